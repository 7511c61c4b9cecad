"""`mlvicx`: its commands, their help, what importing them costs, and how they end as processes."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, assert_users_error, draw, mlvicx, run_python, run_script

from mlvicx_hf.commands import COMMANDS, __version__, prepare
from mlvicx_hf.common.arguments import CommandParser
from mlvicx_hf.data.cache.prepare import CACHE_FITS
from mlvicx_hf.data.collections import KINDS
from mlvicx_hf.data.collections.cells import UNCERTAIN
from mlvicx_hf.data.copies.deduplication import DROPS
from mlvicx_hf.data.copies.duplicates import NEAR

HEAVY = ("torch", "transformers", "datasets", "accelerate", "pandas", "numpy", "scipy", "sklearn", "matplotlib")
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))

HELP = """
import io, json, sys, time
from contextlib import redirect_stdout
from mlvicx_hf.commands import COMMANDS, main

texts, seconds = {}, {}
for name in ("", *COMMANDS):
    before, text = time.process_time(), io.StringIO()
    with redirect_stdout(text):
        try:
            main([*filter(None, [name]), "--help"])
        except SystemExit as end:
            assert not end.code
    texts[name], seconds[name] = text.getvalue(), time.process_time() - before
print(json.dumps({"texts": texts, "seconds": seconds, "modules": sorted(sys.modules)}))
"""

PREPARE = """
import json, sys
from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
    print(json.dumps(sorted(sys.modules)))
"""


@pytest.fixture(scope="module")
def helped() -> dict:
    """The help of all commands, printed by one fresh process, and what that process imported."""
    done = run_python("-c", HELP)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_imports_nothing_heavy(helped: dict):
    assert set(HEAVY) & set(helped["modules"]) == set()


def test_help_is_quick(helped: dict):
    """Half a second of a processor for all of them: each has ten times what it needs."""
    assert sum(helped["seconds"].values()) < 0.5 * len(helped["seconds"])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_short_first_and_complete_behind(helped: dict, name: str):
    usage, _, rest = helped["texts"][name].partition("\n\n")
    assert usage.startswith(f"usage: mlvicx {name} ")
    assert len(usage) < 100
    assert f"  mlvicx {name}" in rest.partition("examples:")[2]
    first = rest.partition("\nadvanced:\n")[0]
    assert len(re.findall(r"^  --\w", first, re.MULTILINE)) <= 12
    assert f"  {name} " in helped["texts"][""]
    flags = [action.option_strings for action in make_parser(name)._actions if action.help != "==SUPPRESS=="]
    assert all(flag in rest for words in flags for flag in words)


def make_parser(name: str) -> CommandParser:
    return importlib.import_module(f"mlvicx_hf.commands.{name}").parser()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name: str):
    assert [action.dest for action in make_parser(name)._actions if not action.help] == []


def test_without_a_command_it_lists_them():
    assert mlvicx().stdout == mlvicx("--help").stdout
    assert mlvicx("--version").stdout == f"mlvicx {__version__}\n"


def test_a_reader_that_leaves_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m mlvicx_hf.commands --help | true", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_an_unknown_command_is_told_its_neighbours():
    done = mlvicx("pretain")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mlvicx: error: command 'pretain' found; expected pretrain; see mlvicx --help\n"
    assert "expected prepare or audit or " in mlvicx("xyz").stderr


def test_what_prepare_and_audit_say_without_importing_is_so():
    assert tuple(KINDS) == prepare.NAMES
    choices = {action.dest: action.choices for action in make_parser("prepare")._actions}
    assert choices["fit"] == CACHE_FITS
    assert choices["drop_duplicates"] == DROPS
    assert choices["uncertain"] == tuple(UNCERTAIN)
    assert make_parser("audit").get_default("near") == NEAR


def test_the_console_command_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    assert '\n[project.scripts]\nmlvicx = "mlvicx_hf.commands:main"\n' in text


def test_as_a_module_and_as_a_script():
    words = ("--model", "x", "--output", "y", "--format", "timm", "--with_expanders")
    for done in (
        run_python("-m", "mlvicx_hf.commands", "export", *words),
        run_python("-m", "mlvicx_hf.commands.export", *words),
        run_script("export_model.py", *words),
    ):
        assert_users_error(done, "--with_expanders found; --format timm does not take it")


def test_every_script_calls_a_command_of_its_own():
    texts = [(ROOT / "scripts" / name).read_text() for name in SCRIPTS]
    called = [re.findall(r'main\(\["(\w+)", \*sys.argv\[1:\]\]\)', text)[0] for text in texts]
    assert sorted(called) == sorted(set(COMMANDS) - {"quickstart"})


def test_prepare_imports_neither_torch_nor_transformers(tmp_path: Path):
    """Nor do its workers, which import what the main process did."""
    (tmp_path / "main.py").write_text(PREPARE)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        draw({"disc": number == 0}, seed=number).save(images / f"{number}.png")
    words = ("--collection", "folder", "--root", images, "--splits", "none", "--size", 32, "--num_workers", 2)
    done = run_python(tmp_path / "main.py", *words, "--output", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert {"torch", "transformers"} & set(json.loads(done.stdout.splitlines()[-1])) == set()
