"""Every default of a run, and how a recipe and flags become one frozen :class:`Config`.

A recipe is a YAML file with the sections below (``caco_scale/recipes/*.yaml``, or a path); flags are the dotted
field names and win over the recipe. The docstring under a field is its ``--help`` line and gives its unit.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
import yaml

from caco_scale import flags
from caco_scale.errors import UserError, did_you_mean, one_line

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class Run:
    dir: str = ""
    """Run directory; empty = runs/<recipe>."""
    seed: int = 0
    """Seed of the data order, the augmentation, the initial weights and the bank."""
    world_size: int = 0
    """Number of processes that training must see (asserted); 0 = unchecked."""
    max_steps: int = 0
    """Stop after this many optimizer steps in all, bank warm-up included; 0 = the whole schedule."""
    max_skipped: int = 3
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    log_every: int = 50
    """Optimizer steps between two lines of metrics; 0 = off."""
    save_every: int = 1000
    """Optimizer steps between two checkpoints (one more at the end and on a signal); 0 = only those."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep; 0 = all."""
    stop_before_end_seconds: float = 60
    """Seconds before the end of a SLURM job, beyond a step and two saves, at which the run stops itself; 0 = off."""
    timeout_seconds: float = 1800
    """Seconds to wait for another process in one exchange, or for a batch of the loader; then the run ends as hung."""
    profile_steps: int = 0
    """Steps to measure after the first few: a trace and a table of their parts in run.dir/profile; 0 = none."""
    resume: str = "auto"
    """auto (newest complete checkpoint of run.dir, else a fresh start), never, or the path of a checkpoint."""


@dataclass(frozen=True)
class Data:
    shards: str = ""
    """Shard set to train on: the directory, s3://, gs://, az:// or https:// address that holds manifest.json."""
    val_shards: str = ""
    """Shard set for the kNN evaluation; empty = none."""
    global_batch_size: int = 1024
    """Images per optimizer step over all processes."""
    micro_batch_size: int = 0
    """Images per forward on one process (gradient accumulation); 0 = the process's whole share."""
    workers: int = 4
    """Loader processes per training process; 0 = load in the training process."""
    max_corrupt: float = 0.001
    """Share of undecodable images above which the run stops (each is replaced and reported)."""
    cache_dir: str = "auto"
    """Where a node keeps whole shards of an object store; auto = in its temporary directory, none = nowhere."""
    cache_bytes: int = 0
    """Most bytes that the cache takes; 0 = four fifths of what is free on its disk."""
    retries: int = 8
    """Failed attempts in a row, with growing pauses, after which an object store counts as unreachable."""
    stall_seconds: float = 30
    """Seconds without a byte after which a read of an object store has failed and is tried again."""
    lanes: int = 0
    """Parts of the epoch that every global batch draws from; 0 = largest divisor of the batch up to 64."""
    window: int = 4096
    """Images shuffled together within a lane."""
    audit: str = ""
    """File that receives the keys of every image trained on, per step (ranks above 0: FILE.rank<R>)."""


@dataclass(frozen=True)
class Views:
    size: int = 224
    """Pixels on a side of the two global views."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that a global crop takes: least, most."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue."""
    jitter_p: float = 0.8
    """Probability of the colour jitter."""
    grayscale_p: float = 0.2
    """Probability of greyscale."""
    blur_p: tuple[float, float] = (1.0, 0.1)
    """Probability of Gaussian blur in view 1 and view 2."""
    solarize_p: tuple[float, float] = (0.0, 0.2)
    """Probability of solarization in view 1 and view 2."""
    num_local_crops: int = 0
    """Local crops besides the two global views (multi-crop)."""
    local_size: int = 96
    """Pixels on a side of a local crop."""
    local_scale: tuple[float, float] = (0.05, 0.14)
    """Share of the image's area that a local crop takes: least, most."""
    local_blur_p: float = 0.5
    """Probability of Gaussian blur in a local crop."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue on a scale of 0 to 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue on a scale of 0 to 1."""


@dataclass(frozen=True)
class Model:
    arch: str = "resnet50"
    """Backbone: a torchvision ResNet's name, vit_b_16, or tiny."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layer of a ResNet: imagenet (7x7, stride 2, max-pool) or cifar (3x3, no max-pool)."""
    projector_hidden: int = 2048
    """Width of the projector's two hidden layers."""
    embedding_dim: int = 256
    """Size of an embedding and of a bank row."""


@dataclass(frozen=True)
class Bank:
    size: int = 65536
    """Rows of the bank (learnable positives and negatives)."""
    rule: Literal["caco", "adco", "moco"] = "caco"
    """caco (positives and negatives learned), adco (negatives learned), moco (a queue of keys)."""
    exchange: Literal["statistics", "logits"] = "statistics"
    """What ranks exchange: exact softmax statistics, or whole rows of logits (equal result, heavy)."""
    kernel: Literal["torch", "triton"] = "torch"
    """How the bank computes: torch (chunks), or Triton kernels on CUDA (README, "How fast")."""
    kernel_inputs: Literal["fp32", "tf32", "bf16"] = "tf32"
    """Number format that the Triton kernels' matrix products read (their sums are fp32)."""
    temperature: float = 0.08
    """Temperature of the bank's gradient."""
    lr: float = 3.0
    """Learning rate of the bank rows, absolute."""
    momentum: float = 0.9
    """Momentum of the bank rows."""
    warmup_epochs: int = 0
    """Epochs of bank warm-up (MoCo steps that fill the rows with keys); at least ceil(size/batch) steps for caco."""
    warmup_ramp_steps: int = 0
    """Steps over which the learning rate rises in the bank warm-up; 0 = full rate at once."""
    warmup_temperature: float = 0.2
    """Temperature of the bank warm-up."""


@dataclass(frozen=True)
class Loss:
    temperature: float = 0.08
    """Temperature of the encoder's loss."""


@dataclass(frozen=True)
class Optim:
    name: Literal["lars", "sgd", "adamw"] = "lars"
    """Optimizer of the query encoder."""
    lr: float = 0.3
    """Learning rate per 256 images of the global batch."""
    epochs: int = 200
    """Epochs of the main schedule (the bank warm-up comes before them)."""
    warmup_epochs: float = 10
    """Epochs of linear learning-rate warm-up at the start of the main schedule."""
    weight_decay: float = 1.5e-6
    """Weight decay of parameters with two or more dimensions."""


@dataclass(frozen=True)
class Ema:
    momentum: float = 0.99
    """Momentum of the key encoder at the start; it rises to 1 by a cosine."""


@dataclass(frozen=True)
class Precision:
    compute: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """Number format of the forward pass; auto = bf16 on CUDA, fp32 on CPU. Parameters stay fp32 (fp64: all)."""
    compile: bool = False
    """Compile the encoders and the augmentation with torch.compile."""
    channels_last: bool = True
    """Give the encoders channels_last inputs on CUDA."""


@dataclass(frozen=True)
class Eval:
    knn_every: int = 0
    """Data epochs between two kNN evaluations on data.val_shards (one more at the end); 0 = off."""
    knn_k: int = 20
    """Neighbours that vote."""
    knn_temperature: float = 0.2
    """Temperature of the votes' weights."""
    baselines: bool = False
    """Before the first step, also evaluate raw pixels and the untrained encoder."""


@dataclass(frozen=True)
class Config:
    """Pre-train an image encoder with CaCo (arXiv:2203.14370)."""

    recipe: tyro.conf.Suppress[str] = "demo"
    """Name of the recipe that these values started from."""
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    views: Views = field(default_factory=Views)
    model: Model = field(default_factory=Model)
    bank: Bank = field(default_factory=Bank)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    ema: Ema = field(default_factory=Ema)
    precision: Precision = field(default_factory=Precision)
    eval: Eval = field(default_factory=Eval)


# Fields that a resumed run may change: none of them changes what is computed (data.micro_batch_size changes only
# the micro-batches of BatchNorm; bank.exchange is exact either way; the data's content is held by its fingerprint).
FREE_ON_RESUME = {
    *(
        "recipe",
        "data.shards",
        "data.val_shards",
        "data.workers",
        "data.micro_batch_size",
        "data.max_corrupt",
    ),
    *("data.cache_dir", "data.cache_bytes", "data.retries", "data.stall_seconds"),
    *("data.audit", "bank.exchange", "precision.compile", "precision.channels_last"),
    *(f"run.{f.name}" for f in dataclasses.fields(Run) if f.name != "seed"),
    *(f"eval.{f.name}" for f in dataclasses.fields(Eval)),
}


def flatten(config):
    """``{"section.field": value}`` of a Config, in its order."""
    flat = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{f.name}.{g.name}": getattr(value, g.name) for g in dataclasses.fields(value)}
        else:
            flat[f.name] = value
    return flat


def replace(config, **changes):
    """A copy with some ``section__field=value`` changed."""
    for name, value in changes.items():
        section, key = name.split("__")
        part = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def recipe_names():
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def makes_its_data(config):
    """Is it a demo, or a baseline of it, on the demo's own images, which the command builds?"""
    return config.recipe.split("_")[0] == "demo" and config.data.shards == load_recipe("demo").data.shards


def load_recipe(name):
    """The Config of a recipe's name or of a YAML file's path."""
    path = RECIPES / f"{name}.yaml"
    if not path.exists():
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"no recipe {name!r}{did_you_mean(name, recipe_names())}: give one of {', '.join(recipe_names())}, "
                "or the path of a YAML file"
            )
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no sections (run:, data:, bank: ...)")
    config = _from_dict(Config, values, str(path))
    return config if "recipe" in values else dataclasses.replace(config, recipe=path.stem)


def _from_dict(cls, values, source, prefix=""):
    types = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in types:
            names = flatten(Config()) if prefix else types
            raise UserError(f"{source}: unknown field {prefix}{key}{did_you_mean(prefix + str(key), names)}")
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise UserError(f"{source}: {key} is a section, not a value ({value!r})")
            arguments[key] = _from_dict(types[key], value, source, f"{key}.")
        else:
            arguments[key] = _coerce(value, types[key], f"{source}: {prefix}{key}")
    return cls(**arguments)


def _coerce(value, kind, where):
    """A YAML value as the field's type; the wrong type is an error (YAML reads 1e-6 as a string)."""
    wrong = UserError(f"{where} is {value!r}, which is not {getattr(kind, '__name__', kind)}")
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            raise UserError(f"{where} is {value!r}: give {len(kinds)} numbers")
        return tuple(_coerce(v, k, where) for v, k in zip(value, kinds, strict=True))
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"{where} is {value!r}: give one of {', '.join(typing.get_args(kind))}")
        return value
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise wrong from None
    if type(value) is not kind:
        raise wrong
    return value


def parse(arguments, prog="python -m caco_scale.pretrain", own=None):
    """Recipe and flags, as typed on a command line, to a checked Config; with ``own`` to (Config, an ``own``).

    Args:
        arguments: ``[RECIPE] [--section.field value ...]``; no recipe means ``demo``.
        own: a dataclass of flags that the command has besides the recipe's.
    Raises:
        UserError: unknown recipe or flag (naming the nearest), a value of the wrong type or out of range.
    """
    arguments = list(arguments)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "demo"
    config = load_recipe(name)
    if not config.run.dir:
        config = replace(config, run__dir=f"runs/{config.recipe}")
    recipes = (
        f"RECIPE: {', '.join(recipe_names())}, or the path of a YAML file. "
        f"The values below are those of {config.recipe}."
    )
    if own is None:
        config = flags.read(Config, arguments, prog, default=config, about=recipes, usage="[RECIPE]")
        check(config)
        return config
    about = f"{own.__doc__} {recipes}"
    config, options = flags.read_both(
        Config, own, arguments, prog, default=config, about=about, usage="[RECIPE]"
    )
    check(config)
    return config, options


def check(config):
    """Refuse values that no run can have; what depends on data or world size is checked where those are known."""
    flat = flatten(config)
    positive = (
        *("data.global_batch_size", "views.size", "views.local_size", "model.projector_hidden"),
        *("model.embedding_dim", "bank.size", "bank.temperature", "bank.warmup_temperature"),
        *("loss.temperature", "optim.epochs", "data.window", "run.max_skipped", "eval.knn_k"),
        *("eval.knn_temperature", "data.stall_seconds", "run.timeout_seconds"),
    )
    for name in positive:
        if flat[name] <= 0:
            raise UserError(f"{name} is {flat[name]}: give a number above 0")
    for name, value in flat.items():
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, int | float) and not 0 <= number < float("inf"):
                raise UserError(f"{name} is {value}: give a number from 0 up")
        if name.endswith("_p") and max(numbers) > 1:
            raise UserError(f"{name} is {value}: a probability is at most 1")
    for name in ("bank.momentum", "ema.momentum"):
        if flat[name] > 1:
            raise UserError(f"{name} is {flat[name]}: a momentum is at most 1")
    for name in ("views.scale", "views.local_scale"):
        low, high = flat[name]
        if not 0 < low <= high <= 1:
            raise UserError(f"{name} is {low} {high}: give two shares of the area, 0 < least <= most <= 1")
    if config.run.seed >= 2**63:
        raise UserError(f"run.seed is {config.run.seed}: give a number below 2^63")
    if config.optim.warmup_epochs >= config.optim.epochs:
        raise UserError(
            f"optim.warmup_epochs {config.optim.warmup_epochs:g} must be below optim.epochs {config.optim.epochs}"
        )


def differences(saved, config):
    """Fields that a resume must not change and that differ: ``["bank.size: 65536 -> 4096", ...]``."""
    now = flatten(config)
    return [
        f"{name}: {value} -> {now[name]}"
        for name, value in flatten(saved).items()
        if name not in FREE_ON_RESUME and value != now[name]
    ]


def to_dict(config):
    """The whole resolved config as nested plain values, as YAML and JSON take them."""
    return {
        name: {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in dataclasses.asdict(config).items()
    }


def from_dict(values, source):
    """The Config of :func:`to_dict`'s values (``source`` names them in errors)."""
    return _from_dict(Config, values, source)


def to_yaml(config):
    """The whole resolved config as YAML; itself a recipe that reproduces the run."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
