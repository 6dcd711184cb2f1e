"""Outputs: pictures, videos and sounds."""

from __future__ import annotations

from invoke.context import Context  # `command` evaluates annotations

from core.command import command
from core.flags import Output, Sudo


@command(
    positional=["path"],
    iterable=["path"],
    help={
        "path": "a file or folder, repeatable; with --host relative to its output folder, and by default all of it",
        "host": "clean the outputs of this host, instead of files here",
        "apply": "write a clean copy next to each file, NAME.clean.png; without it, only show what would be removed",
        "replace": "with --apply: replace the files instead",
    },
)
def sanitise(
    _: Context,
    path: list[str],
    host: str = "",
    apply: bool = False,
    replace: bool = False,
    *,
    sudo: Sudo,
    out: Output,
) -> int:
    """Remove metadata, such as the workflow, from pictures, videos and sounds. Exit code 1 if a file failed.

    Formats: PNG, JPEG, WebP, MP4, WebM and FLAC; others are listed, and may contain metadata. Pixels and samples stay
    the same. Follows no links. Without `--apply`, shows what would be removed; exit code 2 if there is anything.
    How: docs/how-to/clean-outputs.md

        inv sanitise picture.png clips/
        inv sanitise picture.png --apply               # writes picture.clean.png
        inv sanitise --host spark --apply --replace    # all its outputs
    """
    from core.errors import UsageError
    from ops import sanitise

    if replace and not apply:
        raise UsageError("usage", "--replace requires --apply", hint="without both, nothing is changed")
    if host:
        found = sanitise.on_host(host, path, write=apply, replace=replace, ask_sudo=sudo.ask_sudo)
    else:
        found = sanitise.here(path, write=apply, replace=replace)
    return sanitise.show(found, host, path, as_json=out.json)
