"""GPUs of hosts: seen once, watched, and recorded."""

from __future__ import annotations

import errno
import json
import re
import shlex
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent.schema.live import GpuState, Sample
from core import console
from core.errors import ConnectError, DiskFullError, HearthError, UsageError
from deploy import connection, flow
from ops import fleet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from agent.schema.facts import Process
    from deploy.connection import Agent


def run(
    names: Sequence[str],
    *,
    watch: str | bool,
    record: str,
    seconds: str,
    every: str,
    ask_sudo: bool,
    as_json: bool,
) -> int:
    """What `inv gpu` does; returns its exit code."""
    if bool(record) != bool(seconds) or (every and not record) or (record and watch):
        raise UsageError(
            "--record FILE and --seconds N go together, --every S with both, and none of them with --watch",
            hint="inv gpu --record FILE --seconds 60",
        )
    if watch and as_json:
        raise UsageError("--watch shows tables", hint="JSON, a sample a line: inv gpu --record FILE --seconds 60")
    if record and len(names) > 1:
        raise UsageError(
            "--record records one host", hint=f"inv gpu --host {names[0]} --record {shlex.quote(record)} ..."
        )
    if record:
        return _record(names[0], Path(record), number("seconds", seconds, 1), number("every", every or "1"), ask_sudo)
    if watch:
        return _watch(names, number("watch", "1" if watch is True else str(watch)), ask_sudo)
    answers = fleet.ask_each(names, lambda agent, _: next(_samples(agent, 1, 0)), ask_sudo=ask_sudo)
    return _show(answers, as_json=as_json)


def number(flag: str, text: str, least: float = 0.1) -> float:
    """The seconds that a flag gives; raises UsageError."""
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) < least:
        raise UsageError(f"--{flag} {text} makes no sense", hint=f"give seconds, at least {least:g}")
    return float(text)


def _samples(agent: Agent, every: float, seconds: float | None) -> Iterator[Sample]:
    for line in agent.stream("gpu", every=every, seconds=seconds):
        yield msgspec.convert(line, Sample)


# --- once -------------------------------------------------------------------------------------------------------------


def _show(answers: Sequence[fleet.Answer[Sample]], *, as_json: bool) -> int:
    """Print the GPUs of hosts; 1 when some host did not tell them. Raises the error of a host that is the only one."""
    seen = fleet.heard(answers)
    if as_json:
        console.data_json([{"host": name, **msgspec.to_builtins(sample)} for name, sample in seen.items()])
    else:
        for line in lines(seen):
            console.data(console.line(line))
    return int(len(seen) < len(answers))


def lines(seen: Mapping[str, Sample]) -> list[str]:
    """The GPUs of hosts as tables, 100 columns wide at most; the host is a column when there are several."""
    several = len(seen) > 1
    gpus = [(name, gpu) for name, sample in seen.items() for gpu in sample.gpus]
    rows = [(name, str(gpu.index), *cells(gpu, 16 if several else 24), _clocks(gpu)) for name, gpu in gpus]
    headings = ("host", "GPU", "name", "used", "memory", "°C", "power", "SM/memory MHz")
    text = console.aligned(headings[not several :], [row[not several :] for row in rows])
    users = [
        (name, str(gpu.index), *_user(each, 14 if several else 20)) for name, gpu in gpus for each in gpu.processes
    ]
    if users:
        headings = ("host", "GPU", "pid", "process", "user", "kind", "memory", "service")
        text += ["", *console.aligned(headings[not several :], [row[not several :] for row in users])]
    notes = [f"{name}: job {sample.job} runs" for name, sample in seen.items() if sample.job]
    notes += [f"{name}: the driver lists no GPU" for name, sample in seen.items() if not sample.gpus]
    notes += [f"{name}: GPU {gpu.index} shares the machine's memory" for name, gpu in gpus if gpu.unified]
    notes += [f"{name}: GPU {gpu.index}: {fault}" for name, gpu in gpus for fault in gpu.faults]
    return text + [""] * bool(notes) + notes


def cells(gpu: GpuState, wide: int) -> tuple[str, ...]:
    """A GPU in a table: its name, cut to `wide`, utilisation, memory, temperature and power."""
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


# --- again and again --------------------------------------------------------------------------------------------------


def _watch(names: Sequence[str], every: float, ask_sudo: bool) -> int:
    """Show the GPUs as they are, until Ctrl-C. Each host has one connection, on which its agent tells them."""
    latest: dict[str, Sample] = {}
    came: dict[str, float] = {}
    failed: dict[str, HearthError] = {}
    told = threading.Event()

    def read(name: str, agent: Agent) -> None:
        try:
            for sample in _samples(agent, every, None):
                latest[name], came[name] = sample, time.monotonic()
                told.set()
            raise ConnectError(f"{name} does not tell its GPUs any more", hint="run the same command again")
        except HearthError as error:
            failed[name] = error
            told.set()

    def now() -> list[str]:
        if len(failed) == len(names):
            raise failed[names[0]]
        seen = {name: latest[name] for name in names if name in latest and name not in failed}
        late = {name: time.monotonic() - came[name] for name in seen}
        return [
            *lines(seen),
            *(f"{name}: the last of this came {age:.0f} s ago" for name, age in late.items() if age > every + 5),
            *(f"{name}: {failed[name].what}; next: {failed[name].hint}" for name in names if name in failed),
        ]

    with ExitStack() as stack:
        for name in names:  # one after the other: a password may be asked for
            try:
                agent = stack.enter_context(connection.connect(flow.find_target(name), ask_sudo, seconds=5))
                threading.Thread(target=read, args=(name, agent), daemon=True).start()
            except HearthError as error:
                failed[name] = error
        if len(failed) < len(names):
            told.wait(10)
        console.refreshed(now, every)
    return 0


def _record(name: str, place: Path, seconds: float, every: float, ask_sudo: bool) -> int:
    """Write a sample a line to a new file, for `seconds` or until Ctrl-C; what was written stays."""
    count = 0
    try:
        with place.open("x") as file, connection.connect(flow.find_target(name), ask_sudo) as agent:
            console.say(f"recording {name} for {console.clock(seconds)} to {place}; Ctrl-C ends it, and keeps it")
            for sample in _samples(agent, every, seconds):
                file.write(json.dumps({"host": name, **_plain(sample)}) + "\n")
                file.flush()
                count += 1
    except FileExistsError:
        raise UsageError(f"{place} exists", hint="record to another file; this one would be lost") from None
    except OSError as error:
        kind = DiskFullError if error.errno == errno.ENOSPC else UsageError
        raise kind(f"{place} cannot be written", cause=str(error), hint="record to another place") from error
    except KeyboardInterrupt:
        return _recorded(place, count, 130)
    except HearthError:
        _recorded(place, count, 0)
        raise
    return _recorded(place, count, 0)


def _plain(sample: Sample) -> dict[str, Any]:
    found = msgspec.to_builtins(sample)
    assert isinstance(found, dict)
    return found


def _recorded(place: Path, count: int, code: int) -> int:
    if not count:
        place.unlink(missing_ok=True)
    else:
        console.say(f"{count} samples in {place}; inv gpu-plot {shlex.quote(str(place))} draws them")
    return code
