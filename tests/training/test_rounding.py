"""Updates of bf16 weights in float32: against torch's own optimizers in float32, and the two neighbours in bf16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import CPU, copies, random_batches, same_bits, small_config, transformer_step
from torch import Tensor, nn
from torch.optim import AdamW

from bptool.config.schema import OptimizerSettings
from bptool.training.assembly import build_step, capture, restore
from bptool.training.checkpoint import CheckpointFolder
from bptool.training.instrument import Announcer
from bptool.training.optimizers import Optimizers, build_optimizers
from bptool.training.rounding import MASTER, round_stochastically
from bptool.training.seeds import seed_step
from bptool.training.step import TrainStep
from bptool.training.workload import Workload

IMPLEMENTATIONS = {
    "gradient-descent": ("loop",),
    "sgd": ("fused", "foreach", "loop"),
    "adam": ("fused", "foreach", "loop"),
    "adamw": ("fused", "foreach", "loop"),
    "muon": ("fused", "foreach", "loop"),
    "adafactor": ("foreach", "loop"),
}
CASES = [(name, how) for name, hows in IMPLEMENTATIONS.items() for how in hows]
UPDATES = ("nearest", "stochastic", "master")
EVERY_BF16 = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
TINY = 2.0**-149
"""The least float32 above 0, far below bf16's least, 2^-133."""


def rounded(x: Tensor) -> Tensor:
    out = torch.empty_like(x, dtype=torch.bfloat16)
    round_stochastically(x, out=out)
    return out


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest bf16 not above x and the smallest not below it, by torch's own steps between bf16 numbers."""
    near = x.bfloat16()
    inf = torch.tensor(torch.inf, dtype=torch.bfloat16)
    below = torch.where(near.float() > x, torch.nextafter(near, -inf), near)
    above = torch.where(near.float() < x, torch.nextafter(near, inf), near)
    return below, above


class TestRounding:
    @pytest.mark.parametrize("scale", [1.0, 1e-3, 3e38, 1e-38, 2.0**-130])
    def test_only_the_two_neighbours(self, scale: float) -> None:
        torch.manual_seed(0)
        x = (torch.rand(10_000) * 2 - 1) * scale
        below, above = neighbours(x)
        found = rounded(x)
        assert ((found == below) | (found == above)).all()
        assert (found == below).any()
        assert (found == above).any()
        assert below.lt(above).float().mean() > 0.9

    @pytest.mark.parametrize("x", [1.001, -1.001, 1 + 2**-8, 0.3, -7e-30, 1e-39, -3 * TINY * 2**14, 1 + 2**-20, 3.2e38])
    def test_right_on_average(self, x: float) -> None:
        """Within five deviations of a mean of so many, in each of the four lanes of a draw too."""
        torch.manual_seed(1)
        count = 2**18
        exact = torch.tensor(x).double().item()
        below, above = (neighbour.double().item() for neighbour in neighbours(torch.tensor(x)))
        found = rounded(torch.full((count,), x)).double()
        share = (exact - below) / (above - below)
        deviation = (above - below) * (share * (1 - share)) ** 0.5
        assert abs(found.mean().item() - exact) <= 5 * deviation / count**0.5
        for lane in found.view(-1, 4).unbind(1):
            assert abs(lane.mean().item() - exact) <= 5 * deviation / (count / 4) ** 0.5

    def test_one_number_does_not_tell_the_next(self) -> None:
        torch.manual_seed(2)
        up = rounded(torch.full((2**16,), 1 + 2**-8)) > 1
        for distance in (1, 2, 3, 4):
            alike = (up[distance:] == up[:-distance]).float().mean()
            assert abs(alike - 0.5) < 5 * 0.5 / 2**8

    def test_bf16_numbers_stay(self) -> None:
        """All of them, zeros of both signs and infinities too."""
        torch.manual_seed(3)
        for _ in range(20):
            found = rounded(EVERY_BF16.float())
            numbers = ~EVERY_BF16.isnan()
            assert torch.equal(found.view(torch.int16)[numbers], EVERY_BF16.view(torch.int16)[numbers])
            assert found[~numbers].isnan().all()

    def test_nan_stays_whatever_its_bits(self) -> None:
        bits = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -(2**31) + 0x7F800001], dtype=torch.int32)
        assert rounded(bits.view(torch.float32).repeat(1000)).isnan().all()

    @pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (5, 7), (2, 0)])
    def test_any_shape(self, shape: tuple[int, ...]) -> None:
        assert torch.equal(rounded(torch.full(shape, 1.5)), torch.full(shape, 1.5, dtype=torch.bfloat16))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4, bias=False)


class Net(nn.Module):
    """Hidden matrices, vectors, a scalar, tied weights, and one that is float32 whatever the others are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.exact = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))


def net(dtype: torch.dtype = torch.bfloat16) -> Net:
    torch.manual_seed(0)
    model = Net().to(torch.bfloat16).to(dtype)
    model.exact.data = torch.tensor([1.0, 2.0, 3.0])
    return model


def give_gradients(model: Net, step: int) -> None:
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(1000 * step + len(name))
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.bfloat16().to(parameter.dtype)


def take_step(model: Net, optimizers: Optimizers, step: int) -> None:
    give_gradients(model, step)
    optimizers.set_learning_rate((1e-2, 3e-2, 5e-3)[step % 3])
    torch.manual_seed(step)
    optimizers.step()


def optimizers_of(model: Net, name: Any, implementation: Any, update: Any) -> Optimizers:
    settings = OptimizerSettings(name=name, implementation=implementation)
    return build_optimizers(model, model.blocks, settings, update)


class TestMaster:
    @pytest.mark.parametrize(("name", "implementation"), CASES)
    def test_it_is_torchs_own_float32_update_to_the_bit(self, name: Any, implementation: Any) -> None:
        model, exact = net(), net(torch.float32)
        ours = optimizers_of(model, name, implementation, "master")
        torchs = optimizers_of(exact, name, implementation, "nearest")
        for step in range(3):
            take_step(model, ours, step)
            take_step(exact, torchs, step)
        state, weights = ours.state(), dict(exact.named_parameters())
        copied = {key.rpartition("/")[0]: value for key, value in state.items() if key.endswith(f"/{MASTER}")}
        assert copied.keys() == weights.keys() - {"exact"}
        assert same_bits(copied, {key: weights[key] for key in copied})
        assert same_bits({k: v for k, v in state.items() if not k.endswith(f"/{MASTER}")}, torchs.state())
        expected = {key: value.detach().to(model.get_parameter(key).dtype) for key, value in weights.items()}
        assert same_bits(dict(model.named_parameters()), expected)

    def test_against_an_optimizer_written_with_torch_alone(self) -> None:
        model = net()
        masters = {n: p.detach().float().requires_grad_() for n, p in model.named_parameters() if n != "exact"}
        decayed = [p for p in masters.values() if p.ndim > 1]
        rest = [p for p in masters.values() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        torchs = AdamW(groups, betas=(0.9, 0.99), eps=1e-8, fused=True)
        ours = optimizers_of(model, "adamw", "fused", "master")
        for step in range(3):
            take_step(model, ours, step)
            for name, master in masters.items():
                gradient = model.get_parameter(name).grad
                assert gradient is not None
                master.grad = gradient.float()
            for group in torchs.param_groups:
                group["lr"] = (1e-2, 3e-2, 5e-3)[step]
            torchs.step()
        assert all(torch.equal(ours.state()[f"{name}/{MASTER}"], master) for name, master in masters.items())


class TestStochastic:
    @pytest.mark.parametrize(("name", "implementation"), CASES)
    def test_weights_and_state_are_neighbours_of_the_float32_update(self, name: Any, implementation: Any) -> None:
        """Of a step from the same weights, state and gradients, in float32."""
        model, exact = net(), net(torch.float32)
        ours = optimizers_of(model, name, implementation, "stochastic")
        torchs = optimizers_of(exact, name, implementation, "nearest")
        moved = 0
        for step in range(3):
            exact.load_state_dict(model.state_dict())
            torchs.load_state(copies(ours.state()))
            take_step(model, ours, step)
            take_step(exact, torchs, step)
            found = dict(model.named_parameters()) | ours.state()
            wide = dict(exact.named_parameters()) | torchs.state()
            assert found.keys() == wide.keys()
            for key, value in found.items():
                if value.dtype == torch.float32:  # step counters, and the parameter that is float32
                    assert torch.equal(value, wide[key])
                else:
                    below, above = neighbours(wide[key].detach())
                    assert ((value == below) | (value == above)).all(), key
                    moved += int((value != wide[key].bfloat16()).sum())
        assert moved > 0

    def test_the_steps_seed_says_what_is_drawn(self) -> None:
        def after(*seeds: int) -> dict[str, Tensor]:
            model = net()
            optimizers = optimizers_of(model, "adamw", "auto", "stochastic")
            for seed in seeds:
                give_gradients(model, 0)
                torch.manual_seed(seed)
                optimizers.step()
            return copies(dict(model.named_parameters()) | optimizers.state())

        assert same_bits(after(1, 2), after(1, 2))
        assert not same_bits(after(1, 2), after(1, 3))


@pytest.mark.parametrize("update", ["stochastic", "master"])
def test_frozen_and_left_out_parameters_are_left_alone(update: Any) -> None:
    model = net()
    model.blocks[0].requires_grad_(False)
    optimizers = optimizers_of(model, "adamw", "auto", update)
    before = copies(model.state_dict())
    take_step(model, optimizers, 0)
    model.scale.grad = None
    scale = model.scale.detach().clone()
    optimizers.step()
    assert torch.equal(model.scale, scale)
    unmoved = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    assert unmoved == {key for key in before if key.startswith("blocks.0.")}
    assert not [key for key in optimizers.state() if key.startswith("blocks.0.")]
    optimizers.zero_grad()
    assert {parameter.grad for parameter in optimizers.parameters} == {None}


class TestSmallUpdates:
    """Weights of 1 whose first update is 2^-11, an eighth of the way to bf16's next number below, 1 - 2^-8."""

    def run(self, update: str) -> tuple[Tensor, list[float]]:
        settings = {"optimizer.name": "gradient-descent", "optimizer.lr": 2.0**-11, "training.clip_norm": 0.0}
        settings |= {"schedule.name": "constant", "schedule.warmup_steps": 0, "training.steps": 1000}
        config = small_config({**settings, "precision.mode": "bf16", "precision.bf16_update": update})
        step = build_step(config, _half_square(), CPU, Announcer())
        torch.manual_seed(0)
        losses = [step(number, [torch.zeros(())]).loss for number in range(1000)]
        return step.model.get_parameter("weight").detach(), losses

    def test_nearest_stalls(self) -> None:
        weight, losses = self.run("nearest")
        assert (weight == 1).all()
        assert set(losses) == {losses[0]}

    @pytest.mark.parametrize("update", ["stochastic", "master"])
    def test_the_others_learn(self, update: str) -> None:
        """theta <- (1 - 2^-11) theta: 0.6136 after 1000 steps, within a step of bf16, as the gradient is of bf16."""
        weight, losses = self.run(update)
        assert weight.float().mean().item() == pytest.approx((1 - 2.0**-11) ** 1000, abs=2**-8)
        assert losses[-1] < 0.4 * losses[0]


class _Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4096))


def _half_square() -> Workload:
    """Its gradient is the weight itself."""
    return Workload(
        model=_Weights,
        batch=lambda generator: torch.zeros(()),
        loss=lambda model, batch: 0.5 * model.get_parameter("weight").float().square().sum(),
        weight=lambda batch: 1,
        blocks=lambda model: [],
    )


def run_as_the_loop_does(step: TrainStep, numbers: range) -> None:
    for number in numbers:
        seed_step(7, number)
        step(number, random_batches(step, number))


def configured(changes: Mapping[str, object]) -> TrainStep:
    return transformer_step(
        small_config({"precision.mode": "bf16", "training.steps": 6, "model.dropout": 0.1, **changes})
    )


class TestResume:
    @pytest.mark.parametrize("update", UPDATES)
    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_it_goes_on_as_if_it_had_never_stopped(self, tmp_path: Path, name: str, update: str) -> None:
        changes = {"optimizer.name": name, "precision.bf16_update": update}
        unbroken, first, second = (configured(changes) for _ in range(3))
        run_as_the_loop_does(unbroken, range(6))
        run_as_the_loop_does(first, range(3))
        folder = CheckpointFolder(tmp_path, keep=1)
        folder.save(capture(first, 3, {}))
        restore(second, folder.require_newest())
        run_as_the_loop_does(second, range(3, 6))
        assert same_bits(second.model.state_dict(), unbroken.model.state_dict())
        assert same_bits(second.optimizers.state(), unbroken.optimizers.state())
        assert any(key.endswith(f"/{MASTER}") for key in second.optimizers.state()) == (update == "master")

    @pytest.mark.parametrize("before", UPDATES)
    @pytest.mark.parametrize("after", UPDATES)
    def test_from_one_to_another(self, before: str, after: str) -> None:
        """The state is what that update would hold: no copy without need of it, float32 where there is to be some."""
        one, other = configured({"precision.bf16_update": before}), configured({"precision.bf16_update": after})
        plain = configured({"precision.bf16_update": after})
        run_as_the_loop_does(one, range(2))
        restore(other, capture(one, 2, {}))
        run_as_the_loop_does(other, range(2, 3))
        run_as_the_loop_does(plain, range(1))
        kinds = {key: value.dtype for key, value in other.optimizers.state().items()}
        assert kinds == {key: value.dtype for key, value in plain.optimizers.state().items()}
