"""The client's side of a connection: its commands, its interpretation of every end, and its questions."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core import console, files, shell
from core.errors import HearthError, ProcessError
from deploy import archive, connection, passwords
from deploy.change import Outcome, follow
from deploy.group import DESTRUCTIVE, Consent, on_each
from deploy.look import find_target
from deploy.plan import Options
from tests import warm
from tests.errors import raises

pytestmark = pytest.mark.process

# --- a program on the other end -----------------------------------------------------------------------------------


def test_exit_status_counts_after_output() -> None:
    answers = shell.stream(["sh", "-c", "echo one; echo unfini; echo why >&2; printf shed; kill -9 $$"], b"")
    assert [next(answers), next(answers)] == [b"one\n", b"unfini\n"]
    with raises("process") as caught:
        next(answers)
    assert isinstance(caught.value, ProcessError)
    assert (caught.value.status, caught.value.stderr) == (-9, "why")


def test_input_and_output_move_at_once() -> None:
    """More data than any pipe holds, in both directions: neither side waits for the other to read first."""
    blocks = [b"x" * 200_000 + b"\n"] * 30
    assert list(shell.stream(["cat"], b"first\n", blocks)) == [b"first\n", *blocks]


def test_long_lines_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; [sys.stdout.write('x' * 1_000_000) for _ in range(40)]"
    begun = time.monotonic()
    assert [len(each) for each in shell.stream([sys.executable, "-c", script], b"")] == [40_000_000]
    assert time.monotonic() - begun < 10
    monkeypatch.setattr(shell, "LINE", 1_000_000)
    with raises("step-failed", match="a line of more than 1000000 bytes"):
        list(shell.stream(["cat", "/dev/zero"], b""))


def test_unread_input_is_no_error() -> None:
    assert list(shell.stream(["echo", "done"], b"x" * 1_000_000)) == [b"done\n"]


def test_last_line_without_newline_is_read() -> None:
    assert list(shell.stream(["printf", "a\\nb"], b"")) == [b"a\n", b"b"]


def test_messages_of_a_program_name_their_host(capsys: pytest.CaptureFixture[str]) -> None:
    with console.speaking("spark"):
        list(shell.stream(["sh", "-c", "echo building >&2"], b"", on_stderr=console.say))
    assert capsys.readouterr().err == "spark: building\n"


@pytest.mark.parametrize(
    ("script", "limits"),
    [
        ("exec sleep 60", {"first": 0.3}),
        ("echo begun; exec sleep 60", {"first": 60.0, "silence": 0.3}),
        ("exec >&-; exec sleep 60", {"first": 0.3}),
    ],
)
def test_silence_is_a_failure(script: str, limits: dict[str, Any]) -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        list(shell.stream(["sh", "-c", script], b"x" * 1_000_000, **limits))
    assert time.monotonic() - begun < 10


def test_stderr_and_slow_readers_are_not_silence() -> None:
    said: list[str] = []
    script = "for each in 1 2 3 4; do sleep 0.2; echo $each >&2; done; echo done"
    assert list(shell.stream(["sh", "-c", script], b"", first=0.6, on_stderr=said.append)) == [b"done\n"]
    assert said == ["1", "2", "3", "4"]
    for _ in shell.stream(["sh", "-c", "echo a; echo b; sleep 0.1; echo c"], b"", first=0.4, silence=0.4):
        time.sleep(0.5)


def test_abandoned_program_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "GRACE", 0.2)
    answers = shell.stream(["sh", "-c", "trap '' TERM; echo $$; while :; do sleep 0.1; done"], b"")
    pid = int(next(answers))
    answers.close()  # type: ignore[attr-defined]  # a generator
    assert not Path(f"/proc/{pid}").exists()


# --- an ssh that reaches this machine -----------------------------------------------------------------------------

SSH = """#!/bin/sh
for each; do last=$each; done
case " $* " in
*" -G "*) printf 'hostname box.lan\\nuser anna\\nport 22\\nconnecttimeout 15\\n'; exit;;
*" -O "*) exit;;
esac
[ -e "$FAKE/ssh.sh" ] && . "$FAKE/ssh.sh"
export HOME="$FAKE/home" PATH="$FAKE/bin:$PATH"
cd "$FAKE"
exec /bin/sh -c "$last"
"""


class Box:
    """A host whose ssh is a script: the contents of `ssh.sh` run before the login's command."""

    def __init__(self, place: Path) -> None:
        self.place = place
        for name in ("home", "bin", "client"):
            (place / name).mkdir()
        self.program("client/ssh", SSH)

    def program(self, name: str, text: str) -> None:
        path = self.place / name
        path.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def before(self, script: str) -> None:
        (self.place / "ssh.sh").write_text(script)

    @property
    def agents(self) -> list[Path]:
        return list((self.place / "home/.cache/hearth").glob("agent-*.pyz"))

    def call(self, verb: str = "history", name: str = "box", **values: Any) -> Any:
        with connection.connect(find_target(name), ask_sudo=True) as agent:
            return agent.call(verb, **values)

    def fails(self, kind: str, verb: str = "history", name: str = "box", **values: Any) -> HearthError:
        with pytest.raises(HearthError) as caught:
            self.call(verb, name, **values)
        assert caught.value.kind == kind, caught.value
        return caught.value


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    found = Box(tmp_path)
    (tmp_path / "hosts.toml").write_text(
        '[hosts.box]\naddress = "box"\nprofile = "cpu"\nscope = "user"\n'
        '[hosts.rooted]\naddress = "box"\nprofile = "cpu"\n'
        '[hosts.third]\naddress = "box"\nprofile = "cpu"\n[groups]\nall = ["box", "rooted", "third"]\n'
    )
    monkeypatch.setenv("HEARTH_HOSTS", str(tmp_path / "hosts.toml"))
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/client:{os.environ['PATH']}")
    monkeypatch.setattr(passwords, "known", {"rooted": "open-sesame"})
    return found


@pytest.mark.parametrize("text", [b"", b"PK half", b"print('not the agent')"])
def test_wrong_agent_is_sent_again(box: Box, text: bytes) -> None:
    assert box.call() == []
    (path,) = box.agents
    path.write_bytes(text)
    assert box.call() == []
    assert path.read_bytes() == archive.packed_agent()
    path.parent.chmod(0o775)
    assert box.call() == []
    assert path.parent.stat().st_mode & 0o022 == 0


def test_the_agent_is_unpacked_where_something_is_deployed(box: Box) -> None:
    state = box.place / "home/.local/share/hearth/comfyui/state"
    state.mkdir(parents=True)
    assert box.call() == []
    (place,) = (state / "agents").iterdir()
    assert place.name == archive.agent_hash()
    for path in (place / "__main__.py", *place.glob("__pycache__/__main__*")):
        path.unlink()
    (place / "__main__.py").write_text("import sys\nprint('[%r]' % sys.argv[1])".replace("%r", '\\"%s\\"'))
    (path,) = box.agents
    path.write_bytes(b"print('not the agent')")  # it has no reader
    assert box.call() == ["history"]


def test_local_agent_is_verified(box: Box) -> None:
    archive.agent_file().write_bytes(b"PK half")
    assert box.call(name="local") == []


def test_truncated_upload_leaves_no_file(box: Box) -> None:
    with connection.connect(find_target("box")) as agent:
        assert isinstance(agent, connection.Ssh)
        agent.put(b"old", "x/blob")
        box.program("bin/cat", "exec /usr/bin/head -c 5")  # the data before the connection drops
        with raises("step-failed", match="could not be written"):
            agent.put(b"new and long", "x/blob")
        box.program("bin/cat", "echo 'cat: write error: No space left on device' >&2; exit 1")
        with raises("disk-full"):
            agent.put(b"new and long", "x/blob")
    assert [each.name for each in (box.place / "home/x").iterdir()] == ["blob"]
    assert (box.place / "home/x/blob").read_text() == "old"


NOISE = "printf 'Welcome'; echo '[1]'; echo 'sudo: Permission denied (publickey)' >&2; cd /tmp\n"


def test_login_shell_output_is_ignored(box: Box) -> None:
    box.before(NOISE.replace("cd /tmp", ""))
    assert box.call() == []
    box.program("bin/python3", "echo failed >&2; exit 1")
    assert box.fails("step-failed").cause == "failed"
    box.before(NOISE + "exit 7")
    error = box.fails("step-failed")
    assert "does not run commands" in error.what
    assert "Welcome" in error.cause


@pytest.mark.parametrize(
    ("script", "kind", "says"),
    [
        ("exit 255", "unreachable", "cannot be reached (anna@box.lan:22)"),
        ("echo 'ssh: connect to host box.lan port 22: Connection refused' >&2; exit 255", "unreachable", "reached"),
        ("echo 'anna@box.lan: Permission denied (publickey).' >&2; exit 255", "unreachable", "authentication failed"),
        ("echo 'Received disconnect: Too many authentication failures' >&2; exit 255", "unreachable", "authentication"),
        ("echo 'Host key verification failed.' >&2; exit 255", "host-key", "is not known"),
        (
            "echo 'Host key verification failed.' >&2; echo 'Connection closed by UNKNOWN port 65535' >&2; exit 255",
            "host-key",
            "a jump host of box is not known",
        ),
        (
            "echo '@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @' >&2; seq 12 >&2; exit 255",  # a long message
            "host-key",
            "box (box.lan) has CHANGED",
        ),
        ("echo '@  WARNING: REVOKED HOST KEY DETECTED!  @' >&2; exit 255", "host-key", "is revoked"),
        (
            "echo 'Certificate invalid: expired' >&2; echo 'Host key verification failed.' >&2; exit 255",
            "host-key",
            "certificate",
        ),
    ],
)
def test_unreachable_host_errors(box: Box, script: str, kind: str, says: str) -> None:
    box.before(script)
    error = box.fails(kind)
    assert says in error.what
    assert error.cause
    assert "ssh box" in error.hint or "ask the host's administrator" in error.hint


@pytest.mark.parametrize("act", ["shell", "put", "get", "call", "send"])
def test_broken_connection_is_a_connect_error(box: Box, act: str) -> None:
    (box.place / "blob").write_bytes(b"x" * 100)
    with connection.connect(find_target("box")) as agent:
        assert isinstance(agent, connection.Ssh)
        assert agent.call("history") == []
        # After the mark, as the master of a closing connection does.
        box.before('printf "\\n--- hearth ---\\n"; echo "--- hearth ---" >&2; echo gone >&2; exit 255\n')
        acts: dict[str, Callable[[], Any]] = {
            "shell": lambda: agent.shell("true", print),
            "put": lambda: agent.put(b"x", "blob"),
            "get": lambda: agent.get("blob", box.place / "got", 100),
            "call": lambda: agent.call("history"),
            "send": lambda: agent.send(box.place / "blob", "0" * 64, 0, lambda _: None),
        }
        with raises("unreachable", match="was lost") as caught:
            acts[act]()
    assert caught.value.cause == "gone"
    assert "inv attach --host box" in caught.value.hint


def test_failures_are_found_without_stderr(box: Box) -> None:
    box.before("exec 2>/dev/null\n")
    box.program("bin/python3", "exit 7")
    assert "ended with 7" in box.fails("step-failed").what
    box.program("bin/python3", "echo '[]'; exit 255")
    assert "was lost" in box.fails("unreachable").what


def test_a_command_that_fails_there_is_a_remote_error(box: Box) -> None:
    said: list[str] = []
    with connection.connect(find_target("box")) as agent:
        assert isinstance(agent, connection.Ssh)
        assert agent.shell('pwd; echo "it\'s" >&2', said.append) == f"{box.place}/home\n"
        with raises("remote-command", match="ended with 3"):
            agent.shell("exit 3", said.append)
        with raises("remote-command", match="could not be read"):
            agent.get("nothing", box.place / "got", 100)
        box.program("bin/cat", "exit 5")
        for failing in (lambda: agent.get("x", box.place / "got", 100), lambda: agent.shell("exit 5", said.append)):
            with raises("remote-command") as caught:
                failing()
            assert caught.value.cause == "it wrote no message; its exit status is 5"
    assert said == ["it's"]


@pytest.mark.parametrize(
    ("script", "says", "cause"),
    [
        ("exit 127", "python3 on box cannot be started", ""),
        ("echo 'error while loading shared libraries' >&2; exit 127", "cannot be started", "shared libraries"),
        ("kill -9 $$", "was killed by SIGKILL", ""),
        ("echo 'sudo: not mine' >&2; exit 1", "ended with 1", "sudo: not mine"),
        ("exit 0", "without an answer", ""),
        ("echo '{\"half'; exit 0", "is not JSON", "half"),
        ("printf '{\"half'; exit 1", "ended with 1", ""),
        ("echo '[]'; kill -9 $$", "was killed by SIGKILL", ""),
    ],
)
def test_failing_agent_errors(box: Box, script: str, says: str, cause: str) -> None:
    box.program("bin/python3", script)
    error = box.fails("step-failed")
    assert says in error.what
    assert cause in error.cause


def test_python_version_is_checked_before_imports(box: Box) -> None:
    old = "import sys; sys.version_info = (3, 8, 18); sys.version = '3.8.18 (old)'; exec(sys.argv.pop(1))"
    box.program("bin/python3", f'shift 3; exec {sys.executable} -c "{old}" "$@"')
    assert "python3 on box is 3.8.18; Hearth needs 3.10" in box.fails("step-failed").what


def test_lost_connection_does_not_end_a_change(box: Box) -> None:
    box.program("bin/python3", 'echo \'{"event": "step", "title": "x"}\'; kill -9 $$')
    error = box.fails("unreachable", "follow", run="r1")
    assert "inv attach --host box" in error.hint
    box.program("bin/python3", 'echo \'{"event": "step", "title": "x"}\'')
    with raises("unreachable") as caught, connection.connect(find_target("box")) as agent:
        follow(agent, "r1")
    assert "inv attach" in caught.value.hint


def test_failed_new_connection_does_not_end_a_change(box: Box) -> None:
    """The shared connection has ended, and the network with it: the host may have the plan."""
    box.before("echo 'ssh: connect to host box port 22: Connection timed out' >&2; exit 255\n")
    for verb in ("submit", "follow"):
        error = box.fails("unreachable", verb, run="r1")
        assert "timed out" in error.cause
        assert "inv attach --host box" in error.hint
    assert "ssh " in box.fails("unreachable").hint


def test_killed_local_agent_is_an_error(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.program("bin/python3", 'echo \'{"event": "alive"}\'; kill -9 $$')
    monkeypatch.setattr(sys, "executable", str(box.place / "bin/python3"))
    assert "inv attach --host local" in box.fails("unreachable", "follow", "local", run="r1").hint
    assert "was killed by SIGKILL" in box.fails("step-failed", "facts", "local").what


def test_silent_agent_is_a_lost_connection(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "QUIET", 0.3)
    monkeypatch.setattr(connection, "SILENT", 0.6)
    box.program("bin/python3", 'echo \'{"event": "alive"}\'; exec sleep 60')
    for verb, values in (("follow", {"run": "r1"}), ("logs", {"follow": True}), ("facts", {})):
        assert "does not answer" in box.fails("unreachable", verb, **values).cause or verb
    assert connection._patience("free-memory", {"wait": 3600}) > 3600
    assert connection._patience("logs", {"follow": False}) == connection.SILENT


def test_incomplete_upload_is_an_error(box: Box) -> None:
    box.program("bin/python3", "echo '{\"size\": 5}'")
    (box.place / "blob").write_bytes(b"x" * 100)
    with connection.connect(find_target("box")) as agent, raises("unreachable", match="was lost"):
        agent.send(box.place / "blob", "0" * 64, 0, lambda _: None)


def test_replaced_request_is_refused(box: Box) -> None:
    """For example one that waits for the pipe from which root's agent reads its request."""
    box.program("bin/id", "echo 1000")
    box.program("bin/stat", "echo 1000 drwx------")
    pipe = "$HOME/.cache/hearth/in.*"
    forged = f"""printf '{{"site": {{}}, "verb": "nuke"}}\\n' >$(echo {pipe})"""
    taken = f"/usr/bin/cat $(echo {pipe}) >/dev/null"
    box.program("bin/sudo", f'/usr/bin/cat >/dev/null; {taken}; {forged} & shift 3; exec "$@"')
    assert "was replaced during its transfer" in box.fails("usage", name="rooted").what


def test_local_agent_runs_the_verified_bytes(box: Box, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its file is in a cache, which the login can modify between the check and the start."""
    forged = tmp_path / "forged"
    forged.write_text('print("[1]")')
    monkeypatch.setattr(archive, "agent_file", lambda: forged)
    with raises("step-failed"):
        box.call(name="local")


def test_sudo_gets_the_password_and_the_agent_the_request(box: Box) -> None:
    """Runs without root: the user id is faked."""
    box.program("bin/id", "echo 1000")
    box.program("bin/stat", "echo 1000 drwx------")
    note = box.place / "sudo.txt"
    box.program("bin/sudo", f'/usr/bin/cat >{note}; shift 3; exec "$@"')
    assert box.call(name="rooted") == []
    assert note.read_text() == "open-sesame\n"
    box.program("bin/sudo", f'/usr/bin/cat >{note}; echo "sudo: 1 incorrect password attempt" >&2; exit 1')
    assert "does not accept the password" in box.fails("sudo", name="rooted").what
    assert "rooted" not in passwords.known  # the next attempt asks again
    passwords.known["rooted"] = "open-sesame"
    assert note.read_text() == "open-sesame\n"
    assert not list((box.place / "home/.cache/hearth").glob("in.*"))
    box.program("bin/sudo", 'echo "sudo: anna is not in the sudoers file." >&2; exit 1')
    assert "anna may not use sudo on rooted" in box.fails("sudo", name="rooted").what


# --- questions ----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Terminal]:
    """Simulate a user at the terminal who types this; returns the displayed text."""

    def typed(text: str) -> Terminal:
        shown = Terminal()
        monkeypatch.setattr(sys, "stdin", Terminal(text))
        monkeypatch.setattr(sys, "stderr", shown)
        return shown

    return typed


def everywhere(options: Options, action: str = "deploy", skip: str = "") -> list[str]:
    """The changed hosts of the group, in order."""
    names = ["box", "rooted", "third"]
    agree = Consent(names, action, options)
    changed: list[str] = []

    def one(name: str) -> Outcome:
        if name != skip:
            agree()
            changed.append(name)
        return Outcome(name, "r", "", changed=True)

    on_each(names, one, agree, ask_sudo=options.ask_sudo, keep_going=True)
    return changed


@pytest.mark.usefixtures("box")
def test_group_is_confirmed_once(asked: Callable[[str], Terminal]) -> None:
    for skip in ("", "box"):
        shown = asked("y\n")
        assert len(everywhere(Options(ask=True), skip=skip)) == 3 - bool(skip)
        assert shown.getvalue().count("[y/N]") == 1
        assert "deploy box, rooted, third?" in shown.getvalue()
    shown = asked("n\ny\ny\n")
    with raises("refused"):
        everywhere(Options(ask=True))
    assert shown.getvalue().count("[y/N]") == 1


@pytest.mark.usefixtures("box")
def test_group_passwords_are_requested_first(asked: Callable[[str], Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.null.Keyring")
    monkeypatch.setattr(passwords, "known", {})

    def type_it(question: str) -> str:
        order.append(question)
        return "secret"

    monkeypatch.setattr("getpass.getpass", type_it)
    asked("")
    names = ["box", "rooted", "third"]

    def one(name: str) -> Outcome:
        order.append(name)
        passwords.sudo_password(name, find_target(name).host)
        return Outcome(name, "r", "", changed=True)

    on_each(names, one, lambda: None, ask_sudo=True, keep_going=False)
    assert order[:3] == ["sudo password on rooted: ", "sudo password on third: ", "box"]
    assert len(order) == 5


@pytest.mark.usefixtures("box")
@pytest.mark.parametrize("action", ["deploy", "stop", *DESTRUCTIVE])
@pytest.mark.parametrize("name", ["box", "local"])
def test_destructive_action_needs_yes(action: str, name: str, asked: Callable[[str], Terminal]) -> None:
    destroys = action in DESTRUCTIVE
    agree = Consent([name], action, Options(ask=True))
    if destroys:  # there is no terminal
        with raises("refused") as caught:
            agree()
        assert "--yes" in caught.value.hint
    else:
        agree()
    shown = asked("\n")
    if destroys or name != "local":
        with raises("refused"):
            Consent([name], action, Options(ask=True))()
        assert f"{action} {name}? [y/N]" in shown.getvalue()
    for options in (Options(ask=False), Options(ask=True, dry_run=True)):
        Consent([name], action, options)()
    assert shown.getvalue().count("[y/N]") <= 1


def test_missing_terminal_error_names_the_flag(box: Box) -> None:
    """From the command line: an existing service would be removed."""
    prefix = box.place / "home/.local/share/hearth/comfyui"
    (prefix / "releases/old").mkdir(parents=True)
    (prefix / "state").mkdir()
    (prefix / "releases/old/release.json").write_text('{"id": "old", "parts": {}}')
    words = ["nuke", "--host", "box"]
    refused = warm.run(words, dict(os.environ), files.CHECKOUT, 60)
    assert (refused.returncode, "--yes" in refused.stderr) == (63, True), refused.stderr
    assert (prefix / "releases/old").exists()
    assert warm.run([*words, "--dry-run"], dict(os.environ), files.CHECKOUT, 60).returncode == 2
