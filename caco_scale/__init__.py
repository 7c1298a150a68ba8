"""caco_scale: self-supervised image pre-training with CaCo (arXiv:2203.14370) at cluster scale.

From Python: :func:`pretrain`, :func:`batches`, :func:`load_backbone`, :func:`read_metrics`, and for one's own training
loop :class:`ShardedBank` and :class:`LARS`; ``examples/README.md`` shows each in a few lines. Every name is imported
when it is first used: ``import caco_scale`` itself loads nothing of torch.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caco_scale.api.backbone import Backbone, load_backbone
    from caco_scale.api.loader import Batches, ViewBatch, batches
    from caco_scale.api.run import Run, pretrain, read_metrics
    from caco_scale.config import Views
    from caco_scale.errors import UserError
    from caco_scale.method.bank import ShardedBank
    from caco_scale.optim.lars import LARS

__version__ = "0.1.0"

__all__ = [
    "LARS",
    "Backbone",
    "Batches",
    "Run",
    "ShardedBank",
    "UserError",
    "ViewBatch",
    "Views",
    "batches",
    "load_backbone",
    "pretrain",
    "read_metrics",
]

_MODULES = {
    "api.backbone": ("Backbone", "load_backbone"),
    "api.loader": ("Batches", "ViewBatch", "batches"),
    "api.run": ("Run", "pretrain", "read_metrics"),
    "config": ("Views",),
    "errors": ("UserError",),
    "method.bank": ("ShardedBank",),
    "optim.lars": ("LARS",),
}
_PLACES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """``caco_scale.pretrain`` is the function, whatever was imported before.

    The command ``python -m caco_scale.pretrain`` is a module of the same name, which its import puts in this place.
    """

    @property
    def pretrain(self):
        return __getattr__("pretrain")

    @pretrain.setter
    def pretrain(self, module):
        pass


sys.modules[__name__].__class__ = _Package
