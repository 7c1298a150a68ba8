"""Every default of a run: one frozen dataclass a section, each field with its type, rule, unit and help.

The docstring under a field is its ``--help`` line. ``Free``: a resumed run may change it, for it changes nothing of
what is computed (``data.micro_batch_size`` changes only the micro-batches of BatchNorm; ``bank.exchange`` is exact
either way; the data's content is held by its fingerprint).
"""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from caco_scale.flags.choices import (
    AutoSwitch,
    BankExchange,
    BankKernel,
    BankRule,
    Compute,
    Finish,
    KernelInputs,
    Optimizer,
    Predictor,
    Stats,
    Stem,
)
from caco_scale.flags.rules import (
    Amount,
    AreaRange,
    Bits,
    Channels,
    Count,
    FloatOrAuto,
    Free,
    IntOrAuto,
    Mix,
    Momentum,
    Options,
    Pixels,
    Place,
    PositiveFloat,
    PositiveInt,
    Probability,
    Seconds,
    Seed,
    Share,
    Size,
    Source,
    Words,
    Workers,
    at_most,
)


@dataclass(frozen=True)
class Run:
    dir: Free[Place] = ""
    """Run directory, default runs/<recipe>; on a file system that all machines share, not in an object store."""
    seed: Seed = 0
    """Seed of the data order, the augmentation, the initial weights and the bank."""
    world_size: Free[Count] = 0
    """Number of processes that training must see (asserted); 0 = unchecked."""
    max_steps: Free[Count] = 0
    """Stop after this many optimizer steps in all, bank warm-up included; 0 = the whole schedule."""
    max_skipped: Free[PositiveInt] = 3
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    log_every: Free[Count] = 50
    """Optimizer steps between two lines of metrics; 0 = off."""
    save_every: Free[Count] = 1000
    """Optimizer steps between two checkpoints (one more at the end and on a signal); 0 = only those."""
    keep_checkpoints: Free[Count] = 3
    """Newest checkpoints to keep; 0 = all."""
    stop_before_end_seconds: Free[Annotated[Amount, at_most(10**7)]] = 60
    """Seconds before the end of a SLURM job, beyond a step and two saves, at which the run stops itself; 0 = off."""
    timeout_seconds: Free[Seconds] = 1800
    """Seconds to wait for a process in one exchange, a batch, or the disk of run.dir; then the run ends as hung."""
    trackers: Free[Words] = ()
    """Trackers of accelerate's beside TensorBoard: wandb, mlflow, comet_ml (offline by default), ...; none = none."""
    finish: Free[Finish] = "all"
    """Written into run.dir at the end: all, export (backbone.safetensors, model card), report (report.html), none."""
    profile_steps: Free[Count] = 0
    """Steps to measure after the first few: a trace and a table of their parts in run.dir/profile; 0 = none."""
    resume: Free[Place] = "auto"
    """auto (newest complete checkpoint of run.dir, else a fresh start), never, or the path of a run or a checkpoint."""


@dataclass(frozen=True)
class Data:
    shards: Free[str] = ""
    """What to train on: images in a folder, a list (.csv, .tsv, .parquet), parquet files, or a shard set's address."""
    mix: Free[Mix] = ()
    """In place of data.shards several sets, each with its weight: ADDRESS=WEIGHT ... (in a recipe also a section)."""
    val_shards: Free[str] = ""
    """Images of the kNN evaluation, as data.shards, with classes as in training; empty = none."""
    relist: Free[bool] = False
    """List the files of a set again at a resume, and go on with what is there now, as a new data set."""
    channels: Channels = 3
    """Channels of every image; of other than 3, hue, saturation, greyscale and solarization are off."""
    bits: Bits = 8
    """Bits of every channel: 8 or 16."""
    global_batch_size: IntOrAuto[Size] = 1024
    """Images per optimizer step over all processes; auto = by the number of images (config/fit.py)."""
    micro_batch_size: Free[Count] = 0
    """Images per forward on one process (gradient accumulation); 0, or more than it has = its whole share."""
    workers: Free[IntOrAuto[Workers]] = 4
    """Loader processes per training process; 0 = load in the training process, auto = by the cores of the machine."""
    max_corrupt: Free[Share] = 0.001
    """Share of undecodable images above which the run stops (each is replaced and reported)."""
    cache_dir: Free[Place] = "auto"
    """Where a node keeps whole shards of an object store; auto = in its temporary directory, none = nowhere."""
    cache_bytes: Free[Count] = 0
    """Most bytes that the cache takes; 0 = four fifths of what is free on its disk."""
    in_memory: Free[AutoSwitch] = "auto"
    """Whether decoded images stay in memory: true, false, or auto (if they take less than a gigabyte of a node)."""
    retries: Free[Count] = 8
    """Failed attempts in a row, with growing pauses, after which an object store counts as unreachable."""
    stall_seconds: Free[Seconds] = 30
    """Seconds without a byte after which a read of an object store has failed and is tried again."""
    lanes: Count = 0
    """Parts of the epoch that every global batch draws from; 0 = largest divisor of the batch up to 64."""
    window: Size = 4096
    """Images shuffled together within a lane."""
    audit: Free[Place] = ""
    """File that receives the keys of every image trained on, per step (ranks above 0: FILE.rank<R>)."""


@dataclass(frozen=True)
class Views:
    size: Pixels = 224
    """Pixels on a side of the two global views."""
    scale: AreaRange = (0.2, 1.0)
    """Share of the image's area that a global crop takes: least, most."""
    jitter: tuple[Amount, Amount, Amount, Amount] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue."""
    jitter_p: Probability = 0.8
    """Probability of the colour jitter."""
    grayscale_p: Probability = 0.2
    """Probability of greyscale."""
    blur_p: tuple[Probability, Probability] = (1.0, 0.1)
    """Probability of Gaussian blur in view 1 and view 2."""
    solarize_p: tuple[Probability, Probability] = (0.0, 0.2)
    """Probability of solarization in view 1 and view 2."""
    num_local_crops: Annotated[Count, at_most(1024)] = 0
    """Local crops besides the two global views (multi-crop)."""
    local_size: Pixels = 96
    """Pixels on a side of a local crop."""
    local_scale: AreaRange = (0.05, 0.14)
    """Share of the image's area that a local crop takes: least, most."""
    local_blur_p: Probability = 0.5
    """Probability of Gaussian blur in a local crop."""
    mean: tuple[Amount, ...] = (0.485, 0.456, 0.406)
    """Mean of every channel on a scale of 0 to 1; the default stands for 0.5 each where channels are not 3."""
    std: tuple[PositiveFloat, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of every channel on a scale of 0 to 1; as views.mean."""
    stats: Stats = "given"
    """Where mean and std come from: given (the two fields above), or measure (on training images, at a fresh start)."""


@dataclass(frozen=True)
class Model:
    arch: str = "resnet50"
    """Backbone: a torchvision classification model's name, timm/NAME, package.module:callable of yours, or tiny."""
    options: Options = ()
    """Keyword arguments of the backbone: NAME=VALUE ... (in a recipe also a section)."""
    weights: Source = ""
    """What both encoders' backbones start from: a run, a checkpoint, a file or directory of weights, or
    hf://USER/NAME[@REVISION] of the Hugging Face hub; empty = random."""
    checkpoint_activations: Free[bool] = False
    """Compute the blocks of the query encoder twice instead of keeping their activations: less memory, more time."""
    stem: Stem = "imagenet"
    """First layer of a ResNet: imagenet (7x7, stride 2, max-pool) or cifar (3x3, no max-pool)."""
    projector_hidden: Size = 2048
    """Width of the projector's two hidden layers."""
    embedding_dim: Size = 256
    """Size of an embedding and of a bank row."""
    predictor: Predictor = "auto"
    """Predictor behind the query encoder's projector, as wide as that: mlp, none, or auto (mlp for the rule nnclr)."""


@dataclass(frozen=True)
class Bank:
    size: IntOrAuto[Size] = 65536
    """Rows of the bank (learnable positives and negatives); auto = by the number of images."""
    rule: BankRule = "caco"
    """caco (positives and negatives learned), adco (negatives learned), moco (a queue of keys), nearest (a queue,
    its nearest row is the positive), nnclr (that positive against the batch), inbatch (the batch's keys, no bank)."""
    exchange: Free[BankExchange] = "statistics"
    """What ranks exchange: exact softmax statistics, or whole rows of logits (equal result, heavy)."""
    kernel: BankKernel = "torch"
    """How the bank computes: torch (chunks), or Triton kernels on CUDA: quicker, with a few other positives."""
    kernel_inputs: KernelInputs = "tf32"
    """Number format that the Triton kernels' matrix products read (their sums are fp32)."""
    temperature: PositiveFloat = 0.08
    """Temperature of the bank's gradient."""
    lr: Amount = 3.0
    """Learning rate of the bank rows, absolute."""
    momentum: Momentum = 0.9
    """Momentum of the bank rows."""
    warmup_epochs: IntOrAuto[Count] = 0
    """Epochs of bank warm-up (MoCo steps that fill the rows with keys); at least ceil(size/batch) steps for caco and
    nearest; auto = by optim.epochs."""
    warmup_ramp_steps: IntOrAuto[Count] = 0
    """Steps over which the learning rate rises in the bank warm-up; 0 = full rate at once, auto = by the warm-up."""
    warmup_temperature: PositiveFloat = 0.2
    """Temperature of the bank warm-up."""


@dataclass(frozen=True)
class Loss:
    temperature: PositiveFloat = 0.08
    """Temperature of the encoder's loss."""


@dataclass(frozen=True)
class Optim:
    name: Optimizer = "lars"
    """Optimizer of the query encoder."""
    lr: Amount = 0.3
    """Learning rate per 256 images of the global batch."""
    epochs: IntOrAuto[PositiveInt] = 200
    """Epochs of the main schedule (the bank warm-up comes before them); auto = by the number of images."""
    warmup_epochs: FloatOrAuto[Amount] = 10
    """Epochs of linear learning-rate warm-up at the start of the main schedule; auto = by optim.epochs."""
    weight_decay: Amount = 1.5e-6
    """Weight decay of parameters with two or more dimensions."""


@dataclass(frozen=True)
class Ema:
    momentum: Momentum = 0.99
    """Momentum of the key encoder at the start; it rises to 1 by a cosine."""


@dataclass(frozen=True)
class Precision:
    compute: Compute = "auto"
    """Number format of the forward pass; auto = bf16 on CUDA, fp32 on CPU. Parameters stay fp32 (fp64: all)."""
    compile: Free[AutoSwitch] = "auto"
    """Compile encoders and augmentation with torch.compile: true, false, or auto (on CUDA, where that can be had)."""
    channels_last: Free[bool] = True
    """Give the encoders channels_last inputs, with which convolutions are faster. Not with fp64."""


@dataclass(frozen=True)
class Eval:
    knn_every: Free[Count] = 0
    """Data epochs between two kNN evaluations on data.val_shards (one more at the end); 0 = off."""
    knn_k: Free[PositiveInt] = 20
    """Neighbours that vote."""
    knn_temperature: Free[PositiveFloat] = 0.2
    """Temperature of the votes' weights."""
    resize: Free[Count] = 0
    """Shorter side of images before the central views.size is cut out; 0 = 256 for 224 in proportion, and views.size
    itself (whole images) up to 96 pixels."""
    baselines: Free[bool] = False
    """Before the first step, also evaluate raw pixels and the untrained encoder."""


@dataclass(frozen=True)
class Config:
    """Pre-train an image encoder with CaCo (arXiv:2203.14370)."""

    recipe: tyro.conf.Suppress[Free[str]] = "demo"
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
