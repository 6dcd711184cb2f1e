"""The tasks: shared flags reach the body, errors become exit codes, and they run from any folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from invoke.context import Context
from invoke.exceptions import Exit

import tasks
from core import files
from core.command import command
from core.errors import AuditError, BusyError, ConnectError, GateError
from core.flags import CutOver, Where, number
from deploy import remote_build
from deploy.change import Outcome
from docs.generate import contexts
from lock.audit import Audit, Finding
from lock.updates.node_updates import Change as Update
from lock.updates.outdated import Entry
from lock.updates.proposal import Proposal
from lock.updates.report import Report
from tests.conftest import Hearth
from tests.errors import kind_of, raises


def test_flag_dataclasses_become_task_flags() -> None:
    seen: list[Any] = []

    @command(help={"own": "its own"})
    def example(_: Context, path: str, own: str = "x", *, where: Where, how: CutOver) -> None:
        seen.extend((path, own, where, how))

    arguments = {str(each.attr_name or each.name): each for each in example.get_arguments()}
    assert [name for name, each in arguments.items() if each.positional] == ["path"]
    assert {name: each.default for name, each in arguments.items() if not each.positional} == {
        "own": "x", "ask_sudo": False, "host": "", "dry_run": False, "drain": "60", "force": False,
    }  # fmt: skip
    assert arguments["drain"].help.startswith("seconds to wait")
    example(Context(), path="p", own="y", ask_sudo=True, host="spark", dry_run=False, drain="5", force=True)
    assert seen == ["p", "y", Where(ask_sudo=True, host="spark"), CutOver(drain="5", force=True)]


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (
            BusyError("busy", "a\x1b]0;b\x07\u202e", cause="c\x1b[2J\n  next:  d"),
            64,
            "error[busy]: a\n  cause: c[2J\n         next:  d\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue\n"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_an_expected_error_is_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, told: str
) -> None:
    @command()
    def example(_: Context) -> None:
        raise error

    with pytest.raises(Exit) as caught:
        example(Context())
    assert (caught.value.code, caught.value.message) == (code, None)
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["deploy", "--drain", "soon"], "--drain must be a whole number"),
        (["deploy", "--build", "--bundle", "x.tar"], "--build and --bundle exclude each other"),
        (["adopt", "--by", "copy"], "use --by rename or --by reference"),
        (["adopt", "--apply", "--undo"], "one of --apply and --undo"),
    ],
)
def test_invalid_arguments_are_refused(hearth: Hearth, words: list[str], says: str) -> None:
    done = hearth.inv(*words)
    assert done.returncode == 15
    assert says in done.stderr


def test_a_number_of_a_flag_is_in_its_bounds() -> None:
    assert [number("wait", "0"), number("watch", "0.5", 0.5), number("port", "65535", 1, 65535, whole=True)] == [
        0,
        0.5,
        65535,
    ]
    for text, least, most, whole in (
        ("soon", 0, 9, False),
        ("-1", 0, 9, False),
        ("1.5", 0, 9, True),
        ("10", 0, 9, True),
    ):
        with raises("usage"):
            number("wait", text, least, most, whole=whole)


@pytest.mark.process
@pytest.mark.parametrize("folder", [".", "docs"])
def test_inv_finds_the_checkouts_packages_from_every_folder(folder: str) -> None:
    program = Path(sys.executable).with_name("inv")
    words = [str(program), "facts", "--host", "nowhere"]
    done = subprocess.run(words, cwd=files.CHECKOUT / folder, capture_output=True, text=True, check=False)
    assert (done.returncode, kind_of(done.stderr)) == (15, "unknown-name"), done.stderr


@pytest.mark.process
def test_the_checkout_that_a_host_is_sent_has_all_that_a_build_needs(hearth: Hearth, tmp_path: Path) -> None:
    subprocess.run(["tar", "-xz", "-C", str(tmp_path)], input=remote_build._pack(), check=True)
    words = hearth.command("build-kernels", "--arch", "8.9", "--python", "3.11", "--dry-run")
    done = subprocess.run(words, cwd=tmp_path, env=hearth.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sageattention" in done.stdout


def outcome(*, changed: bool) -> Outcome:
    return Outcome("spark", "new", "old", changed)


def update() -> Update:
    return Update("node", "a", "b", (), (), ())


REPORT = Report(summary="a", branch="b", commit="c", base="d", changed=True, proposal=Proposal())
FINDING = Finding("x", "1", (), "a hole", "", "")


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(
    ("task", "flags", "place", "result", "code"),
    [
        ("deploy", {"dry_run": True}, "deploy.deploy.deploy_each", [outcome(changed=True), outcome(changed=False)], 2),
        ("deploy", {"dry_run": True}, "deploy.deploy.deploy_each", [outcome(changed=False)], 0),
        ("deploy", {}, "deploy.deploy.deploy_each", [outcome(changed=True)], 0),
        ("adopt", {"undo": True, "dry_run": True}, "deploy.adopt.adopt", (None, outcome(changed=True)), 2),
        ("adopt", {"undo": True}, "deploy.adopt.adopt", (None, outcome(changed=True)), 0),
        ("nodes.update", {"name": [], "dry_run": True}, "lock.updates.node_updates.update", [update()], 2),
        ("nodes.update", {"name": []}, "lock.updates.node_updates.update", [update()], 0),
        ("nodes.update", {"name": [], "dry_run": True}, "lock.updates.node_updates.update", [], 0),
        ("update", {"dry_run": True}, "lock.updates.update.update", (Proposal(files=["a"]), {}), 2),
        ("update", {"dry_run": True}, "lock.updates.update.update", (Proposal(), {}), 0),
        ("update", {}, "lock.updates.update.update", (Proposal(files=["a"]), {}), 0),
        ("update", {}, "lock.updates.update.update", (Proposal(), {"a": OSError()}), 31),
        ("update", {"undo": True}, "lock.updates.transaction.undo", ["a"], 0),
        ("update", {"undo": True, "propose": True}, "lock.updates.transaction.undo", ["a"], 15),
        ("update", {"host": "spark"}, "lock.updates.update.update", (Proposal(), {}), 15),
        ("update", {"propose": True}, "lock.updates.propose.propose", (REPORT, None), 0),
        ("update", {"propose": True}, "lock.updates.propose.propose", (REPORT, GateError("unhealthy", "a")), 66),
        ("update", {"propose": True, "host": "x"}, "lock.updates.propose.propose", (REPORT, None), 15),
        ("outdated", {}, "lock.updates.outdated.outdated", ([Entry("nodes", "a", "1", "2", 3)], {}), 0),
        ("outdated", {}, "lock.updates.outdated.outdated", ([], {"a": ConnectError("unreachable", "b")}), 60),
        ("nodes.search", {"workflow": "w"}, "lock.updates.node_updates.search", {"A": ["node"], "B": []}, 1),
        ("nodes.search", {"workflow": "w"}, "lock.updates.node_updates.search", {"A": ["node"]}, 0),
        ("audit", {}, "lock.audit.check", Audit(1, 1, 1, (), None), 0),
        ("audit", {}, "lock.audit.check", Audit(1, 1, 1, (FINDING,), None), 1),
    ],
)
def test_the_result_of_a_task_is_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    flags: dict[str, Any],
    place: str,
    result: object,
    code: int,
    as_json: bool,
) -> None:
    assert run(monkeypatch, task, {**flags, "json": as_json}, place, result) == code


@pytest.mark.parametrize("words", [["--cooldown", "1"], ["tool", "--cooldown", "1"], ["--cooldown", "1", "tool"]])
def test_a_part_may_be_left_out(hearth: Hearth, words: list[str]) -> None:
    done = hearth.inv("outdated", *words)
    assert (done.returncode, kind_of(done.stderr)) == (15, "usage"), done.stderr
    assert kind_of(hearth.inv("outdated", "tol").stderr) == "unknown-name"


@pytest.mark.parametrize("words", [("nodes.add",), ("outdated",), ("update", "comfyui"), ("deploy",)])
def test_help_after_a_task_is_its_help(hearth: Hearth, words: tuple[str, ...]) -> None:
    done = hearth.inv(*words, "--help")
    assert (done.returncode, f"[--core-opts] {words[0]} " in done.stdout) == (0, True), done.stderr


def test_an_audit_without_its_service_is_reported_before_it_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Audit(1, 0, 1, (FINDING,), AuditError("audit-service", "no answer"))
    assert run(monkeypatch, "audit", {}, "lock.audit.check", found) == AuditError.exit_code
    assert "x 1: a hole" in capsys.readouterr().out


def run(monkeypatch: pytest.MonkeyPatch, task: str, flags: dict[str, Any], place: str, result: object) -> int:
    """Run a task whose work is replaced by `place`, which returns `result`; returns its exit code."""
    monkeypatch.setattr(place, lambda *_, **__: result)
    monkeypatch.setattr("lock.audit.locked", lambda *_, **__: None)
    given = {str(each.attr_name or each.name): each.default for each in contexts()[task].args.values()}
    try:
        tasks.ns[task](Context(), **{**given, **flags})
    except Exit as error:
        return error.code
    except SystemExit as error:
        return int(error.code or 0)
    return 0
