"""The two ways to reach a host's agent: a local subprocess, or the `ssh` program. The only module that uses SSH.

OpenSSH itself connects, so keys, agents, certificates, jump hosts, known_hosts and all other options work as in a
terminal. It never prompts, and a host's key must be known.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import sys
import tempfile
from abc import ABC, abstractmethod
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from agent.schema.live import Received
from core import shell
from core.errors import (
    DISK_FULL,
    ConnectError,
    HearthError,
    HostError,
    ProcessError,
    SourceError,
    UsageError,
)
from core.typed import convert
from deploy import agent_errors, archive, passwords, ssh_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from deploy.host import Target

ALIVE = 10
"""Seconds between ssh's keepalive messages. Three without a reply, also behind jump hosts, are a lost connection."""

QUIET = 45
"""Seconds of silence after which a verb that sends `alive` every 10 s has lost its agent."""

SILENT = 900
"""Seconds of silence in both directions that any other verb may take: it may read gigabytes from a slow disk."""

_LOGIN = 90
"""Seconds to connect (which ssh itself limits), to log in and to start a shell."""

_MARK = "--- hearth ---"


class Agent(ABC):
    """The agent of one host. It reads `site` and the verb's values as JSON, and writes JSON lines."""

    unpacked: bool = True
    """Run the agent that is unpacked on the host, if there is one; not while a plan deletes it."""

    def __init__(self, target: Target) -> None:
        self._target = target

    @property
    def _state(self) -> str:
        """The host's folder for the unpacked agent; `~` is the login's home."""
        return f"{self._target.prefix}/state" if self.unpacked else os.devnull

    def stream(self, verb: str, **values: Any) -> Iterator[Any]:
        """Yield the answers as they arrive; raises the error that the agent reports, or that of an early end."""
        return self._run(verb, values)

    def call(self, verb: str, **values: Any) -> Any:
        """One answer; raises as `stream` does."""
        answers = list(self.stream(verb, **values))
        if not answers:
            raise HostError(
                "step-failed", f"the agent ended without an answer to {verb}", hint="run the same command again"
            )
        return answers[-1]

    def send(self, path: Path, digest: str, offset: int, progress: Callable[[int], None]) -> None:
        """Send a file from `offset` on; `progress` is called with the size of each block."""
        size = path.stat().st_size
        values = {"sha256": digest, "size": size, "offset": offset}
        answers = list(self._run("receive", values, lambda: _blocks(path, offset, progress)))
        if not answers or convert(answers[-1], Received).size < size:
            raise self.lost(f"{path.name} was not transferred completely")

    def lost(self, cause: str) -> ConnectError:
        """The error for a connection that ended before the answer."""
        return ConnectError(
            "unreachable",
            f"the connection to {self._target.name} was lost",
            cause=cause,
            hint=f"a started change continues on the host; follow it: inv attach --host {self._target.name}",
        )

    def _run(self, verb: str, values: dict[str, Any], blocks: Callable[[], Iterable[bytes]] = tuple) -> Iterator[Any]:
        # Its hash is on a command line, which every user can read: the salt prevents guessing a secret from it.
        request = json.dumps({"site": self._target.site, "salt": token_hex(), **values}, default=vars).encode() + b"\n"
        try:
            for line in self._lines(verb, request, blocks, _patience(verb, values)):
                yield self._parsed(line)
        except ConnectError as error:  # the shared connection has ended, and a new one fails
            error.hint = self.lost("").hint if verb in ("submit", "follow") else error.hint
            raise
        except TimeoutError as error:
            raise self.lost(f"the agent does not answer: {error}") from error
        except ProcessError as error:
            raise self._ended(verb, error.status, error.stderr) from error

    def _parsed(self, line: bytes) -> Any:
        """Parse one line of the agent; raises the error that it reports."""
        try:
            value = json.loads(line)
        except ValueError:
            raise HostError(
                "step-failed",
                f"the answer of {self._target.name} is not JSON",
                cause=line[:500].decode(errors="replace").strip(),
                hint="another program writes to the output: check what the login shell starts in the background",
            ) from None
        if isinstance(value, dict) and value.keys() == {"error"}:
            raise agent_errors.error_of(value["error"])
        return value

    def _ended(self, verb: str, status: int, stderr: str) -> HearthError:
        """The error for an agent that ended with this status."""
        number = -status if status < 0 else status - 128  # a shell's status for a signal
        killed = number in set(signal.Signals)
        how = f"was killed by {signal.Signals(number).name}" if killed else f"ended with {status}"
        if verb == "follow":
            return self.lost(f"the agent that watches the change {how}")
        hint = f"check whether the host is out of memory: inv doctor --host {self._target.name}" if killed else ""
        return HostError(
            "step-failed", f"the agent on {self._target.name} {how} at {verb}", cause=stderr[-2000:], hint=hint
        )

    @abstractmethod
    def _lines(
        self, verb: str, request: bytes, blocks: Callable[[], Iterable[bytes]], silence: float
    ) -> Iterator[bytes]:
        """Run the agent with the request and the blocks on its standard input; yield its output.

        Raises TimeoutError and ProcessError as `shell.stream` does.
        """


def _patience(verb: str, values: Mapping[str, Any]) -> float:
    """The seconds without a byte after which a verb has failed."""
    if verb == "follow" or (verb == "logs" and values["follow"]):
        return QUIET
    return SILENT + float(values.get("wait") or 0) + float(values.get("every") or 0)


class Local(Agent):
    """This machine's agent, by subprocess."""

    def _lines(
        self, verb: str, request: bytes, blocks: Callable[[], Iterable[bytes]], silence: float
    ) -> Iterator[bytes]:
        digest = hashlib.sha256(archive.packed_agent()).hexdigest()
        argv = [sys.executable, "-I", "-S", "-c", archive.LOADER, str(archive.agent_file()), digest, self._state, verb]
        return shell.stream(argv, request, blocks(), first=silence, silence=silence)


def _blocks(path: Path, offset: int, progress: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(1 << 18):
            yield block
            progress(len(block))


class Ssh(Agent):
    """A remote host's agent. Each verb has its own session over one shared connection."""

    def __init__(self, target: Target, argv: Sequence[str], settings: Mapping[str, str], password: str) -> None:
        super().__init__(target)
        self._argv = argv
        self._settings = settings
        self._password = password

    def shell(self, command: str, say: Callable[[str], None]) -> str:
        """Run a shell command as the login, in its home, and return its output; `say` gets its stderr line by line.

        Raises HostError when it fails.
        """
        try:
            return b"".join(self._session(command, say=say)).decode(errors="replace")
        except ProcessError as error:
            raise HostError(
                "remote-command",
                f"a command on {self._target.name} ended with {error.status}",
                cause=_last(error.cause),
                hint="read its output above, then run the same command again to continue",
            ) from error

    def put(self, content: bytes, path: str) -> None:
        """Write a file there, as the login; `path` is relative to its home.

        The upload is compared with its hash, then renamed: a dropped connection leaves the file unchanged.
        """
        digest = hashlib.sha256(content).hexdigest()
        quoted, folder = shlex.quote(path), shlex.quote(os.path.dirname(path))  # noqa: PTH120  the other machine's
        script = f"""umask 022; f={quoted}; p=$f.$$; mkdir -p {folder} && chmod go-w {folder} && cat >"$p" &&
        case $(sha256sum <"$p") in {digest}*) mv -f "$p" "$f"; exit;; *) echo damaged during the transfer >&2;; esac;
        rm -f "$p"; exit 1"""
        try:
            list(self._session(script, content, silence=SILENT))
        except ProcessError as error:
            kind = "disk-full" if DISK_FULL.search(error.stderr) else "step-failed"
            what = f"{path} could not be written on {self._target.name}"
            hint = f"on the host: free space in {folder}, or make it writable"
            raise HostError(kind, what, cause=error.cause, hint=hint) from error

    def forward(self, port: int, address: str, remote: int) -> Iterator[None]:
        """Forward a port of this machine's loopback to an address as the host reaches it, until the caller stops.

        Yields when it is forwarded, then every 10 s. Needs nothing on the host. Raises ConnectError or UsageError.
        """
        held = self._session(f"while echo; do sleep {ALIVE}; done", silence=QUIET)
        try:
            next(held)
            where = f"127.0.0.1:{port}:{f'[{address}]' if ':' in address else address}:{remote}"
            # Without a configuration: its forwards would be requested, too.
            asked = ["ssh", "-F", os.devnull, "-S", self._settings["controlpath"], "-O", "forward", "-L", where]
            done = shell.run([*asked, "hearth"], check=False, input_text="")
            if done.returncode:
                hint = "choose another port: --port 8288"
                raise UsageError("usage", f"port {port} cannot be forwarded", cause=done.stderr.strip(), hint=hint)
            yield
            for _ in held:
                yield
        except TimeoutError as error:
            raise self.lost(f"the host does not answer: {error}") from error
        except ProcessError as error:
            raise self.lost(_last(error.stderr)) from error

    def get(self, path: str, place: Path, most: int) -> None:
        """Fetch a file from there, of at most so many bytes; raises HostError, or SourceError for more."""
        try:
            with place.open("wb") as file:
                for block in self._session(f"cat {shlex.quote(path)}", silence=SILENT):
                    if file.tell() + len(block) > most:
                        raise SourceError("hash-mismatch", f"more than the {most} bytes of {path} were sent")
                    file.write(block)
        except ProcessError as error:
            what = f"{path} could not be read on {self._target.name}"
            raise HostError("remote-command", what, cause=error.cause) from error

    def _lines(
        self, verb: str, request: bytes, blocks: Callable[[], Iterable[bytes]], silence: float
    ) -> Iterator[bytes]:
        """Run the agent there; send it first if the host lacks it, or has another file under its name."""
        script = self._script(verb, hashlib.sha256(request).hexdigest())
        given = f"{self._password}\n".encode() + request if self._password else request
        try:
            yield from self._session(script, given, blocks, silence)
        except ProcessError as error:
            if error.status != archive.NO_AGENT:
                raise
        else:
            return
        self.put(archive.packed_agent(), f".cache/hearth/{archive.agent_name()}")
        yield from self._session(script, given, blocks, silence)

    def _script(self, verb: str, asked: str) -> str:
        """The script that checks the agent's file and runs it, as root if the host's scope needs that.

        Only the login can write to the file's folder, and the user that runs the agent compares the hash. sudo's
        standard input contains only the password, so sudo never reads the request as a second attempt; the agent reads
        the request from a named pipe. Any process of the login can write to that pipe, so the agent also gets the
        request's hash (`asked`).
        """
        digest = hashlib.sha256(archive.packed_agent()).hexdigest()
        check = f"""u=$(id -u); d=$HOME/.cache/hearth; f=$d/{archive.agent_name()};
        case $(stat -Lc "%u %A" "$d" 2>/dev/null) in "$u d"????-??-*) ;; *) exit {archive.NO_AGENT};; esac;
        [ -f "$f" ] || exit {archive.NO_AGENT};
        command -v python3 >/dev/null || exit {archive.NO_PYTHON};"""
        # Not the shell's last command: some shells exec that, and after a signal would report no status.
        loader = shlex.quote(f"exec({archive.LOADER!r})")
        python = f'python3 -I -S -c {loader} "$f" {digest} {shlex.quote(self._state)}'
        run = f"{python} {verb}; exit $?;"
        if self._target.host.scope == "user":
            return f"{check} {run}"
        sudo = "env LC_ALL= LC_MESSAGES=C sudo"  # its messages are compared
        take = "IFS= read -r p;" if self._password else ""
        start = f"{check} {take} if [ $u = 0 ]; then {run} fi; command -v sudo >/dev/null || exit {archive.NO_SUDO};"
        if not self._password:
            return f"{start} {sudo} -n {run}"
        return f"""{start} q=$d/in.$$; mkfifo -m 600 "$q" || exit 1; exec 3<&0; cat <&3 >"$q" 2>/dev/null &
        printf "%s\\n" "$p" | {sudo} -S -p "" {python} "$q" {verb} {asked} 3<&-;
        s=$?; kill $! 2>/dev/null; rm -f "$q"; exit $s"""

    def _session(
        self,
        script: str,
        request: bytes = b"",
        blocks: Callable[[], Iterable[bytes]] = tuple,
        silence: float | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> Iterator[bytes]:
        """Run a /bin/sh script in the login's home and yield its output. Raises ProcessError if it fails.

        The login's shell can be of any kind and may print text itself: the output begins after a mark.
        """
        begun = stderr_begun = False  # mark seen in the output; and on stderr, which the shell may redirect
        noise: list[bytes] = []

        def listen(line: str) -> None:
            nonlocal stderr_begun
            if stderr_begun:
                say(line)
            stderr_begun = stderr_begun or line == _MARK

        # One line: a C shell does not accept several in quotes.
        script = " ".join(f'cd; echo; echo "{_MARK}"; echo "{_MARK}" >&2; {script}'.split("\n"))
        command = f"exec /bin/sh -c {shlex.quote(script)}"
        lines = shell.stream([*self._argv, command], request, blocks(), first=_LOGIN, silence=silence, on_stderr=listen)
        try:
            for line in lines:
                noise.append(line)
                if line.strip() == _MARK.encode():
                    begun = True
                    yield from lines
                    return
        except ProcessError as error:
            if stderr_begun:
                error.stderr = error.stderr.rpartition(_MARK)[2].strip()
                error.cause = shell.last_words(shell.Done([], error.status, "", error.stderr))
            if error.status == 255:  # ssh's own
                failure = self.lost(_last(error.cause)) if begun else self._unreachable(error.stderr or error.cause)
                raise failure from error
            if begun:
                raise
            noise.append(error.cause.encode())
        except TimeoutError as error:
            raise (self.lost if begun else self._unreachable)(str(error)) from error
        raise HostError(
            "step-failed",
            f"the login shell on {self._target.name} does not run commands",
            cause=b"".join(noise).decode(errors="replace").strip()[-500:],
            hint=f"try: {self._try} 'exec /bin/sh -c true'",
        )

    def _ended(self, verb: str, status: int, stderr: str) -> HearthError:
        name = self._target.name
        if status == archive.NO_PYTHON:
            return HostError("step-failed", f"{name} has no python3", hint="on the host: apt-get install python3")
        if status == archive.OLD_PYTHON:
            what = f"python3 on {name} is {_last(stderr)}; Hearth needs 3.10 or newer"
            return HostError(
                "step-failed", what, hint="on the host: upgrade it, or put a newer python3 first on the login's PATH"
            )
        if status in (126, 127):
            what, hint = f"python3 on {name} cannot be started", "on the host: reinstall python3"
            return HostError("step-failed", what, cause=stderr, hint=hint)
        sudo = status in (1, archive.NO_SUDO) and self._target.host.scope == "system"
        return (self._no_root(status, stderr) if sudo else None) or super()._ended(verb, status, stderr)

    def _no_root(self, status: int, stderr: str) -> ConnectError | None:
        """The error for a refusal by sudo; None if sudo did not fail."""
        name, user = self._target.name, self._settings["user"]
        otherwise = f'log in as root or as a user with sudo (`user` of hosts.{name}), or set scope = "user"'
        if status == archive.NO_SUDO:
            return ConnectError("sudo", f"{name} has no sudo, and {user} is not root", hint=otherwise)
        if not re.search(r"^(sudo: |Sorry, )|sudoers", stderr, re.MULTILINE):
            return None
        cause = _last(stderr)
        if re.search(r"sudoers|not allowed|may not run", stderr):
            return ConnectError("sudo", f"{user} may not use sudo on {name}", cause=cause, hint=otherwise)
        if self._password and re.search("incorrect password|no password was provided", stderr):
            passwords.known.pop(name, None)  # prompt again on a retry: some systems lock the login after three failures
            hint = f"type it again; if it is in the keyring: keyring set hearth-sudo {name}"
            return ConnectError("sudo", f"sudo on {name} does not accept the password", cause=cause, hint=hint)
        hint = "run the same command again with --ask-sudo, or allow sudo without a password on the host"
        return ConnectError("sudo", f"sudo does not give {user} root on {name}", cause=cause, hint=hint)

    def _unreachable(self, stderr: str) -> HearthError:
        """The error for an ssh that did not log in."""
        if self._settings.keys() & {"proxyjump", "proxycommand"}:
            # Connection sharing hides errors of the proxy command (ssh_proxy_connect in OpenSSH): retry once without
            # it.
            alone = ["ssh", "-S", "none", "-o", "ControlPersist=no", *self._argv[1:], "true"]
            with suppress(TimeoutError):
                try:
                    list(shell.stream(alone, b"", first=_LOGIN))
                except ProcessError as error:
                    stderr = error.stderr or stderr
        return ssh_errors.unreachable(stderr, self._target.name, self._settings, self._try)

    @property
    def _try(self) -> str:
        return shlex.join([*_ssh(self._target), self._target.host.address])


def _last(stderr: str) -> str:
    return stderr.rpartition("\n")[2]


def _ssh(target: Target) -> list[str]:
    """The ssh command for a host, with the settings of hosts.toml."""
    config, host = os.environ.get("HEARTH_SSH_CONFIG"), target.host
    words = ["ssh", *(["-F", config] if config else []), *(["-l", host.user] if host.user else [])]
    return [*words, *(["-p", str(host.ssh_port)] if host.ssh_port else [])]


@contextmanager
def connect(target: Target, ask_sudo: bool = False, seconds: int = 15) -> Iterator[Agent]:
    """Connect to the agent of a host while the context lasts; the host must accept within `seconds`.

    The first verb makes the connection; it raises ConnectError.
    """
    if not target.host.address:
        yield Local(target)
        return
    password = passwords.sudo_password(target.name, target.host) if ask_sudo else ""
    # Not in $TMPDIR, which may be too long for a socket's path.
    with tempfile.TemporaryDirectory(prefix="hearth-", dir="/tmp") as folder:
        socket = f"{folder}/ssh"
        options = {
            # Sessions share one connection. It ends soon after this process or the last session.
            "ControlMaster": "auto", "ControlPath": socket, "ControlPersist": "60",
            # Never prompt: with several hosts, the user could not tell which one asks. ssh's messages are matched.
            "BatchMode": "yes", "LogLevel": "ERROR", "ConnectTimeout": str(seconds),
            "ServerAliveInterval": str(ALIVE), "ServerAliveCountMax": "3",
            # Disable options for interactive logins: another session may hold a forwarded port, a RemoteCommand would
            # replace ours, and root on the host must not get our agent and display.
            "ClearAllForwardings": "yes", "RemoteCommand": "none", "RequestTTY": "no", "PermitLocalCommand": "no",
            "ForwardAgent": "no", "ForwardX11": "no",
        }  # fmt: skip
        argv = [*_ssh(target), *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
        read = shell.run([*argv, "-G", "--", target.host.address], check=False, input_text="", timeout=60)
        if read.returncode:
            what = f"ssh cannot read its configuration for {target.name}"
            raise ConnectError("unreachable", what, cause=shell.last_words(read), hint="correct the file that it names")
        settings = dict(line.partition(" ")[::2] for line in read.stdout.splitlines())
        if settings.get("stricthostkeychecking") in ("false", "no", "off"):
            argv += ["-o", "StrictHostKeyChecking=accept-new"]  # never run as root on a host whose key changed
        # Options that older ssh lacks: set them if this one has them, because they would block a command's input.
        for name, value in (("stdinnull", "no"), ("forkafterauthentication", "no"), ("sessiontype", "default")):
            argv += ["-o", f"{name}={value}"] if settings.get(name, value) != value else []
        try:
            yield Ssh(target, [*argv, "--", target.host.address], settings, password)
        finally:
            shell.run(["ssh", "-F", os.devnull, "-S", socket, "-O", "exit", "hearth"], check=False, input_text="")
