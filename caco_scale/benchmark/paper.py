"""A long run on paper: hours, GPU-hours, bytes a step and an object store's bandwidth, from inputs that it states.

Nothing here is measured by this module. An input is counted (from the model and the method), published, measured by
another benchmark of this package, or an assumption; each says which, and every result can be worked out by hand.

Shapes: N global batch, V query views, R ranks (GPUs), K bank rows, D embedding.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Inputs:
    """What the run on paper rests on. The GPU's speed and the networks are assumptions: put in your own."""

    gpus: int = 32
    gpus_per_node: int = 8
    epochs: int = 800
    batch: int = 4096
    local_crops: int = 0
    images: int = 1_281_167  # ImageNet-1k, published
    image_bytes: int = 110_000  # of a JPEG, ImageNet's mean
    bank_rows: int = 65_536
    embedding: int = 256
    supervised_images_per_second: float = 2_500.0  # one GPU training a ResNet-50 on labels, bf16: ASSUMPTION
    loader_images_per_cpu_second: float = 554.0  # two uint8 views, measured: tests/benchmarks/loader_*.json
    network_bytes_per_second: float = 25e9  # of a GPU between nodes: ASSUMPTION


# Of ResNet-50 with this project's projector, counted: parameters, and channels of all BatchNorm layers.
PARAMETERS = 23_508_032 + 2 * 2048 * 2048 + 4 * 2048 + 2048 * 256
NORM_CHANNELS = 26_560 + 2 * 2048
LOCAL_CROP_COST = (96 / 224) ** 2  # of a forward, by area


def bank_bytes(inputs: Inputs) -> float:
    """Bytes that a rank sends for the sharded bank in one step (rule caco, one block of queries)."""
    n, v, d, r = inputs.batch, 2 + inputs.local_crops, inputs.embedding, inputs.gpus
    share = (r - 1) / r
    gathered = n * (v + 2) * d * 4 * share  # queries and keys
    reduced = 2 * share * (n * 2 * 8 + n * v * 3 * 4)  # packed positives; Z and two similarities
    return gathered + reduced + n * v * d * 4 * share  # and the reduce-scatter of dq


def replicated_bank_bytes(inputs: Inputs) -> float:
    """Bytes that a rank sends to all-reduce the gradient of a replicated bank once."""
    return 2 * (inputs.gpus - 1) / inputs.gpus * inputs.bank_rows * inputs.embedding * 4


def work_out(inputs: Inputs) -> list[dict[str, str]]:
    """Rows ``{"what", "value", "from"}`` of the run on paper."""
    r, share = inputs.gpus, (inputs.gpus - 1) / inputs.gpus
    steps_per_epoch = inputs.images // inputs.batch
    steps = steps_per_epoch * inputs.epochs
    forwards = 2 * 3 + 2 * 1 + inputs.local_crops * 3 * LOCAL_CROP_COST
    rate = inputs.supervised_images_per_second * 3 / forwards  # supervised training is 3 forwards an image
    images_per_second = rate * r
    step_seconds = inputs.batch / images_per_second
    gradients = 2 * share * PARAMETERS * 4
    views = 4 + inputs.local_crops  # forwards that synchronise their statistics
    norms = share * r * NORM_CHANNELS * 2 * 4 * views + 2 * share * NORM_CHANNELS * 2 * 4 * (views - 2)
    bank = bank_bytes(inputs)
    network_seconds = (gradients + norms + bank) / inputs.network_bytes_per_second
    hours = steps * (step_seconds + network_seconds) / 3600
    nodes = r / inputs.gpus_per_node
    epoch_bytes = inputs.images * inputs.image_bytes
    store = images_per_second * inputs.image_bytes
    cores = rate * inputs.gpus_per_node / inputs.loader_images_per_cpu_second

    cost = f"{inputs.supervised_images_per_second:,.0f} supervised x 3 / {forwards:.1f} forwards"
    network = f"ASSUMED {inputs.network_bytes_per_second / 1e9:.0f} GB/s a GPU, nothing overlapped"
    caches = f"{epoch_bytes / 1e9:,.0f} GB to each of {nodes:.0f} nodes in the first epoch, then nothing"
    replicated = replicated_bank_bytes(inputs)
    rows = [
        ("optimizer steps", f"{steps:,}", f"{inputs.epochs} x floor({inputs.images:,} / {inputs.batch:,})"),
        ("images/s of a GPU", f"{rate:,.0f}", f"ASSUMED {cost}"),
        ("seconds a step", f"{step_seconds:.3f} + {network_seconds:.4f}", "compute + exchange"),
        ("share of exchange", f"{network_seconds / (step_seconds + network_seconds):.1%}", network),
        ("hours", f"{hours:,.1f}", "steps x seconds a step"),
        ("GPU-hours", f"{hours * r:,.0f}", f"x {r} GPUs"),
        ("MB a rank sends: gradients", f"{gradients / 1e6:,.1f}", f"counted: {PARAMETERS:,} fp32, a ring"),
        (
            "MB: BatchNorm statistics",
            f"{norms / 1e6:,.1f}",
            f"counted: {NORM_CHANNELS:,} channels, {views} views",
        ),
        ("MB: the sharded bank", f"{bank / 1e6:,.1f}", "formula, equal to the bytes counted above"),
        (
            "MB: a replicated bank",
            f"{replicated / 1e6:,.1f}",
            "its gradient all-reduced once, for comparison",
        ),
        (
            "object store, no cache",
            f"{store / 1e9:.2f} GB/s",
            f"{inputs.image_bytes:,} bytes an image, every epoch",
        ),
        ("object store, node caches", f"{nodes * epoch_bytes / 1e9:,.0f} GB once", caches),
        (
            "loader cores a node",
            f"{cores:.0f}",
            f"{inputs.loader_images_per_cpu_second:.0f} images per CPU second",
        ),
    ]
    return [{"what": what, "value": value, "from": source} for what, value, source in rows]
