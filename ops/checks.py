"""What the doctor looks for on a host: each check finds one kind of trouble and names the command that mends it.

Pure: a check is given what was seen (`Case`) and yields what is wrong. `docs/troubleshooting.md` is made of them.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import InvalidVersion, Version

from agent.schema.facts import Facts
from agent.schema.live import Live, Probe
from core import console
from deploy import plan
from ops.mps import problems as mps_problems
from ops.status import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deploy.host import Target
    from deploy.plan import Plan, Shelf

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Case:
    """One host, as it was seen; `now` is this machine's clock (seconds since 1970)."""

    target: Target
    facts: Facts
    live: Live
    probe: Probe
    stock: Shelf
    planned: Plan
    now: float

    @property
    def at(self) -> str:
        """The flag that names the host."""
        return f"--host {self.target.name}"

    @property
    def release(self) -> dict[str, Any]:
        """The current release's manifest; empty when nothing is deployed."""
        return self.facts.release(self.facts.current) or {}

    @property
    def lines(self) -> list[str]:
        """The service's log without times."""
        return [line for _, line in self.probe.log]


@dataclass(frozen=True)
class Check:
    """One kind of trouble: its name, the question, how it is found, what mends it.

    `cases` are rows of the troubleshooting chapters of the guides that people come from.
    """

    name: str
    question: str
    how: str
    severity: Severity
    mend: str
    cases: tuple[str, ...]
    find: Callable[[Case], Iterator[Problem]] = field(compare=False)


CHECKS: list[Check] = []

SPARK = "Spark guide"
DEBIAN = "Debian guide"


def check(
    name: str, question: str, *, how: str, mend: str, severity: Severity = "error", cases: tuple[str, ...] = ()
) -> Callable[[Callable[[Case], Iterator[Problem]]], Callable[[Case], Iterator[Problem]]]:
    """List a check; the function it decorates yields what is wrong."""

    def listed(find: Callable[[Case], Iterator[Problem]]) -> Callable[[Case], Iterator[Problem]]:
        CHECKS.append(Check(name, question, how, severity, mend, cases, find))
        return find

    return listed


# --- the release ---------------------------------------------------------------------------------------------------


@check(
    "deployed",
    "Is anything deployed, and is nobody in the middle of it?",
    how="`current` in the prefix, the plan under way, and the last line of the host's history",
    mend="inv deploy; inv attach shows what is under way",
)
def _deployed(case: Case) -> Iterator[Problem]:
    facts = case.facts
    if not facts.current:
        yield Problem("nothing is deployed", f"inv deploy {case.at}")
    if facts.busy and not facts.busy["alive"]:
        yield Problem(f"a {facts.busy['action']} by {facts.busy['who']} was cut short", f"inv attach {case.at}")
    if facts.last and facts.last.get("result") != "done":
        yield Problem(
            f"the last {facts.last['action']} {facts.last['result']}: {facts.last['error']}", f"inv deploy {case.at}"
        )


@check(
    "drift",
    "Is everything as it was deployed, and as the configuration wants it?",
    how="every file's size, time and mode against the parts' stamps; the rest is what a deploy would change",
    mend="inv deploy puts it right; inv deploy --dry-run shows what it would do",
    severity="warning",
    cases=(
        f"{SPARK}: NFS symlinks become directories",
        f"{SPARK}: virtual environment activation, pip installs elsewhere",
        f"{SPARK}: sageattention must be installed first",
        f"{SPARK}: service won't start, Python import errors",
    ),
)
def _drift(case: Case) -> Iterator[Problem]:
    if case.facts.current:
        for name, fault in case.facts.parts.items():
            if fault and name in case.release.get("parts", {}).values():
                yield Problem(f"{name} is damaged: {fault}", f"inv deploy {case.at}")
        if steps := case.planned.steps:
            more = f", and {len(steps) - 1} more" if len(steps) > 1 else ""
            yield Problem(f"a deploy would {steps[0].title} ({steps[0].why}){more}", f"inv deploy {case.at} --dry-run")
        if case.facts.unused:
            what = f"{case.facts.prefix}/data/custom_nodes holds {', '.join(case.facts.unused)}, which is never loaded"
            yield Problem(
                what, f"look at it: whoever put it there meant it to run. inv quarantine {case.at} if in doubt"
            )


@check(
    "confined",
    "Is what custom nodes may do limited?",
    how="a system's unit limits it; without root the kernel must have Landlock (5.13 and newer, not switched off)",
    mend='a newer kernel, "landlock" among its lsm= parameters, or scope = "system"',
    severity="warning",
)
def _confined(case: Case) -> Iterator[Problem]:
    for what in plan.unconfined(case.target, case.facts):
        yield Problem(what, 'a newer kernel, or scope = "system" for this host')


@check(
    "packages",
    "Does the environment hold the torch that the release names?",
    how="the packages' own records in the environment",
    mend="inv deploy makes the environment anew",
    cases=(f"{SPARK}: PyTorch wrong version",),
)
def _packages(case: Case) -> Iterator[Problem]:
    wanted, found = case.release.get("torch"), case.probe.installed.get("torch", "")
    if wanted and found.partition("+")[0] != wanted:
        yield Problem(f"torch is {found or 'missing'}, the release names {wanted}", f"inv deploy {case.at}")


@check(
    "nodes",
    "Could ComfyUI import every custom node?",
    how="ComfyUI's own output when the release was proven",
    mend="the reason is shown: inv nodes.update NAME, or take the node off the host's `nodes`; then inv deploy",
    severity="warning",
)
def _nodes(case: Case) -> Iterator[Problem]:
    for name, why in case.facts.failed_nodes.items():
        yield Problem(
            f"node {name} cannot be imported: {why}",
            f"inv nodes.update {shlex.quote(name)}; inv lock; inv deploy {case.at}",
        )


# --- the service ---------------------------------------------------------------------------------------------------

_DECISIVE = re.compile(
    r"^\s*(\w+\.)*\w*(Error|Exception|Interrupt)\b|\berror:|CUDA error|Killed|\[ERROR\]", re.MULTILINE
)


@check(
    "service",
    "Does the service run and stay up?",
    how="systemd's or the supervisor's record, and the last line of the log that names an error",
    mend="what the line says; then inv start. inv rollback returns to the release before",
    cases=(f"{SPARK}: service won't start", f"{DEBIAN}: driver instability"),
)
def _service(case: Case) -> Iterator[Problem]:
    facts, service = case.facts, case.facts.service
    if facts.paused:
        yield Problem(plan.paused(case.target, facts), f"inv resume {case.at}")
    if not facts.current or facts.paused:
        return
    said = [line.strip() for line in case.lines if _DECISIVE.search(line)]
    line = said[-1] if said else next((each.strip() for each in reversed(case.lines) if each.strip()), "nothing")
    if not service.active and case.probe.result not in ("", "success"):
        yield Problem(
            f"the service gave up ({case.probe.result}); its log: {line}", f"inv logs {case.at}; inv start {case.at}"
        )
    elif not service.active:
        yield Problem(f"the service does not run ({service.state})", f"inv start {case.at}")
    elif service.restarts >= 3:  # a deploy starts it once; systemd gives up at the fifth within five minutes
        yield Problem(
            f"the service crashes again and again ({service.restarts} restarts); its log: {line}",
            f"inv logs {case.at}; inv rollback {case.at}",
        )
    elif case.live.comfyui.state == "silent":
        yield Problem(
            f"ComfyUI takes connections and does not answer ({case.live.comfyui.reason})",
            f"inv logs {case.at}; inv restart {case.at} --force",
        )
    elif case.live.comfyui.state == "closed" and (case.live.uptime or 0) > case.target.profile.start_seconds:
        yield Problem(
            f"ComfyUI runs since {console.clock(case.live.uptime or 0)} and serves nothing", f"inv logs {case.at}"
        )


@check(
    "port",
    "Is ComfyUI's port free for it?",
    how="the kernel's table of listening sockets, and whose socket it is",
    mend="end the program that holds it, or set another `port` for the host and deploy",
    cases=(f"{SPARK}: port 8188 already in use", f"{DEBIAN}: port conflicts between development servers and ComfyUI"),
)
def _port(case: Case) -> Iterator[Problem]:
    if holder := plan.port(case.target, case.facts):
        yield Problem(holder, "end it there, or set another `port` for this host")


@check(
    "exporter",
    "Are the metrics exported?",
    how="who listens at the host's `metrics_port`",
    mend="systemctl restart comfyui-exporter on the host; its log says why it ended",
    severity="warning",
)
def _exporter(case: Case) -> Iterator[Problem]:
    yield from (Problem(each.what, each.remedy) for each in plan.metrics(case.target, case.facts))
    if "exporter" in case.release.get("parts", {}) and not case.facts.metrics_holder:
        unit = case.target.exporter_unit
        yield Problem(
            f"nothing listens at port {case.target.host.metrics_port}: the exporter does not run",
            f"on the host: journalctl --unit {unit}, then systemctl restart {unit}",
        )


SLOW = 1 / 3
"""A start is worth a word from this share of the gate's patience on: of 180 s, 15 were measured, 51 with 26 nodes."""


@check(
    "start",
    "Does ComfyUI start quickly?",
    how="the log's times from the start to `To see the GUI`, and the longest wait between two lines",
    mend="leave --enable-assets out where there are thousands of models; take off the node that waits",
    severity="warning",
)
def _start(case: Case) -> Iterator[Problem]:
    timed = [(at, line) for at, line in case.probe.log if at is not None]
    ends = [number for number, (_, line) in enumerate(timed) if "To see the GUI go to" in line]
    if not ends:
        return
    begins = [number for number in range(ends[-1]) if re.match(r"Starting .+\.service", timed[number][1])]
    start = timed[begins[-1] if begins else 0 : ends[-1] + 1]
    took = start[-1][0] - start[0][0]
    if took > SLOW * case.target.profile.start_seconds and len(start) > 1:
        longest, line = max((after[0] - before[0], before[1].strip()) for before, after in pairwise(start))
        scan = any("asset scan" in each.lower() for _, each in start)
        remedy = 'leave "--enable-assets" out of the host\'s flags' if scan else f"inv logs {case.at} --lines 500"
        yield Problem(
            f"ComfyUI took {console.clock(took)} to start, {console.clock(longest)} of it after: {line[:80]}", remedy
        )


# --- memory --------------------------------------------------------------------------------------------------------


@check(
    "out-of-memory",
    "Was anything killed or refused for want of memory?",
    how="the unit's cgroup, systemd's result, the kernel's log of a week, and ComfyUI's own log of a day",
    mend='modes = ["low-memory"] for the host (a larger `memory_max` where that is the limit), then inv deploy',
    cases=(f"{DEBIAN}: CUDA out of memory", f"{DEBIAN}: memory fragmentation", f"{DEBIAN}: system resource exhaustion"),
)
def _memory(case: Case) -> Iterator[Problem]:
    less = f'modes = ["low-memory"] for {case.target.name}, then inv deploy {case.at}'
    if case.probe.oom_kills or case.probe.result == "oom-kill":
        limit = case.target.profile.memory_max
        remedy = f"memory_max = more than {limit}, or {less}" if limit else less
        yield Problem("the kernel killed ComfyUI for want of memory", remedy)
    elif killed := [line for line in case.probe.kernel.lines if "Killed process" in line or "oom-kill" in line]:
        yield Problem(f"the kernel killed a process for want of memory: {killed[-1].strip()[:120]}", less)
    if refused := [line for line in case.lines if re.search(r"Got an OOM|OutOfMemoryError|CUDA out of memory", line)]:
        if fragments := re.findall(r"([\d.]+ GiB) is reserved by PyTorch but unallocated", refused[-1]):
            less += f'; {fragments[0]} are in pieces too small to use: modes = ["native-allocator"] may help'
        yield Problem(
            f"the GPU's memory did not suffice ({len(refused)} times in the log): {refused[-1].strip()[:120]}", less
        )


@check(
    "unified-memory",
    "Where CPU and GPU share the memory: is it free for the GPU?",
    how="/proc/meminfo: page cache and swap",
    mend="inv drop-caches gives the page cache back; inv tune lists swappiness",
    severity="warning",
)
def _unified(case: Case) -> Iterator[Problem]:
    if not any(gpu.unified for gpu in case.facts.gpus):
        return
    memory = case.live.memory
    total, free, cached = (memory.get(name, 0) for name in ("MemTotal", "MemFree", "Cached"))
    if total and free < total // 5 and cached > total // 4:
        yield Problem(
            f"the page cache holds {console.size(cached)} of {console.size(total)}, and {console.size(free)} is free",
            f"inv drop-caches {case.at}",
        )
    swapped = memory.get("SwapTotal", 0) - memory.get("SwapFree", 0)
    if swapped > total // 20:
        yield Problem(f"{console.size(swapped)} is swapped out, which the GPU waits for", f"inv tune {case.at}")


# --- the GPU -------------------------------------------------------------------------------------------------------


@check(
    "driver",
    "Does the driver see the GPU, and is it new enough for the stack's CUDA?",
    how="NVML, and the driver's version against the floor in config/stacks.toml",
    mend='install or update the driver; or stack = "cu124" in the host\'s override for an old one',
    cases=(f"{SPARK}: GPU not detected", f"{SPARK}: sageattention compilation fails, wrong GPU architecture"),
)
def _driver(case: Case) -> Iterator[Problem]:
    if case.target.profile.cuda:
        for refusal in plan.gpu(case.target, case.facts):
            yield Problem(refusal.what, refusal.remedy)


@check(
    "cuda",
    "Does torch see CUDA in ComfyUI's own environment?",
    how="the devices that ComfyUI names; while it does not answer, torch itself as the service's user",
    mend="inv gpu-access shows who may use the devices; a reboot after an update of the driver",
    cases=(f"{SPARK}: GPU not detected", f"{DEBIAN}: GPU not detected"),
)
def _cuda(case: Case) -> Iterator[Problem]:
    if not (case.target.profile.cuda and case.facts.current):
        return
    said, torch = case.live.comfyui, case.probe.torch
    if said.state == "answers" and not any(each.type == "cuda" for each in said.devices):
        kinds = ", ".join(each.type for each in said.devices)
        yield Problem(f"ComfyUI sees no CUDA device, it computes on {kinds}", f"inv gpu-access {case.at}")
    elif torch and (torch.get("fault") or not torch.get("available")):
        reason = torch.get("fault") or f"torch {torch.get('version')} finds no device"
        yield Problem(f"torch cannot use CUDA: {reason}", f"inv gpu-access {case.at}")


@check(
    "gpu-shared",
    "Is the GPU ComfyUI's own, unless it is shared on purpose?",
    how="the processes that NVML names on each GPU, and the units that they belong to",
    mend='end the others; or share on purpose: inv mps on, modes = ["shared-gpu"]',
    severity="warning",
    cases=(f"{DEBIAN}: context conflicts", f"{DEBIAN}: performance degradation, conflicts with development tools"),
)
def _shared(case: Case) -> Iterator[Problem]:
    on_purpose = "shared-gpu" in case.target.host.modes or case.probe.mps.on
    for gpu in case.live.gpus:
        if not on_purpose and (who := plan.others(gpu.processes)):
            yield Problem(
                f"GPU {gpu.index} is used by others: {who}",
                f'end them, or modes = ["shared-gpu"] for {case.target.name}',
            )
        if gpu.faults:
            yield Problem(f"GPU {gpu.index} does not tell everything: {gpu.faults[0]}", "on the host: nvidia-smi -q")


@check(
    "mps",
    "Where MPS is on: does its daemon run, and does ComfyUI compute through it?",
    how="the daemon's unit and answers, ComfyUI's environment and whether it is among the clients",
    mend="inv mps on starts the daemon and ComfyUI anew; inv mps off does without it",
    cases=(f"{DEBIAN}: context conflicts",),
)
def _mps(case: Case) -> Iterator[Problem]:
    on_gpu = case.live.comfyui.state == "answers" and any(each.type == "cuda" for each in case.live.comfyui.devices)
    yield from mps_problems(case.probe.mps, case.at, cuda=on_gpu)


@check(
    "kernels",
    "Were the kernels built for this GPU, torch and Python?",
    how="the wheels in the release's manifest against the GPU's compute capability and the release",
    mend="inv build-kernels for the GPU's capability, then inv deploy",
    cases=(f"{SPARK}: sageattention compilation fails, wrong GPU architecture",),
)
def _kernels(case: Case) -> Iterator[Problem]:
    have = {gpu.capability for gpu in case.facts.gpus}
    for name, wheel in case.release.get("wheels", {}).items():
        if have and wheel["arch"].partition("+")[0].rstrip("af") not in have:
            listed = ", ".join(sorted(have))
            yield Problem(
                f"{name} was built for {wheel['arch']}, and the GPU is {listed}",
                f"inv build-kernels --kernel {name} --arch '{';'.join(sorted(have))}'; inv deploy {case.at}",
            )
    for refusal in case.planned.refusals:
        if refusal.build or "glibc" in refusal.what:
            yield Problem(refusal.what, refusal.remedy)


@check(
    "gpu-faults",
    "Did the driver report faults of the GPU?",
    how="Xid lines in the kernel's log of a week",
    mend="look the number up in NVIDIA's Xid catalogue; 13, 31 and 43 are programs', 48, 63, 64, 79, 94, 95 hardware's",
    cases=(f"{DEBIAN}: driver instability",),
)
def _xid(case: Case) -> Iterator[Problem]:
    if lines := [line for line in case.probe.kernel.lines if "Xid" in line]:
        yield Problem(
            f"the GPU's driver reported {len(lines)} faults, the last: {lines[-1].strip()[:140]}",
            "look the Xid up in NVIDIA's catalogue; a reboot clears a GPU that has fallen off the bus",
        )


# --- the machine ---------------------------------------------------------------------------------------------------


@check(
    "storage",
    "Is everything mounted, and does the service find its folders?",
    how="the mount points and folders of the host's configuration, each looked at with a time limit",
    mend="mount it; ComfyUI waits for it and starts by itself",
    cases=(f"{SPARK}: NFS symlinks become directories",),
)
def _storage(case: Case) -> Iterator[Problem]:
    for refusal in plan.storage(case.target, case.facts):
        yield Problem(refusal.what, refusal.remedy)


@check(
    "access",
    "May the service read its code and models, and write where it must?",
    how="access(2), as the service's user",
    mend="inv deploy sets what lies in data/; elsewhere chown or an access list",
    cases=(f"{SPARK}: permission errors",),
)
def _access(case: Case) -> Iterator[Problem]:
    who = case.target.host.run_as if case.target.host.scope == "system" else case.facts.login
    for path, what in case.probe.access.items():
        yield Problem(f"{who} may not {what} {path}", f"on the host: chown -R {shlex.quote(who)}: {shlex.quote(path)}")


LEAST = 0.05
"""A disk with less than this share left is nearly full."""


@check(
    "disk",
    "Is there room on the disks, in bytes and inodes?",
    how="statvfs(3) of the prefix, the data and the folders elsewhere",
    mend="delete outputs or models there; fewer kept releases (`keep`)",
    severity="warning",
    cases=(f"{DEBIAN}: system resource exhaustion",),
)
def _disk(case: Case) -> Iterator[Problem]:
    for path, disk in case.live.disks.items():
        if disk.fault:
            yield Problem(f"{path} cannot be looked at: {disk.fault}", f"on the host: ls -ld {shlex.quote(path)}")
        elif disk.total and (disk.free < disk.total * LEAST or disk.free < plan.RESERVE_DATA):
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
        for refusal in plan.room(case.target, case.facts, case.stock):
            yield Problem(f"a new environment would not find room: {refusal.what}", refusal.remedy)


@check(
    "clock",
    "Is the clock right?",
    how="timedatectl, and the host's time beside this machine's",
    mend="on the host: timedatectl set-ntp true",
    severity="warning",
)
def _clock(case: Case) -> Iterator[Problem]:
    off = case.live.time - case.now
    if abs(off) > 60:  # certificates and journals are off by then; an answer takes seconds at most
        ahead = "ahead of" if off > 0 else "behind"
        yield Problem(
            f"its clock is {console.clock(abs(off))} {ahead} this machine's", "on the host: timedatectl set-ntp true"
        )
    elif case.probe.synchronized is False:
        yield Problem("no time service keeps its clock", "on the host: timedatectl set-ntp true")


TOOLKIT = "1.18"
"""CVE-2025-23266 is in NVIDIA's container toolkit below 1.17.8; 1.18 brings the unit that describes the GPU at boot."""


@check(
    "containers",
    "Where there is a container engine: can it give a container the GPU?",
    how="nvidia-ctk, and the devices that it lists (CDI), which some machines lack after a reboot",
    mend="install nvidia-container-toolkit; nvidia-ctk cdi generate",
    severity="warning",
    cases=(f"{DEBIAN}: GPU not detected in container",),
)
def _containers(case: Case) -> Iterator[Problem]:
    found = case.probe.containers
    if not (found.engines and case.facts.gpus):
        return
    engines = " and ".join(found.engines)
    if not found.toolkit:
        yield Problem(
            f"{engines} cannot give a container the GPU: there is no NVIDIA container toolkit",
            "on the host: apt-get install nvidia-container-toolkit",
        )
        return
    if _older(found.toolkit, TOOLKIT):
        yield Problem(
            f"NVIDIA's container toolkit is {found.toolkit}, older than {TOOLKIT} (CVE-2025-23266)",
            "on the host: apt-get install --only-upgrade nvidia-container-toolkit",
        )
    if not found.devices:
        unit = "systemctl enable --now nvidia-cdi-refresh.service"
        make = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
        yield Problem("no GPU is described for containers (CDI)", f"on the host: {unit if found.refresh else make}")


def _older(version: str, floor: str) -> bool:
    try:
        return Version(version) < Version(floor)
    except InvalidVersion:
        return False


@check(
    "compilers",
    "Are a C compiler and Python's headers there, which Triton needs when ComfyUI runs?",
    how="cc on the PATH, and Python.h of the release's Python",
    mend="on the host: apt-get install gcc, and the headers of that Python",
    severity="warning",
    cases=(f"{SPARK}: sageattention compilation fails, build tools",),
)
def _compilers(case: Case) -> Iterator[Problem]:
    if not case.release.get("wheels"):
        return
    version = case.release.get("python", "3")
    if not case.probe.compiler:
        yield Problem(
            "there is no C compiler, and Triton compiles when ComfyUI runs", "on the host: apt-get install gcc"
        )
    if not case.probe.headers:
        yield Problem(
            f"Python {version} has no headers, and Triton compiles against them",
            f"on the host: apt-get install python{version}-dev",
        )
