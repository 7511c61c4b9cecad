"""MLVICX self-supervised representation learning for chest X-rays (arXiv 2403.11504) in the Hugging Face ecosystem.

Importing the package makes `AutoModel.from_pretrained("org/mlvicx-resnet18")` find its classes. It imports no torch and
no transformers by itself, so that commands start quickly: importing transformers registers the classes.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models import (
        MLVICXBackbone,
        MLVICXConfig,
        MLVICXForImageClassification,
        MLVICXForPreTraining,
        MLVICXForSemanticSegmentation,
        MLVICXImageProcessor,
        MLVICXModel,
        MLVICXPreTrainedModel,
    )

__version__ = "0.2.0"

__all__ = [
    "MLVICXBackbone",
    "MLVICXConfig",
    "MLVICXForImageClassification",
    "MLVICXForPreTraining",
    "MLVICXForSemanticSegmentation",
    "MLVICXImageProcessor",
    "MLVICXModel",
    "MLVICXPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    """A class of the models, imported when it is first asked for."""
    if name in __all__:
        return getattr(importlib.import_module(".models", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _RegisterWithTransformers(MetaPathFinder):
    """Register the models as soon as anybody imports transformers, which has no entry points for that."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Leave the search to Python, and import the models once transformers itself is imported."""
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: Any) -> None:
            run(module)
            importlib.import_module(".models", __name__)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]  # a loader of its own would be longer
        return spec


if "transformers" in sys.modules:
    importlib.import_module(".models", __name__)
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())
