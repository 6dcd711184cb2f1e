"""Who made a request: the host's record of the login counts, and a process's own claims do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent import requester

ACCEPTED = "Accepted publickey for {login} from {address} port 4711 ssh2: ED25519 SHA256:{key}"
KNOWN = ("192.0.2.7", "SHA256:mine")


def line(login: str = "anna", address: str = "192.0.2.7", key: str = "mine", **fields: Any) -> str:
    message = ACCEPTED.format(login=login, address=address, key=key)
    return json.dumps({"MESSAGE": message, "_EXE": "/usr/sbin/sshd", **fields})


@pytest.mark.parametrize(("lines", "found"), [
    ([line()], KNOWN),
    ([line(_EXE="/usr/lib/openssh/sshd-session")], KNOWN),
    ([line(MESSAGE="pam_unix(sshd:session): session opened"), line()], KNOWN),
    ([line(), line(key="older")], KNOWN),  # the journal is read newest first
    ([line(MESSAGE="Accepted password for anna from 192.0.2.7 port 4711 ssh2")], ("192.0.2.7", "")),
    # any program can claim that, also one that root runs for somebody (sudo, su, logger)
    ([line(_EXE="/usr/bin/sudo", SYSLOG_IDENTIFIER="sshd", _COMM="sshd"), line(key="other", login="bob")], None),
    ([line(_EXE=None)], None),
    ([line(login="bob")], None),
    # sshd logs a user name as the client sent it, and journald returns binary text as numbers
    ([line(MESSAGE="Invalid user " + ACCEPTED.format(login="anna", address="::1", key="x"))], None),
    ([line(MESSAGE=[65, 255])], None),
    (["no JSON", line()], None),
    ([], None),
])  # fmt: skip
def test_requester_comes_from_sshds_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: list[str], found: tuple[str, str] | None
) -> None:
    (tmp_path / "said").write_text("".join(f"{each}\n" for each in lines))
    program = tmp_path / "journalctl"
    program.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\ncat {tmp_path}/said\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(requester, "_name_of_program", {7: "sshd"}.get)
    assert requester._let_in(7, "anna") == found
    asked = (tmp_path / "asked").read_text().split()
    assert {"_UID=0", "_PID=7", "--reverse", "--lines=50", "--boot"} <= {*asked}
    assert not [each for each in asked if "=" in each and each[0] not in "-_"]
    assert requester._let_in(8, "anna") is None  # no sshd


def test_process_named_sshd_is_not_trusted() -> None:
    code = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'sshd'); print(flush=True); time.sleep(60)"
    lower = ["setpriv", "--reuid=65534", "--clear-groups"] if os.getuid() == 0 else []
    with subprocess.Popen([*lower, "/usr/bin/python3", "-ISc", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert requester._name_of_program(process.pid) == ""
        process.kill()


def test_address_without_sshd_log_is_marked_as_claimed() -> None:
    code = "from agent.requester import asker; print(asker('anna@laptop'))"
    env = {"SSH_CONNECTION": "192.0.2.7 4711 192.0.2.1 22", "PYTHONPATH": "."}
    words = [os.path.realpath(sys.executable), "-S", "-c", code]
    said = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout
    assert "by its own account from 192.0.2.7 (says anna@laptop)" in said
