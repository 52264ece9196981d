"""What kernels take besides their results, against the allocator's own events inside each operation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocator_events import operations
from foreign_models import FOREIGN
from small_runs import CPU, run_steps, small_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bptool.instruments.memory.cpu_scratch import CpuScratch
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.workload import Workload, transformer_workload

ATEN = torch.ops.aten
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
FLOATS = DTYPES[:4]


def wrong(action: Callable[[], object]) -> list[str]:
    """Operations whose scratch is not the predicted one."""
    action()  # what PyTorch sets up once for all has been set up
    scratch = CpuScratch()
    return [
        f"{operation!r}: {predicted} predicted"
        for operation in operations(action)
        if (predicted := scratch(operation.func, operation.args, operation.kwargs, operation.result))
        != operation.scratch
    ]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


SETTINGS: list[dict[str, Any]] = [
    {"optimizer.implementation": "foreach", "model.norm": "layernorm", "model.dropout": 0.1, "model.bias": True},
    {"precision.mode": "bf16", "optimizer.name": "adafactor", "optimizer.implementation": "loop"},
    {"precision.mode": "bf16-mixed", "model.attention": "eager", "training.loss": "plain", "optimizer.name": "muon"},
    {"model.context_length": 200, "model.vocab_size": 300, "model.qk_norm": True, "model.n_layers": 1},
]


class TestEveryOperationOfAStep:
    @pytest.mark.parametrize("n_threads", [1, 2])
    @pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: " ".join(map(str, changes.values())))
    def test_of_the_transformer(self, changes: Mapping[str, Any], n_threads: int) -> None:
        config = small_config({"model.d_model": 64, **changes})
        with threads(n_threads):
            assert wrong(self._step(config, transformer_workload(config))) == []

    @pytest.mark.parametrize("name", ["convolutional", "vision transformer", "bert", "t5"])
    def test_of_other_architectures(self, name: str) -> None:
        assert wrong(self._step(small_config(), FOREIGN[name]())) == []

    @staticmethod
    def _step(config: Any, workload: Workload) -> Callable[[], object]:
        step = build_step(config, workload, CPU, Announcer())
        return lambda: run_steps(step, 1)


def some(chance: random.Random, dtype: torch.dtype, *shape: int) -> Tensor:
    """Of that dtype and shape: contiguous, or with its first dimensions swapped in memory, or expanded."""
    layout = chance.choice(["contiguous", "transposed", "expanded"])
    if layout == "transposed" and len(shape) > 1:
        return torch.ones(shape[1], shape[0], *shape[2:]).to(dtype).transpose(0, 1)
    if layout == "expanded":
        return torch.ones(1, *shape[1:]).to(dtype).expand(shape)
    return torch.ones(shape).to(dtype)


def sizes(chance: random.Random, count: int) -> list[int]:
    return [chance.choice([1, 2, 3, 8, 17, 64, 65]) for _ in range(count)]


def pointwise(chance: random.Random) -> None:
    shape = sizes(chance, chance.choice([1, 2, 3]))
    left, right = (some(chance, chance.choice(DTYPES), *shape) for _ in range(2))
    number = chance.choice([2, 0.5, True])
    functions: list[Callable[..., Tensor]] = [torch.add, torch.mul, torch.div, torch.eq, torch.lt, torch.maximum]
    function = chance.choice(functions)
    other = right if function is torch.maximum else chance.choice([right, number, right.flatten()[0]])
    function(left, other)
    _ = 2.0**left, left.float() ** 2


def in_place(chance: random.Random) -> None:
    shape = sizes(chance, 2)
    left = torch.ones(shape, dtype=chance.choice(FLOATS))
    right = some(chance, chance.choice(FLOATS), *shape)
    getattr(left, chance.choice(["add_", "mul_", "div_", "sub_"]))(chance.choice([right, 3, 1.5]))


def reductions(chance: random.Random) -> None:
    x = some(chance, chance.choice(DTYPES), *sizes(chance, 3))
    torch.sum(x, chance.choice([0, 1, 2]))
    torch.cumsum(x, chance.choice([0, 1, 2]))
    x.sum()
    torch.ones(chance.choice([100, 32767, 32768, 50000]), dtype=chance.choice(DTYPES)).sum()
    if x.is_floating_point():
        x.mean(chance.choice([0, 1, 2]))
        x.mean()


def copies(chance: random.Random) -> None:
    x = some(chance, chance.choice(DTYPES), *sizes(chance, 2))
    x.contiguous()
    x.to(chance.choice(DTYPES))
    torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)


def attention(chance: random.Random) -> None:
    """Single precision: what low precision's products take is tried out."""
    heads, width = chance.choice([1, 2, 4]), chance.choice([8, 16, 32])
    n_queries, n_keys = (chance.choice([1, 5, 31, 32, 33, 200, 600, 800]) for _ in range(2))
    dtype = chance.choice(FLOATS[:2])
    q, k, v = (
        torch.ones(2, n, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (n_queries, n_keys, n_keys)
    )
    F.scaled_dot_product_attention(q, k, v).sum().backward()


def layer_norms(chance: random.Random) -> None:
    dtype = chance.choice(FLOATS[:3])
    x = some(chance, dtype, *sizes(chance, 2), 48).requires_grad_()
    weight = torch.ones(48, dtype=dtype, requires_grad=True)
    y = F.layer_norm(x, (48,), weight, chance.choice([weight.detach(), weight, None]))
    y.backward(some(chance, dtype, *y.shape))


def lookups(chance: random.Random) -> None:
    indices = some(chance, torch.int64, *sizes(chance, 2))
    weight = torch.ones(7, 16, requires_grad=True)
    y = F.embedding(indices, weight)
    y.backward(some(chance, torch.float32, *y.shape))
    F.softmax(some(chance, torch.float32, *sizes(chance, 3)), -1)


def products(chance: random.Random) -> None:
    rows, inner, columns = (chance.choice([1, 16, 64, 100, 256]) for _ in range(3))
    dtype = chance.choice([torch.float32, torch.bfloat16, torch.float16])
    left = torch.ones(rows, inner, dtype=dtype) if chance.random() < 0.5 else torch.ones(inner, rows, dtype=dtype).T
    right = (
        torch.ones(inner, columns, dtype=dtype) if chance.random() < 0.5 else torch.ones(columns, inner, dtype=dtype).T
    )
    left @ right
    torch.addmm(torch.ones(columns, dtype=dtype), left, right)
    left.expand(3, -1, -1).clone() @ right


def over_lists(chance: random.Random) -> None:
    tensors = [torch.ones(sizes(chance, 2), dtype=chance.choice(FLOATS[:3])) for _ in range(4)]
    change = chance.choice(["_foreach_add_", "_foreach_mul_", "_foreach_div_"])
    getattr(torch, change)(tensors, chance.choice([2, 0.1]))
    torch._foreach_sqrt(tensors)
    torch._foreach_lerp_(tensors, [t.clone() for t in tensors], 0.1)


def masks(chance: random.Random) -> None:
    x = some(chance, chance.choice(FLOATS), *sizes(chance, 2))
    F.dropout(x, 0.3)
    torch.empty(sizes(chance, 2), dtype=chance.choice(FLOATS[:3])).bernoulli_(0.5)


CALLS = [masks, pointwise, in_place, reductions, copies, attention, layer_norms, lookups, products, over_lists]


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("calls", CALLS, ids=lambda calls: calls.__name__)
def test_at_random(calls: Callable[[random.Random], None], n_threads: int) -> None:
    """Forty calls of random shapes, dtypes and layouts."""

    def action() -> None:
        chance = random.Random(n_threads)
        for _ in range(40):
            calls(chance)

    with threads(n_threads):
        assert wrong(action) == []


class TestWhatIsTriedOut:
    def test_what_is_too_large_is_named(self) -> None:
        scratch = CpuScratch()
        with FakeTensorMode():
            left, right = (torch.empty(30000, 30000, dtype=torch.bfloat16) for _ in range(2))
            assert scratch(ATEN.mm.default, (left, right), {}, left) == 0
        assert scratch.uncounted == {"mm"}

    def test_large_single_precision_is_known(self) -> None:
        scratch = CpuScratch()
        with FakeTensorMode():
            left, right = (torch.empty(30000, 30000) for _ in range(2))
            scratch(ATEN.mm.default, (left, right), {}, left)
        assert not scratch.uncounted

    def test_no_random_number_is_used_up(self) -> None:
        before = torch.get_rng_state()
        with FakeTensorMode():
            x = torch.empty(1234, 7)
            CpuScratch()(ATEN.bernoulli_.float, (x, 0.25), {}, x)
        assert torch.equal(torch.get_rng_state(), before)
