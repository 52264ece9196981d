"""Updates of bf16 weights that are computed in float32: what `precision.bf16_update` means.

bf16 has 8 significant bits. Rounded to nearest, an update of less than half their step (some 0.2 to 0.4% of the weight)
is lost, each time. Two ways out, around any rule of `torch.optim`, which sees float32 alone:

    stochastic   rounded up or down at random, right on average: no more memory than `nearest` between the updates
    master       the rule owns float32 weights and state; bf16 weights are rounded from them: 8 bytes a parameter more

Both work on one weight at a time, so that no more than one is there in float32 besides. Gradients stay in bf16, as they
come, and are summed over micro-batches in it (ZeRO's recipe, Rajbhandari et al. 2020, section 3.1: 2 + 2 + 12 bytes a
parameter with Adam); they are widened for the update. Parameters that are not bf16 are updated as they are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MASTER = "master"
"""Key of the float32 copy in the state of its parameter."""

_State = dict[str, Tensor]
_COUNTER = "step"
"""Key of the one number in a rule's state; it is float32 always."""


class WideUpdate(Optimizer):
    """Another optimizer's update in float32, a weight at a time.

    Args:
        rule: its groups become this one's; it holds nothing between the updates.
    """

    def __init__(self, rule: Optimizer) -> None:
        super().__init__(rule.param_groups, rule.defaults)
        self._rule = rule

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "the training step computes its gradients itself"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    @abstractmethod
    def state_dtype(self, parameter: Tensor) -> torch.dtype:
        """What the parameter's state is held in, but for the step counter."""

    @abstractmethod
    def _widened(self, parameter: nn.Parameter, state: _State) -> Tensor:
        """The weight in float32."""

    @abstractmethod
    def _keep(self, parameter: nn.Parameter, wide: Tensor, state: _State) -> None:
        """Write the updated weight and the rule's state to where they stay."""

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state: _State = self.state[parameter]
        if parameter.dtype != torch.bfloat16:
            self._apply(parameter, state, group)
            return
        wide = nn.Parameter(self._widened(parameter, state))
        assert parameter.grad is not None
        wide.grad = parameter.grad.float()
        wide_state = {key: value.float() for key, value in state.items() if key != MASTER}
        self._apply(wide, wide_state, group)
        self._keep(parameter, wide.detach(), wide_state)

    def _apply(self, parameter: nn.Parameter, state: _State, group: dict[str, Any]) -> None:
        """The rule's own step with this parameter alone; its state is changed in place."""
        self._rule.param_groups = [{**group, "params": [parameter]}]
        self._rule.state[parameter] = state
        self._rule.step()
        self._rule.param_groups.clear()
        self._rule.state.clear()


class StochasticUpdate(WideUpdate):
    """Weights and state are rounded stochastically to bf16.

    The state too: rounded to nearest, a mean that decays by 0.999 would stand still for the same reason. The random
    numbers are drawn from PyTorch's global generators, which the loop seeds anew for each step.
    """

    def state_dtype(self, parameter: Tensor) -> torch.dtype:
        """The parameter's own."""
        return parameter.dtype

    def _widened(self, parameter: nn.Parameter, state: _State) -> Tensor:
        return parameter.detach().float()

    def _keep(self, parameter: nn.Parameter, wide: Tensor, state: _State) -> None:
        round_stochastically(wide, out=parameter)
        held = self.state[parameter]
        for key in sorted(state):  # else a resumed run, which reads them in another order, would draw other numbers
            if key == _COUNTER:
                held[key] = state[key]
            else:
                held.setdefault(key, torch.empty_like(state[key], dtype=torch.bfloat16))
                round_stochastically(state[key], out=held[key])


class MasterUpdate(WideUpdate):
    """The state has a float32 copy of each weight, made of it at its first update, which the weight is rounded from."""

    def state_dtype(self, parameter: Tensor) -> torch.dtype:
        """float32 where the parameter has a copy."""
        return torch.float32 if parameter.dtype == torch.bfloat16 else parameter.dtype

    def _widened(self, parameter: nn.Parameter, state: _State) -> Tensor:
        return state[MASTER] if MASTER in state else parameter.detach().float()

    def _keep(self, parameter: nn.Parameter, wide: Tensor, state: _State) -> None:
        parameter.copy_(wide)
        self.state[parameter] = {MASTER: wide, **state}


def round_stochastically(x: Tensor, *, out: Tensor) -> None:
    """Write float32 `x` to bf16 `out`, up or down with probability proportional to the distance: right on average.

    Croci et al. 2022, "Stochastic rounding: implementation, error analysis and applications". bf16 is the upper half
    of float32's bits, so 16 random bits are added to the lower half, which is cut off then. Values of bf16, infinities,
    zeros' signs and NaN stay; what lies between the largest finite value of bf16 and that of float32 may become
    infinite.
    """
    # Four times 16 bits in one draw.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    noise = draws.view(torch.int16)[: x.numel()].view(x.shape).to(torch.int32)
    noise.add_(x.view(torch.int32)).add_(2**15).bitwise_and_(-(2**16))
    out.copy_(noise.view(torch.float32))
    out.masked_fill_(x.ne(x), torch.nan)
