"""Facts of hosts, inputs and plans for tests: a fresh DGX Spark, the same after a deploy, wheels and ComfyUI."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import msgspec

from agent.schema.change import Step
from agent.schema.facts import Busy, Paused
from core.manifest import Manifest, Proof
from core.typed import convert
from deploy import plan, release
from deploy.facts import Facts, Gpu, Place, Service
from deploy.host import Host, Target
from deploy.inputs import Inputs
from deploy.profile import profiles
from deploy.selection import choose
from lock import application, requirements

APP = convert(
    {"name": "comfyui", "version": "1.2.3", "source": [{"folder": "src"}], "tree": "t" * 64, "folder": "/nowhere",
     "extra": [], "size": 10**9, "files": 1000},
    application.Application,
)  # fmt: skip
FLAGS = application.flags(
    "parser = argparse.ArgumentParser()\n"
    "parser.add_argument('--listen', type=str, nargs='?')\n"
    "parser.add_argument('--reserve-vram', type=float)\n"
    "parser.add_argument('--enable-manager', action='store_true')\n"
    "parser.add_argument('--disable-nvml-pressure', action='store_true')\n"
    "attn = parser.add_mutually_exclusive_group()\n"
    "attn.add_argument('--use-sage-attention', action='store_true')\n"
    "attn.add_argument('--use-flash-attention', action='store_true')\n"
    "parser.add_argument('--cpu', action='store_true')\n"
)
NO_SERVICE = Service(active=False, state="absent", enabled=False, linked=False, restarts=0, since="", pid=0)
RUNNING = Service(active=True, state="active (running)", enabled=True, linked=True, restarts=0, since="now", pid=7)
FRESH = Facts(
    hostname="h", os="debian 12", machine="aarch64", kernel="6", glibc="2.36", pythons={"3.12": "/usr/bin/python3.12"},
    gpus=(Gpu("GB10", "12.1", None, True),), driver="580.95", memory=10**11, cores=20, login="d", root=True,
    prefix="/opt/comfyui", writable=True, disk_free=10**11, inodes_free=10**6, mounts={}, places={}, packages={},
    data_free={"/opt/comfyui/data": 10**11}, port_holder={}, user=False, exporter_user=True, members=(), shared=True,
    rights="", manager="systemd-system", lingers=True, current="", current_error={}, releases=(), altered=(), proven=(),
    failed_nodes={}, parts={}, data=False, service=NO_SERVICE, incoming={}, tools=(), busy={}, last={},
)  # fmt: skip

OURS = Place(
    real="/opt/comfyui", own=("current", "parts", "releases", "state"), data=True, service="comfyui", ours=True
)
UNITS = tuple(f"/etc/systemd/system/{name}" for name in ("comfyui.service", "comfyui-apply.service"))
PAUSED = Paused(who="anna@desk", at="2026-11-23T03:00:00Z")
DIED = replace(NO_SERVICE, state="activating (auto-restart)", linked=True, enabled=True, waits=True)
STOPPED = replace(NO_SERVICE, state="inactive (dead)", linked=True, enabled=True)
BUSY = Busy(action="deploy", who="a@b", since="then")


def wheel(kernel: str, **values: Any) -> Manifest:
    proof = Proof("passed", "")
    found = Manifest(
        file=f"{kernel}.whl", sha256="a" * 64, size=1, key="b" * 64, identifier=kernel, kernel=kernel,
        version="1+cu130.torch2.14.1.sm121a", arch="12.1", stack="cu130", torch="2.14.1", python="3.12",
        platform="linux_aarch64", profile="", glibc="2.17", glibcxx="3.4", cxxabi="1.3", modules=(), imported=proof,
        smoke=proof, inputs={},
    )  # fmt: skip
    return msgspec.structs.replace(found, **values)


def inputs(*wheels: Manifest) -> Inputs:
    locks = {
        (platform, python): requirements.LockedList("cu130", platform, python, f"torch==2 # {platform} {python}\n")
        for platform in ("linux_aarch64", "linux_x86_64")
        for python in ("3.11", "3.12")
    }
    return Inputs(APP, FLAGS, locks, wheels or (wheel("sageattention"), wheel("flash-attn")), "uv-1")


def spark(**values: Any) -> Target:
    return Target("spark", Host(address="spark", **values), "dgx-spark", profiles()["dgx-spark"], {})


def made(facts: Facts = FRESH, target: Target | None = None, stock: Inputs | None = None) -> plan.Plan:
    return plan.make(target or spark(), facts, stock or inputs(), plan.Options())


def settled() -> Facts:
    """The facts after a first deploy."""
    target, stock = spark(), inputs()
    selection, against = choose(target, FRESH, stock)
    assert selection is not None
    assert not against
    manifest = release.manifest(selection, FRESH.prefix)
    return replace(
        FRESH,
        user=True,
        data=True,
        current=manifest.id,
        releases=(manifest,),
        proven=(manifest.id,),
        parts=dict.fromkeys(manifest.parts.values(), ""),
        service=RUNNING,
        tools=("uv-1",),
        port_holder={"pid": 7, "command": "python main.py"},
    )


def running(**values: Any) -> Facts:
    return replace(settled(), **{"placed": UNITS, "place": OURS, **values})


def stopped(**values: Any) -> Facts:
    return running(**{"port_holder": {}, "service": STOPPED, **values})


def reasons(found: plan.Plan) -> list[str]:
    """The reasons for its refusal."""
    assert all(each.what and each.remedy for each in found.refusals)
    return sorted(each.kind for each in found.refusals)


def values(step: Step) -> dict[str, Any]:
    """A step's values except its texts."""
    return asdict(step)


def kinds(found: plan.Plan) -> list[str]:
    assert not found.refusals, found.refusals
    return [step.kind for step in found.steps]
