"""Servers that answer as ComfyUI does, or as another program."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from agent.api import Endpoint
from agent.files import link, write
from agent.layout import Layout
from agent.schema.facts import Service

IDLE: dict[str, Any] = {"queue_running": [], "queue_pending": []}
BUSY = {"queue_running": [[1, "a-job", {"1": {}}, {"create_time": 5000}, []]], "queue_pending": []}
STATS = {
    "system": {"comfyui_version": "0.30.0", "pytorch_version": "2.11.0+cu130", "argv": ["main.py"]},
    "devices": [{"name": "cpu", "type": "cpu"}],
}
RUNNING = Service(active=True, state="active", enabled=True, linked=True, restarts=0, since="", pid=1)


@contextmanager
def serving(
    answers: dict[str, Any], address: str = "127.0.0.1", delay: float = 0, late: float = 0, tls: Path | None = None
) -> Iterator[int]:
    """Start a server that answers paths with JSON, raw bytes, or (for a string) a redirect; returns its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(delay)
            answer = answers.get(self.path.partition("?")[0])
            self.send_response(302 if isinstance(answer, str) else 404 if answer is None else 200)
            if isinstance(answer, str):
                self.send_header("Location", answer)
            self.end_headers()
            self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

        def do_POST(self) -> None:
            time.sleep(late)
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

    server = Server((address, 0), Handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def listening(talk: Callable[[socket.socket], None] = lambda _: None) -> Iterator[int]:
    """Start a program that accepts connections and calls `talk` with each; returns its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                held.append(connection)
                threading.Thread(target=attempt, args=(connection,), daemon=True).start()

        def attempt(connection: socket.socket) -> None:
            try:
                talk(connection)
            except OSError:
                return

        held: list[socket.socket] = []
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in held:
            connection.close()


def at(port: int, *addresses: str) -> Endpoint:
    return Endpoint(addresses or ("127.0.0.1",), port)


def layout(place: Path, port: int, argv: list[str] | None = None) -> Layout:
    """A host whose configuration has `port`, and whose active release has this command line."""
    found = Layout({"prefix": str(place), "service": "s", "scope": "user", "user": "", "address": "", "port": port})
    if argv is not None:
        write(found.releases / "old/release.json", json.dumps({"id": "old", "argv": argv}))
        link(found.current, "releases/old")
    return found
