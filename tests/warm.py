"""A process that has imported Hearth and forks one child per `inv` call: no call starts Python anew.

It has called none of Hearth's functions, so a child knows nothing of earlier calls. `python -m tests.warm FD` serves
the socket FD; a request is argv, environment and folder as JSON, with descriptors for stdin, stdout, stderr and a pipe
that gets the child's process id and then its wait status.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import IO

REQUEST = 200_000
"""Bytes of a request: an environment, mostly."""


def run(argv: list[str], env: dict[str, str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run `inv` with these words, as `subprocess.run` would. Raises TimeoutExpired."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, Path(os.devnull).open("rb") as nothing:
        answer, theirs = socket.socketpair()
        with answer:
            with theirs:
                request = json.dumps([argv, env, str(cwd)]).encode()
                socket.send_fds(
                    _server(os.getpid()), [request], [nothing.fileno(), out.fileno(), err.fileno(), theirs.fileno()]
                )
            pid = struct.unpack("i", answer.recv(4))[0]
            answer.settimeout(timeout)
            try:
                status = struct.unpack("i", answer.recv(4))[0]
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(argv, timeout, _text(out), _text(err)) from None
        return subprocess.CompletedProcess(argv, os.waitstatus_to_exitcode(status), _text(out), _text(err))


def start() -> None:
    """Start this process's server now: it keeps the network, umask and limits that this process has at its start."""
    _server(os.getpid())


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


@cache
def _server(_: int) -> socket.socket:
    """The connection to this process's server, which ends with the connection."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        words = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
        checkout = Path(__file__).parent.parent
        process = subprocess.Popen(words, pass_fds=[theirs.fileno()], cwd=checkout, stdin=subprocess.DEVNULL)

    def end(owner: int = os.getpid()) -> None:
        ours.close()
        if os.getpid() == owner:
            process.wait()

    atexit.register(end)
    return ours


def _serve(connection: socket.socket) -> list[str]:
    """Fork a child for each request; returns in the child only, with its argv."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while True:
        request, descriptors, _, _ = socket.recv_fds(connection, REQUEST, 4)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            break
        for each in descriptors:
            os.close(each)
    *standard, answer = descriptors
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if child := os.fork():  # the keeper
        os.write(answer, struct.pack("i", child))
        for each in standard:
            os.close(each)
        status = os.waitpid(child, 0)[1]
        with contextlib.suppress(BrokenPipeError):  # the client has given up
            os.write(answer, struct.pack("i", status))
        os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    connection.detach()
    for number, each in enumerate(standard):
        os.dup2(each, number)
    os.closerange(3, 256)
    argv, env, cwd = json.loads(request)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    return [str(word) for word in argv]


def _main() -> None:
    checkout = Path.cwd()
    for folder in ("core", "lock", "deploy", "kernels", "ops", "gateway"):
        for path in sorted((checkout / folder).rglob("*.py")):
            name = ".".join(path.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__")
            if name not in ("kernels.attention", "kernels.smoke"):  # for an interpreter with torch
                importlib.import_module(name)
    program = importlib.import_module("invoke.main").program
    gc.freeze()
    sys.argv = ["inv", *_serve(socket.socket(fileno=int(sys.argv[1])))]
    code = 0
    try:
        program.run(sys.argv)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    # As multiprocessing ends its children. To clear all modules would write to, and so copy, all memory.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _main()
