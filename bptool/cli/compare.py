"""`bptool compare`: which activation-checkpointing and precision settings should I use?"""

from __future__ import annotations

import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from bptool.cli.garbage import collecting_seldom
from bptool.cli.guard import guarded, say
from bptool.cli.refusals import refuse_device, refuse_files
from bptool.cli.words import Debug, Device, Force, GpuName, Html, Json, Keys, Steps, WarmUp, Words, split_words
from bptool.errors import EXIT_INTERRUPTED, AnswerIsNo, UsageError

if TYPE_CHECKING:
    from bptool.analysis.compare.grid import Grid
    from bptool.analysis.compare.result import CompareResult

_EXAMPLE = """\b
Examples:
  bptool compare
  bptool compare gpt2 activation_checkpoint.policy=none,full --predict
  bptool compare llama3-8b --gpu h100 --fit 80GiB precision.mode=bf16 \\
    activation_checkpoint.policy=none,full,save_matmuls,budget:16GiB
  bptool compare --from runs/compare-tiny.jsonl --html compare.html"""

Predict = Annotated[bool, typer.Option("--predict", help="Rank the rows on tensors without values; run nothing.")]
Measure = Annotated[bool, typer.Option("--measure", help="Run the rows; what is done where the device is here.")]
Rounds = Annotated[int, typer.Option("--rounds", metavar="N", help="Processes of each row, which take turns.")]
TimeLimit = Annotated[
    float, typer.Option("--time-limit", metavar="SECONDS", help="Of one process: a row that takes longer says so.")
]
Fit = Annotated[
    str | None, typer.Option("--fit", metavar="SIZE", help="A memory, such as 16GiB: name the fastest row that fits.")
]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="The grid's file; runs/compare-TARGET.jsonl if not given."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a grid that was interrupted: its file is kept.")]
From = Annotated[
    Path | None, typer.Option("--from", metavar="FILE", help="Show a grid's file again; run and predict nothing.")
]
Board = Annotated[
    Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write the rows for TensorBoard's hparams.")
]


class _Asked(NamedTuple):
    """What is to be found out, and how."""

    target: str | None
    words: list[str]
    device: str
    gpu: str | None
    mode: Literal["predict", "measure"] | None
    warmup: int
    steps: int
    rounds: int
    time_limit_s: float


class _Views(NamedTuple):
    """What else is made of the Result."""

    html: Path | None
    tensorboard: Path | None


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compare", epilog=_EXAMPLE)(compare)


@guarded
def compare(
    words: Words = None,
    predict: Predict = False,
    measure: Measure = False,
    device: Device = "auto",
    gpu: GpuName = None,
    steps: Steps = 10,
    warmup: WarmUp = 3,
    rounds: Rounds = 3,
    time_limit: TimeLimit = 600.0,
    fit: Fit = None,
    output: Output = None,
    resume: Resume = False,
    stored: From = None,
    html: Html = None,
    tensorboard: Board = None,
    force: Force = False,
    keys: Keys = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare settings side by side, and name the best.

    KEY=VALUE,VALUE makes an axis; the rows are all combinations, by default of a few policies and precisions. policy
    also takes budget:4GiB, every_k:3 and plan:2*full+2*none. Exit codes: 0 done, 1 nothing fits or works, or a row
    diverged, 2 a wrong command line, config or model, 3 the machine said no, 130 stopped by Ctrl-C, after printing what
    is there.
    """
    target, settings = split_words(words)
    limit = _limit(fit)
    mode = _mode(predict=predict, measure=measure, gpu=gpu)
    asked = _Asked(target, settings, device, gpu, mode, warmup, steps, rounds, time_limit)
    views = _Views(html, tensorboard)
    refuse_files({"--html": html}, force=force)
    _refuse_events(tensorboard, force=force)
    if stored:
        _refuse_beside_from(words, output, resume=resume, predict=predict, measure=measure, gpu=gpu)
        result, file = _read(stored, limit), stored
    else:
        _refuse(asked, output, resume=resume, force=force)
        result, file = _find(asked, output, limit, resume=resume, force=force)
    for warning in result.warnings:
        say(f"warning: {warning}")
    _write(views, result)
    typer.echo(result.json_text() if json else _text(result, file))
    if result.interrupted and not stored:
        say(f"go on with: {_resume_command(file)}")
        raise typer.Exit(EXIT_INTERRUPTED)
    none_fits = limit is not None and result.best is None
    statuses = {row.status for row in result.rows}
    if none_fits or "diverged" in statuses or "ok" not in statuses:
        raise typer.Exit(AnswerIsNo.exit_code)


def _mode(*, predict: bool, measure: bool, gpu: str | None) -> Literal["predict", "measure"] | None:
    """What the options say; None: that depends on what is here."""
    if predict and measure:
        raise UsageError(
            "--predict and --measure exclude each other", "what is measured is predicted too: leave out --predict"
        )
    if measure and gpu:
        raise UsageError(
            "--gpu predicts for a GPU that need not be here, and --measure runs on what is", "leave out one of them"
        )
    return "predict" if predict or gpu else "measure" if measure else None


def _limit(fit: str | None) -> int | None:
    from bptool.units import parse_bytes

    if fit is None:
        return None
    try:
        limit = parse_bytes(fit)
    except ValueError as error:
        raise UsageError(f"--fit: {error}", "such as 24GiB (2^30 bytes each) or 24GB (10^9)") from None
    if limit == 0:
        raise UsageError(f"--fit: nothing fits into '{fit}'", "such as 24GiB (2^30 bytes each) or 24GB (10^9)")
    return limit


def _refuse(asked: _Asked, output: Path | None, *, resume: bool, force: bool) -> None:
    refuse_device(asked.device, asked.gpu)
    for option, value, least, remedy in (
        ("--steps", asked.steps, 1, "--predict runs none"),
        ("--warmup", asked.warmup, 0, "--warmup 0 times the first step too"),
        ("--rounds", asked.rounds, 1, "--predict runs none"),
    ):
        if value < least:
            raise UsageError(f"{option} {value} is less than {least}", remedy)
    if not asked.time_limit_s > 0:
        raise UsageError(f"--time-limit {asked.time_limit_s:g} leaves no time", "give a process some seconds")
    if resume and force:
        raise UsageError("--resume and --force exclude each other", "--resume keeps the file, --force overwrites it")
    if not resume:
        if output and output.is_file() and not force:
            raise UsageError(
                f"{output} exists already", "go on with its grid by --resume, or overwrite it with --force"
            )
        refuse_files({"-o": output}, force=force)


def _refuse_events(folder: Path | None, *, force: bool) -> None:
    """TensorBoard would show what lies below the folder already as well."""
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--tensorboard {folder} is no folder", "choose another name")
    for file in sorted(folder.rglob("events.out.tfevents.*"))[:1] if not force else ():
        raise UsageError(f"{file} exists already", "choose another name, or overwrite it with --force")


def _refuse_beside_from(words: list[str] | None, output: Path | None, *, gpu: str | None, **flags: bool) -> None:
    given = [*(words or []), *(["-o"] if output else []), *([f"--gpu {gpu}"] if gpu else [])]
    given += [f"--{name}" for name, on in flags.items() if on]
    if given:
        raise UsageError(f"--from shows a grid that is there, and takes no {', '.join(given)}", "leave out either")


def _read(file: Path, limit: int | None) -> CompareResult:
    from bptool.analysis.compare.answers import compared
    from bptool.analysis.compare.journal import read

    header, entries = read(file)
    return compared(header, entries, fit_bytes=limit)


def _find(
    asked: _Asked, output: Path | None, limit: int | None, *, resume: bool, force: bool
) -> tuple[CompareResult, Path]:
    """Predict, run, and say where it is written."""
    with collecting_seldom(), redirect_stdout(sys.stderr):  # what the user's own code prints is not our result
        from bptool.analysis.compare.answers import compared
        from bptool.analysis.compare.comparing import Plan, header_of, mode_of, run_grid, size
        from bptool.analysis.compare.grid import read_grid
        from bptool.analysis.compare.journal import Journal

        grid = read_grid(asked.target, asked.words, device=asked.device, gpu=asked.gpu)
        mode = mode_of(grid, asked.mode, named=asked.gpu is not None)
        plan = Plan(mode, asked.warmup, asked.steps, asked.rounds, asked.time_limit_s)
        header = header_of(grid, plan)
        file = output or _default_file(grid, resume=resume)
        with Journal.resume(file, header) if resume else Journal.create(file, header, force=force) as journal:
            say(f"{size(grid, plan)}; written to {file}")
            interrupted = run_grid(grid, header, journal, say)
            result = compared(header, journal.entries, fit_bytes=limit, interrupted=interrupted)
    return result, file


def _default_file(grid: Grid, *, resume: bool) -> Path:
    """`runs/compare-TARGET.jsonl`, with a number where that is taken; the last one of these to resume."""
    from bptool.files import writing

    folder = Path(grid.question.config.run.directory)
    stem, number = f"compare-{grid.name}", 1
    names = [file := folder / f"{stem}.jsonl"]
    while file.exists():
        number += 1
        names.append(file := folder / f"{stem}-{number}.jsonl")
    if resume:
        return names[max(len(names) - 2, 0)]
    with writing(folder, then="or name a file with -o"):
        folder.mkdir(parents=True, exist_ok=True)
    return names[-1]


def _resume_command(file: Path) -> str:
    """The same command, with the file's name."""
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--force")]
    named = [] if {"-o", "--output"} & set(words) else ["-o", str(file)]
    return shlex.join(["bptool", *words, *named, "--resume"])


def _write(views: _Views, result: CompareResult) -> None:
    """Write what was asked for, and say what it is good for."""
    if views.html:
        from bptool.files import replace_text
        from bptool.report.compare.page import render_page

        replace_text(views.html, render_page(result, command=shlex.join(["bptool", *sys.argv[1:]])))
        say(f"wrote {views.html}")
    if views.tensorboard:
        from bptool.report.compare.tensorboard import write_rows

        write_rows(views.tensorboard, result)
        say(f"wrote {views.tensorboard}: tensorboard --logdir {shlex.quote(str(views.tensorboard))}")


def _text(result: CompareResult, file: Path) -> str:
    """The report with its picture, as wide as the terminal, coloured where a person reads it."""

    from rich.console import Console

    from bptool.report.compare.console import render
    from bptool.report.scatter import scatter
    from bptool.report.text import terminal_width

    console = Console()
    width = terminal_width()
    colored = console.is_terminal and not console.no_color
    picture = scatter(result, width=min(width, 100), colored=colored)
    return render(result, width=width, picture=picture, file=str(file))
