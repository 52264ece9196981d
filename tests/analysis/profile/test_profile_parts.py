"""What a tally says: FLOPs by module and operation, what became of each module, and the conventions of an MFU."""

from __future__ import annotations

import pytest
import torch
from small_runs import small_config
from torch import Tensor, nn

from bptool.analysis.profile.conventions import EXECUTED, MODEL, PALM, conventions, executed_flops, model_flops
from bptool.analysis.profile.counting import count
from bptool.analysis.profile.parts import flop_counts, module_costs, module_statuses, op_costs
from bptool.analysis.profile.tally import Tally
from bptool.training.workload import Workload, transformer_workload


class Branches(nn.Module):
    """Every fate that a module can have."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen_first = nn.Linear(8, 8).requires_grad_(False)
        self.trained = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0))
        self.frozen_later = nn.Linear(8, 8).requires_grad_(False)
        self.ignored = nn.Linear(8, 8)
        self.unused = nn.ModuleList([nn.Linear(8, 8)])
        self.read = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen_later(self.trained(self.frozen_first(x)))
        self.ignored(x)
        return nn.functional.linear(x, self.read.weight)


def branches() -> Tally:
    workload = Workload(model=Branches, batch=lambda generator: torch.randn(4, 8), loss=lambda model, x: _sum(model(x)))
    return count(small_config({}), workload)


def _sum(x: Tensor) -> Tensor:
    return x.sum()


def test_what_became_of_each_module() -> None:
    statuses = module_statuses(branches())
    assert statuses == {
        "": "used",
        "frozen_first": "no_backward",
        "trained": "used",
        "trained.0": "used",
        "trained.1": "used",
        "frozen_later": "frozen",
        "ignored": "no_backward",
        "unused": "unused",
        "unused.0": "unused",
        "read": "used",  # never called, but its weight is
    }


def test_modules_add_up_to_the_step() -> None:
    config = small_config({"activation_checkpoint.policy": "full"})
    tally = count(config, transformer_workload(config))
    modules, whole = module_costs(tally), flop_counts(tally)
    for key in ("forward_flops", "dgrad_flops", "wgrad_flops", "recompute_flops"):
        assert sum(getattr(module, key) for module in modules) == getattr(whole, key) > 0
    assert {module.status for module in modules} == {"used"}
    by_name = {module.name: module for module in modules}
    assert by_name["blocks.1.feed_forward.up"].type == "Linear"
    assert by_name["blocks.1.feed_forward.up"].calls == 1
    assert sum(module.parameters_count for module in modules) == 32 * 16 + 2 * (4 * 256 + 3 * 512) + 5 * 16


def test_operations_add_up_to_the_step() -> None:
    config = small_config({})
    tally = count(config, transformer_workload(config))
    ops, whole = op_costs(tally), flop_counts(tally)
    assert sum(op.flops for op in ops if op.kind == "wgrad") == whole.wgrad_flops
    assert sum(op.flops + op.pointwise_flops for op in ops if op.kind == "optimizer") == whole.optimizer_flops
    assert not {"view", "t", "transpose"} & {op.op for op in ops}
    product = next(op for op in ops if op.op == "mm" and op.kind == "forward")
    assert product.intensity == product.flops / product.bytes_moved


class TestConventions:
    CONFIG = small_config({"model.n_heads": 4, "model.n_kv_heads": 2, "activation_checkpoint.policy": "full"})
    TOKENS = 2 * 16

    @pytest.fixture
    def tally(self) -> Tally:
        return count(self.CONFIG, transformer_workload(self.CONFIG))

    def test_by_hand(self, tally: Tally) -> None:
        """N: 2 layers of 16 x (16 + 8 + 8) + 16 x 16 and 3 x 16 x 32, and the head's 16 x 32, which embeds too."""
        weights = 2 * (16 * 32 + 16 * 16 + 3 * 16 * 32) + 16 * 32
        attention = 12 * 2 * 16 * 16  # L, H Q, T
        found = {c.name: c.flops_per_unit for c in conventions(tally, self.TOKENS, self.CONFIG)}
        assert found["6N_all"] == 6 * (weights + 5 * 16)
        assert found["6N"] == 6 * weights
        assert found[PALM] == 6 * weights + attention
        assert found["6N + 6LHQT"] == 6 * weights + attention / 2
        # The fused kernel makes the scores again: one product in six more than PaLM's.
        assert found[MODEL] == 6 * weights + attention * 7 / 6
        assert found[EXECUTED] == found[MODEL] + tally.flops("recompute") / self.TOKENS

    def test_one_headline(self, tally: Tally) -> None:
        assert [c.name for c in conventions(tally, self.TOKENS, self.CONFIG) if c.headline] == [PALM]
        assert [c.name for c in conventions(tally, self.TOKENS, None) if c.headline] == [MODEL]

    def test_of_an_own_model_only_what_was_counted(self, tally: Tally) -> None:
        assert [c.name for c in conventions(tally, self.TOKENS, None)] == [MODEL, EXECUTED]
        assert executed_flops(tally) - model_flops(tally) == tally.flops("recompute") > 0
