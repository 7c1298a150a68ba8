"""Build the parts of a run from its config: data and its order, views, schedule, encoders. The commands share them.

Shapes: N global batch, B this rank's share of it, b a micro-batch, H pixels.
"""

from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from caco_scale import config as configuration
from caco_scale.config import Config
from caco_scale.data.augment import augment
from caco_scale.data.augment_cpu import absent
from caco_scale.data.counters import Counters
from caco_scale.data.in_memory import DecodedImages, Memory, decoded_bytes, memory_here, room_for
from caco_scale.data.listed_files import Listings
from caco_scale.data.loader import Batch, train_batches
from caco_scale.data.mixed_order import MixedOrder
from caco_scale.data.object_store import RetryPolicy
from caco_scale.data.order import Order, share_size
from caco_scale.data.pixels import Pixels
from caco_scale.data.store import open_store
from caco_scale.data.store.base import Store
from caco_scale.data.store.mixed import MixedStore
from caco_scale.data.views import ViewSpec
from caco_scale.distributed.collectives import from_rank_0, gather_objects
from caco_scale.distributed.compilation import lacking, reason_against
from caco_scale.distributed.recompute import recompute_blocks
from caco_scale.distributed.strategies import build as strategies
from caco_scale.distributed.strategies.base import Strategy
from caco_scale.distributed.syncbn import convert_sync_batchnorm
from caco_scale.method.bank import ShardedBank
from caco_scale.method.encoders import build_backbone, takes_views_at_once
from caco_scale.method.model import Encoder, QueryKeyModel
from caco_scale.method.projector import build_predictor, build_projector
from caco_scale.optim.build import build_optimizer, init_optimizer_state
from caco_scale.optim.schedule import Schedule
from caco_scale.run.profiling import part
from caco_scale.training.places import evaluates, mixed
from caco_scale.weights.start import StartingWeights


def make_data(config: Config, accelerator: Accelerator) -> None:
    """Build the demo's data where the config asks for it and it is not there. Collective."""
    if configuration.makes_its_data(config):
        if accelerator.is_main_process:
            from data_prep.demo import build_demo

            build_demo(Path(config.data.shards).parent)
        accelerator.wait_for_everyone()


def resolve_precision(config: Config, device: torch.device, strategy: str = "ddp") -> tuple[Config, str]:
    """The config with every ``auto`` of ``precision`` settled, and a line for users. Collective: ranks decide alike.

    ``compute``: bf16 on CUDA, fp32 on a CPU. ``compile``: true on CUDA, unless there is a :func:`reason_against` it, or
    a rank lacks what it takes.
    """
    compute, compiled, why = config.precision.compute, config.precision.compile, ""
    if compute == "auto":
        compute = "bf16" if device.type == "cuda" else "fp32"
    lacks = next(filter(None, gather_objects(lacking(device.type))), None)
    if compiled == "auto":
        recomputes = config.model.checkpoint_activations
        reason = reason_against(device.type, strategy, recomputes, compute == "fp64", lacks)
        compiled, why = ("false", f" (auto: {reason})") if reason else ("true", "")
    how = "compiled: the first steps take minutes" if compiled == "true" else f"not compiled{why}"
    config = configuration.replace(config, precision__compute=compute, precision__compile=compiled)
    return config, f"precision {compute}, {how}"


def is_compiled(config: Config) -> bool:
    """Whether a config of :func:`resolve_precision` compiles."""
    return config.precision.compile == "true"


def open_training(
    config: Config,
    counters: Counters | None = None,
    listings: Listings | None = None,
    flag: str = "data.shards",
) -> Store:
    """The training images, of one set or of several; ``counters``, ``listings``, ``flag``: of :func:`open_store`."""
    counters, mix = counters or Counters(), mixed(config)
    more: dict[str, Any] = {"counters": counters, "listings": listings, "pixels": pixels_of(config)}
    if not mix:
        return open_store(config.data.shards, *_ways(config), flag=flag, **more)
    stores = [open_store(place, *_ways(config), flag="data.mix", **more) for place, _ in mix]
    return MixedStore(stores, counters)


def training_order(config: Config, store: Store) -> Order:
    """The order of the images of :func:`open_training`. UserError: fewer than a batch."""
    data = config.data
    options: dict[str, Any] = {"seed": config.run.seed, "global_batch_size": data.global_batch_size}
    options |= {"lanes": data.lanes, "window": data.window}
    if not isinstance(store, MixedStore):
        return Order(store.manifest.shards.counts, **options)
    counts = [one.manifest.shards.counts for one in store.stores]
    weights = [weight for _, weight in mixed(config)]
    return MixedOrder([one.url for one in store.stores], counts, weights, **options)


def open_validation(
    config: Config, counters: Counters | None = None, listings: Listings | None = None
) -> Store | None:
    """The images of the evaluation while training, if there is one."""
    if not evaluates(config):
        return None
    more: dict[str, Any] = {"labelled": True, "flag": "data.val_shards", "counters": counters}
    return open_store(
        config.data.val_shards, *_ways(config), **more, listings=listings, pixels=pixels_of(config)
    )


def pixels_of(config: Config) -> Pixels:
    """What the images of a run are decoded to."""
    return Pixels(config.data.channels, config.data.bits)


def _ways(config):
    """How the images of an object store come here."""
    data = config.data
    return data.cache_dir, data.cache_bytes, RetryPolicy(data.retries, data.stall_seconds)


class TrainingData:
    """The shard set, its order, and this rank's part of it; what is refused of them: ``checks.py``.

    Raises:
        UserError: no shard set, fewer images than a batch, a batch that the processes do not divide.
    """

    def __init__(self, config: Config, rank: int, world_size: int, listings: Listings | None = None):
        self.config, self.rank, self.world_size = config, rank, world_size
        data = config.data
        self.counters = Counters()  # what both stores and their workers did
        self.store = open_training(config, self.counters, listings)
        self.order = training_order(config, self.store)
        self.fingerprint = self.order.fingerprint(self.store.manifest.shards.sha256s)
        self.val_store = open_validation(config, self.counters, listings)
        self.batch_size = share_size(data.global_batch_size, world_size)
        self.micro_batch_size = min(data.micro_batch_size or self.batch_size, self.batch_size)
        self.room, self.room_note = 0, None  # of :meth:`make_room`

    def make_room(self) -> None:
        """Settle how many bytes of decoded images :meth:`batches` may keep. Collective, of ranks with the same set.

        The same on all ranks: they go by the fullest node, and by what rank 0, which alone looks, finds in the set.

        Raises:
            UserError: on every rank, where ``data.in_memory`` asks for more than that node has.
        """
        if self.config.data.in_memory == "false":
            return
        processes, free = zip(*gather_objects(memory_here()), strict=True)
        fullest, estimate = Memory(max(processes), min(free)), partial(decoded_bytes, self.store)
        self.room, self.room_note = room_for(
            self.store, self.config.data.in_memory, fullest, partial(from_rank_0, estimate)
        )

    def batches(
        self, start: int, end: int, stop: Callable[[], object] = bool
    ) -> Generator[Batch, None, None]:
        """This rank's :class:`~caco_scale.data.loader.Batch` of every step from ``start`` up to ``end``.

        ``stop``: of :func:`~caco_scale.data.workers.stream`.
        """
        again = end - start > self.order.steps_per_epoch  # else no image comes twice
        return train_batches(
            self.store,
            self.order,
            view_specs(self.config.views, self.config.data.channels),
            rank=self.rank,
            world_size=self.world_size,
            start_step=start,
            num_steps=end,
            seed=self.config.run.seed,
            workers=self.config.data.workers,
            stop=stop,
            images=DecodedImages(self.order.num_samples, self.room, self.store.pixels)
            if self.room and again
            else None,
        )


def view_specs(views: configuration.Views, channels: int = 3) -> list[ViewSpec]:
    """The global views and the local crops, in the order of a step, as the loader takes them.

    Of other than three channels without what :data:`COLOUR_ONLY` names.
    """
    is_colour = channels == 3
    jitter = views.jitter if is_colour else (*views.jitter[:2], 0.0, 0.0)
    grayscale_p = views.grayscale_p if is_colour else 0.0
    spec = partial(ViewSpec, jitter=jitter, jitter_p=views.jitter_p, grayscale_p=grayscale_p)
    global_views = [
        spec(size=views.size, scale=views.scale, blur_p=blur, solarize_p=solarize if is_colour else 0.0)
        for blur, solarize in zip(views.blur_p, views.solarize_p, strict=True)
    ]
    local = spec(size=views.local_size, scale=views.local_scale, blur_p=views.local_blur_p)
    return global_views + [local] * views.num_local_crops


COLOUR_ONLY = "saturation, hue, greyscale and solarization"


def channel_notes(config: Config) -> list[str]:
    """What a run on other than three channels does otherwise, a line each; and a normalisation that is neutral."""
    channels, views = config.data.channels, config.views
    notes = [] if channels == 3 else [f"data.channels {channels}: {COLOUR_ONLY} are off in the views"]
    if set(views.mean) == set(views.std) == {configuration.NEUTRAL}:
        notes.append(
            f"views.mean and views.std are {configuration.NEUTRAL} for each of {channels} channel(s)"
        )
    return notes


class MicroBatches:
    """A batch's augmented views, one micro-batch at a time: lists of (b, C, H, H), where the batch is.

    ``augment``: of :func:`build_augment`. ``channels_last``: of :mod:`~caco_scale.data.augment`.
    """

    def __init__(
        self,
        batch: Batch,
        size: int,
        augment: Callable,
        dtype: torch.dtype,
        views: configuration.Views,
        channels_last: bool = False,
    ):
        self._batch, self._size, self._augment = batch, size, augment
        self._how = {"mean": views.mean, "std": views.std, "dtype": dtype, "channels_last": channels_last}

    def __len__(self) -> int:
        return len(self._batch.keys) // self._size

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for start in range(0, len(self._batch.keys), self._size):
            rows = slice(start, start + self._size)
            with part("augmentation"):
                views = [
                    self._augment(crops[rows], {name: p[rows] for name, p in params.items()}, **self._how)
                    for crops, params in zip(self._batch.crops, self._batch.params, strict=True)
                ]
            yield views


def build_augment(config: Config, backend: str = "inductor") -> Callable:
    """``augment``; with ``precision.compile`` compiled once for each size of view, to few passes over the images."""
    return torch.compile(augment, backend=backend, dynamic=False) if is_compiled(config) else augment


def augmentation_note(config: Config, device: torch.device) -> str | None:
    """A line where views are augmented slowly for want of compiled code (``data/augment_cpu.py``), else None."""
    fused = device.type == "cpu" and not is_compiled(config) and config.precision.compute != "fp64"
    return absent() if fused else None


def build_schedule(config: Config, steps_per_epoch: int) -> Schedule:
    """The schedule of a config over data of so many steps an epoch."""
    return Schedule(
        global_batch_size=config.data.global_batch_size,
        steps_per_epoch=steps_per_epoch,
        epochs=config.optim.epochs,
        base_lr=config.optim.lr,
        lr_warmup_epochs=config.optim.warmup_epochs,
        bank_size=config.bank.size,
        bank_rule=config.bank.rule,
        bank_lr=config.bank.lr,
        bank_warmup_epochs=config.bank.warmup_epochs,
        bank_warmup_ramp_steps=config.bank.warmup_ramp_steps,
        temperature=config.loss.temperature,
        bank_temperature=config.bank.temperature,
        key_momentum=config.ema.momentum,
        warmup_temperature=config.bank.warmup_temperature,
    )


def build_encoder(config: Config) -> Encoder:
    """Backbone, projector and, if any, predictor as ``config.model`` says, with random weights."""
    model = config.model
    return encoder_around(
        config, *build_backbone(model.arch, model.stem, model.options, config.data.channels)
    )


def encoder_around(config: Config, backbone: nn.Module, num_features: int) -> Encoder:
    """The config's projector and predictor behind a backbone of F features."""
    dim, hidden = config.model.embedding_dim, config.model.projector_hidden
    projector, wanted = build_projector(num_features, hidden, dim), config.model.predictor
    has_predictor = wanted == "mlp" or (wanted == "auto" and config.bank.rule == "nnclr")
    return Encoder(backbone, projector, build_predictor(dim, hidden) if has_predictor else None)


def build_model(config: Config, weights: StartingWeights | None = None) -> QueryKeyModel:
    """Query and key encoder with seeded weights, the same on every rank and at every world size.

    ``weights``: what both backbones start from instead.
    """
    torch.manual_seed(config.run.seed)
    encoder = build_encoder(config)
    if weights is not None:
        weights.fill(encoder.backbone)
    at_once = crops_at_once(config, encoder.backbone)
    if at_once:
        convert_sync_batchnorm(encoder, alone=True)
    autocast_dtype = torch.bfloat16 if config.precision.compute == "bf16" else None
    model = QueryKeyModel(encoder, crops_at_once=at_once, autocast_dtype=autocast_dtype)
    return model.to(parameter_dtype(config))


def crops_at_once(config: Config, backbone: nn.Module) -> bool:
    """Whether local crops pass the query encoder in one forward; not where memory is saved block by block."""
    several, model = config.views.num_local_crops > 1, config.model
    saves = model.checkpoint_activations
    return several and not saves and takes_views_at_once(model.arch, model.options, backbone)


def build_strategy(
    config: Config, name: str, accelerator: Accelerator, weights: StartingWeights | None = None
) -> Strategy:
    """The strategy ``name`` around the config's model, with the config's optimizer and its first state. Collective.

    ``weights``: of :func:`build_model`.
    """
    model = build_model(config, weights)
    if config.model.checkpoint_activations:
        recompute_blocks(model.query)  # the key encoder has no backward
    strategy = strategies.build_strategy(
        name,
        accelerator,
        model,
        partial(build_optimizer, config.optim.name, weight_decay=config.optim.weight_decay),
        is_compiled(config),
    )
    init_optimizer_state(strategy.optimizer, strategy.partitions)
    return strategy


def build_bank(config: Config, device: torch.device) -> ShardedBank:
    """This rank's rows of the config's bank, random ones."""
    return ShardedBank(
        config.bank.size,
        config.model.embedding_dim,
        momentum=config.bank.momentum,
        device=device,
        dtype=parameter_dtype(config),
        seed=config.run.seed,
        exchange=config.bank.exchange,
        kernel=config.bank.kernel,
        kernel_inputs=config.bank.kernel_inputs,
    )


def parameter_dtype(config: Config) -> torch.dtype:
    """Of parameters, bank and images; bf16 is the forward's alone."""
    return torch.float64 if config.precision.compute == "fp64" else torch.float32
