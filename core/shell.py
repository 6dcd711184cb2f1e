"""The only module that starts a process: argv lists in, text out, no shell in between."""

from __future__ import annotations

import itertools
import os
import selectors
import shutil
import subprocess
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

from core.errors import AgentError, DiskFullError, ProcessError, ToolMissingError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

Done = subprocess.CompletedProcess[str]

# Where Debian keeps what users call: the package that holds a program, for the message when it is missing.
_PACKAGES = {
    "git": "git",
    "uv": "uv (pip install uv)",
    "apt-get": "apt",
    "rsvg-convert": "librsvg2-bin",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    inherit: bool = True,
    check: bool = True,
    input_text: str | None = None,
    output: IO[bytes] | None = None,
    timeout: float | None = None,
) -> Done:
    """Run a program to its end and return its output as text.

    `env` is added to this process's environment, or without `inherit` is all of it. What it says on standard output
    goes to the file `output` as it is, where there is one. `timeout` is in seconds.
    Raises ToolMissingError when it is not installed and, with `check`, ProcessError when it fails.
    """
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**(os.environ if inherit else {}), **(env or {})},
            input=input_text,
            stdout=output or subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout,
        )
    except FileNotFoundError as error:
        if cwd is not None and not cwd.exists():
            raise
        raise _missing(words[0]) from error
    except subprocess.TimeoutExpired as error:
        raise ProcessError(f"{words[0]} did not end within {timeout:.0f} s") from error
    if done.returncode and "No space left on device" in done.stderr:
        raise DiskFullError(f"the disk is full: {words[0]} could not write", hint="free some space, then run again")
    if check and done.returncode:
        last = (done.stderr or done.stdout or "").strip().splitlines()[-8:]
        raise ProcessError(f"{' '.join(words[:3])} ... exited with {done.returncode}", cause="\n    ".join(last))
    return done


def _missing(program: str) -> ToolMissingError:
    return ToolMissingError(f"{program} is not installed", hint=f"install {_PACKAGES.get(program, program)}")


def lines(
    argv: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str], pass_fds: Sequence[int] = ()
) -> Generator[str, None, int]:
    """Run a program and yield its output, stderr with it, line by line; return its exit status.

    The status is the generator's return value: the `value` of its StopIteration. `pass_fds` stay open in
    the program and in whatever it starts, so that a file lock held on one outlives this process.
    """
    process = subprocess.Popen(
        [str(word) for word in argv],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=tuple(pass_fds),
    )
    assert process.stdout is not None
    with _ended(process):
        for line in process.stdout:
            yield line.rstrip("\n")
    return process.returncode


LINE = 64_000_000
"""Bytes of a line: the hashes of all files of a release are one, some MB."""


def stream(
    argv: Sequence[str | Path],
    request: bytes,
    blocks: Iterable[bytes] = (),
    *,
    first: float | None = None,
    silence: float | None = None,
    said: Callable[[str], None] = lambda _: None,
) -> Iterator[bytes]:
    """Give a program its standard input and yield its output, line by line with the line ends.

    Input and output move at once, so that no full pipe makes both sides wait for each other; `said` gets the lines of
    stderr as they come. The program has a session of its own: it cannot ask at our terminal, and Ctrl-C ends it
    through us. Raises TimeoutError when no byte moves for `silence` seconds (`first`: before any output), and
    ProcessError with the status and stderr whenever the status is not 0, also after output. The unfinished last line
    of a program that fails is dropped.
    """
    words = [str(word) for word in argv]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    except FileNotFoundError as error:
        raise _missing(words[0]) from error
    stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
    assert stdin is not None
    assert stdout is not None
    assert stderr is not None
    outgoing = (each for each in itertools.chain((request,), blocks) if each)
    block = b""
    output = bytearray()
    complaints: deque[str] = deque(maxlen=1000)
    limit, moved = first, time.monotonic()

    def listen() -> None:
        nonlocal moved
        with stderr:
            for line in iter(lambda: stderr.readline(1 << 16), b""):
                moved = time.monotonic()
                complaints.append(line.decode(errors="replace").rstrip())
                said(complaints[-1])

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    with _ended(process, patience=5), selectors.DefaultSelector() as selector:
        os.set_blocking(stdin.fileno(), False)
        selector.register(stdin, selectors.EVENT_WRITE)
        selector.register(stdout, selectors.EVENT_READ)
        while not stdout.closed or process.poll() is None:
            if limit is not None and time.monotonic() - moved > limit:
                raise TimeoutError(f"no byte moved for {limit:.0f} s")
            for key, _ in selector.select(0.1):
                if key.fileobj is stdin:
                    block = block or next(outgoing, b"")
                    count = _write(key.fd, block)
                    block = block[count:]
                else:
                    chunk = os.read(key.fd, 1 << 16)
                    count, limit = len(chunk), silence if chunk else limit
                    output += chunk
                    if b"\n" in chunk:
                        *lines, output = output.split(b"\n")
                        for line in lines:
                            yield bytes(line) + b"\n"
                    if len(output) > LINE:
                        what = f"{words[0]} says a line of more than {LINE} bytes"
                        raise AgentError(what, hint="look at what runs there: inv logs")
                if not count:
                    selector.unregister(key.fileobj)
                    (stdin if key.fileobj is stdin else stdout).close()
                moved = time.monotonic()
        listener.join(1)  # not for ever: the master that an older ssh leaves in the background keeps stderr open
        if process.returncode:
            cause = "\n    ".join([*complaints][-8:])
            failure = ProcessError(f"{' '.join(words[-2:])} ended with {process.returncode}", cause=cause)
            failure.status, failure.said = process.returncode, "\n".join(complaints)
            raise failure
        if output:
            yield bytes(output)


def _write(pipe: int, block: bytes) -> int:
    """Write to a pipe; 0 when there is nothing to write, or nobody who reads."""
    with suppress(BrokenPipeError):
        return os.write(pipe, block) if block else 0
    return 0


@contextmanager
def _ended(process: subprocess.Popen[Any], patience: float | None = None) -> Iterator[None]:
    """See that a process has ended when the context is left; an error ends it early, after `patience` s by SIGKILL."""
    try:
        yield
    except BaseException:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        process.kill()
        raise
    finally:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait()


def find(program: str) -> str:
    """The path of a program; raises ToolMissingError."""
    if found := which(program):
        return found
    raise _missing(program)


def which(program: str) -> str | None:
    """The path of a program, or None."""
    return shutil.which(program)
