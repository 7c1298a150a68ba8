"""DeepSpeed's settings as a launch gives them: found, and checked to train the same model.

A setting that is not known to change only speed and memory is refused by name.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caco_scale import shipped
from caco_scale.distributed.environment import number
from caco_scale.errors import UserError, one_line
from caco_scale.shipped import spelled

# DeepSpeed settings that change only speed and memory, each tried against one process. Any other is refused.
EXACT_KEYS = {
    *(
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print"),
    *("wall_clock_breakdown", "comms_logger", "fp16", "bf16"),
}
EXACT_ZERO_KEYS = {
    *("stage", "contiguous_gradients", "overlap_comm", "reduce_scatter", "reduce_bucket_size"),
    *("allgather_partitions", "allgather_bucket_size", "round_robin_gradients", "sub_group_size"),
    *(
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
    ),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance", "offload_optimizer", "offload_param"),
    "stage3_gather_16bit_weights_on_model_save",
}
EXACT_OFFLOAD_KEYS = {"device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu", "nvme_path"}


def deepspeed_config(environment: Mapping[str, str]) -> dict:
    """DeepSpeed's settings as the launch gives them, checked, with batch sizes left open: a dict.

    From the JSON that the launcher's config file names, or from its own fields. What decides the mathematics is
    ours and is not for DeepSpeed to do twice: accumulation, clipping, number formats, optimizer, schedule.

    Raises:
        UserError: no such JSON; a setting that is not known to be exact.
    """
    name = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if name == "none":
        config, source = _config_of_fields(environment), "the launcher's deepspeed_config"
    else:
        path = find_deepspeed_json(name)
        config, source = _read_json(path), str(path)
    check_deepspeed(config, source)
    zero = config["zero_optimization"]
    return {
        "zero_optimization": {key: value for key, value in zero.items() if value != "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # or offloading would replace our optimizer by one of its own
        "gradient_accumulation_steps": 1,  # the strategy says when a step is complete
        "gradient_clipping": 0.0,
        **{key: config[key] for key in ("wall_clock_breakdown", "comms_logger") if key in config},
    }


def find_deepspeed_json(name: str) -> Path:
    """The JSON file that a launcher's config names: from the working directory, beside it, or of the package."""
    beside = _launcher_config_folder()
    places = [
        Path.cwd() / name,
        *([beside / name, beside / Path(name).name] if beside else []),
        *([shipped.place(name)] if name in shipped.names() else []),
    ]
    for path in places:
        if path.is_file():
            return path
    raise UserError(
        f"the launcher's config names the DeepSpeed file {name}, which is not there (looked for "
        f"{', '.join(map(str, dict.fromkeys(places)))}): correct deepspeed_config_file, an absolute path works anywhere"
    )


def _launcher_config_folder():
    """The folder of the ``--config_file`` on the command line of ``accelerate launch``, our parent; or None."""
    try:
        parent = Path(f"/proc/{os.getppid()}")
        words = (parent / "cmdline").read_bytes().decode(errors="replace").split("\0")
        values = [
            w.partition("=")[2] or words[i + 1] for i, w in enumerate(words) if w.startswith("--config_file")
        ]
        return (parent / "cwd").resolve() / Path(values[0]).parent if values else None
    except (OSError, IndexError):  # no Linux, or not ours to read
        return None


def _read_json(path):
    try:
        config = json.loads(path.read_text())
        if not isinstance(config["zero_optimization"]["stage"], int):
            raise TypeError("zero_optimization.stage is not a number")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a DeepSpeed config with a zero_optimization.stage: {one_line(error)}"
        ) from None
    return config


def _config_of_fields(environment):
    """A launcher's config file may hold DeepSpeed's main settings itself instead of naming a JSON."""
    zero: dict[str, Any] = {"stage": number(environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE", 2, lowest=0)}
    for what in ("optimizer", "param"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
        if device != "none":
            zero[f"offload_{what}"] = {"device": device}
    clipping: float | str = environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    with contextlib.suppress(ValueError):  # what is no number is refused as it stands
        clipping = float(clipping)
    return {"zero_optimization": zero, "gradient_clipping": clipping}


def check_deepspeed(config: dict, source: str) -> None:
    """Refuse DeepSpeed settings under which another model would be trained, each by name with its alternative."""

    def refuse(setting, why):
        raise UserError(f"{source}: {setting} {why}")

    zero = config["zero_optimization"]
    if zero["stage"] not in (1, 2, 3):
        refuse(
            f"zero_optimization.stage {zero['stage']}",
            f"partitions nothing: use --config_file {spelled('ds_configs/ddp.yaml')}",
        )
    unknown = [key for key in config if key not in EXACT_KEYS]
    unknown += [f"zero_optimization.{key}" for key in zero if key not in EXACT_ZERO_KEYS]
    for what in ("offload_optimizer", "offload_param"):
        offload = zero.get(what) or {}
        unknown += [f"zero_optimization.{what}.{key}" for key in offload if key not in EXACT_OFFLOAD_KEYS]
        if offload.get("device", "none") not in ("none", "cpu"):
            refuse(f"zero_optimization.{what}.device {offload['device']}", "is not supported: use cpu")
    if unknown:
        refuse(
            ", ".join(unknown),
            f"is not known to train the same model: remove it ({spelled('ds_configs/*.json')} show what is)",
        )
    if config.get("gradient_clipping", "auto") not in ("auto", 0):
        clipping = config["gradient_clipping"]
        refuse(f"gradient_clipping {clipping}", "changes the gradients, CaCo clips none: set it to 0")
    if config.get("gradient_accumulation_steps", "auto") not in ("auto", 1):
        refuse(
            f"gradient_accumulation_steps {config['gradient_accumulation_steps']}",
            "would divide the gradients a second time: set it to 1, and --data.micro_batch_size to accumulate",
        )
    for name in ("fp16", "bf16"):
        if (config.get(name) or {}).get("enabled", False) not in (False, "auto"):
            refuse(
                f"{name}.enabled", "would round the parameters: remove it and give --precision.compute bf16"
            )
