"""Slurm on this machine: munged, slurmctld and slurmd on the loopback address, with a GPU that is none."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.host.machine import free_port

CONFIGURATION = """\
ClusterName=hearth
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={place}/munge.sock
CredType=cred/munge
SlurmUser=root
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 Gres=gpu:gb10:1 State=UNKNOWN
PartitionName=gpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """A cluster of one node; the environment for its commands."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:  # a socket's path has at most 107 characters
        place = Path(name)
        env = _configure(place)
        with _daemons(place, env):
            yield env


def _configure(place: Path) -> dict[str, str]:
    host = socket.gethostname().partition(".")[0]
    for each in ("state", "spool"):
        (place / each).mkdir()
    ports = {"controller": free_port(), "daemon": free_port()}
    (place / "slurm.conf").write_text(CONFIGURATION.format(host=host, place=place, **ports))
    os.mknod(place / "gpu0", 0o20666, os.makedev(1, 3))
    (place / "gres.conf").write_text(f"NodeName={host} Name=gpu Type=gb10 File={place}/gpu0\n")
    (place / "munge.key").write_bytes(os.urandom(128))
    (place / "munge.key").chmod(0o400)
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "USER": "root",
        "SLURM_CONF": f"{place}/slurm.conf",
    }


@contextmanager
def _daemons(place: Path, env: dict[str, str]) -> Iterator[None]:
    files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{key}={place / name}" for key, name in files.items())]
    daemons = (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D"])
    with ExitStack() as running, (place / "daemons.log").open("wb") as log:
        for words in daemons:
            # Slurm closes every descriptor up to the limit, which may be a billion.
            limited = ["bash", "-c", 'ulimit -n 1024 && exec "$@"', "-", *words]
            daemon = subprocess.Popen(limited, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            running.callback(_end, daemon)
            if words is munged:
                _until(lambda: (place / "munge.sock").exists(), place)
        idle = ["sinfo", "--noheader", "--format=%t"]
        _until(lambda: _said(env, idle).stdout.strip() == "idle", place)
        try:
            yield
        finally:
            _said(env, ["scancel", "--full", "--signal=KILL", "--user=root"])
            _until(lambda: not _said(env, ["squeue", "--noheader"]).stdout.strip(), place)


def _said(env: dict[str, str], words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=120)


def _until(true: Callable[[], bool], place: Path) -> None:
    end = time.monotonic() + 300
    while not true():
        assert time.monotonic() < end, (place / "daemons.log").read_text()[-3000:]
        time.sleep(0.2)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(60)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def submit(env: dict[str, str], batch: Path, *words: str) -> str:
    """Submit a batch file from its folder; return the job's number."""
    argv = ["sbatch", "--parsable", *words, batch.name]
    done = subprocess.run(argv, env=env, cwd=batch.parent, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def state(env: dict[str, str], job: str) -> str:
    """The state of a job, such as RUNNING."""
    shown = _said(env, ["scontrol", "show", "job", job]).stdout
    return next(iter(re.findall(r"JobState=(\w+)", shown)), "unknown")
