"""Number formats of weights and arithmetic: what `precision.mode` means."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from bptool.config.schema import PrecisionSettings
from bptool.errors import DeviceError

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}


@dataclass
class LossScale:
    """fp16's loss scale, which keeps small gradients above the format's underflow at 6e-8.

    Dynamic, as in Micikevicius et al. 2018 (section 3.2): a non-finite gradient halves the scale and costs that
    update; `growth_interval` good updates in a row double it.
    """

    value: float = 2.0**16
    good_steps: int = 0
    growth_interval: int = 2000

    def update(self, *, finite: bool) -> None:
        """Take note of one step's gradients."""
        if not finite:
            self.value, self.good_steps = max(self.value / 2, 0.5), 0  # lower means nothing more
        elif self.good_steps + 1 == self.growth_interval:
            self.value, self.good_steps = self.value * 2, 0
        else:
            self.good_steps += 1

    @property
    def exhausted(self) -> bool:
        """Below 1 the scale does nothing: the gradients themselves are non-finite, not their scaling."""
        return self.value < 1


class Precision:
    """The formats of one run on one kind of device.

    Args:
        keeps_casts: whether autocast keeps its 16-bit copies of weights until the forward ends.

    Attributes:
        parameter_dtype: what the weights, their gradients and the optimizer's state are held in.
        loss_scale: fp16's, or None.

    Raises:
        DeviceError: the device cannot do what was asked.
    """

    def __init__(self, settings: PrecisionSettings, device: torch.device, *, keeps_casts: bool = True) -> None:
        if settings.mode == "tf32" and device.type != "cuda":
            raise DeviceError(
                f"precision.mode = 'tf32' needs a CUDA device; this run's is '{device.type}'",
                "choose precision.mode=fp32, or training.device=cuda where there is one",
            )
        self.mode = settings.mode
        self.parameter_dtype = torch.bfloat16 if settings.mode == "bf16" else torch.float32
        self.loss_scale = LossScale() if settings.mode == "fp16-mixed" else None
        self._device_type = device.type
        self._keeps_casts = keeps_casts
        # Global in PyTorch: said for every mode, so that no earlier run's choice leaks into this one.
        torch.set_float32_matmul_precision("high" if settings.mode == "tf32" else "highest")

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward."""
        dtype = _AUTOCAST.get(self.mode)
        return torch.autocast(self._device_type, dtype, cache_enabled=self._keeps_casts) if dtype else nullcontext()
