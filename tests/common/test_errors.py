"""How a command ends: a line for what the user can mend, a traceback for a bug."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from huggingface_hub.errors import HTTPError, StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from safetensors import SafetensorError

from mlvicx_hf.common.errors import MissingExtraError, UserError, run, user_input


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        UserError("two\nlines"),
        MissingExtraError("two\nlines"),
        OSError("two\nlines"),
        FloatingPointError("two\nlines"),
        StrictDataclassFieldValidationError("size", ValueError("two\nlines")),
        HTTPError("two\nlines"),
        SafetensorError("I/O error: two\nlines"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_user_can_mend_is_one_line_and_code_2(error: Exception, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        run(raising(error))
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("two lines\n")
    assert len(err.splitlines()) == 1


def test_the_name_of_a_validator_is_left_out(capsys: pytest.CaptureFixture[str]):
    error = StrictDataclassClassValidationError("validate_ranges", ValueError("image_size=0 found; expected 1 or more"))
    with pytest.raises(SystemExit):
        run(raising(error))
    assert capsys.readouterr().err == "error: image_size=0 found; expected 1 or more\n"


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), TypeError("a bug"), AssertionError(), KeyError("x"), SafetensorError("a bug")]
)
def test_a_bug_keeps_its_traceback(error: Exception):
    with pytest.raises(type(error)):
        run(raising(error))


def test_an_error_of_a_library_keeps_its_traceback():
    with pytest.raises(ValueError, match="broadcast"):
        run(lambda: np.zeros(2) + np.zeros(3))


def test_a_library_that_checks_what_the_user_gave_raises_a_users_error():
    with pytest.raises(UserError, match="bad value") as caught, user_input():
        raise ValueError("bad value")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(MissingExtraError), user_input():
        raise MissingExtraError("missing")
    with pytest.raises(TypeError), user_input():
        raise TypeError("a bug")


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLVICX_TRACEBACK", "1")
    with pytest.raises(UserError, match="wanted"):
        run(raising(UserError("wanted")))


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        run(raising(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_what_a_command_returns_is_returned():
    assert run(lambda: 3) == 3
