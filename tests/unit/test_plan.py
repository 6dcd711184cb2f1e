"""Plans: (wanted, facts) give steps or refusals; there are no other inputs."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.schema.change import Exporter, Step
from agent.schema.facts import Holder
from agent.schema.installed import ExporterState, InstalledExporter
from core import files
from core.manifest import Manifest
from deploy import archive, facts, plan, refusals
from deploy.facts import Facts, Gpu, Process
from deploy.host import Mount, Target
from deploy.profile import Setting, profiles
from deploy.selection import find_wheel
from lock import application, nodes, requirements
from tests.plans import FLAGS, FRESH, NO_SERVICE, RUNNING, inputs, kinds, made, reasons, settled, spark, values, wheel


def test_a_first_deploy() -> None:
    found = made()
    assert kinds(found) == ["account", "folders", "app", "tool", "env", "release", "cut-over", "prune"]
    assert all(step.title and step.why and step.undo for step in found.steps)


def test_converged_host_has_no_steps() -> None:
    assert kinds(made(settled())) == []


def test_release_id_is_deterministic() -> None:
    assert made().release == made(settled()).release


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"service": replace(NO_SERVICE, linked=True), "port_holder": {}}, ["serve"]),
        ({"service": replace(RUNNING, enabled=False)}, ["serve"]),
        ({"service": replace(RUNNING, linked=False)}, ["cut-over", "prune"]),
        ({"current": ""}, ["cut-over", "prune"]),
        ({"members": ("eve",)}, ["members"]),
        ({"lingers": False}, ["linger"]),
        ({"altered": (settled().current,)}, ["release", "cut-over", "prune"]),
        ({"parts": {**settled().parts, "app-old": ""}}, ["prune"]),
        ({"parts": dict.fromkeys(settled().parts, "changed")},
         ["app", "env", "cut-over", "prune"]),
    ],
)  # fmt: skip
def test_only_missing_parts_are_made(change: dict[str, Any], expected: list[str]) -> None:
    assert kinds(made(replace(settled(), **change))) == expected


def test_other_gpu_processes_are_noted() -> None:
    users = (
        Process(7, "python", "comfyui", "comfyui.service", 10**9, "compute", comfyui=True),
        Process(8, "Xorg", "root", None, 10**8, "graphics"),
        Process(9, "train.py", "anna", None, 3 * 10**9, "compute"),
        Process(9, "train.py", "anna", None, 3 * 10**9, "mps"),
    )
    found = made(replace(FRESH, gpus=(Gpu("GB10", "12.1", None, True, users),)))
    assert found.steps
    told = "other processes use GPU 0; their memory is not available to ComfyUI: train.py (pid 9, anna, 3.0 GB)"
    assert told in found.notes


def test_flags_are_a_new_release_of_the_same_parts() -> None:
    profile = profiles()["dgx-spark"]
    fewer = msgspec.structs.replace(profile, flags={"--use-flash-attention": profile.flags["--use-sage-attention"]})
    found = made(settled(), replace(spark(), profile=fewer))
    assert kinds(found) == ["release", "cut-over", "prune"]
    assert found.base == settled().current
    assert found.release != found.base


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        ({"driver": "570.10"}, "old-driver", "CUDA 13.0 needs 580"),
        ({"gpus": ()}, "no-gpu", "dgx-spark"),
        ({"gpus": (Gpu("RTX 4070", "8.9", 12, False),)}, "other-gpu", "8.9"),
        ({"machine": "riscv64"}, "other-machine", "riscv64"),
        ({"pythons": {}}, "no-python", "3.12 or 3.11"),
        ({"disk_free": 10**9}, "no-room", "1.0 GB free at /opt/comfyui, 10."),
        ({"inodes_free": 10}, "no-inodes", "10 inodes free"),
        ({"port_holder": {"pid": 9, "command": "nginx"}}, "port-taken", "nginx (pid 9)"),
        ({"data_free": {"/mnt/out": 10**7}}, "data-full", "10.0 MB free for /mnt/out, 200.0 MB needed"),
        ({"writable": False}, "not-writable", "/opt/comfyui"),
        ({"busy": {"action": "deploy", "who": "anna@x", "since": "t"}}, "busy", "deploy by anna@x since t"),
    ],
)
def test_refusals(change: dict[str, Any], kind: str, named: str) -> None:
    found = made(replace(FRESH, **change))
    assert not found.steps
    assert reasons(found) == [kind]
    assert named in found.refusals[0].what


@pytest.mark.parametrize(
    ("host", "kind"),
    [
        ({"glibc": "2.10"}, "old-glibc"),
        ({"glibcxx": "3.4.9", "cxxabi": "1.3.13"}, "old-libstdcxx"),
        ({"glibcxx": "3.4.30", "cxxabi": "1.3.2"}, "old-libstdcxx"),
    ],
)
def test_an_old_c_or_cxx_library_is_refused_for_each_wheel(host: dict[str, Any], kind: str) -> None:
    needs = {"glibc": "2.17", "glibcxx": "3.4.21", "cxxabi": "1.3.9"}
    stock = inputs(wheel("sageattention", **needs), wheel("flash-attn", **needs))
    assert reasons(made(replace(FRESH, **host), stock=stock)) == [kind, kind]
    enough: dict[str, Any] = {"glibc": "2.36", "glibcxx": "3.4.21", "cxxabi": "1.3.13"}
    assert not made(replace(FRESH, **enough), stock=stock).refusals


def test_a_library_that_is_not_reported_is_not_refused() -> None:
    assert not made(replace(FRESH, glibc="", glibcxx="", cxxabi="")).refusals
    stock = inputs(*(wheel(name, glibc="", glibcxx="", cxxabi="") for name in ("sageattention", "flash-attn")))
    assert not made(stock=stock).refusals


NAS = {"/mnt/models": Mount("nas:/models", "nfs4", "nosuid")}


def mounted(**values: Any) -> Facts:
    there = facts.MountState(mounted=False, source="", unit="", error="", remedy="")
    return replace(FRESH, mounts={"/mnt/models": replace(there, **values)})


@pytest.mark.parametrize(
    ("mount", "there", "kind"),
    [
        (Mount(), {}, "not-mounted"),
        (NAS["/mnt/models"], {"error": "the host has no mount.nfs4", "remedy": "install it"}, "unmountable"),
        (NAS["/mnt/models"], {"mounted": True, "source": "/dev/sdb"}, "foreign-mount"),
    ],
)
def test_unmountable_mount_is_refused(mount: Mount, there: dict[str, Any], kind: str) -> None:
    found = made(mounted(**there), spark(mounts={"/mnt/models": mount}))
    assert not found.steps
    assert reasons(found) == [kind]


def test_mount_units_come_before_data_steps() -> None:
    target = spark(mounts=NAS, folders={"models": "/mnt/models/comfyui"})
    now = replace(mounted(), places={"/mnt/models/comfyui": refusals.MISSING})
    steps = made(now, target).steps
    assert [step.kind for step in steps][:3] == ["account", "mount", "folders"]
    assert "\nWhat=nas:/models\nWhere=/mnt/models\nType=nfs4\nOptions=nosuid\n" in values(steps[1])["text"]
    there = mounted(mounted=True, unit=target.mount_text("/mnt/models"))
    assert "mount" not in kinds(made(there, target))
    changed = mounted(mounted=True, unit=target.mount_text("/mnt/models").replace("nosuid", "nodev"))
    assert "mount" in kinds(made(changed, target))


def test_folders_elsewhere_become_flags() -> None:
    target = spark(mounts=NAS, folders={"models": "/mnt/models", "output": "/srv/out"}, model_roots=("/srv/more",))
    stock = replace(inputs(), model_folders={"text_encoders": ("text_encoders", "clip")})
    there = mounted(mounted=True, unit=target.mount_text("/mnt/models"))
    now = replace(there, places={"/srv/more": ""})
    (step,) = (each for each in made(now, target, stock).steps if each.kind == "release")
    wanted = values(step)["release"]
    words = " ".join(wanted["argv"])
    data = "/opt/comfyui/data"
    folders = f"--input-directory {data}/input --models-directory /mnt/models --output-directory /srv/out"
    assert f"--temp-directory {data} {folders} --user-directory {data}/user --database-url" in words
    assert json.loads(wanted["files"]["paths.yaml"]) == {
        "/srv/more": {"base_path": "/srv/more", "text_encoders": "text_encoders\nclip"}
    }
    unit = wanted["files"]["comfyui.service"]
    assert "\nBindsTo=comfyui-storage.service\nAfter=comfyui-storage.service\n" in unit
    assert "until mountpoint --quiet /mnt/models; do" in wanted["files"]["comfyui-storage.service"]
    assert "\nReadWritePaths=/opt/comfyui/data /mnt/models /srv/out\n" in unit


def test_a_folder_that_cannot_be_used_is_refused_and_one_that_is_missing_is_made() -> None:
    target = spark(folders={"output": "/srv/out"}, model_roots=("/srv/more",))
    missing = replace(FRESH, places={"/srv/out": refusals.MISSING, "/srv/more": refusals.MISSING})
    (refusal,) = made(missing, target).refusals
    assert (refusal.kind, refusal.what) == ("unusable-folder", "/srv/more does not exist")
    unusable = replace(FRESH, places={"/srv/out": "cannot be written by the service user", "/srv/more": ""})
    (refusal,) = made(unusable, target).refusals
    assert refusal.what == "/srv/out cannot be written by the service user"


def test_members_get_configured_rights_only() -> None:
    target = spark(members=("anna",), members_may=("restart",))
    steps = [step for step in made(target=target).steps if step.kind in ("members", "rights")]
    assert [step.title for step in steps] == [
        "members of group comfyui-members: anna",
        "let members of comfyui-members read its log and restart it (sudo)",
    ]
    text = values(steps[1])["text"]
    assert "/usr/bin/systemctl restart comfyui.service\n" in text
    assert "*" not in text
    there = replace(settled(), members=("anna",), rights=text)
    assert kinds(made(there, target)) == []
    assert kinds(made(there, spark())) == ["members", "rights"]
    without = replace(FRESH, rights=None)
    assert "the host has no sudo" in " ".join(made(without, target).notes)


def exporting(facts: Facts, **host: Any) -> list[Step]:
    """The steps for a host with metrics that is as wanted except for its exporter."""
    found = made(facts, spark(metrics_port=9188, **host))
    assert not found.refusals
    return [step for step in found.steps if step.kind != "prune"]


def test_exporter_is_a_separate_step() -> None:
    first = made(target=spark(metrics_port=9188, listen="192.168.1.5"))
    assert kinds(first)[-3:] == ["cut-over", "exporter", "prune"]
    bare = made(target=spark(listen="192.168.1.5"))
    assert [step for step in first.steps if step.kind == "release"] == [
        step for step in bare.steps if step.kind == "release"
    ]
    (wanted,) = (step.exporter for step in first.steps if isinstance(step, Exporter))
    assert wanted.agent == archive.agent_hash()
    told = wanted.settings
    assert told is not None
    assert (told.port, told.cuda, told.site.prefix) == (9188, True, "/opt/comfyui")
    unit, state = wanted.unit, "/opt/comfyui/state"
    assert f"\nExecStart=/usr/bin/python3.12 -I -S {state}/exporter metrics {state}/exporter.json\n" in unit
    assert "\nIPAddressAllow=localhost 192.168.1.5\n" in unit  # where ComfyUI listens
    assert "\nDeviceAllow=char-nvidia rw\n" in unit
    assert "\nUser=hearth-exporter\n" in unit
    assert "$" not in unit
    without = replace(FRESH, user=True, exporter_user=False)
    (account,) = (step for step in made(without, spark(metrics_port=9188)).steps if step.kind == "account")
    assert (account.title, account.undo) == ("create the system user hearth-exporter", "userdel hearth-exporter")
    own = made(target=spark(metrics_port=9188, scope="user"))
    (wanted,) = (step.exporter for step in own.steps if isinstance(step, Exporter))
    assert "\nWantedBy=default.target\n" in wanted.unit
    assert "ProtectSystem" not in wanted.unit


def test_an_exporter_is_changed_alone() -> None:
    (step,) = exporting(settled())
    assert isinstance(step, Exporter)
    assert step.why == "no exporter is installed"
    there, active = step.exporter, ExporterState(**vars(step.exporter), active=True)
    as_wanted = replace(settled(), exporter=active)
    assert exporting(as_wanted) == []
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"agent": "f" * 16}, "its agent changed"),
        ({"unit": "[Unit]\n"}, "its unit changed"),
        ({"settings": None, "unit": "[Unit]\n"}, "its settings and unit changed"),
        ({"active": False}, "the exporter is not running"),
    )
    for change, why in changes:
        (step,) = exporting(replace(settled(), exporter=replace(active, **change)))
        assert (step.why, vars(step)["exporter"]) == (why, there)
    (step,) = made(as_wanted).steps[:1]
    assert (step.title, vars(step)["exporter"]) == ("remove the metrics exporter", InstalledExporter())


def test_metrics_port_without_systemd_is_refused() -> None:
    target = spark(metrics_port=9188)
    unit = "comfyui-exporter.service"
    held = Holder(pid=9, command="postgres_exporter", unit="postgres.service")
    (refusal,) = made(replace(FRESH, metrics_holder=held), target).refusals
    assert (refusal.kind, "postgres_exporter (pid 9)" in refusal.what) == ("metrics-port-taken", True)
    assert not made(
        replace(FRESH, metrics_holder=Holder(pid=9, command="postgres_exporter", unit=unit)), target
    ).refusals
    supervised = replace(FRESH, manager="process")
    assert reasons(made(supervised, spark(metrics_port=9188, scope="user"))) == ["no-exporter"]
    assert not made(supervised, spark(scope="user")).refusals


@pytest.mark.parametrize(
    ("machine", "driver", "older"),
    [
        ("x86_64", "570.10", 'set stack = "cu124"'),
        ("aarch64", "570.10", ""),
        ("x86_64", "1.0", ""),
    ],
)
def test_an_old_driver_gets_the_newest_stack_that_it_runs(machine: str, driver: str, older: str) -> None:
    found = made(replace(FRESH, machine=machine, driver=driver))
    (remedy,) = [each.remedy for each in found.refusals if each.kind == "old-driver"]
    assert remedy == "update the driver" + (f", or {older} in the host's override" if older else "")


def test_a_stack_that_comfyui_cannot_run_on_is_refused() -> None:
    target = replace(spark(), profile=msgspec.structs.replace(spark().profile, stack="cu132"))
    (refusal,) = made(FRESH, target).refusals
    assert (refusal.kind, "torchaudio" in refusal.what) == ("builds-only", True)


def test_a_plan_notes_a_deprecated_stack() -> None:
    old = replace(spark(), profile=msgspec.structs.replace(spark().profile, stack="cu124", kernels=()))
    facts = replace(FRESH, machine="x86_64")
    assert [each for each in made(facts, old).notes if "deprecated" in each] == [old.stack.notice]
    assert not any("deprecated" in each for each in made(FRESH, spark()).notes)


def test_all_refusals_at_once() -> None:
    holder = Holder(pid=9, command="nginx")
    bad = replace(FRESH, driver="1.0", disk_free=1, data_free={"/a": 1, "/b": 1})
    expected = ["data-full", "data-full", "no-room", "old-driver"]
    assert reasons(made(bad)) == expected
    assert reasons(made(replace(bad, port_holder=holder))) == [*expected, "port-taken"]


def test_a_missing_wheel_says_how_to_build_it() -> None:
    found = made(stock=inputs(wheel("flash-attn")))
    (refusal,) = found.refusals
    words = ("--kernel", "sageattention", "--arch", "12.1", "--stack", "cu130", "--python", "3.12")
    assert (refusal.kind, refusal.build) == ("no-wheel", (*words, "--platform", "linux_aarch64"))


def test_the_wheels_hash_reaches_the_list_and_the_environment() -> None:
    (env,) = (step for step in made().steps if step.kind == "env")
    assert "sageattention==1+cu130.torch2.14.1.sm121a --hash=sha256:" + "a" * 64 in values(env)["requirements"]
    changed = made(stock=inputs(wheel("sageattention", sha256="c" * 64), wheel("flash-attn")))
    assert values(env)["part"] not in [values(step).get("part") for step in changed.steps]


@pytest.mark.parametrize(
    ("versions", "taken"),
    [
        (["2.2.0", "2.10.0", "2.9.1"], "2.10.0"),
        (["2.2.0.post1", "2.2.0"], "2.2.0.post1"),
        (["2.3.0rc1", "2.3.0"], "2.3.0"),
    ],
)
def test_highest_wheel_version_is_selected(versions: list[str], taken: str) -> None:
    wheels = [wheel("flash-attn", size=n, version=f"{each}+cu130.sm121a") for n, each in enumerate(versions)]
    for listed in (wheels, wheels[::-1]):
        found = find_wheel(inputs(*listed), "flash-attn", spark(), "linux_aarch64", "3.12")
        assert isinstance(found, Manifest)
        assert found.version.partition("+")[0] == taken


@pytest.mark.parametrize(
    ("archs", "taken"),
    [
        (["8.9;12.1", "8.9;12.0"], "8.9;12.1"),
        (["8.9;12.1", "12.1"], "12.1"),
        (["12.1a"], "12.1a"),
        (["12.1+PTX", "12.0;12.1+PTX"], "12.1+PTX"),
        (["2.1", "12.0f", "8.9;12.0"], None),
    ],
)
def test_wheel_for_the_gpu_among_others_is_selected(archs: list[str], taken: str | None) -> None:
    wheels = [wheel("flash-attn", arch=each) for each in archs]
    for listed in (wheels, wheels[::-1]):
        found = find_wheel(inputs(*listed), "flash-attn", spark(), "linux_aarch64", "3.12")
        assert (found.arch if isinstance(found, Manifest) else None) == taken


@pytest.mark.parametrize(
    ("torch", "suits"), [(">=2.9", True), (">=2.9,<2.11", False), (">=2.15", False), ("2.9", False)]
)
def test_a_wheel_for_all_pythons_serves_a_range_of_torch(torch: str, suits: bool) -> None:
    listed = wheel("flash-attn", python="", torch=torch)
    found = find_wheel(inputs(listed), "flash-attn", spark(), "linux_aarch64", "3.12")
    assert (found == listed) == suits


@pytest.mark.parametrize("usual", ["inference", "full", "a", "z", ""])
@pytest.mark.parametrize("other", ["inference", "full", "b", "y", ""])
def test_recipe_decides_version_and_profile(usual: str, other: str) -> None:
    """Neither the size nor the text of the local label does."""
    best = wheel("flash-attn", profile=usual, size=9, version=f"2+cu130{f'.{usual}' * bool(usual)}", file="best.whl")
    others = [
        wheel("flash-attn", profile=other, size=1, version="2+cu130.other", file="profile.whl"),
        wheel("flash-attn", profile=usual, size=1, version="2.1+cu130", file="newer.whl"),
        wheel("flash-attn", profile=usual, size=1, version="1.10+cu130", file="older.whl"),
    ]
    known = replace(inputs(best, *others[usual == other :]), recipes={"flash-attn": ("2", usual)})
    for stock in (known, replace(known, wheels=known.wheels[::-1])):
        found = find_wheel(stock, "flash-attn", spark(), "linux_aarch64", "3.12")
        assert isinstance(found, Manifest)
        assert found.file == "best.whl"


def test_a_host_names_the_profile_of_a_kernel() -> None:
    """Then another profile's wheel is none, however new, and the command that builds it names the profile."""
    target = spark()
    target = replace(target, profile=msgspec.structs.replace(target.profile, kernels=("flash-attn:full",)))
    full, usual = wheel("flash-attn", profile="full"), wheel("flash-attn", profile="diffusion", version="9+cu130")
    for listed in ((full, usual), (usual, full)):
        stock = replace(inputs(*listed), recipes={"flash-attn": ("9", "diffusion")})
        assert find_wheel(stock, "flash-attn", target, "linux_aarch64", "3.12") == full
    missing = find_wheel(inputs(usual), "flash-attn", target, "linux_aarch64", "3.12")
    assert isinstance(missing, refusals.Refusal)
    assert missing.build[-2:] == ("--profile", "full")


@pytest.mark.parametrize(
    ("arch", "fits"),
    [("12.1", True), ("12.1a", True), ("12.1+PTX", True), ("12.0;12.1", True), ("12.0", False), ("2.1", False)],
)
def test_wheel_is_for_the_gpu(arch: str, fits: bool) -> None:
    found = find_wheel(inputs(wheel("flash-attn", arch=arch)), "flash-attn", spark(), "linux_aarch64", "3.12")
    assert isinstance(found, Manifest) == fits


@pytest.mark.parametrize(
    ("place", "values", "what", "remedy"),
    [
        ({"service": "comfyui-old"}, {}, "was deployed as service comfyui-old", 'service = "comfyui-old"'),
        ({"service": "new"}, {"service": "new"}, "was deployed as service comfyui", 'service = "comfyui"'),
        ({"service": "comfyui"}, {"service": "new"}, "and the configuration says new", 'service = "comfyui"'),
        ({"scope": "user"}, {}, 'deployed with scope = "user"', 'scope = "user"'),
        ({"user": "anna"}, {}, "data belongs to anna", 'run_as = "anna"'),
        ({"user": "comfyui"}, {"run_as": "art"}, "says run_as = art", "chown -R art: /opt/comfyui/data"),
        ({"elsewhere": "/srv/old"}, {}, "comfyui is deployed at /srv/old", 'prefix = "/srv/old"'),
    ],
)
def test_changed_service_scope_or_prefix_is_refused(
    place: dict[str, str], values: dict[str, str], what: str, remedy: str
) -> None:
    changed = replace(settled(), place=facts.Place(ours=True, **place))  # type: ignore[arg-type]
    back = plan.back(spark(**values), changed, changed.current, plan.Options())
    for found, more in ((made(changed, spark(**values)), ()), (back, ["other-release"] * bool(values))):
        assert not found.steps
        assert set(reasons(found)) == {"deployed-otherwise", *more}
        (refusal,) = (each for each in found.refusals if what in each.what)
        assert remedy in refusal.remedy


@pytest.mark.parametrize("values", [{"service": "new"}, {"run_as": "art"}])
def test_rollback_to_another_services_release_is_refused(values: dict[str, str]) -> None:
    old, before = settled(), settled().current
    now = replace(old, current="", service=NO_SERVICE, port_holder={})
    found = plan.back(spark(**values), now, before, plan.Options())
    assert reasons(found) == ["other-release"]
    assert not plan.back(spark(), now, before, plan.Options()).refusals


def test_removed_service_may_be_renamed() -> None:
    place = facts.Place(ours=True, service="comfyui-old", scope="user")
    assert kinds(made(replace(FRESH, place=place)))
    same = facts.Place(ours=True, service="comfyui", scope="system", user="comfyui")
    assert kinds(made(replace(settled(), place=same))) == []


def test_prefix_unsafe_in_units_is_refused() -> None:
    found = made(replace(FRESH, prefix="/home/my user/.local/share/hearth/comfyui"))
    assert reasons(found) == ["unusable-prefix"]


TLS = {"--tls-keyfile": Setting(why="w", value="/x/k.pem"), "--tls-certfile": Setting(why="w", value="/x/c.pem")}


@pytest.mark.parametrize(("one", "other"), [tuple(TLS), tuple(TLS)[::-1]])
def test_incomplete_tls_flags_are_refused(one: str, other: str) -> None:
    known = application.flags(
        "parser.add_argument('--use-sage-attention', action='store_true')\n"
        "parser.add_argument('--tls-keyfile', type=str)\nparser.add_argument('--tls-certfile', type=str)\n"
        "parser.add_argument('--disable-nvml-pressure', action='store_true')\n"
    )
    stock = replace(inputs(), flags=known)
    profile = profiles()["dgx-spark"]

    def refused(*names: str) -> list[str]:
        flags = {**profile.flags, **{name: TLS[name] for name in names}}
        target = replace(spark(), profile=msgspec.structs.replace(profile, flags=flags))
        return reasons(made(target=target, stock=stock))

    assert refused(one) == ["half-tls"]
    assert refused(one, other) == []


def test_rollback_rewrites_an_altered_release() -> None:
    facts = replace(settled(), altered=(settled().current,))
    assert kinds(plan.back(spark(), facts, facts.current, plan.Options())) == ["release", "cut-over"]


def test_rollback_needs_intact_parts() -> None:
    facts = replace(settled(), current="")
    (name,) = facts.proven
    assert kinds(plan.back(spark(), facts, name, plan.Options())) == ["cut-over"]
    broken = replace(facts, parts={})
    assert reasons(plan.back(spark(), broken, name, plan.Options())) == ["damaged-release"]


@pytest.mark.parametrize("off", [{"active": False}, {"enabled": False}, {"linked": False}])
def test_rollback_converges(off: Any) -> None:
    facts = settled()
    assert kinds(plan.back(spark(), facts, facts.current, plan.Options())) == []
    not_yet = replace(facts, service=replace(RUNNING, **off), port_holder={})
    assert kinds(plan.back(spark(), not_yet, facts.current, plan.Options())) == ["cut-over"]


def test_the_unit_names_its_release_and_hides_nothing_it_needs() -> None:
    unit = settled().releases[0].files["comfyui.service"]
    name = settled().current
    assert f"ExecStart=/opt/comfyui/releases/{name}/env/bin/python /opt/comfyui/releases/{name}/app/main.py" in unit
    assert "current" not in unit.partition("[Service]")[2].replace("$current", "")
    for line in ("DeviceAllow=char-nvidia-frontend rw", "KillSignal=SIGINT", "ProtectSystem=strict", "User=comfyui"):
        assert line in unit
    assert "$" not in "".join(line for line in unit.splitlines() if not line.startswith("#")).replace("$$", "")


@pytest.mark.parametrize(
    ("packages", "required", "noted", "refused"),
    [
        ({"ffmpeg": False, "libgl1": True}, False, True, False),
        ({"ffmpeg": False, "libgl1": True}, True, False, True),
        ({"ffmpeg": True, "libgl1": True}, True, False, False),
        ({}, True, False, False),
    ],
)
def test_missing_system_packages_are_noted_or_refused(
    packages: dict[str, bool], required: bool, noted: bool, refused: bool
) -> None:
    node = nodes.Node(url="u", commit="c" * 40, tree="t", why="w", required=required, system=("ffmpeg", "libgl1"))
    found = made(replace(FRESH, packages=packages), stock=replace(inputs(), nodes={"mine": node}))
    said = "node mine needs ffmpeg, missing on the host; on the host: apt-get install ffmpeg"
    assert (said in found.notes) is noted
    assert reasons(found) == ["no-package"] * refused
    assert bool(found.steps) is not refused


@pytest.mark.parametrize("required", [False, True])
def test_a_node_without_packages_for_the_host_is_left_out_or_refused(required: bool) -> None:
    listed = nodes.Node(url="u", commit="c" * 40, tree="t", why="w", required=required)
    stock = replace(inputs(), nodes={"video": listed, "mine": msgspec.structs.replace(listed, required=False)})
    lacking = {key: replace(lock, text=f"# Without video: no wheel\n{lock.text}") for key, lock in stock.locks.items()}
    assert made(stock=stock).notes == made(stock=replace(stock, nodes={})).notes
    found = made(stock=replace(stock, locks=lacking))
    said = "node video is not available for cu130-linux_aarch64-cp312: no wheel"
    assert (f"left out: {said}" in found.notes) is not required
    assert reasons(found) == ["unavailable-node"] * required
    assert [values(step)["node"] for step in found.steps if step.kind == "node"] == ["mine"] * (not required)


def managed(**values: Any) -> Target:
    target = spark(**values)
    flags = {**target.profile.flags, "--enable-manager": Setting(why="a test")}
    return replace(target, profile=msgspec.structs.replace(target.profile, flags=flags))


def test_manager_is_opt_in() -> None:
    locks = {key: replace(lock, text=LOCKED) for key, lock in inputs().locks.items()}
    without, chosen = (made(target=each, stock=replace(inputs(), locks=locks)) for each in (spark(), managed()))
    for found, expected in ((without, False), (chosen, True)):
        (env,) = (step for step in found.steps if step.kind == "env")
        (written,) = (values(step)["release"] for step in found.steps if step.kind == "release")
        assert ("comfyui-manager==1" in values(env)["requirements"]) is expected
        assert ("user/__manager/config.ini" in written["files"]) is expected
        assert "torch==1" in values(env)["requirements"]


LOCKED = """\
torch==1
    # via -r hearth.txt
comfyui-manager==1
    # via -r ComfyUI-Manager.node.txt
"""


def test_manager_settings_are_read_only() -> None:
    """Without a mount: systemd, as root, follows the service's symlinks on the way to a mount point."""
    target = managed()
    moved = replace(target, host=msgspec.structs.replace(target.host, folders={"user": "/srv/mine"}))
    there = replace(FRESH, places={"/srv/mine": ""})
    for each, user in ((target, "/opt/comfyui/data/user"), (moved, "/srv/mine")):
        (written,) = (values(step)["release"] for step in made(there, each).steps if step.kind == "release")
        place = f"/opt/comfyui/releases/{written['id']}"
        assert written["argv"][written["argv"].index("--user-directory") + 1] == f"{place}/user"
        assert "security_level = strong" in written["files"]["user/__manager/config.ini"]
        assert "user/__manager/startup-scripts" in written["empty"]
        assert "user" not in written["links"]
        assert written["links"]["user/default"] == f"{user}/default"
        assert f"{user}/__manager/cache" in re.findall("ExecStartPre=-(.*)", written["files"]["comfyui.service"])[0]


@pytest.mark.parametrize("each", [spark(), managed(), spark(folders={"user": "/srv/mine"}), spark(develop=("/srv/n",))])
def test_binds_are_not_below_writable_folders(each: Target) -> None:
    places = dict.fromkeys(each.host.folders.values(), "")
    unit = unit_of(made(replace(FRESH, places=places), each))
    written = ["/opt/comfyui/data", *places]
    mounts = re.findall(r"^(?:\w+Paths|TemporaryFileSystem)=(.*)$", unit, re.MULTILINE)
    assert [line for line in mounts for path in written if f"{path}/" in line] == []


PLANTED = "open({proof!r}, 'a').write(__file__ + ' ')\n"
SPAWNS = """
import multiprocessing, subprocess, sys
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=print)
    child.start(); child.join()
    for words in (["-c", "import datasets"], ["-m", "timeit", "-n1", "-r1", "import models"]):
        subprocess.run([sys.executable, *words])
"""


@pytest.mark.process
@pytest.mark.parametrize("scope", ["system", "user"])
def test_service_cannot_write_code(tmp_path: Path, scope: str) -> None:
    """In the working directory, which Python searches first for -c and -m, or in Python's folders in a home."""
    target = spark(scope=scope)
    found = made(replace(FRESH, prefix=str(tmp_path)), target)
    unit = unit_of(found)
    (folder,) = re.findall("^WorkingDirectory=(.*)$", unit, re.MULTILINE)
    variables = dict(re.findall('^Environment="(.*?)=(.*)"$', unit, re.MULTILINE))
    data = tmp_path / "data"
    user = Path(variables["HOME"]) / f".local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    for place in (data, Path(variables["HOME"]), user):
        place.mkdir(parents=True, exist_ok=True)
        for name in ("multiprocessing", "timeit", "datasets", "models", "sitecustomize", "usercustomize"):
            (place / f"{name}.py").write_text(PLANTED.format(proof=str(tmp_path / "ran")))
    (user / "x.pth").write_text("import usercustomize\n")
    (tmp_path / "app").mkdir()
    (tmp_path / "app/main.py").write_text(SPAWNS)
    subprocess.run(
        [os.path.realpath(sys.executable), tmp_path / "app/main.py"], cwd=folder, env=variables, capture_output=True
    )
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert "LimitCORE=1" in unit.splitlines()  # otherwise crash collectors record the secrets


@pytest.mark.parametrize("flag", ["--enable-cors-header", "--multi-user", "--tls-keyfile"])
def test_flags_that_open_what_a_gateway_closes_are_refused(flag: str) -> None:
    target = spark()
    profile = msgspec.structs.replace(target.profile, flags={flag: Setting(why="w", value="x")})
    alone = replace(target, profile=profile, origin={f"flags.{flag}": "host spark"})
    stock = replace(inputs(), flags={**FLAGS, flag: application.Flag(flag, "1", "str", (), "")})
    assert "unfit-flag" not in reasons(made(target=alone, stock=stock))
    assert "unfit-flag" in reasons(made(target=replace(alone, gateways=("home",)), stock=stock))


def test_path_flags_are_reserved() -> None:
    flags = {"--base-directory": Setting(why="a test", value="/srv/mine")}
    target = replace(spark(), profile=msgspec.structs.replace(spark().profile, flags=flags))
    known = FLAGS | application.flags("parser.add_argument('--base-directory', type=str)\n")
    (refusal,) = made(target=target, stock=replace(inputs(), flags=known)).refusals
    assert (refusal.kind, refusal.what.split()[0]) == ("own-flag", "--base-directory")


def test_foreign_account_is_refused() -> None:
    assert reasons(made(replace(FRESH, user=True, user_problem="is root"))) == ["foreign-user"]


def unit_of(found: plan.Plan) -> str:
    (step,) = (each for each in found.steps if each.kind == "release")
    return str(values(step)["release"]["files"]["comfyui.service"])


@pytest.mark.parametrize(("network", "reached", "denied"), [
    ("open", "1.1.1.1 10.0.0.1 2606:4700::1", "169.254.169.254 fe80::1 febf::1 fd00:ec2::254 224.0.0.251 ff02::1"),
    ("lan-deny", "1.1.1.1 8.8.8.8 2606:4700::1 2001:200::1 127.0.0.53",
     "10.0.0.1 172.31.9.9 192.168.1.1 100.64.0.1 0.0.0.0 255.255.255.255 240.0.0.1 239.1.1.1 198.19.0.1 192.0.0.8 "
     "fc00::1 fdff::1 febf::1 fec0::1 ::ffff:10.0.0.1 64:ff9b::a00:1 64:ff9b:1::1 2002:a00:1:: 2001::1 ::"),
    ("offline", "127.0.0.1 ::1", "127.0.0.53 127.0.0.54 127.0.1.1 1.1.1.1 10.0.0.1 ::ffff:127.0.0.53"),
])  # fmt: skip
def test_network_policy_in_the_unit(network: str, reached: str, denied: str) -> None:
    profile = msgspec.structs.replace(spark().profile, network=network)
    unit = unit_of(made(target=replace(spark(), profile=profile)))
    names = {"link-local": "169.254.0.0/16 fe80::/64", "multicast": "224.0.0.0/4 ff00::/8", "any": "0.0.0.0/0 ::/0"}

    def listed(key: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        words = " ".join(re.findall(rf"^IPAddress{key}=(.*)$", unit, re.MULTILINE)).split()
        return [ipaddress.ip_network(each) for word in words for each in names.get(word, word).split()]

    def allowed(address: str) -> bool:
        each = ipaddress.ip_address(address)
        return any(each in net for net in listed("Allow")) or not any(each in net for net in listed("Deny"))

    assert [each for each in reached.split() if not allowed(each)] == []
    assert [each for each in denied.split() if allowed(each)] == []
    # sockets through which other processes would access it
    assert bool(re.search(r"^BindReadOnlyPaths=.*resolve.*nscd", unit, re.MULTILINE)) is (network != "offline")


@pytest.mark.parametrize(("network", "values", "kind"), [
    ("lan-deny", {"listen": "0.0.0.0"}, "network-blocks-clients"),
    ("offline", {"listen": "192.168.1.2"}, "network-blocks-clients"),
    ("lan-deny", {"scope": "user"}, "network-unenforced"),
])  # fmt: skip
def test_inconsistent_network_policy_is_refused(network: str, values: dict[str, Any], kind: str) -> None:
    target = spark(**values)
    target = replace(target, profile=msgspec.structs.replace(target.profile, network=network))
    assert reasons(made(target=target)) == [kind]


def test_the_manager_is_refused_where_it_could_change_its_own_security_level() -> None:
    assert reasons(made(target=managed(scope="user"))) == ["manager-unprotected"]
    assert made(target=managed()).steps


def test_every_locked_list_exists() -> None:
    for stack, platform, python in requirements.combinations(application.version()):
        lock = requirements.find(stack.name, platform.value, python)
        assert lock is not None
        assert f"torch=={stack.torch}" in lock.text
        assert "--hash=sha256:" in lock.text
    assert len(list((files.CHECKOUT / "recipes/comfyui/locks").iterdir())) == len(
        requirements.combinations(application.version())
    )
