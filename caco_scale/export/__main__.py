"""Command: ``python -m caco_scale.export RUN --to FILE [--format FORMAT]``; see :mod:`caco_scale.export.write`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from caco_scale.errors import exit_on_user_error
from caco_scale.flags.choices import Encoder, ExportFormat
from caco_scale.flags.read import Switch, read, shown
from caco_scale.weights.address import hub_address
from caco_scale.weights.place import place_of

PROG = "python -m caco_scale.export"


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a backbone for use without this program: of a run, of one checkpoint, or of a file of weights."""

    run: Positional[Annotated[str, shown("RUN_OR_WEIGHTS")]]
    """Run directory, one of its checkpoints, file of weights, Hugging Face directory in timm's layout, or one on the
    hub: hf://USER/NAME[@REVISION]."""
    to: str
    """File to write; its model card goes to FILE.md. With huggingface a directory, or hf://USER/NAME[@BRANCH]:
    one commit on the hub, by the token of hf auth login or HF_TOKEN."""
    format: Annotated[ExportFormat | None, shown("{safetensors,torchvision,timm,huggingface}")] = None
    """Format of the file; huggingface: a directory of config.json and model.safetensors, as timm has it on the hub
    (default: by the name: .safetensors; .pth, .pt, .bin, .ckpt: torchvision, of a timm backbone timm; no end, hf://:
    huggingface)."""
    which: Annotated[Encoder | None, shown("{query,key}")] = None
    """Encoder, where there are two (default: query; of DINO the teacher)."""
    step: Annotated[int | None, shown("N")] = None
    """Step of the checkpoint (default: the newest)."""
    arch: Annotated[str | None, shown("ARCH")] = None
    """Architecture in a file of weights (default: found out); your own package.module:callable of a run that has it."""
    force: Switch = False
    """Replace an existing file; on the hub its files, by a new commit."""
    private: Switch = False
    """Of a new repository on the hub: show it to nobody else."""


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Write the file and its model card; exit code 2 on a user's mistake."""
    flags = read(Export, sys.argv[1:] if arguments is None else arguments, prog)
    place_of(flags.run, flags.step)
    hub_address(flags.to)

    from caco_scale.export.write import export

    asked = flags.format, flags.which, flags.step, flags.force, flags.arch, flags.private
    metadata = export(flags.run, flags.to, *asked)
    to, size = metadata["to"], int(metadata["bytes"]) / 1e6
    of_step = f" of step {metadata['step']}" if metadata["step"] else ""
    what = "{encoder} backbone {arch} (stem {stem}){0}; {compared}".format(of_step, **metadata)
    folder = metadata["format"] == "huggingface"
    card = metadata.get("page") or (f"{to}/README.md" if folder else f"{to}.md")
    print(f"wrote {to} ({size:.1f} MB, {metadata['format']}) and {card}: {what}")
    if metadata["unused"]:
        print(f"in {flags.run} but not used: {metadata['unused']}")
    if unsaid := [name for name in ("size", "mean", "std") if name not in metadata]:
        print(
            f"{flags.run} does not say the {', '.join(unsaid)} of its images, and so the file does not either"
        )


if __name__ == "__main__":
    main()
