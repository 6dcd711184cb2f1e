"""Creates every fault that the doctor knows on the real machine; the doctor must find it and name the fix."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from tests import nvml
from tests.host.fleet import PREFIX, Fleet
from tests.host.small import small
from tests.host.test_faults import wait_for_step
from tests.plans import wheel

pytestmark = pytest.mark.host


def findings(fleet: Fleet, *, code: int, host: str = "spark") -> dict[str, list[tuple[str, str]]]:
    """The doctor's findings, by check: (what, remedy)."""
    fleet.machine.run(f"rm -f {PREFIX}/state/verified.json")  # files verified before may be damaged now
    done = fleet.inv("doctor", "--host", host, "--json")
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, list[tuple[str, str]]] = {}
    for each in json.loads(done.stdout):
        found.setdefault(each["check"], []).append((each["what"], each["remedy"]))
    return found


def only(found: dict[str, list[tuple[str, str]]], check: str) -> tuple[str, str]:
    """The only finding of a check."""
    (one,) = found[check]
    return one


@contextmanager
def drop_in(fleet: Fleet, *lines: str) -> Iterator[None]:
    """Add lines to the service's unit and restart it; restored and serving afterwards."""
    folder = "/etc/systemd/system/comfyui.service.d"
    text = "\\n".join(("[Service]", *lines))
    fleet.machine.run(f"mkdir -p {folder}; printf {shlex.quote(text + chr(92) + 'n')} > {folder}/test.conf")
    fleet.machine.run("systemctl daemon-reload; systemctl restart comfyui", check=False)
    try:
        yield
    finally:
        fleet.machine.run(f"rm -r {folder}; systemctl daemon-reload; systemctl reset-failed comfyui")
        fleet.machine.run("journalctl --rotate --vacuum-time=1s --quiet; systemctl restart comfyui")
        assert fleet.answers()


@contextmanager
def program(fleet: Fleet, name: str, script: str) -> Iterator[None]:
    """A fake program on the machine with a real one's output."""
    path = f"/usr/local/bin/{name}"
    fleet.machine.run(f"printf '%s\\n' {shlex.quote('#!/bin/sh')} {shlex.quote(script)} > {path}; chmod +x {path}")
    try:
        yield
    finally:
        fleet.machine.run(f"rm {path}")


DEAD = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
pid, place = sys.argv[1], sys.argv[2].encode()
fuse = os.open("/dev/fuse", os.O_RDWR)
assert libc.setns(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY), 0) == 0
options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
assert libc.mount(b"nowhere", place, b"fuse", 0, options) == 0
print("mounted", flush=True)
time.sleep(600)
"""  # mount(2); nobody answers the kernel's requests (fuse(4))


@contextmanager
def dead(fleet: Fleet, path: str) -> Iterator[None]:
    """A mount on the machine whose server is down: every access blocks."""
    fleet.machine.run(f"mkdir -p {path}")
    words = [sys.executable, "-c", DEAD, str(fleet.machine.first), path]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "mounted\n"
            yield
        finally:
            fleet.machine.run(f"umount --lazy {path}")
            server.kill()  # blocked processes then get an error


def test_a_healthy_host_has_no_errors(steady: Fleet) -> None:
    status = steady.inv("status", "--host", "spark", "--json")
    assert status.returncode == 0, status.stdout
    (told,) = json.loads(status.stdout)
    assert (told["well"], told["drift"], told["comfyui"]["state"]) == (True, [], "answers")
    assert told["uptime"] > 0
    assert (told["deployed"]["action"], told["deployed"]["result"]) == ("deploy", "done")
    assert told["disks"][PREFIX]["free"] > 0
    shown = steady.inv("status", "--host", "spark")
    assert "no problems found" in shown.stdout
    assert all(len(line) <= 100 for line in shown.stdout.splitlines())
    found = findings(steady, code=1)  # a container's clock is not synchronised
    assert list(found) == ["clock"]
    assert only(found, "clock") == ("no time service synchronises its clock", "on the host: timedatectl set-ntp true")


def test_nothing_deployed(steady: Fleet) -> None:
    steady.configure(f'[hosts.bare]\naddress = "spark"\nprofile = "cpu"\nprefix = "/opt/other"\nport = {1}\n')
    found = findings(steady, code=2, host="bare")
    assert only(found, "deployed") == ("nothing is deployed", "inv deploy --host bare")
    assert steady.inv("status", "--host", "bare").returncode == 1


def test_unreachable_host_does_not_delay_others(steady: Fleet) -> None:
    more = '[hosts.off]\naddress = "127.0.0.1"\nssh_port = 9\nprofile = "cpu"\n[groups]\nall = ["spark", "off"]\n'
    steady.configure(more)
    done = steady.inv("status", "--group", "all", "--json")
    spark, off = json.loads(done.stdout)
    assert (done.returncode, spark["well"], off["reached"]) == (1, True, False)
    assert "cannot be reached" in off["problems"][0]["what"]
    assert "cannot be reached" in only(findings(steady, code=2, host="off"), "reach")[0]
    logs = steady.inv("logs", "--group", "all", "--lines", "1")
    assert (logs.returncode, logs.stdout[:7], "off: off cannot be reached" in logs.stderr) == (1, "spark  ", True)
    jobs = steady.inv("jobs", "--group", "all", "--json")
    assert (jobs.returncode, {each["host"] for each in json.loads(jobs.stdout)}) == (1, {"spark"})
    assert steady.inv("flags", "--group", "all").returncode == 1
    assert steady.inv("jobs", "--host", "off").returncode == 60


def test_the_logs_of_several_hosts_are_followed_at_once(steady: Fleet) -> None:
    twin = f'[hosts.twin]\naddress = "spark"\nprofile = "cpu"\nport = {steady.machine.port}\n'
    steady.configure(f'{twin}[groups]\nboth = ["spark", "twin"]\n')
    following = steady.start("logs", "--group", "both", "--follow", "--lines", "1")
    assert following.stdout is not None
    assert {following.stdout.readline()[:7] for _ in range(2)} == {"spark  ", "twin  2"}
    following.send_signal(signal.SIGINT)
    following.communicate(timeout=10)
    assert following.returncode == 130


def test_damage_and_wrong_torch_are_reported(steady: Fleet) -> None:
    place = f"{PREFIX}/current/env/lib/python3.11/site-packages"
    steady.machine.run(f"mv {place}/torch-2.14.1.dist-info {place}/torch-2.9.1.dist-info")
    found = findings(steady, code=2)
    steady.machine.run(f"mv {place}/torch-2.9.1.dist-info {place}/torch-2.14.1.dist-info")
    assert only(found, "packages") == ("torch is 2.9.1, the release requires 2.14.1", "inv deploy --host spark")
    assert any("was changed after it was made" in what for what, _ in found["drift"])
    # The first step: a machine that has its environment from the shared layer has no uv yet.
    assert any(what.startswith(("a deploy would make env-", "a deploy would send uv")) for what, _ in found["drift"])


def test_crash_loop_shows_the_error_line(service: Fleet) -> None:
    command = "/bin/sh -c 'echo starting; echo \"ModuleNotFoundError: No module named kornia\" >&2; echo bye; exit 1'"
    with drop_in(service, "ExecStart=", f"ExecStart={command}", "RestartSec=100ms"):
        service.machine.run("until systemctl is-failed comfyui; do sleep 0.1; done")
        what, remedy = only(findings(service, code=2), "service")
        status = service.inv("status", "--host", "spark")
    assert what == "the service failed (exit-code); its log: ModuleNotFoundError: No module named kornia"
    assert remedy == "inv logs --host spark; inv start --host spark"
    assert (status.returncode, "stopped" in status.stdout) == (1, True)


def test_crash_loops_and_hanging_starts_are_reported(service: Fleet) -> None:
    count = f"{PREFIX}/data/output/count"
    script = f'echo >> {count}; [ $(wc -l < {count}) -gt 3 ] && exec sleep 600; echo "RuntimeError: boom" >&2; exit 1'
    with drop_in(service, "ExecStart=", f"ExecStart=/bin/sh -c '{script}'", "RestartSec=100ms"):
        service.machine.run(f"until [ $(wc -l < {count}) -gt 3 ]; do sleep 0.1; done; rm {count}")
        what, remedy = only(findings(service, code=2), "service")
    assert what == "the service keeps crashing (3 restarts); its log: RuntimeError: boom"
    assert remedy == "inv logs --host spark; inv rollback --host spark"
    with drop_in(service, "ExecStart=", "ExecStart=/bin/sleep 600"):
        service.configure("override.start_seconds = 1\n")
        time.sleep(1.5)
        what, remedy = only(findings(service, code=2), "service")
    assert what.endswith("but accepts no connections")
    assert remedy == "inv logs --host spark"


def test_failed_and_interrupted_deploys_are_reported(service: Fleet) -> None:
    app = small(service.place, "broken", 'raise RuntimeError("broken")')
    for flag, how in ((), "failed"), (("--no-trial",), "reverted"):
        assert service.deploy(*flag, HEARTH_APP=str(app)).returncode == 66
        what, remedy = only(findings(service, code=2), "deployed")
        assert what.startswith(f"the last deploy {how}: release ")
    assert remedy == "inv deploy --host spark"
    since = time.time()
    client = service.start("deploy", "--host", "spark", HEARTH_APP=str(app))
    wait_for_step(service, "cut over", since)
    service.machine.run("systemctl stop comfyui-apply")
    found = findings(service, code=2)
    service.machine.run("systemctl start comfyui-apply")  # as a boot would
    client.communicate(timeout=180)
    (what, remedy), *_ = found["deployed"]
    assert re.fullmatch("a deploy by .+ was interrupted", what)
    assert remedy == "inv attach --host spark"


def test_hanging_comfyui_is_reported(service: Fleet) -> None:
    pid = service.machine.run("systemctl show comfyui --property=MainPID --value").strip()
    service.machine.run(f"kill -STOP {pid}")
    status = service.inv("status", "--host", "spark")
    found = findings(service, code=2)
    service.machine.run(f"kill -CONT {pid}")
    assert (status.returncode, "silent" in status.stdout) == (1, True)
    what, remedy = only(found, "service")
    assert what.startswith("ComfyUI accepts connections but does not answer")
    assert "inv restart --host spark --force" in remedy


def test_port_in_use_is_reported(service: Fleet) -> None:
    machine = service.machine
    machine.run(f"systemctl stop comfyui; systemd-run --unit=other python3 -m http.server {machine.port}")
    machine.run(f"until ss -ltn | grep -q :{machine.port}; do sleep 0.1; done")
    found = findings(service, code=2)
    machine.run("systemctl stop other; systemctl start comfyui")
    assert service.answers()
    assert only(found, "port")[0].startswith(f"port {machine.port} is in use by /usr/bin/python3")
    assert only(found, "service") == ("the service is not running (inactive (dead))", "inv start --host spark")


def test_slow_start_names_its_cause(service: Fleet) -> None:
    with drop_in(service, "ExecStartPre=/bin/echo Background asset scan initiated", "ExecStartPre=/bin/sleep 20"):
        # longer than any other step of a start, on a busy machine too
        assert service.answers()
        service.configure("override.start_seconds = 10\n")
        (what, remedy), *_ = findings(service, code=1)["start"]
    assert "of it after: Background asset scan initiated" in what
    assert "--enable-assets" in remedy


AHEAD = """\
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += 7200;
    return result;
}
"""  # a container uses its host's clock: shift it two hours for each program that starts there

KERNEL = """\
2026-11-20T08:12:01,000000+00:00 Memory cgroup out of memory: Killed process 4242 (python) total-vm:24112640kB, UID:999
2026-11-20T09:00:00,000000+00:00 NVRM: Xid (PCI:0000:01:00): 79, pid=4242, GPU has fallen off the bus.
"""  # the wording of the kernel (mm/oom_kill.c) and the driver; a container cannot read the real log


def test_out_of_memory_in_the_kernel_and_on_the_gpu(service: Fleet) -> None:
    with program(service, "dmesg", f"cat <<'E'\n{KERNEL}E"):
        found = findings(service, code=2)
    what, remedy = only(found, "out-of-memory")
    assert "Killed process 4242 (python)" in what
    assert 'modes = ["low-memory"] for spark' in remedy
    assert "Xid (PCI:0000:01:00): 79" in only(found, "gpu-faults")[0]
    refusal = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    with drop_in(service, f'ExecStartPre=/bin/echo "{refusal}"'):
        assert service.answers()
        what, remedy = only(findings(service, code=2), "out-of-memory")
    assert refusal in what
    assert 'modes = ["low-memory"] for spark' in remedy


def test_missing_dead_and_unreadable_folders_are_reported(service: Fleet) -> None:
    machine = service.machine
    service.configure('mounts."/srv/none" = {}\n')
    assert any("/srv/none" in what for what, _ in findings(service, code=2)["storage"])
    with dead(service, "/srv/none"):
        what, remedy = only(findings(service, code=2), "storage")
        words = (["status"], ["facts"], ["deploy", "--dry-run"], ["tune"], ["stop", "--dry-run"])
        asked = {each[0]: service.start(*each, "--host", "spark") for each in words}
        said = {name: client.communicate(timeout=60)[0] for name, client in asked.items()}
        logs = service.inv("logs", "--host", "spark", "--lines", "1")
    assert what == "/srv/none does not answer"
    assert remedy.startswith("on the host: umount --lazy")
    assert {name: client.returncode for name, client in asked.items()} == {
        "status": 1, "facts": 69, "deploy": 69, "tune": 69, "stop": 69,
    }  # fmt: skip
    assert all("/srv/none does not answer" in each for each in said.values())
    assert logs.returncode == 0
    service.configure()
    machine.run(f"rmdir /srv/none; chmod 700 {PREFIX}/data/output; chown root:root {PREFIX}/data/output")
    found = findings(service, code=2)
    machine.run(f"chown comfyui:comfyui-members {PREFIX}/data/output; chmod 2770 {PREFIX}/data/output")
    what, remedy = only(found, "access")
    assert what == f"comfyui cannot write {PREFIX}/data/output"
    assert remedy == f"on the host: chown -R comfyui: {PREFIX}/data/output"


def test_wrong_clock_is_reported(service: Fleet) -> None:
    library = service.machine.root / "usr/local/lib/clock.so"
    words = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-x", "c", "-", "-o", str(library), "-ldl"]
    subprocess.run(words, input=AHEAD, text=True, check=True)
    service.machine.run("echo /usr/local/lib/clock.so > /etc/ld.so.preload")
    found = findings(service, code=1)
    service.machine.run("rm /etc/ld.so.preload /usr/local/lib/clock.so")
    what, remedy = only(found, "clock")
    assert re.fullmatch(r"its clock is (2 h 00|1 h 59) min ahead of this machine's", what)
    assert remedy == "on the host: timedatectl set-ntp true"


def test_full_disks(service: Fleet) -> None:
    machine = service.machine
    machine.run("mkdir -p /srv/inodes/out; chown comfyui: /srv/inodes/out")
    machine.run("i=0; while touch /srv/inodes/out/$i 2>/dev/null; do i=$((i+1)); done")
    service.configure('folders.output = "/srv/inodes/out"\n')
    (what, remedy), *_ = findings(service, code=1)["disk"]
    machine.run("rm -r /srv/inodes/out; mkdir -p /srv/blocks/out; chown comfyui: /srv/blocks/out")
    assert "inodes left at /srv/inodes/out" in what
    assert remedy.startswith("on the host: du --inodes")
    machine.run("head -c 400M /dev/zero > /srv/blocks/filler 2>/dev/null || true")
    service.configure('folders.output = "/srv/blocks/out"\n')
    found = findings(service, code=2)
    machine.run("rm -r /srv/blocks/out /srv/blocks/filler")
    assert any("left at /srv/blocks/out" in what for what, _ in found["disk"])


def test_a_gpu_that_is_missing_and_kernels_for_another(service: Fleet) -> None:
    service.configure("override.cuda = true\n")
    found = findings(service, code=2)
    assert "shows none" in only(found, "driver")[0]
    assert only(found, "cuda")[0] == "ComfyUI finds no CUDA device and computes on cpu"
    service.machine.run("systemctl stop comfyui")
    found = findings(service, code=2)
    service.machine.run("systemctl start comfyui")
    assert service.answers()
    said = ("torch cannot use CUDA: torch 2.14.1+cu130 finds no device", "inv gpu-access --host spark")
    assert only(found, "cuda") == said
    service.configure('override.kernels = ["sageattention"]\noverride.arch = "8.9"\n')
    what, remedy = only(findings(service, code=2), "kernels")
    assert what.startswith("the wheelhouse has no sageattention for 8.9")
    assert remedy.startswith("inv build-kernels --kernel sageattention --arch 8.9")
    house = service.place / "wheelhouse"
    house.mkdir(exist_ok=True)
    newer = wheel("sageattention", arch="8.9", python="3.11", platform="linux_x86_64", glibc="2.99")
    (house / newer.file).write_bytes(b"x")
    (house / f"{newer.file}.json").write_bytes(msgspec.json.encode(newer))
    what, _ = only(findings(service, code=2), "kernels")
    shutil.rmtree(house)
    assert what == "sageattention.whl needs glibc 2.99, the host has 2.36"


@contextmanager
def gpu(fleet: Fleet, machine: str, *edits: tuple[str, str]) -> Iterator[None]:
    """A fake NVML on the machine that replays a recording of another one."""
    root = fleet.machine.root
    place, recording = root / "usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", root / "etc/nvml-recording"
    shutil.copy(nvml.library(), place)
    recording.write_text(nvml.recording(machine, *edits))
    try:
        yield
    finally:
        place.unlink()
        recording.unlink()


def test_a_gpu_with_an_old_driver_that_others_use(service: Fleet) -> None:
    service.configure("override.cuda = true\n")
    other = service.machine.run(
        "systemd-run --quiet --unit=trainer sleep 600; systemctl show trainer -p MainPID --value"
    )
    with gpu(service, "rtx-4070", ("driver", "550.54.14"), ("compute", f"{other.strip()} 3000000000")):
        found = findings(service, code=2)
        shown = service.inv("status", "--host", "spark").stdout
    with gpu(service, "rtx-4070", ("driver", "580.95.05"), ("compute", f"{other.strip()} 3000000000")):
        dry = service.deploy("--dry-run")
        assert dry.returncode == 2, dry.stderr
    with gpu(service, "rtx-4070", ("temperature", "!999")):
        told = findings(service, code=2)["gpu-shared"]
    service.machine.run("systemctl stop trainer")
    assert only(found, "driver")[0] == "the driver is 550.54.14, but CUDA 13.0 needs 580.65.06"
    what, remedy = only(found, "gpu-shared")
    assert what == f"other processes use GPU 0: sleep (pid {other.strip()}, root, 3.0 GB)"
    assert 'modes = ["shared-gpu"] for spark' in remedy
    assert f"their memory is not available to ComfyUI: sleep (pid {other.strip()}, root, 3.0 GB)" in dry.stderr
    assert "°C" in shown
    assert any(what.startswith("GPU 0 does not report everything: temperature") for what, _ in told)


def test_kernels_for_another_gpu_without_a_compiler_and_a_container_without_one(service: Fleet) -> None:
    machine = service.machine
    release = f"{PREFIX}/current/release.json"
    machine.run(f"cp {release} /root/release.json")
    text = json.loads(machine.run(f"cat {release}"))
    text["wheels"] = {"sageattention": {"file": "-", "sha256": "-", "arch": "12.1", "cuda": "", "compilers": {}}}
    (service.prefix / "releases" / service.current() / "release.json").write_text(json.dumps(text))
    with gpu(service, "rtx-4070"), program(service, "docker", "exit 0"):
        found = findings(service, code=2)
        with program(service, "nvidia-ctk", '[ "$1" = cdi ] || echo "NVIDIA Container Toolkit CLI version 1.17.4"'):
            old = findings(service, code=2)
    machine.run(f"cp /root/release.json {release}")
    what, remedy = only(found, "kernels")
    assert what == "sageattention was built for 12.1, but the GPU is 8.9"
    assert remedy.startswith("inv build-kernels --kernel sageattention --arch '8.9'")
    assert [what.partition(",")[0] for what, _ in found["compilers"]] == [
        "there is no C compiler",
        "there are no headers of Python 3.11",
    ]
    what, remedy = only(found, "containers")
    assert "there is no NVIDIA container toolkit" in what
    assert remedy == "on the host: apt-get install nvidia-container-toolkit"
    assert [what.partition(",")[0] for what, _ in old["containers"]] == [
        "NVIDIA's container toolkit is 1.17.4",
        "containers cannot find the GPU: it has no CDI description",
    ]


def test_unified_memory_that_the_page_cache_holds(service: Fleet) -> None:
    lines = {"MemTotal": 120, "MemFree": 5, "MemAvailable": 60, "Cached": 70, "SwapTotal": 16, "SwapFree": 4}
    text = "".join(f"{name}: {value * 1_000_000} kB\n" for name, value in lines.items())
    (service.machine.root / "root/meminfo").write_text(text)
    service.machine.run("mount --bind /root/meminfo /proc/meminfo")
    with gpu(service, "gb10"):
        found = findings(service, code=1)
    service.machine.run("umount /proc/meminfo; rm /root/meminfo")
    (cache, drop), (swap, tune) = found["unified-memory"]
    assert cache == "the page cache holds 71.7 GB of 122.9 GB; 5.1 GB is free"
    assert drop == "inv drop-caches --host spark"
    assert swap == "12.3 GB is swapped out, which slows the GPU down"
    assert tune == "inv tune --host spark"
