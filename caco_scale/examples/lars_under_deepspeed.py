"""LARS in a DeepSpeed loop of one's own: ``lars.attach(engine)`` makes it exact under ZeRO-1, 2 and 3.

    python -m caco_scale.examples.lars_under_deepspeed [STAGE]
    torchrun --nproc_per_node 2 -m caco_scale.examples.lars_under_deepspeed [STAGE]

ZeRO joins the parameters in flat tensors, which have no norm of their own any more. LARS refuses to step them until
attach has told it which part of them is which parameter.
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

import caco_scale
from caco_scale.distributed.launch import import_deepspeed

STEPS, BATCH, LR = 5, 32, 2.0


def main(stage: int = 2) -> None:
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = (
        import_deepspeed()
    )  # as `import deepspeed`, without the kernel that it would compile for a CPU
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 50), nn.ReLU(), nn.Linear(50, 10))
    whole = copy.deepcopy(model)  # the same model, whole, on the whole batch: what must come out
    lars = caco_scale.LARS(model.parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=lars,
        config={
            "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # DeepSpeed clips at a norm of 1 otherwise
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    lars.attach(engine)

    whole.to(engine.device)
    reference = caco_scale.LARS(whole.parameters(), lr=LR)
    own = BATCH // dist.get_world_size()
    share = slice(dist.get_rank() * own, (dist.get_rank() + 1) * own)
    for _ in range(STEPS):
        inputs = torch.randn(BATCH, 64, device=engine.device)
        labels = torch.randint(10, (BATCH,), device=engine.device)
        engine.backward(nn.functional.cross_entropy(engine(inputs[share]), labels[share]))
        engine.step()
        reference.zero_grad()
        nn.functional.cross_entropy(whole(inputs), labels).backward()
        reference.step()

    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        pairs = zip(parameters, whole.parameters(), strict=True)
        worst = max(((p - w).norm() / w.norm()).item() for p, w in pairs)
    if dist.get_rank() == 0:
        print(
            f"ZeRO-{stage}, {dist.get_world_size()} process(es), {STEPS} steps: "
            f"relative difference to one process {worst:.1e}"
        )
    assert worst < 1e-5
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
