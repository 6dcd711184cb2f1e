"""`inv update --propose`: a branch and a report from a checkout that stays as it is, with real git."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from core.errors import GateError, HearthError
from deploy import proofs, trial
from deploy.change import Outcome
from deploy.plan import Options
from docs.generate import contexts
from lock import interface, workflows
from lock.application import application
from lock.preview import COMFYUI, Preview, Release
from lock.updates import propose, report
from lock.updates.proposal import Move, Proposal, Request
from lock.updates.report import Report, Trial
from tests.errors import raises
from tests.upstream import OLD, Checkout, Repository

pytestmark = pytest.mark.installer

CODE = Path(__file__).resolve().parents[2]
BRANCH = "update/comfyui-0.31.0"


def look(old: Release, new: Release) -> Preview:
    return Preview(
        old=old.version,
        new=new.version,
        types={COMFYUI: (interface.Change("Gone", "removed"), interface.Change("Used", "removed"))},
        workflows=(
            workflows.Report("a.json"),
            workflows.Report("b.json", (workflows.Finding("1", "Used", "type"),)),
            workflows.Report("c.json", error="it is empty"),
        ),
    )


FACTS = "1 of 2 workflows pass, 1 workflow cannot be read, 1 unused node type removed"


@dataclass
class Mine:
    """A checkout in git, with a newer ComfyUI upstream."""

    upstream: Checkout
    output: Path

    def git(self, *words: str, cwd: Path | None = None) -> str:
        argv = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        done = subprocess.run(argv, cwd=cwd or self.upstream.root, check=True, capture_output=True, text=True)
        return done.stdout.rstrip("\n")

    def state(self) -> tuple[object, ...]:
        """All that a proposal must not change."""
        head, status = self.git("symbolic-ref", "HEAD"), self.git("status", "--porcelain", "--untracked-files=all")
        return self.upstream.texts(), head, self.git("rev-parse", "HEAD"), status, self.git("stash", "list")

    def branches(self) -> list[str]:
        return self.git("for-each-ref", "--format=%(refname:short)", "refs/heads/update").split()

    def propose(
        self, part: str = "comfyui", to: str = "", trial: Callable[[], Trial] | None = None
    ) -> tuple[Report, HearthError | None]:
        return propose.propose(Request(part, to), self.output, look, trial, "spark")

    def read(self) -> Any:
        return json.loads((self.output / "report.json").read_text())


@pytest.fixture
def mine(own: Checkout, monkeypatch: pytest.MonkeyPatch) -> Mine:
    made = Mine(own, own.place / "output")
    for name in ("AUTHOR", "COMMITTER"):  # git's own variables do not reach it
        monkeypatch.delenv(f"GIT_{name}_NAME", raising=False)
    made.git("init", "--quiet", "--initial-branch=main")
    for key in ("name", "email"):
        made.git("config", f"user.{key}", "tester")
    own.file(".gitignore").write_text("/.update/\n")
    made.git("add", "-A")
    made.git("commit", "--quiet", "-m", "first")
    return made


@pytest.fixture
def newer(mine: Mine) -> Mine:
    mine.upstream.tag("0.31.0", requirements__txt="six==2\n")
    return mine


def test_a_proposal_is_a_branch_and_changes_nothing_else(newer: Mine) -> None:
    before, base = newer.state(), newer.git("rev-parse", "HEAD")
    made, error = newer.propose()
    assert (made.branch, made.base, made.changed, error) == (BRANCH, base, True, None)
    assert newer.state() == before
    assert newer.branches() == [BRANCH]
    assert newer.git("rev-parse", BRANCH, f"{BRANCH}^").split() == [made.commit, base]
    assert newer.git("diff", "--name-only", base, BRANCH).split() == sorted(made.proposal.files)
    assert newer.git("log", "-1", "--format=%s", BRANCH) == f"ComfyUI 0.31.0: {FACTS}" == made.summary
    kept = newer.read()
    assert (kept["branch"], kept["commit"], kept["trial"]) == (BRANCH, made.commit, None)
    assert kept["proposal"]["moves"][0]["new"] == "0.31.0"
    assert made.summary in (newer.output / "REPORT.md").read_text()
    newer.git("apply", "--check", str(newer.output / "update.patch"))

    again, _ = newer.propose()
    assert (again.commit, again.changed) == (made.commit, False)
    assert {**newer.read(), "changed": True} == kept
    assert newer.git("reflog", BRANCH).count("\n") == 0  # one entry

    newer.git("merge", "--quiet", "--ff-only", BRANCH)
    assert application().version == "0.31.0"
    before = newer.state()
    done, error = newer.propose()
    assert (done.summary, done.branch, done.changed, error) == ("nothing is newer", "", False, None)
    assert newer.state() == before
    assert newer.read()["branch"] == ""
    assert (newer.output / "update.patch").read_text() == ""


def test_nothing_newer_makes_no_branch(mine: Mine) -> None:
    before = mine.state()
    made, error = mine.propose()
    assert (made.branch, made.commit, made.proposal.moves, error) == ("", "", [], None)
    assert (mine.state(), mine.branches()) == (before, [])
    assert mine.propose(to="0.30.0")[0].branch == ""


def test_a_checkout_in_a_subfolder_of_a_repository(newer: Mine) -> None:
    root = newer.upstream.root
    shutil.rmtree(root / ".git")
    for words in (["init", "--quiet"], ["config", "user.name", "a"], ["config", "user.email", "b"],
                  ["add", "-A", "checkout"], ["commit", "--quiet", "-m", "first"]):  # fmt: skip
        newer.git(*words, cwd=root.parent)
    made, _ = newer.propose()
    changed = newer.git("diff", "--name-only", made.base, made.commit, cwd=root.parent).split()
    assert changed == sorted(f"checkout/{each}" for each in made.proposal.files)


def test_what_cannot_be_a_proposal_is_refused(newer: Mine, monkeypatch: pytest.MonkeyPatch) -> None:
    path = newer.upstream.file("config/stacks.toml")
    path.write_text(path.read_text() + "# mine\n")
    before = newer.state()
    with raises("refused") as raised:
        newer.propose()
    assert "config/stacks.toml" in raised.value.cause
    newer.git("add", "-A")  # staged edits count, too
    with raises("refused"):
        newer.propose()
    newer.git("reset", "--quiet")
    assert newer.state() == before
    newer.git("checkout", "--quiet", "config/stacks.toml")
    with monkeypatch.context() as patch:
        patch.setenv("HEARTH_APP", str(newer.output))
        with raises("usage"):
            newer.propose()
    shutil.rmtree(newer.upstream.place / "upstream")
    before = newer.state()
    with raises("source-unreachable"):
        newer.propose()
    assert (newer.state(), newer.branches(), newer.output.exists()) == (before, [], False)
    shutil.rmtree(newer.upstream.root / ".git")
    with raises("usage"):
        newer.propose()


def test_only_an_unedited_proposal_is_replaced(newer: Mine) -> None:
    first, _ = newer.propose()
    newer.git("commit", "--quiet", "--allow-empty", "-m", "main moves on")
    moved, _ = newer.propose()
    assert (moved.branch, moved.changed, moved.base) == (BRANCH, True, newer.git("rev-parse", "HEAD"))
    assert moved.commit != first.commit
    work = newer.upstream.place / "work"
    newer.git("worktree", "add", "--quiet", str(work), BRANCH)
    assert newer.propose()[0].changed is False  # the same content in use elsewhere is fine
    newer.upstream.file("config/stacks.toml").write_text(newer.upstream.file("config/stacks.toml").read_text() + "\n")
    newer.git("commit", "--quiet", "-am", "another base")
    with raises("refused", match="checked out"):
        newer.propose()
    (work / "mine").write_text("mine")
    newer.git("add", "mine", cwd=work)
    for words in (["commit", "--quiet", "--amend", "--no-edit"], ["commit", "--quiet", "--allow-empty", "-m", "mine"]):
        newer.git(*words, cwd=work)
        tip = newer.git("rev-parse", BRANCH)
        with raises("refused", match="not an unedited proposal"):
            newer.propose()
        assert newer.git("rev-parse", BRANCH) == tip


@pytest.mark.parametrize("name", [BRANCH, "update", f"{BRANCH}/mine"])
def test_a_branch_of_somebody_else_stays(newer: Mine, name: str) -> None:
    newer.git("branch", name)
    before = newer.state()
    with raises("refused"):
        newer.propose()
    assert newer.git("rev-parse", name) == newer.git("rev-parse", "main")
    assert (newer.state(), newer.output.exists()) == (before, False)


def test_the_trial_runs_with_the_proposed_pins(newer: Mine) -> None:
    before, seen = newer.state(), []

    def passes() -> Trial:
        seen.append((application().version, application().path.is_relative_to(newer.upstream.root)))
        return Trial(host="spark", times={"a": (9.7, 10.0)}, preview=Preview(old="1", new="2"))

    made, error = newer.propose(trial=passes)
    assert (seen, error) == ([("0.31.0", False)], None)
    assert made.summary == "ComfyUI 0.31.0: the trial on spark passed, 3 % faster"
    assert newer.read()["trial"]["times"] == {"a": [9.7, 10.0]}
    assert newer.state() == before

    def fails() -> Trial:
        raise GateError("unhealthy", "it does not start")

    failed, error = newer.propose(trial=fails)
    assert isinstance(error, GateError)
    assert (failed.branch, failed.commit, failed.changed) == (BRANCH, made.commit, False)
    assert newer.read()["trial"]["kind"] == "unhealthy"
    assert failed.summary.endswith("the trial on spark failed")
    assert "it does not start" in (newer.output / "REPORT.md").read_text()
    assert newer.state() == before


def test_a_dead_node_does_not_hold_up_the_others(mine: Mine) -> None:
    from lock import resolution
    from lock.updates import node_updates

    git = {name: Repository(mine.upstream.place / name) for name in ("Mine", "Dead")}
    for each in git.values():
        each.commit(OLD, requirements="six")
        node_updates.add(each.url, "a test")
    resolution.compile_all(check=False)
    mine.git("add", "-A")
    mine.git("commit", "--quiet", "-m", "nodes")
    new = git["Mine"].commit(OLD, requirements="six==2")
    shutil.rmtree(git["Dead"].place)
    made, error = mine.propose("nodes")
    assert error is not None
    assert (error.kind, [*made.failures]) == ("source-unreachable", ["Dead"])
    assert (made.branch, [each.new for each in made.proposal.moves]) == ("update/nodes", [new[:9]])
    assert mine.branches() == ["update/nodes"]


KILLED = """
import os, sys
from pathlib import Path
from core import files
files.CHECKOUT = Path(sys.argv[1])
from core import tools
from lock import advisory
advisory._path = lambda: files.CHECKOUT / "recipes/comfyui/known-bad.toml"
from lock.updates import propose, transaction, update
from lock.updates.proposal import Request
from tests.kills import killer
from tests.unit.test_propose import look

with transaction.changing():
    known = update.proposed(Request("comfyui"), look)
update.proposed = lambda *_: known

def killed_at(calls):
    counted = killer(calls)
    tools.git, Path.replace = counted(tools.git), counted(Path.replace)
    propose.propose(Request("comfyui"), Path(sys.argv[2]), look)
    os._exit(0)

for count in range(100):
    child = os.fork() or killed_at(count)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tip = tools.git("rev-parse", "--verify", "--quiet", sys.argv[3], cwd=files.CHECKOUT, check=False).stdout.strip()
    print(status, tip or "-")
    if status != -9:
        break
"""


def test_a_killed_proposal_leaves_the_checkout_and_a_whole_branch_or_none(newer: Mine) -> None:
    before = newer.state()
    words = [sys.executable, "-c", KILLED, str(newer.upstream.root), str(newer.output), BRANCH]
    done = subprocess.run(words, cwd=CODE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = [line.split() for line in done.stdout.splitlines()]
    assert [int(status) for status, _ in runs] == [-signal.SIGKILL] * (len(runs) - 1) + [0]
    tips = [tip for _, tip in runs]
    assert [*dict.fromkeys(tips)] == ["-", tips[-1]]  # none, then the whole one
    assert tips.count("-") < len(tips) - 1  # killed after the branch, too
    assert newer.state() == before
    assert newer.git("diff", "--name-only", "main", BRANCH)
    assert newer.read()["commit"] == tips[-1]


# --- the workflow of GitHub -------------------------------------------------------------------------------------------

WORKFLOW = (CODE / ".github/workflows/update.yml").read_text()
GH = """#!/bin/sh
echo "$*" >> calls
test "$1 $2" != "pr list" || cat open 2> /dev/null || true
"""


def script(name: str) -> str:
    """The shell script of a step."""
    step = WORKFLOW.partition(f"- name: {name}\n")[2].partition("        run: |\n")[2]
    lines = [each[10:] for each in takewhile(lambda each: each.startswith(" " * 10), step.splitlines())]
    return "set -e\n" + "\n".join(lines)


@pytest.mark.needs("jq")
def test_the_workflow_publishes_a_proposal_and_keeps_edited_ones(newer: Mine) -> None:
    place = newer.upstream.place
    (place / "bin").mkdir()
    gh, remote = place / "bin/gh", place / "remote.git"
    gh.write_text(GH)
    gh.chmod(0o755)
    newer.git("init", "--quiet", "--bare", str(remote))
    newer.git("config", f"url.{remote}.insteadOf", "https://x-access-token:secret@github.com/me/mine")
    variables = {"RUNNER_TEMP": str(place), "GITHUB_WORKSPACE": str(newer.upstream.root), "GH_TOKEN": "secret"}
    variables |= {"GH_REPO": "me/mine", "PATH": f"{gh.parent}:{os.environ['PATH']}", "HOME": str(place)}
    newer.output = place / "proposal"

    def step(name: str) -> None:
        words = ["bash", "-c", script(name)]
        subprocess.run(words, cwd=newer.upstream.root, env={**os.environ, **variables}, check=True)

    def calls() -> list[str]:
        kept = newer.output / "calls"
        found = [line.partition(" --")[0] for line in kept.read_text().splitlines()] if kept.exists() else []
        kept.unlink(missing_ok=True)
        return found

    step("publish")  # there is no proposal
    step("branches")
    made, _ = newer.propose()
    step("publish")
    assert calls() == ["pr list", "pr create"]
    assert newer.git("rev-parse", BRANCH, cwd=remote) == made.commit
    (newer.output / "open").write_text("7")
    newer.git("commit", "--quiet", "--allow-empty", "-m", "main moves on")
    newer.git("branch", "--quiet", "-D", BRANCH)
    newer.git("fetch", "--quiet", str(remote), "+refs/heads/*:refs/remotes/origin/*")  # as actions/checkout does
    step("branches")
    again, _ = newer.propose()
    step("publish")
    assert calls() == ["pr list", f"pr edit {BRANCH}"]
    assert newer.git("rev-parse", BRANCH, cwd=remote) == again.commit != made.commit


def test_only_steps_without_code_of_the_checkout_have_a_token() -> None:
    steps = WORKFLOW.partition("    steps:\n")[2].split("      - ")[1:]
    tokens = [each for each in steps if "github.token" in each]
    assert len(tokens) == 1
    assert not any("uv run" in each for each in tokens)
    (command,) = (each for each in steps if "uv run" in each)
    known = {flag for each in contexts()["update"].args.values() for flag in each.names}
    assert {each.replace("-", "_") for each in re.findall(r" --([\w-]+)", command)} <= known
    assert "permissions: {}" in WORKFLOW
    assert "persist-credentials: false" in WORKFLOW


def test_actions_are_pinned_by_commit_and_name_their_version() -> None:
    texts = [path.read_text() for path in (CODE / ".github/workflows").glob("*.yml")]
    used = {each.strip() for text in texts for each in re.findall(r"uses:(.*)", text)}
    assert len({each.partition("@")[0] for each in used}) == len(used) > 0  # all use the same
    assert [each for each in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each)] == []


# --- reports and trials -----------------------------------------------------------------------------------------------


def proposal(*moves: tuple[str, str]) -> Proposal:
    return Proposal(moves=[Move(part, "ComfyUI" if part == "comfyui" else new, "1", new) for part, new in moves])


@pytest.mark.parametrize(
    ("moves", "tried", "failures", "expected"),
    [
        ((), None, (), "nothing is newer"),
        ((), None, ("a",), "nothing is newer: 1 upstream did not answer"),
        ((("nodes", "a"), ("nodes", "b"), ("tool", "c")), None, (), "2 custom nodes, 1 tool package"),
        (
            (("comfyui", "2"),),
            Trial(host="h", times={"a": (2.2, 2.0), "b": (0.1, 0.1)}),
            (),
            "ComfyUI 2: the trial on h passed, 10 % slower",
        ),
        ((("comfyui", "2"),), Trial(host="h", times={"a": (0.2, 0.1)}), (), "ComfyUI 2: the trial on h passed"),
        ((("comfyui", "2"),), Trial(host="h", tried=False), (), "ComfyUI 2: h does not change"),
    ],
)
def test_the_summary(moves: Any, tried: Trial | None, failures: Any, expected: str) -> None:
    assert report.summary(proposal(*moves), tried, failures) == expected


def test_text_of_others_cannot_leave_its_block() -> None:
    made = Report(
        summary="s", branch="b", commit="c", base="d", changed=True,
        proposal=Proposal(warnings=["```\n# @everyone ````", *("long " * 400 for _ in range(100))]),
        trial=Trial(host="h", error="``` @you"),
    )  # fmt: skip
    text = report.markdown(made)
    assert len(text) < 65_536
    open_fence = ""
    for line in text.splitlines():
        if line.startswith("```") and set(line.removesuffix("text")) == {"`"}:
            open_fence = "" if line == open_fence else open_fence or line.removesuffix("text")
        elif "@" in line:
            assert open_fence
    assert not open_fence
    assert "more lines: report.json" in text


def test_the_times_of_a_trial_are_read_from_its_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.schema.change import COMPARED

    note = COMPARED.format("a b.json", 9.71, "1770ffa92976f32c", 10.0)
    assert proofs.times([note, "proof a.json: 0.1 s, 1 file", "another"]) == {"a b.json": (9.7, 10.0)}
    asked: list[Options] = []

    def deploy(name: str, options: Options) -> Outcome:
        asked.append(options)
        preview = Preview(old="1", new="2") if options.dry_run else None
        return Outcome(name, "new", base, True, notes=() if options.dry_run else (note,), preview=preview)

    monkeypatch.setattr(trial, "deploy", deploy)
    base = "old"
    assert trial.attempt("spark", ask_sudo=False) == Trial(
        host="spark", preview=Preview(old="1", new="2"), times={"a b.json": (9.7, 10.0)}, notes=(note,)
    )
    assert [(each.dry_run, each.trial) for each in asked] == [(True, "only"), (False, "only")]
    base = "new"
    assert trial.attempt("spark", ask_sudo=False).tried is False
    assert [each.dry_run for each in asked[2:]] == [True]
