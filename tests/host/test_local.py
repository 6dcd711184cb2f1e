"""`inv deploy` without a host: this machine, no root, no systemd, with Hearth's own supervisor."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from core import files, workspace
from tests import nvml
from tests.client import Client
from tests.errors import kind_of
from tests.host import slurm
from tests.host.fleet import SOONER, link_environment
from tests.host.machine import NEEDS, SITE, free_port, place_for
from tests.host.small import small

pytestmark = [pytest.mark.host, pytest.mark.needs(*NEEDS)]


@dataclass
class Here(Client):
    """A prefix on this machine, and `inv` for it."""

    prefix: Path
    hosts: Path
    port: int
    env: dict[str, str] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        path = f"/usr/bin:{os.environ['PATH']}"  # Debian's Python, as in the environment that hosts share
        return {"HEARTH_HOSTS": str(self.hosts), "PATH": path, **self.env}

    def configure(self, text: str = "") -> None:
        self.hosts.write_text(
            f'[hosts.local]\nprofile = "cpu"\nscope = "user"\nprefix = "{self.prefix}"\nport = {self.port}\n'
            f"{'' if 'override' in text else SOONER}{text}\n[hosts.local.override.env]\n"
            f'PYTHONPATH = {{ value = "{self.prefix}/data/cache", why = "SITE" }}\n'
        )

    def choose(self) -> None:
        """Let Hearth supervise ComfyUI as in a container, even if the login has a systemd."""
        (self.prefix / "state").mkdir(parents=True, exist_ok=True)
        (self.prefix / "state/manager.json").write_text('{"manager": "process"}')

    def answers(self, within: float) -> bool:
        end = time.monotonic() + within
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/queue", timeout=2):
                    return True
            except OSError:
                time.sleep(0.2)
        return False

    def supervisor(self) -> dict[str, int]:
        found = json.loads((self.prefix / "state/supervisor.json").read_text())
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("local")
    prefix = place_for("local")
    one = Here(prefix, folder / "hosts.toml", free_port())
    (prefix / "data/cache").mkdir(parents=True)  # ComfyUI is confined, and may read there
    (prefix / "data/cache/sitecustomize.py").write_text(SITE)
    one.configure()
    one.choose()
    link_environment(prefix)
    try:
        yield one
    finally:
        if (prefix / "state/supervisor.json").exists():
            record = one.supervisor()
            os.kill(record["pid"], signal.SIGTERM)
            end = time.monotonic() + 20
            while Path(f"/proc/{record['pid']}").exists() and time.monotonic() < end:
                time.sleep(0.1)
            assert not Path(f"/proc/{record['child']}").exists()
        # Only folders: files are hard links to other environments' files.
        subprocess.run(["find", str(prefix), "-type", "d", "-exec", "chmod", "u+w", "{}", "+"], check=False)
        shutil.rmtree(prefix, ignore_errors=True)


@pytest.fixture(scope="module")
def running(here: Here) -> Here:
    done = here.inv("deploy")
    assert done.returncode == 0, done.stderr
    assert "the second picture arrived" in done.stderr
    assert done.stdout.strip().endswith(f"is in service at http://127.0.0.1:{here.port}")
    return here


def test_a_second_deploy_does_nothing(running: Here) -> None:
    before = running.supervisor()
    done = running.inv("deploy")
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert running.inv("deploy", "--dry-run").returncode == 0
    assert running.supervisor() == before


def test_gpu_is_shown_and_memory_is_freed(running: Here, tmp_path: Path) -> None:
    child = running.supervisor()["child"]
    recording = tmp_path / "recording"
    recording.write_text(nvml.recording("gb10", ("compute", f"{child} 5000000000")))
    env = {"LD_LIBRARY_PATH": str(nvml.library(recording).parent)}
    (seen,) = json.loads(running.inv("gpu", "--json", **env).stdout)
    (process,) = seen["gpus"][0]["processes"]
    assert (process["pid"], process["comfyui"]) == (child, True)
    freed = running.inv("free-memory")
    assert freed.returncode == 0, freed.stderr
    assert freed.stdout.startswith("local: ComfyUI's process: ")
    dropped = running.inv("drop-caches", **env)  # this machine's, only once
    last = json.loads(running.inv("history", "--json").stdout)[-1]
    if os.access("/proc/sys/vm/drop_caches", os.W_OK):
        assert dropped.returncode == 0, dropped.stderr
        assert re.search(r"the page cache: [\d.]+ GB before, [\d.]+ GB after; available memory: ", dropped.stdout)
        assert (last["action"], last["result"]) == ("drop-caches", "done")
    else:  # other users are refused, and root in a container fails
        assert dropped.returncode in (63, 69), dropped.stderr


def test_tutorial_commands_work(running: Here, tmp_path: Path) -> None:
    """docs/tutorial/custom-nodes.md, block by block, with a list of nodes that begins empty."""
    app = tmp_path / "app"
    shutil.copytree(files.CHECKOUT / "recipes/comfyui", app, ignore=shutil.ignore_patterns("nodes.toml"))
    (app / "nodes.toml").write_text("[sets]\n")
    recipe = (app / "app.toml").read_text()
    assert "\nextra = [" in recipe
    # Other nodes' requirements add this to ComfyUI's packages. With it, the environment is the one that hosts share.
    (app / "app.toml").write_text(recipe.replace("\nextra = [", '\nextra = ["pysocks", '))
    before = (running.prefix / "current").readlink()
    env = running.environment(
        HOME=str(tmp_path),
        HEARTH_APP=str(app),
        HEARTH_CACHE=str(workspace.current().cache),
        UV_CACHE_DIR=subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip(),
        GIT_CONFIG_COUNT="1",
        GIT_CONFIG_KEY_0="init.defaultBranch",
        GIT_CONFIG_VALUE_0="main",
        **{f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    )
    page = (files.CHECKOUT / "docs/tutorial/custom-nodes.md").read_text()
    said: list[str] = []
    for block in page.split("```")[1::2]:
        kind, _, text = block.partition("\n")
        if kind == "toml":
            running.configure(text)
            continue
        text = text.replace("uv run inv", f"{sys.executable} -m invoke").replace(":8188", f":{running.port}")
        text = re.sub(r"-m invoke (deploy|rollback)$", r"\g<0> --no-trial", text, flags=re.MULTILINE)  # starts twice
        if "nodes.remove" in text:
            running.configure()
        done = subprocess.run(
            ["bash", "-euc", text],
            cwd=files.CHECKOUT,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == 0, text + done.stdout + done.stderr
        said.append(done.stdout + done.stderr)
    _, _, chosen, shown, _, broke, back, _ = said
    assert ": node hello-node" in chosen
    assert "make env-" not in chosen
    assert '"tutorial"' in shown
    assert "node hello-node cannot be imported: No module named 'a_package_that_nobody_has'" in broke
    assert "node types that no longer exist: TutorialHello" in broke
    assert '"tutorial"' in back
    done = running.inv("deploy", "--no-trial")
    assert done.returncode == 0, done.stderr
    assert (running.prefix / "current").readlink() == before


def test_releases_and_history_and_hosts(running: Here) -> None:
    for words in (("releases",), ("history",), ("facts",), ("hosts",), ("hosts", "--check")):
        plain = running.inv(*words)
        assert plain.returncode == 0, plain.stderr
        assert plain.stdout.strip()
        shown = running.inv(*words, "--json")
        assert json.loads(shown.stdout)


def test_the_supervisors_log(running: Here) -> None:
    last = running.inv("logs", "-n", "3", "--grep", "To see the GUI")
    assert (last.returncode, last.stdout.splitlines()[-1]) == (
        0, f"[INFO] To see the GUI go to: http://127.0.0.1:{running.port}",
    )  # fmt: skip
    for words, said in (
        (("--since", "whenever"), "--since whenever is not a supported time"),
        (("--grep", "("), "--grep ( is not a regular expression"),
        (("--lines", "many"), "--lines must be a whole number"),
    ):
        wrong = running.inv("logs", *words)
        assert (wrong.returncode, said in wrong.stderr) == (15, True), wrong.stderr
    lately = running.inv("logs", "--since", "10 min ago", "--json")
    assert any("To see the GUI" in json.loads(line)["text"] for line in lately.stdout.splitlines())
    assert "the output can begin up to five seconds early" in lately.stderr

    following = running.start("logs", "-f", "-n", "0")
    assert following.stdout is not None
    for _ in range(20):  # until it is connected: earlier messages are not shown
        submit(running.port, "seen")
        if select.select([following.stdout], [], [], 3)[0]:
            break
    seen = [following.stdout.readline() for _ in range(2)]
    assert "got prompt" in seen[0], seen
    following.send_signal(signal.SIGINT)
    said, _ = following.communicate(timeout=10)
    assert (following.returncode, said) == (130, "")

    pipe = f"{sys.executable} -m invoke logs -f -n 5 | head -2; echo ${{PIPESTATUS[0]}}"
    shell = subprocess.run(
        ["bash", "-c", pipe], cwd=files.CHECKOUT, env=running.environment(), capture_output=True, text=True, timeout=30
    )
    assert (len(shell.stdout.splitlines()), shell.stdout.splitlines()[-1], shell.stderr) == (3, "0", "")


def submit(port: int, prefix: str, width: int = 64) -> str:
    """Have ComfyUI save a picture, which needs no model; returns the prompt's id."""
    inputs = {"width": width, "height": 64, "batch_size": 1, "color": time.time_ns() % (1 << 24)}
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }
    body = json.dumps({"prompt": workflow}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/prompt", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(json.load(answer)["prompt_id"])


def test_jobs_show_results_and_a_hanging_comfyui(running: Here) -> None:
    good, bad = submit(running.port, "good"), submit(running.port, "../../outside")
    end = time.monotonic() + 60
    listed: dict[str, Any] = {}
    while not {good, bad} <= {job for job, each in listed.items() if each["status"] in ("success", "error")}:
        assert time.monotonic() < end, listed
        listed = {each["id"]: each for each in json.loads(running.inv("jobs", "--json").stdout)}
    shown = running.inv("jobs")
    assert shown.returncode == 0, shown.stderr
    assert f"{bad[:8]}: node 2 (SaveImage): Exception: **** ERROR: Saving image outside" in shown.stdout
    assert (listed[good]["status"], listed[good]["nodes"], listed[bad]["status"]) == ("success", 2, "error")
    assert 0 <= listed[good]["seconds"] < 60
    child = running.supervisor()["child"]
    os.kill(child, signal.SIGSTOP)
    try:
        silent = running.inv("jobs")
    finally:
        os.kill(child, signal.SIGCONT)
    assert (silent.returncode, kind_of(silent.stderr)) == (69, "no-answer")
    assert "ComfyUI accepts connections but does not answer" in silent.stderr


@pytest.fixture(scope="module")
def service(running: Here) -> Here:
    """The same prefix, where a stand-in for ComfyUI runs from here to the end of this file."""
    running.env["HEARTH_APP"] = str(small(running.hosts.parent, "small"))
    done = running.inv("deploy", "--no-trial")
    assert done.returncode == 0, done.stderr
    return running


def test_deploy_continues_without_its_client(service: Here) -> None:
    before = (service.prefix / "current").readlink()
    service.configure('[hosts.local.override.flags]\n"--preview-size" = { value = "300", why = "a test" }\n')
    submit(service.port, "long", 65)
    client = service.start("deploy", "--no-trial", "--drain", "60")
    assert client.stdout is not None
    assert any("waiting for jobs" in line for line in client.stdout)
    client.kill()
    client.communicate()
    refused = service.inv("deploy")
    assert refused.returncode in (63, 64)
    assert "under way" in refused.stderr or "being changed" in refused.stderr
    (service.prefix / "data/output/finish").touch()
    watched = service.inv("attach")
    assert watched.returncode == 0, watched.stderr
    assert "the second picture arrived" in watched.stderr
    assert (service.prefix / "current").readlink() != before
    assert service.inv("deploy", "--dry-run").returncode == 0
    service.configure()
    back = service.inv("rollback", "--no-trial")
    assert back.returncode == 0, back.stderr
    assert (service.prefix / "current").readlink() == before


def test_changed_address_port_and_tls_can_be_rolled_back(service: Here, tmp_path: Path) -> None:
    """Each release is polled at its own address: in the trial, after the cut-over and in the rollback."""
    before, port = (service.prefix / "current").readlink(), service.port
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=spark.example", "-days", "2"]
    subprocess.run(
        [*words, "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")],
        check=True,
        capture_output=True,
    )
    flags = f'"--tls-keyfile" = {{ value = "{tmp_path}/key.pem", why = "a test" }}\n'
    flags += f'"--tls-certfile" = {{ value = "{tmp_path}/cert.pem", why = "a test" }}\n'
    service.port = free_port()
    try:
        service.configure(f'listen = "127.0.0.1,::1"\n[hosts.local.override.flags]\n{flags}')
        done = service.inv("deploy")
        assert done.returncode == 0, done.stderr
        assert "trial: the second picture arrived" in done.stderr
        assert done.stdout.strip().endswith(f"is in service at https://127.0.0.1:{service.port}")
        status = json.loads(service.inv("status", "--json").stdout)
        assert "answers" in json.dumps(status)
        slow = service.inv("restart")
        assert slow.returncode == 0, slow.stderr
        back = service.inv("rollback", "--no-trial")  # hosts.toml still names the other port
        assert back.returncode == 0, back.stderr
    finally:
        service.port = port
    assert (service.prefix / "current").readlink() == before
    assert service.answers(1)
    service.configure()
    assert service.inv("deploy", "--dry-run").returncode == 0


def test_supervised_development_mode_and_memory_timer(service: Here, tmp_path: Path) -> None:
    before = (service.prefix / "current").readlink()
    node = tmp_path / "my-node"
    node.mkdir()
    (node / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    service.configure(f'modes = ["development"]\ndevelop = ["{node}"]\nfree_memory = "4s"\n')
    done = service.inv("deploy", "--no-trial")
    assert done.returncode == 0, done.stderr
    first = service.supervisor()
    log = service.prefix / "state/comfyui.log"

    def said(text: str, within: float) -> bool:
        end = time.monotonic() + within
        while text not in log.read_text() and time.monotonic() < end:
            time.sleep(0.2)
        return text in log.read_text()

    assert said("ComfyUI has no job and frees its memory", 20)
    (node / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\nprint('the second one')\n")
    assert said(f"{node}/__init__.py changed: restarting ComfyUI", 20)
    assert said("the second one", 60)
    assert service.answers(60)
    now = service.supervisor()
    assert now["pid"] == first["pid"]
    assert (now["child"] != first["child"], now["restarts"]) == (True, first["restarts"])
    service.configure()
    assert service.inv("deploy", "--no-trial").returncode == 0
    assert (service.prefix / "current").readlink() == before


@pytest.mark.needs("slurmctld", "munged", "root")
def test_comfyui_answers_in_a_job_of_slurm(service: Here, tmp_path: Path) -> None:
    """The host's port is in use on the node, so the job has another; the database is one for all, so jobs wait."""
    made = service.inv("manifests", "--slurm", "--output", str(tmp_path), "--json")
    assert made.returncode == 0, made.stderr
    (batch,) = map(Path, json.loads(made.stdout))
    assert service.inv("stop").returncode == 0
    try:
        with slurm.slurm() as env, socket.create_server(("127.0.0.1", service.port)):
            job = slurm.submit(env, batch, "--gres=gpu:1", "--time=10", "--cpus-per-task=1")
            log = tmp_path / f"comfyui-local-{job}.log"
            waiting = slurm.submit(env, batch, "--cpus-per-task=1")
            end = time.monotonic() + 300
            while not (log.exists() and "To see the GUI" in log.read_text()):
                state = slurm.state(env, job)
                works = state in ("PENDING", "CONFIGURING", "RUNNING") and time.monotonic() < end
                assert works, f"{state}: {log.read_text() if log.exists() else ''}"
                time.sleep(0.5)
            (port,) = re.findall(rf"ssh -N -L {service.port}:127\.0\.0\.1:(\d+) -J \S+ root@", log.read_text())
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/system_stats", timeout=60) as answer:
                assert json.load(answer)["system"]["comfyui_version"]
            assert submit(int(port), "in a job")
            words = ["pgrep", "-f", f"main.py.*--port {port}"]
            child, *_ = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
            assert "CUDA_VISIBLE_DEVICES=0" in Path(f"/proc/{child}/environ").read_text().split("\0")
            assert (slurm.state(env, job), slurm.state(env, waiting)) == ("RUNNING", "PENDING")
            subprocess.run(["scancel", waiting, job], env=env, check=True)
            end = time.monotonic() + 300
            while slurm.state(env, job) in ("RUNNING", "COMPLETING") and time.monotonic() < end:
                time.sleep(0.2)
            assert slurm.state(env, job) == "CANCELLED"
            assert "Stopped server" in log.read_text()
    finally:
        assert service.inv("start").returncode == 0


def test_crashed_comfyui_is_restarted(service: Here) -> None:
    before = service.supervisor()
    os.kill(before["child"], signal.SIGKILL)
    end = time.monotonic() + 30
    while service.supervisor()["child"] == before["child"] and time.monotonic() < end:
        time.sleep(0.1)
    assert service.supervisor()["restarts"] == before["restarts"] + 1
    assert service.answers(60)


def test_deploy_restarts_a_killed_supervisor(service: Here) -> None:
    record = service.supervisor()
    os.kill(record["pid"], signal.SIGKILL)
    os.kill(record["child"], signal.SIGKILL)
    plan = service.inv("deploy", "--dry-run")
    assert plan.returncode == 2
    assert "start comfyui" in plan.stderr
    done = service.inv("deploy")
    assert done.returncode == 0, done.stderr
    assert service.answers(1)


def test_damaged_part_is_rebuilt_and_comfyui_restarted(service: Here) -> None:
    before = service.supervisor()
    part = (service.prefix / "current/app").resolve()
    (part / "main.py").chmod(0o644)
    (part / "main.py").write_text("broken\n")
    done = service.inv("deploy", "--no-trial")
    assert done.returncode == 0, done.stderr
    assert "it was changed after it was made" in done.stderr
    assert service.supervisor()["child"] != before["child"]
    assert (part / "main.py").stat().st_mode & 0o222 == 0


def test_supervised_comfyui_waits_for_mounts(service: Here, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    before = (service.prefix / "current").readlink()
    mount = ["mount", "-t", "tmpfs", "pool", str(pool)]
    service.configure(f'mounts."{pool}" = {{}}\nfolders.output = "{pool}/out"\n')
    assert service.inv("deploy").returncode == 63
    subprocess.run(mount, check=True)
    try:
        done = service.inv("deploy", "--no-trial")
        assert done.returncode == 0, done.stderr
        assert (pool / "out").is_dir()
        child = service.supervisor()["child"]
        subprocess.run(["umount", "--lazy", str(pool)], check=True)
        end = time.monotonic() + 40
        while Path(f"/proc/{child}").exists() and time.monotonic() < end:
            time.sleep(0.1)
        assert not service.answers(3)
        assert not list(pool.iterdir())
        assert f"waiting for {pool} to be mounted" in (service.prefix / "state/comfyui.log").read_text()
        subprocess.run(mount, check=True)
        (pool / "out").mkdir()
        assert service.answers(60)
        service.configure()
        assert service.inv("deploy", "--no-trial").returncode == 0
        assert (service.prefix / "current").readlink() == before
    finally:
        subprocess.run(["umount", "--lazy", str(pool)], check=False)


def test_stop_start_restart_pause_and_resume(service: Here) -> None:
    assert service.inv("start").stdout == "local: nothing to do, ComfyUI is running\n"
    dry = service.inv("stop", "--dry-run")
    assert (dry.returncode, "stop comfyui until inv start" in dry.stderr) == (2, True), dry.stderr
    assert service.answers(1)
    child = service.supervisor()["child"]
    again = service.inv("restart")
    assert again.returncode == 0, again.stderr
    assert "answers after" in again.stderr
    assert service.supervisor()["child"] != child
    assert service.inv("stop").returncode == 0
    assert not service.answers(0.5)
    assert "nothing to do" in service.inv("stop").stdout
    started = service.inv("start")
    assert (started.returncode, "answers after" in started.stderr) == (0, True), started.stderr

    assert service.inv("pause").returncode == 0
    assert "nothing to do" in service.inv("pause").stdout
    for words in (("start",), ("restart",), ("deploy",)):
        refused = service.inv(*words)
        assert refused.returncode == 63, refused.stderr
        assert "comfyui was paused by " in refused.stderr
        assert "next:  inv resume --host local" in refused.stderr
    assert "was paused by" in service.inv("status").stdout
    assert not service.answers(0.5)
    resumed = service.inv("resume")
    assert resumed.returncode == 0, resumed.stderr
    assert service.answers(1)
    assert service.inv("deploy", "--dry-run").returncode == 0


def test_failed_start_shows_the_log(service: Here) -> None:
    main = service.prefix / "current/app/main.py"
    mode, text = main.stat().st_mode, main.read_text()
    main.chmod(0o644)
    try:
        main.write_text(f"print('I am broken', flush=True); raise SystemExit(3)\n{text}")
        broken = service.inv("restart")
    finally:
        main.write_text(text)
    assert (broken.returncode, kind_of(broken.stderr)) == (69, "no-answer"), broken.stderr
    assert "| I am broken" in broken.stderr
    assert json.loads(service.inv("history", "--json").stdout)[-1]["result"] == "failed"
    main.chmod(mode)
    mended = service.inv("deploy", "--no-trial")  # the file differs at least in its time
    assert mended.returncode == 0, mended.stderr


def test_deploy_restores_a_removed_service(service: Here) -> None:
    release = (service.prefix / "current").readlink()
    done = service.inv("remove", "--yes")
    assert done.returncode == 0, done.stderr
    assert not service.answers(0.5)
    assert sorted(path.name for path in service.prefix.iterdir()) == ["data", "parts", "releases", "state"]
    assert "nothing to do" in service.inv("remove").stdout
    assert "nothing is in service on local" in service.inv("start").stderr
    service.choose()
    back = service.inv("deploy")
    assert back.returncode == 0, back.stderr
    assert "make " not in back.stderr
    assert (service.prefix / "current").readlink() == release
    assert [each["action"] for each in json.loads(service.inv("history", "--json").stdout)][-2:] == ["remove", "deploy"]


def test_killed_nuke_resumes_and_keeps_data_and_mounts(service: Here) -> None:
    """The last test in this file: afterwards nothing is deployed."""
    prefix, pool = service.prefix, place_for("pool")  # on the same file system
    (pool / "weights").mkdir(parents=True)
    (pool / "weights/large").write_text("kept")
    inside = prefix / "data/models/pool"
    inside.mkdir()
    (prefix / "data/input/pool").symlink_to(pool)
    (prefix / "data/output/art.png").write_text("art")
    (prefix / "notes.txt").write_text("mine")
    subprocess.run(["mount", "--bind", str(pool), str(inside)], check=True)  # the same file system: only /proc tells
    try:
        (prefix / "state/adopted.jsonl").touch()
        adopted = service.inv("nuke", "--yes")
        (prefix / "state/adopted.jsonl").unlink()
        assert (adopted.returncode, "inv adopt --host local --undo" in adopted.stderr) == (63, True), adopted.stderr

        client = service.start("nuke", "--yes")
        journal = b""
        end = time.monotonic() + 60
        while b"delete current" not in journal and time.monotonic() < end:
            journal = b"".join(path.read_bytes() for path in (prefix / "state/runs").glob("*.jsonl"))
        for applying in applying_in(prefix):
            os.kill(applying, signal.SIGKILL)
        client.kill()
        client.communicate()
        assert (prefix / "state/pending.json").exists()
        other = service.inv("nuke", "--yes")
        assert other.returncode in (63, 64), other.stderr
        assert "nuke" in other.stderr
        watched = service.inv("attach")
        assert watched.returncode == 0, watched.stderr
        assert sorted(path.name for path in prefix.iterdir()) == ["data", "notes.txt"]
        assert (prefix / "data/output/art.png").read_text() == "art"
        assert service.inv("nuke").stdout.startswith("local: nothing to do")
        assert service.inv("attach").stderr == "no change was ever made on local\n"

        unnamed = service.inv("nuke", "--data", "--yes")
        assert (unnamed.returncode, "the host's name was not typed" in unnamed.stderr) == (63, True), unnamed.stderr
        wrong = service.inv("nuke", "--data", "--yes-delete-data-of", "spark")
        assert (wrong.returncode, (prefix / "data/output/art.png").exists()) == (15, True), wrong.stderr
        gone = service.inv("nuke", "--data", "--yes-delete-data-of", "local")
        assert gone.returncode == 0, gone.stderr
        assert f"kept, it is mounted: {inside}" in gone.stderr
        assert f"kept, it is not Hearth's: {prefix}/notes.txt" in gone.stderr
        left = [str(path.relative_to(prefix)) for path in sorted(prefix.rglob("*"))]
        assert left == [
            "data", "data/models", "data/models/pool", "data/models/pool/weights", "data/models/pool/weights/large",
            "notes.txt",
        ]  # fmt: skip
        assert (pool / "weights/large").read_text() == "kept"
        assert service.inv("nuke", "--data", "--yes-delete-data-of", "local").stdout.startswith("local: nothing to do")
    finally:
        subprocess.run(["umount", "--lazy", str(inside)], check=False)
        shutil.rmtree(pool, ignore_errors=True)


def applying_in(prefix: Path) -> list[int]:
    """The processes that apply a plan in a prefix."""
    words = f"{prefix}/state/agent\0apply".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(path.parent.name)] * (words in path.read_bytes())
        except OSError:  # it has ended
            continue
    return found
