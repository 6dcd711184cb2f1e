"""The main path on a real host: deploy, hardening, convergence, refusals, rollback."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import subprocess
import termios
import time

import pytest

from core import files
from tests.errors import kind_of
from tests.host.fleet import PREFIX, Fleet, taken_port
from tests.host.small import small

pytestmark = pytest.mark.host


def broken(line: str) -> dict[str, tuple[str, str]]:
    """An edit that adds a line at the start of ComfyUI's main.py."""
    return {"main.py": (r"\A", f"{line}\n")}


def test_the_service_runs_unprivileged_and_its_code_is_read_only(deployed: Fleet) -> None:
    machine = deployed.machine
    assert deployed.answers()
    user = machine.run("ps -o user= -p $(systemctl show comfyui --property=MainPID --value)").strip()
    assert user == "comfyui"
    for place in ("current/app/main.py", "current/env/bin/x", "current/release.json", "state/pending.json"):
        tried = machine.run(f"runuser -u comfyui -- sh -c 'echo x >> {PREFIX}/{place}' 2>&1 || echo refused")
        assert "refused" in tried, place
    assert machine.run("systemctl is-enabled comfyui").strip() == "enabled"
    shown = machine.run("systemd-analyze security comfyui --no-pager")
    found = re.search(r"exposure level for comfyui.service: ([\d.]+)", shown)
    assert found
    assert float(found[1]) <= 2.0
    assert (deployed.prefix / "data/models").stat().st_mode & 0o7777 == 0o2770


def test_second_deploy_changes_nothing(deployed: Fleet) -> None:
    since = machine_since(deployed)
    done = deployed.deploy("--json")
    assert done.returncode == 0, done.stderr
    (outcome,) = json.loads(done.stdout)
    assert outcome["changed"] is False
    assert outcome["release"] == deployed.current()
    assert deployed.deploy("--dry-run").returncode == 0
    assert machine_since(deployed) == since


def machine_since(fleet: Fleet) -> str:
    return fleet.machine.run("systemctl show comfyui --property=ActiveEnterTimestamp --value")


def test_facts_releases_history_and_what_a_release_holds(deployed: Fleet) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    facts = deployed.facts()
    assert facts["os"] == "debian 12"
    assert facts["manager"] == "systemd-system"
    assert facts["current"] == deployed.current()
    assert facts["port_holder"]["pid"] == facts["service"]["pid"]
    assert set(facts["parts"].values()) == {""}
    releases = json.loads(deployed.inv("releases", "--host", "spark", "--json").stdout)
    assert [each["id"] for each in releases if each["current"]] == [deployed.current()]
    lines = json.loads(deployed.inv("history", "--host", "spark", "--json").stdout)
    assert (lines[0]["action"], lines[0]["result"], lines[0]["release"]) == ("deploy", "done", deployed.current())
    assert re.fullmatch(r"deployer from 127.0.0.1 \(says \w+@\S+\)", lines[0]["who"])
    assert lines[0]["key"].startswith("SHA256:")
    bill = deployed.inv("bom", "--host", "spark")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill.stdout) is None, bill.stderr
    found = {each["name"]: each for each in json.loads(bill.stdout)["components"]}
    torch = deployed.machine.run(f"{PREFIX}/current/env/bin/python -c 'import torch; print(torch.__version__)'")
    assert (found["torch"]["version"], found["ComfyUI"]["version"]) == (torch.partition("+")[0].strip(), "0.30.0")
    listed = deployed.machine.run(f"ls -d {PREFIX}/current/env/lib/python*/site-packages/*.dist-info").split()
    assert len(listed) == len([each for each in found.values() if each["bom-ref"].startswith("pkg:pypi/")])
    audited = deployed.inv("audit", "--host", "spark", "--service", "http://127.0.0.1:1", UV_HTTP_RETRIES="0")
    assert audited.returncode == 74, audited.stderr
    assert f"1 finding: {len(listed)} packages (not looked up)" in audited.stdout
    assert audited.stdout.startswith("comfy-aimdo 0.4.11: ")  # known bad, and required by this ComfyUI


@pytest.mark.parametrize(
    ("name", "edits", "said"),
    [
        ("crashes", broken('import sys; print("I am broken", flush=True); sys.exit(5)'), "| I am broken"),
        pytest.param(
            "never-answers",
            broken("import time; time.sleep(1000)"),
            "does not answer after 6 s",
            marks=pytest.mark.faults,
        ),
        pytest.param(
            "wrong-version",
            {"comfyui_version.py": (r"0\.30\.0", "0.29.9")},
            "found 0.29.9, expected 0.30.0",
            marks=pytest.mark.faults,
        ),
        ("no-pictures", {"nodes.py": (r"filename_with_batch_num = ", "raise OSError; x = ")}, "made no picture"),
    ],
)
def test_unhealthy_release_fails_its_trial_or_is_rolled_back(
    steady: Fleet, name: str, edits: dict[str, tuple[str, str]], said: str
) -> None:
    """A failed trial stops nothing; without a trial, the previous release is restored."""
    release, data, since = steady.current(), steady.data(), machine_since(steady)
    steady.configure("[hosts.spark.override]\nstart_seconds = 6\n" if name == "never-answers" else "")
    app = str(steady.comfyui(name, edits))
    tried = steady.deploy(HEARTH_APP=app)
    assert tried.returncode == 66, tried.stderr
    assert said in tried.stderr
    assert f"release {release} stays in service: nothing was stopped" in tried.stderr
    assert (steady.current(), machine_since(steady)) == (release, since)
    assert "comfyui-trial" not in steady.machine.run("systemctl list-units --all; ls /run/systemd/system")
    assert not (steady.prefix / "state/trial").exists()
    if name == "no-pictures":  # after a cut-over the same gate decides
        return
    done = steady.deploy("--no-trial", HEARTH_APP=app)
    assert done.returncode == 66, done.stderr
    assert said in done.stderr
    assert f"release {release} is restored and answers requests" in done.stderr
    assert steady.current() == release
    assert steady.answers(1)
    assert steady.data() == data


def test_unused_gpu_or_kernel_is_unhealthy(steady: Fleet) -> None:
    """Only nvidia-smi is faked, so that the plan accepts a GPU profile; ComfyUI is real and runs on the CPU."""
    release = steady.current()
    smi = steady.machine.root / "usr/local/bin/nvidia-smi"
    smi.write_text("#!/bin/sh\necho NVIDIA GB10, 12.1, [N/A]\n")
    smi.chmod(0o755)
    try:
        steady.configure("[hosts.spark.override]\ncuda = true\n")
        no_cuda = steady.deploy()
        (gpu,) = steady.facts()["gpus"]
    finally:
        smi.unlink()
    assert gpu == {"name": "NVIDIA GB10", "capability": "12.1", "memory": None, "unified": True, "processes": []}
    assert no_cuda.returncode == 66, no_cuda.stderr
    assert "ComfyUI sees no CUDA device" in no_cuda.stderr
    steady.configure('[hosts.spark.override.flags]\n"--use-pytorch-cross-attention" = { why = "a test" }\n')
    other = {"comfy/ldm/modules/attention.py": ("Using pytorch attention", "Using split attention")}
    not_used = steady.deploy(HEARTH_APP=str(steady.comfyui("not-used", other)))
    assert not_used.returncode == 66, not_used.stderr
    assert "ComfyUI does not use pytorch attention" in not_used.stderr
    assert steady.current() == release
    assert steady.answers(1)


def test_rollback_restores_the_database(steady: Fleet) -> None:
    """An unhealthy version that migrated the database: the old one would refuse to start on it."""
    before = (steady.prefix / "data/user/comfyui.db").read_bytes()
    line = 'import sqlite3,sys; d=sqlite3.connect(sys.argv[sys.argv.index("--database-url")+1][10:]);'
    line += ' d.execute("create table newer (x)"); d.commit(); sys.exit(1)'
    app = str(steady.comfyui("migrates", broken(line)))
    assert steady.deploy(HEARTH_APP=app).returncode == 66
    assert (steady.prefix / "data/user/comfyui.db").read_bytes() == before  # the trial used a copy
    done = steady.deploy("--no-trial", HEARTH_APP=app)
    assert done.returncode == 66, done.stderr
    assert b"newer" not in (steady.prefix / "data/user/comfyui.db").read_bytes()
    assert len((steady.prefix / "data/user/comfyui.db").read_bytes()) == len(before)


def test_every_refusal_is_shown_at_once(deployed: Fleet) -> None:
    deployed.configure(
        'mounts."/mnt/models" = {}\n[hosts.spark.override]\npythons = ["3.13"]\ncuda = true\n'
        'flags."--lowvram" = { why = "a test" }\nflags."--normalvram" = { why = "a test" }\n'
    )
    done = deployed.deploy()
    deployed.configure()
    assert done.returncode == 63
    for said in (
        "/mnt/models is not mounted",
        "no Python 3.13 (found: none)",
        "needs an NVIDIA GPU, and nvidia-smi shows none",
        "this ComfyUI has no flag --normalvram",
        "--cpu and --lowvram exclude each other",
        "apt-get install python3.13",
    ):
        assert said in done.stderr
    assert deployed.answers(1)


def test_port_in_use_is_reported(deployed: Fleet) -> None:
    deployed.configure()
    text = (deployed.place / "hosts.toml").read_text()
    with taken_port(deployed.machine) as (port, holder):
        (deployed.place / "hosts.toml").write_text(re.sub(r"port = \d+", f"port = {port}", text))
        done = deployed.deploy()
    deployed.configure()
    assert done.returncode == 63, done.stderr
    assert f"port {port} is in use by python3 -m http.server (pid {holder})" in done.stderr


def test_a_missing_kernel_wheel_names_its_build(deployed: Fleet) -> None:
    deployed.configure('[hosts.spark.override]\narch = "8.9"\nkernels = ["sageattention"]\n')
    done = deployed.deploy()
    deployed.configure()
    assert done.returncode == 63
    build = "inv build-kernels --kernel sageattention --arch 8.9 --stack cu130 --python 3.11 --platform linux_x86_64"
    assert build in done.stderr


def test_a_changed_and_an_unknown_host_key_are_refused(deployed: Fleet) -> None:
    known = deployed.machine.place / "known_hosts"
    right = known.read_text()
    other = deployed.place / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    try:
        known.write_text(f"{right.split()[0]} {other.with_suffix('.pub').read_text()}")
        changed = deployed.deploy()
        known.write_text("")
        unknown = deployed.deploy()
    finally:
        known.write_text(right)
    assert {kind_of(changed.stderr), kind_of(unknown.stderr)} == {"host-key"}
    assert "has CHANGED" in changed.stderr
    assert "ssh-keyscan -p" in unknown.stderr
    assert "is not known" in unknown.stderr


def test_missing_sudo_has_its_own_error(deployed: Fleet) -> None:
    rule = deployed.machine.root / "etc/sudoers.d/deployer"
    text = rule.read_text()
    rule.write_text("")
    try:
        done = deployed.deploy()
        asked = deployed.deploy("--ask-sudo")
    finally:
        rule.write_text(text)
    assert (done.returncode, kind_of(done.stderr)) == (60, "sudo"), done.stderr
    assert "--ask-sudo" in done.stderr
    assert (asked.returncode, kind_of(asked.stderr)) == (60, "sudo")
    assert "no terminal" in asked.stderr


def test_unreachable_host_has_its_own_error(deployed: Fleet) -> None:
    deployed.configure()
    text = (deployed.place / "hosts.toml").read_text()
    (deployed.place / "hosts.toml").write_text(text.replace('"spark"', '"127.0.0.1"') + "ssh_port = 1\n")
    done = deployed.deploy()
    deployed.configure()
    assert done.returncode == 60
    assert "cannot be reached" in done.stderr


def test_foreign_current_link_is_refused(steady: Fleet) -> None:
    current = steady.prefix / "current"
    target = current.readlink()
    current.unlink()
    current.mkdir()
    (current / "mine").write_text("mine")
    done = steady.deploy()
    assert done.returncode == 63
    assert "is not Hearth's link" in done.stderr
    assert (current / "mine").read_text() == "mine"
    shutil.rmtree(current)
    current.symlink_to("/etc")
    assert "which is not a release" in steady.deploy().stderr
    current.unlink()
    current.symlink_to(target)


def test_group_starts_with_its_canary(deployed: Fleet) -> None:
    ghost = '[hosts.ghost]\naddress = "127.0.0.1"\nssh_port = 1\nprofile = "cpu"\n'
    deployed.configure(f'{ghost}[groups]\nsound = ["spark", "ghost"]\nsick = ["ghost", "spark"]\n')
    sound = deployed.inv("deploy", "--group", "sound")
    sick = deployed.inv("deploy", "--group", "sick")
    both = deployed.inv("deploy", "--group", "sick", "--keep-going")
    deployed.configure()
    assert (sound.returncode, sick.returncode, both.returncode) == (70, 70, 70)
    in_service = f"spark: release {deployed.current()} is in service"
    assert in_service in sound.stderr
    assert "spark: skipped, the canary failed" in sick.stderr
    assert in_service in both.stderr
    assert "ghost: error[unreachable]: ghost cannot be reached" in both.stderr


def test_sudo_password_is_requested_once_and_hidden(deployed: Fleet) -> None:
    rule = deployed.machine.root / "etc/sudoers.d/deployer"
    text = rule.read_text()
    # Not by a command over ssh: sudo's log would then contain the password.
    subprocess.run(["chroot", deployed.machine.root, "chpasswd"], input="deployer:open-sesame", text=True, check=True)
    rule.write_text(text.replace("NOPASSWD: ", ""))
    try:
        status, said = at_a_terminal(deployed, ("facts", "--host", "spark", "--ask-sudo"), "open-sesame\n")
        refused, why = at_a_terminal(deployed, ("facts", "--host", "spark", "--ask-sudo"), "wrong\n")
    finally:
        rule.write_text(text)
    assert status == 0, said
    assert said.count("sudo password on spark") == 1
    assert "open-sesame" not in said
    assert "debian 12" in said
    assert (refused, "error[sudo]" in why) == (60, True), why
    # If sudo does not ask, the password is not sent.
    status, said = at_a_terminal(deployed, ("facts", "--host", "spark", "--ask-sudo"), "open-sesame\n")
    assert status == 0, said
    assert "open-sesame" not in deployed.machine.run("journalctl --no-pager")


def at_a_terminal(fleet: Fleet, words: tuple[str, ...], typed: str) -> tuple[int, str]:
    """Run inv in its own terminal; type the text when it asks for a password."""
    ours, theirs = pty.openpty()
    environment = fleet.environment(COLUMNS="200")
    process = subprocess.Popen(
        fleet.command(*words), cwd=files.CHECKOUT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    said = ""
    while True:
        try:
            said += os.read(ours, 4096).decode()
        except OSError:  # the other end is closed
            break
        if said.endswith(": ") and typed:
            os.write(ours, typed.encode())
            typed = ""
    os.close(ours)
    return process.wait(), said


def test_it_starts_at_boot(service: Fleet) -> None:
    release = service.current()
    service.machine.power_off()
    service.machine.boot()
    assert service.answers()
    assert service.current() == release


def test_drift_is_repaired(service: Fleet) -> None:
    service.machine.run("systemctl stop comfyui; rm /etc/systemd/system/multi-user.target.wants/comfyui.service")
    plan = service.deploy("--dry-run")
    assert plan.returncode == 2
    assert "start comfyui  (it is not active, not enabled)" in plan.stderr


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        ("sed -i --follow-symlinks", "its manifest, unit or links were changed"),
        ("sed -i", "the running release was modified on disk"),
    ],
    ids=["in the release", "a file in its place"],
)
def test_edited_unit_is_repaired(service: Fleet, edit: str, why: str) -> None:
    """Some editors write through a link, others replace it. An administrator's drop-in stays."""
    unit = "/etc/systemd/system/comfyui.service"
    service.machine.run(f"mkdir -p {unit}.d; printf '[Service]\\nEnvironment=OWN=1\\n' > {unit}.d/own.conf")
    service.machine.run(f"{edit} 's/^NoNewPrivileges=yes/NoNewPrivileges=no/' {unit}")
    done = service.deploy("--no-trial")
    assert done.returncode == 0, done.stderr
    assert why in done.stderr
    shown = service.machine.run("systemctl show comfyui -p NoNewPrivileges -p Environment")
    assert "NoNewPrivileges=yes" in shown
    assert "OWN=1" in shown
    service.machine.run(f"rm -r {unit}.d; systemctl daemon-reload")


def test_tampered_part_is_rebuilt(service: Fleet) -> None:
    manifest = json.loads((service.prefix / "current/release.json").read_text())
    target = service.prefix / "parts" / manifest["parts"]["app"]
    (target / "main.py").chmod(0o644)
    with (target / "main.py").open("a") as file:
        file.write("# tampered\n")
    plan = service.deploy("--dry-run")
    assert plan.returncode == 2
    assert "it was changed after it was made" in plan.stderr
    done = service.deploy("--no-trial")
    assert done.returncode == 0, done.stderr
    assert "tampered" not in (target / "main.py").read_text()


def test_deploy_waits_for_jobs_and_lists_them(service: Fleet) -> None:
    folder = small(service.place, "slow")
    assert service.deploy("--no-trial", HEARTH_APP=str(folder)).returncode == 0
    prompt = submit(service, 65)
    done = service.deploy("--no-trial", "--drain", "1")  # the job might end during the trial
    assert (done.returncode, kind_of(done.stderr)) == (64, "drain"), done.stderr
    assert prompt in done.stderr
    waiting = service.start("deploy", "--host", "spark", "--no-trial", "--drain", "60")
    assert waiting.stdout is not None
    assert any(f"waiting for jobs: 1 running ({prompt}), 0 waiting" in line for line in waiting.stdout)
    finish(service)
    said, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, said
    assert (service.prefix / "data/output/slow_00001_.png").exists()
    (service.prefix / "data/output/slow_00001_.png").unlink()


def finish(fleet: Fleet) -> None:
    """Let the stand-in finish a picture 65 pixels wide."""
    (fleet.prefix / "data/output/finish").touch()


def submit(fleet: Fleet, width: int) -> str:
    import urllib.request

    inputs = {"width": width, "height": 64, "batch_size": 1, "color": 0}
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "slow"}},
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{fleet.machine.port}/prompt",
        json.dumps({"prompt": workflow}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        prompt = json.load(answer)["prompt_id"]
    end = time.monotonic() + 10
    while not fleet.ask("/queue")["queue_running"] and time.monotonic() < end:
        time.sleep(0.05)
    return str(prompt)


def test_old_releases_are_pruned_with_their_parts(service: Fleet) -> None:
    other = small(service.place, "pruned")
    for number, env in enumerate(({"HEARTH_APP": str(other)}, {}, {})):
        service.configure(
            f'keep = 2\n[hosts.spark.override.flags]\n"--preview-size" = {{ value = "{number}00", why = "a test" }}\n'
        )
        assert service.deploy("--no-trial", **env).returncode == 0
    assert len(list((service.prefix / "releases").iterdir())) == 2
    named = {
        part
        for path in (service.prefix / "releases").glob("*/release.json")
        for part in json.loads(path.read_text())["parts"].values()
    }
    assert {path.name for path in (service.prefix / "parts").iterdir()} == named
