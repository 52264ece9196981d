"""A profile's timed steps as TensorBoard's scalars, under the tags that a run's own steps have."""

from __future__ import annotations

from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import Summary

from bptool.analysis.profile.result import PhaseTimes, ProfileResult
from bptool.files import writing
from bptool.report.event_file import EventFile

_PHASES = ("step", "data", "forward", "recompute", "backward", "clip", "optimizer")


def write_scalars(folder: Path, profile: ProfileResult) -> None:
    """Write one point for each timed step, from step 1 on; nothing where none was timed.

    Args:
        folder: made where there is none. Events that lie there already are out of sight from step 1 on.

    Raises:
        StorageError: it could not be written.
    """
    if profile.time is None:
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    events = EventFile(folder, next_step=1)
    for i in range(len(profile.time.step.samples_s)):
        scalars = _scalars(profile, profile.time, i)
        values = [Summary.Value(tag=f"perf/{tag}", simple_value=value) for tag, value in scalars.items()]
        events.write(Summary(value=values), step=i + 1)
    events.close()


def _scalars(profile: ProfileResult, time: PhaseTimes, i: int) -> dict[str, float]:
    """Of one step: the phases' seconds, and the figures that follow from its own time."""
    durations = {phase: time.of(phase) for phase in _PHASES}
    found = {f"{phase}_s": duration.samples_s[i] for phase, duration in durations.items() if duration}
    if found["forward_s"]:
        found["backward_over_forward"] = found["backward_s"] / found["forward_s"]
    slower = found["step_s"] / time.step.median_s
    for tag, of_the_median in (("tokens_per_s", profile.tokens_per_s), ("mfu", profile.mfu), ("hfu", profile.hfu)):
        if of_the_median is not None:
            found[tag] = of_the_median / slower
    return found
