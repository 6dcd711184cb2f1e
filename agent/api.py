"""Client for ComfyUI's HTTP API on the local machine. The server may be slow, hostile or another program."""

from __future__ import annotations

import errno
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from agent.files import AgentError, Json
from agent.layout import Layout

if TYPE_CHECKING:
    from http.client import HTTPConnection

T = TypeVar("T")

LIMIT = 16_000_000
"""Maximum response size in bytes: queues and histories contain whole workflows of some 100 kB each."""

SMALL = 1_000_000
"""Maximum size in bytes of a response without workflows."""

DENSE = 8
"""Minimum average bytes per JSON value. A parsed value takes about 100 bytes; workflows average 10 bytes per value."""

MOST = 100
"""Maximum number of jobs read from a queue."""


class TooLongError(ValueError):
    """The response exceeds the size limit."""


@dataclass(frozen=True)
class Endpoint:
    """A ComfyUI's listening addresses as seen from the local machine, its port, and whether it uses TLS."""

    addresses: tuple[str, ...]
    port: int
    tls: bool = False

    @classmethod
    def of(cls, argv: Sequence[str]) -> Endpoint:
        """Derive the endpoint from ComfyUI's command line (comfy/cli_args.py: --listen, --port, --tls-*)."""
        values = {"--listen": "127.0.0.1", "--port": "8188", "--tls-keyfile": "", "--tls-certfile": ""}
        words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
        for flag, value in zip(words, [*words[1:], ""]):  # noqa: B905  3.10 and the same length
            if flag in values:
                values[flag] = "" if value.startswith("--") else value
        any_address = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}
        listed = (values["--listen"] or "0.0.0.0,::").split(",")  # the default of --listen without a value
        addresses = dict.fromkeys(any_address.get(each.strip(), each.strip()) for each in listed)
        return cls(tuple(addresses), int(values["--port"]), bool(values["--tls-keyfile"] and values["--tls-certfile"]))


def endpoint(layout: Layout) -> Endpoint:
    """Return the endpoint from the current release's manifest, or the configured one if nothing is deployed."""
    with suppress(AgentError):  # `current` is not Hearth's; facts report it
        if argv := layout.manifest(layout.release()).argv:
            return Endpoint.of(argv)
    return Endpoint.of(["--listen", layout.address, "--port", str(layout.port)])


NOBODY = (errno.ECONNREFUSED, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors that mean nothing listens at an address: connection refused, or no such address on this machine."""


def ask(place: Endpoint, path: str, body: Json | None = None, seconds: float = 5, limit: int = LIMIT) -> Any:
    """Send a request; return the raw bytes for `/view`, else the parsed JSON (None: empty response).

    `seconds` limits the whole exchange, including connecting; `limit` is in bytes. Follows no redirects. Raises
    ConnectionRefusedError if no address accepts connections, another OSError if no response arrives in time, and
    ValueError if the response is not ComfyUI's.
    """
    from http.client import HTTPException  # half of this module's import time; most verbs send no request

    end = time.monotonic() + seconds
    unknown: OSError | None = None
    for address in place.addresses:
        try:
            raw = _exchange(place, address, path, body, max(0.1, end - time.monotonic()), limit)
        except OSError as error:
            unknown = unknown or (None if error.errno in NOBODY else error)
            continue
        except HTTPException as error:  # another protocol at this port
            raise ValueError(f"not an HTTP answer: {printable(repr(error))}") from error
        if path.startswith("/view"):
            return raw
        if sum(map(raw.count, (b",", b"[", b"{"))) > limit // DENSE:
            raise TooLongError(f"the answer to {path} has too many values")
        try:
            return parsed(raw) if raw else None
        except RecursionError as error:
            raise ValueError(f"the answer to {path} is nested too deeply") from error
    raise unknown or ConnectionRefusedError(f"no process listens at {' or '.join(place.addresses)}, port {place.port}")


def _connection(place: Endpoint, address: str, seconds: float) -> HTTPConnection:
    from http.client import HTTPConnection, HTTPSConnection

    if not place.tls:
        return HTTPConnection(address, place.port, timeout=seconds)
    import ssl

    # ComfyUI's certificate is for the public host name, not for the loopback address.
    unverified = ssl._create_unverified_context()  # noqa: S323
    return HTTPSConnection(address, place.port, timeout=seconds, context=unverified)


def _exchange(place: Endpoint, address: str, path: str, body: Json | None, seconds: float, limit: int) -> bytes:
    connection, late = _connection(place, address, seconds), threading.Event()
    sockets: list[socket.socket | None] = []

    def close_sockets() -> None:
        late.set()
        for each in filter(None, (connection.sock, *sockets)):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    # A socket timeout restarts with every byte; this timer also limits a response that trickles in.
    timer = threading.Timer(seconds, close_sockets)
    timer.daemon = True
    method, text = ("GET", None) if body is None else ("POST", json.dumps(body))
    with closing(connection):
        timer.start()
        try:
            connection.connect()
            sockets.append(connection.sock)  # HTTPConnection drops it after the headers of a final response
            connection.request(method, path, text, {"Content-Type": "application/json"})
            with connection.getresponse() as answer:
                raw = answer.read(limit + 1)
        except Exception as error:
            if late.is_set():
                raise TimeoutError(f"no answer to {path} within {seconds:g} s") from error
            raise
        finally:
            timer.cancel()
    if late.is_set():
        raise TimeoutError(f"no answer to {path} within {seconds:g} s")
    if len(raw) > limit:
        raise TooLongError(f"the answer to {path} is longer than {limit} bytes")
    if answer.status != 200:
        said = printable(raw[:500].decode(errors="replace"), 500)
        raise ValueError(f"{path} returned status {answer.status}: {said}")
    return raw


def parsed(raw: bytes) -> Any:
    """Parse strict JSON, without NaN and infinities. Raises ValueError and RecursionError."""

    def number(text: str) -> float:
        if not math.isfinite(found := float(text)):
            raise ValueError(f"{text} is not a number")
        return found

    return json.loads(raw, parse_float=number, parse_constant=number)


# --- checked responses ---------------------------------------------------------------------------------------------


def checked(name: str, answer: Any, read: Callable[[Any], T]) -> T:
    """Apply `read` to a response. Raises ValueError if the response has an unexpected shape."""
    try:
        return read(answer)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"the answer to {name} is not in ComfyUI's format: {printable(repr(error))}") from error


def printable(value: object, limit: int = 200) -> str:
    """Convert an untrusted value to one line of printable text of at most `limit` characters."""
    if isinstance(value, (list, dict)):  # of any depth and size
        value = f"({len(value)} values)"
    text = value[: limit + 1] if isinstance(value, str) else repr(value)[: limit + 1] if value is not None else ""
    text = "".join(each if each.isprintable() else " " for each in text)
    return f"{text[:limit]}…" if len(text) > limit else text


def seconds_of(milliseconds: object) -> float | None:
    """Convert a ComfyUI timestamp to seconds since 1970; None if it is not a valid time."""
    if isinstance(milliseconds, (int, float)) and 0 <= milliseconds < 1e14:
        return milliseconds / 1000
    return None


def system_stats(place: Endpoint, seconds: float = 5) -> Json:
    """Return `version`, `torch`, `argv` and `devices` (name, type) from `/system_stats`. Raises like `ask`."""

    def read(answer: Any) -> Json:
        system = answer["system"]
        return {
            "version": printable(system.get("comfyui_version", "")),
            "torch": printable(system.get("pytorch_version", "")),
            "argv": [printable(word, 10_000) for word in system.get("argv", [])[:1000]],
            "devices": [
                {"name": printable(each["name"]), "type": printable(each["type"])} for each in answer["devices"][:100]
            ],
        }

    return checked("/system_stats", ask(place, "/system_stats", seconds=seconds, limit=SMALL), read)


class Jobs(list[Json]):
    """The first MOST jobs of a queue (see `job`) in queue order; `total` counts all jobs."""

    def __init__(self, listed: list[Any], more: int = 0) -> None:
        # Custom nodes also queue jobs and may use priorities that are not numbers.
        listed = sorted(listed, key=lambda entry: entry[0] if isinstance(entry[0], (int, float)) else float("inf"))
        super().__init__(job(entry) for entry in listed[:MOST])
        self.total = len(listed) + more


def queue(place: Endpoint, seconds: float = 5) -> tuple[Jobs, Jobs]:
    """Return the running and pending jobs; only the total if the queue exceeds the size limit. Raises like `ask`."""
    try:
        answer = ask(place, "/queue", seconds=seconds)
    except TooLongError:
        answer = ask(place, "/prompt", seconds=seconds, limit=SMALL)
        return Jobs([]), checked(
            "/prompt", answer, lambda answer: Jobs([], int(answer["exec_info"]["queue_remaining"]))
        )
    return checked(
        "/queue", answer, lambda answer: (Jobs(list(answer["queue_running"])), Jobs(list(answer["queue_pending"])))
    )


def job(entry: Sequence[Any]) -> Json:
    """Decode a queue entry (execution.py, PromptQueue): number, id, workflow, extra data.

    `queued` is in seconds since 1970; None if not reported.
    """
    workflow, extra = (each if isinstance(each, dict) else {} for each in [*entry[2:4], None, None][:2])
    return {"id": printable(entry[1]), "nodes": len(workflow), "queued": seconds_of(extra.get("create_time"))}


def accepts_connections(place: Endpoint) -> bool:
    """Return whether any address of the endpoint accepts connections."""
    for address in place.addresses:
        with suppress(OSError), socket.create_connection((address, place.port), timeout=1):
            return True
    return False


def unanswered(place: Endpoint, error: Exception) -> AgentError:
    """Return the AgentError for a failed request: ComfyUI does not respond, or another program holds its port."""
    if isinstance(error, ValueError):
        what = f"the program at port {place.port} does not answer as ComfyUI does"
        return AgentError("silent", what, str(error), "inv status shows which process uses the port")
    if accepts_connections(place):
        hint = "read its log: inv logs; to end it: inv restart --force"
        return AgentError("silent", "ComfyUI accepts connections but does not answer", str(error), hint)
    what = f"ComfyUI is not running: no process listens on port {place.port}"
    return AgentError("silent", what, str(error), "inv start; inv logs")


def unload(place: Endpoint) -> None:
    """Ask ComfyUI to unload its models and clear cached results when no job is running. Raises like `ask`.

    `free_memory` implies `unload_models` (main.py, prompt_worker). Given both, ComfyUI wakes its worker by the first:
    on a busy machine it misses the second, and keeps cached results until the next job.
    """
    ask(place, "/free", {"free_memory": True})
