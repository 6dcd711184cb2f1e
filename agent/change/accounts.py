"""Steps that change users, groups and their permissions."""

from __future__ import annotations

import grp
import pwd
import subprocess
from contextlib import suppress

from agent.files import Note, discard, write
from agent.layout import Layout
from agent.look.accounts import sudoers
from agent.processes import run
from agent.schema.change import Account, Linger, Members, Rights


def account(layout: Layout, step: Account, note: Note) -> None:
    """Create the system users of the units, each with its group, and the members' group. Raises AgentError."""
    run(["groupadd", "--force", "--system", layout.group])
    for user in filter(None, (layout.user, layout.exporter)):
        with suppress(KeyError):
            pwd.getpwnam(user)
            note(f"user {user} exists")
            continue
        home = str(layout.data) if user == layout.user else "/nonexistent"
        run(["useradd", "--system", "--user-group", "--home-dir", home, "--shell", "/usr/sbin/nologin", user])


def members(layout: Layout, step: Members, note: Note) -> None:
    """Set the members' group to exactly the step's users; remove all members from the service's own group."""
    run(["groupadd", "--force", "--system", layout.group])
    run(["gpasswd", "--members", ",".join(step.members), layout.group])
    with suppress(KeyError):
        if grp.getgrnam(layout.user).gr_mem:
            run(["gpasswd", "--members", "", layout.user])


def rights(layout: Layout, step: Rights, note: Note) -> None:
    """Write the sudoers file for members. Check it first: an invalid file would disable sudo. Raises AgentError."""
    place = sudoers(layout)
    if not step.text:
        discard(place)
        return
    draft = layout.state / "sudoers"
    write(draft, step.text, 0o440)
    run(["visudo", "--check", "--strict", f"--file={draft}"])
    draft.unlink()
    write(place, step.text, 0o440)


def linger(layout: Layout, step: Linger, note: Note) -> None:
    """Enable lingering, so that the user's systemd runs from boot on. If refused, Hearth's supervisor is used."""
    write(layout.lingered, "")
    done = subprocess.run(["loginctl", "enable-linger"], capture_output=True, text=True)
    if done.returncode:
        discard(layout.lingered)
        note(f"loginctl enable-linger: {done.stderr.strip()}; Hearth's own supervisor runs ComfyUI instead")
