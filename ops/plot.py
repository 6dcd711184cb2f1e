"""Recordings of GPUs, drawn: utilisation, memory and power over time, with the jobs that ran.

The SVG is written here: three lines of numbers need no library. A PNG is made of it by rsvg-convert.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import msgspec

from agent.schema.live import GpuState, Sample
from core import console, files, shell
from core.errors import RecordingError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH, LEFT, RIGHT, TOP = 960, 70, 20, 50
PANEL, GAP = 150, 40
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
"""Okabe and Ito's, which also those tell apart who see few colours (jfly.uni-koeln.de/color)."""


@dataclass(frozen=True, kw_only=True)
class Recorded(Sample):
    """A line of a recording."""

    host: str


@dataclass(frozen=True)
class Panel:
    """A value of every GPU over time, and the most that it can be (None: not told)."""

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


def plot(recording: str, output: str) -> None:
    """Draw a recording to a file, by default its own name with `.svg`; raises RecordingError and UsageError."""
    place = Path(output) if output else Path(recording).with_suffix(".svg")
    if place.suffix not in (".svg", ".png"):
        raise UsageError(f"{place} is neither .svg nor .png", hint="--output FILE.svg, which every browser shows")
    picture = svg(read(Path(recording)))
    if place.suffix == ".png":
        words = ["rsvg-convert", "--output", str(place)]
        shell.run(words, input_text=picture)
    else:
        files.write(place, picture)
    console.data(str(place))


def read(path: Path) -> list[Recorded]:
    """The samples of a recording; raises RecordingError that names the line."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecordingError(f"{path} cannot be read", cause=str(error), hint="name a file of --record") from error
    whole, rest = lines[:-1], lines[-1]
    if rest or not whole:
        what = f"line {len(lines)} of {path} is cut short" if rest else f"{path} is empty"
        hint = (
            f"leave it out: sed -i '$d' {shlex.quote(str(path))}"
            if whole
            else "record anew: inv gpu --record FILE --seconds N"
        )
        raise RecordingError(what, cause="whoever recorded was killed, or the disk was full", hint=hint)
    found: list[Recorded] = []
    for number, line in enumerate(whole, 1):
        try:
            found.append(msgspec.json.decode(line, type=Recorded))
        except msgspec.DecodeError as error:  # of which a wrong type is one
            hint = "name a file of inv gpu --record, or take the line out"
            raise RecordingError(f"line {number} of {path} is no sample", cause=str(error), hint=hint) from error
    return found


def svg(samples: Sequence[Recorded]) -> str:
    """The picture: a panel for each value, a colour for each GPU, a grey field for each job."""
    begin = samples[0].time
    length = max(samples[-1].time - begin, 1.0)
    bottom = TOP + len(PANELS) * (PANEL + GAP) - GAP

    def x(time: float) -> float:
        return LEFT + (time - begin) / length * (WIDTH - LEFT - RIGHT)

    names = {gpu.index: gpu.name or "GPU" for sample in samples for gpu in sample.gpus}
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{bottom + 50}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for start, end, job in jobs(samples):
        place = f'x="{x(start):.1f}" y="{TOP}" width="{x(end) - x(start):.1f}" height="{bottom - TOP}"'
        out.append(f'<rect class="job" {place} fill="#eee" stroke="#bbb"><title>{escape(job)}</title></rect>')
        place = f'x="{x(start) + 3:.1f}" y="{TOP + PANEL + 12}"'  # where no line is drawn
        out.append(f'<text {place} fill="#777" font-size="9">{escape(job[:8])}</text>')
    for number, (index, name) in enumerate(names.items()):
        place = f'x="{LEFT + number % 4 * 220}" y="{14 + number // 4 * 14}"'
        out.append(f'<text {place} fill="{_color(index)}">GPU {index}: {escape(name)}</text>')
    for row, panel in enumerate(PANELS):
        out += _panel(panel, samples, TOP + row * (PANEL + GAP), x)
    step = _nice(length / 8)
    for tick in range(int(length / step) + 1):
        out.append(_text(x(begin + tick * step), bottom + 18, f"{tick * step:g} s", "middle"))
    return "\n".join([*out, "</svg>\n"])


def jobs(samples: Sequence[Recorded]) -> list[tuple[float, float, str]]:
    """When each job was seen to begin and to end, and its id."""
    found: list[tuple[float, float, str]] = []
    for sample, after in pairwise([*samples, samples[-1]]):
        if sample.job is None:
            continue
        if found and found[-1][1:] == (sample.time, sample.job):
            found[-1] = (found[-1][0], after.time, sample.job)
        else:
            found.append((sample.time, after.time, sample.job))
    return found


def _panel(panel: Panel, samples: Sequence[Recorded], top: float, x: Callable[[float], float]) -> list[str]:
    gpus = [gpu for sample in samples for gpu in sample.gpus]
    told = [each for gpu in gpus for each in (panel.value(gpu), panel.most(gpu)) if each is not None]
    most = max(told, default=1.0) or 1.0

    def y(value: float) -> float:
        return top + PANEL * (1 - value / most)

    out = [_text(LEFT, top - 6, panel.title if told else f"{panel.title}: not told", "start")]
    step = _nice(most / 4)
    for tick in range(int(most / step) + 1):
        height = y(tick * step)
        out.append(f'<path d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(_text(LEFT - 6, height + 4, f"{tick * step:g}", "end"))
    for index in sorted({gpu.index for gpu in gpus}):
        path, pen = "", "M"
        for sample in samples:
            value = next((panel.value(gpu) for gpu in sample.gpus if gpu.index == index), None)
            path += "" if value is None else f"{pen}{x(sample.time):.1f} {y(value):.1f}"
            pen = "M" if value is None else "L"  # what was not told leaves a gap
        if path:
            out.append(f'<path class="gpu{index}" d="{path}" fill="none" stroke="{_color(index)}" stroke-width="1.5"/>')
    return out


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _nice(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** (len(str(int(step))) - 1) if step >= 1 else 0.1
    return next((each * power for each in (1, 2, 5, 10) if each * power >= step), step)
