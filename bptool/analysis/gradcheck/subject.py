"""What is checked: a float64 copy of a target, as one scalar function of its parameters and inputs.

A function with outputs o_1, o_2 ... becomes the scalar L = sum of <w_i, o_i> with Gaussian weights w_i (a lone scalar
keeps the weight 1); of a complex output the real part of <conj(w_i), o_i> counts. PyTorch's random numbers are replayed
from one seed in every evaluation, and buffers are put back before each, so that L is a function.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_leaves  # pytrees have no public name yet

from bptool.analysis.gradcheck.arguments import Arguments, in_float64, module_of
from bptool.analysis.gradcheck.random_state import seed_generators
from bptool.errors import BptoolError, TargetError
from bptool.training.gradient_target import GradientTarget
from bptool.training.seeds import derive_seed
from bptool.training.user_code import describe

Gradients = dict[str, Tensor | None]
"""By the name of the tensor; None where autograd gave none."""


@dataclass(eq=False)
class Leaf:
    """A tensor whose gradient is checked.

    Attributes:
        tensor: the float64 leaf that the function sees; its values are changed while differences are taken.
        base: the point at which the gradient is checked.
        kept: 1 where an element is checked, 0 where the op defines that it has no gradient; None: all are.
    """

    name: str
    kind: str
    tensor: Tensor
    base: Tensor
    kept: Tensor | None = None

    @property
    def scale(self) -> float:
        """Root mean square of the values, the unit of a step; where all are zero, what a new layer would have."""
        if not self.base.numel():
            return 1.0
        rms = float(real_view(self.base).square().mean().sqrt().item())
        return rms or (1.0 if self.base.dim() < 2 else float(self.base.shape[-1]) ** -0.5)


class Subject:
    """A target's scalar function in float64, its leaves, and its gradient by backpropagation.

    Args:
        seed: of the projection, of what the function draws, and of the directions.
        within: entered around each call of the function.

    Raises:
        TargetError: the target has nothing to check, returns no tensor, changes its inputs, or refuses float64.
    """

    def __init__(
        self, target: GradientTarget, *, seed: int, within: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self.seed = seed
        self._within = within
        self.random_seed = derive_seed(seed, "forward")
        self.target = target
        try:
            self.function = copy.deepcopy(target.function)
        except (RuntimeError, TypeError) as error:
            raise TargetError(
                f"the target cannot be copied, which it is for float64: {error}",
                "keep only parameters, buffers and plain values in it",
            ) from error
        self.module = module_of(self.function)
        self._refuse_lazy()
        self._carry_hooks()
        self.arguments = Arguments(self.function, target.inputs)
        self._convert()
        self.leaves = self._find_leaves()
        self._buffers = [(b, b.detach().clone()) for b in self.module.buffers()] if self.module is not None else []
        self._weights: list[Tensor | None] = []
        self._timed: list[tuple[float, float]] = []
        self.evaluations = 0
        self.records_graph = False  # whether plain values are taken with the graph recorded too
        self._first_call()

    @property
    def n_elements(self) -> int:
        """Numbers whose gradient is checked."""
        return sum(leaf.base.numel() for leaf in self.leaves.values())

    def outputs(self) -> list[Tensor]:
        """Run the function once, from the same random numbers; its floating point and complex tensors."""
        self._begin()
        with self._within():
            return _differentiable(self.arguments.call(self.function))

    def outputs_with(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """The same with other tensors in some leaves' places."""
        self._begin()
        places = {id(self.leaves[name].tensor): value for name, value in values.items()}
        args, kwargs = self.arguments.replaced(lambda tensor: places.get(id(tensor), tensor))
        parameters = {name: value for name, value in values.items() if self.leaves[name].kind == "parameter"}
        with self._within():
            if self.module is None:
                return _differentiable(self.function(*args, **kwargs))
            call = _Call(self.module, self.function)
            inside = {f"module.{name}": value for name, value in parameters.items()}
            return _differentiable(functional_call(call, inside, tuple(args), kwargs))

    def _begin(self) -> None:
        self.evaluations += 1
        seed_generators(self.random_seed)
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)

    def scalar(self, outputs: list[Tensor]) -> Tensor:
        """The projection of outputs."""
        parts = [projected(o, w) for o, w in zip(outputs, self._weights, strict=True) if w is not None]
        return torch.stack(parts).sum()

    def value(self) -> float:
        """L where the leaves are now."""
        with torch.set_grad_enabled(self.records_graph):
            return float(self.scalar(self.outputs()).item())

    def output_weights(self) -> list[Tensor | None]:
        """The projection's weight of each output; None where an output has no gradient and is left out."""
        return list(self._weights)

    def gradient(self) -> tuple[float, Gradients]:
        """L and its gradient where the leaves are now, by one forward and one backward; both are timed."""
        self.clear()
        start = time.perf_counter()
        value = self.scalar(self.outputs())
        middle = time.perf_counter()
        if value.requires_grad:
            value.backward()
        self._timed.append((middle - start, time.perf_counter() - middle))
        return float(value.item()), self.collected()

    def pass_seconds(self) -> tuple[float, float]:
        """What a forward with its graph and the backward took: medians of all but the first."""
        forwards, backwards = zip(*(self._timed[1:] or self._timed), strict=True)
        return statistics.median(forwards), statistics.median(backwards)

    def clear(self) -> None:
        """Forget accumulated gradients."""
        for leaf in self.leaves.values():
            leaf.tensor.grad = None

    def collected(self) -> Gradients:
        """What a backward left in `.grad`, dense, and zero where an op defines that there is none."""
        found: Gradients = {}
        for name, leaf in self.leaves.items():
            grad = None if leaf.tensor.grad is None else _dense(leaf.tensor.grad.detach()).clone()
            found[name] = grad if grad is None or leaf.kept is None else torch.where(leaf.kept.bool(), grad, 0)
        return found

    @contextmanager
    def along(self, direction: Mapping[str, Tensor]) -> Iterator[Callable[[float], None]]:
        """Gives what puts the leaves at base + step * direction; afterwards they are at the base again."""

        def go(step: float) -> None:
            with torch.no_grad():
                for name, change in direction.items():
                    torch.add(self.leaves[name].base, change, alpha=step, out=self.leaves[name].tensor.detach())

        try:
            yield go
        finally:
            with torch.no_grad():
                for name in direction:
                    self.leaves[name].tensor.detach().copy_(self.leaves[name].base)

    @contextmanager
    def values_along(self, direction: Mapping[str, Tensor]) -> Iterator[Callable[[float], float]]:
        """Gives L as a function of the step along a direction."""
        with self.along(direction) as go:

            def value_at(step: float) -> float:
                go(step)
                return self.value()

            yield value_at

    @contextmanager
    def shifted(self, direction: Mapping[str, Tensor]) -> Iterator[None]:
        """With another point to check: the base itself is moved."""
        before = {name: self.leaves[name].base for name in direction}
        for name, change in direction.items():
            self.leaves[name].base = before[name] + change
        with torch.no_grad():
            for name in direction:
                self.leaves[name].tensor.detach().copy_(self.leaves[name].base)
        try:
            yield
        finally:
            for name, base in before.items():
                self.leaves[name].base = base
                self.leaves[name].tensor.detach().copy_(base)

    def generator(self, *purpose: int | str) -> torch.Generator:
        """Random numbers that are a function of the seed and of what they are for."""
        return torch.Generator().manual_seed(derive_seed(self.seed, *purpose))

    def _refuse_lazy(self) -> None:
        named = self.module.named_parameters() if self.module is not None else ()
        lazy = [name for name, parameter in named if isinstance(parameter, UninitializedParameter)]
        if lazy:
            raise TargetError(
                f"the module's parameters have no shape before its first call: {', '.join(lazy)}",
                "call it once on its sample inputs before you hand it over",
            )

    def _carry_hooks(self) -> None:
        """Hooks that change a parameter's gradient belong to it; a copy of a module has lost them."""
        given = module_of(self.target.function)
        if self.module is None or given is None:
            return
        for before, own in zip(given.parameters(), self.module.parameters(), strict=True):
            for hook in (before._backward_hooks or {}).values():  # no public name lists them
                own.register_hook(hook)

    def _convert(self) -> None:
        if self.module is not None:
            for tensor in [*self.module.parameters(), *self.module.buffers()]:
                tensor.data = in_float64(tensor.data)
                tensor.grad = None

    def _find_leaves(self) -> dict[str, Leaf]:
        parameters = self.module.named_parameters() if self.module is not None else ()
        found = [Leaf(name, "parameter", p, p.detach().clone()) for name, p in parameters if p.requires_grad]
        known = {leaf.name for leaf in found}
        for name, tensor in self.arguments.tensors():
            if tensor.requires_grad:
                free = f"input {name}" if name in known else name
                found.append(Leaf(free, "input", tensor, tensor.detach().clone()))
        if not found:
            raise TargetError(
                "nothing to check: no parameter and no input requires a gradient",
                "give it an input with requires_grad=True, or a module with parameters that are not frozen",
            )
        return {leaf.name: leaf for leaf in found}

    def _first_call(self) -> None:
        before = [(name, tensor, tensor.detach().clone()) for name, tensor in self.arguments.tensors()]
        before += [(leaf.name, leaf.tensor, leaf.base) for leaf in self.leaves.values() if leaf.kind == "parameter"]
        try:
            outputs = self.outputs()
        except BptoolError:
            raise
        except Exception as error:
            raise self._explained(error) from error
        # Only those that a forward changes are put back: others may be saved for a backward that is still to come.
        self._buffers = [(b, value) for b, value in self._buffers if not torch.equal(b, value)]
        for name, tensor, value in before:
            if tensor.shape != value.shape or not torch.equal(tensor.detach().nan_to_num(), value.nan_to_num()):
                raise mutated(f"its {self._kind(name)} {name}")
        if not outputs:
            raise TargetError(
                "the target returns no floating point or complex tensor, so there is nothing to differentiate",
                "return the tensors themselves, not numbers, strings or integer tensors made of them",
            )
        self._weights = self._chosen_weights(outputs)
        recorded = float(self.scalar(outputs).item())
        self.records_graph = abs(self.value() - recorded) > 1e-12 * abs(recorded)

    def _kind(self, name: str) -> str:
        return self.leaves[name].kind if name in self.leaves else "input"

    def _chosen_weights(self, outputs: list[Tensor]) -> list[Tensor | None]:
        """Outputs without a graph are left out where others have one: they are not meant to be differentiated."""
        some = any(output.requires_grad for output in outputs)
        chosen = [output.requires_grad or not some for output in outputs]
        if sum(chosen) == 1 and next(o for o, c in zip(outputs, chosen, strict=True) if c).numel() == 1:
            return [torch.ones_like(_dense(o)) if c else None for o, c in zip(outputs, chosen, strict=True)]
        generator = self.generator("projection")
        return [gaussian_like(_dense(o), generator) if c else None for o, c in zip(outputs, chosen, strict=True)]

    def _explained(self, error: Exception) -> Exception:
        """The user's own error, or what float64 or a change in place made of it."""
        if "leaf Variable that requires grad" in str(error):
            return mutated("a parameter or input that requires a gradient", where=describe(error))
        if not isinstance(error, RuntimeError | TypeError | ValueError):
            return error
        if not _runs_as_given(self.target):
            return error
        return TargetError(
            f"the target does not run in float64, though it does in its own precision: {error}",
            "make constants and buffers with the dtype of the inputs (dtype=x.dtype), not with a fixed one",
        )


class _Call(nn.Module):
    """A function of a module as a module, in which parameters can be replaced."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._function = [function]  # in a list, as a module would be registered a second time

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function[0](*args, **kwargs)


def mutated(what: str, *, where: str = "") -> TargetError:
    """The target changed a tensor that it was given; `where` is PyTorch's own error, if it refused that."""
    return TargetError(
        f"the target changes {what} in place, so its value is not a function of its inputs"
        + (f": {where}" if where else ""),
        "work on a copy: x = x.clone(), or use the out-of-place operation",
    )


def projected(output: Tensor, weight: Tensor) -> Tensor:
    """The real part of <conj(weight), output>, a scalar in float64."""
    dense = _dense(output)
    if dense.is_complex():
        return (torch.view_as_real(dense.resolve_conj()) * torch.view_as_real(weight)).sum().double()
    return (dense.double() * weight.double()).sum()


def real_view(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs, as a last dimension; real ones as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def gaussian_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of its shape, dtype and device (both parts of a complex one)."""
    shape = real_view(tensor.detach()).shape
    # Drawn in float32, which is several times faster; a random number need not have more digits.
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32).to(tensor.device, torch.float64)
    if tensor.is_complex():
        return torch.view_as_complex(drawn).to(tensor.dtype)
    return drawn.to(tensor.dtype)


def inner(a: Tensor, b: Tensor) -> float:
    """Real part of <conj(a), b>."""
    return float((real_view(a) * real_view(b)).sum().item())


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _is_real_or_complex(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _runs_as_given(target: GradientTarget) -> bool:
    """Whether the target runs with the dtypes that it was given."""
    try:
        function: Callable[..., Any] = copy.deepcopy(target.function)
        Arguments(function, target.inputs, convert=False).call(function)
    except Exception:
        return False
    return True


def _differentiable(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and _is_real_or_complex(leaf)]
