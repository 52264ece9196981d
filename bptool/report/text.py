"""Small pieces of plain text that all reports share."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[tuple[str, str]], indent: str = "  ") -> str:
    """Two columns: labels, and what they label."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{indent}{label:<{width}}  {value}" for label, value in rows)


def quoted(text: str) -> str:
    """Somebody's words, marked at the margin, so that none of them is taken for ours."""
    return "\n".join(f"  | {line}".rstrip() for line in text.splitlines())


def next_commands(commands: Sequence[str]) -> str:
    """What to do next, ready to paste."""
    return "\n".join(["next:", *(f"  {command}" for command in commands)])
