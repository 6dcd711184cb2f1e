"""Modes: merged over profiles, by version and type of memory; nodes under development; freed memory."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.layout import Layout
from agent.schema.change import Release
from agent.schema.live import CommandLine
from agent.schema.manifest import ReleaseManifest
from agent.serve import health, systemd
from agent.serve.watch import Watcher
from core import files, workspace
from core.stack import stacks
from deploy import host, plan, refusals, survey
from deploy import profile as loaded
from deploy.host import Target
from deploy.profile import Override, Setting, merged, modes
from lock import application, nodes
from ops import flags, profiles
from tests.errors import raises
from tests.plans import FRESH, inputs, made, spark


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "hosts.toml"
    monkeypatch.setenv("HEARTH_HOSTS", str(path))
    return path


def target(written: Path, text: str, profile: str = "rtx-4070") -> Target:
    written.write_text(f'[hosts.a]\naddress = "a"\nprofile = "{profile}"\n{text}')
    return host.target("a")


# --- what is merged ------------------------------------------------------------------------------------------------


def test_precedence_is_profile_modes_host(written: Path) -> None:
    text = 'modes = ["shared-gpu", "low-memory", "production"]\n[hosts.a.override]\nmemory_max = "20G"\n'
    found = target(written, text + 'flags."--cache-ram" = { value = "3", why = "mine" }\n')
    assert found.flags == {
        "--cache-ram": "3",
        "--disable-smart-memory": "",
        "--reserve-vram": "2",
        "--use-sage-attention": "",
        "--vram-headroom": "0.5",
    }
    said = {
        "flags.--use-sage-attention": "profile rtx-4070",
        "flags.--reserve-vram": "mode shared-gpu",
        "flags.--vram-headroom": "mode low-memory",
        "flags.--cache-ram": "host a",
        "restart": "mode production",
        "memory_max": "host a",
        "stack": "config/stacks.toml",
    }
    assert {name: found.origin[name] for name in said} == said
    assert (found.profile.restart, found.profile.memory_max) == ("always", "20G")


def test_later_mode_wins() -> None:
    one, two = (Override(flags={"--x": Setting(value=value, why="w")}, memory_max=f"{value}G") for value in "12")
    profile, origin = merged("p", loaded.profiles()["cpu"], [("one", one), ("two", two), ("three", Override())])
    assert (profile.flags["--x"].value, profile.memory_max) == ("2", "2G")
    assert (origin["flags.--x"], origin["memory_max"], origin["flags.--cpu"]) == ("two", "two", "p")


def test_modes_differ_on_unified_memory(written: Path) -> None:
    text = 'modes = ["high-memory"]\n'
    assert "--high-ram" in target(written, text).flags
    assert target(written, text, "dgx-spark").flags["--cache-ram"] == "10 32"
    assert "--high-ram" not in target(written, text, "dgx-spark").flags
    assert "--cache-ram" in target(written, text + "override.unified = true\n", "cuda").flags


def test_settings_apply_to_version_ranges(written: Path) -> None:
    old = 'modes = ["low-memory"]\noverride.stack = "cu124"\n'
    assert {"--lowvram", "--cache-ram"} <= target(written, old).flags.keys()
    assert "--vram-headroom" not in target(written, old).flags
    before = target(written, 'modes = ["low-memory"]\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(application, "version", lambda _: "0.29.9")
        assert not {"--lowvram", "--cache-ram", "--vram-headroom"} & before.flags.keys()
    setting = Setting(why="w", torch=">=2.8", comfyui="<1")
    assert [setting.active(torch, "0.30.0") for torch in ("2.6.0", "2.11.0")] == [False, True]
    assert not setting.active("2.11.0", "1.0")
    assert not msgspec.structs.replace(setting, off=True).active("2.11.0", "0.30.0")
    assert Setting(why="w", comfyui=">=0.30").active("2.11.0", "0.31.0rc1")  # the trial of a pre-release


SINCE_0_30 = """
--cache-ram --debug-hang --disable-async-offload --disable-dynamic-vram --disable-manager-ui --disable-nvml-pressure
--disable-pinned-memory --disable-triton-backend --enable-asset-hashing --enable-assets --enable-dynamic-vram
--enable-manager --enable-manager-legacy-ui --enable-triton-backend --fast-disk --feature-flag --fp16-intermediates
--high-ram --list-feature-flags --models-directory --vram-headroom
"""
"""The flags of ComfyUI 0.30.0 that 0.3.64 lacks."""


def test_flags_of_profiles_and_modes_fit_an_older_comfyui() -> None:
    flags = [(name, each.flags) for name, each in loaded.profiles().items()]
    flags += [(name, each.on(unified=unified).flags) for name, each in modes().items() for unified in (False, True)]
    used = {(name, flag) for name, given in flags for flag, each in given.items() if each.active("2.14.1", "0.3.64")}
    assert ("dgx-spark", "--use-sage-attention") in used
    assert not [each for each in used if each[1] in SINCE_0_30.split()]


def test_a_host_shows_which_versions_a_setting_is_for(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> str:
        (line,) = (each for each in host.rows(target(written, "", "dgx-spark")) if "--disable-nvml-pressure" in each)
        return line.partition(" profile ")[0].strip()

    assert shown() == "--disable-nvml-pressure"
    monkeypatch.setattr(application, "version", lambda _: "0.3.64")
    assert shown() == "--disable-nvml-pressure (only ComfyUI >=0.30)"


@pytest.mark.parametrize("stack", list(stacks()))
@pytest.mark.parametrize("profile", ["cuda", "rtx-4070", "dgx-spark"])
def test_allocator_variable_matches_torch(written: Path, profile: str, stack: str) -> None:
    chosen = f'override.stack = "{stack}"\n'
    assert target(written, chosen, profile).env == {}
    found = target(written, f'modes = ["native-allocator"]\n{chosen}', profile)
    name = "PYTORCH_CUDA_ALLOC_CONF" if stack == "cu124" else "PYTORCH_ALLOC_CONF"
    assert found.env == {name: "expandable_segments:True"}
    assert "--disable-cuda-malloc" in found.flags
    assert ("--disable-dynamic-vram" in found.flags) is (stack != "cu124")


def test_unused_allocator_variable_is_noted(written: Path) -> None:
    text = '[hosts.a.override.env]\nPYTORCH_ALLOC_CONF = { value = "expandable_segments:True", why = "w" }\n'
    assert plan.allocator_without_effect(target(written, text)) == "PYTORCH_ALLOC_CONF"
    assert plan.allocator_without_effect(target(written, text, "cpu")) == ""
    assert plan.allocator_without_effect(target(written, text.replace("expandable", "backend:native,expandable"))) == ""
    assert plan.allocator_without_effect(target(written, 'modes = ["native-allocator"]\n')) == ""


def test_modes_have_reasons_and_exclude_existing_modes() -> None:
    found = modes()
    wanted = {"standard", "low-memory", "high-memory", "shared-gpu", "native-allocator", "development", "production"}
    wanted |= {"lan-deny", "no-metadata", "offline"}
    assert set(found) == wanted
    for name, mode in found.items():
        assert mode.summary
        assert set(mode.excludes) <= wanted - {name}
        assert all(name in found[other].excludes for other in mode.excludes)
        for said in (mode, mode.on(unified=True)):
            assert all(setting.why for setting in (said.flags | said.env).values())
        assert not any("max_split_size_mb" in setting.value for setting in mode.env.values())


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ('modes = ["low-memory", "high-memory"]', "config", "low-memory and high-memory exclude each other"),
        ('modes = ["shared-gpu", "high-memory"]', "config", "shared-gpu and high-memory exclude each other"),
        ('modes = ["low-memroy"]', "unknown-name", "low-memory"),
        ('develop = ["/home/a/n"]', "config", 'modes = ["development"]'),
        ('modes = ["production"]\ndevelop = ["/home/a/n"]', "config", "which production does not allow"),
        ('modes = ["production", "development"]', "config", "production and development exclude each other"),
        ('modes = ["development"]\ndevelop = ["n"]', "config", "'n' is not a plain absolute path"),
        ('modes = ["development"]\ndevelop = ["/a/n.x"]', "config", "n.x: not valid as names of node folders"),
        ('modes = ["development"]\ndevelop = ["/a/n", "/b/n"]', "config", "/a/n, /b/n: not valid as names"),
        ('free_memory = "often"', "config", "a duration such as 30m, 4h or 1d"),
        ('free_memory = "0h"', "config", "a duration such as 30m, 4h or 1d"),
        ('override.flags."--x" = { why = "w", comfyui = "new" }', "config", "comfyui = 'new' is not a version range"),
        ('override.flags."--x" = { why = "w", torch = "2.9" }', "config", "torch = '2.9' is not a version range"),
        (
            'override.env.PYTORCH_ALLOC_CONF = { why = "w", value = "expandable_segments:True,max_split_size_mb:64" }',
            "config",
            "max_split_size_mb has no effect with expandable_segments",
        ),
        ("override.summary = 'x'", "config", "summary"),
    ],
)
def test_invalid_modes_and_overrides_are_refused(written: Path, text: str, error: str, said: str) -> None:
    with raises(error) as raised:
        target(written, text)
    assert said in str(raised.value)


def test_a_mode_without_a_reason_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config/modes").mkdir(parents=True)
    (tmp_path / "config/modes/mine.toml").write_text('summary = "s"\nmemory_max = "1G"\n')
    here = replace(workspace.current(), checkout=tmp_path)
    with workspace.using(here), raises("config", match="no reason for memory_max"):
        modes()


def test_conflicting_flags_are_refused_with_their_origins() -> None:
    profile = msgspec.structs.replace(spark().profile, flags=spark().profile.flags | {"--use-flash-attention": WHY})
    origin = {"flags.--use-sage-attention": "profile x", "flags.--use-flash-attention": "mode y"}
    found = made(target=replace(spark(), profile=profile, origin=origin))
    (refusal,) = found.refusals
    assert refusal.kind == "wrong-flag"
    assert refusal.what == "--use-flash-attention and --use-sage-attention exclude each other"
    assert refusal.remedy.endswith("--use-flash-attention is from mode y, --use-sage-attention is from profile x")


WHY = Setting(why="a test")


# --- what is deployed ----------------------------------------------------------------------------------------------


def wanted(**values: Any) -> ReleaseManifest:
    node = nodes.Node(url="u", commit="c" * 40, tree="t", why="w", required=True)
    stock = replace(inputs(), nodes={"mine": node, "other": node})
    (step,) = (each for each in made(target=spark(**values), stock=stock).steps if isinstance(each, Release))
    return step.release


def test_developed_node_replaces_the_released_one() -> None:
    found = wanted(develop=("/home/anna/mine",))
    place = f"/opt/comfyui/releases/{found.id}"
    assert "custom_nodes/mine" not in found.links  # mounted there: the service cannot write it
    assert set(found.nodes) == {"other"} == set(wanted().nodes) - {"mine"}
    assert "custom_nodes/mine" not in found.parts
    assert found.gate.required == ("other",)
    assert found.develop == (f"{place}/custom_nodes/mine",)
    assert found.empty == ("custom_nodes", "custom_nodes/mine")
    bind = f"BindReadOnlyPaths=-/home/anna/mine:{place}/custom_nodes/mine"
    for name in ("comfyui.service", "comfyui-reload.service"):
        assert bind in found.files[name].splitlines(), name
    reload = found.files["comfyui-reload.service"]
    # not another release's, and no package's code: it runs as root
    command = f"/usr/bin/python3.12 -I -S {place}/agent watch"
    assert f"ExecStart={command} /opt/comfyui/state/site.json" in reload
    assert reload.endswith("[Install]\nWantedBy=multi-user.target\n")


def test_companion_units_are_limited() -> None:
    units = {path.stem: path.read_text() for path in (files.CHECKOUT / "recipes").rglob("*.service")}
    known = {"haproxy", "system", "user", "exporter", "storage", "free-memory", "reload", "mps", "persistence"}
    assert units.keys() == known
    units |= {
        name: unit.replace("$limits", "MemoryMax=90%") for name, unit in units.items() if name in ("system", "user")
    }
    assert "MemoryMax=" in wanted().files["comfyui.service"]
    for name, unit in units.items():
        above = unit.partition("# --- Only the system's")[0]  # the user's systemd has these, too
        assert re.search(r"^TasksMax=\d+$", above, re.MULTILINE), name
        assert re.search(r"^MemoryMax=\d+[MG%]$", above, re.MULTILINE), name
    assert "TasksMax=" in systemd._APPLY_LIMITS


def test_developed_node_is_linked_without_root() -> None:
    found = wanted(develop=("/home/anna/mine",), scope="user", free_memory="30m")
    assert found.links["custom_nodes/mine"] == "/home/anna/mine"
    assert (found.develop, found.free_memory) == (("/home/anna/mine",), 1800)
    units = {name: text for name, text in found.files.items() if name.startswith("comfyui-")}
    assert set(units) == {"comfyui-reload.service", "comfyui-free-memory.service", "comfyui-free-memory.timer"}
    assert not [name for name, text in units.items() if "ProtectSystem" in text or "User=" in text]
    assert units["comfyui-reload.service"].endswith("\n\n[Install]\nWantedBy=default.target\n")
    assert "Bind" not in "".join(found.files.values())


def test_the_timer_and_what_it_starts() -> None:
    found = wanted(free_memory="4h", listen="192.168.1.5")
    assert "OnActiveSec=4h\nOnUnitActiveSec=4h\n" in found.files["comfyui-free-memory.timer"]
    service = found.files["comfyui-free-memory.service"].splitlines()
    assert {"IPAddressDeny=any", "IPAddressAllow=localhost 192.168.1.5", "DynamicUser=yes"} <= set(service)
    assert found.free_memory == 14400
    anywhere = wanted(free_memory="4h", listen="0.0.0.0").files["comfyui-free-memory.service"]
    assert "IPAddressAllow=localhost\n" in anywhere


def test_unused_features_do_not_change_the_release() -> None:
    found = wanted()
    assert (found.develop, found.free_memory) == ((), 0)
    assert [name for name in found.files if name.startswith("comfyui-")] == []
    assert "\nRestart=on-failure\n" in found.files["comfyui.service"]


def test_missing_developed_folder_is_refused() -> None:
    missing = replace(FRESH, places={"/home/anna/mine": refusals.MISSING})
    (refusal,) = made(missing, spark(develop=("/home/anna/mine",))).refusals
    assert (refusal.kind, "/home/anna/mine" in refusal.what) == ("unusable-folder", True)
    there = made(replace(FRESH, places={"/home/anna/mine": ""}), spark(develop=("/home/anna/mine",)))
    assert there.notes == ("ComfyUI restarts whenever a Python file in /home/anna/mine changes, even during a job",)


def test_unenforced_memory_limit_is_noted() -> None:
    profile = msgspec.structs.replace(spark().profile, memory_max="90%")
    target = replace(spark(scope="user"), profile=profile)
    without = replace(FRESH, manager="process")
    assert "ComfyUI's memory is not limited: `memory_max` needs systemd" in made(without, target).notes
    unlimited = replace(target, profile=msgspec.structs.replace(profile, memory_max="infinity"))
    limited = [(replace(FRESH, manager="x"), target), (replace(without, lingers=False), target), (without, unlimited)]
    for facts, each in limited:  # systemd, systemd once the plan has enabled lingering, and no limit
        assert not any("memory_max" in note for note in made(facts, each).notes)


# --- what the agent does -------------------------------------------------------------------------------------------


def test_changes_are_reported_once_stable(tmp_path: Path) -> None:
    def touch(name: str, text: str = "x") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    one = touch("one.py")
    watcher = Watcher([str(tmp_path)])
    assert watcher.changed() == []
    for name in ("readme.md", ".git/hook.py", "__pycache__/one.cpython-312.py"):
        touch(name)
    assert watcher.changed() == watcher.changed() == []
    two = touch("deep/er/two.py")
    assert watcher.changed() == []
    touch("one.py", "longer")
    assert watcher.changed() == []
    assert watcher.changed() == sorted([one, two])
    assert watcher.changed() == []
    os.utime(one, ns=(1, 1))
    assert [watcher.changed(), watcher.changed()] == [[], [one]]
    Path(two).unlink()
    assert [watcher.changed(), watcher.changed()] == [[], [two]]
    touch("three.py")
    assert watcher.changed() == []
    (tmp_path / "three.py").unlink()
    assert [watcher.changed(), watcher.changed()] == [[], []]


def test_missing_folder_counts_as_empty(tmp_path: Path) -> None:
    watcher = Watcher([str(tmp_path / "later")])
    assert watcher.changed() == []
    (tmp_path / "later").mkdir()
    (tmp_path / "later/new.py").write_text("")
    assert [watcher.changed(), watcher.changed()] == [[], [str(tmp_path / "later/new.py")]]


@contextmanager
def answering(queue: dict[str, Any]) -> Iterator[tuple[Layout, list[Any]]]:
    """A server that answers as ComfyUI does to queries of its queue, and to requests to free memory."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(json.dumps(queue).encode() if self.path == "/queue" else b"")

        def do_POST(self) -> None:
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self._answer(b"")

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        values = {"prefix": "/nowhere", "service": "s", "scope": "user", "user": "", "address": "127.0.0.1"}
        yield Layout({**values, "port": server.server_address[1]}), asked
        server.shutdown()


@pytest.mark.parametrize(
    ("queue", "said", "freed"),
    [
        ({"queue_running": [], "queue_pending": []}, "frees its memory", True),
        ({"queue_running": [[0, "p", {}]], "queue_pending": []}, "has a job", False),
        ({"queue_running": [], "queue_pending": [[0, "p", {}]]}, "has a job", False),
    ],
)
def test_idle_comfyui_frees_its_memory(queue: dict[str, Any], said: str, freed: bool) -> None:
    with answering(queue) as (layout, asked):
        assert said in health.free_if_idle(layout)
    assert asked == ([("/free", {"free_memory": True})] if freed else [])
    assert "does not answer" in health.free_if_idle(layout)


# --- what is shown -------------------------------------------------------------------------------------------------

CLI = """
parser.add_argument("--listen", type=str, nargs="?")
parser.add_argument("--size", type=int)
parser.add_argument("--hash", type=str, choices=['md5', 'sha1'])
parser.add_argument("--cache-ram", type=float, nargs='*')
vram = parser.add_mutually_exclusive_group()
vram.add_argument("--cpu", action="store_true")
vram.add_argument("--lowvram", action="store_true")
"""


def release_of(*words: str) -> CommandLine:
    return CommandLine("r1", "0.29.0", words, CLI)


def test_a_command_line_is_read_as_comfyui_reads_it() -> None:
    read = survey.settings(["--cpu", "--cache-ram", "10", "32", "--size", "3", "--size", "4"])
    assert read == {"--cpu": "", "--cache-ram": "10 32", "--size": "4"}


def test_flags_show_origin_and_differences(written: Path) -> None:
    wish = target(written, '[hosts.a.override]\nflags."--size" = { value = "4", why = "w" }\n', "cpu")
    found = flags.compare(wish, release_of("--listen", "127.0.0.1", "--cpu", "--size", "3", "--hash", "md5"), CLI)
    shown = {each.name: each for each in found.lines}
    assert (found.version, found.release) == ("0.29.0", "r1")
    assert {name: (each.value, each.origin) for name, each in shown.items() if each.value is not None} == {
        "--listen": ("127.0.0.1", "Hearth"),
        "--cpu": ("", "profile cpu"),
        "--size": ("3", "an earlier configuration"),
        "--hash": ("md5", "an earlier configuration"),
    }
    assert shown["--lowvram"].excludes == ("--cpu",)
    assert [shown[name].takes for name in ("--cpu", "--hash", "--size", "--cache-ram", "--listen")] == [
        "", "md5|sha1", "number", "[number ...]", "[text]",
    ]  # fmt: skip
    assert [(each.name, each.deployed, each.configured) for each in found.differences] == [
        ("--hash", "md5", None),
        ("--size", "3", "4"),
    ]
    said = "\n".join(flags.rows([found]))
    assert "configuration differs: --hash is md5 in the release, not set in the configuration" in said
    assert "\n  --cpu --lowvram\n" in said
    assert max(map(len, said.splitlines())) <= 100


def test_flags_of_a_host_without_a_release_are_those_that_are_configured(written: Path) -> None:
    found = flags.compare(target(written, "", "cpu"), CommandLine(), CLI)
    assert (found.release, found.differences) == ("", ())
    assert [(each.name, each.origin) for each in found.lines if each.value is not None] == [("--cpu", "profile cpu")]


@pytest.mark.parametrize("name", [each.name for each in profiles.every()])
def test_every_profile_and_mode_is_explained(name: str) -> None:
    found = profiles.one(name)
    explained = "\n".join(profiles.rows(found, explain=True))
    assert all(each.why in " ".join(explained.split()) for each in found.lines)
    assert max(map(len, explained.splitlines())) <= 100
    plain = "\n".join(profiles.rows(found, explain=False))
    assert not any(each.why in plain for each in found.lines)
    assert max(map(len, plain.splitlines())) <= 100
    assert all(set(each.stacks) <= set(stacks()) for each in found.lines)


def test_an_explanation_says_with_which_stacks_a_setting_has_effect() -> None:
    shown = {(each.name, each.machines): each for each in profiles.one("low-memory").lines}
    assert shown["--lowvram", profiles.SEPARATE].stacks == ("cu124",)
    assert shown["--vram-headroom", profiles.SEPARATE].stacks == ("cu130", "cu132")
    assert shown["--cache-ram", profiles.SEPARATE].stacks == ("cu124", "cu130", "cu132")
    assert shown["--reserve-vram", profiles.UNIFIED].value == "16"
    assert [(each.name, each.value) for each in profiles.one("production").lines] == [("restart", "always")]
    with raises("unknown-name", match="perhaps you meant 'low-memory'"):
        profiles.one("low-memroy")


def test_all_are_listed() -> None:
    said = "\n".join(profiles.list_rows(profiles.every()))
    assert max(map(len, said.splitlines())) <= 100
    assert "\nmode     low-memory " in said
    assert "\nprofile  rtx-4070 " in said
    assert {each.name for each in profiles.every()} >= {"cpu", "standard"}


# --- metadata ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ('modes = ["no-metadata"]\n', "mode no-metadata"),
        ('[hosts.a.override]\nmetadata = "none"\n', "host a"),
    ],
)
def test_metadata_none_sets_comfyuis_flag(written: Path, text: str, origin: str) -> None:
    found = target(written, text)
    assert found.flags["--disable-metadata"] == ""
    assert list(found.flags) == sorted(found.flags)
    assert found.flag_origin("--disable-metadata") == origin
    assert f"  {'metadata = none':44} {origin}" in [*host.rows(found)]
    release = made(
        target=found, stock=replace(inputs(), flags={**inputs().flags, **application.flags(DISABLE_METADATA)})
    )
    assert not [each for each in release.refusals if each.kind == "wrong-flag"]
    assert f"outputs contain no workflow: metadata = none ({origin})" in release.notes


DISABLE_METADATA = "parser.add_argument('--disable-metadata', action='store_true')\n"


def test_metadata_is_kept_by_default_and_a_host_can_keep_it_despite_its_mode(written: Path) -> None:
    for text in ("", 'modes = ["no-metadata"]\n[hosts.a.override]\nmetadata = "keep"\n'):
        assert "--disable-metadata" not in target(written, text).flags
    flag = '[hosts.a.override.flags]\n"--disable-metadata" = { why = "mine" }\n'
    assert target(written, flag).flag_origin("--disable-metadata") == "host a"


def test_a_comfyui_without_the_flag_is_refused(written: Path) -> None:
    found = made(target=target(written, 'modes = ["no-metadata"]\n'))
    (what,) = [each.what for each in found.refusals if each.kind == "wrong-flag"]
    assert what == "this ComfyUI has no flag --disable-metadata"
