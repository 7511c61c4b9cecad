"""Named sets of hyper-parameters, one YAML file each, in a folder for each kind of training."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlvicx_hf.common.arguments import CommandParser, add_sections, from_values, names_of, rest_of
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import read_yaml

OF_ONE_RUN = {"dataset", "output_dir", "model", "resume"}  # never in a recipe


def recipe_names(kind: str = "pretraining") -> list[str]:
    """Names of the recipes for "pretraining", "classification", "segmentation" or a "suite" in the package."""
    return sorted(Path(f.name).stem for f in (files(__name__) / kind).iterdir() if f.name.endswith(".yaml"))


def find_recipe(name: str, kind: str = "pretraining") -> Path:
    """Find the file of a recipe of the package, or of another one by its path, which ends in .yaml or .yml.

    Raises:
        UserError: neither.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = recipe_names(kind)
    if name not in known:
        what = "suite" if kind == "suite" else "recipe"
        raise UserError(f"{what} {name!r} found; expected {', '.join(known)}, or the path of a .yaml file")
    return Path(str(files(__name__) / kind / f"{name}.yaml"))


def load_recipe(name: str, known: Collection[str] | None, kind: str = "pretraining") -> dict[str, Any]:
    """Read a recipe by its name, or from a YAML file.

    Args:
        name: see `find_recipe`.
        known: the keys that exist; None allows any but those of a single run.
        kind: of training.

    Raises:
        UserError: an unknown recipe, a file that is not a mapping, or a key that does not exist.
    """
    recipe = read_yaml(find_recipe(name, kind))
    for key in recipe:
        if key in OF_ONE_RUN:
            raise UserError(f"recipe {name} has the key {key!r}, which belongs to a single run; give it as --{key}")
        if known is not None and key not in known:
            close = difflib.get_close_matches(str(key), known, 3) or sorted(known)
            raise UserError(
                f"recipe {name} has the key {key!r}, which does not exist; did you mean {', '.join(close)}?"
            )
    return recipe


def add_recipe(parser: CommandParser, kind: str, *sections: type) -> None:
    """Add the option `--recipe` of a kind of training, and its sections, with the values of the default recipe."""
    names = ", ".join(recipe_names(kind))
    text = f"hyper-parameters that further flags override: {names}, or a .yaml file (default default)"
    parser.add_argument("--recipe", default="default", metavar="NAME", help=text)
    add_sections(parser, *sections, defaults=load_recipe("default", None, kind))


def fill_sections(sections: Sequence[type], values: Mapping[str, Any], kind: str) -> tuple[Any, ...]:
    """Dataclasses of arguments from a recipe and from values that override it.

    Args:
        sections: see `from_values`.
        values: field → value; `recipe` names the recipe, by default "default".
        kind: of training.
    """
    given = dict(values)
    known = names_of(sections) - OF_ONE_RUN if rest_of(sections) is None else None
    recipe = load_recipe(given.pop("recipe", "default"), known, kind)
    return from_values(sections, given, recipe)
