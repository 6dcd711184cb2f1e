"""Containers on a host: the release's `.container` file, refusals, the agent's steps and facts."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.change import trees, trial
from agent.change.env import use_interpreter
from agent.files import AgentError, write
from agent.layout import Layout
from agent.look import engine as look
from agent.look.prefix import prefix_state
from agent.schema import change as schema
from agent.schema.change import Base, Env, Release
from agent.schema.facts import Engine
from agent.schema.live import Containers, Probe
from agent.schema.manifest import Gate, ReleaseManifest
from agent.serve import systemd
from core import workspace
from core.stack import Platform
from core.typed import convert
from core.workspace import Workspace
from deploy import bundle, containers, image_layout, plan
from deploy.facts import Facts
from deploy.host import Host, Target
from deploy.host_rules import check_host
from deploy.image_parts import Layer
from deploy.inputs import Inputs
from deploy.profile import Setting
from lock import image_base
from lock.nodes import Node
from ops import doctor
from ops.checks import Case
from tests.errors import raises
from tests.plans import FRESH, RUNNING, inputs, kinds, made, reasons, spark, wheel
from tests.unit.test_doctor import NOW, PROBE, WELL

ENGINE = Engine("5.4.2", True, ("cpu", "memory", "pids"), True, ("nvidia.com/gpu=0", "nvidia.com/gpu=all"))
READY = replace(FRESH, engine=ENGINE)
OWN = "/home/d/.local/share/hearth/comfyui"


def stock(**values: Any) -> Inputs:
    wheels = [wheel(name, python="3.11") for name in ("sageattention", "flash-attn")]
    return replace(inputs(*wheels), **values)


def boxed(facts: Facts = READY, target: Target | None = None, given: Inputs | None = None, **host: Any) -> plan.Plan:
    return made(facts, target or spark(runtime="podman", **host), given or stock())


def unit(found: plan.Plan) -> dict[str, list[str]]:
    """The values of each key of the release's `.container` file, and its sections with their keys."""
    (step,) = (each for each in found.steps if each.kind == "release")
    files: dict[str, str] = step.release.files  # type: ignore[attr-defined]
    assert not [name for name in files if name == "comfyui.service"]
    lines = [line for line in files["comfyui.container"].splitlines() if re.match(r"\w+=", line)]
    values: dict[str, list[str]] = {}
    for key, _, value in (line.partition("=") for line in lines):
        values.setdefault(key, []).append(value)
    return values


def test_a_container_is_a_release_with_its_base() -> None:
    found = boxed()
    assert kinds(found) == ["account", "folders", "base", "app", "tool", "env", "release", "cut-over", "prune"]
    base, env = (next(each for each in found.steps if isinstance(each, kind)) for kind in (Base, Env))
    assert isinstance(base, Base)
    assert isinstance(env, Env)
    assert base.part == containers.base_part(Platform.LINUX_AARCH64, cuda=True)
    assert base.part != containers.base_part(Platform.LINUX_AARCH64, cuda=False)
    assert base.part != containers.base_part(Platform.LINUX_X86_64, cuda=True)
    # The parts are made by the Python that will run them, which need not be the host's.
    assert (env.version, env.inside) == ("3.11", "/usr/bin/python3.11")
    assert env.python == base.python == f"/opt/comfyui/parts/{base.part}/usr/bin/python3.11"


def test_a_second_plan_does_nothing() -> None:
    found = boxed()
    (manifest,) = (each.release for each in found.steps if each.kind == "release")  # type: ignore[attr-defined]
    after = replace(
        READY, user=True, data=True, current=manifest.id, releases=(manifest,), proven=(manifest.id,),
        parts=dict.fromkeys(manifest.parts.values(), ""), service=RUNNING, tools=("uv-1",),
    )  # fmt: skip
    assert kinds(boxed(after)) == []
    # Its service is found, and a rollback to it allowed.
    assert kinds(plan.back(spark(runtime="podman"), after, manifest.id, plan.Options())) == []


def test_a_native_release_is_unchanged_by_the_runtime() -> None:
    (native,) = (each.release for each in made().steps if each.kind == "release")  # type: ignore[attr-defined]
    assert "base" not in native.parts
    assert "comfyui.service" in native.files


def test_the_unit_of_a_system_container() -> None:
    found = boxed(model_roots=("/mnt/more",), folders={"models": "/mnt/models"}, listen="0.0.0.0,::1")
    values = unit(found)
    (base,) = (each.part for each in found.steps if isinstance(each, Base))
    release, data = f"/opt/comfyui/releases/{found.release}", "/opt/comfyui/data"
    assert values["Rootfs"] == [f"/opt/comfyui/parts/{base}:O"]
    assert values["Volume"] == [
        *(f"{each}:{each}:ro" for each in ("/opt/comfyui/parts", release, "/mnt/more", "/etc/passwd", "/etc/group")),
        *(f"{each}:{each}:rw,z" for each in (data, "/mnt/models")),
    ]
    assert shlex.split(values["Exec"][0])[:2] == [f"{release}/env/bin/python", f"{release}/app/main.py"]
    for key, value in (
        ("User", "comfyui"), ("Network", "host"), ("ReadOnly", "true"), ("DropCapability", "all"),
        ("NoNewPrivileges", "true"), ("AddDevice", "nvidia.com/gpu=all"), ("Notify", "healthy"),
        ("LogDriver", "passthrough"), ("SuccessExitStatus", "SIGINT 130"), ("MemoryMax", "90%"), ("TasksMax", "4096"),
    ):  # fmt: skip
        assert values[key] == [value], key
    assert {"UserNS", "AutoUpdate", "Image", "CPUQuota"}.isdisjoint(values)
    words = shlex.split(" ".join(values["PodmanArgs"]))
    assert words[words.index("--stop-signal") + 1] == "SIGINT"
    check = json.loads(values["HealthCmd"][0])
    assert check[:3] == ["/usr/bin/python3.11", "-I", "-S"]
    assert "'http://[::1]:8188/system_stats'" in check[-1]
    assert values["IPAddressDeny"][0].startswith("link-local")


def test_the_unit_of_a_container_without_root() -> None:
    facts = replace(READY, prefix=OWN, manager="systemd-user", root=False)
    values = unit(boxed(facts, scope="user"))
    assert values["UserNS"] == ["keep-id"]
    assert not {"User", "IPAddressDeny"} & set(values)
    assert not [each for each in values["Volume"] if each.startswith("/etc/")]
    assert f"{OWN}/data:{OWN}/data:rw,z" in values["Volume"]
    assert not [note for note in boxed(facts, scope="user").notes if "Landlock" in note]


def test_values_survive_quadlet_and_systemd() -> None:
    setting = Setting(value='50% of "$HOME"', why="test")
    target = spark(runtime="podman")
    found = unit(boxed(target=replace(target, profile=msgspec.structs.replace(target.profile, env={"A": setting}))))
    assert '"A=50%% of \\"$HOME\\""' in found["Environment"]


def test_limits_of_processors() -> None:
    target = spark(runtime="podman")
    target = replace(target, profile=msgspec.structs.replace(target.profile, cpu_max="400%"))
    assert unit(boxed(target=target))["CPUQuota"] == ["400%"]
    without = replace(READY, engine=replace(ENGINE, controllers=("memory", "pids")))
    assert reasons(boxed(without, target)) == ["no-limits"]
    with raises("config"):
        check_host("here", convert({"override": {"cpu_max": "4"}}, Host))


@pytest.mark.parametrize(
    ("changed", "kind", "words"),
    [
        ({"version": ""}, "no-engine", "Podman"),
        ({"version": "4.3.1", "quadlet": False}, "old-engine", "4.3.1"),
        ({"version": "4.4.0"}, "old-engine", "4.4.0"),
        ({"quadlet": False}, "old-engine", "generator"),
        ({"controllers": None}, "no-cgroups", "cgroup v2"),
        ({"controllers": ("pids",)}, "no-limits", "memory"),
        ({"devices": ("nvidia.com/gpu=0",)}, "no-cdi", "nvidia.com/gpu=all"),
    ],
)
def test_a_host_without_what_containers_need_is_refused(changed: dict[str, Any], kind: str, words: str) -> None:
    found = boxed(replace(READY, engine=replace(ENGINE, **changed)))
    assert reasons(found) == [kind]
    assert words in found.refusals[0].what
    assert not found.steps


def test_containers_without_root_need_subordinate_ids_and_systemd() -> None:
    facts = replace(READY, prefix=OWN, manager="process", root=False, engine=replace(ENGINE, subids=False))
    assert reasons(boxed(facts, scope="user")) == ["no-subids", "no-systemd"]
    # A system service needs no subordinate ids.
    assert kinds(boxed(replace(READY, engine=replace(ENGINE, subids=False))))


def test_a_container_needs_no_python_of_its_version_on_the_host() -> None:
    assert kinds(boxed(replace(READY, pythons={"3.13": "/usr/bin/python3.13"})))
    assert reasons(boxed(replace(READY, pythons={}))) == ["no-python"]
    assert reasons(boxed(replace(READY, glibc="2.35"))) == ["old-glibc"]


def manifest(found: plan.Plan) -> ReleaseManifest:
    (step,) = (each for each in found.steps if isinstance(each, Release))
    return step.release


def test_secrets_reach_comfyui_by_files_that_only_its_user_reads() -> None:
    facts = replace(READY, secrets={"HF_TOKEN": "encrypted", "OTHER": "plain"})
    found = boxed(facts, secrets=("HF_TOKEN", "OTHER"))
    values, release = unit(found), f"/opt/comfyui/releases/{found.release}"
    assert values["LoadCredentialEncrypted"] == ["HF_TOKEN:/opt/comfyui/secrets/HF_TOKEN.cred"]
    assert values["LoadCredential"] == ["OTHER:/opt/comfyui/secrets/OTHER"]
    assert {"%t/%N/secrets:/run/hearth/secrets:ro,z", f"{release}/agent:/run/hearth/agent:ro"} < {*values["Volume"]}
    words = shlex.split(values["Exec"][0])
    assert words[:5] == ["/usr/bin/python3.11", "-I", "-S", "/run/hearth/agent", "confine"]
    assert json.loads(words[5])["secrets"] == ["HF_TOKEN", "OTHER"]
    assert words[7] == f"{release}/env/bin/python"
    # The trial passes them in the same way.
    assert manifest(found).confined == tuple(words[:7])
    assert "TOKEN" not in " ".join([*values["Environment"], *values["PodmanArgs"]])


def test_secrets_of_a_container_without_root_are_its_logins_files() -> None:
    facts = replace(READY, prefix=OWN, manager="systemd-user", root=False, secrets={"HF_TOKEN": "plain"})
    values = unit(boxed(facts, scope="user", secrets=("HF_TOKEN",)))
    assert f"{OWN}/secrets/HF_TOKEN:/run/hearth/secrets/HF_TOKEN:ro,z" in values["Volume"]
    assert not {"RuntimeDirectory", "LoadCredential"} & set(values)


@pytest.mark.parametrize("scope", ["system", "user"])
def test_nodes_under_development_are_mounted(scope: str) -> None:
    facts = READY if scope == "system" else replace(READY, prefix=OWN, manager="systemd-user", root=False)
    found = boxed(facts, scope=scope, develop=("/srv/one",), modes=("development",))
    values, written = unit(found), manifest(found)
    at = f"/opt/comfyui/releases/{found.release}/custom_nodes/one" if scope == "system" else "/srv/one"
    assert f"%t/%N/nodes/one:{at}:ro" in values["Volume"]
    assert values["ExecStartPre"][0].endswith(" sh one /srv/one")
    assert written.develop == (at,)
    assert "comfyui-reload.service" in written.files


def prepared(unit: str, folder: Path) -> None:
    """Run a unit's commands before the start, with its folder in /run here."""
    for line in unit.splitlines():
        key, _, command = line.partition("=")
        if key == "ExecStartPre":
            argv = shlex.split(command.replace("$$", "$").replace("%%", "%"))
            subprocess.run(argv, check=True, env={"RUNTIME_DIRECTORY": str(folder), "PATH": "/usr/bin:/bin"})


def test_a_missing_node_does_not_keep_a_container_from_starting(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    develop = (f"{tmp_path}/here", f"{tmp_path}/gone")
    found = boxed(develop=develop, modes=("development",))
    (tmp_path / "run").mkdir()
    prepared(manifest(found).files["comfyui.container"], tmp_path / "run")
    assert (tmp_path / "run/nodes/here").readlink() == tmp_path / "here"
    assert [*(tmp_path / "run/nodes/gone").iterdir()] == []


def test_proofs_and_install_scripts_run_in_a_container_of_their_own() -> None:
    node = Node(url="https://a/b", commit="c" * 40, tree="t" * 64, install="why", why="test")
    found = boxed(given=stock(nodes={"one": node}))
    (step,) = (each for each in found.steps if isinstance(each, schema.Node))
    assert step.unit == manifest(found).files["comfyui.container"]


@pytest.mark.parametrize("scope", ["system", "user"])
def test_the_manager_gets_its_folders_inside_the_container(scope: str) -> None:
    target = spark(runtime="podman", scope=scope)
    flags = {"--enable-manager": Setting(value="", why="test")}
    target = replace(target, profile=msgspec.structs.replace(target.profile, flags=flags))
    facts = READY if scope == "system" else replace(READY, prefix=OWN, manager="systemd-user", root=False)
    found = boxed(facts, target)
    words = shlex.split(unit(found)["Exec"][0])
    data = f"{facts.prefix}/data/user"
    assert json.loads(words[5])["make"][:2] == [f"{data}/default", f"{data}/__manager/cache"]
    assert "security_level = strong" in manifest(found).files["user/__manager/config.ini"]


def test_a_network_without_effect_is_refused() -> None:
    facts = replace(READY, prefix=OWN, manager="systemd-user", root=False)
    target = spark(runtime="podman", scope="user")
    target = replace(target, profile=msgspec.structs.replace(target.profile, network="offline"))
    assert "network-unenforced" in reasons(boxed(facts, target))


def test_a_bundle_without_a_base_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_base, "recipe", list)
    assert reasons(boxed()) == ["no-base"]


def test_a_bundle_has_the_root_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = workspace.current()
    mine = replace(here, cache=tmp_path / "mine")
    theirs = Workspace.of_bundle(tmp_path / "bundle")
    platform, target = Platform.LINUX_AARCH64, spark(runtime="podman")

    def debian(_: Platform, group: str) -> Layer:
        def entries() -> Any:
            if workspace.current().bundled:
                pytest.fail("a bundle has the layers")
            return nullcontext([image_layout.file(f"etc/{group}", b"1")])

        return group, entries

    monkeypatch.setattr(containers, "debian", debian)
    with workspace.using(mine):
        for name, path in bundle._root(target, platform).items():
            (tmp_path / "bundle" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "bundle" / name).write_bytes(path.read_bytes())
    with workspace.using(theirs):
        assert {path.name for path in image_base.recipe()} == {"base.toml", "base.lock"}
        found = []
        for path in containers.archives(platform, tmp_path, cuda=target.profile.cuda):
            with tarfile.open(path) as archive:
                found += [each for each in archive.getnames() if "/" in each]
    assert found == ["etc/base", "etc/compiler"]


def test_the_doctor_names_what_containers_lack() -> None:
    lacking = replace(READY, engine=replace(ENGINE, version="4.3.1", devices=()), lingers=False)
    for runtime, wanted in (("podman", 3), ("native", 0)):
        target = spark(runtime=runtime)
        case = Case(target, lacking, WELL, PROBE, stock(), made(lacking, target, stock()), NOW)
        assert len([each for each in doctor.judge(case) if each.check == "engine"]) == wanted


def test_a_container_has_its_own_compiler() -> None:
    (manifest,) = (each.release for each in boxed().steps if each.kind == "release")  # type: ignore[attr-defined]
    probe = replace(PROBE, compiler="", headers="")
    for parts, wanted in ((manifest.parts, 0), ({"app": "app-1"}, 2)):
        facts = replace(READY, current=manifest.id, releases=(replace(manifest, parts=parts),))
        case = Case(spark(), facts, WELL, probe, stock(), boxed(), NOW)
        assert len([each for each in doctor.judge(case) if each.check == "compilers"]) == wanted


@pytest.mark.parametrize(
    ("changed", "problems"),
    [({}, 0), ({"toolkit": "1.17.8"}, 1), ({"toolkit": ""}, 1), ({"devices": ()}, 1), ({"lasting": False}, 1)],
)
def test_the_doctor_checks_the_toolkit_and_its_description(changed: dict[str, Any], problems: int) -> None:
    found = replace(Containers(("podman",), "1.18.0", ("nvidia.com/gpu=all",), True), **changed)
    probe: Probe = replace(PROBE, containers=found)
    case = Case(spark(), READY, WELL, probe, stock(), boxed(), NOW)
    assert len([each for each in doctor.judge(case) if each.check == "containers"]) == problems


# --- the agent -------------------------------------------------------------------------------------------------------


def layout(tmp_path: Path, **values: Any) -> Layout:
    given = {
        "prefix": str(tmp_path / "p"),
        "service": "comfyui",
        "scope": "system",
        "user": "",
        "address": "",
        "port": 1,
    }
    return Layout({**given, **values})


@pytest.fixture
def managed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> systemd.Systemd:
    """The service's manager in a folder; `systemctl` does nothing. Release `boxed` is a container, `native` is not."""
    for name in ("UNITS", "QUADLETS"):
        monkeypatch.setattr(systemd, name, tmp_path / name)
    monkeypatch.setattr(systemd, "run", lambda *_, **__: "")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: None)
    place = layout(tmp_path)
    place.state.mkdir(parents=True)
    for release, end in (("boxed", "container"), ("native", "service")):
        write(place.releases / release / f"comfyui.{end}", f"# {systemd.WRITTEN} {release}\n")
        write(place.releases / release / "release.json", json.dumps({"id": release}))
    return systemd.Systemd(place)


def switch(manager: systemd.Systemd, release: str) -> None:
    manager.layout.current.unlink(missing_ok=True)
    manager.layout.current.symlink_to(f"releases/{release}")


def test_releases_with_and_without_container_replace_each_other(managed: systemd.Systemd) -> None:
    wants = managed.units / "multi-user.target.wants/comfyui.service"
    for release, name in (("native", "comfyui.service"), ("boxed", "comfyui.container"), ("native", "comfyui.service")):
        switch(managed, release)
        assert not managed.status().linked
        managed.install()
        status = managed.status()
        assert (status.linked, status.enabled, managed.foreign()) == (True, True, "")
        # A unit file in /etc would hide the one that Quadlet makes.
        assert set(managed.placed()) == {managed.place(name), wants}
        assert managed.place(name).resolve() == managed.layout.releases / release / name
    managed.uninstall()
    assert managed.placed() == []


@pytest.mark.parametrize(("release", "waits"), [("native", True), ("boxed", False)])
def test_a_restart_does_not_wait_for_a_container_to_answer(
    managed: systemd.Systemd, monkeypatch: pytest.MonkeyPatch, release: str, *, waits: bool
) -> None:
    """A node under development may keep ComfyUI from answering, until its next change restarts it."""
    calls: list[list[str]] = []
    monkeypatch.setattr(systemd, "run", calls.append)
    switch(managed, release)
    managed.restart()
    assert calls == [["systemctl", "restart", *([] if waits else ["--no-block"]), "comfyui.service"]]


def test_a_container_of_another_prefix_is_found(managed: systemd.Systemd, tmp_path: Path) -> None:
    switch(managed, "boxed")
    managed.install()
    assert prefix_state(managed.layout).elsewhere == ""
    write(managed.layout.state / "site.json", "{}")
    assert prefix_state(layout(tmp_path, prefix=str(tmp_path / "other"))).elsewhere == str(managed.layout.prefix)


def test_a_foreign_container_is_not_replaced(managed: systemd.Systemd) -> None:
    switch(managed, "boxed")
    write(managed.place("comfyui.container"), "[Container]\nImage=docker.io/other\n")
    assert managed.foreign() == str(managed.place("comfyui.container"))


def test_the_process_is_the_child_of_the_engines_monitor(managed: systemd.Systemd) -> None:
    switch(managed, "native")
    assert managed.process(os.getppid()) == os.getppid()
    switch(managed, "boxed")
    assert managed.process(os.getppid()) != os.getppid()
    assert managed.process(0) == 0


def test_the_trial_of_a_container_has_scratch_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = layout(tmp_path, folders={"models": "/mnt/models", "output": "/srv/output"})
    for each in (place.data / "user", place.state):
        each.mkdir(parents=True)
    argv = ("python", "--listen", "0.0.0.0", "--port", "8188", "--x", "$50%")
    release = ReleaseManifest(id="r", argv=argv, gate=Gate(seconds=1, imports=("kernel",)))
    text = unit_text(place)
    write(place.releases / "r/comfyui.container", text)
    monkeypatch.setattr(trial, "run", lambda *_: "")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: None)
    tried = trial.SystemdTrial(place)
    for name, value in (("units", tmp_path / "units"), ("quadlets", tmp_path / "quadlets")):
        monkeypatch.setattr(tried.unit, name, value)
    tried.place = tmp_path / "units/comfyui-trial.service"
    monkeypatch.setattr(tried.unit, "start", lambda: None)
    monkeypatch.setattr(tried.unit, "stop", lambda: None)
    tried.start(release)
    said = (tmp_path / "quadlets/comfyui-trial.container").read_text()
    listed = [line.partition("=")[::2] for line in said.splitlines() if "=" in line]
    volumes = {value for key, value in listed if key == "Volume"}
    room = place.state / "trial"
    assert volumes == {
        "/opt/parts:/opt/parts:ro", f"{room}/data:{place.data}:rw,z", f"{room}/output:/srv/output:rw,z",
        f"{place.data}:/run/comfyui-data:ro", "/mnt/models:/mnt/models:ro",
    }  # fmt: skip
    values = dict(listed)
    assert (values["ContainerName"], values["Restart"], values["ReadOnly"]) == ("comfyui-trial", "no", "true")
    assert not {"Notify", "HealthCmd", "BindsTo"} & set(values)
    shell, flag, script = shlex.split(values["Exec"].replace("$$", "$").replace("%%", "%"))
    assert (shell, flag) == ("/bin/sh", "-c")
    assert script.startswith("python -I -B -c 'import torch, kernel' && exec python --listen 127.0.0.1 --port ")
    assert script.endswith("'$50%'")
    assert (room / "data/models").readlink() == Path("/run/comfyui-data/models")
    tried.clear()
    assert not (tmp_path / "quadlets/comfyui-trial.container").exists()
    assert not room.exists()


def unit_text(place: Layout) -> str:
    return f"""[Unit]
BindsTo=comfyui-storage.service
[Container]
ContainerName=comfyui
Exec=python
ReadOnly=true
Volume=/opt/parts:/opt/parts:ro
Volume={place.data}:{place.data}:rw,z
Volume=/mnt/models:/mnt/models:rw,z
Volume=/srv/output:/srv/output:rw,z
Notify=healthy
HealthCmd=x
[Service]
Restart=always
"""


def packed(place: Layout, **files: str) -> str:
    """An uploaded archive; returns its hash."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size, info.mode = len(text), 0o755
            archive.addfile(info, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("etc/alternatives")
        link.type, link.linkname = tarfile.SYMTYPE, "/usr/alternatives"
        archive.addfile(link)
    digest = hashlib.sha256(raw.getvalue()).hexdigest()
    write(place.incoming / digest, raw.getvalue())
    return digest


def test_the_base_is_a_part_whose_python_runs(tmp_path: Path) -> None:
    place = layout(tmp_path)
    python = f"{place.parts}/base-1/bin__python".replace("__", "/")
    blobs = (packed(place, bin__python=f'#!/bin/sh\nexec {sys.executable} "$@"\n'), packed(place, etc__more="x"))
    trees.base(place, Base("t", "w", "u", "base-1", python, blobs), lambda _: None)
    assert (place.parts / "base-1/etc/more").read_text() == "x"
    assert (place.parts / "base-1/etc/alternatives").readlink() == Path("/usr/alternatives")
    assert (place.parts / "base-1/PART.json").exists()
    broken = (packed(place, bin__python="#!/bin/sh\nexit 1\n"),)
    with pytest.raises(AgentError):
        trees.base(place, Base("t", "w", "u", "base-2", python.replace("base-1", "base-2"), broken), lambda _: None)
    assert not (place.parts / "base-2").exists()


def test_an_environment_gets_the_containers_interpreter(tmp_path: Path) -> None:
    write(tmp_path / "pyvenv.cfg", "home = /opt/p/parts/base-1/usr/bin\nversion_info = 3.11.2\nrelocatable = true\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to("/opt/p/parts/base-1/usr/bin/python3.11")
    use_interpreter(tmp_path, Path("/usr/bin/python3.11"))
    assert (tmp_path / "bin/python").readlink() == Path("/usr/bin/python3.11")
    assert (tmp_path / "pyvenv.cfg").read_text().splitlines()[:2] == ["home = /usr/bin", "version_info = 3.11.2"]


YAML = """---
cdiVersion: 0.5.0
kind: nvidia.com/gpu
devices:
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
  name: "0"
- name: all
"""


def test_the_engine_and_what_it_needs_are_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/podman").write_text("#!/bin/sh\necho podman version 4.3.1\n")
    (tmp_path / "bin/podman").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    monkeypatch.setattr(look, "GENERATORS", (str(tmp_path),))
    monkeypatch.setattr(look, "CGROUPS", tmp_path / "cgroups")
    monkeypatch.setattr(look, "CDI", (tmp_path / "etc", tmp_path / "run"))
    monkeypatch.setattr(look, "SUBIDS", (tmp_path / "subuid", tmp_path / "subgid"))
    place = layout(tmp_path, scope="user")
    assert look.engine(place) == Engine("4.3.1", False, None, False, ())
    write(tmp_path / "user-generators/podman-user-generator", "")
    write(tmp_path / "cgroups/cgroup.controllers", "cpu memory pids\n")
    own = f"user.slice/user-{os.getuid()}.slice/user@{os.getuid()}.service/cgroup.controllers"
    write(tmp_path / "cgroups" / own, "memory pids\n")
    write(tmp_path / "etc/nvidia.yaml", YAML)
    write(tmp_path / "run/other.json", json.dumps({"kind": "vendor.com/net", "devices": [{"name": "eth"}]}))
    write(tmp_path / "run/nvidia.json", json.dumps({"kind": "nvidia.com/gpu", "devices": [{"name": "1:0"}]}))
    write(tmp_path / "subuid", f"{os.getuid()}:100000:65536\n")
    write(tmp_path / "subgid", "somebody-else:100000:65536\n")
    devices = tuple(f"nvidia.com/gpu={name}" for name in ("0", "1:0", "all"))
    assert look.engine(place) == Engine("4.3.1", True, ("memory", "pids"), False, devices)
    write(tmp_path / "subgid", f"other:1:1\n{systemd.login()}:100000:65536\n")
    assert look.engine(place).subids
    assert look.engine(layout(tmp_path)).controllers == ("cpu", "memory", "pids")


def test_the_container_file_has_known_keys_only() -> None:
    """Quadlet refuses a file with an unknown key, and makes no unit: the keys are those of Podman 4.8."""
    known = {
        "AddDevice", "ContainerName", "DropCapability", "Environment", "Exec", "HealthCmd", "HealthInterval",
        "HealthRetries", "HealthStartupCmd", "HealthStartupInterval", "HealthStartupRetries", "HealthStartupTimeout",
        "HealthTimeout", "LogDriver", "Network", "NoNewPrivileges", "Notify", "PodmanArgs", "ReadOnly", "Rootfs",
        "User", "UserNS", "Volume",
    }  # fmt: skip
    text = (Path(workspace.current().checkout) / "recipes/comfyui/units/podman.container").read_text()
    section = text.partition("[Container]")[2].partition("\n[")[0]
    found = set(re.findall(r"^(\w+)=", section, re.MULTILINE))
    assert found < known
