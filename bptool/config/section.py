"""What every section of a config is made of: its base class, the kinds of numbers, and how keys conflict."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

AUTO: Any = "auto"  # Any: it stands in for an int until the section's validator has replaced it

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ConflictError(ValueError):
    """Settings that are right one by one and wrong together (or a rule that no range can state).

    Args:
        message: what is wrong; it names the keys in full, with what they are.
        keys: the dotted keys that it depends on, defaults included, the likeliest culprit first. Where one of
            them has a mistake of its own, the conflict says nothing new.
    """

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


class Section(BaseModel):
    """One table of a config: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )
