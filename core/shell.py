"""The only module that starts a process: argv lists in, text out, no shell in between."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

from core.errors import DiskFullError, ProcessError, ToolMissingError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

Done = subprocess.CompletedProcess[str]

# Where Debian keeps what users call: the package that holds a program, for the message when it is missing.
_PACKAGES = {"git": "git", "uv": "uv (pip install uv)", "apt-get": "apt", "rsvg-convert": "librsvg2-bin"}


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
        package = _PACKAGES.get(words[0], words[0])
        raise ToolMissingError(f"{words[0]} is not installed", hint=f"install {package}") from error
    except subprocess.TimeoutExpired as error:
        raise ProcessError(f"{words[0]} did not end within {timeout:.0f} s") from error
    if done.returncode and "No space left on device" in done.stderr:
        raise DiskFullError(f"the disk is full: {words[0]} could not write", hint="free some space, then run again")
    if check and done.returncode:
        last = (done.stderr or done.stdout or "").strip().splitlines()[-8:]
        raise ProcessError(f"{' '.join(words[:3])} ... exited with {done.returncode}", cause="\n    ".join(last))
    return done


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


def talk(argv: Sequence[str | Path], request: bytes, blocks: Iterable[bytes] = ()) -> Iterator[str]:
    """Give a program its standard input, then yield its output line by line; raises ProcessError when it only fails."""
    words = [str(word) for word in argv]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
        assert process.stdin is not None
        assert process.stdout is not None
        count = 0
        with _ended(process):
            with suppress(BrokenPipeError):
                process.stdin.write(request)
                for block in blocks:
                    process.stdin.write(block)
            with suppress(BrokenPipeError):
                process.stdin.close()
            for line in process.stdout:
                count += 1
                yield line.decode(errors="replace")
        if process.returncode and not count:
            said.seek(0)
            last = said.read().decode(errors="replace").strip().splitlines()[-8:]
            raise ProcessError(f"{' '.join(words[-2:])} ended with {process.returncode}", cause="\n    ".join(last))


@contextmanager
def _ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """See that a process has ended when the context is left; an error ends it early."""
    assert process.stdout is not None
    try:
        yield
    except BaseException:
        process.terminate()
        raise
    finally:
        process.stdout.close()
        process.wait()


def which(program: str) -> str | None:
    """The path of a program, or None."""
    return shutil.which(program)
