"""Secrets on a real host: who can read them, and where they must not appear."""

from __future__ import annotations

import json

import pytest

from tests.host.fleet import PREFIX, Fleet

pytestmark = pytest.mark.host

VALUE = "correct-horse-battery"
PATTERN = "[c]orrect-horse-battery"
"""The secret as a pattern that does not match itself: the searching process is also a process."""


def test_secret_reaches_only_comfyui(service: Fleet) -> None:
    machine = service.machine
    service.configure('secrets = ["HF_TOKEN"]\n')
    refused = service.deploy()
    assert refused.returncode != 0
    assert "the host has no secret HF_TOKEN" in refused.stderr
    kept = service.inv("secret", "set", "HF_TOKEN", "--host", "spark", "--command", f"echo {VALUE}")
    assert kept.returncode == 0, kept.stderr
    assert json.loads(service.inv("secrets", "--host", "spark", "--json").stdout) == {
        "spark": {"HF_TOKEN": "encrypted"}
    }
    done = service.deploy("--no-trial")
    assert done.returncode == 0, done.stderr
    pid = "$(systemctl show comfyui -p MainPID --value)"
    assert f"HF_TOKEN={VALUE}" in machine.run(f"tr '\\0' '\\n' < /proc/{pid}/environ")
    assert service.deploy("--dry-run").returncode == 0
    # not visible to others: not in systemd, a file, another process or a log
    assert VALUE not in machine.run("systemctl show comfyui; systemctl cat comfyui; journalctl --no-pager")
    found = machine.run(
        f"grep -rls --exclude-dir='env-*' {PATTERN} {PREFIX} /etc /run /var/log /tmp /home 2>/dev/null || true"
    )
    assert found.split() == ["/run/credentials/comfyui.service/HF_TOKEN"]  # readable by root and the service
    others = (
        f"for p in /proc/[0-9]*; do [ $p = /proc/{pid} ] || grep -l {PATTERN} $p/environ $p/cmdline; done 2>/dev/null"
    )
    assert machine.run(f"{others} || true").strip() == ""
    assert machine.run(f"stat -c '%U %a' {PREFIX}/secrets").strip() == "root 700"
    (line,) = (each for each in json.loads(service.inv("history", "--host", "spark", "--json").stdout)
               if "secret" in each["action"])  # fmt: skip
    assert line["action"] == "set secret HF_TOKEN"
    service.becomes()
    gone = service.inv("secret", "remove", "HF_TOKEN", "--host", "spark")
    assert gone.returncode == 0, gone.stderr
    assert machine.run(f"ls -A {PREFIX}/secrets").strip() == ""
    assert "HF_TOKEN" not in machine.run(f"tr '\\0' '\\n' < /proc/{pid}/environ")
