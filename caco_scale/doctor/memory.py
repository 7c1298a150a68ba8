"""How many bytes a rank needs, estimated before anything is built: what the doctor compares with the machine.

Legend: P parameters of the query encoder (the key encoder has as many), R ranks, K bank rows, D embedding, N global
batch, V views, b images of a micro-batch.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from caco_scale.config import Config
from caco_scale.distributed.blocks import find_blocks
from caco_scale.method.bank_compute import BLOCK_BYTES_GPU, LEAST_QUERIES, TILE_BYTES_GPU
from caco_scale.method.encoders import skeleton
from caco_scale.training.assemble import encoder_around

OPTIMIZER_SLOTS = {"lars": 1, "sgd": 1, "adamw": 2}  # tensors of a parameter's size
PARTITIONED = {  # what each strategy divides by R
    "ddp": (),
    "zero1": ("masters", "optimizer state"),
    "zero2": ("masters", "optimizer state", "gradients"),
    "zero3": ("masters", "optimizer state", "gradients", "parameters"),
    "fsdp2": ("optimizer state", "gradients", "parameters"),
}
OFFLOADED = ("masters", "optimizer state")
GATHERED_ELEMENTS = 100_000_000  # ds_configs/zero3.json: max_live_parameters and prefetch_bucket_size
BUCKET_ELEMENTS = 50_000_000  # ds_configs/zero*.json: reduce_bucket_size, allgather_bucket_size


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank, largest at the end of a step's forward; what libraries and the allocator add is not in it."""

    parameters: int
    masters: int
    gradients: int
    optimizer_state: int
    buffers: int  # communication: parameters gathered for a moment, buckets of gradients
    bank: int
    activations: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def estimate_memory(
    config: Config, strategy: str, world_size: int, micro_batch_size: int, offloaded: bool = False
) -> Estimate:
    """The :class:`Estimate` of a resolved config under a strategy. Of nearly all encoders nothing is allocated.

    ``offloaded``: DeepSpeed's ``offload_optimizer``, with which masters and optimizer state are in the host's memory.
    """
    encoder = _encoder(config)
    counted = max(micro_batch_size, 2)  # BatchNorm refuses a single image; several ranks together have more
    with FakeTensorMode():
        _forget_values(encoder)
        saved = _saved_bytes(config, encoder, counted) * micro_batch_size // counted
    num_parameters = sum(p.numel() for p in encoder.parameters())
    size = 8 if config.precision.compute == "fp64" else 4

    def of(what, elements):
        if offloaded and what in OFFLOADED:
            return 0
        share = world_size if what in PARTITIONED[strategy] else 1
        return -(-elements * size // share)

    buffers = 0
    if strategy.startswith("zero"):
        buffers += 2 * min(num_parameters, BUCKET_ELEMENTS) * size
    if strategy == "zero3":
        buffers += min(num_parameters, GATHERED_ELEMENTS) * size
    if strategy == "fsdp2":  # two units' parameters and one's gradients, whole
        buffers += 3 * _largest_unit(encoder) * size
    return Estimate(
        parameters=of("parameters", 2 * num_parameters),
        masters=of("masters", num_parameters) if strategy.startswith("zero") else 0,
        gradients=of("gradients", num_parameters),
        optimizer_state=of("optimizer state", OPTIMIZER_SLOTS[config.optim.name] * num_parameters),
        buffers=buffers,
        bank=_bank_bytes(config, world_size, size),
        activations=saved * size // 4,
    )


def checkpoint_bytes(config: Config) -> int:
    """Bytes of one checkpoint: both encoders, the optimizer's tensors, the bank's rows and their velocity."""
    parameters = sum(p.numel() for p in _encoder(config).parameters())
    rows = 2 * config.bank.size * config.model.embedding_dim
    size = 8 if config.precision.compute == "fp64" else 4
    return size * (parameters * (2 + OPTIMIZER_SLOTS[config.optim.name]) + rows)


def _encoder(config):
    """As training builds it, of tensors without memory where that can be."""
    model = config.model
    backbone, num_features = skeleton(model.arch, model.stem, model.options, config.data.channels)
    with torch.device("meta"):
        return encoder_around(config, backbone, num_features)


def largest_micro_batch(
    config: Config, strategy: str, world_size: int, estimate: Estimate, room: float, offloaded: bool = False
) -> int | None:
    """The most images per forward that divide a rank's batch and fit into ``room`` bytes; None: none does.

    Args:
        estimate: with the whole batch of a rank, or with a micro-batch that does not fit.
    """
    batch = config.data.global_batch_size // world_size
    micro = min(config.data.micro_batch_size or batch, batch)
    rest, least = estimate.total - estimate.activations, 1 if world_size > 1 else 2  # BatchNorm needs two
    for size in range(micro - 1, least - 1, -1):  # nearly in proportion, so that few are estimated
        may_fit = batch % size == 0 and rest + size * estimate.activations / micro <= room
        if may_fit and estimate_memory(config, strategy, world_size, size, offloaded).total <= room:
            return size
    return None


def _forget_values(module):
    """Put tensors without memory in the place of parameters and buffers (inside a ``FakeTensorMode``)."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty(p.shape))
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def _largest_unit(encoder):
    """Elements of the largest of the parts that FSDP2 gathers at once."""
    units = [sum(p.numel() for p in block.parameters()) for block in find_blocks(encoder)]
    rest = sum(p.numel() for p in encoder.parameters()) - sum(units)
    return max([*units, rest])


def _bank_bytes(config, world_size, size):
    """Rows, velocity and gradient of K/R rows; the gathered batch; a block of exponentials and a tile."""
    most_rows = -(-config.bank.size // world_size)
    rows = most_rows * config.model.embedding_dim
    views = 2 + config.views.num_local_crops
    batch = config.data.global_batch_size * (views + 2) * config.model.embedding_dim
    block = max(BLOCK_BYTES_GPU, LEAST_QUERIES * most_rows * size)
    return (3 * rows + 3 * batch) * size + block + TILE_BYTES_GPU


def _saved_bytes(config, encoder, micro_batch_size):
    """Bytes that the forwards of all views keep for the backward, counted on tensors without memory."""
    own = {p.untyped_storage()._cdata for p in (*encoder.parameters(), *encoder.buffers())}
    seen, block, largest = (
        {},
        None,
        0,
    )  # block: what lies within the one that computes, if it is computed again later

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # held, so that no other storage takes its place
            (seen if block is None else block)[storage._cdata] = storage
        return tensor

    def enter(_, inputs):
        nonlocal block
        for x in inputs:
            keep(x) if isinstance(x, torch.Tensor) else None
        block = {}

    def leave(*_):
        nonlocal block, largest
        largest, block = max(largest, _bytes_of(block)), None

    for part in find_blocks(encoder) if config.model.checkpoint_activations else ():
        part.register_forward_pre_hook(enter)
        part.register_forward_hook(leave)
    bf16 = config.precision.compute == "bf16"
    sizes = [config.views.size] * 2 + [config.views.local_size] * config.views.num_local_crops
    outputs = []  # held: the backward comes after all forwards
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            for size in sizes:
                images = torch.empty(micro_batch_size, config.data.channels, size, size)
                keep(images)
                outputs.append(encoder(images))
    return _bytes_of(seen) + largest


def _bytes_of(storages):
    return sum(storage.nbytes() for storage in storages.values())
