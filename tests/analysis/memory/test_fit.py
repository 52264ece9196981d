from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_runs import Perceptron, masked_regression, question_of, small_config
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from bptool.analysis.machine import Machine
from bptool.analysis.memory.fit import PeakPrediction, check_fit, out_of_memory, predict_peak
from bptool.analysis.memory.least import least_bytes, state_bytes
from bptool.analysis.memory.simulation import simulate
from bptool.analysis.question import Question
from bptool.config.loading import load_config
from bptool.config.overrides import override, parse_overrides
from bptool.config.schema import Config
from bptool.config.target import resolve_target
from bptool.errors import OutOfMemory
from bptool.gpus import gpu_named
from bptool.model.accounting import count_parameters
from bptool.training.workload import Workload, transformer_workload

GIB = 2**30


def preset(name: str, *overrides: str) -> Config:
    return load_config(resolve_target(name), overrides)


def peak(config: Config) -> int:
    return predict_peak(question_of(config)).peak_bytes


def question(config: Config, available: int | None, workload: Workload | None = None) -> Question:
    return Question("", (), config, workload or transformer_workload(config), Machine(None, available))


def refusal(config: Config, available: int) -> OutOfMemory:
    with pytest.raises(OutOfMemory) as caught:
        check_fit(question(config, available))
    return caught.value


def proposed(error: OutOfMemory) -> tuple[list[str], str]:
    """The overrides of the remedy's line, and the peak that it promises."""
    first, line = error.remedy.splitlines()
    assert first == "these would fit:"
    words, promised = re.fullmatch(r"(\S.*\S)   \((.*)\)", line).groups()  # type: ignore[union-attr]
    return words.split(" "), promised


class TestStateBytes:
    @pytest.mark.parametrize(
        ("optimizer", "copies"), [("gradient-descent", 2), ("sgd", 3), ("adam", 4), ("adamw", 4), ("adafactor", 2)]
    )
    @pytest.mark.parametrize(
        ("mode", "each"), [("fp32", 4), ("tf32", 4), ("bf16-mixed", 4), ("fp16-mixed", 4), ("bf16", 2)]
    )
    def test_weights_gradients_and_state(self, optimizer: str, copies: int, mode: str, each: int) -> None:
        config = small_config({"optimizer.name": optimizer, "precision.mode": mode})
        n_parameters = count_parameters(config.model).total
        assert state_bytes(config, transformer_workload(config)) == each * copies * n_parameters

    @pytest.mark.parametrize(("update", "each"), [("nearest", 8), ("stochastic", 8), ("master", 16)])
    def test_master_copies(self, update: str, each: int) -> None:
        """ZeRO's 16 bytes a parameter: 2 + 2 + (4 + 4 + 4)."""
        config = small_config({"precision.mode": "bf16", "precision.bf16_update": update})
        n_parameters = count_parameters(config.model).total
        assert state_bytes(config, transformer_workload(config)) == each * n_parameters

    def test_sgd_without_momentum_has_no_state(self) -> None:
        config = small_config({"optimizer.name": "sgd", "optimizer.momentum": 0.0})
        assert state_bytes(config, transformer_workload(config)) == 8 * count_parameters(config.model).total

    def test_frozen_weights_have_neither(self) -> None:
        def model() -> nn.Module:
            perceptron = Perceptron()
            perceptron.first.requires_grad_(False)  # 3 x 5 + 5
            return perceptron  # and 5 x 2 + 2

        workload = replace(masked_regression(), model=model)
        assert state_bytes(small_config(), workload) == 4 * (20 + 12 * 4)

    def test_weights_in_a_format_of_the_models_own(self) -> None:
        workload = masked_regression(torch.float64)
        assert state_bytes(small_config(), workload) == 8 * 32 * 4

    @pytest.mark.parametrize("optimizer", ["gradient-descent", "sgd", "adam", "adamw", "muon", "adafactor"])
    @pytest.mark.parametrize("mode", ["fp32", "bf16"])
    def test_it_is_never_more_than_the_peak(self, optimizer: str, mode: str) -> None:
        """Else a run that fits would be refused."""
        config = small_config({"optimizer.name": optimizer, "precision.mode": mode})
        assert state_bytes(config, transformer_workload(config)) <= peak(config)

    @pytest.mark.parametrize("settings", [{"policy": "offload"}, {"policy": "plan", "plan": "31*offload+none"}])
    def test_what_waits_in_host_memory_is_none_of_it(self, settings: dict[str, str]) -> None:
        shape = {"model.n_layers": 32, "model.context_length": 512, "model.d_ff": 16, "optimizer.name": "sgd"}
        config = small_config({**shape, **{f"activation_checkpoint.{key}": word for key, word in settings.items()}})
        workload = transformer_workload(config)
        on_gpu = simulate(config, workload, Machine(gpu_named("a100-40gb")))
        cublas = next(a.n_bytes for a in on_gpu.allocations if a.op == "cuBLAS workspace")
        assert least_bytes(config, workload) <= int(on_gpu.live_bytes.max()) - cublas

    def test_else_each_blocks_input_is(self) -> None:
        """2 blocks, 2 sequences of 16 tokens, 16 numbers of 4 bytes each."""
        config = small_config()
        workload = transformer_workload(config)
        assert least_bytes(config, workload) - state_bytes(config, workload) == 2 * 2 * 16 * 16 * 4


class TestPredictPeak:
    def test_no_phase_is_above_the_step(self) -> None:
        config = small_config({"activation_checkpoint.policy": "full"})
        prediction = predict_peak(question_of(config))
        assert prediction.phase_peaks_bytes.keys() >= {"data", "forward", "recompute", "backward", "clip", "optimizer"}
        assert max(prediction.phase_peaks_bytes.values()) == prediction.peak_bytes

    def test_waiting_micro_batches_add_their_own_bytes(self) -> None:
        """Each holds 2 x 16 tokens and as many targets, 8 bytes each."""
        few, many = (peak(small_config({"training.gradient_accumulation_steps": count})) for count in (2, 50))
        assert many - few == 48 * 2 * 2 * 16 * 8

    def test_nothing_is_compiled_and_no_gpu_is_needed(self) -> None:
        changes = {"training.compile": True, "precision.mode": "tf32", "training.device": "cuda"}
        assert peak(small_config(changes)) == peak(small_config())

    def test_a_users_model_whose_weight_is_read_from_the_batch(self) -> None:
        """Its value is not known of fake tensors, and does not matter."""
        workload = masked_regression()
        assert predict_peak(question_of(small_config(), workload)) == predict_peak(
            question_of(small_config(), replace(workload, weight=lambda b: 3))
        )


HEAVY = {"training.micro_batch_size": 8, "training.loss": "plain"}


class TestCheckFit:
    def test_what_fits_is_predicted(self) -> None:
        config = small_config()
        prediction = predict_peak(question_of(config))
        assert check_fit(question(config, prediction.peak_bytes)) == replace(prediction, fits=True)

    def test_one_byte_too_few(self) -> None:
        config = small_config()
        error = refusal(config, peak(config) - 1)
        assert re.fullmatch(r"a step's peak is predicted as \d+\.\d\d KiB; \d+\.\d\d KiB are available", error.message)

    @pytest.mark.parametrize("share", [0.6, 0.25])
    def test_what_is_proposed_fits(self, share: float) -> None:
        """Applied as a user would, and predicted again."""
        config = small_config(HEAVY)
        available = int(share * peak(config))
        words, promised = proposed(refusal(config, available))
        changes = parse_overrides(words)
        lighter = override(config, changes)
        assert peak(lighter) <= available
        assert promised == f"{peak(lighter) / 1024:.2f} KiB"
        tokens = [c.training.micro_batch_size * c.training.gradient_accumulation_steps for c in (config, lighter)]
        assert tokens[0] == tokens[1]

    def test_the_cheapest_that_fits_is_proposed(self) -> None:
        config = small_config(HEAVY)
        words, _ = proposed(refusal(config, peak(config) - 1))
        assert words == ["training.loss=fused"]

    def test_where_nothing_fits(self) -> None:
        light = small_config({"optimizer.name": "adafactor", "precision.mode": "bf16", "model.n_layers": 1})
        tight = state_bytes(light, transformer_workload(light)) + 1
        assert re.match(r"no .* fits; choose ", refusal(light, tight).remedy)

    def test_a_model_far_too_large_is_refused_at_once(self) -> None:
        """70,553,706,496 parameters, published, times 16 bytes."""
        start = time.monotonic()
        error = refusal(preset("llama3-70b"), 64 * GIB)
        assert time.monotonic() - start < 20  # simulating 80 blocks would take longer
        assert error.message == (
            f"weights, gradients and optimizer state alone need {70_553_706_496 * 16 / 2**40:.2f} TiB;"
            " 64.00 GiB are available"
        )
        assert error.remedy.startswith("no optimizer or precision makes them fit")

    @pytest.mark.parametrize(
        ("available_gib", "words"),
        [(62, "optimizer.name=adafactor would need 59.83 GiB"), (31, "precision.mode=bf16 optimizer.name=adafactor")],
    )
    def test_lighter_states_that_would_fit(self, available_gib: int, words: str) -> None:
        """8,030,261,248 parameters, published: 8 bytes each with Adafactor, 4 in bf16 too."""
        assert refusal(preset("llama3-8b"), available_gib * GIB).remedy.startswith(words)

    def test_nothing_is_allocated_before_the_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = small_config()
        built: list[torch.device] = []
        workload = transformer_workload(config)

        def model() -> nn.Module:
            made = workload.model()
            built.extend(parameter.device for parameter in made.parameters())
            return made

        with pytest.raises(OutOfMemory):
            check_fit(question(config, 1000, replace(workload, model=model)))
        assert {device.type for device in built} == {"meta"}


class TestOutOfMemory:
    def test_without_a_prediction(self) -> None:
        error = out_of_memory(question(small_config({"model.n_layers": 1}), 10), None)
        assert error.message == "a step's peak is predicted as unknown; 10 B are available"
        assert error.exit_code == 3

    def test_a_users_model(self) -> None:
        config = override(small_config(), {"run.workload": "my_model.py:vit"})
        error = out_of_memory(question(config, 2 * GIB), PeakPrediction(3 * GIB, {}))
        assert error.message == "a step's peak is predicted as 3.00 GiB; 2.00 GiB are available"
        assert error.remedy.startswith("make the batches of my_model.py:vit smaller")


def test_a_workload_that_cannot_be_fake_is_told_by_its_own_error() -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        result: torch.Tensor = model(batch["x"]).mean()
        return result * result.item()

    with pytest.raises(DataDependentOutputException):
        predict_peak(question_of(small_config(), Workload(Perceptron, masked_regression().batch, loss)))


def test_a_batch_far_too_large_is_refused_without_simulating_it() -> None:
    config = override(Config(), {"training.micro_batch_size": 10**6})
    with pytest.raises(OutOfMemory, match=r"at least 488\.\d+ GiB") as caught:  # 4 blocks x 256e6 x 128 x 4 bytes
        check_fit(question(config, 8 * GIB))
    pairs = caught.value.remedy.splitlines()[1].split("   ")[0].split()
    proposed = {key: int(value) for key, value in (pair.split("=") for pair in pairs)}
    assert proposed["training.micro_batch_size"] * proposed["training.gradient_accumulation_steps"] == 10**6
    lighter = override(config, dict(proposed))
    assert check_fit(question(lighter, 8 * GIB)).peak_bytes <= 8 * GIB
