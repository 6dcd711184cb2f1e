"""A gateway against direct access to ComfyUI. Writes docs/benchmarks-gateway.md.

uv run python -m bench.gateway

On Debian 12, with haproxy, openssl, chromium-headless-shell and libnss3-tools. It deploys ComfyUI to this machine.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.kernels import machine as this_machine
from core import files, workspace
from deploy.gateways import Limits
from tests.browser import Browser
from tests.gateway import PASSWORD, Running, basic, closed
from tests.host.machine import clear, free_port
from tests.host.test_local import Here

LOADS, ROUNDS, PROMPTS, SOCKETS = 5, 40, 15, 200
UNLIMITED = Limits(requests=1_000_000, prompts=1_000_000, connections=10_000)
NODES = 30
PROMPT = {
    f"{kind}{i}": {"class_type": kind, "inputs": inputs}
    for i in range(NODES // 2)
    for kind, inputs in {
        "EmptyImage": {"width": 64, "height": 64, "batch_size": 1, "color": i},
        "PreviewImage": {"images": [f"EmptyImage{i}", 0]},
    }.items()
}
BODY = json.dumps({"prompt": PROMPT}).encode()


def succeeds(here: Here, *words: str) -> None:
    """Run `inv` for the deployed ComfyUI; it must succeed."""
    done = here.inv(*words)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SystemExit(1)


def page_load(gateway: Running, address: str) -> float:
    """Seconds until a new browser shows the graph."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:  # its processes end a little later
        browser = Browser(Path(home), gateway.folder / "ca.pem", "anna", PASSWORD)
        try:
            began = time.monotonic()
            browser.call("Page.navigate", url=address)
            browser.wait("websocket", lambda: any(each["type"] == "status" for each in browser.frames()))
            browser.wait("graph", lambda: browser.run("!!(window.app && app.graph && app.canvas)"))
            return time.monotonic() - began
        finally:
            browser.close()


def posts(here: Here, connect: Callable[[], http.client.HTTPConnection], headers: dict[str, str]) -> list[float]:
    """Seconds of each of PROMPTS prompts on one connection, each when ComfyUI has no job."""
    found = []
    with closing(connect()) as connection:
        for _ in range(PROMPTS):
            began = time.monotonic()
            connection.request("POST", "/prompt", body=BODY, headers=headers)
            response = connection.getresponse()
            response.read()
            assert response.status == 200
            found.append(time.monotonic() - began)
            while json.loads(body(f"http://127.0.0.1:{here.port}/prompt"))["exec_info"]["queue_remaining"]:
                time.sleep(0.05)
    return found


def body(address: str) -> bytes:
    """The body of a response."""
    with urllib.request.urlopen(address, timeout=60) as response:
        return bytes(response.read())


def prompts(here: Here, gateway: Running) -> tuple[list[float], list[float]]:
    """Seconds of prompts straight and through the gateway, in turns."""
    straight: list[float] = []
    through: list[float] = []
    host = {"Content-Type": "application/json"}
    for _ in range(ROUNDS):
        straight += posts(here, lambda: http.client.HTTPConnection("127.0.0.1", here.port, timeout=60), host)
        headers = {**host, **basic("anna"), "Host": f"spark.local:{gateway.port}"}
        through += posts(
            here,
            lambda: http.client.HTTPSConnection("127.0.0.1", gateway.port, timeout=60, context=gateway.tls),
            headers,
        )
    return straight, through


async def sockets(gateway: Running) -> int:
    """The bytes by which the gateway grows with idle websockets."""
    before = gateway.memory()
    opened = [await gateway.websocket("anna", f"/ws?clientId={uuid.uuid4()}") for _ in range(SOCKETS)]
    await asyncio.sleep(5)
    grown = gateway.memory() - before
    for _, writer in opened:
        await closed(writer)
    return grown


def during_deploy(here: Here, gateway: Running) -> tuple[int, int, float]:
    """The requests and the failed ones while a release is replaced, and the longest in seconds."""
    done = threading.Event()
    times: list[float] = []
    failed: list[Any] = []

    def client(method: str, path: str, body: bytes | None) -> None:
        while not done.wait(0.2):
            began = time.monotonic()
            try:
                if (code := gateway.ask(method, path, "anna", body=body, seconds=300).status) != 200:
                    failed.append(code)
            except OSError as error:
                failed.append(error)
            times.append(time.monotonic() - began)

    kinds = [("GET", "/queue", None), ("POST", "/prompt", BODY)] * 2
    threads = [threading.Thread(target=client, args=each) for each in kinds]
    for each in threads:
        each.start()
    try:
        here.configure('[hosts.local.override]\nmetadata = "none"')
        succeeds(here, "deploy")
    finally:
        done.set()
        for each in threads:
            each.join()
    if failed:
        sys.stderr.write(f"failed: {failed}\n")
    return len(times), len(failed), max(times)


def page(here: Here, place: Path) -> str:
    """Measure a deployed ComfyUI, with a gateway in this folder; return the page."""
    gateway = Running(place, {"local": here.port}, {}, limits=UNLIMITED, hold="5m")
    try:
        direct, behind = f"http://127.0.0.1:{here.port}", f"https://127.0.0.1:{gateway.port}"
        page_load(gateway, direct)  # warms the disk's cache
        loads = [(page_load(gateway, direct), page_load(gateway, behind)) for _ in range(LOADS)]
        straight, through = prompts(here, gateway)
        grown, load = asyncio.run(sockets(gateway)), os.getloadavg()[0]
        sent, failed, longest = during_deploy(here, gateway)
    finally:
        gateway.stop()
    rows = [
        ("page load, median (s)", *(statistics.median(each) for each in zip(*loads, strict=True))),
        ("prompt, median (ms)", *(1000 * statistics.median(each) for each in (straight, through))),
        ("prompt, p95 (ms)", *(1000 * statistics.quantiles(each, n=20)[-1] for each in (straight, through))),
    ]
    return PAGE.format(
        date=datetime.now(UTC).date(),
        machine=this_machine(),
        load=load,
        rows="\n".join(f"| {what} | {one:.1f} | {two:.1f} | {two / one:.2f} |" for what, one, two in rows),
        loads=LOADS,
        prompts=ROUNDS * PROMPTS,
        nodes=NODES,
        sockets=SOCKETS,
        grown=grown / 1e6,
        sent=sent,
        failed=failed,
        longest=longest,
    )


def main() -> None:
    """Deploy ComfyUI, measure, and write the page."""
    with tempfile.TemporaryDirectory(prefix="hearth-bench-", dir=workspace.current().cache) as name:
        place = Path(name)
        here = Here(place / "comfyui", place / "hosts.toml", free_port())
        (here.prefix / "data/cache").mkdir(parents=True)
        (place / "gateway").mkdir()
        here.configure()
        here.choose()
        try:
            succeeds(here, "deploy", "--no-trial")
            text = page(here, place / "gateway")
        finally:
            succeeds(here, "nuke", "--yes")
            clear(here.prefix)
    (files.CHECKOUT / "docs/benchmarks-gateway.md").write_text(text)
    sys.stdout.write(text)


PAGE = """\
# Benchmarks of the gateway

Measured by `uv run python -m bench.gateway` on {date}, on {machine}, with a load of {load:.0f}: the real
ComfyUI, straight by HTTP and through HAProxy with TLS and a login, in turns. {loads} page loads in a new headless
Chromium until the graph is there, and {prompts} prompts of {nodes} nodes on kept connections. The target was at most
1.2 times.

| | Straight | Gateway | Times |
| --- | ---: | ---: | ---: |
{rows}

{sockets} idle websockets: {grown:.1f} MB more in HAProxy. During a deploy of another release, with a trial:
{sent} requests, {failed} failed (target: 0), the longest took {longest:.1f} s.
"""


if __name__ == "__main__":
    main()
