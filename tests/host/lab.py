"""A separate sshd on loopback with its own login, to test every SSH configuration."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.client import Client
from tests.host.machine import free_port

NEEDS = ("root", "ssh", "ssh-keygen", "sshd", "sudo", "fish", "tcsh", "zsh")
"""The requirements of tests with a Lab, as arguments of the mark `needs`."""


@dataclass
class Lab(Client):
    """The login, its sshd, and a client's configuration: the hosts `box` (scope user) and `rooted` (system)."""

    place: Path
    login: str = field(default_factory=lambda: f"hearth{os.getpid()}")
    password: str = "open-sesame"
    port: int = field(default_factory=free_port)
    server: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        return Path("/home") / self.login

    def variables(self) -> dict[str, str]:
        return {"HEARTH_HOSTS": str(self.place / "hosts.toml"), "HEARTH_SSH_CONFIG": str(self.place / "config")}

    def prepare(self) -> None:
        """Create the login, the keys, and the configuration of sshd and client."""
        self.place.chmod(0o755)
        # A user id that no login of a booted host has: their processes are visible here, and `processes` must find
        # only ours.
        number = ["--key", "UID_MIN=30000", "--key", "UID_MAX=39999"]
        subprocess.run(["useradd", *number, "--create-home", "--shell", "/bin/bash", self.login], check=True)
        for each in self.home.iterdir():  # the skeleton's files; tests write these themselves
            each.unlink()
        line = f"{self.login}:{self.password}"  # sshd refuses logins with a locked password
        subprocess.run(["chpasswd"], input=line, text=True, check=True)
        for key in ("client", "host", "other", "ca"):
            self.make_key(key)
        ssh = self.home / ".ssh"
        ssh.mkdir()
        shutil.copy(self.place / "client.pub", ssh / "authorized_keys")
        subprocess.run(["chown", "-R", f"{self.login}:", str(ssh)], check=True)
        self.know(self.public("host"))
        self.configure()
        text = "".join(
            f'[hosts.{name}]\naddress = "lab"\nprofile = "cpu"\nscope = "{scope}"\n'
            for name, scope in (("box", "user"), ("rooted", "system"))
        )
        (self.place / "hosts.toml").write_text(text)

    def make_key(self, name: str) -> None:
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(self.place / name)]
        subprocess.run(words, check=True)

    def public(self, name: str) -> str:
        return " ".join((self.place / f"{name}.pub").read_text().split()[:2])

    def know(self, key: str, more: str = "", name: str = "") -> None:
        """Write known_hosts: this key of the host, followed by more lines."""
        (self.place / "known_hosts").write_text(f"{name or f'[127.0.0.1]:{self.port}'} {key}\n{more}")

    def configure(self, text: str = "", *, own: str = "", first: str = "", key: str = "client") -> None:
        """Write the client's configuration: `first`, the host `lab` with its `own` options, then `text`."""
        identity = f"  IdentityFile {self.place}/{key}\n  IdentitiesOnly yes\n" if key else ""
        (self.place / "config").write_text(
            f"{first}Host lab\n{own}  HostName 127.0.0.1\n  Port {self.port}\n  User {self.login}\n{identity}"
            f"  UserKnownHostsFile {self.place}/known_hosts\n  GlobalKnownHostsFile /dev/null\n{text}"
        )

    def serve(self, text: str = "") -> None:
        """(Re)start sshd, with more options."""
        self.stop()
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        (self.place / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {self.place}/host\nPidFile none\nUsePAM no\n"
            f"StrictModes no\nMaxAuthTries 3\nUseDNS no\n{text}"
        )
        words = ["/usr/sbin/sshd", "-D", "-e", "-f", str(self.place / "sshd_config")]
        with (self.place / "sshd.log").open("ab") as log:
            self.server = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as client:
                if client.recv(4) == b"SSH-":
                    return
            time.sleep(0.05)
        raise RuntimeError((self.place / "sshd.log").read_text())

    def stop(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.wait()
            self.server = None

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        """Write a file in the login's home, owned by it."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        subprocess.run(["chown", "-R", f"{self.login}:", str(self.home / name.partition("/")[0])], check=True)
        return path

    def use_shell(self, path: str) -> None:
        subprocess.run(["usermod", "--shell", path, self.login], check=True)

    def processes(self, word: str) -> list[int]:
        """The processes of the login whose command line contains this word."""
        found, number = [], pwd.getpwnam(self.login).pw_uid
        for each in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if each.stat().st_uid == number and word.encode() in (each / "cmdline").read_bytes():
                    found.append(int(each.name))
        return found

    def discard(self) -> None:
        self.stop()
        with suppress(KeyError):  # the login does not exist
            for each in self.processes(""):
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        Path(f"/etc/sudoers.d/{self.login}").unlink(missing_ok=True)
        time.sleep(0.1)
        subprocess.run(["userdel", "--remove", "--force", self.login], check=False, capture_output=True)


@contextmanager
def lab(place: Path) -> Iterator[Lab]:
    """A running sshd; the login and all its files are removed afterwards."""
    one = Lab(place)
    try:
        one.prepare()
        one.serve()
        yield one
    finally:
        one.discard()
