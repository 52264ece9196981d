"""What every command's Result has in common: frozen, typed, and one JSON form, which is the public contract."""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from bptool import __version__

SCHEMA_VERSION = 1
"""Raised when a published key changes its meaning or goes."""


class Record(BaseModel):
    """A part of a Result. Keys carry their unit: `_bytes`, `_s`, `_flops`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Result(Record):
    """A command's finished record."""

    command: ClassVar[str]

    def document(self) -> dict[str, Any]:
        """The JSON document: what `--json` prints and files hold. A NaN or infinite figure is null."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "bptool_version": __version__,
            "result": _finite(self.model_dump(mode="json")),
        }

    def json_text(self) -> str:
        """`document()` as text."""
        return json.dumps(self.document(), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
