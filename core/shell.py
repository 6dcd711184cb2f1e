"""The only module that starts a process: argv lists in, text out, no shell in between."""

from __future__ import annotations

import contextvars
import itertools
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

from core.errors import DISK_FULL, HostError, ProcessError, ToolError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

Done = subprocess.CompletedProcess[str]

# The Debian package of a program, for the message when it is missing.
_PACKAGES = {
    "git": "git",
    "uv": "uv (pipx install uv)",
    "apt-get": "apt",
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
    stdin: IO[str] | None = None,
    output: IO[bytes] | None = None,
    timeout: float | None = None,
) -> Done:
    """Run a program to its end and return its output as text.

    `env` is added to this process's environment, or replaces it without `inherit`. Its input is `input_text` or the
    file `stdin`. `output` is a file for standard output, in bytes. `timeout` is in seconds.
    Raises ToolError when it is not installed and, with `check`, ProcessError when it fails.
    """
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**(os.environ if inherit else {}), **(env or {})},
            **({"stdin": stdin} if input_text is None else {"input": input_text}),
            stdout=output or subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout,
        )
    except OSError as error:
        if error.filename != words[0]:  # `cwd` does not exist, or a resource is exhausted
            raise
        raise _missing(words[0], error) from error
    except subprocess.TimeoutExpired as error:
        raise ProcessError("process", f"{words[0]} did not end within {timeout:.0f} s") from error
    if done.returncode and DISK_FULL.search(done.stderr):
        raise HostError(
            "disk-full",
            f"the disk is full: {words[0]} could not write",
            hint="free some space, then run the same command again",
        )
    if check and done.returncode:
        raise ProcessError(
            "process", f"{' '.join(words[:3])} ... exited with {done.returncode}", cause=last_words(done)
        )
    return done


def last_words(done: Done, lines: int = 8) -> str:
    """The end of a failed program's output, and the signal that killed it; for a silent one, its exit status."""
    said = (done.stderr or "").strip() or (done.stdout or "").strip()
    words, status = said.splitlines()[-lines:], done.returncode
    words += [f"it was killed by signal {-status} ({signal.strsignal(-status)})"] if status < 0 else []
    return "\n".join(words) or f"it wrote no message; its exit status is {status}"


def _missing(program: str, error: OSError | None = None) -> ToolError:
    if error is None or isinstance(error, FileNotFoundError):
        hint = f"install {_PACKAGES.get(program, program)}"
        return ToolError("program-missing", f"{program} is not installed", hint=hint)
    return ToolError("program-missing", f"{program} cannot be run", cause=error.strerror or "")


def lines(
    argv: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str], pass_fds: Sequence[int] = ()
) -> Generator[str, None, int]:
    """Run a program in this environment and yield its output, with stderr, line by line; return its exit status.

    The status is the generator's return value: the `value` of its StopIteration. `pass_fds` stay open in
    the program and its children, so that a file lock on one outlives this process.
    """
    process = subprocess.Popen(
        [str(word) for word in argv],
        cwd=cwd,
        env=dict(env),
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


GRACE = 5
"""Seconds that a program with its own session has after SIGTERM, before SIGKILL."""

LINE = 64_000_000
"""Maximum bytes of a line: the hashes of all files of a release are one line of some MB."""


def stream(
    argv: Sequence[str | Path],
    request: bytes,
    blocks: Iterable[bytes] = (),
    *,
    first: float | None = None,
    silence: float | None = None,
    on_stderr: Callable[[str], None] = lambda _: None,
) -> Iterator[bytes]:
    """Write a program's standard input and yield its output, line by line with the line ends.

    Input and output are transferred at the same time, so that full pipes cannot block both sides; `on_stderr` gets
    each line of stderr. The program has its own session: it cannot prompt at the terminal, and Ctrl-C reaches it
    through this process. Raises TimeoutError when no byte moves for `silence` seconds (`first`: before any output),
    and ProcessError with the status and stderr whenever the status is not 0, also after output. The unfinished last
    line of a program that fails is dropped.
    """
    words = [str(word) for word in argv]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    except FileNotFoundError as error:
        raise _missing(words[0]) from error
    errors = _Errors(process, on_stderr)
    errors.start()
    output = bytearray()
    with _ended(process, patience=GRACE):
        for chunk in _exchange(process, itertools.chain((request,), blocks), errors, first, silence):
            output += chunk
            if b"\n" in chunk:
                *lines, output = output.split(b"\n")
                for line in lines:
                    yield bytes(line) + b"\n"
            if len(output) > LINE:
                what = f"{words[0]} wrote a line of more than {LINE} bytes"
                raise HostError("step-failed", what, hint="read the log: inv logs")
        errors.join(1)  # at most: the background master of an older ssh keeps stderr open
        if process.returncode:
            done = Done(words, process.returncode, "", "\n".join(errors.lines))
            cause = last_words(done)
            failure = ProcessError("process", f"{' '.join(words[-2:])} ended with {process.returncode}", cause=cause)
            failure.status, failure.stderr = done.returncode, done.stderr
            raise failure
        if output:
            yield bytes(output)


class _Errors(threading.Thread):
    """Reads a program's stderr: its last lines, and the time of the latest."""

    def __init__(self, process: subprocess.Popen[bytes], on_stderr: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        assert process.stderr is not None
        self._stderr, self._on_stderr = process.stderr, on_stderr
        self._context = contextvars.copy_context()  # a thread starts with an empty one: no `console.speaking`
        self.lines: deque[str] = deque(maxlen=1000)
        self.moved = time.monotonic()

    def run(self) -> None:
        with self._stderr:
            for line in iter(lambda: self._stderr.readline(1 << 16), b""):
                self.moved = time.monotonic()
                self.lines.append(line.decode(errors="replace").rstrip())
                self._context.run(self._on_stderr, self.lines[-1])


def _exchange(
    process: subprocess.Popen[bytes],
    blocks: Iterable[bytes],
    errors: _Errors,
    first: float | None,
    silence: float | None,
) -> Iterator[bytes]:
    """Write blocks to a program and yield its output in chunks, until it has ended; raises TimeoutError."""
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    outgoing, block = (each for each in blocks if each), b""
    limit, moved = first, time.monotonic()
    with selectors.DefaultSelector() as selector:
        os.set_blocking(stdin.fileno(), False)
        selector.register(stdin, selectors.EVENT_WRITE)
        selector.register(stdout, selectors.EVENT_READ)
        while not stdout.closed or process.poll() is None:
            if limit is not None and time.monotonic() - max(moved, errors.moved) > limit:
                raise TimeoutError(f"no byte moved for {limit:.0f} s")
            for key, _ in selector.select(0.1):
                if key.fileobj is stdin:
                    block = block or next(outgoing, b"")
                    count = _write(key.fd, block)
                    block = block[count:]
                else:
                    chunk = os.read(key.fd, 1 << 16)
                    count, limit = len(chunk), silence if chunk else limit
                    yield chunk
                if not count:
                    selector.unregister(key.fileobj)
                    (stdin if key.fileobj is stdin else stdout).close()
                moved = time.monotonic()


def _write(pipe: int, block: bytes) -> int:
    """Write to a pipe; 0 when there is nothing to write or no reader."""
    with suppress(BrokenPipeError):
        return os.write(pipe, block) if block else 0
    return 0


@contextmanager
def _ended(process: subprocess.Popen[Any], patience: float | None = None) -> Iterator[None]:
    """End a process with the context: wait for it, or on an error terminate it, after `patience` s by SIGKILL."""
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
    """The path of a program; raises ToolError."""
    if found := which(program):
        return found
    raise _missing(program)


def which(program: str) -> str | None:
    """The path of a program, or None."""
    return shutil.which(program)


def browse(address: str) -> bool:
    """Open an address in the browser; False if there is no display for one."""
    import webbrowser

    shown = sys.platform == "darwin" or any(os.environ.get(each) for each in ("DISPLAY", "WAYLAND_DISPLAY"))
    return shown and webbrowser.open(address)
