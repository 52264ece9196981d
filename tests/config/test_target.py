from __future__ import annotations

from pathlib import Path

import pytest

from bptool.config.presets import preset_names
from bptool.config.target import CodeTarget, FileTarget, PresetTarget, resolve_target
from bptool.errors import StorageError, TargetError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and we are in it."""
    here = tmp_path / "work.d"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def refusal(text: str) -> str:
    with pytest.raises(TargetError) as caught:
        resolve_target(text)
    assert all(name in caught.value.remedy for name in preset_names())
    assert "FILE.py:NAME" in caught.value.remedy
    return str(caught.value)


def test_nothing_is_the_default_preset() -> None:
    assert resolve_target(None) == PresetTarget("tiny") == resolve_target("tiny")


@pytest.mark.parametrize("name", preset_names())
def test_presets(name: str) -> None:
    target = resolve_target(name)
    assert (target, target.name, str(target)) == (PresetTarget(name), name, f"preset '{name}'")


def test_a_preset_wins_over_a_folder_of_its_name(folder: Path) -> None:
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "config.json").touch()
    assert resolve_target("gpt2") == PresetTarget("gpt2")
    assert resolve_target("./gpt2") == FileTarget("gpt2", Path("gpt2"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("my run.toml", "my run"),
        ("deep/v1.2.toml", "v1.2"),
        ("deep/config.json", "deep"),  # a file that is always called so says nothing
        ("deep/other.json", "other"),
        ("config.json", "work.d"),
        ("deep", "deep"),
        ("deep/", "deep"),
        (".", "work.d"),
        (".hidden.toml", "hidden"),  # no run's name begins with a dot
        ("a:b.toml", "a:b"),  # a file that exists is no callable
    ],
)
def test_files_and_folders_name_a_run(folder: Path, text: str, name: str) -> None:
    (folder / "deep").mkdir()
    for file in ("config.json", "deep/config.json", "deep/other.json", "deep/v1.2.toml", "my run.toml"):
        (folder / file).touch()
    (folder / ".hidden.toml").touch()
    (folder / "a:b.toml").touch()
    target = resolve_target(text)
    assert target == FileTarget(name, Path(text))
    assert str(target) == str(Path(text))


def test_callables(folder: Path) -> None:
    (folder / "my_model.py").write_text("raise RuntimeError('never run')", "utf-8")
    in_file = resolve_target("my_model.py:vit")
    assert (in_file, str(in_file)) == (CodeTarget("vit", Path("my_model.py")), "my_model.py:vit")
    in_module = resolve_target("package.module:vit")  # whether it can be imported is seen when it is
    assert (in_module, str(in_module)) == (CodeTarget("vit", "package.module"), "package.module:vit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gtp2", "'gtp2' is neither a preset nor a file, did you mean 'gpt2'?"),
        ("gpt2_xl", "'gpt2_xl' is neither a preset nor a file, did you mean 'gpt2-xl'?"),
        ("my_rum.toml", "'my_rum.toml' is neither a preset nor a file, did you mean 'my_run.toml'?"),
        ("runs/tint", "'runs/tint' is neither a preset nor a file, did you mean 'runs/tiny'?"),
        ("xyzzy/quux", "'xyzzy/quux' is neither a preset nor a file"),
        ("", "'' is neither a preset nor a file"),
        ("x" * 5000, f"'{'x' * 5000}' is neither a preset nor a file"),
        ("a\0b", "'a\0b' is neither a preset nor a file"),
        ("runs", "the folder 'runs' holds no config.json"),
        ("notes.txt", "'notes.txt' is neither a .toml nor a .json file"),
        ("my_model.py", "'my_model.py' needs the name of a callable: 'my_model.py:NAME' (it defines vit, gpt)"),
        ("broken.py", "'broken.py' needs the name of a callable: 'broken.py:NAME'"),
        ("my_modle.py:vit", "'my_modle.py:vit': there is no file 'my_modle.py', did you mean 'my_model.py'?"),
        ("my_model.py:", "'my_model.py:': '' cannot be the name of a callable"),
        ("my_model.py:a b", "'my_model.py:a b': 'a b' cannot be the name of a callable"),
        (":vit", "':vit': '' is neither a .py file nor the dotted name of a module"),
        ("a-b:vit", "'a-b:vit': 'a-b' is neither a .py file nor the dotted name of a module"),
        ("https://a.b/c", "'https://a.b/c': '//a.b/c' cannot be the name of a callable"),
    ],
)
def test_what_is_no_target_is_told_with_the_nearest_that_is(folder: Path, text: str, message: str) -> None:
    (folder / "runs" / "tiny").mkdir(parents=True)
    (folder / "my_run.toml").touch()
    (folder / "notes.txt").touch()
    (folder / "my_model.py").write_text("def vit(): ...\n\ndef gpt(): ...\n", "utf-8")
    (folder / "broken.py").write_text("def vit(:", "utf-8")
    assert refusal(text) == message


def test_a_path_that_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(StorageError, match=r"'secret/run\.toml' cannot be read: Permission denied"):
        resolve_target("secret/run.toml")
