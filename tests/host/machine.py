"""Real hosts for deploys: a Debian with systemd and sshd in a folder, booted by systemd-nspawn.

A machine is an overlay over a root from debootstrap, which is kept in the user's cache. It shares this machine's
network and is reachable only at a port of 127.0.0.1. Needs root, debootstrap, systemd-container and openssh-client.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from core import files, workspace

PACKAGES = "systemd,systemd-sysv,dbus,openssh-server,sudo,python3,iproute2,ca-certificates,procps"
LOGIN = "deployer"
ROOT = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root")
"""The environment of commands of the tests there."""

CONTAINERS = "podman,crun,uidmap,passt,dbus-user-session,libpam-systemd,polkitd"
"""What Debian 13 has in addition, for containers of Podman."""

FIREWALL = ("--system-call-filter=bpf", "--capability=CAP_BPF,CAP_NET_ADMIN,CAP_PERFMON,CAP_SYS_RESOURCE")
"""Flags that let a machine's systemd enforce IPAddressDeny=, for which it attaches BPF programs."""


SITE = """
import atexit, gc
gc.set_threshold(100_000, 50, 50)
atexit.register(gc.freeze)
"""
"""For every Python on a machine. Garbage collection takes 45 % of the CPU time of a start and end of ComfyUI (7 s)."""

NEEDS = ("root", "systemd-nspawn", "debootstrap", "ssh", "ssh-keygen", "mkfs.xfs", "mkfs.btrfs", "ip", "nft")
"""The requirements for booting machines, as arguments of the mark `needs`."""


def base(suite: str, arch: str) -> Path:
    """The root below the machines' overlays, for a Debian and an arch (its name); created once, in a minute."""
    place = workspace.current().cache / "hosts" / f"{suite}-{arch}"
    # One at a time: two debootstraps with a common package folder delete each other's packages.
    with files.locked(workspace.current().cache / "hosts/base.lock", lambda: None):
        if not place.is_dir():
            _make_base(suite, arch, place)
    return place


def _make_base(suite: str, arch: str, place: Path) -> None:
    packages = PACKAGES if suite == "bookworm" else f"{PACKAGES},{CONTAINERS}"
    with files.atomic_dir(place) as part:
        words = ["debootstrap", "--variant=minbase", f"--include={packages}", f"--arch={arch}"]
        words += [f"--cache-dir={_made(workspace.current().cache / 'hosts/debs')}", suite, str(part)]
        native = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True).stdout.strip()
        if arch != native:
            _emulate()
            words.insert(1, "--foreign")
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        if arch != native:
            second = ["chroot", str(part), "/debootstrap/debootstrap", "--second-stage"]
            subprocess.run(second, check=True, stdout=subprocess.DEVNULL)
        run = ["chroot", str(part)]
        subprocess.run([*run, "useradd", "--create-home", "--shell", "/bin/bash", LOGIN], check=True)
        (part / "etc/sudoers.d/deployer").write_text(f"{LOGIN} ALL=(ALL) NOPASSWD: ALL\n")
        (part / "etc/ssh/sshd_config.d/here.conf").write_text("ListenAddress 127.0.0.1\nUseDNS no\n")
        # Packages come from this machine's index settings.
        shutil.copy("/etc/ssl/certs/ca-certificates.crt", part / "etc/ssl/certs/ca-certificates.crt")
        (part / "etc/uv").mkdir()
        (part / "etc/uv/uv.toml").write_text("system-certs = true\n")
        (part / "etc/machine-id").write_text("")


def _emulate() -> None:
    """Register qemu for arm64 programs with this kernel, for every root; binfmt-support keeps it so."""
    register = Path("/proc/sys/fs/binfmt_misc")
    if not (register / "status").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(register)], check=True)
    if not (register / "qemu-aarch64").exists():
        subprocess.run(["update-binfmts", "--enable", "qemu-aarch64"], check=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def place_for(name: str) -> Path:
    """A folder for a test's host, on uv's cache file system for hard links; its name contains our process id.

    First deletes the remains of killed runs: gigabytes, mounts, and running machines.
    """
    running = _made(workspace.current().cache / "hosts/running")
    for stale in running.glob("*.*"):
        if not Path(f"/proc/{stale.suffix[1:]}").exists():
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # systemd-nspawn, whose first argument ends its machine with it
                    if f"--directory={stale}/root".encode() in process.read_bytes().split(b"\0"):
                        _kill(int(process.parent.name))
            clear(stale)
    return running / f"{name}.{os.getpid()}"


def mounted_below(place: Path) -> list[Path]:
    """The mount points below a folder, in the order for unmounting."""
    points = (Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in reversed([*points]) if point.is_relative_to(place)]


def clear(place: Path) -> None:
    """Unmount everything below a folder, and delete it."""
    for point in mounted_below(place):
        subprocess.run(["umount", "--lazy", "--quiet", str(point)], check=False)
    subprocess.run(["rm", "-rf", str(place)], check=False)  # of any depth


def _kill(pid: int) -> list[int]:
    """Kill systemd-nspawn and its machine's first process, which ends the others; returns the killed ones."""
    listed = [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()), pid]
    for each in listed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    return listed


def _runs(pid: int) -> bool:
    """Whether a process runs. A zombie's entry remains until its parent reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


DOWNLOADS = "/srv/downloads"
"""Where a machine has this machine's uv cache."""


def downloads() -> Path:
    """This machine's uv cache."""
    asked = subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True, check=True)
    return _made(Path(asked.stdout.strip()))


@dataclass
class Machine:
    """One host: `boot` and `power_off` as often as needed; its disk remains.

    Without `network` it has only its own loopback; ssh connects through its namespace. `more` are further flags of
    systemd-nspawn. `layers` are overlay layers above the base. With `downloads`, its uv uses this machine's cache.
    """

    place: Path
    prefix: str
    suite: str = "bookworm"
    arch: str = "amd64"
    downloads: bool = False
    network: bool = True
    more: tuple[str, ...] = ()
    layers: tuple[Path, ...] = ()
    ssh_port: int = field(default_factory=free_port)
    port: int = field(default_factory=free_port)
    login: str = LOGIN
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True)
        self.mount()
        if self.downloads:
            self.share_downloads()
        for place in self.root.glob("etc/python3.*"):
            with (place / "sitecustomize.py").open("a") as file:
                file.write(SITE)
        for key in ("client", "host"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(self.place / key)]
            subprocess.run(words, check=True)
        # setuid does not work for emulated programs, so sudo does not work there.
        login, home = (LOGIN, f"home/{LOGIN}") if self.arch == "amd64" else ("root", "root")
        ssh = self.root / home / ".ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(self.place / "client.pub", ssh / "authorized_keys")
        subprocess.run(["chroot", str(self.root), "chown", "-R", f"{login}:", f"/{home}/.ssh"], check=True)
        self.set_host_key(self.place / "host")
        (self.root / "etc/ssh/sshd_config.d/port.conf").write_text(f"Port {self.ssh_port}\n")
        public = (self.place / "host.pub").read_text()
        (self.place / "known_hosts").write_text(f"[127.0.0.1]:{self.ssh_port} {public}")
        self.login = login
        self.configure_ssh()

    @property
    def root(self) -> Path:
        return self.place / "root"

    @property
    def disk(self) -> Path:
        """The folder with the machine's own writes: the overlay's `upper`."""
        return self.place

    def mount(self) -> None:
        """Mount the machine's root."""
        for name in ("upper", "work"):
            (self.disk / name).mkdir(exist_ok=True)
        lower = ":".join(str(each) for each in (*self.layers, base(self.suite, self.arch)))
        # redirect_dir: a folder of a layer can be renamed, as on any other file system
        options = f"lowerdir={lower},upperdir={self.disk}/upper,workdir={self.disk}/work,redirect_dir=on"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(self.root)], check=True)

    def configure_ssh(self, text: str = "") -> None:
        """Write the client's ssh_config: the host `spark`, followed by `text` with more options or hosts."""
        (self.place / "ssh_config").write_text(
            f"Host spark inner\n  HostName 127.0.0.1\n  Port {self.ssh_port}\n  User {self.login}\n"
            f"  IdentityFile {self.place}/client\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.place}/known_hosts\n  GlobalKnownHostsFile /dev/null\n{text}"
        )

    def set_host_key(self, key: Path) -> None:
        for old in (self.root / "etc/ssh").glob("ssh_host_*"):
            old.unlink()
        shutil.copy(key, self.root / "etc/ssh/ssh_host_ed25519_key")

    def share_downloads(self) -> None:
        """Have the machine's uv use this machine's cache, mounted elsewhere: it copies the files, which may change."""
        there = self.root / f"{self.prefix.lstrip('/')}/state/cache"
        there.mkdir(parents=True)
        (there / "uv").symlink_to(DOWNLOADS)

    def add_disk(self, name: str, size: str, *options: str) -> None:
        """Add a file system, mounted at /srv/<name> from the next boot on; `options` are mkfs.ext4's."""
        image, mounted = self.place / f"{name}.img", self.place / "disks" / name
        mounted.mkdir(parents=True)
        subprocess.run(["truncate", "-s", size, str(image)], check=True)
        subprocess.run(["mkfs.ext4", "-q", *options, str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(mounted)], check=True)

    def boot(self) -> None:
        """Boot and wait until sshd answers."""
        words = ["systemd-nspawn", "--quiet", f"--directory={self.root}", "--boot", "--register=no", "--keep-unit"]
        words += [f"--machine=hearth-{self.ssh_port}", "--resolv-conf=copy-host", "--bind-ro=/etc/hosts"]
        words += [] if self.network else ["--private-network"]
        words += self.more
        words += [f"--bind={disk}:/srv/{disk.name}" for disk in self.place.glob("disks/*")]
        words += [f"--bind={downloads()}:{DOWNLOADS}"] if self.downloads else []
        with (self.place / "console.log").open("ab") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=self._alone
            )
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if self._answers():
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"{self.place} does not boot:\n{(self.place / 'console.log').read_text()[-2000:]}")

    def _cgroups(self) -> list[Path]:
        """The machine's own control groups, in the hierarchies that its systemd uses: version 1's and version 2's."""
        roots = (Path("/sys/fs/cgroup", name) for name in ("systemd", "unified", ""))
        return [root / f"hearth-{self.ssh_port}" for root in roots if (root / "cgroup.procs").exists()]

    def _alone(self) -> None:
        """Enter them. Two machines in one group would remove each other's groups, and services would fail to start."""
        for place in self._cgroups():
            with contextlib.suppress(OSError):  # no permission: then machines share them
                place.mkdir(exist_ok=True)
                (place / "cgroup.procs").write_text(str(os.getpid()))

    def _answers(self) -> bool:
        """Whether sshd answers."""
        if self.network:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.ssh_port), 1) as there:
                return there.recv(4) == b"SSH-"
            return False
        if self._children():
            way = f"nsenter --net=/proc/{self.first}/ns/net {sys.executable} {Path(__file__).with_name('relay.py')}"
            self.configure_ssh(f"  ProxyCommand {way} {self.ssh_port}\n")
        words = ["ssh", "-q", "-F", str(self.place / "ssh_config"), "-o", "ConnectTimeout=1", "spark", "true"]
        return subprocess.run(words, stdin=subprocess.DEVNULL, check=False).returncode == 0

    def _children(self) -> list[int]:
        """The child processes of nspawn: the machine's first process."""
        assert self.process is not None
        pid = self.process.pid
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    @property
    def first(self) -> int:
        """The machine's first process, by its id on this machine."""
        return self._children()[0]

    def power_off(self) -> None:
        """Simulate a power cut: kill every process of the machine at once."""
        if self.process is None:
            return
        listed = _kill(self.process.pid)
        self.process.wait()
        self.process = None
        while any(_runs(pid) for pid in listed):
            time.sleep(0.02)
        for root in self._cgroups():
            for place in [*sorted(root.rglob("*/"), reverse=True), root]:
                with contextlib.suppress(OSError):
                    place.rmdir()

    def run(self, command: str, *, check: bool = True) -> str:
        """Run a shell command there, as root. Not by SSH, whose login would take most of the time."""
        words = [
            "nsenter",
            f"--target={self.first}",
            "--all",
            "--root",
            "--wd",
            "env",
            "-i",
            *ROOT,
            "sh",
            "-c",
            command,
        ]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=600, umask=0o022
        )
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def discard(self) -> None:
        """Power off and delete everything."""
        self.power_off()
        clear(self.place)
