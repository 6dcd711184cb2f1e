"""The README's commands work on stock Debian: they are typed in roots with nothing else installed.

A root is debootstrap's smallest, with sudo and a user, like a real installation. From this machine it gets only
network settings: access to the package registries.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from core import files, workspace
from tests.host import machine
from tests.host.replica import scratch

pytestmark = pytest.mark.host

README = (files.CHECKOUT / "README.md").read_text()
USER = "anna"


def commands(section: str) -> list[str]:
    """The lines of the first code block in a section of the README."""
    found = re.search(rf"^## {section}\n.*?^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert found, section
    return found[1].splitlines()


def bare(suite: str) -> Path:
    """A minimal Debian with sudo and one user; created once, in a minute."""
    place = workspace.current().cache / "hosts" / f"bare-{suite}"
    with files.locked(workspace.current().cache / "hosts/base.lock", lambda: None):
        if not place.is_dir():
            with files.atomic_dir(place) as part:
                words = ["debootstrap", "--variant=minbase", "--include=sudo", suite, str(part)]
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
                run = ["chroot", str(part)]
                subprocess.run([*run, "useradd", "--create-home", "--shell", "/bin/bash", USER], check=True)
                (part / f"etc/sudoers.d/{USER}").write_text(f"{USER} ALL=(ALL) NOPASSWD: ALL\n")
    return place


@dataclass
class Root:
    """A root without an init system: like a container, it has no systemd."""

    place: Path
    suite: str
    port: int = field(default_factory=machine.free_port)

    @property
    def upper(self) -> Path:
        return self.place / "upper"

    @property
    def home(self) -> Path:
        return self.place / "root/home" / USER

    def make(self) -> None:
        for name in ("upper", "work", "root"):
            (self.place / name).mkdir(parents=True)
        options = f"lowerdir={bare(self.suite)},upperdir={self.upper},workdir={self.place}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(self.place / "root")], check=True)
        self._connect()
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=files.CHECKOUT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, names.split("\0")):
            if (files.CHECKOUT / name).exists():  # a deleted but uncommitted file is still listed
                target = self.home / "hearth" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(files.CHECKOUT / name, target)
        # 8188, the default, may be in use: the root shares this machine's network
        (self.home / "hearth/config/hosts.toml").write_text(f'[hosts.local]\nscope = "user"\nport = {self.port}\n')
        subprocess.run(["chroot", str(self.place / "root"), "chown", "-R", f"{USER}:", f"/home/{USER}"], check=True)

    def _connect(self) -> None:
        """Copy this machine's certificates and its settings for apt, pip and uv."""
        etc = self.place / "root/etc"
        authorities = Path("usr/local/share/ca-certificates")
        if (Path("/") / authorities).is_dir():  # its own apt installs them with ca-certificates
            shutil.copytree(Path("/") / authorities, self.place / "root" / authorities, dirs_exist_ok=True)
        dumped = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
        acquire = [line for line in dumped.splitlines() if line.startswith("Acquire::")]
        (etc / "apt/apt.conf.d/99here").write_text("\n".join([*acquire, 'APT::Install-Recommends "true";', ""]))
        subprocess.run(["chroot", str(self.place / "root"), "apt-get", "update", "-qq"], check=True)
        # If this machine has its own certificate bundle, uv is set to use the system's; the root's apt creates that.
        (etc / "uv").mkdir()
        (etc / "uv/uv.toml").write_text("system-certs = true\n")
        if Path("/etc/pip.conf").exists():
            shutil.copy("/etc/pip.conf", etc / "pip.conf")

    def run(self, command: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Type a command as the user, in the checkout."""
        words = ["systemd-nspawn", "--quiet", f"--directory={self.place}/root", "--register=no", "--keep-unit"]
        words += ["--as-pid2", "--resolv-conf=copy-host", "--bind-ro=/etc/hosts", f"--user={USER}"]
        words += [f"--machine=readme-{os.getpid()}", f"--chdir=/home/{USER}/hearth", "--console=pipe"]
        kept = ("PIP_", "UV_", "SSL_CERT_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "REQUESTS_CA")
        given = {name: value for name, value in os.environ.items() if name.upper().startswith(kept)}
        words += [f"--setenv={name}={value}" for name, value in given.items()]
        # local folders of wheels and indexes in pip's settings
        mentioned = re.findall(r"(?:file://)?(/[\w./-]+)", " ".join(given.values()))
        words += [f"--bind-ro={path}" for path in {*mentioned} if Path(path).is_dir() and not path.startswith("/etc")]
        return subprocess.run(
            [*words, "bash", "-euc", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=timeout,
        )


@pytest.fixture(params=["bookworm", "trixie"])
def root(request: pytest.FixtureRequest) -> Iterator[Root]:
    with scratch(f"readme-{request.param}") as disk:
        one = Root(disk / "machine", request.param)
        one.make()
        yield one


def test_the_readmes_commands(root: Root) -> None:
    """In order, as a reader types them."""
    (deploy,) = commands("Run ComfyUI on this machine")
    if root.suite == "trixie":  # skipped: its Python has different packages, gigabytes of them
        done = root.run(f"{deploy} --dry-run || test $? = 2")
        assert "cut over from nothing to " in done.stdout, done.stdout[-3000:]
    else:
        done = root.run(f"{deploy} && source .venv/bin/activate && inv status")
        assert f"is in service at http://127.0.0.1:{root.port}" in done.stdout, done.stdout[-3000:]
        assert "no problems found" in done.stdout, done.stdout[-3000:]
    assert done.returncode == 0, done.stdout[-3000:]

    install, build, wheels = commands("Build wheels for my GPU")
    build = build.replace("build-kernels", "build-kernels --dry-run")
    done = root.run("\n".join(["source .venv/bin/activate", install, build, wheels]))
    python = {"bookworm": "cp311", "trixie": "cp313"}[root.suite]
    for kernel in (f"flash-attn-.*-{python}-", "sageattention-.*-cp310-abi3-"):
        assert re.search(rf"{kernel}linux_x86_64.* to build", done.stdout), done.stdout
    assert done.returncode == 0, done.stdout[-3000:]

    (test,) = commands("Test")
    assert test.endswith(" nox -s verify")
    done = root.run(f"{test.removesuffix('verify')}lock lint")  # the quick sessions; CI runs the others anyway
    assert "lint was successful" in done.stdout, done.stdout[-3000:]
    assert done.returncode == 0, done.stdout[-3000:]
