"""The GPUs of hosts: shown once, watched, and recorded."""

from __future__ import annotations

import errno
import json
import shlex
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent.schema.live import GpuState, Sample
from core import console
from core.console import counted
from core.errors import ConnectError, HearthError, HostError, UsageError
from core.flags import number
from core.typed import convert
from deploy import connection, fleet
from deploy.look import find_target

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from agent.schema.facts import Process
    from deploy.connection import Agent


def check(names: Sequence[str], *, watch: str | bool, record: str, seconds: str, every: str, as_json: bool) -> None:
    """Check the flags of `inv gpu` against each other; raises UsageError."""
    if bool(record) != bool(seconds) or (every and not record) or (record and watch):
        raise UsageError(
            "usage",
            "--record FILE requires --seconds N, --every S requires both, and --watch excludes all three",
            hint="inv gpu --record FILE --seconds 60",
        )
    if watch and as_json:
        raise UsageError(
            "usage", "--watch has no JSON output", hint="for JSON lines: inv gpu --record FILE --seconds 60"
        )
    if record and len(names) > 1:
        raise UsageError(
            "usage", "--record records one host", hint=f"inv gpu --host {names[0]} --record {shlex.quote(record)} ..."
        )


def look(names: Sequence[str], *, ask_sudo: bool) -> list[fleet.Answer[Sample]]:
    """One sample of each host."""
    return fleet.ask_each(names, lambda agent, _: next(_samples(agent, 1, 0)), ask_sudo=ask_sudo)


def _samples(agent: Agent, every: float, seconds: float | None) -> Iterator[Sample]:
    for line in agent.stream("gpu", every=every, seconds=seconds):
        yield convert(line, Sample)


# --- once -------------------------------------------------------------------------------------------------------------


def summary(seen: Mapping[str, Sample]) -> list[dict[str, Any]]:
    """The samples of hosts, for JSON."""
    return [{"host": name, **msgspec.to_builtins(sample)} for name, sample in seen.items()]


def rows(seen: Mapping[str, Sample]) -> list[str]:
    """Tables of GPUs and their processes, 100 columns wide at most, with a column for the host if there are several."""
    several = len(seen) > 1
    gpus = [(name, gpu) for name, sample in seen.items() for gpu in sample.gpus]
    listed = [(name, str(gpu.index), *cells(gpu, 16 if several else 24), _clocks(gpu)) for name, gpu in gpus]
    headings = ("host", "GPU", "name", "used", "memory", "°C", "power", "SM/memory MHz")
    text = console.table(headings[not several :], [row[not several :] for row in listed])
    users = [
        (name, str(gpu.index), *_user(each, 14 if several else 20)) for name, gpu in gpus for each in gpu.processes
    ]
    if users:
        headings = ("host", "GPU", "pid", "process", "user", "kind", "memory", "service")
        text += ["", *console.table(headings[not several :], [row[not several :] for row in users])]
    notes = [f"{name}: job {sample.job} is running" for name, sample in seen.items() if sample.job]
    notes += [f"{name}: the driver lists no GPU" for name, sample in seen.items() if not sample.gpus]
    notes += [f"{name}: GPU {gpu.index} shares the machine's memory" for name, gpu in gpus if gpu.unified]
    notes += [f"{name}: GPU {gpu.index}: {error}" for name, gpu in gpus for error in gpu.errors]
    return text + [""] * bool(notes) + notes


def cells(gpu: GpuState, wide: int) -> tuple[str, ...]:
    """The cells of a GPU: its name, cut to `wide`, utilisation, memory, temperature and power."""
    name = (gpu.name or "-").removeprefix("NVIDIA ").removeprefix("GeForce ")
    memory = f"{_size(gpu.memory_used)} of {_size(gpu.memory_total)}"
    power = f"{_whole(gpu.power)} of {_whole(gpu.power_limit)} W" if gpu.power_limit else f"{_whole(gpu.power)} W"
    return name[:wide], f"{_whole(gpu.utilization)} %", memory, _whole(gpu.temperature), power


def _clocks(gpu: GpuState) -> str:
    return f"{_whole(gpu.clock_sm)} / {_whole(gpu.clock_memory)}"


def _user(each: Process, wide: int) -> tuple[str, ...]:
    name, user, unit = (each.name or "-")[:wide], (each.user or "-")[:10], (each.unit or "-")[:18]
    return str(each.pid), name, user, each.kind, _size(each.bytes), f"{unit}{' (ComfyUI)' * each.comfyui}"


def _size(value: int | None) -> str:
    return "-" if value is None else console.size(value)


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


# --- repeatedly -----------------------------------------------------------------------------------------------


def watch(names: Sequence[str], seconds: str | bool, *, ask_sudo: bool) -> None:
    """Show the GPUs every `seconds` (True: 1) until Ctrl-C. Each host's agent streams samples over one connection.

    Raises UsageError.
    """
    every = number("watch", "1" if seconds is True else str(seconds), 0.1)
    latest: dict[str, Sample] = {}
    came: dict[str, float] = {}
    failed: dict[str, HearthError] = {}
    news = threading.Event()

    def read(name: str, agent: Agent) -> None:
        try:
            for sample in _samples(agent, every, None):
                latest[name], came[name] = sample, time.monotonic()
                news.set()
            raise ConnectError("unreachable", f"{name} stopped reporting its GPUs", hint="run the same command again")
        except HearthError as error:
            failed[name] = error
            news.set()

    def now() -> list[str]:
        if len(failed) == len(names):
            raise failed[names[0]]
        seen = {name: latest[name] for name in names if name in latest and name not in failed}
        late = {name: time.monotonic() - came[name] for name in seen}
        return [
            *rows(seen),
            *(f"{name}: last reported {age:.0f} s ago" for name, age in late.items() if age > every + 5),
            *(f"{name}: {failed[name].what}; fix: {failed[name].hint}" for name in names if name in failed),
        ]

    with ExitStack() as stack:
        for name in names:  # one after the other: the terminal may ask for a password
            try:
                agent = stack.enter_context(connection.connect(find_target(name), ask_sudo, seconds=5))
                threading.Thread(target=read, args=(name, agent), daemon=True).start()
            except HearthError as error:
                failed[name] = error
        if len(failed) < len(names):
            news.wait(10)
        console.refreshed(now, every)


def record(name: str, place: Path, seconds: float, every: float, *, ask_sudo: bool) -> int:
    """Write samples to a new file, one JSON line each, for `seconds` or until Ctrl-C; returns 130 at Ctrl-C.

    Keeps the samples written before an error. Raises UsageError or HostError if the file cannot be written.
    """
    count = 0
    try:
        with place.open("x") as file, connection.connect(find_target(name), ask_sudo) as agent:
            console.say(f"recording {name} for {console.clock(seconds)} to {place}; Ctrl-C ends it, and keeps it")
            for sample in _samples(agent, every, seconds):
                file.write(json.dumps({"host": name, **msgspec.to_builtins(sample)}) + "\n")
                file.flush()
                count += 1
    except FileExistsError:
        raise UsageError("usage", f"{place} already exists", hint="record to another file") from None
    except OSError as error:
        what, why, hint = f"{place} cannot be written", str(error), "record to another folder"
        if error.errno == errno.ENOSPC:
            raise HostError("disk-full", what, cause=why, hint=hint) from error
        raise UsageError("usage", what, cause=why, hint=hint) from error
    except KeyboardInterrupt:
        return _recorded(place, count, 130)
    except HearthError:
        _recorded(place, count, 0)
        raise
    return _recorded(place, count, 0)


def _recorded(place: Path, count: int, code: int) -> int:
    if not count:
        place.unlink(missing_ok=True)
    else:
        console.say(f"{counted(count, 'sample')} in {place}; plot them with inv gpu-plot {shlex.quote(str(place))}")
    return code
