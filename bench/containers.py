"""Container images and containers: writes docs/benchmarks-containers.md, one section for each argument.

uv run python -m bench.containers [image] [push] [run]

On Debian 12, as root. `image` needs 9 GB of disk, uv's cache and minutes; `push` skopeo and docker-registry; `run`
Podman and runc.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.kernels import machine as this_machine
from core import files, source, workspace
from core.stack import Platform
from deploy import image as images
from lock import application, image_base
from tests.host.fleet import link_environment
from tests.host.machine import free_port
from tests.unit.test_bundle import SIX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deploy.image import Image

PLATFORM = "linux_x86_64"
ROUNDS = 5


def timed(place: Path) -> tuple[float, Image]:
    """Write the image of the profile `cpu`."""
    started = time.monotonic()
    found = images.write(images.find_target("", "cpu"), PLATFORM, place)
    return time.monotonic() - started, found


def edited(place: Path) -> None:
    """Make the next image one of another revision of ComfyUI with the same requirements."""
    app = application.application()
    tree = source.fetch(app)
    if not (place / "app.toml").exists():
        shutil.copytree(app.path, place, ignore=shutil.ignore_patterns("versions"))
        shutil.copytree(tree, place / "src")
        text = (place / "app.toml").read_text().partition("[[source]]")[0].replace(app.tree, "")
        (place / "app.toml").write_text(text + '[[source]]\nfolder = "src"\n')
    (place / "src/nodes.py").write_text((place / "src/nodes.py").read_text() + "\n# edited\n")
    os.environ["HEARTH_APP"] = str(place)


# --- image -----------------------------------------------------------------------------------------------------------


def image(place: Path) -> str:
    """Seconds and bytes to write an image, again, and after an update."""
    first, one = timed(place / "image")
    again, same = timed(place / "image")
    edited(place / "app")
    update, other = timed(place / "image")
    assert same.digest == one.digest
    fresh = sum(size for layer, size in other.layers.items() if size and layer in ("app", "release"))
    rows = [("the first image", first, sum(one.layers.values())), ("unchanged", again, 0), ("update", update, fresh)]
    return IMAGE.format(
        rows="\n".join(f"| {what} | {seconds:.1f} | {size / 1e6:,.1f} |" for what, seconds, size in rows),
        layers="\n".join(f"| {layer} | {size / 1e6:,.1f} |" for layer, size in one.layers.items()),
    )


IMAGE = """\
The image of the profile `cpu` for linux_x86_64, with uv's packages in its cache. The target for an unchanged image was
2 s. "update" is another revision of ComfyUI with the same requirements.

| | Seconds | MB written |
| --- | ---: | ---: |
{rows}

| Layer | MB |
| --- | ---: |
{layers}
"""


# --- push ------------------------------------------------------------------------------------------------------------


@contextmanager
def registry(place: Path) -> Iterator[str]:
    """Debian's registry with its storage in a folder; its address."""
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "version": "0.1",
        "storage": {"filesystem": {"rootdirectory": str(place)}},
        "http": {"addr": address, "secret": "x"},
        "log": {"level": "error", "accesslog": {"disabled": True}},
    }
    (place / "settings.yml").write_text(json.dumps(settings))  # JSON is YAML
    process = subprocess.Popen(["docker-registry", "serve", str(place / "settings.yml")], stderr=subprocess.DEVNULL)
    try:
        until(lambda: answers(f"http://{address}/v2/"), process)
        yield address
    finally:
        process.terminate()
        process.wait()


def push(place: Path) -> str:
    """Seconds and bytes to push an image, again, and after an update.

    Its environment has one small package: the layers of all others are the same in both images, and are not sent.
    """
    edited(place / "app")
    (place / "app/src/requirements.txt").write_text("six\n")
    recipe = (place / "app/app.toml").read_text()
    (place / "app/app.toml").write_text(re.sub(r"^extra = .*", "extra = []", recipe, flags=re.MULTILINE))
    for path in (place / "app/locks").glob("*.txt"):
        path.write_text(SIX)
    rows = []
    (place / "registry").mkdir()
    with registry(place / "registry") as address:
        for what, change in (("the first image", False), ("unchanged", False), ("update", True)):
            if change:
                edited(place / "app")
            _, found = timed(place / "image")
            before, started = stored(place / "registry"), time.monotonic()
            images.push(found, f"{address}/bench/comfyui")
            rows.append((what, time.monotonic() - started, stored(place / "registry") - before))
        changed = sum(found.layers[layer] for layer in ("app", "release"))
    return PUSH.format(
        rows="\n".join(f"| {what} | {seconds:.1f} | {size / 1e6:,.1f} |" for what, seconds, size in rows),
        changed=f"{changed / 1e6:,.1f}",
    )


def stored(place: Path) -> int:
    """The bytes that a registry stores."""
    return sum(path.stat().st_size for path in place.rglob("data"))


PUSH = """\
`inv image --push` to Debian's `docker-registry` on the loopback address, with skopeo: the bytes that the registry
stores. It keeps layers as they are sent. The image is the real ComfyUI with one small package instead of its
environment: an update does not change the layers of packages, so they are not sent. The layers `app` and `release` have
{changed} MB.

| | Seconds | MB pushed |
| --- | ---: | ---: |
{rows}
"""


# --- run -------------------------------------------------------------------------------------------------------------

WORKFLOW = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 2048, "height": 2048, "batch_size": 2, "color": 0}},
    "2": {"class_type": "ImageBlur", "inputs": {"image": ["1", 0], "blur_radius": 15, "sigma": 5.0}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "bench"}},
}

ENGINE = """\
[engine]
runtime = "runc"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
"""
"""Where the machine may not raise limits, Podman's own defaults fail; crun refuses a hybrid cgroup layout."""


def run(place: Path) -> str:
    """Seconds until ComfyUI answers, and for a workflow, outside and inside a container, in turn."""
    prefix, port = place / "comfyui", free_port()
    hosts = f'[hosts.local]\nprofile = "cpu"\nscope = "user"\nprefix = "{prefix}"\nport = {port}\n'
    (place / "hosts.toml").write_text(hosts)
    env = {**os.environ, "HEARTH_HOSTS": str(place / "hosts.toml"), "PATH": f"/usr/bin:{os.environ['PATH']}"}
    link_environment(prefix)  # no gigabytes of its own
    for words in (["deploy"], ["stop"]):
        subprocess.run([sys.executable, "-m", "invoke", *words, "--yes"], env=env, check=True)
    release = json.loads((prefix / "current/release.json").read_text())
    native = {"env": {"PATH": "/usr/bin:/bin", **release["environment"]}}
    contained = {"env": engine(place)}
    found: dict[str, list[tuple[float, float]]] = {"native": [], "container": []}
    kinds = [("native", release["argv"], native), ("container", container(prefix, release), contained)]
    for number in range(ROUNDS + 1):
        for kind, argv, how in reversed(kinds) if number % 2 else kinds:
            times = measured(argv, how, port, number)
            if number:  # the first one of each reads files that the others find in memory
                found[kind].append(times)
    medians = {kind: [statistics.median(each) for each in zip(*times, strict=True)] for kind, times in found.items()}
    rows = [
        (what, medians["native"][index], medians["container"][index])
        for index, what in enumerate(("start until it answers", "a workflow without models"))
    ]
    return RUN.format(
        rounds=ROUNDS,
        rows="\n".join(f"| {what} | {one:.2f} | {two:.2f} | {two / one:.2f} |" for what, one, two in rows),
    )


def engine(place: Path) -> dict[str, str]:
    """The environment of a Podman with its own storage."""
    (place / "engine.conf").write_text(ENGINE)
    storage = f'[storage]\ndriver = "overlay"\ngraphroot = "{place}/graph"\nrunroot = "{place}/run"\n'
    (place / "storage.conf").write_text(storage)
    settings = {"CONTAINERS_CONF": f"{place}/engine.conf", "CONTAINERS_STORAGE_CONF": f"{place}/storage.conf"}
    return {"PATH": os.environ["PATH"], "HOME": str(place), **settings}


def container(prefix: Path, release: dict[str, Any]) -> list[str]:
    """Run the same release on the base of images, with the limits of run.sh."""
    base = image_base.tree(Platform.parse(PLATFORM), "base")
    words = ["podman", "run", "--rm", "--network", "host", "--user", f"{os.getuid()}:{os.getgid()}"]
    words += ["--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    words += ["--memory", "8g", "--pids-limit", "4096", "--shm-size", "1g", "--tmpfs", "/tmp:mode=1777"]
    words += ["--stop-signal", "SIGINT", "--volume", f"{prefix}:{prefix}:ro"]
    words += ["--volume", f"{prefix}/data:{prefix}/data"]
    words += [word for name, value in release["environment"].items() for word in ("--env", f"{name}={value}")]
    return [*words, "--rootfs", f"{base}:O", *release["argv"]]


def measured(argv: list[str], how: dict[str, Any], port: int, number: int) -> tuple[float, float]:
    """Seconds until ComfyUI answers, and for the workflow; then end it."""
    started = time.monotonic()
    output = subprocess.DEVNULL
    # Whoever starts this in the background makes it deaf to SIGINT, which ends ComfyUI.
    process = subprocess.Popen(
        argv,
        **how,
        stdin=output,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/system_stats"), process)
        up = time.monotonic() - started
        return up, worked(port, number)
    finally:
        process.send_signal(signal.SIGINT)  # Podman passes it on
        process.wait(60)


def worked(port: int, number: int) -> float:
    """Seconds for the workflow, with another colour each time: ComfyUI caches results."""
    workflow = json.loads(json.dumps(WORKFLOW))
    workflow["1"]["inputs"]["color"] = number
    body = json.dumps({"prompt": workflow}).encode()
    address = f"http://127.0.0.1:{port}"
    request = urllib.request.Request(f"{address}/prompt", body, {"Content-Type": "application/json"})
    started = time.monotonic()
    with urllib.request.urlopen(request, timeout=60) as answer:
        job = json.load(answer)["prompt_id"]
    while True:
        with urllib.request.urlopen(f"{address}/history/{job}", timeout=60) as answer:
            if done := json.load(answer):
                assert done[job]["status"]["status_str"] == "success", done
                return time.monotonic() - started
        time.sleep(0.02)


def answers(address: str) -> bool:
    """Whether a server answers."""
    try:
        with urllib.request.urlopen(address, timeout=10):
            return True
    except OSError:
        return False


def until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until it is true, or the process has ended."""
    end = time.monotonic() + 300
    while not true():
        assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
        assert time.monotonic() < end, f"{process.args!r} does not answer"
        time.sleep(0.02)


RUN = """\
The real ComfyUI on a CPU: one release, started natively and in a container of Podman 4.3 and runc with the limits of
`run.sh`, on the base of images. Medians of {rounds} starts each, in turn. The workflow blurs and saves two pictures of
2048 x 2048. The target was 1.1 times.

| | Native, s | Container, s | Ratio |
| --- | ---: | ---: | ---: |
{rows}
"""

SECTIONS = {"image": ("Write an image", image), "push": ("Push an image", push), "run": ("Run a container", run)}


def main() -> None:
    """Measure what the arguments name (default: everything), and replace these sections of the page."""
    page = files.CHECKOUT / "docs/benchmarks-containers.md"
    for name in sys.argv[1:] or SECTIONS:
        title, measure = SECTIONS[name]
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="hearth-bench-", dir=workspace.current().cache) as place:
            table = measure(Path(place))
        command = f"uv run python -m bench.containers {name}"
        head = f"Measured by `{command}` on {datetime.now(UTC).date()}, on {this_machine()},"
        text = f"## {title}\n\n{head}\nwith a load of {load:.0f} at its start. {table}\n"
        sys.stdout.write(text)
        others = page.read_text().partition("\n## ")[2].split("\n## ")
        kept = {each.partition("\n")[0]: f"## {each.strip()}\n\n" for each in others if each}
        kept[title] = text
        whole = "".join(kept[each] for each, _ in SECTIONS.values() if each in kept)
        page.write_text(f"# Benchmarks of container images\n\n{whole.strip()}\n")


if __name__ == "__main__":
    main()
