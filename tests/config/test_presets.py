from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bptool
from bptool.config.keys import fields, flatten
from bptool.config.loading import load_config, parse_config
from bptool.config.presets import preset_names, preset_text
from bptool.config.schema import Config, ModelSettings
from bptool.config.target import PresetTarget

CHECKOUT = Path(bptool.__file__).parents[1]
NAMES = ["tiny", "gpt2", "gpt2-large", "gpt2-medium", "gpt2-xl"]
NAMES += ["llama3-405b", "llama3-70b", "llama3-8b", "llama3.2-1b"]
each_preset = pytest.mark.parametrize("name", NAMES)


def test_the_presets_are_those_of_the_design_with_the_default_first() -> None:
    assert preset_names() == NAMES


@each_preset
def test_a_preset_holds_every_key_and_nothing_else(name: str) -> None:
    assert flatten(tomllib.loads(preset_text(name))).keys() == fields().keys()


@each_preset
def test_a_preset_says_something_about_every_key(name: str) -> None:
    lines = [line for line in preset_text(name).splitlines() if " = " in line.partition("#")[0]]
    assert len(lines) == len(fields())
    assert not [line for line in lines if not line.partition("  # ")[2]]


@each_preset
def test_a_preset_is_valid_and_survives_json(name: str) -> None:
    config = load_config(PresetTarget(name), [])
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert parse_config(config.model_dump(mode="json"), "a run") == config


def test_tiny_is_the_default() -> None:
    assert load_config(PresetTarget("tiny"), []) == Config()


@each_preset
def test_a_preset_runs_as_it_is(name: str) -> None:
    config = load_config(PresetTarget(name), [])
    assert config.data.source == "python-stdlib"
    assert config.data.tokenizer == ("bytes" if name == "tiny" else "bpe")
    assert config.precision.mode == ("fp32" if name == "tiny" else "bf16-mixed")
    assert config.training.sequence_length == (8192 if "llama" in name else config.model.context_length)


def parameters(model: ModelSettings) -> int:
    """Closed form, from the shapes of GPT-2 and Llama alone: every matrix, bias and norm, one by one."""
    width, attention, kv = model.d_model, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    matrices = width * attention + 2 * width * kv + attention * width
    matrices += (3 if model.activation == "swiglu" else 2) * width * model.d_ff
    biases = (attention + 2 * kv + width + model.d_ff + width) if model.bias else 0
    norm = width * (2 if model.norm == "layernorm" and model.bias else 1)
    embedding = model.vocab_size * width * (1 if model.tied_embeddings else 2)
    positions = model.context_length * width if model.position == "learned" else 0
    return embedding + positions + model.n_layers * (matrices + biases + 2 * norm) + norm


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, published: int) -> None:
    assert parameters(load_config(PresetTarget(name), []).model) == published
    assert f"{published:,} parameters" in preset_text(name)


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_comment_on_the_batch_is_right(name: str) -> None:
    """`# 12 x 40 x 1024 = 491,520 tokens an update`: the product that the numbers beside it make."""
    training = load_config(PresetTarget(name), []).training
    factors = (training.micro_batch_size, training.gradient_accumulation_steps, training.sequence_length)
    tokens = factors[0] * factors[1] * factors[2]
    written = " x ".join(str(factor) for factor in factors if factor > 1)
    shown = f"{tokens / 1e6:.1f}M" if "llama" in name else f"{tokens:,}"
    assert f"# {written} = {shown} tokens an update" in preset_text(name)


def test_an_installed_package_finds_its_presets_outside_the_checkout(tmp_path: Path) -> None:
    """Laid out as pyproject.toml tells the wheel to: configs/ becomes bptool/presets."""
    build = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["force-include"] == {"configs": "bptool/presets"}
    for name in ("__init__.py", "errors.py", "config"):
        copy = shutil.copytree if name == "config" else shutil.copy
        (tmp_path / "bptool").mkdir(exist_ok=True)
        copy(CHECKOUT / "bptool" / name, tmp_path / "bptool" / name)
    shutil.copytree(CHECKOUT / "configs", tmp_path / "bptool" / "presets")
    program = "import bptool.config.presets as p; print(p.__file__, *p.preset_names(), len(p.preset_text('tiny')))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    module = tmp_path / "bptool" / "config" / "presets.py"
    assert result.stdout.split() == [str(module), *NAMES, str(len(preset_text("tiny")))]
