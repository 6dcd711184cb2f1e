"""Gateways: several people reach ComfyUI over the network, with TLS, logins and limits."""

from __future__ import annotations

from invoke.context import Context  # `command` evaluates annotations

from core import console
from core.command import command
from core.flags import Confirmation, Output, Sudo
from deploy.flags import options


@command(
    positional=["action", "what", "person"],
    optional=["what", "person"],
    help={
        "action": "deploy, rollback, remove, status, users, cert or audit",
        "what": "with users: add, remove or list",
        "person": "the person's name, with users add and users remove",
        "gateway": "a gateway of config/hosts.toml (default: the only one)",
        "token": "with users add: create a token for scripts, and print it; without, ask for a password",
        "lines": "with audit: how many lines (default: 100)",
        "since": "with audit: since when, as journalctl reads it, such as yesterday",
    },
)
def gateway(
    _: Context,
    action: str,
    what: str,
    person: str,
    gateway: str = "",
    token: bool = False,
    lines: str = "100",
    since: str = "",
    *,
    sudo: Sudo,
    how: Confirmation,
    out: Output,
) -> int:
    """Let several people use ComfyUI over the network: HAProxy with TLS, logins, limits and an audit log.

    `[gateways.NAME]` in `config/hosts.toml` lists people, hosts and limits. `deploy` puts it in service; if HAProxy
    does not serve, the previous release does again. `rollback` returns to that, and `remove` deletes everything.
    Passwords are hashed on the host, and a token is shown once. `cert` prints the certificate of the gateway's own
    authority, which people's browsers must trust.
    How: docs/how-to/share-over-the-network.md

        inv gateway deploy --dry-run
        inv gateway users add anna            # asks for the password
        inv gateway users add anna --token    # for scripts: Authorization: Bearer TOKEN
        inv gateway users list
        inv gateway cert > ca.pem
        inv gateway audit --since yesterday
    """
    from gateway import control, people

    if change := {"deploy": control.deploy, "rollback": control.rollback, "remove": control.remove}.get(action):
        from ops import lifecycle

        return lifecycle.show(change(gateway, options(sudo, how)), as_json=out.json, dry_run=how.dry_run)
    if action == "status" or (action, what) == ("users", "list"):
        found = control.status(gateway, ask_sudo=sudo.ask_sudo)
        console.show(found, control.rows(found), as_json=out.json)
        return int(action == "status" and found.state != "in service")
    if action == "audit":
        listed = control.audit(gateway, lines, since, ask_sudo=sudo.ask_sudo)
        console.show(listed, control.audit_rows(listed), as_json=out.json)
        return 0
    people.run(action, what, person, gateway, token=token, ask_sudo=sudo.ask_sudo)
    return 0
