"""Plots of GPU recordings: utilisation, memory and power over time, with the jobs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from agent.schema.live import GpuState, Sample
from core import console
from core import figure as drawing
from core.errors import UsageError
from core.typed import from_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Recorded(Sample):
    """A line of a recording."""

    host: str = field(kw_only=True)


@dataclass(frozen=True)
class Panel:
    """A value of every GPU over time, and its maximum (None: not reported)."""

    title: str
    value: Callable[[GpuState], float | None]
    most: Callable[[GpuState], float | None]


PANELS = (
    Panel("GPU used, %", lambda gpu: gpu.utilization, lambda _: 100),
    Panel(
        "memory used, GB",
        lambda gpu: None if gpu.memory_used is None else gpu.memory_used / 1e9,
        lambda gpu: None if gpu.memory_total is None else gpu.memory_total / 1e9,
    ),
    Panel("power, W", lambda gpu: gpu.power, lambda gpu: gpu.power_limit),
)


def plot(recording: str, output: str) -> Path:
    """Plot a recording to an .svg or .png file (default: the recording's name with .svg), and return its path.

    Raises UsageError, and ToolError without matplotlib.
    """
    place = Path(output) if output else Path(recording).with_suffix(".svg")
    drawing.check(place, "output")
    samples = read(Path(recording))
    drawing.save(lambda: figure(samples), place, "output")
    return place


def read(path: Path) -> list[Recorded]:
    """Read the samples of a recording; raises UsageError, which names the line."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(
            "recording", f"{path} cannot be read", cause=str(error), hint="use a file of inv gpu --record"
        ) from error
    whole, rest = lines[:-1], lines[-1]
    if rest or not whole:
        what = f"line {len(lines)} of {path} is incomplete" if rest else f"{path} is empty"
        hint = (
            f"delete that line: sed -i '$d' {shlex.quote(str(path))}"
            if whole
            else "record again: inv gpu --record FILE --seconds N"
        )
        raise UsageError("recording", what, cause="the recording was killed, or the disk was full", hint=hint)
    found: list[Recorded] = []
    for number, line in enumerate(whole, 1):
        try:
            found.append(from_json(line, Recorded))
        except msgspec.DecodeError as error:  # includes a wrong type
            hint = "use a file of inv gpu --record, or delete the line"
            raise UsageError(
                "recording", f"line {number} of {path} is not a sample", cause=str(error), hint=hint
            ) from error
    return found


def figure(samples: Sequence[Recorded]) -> Figure:
    """A panel for each value, with a line for each GPU and a grey field for each job."""
    from matplotlib.figure import Figure

    begin = samples[0].time
    names = {gpu.index: gpu.name or "GPU" for sample in samples for gpu in sample.gpus}
    picture = Figure(figsize=(9.6, 6.4), layout="constrained")
    axes = picture.subplots(len(PANELS), sharex=True)
    for panel, each in zip(PANELS, axes, strict=True):
        _draw(panel, each, samples, names)
        for start, end, _ in jobs(samples):
            each.axvspan(start - begin, end - begin, facecolor="#eee", edgecolor="#bbb", gid="job")
    for start, _, job in jobs(samples):
        top = axes[0].get_xaxis_transform()
        axes[0].text(
            start - begin, 1.01, console.line(job[:8]), transform=top, va="bottom", size="x-small", color="#777"
        )
    axes[-1].set_xlabel("seconds")
    axes[-1].set_xlim(0, max(samples[-1].time - begin, 1))
    if names:
        picture.legend(handles=axes[0].get_lines(), loc="outside upper left", ncols=2, frameon=False)
    return picture


def jobs(samples: Sequence[Recorded]) -> list[tuple[float, float, str]]:
    """The times of each job's first and last sample, and its id."""
    found: list[tuple[float, float, str]] = []
    for sample, after in pairwise([*samples, samples[-1]]):
        if sample.job is None:
            continue
        if found and found[-1][1:] == (sample.time, sample.job):
            found[-1] = (found[-1][0], after.time, sample.job)
        else:
            found.append((sample.time, after.time, sample.job))
    return found


def _draw(panel: Panel, axes: Axes, samples: Sequence[Recorded], names: dict[int, str]) -> None:
    gpus = [gpu for sample in samples for gpu in sample.gpus]
    reported = [each for gpu in gpus for each in (panel.value(gpu), panel.most(gpu)) if each is not None]
    axes.set_ylabel(panel.title if reported else f"{panel.title}\nnot reported")
    axes.set_ylim(0, max(reported, default=1) or 1)
    axes.grid(axis="y", color="#ddd")
    times = [sample.time - samples[0].time for sample in samples]
    for index, name in sorted(names.items()):
        values = (next((panel.value(gpu) for gpu in sample.gpus if gpu.index == index), None) for sample in samples)
        line = [nan if value is None else value for value in values]  # a gap
        axes.plot(
            times,
            line,
            color=drawing.COLORS[index % len(drawing.COLORS)],
            label=console.line(f"GPU {index}: {name}"),
            gid=f"gpu{index}",
        )
