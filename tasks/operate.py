"""Hosts that run: seen, understood and cared for."""

from __future__ import annotations

from typing import Any

from invoke.context import Context  # `command` evaluates annotations

from tasks.command import command
from tasks.flags import Agreed, Change, Fleet, Output, Where


@command(
    help={"watch": "show it again and again, every 2 seconds or as many as given, until Ctrl-C"}, optional=["watch"]
)
def status(_: Context, watch: str = "", *, where: Fleet, out: Output) -> int:
    """Show hosts at a glance; exit code 0 only when all is well."""
    from deploy.host import select
    from ops import status

    names = select(where.host, where.group)
    if watch:
        status.watch(names, watch, ask_sudo=where.ask_sudo)
    return status.show(status.look(names, ask_sudo=where.ask_sudo), as_json=out.json)


@command()
def doctor(_: Context, *, where: Fleet, out: Output) -> int:
    """Look for what is wrong, here or on hosts, and name the command that mends it; 1: warnings, 2: errors."""
    from ops import doctor

    return doctor.show(*doctor.examine(where.host, where.group, ask_sudo=where.ask_sudo), as_json=out.json)


def _change(action: str, where: Fleet, how: Agreed, out: Output, **more: Any) -> int:
    from deploy.plan import Options, options
    from ops import lifecycle

    wishes = options(how.drain, how.force) if isinstance(how, Change) else Options()
    more |= {"dry_run": how.dry_run, "ask_sudo": where.ask_sudo, "ask": not how.yes}
    results = lifecycle.carry_out(action, where.host, where.group, wishes, **more)
    return lifecycle.show(results, as_json=out.json, dry_run=how.dry_run)


@command()
def start(_: Context, *, where: Fleet, how: Agreed, out: Output) -> int:
    """Start ComfyUI, and wait until it answers."""
    return _change("start", where, how, out)


@command()
def stop(_: Context, *, where: Fleet, how: Change, out: Output) -> int:
    """Stop ComfyUI when its jobs are done, until the next boot or `inv start`."""
    return _change("stop", where, how, out)


@command()
def restart(_: Context, *, where: Fleet, how: Change, out: Output) -> int:
    """Stop ComfyUI when its jobs are done, start it again, and wait until it answers."""
    return _change("restart", where, how, out)


@command()
def pause(_: Context, *, where: Fleet, how: Change, out: Output) -> int:
    """Stop ComfyUI until `inv resume`: no boot and no deploy starts it."""
    return _change("pause", where, how, out)


@command()
def resume(_: Context, *, where: Fleet, how: Agreed, out: Output) -> int:
    """Start ComfyUI after a pause, from now on also at boot."""
    return _change("resume", where, how, out)


@command()
def remove(_: Context, *, where: Fleet, how: Change, out: Output) -> int:
    """Take the service away; its releases and data stay, and a deploy brings it back."""
    return _change("remove", where, how, out)


@command(
    help={
        "data": "delete the data, too; the host's name must be typed",
        "yes-delete-data-of": "the host's name, instead of typing it",
    }
)
def nuke(
    _: Context, data: bool = False, yes_delete_data_of: str = "", *, where: Fleet, how: Change, out: Output
) -> int:
    """Delete all of Hearth's on a host but the data, and with --data that too; never what is mounted or linked."""
    return _change("nuke", where, how, out, data=data, yes_delete_data_of=yes_delete_data_of)


@command(
    help={
        "follow": "go on as it grows, until Ctrl-C",
        "lines": "the last lines, so many (default: 100, or all since the time given)",
        "since": "from this time on: '2026-11-23 14:00', 14:00, '10 min ago', yesterday",
        "grep": "only lines that match this regular expression",
    }
)
def logs(
    _: Context,
    follow: bool = False,
    lines: str = "",
    since: str = "",
    grep: str = "",
    *,
    where: Where,
    out: Output,
) -> int:
    """Show ComfyUI's log."""
    from ops import logs

    asked = logs.question(lines, since, grep, follow=follow)
    return logs.show(where.host, asked, ask_sudo=where.ask_sudo, as_json=out.json)


@command(help={"number": "so many of those that are over (default: 20)"})
def jobs(_: Context, number: str = "20", *, where: Where, out: Output) -> None:
    """List ComfyUI's recent jobs, how long they took and why they failed, and those that run and wait."""
    from ops import jobs

    jobs.show(jobs.recent(where.host, number, ask_sudo=where.ask_sudo), as_json=out.json)
