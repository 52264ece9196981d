"""Identities of backpropagation and what a number format loses, as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from bptool.analysis.gradcheck.identities.identity import Identity
from bptool.analysis.gradcheck.precision import FormatError, PrecisionCheck, TensorPrecision
from bptool.report.text import WIDTH, columns

_MOST = 12
"""Parameters that are shown; the others lose less."""


def identities_text(identities: Sequence[Identity], width: int = WIDTH) -> str:
    """Each identity with its figures, those that fail first."""
    lines = ["identities of backpropagation"]
    for identity in sorted(identities, key=lambda one: one.holds):
        lines.append(f"  {identity.name.replace('_', ' ')} {'holds' if identity.holds else 'FAILS'}")
        lines += textwrap.wrap(identity.detail, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def precision_text(check: PrecisionCheck, width: int = WIDTH) -> str:
    """The whole gradient in a sentence, then those parameters that lose most."""
    scaled = check.loss_scale is not None
    heading = [f"{check.mode} beside float64", "relative error", "cosine", "underflow"]
    rows = [[*heading, *(["without scaling"] if scaled else [])]]
    rows += [_row(record) for record in check.tensors[:_MOST]]
    table = columns(rows, right=range(1, len(rows[0])))
    left = len(check.tensors) - _MOST
    more = [f"  ... and {left} that lose less"] if left > 0 else []
    scale = [f"  loss scale {check.loss_scale:g}"] if check.loss_scale is not None else []
    sentence = textwrap.wrap(check.detail, width, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([table, *more, *sentence, *scale, *(f"  {note}" for note in check.notes)])


def _row(record: TensorPrecision) -> list[str]:
    name = f"{record.name} (zero but for rounding)" if record.structurally_zero else record.name
    without = [] if record.without_scaling is None else [_share(record.without_scaling.underflow_share)]
    return [name, *_figures(record), *without]


def _figures(error: FormatError) -> list[str]:
    relative = "" if error.relative_error is None else f"{error.relative_error:.1e}"
    cosine = "" if error.cosine is None else f"{error.cosine:.6f}"
    return [relative, cosine, _share(error.underflow_share)]


def _share(share: float) -> str:
    return f"{share:.2%}" if share else "none"
