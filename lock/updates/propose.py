"""Proposes an update as a git branch with a report, for a timer or CI; the checkout's files and hosts do not change."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from core import files, shell, tools, workspace
from core.errors import HearthError, RefusedError, UsageError
from lock import application
from lock.updates import node_updates, transaction, update
from lock.updates import report as reports
from lock.updates.report import Report, Trial

if TYPE_CHECKING:
    from collections.abc import Callable

    from lock.updates.proposal import Proposal, Request
    from lock.updates.transaction import Record
    from lock.updates.update import Look

MARK = "Hearth-Proposal"
"""The line of a commit's message with the tree that was proposed: an edited proposal has another one."""


def propose(
    wanted: Request, output: Path, look: Look, trial: Callable[[], Trial] | None = None, host: str = ""
) -> tuple[Report, HearthError | None]:
    """Write an update as a branch, and a report and a patch to a folder; returns the error of the trial or an upstream.

    `trial` tries the release of the current workspace on the `host`. If nothing is newer, there is no branch. A branch
    of an earlier proposal that nobody edited is replaced. Raises RefusedError for uncommitted changes and for a branch
    that is not Hearth's, and the errors of `update.proposed`; then nothing is written.
    """
    base = _base()
    with transaction.changing():
        made, record, failed = update.proposed(wanted, look)
    if _base() != base:
        raise RefusedError("refused", "the checkout's commit changed meanwhile", hint="run inv update --propose again")
    error: HearthError | None = node_updates.together(failed) if failed else None
    branch = _branch(wanted, made) if record.changes else ""
    tree = _tree(base, record) if branch else ""
    before = _replaceable(branch, tree) if branch else ""
    tried: Trial | None = None
    if branch and trial:
        try:
            with transaction.applied(record):
                tried = trial()
        except HearthError as caught:
            error, tried = caught, Trial(host=host, error=str(caught), kind=caught.kind)
    why = {name: str(getattr(each, "what", each)) for name, each in failed.items()}
    summary = reports.summary(made, tried, why)
    commit = _committed(branch, tree, base, before, summary) if branch else ""
    report = Report(
        summary=summary, branch=branch, commit=commit, base=base, changed=commit != before,
        proposal=made, trial=tried, failures=why,
    )  # fmt: skip
    _write(output, report)
    return report, error


def folder(output: str) -> Path:
    """The folder of the report: the given one, or one that git ignores."""
    return Path(output).absolute() if output else workspace.current().checkout / ".update/proposal"


def _write(output: Path, report: Report) -> None:
    patch = _git("format-patch", "--stdout", "--no-signature", "-1", report.commit).stdout if report.commit else ""
    files.write(output / "update.patch", patch)
    files.write(output / "REPORT.md", reports.markdown(report))
    files.write(output / "report.json", msgspec.json.format(msgspec.json.encode(report), indent=2))


def _branch(wanted: Request, made: Proposal) -> str:
    """The name of the branch: one for each version of ComfyUI, and for each part without a new one."""
    channel = f"{wanted.channel}-" if wanted.channel else ""
    comfyui = next((each.new for each in made.moves if each.part == "comfyui"), "")
    return f"update/comfyui-{channel}{comfyui}" if comfyui else f"update/{wanted.part}"


# --- git --------------------------------------------------------------------------------------------------------------


def _git(*words: str, check: bool = True, env: dict[str, str] | None = None, text: str | None = None) -> shell.Done:
    here = workspace.current().checkout
    return tools.git(*words, cwd=here, check=check, env=env, input_text=text)


def _base() -> str:
    """The commit of the checkout; raises UsageError if it has none, and RefusedError if files differ from it."""
    if application.folder() != workspace.current().checkout / "recipes/comfyui":
        raise UsageError("usage", "--propose is for the ComfyUI of this checkout", hint="unset HEARTH_APP")
    found = _git("rev-parse", "--verify", "--quiet", "HEAD^{commit}", check=False)
    if found.returncode:
        here = workspace.current().checkout
        raise UsageError(
            "usage",
            f"{here} is not a git repository with a commit",
            cause=shell.last_words(found),
            hint="make it one, or use inv update without --propose",
        )
    if edited := _git("status", "--porcelain", "--untracked-files=no", "--", ".").stdout.rstrip():
        raise RefusedError(
            "refused",
            "the checkout has uncommitted changes; nothing was proposed",
            cause=edited,
            hint="commit them, or put them aside with git stash",
        )
    return found.stdout.strip()


def _tree(base: str, record: Record) -> str:
    """The tree of a commit with a change of files, made without touching the checkout or its index."""
    here, lines = workspace.current().checkout, list[str]()
    prefix = _git("rev-parse", "--show-prefix").stdout.strip()
    for path, change in record.changes.items():
        name = f"{prefix}{Path(path).relative_to(here)}"
        if change.new is None:
            lines.append(f"0 {'0' * 40}\t{name}\0")
        else:
            blob = _git("hash-object", "-w", "--stdin", text=change.new).stdout.strip()
            lines.append(f"100644 {blob}\t{name}\0")
    with tempfile.TemporaryDirectory(prefix="hearth-") as place:
        index = {"GIT_INDEX_FILE": f"{place}/index"}
        _git("read-tree", base, env=index)
        _git("update-index", "-z", "--index-info", env=index, text="".join(lines))
        return _git("write-tree", env=index).stdout.strip()


def _replaceable(branch: str, tree: str) -> str:
    """The commit of a branch that may be replaced; empty if there is no branch. Raises RefusedError."""
    first = branch.partition("/")[0]
    names = _git("for-each-ref", "--format=%(refname:lstrip=2)", f"refs/heads/{first}").stdout.splitlines()
    if other := next((each for each in names if each == first or each.startswith(f"{branch}/")), ""):
        hint = f"rename it: git branch -m {other} NAME"
        raise RefusedError("refused", f"git cannot have the branch {branch} beside the branch {other}", hint=hint)
    form = "%(objectname) %(tree) %(worktreepath)%0a%(contents)"
    found = _git("for-each-ref", f"--format={form}", f"refs/heads/{branch}").stdout
    if not found:
        return ""
    first, _, message = found.partition("\n")
    commit, old, *place = first.split(" ", 2)
    mark = re.search(rf"^{MARK}: ([0-9a-f]+)$", message, re.MULTILINE)
    if not (mark and mark[1] == old):
        what, cause = f"the branch {branch} is not an unedited proposal", "somebody made or changed it"
    elif any(place) and old != tree:
        what, cause = f"the branch {branch} is checked out", f"in {place[0]}"
    else:
        return commit
    raise RefusedError(
        "refused", f"{what}; it was left as it is", cause=cause, hint=f"merge it, or: git branch -D {branch}"
    )


def _committed(branch: str, tree: str, base: str, before: str, summary: str) -> str:
    """Point a branch to a commit of this tree, in one step; returns the existing commit if it is the same."""
    if before and _git("rev-parse", f"{before}^{{tree}}", f"{before}^").stdout.split() == [tree, base]:
        return before
    words = ("commit-tree", tree, "-p", base, "-F", "-")
    commit = _git(*words, text=f"{summary}\n\n{MARK}: {tree}\n").stdout.strip()
    _git("update-ref", "-m", "inv update --propose", f"refs/heads/{branch}", commit, before or "0" * 40)
    return commit


def rows(made: Report, output: Path) -> list[str]:
    """The summary, and where the branch and the report are."""
    where = [f"branch {made.branch}: {'written' if made.changed else 'unchanged'}"] if made.branch else []
    return [made.summary, *where, f"report: {output / 'REPORT.md'}"]
