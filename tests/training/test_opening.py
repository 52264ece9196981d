from __future__ import annotations

import json
from pathlib import Path

import pytest

from bptool.errors import ConfigError, ResumeError, UsageError
from bptool.training.opening import OpenedRun, open_new, open_resumed
from bptool.training.run_folder import read_run_config

MODEL = "from bptool import Workload\ndef vit():\n    raise AssertionError('run before it was asked for')\n"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def new(target: str | None = None, *overrides: str, force: bool = False) -> OpenedRun:
    opened = open_new(target, overrides, print, force=force)
    opened.folder.close()
    return opened


def resumed(run: str, target: str | None = None, *overrides: str) -> tuple[OpenedRun, list[str]]:
    notes: list[str] = []
    opened = open_resumed(run, target, overrides, notes.append)
    opened.folder.close()
    return opened, notes


class TestNew:
    def test_named_after_the_target_with_a_number_where_that_is_taken(self) -> None:
        assert [new().folder.path for _ in range(2)] == [Path("runs/tiny"), Path("runs/tiny-2")]
        assert new("gpt2").folder.name == "gpt2"

    def test_named_by_the_command_line(self) -> None:
        opened = new(None, "run.name=mine", "run.directory=elsewhere")
        assert opened.folder.path == Path("elsewhere/mine")
        assert read_run_config(opened.folder.path) == opened.config

    def test_named_by_its_own_file(self) -> None:
        Path("experiment.toml").write_text('[run]\nname = "own"\n')
        assert new("experiment.toml").folder.name == "own"
        Path("experiment.toml").write_text("[training]\nsteps = 3\n")
        assert new("experiment.toml").folder.name == "experiment"

    def test_the_settings_of_another_run_without_its_name(self) -> None:
        new(None, "run.name=mine", "training.steps=7")
        again = new("runs/mine")
        assert again.folder.name == "mine-2"
        assert again.config.training.steps == 7

    def test_force_takes_the_name_itself(self) -> None:
        new()
        assert new(force=True).folder.name == "tiny"

    def test_a_wrong_config_makes_no_folder(self) -> None:
        with pytest.raises(ConfigError):
            new(None, "training.steps=0")
        assert not Path("runs").exists()

    def test_the_users_model_is_not_run_yet(self) -> None:
        Path("my_model.py").write_text(MODEL)
        opened = new("my_model.py:vit")
        assert opened.code is not None
        assert opened.folder.name == "vit"
        assert opened.config.run.workload == "my_model.py:vit"

    def test_a_users_model_is_never_taken_for_the_built_in_one(self) -> None:
        Path("my_model.py").write_text(MODEL)
        new("my_model.py:vit")
        for words in (("runs/vit",), (None, "run.workload=my_model.py:vit")):
            with pytest.raises(UsageError, match="names the user's own model") as caught:
                new(*words)
            assert caught.value.remedy == "bptool train my_model.py:vit"


class TestResumed:
    def test_nothing_changes_by_itself(self) -> None:
        opened = new(None, "training.steps=7", "optimizer.lr=0.5")
        again, notes = resumed("tiny")
        assert again.config == opened.config
        assert (again.resumed, again.data_may_change, notes) == (True, False, [])

    def test_changes_are_said(self) -> None:
        new(None, "training.steps=600", "logging.every=3")
        again, notes = resumed("runs/tiny", None, "training.steps=900", "logging.every=5")
        assert notes == ["training.steps: 600 -> 900", "logging.every: 3 -> 5"]
        assert again.config.training.steps == 900

    def test_a_file_may_not_change_the_schedule_unnamed(self) -> None:
        new()
        Path("longer.toml").write_text("[training]\nsteps = 900\n")
        with pytest.raises(ResumeError, match=r"training\.steps: \d+ -> 900"):
            resumed("tiny", "longer.toml")
        assert resumed("tiny", "longer.toml", "training.steps=900")[0].config.training.steps == 900

    def test_the_config_is_kept_only_when_the_run_goes_on_with_it(self) -> None:
        new(None, "optimizer.lr=0.25")
        opened, _ = resumed("tiny", None, "optimizer.lr=0.5")
        assert read_run_config(Path("runs/tiny")).optimizer.lr == 0.25  # the data, say, may still be refused
        opened.keep_config()
        assert read_run_config(Path("runs/tiny")).optimizer.lr == 0.5

    @pytest.mark.parametrize(
        ("override", "may"),
        [("data.source=x.txt", True), ("data.validation_fraction=0.1", True), ("run.seed=3", False)],
    )
    def test_whether_the_data_may_change(self, override: str, may: bool) -> None:
        new()
        assert resumed("tiny", None, override)[0].data_may_change is may

    def test_a_moved_run(self) -> None:
        new()
        Path("runs/tiny").rename("renamed")
        again, notes = resumed("renamed")
        assert (again.config.run.name, again.config.run.directory, notes) == ("renamed", ".", [])

    def test_a_run_below_another_directory(self) -> None:
        new(None, "run.directory=elsewhere")
        assert resumed("tiny", None, "run.directory=elsewhere")[0].folder.path == Path("elsewhere/tiny")

    def test_no_such_run(self) -> None:
        new()
        with pytest.raises(ResumeError, match="no run at runs/tinny"):
            resumed("runs/tinny")

    def test_the_users_model_must_be_named(self) -> None:
        Path("my_model.py").write_text(MODEL)
        new("my_model.py:vit", "training.steps=7")
        with pytest.raises(ResumeError, match="trains the user's own model") as caught:
            resumed("vit")
        assert caught.value.remedy == "bptool train my_model.py:vit --resume vit"

    def test_the_users_model_named_goes_on_with_the_runs_own_settings(self) -> None:
        Path("my_model.py").write_text(MODEL)
        opened = new("my_model.py:vit", "training.steps=7", "optimizer.lr=0.5")
        again, notes = resumed("vit", "my_model.py:vit")
        assert again.config == opened.config
        assert again.code == opened.code
        assert notes == []

    def test_not_with_another_model(self) -> None:
        Path("my_model.py").write_text(MODEL + "def other():\n    pass\n")
        new("my_model.py:vit")
        new()
        for run, target in (("vit", "my_model.py:other"), ("tiny", "my_model.py:vit")):
            with pytest.raises(ResumeError, match=r"run\.workload"):
                resumed(run, target)
        with pytest.raises(ResumeError, match="own model"):
            resumed("vit", "tiny")

    def test_a_broken_config(self) -> None:
        new()
        Path("runs/tiny/config.json").write_text(json.dumps({"training": {"stepz": 1}}))
        with pytest.raises(ConfigError, match="stepz"):
            resumed("tiny")
