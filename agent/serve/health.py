"""ComfyUI as a service: drained before it is stopped, and proven healthy (`prove`) before it takes traffic."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from agent.api import Endpoint, ask, checked, endpoint, queue, said, system_stats, unload
from agent.deletion import remove
from agent.files import Fault, Json, Note, write
from agent.journal import now
from agent.layout import PROOF, Layout
from agent.parts import as_service
from agent.processes import LINE, LOG_BYTES
from agent.schema.facts import Service


class Process(Protocol):
    """Whatever runs a ComfyUI: a service manager, or the trial of a release."""

    def status(self) -> Service:
        """Its state."""

    def log(self, lines: int) -> list[str]:
        """The last lines of its present or last run."""


def free_if_idle(layout: Layout) -> str:
    """Have ComfyUI unload its models and forget its results when it has no job; says what came of it."""
    place = endpoint(layout)
    try:
        running, waiting = queue(place)
        if running.total or waiting.total:
            return "ComfyUI has a job: its memory stays as it is"
        unload(place)
    except (OSError, ValueError) as error:
        return f"ComfyUI does not answer: {error}"
    return "ComfyUI has no job, and gives its memory back"


def drain(place: Endpoint, seconds: float, force: bool, note: Note) -> None:
    """Wait until ComfyUI has no job left; with `force` ask it nothing, its jobs are interrupted.

    Only a refused connection means that no ComfyUI runs. One that answers late, or with nonsense, may be at work: it
    shares Python's lock with its jobs. Raises Fault naming the jobs, or the reason why they are not known.
    """
    if force:
        note("not waiting for jobs (--force): what runs is interrupted")
        return
    end = time.monotonic() + seconds
    said = ""
    while True:
        try:
            running, waiting = queue(place)
        except ConnectionRefusedError:
            return
        except (OSError, ValueError) as error:
            found = f"its jobs are not known: {error}"
        else:
            if not running.total and not waiting.total:
                return
            ids = ", ".join([*(each["id"] for each in running[:5]), *["..."] * (running.total > 5)])
            found = f"{running.total} running ({ids}), {waiting.total} waiting"
        if time.monotonic() > end:
            raise Fault(
                "drain",
                f"ComfyUI is still working after {seconds:.0f} s: {found}",
                "",
                "wait and run again, give it longer (--drain SECONDS), or interrupt it (--force)",
            )
        if found != said:
            note(f"waiting for jobs: {found}")
            said = found
        time.sleep(0.5)


def gate(layout: Layout, process: Process, release: Json, note: Note) -> None:
    """Prove that the release in service is healthy, and keep with it what was found, in `proven`. Raises Fault."""
    proof = prove(Endpoint.of(release["argv"]), process, release, release["argv"], note, clearer(layout, note))
    write(layout.releases / release["id"] / "proven", json.dumps(proof))


TYPES = 20_000
"""Node types that are looked at, and kept: a hundred node packs have some 10,000."""

OBJECT_INFO = 48_000_000
"""Bytes of all node types: some 5 MB with ten node packs."""


def clearer(layout: Layout, note: Note) -> Callable[[], None]:
    """What deletes the pictures of a proof: as the service, which may have put a link or a labyrinth there."""

    def clear() -> None:
        try:
            as_service(layout, remove, layout.folder("output") / PROOF, seconds=20)
        except (Fault, OSError) as error:
            note(f"the proof's folder stays: {error}")

    return clear


def prove(
    place: Endpoint,
    process: Process,
    release: Json,
    command: list[str],
    note: Note,
    clear: Callable[[], None],
) -> Json:
    """Prove that a ComfyUI serves: it answers, is the release asked for, and makes pictures. Raises Fault.

    `command` is the one that it was started with, `clear` deletes the pictures. Returns when this was, the node types
    with the module that each is from, and the nodes that could not be imported with the reason.
    """
    wanted = release["gate"]
    started = time.monotonic()
    stats = first_answer(place, process, wanted["seconds"])
    note(f"answers after {time.monotonic() - started:.1f} s: ComfyUI {stats['version']}")
    argv = command[command.index(f"{release['code']}/main.py") :]
    kinds = sorted({device["type"] for device in stats["devices"]})
    checks = [
        ("ComfyUI", stats["version"], wanted["version"]),
        ("its command line", " ".join(stats["argv"]), " ".join(argv)),
        ("torch", stats["torch"].partition("+")[0], wanted["torch"]),
    ]
    for what, found, expected in checks:
        if found != expected:
            raise Fault("gate", f"{what} is not the release's", f"found {said(found, 2000)}, wanted {expected}")
    if wanted["cuda"] and "cuda" not in kinds:
        raise Fault(
            "gate", "ComfyUI sees no CUDA device", f"it runs on {', '.join(kinds[:5])}", "inv facts shows the GPUs"
        )
    lines = _output(place, process, "Import times for custom nodes:" if release.get("nodes") else "")
    if wanted["attention"]:
        used = next((line.strip() for line in lines if re.search(r"Using .* attention", line)), "nothing it logged")
        if wanted["attention"].lower() not in used.lower():
            raise Fault("gate", f"the attention in use is not {wanted['attention']}", f"ComfyUI says: {said(used)}")
        note(f"attention: {wanted['attention']}")
    failed = _failed_nodes(
        lines, {*release.get("nodes", ()), *(Path(each).name for each in release.get("develop", ()))}
    )
    for name, reason in failed.items():
        if name in wanted.get("required", ()):
            raise Fault("gate", f"node {name} cannot be imported, and is required", reason)
        note(f"node {name} cannot be imported: {reason}")
    for turn in ("first", "second"):  # an upstream regression passes the first and hangs in the second (ComfyUI#15269)
        _picture(place, process, turn, clear, note)
    try:
        types = checked(
            "/object_info",
            ask(place, "/object_info", seconds=60, limit=OBJECT_INFO),
            lambda listed: {
                said(name, 120): said(each.get("python_module", ""), 120)
                for name, each in sorted(listed.items())[:TYPES]
            },
        )
    except (OSError, ValueError) as error:
        raise Fault("gate", "ComfyUI does not list its node types", str(error)) from error
    return {"at": now(), "failed_nodes": failed, "types": types}


LOG_SECONDS = 5.0
"""For the log to hold what is looked for: a journal is some moments behind."""


def _output(place: Endpoint, process: Process, until: str) -> list[str]:
    """What ComfyUI has written since it started, without colours; waits a little for a line with `until`."""
    lines: list[str] = []
    end = time.monotonic() + LOG_SECONDS
    while True:
        with suppress(Fault, OSError):
            lines = process.log(20_000)
        if not lines:  # a journal that is not ours to read: ComfyUI itself keeps its last 300 writes
            with suppress(OSError, ValueError):
                found = ask(place, "/internal/logs/raw", seconds=LOG_SECONDS, limit=LOG_BYTES)
                lines = checked(
                    "its log", found, lambda log: "".join(str(each["m"]) for each in log["entries"])
                ).splitlines()
        lines = [line[:LINE] for line in lines[-20_000:]]
        if any(until in line for line in lines) or time.monotonic() > end:
            break
        time.sleep(0.25)
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


def _failed_nodes(lines: list[str], known: Collection[str] = ()) -> dict[str, str]:
    """The nodes of the release that ComfyUI could not import, each with the last line of its traceback."""
    reasons: dict[str, str] = {}
    failed: dict[str, str] = {}
    for line in lines:
        place, found, why = line.partition(" module for custom nodes: ")
        if found:
            reasons[place.rpartition("/")[2]] = said(why, 500)
        elif "(IMPORT FAILED): " in line:
            failed[line.rpartition("/")[2].strip()] = "it has no NODE_CLASS_MAPPINGS and no comfy_entrypoint"
    return {name: reasons.get(name, why) for name, why in failed.items() if name in known}


def say_changed_types(old: Json, new: Json, note: Note) -> None:
    """Say which node types are gone since the release before, and which another node provides: workflows use them.

    Both are what `prove` found (empty: it is not known). Of two nodes with the same type ComfyUI takes the one that it
    loads last, without a word.
    """
    old, new = old.get("types", {}), new.get("types", {})
    gone = sorted(set(old) - set(new))
    moved = [
        f"{name} ({new[name]}, before {old[name]})"
        for name in sorted(set(old) & set(new))
        # an older Hearth kept names only; a newer ComfyUI may move its own
        if isinstance(old, dict) and old[name] != new[name] and new[name].startswith("custom_nodes.")
    ]
    for what, names in (("are gone", gone), ("another node provides now", moved)):
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            note(f"node types that {what}: {', '.join(names[:20])}{more}")


def first_answer(place: Endpoint, process: Process, seconds: float) -> Json:
    """The first `/system_stats`; raises Fault when the process dies or the time is over."""
    end = time.monotonic() + seconds
    restarts = process.status().restarts
    answer = "nothing yet"
    while True:
        try:
            return system_stats(place)
        except ValueError as error:
            answer = str(error)
        except OSError:
            pass
        status = process.status()
        if not status.active or status.restarts > restarts:
            raise Fault("gate", "ComfyUI died while it started", status.state)
        if time.monotonic() > end:
            why = f"{status.state}; the last answer at port {place.port}: {answer}"
            raise Fault("gate", f"ComfyUI does not answer after {seconds:.0f} s", why)
        time.sleep(0.25)


WORKFLOW_SECONDS = 120
"""For a workflow of 64 x 64 pixels without a model: it takes under a second, and a busy disk or GPU may hold it up."""


def _picture(place: Endpoint, process: Process, turn: str, clear: Callable[[], None], note: Note) -> None:
    """Run a workflow that needs no model, fetch its picture, and leave nothing behind."""
    started = time.monotonic()
    color = time.time_ns() % (1 << 24)  # ComfyUI would answer the same workflow from its cache, without the file
    inputs = {"width": 64, "height": 64, "batch_size": 1, "color": color}

    def answer(path: str, body: Json | None = None) -> Any:  # a busy ComfyUI is late, which is no fault of the release
        return ask(place, path, body, seconds=max(1, started + WORKFLOW_SECONDS - time.monotonic()))

    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": f"{PROOF}/proof"}},
    }
    try:
        prompt = said(answer("/prompt", {"prompt": workflow})["prompt_id"])
        while not (done := answer(f"/history/{prompt}").get(prompt)):
            if time.monotonic() - started > WORKFLOW_SECONDS:
                raise Fault("gate", f"the {turn} workflow without models does not end within {WORKFLOW_SECONDS} s")
            if not process.status().active:
                raise Fault("gate", f"ComfyUI died during the {turn} workflow", process.status().state)
            time.sleep(0.1)
        (image,) = done["outputs"]["2"]["images"]
        raw = answer(f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Fault("gate", f"the {turn} workflow without models makes no picture", said(repr(error), 500)) from error
    finally:
        clear()
    if raw[:8] != b"\x89PNG\r\n\x1a\n" or raw[16:24] != b"\0\0\0\x40\0\0\0\x40":
        raise Fault("gate", "the picture that came back is not the one asked for", f"{len(raw)} bytes")
    note(f"the {turn} picture came back after {time.monotonic() - started:.1f} s")
