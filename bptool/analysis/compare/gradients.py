"""The gradients of a grid's rows: each thing that several rows have in common is found out once."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection
from pathlib import Path

from bptool.analysis.compare.entries import Entry, GradientComparison
from bptool.analysis.compare.job import Outcome
from bptool.analysis.compare.session import Session
from bptool.analysis.question import Question
from bptool.config.keys import dotted

_OF_REFERENCE = ("model.", "data.", "run.seed", "training.sequence_length")
_OF_EQUALITY = ("model.", "activation_checkpoint.", "run.seed", "training.")
_OF_GRADIENT = ("model.", "data.", "run.seed", "activation_checkpoint.", "precision.", "training.")
"""Keys, or the beginnings of keys, that each of these is a function of."""
_SAME_GRADIENT = {"model.attention", "model.dropout"}
"""Of the model, what is another way to the same gradient, or turned off."""


class Gradients:
    """Compares rows' gradients, and remembers what was found.

    Args:
        known: entries of earlier sessions, with each row's question.
    """

    def __init__(self, session: Session, known: Collection[Entry] = ()) -> None:
        self._session = session
        self._changed: dict[str, Outcome] = {}
        self._references: dict[str, Outcome] = {}
        self._compared: dict[str, GradientComparison] = {}
        for entry in known:
            question = session.questions[entry.row]
            if question and isinstance(entry, GradientComparison):
                self._remember(question, entry)

    def compare(self, row: int, question: Question) -> GradientComparison | None:
        """A row's entry; None where the user stopped it."""
        known = self._compared.get(_key(question, _OF_GRADIENT))
        entry = known.model_copy(update={"row": row}) if known else self._found(row, question)
        if entry:
            self._remember(question, entry)
        return entry

    def _found(self, row: int, question: Question) -> GradientComparison | None:
        equality = self._equality(question)
        if equality is None:
            return None
        changed = equality.figures.get("changed", [])
        if changed:
            return GradientComparison(row=row, status="gradients_differ", reason=_words(changed), changed=changed)
        unchecked = "" if equality.status == "ok" else f"not compared with policy none to the bit: {equality.reason}"
        reference = self._reference(question)
        if reference is None:
            return None
        if not reference.figures.get("reference"):
            why = f"no reference gradient: {reference.reason or '; '.join(reference.notes)}"
            return GradientComparison(row=row, status="ok", reason="; ".join(filter(None, (unchecked, why))))
        outcome = self._session.run("gradient", question, self._file(question))
        if outcome is None:
            return None
        if outcome.status != "ok":
            return GradientComparison(row=row, status=outcome.status, reason=outcome.reason)
        return GradientComparison(row=row, status="ok", reason=unchecked, **reference.figures, **outcome.figures)

    def _remember(self, question: Question, entry: GradientComparison) -> None:
        """What was found once holds for like rows; what failed may have failed by chance."""
        whole = entry.relative_error is not None and not entry.reason
        if whole or entry.status == "gradients_differ":
            self._compared[_key(question, _OF_GRADIENT)] = entry
            self._changed[_key(question, _OF_EQUALITY)] = Outcome(figures={"changed": entry.changed})

    def _equality(self, question: Question) -> Outcome | None:
        if question.config.activation_checkpoint.policy == "none":
            return Outcome(figures={"changed": []})
        key = _key(question, _OF_EQUALITY)
        return _once(self._changed, key, lambda: self._session.run("equality", question))

    def _reference(self, question: Question) -> Outcome | None:
        key = self._reference_key(question)
        return _once(self._references, key, lambda: self._session.run("reference", question, self._file(question)))

    def _file(self, question: Question) -> Path:
        name = zlib.crc32(self._reference_key(question).encode())
        return self._session.folder / f"gradient-{name:08x}.safetensors"

    def _reference_key(self, question: Question) -> str:
        return _key(question, _OF_REFERENCE, besides=_SAME_GRADIENT)


def _once(found: dict[str, Outcome], key: str, find: Callable[[], Outcome | None]) -> Outcome | None:
    if key not in found and (outcome := find()):
        found[key] = outcome
    return found.get(key)


def _key(question: Question, prefixes: tuple[str, ...], besides: Collection[str] = ()) -> str:
    values = dotted(question.config)
    chosen = {key: value for key, value in values.items() if key.startswith(prefixes) and key not in besides}
    return json.dumps([str(question.code or ""), chosen], default=str)


def _words(changed: list[str]) -> str:
    shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    return f"recomputation changes {shown}: a block cannot be repeated as it was"
