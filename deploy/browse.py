"""ComfyUI in the browser, through an SSH tunnel."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from core import console, shell
from core.errors import UsageError
from core.flags import number
from deploy import connection
from deploy import host as hosts
from deploy.gateways import on_its_machine
from deploy.look import find_target, web_address
from deploy.release import TLS_FLAGS

if TYPE_CHECKING:
    from deploy.host import Target


def run(name: str, port: str) -> None:
    """Run `inv open` until Ctrl-C; raises UsageError or ConnectError."""
    target = find_target(name)
    known = hosts.hosts()
    for each in target.gateways:
        if on_its_machine(known.gateways[each], target.host, known):
            what = f"on {target.name}, only gateway {each} reaches ComfyUI"
            raise UsageError("usage", what, hint=f"its address: inv gateway status --gateway {each}")
    if not target.host.address:
        show(target, web_address(target))
        return
    local = _port(port, target.host.port)
    with connection.connect(target) as agent, suppress(KeyboardInterrupt):
        assert isinstance(agent, connection.Ssh)
        for count, _ in enumerate(agent.forward(local, there(target), target.host.port)):
            if not count:
                scheme = "https" if all(flag in target.flags for flag in TLS_FLAGS) else "http"
                show(target, f"{scheme}://127.0.0.1:{local}")
                console.say("the tunnel stays open until Ctrl-C")
    console.say("the tunnel is closed")


def show(target: Target, address: str) -> None:
    """Print ComfyUI's address, and open it in the browser if there is a display."""
    console.data(address)
    if not shell.browse(address):
        console.say(f"no display here: open the address above for ComfyUI on {target.name}")


def there(target: Target) -> str:
    """An address at which ComfyUI listens, as its own host reaches it."""
    listed = [ipaddress.ip_address(each) for each in target.host.listen.split(",")]
    first = next((each for each in listed if each.is_loopback or each.is_unspecified), listed[0])
    if first.is_unspecified:
        return "127.0.0.1" if first.version == 4 else "::1"
    return str(first)


def _port(asked: str, usual: int) -> int:
    """The local port: the one that was asked for, ComfyUI's own if it is free, or a free one. Raises UsageError."""
    if asked:
        return int(number("port", asked, 1, 65535, whole=True))
    for port in (usual, 0):
        with socket.socket() as held, suppress(OSError):
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", port))
            return int(held.getsockname()[1])
    raise UsageError("usage", "this machine has no free port", hint="give one: --port 8288")
