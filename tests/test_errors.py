from __future__ import annotations

import inspect
import re

import pytest

from bptool import errors
from bptool.errors import BptoolError, ConfigError, nearest


def subclasses(cls: type[BptoolError]) -> list[type[BptoolError]]:
    return [cls, *(deeper for child in cls.__subclasses__() for deeper in subclasses(child))]


OURS = [cls for cls in subclasses(BptoolError) if cls.__module__ == errors.__name__]


def test_the_drawn_tree_is_the_real_tree() -> None:
    drawn: dict[str, str] = {}
    ancestors: list[str] = []
    for line in inspect.cleandoc(errors.__doc__ or "").splitlines():
        if match := re.match(r"^([ │├└─]*)(\w+(?:Error|No|Failure|OfMemory|InUse))\b", line):
            depth = len(match[1]) // 4 - 1  # the whole tree is indented once
            ancestors[depth:] = [match[2]]
            drawn[match[2]] = ancestors[depth - 1] if depth else ""
    real = {cls.__name__: cls.__base__.__name__ for cls in OURS if cls.__base__ is not None}
    assert drawn == real | {"BptoolError": ""}


@pytest.mark.parametrize("cls", OURS[1:], ids=lambda cls: cls.__name__)
def test_exit_codes_are_the_documented_ones(cls: type[BptoolError]) -> None:
    documented = {"AnswerIsNo": 1, "UsageError": 2, "EnvironmentFailure": 3}
    family = next(parent.__name__ for parent in cls.__mro__ if parent.__name__ in documented)
    assert cls.exit_code == documented[family]


def test_a_defect_and_an_interruption_read_as_nothing_else() -> None:
    assert errors.EXIT_DEFECT not in {0, 1, 2, 3, errors.EXIT_INTERRUPTED}
    assert errors.EXIT_INTERRUPTED == 128 + 2  # the shell's convention for SIGINT


def test_an_error_keeps_its_remedy_out_of_its_message() -> None:
    error = errors.DeviceError("no GPU", remedy="use training.device=cpu")
    assert str(error) == error.message == "no GPU"
    assert error.remedy == "use training.device=cpu"


def test_a_config_error_tells_all_its_problems() -> None:
    error = ConfigError("run.toml", ["a: unknown key", "b: found 1"], remedy="read the manual")
    assert str(error) == "run.toml: 2 problems\n  a: unknown key\n  b: found 1"
    assert error.problems == ("a: unknown key", "b: found 1")
    assert str(ConfigError("x", ["y"])).startswith("x: 1 problem\n")


@pytest.mark.parametrize(
    ("word", "allowed", "expected"),
    [
        ("n_haeds", ["n_heads", "n_layers"], ", did you mean 'n_heads'?"),
        ("model.n_haeds", ["model.n_heads", "model.d_model"], ", did you mean 'model.n_heads'?"),
        ("warmup_step", ["model.norm", "schedule.warmup_steps"], ", did you mean 'schedule.warmup_steps'?"),
        ("xyzzy", ["model.norm", "run.seed"], ""),
        ("anything", [], ""),
    ],
)
def test_nearest(word: str, allowed: list[str], expected: str) -> None:
    assert nearest(word, allowed) == expected
