"""`inv bench-kernels`: measurements of attention backends, as a table, a plot, and an answer.

kernels/attention.py measures, in an interpreter with torch. A recording is what it prints.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from core import arch, console, files, shell, tools, workspace
from core import figure as drawing
from core.errors import BuildError, UsageError
from core.typed import from_json
from kernels import inspection, matrix, store, toolchain
from kernels.shapes import Shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.figure import Figure

SHIPPED = files.CHECKOUT / "bench/recordings/h200.jsonl"
"""The recording that is shown on a machine without a GPU."""

BASELINE = "SDPA"
"""What ComfyUI uses unless another backend is installed and chosen: the speed of the others is relative to it."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """A backend on a shape of a model. `error` is that of the worst row, relative to it; `reason` says what failed.

    `memory` is what a call takes beyond its inputs, in bytes.
    """

    backend: str
    shape: Shape
    tolerance: float
    error: float | None = None
    memory: int | None = None
    milliseconds: float | None = None
    tflops: float | None = None
    reason: str = ""

    @property
    def correct(self) -> bool:
        """Whether it ran and is as exact as its kind can be."""
        return not self.reason and self.error is not None and self.error <= self.tolerance


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The GPU and the versions that were measured; `date` and `driver` are added to a recording that is kept."""

    gpu: str
    capability: str
    cuda: str
    versions: dict[str, str]
    date: str = ""
    driver: str = ""


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """All measurements of a GPU. `recording` is the file that they come from; empty if they were made now."""

    machine: Machine
    measurements: tuple[Measurement, ...]
    recording: str = ""
    notes: tuple[str, ...] = ()

    @property
    def models(self) -> list[str]:
        """The models, in the order of their measurements."""
        return list(dict.fromkeys(each.shape.model for each in self.measurements))

    @property
    def backends(self) -> list[str]:
        """The backends, in the order of their measurements."""
        return list(dict.fromkeys(each.backend for each in self.measurements))


# --- measured or read -------------------------------------------------------------------------------------------------


def look(python: str, recording: str) -> Bench:
    """Measure this machine's GPU, or read a recording: the shipped one on a machine without a GPU.

    `python` is an interpreter whose environment is measured, such as ComfyUI's. By default, the wheelhouse's kernels
    are measured with their torch. Raises BuildError if nothing could be measured, and UsageError.
    """
    if recording:
        return read(Path(recording))
    if gpus := arch.local_gpus():
        return measure(python, gpus)
    if python:
        raise UsageError("usage", "--python needs an NVIDIA GPU, and this machine has none", hint="omit --python")
    return read(SHIPPED)


def read(path: Path) -> Bench:
    """Read a recording; raises UsageError."""
    try:
        text = path.read_text()
        found = parse(text)
    except (OSError, UnicodeError, msgspec.DecodeError) as error:
        what, hint = f"{path} is not a recording of kernels", "use the output of python -m kernels.attention"
        raise UsageError("recording", what, cause=str(error), hint=hint) from error
    return msgspec.structs.replace(found, recording=str(path))


def parse(text: str) -> Bench:
    """Parse the lines of kernels/attention.py, without others that libraries print; raises msgspec.DecodeError."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    machine = from_json(lines[0] if lines else "", Machine)
    return Bench(machine=machine, measurements=tuple(from_json(line, Measurement) for line in lines[1:]))


def measure(python: str, gpus: Sequence[arch.LocalGpu]) -> Bench:
    """Run kernels/attention.py on the first of the GPUs, or one like it.

    If it ends early, the measurements made until then are kept, with a note.
    """
    capability = gpus[0].arch.capability
    with ExitStack() as stack:
        path = [str(files.CHECKOUT)]
        notes: list[str] = []
        if not python:
            builds, _ = matrix.select(matrix.Request(arch=capability))
            chain = builds[0].toolchain
            site = toolchain.install_stack(chain.stack, chain.platform, chain.python)
            python = chain.interpreter
            built = [(build, wheel) for build in builds if (wheel := store.find(build))]
            house = workspace.current().wheelhouse
            path += [str(stack.enter_context(inspection.unpacked(house.place(wheel)))) for _, wheel in built]
            path.append(str(site))
            missing = {build.recipe.name for build in builds} - {build.recipe.name for build, _ in built}
            notes += [f"{name} is not in the wheelhouse: inv build-kernels --kernel {name}" for name in sorted(missing)]
        env = {"PYTHONPATH": ":".join(path), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1"}
        env |= arch.device_environment(gpus, capability)
        done = tools.build(python, "-m", "kernels.attention", env=env, check=False, timeout=3600)
    last = shell.last_words(done, 1).replace("\n", "; ") if done.returncode else ""
    try:
        found = parse(done.stdout)
    except msgspec.DecodeError as error:
        what = f"{python} could not measure the GPU"
        hint = "it needs torch for this GPU; --python takes ComfyUI's interpreter"
        raise BuildError("inspection", what, cause=last or str(error), hint=hint) from error
    notes += [f"the measurement ended early: {last}"] if done.returncode else []
    return msgspec.structs.replace(found, notes=tuple(notes))


# --- shown ------------------------------------------------------------------------------------------------------------


def fastest(bench: Bench, model: str) -> Measurement | None:
    """The fastest correct backend on a shape; None if none was timed."""
    timed = [each for each in bench.measurements if each.shape.model == model and each.correct and each.milliseconds]
    return min(timed, key=lambda each: each.milliseconds or math.inf, default=None)


def speeds(bench: Bench) -> dict[str, float | None]:
    """The speed of each backend relative to SDPA: the geometric mean over all models; None if it failed on one."""
    by = {(each.backend, each.shape.model): each for each in bench.measurements}
    found: dict[str, float | None] = {}
    for backend in bench.backends:
        ratios: list[float] = []
        for model in bench.models:
            one, base = by.get((backend, model)), by.get((BASELINE, model))
            if one and base and one.correct and one.milliseconds and base.milliseconds:
                ratios.append(base.milliseconds / one.milliseconds)
        complete = ratios and len(ratios) == len(bench.models)
        found[backend] = math.exp(sum(map(math.log, ratios)) / len(ratios)) if complete else None
    return found


def rows(bench: Bench) -> Iterator[str]:
    """A table of all measurements, then the answer: the fastest correct backend for each model, and on the whole."""
    machine = bench.machine
    versions = ", ".join(f"{name} {version}" for name, version in sorted(machine.versions.items()))
    if bench.recording:
        when = f", of {machine.date}" if machine.date else ""
        yield f"RECORDING {bench.recording}{when}: not measured on this machine"
    yield f"{machine.gpu}, capability {machine.capability}, CUDA {machine.cuda}, {versions}"
    best = {model: fastest(bench, model) for model in bench.models}
    headings = ("model", "backend", "error", "at most", "ms", "TFLOP/s", "memory", "result")
    yield from console.table(headings, (_cells(each, best[each.shape.model]) for each in bench.measurements))
    yield ""
    for model, one in best.items():
        yield f"{model}: {f'{one.backend}, {_number(one.milliseconds)} ms' if one else 'no correct backend'}"
    yield ""
    for backend, speed in speeds(bench).items():
        text = "wrong or failed on a model" if speed is None else f"{speed:.2f} times the speed of {BASELINE}"
        yield f"{backend}: {text}"
    yield from bench.notes


def _cells(each: Measurement, best: Measurement | None) -> Sequence[str]:
    result = each.reason or ("correct" if each.correct else "WRONG")
    error = "-" if each.error is None else f"{each.error:.5f}"
    memory = "-" if each.memory is None else console.size(each.memory)
    tflops = "-" if each.tflops is None else f"{each.tflops:.0f}"
    state = "fastest" if each is best else result[:60]
    return (
        each.shape.model,
        each.backend,
        error,
        f"{each.tolerance:.5f}",
        _number(each.milliseconds),
        tflops,
        memory,
        state,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def plot(bench: Bench, place: Path) -> None:
    """Draw the speed of each backend, one panel for each model. Raises UsageError, and ToolError without matplotlib."""
    drawing.save(lambda: figure(bench), place, "plot")


def figure(bench: Bench) -> Figure:
    """Bars of TFLOP/s; a hatched bar is a wrong result."""
    from matplotlib.figure import Figure

    columns = 2
    lines = -(-len(bench.models) // columns)
    picture = Figure(figsize=(9.6, 0.9 + 1.9 * lines), layout="constrained")
    panels = picture.subplots(lines, columns, squeeze=False).flat
    for panel, model in zip(panels, bench.models, strict=False):
        for each in [each for each in bench.measurements if each.shape.model == model]:
            color = drawing.COLORS[bench.backends.index(each.backend) % len(drawing.COLORS)]
            hatch = "" if each.correct else "//"
            panel.barh(each.backend, each.tflops or 0, color=color, hatch=hatch, gid=each.backend)
        panel.set_title(model, fontsize="small")
        panel.invert_yaxis()
        panel.tick_params(labelsize="x-small")
        panel.set_xlabel("TFLOP/s", fontsize="x-small")
    for panel in list(panels):
        panel.set_axis_off()
    recorded = ", recorded" if bench.recording else ""
    picture.suptitle(f"Speed of attention: {bench.machine.gpu}{recorded}")
    return picture
