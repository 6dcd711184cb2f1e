"""Settings outside the prefix: recorded before they change, restored from the record, planned only by name."""

from __future__ import annotations

import grp
import os
from dataclasses import replace
from pathlib import Path

import pytest

from agent.change import settings as steps
from agent.files import AgentError
from agent.journal import SettingsJournal
from agent.layout import Layout
from agent.look import access as devices
from agent.schema.change import Set, Unset
from agent.schema.facts import Engine
from agent.schema.live import Mps, MpsClient, MpsServer
from agent.schema.settings import Access, Applied, Node, Seen, State
from deploy import fleet, plan
from deploy.facts import Facts, Gpu
from ops import access, mps, tuning
from tests.errors import raises
from tests.plans import FRESH, kinds, reasons, running, spark, values

DESKTOP = replace(FRESH, gpus=(Gpu("RTX 4070", "8.9", 12 * 10**9, False),))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "state").mkdir()
    values = {"prefix": str(tmp_path), "service": "comfyui", "scope": "system", "user": ""}
    return Layout({**values, "address": "127.0.0.1", "port": 1})


def step(files: dict[str, str], **groups: tuple[str, ...]) -> Set:
    return Set("t", "w", "u", 0, False, False, "one", files, groups)


def undo(*, overwrite: bool = False) -> Unset:
    return Unset("t", "w", "u", 0, False, False, ("one",), overwrite)


def quiet(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "TMPFILES", tmp_path / "tmpfiles.d")
    monkeypatch.setattr(steps, "SYSCTL", tmp_path / "sysctl.d")


def test_a_second_change_keeps_the_first_old_value_and_undo_restores_it(layout: Layout, tmp_path: Path) -> None:
    old, fresh, kernel = (tmp_path / name for name in ("old", "tmpfiles.d/new", "kernel0"))
    old.write_text("before")
    kernel.write_text("60\n")
    line = f"# a comment\n\nw {tmp_path}/kernel[0-9] - - - - 10\n"
    steps.apply_setting(layout, step({str(old): "first", str(fresh): line}), quiet)
    steps.apply_setting(layout, step({str(old): "second", str(fresh): line}), quiet)
    assert (old.read_text(), fresh.read_text(), kernel.read_text()) == ("second", line, "10")
    assert {each.place: each.old for each in SettingsJournal(layout).in_force()["one"]} == {
        str(old): "before", str(fresh): None, str(kernel): "60",
    }  # fmt: skip
    steps.undo_settings(layout, undo(), quiet)
    assert (old.read_text(), fresh.exists(), kernel.read_text()) == ("before", False, "60")
    assert SettingsJournal(layout).in_force() == {}
    kept = SettingsJournal(layout).path.read_text()
    steps.undo_settings(layout, undo(), quiet)
    assert SettingsJournal(layout).path.read_text() == kept


@pytest.mark.needs("root")
def test_groups_and_device_files_are_restored(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, file, options = tmp_path / "nvidia0", tmp_path / "tmpfiles.d/gpu", tmp_path / "options"
    device.touch()
    device.chmod(0o600)
    gid = grp.getgrnam("daemon").gr_gid
    members: dict[str, str | None] = {}
    monkeypatch.setitem(steps.KINDS, "group", (members.get, members.__setitem__))
    monkeypatch.setattr(steps, "_read_group", members.get)
    files = {str(options): "gid=@gid:daemon@", str(file): f"z {tmp_path}/nvidia[0-9] 0660 - daemon -\n"}
    steps.apply_setting(layout, step(files, gpu=("b", "a")), quiet)
    status = device.stat()
    assert (status.st_mode & 0o777, status.st_gid, members) == (0o660, gid, {"gpu": "a,b"})
    assert options.read_text() == f"gid={gid}"
    steps.undo_settings(layout, undo(), quiet)
    status = device.stat()
    assert (status.st_mode & 0o777, status.st_gid, members) == (0o600, 0, {"gpu": None})
    assert not options.exists()


def test_sysctl_files_set_kernel_values(tmp_path: Path) -> None:
    found = steps.seen({f"{tmp_path}/sysctl.d/90-x.conf": "# vm.x = 1\nvm.swappiness = 10\n"}, {})
    assert [(each.kind, each.place, each.wanted) for each in found][1:] == [("value", "/proc/sys/vm/swappiness", "10")]


def test_existing_values_are_not_recorded(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("same")
    steps.apply_setting(layout, step({f"{tmp_path}/file": "same"}), quiet)
    assert SettingsJournal(layout).in_force() == {}


def test_later_edits_are_reported_and_kept(layout: Layout, tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.write_text("before")
    steps.apply_setting(layout, step({str(mine): "set", str(other): "set"}), quiet)
    mine.write_text("edited")
    with pytest.raises(AgentError) as caught:
        steps.undo_settings(layout, undo(), quiet)
    assert caught.value.report["kind"] == "changed"
    assert caught.value.report["cause"] == f"{mine}: edited"
    assert (mine.read_text(), other.exists()) == ("edited", False)
    assert [each.place for each in SettingsJournal(layout).in_force()["one"]] == [str(mine)]
    steps.undo_settings(layout, undo(overwrite=True), quiet)
    assert (mine.read_text(), SettingsJournal(layout).in_force()) == ("before", {})


class _Killed(BaseException):
    """A power cut."""


@pytest.mark.parametrize("again", [True, False])
def test_kill_between_record_and_change(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def killed(*_: object) -> None:
        raise _Killed

    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setitem(steps.KINDS, "file", (steps.KINDS["file"][0], killed))
        steps.apply_setting(layout, step({str(path): "set"}), quiet)
    assert (path.read_text(), list(SettingsJournal(layout).in_force())) == ("before", ["one"])
    if again:
        steps.apply_setting(layout, step({str(path): "set"}), quiet)
        assert path.read_text() == "set"
        assert len(SettingsJournal(layout).events()) == 1
    steps.undo_settings(layout, undo(), quiet)
    assert (path.read_text(), SettingsJournal(layout).in_force()) == ("before", {})


def test_failed_setting_is_rolled_back(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file where a folder is needed")
    with pytest.raises(AgentError, match="could not be set and was undone"):
        steps.apply_setting(layout, step({f"{tmp_path}/first": "x", f"{tmp_path}/folder/file": "x"}), quiet)
    assert not (tmp_path / "first").exists()
    assert SettingsJournal(layout).in_force() == {}


def test_failed_undo_is_reported_and_stays_recorded(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("before")
    steps.apply_setting(layout, step({f"{tmp_path}/one": "set", f"{tmp_path}/two": "set"}), quiet)
    (tmp_path / "two").unlink()
    (tmp_path / "two").mkdir()
    with pytest.raises(AgentError) as caught:
        steps.undo_settings(layout, undo(), quiet)
    assert "Is a directory" in caught.value.report["cause"]
    assert (tmp_path / "one").read_text() == "before"
    assert [each.place for each in SettingsJournal(layout).in_force()["one"]] == [f"{tmp_path}/two"]


def test_bracketed_kernel_value_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    _, found = steps.seen({f"{tmp_path}/tmpfiles.d/huge": f"w {path} - - - - always"}, {})
    assert (found.now, found.wanted) == ("madvise", "always")


def test_device_access_by_user_and_group() -> None:
    def may(mode: int, groups: tuple[str, ...]) -> bool:
        status = os.stat_result((0o020000 | mode, 0, 0, 1, 0, 0, 0, 0, 0, 0))  # root:root
        return devices.may_use(status, "somebody", groups)

    assert (may(0o666, ()), may(0o660, ()), may(0o660, ("root",)), may(0o606, ("root",))) == (True, False, True, False)


# --- plans ---------------------------------------------------------------------------------------------------------


def state(name: str = "swappiness", now: str = "60", *, writable: bool = True, applied: bool = False) -> State:
    setting = tuning.known().settings[name]
    seen = [Seen("file", file, None, text, True) for file, text in tuning.drop_ins(name, setting).files.items()]
    seen += [Seen("unit", f"hearth-{name}.service", "on", "on", True)] if setting.unit else []
    values = {f"/proc/sys/{key.replace('.', '/')}": value for key, value in setting.sysctl.items()} | setting.value
    seen += [Seen("value", place, now, value, writable) for place, value in values.items()]
    record: dict[str, tuple[Applied, ...]] = {name: (Applied("value", seen[1].place, "60", "10"),)} if applied else {}
    return State(record, {name: tuple(seen)})


def test_only_named_and_different_settings_are_planned() -> None:
    found = tuning.apply(spark(), FRESH, state(), ["swappiness"])
    assert kinds(found) == ["set"]
    assert found.steps[0].title == "set swappiness: 60 -> 10"
    ((path, text),) = values(found.steps[0])["files"].items()
    assert path == "/etc/sysctl.d/90-hearth-swappiness.conf"
    assert text.endswith("\nvm.swappiness = 10\n")
    assert kinds(tuning.apply(spark(), FRESH, state(now="10"), ["swappiness"])) == []
    assert kinds(tuning.apply(spark(), FRESH, state(), [])) == []


def test_a_value_that_cannot_be_written_is_refused() -> None:
    found = tuning.apply(spark(), FRESH, state(writable=False), ["swappiness"])
    assert (reasons(found), found.steps) == (["unfit-setting"], ())


def test_inapplicable_settings_are_refused() -> None:
    name = "dirty-pages"
    (refusal,) = tuning.apply(spark(), DESKTOP, state(name), [name]).refusals
    assert refusal.kind == "unfit-setting"
    assert refusal.what == "dirty-pages: of no use on this machine: for a GPU that shares the machine's memory"
    assert kinds(tuning.apply(spark(), FRESH, state(name), [name])) == ["set"]


def test_undo_lists_values_and_is_idempotent() -> None:
    found = tuning.undo(spark(), FRESH, state(applied=True), [], force=False)
    assert found.steps[0].title == "undo swappiness: restore /proc/sys/vm/swappiness to 60"
    assert kinds(tuning.undo(spark(), FRESH, state(), [], force=False)) == []


def test_every_setting_is_explained_and_fits_the_terminal() -> None:
    seen = {name: state(name).seen[name] for name in tuning.known().settings}
    told = tuning.lines("spark", tuning.rows(FRESH, State({}, seen)))
    assert max(map(len, told)) <= 100
    for name, each in tuning.known().settings.items():
        assert each.source.startswith("https://"), name
        assert any(line.startswith(f"{name}: ") for line in told)


def test_mistyped_setting_suggests_a_name() -> None:
    with raises("unknown-name", match="swapiness"):
        tuning.named("cpu-governor,swapiness")
    with raises("unknown-name") as caught:
        tuning.named("mps")
    assert caught.value.hint.startswith("run inv mps")


# --- MPS -----------------------------------------------------------------------------------------------------------

CONTROL = "/usr/bin/nvidia-cuda-mps-control"
OFF = Mps(control=CONTROL)
ON = Mps(on=True, control=CONTROL, state="active (running)", service_pid=7, service_knows=True,
         servers=(MpsServer(9, "ACTIVE", (MpsClient(7, "python main.py", "comfyui"),)),))  # fmt: skip


def mps_state(*, now: str | None) -> State:
    places = [Seen("file", file, now, "wanted", True) for file in mps.setting(spark(), CONTROL, {}).files]
    return State({}, {"mps": tuple(places)})


def test_mps_is_turned_on_around_a_service_that_runs() -> None:
    facts = running()
    found = mps.turn_on(spark(), facts, OFF, mps_state(now=None), {mps.PERCENT: "40"}, plan.Options(drain=5))
    (step,) = found.steps
    assert (step.kind, values(step)["serves"], values(step)["drain"]) == ("set", True, 5)
    unit, drop_in, container = values(step)["files"].values()
    assert "\nEnvironment=CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=40\n" in unit
    assert f"\nExecStart={CONTROL} -f\n" in unit
    assert "\nUser=comfyui\n" in unit
    assert "\nDeviceAllow=char-nvidia-uvm rw\n" in unit
    assert "$" not in unit
    for each in (drop_in, container):
        assert "\nEnvironment=CUDA_MPS_PIPE_DIRECTORY=/run/comfyui-mps\n" in each
    # A container needs mounts for it, also of the memory that a client shares with its server.
    assert "\nVolume=/run/comfyui-mps:/run/comfyui-mps\nVolume=/dev/shm:/dev/shm\n" in container
    assert "not verified on GB10" in found.notes[0]
    still = mps.turn_on(spark(), facts, ON, mps_state(now="wanted"), {}, plan.Options())
    assert kinds(still) == []


@pytest.mark.parametrize(
    ("facts", "seen", "kind"),
    [
        (running(gpus=()), OFF, "no-gpu"),
        (running(), Mps(), "no-mps"),
        (FRESH, OFF, "not-deployed"),
    ],
)
def test_mps_is_refused_with_a_reason(facts: Facts, seen: Mps, kind: str) -> None:
    limited = {mps.MEMORY: "3=8G"}
    found = mps.turn_on(spark(), facts, seen, mps_state(now=None), limited, plan.Options())
    assert reasons(found) == sorted([kind, "no-such-gpu"])
    assert found.steps == ()


@pytest.mark.parametrize(
    ("runtime", "version", "refused"),
    [("podman", "4.9.3", ["old-engine"]), ("podman", "5.4.2", []), ("native", "", [])],
)
def test_mps_in_a_container_needs_drop_in_files(runtime: str, version: str, refused: list[str]) -> None:
    facts = replace(running(), engine=Engine(version, True, ("memory",), True, ()) if version else None)
    target = spark(runtime=runtime)
    found = mps.turn_on(target, facts, OFF, mps_state(now=None), {}, plan.Options())
    assert reasons(found) == refused


def test_a_drop_in_of_a_container_is_reloaded_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(steps, "QUADLETS", tmp_path)
    monkeypatch.setattr(steps, "run", calls.append)
    place = tmp_path / "comfyui.container.d/hearth-mps.conf"
    for text in ("[Container]\n", None):
        steps._write_file(str(place), text)
        assert place.exists() == (text is not None)
    assert calls == [["systemctl", "daemon-reload"]] * 2
    assert not place.parent.exists()


def test_mps_off_status() -> None:
    assert kinds(mps.turn_off(spark(), running(), OFF, plan.Options())) == []
    (refusal,) = mps.limit(spark(), running(), OFF, mps_state(now=None), {}, plan.Options()).refusals
    assert refusal.kind == "mps-off"


@pytest.mark.parametrize(
    ("seen", "what"),
    [
        (Mps(service_knows=True), "ComfyUI is configured for MPS, but MPS is off"),
        (replace(ON, state="failed (failed)"), "its daemon is not running: failed (failed)"),
        (replace(ON, error="it does not answer"), "MPS is on, but it does not answer"),
        (replace(ON, service_knows=False), "was started before MPS"),
        (replace(ON, servers=()), "but not through MPS"),
        (replace(ON, restarts=2), "restarted 2 times"),
        (replace(ON, servers=(MpsServer(9, "FAULT", ON.servers[0].clients),)), "is in state FAULT"),
    ],
)
def test_mps_problems_are_reported(seen: Mps, what: str) -> None:
    (found,) = mps.problems(seen, "--host spark", cuda=True)
    assert what in found.what


def test_healthy_mps_has_no_problems() -> None:
    assert mps.problems(ON, "--host spark", cuda=True) == []
    assert mps.problems(OFF, "--host spark", cuda=True) == []
    told = mps.lines("spark", ON)
    assert told[1:] == ["  server 9: ACTIVE", "    client 7: python main.py, comfyui (ComfyUI)"]


@pytest.mark.parametrize(
    ("percent", "memory"), [("0", ""), ("101", ""), ("half", ""), ("", "8G"), ("", "0=8"), ("", "0:8G")]
)
def test_invalid_mps_limits_are_refused(percent: str, memory: str) -> None:
    with raises("usage"):
        mps.limits(percent, memory)
    assert mps.limits("50", "0=8G,1=500M") == {mps.PERCENT: "50", mps.MEMORY: "0=8G,1=500M"}


# --- who may use the GPU -------------------------------------------------------------------------------------------


def test_gpu_is_restricted_to_a_group() -> None:
    target = spark(members=("anna",))
    places = tuple(Seen("file", file, None, "x", True) for file in access.setting(target).files)
    seen = Access((), {}, (), {"comfyui": ("comfyui",), "anna": ("anna",)})
    found = access.keep(target, running(), State({}, {access.NAME: places}), seen, plan.Options())
    assert found.steps[0].title == "restrict the GPU to group gpu-users: comfyui, anna"
    assert any("next login: anna" in note for note in found.notes)
    nobody = replace(seen, users={"comfyui": None})
    (refusal,) = access.keep(target, running(), State({}, {access.NAME: places}), nobody, plan.Options()).refusals
    assert (refusal.kind, "no user comfyui" in refusal.what) == ("no-user", True)


@pytest.mark.parametrize(
    ("node", "code", "what"),
    [
        (Node("/dev/nvidia0", 0o666, "root", "root", ()), 0, "all required users can use the GPU"),
        (Node("/dev/nvidia0", 0o660, "root", "video", ("anna",)), 1, "usermod -aG video USER; or inv gpu-access"),
        (Node("/dev/dri/renderD128", 0o660, "root", "render", ("anna",)), 0, "all required users can use the GPU"),
    ],
)
def test_users_without_gpu_access_are_reported(
    node: Node, code: int, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = Access((node,), {"DeviceFileMode": "438"}, (), {"anna": ()})
    assert access.show([fleet.Answer("spark", seen)], as_json=False) == code
    assert what in capsys.readouterr().out
