"""LARS where FSDP2 shards every parameter: its norms are those of whole tensors, on any number of processes.

python -m caco_scale.examples.lars_under_fsdp2
torchrun --nproc_per_node 2 -m caco_scale.examples.lars_under_fsdp2
"""

import copy
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import caco_scale

STEPS, BATCH, LR = 5, 32, 2.0


def join() -> torch.device:
    """Join the processes that torchrun started; alone, be the only one."""
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
        return torch.device("cuda")
    dist.init_process_group("gloo")
    return torch.device("cpu")


def main() -> None:
    device = join()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 50), nn.ReLU(), nn.Linear(50, 10)).to(
        device
    )
    alone = copy.deepcopy(model)  # the same model, whole, on the whole batch: what must come out

    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = caco_scale.LARS(model.parameters(), lr=LR)  # after fully_shard, as any optimizer
    reference = caco_scale.LARS(alone.parameters(), lr=LR)

    own = BATCH // dist.get_world_size()
    share = slice(dist.get_rank() * own, (dist.get_rank() + 1) * own)
    for _ in range(STEPS):
        inputs, labels = torch.randn(BATCH, 64, device=device), torch.randint(10, (BATCH,), device=device)
        for network, optim, part in ((model, optimizer, share), (alone, reference, slice(None))):
            optim.zero_grad()
            nn.functional.cross_entropy(network(inputs[part]), labels[part]).backward()
            optim.step()

    worst = 0.0
    for sharded, whole in zip(model.parameters(), alone.parameters(), strict=True):
        assert isinstance(sharded, DTensor)
        worst = max(worst, ((sharded.full_tensor() - whole).norm() / whole.norm()).item())
    if dist.get_rank() == 0:
        print(
            f"{dist.get_world_size()} process(es), {STEPS} steps: relative difference to one process {worst:.1e}"
        )
    assert worst < 1e-5
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
