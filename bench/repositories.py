"""Git repositories on this machine behind a slow link: git daemon, a relay (`bench/link.py`), and a program for ssh."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from core import files
from tests.host.machine import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

RATE = 100e6 / 8
"""Bytes per second of the link."""

BRIDGE = r"""#!{python} -IS
# In place of ssh, to git daemon behind the link. Arguments: options, host, "git-upload-pack '/name'".
import os, socket, sys
request = sys.argv[-1].replace("'", "") + "\0\0version=2\0"
there = socket.create_connection(("127.0.0.1", {port}))
there.sendall(f"{{len(request) + 4:04x}}{{request}}".encode())
if os.fork():
    while block := there.recv(1 << 16):
        os.write(1, block)
else:
    while block := os.read(0, 1 << 16):
        there.sendall(block)
    there.shutdown(socket.SHUT_WR)
"""


@contextmanager
def served(place: Path, addresses: Mapping[str, str], delay: float) -> Iterator[dict[str, str]]:
    """Serve the repositories below `place`, by name, `delay` seconds away in each direction.

    Yields the environment in which git finds them at their addresses.
    """
    daemon, link = free_port(), free_port()
    bridge = place / f"ssh-{link}"
    bridge.write_text(BRIDGE.format(python=sys.executable, port=link))
    bridge.chmod(0o755)
    allowed = {"uploadpack.allowAnySHA1InWant": "true", "uploadpack.allowFilter": "true", "safe.directory": "*"}
    server = ["git", "daemon", "--reuseaddr", "--listen=127.0.0.1", f"--port={daemon}", "--export-all"]
    server += [f"--base-path={place}", "--max-connections=64"]
    relay = [sys.executable, "-m", "bench.link", str(link), str(daemon), str(delay), str(RATE)]
    processes = [
        subprocess.Popen(server, env={**os.environ, **_git(allowed)}),
        subprocess.Popen(relay, cwd=files.CHECKOUT),
    ]
    time.sleep(1)
    instead = {f"url.ssh://bench/{name}.insteadOf": url for name, url in addresses.items()}
    settings = _git({**instead, "ssh.variant": "ssh"})
    try:
        yield {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_SSH_COMMAND": str(bridge), **settings}
    finally:
        for each in processes:
            each.terminate()
            each.wait()


def _git(settings: Mapping[str, str]) -> dict[str, str]:
    """Git settings as environment variables."""
    found = {"GIT_CONFIG_COUNT": str(len(settings))}
    for number, (key, value) in enumerate(settings.items()):
        found |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return found
