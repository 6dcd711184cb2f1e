"""`inv open`: ComfyUI of a host, through a real sshd."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from core.files import CHECKOUT
from tests.errors import kind_of
from tests.gateway import StandIn, free_port
from tests.host.lab import NEEDS, Lab, lab

pytestmark = [pytest.mark.host, pytest.mark.needs(*NEEDS)]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("lab")) as one:
        yield one


@pytest.fixture
def comfy() -> Iterator[StandIn]:
    one = StandIn(free_port())
    yield one
    one.close()


@contextmanager
def opened(box: Lab, comfy: StandIn, *more: str) -> Iterator[subprocess.Popen[str]]:
    text = f'[hosts.box]\naddress = "lab"\nprofile = "cpu"\nport = {comfy.port}\n'  # scope system: needs no sudo
    (box.place / "hosts.toml").write_text(text)
    without = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    with subprocess.Popen(
        [sys.executable, "-m", "invoke", "open", "--host", "box", *more],
        cwd=CHECKOUT, env={**without, **box.variables()}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Whoever starts the tests in the background makes them, and all they start, deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def test_a_tunnel_lasts_until_ctrl_c(box: Lab, comfy: StandIn) -> None:
    with opened(box, comfy) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()  # ComfyUI's own port is taken: by ComfyUI, on this machine
        assert address.startswith("http://127.0.0.1:")
        assert not address.endswith(f":{comfy.port}")
        with urllib.request.urlopen(f"{address}/queue", timeout=10) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert (process.returncode, kind_of(said)) == (0, "")
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{address}/queue", timeout=10)
    end = time.monotonic() + 20
    while box.processes("sleep 10"):  # nothing of it stays on the host
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_port_in_use_and_a_lost_host_are_errors(box: Lab, comfy: StandIn) -> None:
    with opened(box, comfy, "--port", str(comfy.port)) as process:
        _, said = process.communicate(timeout=20)
    assert (process.returncode, kind_of(said)) == (15, "usage")
    with opened(box, comfy) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        for pid in box.processes("sshd"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, kind_of(said)) == (60, "unreachable")
