"""The trial of a proposed update on a host: that of a deploy, which ends before the cut-over."""

from __future__ import annotations

from dataclasses import replace

from deploy import proofs
from deploy.deploy import deploy
from deploy.plan import Options
from lock.updates.report import Trial


def attempt(name: str, *, ask_sudo: bool) -> Trial:
    """Try the current workspace's release on a host; raises the errors of a deploy. Nothing is put in service."""
    options = Options(ask_sudo=ask_sudo, trial="only")
    expected = deploy(name, replace(options, dry_run=True))
    if expected.base == expected.release:
        return Trial(host=name, tried=False, preview=expected.preview)
    done = deploy(name, options)
    return Trial(host=name, preview=expected.preview, times=proofs.times(done.notes), notes=done.notes)
