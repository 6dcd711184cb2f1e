"""Who asks: as the host itself knows it. What a client says of itself is no more than a hint."""

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
"""The login of a process that no login started (proc(5), loginuid)."""


SSHD = ("sshd", "sshd-session")
"""The programs that let logins in and note it; which of them does depends on OpenSSH's version."""


def asker(claim: str) -> Json:
    """`who` in words, and the fingerprint of the SSH `key` that let them in (empty: unknown). `claim` is the client's.

    The login is the one that PAM noted, which only the kernel can change, else sudo's word, else this process's user.
    Where it came from is what the sshd above this process noted in the journal, else what its own variables say.
    """
    login = _name(read_text(Path("/proc/self/loginuid")).strip())
    login = login or _name(_environment("self").get("SUDO_UID", "")) or _name(str(os.getuid())) or str(os.getuid())
    above = _above()
    for pid in above:
        if found := _let_in(pid, login):
            address, key = found
            return {"who": f"{login} from {address} (says {claim})", "key": key}
    for pid in above:  # sudo does not hand it on: the shell before it has it
        if said := re.match(r"[0-9A-Fa-f:.%]+", _environment(pid).get("SSH_CONNECTION", "")):
            return {"who": f"{login}, by its own account from {said[0]} (says {claim})", "key": ""}
    return {"who": f"{login}@{os.uname().nodename}", "key": ""}


def _above() -> list[int]:
    """This process and those that it comes from; not the system's first."""
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
    """The variables that a process was started with, as far as this one may see them."""
    words = read_text(Path(f"/proc/{pid}/environ")).split("\0")
    return dict(word.partition("=")[::2] for word in words)


def _parent(pid: int) -> int:
    fields = read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def _let_in(pid: int, login: str) -> tuple[str, str] | None:
    """The address, and the key if it was one, that a process let the login in by: None where that was not sshd's.

    Any process can write to the journal, call itself sshd and name itself so. Fields that begin with _ are journald's
    own: that the writer was root, and which program it ran. Of that process, the newest word counts.
    """
    words = ["journalctl", "--quiet", "--boot", "--reverse", "--lines=50", "--output=json", "_UID=0", f"_PID={pid}"]
    pattern = r"Accepted \S+ for (\S+) from (\S+) port \d+ ssh2(?:: \S+ (SHA256:\S+))?"
    if _name_of_program(pid) not in SSHD:
        return None
    with suppress(OSError, subprocess.SubprocessError, ValueError, TypeError, LookupError):
        log = subprocess.run([*words, "--output-fields=MESSAGE,_EXE"], capture_output=True, timeout=5).stdout
        for line in map(json.loads, log.splitlines()):
            said = re.match(pattern, str(line.get("MESSAGE")))
            if said and said[1] == login and Path(str(line.get("_EXE"))).name in SSHD:
                return said[2], said[3] or ""
    return None


def _name_of_program(pid: int) -> str:
    """What a process of root's runs; empty for another's. Without root nobody may look, and its own word is taken."""
    if not re.search(r"^Uid:\t0\t0\t0\t0$", read_text(Path(f"/proc/{pid}/status")), re.MULTILINE):
        return ""
    try:
        return Path(f"/proc/{pid}/exe").readlink().name.removesuffix(" (deleted)")
    except OSError:
        return read_text(Path(f"/proc/{pid}/comm")).strip()
