"""The two ways to reach a host's agent: a subprocess here, or one SSH connection. The only module that knows Fabric.

Host keys are checked: an unknown or changed one ends the run. Fabric itself accepts any (`AutoAddPolicy`,
fabric/connection.py), so policy and known_hosts are set here, for jump hosts as well.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import os
import shlex
import sys
import threading
import zipfile
from abc import ABC, abstractmethod
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import files, shell
from core.errors import (
    AgentError,
    BusyError,
    ChangedSinceError,
    ConnectError,
    DiskFullError,
    DrainError,
    GateError,
    GpuError,
    HearthError,
    HostKeyError,
    HostOfflineError,
    LogError,
    NoAnswerError,
    RemoteError,
    StorageError,
    SudoError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import fabric

    from deploy.host import Target


@functools.cache
def packed_agent() -> bytes:
    """`agent/` as one file that Python runs. The same code gives the same bytes: its hash is its name on hosts."""
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        for path in sorted((files.CHECKOUT / "agent").glob("*.py")):
            archive.writestr(zipfile.ZipInfo(f"agent/{path.name}"), path.read_bytes())
        run = "import sys\n\nfrom agent.main import main\n\nsys.exit(main(sys.argv[1:]))\n"
        archive.writestr(zipfile.ZipInfo("__main__.py"), run)
    return output.getvalue()


def agent_name() -> str:
    """The name of the packed agent's file, here and on hosts."""
    return f"agent-{hashlib.sha256(packed_agent()).hexdigest()[:16]}.pyz"


def agent_file() -> Path:
    """The packed agent, in the cache."""
    place = files.cache() / "agents" / agent_name()
    if not place.is_file():
        files.write(place, packed_agent())
    return place


class Agent(ABC):
    """The agent of one host. `site` and the verb's own values go in as JSON, JSON lines come out."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def stream(self, verb: str, **values: Any) -> Iterator[Any]:
        """Answers as they come; raises what the agent's fault stands for."""
        return self._run(verb, values)

    def call(self, verb: str, **values: Any) -> Any:
        """One answer; raises what the agent's fault stands for."""
        answers = list(self.stream(verb, **values))
        if not answers:
            raise AgentError(f"the agent ended without an answer to {verb}", hint="run the same command again")
        return answers[-1]

    def send(self, path: Path, digest: str, offset: int, progress: Callable[[int], None]) -> None:
        """Send a file from `offset` on; `progress` is told the bytes of each block."""
        values = {"sha256": digest, "size": path.stat().st_size, "offset": offset}
        for _ in self._run("receive", values, _blocks(path, offset, progress)):
            pass

    def _run(self, verb: str, values: dict[str, Any], blocks: Iterable[bytes] = ()) -> Iterator[Any]:
        request = json.dumps({"site": self._target.site, **values}).encode() + b"\n"
        for line in self._lines(verb, request, blocks):
            yield _parsed(line)

    @abstractmethod
    def _lines(self, verb: str, request: bytes, blocks: Iterable[bytes]) -> Iterator[str]:
        """Run the agent with the request and the blocks on its standard input; yield its output."""


def _parsed(line: str) -> Any:
    """One line of the agent's; raises the error that a fault stands for."""
    try:
        value = json.loads(line)
    except ValueError:
        raise AgentError("the agent's answer is not JSON", cause=line[:500]) from None
    if isinstance(value, dict) and value.keys() == {"fault"}:
        raise error_of(value["fault"])
    return value


def error_of(fault: dict[str, Any]) -> HearthError:
    """The error that a fault of the agent stands for."""
    kinds: dict[str, type[HearthError]] = {
        "busy": BusyError,
        "drain": DrainError,
        "gate": GateError,
        "trial": GateError,
        "changed": ChangedSinceError,
        "disk": DiskFullError,
        "offline": HostOfflineError,
        "storage": StorageError,
        "gpu": GpuError,
        "silent": NoAnswerError,
        "log": LogError,
        "usage": UsageError,
    }
    kind = kinds.get(fault["kind"], AgentError)
    cause = "\n         ".join([*fault["cause"].splitlines(), *(f"| {line}" for line in fault.get("log", []))])
    return kind(fault["what"], cause=cause, hint=fault["hint"])


class Local(Agent):
    """This machine's agent, by subprocess."""

    def _lines(self, verb: str, request: bytes, blocks: Iterable[bytes]) -> Iterator[str]:
        return shell.talk([sys.executable, "-I", str(agent_file()), verb], request, blocks)


def _blocks(path: Path, offset: int, progress: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(1 << 18):
            yield block
            progress(len(block))


class Ssh(Agent):
    """A remote host's agent, over one connection."""

    def __init__(self, target: Target, connection: fabric.Connection, password: str) -> None:
        super().__init__(target)
        self._connection = connection
        self._password = password
        self._file = f".cache/hearth/{agent_name()}"

    def _lines(self, verb: str, request: bytes, blocks: Iterable[bytes]) -> Iterator[str]:
        """Run the agent there; when it lacks this very file, send it and run it again."""
        from paramiko import SSHException

        for attempt in (1, 2):
            channel = self._open()
            try:
                channel.exec_command(self._command(verb))
                if self._password:
                    channel.sendall(self._password.encode() + b"\n")
                channel.sendall(request)
                for block in blocks:
                    channel.sendall(block)
                channel.shutdown_write()
            except (OSError, SSHException) as error:
                if not channel.exit_status_ready():
                    raise self._lost(error) from error
            count = 0
            with channel.makefile("r") as output:
                for line in output:
                    count += 1
                    yield line
            said = channel.makefile_stderr("r").read().decode(errors="replace").strip()
            status = channel.recv_exit_status()
            if status == 99 and attempt == 1:
                self._install()
                continue
            if status == -1:
                raise self._lost(ConnectionError("the connection was closed"))
            if status and not count:
                raise self._refused(status, said)
            return

    def shell(self, command: str, say: Callable[[str], None]) -> str:
        """Run a shell command as the login and return its output; what it says on stderr goes to `say` line by line.

        Raises RemoteError when it fails.
        """
        channel = self._open()
        channel.exec_command(command)
        channel.shutdown_write()
        output: list[bytes] = []
        reader = threading.Thread(target=lambda: output.append(channel.makefile("rb").read()))
        reader.start()
        last = ""
        with channel.makefile_stderr("r") as lines:
            for line in lines:
                last = line.rstrip("\n")
                say(last)
        reader.join()
        status = channel.recv_exit_status()
        if status == -1:
            raise self._lost(ConnectionError("the connection was closed"))
        if status:
            raise RemoteError(
                f"a command on {self._target.name} ended with {status}",
                cause=last,
                hint="read what it said above; the same command goes on from there",
            )
        return b"".join(output).decode(errors="replace")

    def put(self, content: bytes, path: str) -> None:
        """Write a file there, as the login."""
        with self._connection.sftp().open(path, "wb") as file:
            file.set_pipelined(True)
            file.write(content)

    def get(self, path: str, place: Path) -> None:
        """Fetch a file from there."""
        self._connection.sftp().get(path, str(place))

    def _command(self, verb: str) -> str:
        """The shell command that runs the agent, as root where the host's scope needs that.

        The first line of standard input is sudo's password when there is one. Where sudo does not ask for it, it
        is taken away, so that the agent never sees it.
        """
        agent = shlex.join(["python3", "-I", self._file, verb])
        present = f"test -f {self._file} || exit 99"
        if self._target.host.scope == "user":
            return f"{present}; exec {agent}"
        as_root = 'if [ "$(id -u)" = 0 ]; then'
        if not self._password:
            return f"{present}; {as_root} exec {agent}; fi; exec sudo -n {agent}"
        unasked = f"if sudo -n true 2>/dev/null; then read -r _; exec sudo -n {agent}; fi"
        return f"{present}; {as_root} read -r _; exec {agent}; fi; {unasked}; exec sudo -S -p '' {agent}"

    def _open(self) -> Any:
        transport = self._connection.transport
        if transport is None:
            raise self._lost(ConnectionError("there is no connection"))
        return transport.open_session()

    def _install(self) -> None:
        """Put the agent where its hash says."""
        channel = self._open()
        part = f"{self._file}.part"
        folder = os.path.dirname(self._file)  # noqa: PTH120  the other machine's path
        channel.exec_command(f"mkdir -p {folder} && cat > {part} && mv {part} {self._file}")
        channel.sendall(packed_agent())
        channel.shutdown_write()
        if channel.recv_exit_status():
            said = channel.makefile_stderr("r").read().decode(errors="replace").strip()
            raise AgentError(f"the agent could not be written on {self._target.name}", cause=said)

    def _refused(self, status: int, said: str) -> HearthError:
        name = self._target.name
        if "sudo" in said or "password" in said.lower():
            return SudoError(
                f"no root on {name}",
                cause=said.splitlines()[-1],
                hint="run again with --ask-sudo, or allow sudo without a password there",
            )
        if status in (126, 127):
            return AgentError(f"{name} has no python3", cause=said, hint="apt-get install python3 there")
        return AgentError(f"the agent on {name} ended with {status}", cause=said[-2000:])

    def _lost(self, error: Exception) -> ConnectError:
        return ConnectError(
            f"the connection to {self._target.name} was lost",
            cause=str(error),
            hint=f"what was begun goes on there: inv attach --host {self._target.name}",
        )


@contextmanager
def connect(target: Target, ask_sudo: bool = False, seconds: int = 15) -> Iterator[Agent]:
    """The agent of a host, for as long as the context lasts; the host must let us in within `seconds`.

    Raises HostKeyError, ConnectError or SudoError.
    """
    if not target.host.address:
        yield Local(target)
        return
    import fabric
    from paramiko import AuthenticationException, BadHostKeyException, RejectPolicy, SSHException

    password = _sudo_password(target) if ask_sudo and target.host.scope == "system" else ""
    config = fabric.Config(runtime_ssh_path=os.environ.get("HEARTH_SSH_CONFIG"))
    host = target.host
    connection = fabric.Connection(
        host.address, user=host.user or None, port=host.ssh_port, config=config, connect_timeout=seconds
    )
    try:
        hop: Any = connection
        while isinstance(hop, fabric.Connection):
            hop.client.set_missing_host_key_policy(RejectPolicy())
            for file in _known_hosts(hop.ssh_config):
                hop.client.load_system_host_keys(str(file))
            hop = hop.gateway
        connection.open()
    except BadHostKeyException as error:
        raise HostKeyError(
            f"the host key of {target.name} ({connection.host}) has CHANGED",
            cause=f"known: {_fingerprint(error.expected_key)}; offered: {_fingerprint(error.key)}. "
            "The machine was set up anew, or someone stands between",
            hint=f"ask whoever runs it, compare with {_scan(connection)}; only when it is right: "
            f"ssh-keygen -R {_known_name(connection)}, then ssh to it once",
        ) from error
    except AuthenticationException as error:
        raise ConnectError(
            f"{target.name} does not let {connection.user} in",
            cause=str(error),
            hint=f"try: ssh -p {connection.port} {connection.user}@{connection.host}",
        ) from error
    except (SSHException, OSError) as error:
        if "not found in known_hosts" in str(error):
            raise HostKeyError(
                f"the host key of {target.name} ({connection.host}) is not known",
                cause="no known_hosts of yours or the system's has it",
                hint=f"compare what {_scan(connection)} shows with the machine's own; then ssh to it once",
            ) from error
        raise ConnectError(
            f"{target.name} cannot be reached ({connection.user}@{connection.host}:{connection.port})",
            cause=str(error) or type(error).__name__,
            hint=f"try: ssh -p {connection.port} {connection.user}@{connection.host}",
        ) from error
    try:
        yield Ssh(target, connection, password)
    finally:
        connection.close()


def _known_hosts(listed: dict[str, Any]) -> list[Path]:
    """The known_hosts files that ssh itself would read for a host with this configuration."""
    names = listed.get("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2").split()
    names += listed.get("globalknownhostsfile", "/etc/ssh/ssh_known_hosts").split()
    return [path for path in (Path(name).expanduser() for name in names) if path.is_file()]


def _fingerprint(key: Any) -> str:
    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
    return f"{key.get_name()} SHA256:{digest}"


def _scan(connection: Any) -> str:
    return f"`ssh-keyscan -p {connection.port} {connection.host} | ssh-keygen -lf -`"


def _known_name(connection: Any) -> str:
    return connection.host if connection.port == 22 else f"'[{connection.host}]:{connection.port}'"


def _sudo_password(target: Target) -> str:
    """The sudo password: from the system's keyring when it holds one, else asked for. Kept in memory only."""
    from getpass import getpass

    import keyring

    with suppress(keyring.errors.KeyringError):  # a machine without one
        if found := keyring.get_password("hearth-sudo", target.name):
            return found
    if not sys.stdin.isatty():
        raise SudoError(
            f"no terminal to ask for the sudo password of {target.name} at",
            hint=f"run: keyring set hearth-sudo {target.name}",
        )
    return getpass(f"sudo password on {target.name}: ")
