"""A service under systemd: stopped, paused, inspected and finally removed, on a separate machine.

It is a stand-in for ComfyUI.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator

import pytest

from tests.host.fleet import PREFIX, Fleet, fresh
from tests.host.small import small
from tests.host.test_deploy import at_a_terminal, finish, submit
from tests.host.test_faults import kill_agent

pytestmark = pytest.mark.host

MOUNT = '[hosts.spark.mounts."/srv/pool"]\nwhat = "/srv/vault"\ntype = "none"\noptions = "bind"\n'
PEOPLE = 'members = ["anna"]\nmembers_may = ["restart"]\nfolders.input = "/srv/pool/in"\n'


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A machine with members, a mount by Hearth, and a stand-in that can be slow: `finish`."""
    with fresh(tmp_path_factory.mktemp("lone"), "lifecycle", Fleet) as fleet:
        fleet.machine.add_disk("vault", "400M")
        fleet.machine.boot()
        fleet.machine.run("useradd anna")
        fleet.env["HEARTH_APP"] = str(small(fleet.place, "slow"))
        fleet.configure(PEOPLE + MOUNT)
        done = fleet.deploy()
        assert done.returncode == 0, done.stderr
        yield fleet


@pytest.fixture
def served(lone: Fleet) -> Iterator[Fleet]:
    """The same machine; after the test a deploy must find nothing to do."""
    yield lone
    lone.configure(PEOPLE + MOUNT)
    again = lone.deploy("--dry-run")
    assert again.returncode == 0, again.stderr
    assert lone.answers(1)


def inv(fleet: Fleet, *words: str, code: int = 0) -> str:
    """Run a task for the host; returns both outputs and checks the exit code."""
    done = fleet.inv(words[0], "--host", "spark", *words[1:])
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def active(fleet: Fleet) -> str:
    return fleet.machine.run("systemctl is-active comfyui || true").strip()


def test_stop_waits_for_jobs_and_lasts_until_boot(served: Fleet) -> None:
    prompt = submit(served, 65)
    assert prompt in inv(served, "stop", "--drain", "1", code=64)
    assert active(served) == "active"
    stopping = served.start("stop", "--host", "spark", "--drain", "60")
    while not (served.prefix / "state/pending.json").exists() and stopping.poll() is None:
        time.sleep(0.01)
    other = served.inv("pause", "--host", "spark")
    assert (other.returncode, "the host is being changed: stop by " in other.stderr) == (63, True), other.stderr
    finish(served)
    said, _ = stopping.communicate(timeout=60)
    assert stopping.returncode == 0, said
    assert f"waiting for jobs: 1 running ({prompt}), 0 waiting" in said
    assert "spark: ComfyUI is stopped" in said
    assert active(served) == "inactive"
    assert "nothing to do" in inv(served, "stop")
    served.machine.power_off()
    served.machine.boot()
    assert served.answers()


def test_pause_survives_boot_and_deploy(served: Fleet) -> None:
    assert "until inv resume" in inv(served, "pause", "--dry-run", code=2)
    inv(served, "pause")
    served.machine.power_off()
    served.machine.boot()
    assert served.facts()["paused"]["who"]
    for task in ("deploy", "start", "restart", "rollback"):
        said = inv(served, task, code=15 if task == "rollback" else 63)  # there is no other release to go back to
        assert "comfyui was paused by " in said or task == "rollback"
    assert active(served) == "inactive"
    assert "nothing to do" in inv(served, "pause")
    assert re.search(r"answers after \d+\.\d s: ComfyUI 0\.30\.0", inv(served, "resume"))
    assert served.machine.run("systemctl is-enabled comfyui || true").strip() in ("enabled", "linked")
    assert served.facts()["service"]["enabled"]


def test_group_restart_starts_with_its_canary(served: Fleet) -> None:
    ghost = '[hosts.ghost]\naddress = "127.0.0.1"\nssh_port = 1\nprofile = "cpu"\n'
    served.configure(f'{PEOPLE}{MOUNT}{ghost}[groups]\nsound = ["spark", "ghost"]\nsick = ["ghost", "spark"]\n')
    sound, sick = (served.inv("restart", "--group", group) for group in ("sound", "sick"))
    assert (sound.returncode, sick.returncode) == (70, 70)
    assert "spark: ComfyUI is running again" in sound.stderr
    assert "answers after" in sound.stderr
    assert "spark: skipped, the canary failed" in sick.stderr


def test_service_waiting_for_a_mount_can_be_stopped(served: Fleet) -> None:
    machine = served.machine
    machine.run("mkdir -p /srv/plain; mount -t tmpfs plain /srv/plain")
    served.configure(f'{PEOPLE}mounts."/srv/plain" = {{}}\n{MOUNT}')  # systemd remounts Hearth's mounts
    assert served.deploy("--no-trial").returncode == 0
    machine.run("umount /srv/plain || umount --lazy /srv/plain")
    end = time.monotonic() + 40
    while active(served) == "active" and time.monotonic() < end:
        time.sleep(0.2)
    assert served.facts()["service"]["waits"]
    assert "/srv/plain is not mounted" in inv(served, "restart", code=63)
    assert "spark: ComfyUI is stopped" in inv(served, "stop")
    assert not served.facts()["service"]["waits"]
    assert "/srv/plain is not mounted" in inv(served, "start", code=63)
    machine.run("mount -t tmpfs plain /srv/plain; sleep 3")
    assert active(served) == "inactive"  # a stopped service stays stopped when the mount returns
    assert "spark: ComfyUI is running" in inv(served, "start")
    assert served.answers(1)
    served.configure(PEOPLE + MOUNT)
    assert served.deploy("--no-trial").returncode == 0
    machine.run("umount /srv/plain")


def test_the_journal(served: Fleet) -> None:
    inv(served, "restart")
    (line,) = inv(served, "logs", "-n", "1", "--grep", "To see the GUI").splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  .*To see the GUI go to: http://127\.0\.0\.1:\d+", line)
    assert "Started comfyui.service" in inv(served, "logs", "--since", "5 min ago")
    assert inv(served, "logs", "--since", "tomorrow").startswith("the journal has no line of comfyui.service since")
    assert "Failed to parse timestamp" in inv(served, "logs", "--since", "gestern", code=15)
    lines = [json.loads(each) for each in inv(served, "logs", "--json", "-n", "7").splitlines()]
    assert len(lines) == 7
    assert all(time.time() - 600 < each["at"] <= time.time() + 1 for each in lines)

    following = served.start("logs", "--host", "spark", "--follow", "--lines", "1", "--grep", "[Pp]rompt|To see")
    assert following.stdout is not None
    assert "To see" in following.stdout.readline()
    submit(served, 64)
    assert "got prompt" in following.stdout.readline()
    assert "Prompt executed" in following.stdout.readline()
    following.send_signal(signal.SIGINT)
    said, _ = following.communicate(timeout=10)
    assert (following.returncode, said) == (130, "")
    end = time.monotonic() + 15  # the host notices when it writes
    while "journalctl" in (left := served.machine.run("ps -e -o args")) and time.monotonic() < end:
        time.sleep(0.5)
    assert "journalctl" not in left

    served.machine.run("journalctl --rotate --quiet; journalctl --vacuum-time=1s --quiet; logger after")
    gone = served.inv("logs", "--host", "spark")
    assert gone.returncode == 0, gone.stderr
    assert "the journal has no line of comfyui.service. It begins at " in gone.stderr
    served.machine.run("systemctl stop systemd-journald.socket systemd-journald-dev-log.socket systemd-journald")
    served.machine.run("rm -rf /run/log/journal /var/log/journal/*")
    empty = served.inv("logs", "--host", "spark")
    served.machine.run("systemctl start systemd-journald.socket systemd-journald-dev-log.socket systemd-journald")
    assert "the journal is empty" in empty.stderr or "cannot read the journal" in empty.stderr, empty.stderr
    inv(served, "restart")


def test_jobs_that_run_and_wait(served: Fleet) -> None:
    first, second = submit(served, 65), submit(served, 65)
    listed = json.loads(inv(served, "jobs", "--json"))
    assert [(each["id"], each["status"]) for each in listed[-2:]] == [(first, "running"), (second, "pending")]
    forced = inv(served, "restart", "--force")
    assert "not waiting for jobs (--force)" in forced
    assert "no jobs" in inv(served, "jobs")


def test_removed_service_leaves_systemd_and_can_return(served: Fleet) -> None:
    machine = served.machine
    assert "comfyui-apply.service" in machine.run("ls /etc/systemd/system")
    release = served.current()
    said = inv(served, "remove", "--yes")
    assert "remove the members' sudo rules" in said
    assert "comfyui" not in machine.run("ls -R /etc/systemd/system /etc/sudoers.d")
    for listing in ("list-units --all --state=loaded", "list-units --failed", "list-unit-files"):
        assert "comfyui" not in machine.run(f"systemctl {listing} --no-legend")
    assert "/srv/pool" in machine.run("findmnt --noheadings --output TARGET /srv/pool")
    assert "nothing to do" in inv(served, "remove")
    back = served.deploy()
    assert back.returncode == 0, back.stderr
    assert "make " not in back.stderr
    assert served.current() == release
    assert "hearth-comfyui" in machine.run("ls /etc/sudoers.d")


@pytest.mark.parametrize(
    ("prefix", "prepare", "said"),
    [
        ("/opt", "true", "/opt cannot be a prefix"),
        ("/", "true", "'/' is not a plain absolute path"),
        ("/srv/vault", "true", "/srv/vault is a mount point"),
        ("/srv/link", f"ln -s {PREFIX} /srv/link", f"/srv/link is a symbolic link to {PREFIX}"),
        ("/srv/ben", "useradd --create-home --home-dir /srv/ben ben", "/srv/ben is or contains the home folder of ben"),
        (
            "/srv/other",
            "mkdir -p /srv/other/data/x /srv/other/releases",
            "/srv/other does not look like a prefix of Hearth",
        ),
    ],
    ids=["top", "root", "mount", "link", "home", "foreign"],
)
def test_unsafe_prefix_is_not_deleted(lone: Fleet, prefix: str, prepare: str, said: str) -> None:
    lone.machine.run(prepare)
    before = lone.machine.run(f"ls -A {prefix}/")
    lone.configure(f'prefix = "{prefix}"\n')
    try:
        refused = lone.inv("nuke", "--host", "spark", "--data", "--yes-delete-data-of", "spark")
    finally:
        lone.configure(PEOPLE + MOUNT)
    assert refused.returncode == (10 if prefix in ("/", "/opt") else 63), refused.stderr
    assert said in refused.stderr
    assert lone.machine.run(f"ls -A {prefix}/") == before
    assert active(lone) == "active"


def test_nuke_resumes_after_kill_and_power_loss_and_keeps_data(lone: Fleet) -> None:
    """From here on, nothing is deployed."""
    machine, prefix = lone.machine, lone.prefix
    machine.run(f"runuser -u comfyui -- sh -c 'echo art > {PREFIX}/data/output/art.png'")
    # As uv's cache after a real first deploy: the deletion of the state takes a while.
    machine.run(f"mkdir -p {PREFIX}/state/cache/uv/files; cd {PREFIX}/state/cache/uv/files; seq 50000 | xargs touch")
    client = lone.start("nuke", "--host", "spark", "--yes")
    wait_for(lone, "delete current")
    kill_agent(lone, 0)
    wait_for(lone, f"delete {PREFIX}/state")
    machine.power_off()
    client.communicate(timeout=60)
    assert (prefix / "state").exists()
    machine.boot()
    end = time.monotonic() + 120
    while (prefix / "state").exists() and time.monotonic() < end:
        time.sleep(0.2)
    assert sorted(path.name for path in prefix.iterdir()) == ["data"]
    assert (prefix / "data/output/art.png").read_text() == "art\n"
    assert not machine.run("ls -R /etc/systemd/system /etc/sudoers.d | grep -e comfyui -e pool || true")
    assert "/srv/pool" not in machine.run("findmnt --noheadings --output TARGET /srv/pool || true")  # it has booted
    assert machine.run("id -un comfyui").strip() == "comfyui"
    assert "nothing to do" in inv(lone, "nuke")
    assert "Hearth is removed" in inv(lone, "nuke")


def wait_for(fleet: Fleet, title: str) -> None:
    """Wait until the current run has begun a step."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            text = "".join(path.read_text() for path in (fleet.prefix / "state/runs").glob("*.jsonl"))
        except OSError:
            continue
        if f'"title": "{title}' in text:
            return
        time.sleep(0.003)
    raise AssertionError(f"step {title!r} never began")


def test_data_deletion_needs_the_name_and_stays_in_the_prefix(lone: Fleet) -> None:
    machine = lone.machine
    machine.run(f"mkdir -p /srv/vault/keep {PREFIX}/data/models/nas; touch /srv/vault/keep/file /srv/outside")
    machine.run(f"mount --bind /srv/vault {PREFIX}/data/models/nas")
    machine.run(f"runuser -u comfyui -- ln -s /srv {PREFIX}/data/output/evil")
    lone.configure()
    dry = inv(lone, "nuke", "--data", "--dry-run", code=2)
    assert f"kept, it is mounted: {PREFIX}/data/models/nas" in dry
    assert "the host's name was not typed" in inv(lone, "nuke", "--data", "--yes", code=63)
    status, said = at_a_terminal(lone, ("nuke", "--host", "spark", "--data"), "yes\n")
    assert (status, "the host's name was not typed" in said) == (63, True), said
    assert (lone.prefix / "data/output/art.png").exists()
    status, said = at_a_terminal(lone, ("nuke", "--host", "spark", "--data"), "spark\n")
    assert status == 0, said
    assert machine.run(f"find {PREFIX} -xdev").split() == [f"{PREFIX}{each}" for each in ("", *LEFT)]
    assert machine.run("ls /srv/vault/keep /srv/outside").split() == ["/srv/outside", "/srv/vault/keep:", "file"]
    assert "nothing to do" in inv(lone, "nuke", "--data", "--yes-delete-data-of", "spark")


LEFT = ("/data", "/data/models", "/data/models/nas")
