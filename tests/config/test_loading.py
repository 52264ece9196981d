from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bptool.config.asked import read_command_line
from bptool.config.loading import load_config, parse_config
from bptool.config.schema import Config, ModelSettings
from bptool.config.target import CodeTarget, resolve_target
from bptool.errors import ConfigError, StorageError


def load(target: Path | str | None, *overrides: str) -> Config:
    return load_config(resolve_target(None if target is None else str(target)), overrides)


def error_of(target: Path | str | None, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(target, *overrides)
    return caught.value


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text("[training]\nsteps = 5\n[optimizer]\nlr = 1  # a whole number for a float\n", "utf-8")
    return file


class TestToml:
    def test_a_file_stands_over_the_defaults_and_the_command_line_over_both(self, run_toml: Path) -> None:
        config = load(run_toml, "training.steps=7", "model.d_model=128")
        assert (config.training.steps, config.optimizer.lr, config.model.d_model) == (7, 1.0, 128)
        assert config.model.head_dim == 32  # auto, worked out after the overrides
        assert config.schedule == Config().schedule

    def test_auto_of_a_preset_follows_an_override(self) -> None:
        assert load("gpt2", "model.d_model=1536").model.d_ff == 4 * 1536
        assert load("tiny", "model.context_length=64").training.sequence_length == 64

    def test_a_mistake_in_a_file_names_the_file(self, run_toml: Path) -> None:
        run_toml.write_text("[training]\nsteps = 0\n", "utf-8")
        error = error_of(run_toml)
        assert str(error) == f"{run_toml}: 1 problem\n  training.steps: found 0, expected a whole number above 0"

    def test_mistakes_of_a_file_and_a_command_line_are_told_apart(self, run_toml: Path) -> None:
        run_toml.write_text("[training]\nsteps = 0\n", "utf-8")
        error = error_of(run_toml, "optimizer.lr=fast", "nonsense=1")
        assert str(error).startswith(f"{run_toml}: 3 problems\n")
        assert error.problems == (
            "nonsense: unknown key (from the command line)",
            "training.steps: found 0, expected a whole number above 0",
            'optimizer.lr: found "fast", expected a number above 0 (from the command line)',
        )

    def test_a_conflict_with_an_override_is_the_command_lines(self) -> None:
        error = error_of("gpt2", "model.n_heads=7")
        assert str(error).startswith("command line: 1 problem\n  model.d_model = 768 is not divisible")

    def test_a_section_that_a_file_gets_wrong_is_not_mended_by_an_override(self, run_toml: Path) -> None:
        run_toml.write_text("model = 3\n", "utf-8")
        error = error_of(run_toml, "model.n_heads=8")
        assert error.problems == ("model: found 3, expected a table of keys such as 'model.n_layers'",)

    @pytest.mark.parametrize(
        ("text", "place"),
        [
            ("[training]\nsteps 5\n", "line 2, column 7"),
            ("a = 1\na = 2\n", "line 2, column 6"),
            ("[training]\nsteps = 'x", "line 2, column 11"),
        ],
    )
    def test_a_file_that_is_no_toml(self, run_toml: Path, text: str, place: str) -> None:
        run_toml.write_text(text, "utf-8")
        error = error_of(run_toml)
        assert str(error).startswith(f"{run_toml}: 1 problem\n  not TOML: ")
        assert f"(at {place})" in str(error)

    def test_a_byte_order_mark_is_no_mistake(self, run_toml: Path) -> None:
        run_toml.write_bytes(b"\xef\xbb\xbf[training]\nsteps = 5\n")
        assert load(run_toml).training.steps == 5

    def test_a_file_that_is_no_utf8(self, run_toml: Path) -> None:
        run_toml.write_bytes(b'[run]\nname = "caf\xe9"\n')
        assert error_of(run_toml).problems == ("not UTF-8 text: invalid continuation byte at byte 17",)

    def test_a_file_that_cannot_be_read(self, run_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = resolve_target(str(run_toml))

        def refuse(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(StorageError, match=r"run\.toml cannot be read: Permission denied"):
            load_config(target, [])

    def test_a_file_that_is_gone(self, run_toml: Path) -> None:
        target = resolve_target(str(run_toml))
        run_toml.unlink()
        with pytest.raises(StorageError, match=r"run\.toml cannot be read: No such file"):
            load_config(target, [])

    def test_malformed_overrides_are_the_command_lines(self) -> None:
        assert str(error_of(None, "training.steps")).startswith("command line: 1 problem")


class TestRunFolder:
    def test_a_runs_own_config_comes_back(self, tmp_path: Path) -> None:
        config = load("gpt2", "run.name=mine", "optimizer.lr=1e-5")
        (tmp_path / "config.json").write_text(config.model_dump_json(), "utf-8")
        assert load(tmp_path) == load(tmp_path / "config.json") == config
        assert load(tmp_path, "run.seed=2").run.seed == 2

    def test_a_config_of_another_version_names_what_it_does_not_know(self, tmp_path: Path) -> None:
        values = Config().model_dump()
        values["training"]["new_key"] = 1
        (tmp_path / "config.json").write_text(json.dumps(values), "utf-8")
        assert error_of(tmp_path).problems == ("training.new_key: unknown key",)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ('{"run": }', "not JSON: Expecting value (at line 1, column 9)"),
            ("", "not JSON: Expecting value (at line 1, column 1)"),
            ("[1]", "found a list, expected a JSON object"),
            ("3", "found 3, expected a JSON object"),
        ],
    )
    def test_a_config_that_is_no_json_object(self, tmp_path: Path, text: str, problem: str) -> None:
        (tmp_path / "config.json").write_text(text, "utf-8")
        assert error_of(tmp_path).problems == (problem,)


class TestHuggingFace:
    """With a stand-in for the translation of config.json, which has its own tests."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        def reading(config: dict[str, Any], source: str) -> SimpleNamespace:
            assert source == str(tmp_path / "config.json")
            settings = ModelSettings(n_layers=config["n_layer"], d_model=64, n_heads=2, context_length=32)
            return SimpleNamespace(settings=settings, defaults={"n_heads": "n_head = 2", "d_ff": "n_inner = 256"})

        module = ModuleType("bptool.config.huggingface")
        monkeypatch.setattr(module, "read_huggingface", reading, raising=False)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 3}', "utf-8")
        return tmp_path

    def test_the_shape_is_the_files_and_the_rest_the_defaults(self, folder: Path) -> None:
        config = load(folder / "config.json")
        assert (config.model.n_layers, config.model.weights, config.training.sequence_length) == (3, "", 32)
        assert config.data == Config().data
        assert load(folder) == config

    def test_a_folder_brings_weights_and_tokenizer_and_the_file_alone_does_not(self, folder: Path) -> None:
        (folder / "model-00001-of-00002.safetensors").touch()
        (folder / "tokenizer.json").touch()
        config = load(folder)
        assert config.model.weights == str(folder)
        assert config.data.tokenizer == str(folder / "tokenizer.json")
        assert load(folder / "config.json").model.weights == ""
        assert load(folder, "model.weights=").model.weights == ""

    def test_overrides_stand_over_it(self, folder: Path) -> None:
        assert load(folder, "model.n_layers=1").model.n_layers == 1

    def test_what_the_file_leaves_out_is_noted_unless_it_was_typed(self, folder: Path) -> None:
        def notes(*overrides: str) -> tuple[str, ...]:
            return read_command_line(str(folder), overrides, command="train").notes

        taken = f"{folder} leaves out keys, and its family's defaults were taken: "
        assert notes() == (f"{taken}n_head = 2, n_inner = 256",)
        assert notes("model.n_heads=4") == (f"{taken}n_inner = 256",)
        assert notes("model.n_heads=4", "model.d_ff=9") == ()
        assert read_command_line(None, [], command="train").notes == ()


class TestCode:
    def test_defaults_and_overrides(self) -> None:
        config = load("a.module:vit", "training.steps=3")
        assert config.run.workload == "a.module:vit"
        assert config.training.steps == 3
        assert config.model == Config().model

    def test_the_model_and_the_data_are_its_own(self) -> None:
        error = error_of("a.module:vit", "model.d_model=3", "data.source=x", "training.steps=3")
        assert error.problems == (
            "model.d_model: a.module:vit brings its own model and data",
            "data.source: a.module:vit brings its own model and data",
        )
        assert error.remedy == "Make the change in a.module"

    def test_a_run_of_it_refuses_them_too(self, tmp_path: Path) -> None:
        config = load_config(CodeTarget("vit", "a.module"), [])
        (tmp_path / "config.json").write_text(config.model_dump_json(), "utf-8")
        assert "brings its own model" in str(error_of(tmp_path, "model.d_model=3"))
        assert load(tmp_path, "run.workload=", "model.d_model=32").model.d_model == 32

    def test_a_workload_of_a_wrong_type_is_a_mistake_like_any_other(self, run_toml: Path) -> None:
        run_toml.write_text("[run]\nworkload = 3\n", "utf-8")
        assert error_of(run_toml, "model.d_model=32").problems == ("run.workload: found 3, expected text",)


def test_parse_config_takes_nested_and_dotted_keys() -> None:
    nested = parse_config({"model": {"rope": {"theta": 5e5}}, "training": {"steps": 3}}, "here")
    assert parse_config({"model.rope.theta": 5e5, "training.steps": 3}, "here") == nested
    assert parse_config({}, "here") == Config()
