from __future__ import annotations

import re
import subprocess
import sys

import pytest
from command_line import invoke, process_environment

from bptool import __version__
from bptool.cli.main import app
from bptool.config.keys import all_keys
from bptool.config.loading import load_config
from bptool.config.target import resolve_target

COMMANDS = sorted(command.name or "" for command in app.registered_commands)
HEAVY = ("torch", "numpy", "tensorboard", "safetensors", "tokenizers", "rich")


def test_all_commands_are_here() -> None:
    assert set(COMMANDS) >= {"train", "sample", "export"}
    listed = invoke("--help").out
    assert [name for name in COMMANDS if not re.search(rf"^  {name} ", listed, re.MULTILINE)] == []
    assert "..." not in listed.partition("Commands:")[2]  # a summary that is cut short


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    """In a fresh interpreter, through the very function that the console script calls."""
    arguments = [command, "--help"] if command else ["--help"]
    program = (
        "import atexit, sys\n"
        f"sys.argv = ['bptool', *{arguments}]\n"
        f"atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr))\n"
        "from bptool.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=process_environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.startswith("Usage: bptool")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_has_an_example_on_a_line_of_its_own(command: str) -> None:
    help_text = invoke(command, "--help").out
    examples = re.findall(r"^ {4}(bptool .*)$", help_text, re.MULTILINE)
    assert examples
    assert all(example.startswith(f"bptool {command}") for example in examples)
    assert max(len(line) for line in help_text.splitlines()) <= 80


def test_the_examples_of_train_are_settings_that_load() -> None:
    help_text = invoke("train", "--help").out
    examples = [line.split()[2:] for line in re.findall(r"^ {4}(bptool train .*)$", help_text, re.MULTILINE)]
    for words in examples:
        overrides = [word for word in words if "=" in word]
        targets = [word for word in words if "=" not in word and not {"--resume"} & set(words)]
        load_config(resolve_target(targets[0] if targets else None), overrides)


def test_keys_are_listed_with_defaults_and_meanings() -> None:
    done = invoke("train", "--keys")
    assert done.code == 0
    lines = done.out.splitlines()
    assert [line.split(" = ")[0] for line in lines[::2]] == list(all_keys())
    assert lines[lines.index("model.qk_norm = false") + 1].startswith("    RMS-normalise each head's queries and keys")
    assert 'data.source = "python-stdlib"' in lines


def test_version() -> None:
    done = invoke("--version")
    assert (done.code, done.out) == (0, f"bptool {__version__}\n")


def test_without_a_command_there_is_help_and_no_success() -> None:
    done = invoke()
    assert done.code == 2
    assert "Commands:" in done.out + done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--reusme", "x"], "--resume"),
        (["sample"], "'RUN'"),
        (["export", "a"], "'DIR'"),
        (["sample", "a", "--tokens", "0"], "--tokens"),
        (["sample", "a", "--temperature", "-1"], "--temperature"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], words: str) -> None:
    done = invoke(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert words in done.err
