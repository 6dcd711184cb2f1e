"""Checks of the machine: storage, permissions, disks, clock, containers and compilers."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from core import console
from deploy import container_refusals, refusals, release_refusals
from ops.checks.case import Case, Check
from ops.status import Problem

if TYPE_CHECKING:
    from ops.checks.case import Found

LEAST = 0.05
"""A disk is nearly full if less than this share is free."""

TOOLKIT = "1.18"
"""CVE-2025-23266 is in NVIDIA's container toolkit below 1.17.8; 1.18 adds the unit that describes the GPU at boot."""


def _storage(case: Case) -> Found:
    yield from refusals.storage(case.target, case.facts)


def _access(case: Case) -> Found:
    who = case.target.host.run_as if case.target.host.scope == "system" else case.facts.login
    for path, what in case.probe.access.items():
        yield Problem(f"{who} cannot {what} {path}", f"on the host: chown -R {shlex.quote(who)}: {shlex.quote(path)}")


def _disk(case: Case) -> Found:
    for path, disk in case.live.disks.items():
        if disk.error:
            yield Problem(f"{path} cannot be read: {disk.error}", f"on the host: ls -ld {shlex.quote(path)}")
        elif disk.total and (disk.free < disk.total * LEAST or disk.free < refusals.RESERVE_DATA):
            yield Problem(
                f"{console.size(disk.free)} of {console.size(disk.total)} left at {path}",
                f"on the host: du -xh {shlex.quote(path)} | sort -h | tail",
            )
        elif disk.files and disk.files_free is not None and disk.files_free < disk.files * LEAST:
            yield Problem(
                f"{disk.files_free} of {disk.files} inodes left at {path}",
                f"on the host: du --inodes -x {shlex.quote(path)} | sort -n | tail",
            )
    if not case.planned.steps:
        for refusal in release_refusals.room(case.target, case.facts, case.inputs):
            yield Problem(f"too little space for a new environment: {refusal.what}", refusal.remedy)


def _clock(case: Case) -> Found:
    off = case.live.time - case.now
    if abs(off) > 60:  # certificates and journals would be affected; an answer takes only seconds
        ahead = "ahead of" if off > 0 else "behind"
        yield Problem(
            f"its clock is {console.clock(abs(off))} {ahead} this machine's", "on the host: timedatectl set-ntp true"
        )
    elif case.probe.synchronized is False:
        yield Problem("no time service synchronises its clock", "on the host: timedatectl set-ntp true")


def _containers(case: Case) -> Found:
    found = case.probe.containers
    if not (found.engines and case.facts.gpus):
        return
    if not found.toolkit:
        yield Problem(
            f"containers of {' and '.join(found.engines)} cannot use the GPU: there is no NVIDIA container toolkit",
            "on the host: apt-get install nvidia-container-toolkit",
        )
        return
    if refusals.older(found.toolkit, TOOLKIT):
        yield Problem(
            f"NVIDIA's container toolkit is {found.toolkit}, older than {TOOLKIT} (CVE-2025-23266)",
            "on the host: apt-get install --only-upgrade nvidia-container-toolkit",
        )
    unit = "systemctl enable --now nvidia-cdi-refresh.service"
    if found.devices and not found.lasting:
        what = "after a boot, containers do not find the GPU: its CDI description is in /run"
        yield Problem(what, f"on the host: {unit}")
    if not found.devices:
        make = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
        yield Problem(
            "containers cannot find the GPU: it has no CDI description",
            f"on the host: {unit if found.refresh else make}",
        )


def _engine(case: Case) -> Found:
    if case.target.host.runtime != "podman":
        return
    yield from container_refusals.lacking(case.target, case.facts)
    if not case.facts.lingers:
        login = case.facts.login
        yield Problem(f"{login}'s containers end with the last session", f"on the host: loginctl enable-linger {login}")


def _compilers(case: Case) -> Found:
    if not case.release.wheels or "base" in case.release.parts:  # a container has its own
        return
    version = case.release.python or "3"
    if not case.probe.compiler:
        yield Problem("there is no C compiler, which Triton needs at run time", "on the host: apt-get install gcc")
    if not case.probe.headers:
        yield Problem(
            f"there are no headers of Python {version}, which Triton needs at run time",
            f"on the host: apt-get install python{version}-dev",
        )


CHECKS = (
    Check(
        name="storage",
        question="Are all file systems mounted, and do the service's folders exist?",
        detected_by="the configured mount points and folders, each read with a time-out",
        fix="mount the file system; ComfyUI waits for it, then starts automatically",
        find=_storage,
    ),
    Check(
        name="access",
        question="Can the service read its code and models, and write its data?",
        detected_by="access(2), as the service's user",
        fix="inv deploy sets the permissions in data/; elsewhere use chown or an access control list",
        find=_access,
    ),
    Check(
        name="disk",
        question="Is there free disk space, in bytes and inodes?",
        detected_by="statvfs(3) of the prefix, the data and the folders elsewhere",
        fix="delete outputs or models, or keep fewer releases (`keep`)",
        severity="warning",
        find=_disk,
    ),
    Check(
        name="clock",
        question="Is the clock right?",
        detected_by="timedatectl, and the host's time compared with this machine's",
        fix="on the host: timedatectl set-ntp true",
        severity="warning",
        find=_clock,
    ),
    Check(
        name="containers",
        question="If there is a container engine, can its containers use the GPU?",
        detected_by="nvidia-ctk, and the devices that it lists (CDI), which some machines lack after a reboot",
        fix="install nvidia-container-toolkit; nvidia-ctk cdi generate",
        severity="warning",
        find=_containers,
    ),
    Check(
        name="engine",
        question='With runtime = "podman", does the host have what containers need?',
        detected_by="podman --version and its systemd generator, the control groups of units, /etc/subuid and "
        "/etc/subgid, the CDI files, and lingering",
        fix="install Podman 4.8 or newer, and what the message names",
        find=_engine,
    ),
    Check(
        name="compilers",
        question="Are a C compiler and Python's headers installed, which Triton needs at run time?",
        detected_by="cc on the PATH, and Python.h of the release's Python",
        fix="on the host: apt-get install gcc, and the -dev package of that Python",
        severity="warning",
        find=_compilers,
    ),
)
