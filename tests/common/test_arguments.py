from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

import pytest
from transformers import HfArgumentParser

from mlvicx_hf.common.arguments import CommandParser, add_sections, check_values, from_values, option
from mlvicx_hf.common.errors import UserError


@dataclass
class Model:
    output_dir: str = field(metadata={"help": "Folder.", "first": True, "metavar": "DIR"})
    backbone: str = field(default="resnet18", metadata={"help": "100% of it.", "first": True})
    use_context: bool = True
    levels: list[int] | None = None
    gain: float = 1.0


@dataclass
class Training:
    epochs: int = 300
    rates: list[float] = field(default_factory=lambda: [0.2, 1.0])
    limit: int | None = None
    torch_compile: bool = field(default=False, metadata={"aliases": ["--compile"]})
    precision: str = field(default="no", metadata={"choices": ["no", "bf16"]})
    reduction: str = field(default="mean", metadata={"choices": ["mean", "sum"]})
    table: str | None = None


SECTIONS = (Model, Training)


def make_parser() -> CommandParser:
    parser = CommandParser("pretrain", "--output_dir DIR [options]", "Train.", ["mlvicx pretrain --output_dir runs"])
    add_sections(parser, *SECTIONS)
    return parser


def read(words: list[str], defaults: dict[str, Any] | None = None) -> tuple[Any, ...]:
    return from_values(SECTIONS, vars(make_parser().parse_args(words)), defaults)


WORDS = {
    "nothing": "",
    "text and numbers": "--backbone resnet34 --epochs 3 --gain 2 --limit 5",
    "lists": "--levels 0 1 --rates 0.5 0.6",
    "a bare flag": "--torch_compile",
    "an alias": "--compile",
    "flags with values": "--torch_compile True --use_context f",
    "a flag turned off": "--no_use_context",
    "hyphens": "--no-use-context --torch-compile --output-dir=other-dir",
    "choices": "--precision bf16 --reduction sum",
    "a name": "--table a/b.csv",
    "the last one counts": "--epochs 3 --epochs=4 --use_context false --use_context",
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_words_mean_what_they_mean_to_the_parser_of_transformers(words: str):
    all_words = ["--output_dir", "runs", *words.split()]
    parser = HfArgumentParser([without_ours(section) for section in SECTIONS], allow_abbrev=False)
    expected = parser.parse_args_into_dataclasses(all_words)
    assert [asdict(each) for each in read(all_words)] == [asdict(each) for each in expected]


def without_ours(section: Any) -> type:
    """The section without the metadata that argparse does not know."""
    hints = get_type_hints(section)
    columns = []
    for each in fields(section):
        metadata = {key: value for key, value in each.metadata.items() if key != "first"}
        known = field(default=each.default, default_factory=each.default_factory, metadata=metadata)
        columns.append((each.name, hints[each.name], known))
    return make_dataclass(section.__name__, columns)


@pytest.mark.parametrize(
    "words", ["", "--output_dir a --epoch 3", "--output_dir a --epochs x", "--output_dir a --precision fp8", "a"]
)
def test_words_that_mean_nothing_end_the_command(words: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        read(words.split())
    assert ended.value.code == 2
    assert "usage: mlvicx pretrain --output_dir DIR [options]" in capsys.readouterr().err


def test_a_misspelled_flag_is_told_its_neighbours(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        read(["--output_dir", "a", "--epoch", "3"])
    assert "--epoch 3 found, which mlvicx pretrain does not know; did you mean --epochs" in capsys.readouterr().err


def test_defaults_give_way_to_words():
    model, training = read(["--output_dir", "a", "--epochs", "3"], {"epochs": 7, "gain": 2, "backbone": "resnet34"})
    assert (training.epochs, model.gain, model.backbone) == (3, 2, "resnet34")


def test_the_help_has_two_groups():
    text = make_parser().format_help()
    first, advanced = text.split("\nadvanced:\n")
    assert "--output_dir DIR" in first
    assert "100% of it. (default resnet18)" in first
    assert "--use_context [BOOL]" in advanced
    assert "(default true; --no_use_context turns it off)" in advanced.replace("\n" + " " * 24, " ")
    assert "(default 0.2 1.0)" in advanced
    assert "[--epochs" not in text  # a short usage line


def test_values_of_a_file():
    values = {
        "output_dir": "a",
        "gain": "1e-3",
        "epochs": 2,
        "levels": [0, "1"],
        "table": "b.csv",
    }
    model, training = from_values(SECTIONS, values)
    assert model == Model("a", gain=1e-3, levels=[0, 1])
    assert training == Training(epochs=2, table="b.csv")


def test_whole_numbers_become_fractions_except_in_defaults():
    (model, _) = from_values(SECTIONS, {"output_dir": "a", "gain": 2})
    assert type(model.gain) is float
    (model, _) = from_values(SECTIONS, {"output_dir": "a"}, {"gain": 2})
    assert type(model.gain) is int


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "epoch found, which does not exist; did you mean epochs"),
        ({"epochs": 2.5}, "epochs=2.5 found; expected a whole number"),
        ({"epochs": True}, "epochs=True found; expected a whole number"),
        ({"epochs": "many"}, "epochs='many' found; expected a whole number"),
        ({"epochs": None}, "epochs=None found; expected a whole number"),
        ({"gain": [1.0]}, r"gain=\[1.0\] found; expected a number"),
        ({"levels": 1}, "levels=1 found; expected a list of one or more, each a whole number"),
        ({"levels": []}, r"levels=\[\] found; expected a list of one or more"),
        ({"use_context": "perhaps"}, "use_context='perhaps' found; expected true or false"),
        ({"backbone": False}, "backbone=False found; expected text, in quotes in YAML"),
        ({"precision": "fp8"}, "precision='fp8' found; expected one of no, bf16"),
        ({}, "--output_dir missing"),
    ],
)
@pytest.mark.parametrize("as_defaults", [False, True])
def test_wrong_values_are_named(values: dict[str, Any], message: str, as_defaults: bool):
    with pytest.raises(UserError, match=message):
        from_values(SECTIONS, {}, values) if as_defaults else from_values(SECTIONS, values)


@dataclass
class Trainer:
    patience: int = 10
    trainer: dict[str, Any] = field(default_factory=dict, metadata={"rest": True})


def test_a_field_for_the_rest_takes_unknown_flags():
    parser = CommandParser("classify", "[options]", "Train.")
    add_sections(parser, Trainer)
    words = ["--patience", "3", "--bf16", "--optim", "sgd", "--betas", "0.9", "0.99", "--warmup-steps=5"]
    expected = {"bf16": "true", "optim": "sgd", "betas": ["0.9", "0.99"], "warmup_steps": "5"}
    assert from_values([Trainer], vars(parser.parse_args(words))) == (Trainer(3, expected),)


def test_a_field_for_the_rest_takes_unknown_values():
    (trainer,) = from_values([Trainer], {"optim": "sgd", "patience": 3}, {"optim": "adamw", "bf16": True})
    assert trainer == Trainer(3, {"optim": "sgd", "bf16": True})


def test_numbers_out_of_range_are_refused():
    limited = make_dataclass(
        "Limited", [("rate", float, option("", 1.0, above=0)), ("seed", int, option("", 0, least=0, most=9))]
    )
    assert from_values([limited], {"rate": "0.5", "seed": 9})[0].seed == 9
    for name, value, expected in (
        ("rate", "0", "a number above 0"),
        ("rate", float("nan"), "a number above 0"),
        ("rate", "inf", "a number above 0"),
        ("seed", -1, "at least 0 and at most 9"),
        ("seed", "10", "at least 0 and at most 9"),
    ):
        with pytest.raises(UserError, match=rf"{name}=.* found; expected .*{expected}"):
            from_values([limited], {name: value})
        with pytest.raises(UserError, match=rf"{name}=.* found; expected .*{expected}"):
            check_values(limited(), limited(**{name: value}))
