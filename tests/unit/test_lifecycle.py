"""Start, stop and removal: the plans, and the files that may be deleted."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.change import lifecycle as steps
from agent.change import runs
from agent.deletion import SafeDeleter
from agent.files import AgentError
from agent.journal import Journal
from agent.layout import Layout
from agent.schema.change import Delete, Erase, packed
from agent.schema.records import Event
from agent.serve.systemd import entries
from core import console
from deploy import plan
from deploy.facts import Facts, MountState, Place, Service
from deploy.host import Mount
from deploy.plan import Options
from ops import lifecycle
from tests.errors import raises
from tests.plans import (
    BUSY,
    DIED,
    FRESH,
    OURS,
    PAUSED,
    RUNNING,
    STOPPED,
    UNITS,
    kinds,
    made,
    reasons,
    running,
    spark,
    stopped,
    values,
)


def planned(action: str, facts: Facts, **host: Any) -> plan.Plan:
    return lifecycle.ACTIONS[action][0](spark(**host), facts, Options(drain=5))


@pytest.mark.parametrize("service", [RUNNING, STOPPED])
@pytest.mark.parametrize("action", ["stop", "pause", "quarantine"])
def test_forced_stop_aborts_a_running_change(action: str, service: Service) -> None:
    facts = running(busy=BUSY, service=service, paused=PAUSED)
    asked = lifecycle.ACTIONS[action][0](spark(), facts, Options(force=True))
    assert (asked.refusals, kinds(asked)[-1]) == ((), "stop")
    assert asked.notes == ("this aborts the deploy by a@b, in progress since then",)
    if action != "quarantine":
        assert lifecycle.ACTIONS[action][0](spark(), facts, Options()).refusals


def test_quarantine_blocks_the_network_first() -> None:
    assert kinds(planned("quarantine", running())) == ["set", "stop"]


def test_quarantine_lists_the_hosts_own_paths() -> None:
    system = lifecycle.evidence(spark(folders={"output": "/mnt/art"}), "/opt/comfyui")
    assert sum("/opt/comfyui/data /mnt/art " in line for line in system) == 2
    assert "sudo journalctl --unit comfyui.service" in system[-1]
    assert lifecycle.evidence(spark(scope="user"), "/x")[-1].startswith("journalctl --user-unit comfyui.service")
    assert "/x/state/comfyui.log" in lifecycle.evidence(spark(scope="user"), "/x")[-1]


@pytest.mark.parametrize(
    ("action", "facts", "expected"),
    [
        ("start", running(), []),
        ("start", stopped(), ["start"]),
        ("start", stopped(service=DIED), ["start"]),
        ("stop", running(), ["stop"]),
        ("stop", stopped(), []),
        ("stop", stopped(service=DIED), ["stop"]),
        ("stop", FRESH, []),
        ("restart", running(), ["restart"]),
        ("restart", stopped(), ["restart"]),
        ("pause", running(), ["stop"]),
        ("pause", stopped(), ["stop"]),
        ("pause", stopped(paused=PAUSED, service=replace(STOPPED, enabled=False)), []),
        ("resume", running(), []),
        ("resume", running(service=replace(RUNNING, enabled=False)), ["start"]),
        ("resume", stopped(paused=PAUSED), ["start"]),
        ("remove", running(), ["withdraw", "forget"]),
        ("remove", running(rights="some", lingered=True), ["withdraw", "rights", "end-linger", "forget"]),
        ("remove", stopped(current="", placed=UNITS[1:]), ["forget"]),
        ("remove", FRESH, []),
        ("nuke", running(), ["withdraw", "delete", "erase"]),
        ("nuke", stopped(current="", placed=(), place=replace(OURS, own=("state",))), ["erase"]),
        ("nuke", stopped(current="", placed=(), place=replace(OURS, own=())), []),
        ("nuke", replace(FRESH, place=Place(real="/opt/comfyui")), []),
    ],
)  # fmt: skip
def test_lifecycle_actions_have_their_steps(action: str, facts: Facts, expected: list[str]) -> None:
    assert kinds(planned(action, facts)) == expected


def test_pause_and_remove_without_systemd() -> None:
    host = {"scope": "user"}
    facts = stopped(manager="process", placed=())
    assert kinds(planned("pause", replace(facts, paused=PAUSED), **host)) == []
    assert kinds(planned("remove", facts, **host)) == ["withdraw"]
    (step,) = planned("stop", running(manager="process"), **host).steps
    assert step.title == "stop comfyui until inv start"


def test_drain_seconds_reach_the_step() -> None:
    (step,) = planned("stop", running()).steps
    assert (values(step)["drain"], values(step)["force"], values(step)["pause"]) == (5, False, False)
    (step,) = planned("pause", running()).steps
    assert values(step)["pause"]


def test_paused_service_stays_paused() -> None:
    for found in (
        planned("start", stopped(paused=PAUSED)),
        planned("restart", stopped(paused=PAUSED)),
        made(stopped(paused=PAUSED)),
        plan.back(spark(), stopped(paused=PAUSED), "x", Options()),
    ):
        assert reasons(found) == ["paused"]
        assert "anna@desk at 2026-11-23T03:00:00Z" in found.refusals[0].what
        assert not found.steps


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        (FRESH, "not-deployed"),
        (stopped(port_holder={"pid": 9, "command": "jupyter"}), "port-taken"),
        (stopped(service=replace(STOPPED, linked=False)), "unlinked"),
        (stopped(settings=("quarantine",)), "quarantine"),
    ],
)
def test_unstartable_release_is_refused(facts: Facts, kind: str) -> None:
    for action in ("start", "restart", "resume"):
        assert reasons(planned(action, facts)) == [kind]


@pytest.mark.parametrize("mount", [Mount(), Mount("nas:/models", "nfs4")])
def test_missing_mount_blocks_start_but_not_stop(mount: Mount) -> None:
    host = {"mounts": {"/mnt/models": mount}}
    facts = stopped(mounts={"/mnt/models": MountState(False, "", "", "", "")}, service=DIED)
    assert reasons(planned("start", facts, **host)) == ["not-mounted"]
    assert kinds(planned("stop", facts, **host)) == ["stop"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"real": "/"}, "is the root"),
        ({"real": "/opt"}, "is a top-level folder"),
        ({"mount": True}, "is a mount point"),
        ({"link": True, "real": "/srv/x"}, "is a symbolic link to /srv/x"),
        ({"homes": ("anna",)}, "is or contains the home folder of anna"),
        ({"crossings": ("parts",)}, "parts in /opt/comfyui: a link out of the prefix"),
        ({"mounts": ("/opt/comfyui/parts",)}, "something is mounted at /opt/comfyui/parts"),
        ({"ours": False, "own": ("parts",)}, "does not look like a prefix of Hearth"),
        ({"ours": False, "own": ()}, "does not look like a prefix of Hearth"),
        ({"service": "other"}, "was deployed as service other"),
    ],
)
def test_unsafe_prefix_is_not_deleted(place: dict[str, Any], said: str) -> None:
    facts = running(data=False)
    found = planned("nuke", replace(facts, place=replace(OURS, **place)))
    assert not found.steps
    assert set(reasons(found)) == {"deployed-otherwise" if "service" in place else "unsafe-prefix"}
    assert len([each for each in found.refusals if said in each.what]) == 1


def test_nuke_is_refused_while_adopted() -> None:
    (refusal,) = planned("nuke", running(adopted=True)).refusals
    assert (refusal.kind, "inv adopt --host spark --undo" in refusal.remedy) == ("adopted", True)


def test_nuke_lists_kept_items_and_keeps_data_by_default() -> None:
    place = replace(
        OURS, mounts=("/opt/comfyui/data/models/nas",), links={"/opt/comfyui/data/input": "/srv/in"}, others=("notes",)
    )
    own = "/etc/systemd/system/comfyui.service.d"
    facts, target = (
        running(place=place, drop_ins=(own,)),
        spark(folders={"output": "/srv/out"}, model_roots=("/srv/more",)),
    )
    without, with_data = (lifecycle.nuke(target, facts, Options(), data=each) for each in (False, True))
    assert not [step for step in without.steps if values(step).get("names") == ("data",)]
    assert [values(step).get("names") for step in with_data.steps] == [
        None, ("current", "parts", "releases"), ("data",), None,
    ]  # fmt: skip
    left = "\n".join(with_data.notes)
    for each in (
        "data/models/nas",
        "/srv/in",
        "/srv/out",
        "/srv/more",
        "/opt/comfyui/notes",
        own,
        "the user comfyui",
    ):
        assert each in left
    assert "kept: /opt/comfyui/data" in without.notes
    assert "kept: /opt/comfyui/data" not in with_data.notes


@pytest.mark.parametrize(
    "place", [{"mounts": ("/opt/comfyui/data",)}, {"links": {"/opt/comfyui/data": "/srv/data"}}], ids=["mount", "link"]
)
def test_mounted_or_linked_data_is_kept(place: dict[str, Any]) -> None:
    facts = running(place=replace(OURS, **place))
    found = lifecycle.nuke(spark(), facts, Options(), data=True)
    assert not [step for step in found.steps if values(step).get("names") == ("data",)]


def test_only_hearths_mount_units_are_removed() -> None:
    host = {"mounts": {"/mnt/a": Mount("nas:/a", "nfs4"), "/mnt/b": Mount()}}
    ours = MountState(True, "nas:/a", "# Written by Hearth; a deploy replaces it.\n", "", "")
    theirs = MountState(True, "/dev/sdb", "[Mount]\n", "", "")
    found = planned("nuke", running(mounts={"/mnt/a": ours, "/mnt/b": theirs}), **host)
    (step,) = (step for step in found.steps if step.kind == "forget-mounts")
    assert values(step)["units"] == ("mnt-a.mount",)


def test_data_deletion_needs_the_hosts_name(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed: list[str] = []

    def change_each(names: list[str], *_: object, agree: Callable[[], None]) -> None:
        agree()
        agreed.extend(names)

    def nuke(*names: str, named: str = "", data: bool = True) -> None:
        lifecycle.carry_out("nuke", names, Options(), data=data, yes_delete_data_of=named)

    monkeypatch.setattr(lifecycle, "change_each", change_each)
    monkeypatch.setattr(console, "confirm_name", lambda _, word: word == "spark")
    nuke("spark")
    nuke("box", named="box")
    assert agreed == ["spark", "box"]
    with raises("refused") as caught:
        nuke("box")
    assert [(each.host, each.kind) for each in caught.value.refusals] == [("box", "unconfirmed")]
    with raises("usage", match="names another host than box"):
        nuke("box", named="spark")
    with raises("usage", match="one host at a time"):
        nuke("box", "spark")
    with raises("usage", match="requires --data"):
        nuke("box", named="box", data=False)
    assert agreed == ["spark", "box"]


# --- the agent -----------------------------------------------------------------------------------------------------


def layout(place: Path) -> Layout:
    return Layout({"prefix": str(place), "service": "s", "scope": "user", "user": "", "address": "", "port": 1})


def test_deleting_follows_no_link(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text("kept")
    (inside / "deep/er").mkdir(parents=True)
    (inside / "deep/link").symlink_to(outside / "folder")
    (inside / "file").symlink_to(outside / "file")
    (inside / "deep/hard").hardlink_to(outside / "file")
    os.mkfifo(inside / "deep/er/pipe")
    (inside / "deep/er").chmod(0o500)
    mode = stat.S_IMODE((outside / "folder").stat().st_mode)
    sweep = SafeDeleter()
    sweep.delete(inside)
    assert (sweep.files, sweep.left, sweep.stuck) == (4, [], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside"]
    assert (outside / "file").read_text() == "kept"
    assert stat.S_IMODE((outside / "folder").stat().st_mode) == mode
    sweep.delete(inside)  # it is gone already


def test_undeletable_paths_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts/one").mkdir(parents=True)
    (tmp_path / "parts/one/fixed").touch()
    (tmp_path / "parts/other").touch()
    real = os.unlink

    def refuse(name: str, dir_fd: int | None = None) -> None:  # as chattr +i would
        if name == "fixed":
            raise PermissionError(1, "Operation not permitted")
        real(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(AgentError, match="paths that could not be deleted: 1") as caught:
        steps.delete(layout(tmp_path), Delete("t", "w", "u", ("parts",)), lambda _: None)
    assert caught.value.report["cause"] == f"{tmp_path}/parts/one/fixed: Operation not permitted"
    assert not (tmp_path / "parts/other").exists()


def test_dangling_unit_links_are_found(tmp_path: Path) -> None:
    """Such as those of a companion that the active release no longer has."""
    wants = tmp_path / "timers.target.wants"
    wants.mkdir()
    (tmp_path / "s-x.timer").symlink_to("/nowhere/current/s-x.timer")
    (wants / "s-x.timer").symlink_to("../s-x.timer")
    assert entries(tmp_path, "s-x.timer") == [tmp_path / "s-x.timer", wants / "s-x.timer"]
    assert entries(tmp_path, "other.timer") == []


def pending(own: Layout) -> Journal:
    """A nuke that was submitted but has not started."""
    (own.parts / "app-1").mkdir(parents=True)
    (own.parts / "app-1/file").touch()
    own.data.mkdir()
    (own.state / "cache").mkdir(parents=True)
    (own.state / "agents/1").mkdir(parents=True)
    plan = {"run": "r", "who": "a@b", "action": "nuke", "release": "", "base": ""}
    kinds = [packed(Delete("parts", "w", "u", ("parts",))), packed(Erase("state", "w", "u"))]
    own.pending.write_text(json.dumps({**plan, "since": "then", "steps": kinds}))
    journal = Journal(own, "r")
    journal.add(Event("begin"))
    return journal


def test_nuke_can_be_followed_to_its_end(tmp_path: Path) -> None:
    own = layout(tmp_path / "prefix")
    pending(own)
    following = runs.follow(own, "r")
    assert next(following).event == "begin"
    runs.apply(own)
    events = list(following)
    assert [each.event for each in events] == ["step", "note", "done", "step", "note", "done", "end"]
    assert events[-1].result == "done"
    assert [path.name for path in own.prefix.iterdir()] == ["data"]
    # A client that comes too late to open the journal gets the same answer, and its request creates no files.
    assert [each.event for each in runs.follow(own, "r")] == ["end"]
    assert not own.state.exists()


def test_nuke_ends_for_its_client_when_the_state_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the client's next look at the host could find half of it."""
    own, delete = layout(tmp_path / "prefix"), SafeDeleter.delete
    pending(own)

    def slow(self: SafeDeleter, path: Path) -> None:
        if path == own.state:
            time.sleep(0.5)
        delete(self, path)

    monkeypatch.setattr(SafeDeleter, "delete", slow)
    following = runs.follow(own, "r")
    assert next(following).event == "begin"
    worker = threading.Thread(target=runs.apply, args=[own])
    worker.start()
    found = next(own.state.exists() for event in following if event.event == "end")
    worker.join()
    assert not found


def test_nuke_removes_the_agents_before_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client looks again at once, while the state is still being deleted."""
    own, there = layout(tmp_path / "prefix"), []
    pending(own)
    add = Journal.add

    def added(self: Journal, line: Event) -> None:
        there.append((line.event, bool([*own.state.glob("*agents")])))
        add(self, line)

    monkeypatch.setattr(Journal, "add", added)
    runs.apply(own)
    assert (there[0][1], there[-1]) == (True, ("end", False))


def test_killed_nuke_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at each deletion in turn: the remaining files are sufficient for the next run."""
    real = os.unlink
    for count in range(20):
        own = layout(tmp_path / f"prefix-{count}")
        pending(own)
        done = 0

        def killed(name: str, dir_fd: int | None = None, stop: int = count) -> None:
            nonlocal done
            done += 1
            if done > stop:
                raise KeyboardInterrupt
            real(name, dir_fd=dir_fd)

        monkeypatch.setattr(os, "unlink", killed)
        try:
            runs.apply(own)
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "unlink", real)
            before = own.pending.exists()
            runs.apply(own)
            assert before == (not own.state.exists())  # the next nuke deletes the remains of a finished run
        else:
            assert count > 1
            return
    raise AssertionError("it never came through")


def test_failed_nuke_keeps_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = layout(tmp_path / "prefix")
    pending(own)

    def full(self: SafeDeleter, path: Path) -> None:
        self.stuck.append(f"{path}: Operation not permitted")

    monkeypatch.setattr(SafeDeleter, "delete", full)
    runs.apply(own)
    events = list(runs.follow(own, "r"))
    assert events[-1].error["what"] == "paths that could not be deleted: 1"
    assert not own.pending.exists()


def test_settings_outside_the_prefix_keep_their_journal() -> None:
    facts = running(settings=("mps", "swappiness"))
    (refusal,) = planned("nuke", facts).refusals
    assert refusal.what.startswith("mps, swappiness is set outside /opt/comfyui")
    assert refusal.remedy == "inv mps off --host spark; inv tune --undo --host spark"
    assert any("kept: mps, swappiness" in note for note in planned("remove", facts).notes)
