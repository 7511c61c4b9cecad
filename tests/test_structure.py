"""The shape of the package: rooms on floors, imports that run one way, no circle, one meaning a public name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "mlvicx_hf"
FLOORS = (
    {"models", "common"},
    {"recipes", "data", "scoring"},
    {"objectives", "encoders"},
    {"pretraining", "finetuning"},
    {"evaluation", "prediction", "hub"},
    {"demo"},
    {"commands"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py"))
IN_ROOMS = [file for file in FILES if len(file.parts) > 1]
MODULES = {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file for file in IN_ROOMS}


def imported(file: Path) -> Iterator[str]:
    """Modules of the package that a file imports, also inside functions, as "room.module"."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = ("mlvicx_hf", *file.parts[:-1])
            base = [*here[: len(here) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "mlvicx_hf":
                found = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
                yield from (module for module in found[:2] if module in MODULES)


def test_top_level_holds_rooms_alone() -> None:
    entries = {entry.name for entry in PACKAGE.iterdir()} - {"__pycache__", "__init__.py", "py.typed"}
    assert entries <= set(FLOOR), "every room needs a floor"
    assert len(entries) <= 14


@pytest.mark.parametrize("file", IN_ROOMS, ids=str)
def test_imports_run_downwards(file: Path) -> None:
    room = file.parts[0]
    for module in imported(file):
        other = module.split(".")[0]
        assert other == room or FLOOR[other] < FLOOR[room], f"{file} imports {module}"


def test_no_circles() -> None:
    """Not between modules, whether they import at the top or inside a function."""
    graph: dict[str, set[str]] = defaultdict(set)
    for name, file in MODULES.items():
        # A package's __init__ that gathers its modules depends on them; they do not depend on it.
        graph[name] |= {module for module in imported(file) if module != name and not name.startswith(module + ".")}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_models_import_flat_neighbours_alone() -> None:
    """Their files travel to the Hub, where nothing else of the package is."""
    for file in IN_ROOMS:
        if file.parts[0] == "models":
            for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert node.level < 2
                    assert not (node.module or "").startswith("mlvicx_hf")


def test_public_names_mean_one_thing() -> None:
    places = defaultdict(set)
    for file in FILES:
        for node in ast.parse((PACKAGE / file).read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            else:
                continue
            for name in names:
                places[name].add(str(file))
    everywhere = {"logger", "main", "parser", "T"}  # of a module, of a command, of a signature
    twice = {n: sorted(p) for n, p in places.items() if len(p) > 1 and n[0] != "_" and n not in everywhere}
    assert not twice
