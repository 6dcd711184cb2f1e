"""Serves the wheelhouse on loopback, for installers on this machine, or on another one through an SSH tunnel."""

from __future__ import annotations

import socket
from contextlib import suppress
from functools import partial
from getpass import getuser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from core import console
from core.errors import UsageError

if TYPE_CHECKING:
    from core.wheelhouse import Wheelhouse


def serve(house: Wheelhouse, port: str) -> None:
    """Serve until Ctrl-C; raises UsageError for a port that cannot be used."""
    handler = partial(_Handler, directory=str(house.folder))
    try:
        server = ThreadingHTTPServer(("127.0.0.1", int(port)), handler)
    except (ValueError, OverflowError, OSError) as error:
        hint = "choose another one with --port; 0 takes any free port"
        raise UsageError("usage", f"port {port} cannot be used", cause=str(error), hint=hint) from error
    with server, suppress(KeyboardInterrupt):
        at = f"127.0.0.1:{server.server_port}"
        for command in dict.fromkeys(house.install_command(each, f"http://{at}") for each in house.wheels()):
            console.say(command)
        console.say(
            f"from another machine, first: ssh -N -L {at.rpartition(':')[2]}:{at} {getuser()}@{socket.gethostname()}"
        )
        console.say(f"serving {house.folder} at http://{at}/; Ctrl-C ends it")
        server.serve_forever()


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name in the base class
        console.say(console.line(format % args))
