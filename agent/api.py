"""ComfyUI's HTTP API, asked from its own machine. Whatever listens there may be slow, hostile or no ComfyUI at all."""

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
from typing import Any, TypeVar

from agent.files import Fault, Json
from agent.layout import Layout

T = TypeVar("T")

LIMIT = 16_000_000
"""Bytes of an answer: queues and histories hold whole workflows, of some 100 kB each."""

SMALL = 1_000_000
"""Bytes of one that holds no workflow."""

DENSE = 8
"""Bytes that a value takes on average, at least: parsed it takes a hundred, and workflows have one in ten."""

MOST = 100
"""Jobs of a queue that are looked at."""


class TooLong(ValueError):
    """An answer that is larger than any of ComfyUI's should be."""


@dataclass(frozen=True)
class Endpoint:
    """Where a ComfyUI listens: its addresses as reached from its own machine, its port, and whether by TLS."""

    addresses: tuple[str, ...]
    port: int
    tls: bool = False

    @classmethod
    def of(cls, argv: Sequence[str]) -> Endpoint:
        """The endpoint that a ComfyUI with this command line has (comfy/cli_args.py: --listen, --port, --tls-*)."""
        values = {"--listen": "127.0.0.1", "--port": "8188", "--tls-keyfile": "", "--tls-certfile": ""}
        words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
        for flag, value in zip(words, [*words[1:], ""]):  # noqa: B905  3.10 and the same length
            if flag in values:
                values[flag] = "" if value.startswith("--") else value
        any_address = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}
        listed = (values["--listen"] or "0.0.0.0,::").split(",")  # what a --listen without a value stands for
        addresses = dict.fromkeys(any_address.get(each.strip(), each.strip()) for each in listed)
        return cls(tuple(addresses), int(values["--port"]), bool(values["--tls-keyfile"] and values["--tls-certfile"]))


def endpoint(layout: Layout) -> Endpoint:
    """Where the release in service listens, by its own manifest; where nothing is deployed, as configured."""
    with suppress(Fault):  # `current` is foreign: facts report it
        if argv := layout.manifest(layout.release()).get("argv"):
            return Endpoint.of(argv)
    return Endpoint.of(["--listen", layout.address, "--port", str(layout.port)])


NOBODY = (errno.ECONNREFUSED, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors that say that nothing listens at an address: it is refused, or this machine has no such address at all."""


def ask(place: Endpoint, path: str, body: Json | None = None, seconds: float = 5, limit: int = LIMIT) -> Any:
    """Ask ComfyUI; the bytes of a picture (`/view`), else parsed JSON (None: an empty answer).

    `seconds` is for all of it, connecting included. No redirect is followed. Raises ConnectionRefusedError when no
    address of the endpoint takes connections, another OSError when there is no answer in time, ValueError when the
    answer is not ComfyUI's.
    """
    from http.client import HTTPException  # half of this file's start, and most verbs ask nothing

    end = time.monotonic() + seconds
    unknown: OSError | None = None
    for address in place.addresses:
        try:
            raw = _exchange(place, address, path, body, max(0.1, end - time.monotonic()), limit)
        except OSError as error:
            unknown = unknown or (None if error.errno in NOBODY else error)
            continue
        except HTTPException as error:  # whoever has the port speaks something else
            raise ValueError(f"no HTTP: {said(repr(error))}") from error
        if path.startswith("/view"):
            return raw
        if sum(map(raw.count, (b",", b"[", b"{"))) > limit // DENSE:
            raise TooLong(f"the answer to {path} has more values than are looked at")
        try:
            return parsed(raw) if raw else None
        except RecursionError as error:
            raise ValueError(f"the answer to {path} is nested too deeply") from error
    raise unknown or ConnectionRefusedError(f"nothing listens at {' or '.join(place.addresses)}, port {place.port}")


def _exchange(place: Endpoint, address: str, path: str, body: Json | None, seconds: float, limit: int) -> bytes:
    from http.client import HTTPConnection, HTTPSConnection

    if place.tls:
        import ssl

        # ComfyUI's own certificate names the host that people open, not this loopback address.
        connection: HTTPConnection = HTTPSConnection(
            address,
            place.port,
            timeout=seconds,
            context=ssl._create_unverified_context(),  # noqa: S323
        )
    else:
        connection = HTTPConnection(address, place.port, timeout=seconds)
    late = threading.Event()
    sockets: list[socket.socket | None] = []

    def hang_up() -> None:
        late.set()
        for each in filter(None, (connection.sock, *sockets)):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    # A socket's own time-out starts anew with every byte: this one ends an answer that trickles.
    timer = threading.Timer(seconds, hang_up)
    timer.daemon = True
    with closing(connection):
        timer.start()
        try:
            connection.connect()
            sockets.append(connection.sock)  # a connection forgets it once the headers of a last answer are read
            headers = {"Content-Type": "application/json"}
            connection.request(
                "GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers
            )
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
        raise TooLong(f"the answer to {path} is longer than {limit} bytes")
    if answer.status != 200:
        raise ValueError(f"{path} is answered with {answer.status}: {said(raw[:500].decode(errors='replace'), 500)}")
    return raw


def parsed(raw: bytes) -> Any:
    """JSON as the format has it, without Python's NaN and infinities; raises ValueError, RecursionError."""

    def number(text: str) -> float:
        if not math.isfinite(found := float(text)):
            raise ValueError(f"{text} is no number")
        return found

    return json.loads(raw, parse_float=number, parse_constant=number)


# --- answers, checked ----------------------------------------------------------------------------------------------


def checked(name: str, answer: Any, read: Callable[[Any], T]) -> T:
    """What `read` makes of an answer; raises ValueError when the answer has another shape than ComfyUI's."""
    try:
        return read(answer)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"the answer to {name} is not ComfyUI's: {said(repr(error))}") from error


def said(value: object, limit: int = 200) -> str:
    """A word of ComfyUI's, as text of one line that any program can take: it may be anything, of any length."""
    if isinstance(value, (list, dict)):  # of any depth and size
        value = f"({len(value)} values)"
    text = value[: limit + 1] if isinstance(value, str) else repr(value)[: limit + 1] if value is not None else ""
    text = "".join(each if each.isprintable() else " " for each in text)
    return f"{text[:limit]}…" if len(text) > limit else text


def seconds_of(milliseconds: object) -> float | None:
    """A time of ComfyUI's in seconds since 1970; None for what is none."""
    if isinstance(milliseconds, (int, float)) and 0 <= milliseconds < 1e14:
        return milliseconds / 1000
    return None


def system_stats(place: Endpoint, seconds: float = 5) -> Json:
    """`/system_stats`: `version`, `torch`, `argv`, and `devices` with name and type. Raises as `ask` does."""

    def read(answer: Any) -> Json:
        system = answer["system"]
        return {
            "version": said(system.get("comfyui_version", "")),
            "torch": said(system.get("pytorch_version", "")),
            "argv": [said(word, 10_000) for word in system.get("argv", [])[:1000]],
            "devices": [{"name": said(each["name"]), "type": said(each["type"])} for each in answer["devices"][:100]],
        }

    return checked("/system_stats", ask(place, "/system_stats", seconds=seconds, limit=SMALL), read)


class Jobs(list[Json]):
    """The first jobs of a queue (`job`), in their order; `total` is how many it has."""

    def __init__(self, listed: list[Any], more: int = 0) -> None:
        # nodes queue jobs, too, and may number them with something else
        listed = sorted(listed, key=lambda entry: entry[0] if isinstance(entry[0], (int, float)) else float("inf"))
        super().__init__(job(entry) for entry in listed[:MOST])
        self.total = len(listed) + more


def queue(place: Endpoint, seconds: float = 5) -> tuple[Jobs, Jobs]:
    """The jobs that run and those that wait; of a queue that is too long to be read the total alone. Raises as `ask`
    does."""
    try:
        answer = ask(place, "/queue", seconds=seconds)
    except TooLong:
        told = ask(place, "/prompt", seconds=seconds, limit=SMALL)
        return Jobs([]), checked("/prompt", told, lambda told: Jobs([], int(told["exec_info"]["queue_remaining"])))
    return checked(
        "/queue", answer, lambda answer: (Jobs(list(answer["queue_running"])), Jobs(list(answer["queue_pending"])))
    )


def job(entry: Sequence[Any]) -> Json:
    """A job as ComfyUI queues it (execution.py, PromptQueue): number, id, workflow, and what came with it.

    `queued` is in seconds since 1970, None where the job does not say.
    """
    workflow, extra = (each if isinstance(each, dict) else {} for each in [*entry[2:4], None, None][:2])
    return {"id": said(entry[1]), "nodes": len(workflow), "queued": seconds_of(extra.get("create_time"))}


def takes_connections(place: Endpoint) -> bool:
    """Whether anything listens at an address of the endpoint."""
    for address in place.addresses:
        with suppress(OSError), socket.create_connection((address, place.port), timeout=1):
            return True
    return False


def unanswered(place: Endpoint, error: Exception) -> Fault:
    """The Fault that stands for a ComfyUI that gave no answer, or for another program at its port."""
    if isinstance(error, ValueError):
        what = f"the program at port {place.port} does not answer as ComfyUI does"
        return Fault("silent", what, str(error), "inv status shows which program holds the port")
    if takes_connections(place):
        hint = "inv logs shows what it does; inv restart --force ends that"
        return Fault("silent", "ComfyUI takes connections and does not answer", str(error), hint)
    what = f"nothing listens on port {place.port}: ComfyUI does not run"
    return Fault("silent", what, str(error), "inv start; inv logs")


def unload(place: Endpoint) -> None:
    """Ask ComfyUI to unload its models and forget its results, once no job runs. Raises as `ask` does."""
    ask(place, "/free", {"unload_models": True, "free_memory": True})
