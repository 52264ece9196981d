"""An ExportResult as a person reads it."""

from __future__ import annotations

from bptool.analysis.export import ExportResult
from bptool.report.text import aligned, next_commands


def render(result: ExportResult) -> str:
    """What was written, and how to load it."""
    rows = [("from", f"{result.run}, step {result.step}"), ("files", ", ".join(result.files))]
    load = (
        f"python -c \"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('{result.folder}'))\""
    )
    return "\n\n".join([f"{result.folder} holds a {result.family} model", aligned(rows), next_commands([load])])
