"""Make command-line flags of dataclasses, and dataclasses of parsed flags or of YAML files, without importing torch.

A dataclass whose fields are flags is called a section. `--help` shows a field with the metadata `{"first": True}` among
the first options, and any other field under "advanced". Further metadata are argparse's `help`, `choices` and
`metavar`, and `aliases`, a list of further flags. A field of the type dict with the metadata `{"rest": True}` takes the
flags that no section knows, by name; its section checks them itself. Any other field of the type dict takes words
NAME=VALUE; the values stay words.
"""

import argparse
import difflib
import math
import sys
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from .errors import UserError

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_METAVARS = {int: "N", float: "X", str: "TEXT"}


def option(text: str, default: Any = MISSING, **metadata: Any) -> Any:
    """Make a field of a section: the help, the default if there is one, and further metadata.

    Of a number, `least` and `most` are the smallest and the largest that is taken, and `above` one that is too small.
    Every object gets its own copy of a list or dictionary.
    """
    metadata["help"] = text
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class CommandParser(argparse.ArgumentParser):
    """Parse the words of one command. The help has a short usage line, two groups of options, and examples.

    Hyphens in the name of a flag are read as underscores: `--batch-size` is `--batch_size`.
    """

    def __init__(self, name: str, usage: str, description: str, examples: Sequence[str] = ()) -> None:
        super().__init__(
            prog=f"mlvicx {name}",
            usage=f"%(prog)s {usage}",
            description="\n".join(textwrap.fill(line, 100) for line in description.splitlines()),
            epilog="\n".join(["examples:", *(f"  {line}" for line in examples)]) if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.advanced = self.add_argument_group("advanced")  # options that few users need
        self.rest: str | None = None  # name of the field that takes unknown flags; None to refuse them

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Read hyphens in the names of flags as underscores, then parse as argparse does."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_underscores(word) for word in words], namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse. Refuse words that are not understood, or leave them to the field for the rest."""
        found, words = self.parse_known_args(args, namespace)
        if words and (self.rest is None or not words[0].startswith("--")):
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            close = difflib.get_close_matches(words[0].partition("=")[0], known)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            self.error(f"{' '.join(words)} found, which {self.prog} does not know{hint}")
        if words:
            setattr(found, str(self.rest), _by_flag(words))
        return found


def _by_flag(words: Sequence[str]) -> dict[str, str | list[str]]:
    """Map each flag to "true" if it stands alone, to its word, or to the list of its words."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = [value] if equals else []
        else:
            found[name].append(word)
    return {name: "true" if not given else given[0] if len(given) == 1 else given for name, given in found.items()}


def _with_underscores(word: str) -> str:
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") and len(flag) > 2 else word


@dataclass(frozen=True)
class _Option:
    """A field of a section. `kind` is the type of one value; `many` says that it is a list of these.

    `named` says that it is a dictionary, of which a command line gives many words NAME=VALUE.
    """

    name: str
    kind: type
    many: bool
    optional: bool
    required: bool
    default: Any
    choices: tuple[Any, ...] | None
    metadata: Mapping[str, Any]
    named: bool = False

    def read(self, word: str) -> Any:
        """Read one value from a word."""
        if self.choices is not None:
            return next((choice for choice in self.choices if str(choice) == word), word)
        return _read_bool(word) if self.kind is bool else self.kind(word)

    def convert(self, value: Any) -> Any:
        """Check a value of a YAML file or of Python. Convert a word as on the command line."""
        if value is None and self.optional:
            return None
        if self.named:
            return self._convert_named(value)
        if not self.many:
            return self._convert_one(value, value)
        if not isinstance(value, (list, tuple)) or not value:
            self._refuse(value)
        return [self._convert_one(each, value) for each in value]

    def _convert_named(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return {str(name): each for name, each in value.items()}
        if not isinstance(value, (list, tuple)) or not all("=" in str(word) for word in value):
            self._refuse(value)
        return dict(str(word).split("=", 1) for word in value)

    def _convert_one(self, value: Any, whole: Any) -> Any:
        kinds = {float: (float, int), str: (str, Path)}.get(self.kind, (self.kind,))
        if isinstance(value, str):
            try:
                value = self.read(value)
            except (ValueError, argparse.ArgumentTypeError):
                self._refuse(whole)
        elif not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            self._refuse(whole)
        if self.choices is not None and value not in self.choices:
            self._refuse(whole)
        if self.kind in (int, float) and not self._in_range(value):
            self._refuse(whole)
        return self.kind(value)

    def _in_range(self, number: float) -> bool:
        limits = self.metadata
        lowest, highest = limits.get("least", -math.inf), limits.get("most", math.inf)
        return math.isfinite(number) and lowest <= number <= highest and number > limits.get("above", -math.inf)

    def _refuse(self, value: Any) -> NoReturn:
        expected = _EXPECTED[self.kind] if self.choices is None else f"one of {', '.join(map(str, self.choices))}"
        words = {"least": "at least", "above": "above", "most": "at most"}
        limits = [f"{word} {self.metadata[name]}" for name, word in words.items() if name in self.metadata]
        expected = " ".join([expected, " and ".join(limits)]).strip()
        expected = f"a list of one or more, each {expected}" if self.many else expected
        expected = "NAME=VALUE, or a mapping of names to values" if self.named else expected
        hint = ", in quotes in YAML" if self.kind is str and self.choices is None and not self.named else ""
        raise UserError(f"{self.name}={value!r} found; expected {expected}{hint}")


def _read_bool(word: str) -> bool:
    if word.lower() not in _TRUE + _FALSE:
        raise argparse.ArgumentTypeError(f"{word!r} found; expected true or false")
    return word.lower() in _TRUE


def _options(section: type) -> list[_Option]:
    hints = get_type_hints(section)
    found = []
    for each in fields(section):
        if not each.init or each.metadata.get("rest"):
            continue
        hint, choices = hints[each.name], each.metadata.get("choices")
        optional = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
        if optional:
            hint = next(kind for kind in get_args(hint) if kind is not type(None))
        named = get_origin(hint) is dict
        many = named or get_origin(hint) is list
        if many:
            hint = str if named else get_args(hint)[0]
        assert hint in _EXPECTED, f"{section.__name__}.{each.name}: a flag cannot have the type {hint}"
        required = each.default is MISSING and each.default_factory is MISSING
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        choices = None if choices is None else tuple(choices)
        found.append(_Option(each.name, hint, many, optional, required, default, choices, each.metadata, named))
    return found


def add_sections(parser: CommandParser, *sections: type, defaults: Mapping[str, Any] | None = None) -> None:
    """Add the fields of dataclasses as flags. What the user does not give is not in the parsed namespace.

    A bool is `--flag`, `--flag true` or `--flag false`, and `--no_flag` where the default is true or depends; a list
    takes one value or more, a dictionary one word NAME=VALUE or more.

    Args:
        parser: of a command.
        sections: dataclasses whose fields are of bool, int, float, str, lists of these, dictionaries, or optional.
        defaults: field → value that the help shows in place of the field's own default, such as a recipe's.
    """
    parser.rest = rest_of(sections)
    for each in (each for section in sections for each in _options(section)):
        each = replace(each, default=(defaults or {}).get(each.name, each.default))
        group = parser if each.metadata.get("first") else parser.advanced
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(each)}
        read: Callable[[str], Any] = each.read if each.choices is not None or each.kind is bool else each.kind
        settings |= {"type": read, "required": each.required, "choices": each.choices}
        if each.kind is bool:
            settings |= {"nargs": "?", "const": True, "metavar": "BOOL"}
        elif each.choices is None:
            settings["metavar"] = each.metadata.get("metavar", _METAVARS[each.kind])
        if each.many:
            settings["nargs"] = "+"
        group.add_argument(f"--{each.name}", *each.metadata.get("aliases", ()), **settings)
        if each.default is True or (each.kind is bool and each.optional):
            off: dict[str, Any] = {"dest": each.name, "action": "store_false", "default": argparse.SUPPRESS}
            group.add_argument(f"--no_{each.name}", help=argparse.SUPPRESS, **off)


def _help(each: _Option) -> str:
    text = each.metadata.get("help", "")
    if each.default is True:
        text += f" (default true; --no_{each.name} turns it off)"
    elif not (each.required or each.default is None or each.default is False or each.default == {}):
        text += f" (default {' '.join(map(str, each.default)) if each.many else each.default})"
    return text.replace("%", "%%")


def rest_of(sections: Sequence[type]) -> str | None:
    """Find the field that takes the flags that no section knows; None without any."""
    return next((each.name for section in sections for each in fields(section) if each.metadata.get("rest")), None)


def check_values(*sections: Any) -> None:
    """Check the options of sections that were made in Python.

    Raises:
        UserError: a value of another type, or out of its range.
    """
    for section in sections:
        for each in _options(type(section)):
            each.convert(getattr(section, each.name))


def names_of(sections: Sequence[type]) -> set[str]:
    """Collect the names of all fields."""
    return {each.name for section in sections for each in fields(section) if each.init}


def from_values(
    sections: Sequence[type], values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """Make dataclasses of values by name, of a parsed command line, of a YAML file or of Python. Check the types.

    Args:
        sections: dataclasses, as for `add_sections`.
        values: field → value. A word is converted as on the command line.
        defaults: field → value, such as a recipe's; used where `values` has none. Numbers stay as they are written.
            Of two dictionaries, both count, and `values` goes before name by name.

    Returns:
        One object of each section.

    Raises:
        UserError: a name that no section has, a value of another type, or a missing one.
    """
    options = {each.name: each for section in sections for each in _options(section)}
    given, usual, rest = dict(values), dict(defaults or {}), rest_of(sections)
    unknown = {name: value for name, value in (usual | given).items() if name not in options and name != rest}
    if unknown and rest is None:
        name = next(iter(unknown))
        close = difflib.get_close_matches(name, options) or sorted(options)
        raise UserError(f"{name} found, which does not exist; did you mean {', '.join(close)}?")
    found: dict[str, Any] = {} if rest is None else {rest: unknown | given.get(rest, {})}
    for name, value in usual.items():
        if name in options:
            converted = options[name].convert(value)
            found[name] = converted if isinstance(value, str) or options[name].named else value
    for name, value in given.items():
        if name in options:
            converted = options[name].convert(value)
            found[name] = found.get(name, {}) | converted if options[name].named else converted
    missing = [f"--{each.name}" for each in options.values() if each.required and each.name not in found]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; expected a value for each")
    return tuple(section(**{name: found[name] for name in names_of([section]) & set(found)}) for section in sections)
