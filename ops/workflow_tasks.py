"""Workflows: what they use and a ComfyUI lacks."""

from __future__ import annotations

from invoke.context import Context  # `command` evaluates annotations

from core import console
from core.command import command
from core.flags import Output, Sudo


@command(
    iterable=["file"],
    help={
        "file": "a workflow, or a picture, video, sound, latent or 3D model with one; a quoted pattern names several; "
        "repeatable",
        "host": "check against the running ComfyUI of this host",
        "to": "list what another version of ComfyUI changes: a version, or a folder with its source",
    },
)
def check(_: Context, file: list[str], host: str = "", to: str = "", *, sudo: Sudo, out: Output) -> int:
    """List what workflows use and a ComfyUI lacks: node types, inputs, outputs and values. Exit code 1 if any breaks.

    Without `--host` and `--to`, checks against the pinned ComfyUI and the known nodes. Without files, checks those in
    `config/workflows/`, and with `--host` also those saved on it. An unreadable file does not stop the others.
    How: docs/how-to/check-workflows.md

        inv workflows.check flux.json '~/pictures/*.png'
        inv workflows.check --host spark                                # those saved on spark
        inv workflows.check --to 0.31.0
    """
    from ops import workflows

    found = workflows.check(file, host, to, ask_sudo=sudo.ask_sudo)
    for each in found.reports:
        if each.error and each.error != str(found.failed):
            console.say(each.error)
    console.show(workflows.summary(found), workflows.rows(found), as_json=out.json)
    if found.failed:
        raise found.failed
    return int(any(each.breaks for each in found.reports))


@command(help={"to": "a version of ComfyUI, or a folder with its source"})
def compare(_: Context, to: str = "", *, out: Output) -> None:
    """List the node types, inputs, values and outputs that another version of ComfyUI removes, adds or changes.

    Both sources are read without being run. What cannot be read, such as an input that is made at run time, is unknown
    and not listed.

        inv workflows.compare --to 0.31.0
    """
    from lock import interface
    from ops import workflows

    found = workflows.compare(to)
    console.show(found, interface.rows(found), as_json=out.json)
