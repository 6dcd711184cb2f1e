"""Container images: the same bytes everywhere, what they contain, the files that run them, and pushes."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent.serve import container
from core import files, workspace
from core.stack import Platform
from deploy import container_refusals, image_parts
from deploy import host as hosts
from deploy import image as images
from deploy import release as releases
from lock import image_base
from lock.nodes import Node
from tests.client import Client
from tests.errors import kind_of, raises
from tests.image_base import available_base
from tests.plans import inputs as plan_inputs
from tests.plans import spark
from tests.unit.test_bundle import APP, SIX
from tests.unit.test_image_layout import check, members, read, validate

if TYPE_CHECKING:
    import tarfile
    from collections.abc import Iterator

MAIN = """\
import argparse, http.server, os, sqlite3, ssl, six
parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--listen")
given, _ = parser.parse_known_args()
open("/opt/comfyui/data/output/user", "w").write(str(os.getuid()))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer((given.listen, given.port), Handler).serve_forever()
"""

pytestmark = pytest.mark.needs("apt-get", "dpkg-deb")


class Images(Client):
    """Writes images of a small application, with layers of its own; the base comes from the user's cache."""

    def __init__(self, place: Path) -> None:
        self.place = place
        (place / "cache").mkdir(parents=True)
        real = workspace.current().cache / "installed"
        real.mkdir(parents=True, exist_ok=True)
        (place / "cache/installed").symlink_to(real)
        src = place / "app/src"
        for name, text in {
            "comfy/cli_args.py": "parser.add_argument('--cpu', action='store_true')\n",
            "folder_paths.py": "folder_names_and_paths = {}\n",
            "requirements.txt": "six\n",
            "main.py": MAIN,
            "web/extensions/a.js": "1",
        }.items():
            files.write(src / name, text)
        files.write(place / "app/app.toml", APP.replace("size = 1", 'size = 1\nwritable = ["web/extensions/"]'))
        for cpu in ("x86_64", "aarch64"):
            files.write(place / f"app/locks/cu130-linux_{cpu}-cp311.txt", SIX)
        files.write(
            place / "hosts.toml",
            '[hosts.far]\naddress = "nowhere.invalid"\nprofile = "cpu"\nport = 8288\nmodel_roots = ["/mnt/more"]\n'
            'folders.models = "/mnt/models"\noverride.memory_max = "6G"\n[hosts.gpu]\naddress = "x"\nprofile = "cpu"\n'
            'override.cuda = true\nlisten = "127.0.0.1,::1"\n[hosts.colon]\naddress = "x"\n'
            'profile = "cpu"\nmodel_roots = ["/mnt/a:b"]\n[hosts.dev]\n'
            'address = "x"\nprofile = "cpu"\nmodes = ["development"]\ndevelop = ["/home/a/my-node"]\n',
        )

    def variables(self) -> dict[str, str]:
        names = {"HEARTH_APP": "app", "HEARTH_CACHE": "cache", "HEARTH_HOSTS": "hosts.toml"}
        return {name: str(self.place / path) for name, path in names.items()}

    def write(self, output: Path, *words: str) -> dict[str, Any]:
        done = self.inv("image", "--output", str(output), "--json", *words)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    with available_base():
        yield Images(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def made(first: Images) -> tuple[Path, dict[str, Any]]:
    place = first.place / "far"
    return place, first.write(place, "--host", "far")


def layer(place: Path, number: int) -> list[tarfile.TarInfo]:
    index = json.loads((place / "image/index.json").read_bytes())
    return members(place / "image", read(place / "image", index["manifests"][0])["layers"][number])


@pytest.mark.installer
@pytest.mark.parametrize("platform", [each.value for each in Platform])
def test_two_machines_write_the_same_image(first: Images, tmp_path: Path, platform: str) -> None:
    one = first.write(tmp_path / "one", "--profile", "cpu", "--platform", platform)
    other = Images(tmp_path / "another machine").write(tmp_path / "two", "--profile", "cpu", "--platform", platform)
    assert (one["digest"], one["sbom"], one["layers"]) == (other["digest"], other["sbom"], other["layers"])
    assert one["digest"] in check(tmp_path / "one/image")
    for name in ("run.sh", "compose.yaml"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.installer
def test_an_image_says_what_it_is(made: tuple[Path, dict[str, Any]]) -> None:
    place, found = made
    index = json.loads((place / "image/index.json").read_bytes())
    manifest = read(place / "image", index["manifests"][0])
    config = read(place / "image", manifest["config"])
    validate(config, "config-schema")
    assert manifest["annotations"]["org.opencontainers.image.version"] == "1.2.3"
    assert index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"] == found["name"].rpartition(":")[2]
    assert config["config"]["User"] == "1000:1000"
    assert config["config"]["StopSignal"] == "SIGINT"
    assert config["config"]["Healthcheck"]["StartPeriod"] == 180_000_000_000
    assert f"HOME=/{image_parts.PREFIX}/data/cache" in config["config"]["Env"]
    about = read(place / "image", read(place / "image", index["manifests"][1])["manifests"][0])
    bill = json.loads((place / "image/blobs/sha256" / about["layers"][0]["digest"][7:]).read_bytes())
    purls = {each.get("purl") for each in bill["components"]}
    assert {"pkg:pypi/six@1.17.0"} <= purls
    assert [each for each in purls if each and each.startswith("pkg:deb/debian/libc6@2.36")]


@pytest.mark.installer
def test_an_image_has_the_release_as_a_host_has_it(made: tuple[Path, dict[str, Any]]) -> None:
    place, found = made
    assert set(found["layers"]) == {"base", "packages", "app", "release"}
    base = {each.name: each for each in layer(place, 0)}
    assert (base["lib"].linkname, base["bin"].linkname) == ("usr/lib", "usr/bin")
    assert oct(base["tmp"].mode) == "0o1777"
    assert base["etc/ssl/certs/ca-certificates.crt"].size > 100_000
    assert base["etc/ld.so.cache"].size == 48
    assert not [each.name for each in base.values() if each.mode & 0o6000]
    packages = [each.name for each in layer(place, 1)]
    site = "opt/comfyui/env/lib/python3.11/site-packages"
    assert {f"{site}/six.py", f"{site}/__pycache__/six.cpython-311.pyc"} <= set(packages)
    app = {each.name.partition("/app-")[2].partition("/")[2] or each.name: each for each in layer(place, 2)}
    assert app["web/extensions"].linkname == "/opt/comfyui/data/comfyui/web/extensions"
    assert "opt/comfyui/defaults/comfyui/web/extensions/a.js" in app
    release = {each.name: each for each in layer(place, 3)}
    place_of = f"opt/comfyui/{release['opt/comfyui/current'].linkname}"
    assert release[f"{place_of}/env"].linkname == "../../env"
    assert release[f"{place_of}/input"].linkname == "/opt/comfyui/data/input"
    assert not [name for name in release if name.endswith(".service")]
    owners = {each.uid for name, each in release.items() if name.startswith("opt/comfyui/data")}
    assert owners == {image_base.USER}


@pytest.mark.installer
def test_an_unchanged_image_is_not_written_again(first: Images, made: tuple[Path, dict[str, Any]]) -> None:
    place, found = made
    blobs = {path: path.stat().st_ino for path in (place / "image/blobs/sha256").iterdir()}
    assert first.write(place, "--host", "far") == found
    assert {path: path.stat().st_ino for path in (place / "image/blobs/sha256").iterdir()} == blobs


@pytest.mark.installer
@pytest.mark.usefixtures("first")
def test_bytecode_is_the_same_again_and_names_the_place_in_the_image(tmp_path: Path) -> None:
    """Of a whole package, by as many processes as there are cores."""
    found = []
    for name in ("one", "two"):
        shutil.copytree(Path(files.__file__).parent, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        image_base.compile_all(tmp_path / name, "/opt/place")
        found.append({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.pyc")})
    assert found[0] == found[1]
    code = found[0]["files.cpython-311.pyc"]
    assert b"/opt/place/files.py" in code
    assert str(tmp_path).encode() not in code
    assert code[4:8] == b"\1\0\0\0"  # checked by nothing: PEP 552


@pytest.mark.installer
def test_scripts_and_records_of_packages_name_nothing_of_this_machine(tmp_path: Path) -> None:
    info = tmp_path / "six-1.dist-info"
    info.mkdir()
    (info / "direct_url.json").write_text("{}")
    (info / "RECORD").write_text("six.py,sha256=x,1\nbin/tool,sha256=y,1\nsix-1.dist-info/direct_url.json,sha256=z,1\n")
    (tmp_path / "bin").mkdir()
    short = f"#!{sys.executable}\nimport six\n"
    long = f"#!/bin/sh\n'''exec' '{sys.executable}' \"$0\" \"$@\"\n' '''\nimport six\n"
    for name, text in (("short", short), ("long", long), ("shell", "#!/bin/sh\nexec true\n"), ("binary", "\x7fELF")):
        (tmp_path / "bin" / name).write_text(text)
    image_parts._normalise(tmp_path)
    assert (info / "RECORD").read_text() == "six.py,sha256=x,1\n"
    assert not (info / "direct_url.json").exists()
    own = "#!/opt/comfyui/env/bin/python\nimport six\n"
    found = {path.name: path.read_text() for path in (tmp_path / "bin").iterdir()}
    assert found == {"short": own, "long": own, "shell": "#!/bin/sh\nexec true\n", "binary": "\x7fELF"}
    assert os.access(tmp_path / "bin/short", os.X_OK)


def test_layers_of_the_environment_hold_every_package_once() -> None:
    """The real lists: CUDA's libraries, torch and the rest each have a layer."""
    for platform in Platform:
        text = (files.CHECKOUT / f"recipes/comfyui/locks/cu130-{platform.value}-cp311.txt").read_text()
        names = re.findall(r"^([\w.-]+)(?===| @)", text, re.MULTILINE)
        groups = [image_parts.group(name) for name in names]
        assert {"cuda", "torch", "packages"} == set(groups)
        found = dict(zip(names, groups, strict=True))
        assert {found[name] for name in names if name.startswith("nvidia-")} == {"cuda"}
        assert [found[name] for name in ("torch", "torchvision", "torchaudio", "torchsde", "triton")] == [
            *("torch", "torch", "torch", "packages", "cuda")
        ]


@pytest.mark.installer
@pytest.mark.parametrize(("host", "kind"), [("dev", "image-develop"), ("colon", "image-mount")])
def test_what_an_image_cannot_have_is_refused(first: Images, tmp_path: Path, host: str, kind: str) -> None:
    done = first.inv("image", "--host", host, "--output", str(tmp_path / host), "--json")
    assert (done.returncode, kind_of(done.stderr)) == (63, "refused")
    assert [each["kind"] for each in json.loads(done.stdout)["refusals"]] == [kind]
    assert not (tmp_path / host).exists()


def test_a_node_that_installs_itself_is_refused() -> None:
    node = Node(url="https://x.invalid/a", commit="0" * 40, tree="", why="", install="it downloads")
    needy = Node(url="https://x.invalid/b", commit="0" * 40, tree="", why="", system=("ffmpeg",), required=True)
    optional = Node(url="https://x.invalid/c", commit="0" * 40, tree="", why="", system=("ffmpeg",))
    given = replace(plan_inputs(), nodes={"a": node, "b": needy, "c": optional})
    assert [each.kind for each in container_refusals.image(spark(), given)] == ["image-install", "no-package"]


@pytest.mark.installer
@pytest.mark.needs("unshare")
def test_a_full_disk_is_reported_and_leaves_no_image(first: Images, tmp_path: Path) -> None:
    """The output is on a file system of 60 MB, less than the base, in a separate mount namespace."""
    place = tmp_path / "small"
    place.mkdir()
    words = first.command("image", "--profile", "cpu", "--output", str(place))
    inner = f"mount -t tmpfs -o size=60m none {place} && {shlex.join(words)}; echo $?; find {place} -type f"
    argv = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", inner]
    done = subprocess.run(
        argv, cwd=files.CHECKOUT, env=first.environment(), capture_output=True, text=True, check=False
    )
    assert (done.stdout, kind_of(done.stderr)) == ("69\n", "disk-full"), done.stderr


def test_a_host_and_a_profile_exclude_each_other() -> None:
    with raises("usage"):
        images.find_target("far", "cpu")


def test_an_unlocked_base_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "base.lock").write_text("linux_x86_64 base libc6 2.36 00\n")
    monkeypatch.setattr(image_base, "_folder", lambda: tmp_path)
    assert image_base.locked(Platform.LINUX_X86_64, "base") == {"libc6": ("2.36", "00")}
    with raises("lock-stale"):
        image_base.locked(Platform.LINUX_AARCH64, "base")


@pytest.mark.installer
def test_a_package_that_no_source_has_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty file of sources: the machine's own are not asked."""
    (tmp_path / "sources.list").write_text("")
    monkeypatch.setenv("HEARTH_DEBIAN_SOURCES", str(tmp_path / "sources.list"))
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    with raises("lock-stale", match="lack locked Debian packages"):
        image_base.tree(Platform.LINUX_X86_64, "base")
    assert not list((tmp_path / "cache/installed").iterdir())


# --- run.sh and compose.yaml -----------------------------------------------------------------------------------------

ENGINE = """\
#!/bin/sh
case "$1 $2" in
"info "*) exit 0 ;;
"image exists" | "image inspect") exit 0 ;;
esac
for word in "$@"; do printf '%s\\n' "$word"; done
"""


def run(place: Path, tmp_path: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Call run.sh with engines that print their arguments."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("podman", "docker"):
        (tools / name).write_text(ENGINE)
        (tools / name).chmod(0o755)
    return called(place, f"{tools}:{os.environ['PATH']}", *words, **env)


def called(place: Path, path: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Call run.sh with a PATH."""
    argv = ["sh", str(place / "run.sh"), *words]
    return subprocess.run(argv, env={"PATH": path, **env}, capture_output=True, text=True, check=False)


def options(argv: list[str]) -> dict[str, list[str]]:
    """The options of a run command, with their values."""
    found: dict[str, list[str]] = {}
    for name, value in zip(argv, [*argv[1:], ""], strict=True):
        if name.startswith("--"):
            found.setdefault(name[2:], []).append("" if value.startswith("--") else value)
    return found


@pytest.mark.installer
def test_run_and_compose_have_the_same_settings(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    place, image = made
    given = {}
    for engine in ("podman", "docker"):
        done = run(place, tmp_path, engine, "--network", "host")
        assert done.returncode == 0, done.stderr
        argv = done.stdout.splitlines()
        assert argv[-1] == image["name"]
        given[engine] = options(argv[:-1])
        assert given[engine].pop("network") == ["host"]
    own = {"read-only-tmpfs=false": [""], "restart": ["on-failure:5"]}
    own |= {} if os.geteuid() == 0 else {"userns": ["keep-id:uid=1000,gid=1000"]}
    assert {name: given["podman"].pop(name) for name in own} == own
    assert given["docker"].pop("restart") == ["unless-stopped"]
    assert given["podman"] == given["docker"]
    compose = (place / "compose.yaml").read_text()
    found = given["docker"]
    for key, option in {
        "user": "user",
        "pids_limit": "pids-limit",
        "shm_size": "shm-size",
        "stop_signal": "stop-signal",
        "image": "image",
        "container_name": "name",
    }.items():
        (value,) = re.findall(rf"^    {key}: \"?([^\"\n]+)", compose, re.MULTILINE)
        assert value == (image["name"] if key == "image" else found[option][0])
    assert "    read_only: true\n" in compose
    assert found["read-only"] == [""]
    assert ("    cap_drop: [ALL]\n" in compose, found["cap-drop"]) == (True, ["ALL"])
    assert ('["no-new-privileges:true"]' in compose, found["security-opt"]) == (True, ["no-new-privileges"])
    assert ("${COMFYUI_MEMORY:-6g}" in compose, found["memory"]) == (True, ["6g"])
    assert ("${COMFYUI_CPUS:-0}" in compose, found["cpus"]) == (True, ["0"])
    assert json.loads(re.findall(r"tmpfs: (.*)", compose)[0]) == found["tmpfs"]
    assert json.loads(re.findall(r"test: (.*)", compose)[0]) == ["CMD-SHELL", found["health-cmd"][0]]
    assert json.loads(re.findall(r"ports: (.*)", compose)[0]) == found["publish"] == ["127.0.0.1:8288:8188"]
    mounts = ["/mnt/models:/mnt/models", "/mnt/more:/mnt/more:ro"]
    assert found["volume"] == ["comfyui-data:/opt/comfyui/data", *mounts]
    assert [json.loads(each) for each in re.findall(r"      - (\".*\")", compose)] == mounts
    assert "device" not in found


def texts(first: Images, monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, str]:
    """The files of a host's image, without the image."""
    for variable, value in first.variables().items():
        monkeypatch.setenv(variable, value)
    target = hosts.target(name)
    selection = images._select(target, Platform.LINUX_X86_64)
    manifest = releases.manifest(selection, "/opt/comfyui")
    return images._texts(target.host, selection, manifest, "localhost/hearth/comfyui:1")


@pytest.mark.installer
def test_a_gpu_and_every_address_are_passed(first: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    found = texts(first, monkeypatch, "gpu")
    (line,) = re.findall(r"^    deploy: (.*)$", found["compose.yaml"], re.MULTILINE)
    assert json.loads(line)["resources"]["reservations"]["devices"] == [
        {"driver": "cdi", "device_ids": ["nvidia.com/gpu=all"], "capabilities": ["gpu"]}
    ]
    assert " --device nvidia.com/gpu=all " in found["run.sh"]
    assert 'ports: ["127.0.0.1:8188:8188", "[::1]:8188:8188"]' in found["compose.yaml"]
    assert " --publish 127.0.0.1:8188:8188 --publish '[::1]:8188:8188' " in found["run.sh"]


def test_memory_limits_are_those_of_the_unit() -> None:
    assert images._memory("48G")["memory_compose"] == "-48g"
    assert images._memory("infinity")["memory_shell"] == "0"
    share = images._memory("90%")
    assert share["memory_compose"].startswith("?")
    done = subprocess.run(["sh", "-c", f"echo {share['memory_shell']}"], capture_output=True, text=True, check=True)
    total = int(re.findall(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[0])
    assert done.stdout == f"{int(total * 0.9)}k\n"


@pytest.mark.installer
def test_run_names_what_is_missing(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    place, _ = made
    assert kind_of(run(place, tmp_path).stderr) == "usage"
    assert kind_of(run(place, tmp_path, "lxc").stderr) == "usage"
    (tmp_path / "tools/docker").write_text("#!/bin/sh\necho no socket >&2\nexit 1\n")
    broken = called(place, f"{tmp_path}/tools:/usr/bin:/bin", "docker")
    assert (broken.returncode, kind_of(broken.stderr)) == (34, "engine")
    assert "no socket" in broken.stderr
    for name in ("sh", "dirname", "uname"):
        (tmp_path / "tools" / name).symlink_to(shutil.which(name) or name)
    (tmp_path / "tools/podman").unlink()
    absent = called(place, f"{tmp_path}/tools", "podman")
    assert (absent.returncode, kind_of(absent.stderr)) == (34, "engine")


@pytest.mark.installer
def test_an_image_for_another_platform_does_not_start(first: Images, tmp_path: Path) -> None:
    (other,) = {each.value for each in Platform} - {Platform.local().value}
    first.write(tmp_path / "other", "--profile", "cpu", "--platform", other)
    done = run(tmp_path / "other", tmp_path, "podman")
    assert (done.returncode, kind_of(done.stderr)) == (34, "platform")
    assert not done.stdout


# --- inside the container --------------------------------------------------------------------------------------------


def started(place: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Start what a container starts; its program prints its arguments."""
    place.mkdir(exist_ok=True)
    shutil.copy(container.__file__, place / "container.py")
    settings = {"argv": ["/bin/echo", "--port", "8188"], "data": str(place / "data"), "folders": ["a/b", "c"]}
    (place / "container.json").write_text(json.dumps(settings))
    argv = [sys.executable, "-I", "-S", str(place / "container.py"), "start", *words]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False)


def test_a_container_makes_its_folders_and_keeps_files(tmp_path: Path) -> None:
    place = tmp_path / "image"
    files.write(place / "defaults/nodes/x/settings.json", "default")
    files.write(place / "defaults/nodes/x/more/b.json", "default")
    files.write(place / "data/nodes/x/settings.json", "mine")
    done = started(place, "--cpu", COMFYUI_PORT="8200", COMFYUI_LISTEN="127.0.0.1")
    assert done.stdout == "--port 8188 --listen 127.0.0.1 --port 8200 --cpu\n"
    assert (place / "data/a/b").is_dir()
    assert (place / "data/nodes/x/settings.json").read_text() == "mine"
    assert (place / "data/nodes/x/more/b.json").read_text() == "default"
    assert started(place).stdout == "--port 8188\n"


def test_data_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    files.write(tmp_path / "image/data", "a file")
    done = started(tmp_path / "image")
    assert (done.returncode, kind_of(done.stderr)) == (69, "not-writable")
    assert not done.stdout


def test_health_is_that_of_comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("COMFYUI_PORT", str(port))
        answered = threading.Thread(target=answer, args=(server, b"HTTP/1.0 200 OK\r\n\r\n{}"))
        answered.start()
        container.health()
        answered.join()
        answered = threading.Thread(target=answer, args=(server, b"HTTP/1.0 500 Oh\r\n\r\n"))
        answered.start()
        with pytest.raises(urllib.error.HTTPError):
            container.health()
        answered.join()
    with pytest.raises(urllib.error.URLError):
        container.health()


def answer(server: socket.socket, text: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        assert connection.recv(1000).startswith(b"GET /system_stats ")
        connection.sendall(text)


# --- registries ------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """Debian's registry on a loopback port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {
        "version": "0.1",
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": address, "secret": "x"},
        "log": {"level": "error", "accesslog": {"disabled": True}},
    }
    (tmp_path / "registry.yml").write_text(json.dumps(settings))  # JSON is YAML
    process = subprocess.Popen(["docker-registry", "serve", str(tmp_path / "registry.yml")], stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(address.partition(":")[2]))):
                break
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait()


def fetched(address: str, path: str) -> tuple[str, Any]:
    """A manifest of a registry, with its digest there."""
    accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"
    request = urllib.request.Request(f"http://{address}/v2/{path}", headers={"Accept": accept})
    with urllib.request.urlopen(request) as found:
        return str(found.headers["Docker-Content-Digest"]), json.loads(found.read())


@pytest.mark.installer
@pytest.mark.needs("docker-registry", "skopeo")
def test_a_push_keeps_the_digests_of_image_and_sbom(
    first: Images, made: tuple[Path, dict[str, Any]], registry: str
) -> None:
    place, image = made
    pushed = first.write(place, "--host", "far", "--push", f"{registry}/anna/comfyui")
    assert pushed["pushed"] == f"{registry}/anna/comfyui@{image['digest']}"
    digest, manifest = fetched(registry, f"anna/comfyui/manifests/{image['name'].rpartition(':')[2]}")
    assert digest == image["digest"]
    _, listed = fetched(registry, f"anna/comfyui/manifests/{digest.replace(':', '-')}")  # the tag of referrers
    assert [each["digest"] for each in listed["manifests"]] == [image["sbom"]]
    _, about = fetched(registry, f"anna/comfyui/manifests/{image['sbom']}")
    assert about["subject"]["digest"] == digest
    done = subprocess.run(
        ["skopeo", "inspect", "--tls-verify=false", f"docker://{registry}/anna/comfyui@{digest}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["Layers"] == [each["digest"] for each in manifest["layers"]]


@pytest.mark.installer
@pytest.mark.needs("skopeo")
def test_a_registry_that_does_not_take_the_image_is_an_error(made: tuple[Path, dict[str, Any]]) -> None:
    place, image = made
    found = images.Image(**{name: value for name, value in image.items() if name != "pushed"} | {"path": place})
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with raises("registry"):
        images.push(found, f"{address}/anna/comfyui")
    with raises("usage"):
        images.push(found, "comfyui")


class Closed(http.server.BaseHTTPRequestHandler):
    """A registry that wants a login."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="registry"')
        self.end_headers()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.installer
@pytest.mark.needs("skopeo")
def test_a_registry_that_wants_a_login_names_it(made: tuple[Path, dict[str, Any]]) -> None:
    place, image = made
    found = images.Image(**{name: value for name, value in image.items() if name != "pushed"} | {"path": place})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Closed) as server:
        address = f"127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with raises("registry") as caught:
            images.push(found, f"{address}/anna/comfyui")
        server.shutdown()
    assert caught.value.hint == f"skopeo login {address}"
