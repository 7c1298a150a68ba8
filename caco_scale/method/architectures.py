"""The names of architectures, from the source files of torchvision and timm: neither they nor torch are imported.

A mistyped name is told before anything is loaded. What is a model, the libraries alone decide (``encoders``).
"""

import importlib.metadata
import importlib.util
import re
from functools import cache
from pathlib import Path

from caco_scale.errors import UserError, did_you_mean

CALLABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
KINDS = "the name of a torchvision classification model, timm/NAME, or package.module:callable"
MODEL = re.compile(r"^@register_model\b.*\n(?:@.*\n)*def (\w+)", re.MULTILINE)


def refuse_unknown(arch: str) -> None:
    """UserError for a name that its library's files do not hold as a word: it cannot be a model of it.

    A library that is not installed is not looked at, and a function of the user's own is not imported.
    """
    timm_name = arch.removeprefix("timm/")
    if arch == "tiny" or CALLABLE.fullmatch(arch) or ":" in timm_name:
        return
    library, name = ("timm", timm_name.split(".")[0]) if timm_name != arch else ("torchvision", arch)
    source = _source(library)
    if source and not re.search(rf"\b{re.escape(name)}\b", source):
        raise unknown(arch)


def unknown(arch: str) -> UserError:
    """What is said of a name that no library knows, with the nearest one."""
    name = arch.removeprefix("timm/")
    if name != arch:
        meant = did_you_mean(name, names("timm"))
        return UserError(
            f"model.arch: timm {importlib.metadata.version('timm')} has no model {name!r}{meant}"
        )
    if name.split(".")[0] in names("timm"):
        meant = f" (did you mean timm/{name}?)"
    else:
        meant = did_you_mean(name, (*names("torchvision"), "tiny"))
    return UserError(f"model.arch: no architecture {arch!r}{meant}: give {KINDS}")


def names(library: str) -> list[str]:
    """The models of torchvision (the classifiers) or of timm that its files define, sorted; none where it is not."""
    return sorted(set(MODEL.findall(_source(library))))


@cache
def _source(library):
    """The text of its files of models, each in a row."""
    found = importlib.util.find_spec(library)
    places = (found.submodule_search_locations if found else None) or []
    files = [file for place in places for file in sorted(Path(place, "models").glob("*.py"))]
    return "\n".join(file.read_text(errors="replace") for file in files)
