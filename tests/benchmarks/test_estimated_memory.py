"""How right and how fast `bptool memory-estimate` is, as tables; what must hold is asserted elsewhere."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from allocator_events import measured_peak, tracked_by_torch
from foreign_models import FOREIGN
from memory_settings import FAST, SHAPE, SLOW, TRACKABLE, name
from published_cuda_peaks import PUBLISHED, predicted_bytes
from published_cuda_steps import STEPS, predicted_step
from small_runs import small_config

from bptool.analysis.machine import FakeTensors
from bptool.analysis.memory.simulation import STEADY, simulate, simulate_deep
from bptool.config.loading import load_config
from bptool.config.schema import Config
from bptool.config.target import resolve_target
from bptool.training.workload import Workload, transformer_workload

pytestmark = [pytest.mark.benchmark, pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")]

PRESETS = ("tiny", "gpt2", "gpt2-xl", "llama3-8b", "llama3-70b", "llama3-405b")
LARGER = (
    "llama3-405b model.n_layers=2000",
    "llama3-405b training.micro_batch_size=64",
    "llama3-405b training.sequence_length=131072 model.context_length=131072",
)


def _predicted(config: Config, workload: Workload) -> int:
    trace = simulate(config, workload)
    return int(trace.live_bytes[trace.peak_event(STEADY)])


def _error(predicted: int, measured: int) -> str:
    return f"{predicted - measured:>+12,} B {predicted / measured - 1:>+9.4%}"


def test_accuracy_on_a_cpu() -> None:
    """The allocator's own events of a real second step, beside the prediction."""
    print(f"\npeak of a step on this CPU\n  {'measured':>14}{'predicted':>16}{'error':>24}  settings")
    errors = []
    settings = [(name(changes), small_config({**SHAPE, **changes}), None) for changes in FAST + SLOW]
    settings += [(architecture, small_config(), make) for architecture, make in FOREIGN.items()]  # type: ignore[misc]
    for words, config, make in settings:
        workload = make() if make else transformer_workload(config)
        predicted, measured = _predicted(config, workload), measured_peak(config, workload)
        errors.append(predicted - measured)
        print(f"  {measured:>12,} B{predicted:>14,} B{_error(predicted, measured)}  {words}")
    print(f"  {errors.count(0)} of {len(errors)} to the byte")


def test_accuracy_beside_pytorchs_tracker() -> None:
    """`MemTracker` of torch.distributed._tools, of the same step on fake and on real tensors."""
    print(f"\nerror of a step's peak\n  {'bptool':>24}{'MemTracker, fake':>24}{'MemTracker, real':>24}  settings")
    for changes in TRACKABLE:
        config = small_config({**SHAPE, **changes})
        workload = transformer_workload(config)
        measured = measured_peak(config, workload)
        found = [_predicted(config, workload), *(tracked_by_torch(config, workload, fake=f) for f in (True, False))]
        print(f"  {''.join(f'{_error(one, measured):>24}' for one in found)}  {name(changes)}")


def test_accuracy_on_published_gpus() -> None:
    """Peaks that others measured and published; MB are 10^6 bytes."""
    print(f"\npeak on a GPU\n  {'measured':>12}{'predicted':>12}{'error':>9}  step")
    for model, table in PUBLISHED.items():
        for row in table["peaks_mb"]:
            for attention in ("eager", "sdpa"):
                predicted_mb = predicted_bytes(model, attention, row["batch"], row["tokens"]) / 1e6
                measured_mb = row[attention]
                words = f"{model}, {attention}, {row['batch']} x {row['tokens']}, {table['gpu']}"
                print(
                    f"  {measured_mb:>9.1f} MB{predicted_mb:>9.1f} MB{predicted_mb / measured_mb - 1:>+9.2%}  {words}"
                )


def test_accuracy_on_published_steps() -> None:
    """Whole steps with their update, allocated and reserved."""
    print(f"\nwhole steps on a GPU\n  {'allocated':>12}{'error':>9}{'reserved':>12}{'error':>9}  step")
    for row in STEPS["peaks"]:
        step = predicted_step(row["model"], row["batch"], row["size"])
        found = ((step.peak_bytes, row["allocated"]), (step.reserved_bytes, row["reserved"]))
        figures = "".join(f"{ours / 1e6:>9.1f} MB{ours / theirs - 1:>+9.2%}" for ours, theirs in found)
        print(f"  {figures}  {row['model']}, {row['batch']} x {row['size']}, {STEPS['gpu']}")


def test_speed_from_the_shell() -> None:
    """Each preset, and the largest one larger, in a fresh process, torch's import included; the best and the median."""
    commands = {"python -c 'import torch'": ["-c", "import torch"]}
    for asked in PRESETS + LARGER:
        commands[f"{asked} --gpu h100"] = ["-m", "bptool", "memory-estimate", *asked.split(), "--gpu", "h100"]
    seconds: dict[str, list[float]] = {words: [] for words in commands}
    for _ in range(3):
        for words, arguments in commands.items():
            seconds[words].append(_seconds(lambda arguments=arguments: _run(arguments)))  # type: ignore[misc]
    print(f"\nfrom the shell, load {os.getloadavg()[0]:.1f}\n  {'best':>8}{'median':>10}")
    for words, taken in seconds.items():
        print(f"  {min(taken):>6.2f} s{statistics.median(taken):>8.2f} s  {words}")


def test_speed_beside_pytorchs_tracker() -> None:
    """The whole question, from a config to the peak: deep models need not be simulated at their depth here."""
    print(f"\nfrom a config to the peak\n  {'bptool':>8}{'MemTracker':>13}{'ratio':>9}")
    for preset, n_layers in (("gpt2", 12), ("gpt2-xl", 48), ("llama3-8b", 32)):
        config = load_config(resolve_target(preset), ["training.device=cpu", "training.gradient_accumulation_steps=1"])
        workload = transformer_workload(config)
        with FakeTensors():  # the first fake step of a process is slow
            pass
        ours = min(_seconds(lambda c=config, w=workload: simulate_deep(c, w)) for _ in range(2))  # type: ignore[misc]
        theirs = min(_seconds(lambda c=config, w=workload: tracked_by_torch(c, w)) for _ in range(2))  # type: ignore[misc]
        print(f"  {ours:>6.2f} s{theirs:>11.2f} s{theirs / ours:>8.1f}x  {preset}, {n_layers} layers")


def _seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _run(arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (0, 1), done.stderr  # 1: it does not fit
