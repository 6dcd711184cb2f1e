"""Health of ComfyUI: drain its jobs before a stop, and prove a release (`prove`) before it takes traffic."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast

from agent.api import LIMIT, Endpoint, ask, checked, endpoint, printable, queue, system_stats, unload
from agent.deletion import remove
from agent.files import AgentError, Json, Note, record
from agent.journal import now
from agent.layout import PROOF, Layout
from agent.parts import as_service
from agent.processes import LINE, LOG_BYTES
from agent.schema.facts import Service
from agent.schema.manifest import Gate, ReleaseManifest
from agent.schema.records import Proven


class Process(Protocol):
    """The runner of a ComfyUI: a service manager, or a release's trial."""

    def status(self) -> Service:
        """Return its state."""

    def log(self, lines: int) -> list[str]:
        """Return the last lines of the current or most recent run."""


def free_if_idle(layout: Layout) -> str:
    """Ask an idle ComfyUI to unload its models and clear cached results; return the outcome as a sentence."""
    place = endpoint(layout)
    try:
        running, waiting = queue(place)
        if running.total or waiting.total:
            return "ComfyUI has a job, so its memory is not freed"
        unload(place)
    except (OSError, ValueError) as error:
        return f"ComfyUI does not answer: {error}"
    return "ComfyUI has no job and frees its memory"


def drain(place: Endpoint, seconds: float, force: bool, note: Note) -> None:
    """Wait up to `seconds` until ComfyUI has no jobs. With `force`, return at once; the stop interrupts its jobs.

    Only a refused connection means that ComfyUI is not running. A late or invalid response may come from a busy
    ComfyUI, whose server shares the GIL with its jobs. Raises AgentError with the remaining jobs or the reason why
    they are unknown.
    """
    if force:
        note("not waiting for jobs (--force): running jobs are interrupted")
        return
    end = time.monotonic() + seconds
    shown = ""
    while True:
        try:
            running, waiting = queue(place)
        except ConnectionRefusedError:
            return
        except (OSError, ValueError) as error:
            found = f"its jobs are unknown: {error}"
        else:
            if not running.total and not waiting.total:
                return
            ids = ", ".join([*(each["id"] for each in running[:5]), *["..."] * (running.total > 5)])
            found = f"{running.total} running ({ids}), {waiting.total} waiting"
        if time.monotonic() > end:
            raise AgentError(
                "drain",
                f"ComfyUI is still working after {seconds:.0f} s: {found}",
                "",
                "run the same command again later, wait longer (--drain SECONDS), or interrupt the jobs (--force)",
            )
        if found != shown:
            note(f"waiting for jobs: {found}")
            shown = found
        time.sleep(max(0.0, min(0.5, end - time.monotonic())))


def gate(
    layout: Layout, process: Process, release: ReleaseManifest, note: Note, further: Callable[[], object] = lambda: None
) -> None:
    """Prove that the current release is healthy and store the result in its `proven` file. Raises AgentError.

    `further` does more checks after the common ones.
    """
    proof = prove(Endpoint.of(release.argv), process, release, release.argv, note, clearer(layout, note))
    further()
    record(layout.releases / release.id / "proven", proof)


TYPES = 20_000
"""Maximum number of node types to check and store: a hundred node packs have some 10,000."""

OBJECT_INFO = 48_000_000
"""Maximum size of `/object_info` in bytes: some 5 MB with ten node packs."""


def clearer(layout: Layout, note: Note) -> Callable[[], None]:
    """Return a function that deletes the proof's pictures as the service user, who may have put symlinks there."""

    def clear() -> None:
        try:
            as_service(layout, remove, layout.folder("output") / PROOF, seconds=20)
        except (AgentError, OSError) as error:
            note(f"the health check's folder could not be deleted: {error}")

    return clear


def prove(
    place: Endpoint,
    process: Process,
    release: ReleaseManifest,
    command: Sequence[str],
    note: Note,
    clear: Callable[[], None],
) -> Proven:
    """Prove that ComfyUI responds, is the expected release, and generates pictures. Raises AgentError.

    `command` is the command that started it; `clear` deletes the pictures.
    """
    wanted = release.gate
    started = time.monotonic()
    stats = first_answer(place, process, wanted.seconds)
    note(f"answers after {time.monotonic() - started:.1f} s: ComfyUI {stats['version']}")
    _check_stats(stats, wanted, command[command.index(f"{release.code}/main.py") :])
    lines = output(place, process, "Import times for custom nodes:" if release.nodes else "")
    if wanted.attention:
        used = next(
            (line.strip() for line in lines if re.search(r"Using .* attention", line)), "nothing about attention"
        )
        if wanted.attention.lower() not in used.lower():
            raise AgentError("gate", f"ComfyUI does not use {wanted.attention}", f"its log: {printable(used)}")
        note(f"attention: {wanted.attention}")
    failed = _failed_nodes(lines, {*release.nodes, *(Path(each).name for each in release.develop)})
    for name, reason in failed.items():
        if name in wanted.required:
            raise AgentError("gate", f"required node {name} cannot be imported", reason)
        note(f"node {name} cannot be imported: {reason}")
    for turn in ("first", "second"):  # an upstream regression hangs in the second workflow only (ComfyUI#15269)
        _picture(place, process, turn, clear, note)
    types = _node_types(place)
    return Proven(now(), failed, types, _replacements(place, types))


def _check_stats(stats: Json, wanted: Gate, argv: Sequence[str]) -> None:
    kinds = sorted({device["type"] for device in stats["devices"]})
    checks = [
        ("ComfyUI", stats["version"], wanted.version),
        ("its command line", " ".join(stats["argv"]), " ".join(argv)),
        ("torch", stats["torch"].partition("+")[0], wanted.torch),
    ]
    for what, found, expected in checks:
        if found != expected:
            raise AgentError(
                "gate", f"{what} differs from the release", f"found {printable(found, 2000)}, expected {expected}"
            )
    if wanted.cuda and "cuda" not in kinds:
        raise AgentError(
            "gate", "ComfyUI sees no CUDA device", f"it runs on {', '.join(kinds[:5])}", "inv doctor checks the GPU"
        )


def _node_types(place: Endpoint) -> Json:
    try:
        return cast(
            "Json",
            checked(
                "/object_info",
                ask(place, "/object_info", seconds=60, limit=OBJECT_INFO),
                lambda listed: {
                    printable(name, 120): printable(each.get("python_module", ""), 120)
                    for name, each in sorted(listed.items())[:TYPES]
                },
            ),
        )
    except (OSError, ValueError) as error:
        raise AgentError("gate", "ComfyUI does not list its node types", str(error)) from error


def _replacements(place: Endpoint, types: Json) -> Json:
    """The types that ComfyUI replaces in workflows, each by the first one registered, if that one exists."""
    try:
        listed = checked(
            "/node_replacements",
            ask(place, "/node_replacements", limit=OBJECT_INFO),
            lambda found: {str(old): printable(each[0]["new_node_id"], 120) for old, each in found.items() if each},
        )
    except (OSError, ValueError):  # an older ComfyUI has none
        return {}
    return {printable(old, 120): new for old, new in [*listed.items()][:TYPES] if new in types}


LOG_SECONDS = 5.0
"""Seconds to wait for an expected log line: the journal lags behind."""


def output(place: Endpoint, process: Process, until: str) -> list[str]:
    """Return ComfyUI's log of this run without colours; wait up to LOG_SECONDS for a line that contains `until`."""
    lines: list[str] = []
    end = time.monotonic() + LOG_SECONDS
    while True:
        with suppress(AgentError, OSError):
            lines = process.log(20_000)
        if not lines:  # journal not readable: ComfyUI keeps its last 300 writes
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
    """Return the `known` nodes that ComfyUI failed to import, each with the last line of its traceback."""
    reasons: dict[str, str] = {}
    failed: dict[str, str] = {}
    for line in lines:
        place, found, why = line.partition(" module for custom nodes: ")
        if found:
            reasons[place.rpartition("/")[2]] = printable(why, 500)
        elif "(IMPORT FAILED): " in line:
            failed[line.rpartition("/")[2].strip()] = "it has no NODE_CLASS_MAPPINGS and no comfy_entrypoint"
    return {name: reasons.get(name, why) for name, why in failed.items() if name in known}


def report_changed_types(before: Proven, after: Proven, note: Note) -> None:
    """Report node types that disappeared since the previous release or now come from another node: workflows use them.

    Without types they are unknown. If two nodes define the same type, ComfyUI silently uses
    the one loaded last.
    """
    replaced, old, new = after.replaced, before.types, after.types
    gone = sorted(set(old) - set(new) - set(replaced))
    others = [f"{name} ({replaced[name]})" for name in sorted(set(old) & set(replaced) - set(new))]
    moved = [
        f"{name} ({new[name]}, before {old[name]})"
        for name in sorted(set(old) & set(new))
        # Older versions of Hearth stored names only; a newer ComfyUI may move its own types.
        if isinstance(old, dict) and old[name] != new[name] and new[name].startswith("custom_nodes.")
    ]
    for what, names in (
        ("no longer exist", gone),
        ("ComfyUI replaces in workflows", others),
        ("are provided by another node now", moved),
    ):
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            note(f"node types that {what}: {', '.join(names[:20])}{more}")


def first_answer(place: Endpoint, process: Process, seconds: float) -> Json:
    """Poll `/system_stats` until ComfyUI responds. Raises AgentError if the process dies or `seconds` pass."""
    end = time.monotonic() + seconds
    restarts = process.status().restarts
    answer = "none yet"
    while True:
        try:
            return system_stats(place)
        except ValueError as error:
            answer = str(error)
        except OSError:
            pass
        status = process.status()
        if not status.active or status.restarts > restarts:
            raise AgentError("gate", "ComfyUI died during its start", status.state)
        if time.monotonic() > end:
            why = f"{status.state}; the last answer at port {place.port}: {answer}"
            raise AgentError("gate", f"ComfyUI does not answer after {seconds:.0f} s", why)
        time.sleep(0.25)


WORKFLOW_SECONDS = 120
"""Time limit for a 64 x 64 workflow without models: normally under a second; a busy disk or GPU may delay it."""


def finished(place: Endpoint, process: Process, workflow: Json, seconds: float, what: str) -> Json:
    """Run a workflow and return its entry in the history. A slow response does not fail it.

    Raises AgentError if it does not end within `seconds`, or if the process dies; otherwise like `ask`, and
    LookupError, TypeError or AttributeError for a response of another program.
    """
    end, restarts = time.monotonic() + seconds, process.status().restarts

    def answer(path: str, body: Json | None = None) -> Any:
        return ask(place, path, body, seconds=max(1, end - time.monotonic()))

    prompt = printable(answer("/prompt", {"prompt": workflow})["prompt_id"])
    while True:
        try:
            if done := answer(f"/history/{prompt}").get(prompt):
                return cast("Json", done)
        except ConnectionRefusedError:
            pass  # it has died
        status = process.status()
        if not status.active or status.restarts > restarts:
            raise AgentError("gate", f"ComfyUI died during {what}", status.state)
        if time.monotonic() > end:
            raise AgentError("gate", f"{what} did not end within {seconds:g} s")
        time.sleep(0.1)


def fetch(place: Endpoint, picture: Json, seconds: float, limit: int = LIMIT) -> bytes:
    """Fetch a picture that a job of the history lists. Raises like `ask`, and KeyError."""
    from urllib.parse import urlencode

    query = urlencode({name: str(picture[name]) for name in ("filename", "subfolder", "type")})
    return cast("bytes", ask(place, f"/view?{query}", seconds=seconds, limit=limit))


def _picture(place: Endpoint, process: Process, turn: str, clear: Callable[[], None], note: Note) -> None:
    """Run a workflow without models, fetch its picture, check it and delete it. Raises AgentError."""
    started = time.monotonic()
    end = started + WORKFLOW_SECONDS
    color = time.time_ns() % (1 << 24)  # unique: the same workflow would be a cache hit, without a file
    inputs = {"width": 64, "height": 64, "batch_size": 1, "color": color}
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": f"{PROOF}/proof"}},
    }
    try:
        done = finished(place, process, workflow, WORKFLOW_SECONDS, f"the {turn} workflow without models")
        (image,) = done["outputs"]["2"]["images"]
        raw = fetch(place, image, max(1, end - time.monotonic()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AgentError(
            "gate", f"the {turn} workflow without models made no picture", printable(repr(error), 500)
        ) from error
    finally:
        clear()
    if raw[:8] != b"\x89PNG\r\n\x1a\n" or raw[16:24] != b"\0\0\0\x40\0\0\0\x40":
        raise AgentError("gate", "the returned picture is not the requested one", f"{len(raw)} bytes")
    note(f"the {turn} picture arrived after {time.monotonic() - started:.1f} s")
