"""Checks of the GPU: driver, CUDA, other users, MPS, kernels and faults."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.console import counted
from core.manifest import capabilities
from deploy import plan, release_refusals
from ops.checks.case import Case, Check
from ops.mps import problems as mps_problems
from ops.status import Problem

if TYPE_CHECKING:
    from ops.checks.case import Found


def _driver(case: Case) -> Found:
    if case.target.profile.cuda:
        yield from release_refusals.gpu(case.target, case.facts)


def _cuda(case: Case) -> Found:
    if not (case.target.profile.cuda and case.facts.current):
        return
    comfyui, torch = case.live.comfyui, case.probe.torch
    if comfyui.state == "answers" and not any(each.type == "cuda" for each in comfyui.devices):
        kinds = ", ".join(each.type for each in comfyui.devices)
        yield Problem(f"ComfyUI finds no CUDA device and computes on {kinds}", f"inv gpu-access {case.at}")
    elif torch and not torch.available:
        reason = torch.error or f"torch {torch.version} finds no device"
        yield Problem(f"torch cannot use CUDA: {reason}", f"inv gpu-access {case.at}")


def _shared(case: Case) -> Found:
    on_purpose = "shared-gpu" in case.target.host.modes or case.probe.mps.on
    for gpu in case.live.gpus:
        if not on_purpose and (who := plan.others(gpu.processes)):
            yield Problem(
                f"other processes use GPU {gpu.index}: {who}",
                f'stop them, or set modes = ["shared-gpu"] for {case.target.name}',
            )
        if gpu.errors:
            yield Problem(f"GPU {gpu.index} does not report everything: {gpu.errors[0]}", "on the host: nvidia-smi -q")


def _mps(case: Case) -> Found:
    on_gpu = case.live.comfyui.state == "answers" and any(each.type == "cuda" for each in case.live.comfyui.devices)
    yield from mps_problems(case.probe.mps, case.at, cuda=on_gpu)


def _kernels(case: Case) -> Found:
    have = {gpu.capability for gpu in case.facts.gpus}
    for name, wheel in (case.release.wheels or {}).items():
        if have and have.isdisjoint(capabilities(wheel.arch)):
            listed = ", ".join(sorted(have))
            yield Problem(
                f"{name} was built for {wheel.arch}, but the GPU is {listed}",
                f"inv build-kernels --kernel {name} --arch '{';'.join(sorted(have))}'; inv deploy {case.at}",
            )
    old = ("no-wheel", "old-glibc", "old-libstdcxx")
    yield from (refusal for refusal in case.planned.refusals if refusal.kind in old)


def _faults(case: Case) -> Found:
    if lines := [line for line in case.probe.kernel.lines if "Xid" in line]:
        yield Problem(
            f"the GPU driver reported {counted(len(lines), 'error')}, the last: {lines[-1].strip()[:140]}",
            "look up the Xid in NVIDIA's catalogue; a reboot recovers a GPU that has fallen off the bus",
        )


CHECKS = (
    Check(
        name="driver",
        question="Does the driver find the GPU, and is it new enough for the stack's CUDA version?",
        detected_by="NVML, and the driver version compared with the minimum in config/stacks.toml",
        fix="install or update the driver; for an old driver, set an older stack in the host's override",
        find=_driver,
    ),
    Check(
        name="cuda",
        question="Can torch use CUDA in ComfyUI's environment?",
        detected_by="the devices that ComfyUI reports; if it does not answer, torch itself, run as the service's user",
        fix="inv gpu-access shows who may use the devices; reboot after a driver update",
        find=_cuda,
    ),
    Check(
        name="gpu-shared",
        question="Is ComfyUI the only user of the GPU, unless sharing is configured?",
        detected_by="the processes that NVML lists for each GPU, and their units",
        fix='stop the others, or share on purpose: inv mps on, modes = ["shared-gpu"]',
        severity="warning",
        find=_shared,
    ),
    Check(
        name="mps",
        question="If MPS is on, does its daemon run, and does ComfyUI use it?",
        detected_by="the daemon's unit and answers, ComfyUI's environment, and the list of MPS clients",
        fix="inv mps on restarts the daemon and ComfyUI; inv mps off turns MPS off",
        find=_mps,
    ),
    Check(
        name="kernels",
        question="Were the kernels built for this GPU, torch and Python?",
        detected_by="the wheels in the manifest, compared with the GPU and the release",
        fix="inv build-kernels for the GPU's compute capability, then inv deploy",
        find=_kernels,
    ),
    Check(
        name="gpu-faults",
        question="Did the driver report GPU errors?",
        detected_by="Xid lines in the kernel log of a week",
        fix="look up the number in NVIDIA's Xid catalogue: 13, 31 and 43 are program errors; 48, 63, 64, 79, 94 and 95 "
        "are hardware errors",
        find=_faults,
    ),
)
