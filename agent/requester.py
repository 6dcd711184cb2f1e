"""The requester's identity as the host knows it. A client's own claim is only a hint."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
from contextlib import suppress
from pathlib import Path

from agent.files import Json, read_text

UNSET = "4294967295"
"""The loginuid of a process outside any login session (proc(5))."""


SSHD = ("sshd", "sshd-session")
"""Programs that accept and log logins, depending on OpenSSH's version."""


def asker(claim: str) -> Json:
    """Return `who` as text and the fingerprint of the SSH `key` used (empty: unknown). `claim` is the client's name.

    The login is the loginuid, which the kernel protects, else SUDO_UID, else this process's user. The address comes
    from the journal entry of the sshd above this process, else from the environment (SSH_CONNECTION).
    """
    login = _name(read_text(Path("/proc/self/loginuid")).strip())
    login = login or _name(_environment("self").get("SUDO_UID", "")) or _name(str(os.getuid())) or str(os.getuid())
    above = _above()
    for pid in above:
        if found := _let_in(pid, login):
            address, key = found
            return {"who": f"{login} from {address} (says {claim})", "key": key}
    for pid in above:  # sudo drops it; the shell above has it
        if match := re.match(r"[0-9A-Fa-f:.%]+", _environment(pid).get("SSH_CONNECTION", "")):
            return {"who": f"{login}, by its own account from {match[0]} (says {claim})", "key": ""}
    return {"who": f"{login}@{os.uname().nodename}", "key": ""}


def _above() -> list[int]:
    """Return the pids of this process and its ancestors, except pid 1."""
    found, pid = list[int](), os.getpid()
    while pid > 1:
        found.append(pid)
        pid = _parent(pid)
    return found


def _name(number: str) -> str:
    with suppress(KeyError, ValueError, OverflowError):
        return pwd.getpwuid(int(number)).pw_name if number not in ("", UNSET) else ""
    return ""


def _environment(pid: int | str) -> dict[str, str]:
    """Return a process's initial environment; empty if it is not readable."""
    words = read_text(Path(f"/proc/{pid}/environ")).split("\0")
    return dict(word.partition("=")[::2] for word in words)


def _parent(pid: int) -> int:
    fields = read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def _let_in(pid: int, login: str) -> tuple[str, str] | None:
    """Return the address and SSH key with which a process accepted the login; None if it is not sshd.

    Any process can write to the journal under the name sshd. Fields that begin with _ are set by journald and prove
    that the writer was root and which program it ran. Its latest entry counts.
    """
    words = ["journalctl", "--quiet", "--boot", "--reverse", "--lines=50", "--output=json", "_UID=0", f"_PID={pid}"]
    pattern = r"Accepted \S+ for (\S+) from (\S+) port \d+ ssh2(?:: \S+ (SHA256:\S+))?"
    if _name_of_program(pid) not in SSHD:
        return None
    with suppress(OSError, subprocess.SubprocessError, ValueError, TypeError, LookupError):
        log = subprocess.run([*words, "--output-fields=MESSAGE,_EXE"], capture_output=True, timeout=5).stdout
        for line in map(json.loads, log.splitlines()):
            match = re.match(pattern, str(line.get("MESSAGE")))
            if match and match[1] == login and Path(str(line.get("_EXE"))).name in SSHD:
                return match[2], match[3] or ""
    return None


def _name_of_program(pid: int) -> str:
    """Return the program of a root process; empty for other users'. Without root, return its self-reported name."""
    if not re.search(r"^Uid:\t0\t0\t0\t0$", read_text(Path(f"/proc/{pid}/status")), re.MULTILINE):
        return ""
    try:
        return Path(f"/proc/{pid}/exe").readlink().name.removesuffix(" (deleted)")
    except OSError:
        return read_text(Path(f"/proc/{pid}/comm")).strip()
