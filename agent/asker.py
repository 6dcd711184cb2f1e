"""Who asks: as the host itself knows it. What a client says of itself is no more than a hint."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from contextlib import suppress
from pathlib import Path

from agent.files import Json, read_text

UNSET = "4294967295"
"""The login of a process that no login started (proc(5), loginuid)."""


def asker(claim: str) -> Json:
    """`who` in words, and the fingerprint of the SSH `key` that let them in (empty: unknown). `claim` is the client's.

    The login is the one that PAM noted, which only the kernel can change, else sudo's word, else this process's user.
    """
    login = _name(read_text(Path("/proc/self/loginuid")).strip())
    came = ""
    variables = _environment("self")
    pid = os.getpid()
    while pid > 1 and not came:  # sudo does not hand it on: the shell before it has it
        came = _environment(pid).get("SSH_CONNECTION", "")
        pid = _parent(pid)
    login = login or _name(variables.get("SUDO_UID", "")) or _name(str(os.getuid())) or str(os.getuid())
    if not came:
        return {"who": f"{login}@{os.uname().nodename}", "key": ""}
    address, port, *_ = [*re.findall(r"[0-9A-Fa-f:.%]+", came), "?", "?"]
    return {"who": f"{login} from {address} (says {claim})", "key": _key(port)}


def _name(number: str) -> str:
    with suppress(KeyError, ValueError, OverflowError):
        return pwd.getpwuid(int(number)).pw_name if number not in ("", UNSET) else ""
    return ""


def _environment(pid: int | str) -> dict[str, str]:
    """The variables that a process was started with, as far as this one may see them."""
    words = read_text(Path(f"/proc/{pid}/environ")).split("\0")
    return dict(word.partition("=")[::2] for word in words)


def _parent(pid: int) -> int:
    fields = read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def _key(port: str) -> str:
    """The key that sshd let a connection in by, from its log; empty where that cannot be read, or was a password."""
    words = ["journalctl", "--quiet", "--output=cat", "--boot", "--lines=5000", "_COMM=sshd", "+", "_COMM=sshd-session"]
    with suppress(OSError, subprocess.SubprocessError):
        log = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=5).stdout
        pattern = rf"Accepted publickey for \S+ from \S+ port {re.escape(port)} ssh2: \S+ (SHA256:\S+)"
        return str((re.findall(pattern, log) or [""])[-1])
    return ""
