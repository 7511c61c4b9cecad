"""Read one cell of labels: a number, a class name, names, a list or an object. The same for every kind of table.

Tables give text. Lists and objects of typed tables come as JSON, which `tables.as_text` writes.
"""

import ast
import io
import json
import math
import re
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..options import check_choice
from .tables import NO_VALUE, CellType

NO_FINDING = "no finding"
_YES = ("1", "true", "yes", "y", "positive", "pos", "present")
_NO = ("0", "false", "no", "n", "negative", "neg", "absent")
# As `plain_cell` writes them:
BINARY = dict.fromkeys(_NO, 0.0) | dict.fromkeys(_YES, 1.0) | dict.fromkeys(NO_VALUE, math.nan)
MINUS_ONE = "-1"  # an uncertain label
UNCERTAIN = {"ignore": math.nan, "ones": 1.0, "zeros": 0.0}  # policy → value of an uncertain label
SEPARATORS = ("|", ";", ",")  # of names, the first that a column holds
_FLAG = re.compile(r"[+-]?[01](?=([.,]0+)?$)")  # 1, 1.0, 1.00, and 1,0 where the comma is decimal
_NUMERIC = re.compile(r"[\s.+-]*\d([\s\d.+-]|(?<=[\d.])[eE])*")  # 1, 0.5, 1e-3, and 0 1 0 as well, but not E84


def label_cells(uncertain: str | None, hint: str = "") -> CellType:
    """Make the type of cells that hold labels: 1 or 0, also as words, nothing for unknown, and -1 for uncertain.

    Args:
        uncertain: what -1 becomes: "ignore" (unknown), "ones" or "zeros". With None it is no label.
        hint: end of the error message.

    Raises:
        UserError: `uncertain` has another value.
    """
    values = binary_values(uncertain)
    also = "" if uncertain is None else ", -1"
    return CellType(lambda text: values[plain_cell(text)], f"0, 1{also}, or empty for unknown{hint}")


def binary_values(uncertain: str | None) -> Mapping[str, float]:
    """Map the texts of a binary label, as `plain_cell` writes them, to 1, 0 or NaN."""
    if uncertain is None:
        return BINARY
    return BINARY | {MINUS_ONE: UNCERTAIN[check_choice("uncertain", uncertain, UNCERTAIN)]}


def plain_cell(text: str) -> str:
    """Write 1, 0 and -1 without sign, decimals and their point or comma, and anything else in lower case."""
    found = _FLAG.match(text)
    return text.lower() if found is None else str(int(found[0]))


def is_unknown(text: str) -> bool:
    """Whether a cell stands for a label that is not known."""
    return text.lower() in NO_VALUE


def is_literal(text: str) -> bool:
    """Whether a cell holds a list or an object."""
    return text[:1] in ("[", "(", "{") and text[-1:] in ("]", ")", "}")


def is_number(text: str) -> bool:
    """Whether a text is made of numbers, which are no names."""
    return _NUMERIC.fullmatch(text) is not None


@dataclass(frozen=True)
class Findings:
    """What a cell says of the findings: 1, 0 or NaN for some, and one value for all that it does not name."""

    values: dict[str, float] = field(default_factory=dict)
    others: float = 0.0


NOTHING_KNOWN = Findings(others=math.nan)


@dataclass(frozen=True)
class FindingsReader:
    """Reads the cells of a column of findings.

    Attributes:
        separator: what stands between names outside a list.
        names: the findings in the order of lists of numbers. Without them such a list is refused.
        uncertain: what -1 means, as for `label_cells`.
    """

    separator: str = "|"
    names: Sequence[str] | None = None
    uncertain: str | None = None

    def read(self, text: str) -> Findings:
        """Read a cell.

        Raises:
            ValueError: the cell is none of what the documentation names.
        """
        if is_unknown(text):
            return NOTHING_KNOWN
        content: Any = _literal(text) if is_literal(text) else [part.strip() for part in text.split(self.separator)]
        if isinstance(content, dict):
            values = {self._name(name): self._value(value) for name, value in content.items()}
            return Findings(values, math.nan)
        if content and all(isinstance(item, (bool, int, float)) or item is None for item in content):
            return self._numbers(content)
        if content and self.names is not None and all(isinstance(item, str) and is_number(item) for item in content):
            return self._numbers(content)
        found = {self._name(item) for item in content}
        normal = {name for name in found if same_name(name) == NO_FINDING}
        if normal and len(found) > 1:
            raise ValueError(text)
        return Findings(dict.fromkeys(found - normal, 1.0))

    def _name(self, item: object) -> str:
        if not isinstance(item, str) or is_unknown(item.strip()) or is_number(item) or set(item) & set('[]{}"'):
            raise ValueError(item)
        if item.strip()[0] == "'" or item.strip()[-1] == "'":  # a broken list, not Hodgkin's disease
            raise ValueError(item)
        name = " ".join(item.split())
        if self.names is not None and same_name(name) != NO_FINDING:
            known = {same_name(known): known for known in self.names}
            if same_name(name) not in known:
                raise ValueError(name)
            return known[same_name(name)]
        return name

    def _value(self, value: object) -> float:
        if isinstance(value, bool) or value is None:
            return math.nan if value is None else float(value)
        text = "" if isinstance(value, float) and math.isnan(value) else str(value)
        try:
            return binary_values(self.uncertain)[plain_cell(text)]
        except KeyError:
            raise ValueError(text) from None

    def _numbers(self, items: Sequence[Any]) -> Findings:
        if self.names is None or len(items) != len(self.names):
            raise ValueError(items)
        return Findings({name: self._value(item) for name, item in zip(self.names, items, strict=True)})


def _literal(text: str) -> Any:
    """Read a list or an object in the spelling of JSON or of Python."""
    try:
        found = json.loads(text)
    except ValueError:
        found = _python_literal(text)
    if not isinstance(found, (list, tuple, set, dict)):
        raise ValueError(text)
    return found


def _python_literal(text: str) -> Any:
    try:
        tokens = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
        # NumPy writes ['a' 'b'] without a comma, which Python would read as the one text 'ab'.
        solid = [kind for kind in tokens if kind not in (tokenize.NL, tokenize.NEWLINE)]
        if any(pair == (tokenize.STRING, tokenize.STRING) for pair in pairwise(solid)):
            raise ValueError(text)
        return ast.literal_eval(text)
    except (SyntaxError, tokenize.TokenError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(text) from error


def same_name(name: str) -> str:
    """Write a finding so that case, blanks, `_`, and `-` between words make no difference. TB- is not TB.

    An Ö of one character and one of two (O and dots, as macOS writes it) are the same.
    """
    name = unicodedata.normalize("NFC", name)
    return " ".join(re.sub(r"\s-\s|(?<=[^\W_])-(?=[^\W_])|[\s_]+", " ", name).lower().split())


def one_spelling(names: Iterable[str]) -> dict[str, str]:
    """Map each spelling of a finding to the most frequent one, or else to the first in the alphabet."""
    chosen: dict[str, str] = {}
    counts = Counter(names)
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        chosen.setdefault(_spelled(name), name)
    return {name: chosen[_spelled(name)] for name in counts}


def _spelled(name: str) -> str:
    """What spellings of one finding share. Of numbers every sign counts: 1 is not -1."""
    return name if is_number(name) else same_name(name)
