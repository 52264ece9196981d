"""`bptool sample`: continue a prompt with a run's model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bptool.cli.guard import guarded, note
from bptool.cli.words import Debug, Json

_EXAMPLE = """\b
Examples:
  bptool sample tiny
  bptool sample runs/tiny --prompt "class Tokenizer" --tokens 300"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("sample", epilog=_EXAMPLE)(sample)


@guarded
def sample(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name below runs/.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to continue; the run's own if not given.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", "-n", min=1, help="How many tokens to add.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="Sample among the k likeliest; 0: all.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed writes the same text.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda ...; the run's own if not given.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt with a run's newest model. The run may still be training."""
    from bptool.analysis.sample import sample_run
    from bptool.config.schema import RunSettings
    from bptool.report.text import visible
    from bptool.training.run_folder import find_run

    given = {
        "evaluation.prompt": prompt,
        "evaluation.sample_tokens": tokens,
        "evaluation.temperature": temperature,
        "evaluation.top_k": top_k,
        "training.device": device,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    result = sample_run(find_run(run, RunSettings().directory), changes, seed=seed, note=note)
    text = visible(result.text) if sys.stdout.isatty() else result.text
    typer.echo(result.json_text() if json else text)
