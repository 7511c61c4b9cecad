"""Named sets of hyper-parameters, one YAML file each, in a folder for each kind of training."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mlvicx_hf.common.errors import UserError


def recipe_names(kind: str = "pretraining") -> list[str]:
    """Names of the recipes for "pretraining", "classification" or "segmentation" that come with the package."""
    return sorted(Path(f.name).stem for f in (files(__name__) / kind).iterdir() if f.name.endswith(".yaml"))


def load_recipe(name: str, known: Collection[str] | None, kind: str = "pretraining") -> dict[str, Any]:
    """Read a recipe by its name, or from a YAML file.

    Args:
        name: one of `recipe_names(kind)`, or the path of a file that ends in .yaml or .yml.
        known: the keys that exist; None leaves the check to the caller.
        kind: of training.

    Raises:
        ValueError: an unknown recipe, a file that is not a mapping, or a key that does not exist.
    """
    if name.endswith((".yaml", ".yml")):
        text = Path(name).read_text()
    elif name in recipe_names(kind):
        text = (files(__name__) / kind / f"{name}.yaml").read_text()
    else:
        names = ", ".join(recipe_names(kind))
        raise UserError(f"recipe {name!r} found; expected {names}, or the path of a .yaml file")
    recipe = yaml.safe_load(text)
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {name} holds a {type(recipe).__name__}; expected a mapping of keys to values")
    for key in recipe:
        if known is not None and key not in known:
            close = difflib.get_close_matches(str(key), known, 3) or sorted(known)
            raise UserError(
                f"recipe {name} has the key {key!r}, which does not exist; did you mean {', '.join(close)}?"
            )
    return recipe
