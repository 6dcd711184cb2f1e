"""Run an untrusted program once, in the service's sandbox."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from agent.files import AgentError, Json
from agent.layout import Layout
from agent.processes import end_descendants, inherited, take_orphans
from agent.schema.change import Node
from agent.schema.manifest import ReleaseManifest

# Unit settings for the command and its lifetime; the other settings are the sandbox.
_ITS_OWN = re.compile(
    r"(Exec|Restart|Timeout|RuntimeDirectory|LogsDirectory|Kill|SuccessExit)\w*="
    r"|(Type|WorkingDirectory|Environment|LoadCredential|LoadCredentialEncrypted)="
)

OUTPUT = 300_000_000
"""Maximum output in bytes: an install.py's tree arrives on standard output."""


def sandboxed(
    layout: Layout,
    unit: str,
    argv: list[str],
    release: ReleaseManifest,
    *,
    seconds: int,
    most: int = OUTPUT,
    apart: bool = False,
    network: bool = False,
    given: bytes = b"",
) -> bytes:
    """Run a program with the sandbox settings of `unit` and return its standard output.

    `unit` is the text of a unit, or of a container, of which the program gets one of its own.

    The program and its descendants are killed after `seconds` or after `most` bytes of output. `apart` runs it as a
    transient user who can write only to a private /tmp. `release` provides its `environment` and, without a system
    unit, its `confined` prefix. Without `network` it has no network access. `given` is its input. Raises
    AgentError.
    """
    variables = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}  # not the deploying user's environment
    variables |= {**release.environment, "PYTHONDONTWRITEBYTECODE": "1"}
    if "[Container]" in unit:
        command = _in_container(layout, unit, argv, variables, seconds, apart=apart, network=network)
        return _output(command, inherited(), seconds + 10, most, given)
    if layout.scope == "system":
        service = unit.partition("[Service]")[2].partition("\n[")[0]
        lines = [line for line in service.splitlines() if re.match(r"\w+=", line)]
        # Units of older releases mount below writable folders, where systemd would follow the service's links as root.
        written = [f"{each}/" for each in (layout.data, *layout.elsewhere.values())]
        lines = [line for line in lines if not _ITS_OWN.match(line) and not any(each in line for each in written)]
        # systemd-run (252) accepts names such as link-local only as a single value.
        lines = [each for line in lines for each in _split(line)]
        if apart:
            lines = [line for line in lines if not re.match("(User|Group|ReadWritePaths|UMask)=", line)]
            lines.append("DynamicUser=yes")
        lines += [] if network else ["PrivateNetwork=yes"]
        lines += [f"RuntimeMaxSec={seconds + 5}", "TimeoutStopSec=5", "KillMode=control-group", "WorkingDirectory=/"]
        words = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", "--service-type=exec"]
        words += [f"--property={line}" for line in lines]
        words += [f"--setenv={name}={value}" for name, value in variables.items()]
        command = [*words, "--", *argv]
    else:
        command = [*release.confined, *argv]
    return _output(
        command, {**inherited(), **variables} if layout.scope == "system" else variables, seconds, most, given
    )


def _in_container(
    layout: Layout, unit: str, argv: list[str], variables: Json, seconds: int, *, apart: bool, network: bool
) -> list[str]:
    """Return the command that runs a program in a container as the unit's, which has only the parts and a /tmp.

    systemd starts the engine: the agent's own unit may not create namespaces.
    """
    system = layout.scope == "system"
    limits = [each for line in unit.splitlines() if line.startswith(_LIMITS) for each in _split(line)]
    words = ["systemd-run", *([] if system else ["--user"]), "--quiet", "--wait", "--pipe", "--collect"]
    words += ["--service-type=exec", "--property=Delegate=yes", f"--property=RuntimeMaxSec={seconds + 5}"]
    words += [f"--property={each}" for each in limits]
    words += ["--", "podman", "run", "--rm", "--interactive", f"--timeout={seconds}", "--cgroups=split"]
    words += ["--log-driver=passthrough", "--read-only", "--read-only-tmpfs=false", "--cap-drop=all"]
    words += ["--security-opt=no-new-privileges", "--tmpfs=/tmp:mode=1777,notmpcopyup", "--workdir=/", "--pids-limit=0"]
    words += ["--network=host" if network else "--network=none", f"--volume={layout.parts}:{layout.parts}:ro"]
    if system:
        user, group = (NOBODY, NOBODY) if apart else layout.owner()
        words += [f"--user={user}:{group}"]
    else:
        words += ["--userns=keep-id"]
    words += [f"--device={each}" for each in re.findall(r"^AddDevice=(.+)$", unit, re.MULTILINE)]
    words += [f"--env={name}={value}" for name, value in variables.items()]
    return [*words, "--rootfs", *re.findall(r"^Rootfs=(.+)$", unit, re.MULTILINE), *argv]


_LIMITS = tuple(
    f"{each}=" for each in ("MemoryMax", "CPUQuota", "TasksMax", "LimitCORE", "IPAddressDeny", "IPAddressAllow")
)

NOBODY = 65534
"""The user without files, in every Debian."""


def _split(line: str) -> list[str]:
    key, _, words = line.partition("=")
    return [f"{key}={word}" for word in words.split()] if key.startswith("IPAddress") else [line]


def unit_of(layout: Layout, release: ReleaseManifest) -> str:
    """Return the text of a release's unit, or of its container; empty without either."""
    files: dict[str, str] = release.files
    return files.get(f"{layout.service}.container") or files.get(f"{layout.service}.service", "")


def python_of(layout: Layout, release: ReleaseManifest) -> str:
    """Return the Python of a release's environment, in its part: a container of `sandboxed` has no releases."""
    return str(layout.parts / release.parts["env"] / "bin/python")


def confined_to(folder: Path, layout: Layout, step: Node) -> list[str]:
    """Return the confining command prefix that allows writes to `folder` only, derived from the step's prefix."""
    words = list(step.confined)
    if words:
        spec = json.loads(words[-2])
        spec |= {"secrets": [], "write": [str(folder)], "bind": [], "udp": step.network}
        spec |= {} if step.network else {"connect": []}
        words[3], words[-2] = str(layout.agent), json.dumps(spec)
    return words


@contextmanager
def _source(content: bytes) -> Iterator[IO[bytes] | int]:
    """Yield a program's standard input; in memory, so that it needs no disk."""
    if not content:
        yield subprocess.DEVNULL
        return
    with os.fdopen(os.memfd_create("hearth"), "w+b") as file:
        file.write(content)
        file.seek(0)
        yield file


def _output(command: list[str], variables: dict[str, str], seconds: float, most: int, given: bytes = b"") -> bytes:
    """Run a command with limits on time and output; return its standard output. Raises AgentError."""
    pipe = subprocess.PIPE
    spared = take_orphans()  # a daemon could hold the pipe open and outlive it
    try:
        with (
            _source(given) as source,
            subprocess.Popen(
                command, env=variables, cwd="/", stdin=source, stdout=pipe, stderr=pipe, start_new_session=True
            ) as process,
        ):
            output, tail, late = _watched(process, spared, seconds, most)
    except OSError as error:
        raise AgentError("step", f"{command[0]} could not be started", str(error)) from error
    if late:
        raise AgentError("step", f"it did not end within {seconds} s")
    if len(output) > most:
        raise AgentError("step", f"it printed more than {most} bytes")
    if process.returncode:
        lines = (tail or output[-4000:]).decode(errors="replace").strip().splitlines()
        raise AgentError("step", f"it ended with {process.returncode}", "\n".join(lines[-8:]))
    return output


def _watched(
    process: subprocess.Popen[bytes], spared: set[int], seconds: float, most: int
) -> tuple[bytes, bytes, bool]:
    """Wait for a process's end, or kill it and its descendants except `spared`.

    Return its standard output, the end of its stderr, and whether it was killed because it was late.
    """
    tail, late = bytearray(), threading.Event()

    def listen(pipe: IO[bytes]) -> None:
        while block := pipe.read1(65536):  # type: ignore[attr-defined]
            tail[:] = (tail + block)[-4000:]

    def end() -> None:
        late.set()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        end_descendants(spared)

    timer = threading.Timer(seconds, end)
    listener = threading.Thread(target=listen, args=(process.stderr,), daemon=True)
    timer.start()
    listener.start()
    try:
        assert process.stdout is not None
        output = process.stdout.read(most + 1)
        if len(output) > most:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        end_descendants(spared)
        listener.join(1)
    finally:
        timer.cancel()
        timer.join()  # else it could kill the next command's descendants
    return output, bytes(tail), late.is_set()
