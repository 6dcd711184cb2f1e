"""A real HAProxy on 127.0.0.1 with stand-ins for ComfyUI behind it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import processes
from deploy.gateways import Gateway, Person
from deploy.host import Host, Hosts
from gateway.haproxy import Places, configuration

PASSWORD = "correct horse"


@dataclass(frozen=True)
class Request:
    """A request as a ComfyUI got it."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class StandIn:
    """What a gateway sees of ComfyUI: HTTP/1.1, prompts with ids, and websockets that echo."""

    port: int
    delay: float = 0
    requests: list[Request] = field(default_factory=list)
    sockets: int = 0

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.StreamWriter, asyncio.Task[Any]] = {}
        self.start()

    def start(self) -> None:
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def stop(self) -> None:
        """End as a process does: nothing listens, and every connection breaks."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def received(self, path: str) -> list[Request]:
        return [each for each in self.requests if each.target.partition("?")[0] == path]

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024)

    async def _stop(self) -> None:
        if self._server:
            for each in self._server.sockets:
                self._loop.remove_reader(each.fileno())
            await asyncio.sleep(0.01)  # asyncio leaks a connection that is accepted as its server closes
            self._server.close()
        served = list(self._open.items())
        for writer, _ in served:
            writer.transport.abort()
        await asyncio.gather(*(task for _, task in served), return_exceptions=True)
        await asyncio.sleep(0.05)  # the aborted transports close

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[writer] = task
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while await self._one(reader, writer):
                pass
        await closed(writer)
        del self._open[writer]

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether the connection stays."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ", 2)
        lines = (line.partition(": ") for line in head[1:] if line)
        headers = {name.lower(): value for name, _, value in lines}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if target != "/system_stats":
            self.requests.append(Request(method, target, headers, body))
            await asyncio.sleep(self.delay)
        if headers.get("upgrade", "").lower() == "websocket":
            await self._websocket(headers, reader, writer)
            return False
        content = json.dumps(self._answer(method, target, body)).encode()
        reply = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(reply.encode() + (b"" if method == "HEAD" else content))
        await writer.drain()
        return headers.get("connection", "").lower() != "close"

    def _answer(self, method: str, target: str, body: bytes) -> Any:
        if method == "POST" and target in ("/prompt", "/api/prompt"):
            return {"prompt_id": json.loads(body).get("prompt_id", str(uuid.uuid4())), "number": 1, "node_errors": {}}
        return {"port": self.port}

    async def _websocket(
        self, headers: Mapping[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        accept = hashlib.sha1(headers["sec-websocket-key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        self.sockets += 1
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + base64.b64encode(accept) + b"\r\n\r\n"
        )
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()


@dataclass(frozen=True)
class Response:
    """A response of the gateway."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def closed(writer: asyncio.StreamWriter) -> None:
    """Close a connection; the other side may have broken it."""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def hashed(password: str) -> str:
    words = ["openssl", "passwd", "-6", "-salt", "saltsalt", password]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def check(folder: Path, text: str, **env: str) -> None:
    """HAProxy must accept a configuration without a warning; the folder gets what the configuration refers to."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    subprocess.run([*words, "-subj", "/CN=x", "-keyout", key, "-out", certificate], check=True, capture_output=True)
    certificate.write_text(certificate.read_text() + key.read_text())
    (folder / "tokens.map").touch()
    (folder / "users.cfg").write_text("userlist people\n")
    (folder / "haproxy.cfg").write_text(text)
    words = ["haproxy", "-c", "-V", "-dW", "-f", str(folder / "haproxy.cfg"), "-f", str(folder / "users.cfg")]
    env = {"PATH": f"{os.environ['PATH']}:/usr/sbin", **env}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


def basic(user: str, password: str = PASSWORD) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


PEOPLE = {
    "anna": Person(role="administrator"),
    "ben": Person(),
    "cleo": Person(),
}


class Running:
    """A gateway in service. `edit` replaces text in the configuration, such as a time-out of minutes."""

    def __init__(
        self,
        folder: Path,
        ports: Mapping[str, int],
        edit: Mapping[str, str],
        users: Mapping[str, Person] = PEOPLE,
        **values: Any,
    ) -> None:
        self.folder, self.port = folder, free_port()
        hosts = {name: Host(address=name, port=port) for name, port in ports.items()}
        hosts |= {name: Host(address=name, port=port, listen="192.0.2.1") for name, port in list(ports.items())[1:]}
        self.gateway = Gateway(
            host=next(iter(ports)),
            behind=tuple(ports),
            listen="127.0.0.1",
            port=self.port,
            names=("spark.local", "127.0.0.1"),
            users=dict(users),
            **{"hold": "20s", **values},
        )
        self.assigned = folder / "gateway/secrets/hosts.map"
        self.places = Places(str(folder), str(folder), f"{folder}/certificate.pem", str(self.assigned))
        # A gateway reaches other hosts at their own addresses; here, they are on this machine, too.
        text = configuration("home", self.gateway, Hosts(hosts=hosts), self.places).replace("192.0.2.1:", "127.0.0.1:")
        for old, new in edit.items():
            assert old in text
            text = text.replace(old, new)
        (folder / "haproxy.cfg").write_text(text)
        self.assigned.parent.mkdir(parents=True)
        self.assigned.touch()
        self.write_people(dict.fromkeys(users, PASSWORD))
        self._certify()
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            ["haproxy", "-W", "-f", folder / "haproxy.cfg", "-f", folder / "users.cfg"],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={"PATH": f"{os.environ['PATH']}:/usr/sbin"},
        )
        self._await()

    def write_people(self, passwords: Mapping[str, str], tokens: Mapping[str, str] | None = None) -> None:
        hashes = {each: hashed(each) for each in set(passwords.values())}
        lines = [f"    user {name} password {hashes[password]}" for name, password in passwords.items()]
        (self.folder / "users.cfg").write_text("\n".join(["userlist people", *lines]) + "\n")
        digests = {hashlib.sha256(token.encode()).hexdigest(): name for token, name in (tokens or TOKENS).items()}
        (self.folder / "tokens.map").write_text("".join(f"{digest} {name}\n" for digest, name in digests.items()))

    def _certify(self) -> None:
        key, certificate = self.folder / "key.pem", self.folder / "ca.pem"
        words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        words += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=test"]
        words += ["-addext", "subjectAltName=DNS:spark.local,IP:127.0.0.1"]
        subprocess.run(words, check=True, capture_output=True)
        (self.folder / "certificate.pem").write_text(certificate.read_text() + key.read_text())
        self.tls = ssl.create_default_context(cafile=str(certificate))

    def _await(self) -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                if self._loaded():  # the worker listens before its master is ready
                    return
            assert self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text())

    def _loaded(self) -> int:
        """How often a configuration was loaded."""
        return (self.folder / "log").read_text().count("Loading success")

    def reload(self) -> None:
        """Reload the configuration. A master that executes itself again may lose a signal, so it gets several."""
        before, end = self._loaded(), time.monotonic() + 20
        while self._loaded() == before:
            assert time.monotonic() < end
            self.process.send_signal(signal.SIGUSR2)
            processes.wait_for(lambda: self._loaded() > before, 2)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.log.close()

    def ask(
        self,
        method: str,
        path: str,
        user: str = "",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        seconds: float = 30,
        source: str = "127.0.0.1",
    ) -> Response:
        """Send a request from an address of this machine."""
        given = {"Host": f"spark.local:{self.port}", **(basic(user) if user else {}), **(headers or {})}
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=seconds, context=self.tls, source_address=(source, 0)
        )
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=given)
            response = connection.getresponse()
            content = response.read()
            return Response(response.status, {k.lower(): v for k, v in response.getheaders()}, content)

    def memory(self) -> int:
        """Resident bytes of all its processes."""
        (listed,) = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        pids = [self.process.pid, *map(int, listed.read_text().split())]
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return sum(pages) * os.sysconf("SC_PAGESIZE")

    def raw(self, sent: bytes, seconds: float = 30, *, first: bool = False) -> bytes:
        """What the gateway answers to these bytes: the first block, or all until it closes the connection."""
        with (
            socket.create_connection(("127.0.0.1", self.port), seconds) as plain,
            self.tls.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            connection.sendall(sent)
            found = b""
            while block := connection.recv(65536):
                found += block
                if first:
                    break
            return found

    async def websocket(self, user: str, path: str = "/ws") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """An open websocket."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls)
        host = f"spark.local:{self.port}"
        headers = {"Host": host, "Origin": f"https://{host}", "Upgrade": "websocket", "Connection": "Upgrade"}
        headers |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13", **basic(user)}
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 101"), answer
        return reader, writer

    def audit(self) -> list[dict[str, Any]]:
        """The audit log, as soon as it has the last request."""
        lines = (self.folder / "log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


TOKENS = {"a-token-of-ben-with-much-entropy": "ben"}


@contextlib.contextmanager
def running(folder: Path, *, hosts: int = 1, edit: Mapping[str, str] | None = None, **values: Any) -> Iterator[Any]:
    """A gateway and its stand-ins: `(gateway, [stand-in, ...])`."""
    behind = [StandIn(free_port()) for _ in range(hosts)]
    found = None
    try:
        found = Running(folder, {f"h{i}": each.port for i, each in enumerate(behind)}, edit or {}, **values)
        yield found, behind
    finally:
        if found:
            found.stop()
        for each in behind:
            each.close()
