"""Hosts that run: seen, understood and cared for."""

from __future__ import annotations

from invoke.context import Context  # `command` evaluates annotations

from tasks.command import command
from tasks.flags import Fleet, Output


@command(
    help={"watch": "show it again and again, every 2 seconds or as many as given, until Ctrl-C"}, optional=["watch"]
)
def status(_: Context, watch: str = "", *, where: Fleet, out: Output) -> int:
    """Show hosts at a glance; exit code 0 only when all is well.

    All hosts of a group are asked at once.

        inv status --host spark
        inv status --group home --watch     # again and again, until Ctrl-C
        inv status --group home --watch 10
    """
    from deploy.host import select
    from ops import status

    names = select(where.host, where.group)
    if watch:
        status.watch(names, watch, ask_sudo=where.ask_sudo)
    return status.show(status.look(names, ask_sudo=where.ask_sudo), as_json=out.json)


@command()
def doctor(_: Context, *, where: Fleet, out: Output) -> int:
    """Look for what is wrong, here or on hosts, and name the command that mends it; 1: warnings, 2: errors.

    Without `--host` and `--group`: where kernels are built, and the ComfyUI of this machine where there is one. A host
    that cannot be reached is a finding, too.

        inv doctor                # here
        inv doctor --host spark
    """
    from ops import doctor

    return doctor.show(*doctor.examine(where.host, where.group, ask_sudo=where.ask_sudo), as_json=out.json)
