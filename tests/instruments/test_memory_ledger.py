"""The ledger on fake tensors against the real allocator's own events, to the byte."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from small_runs import CPU, run_steps, small_config, transformer_step
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from bptool.analysis.memory import predict_peak
from bptool.config.schema import Config
from bptool.instruments.memory_ledger import MemoryLedger
from bptool.instruments.peak_memory import PeakMemory
from bptool.training.workload import transformer_workload

SHAPE = {
    "model.n_layers": 1,
    "model.d_model": 64,
    "model.d_ff": 128,
    "model.context_length": 32,
    "model.vocab_size": 128,
}


def of_shape(changes: dict[str, Any]) -> Config:
    return small_config({**SHAPE, **changes})


def measured(config: Config) -> int:
    """The allocator's peak in the second real step, which begins with the optimizer's state in place."""
    gc.collect()  # what goes in the measured step must have come in it: the profiler's memory of older blocks is stale
    step = transformer_step(config)

    def persistent() -> list[Tensor]:
        return [*step.model.parameters(), *step.model.buffers(), *step.optimizers.state().values()]

    memory = PeakMemory(CPU, persistent)
    step.announcer.instruments.append(memory)
    run_steps(step, 2, config.training.gradient_accumulation_steps)
    assert memory.peak_bytes is not None
    return memory.peak_bytes


def surplus(changes: dict[str, Any]) -> int:
    """What the allocator held beyond the prediction."""
    config = of_shape(changes)
    return measured(config) - predict_peak(config, transformer_workload(config)).peak_bytes


GRID: list[dict[str, Any]] = [
    {},
    {"optimizer.name": "adamw", "optimizer.implementation": "foreach"},
    {"optimizer.name": "adamw", "optimizer.implementation": "loop"},
    {"optimizer.name": "adam", "training.loss": "plain"},
    {"optimizer.name": "sgd", "optimizer.implementation": "fused"},
    {"optimizer.name": "sgd", "optimizer.implementation": "foreach", "optimizer.nesterov": False},
    {"optimizer.name": "sgd", "optimizer.implementation": "loop", "optimizer.momentum": 0.0},
    {"optimizer.name": "gradient-descent", "training.loss": "plain", "model.norm": "layernorm"},
    {"optimizer.name": "muon"},
    {"optimizer.name": "muon", "optimizer.implementation": "loop", "model.bias": True},
    {"optimizer.name": "adafactor", "optimizer.implementation": "foreach"},
    {"optimizer.name": "adafactor", "optimizer.implementation": "loop", "training.clip_norm": 0.0},
    {"training.gradient_accumulation_steps": 2},
    {"training.gradient_accumulation_steps": 3, "model.dropout": 0.1},
    {"training.gradient_accumulation_steps": 7, "training.loss": "plain"},
    {"model.dropout": 0.1, "model.norm": "layernorm", "model.position": "learned", "model.activation": "gelu"},
    {"model.norm": "none", "model.activation": "relu", "model.residual": False},
    {"model.tied_embeddings": False, "model.n_kv_heads": 1, "model.qk_norm": True},
    {"model.n_layers": 4, "training.micro_batch_size": 3},
    {"model.n_layers": 4, "activation_checkpoint.policy": "full"},
    {"model.n_layers": 4, "activation_checkpoint.policy": "every_k", "model.dropout": 0.1},
]


@pytest.mark.parametrize("changes", GRID, ids=lambda changes: " ".join(map(str, changes.values())) or "default")
def test_the_prediction_is_the_allocators_peak(changes: dict[str, Any]) -> None:
    assert surplus(changes) == 0


class TestWhatIsNotSeen:
    """Known differences: what a kernel allocates and frees inside one operation."""

    @pytest.mark.parametrize("n_layers", [2, 4])
    def test_a_number_that_a_product_saves(self, n_layers: int) -> None:
        """`scores * scale`: autograd keeps the Python number as a tensor of 8 bytes, once a block."""
        assert surplus({"model.n_layers": n_layers, "model.attention": "eager"}) == 8 * n_layers

    @pytest.mark.parametrize("mode", ["bf16", "bf16-mixed"])
    def test_the_scratch_of_a_bf16_product(self, mode: str) -> None:
        """oneDNN packs what it multiplies, inside the operation; for float32 it needs no such place."""
        config = of_shape({"precision.mode": mode})
        scratch = max(_scratch_bytes(torch.bfloat16, rows, 64, 128) for rows in (64, 128))
        assert _scratch_bytes(torch.float32, 64, 64, 128) == 0
        assert 0 <= surplus({"precision.mode": mode}) <= 2 * scratch
        assert surplus({"precision.mode": mode}) < 0.1 * measured(config)


def _scratch_bytes(dtype: torch.dtype, rows: int, inner: int, columns: int) -> int:
    """Most that one matrix product allocates and frees besides its result."""
    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    memory = PeakMemory(CPU, list, measured_step=0)
    with memory.phase("step"):
        product = left @ right
    assert memory.peak_bytes is not None
    return memory.peak_bytes - product.nbytes


def live(ledger: MemoryLedger) -> int:
    return int(ledger.trace().live_bytes[-1])


class TestLedger:
    """By hand, on fake tensors."""

    def test_live_bytes_follow_the_storages(self) -> None:
        with FakeTensorMode(), MemoryLedger() as ledger:
            x = torch.empty(10, dtype=torch.float64)
            assert live(ledger) == 80
            view = x.view(2, 5)[0]
            assert live(ledger) == 80
            y = x.neg()
            assert live(ledger) == 160
            del x
            assert live(ledger) == 160  # the view holds the storage
            del view
            assert live(ledger) == 80
            y.neg_()
            assert live(ledger) == 80
            del y
            assert live(ledger) == 0

    def test_the_peaks_of_phases(self) -> None:
        """Each phase's own, the innermost alone, and what was there when it began."""
        with FakeTensorMode(), MemoryLedger() as ledger:
            with ledger.phase("step"):
                x = torch.empty(100, dtype=torch.uint8)
                with ledger.phase("forward"):
                    y = torch.empty(50, dtype=torch.uint8)
                with ledger.phase("backward"):
                    del y
                    with ledger.phase("recompute"):
                        z = torch.empty(300, dtype=torch.uint8)
                        del z
                    w = torch.empty(70, dtype=torch.uint8)
            del w
            with ledger.phase("step"), ledger.phase("forward"):
                pass
            del x
        trace = ledger.trace()

        def peaks(step: int) -> dict[str, int]:
            return {name: int(trace.live_bytes[trace.peak_event(step, name)]) for name in trace.phases_of(step)}

        # A phase ends within the one around it, so that one holds at least what the other left.
        assert peaks(0) == {"step": 170, "forward": 150, "backward": 170, "recompute": 400}
        assert peaks(1) == {"step": 100, "forward": 100}
        assert trace.live_bytes[trace.peak_event(0)] == 400


def test_fake_tensors_take_no_memory() -> None:
    """The prediction of a model of 10 GB allocates next to nothing."""
    config = small_config({"model.d_model": 8192, "model.d_ff": 32768, "model.n_heads": 64, "model.n_layers": 1})
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        prediction = predict_peak(config, transformer_workload(config))
    assert prediction.peak_bytes > 10e9
    assert profiler.profiler is not None
    events: Any = profiler.profiler.kineto_results
    allocated = [event.nbytes() for event in events.events() if event.name() == "[memory]"]
    assert sum(n for n in allocated if n > 0) < 2**20
