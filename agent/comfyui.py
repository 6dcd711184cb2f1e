"""ComfyUI, over HTTP: asked, drained, and proven (`gate`)."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from agent.files import Fault, Json, read, write
from agent.journal import now
from agent.services import Manager
from agent.site import PROOF, Site


def ask(site: Site, path: str, body: Json | None = None, timeout: float = 5) -> Any:
    """Ask the running ComfyUI; bytes for a picture, else parsed JSON. Raises OSError or ValueError."""
    import urllib.request  # half of this file's start, and most verbs ask nothing
    from http.client import HTTPException

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a machine needs no proxy to reach itself
    host = f"[{site.reachable}]" if ":" in site.reachable else site.reachable
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"http://{host}:{site.port}{path}", data, {"Content-Type": "application/json"})
    try:
        with direct.open(request, timeout=timeout) as answer:
            raw = answer.read()
    except HTTPException as error:  # whoever has the port speaks something else
        raise ValueError(f"no HTTP: {error!r}") from error
    return raw if path.startswith("/view") or not raw else json.loads(raw)


def unload(site: Site) -> None:
    """Ask ComfyUI to unload its models and forget its results, once no job runs. Raises OSError or ValueError."""
    ask(site, "/free", {"unload_models": True, "free_memory": True})


def free_if_idle(site: Site) -> str:
    """Have ComfyUI unload its models and forget its results when it has no job; says what came of it."""
    try:
        queue = ask(site, "/queue")
        if queue["queue_running"] or queue["queue_pending"]:
            return "ComfyUI has a job: its memory stays as it is"
        unload(site)
    except (OSError, ValueError) as error:
        return f"ComfyUI does not answer: {error}"
    return "ComfyUI has no job, and gives its memory back"


def takes_connections(site: Site) -> bool:
    """Whether anything listens on the site's port."""
    import socket

    with suppress(OSError), socket.create_connection((site.reachable, site.port), timeout=1):
        return True
    return False


def unanswered(site: Site, error: Exception) -> Fault:
    """The Fault that stands for a ComfyUI that gave no answer."""
    if takes_connections(site):
        hint = "inv logs shows what it does; inv restart --force ends that"
        return Fault("silent", "ComfyUI takes connections and does not answer", str(error), hint)
    return Fault(
        "silent", f"nothing listens on port {site.port}: ComfyUI does not run", str(error), "inv start; inv logs"
    )


def drain(site: Site, seconds: float, force: bool, note: Callable[[str], None]) -> None:
    """Wait until ComfyUI has no job left; raises Fault naming the jobs when it does not end in time."""
    end = time.monotonic() + seconds
    said = ""
    while True:
        try:
            queue = ask(site, "/queue")
        except (OSError, ValueError):
            return  # not answering: nothing to wait for
        running = [str(job[1]) for job in queue["queue_running"]]
        waiting = len(queue["queue_pending"])
        if not running and not waiting:
            return
        jobs = f"{len(running)} running ({', '.join(running)}), {waiting} waiting"
        if force:
            note(f"cutting jobs short: {jobs}")
            return
        if time.monotonic() > end:
            raise Fault(
                "drain",
                f"ComfyUI is still working after {seconds:.0f} s: {jobs}",
                "",
                "wait and run again, give it longer (--drain SECONDS), or cut the jobs short (--force)",
            )
        if jobs != said:
            note(f"waiting for jobs: {jobs}")
            said = jobs
        time.sleep(0.5)


def gate(site: Site, manager: Manager, release: Json, note: Callable[[str], None]) -> None:
    """Prove that the release serves: it answers, is the one asked for, and makes a picture. Raises Fault if not.

    What was found is kept with the release, in `proven`: its node types with the module that each is from, and nodes
    that could not be imported.
    """
    wanted = release["gate"]
    started = time.monotonic()
    stats = first_answer(site, manager, wanted["seconds"])
    system = stats["system"]
    note(f"answers after {time.monotonic() - started:.1f} s: ComfyUI {system['comfyui_version']}")
    argv = release["argv"][release["argv"].index(f"{release['code']}/main.py") :]
    kinds = sorted({device["type"] for device in stats["devices"]})
    checks = [
        ("ComfyUI", system["comfyui_version"], wanted["version"]),
        ("its command line", " ".join(system["argv"]), " ".join(argv)),
        ("torch", system["pytorch_version"].partition("+")[0], wanted["torch"]),
    ]
    for what, found, expected in checks:
        if found != expected:
            raise Fault("gate", f"{what} is not the release's", f"found {found}, wanted {expected}")
    if wanted["cuda"] and "cuda" not in kinds:
        raise Fault("gate", "ComfyUI sees no CUDA device", f"it runs on {', '.join(kinds)}", "inv facts shows the GPUs")
    lines = _output(site, manager, "Import times for custom nodes:" if release.get("nodes") else "")
    if wanted["attention"]:
        used = next((line.strip() for line in lines if re.search(r"Using .* attention", line)), "nothing it logged")
        if wanted["attention"].lower() not in used.lower():
            raise Fault("gate", f"the attention in use is not {wanted['attention']}", f"ComfyUI says: {used}")
        note(f"attention: {wanted['attention']}")
    failed = _failed_nodes(lines)
    for name, reason in failed.items():
        if name in wanted.get("required", ()):
            raise Fault("gate", f"node {name} cannot be imported, and is required", reason)
        note(f"node {name} cannot be imported: {reason}")
    _picture(site, note)
    types = {
        name: each.get("python_module", "") for name, each in sorted(ask(site, "/object_info", timeout=60).items())
    }
    proof = {"at": now(), "failed_nodes": failed, "types": types}
    write(site.releases / release["id"] / "proven", json.dumps(proof))


def _output(site: Site, manager: Manager, until: str) -> list[str]:
    """What ComfyUI has written since it started, without colours; waits a little for a line with `until`."""
    lines: list[str] = []
    for _ in range(20):
        with suppress(Fault, OSError):
            lines = manager.log(100_000)
        if not lines:  # a journal that is not ours to read: ComfyUI itself keeps its last 300 writes
            lines = "".join(str(each["m"]) for each in ask(site, "/internal/logs/raw")["entries"]).splitlines()
        if any(until in line for line in lines):
            break
        time.sleep(0.25)
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


def _failed_nodes(lines: list[str]) -> dict[str, str]:
    """The custom nodes that ComfyUI could not import, each with the last line of its traceback."""
    failed: dict[str, str] = {}
    for line in lines:
        if found := re.search(r"\(IMPORT FAILED\): .*/([^/]+)$", line):
            name = found[1].strip()
            why = [each.partition(" for custom nodes: ")[2] for each in lines if f"/{name} module for custom" in each]
            failed[name] = why[-1] if why else "it has no NODE_CLASS_MAPPINGS and no comfy_entrypoint"
    return failed


def say_changed_types(site: Site, before: str, after: str, note: Callable[[str], None]) -> None:
    """Say which node types are gone since the release before, and which another node provides: workflows use them.

    Of two nodes with the same type ComfyUI takes the one that it loads last, without a word.
    """
    old, new = (read(site.releases / name / "proven").get("types", {}) for name in (before, after))
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


def first_answer(site: Site, manager: Manager, seconds: float) -> Any:
    """The first /system_stats of the service; raises Fault when it dies or the time is over."""
    end = time.monotonic() + seconds
    restarts = manager.status()["restarts"]
    while True:
        try:
            return ask(site, "/system_stats")
        except (OSError, ValueError):
            pass
        status = manager.status()
        if not status["active"] or status["restarts"] > restarts:
            raise Fault("gate", "ComfyUI died while it started", status["state"])
        if time.monotonic() > end:
            raise Fault("gate", f"ComfyUI does not answer after {seconds:.0f} s", status["state"])
        time.sleep(0.25)


def _picture(site: Site, note: Callable[[str], None]) -> None:
    """Run a workflow that needs no model, fetch its picture, and leave nothing behind."""
    started = time.monotonic()
    color = time.time_ns() % (1 << 24)  # ComfyUI would answer the same workflow from its cache, without the file
    inputs = {"width": 64, "height": 64, "batch_size": 1, "color": color}
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": f"{PROOF}/proof"}},
    }
    try:
        prompt = str(ask(site, "/prompt", {"prompt": workflow})["prompt_id"])
        while not (done := ask(site, f"/history/{prompt}").get(prompt)):
            if time.monotonic() - started > 120:
                raise Fault("gate", "a workflow without models does not end within 120 s")
            time.sleep(0.1)
        (image,) = done["outputs"]["2"]["images"]
        raw = ask(site, f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Fault("gate", "a workflow without models makes no picture", repr(error)) from error
    finally:
        shutil.rmtree(site.folder("output") / PROOF, ignore_errors=True)
    if raw[:8] != b"\x89PNG\r\n\x1a\n" or raw[16:24] != b"\0\0\0\x40\0\0\0\x40":
        raise Fault("gate", "the picture that came back is not the one asked for", f"{len(raw)} bytes")
    note(f"a picture came back after {time.monotonic() - started:.1f} s")
