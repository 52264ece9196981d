"""Measure the peaks of the trainer's own second step on the GPU that is there, and write them down. See README.md."""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script, in a checkout where bptool may not be installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from settings import SETTINGS

from bptool.analysis.question import ask
from bptool.errors import BptoolError
from bptool.instruments.memory.peak import PeakMemory
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", default="", metavar="TEXT", help="only settings that contain this")
    parser.add_argument("-o", "--output", type=Path, help="peaks-GPU-TORCH.json beside this file if not given")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA GPU here; --device cpu tries the script without one", file=sys.stderr)
        return 3
    device = torch.device(asked.device, 0) if asked.device == "cuda" else torch.device("cpu")
    environment = environment_of(device)
    output = asked.output or HERE / f"peaks-{_as_file_name(environment['device'])}-{environment['torch']}.json"
    measured = []
    for setting in [one for one in SETTINGS if asked.only in one]:
        measured.append(measure(setting, device))
        write(output, environment, measured)  # after each, so that a machine that is taken away loses none
        print(json.dumps(measured[-1]), flush=True)
    failed = [one for one in measured if "error" in one]
    print(f"wrote {output}: {len(measured) - len(failed)} measured, {len(failed)} failed")
    return 0


def measure(setting: str, device: torch.device) -> dict[str, Any]:
    """One setting's record: peaks in bytes, or the error that it ended in."""
    begin = time.perf_counter()
    record: dict[str, Any]
    try:
        record = _measured(setting, device)
    except (BptoolError, RuntimeError, TypeError) as error:  # out of memory is a RuntimeError
        record = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
    return {"setting": setting, **record, "seconds": round(time.perf_counter() - begin, 2)}


def _measured(setting: str, device: torch.device) -> dict[str, Any]:
    target, *overrides = shlex.split(setting)
    question = ask(target, overrides, command="memory-estimate", device="cpu")  # whose step, not whose memory
    cuda = device.type == "cuda"
    _clear(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    step = build_step(question.config, question.workload, device, Announcer())
    peak = PeakMemory(device, step.persistent_tensors)
    step.announcer.instruments.append(peak)
    generator = torch.Generator(device)
    for number in range(2):
        with step.announcer.phase("step"):
            with step.announcer.phase("data"):
                count = question.config.training.gradient_accumulation_steps
                micro_batches = [step.workload.batch(generator) for _ in range(count)]
            step(number, micro_batches)
        del micro_batches
    reserved = torch.cuda.max_memory_reserved(device) if cuda else None
    return {"allocated_bytes": peak.peak_bytes, "reserved_bytes": reserved, "allocated_before_bytes": before}


def _clear(device: torch.device) -> None:
    """What the setting before has left, as far as it can be given back; cuBLAS keeps its workspaces."""
    gc.collect()
    if device.type == "cuda":
        _use_cublas(device)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _use_cublas(device: torch.device) -> None:
    """Have cuBLAS and cuBLASLt take their workspaces, so that the first setting does not differ from the others."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(64, 64, device=device, dtype=dtype)
        torch.nn.functional.linear(x, x, x[0])


def environment_of(device: torch.device) -> dict[str, Any]:
    """Where the figures come from."""
    found: dict[str, Any] = {"torch": torch.__version__.partition("+")[0]}
    if device.type == "cpu":
        return {**found, "device": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "device": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "total_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver_version(),
    }


def _driver_version() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else "unknown"


def write(path: Path, environment: dict[str, Any], measured: Iterable[dict[str, Any]]) -> None:
    """One measurement a line, for readable differences."""
    lines = ",\n".join(f"    {json.dumps(one)}" for one in measured)
    path.write_text(f'{{\n  "environment": {json.dumps(environment)},\n  "measured": [\n{lines}\n  ]\n}}\n')


def _as_file_name(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split()).removeprefix("nvidia-")


if __name__ == "__main__":
    sys.exit(main())
