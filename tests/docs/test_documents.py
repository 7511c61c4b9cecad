"""The documents: each command that they show is accepted by its parser and runs, and links lead somewhere."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from helpers import ROOT, environment, make_cache, mlvicx

from mlvicx_hf import __version__
from mlvicx_hf.commands import COMMANDS
from mlvicx_hf.evaluation.suite.grid import read_suite

DOCS = ROOT / "docs"
OTHERS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "model_cards/README.md")
PAGES = [*(ROOT / name for name in OTHERS), *sorted(DOCS.rglob("*.md"))]
GENERATED = {DOCS / "reference" / "commands.md"}  # by docs/build_commands.py
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
# What makes a shown command small enough for a test: flags that replace or join its own.
SMALLER = {
    "prepare": {"--size": "32", "--num_workers": "0"},
    "pretrain": {"--recipe": "smoke", "--epochs": "1", "--num_workers": "0"},
    "classify": {"--num_train_epochs": "1"},
    "segment": {"--num_train_epochs": "1"},
    "evaluate": {"--samples": "20"},
    "predict": {"--num_workers": "0"},
    "similar": {"--num_workers": "0"},
}
FEW_PHANTOMS = {"--num_patients": "12", "--images_per_patient": "1"}
OUTPUTS = ("--output", "--output_dir", "--masks", "--embeddings", "--json", "--sheet")
FLAGS_OF_OTHERS = {"--all", "--lowest", "--strict", "--nproc_per_node", "--kills"}  # of scripts, mkdocs, torchrun


class Block(NamedTuple):
    """A fenced block of a page; `reason` says why it is not run."""

    page: Path
    language: str
    text: str
    reason: str | None


def blocks(language: str) -> Iterator[Block]:
    for page in PAGES:
        for found in FENCE.finditer(page.read_text()):
            if found["language"] == language:
                yield Block(page, language, found["text"], found["reason"])


BASH = list(blocks("bash"))
RUN = {page: [block for block in BASH if block.page == page and block.reason is None] for page in PAGES}
RUN = {page: found for page, found in RUN.items() if found}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a block as words, with the variables that the block sets put in."""
    variables: dict[str, str] = {}
    for line in block.text.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", value, line)
        words = shlex.split(line, comments=True)
        if len(words) == 1 and (assigned := re.fullmatch(r"(\w+)=(.*)", words[0])):
            variables[assigned[1]] = assigned[2]
        elif words and words[0] == "for":
            variables[words[1]] = words[3]  # the first turn of the loop
        elif words and words[0] not in ("done", "source", "pip", "pre-commit"):
            yield words


def our_command(words: list[str]) -> list[str] | None:
    """Name and options of the command of ours that a line starts, by itself or by a launcher."""
    if words[0] == "mlvicx":
        return words[1:]
    for number, word in enumerate(words):
        if word.startswith("mlvicx_hf.commands."):
            return [word.removeprefix("mlvicx_hf.commands."), *words[number + 1 :]]
        if re.fullmatch(r"scripts/\w+\.py", word):
            (name,) = re.findall(r'main\(\["(\w+)"', (ROOT / word).read_text())
            return [name, *words[number + 1 :]]
    return None


def parser_of(name: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = importlib.import_module(f"mlvicx_hf.commands.{name}").parser()
    return made


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", sorted({block.page for block in BASH}), ids=name_of)
def test_parsers_accept_what_is_shown(page: Path) -> None:
    for block in BASH:
        for words in commands(block) if block.page == page else ():
            ours = our_command(words)
            if ours is not None:
                assert ours[0] in COMMANDS
                parser_of(ours[0]).parse_args(ours[1:])  # exits if a flag does not exist
            else:
                tool = {"benchmark", "benchmark.gpu"} & {*words}
                assert words[0].startswith("scripts/") or tool or words[0] in ("python", "hf"), words
                for file in (word for word in words if word.startswith(("scripts/", "tools/"))):
                    assert (ROOT / file).is_file()


def test_reasons_are_given_where_a_block_cannot_run() -> None:
    for block in BASH:
        if block.reason is None:
            assert all(words[0] == "mlvicx" for words in commands(block)), (
                f"{name_of(block.page)}: say why it is not run"
            )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take as given: a folder of radiographs with its table, caches, models and a suite."""
    folder = tmp_path_factory.mktemp("world")
    rows = [
        {
            "patient_id": f"p{i // 2}",
            "split": ("test", "validation", "train", "train", "train")[i // 2 % 5],
            "view": "PA",
            "_draw": {"disc": i % 3 == 0, "stripes": i % 4 < 2},
            "disc": int(i % 3 == 0),
            "stripes": int(i % 4 < 2),
        }
        for i in range(40)
    ]
    caches = folder / "caches"
    for name in ("mine", "other"):
        make_cache(caches, rows, name=name)
    no_labels = [{key: value for key, value in row.items() if key not in ("disc", "stripes")} for row in rows]
    make_cache(caches, no_labels, name="masked", mask_names=("disc",))
    no_stripes = [{key: value for key, value in row.items() if key != "stripes"} for row in rows]
    make_cache(caches, no_stripes, name="findings_masked", mask_names=("disc",))
    shutil.copytree(caches / "mine-images", folder / "my_radiographs")
    run = folder / "runs"
    pretrain = ["--recipe", "smoke", "--epochs", 1, "--dataset", caches / "mine", "--num_workers", 0]
    check("pretrain", *pretrain, "--output_dir", run / "mine")
    few = ["--freeze_backbone", "--num_train_epochs", 1]
    for command, cache, name in (
        ("classify", "mine", "frozen"),
        ("classify", "findings_masked", "findings"),
        ("segment", "masked", "lungs"),
    ):
        check(command, "--model", run / "mine", "--dataset", caches / cache, *few, "--output_dir", run / name)
    (folder / "suite.yaml").write_text(yaml.safe_dump(small_suite(), sort_keys=False))
    return folder


def shown_suite() -> str:
    """The suite of the guide."""
    (block,) = (block for block in blocks("yaml") if block.page.name == "evaluate.md")
    return block.text


def small_suite() -> dict[str, object]:
    """The same with few runs, and without ImageNet's weights, which would be downloaded."""
    suite = yaml.safe_load(shown_suite())
    models = {"random": {"random": "runs/mine"}, "MLVICX": "runs/mine"}
    tasks = {"findings": suite["tasks"]["findings"]}
    small = {"protocols": ["frozen"], "label_fractions": [1], "seeds": [0], "compare": [["MLVICX", "random"]]}
    options = suite["classification"] | {"num_train_epochs": 1}
    return suite | small | {"models": models, "tasks": tasks, "classification": options}


def check(*words: object) -> None:
    done = mlvicx(*words)
    # `audit` says by exit code 1 that it found a leak
    assert done.returncode in ((0, 1) if words[0] == "audit" else (0,)), f"{words}\n{done.stdout}\n{done.stderr}"


def smaller(words: list[str]) -> list[str]:
    """The command on a toy network and few images."""
    flags = dict(SMALLER.get(words[0], {}))
    if "phantom" in words:
        flags |= FEW_PHANTOMS
    for flag, value in flags.items():
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return words


def remove_outputs(words: list[str]) -> None:
    """A page may show a command whose output is given here, or is shown twice."""
    for flag, value in pairwise(words):
        if flag in OUTPUTS and "--resume" not in words:
            if Path(value).is_dir():
                shutil.rmtree(value)
            else:
                Path(value).unlink(missing_ok=True)
            if value.endswith(".csv"):
                Path(value).with_suffix(".json").unlink(missing_ok=True)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_shown_commands_run(page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    for block in RUN[page]:
        for words in commands(block):
            command = smaller(words[1:])
            remove_outputs(command)
            check(*command)


def test_suite_of_the_guide_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(shown_suite())
    assert len(read_suite(file).cells) > 100


def test_flags_in_the_text_exist() -> None:
    known = {flag for name in COMMANDS for flag in parser_of(name)._option_string_actions} | FLAGS_OF_OTHERS
    # `classify` and `segment` pass other flags on to transformers' TrainingArguments
    known |= {"--metric_for_best_model"}
    for page in PAGES:
        shown = re.findall(r"(?<![-\w])--[a-z]\w+", FENCE.sub("", page.read_text()))
        assert set(shown) <= known, f"{name_of(page)}: {sorted(set(shown) - known)}"


def test_python_blocks_are_python() -> None:
    for block in blocks("python"):
        compile(block.text, name_of(block.page), "exec")


# -- pages -------------------------------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_readme_lists_the_commands() -> None:
    rows = re.findall(r"^\| `mlvicx (\w+)` \| (.*?)(?: \(\[.*)? \|$", (ROOT / "README.md").read_text(), re.M)
    assert dict(rows) == COMMANDS
    assert len(rows) == len(COMMANDS)


def test_readme_repeats_the_results_as_they_are() -> None:
    """Encoders in the order of the page on worth; rows of its first table tell a longer run, and larger images."""
    found = re.findall(r"\| \**(0\.\d{3})\** \| \**(0\.\d{3})\** \|$", (ROOT / "README.md").read_text(), re.M)
    page = (DOCS / "results" / "worth.md").read_text()
    rows = [re.search(rf"^\| {task}, 100 % \|(.*)$", page, re.M) for task in "AB"]
    expected = list(zip(*(re.findall(r"0\.\d{3}", row[1]) for row in rows if row), strict=True))
    *_, late_a, late_b, large_a, large_b, long_a, long_b = re.findall(r"(0\.\d{3}) → (0\.\d{3})", page)
    expected[3:3] = [(long_a[1], long_b[1])]
    expected += [(late_a[1], late_b[1]), *zip(large_a, large_b, strict=True)]
    assert found == expected


def test_rooms_are_listed() -> None:
    rooms = {folder.name for folder in (ROOT / "src" / "mlvicx_hf").iterdir() if (folder / "__init__.py").exists()}
    for page in (ROOT / "README.md", DOCS / "develop" / "layout.md"):
        assert rooms == set(re.findall(r"^\|(?: \d \|)? `(\w+)/` \|", page.read_text(), re.M))


def heading_links(page: Path) -> set[str]:
    """The part behind # of links to the headings of a page."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_rows_of_a_table_are_as_long_as_its_header(page: Path) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", FENCE.sub("", page.read_text()), re.M):
        header, *rows = (len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines())
        assert all(row == header for row in rows), table


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if file in GENERATED:
            assert not heading or heading.removeprefix("mlvicx-") in COMMANDS
            continue
        assert file.exists(), f"{name_of(page)}: {target}"
        assert not heading or heading in heading_links(file), f"{name_of(page)}: {target}"


def test_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert [author["family-names"] for author in citation["preferred-citation"]["authors"]] == [
        "Singh",
        "Gorade",
        "Mishra",
    ]


@pytest.mark.documents
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    for name in ("material", "mkdocstrings", "mkdocstrings_handlers.python"):
        pytest.importorskip(name, reason='the site needs pip install ".[docs]"')
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        words, cwd=ROOT, env=environment(NO_MKDOCS_2_WARNING="1"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference" / "commands" / "index.html").read_text()
    assert all(f'id="mlvicx-{name}"' in page for name in COMMANDS)
