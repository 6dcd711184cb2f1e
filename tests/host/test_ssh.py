"""Real sshd and ssh: every ssh configuration, every login shell, and broken connections."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from core.errors import HearthError
from deploy import archive, connection, passwords
from deploy.look import find_target
from tests.errors import raises
from tests.host.fleet import within
from tests.host.lab import NEEDS, Lab, lab

pytestmark = [pytest.mark.host, pytest.mark.needs(*NEEDS)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("lab")) as one:
        yield one


@pytest.fixture
def box(served: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """The lab in its initial state: every change by a test is undone before the next one."""
    for name, value in served.variables().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    served.configure()
    served.know(served.public("host"))
    served.use_shell("/bin/bash")
    served.serve()
    kept = {path.name for path in served.home.iterdir()}
    yield served
    subprocess.run(["rm", "-rf", *(str(path) for path in served.home.iterdir() if path.name not in kept)], check=True)
    subprocess.run(["rm", "-rf", "/tmp/.cache"], check=True)


def reach(name: str = "box") -> object:
    """Any verb that needs nothing on the host."""
    with connection.connect(find_target(name)) as agent:
        return agent.call("history")


def refused(kind: str, name: str = "box") -> HearthError:
    with raises(kind) as caught:
        reach(name)
    return caught.value


# --- what ssh's configuration says --------------------------------------------------------------------------------


def test_included_files_are_read(box: Lab) -> None:
    (box.place / "inner").write_text((box.place / "config").read_text())
    (box.place / "config").write_text(f"Include {box.place}/inn*\n")
    assert reach() == []


@pytest.mark.parametrize(
    "own",
    [
        "  IdentityFile /nowhere/id_work\n",
        "  IdentityFile none\n",
        "  CertificateFile /nowhere/id-cert.pub\n",
        "  LocalForward 8188 127.0.0.1:8188\n  ExitOnForwardFailure yes\n",
        "  RemoteCommand tmux\n  RequestTTY force\n",
        "  StdinNull yes\n  ForkAfterAuthentication yes\n  SessionType none\n",
        "  LogLevel DEBUG3\n",
        "  LogLevel QUIET\n",
        "  ControlMaster auto\n  ControlPath /nowhere/%C\n",
        "  PermitLocalCommand yes\n  LocalCommand echo hello\n",
        "  ProxyCommand sh -c 'H=localhost; exec python3 -c \"$HEARTH_RELAY\" %p'\n",
        "  IdentityFile ~/.ssh/none # a comment\n",
    ],
)
def test_ssh_options_are_accepted(box: Lab, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = Path(__file__).with_name("relay.py").read_text()
    monkeypatch.setenv("HEARTH_RELAY", relay)
    box.configure(own=own)
    assert reach() == []


def test_ssh_configuration_may_have_any_encoding(box: Lab) -> None:
    config = box.place / "config"
    config.write_bytes(b"# mein B\xfcro\r\n" + config.read_bytes())
    known = box.place / "known_hosts"
    known.write_bytes(b"# B\xfcro\nb\xfcro.example ssh-ed25519 AAAA\n" + known.read_bytes())
    assert reach() == []


@pytest.mark.parametrize("broken", ["\ufeffHost x\n", 'IdentityFile "unbalanced\n', "NoSuchOption yes\n"])
def test_invalid_ssh_configuration_is_reported(box: Lab, broken: str) -> None:
    box.configure(first=broken)
    error = refused("unreachable")
    assert "cannot read its configuration" in error.what
    assert f"{box.place}/config" in error.cause


def test_host_key_alias_is_used(box: Lab) -> None:
    box.configure(own="  HostKeyAlias labbox\n")
    box.know(box.public("host"), name="labbox")
    assert reach() == []
    box.know(box.public("other"), name="labbox")
    assert "ssh-keygen -R 'labbox'" in refused("host-key").hint


@pytest.mark.parametrize("written", ['"{}/my lab/kh"', "{}/%n/kh"])
def test_names_of_known_hosts_files_are_read_as_ssh_reads_them(box: Lab, written: str) -> None:
    for folder in ("my lab", "lab"):
        (box.place / folder).mkdir(exist_ok=True)
        (box.place / folder / "kh").write_text(f"[127.0.0.1]:{box.port} {box.public('host')}\n")
    box.know(box.public("other"))
    box.configure(own=f"  UserKnownHostsFile {written.format(box.place)}\n")
    assert reach() == []


@contextmanager
def key_agent(box: Lab, *keys: str) -> Iterator[str]:
    socket = str(box.place / "agent.sock")
    process = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL)
    try:
        while not Path(socket).exists():
            time.sleep(0.01)
        for key in keys:
            words = ["ssh-add", "-q", str(box.place / key)]
            subprocess.run(words, env={**os.environ, "SSH_AUTH_SOCK": socket}, check=True, capture_output=True)
        yield socket
    finally:
        process.terminate()
        process.wait()
        Path(socket).unlink(missing_ok=True)


def test_an_identity_agent_is_asked(box: Lab) -> None:
    with key_agent(box, "client") as socket:
        box.configure(own=f"  IdentityAgent {socket}\n", key="")
        assert reach() == []


def test_a_public_key_names_one_of_many_in_the_agent(box: Lab) -> None:
    """sshd closes the connection after three keys, and ours is the sixth."""
    others = [f"another{number}" for number in range(5)]
    for name in others:
        if not (box.place / name).exists():
            box.make_key(name)
    with key_agent(box, *others, "client") as socket:
        (box.place / "named.pub").write_text((box.place / "client.pub").read_text())
        box.configure(own=f"  IdentityAgent {socket}\n", key="named.pub")
        assert reach() == []


def test_certificate_file_is_used(box: Lab) -> None:
    box.serve(f"TrustedUserCAKeys {box.place}/ca.pub\nAuthorizedKeysFile none\n")
    error = refused("unreachable")
    assert f"SSH authentication failed for {box.login} on box" in error.what
    certify(box, "-I", "me", "-n", box.login, key="client")
    folder = box.place / "elsewhere"
    folder.mkdir(exist_ok=True)
    (box.place / "client-cert.pub").rename(folder / "me-cert.pub")
    box.configure(own=f"  CertificateFile {folder}/me-cert.pub\n")
    assert reach() == []


def test_jump_hosts_are_chained_and_each_key_is_checked(box: Lab) -> None:
    jumps = "".join(
        f"Host {name}\n  HostName 127.0.0.1\n  Port {box.port}\n  User {box.login}\n  IdentityFile {box.place}/client\n"
        f"  GlobalKnownHostsFile /dev/null\n  UserKnownHostsFile {box.place}/{known}\n"
        for name, known in (("first", "known_hosts"), ("second", "known_second"))
    )
    (box.place / "known_second").write_text((box.place / "known_hosts").read_text())
    box.configure(jumps, own="  ProxyJump first,second\n")
    assert reach() == []
    (box.place / "known_second").write_text("")
    assert "the host key of a jump host of box is not known" in refused("host-key").what
    (box.place / "known_second").write_text(f"[127.0.0.1]:{box.port} {box.public('other')}\n")
    assert "the host key of a jump host of box has CHANGED" in refused("host-key").what
    box.configure(
        jumps.replace(f"{box.place}/client\n", "/dev/null\n  IdentitiesOnly yes\n"), own="  ProxyJump first\n"
    )
    assert "SSH authentication failed" in refused("unreachable").what


def test_hosts_toml_overrides_ssh_configuration(box: Lab) -> None:
    listed = box.place / "hosts.toml"
    text = listed.read_text()
    listed.write_text(text.replace('"lab"\n', f'"127.0.0.1"\nuser = "{box.login}"\nssh_port = {box.port}\n'))
    config = box.place / "config"
    config.write_text(config.read_text().replace("Host lab", "Host 127.0.0.1").replace("Port", "Port 1\n#"))
    try:
        assert reach() == []
    finally:
        listed.write_text(text)


def test_one_session_at_a_time_is_enough(box: Lab) -> None:
    box.serve("MaxSessions 1\n")
    with connection.connect(find_target("box")) as agent:
        assert [agent.call("history") for _ in range(3)] == [[], [], []]


def test_a_missing_ssh_names_its_package(box: Lab) -> None:
    done = box.inv("facts", "--host", "box", PATH="/nowhere")
    assert done.returncode == 25, done.stderr
    assert "install openssh-client" in done.stderr


@pytest.mark.usefixtures("box")
def test_connection_leaves_no_files() -> None:
    with connection.connect(find_target("box")) as agent:
        agent.call("history")
        assert len(masters(agent)) == 1
    assert within(5, lambda: not masters(agent))


# --- host keys ----------------------------------------------------------------------------------------------------


def certify(box: Lab, *words: str, key: str) -> None:
    sign = ["ssh-keygen", "-q", "-s", str(box.place / "ca"), *words, str(box.place / f"{key}.pub")]
    subprocess.run(sign, check=True, capture_output=True)


@pytest.mark.parametrize(
    "line",
    [
        "@cert-authority *.corp.example {other}",
        "@revoked * {other}",
        "box.example ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI",
        "box.example ssh-nonsense AAAA",
        "one",
        "@nonsense x y z",
    ],
)
def test_known_hosts_lines_of_others_are_ignored(box: Lab, line: str) -> None:
    box.know(box.public("host"), line.format(other=box.public("other")) + "\n")
    assert reach() == []


def test_hashed_names_are_known(box: Lab) -> None:
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(box.place / "known_hosts")], check=True, capture_output=True)
    assert "127.0.0.1" not in (box.place / "known_hosts").read_text()
    assert reach() == []


@pytest.mark.parametrize("strict", ["", "  StrictHostKeyChecking no\n", "  StrictHostKeyChecking accept-new\n"])
def test_a_changed_key_is_refused_whatever_is_configured(box: Lab, strict: str) -> None:
    box.configure(own=strict)
    box.know(box.public("other"))
    error = refused("host-key")
    assert "has CHANGED" in error.what
    assert "SHA256:" in error.cause
    assert "known_hosts:1" in error.cause
    assert f"ssh-keygen -R '[127.0.0.1]:{box.port}'" in error.hint


def test_a_revoked_key_is_refused(box: Lab) -> None:
    box.know(box.public("host"), f"@revoked * {box.public('host')}\n")
    assert "is revoked" in refused("host-key").what


def test_unknown_key_is_refused_by_default(box: Lab) -> None:
    known = box.place / "known_hosts"
    known.write_text("")
    error = refused("host-key")
    assert "is not known" in error.what
    assert f"ssh-keyscan -p {box.port} 127.0.0.1" in error.hint
    box.configure(own="  StrictHostKeyChecking accept-new\n")
    assert reach() == []
    assert str(box.port) in known.read_text()


def test_a_host_certificate_counts_when_its_authority_is_known(box: Lab) -> None:
    certify(box, "-h", "-I", "host", "-n", "127.0.0.1", key="host")
    box.serve(f"HostCertificate {box.place}/host-cert.pub\n")
    authority = f"@cert-authority [127.0.0.1]:{box.port} {box.public('ca')}\n"
    (box.place / "known_hosts").write_text(authority)
    assert reach() == []
    certify(box, "-h", "-I", "host", "-n", "elsewhere", key="host")
    box.serve(f"HostCertificate {box.place}/host-cert.pub\n")
    error = refused("host-key")
    assert "certificate" in error.what
    (box.place / "known_hosts").write_text("")
    assert "is not known" in refused("host-key").what


# --- login shells -------------------------------------------------------------------------------------------------


SHELLS = ("/bin/sh", "/bin/bash", "/usr/bin/zsh", "/usr/bin/fish", "/usr/bin/tcsh")


def sudo(box: Lab, rule: str, *defaults: str) -> None:
    """Grant the login a sudo rule. Every sudo test uses it, and the lab removes it at the end."""
    text = "".join(f"Defaults:{box.login} {each}\n" for each in defaults)
    path = Path(f"/etc/sudoers.d/{box.login}")
    path.write_text(text + (f"{box.login} {rule}\n" if rule else ""))
    path.chmod(0o440)


FREE = "ALL=(ALL) NOPASSWD: ALL"
ASKED = "ALL=(ALL) ALL"


@pytest.mark.parametrize("password", ["", "secret"])
@pytest.mark.parametrize("name", ["box", "rooted"])
@pytest.mark.parametrize("path", SHELLS)
def test_any_login_shell_works(box: Lab, path: str, name: str, password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    box.use_shell(path)
    sudo(box, FREE)
    monkeypatch.setattr(passwords, "known", {"rooted": password})
    with connection.connect(find_target(name), ask_sudo=True) as agent:
        assert agent.call("history") == []
        assert isinstance(agent, connection.Ssh)
        assert agent.shell(
            """test -d "$HOME" && echo 'a  b' "$HOME" | tr a-b A-B""", print
        ) == f"A  B {box.home}\n".replace(str(box.home), str(box.home).translate(str.maketrans("ab", "AB")))


NOISE = "printf 'Welcome to the lab'; echo '{\"error\": 1}'; echo 'sudo: password' >&2; cd /tmp\n"


@pytest.mark.parametrize(("path", "file"), [("/bin/bash", ".bashrc"), ("/usr/bin/zsh", ".zshenv")])
def test_shell_start_files_may_print_and_change_folder(box: Lab, path: str, file: str) -> None:
    """They change to a world-writable folder: no file there is used."""
    box.use_shell(path)
    box.write(file, NOISE)
    planted = Path("/tmp/.cache/hearth") / archive.agent_name()
    planted.parent.mkdir(parents=True)
    planted.write_text("raise SystemExit('planted')")
    assert reach() == []
    assert planted.read_text().startswith("raise")
    with connection.connect(find_target("box")) as agent:
        assert isinstance(agent, connection.Ssh)
        said: list[str] = []
        assert agent.shell("echo here; echo there >&2", said.append) == "here\n"
        assert said == ["there"]
        content = bytes(range(256)) * 1000 + b"no line end"
        agent.put(content, ".cache/hearth/x/blob")
        agent.get(".cache/hearth/x/blob", box.place / "blob", 10**9)
        assert (box.place / "blob").read_bytes() == content


def test_login_without_shell_has_its_own_error(box: Lab) -> None:
    box.use_shell("/usr/sbin/nologin")
    error = refused("step-failed")
    assert "the login shell on box does not run commands" in error.what
    assert "not available" in error.cause


def test_foreign_output_has_its_own_error(box: Lab) -> None:
    box.write(".bashrc", "(sleep 0.05; while sleep 0.01; do echo tick; done) &\n")
    fake_python(box, "echo '[]'; sleep 0.5")
    assert "is not JSON" in refused("step-failed").what


# --- the host's Python and sudo -----------------------------------------------------------------------------------


def fake_python(box: Lab, script: str) -> None:
    box.write("bin/python3", f"#!/bin/sh\n{script}\n", 0o755)
    path = box.home / ".bashrc"
    box.write(".bashrc", f"PATH=~/bin:$PATH\n{path.read_text() if path.exists() else ''}")


def test_missing_python_has_its_own_error(box: Lab) -> None:
    only_without(box, "python3")
    assert "box has no python3" in refused("step-failed").what


def only_without(box: Lab, program: str) -> None:
    """Give the login all programs except this one."""
    box.write(".bashrc", f"mkdir -p ~/bin; ln -sf /usr/bin/* ~/bin; rm -f ~/bin/{program}; PATH=~/bin\n")


@pytest.mark.parametrize("version", ["3.8.18", "3.9.2"])
def test_old_python_has_its_own_error(box: Lab, version: str) -> None:
    """The version is checked before any module of the agent is parsed."""
    numbers = ", ".join(version.split("."))
    start = f"import sys; sys.version_info = ({numbers}, 'final', 0); sys.version = '{version} x'"
    fake_python(box, f'shift 3; exec /usr/bin/python3 -c "{start}; exec(sys.argv.pop(1))" "$@"')  # without -I -S -c
    assert f"python3 on box is {version}; Hearth needs 3.10" in refused("step-failed").what


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'error while loading shared libraries: libpython3.11.so.1.0' >&2; exit 127", "cannot be started"),
        ("echo 'conda: no environment is active' >&2; exit 1", "ended with 1"),
        ("kill -9 $$", "was killed by SIGKILL"),
    ],
)
def test_broken_python_has_its_own_error(box: Lab, script: str, says: str) -> None:
    fake_python(box, script)
    error = refused("step-failed")
    assert says in error.what
    assert not script.startswith("echo") or script.split("'")[1] in error.cause


@contextmanager
def password(box: Lab, monkeypatch: pytest.MonkeyPatch, text: str) -> Iterator[list[str]]:
    """The attempts in sudo's log with this password."""
    log = Path(f"/var/log/{box.login}.sudo")
    log.unlink(missing_ok=True)
    monkeypatch.setattr("getpass.getpass", lambda _: text)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    passwords.known.clear()
    seen: list[str] = []
    yield seen
    passwords.known.clear()
    if log.exists():
        seen += [line for line in log.read_text().splitlines() if "incorrect password" in line]
        log.unlink()


def rooted() -> object:
    with connection.connect(find_target("rooted"), ask_sudo=True) as agent:
        return agent.call("history")


def test_sudo_password_reaches_only_sudo(box: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for defaults in (
        (),
        ("timestamp_timeout=0",),
        ("timestamp_type=tty",),
        ("!tty_tickets", "use_pty"),
        ("lecture=always",),
    ):
        sudo(box, ASKED, f"logfile=/var/log/{box.login}.sudo", *defaults)
        with password(box, monkeypatch, box.password) as failures:
            assert rooted() == []
        assert failures == []
    assert not list((box.home / ".cache/hearth").glob("in.*"))


def test_a_wrong_sudo_password_is_one_failed_attempt(box: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    sudo(box, ASKED, f"logfile=/var/log/{box.login}.sudo")
    with password(box, monkeypatch, "wrong") as failures, raises("sudo") as caught:
        rooted()
    assert "does not accept the password" in caught.value.what
    assert len(failures) == 1
    assert "1 incorrect password attempt" in failures[0]
    assert not list((box.home / ".cache/hearth").glob("in.*"))


@pytest.mark.parametrize(
    ("rule", "program", "says"),
    [
        ("", "", "may not use sudo"),
        ("ALL=(ALL) /bin/true", "", "may not use sudo"),
        (ASKED, "", "does not give .* root"),
        (FREE, "sudo", "has no sudo"),
    ],
)
def test_sudo_refusal_has_its_own_error(
    box: Lab, rule: str, program: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sudo(box, rule)
    if program:
        only_without(box, program)
    given = box.password if "may not" in says else ""
    monkeypatch.setattr(passwords, "known", {"rooted": given})
    with raises("sudo", match=says):
        rooted()


# --- the agent's file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["box", "rooted"])
def test_incomplete_agent_is_sent_again(box: Lab, name: str) -> None:
    sudo(box, FREE)
    reach(name)
    (path,) = (box.home / ".cache/hearth").glob("agent-*.pyz")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"open('/tmp/planted', 'w')\n", whole + b"more"):
        path.write_bytes(content)
        assert reach(name) == []
        assert path.read_bytes() == whole
    path.unlink()
    path.mkdir()  # mv cannot replace that
    assert "could not be written" in refused("step-failed", name).what
    assert not Path("/tmp/planted").exists()


def test_file_is_sent_completely_after_a_missing_agent(box: Lab) -> None:
    """The first attempt reads part of the file; the second must start from the beginning."""
    blob = box.place / "blob"
    blob.write_bytes(os.urandom(3_000_000))
    digest = hashlib.sha256(blob.read_bytes()).hexdigest()
    with connection.connect(find_target("box")) as agent:
        agent.send(blob, digest, 0, lambda _: None)
    (there,) = box.home.glob(f".local/share/hearth/comfyui/state/incoming/{digest}")
    assert there.read_bytes() == blob.read_bytes()


def test_writable_folder_is_closed_first(box: Lab) -> None:
    reach()
    folder = box.home / ".cache/hearth"
    folder.chmod(0o777)
    assert reach() == []
    assert folder.stat().st_mode & 0o022 == 0


def test_interrupted_upload_leaves_nothing(box: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with connection.connect(find_target("box")) as agent:
        assert isinstance(agent, connection.Ssh)
        agent.put(b"old", ".cache/hearth/x/blob")

        def cut(**_: object) -> Iterator[bytes]:
            yield b"part of it"
            raise KeyboardInterrupt

        session = agent._session
        monkeypatch.setattr(agent, "_session", lambda script, *_, **__: session(script, b"", cut))
        with pytest.raises(KeyboardInterrupt):
            agent.put(b"new" * 1000, ".cache/hearth/x/blob")
    folder = box.home / ".cache/hearth/x"
    assert within(5, lambda: [each.name for each in folder.iterdir()] == ["blob"])
    assert (folder / "blob").read_bytes() == b"old"


# --- connections that break ---------------------------------------------------------------------------------------


def following(box: Lab, monkeypatch: pytest.MonkeyPatch, act: Callable[[connection.Agent], None]) -> HearthError:
    """The error that ends a watched run if the connection breaks after the first event."""
    monkeypatch.setattr(connection, "ALIVE", 1)
    monkeypatch.setattr(connection, "QUIET", 6)
    state = box.home / ".local/share/hearth/comfyui/state"
    box.write(".local/share/hearth/comfyui/state/runs/r1.jsonl", '{"event": "step", "step": 0, "title": "x"}\n')
    box.write(".local/share/hearth/comfyui/state/pending.json", '{"run": "r1"}')
    lock = subprocess.Popen(["flock", str(state / "lock"), "sleep", "100"])  # as the applying process holds it
    try:
        with pytest.raises(HearthError) as caught, connection.connect(find_target("box")) as agent:
            for event in agent.stream("follow", run="r1"):
                if event["event"] == "step":
                    act(agent)
    finally:
        lock.kill()
        lock.wait()
    return caught.value


def masters(agent: connection.Agent) -> list[int]:
    """The processes of this agent's shared connection."""
    assert isinstance(agent, connection.Ssh)
    (path,) = (word.partition("=")[2] for word in agent._argv if word.startswith("ControlPath="))
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if each.read_bytes().startswith(f"ssh: {path} ".encode()):
                found.append(int(each.parent.name))
    return found


def signal_all(pids: list[int], number: int) -> None:
    assert pids
    for each in pids:
        os.kill(each, number)


@pytest.mark.parametrize("what", ["agent", "server", "connection"])
def test_lost_connection_suggests_attach(box: Lab, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = {
        "agent": lambda _: box.processes("follow"),
        "server": lambda _: box.processes("sshd:"),
        "connection": masters,
    }
    error = following(box, monkeypatch, lambda agent: signal_all(kills[what](agent), signal.SIGKILL))
    assert error.kind == "unreachable"
    assert "inv attach --host box" in error.hint


@pytest.mark.parametrize("what", ["follow", "sshd:"])
@pytest.mark.parametrize("jump", [False, True])
def test_silent_host_is_detected(box: Lab, what: str, jump: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP: no FIN and no RST, as after a power cut. Behind a jump host, TCP's own time-outs do not detect that."""
    if jump:
        relay = Path(__file__).with_name("relay.py")
        box.configure(own=f"  ProxyCommand {sys.executable} {relay} %p\n")
    stopped: list[int] = []

    def stop(_: connection.Agent) -> None:
        stopped.extend(box.processes(what))
        signal_all(stopped, signal.SIGSTOP)

    begun = time.monotonic()
    try:
        error = following(box, monkeypatch, stop)
    finally:
        signal_all(stopped, signal.SIGKILL)
    assert error.kind == "unreachable"
    assert "inv attach --host box" in error.hint
    assert time.monotonic() - begun < 60


def test_unreachable_and_unknown_hosts_have_distinct_errors(box: Lab) -> None:
    box.serve()
    box.stop()
    assert "cannot be reached" in refused("unreachable").what
    box.configure(own="  HostName no-such-host.invalid\n")
    error = refused("unreachable")
    assert "resolve" in error.cause
    box.configure(own="  ProxyCommand no-such-program\n")
    assert "no-such-program" in refused("unreachable").cause


def test_silent_ssh_server_times_out(box: Lab) -> None:
    box.stop()
    with socket.create_server(("127.0.0.1", box.port)):
        begun = time.monotonic()
        with raises("unreachable"), connection.connect(find_target("box"), seconds=2) as agent:
            agent.call("history")
        assert time.monotonic() - begun < 60


@pytest.mark.usefixtures("box")
def test_lost_connection_is_reopened_between_verbs() -> None:
    with connection.connect(find_target("box")) as agent:
        assert agent.call("history") == []
        signal_all(masters(agent), signal.SIGKILL)
        assert within(5, lambda: not masters(agent))
        assert agent.call("history") == []
