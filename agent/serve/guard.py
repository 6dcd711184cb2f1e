"""The firewall of a gateway's host: at its loopback address, few users reach the ComfyUIs behind the gateway."""

from __future__ import annotations

import pwd
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress

from agent.layout import Layout

NFT = "/usr/sbin/nft"
DYNAMIC = "61184-65519"
"""The uids that systemd gives to units with DynamicUser=, such as the one that has ComfyUI free its memory."""


def rules(layout: Layout, access: Mapping[str, Iterable[str]]) -> str:
    """Return the nftables rules that let root, services with DynamicUser= and the named users reach each port.

    Users that do not exist (yet) are left out.
    """
    table = f"inet {layout.service}-gateway"
    lines = [f"table {table}", f"delete table {table}", f"table {table} {{", "    chain output {"]
    lines.append("        type filter hook output priority -150;")  # before a container's port is translated
    for port, names in sorted(access.items()):
        uids = ["0", *(str(uid) for uid in sorted({*_uids(names)})), DYNAMIC]
        lines.append(
            f'        oifname "lo" tcp dport {int(port)} meta skuid != {{ {", ".join(uids)} }} reject with tcp reset'
        )
    return "\n".join([*lines, "    }", "}", ""])


def _uids(names: Iterable[str]) -> Iterable[int]:
    for name in names:
        with suppress(KeyError):
            yield pwd.getpwnam(name).pw_uid


def loaded(layout: Layout) -> bool:
    """Return whether the kernel has the rules. Others may delete them: nftables.service flushes all when it starts."""
    return _succeeds([NFT, "list", "table", "inet", f"{layout.service}-gateway"])


def remove(layout: Layout) -> None:
    """Remove the rules, if there are any. An agent that changes hosts may not do that itself."""
    words = ["systemd-run", "--quiet", "--wait", "--collect", NFT]
    _succeeds([*words, "delete", "table", "inet", f"{layout.service}-gateway"])


def _succeeds(words: list[str]) -> bool:
    with suppress(OSError):
        return subprocess.run(words, capture_output=True).returncode == 0
    return False
