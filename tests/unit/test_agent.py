"""The agent's own rules, with a real uv and real wheels."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pwd
import shutil
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent import journal, processes
from agent.change import env, runs, trees
from agent.files import AgentError, Json, append, record, write
from agent.layout import Layout
from agent.look import prefix
from agent.processes import last_of, run
from agent.schema.change import Env, Node, Serve, WheelFile, packed
from agent.schema.records import Event, Plan, Proven
from agent.serve import health, managers, supervised


def at(place: Path) -> Layout:
    return Layout({"prefix": str(place), "service": "s", "scope": "user", "user": "", "address": "", "port": 1})


def wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    """A minimal wheel with these files."""
    info = f"{name}-1.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-1-py3-none-any.whl"
    record = f"{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in {**files, **meta}.items():
            archive.writestr(each, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
            record += f"{each},sha256={digest},{len(text)}\n"
        archive.writestr(f"{info}/RECORD", record)
    return path


def make(tmp_path: Path, one: dict[str, str], two: dict[str, str], **values: Any) -> Path:
    """Create an environment of the wheels `one` and `two`, without a network as on a host; returns the part."""
    layout = Layout({"prefix": str(tmp_path), "service": "s", "scope": "user", "user": "", "address": "", "port": 1})
    uv = shutil.which("uv")
    assert uv
    (layout.state / "tools").mkdir(parents=True, exist_ok=True)
    (layout.state / "tools/uv").symlink_to(uv)
    layout.incoming.mkdir()
    wheels, lines = list[WheelFile](), list[str]()
    for name, files in (("one", one), ("two", two)):
        path = wheel(tmp_path, name, files)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(layout.incoming / digest)
        wheels.append(WheelFile(path.name, digest))
        lines.append(f"{name}==1 --hash=sha256:{digest}\n")
    return environment(layout, "".join(lines), wheels=tuple(wheels), **values)


def environment(layout: Layout, requirements: str, **values: Any) -> Path:
    """An environment of these requirements, created without a network unless `offline` says otherwise."""
    step = Env("t", "w", "u", "env-test", sys.executable, False, requirements, (), "3.11", (), tool="uv", offline=True)
    env.env(layout, replace(step, **values), lambda _: None)
    return layout.parts / "env-test"


def test_packages_that_overwrite_each_others_modules_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(AgentError) as raised:
        make(tmp_path, {"cv2/__init__.py": "whose = 1"}, {"cv2/__init__.py": "whose = 2"})
    report = raised.value.report
    assert report["what"] == "one and two both install cv2/__init__.py; one has overwritten the other's"
    assert "[override.two]" in report["hint"]
    assert not list((tmp_path / "parts").iterdir())


def test_packages_may_share_harmless_files(tmp_path: Path) -> None:
    shared = {"space/__init__.py": "", "LICENSE": "a"}
    one = {**shared, "space/one.py": "", "tests/__init__.py": "a = 1"}
    two = {**shared, "space/two.py": "", "tests/__init__.py": "a = 2", "LICENSE": "b"}
    place = make(tmp_path, one, two)
    assert {path.name for path in place.glob("lib/*/site-packages/space/*.py")} == {"__init__.py", "one.py", "two.py"}


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (["A", "B", "C"], ["node types that no longer exist: C"]),  # as an older Hearth stored them
        (
            {"A": "custom_nodes.one", "B": "comfy_extras.old", "C": "nodes"},
            [
                "node types that no longer exist: C",
                "node types that are provided by another node now: A (two, before one)",
            ],
        ),
        ({"A": "custom_nodes.two", "B": "comfy_extras.new"}, []),
    ],
)
def test_removed_and_moved_node_types_are_reported(before: object, said: list[str]) -> None:
    after = {"A": "custom_nodes.two", "B": "comfy_extras.new"}
    notes: list[str] = []
    health.report_changed_types(Proven(types=before), Proven(types=after), notes.append)
    assert [note.replace("custom_nodes.", "") for note in notes] == said


def test_node_types_that_comfyui_replaces_are_told_apart() -> None:
    notes: list[str] = []
    new = Proven(types={"A": "nodes"}, replaced={"Old": "A", "A": "B", "Never": "A"})
    health.report_changed_types(Proven(types={"A": "nodes", "Old": "nodes", "Gone": "nodes"}), new, notes.append)
    assert notes == ["node types that no longer exist: Gone", "node types that ComfyUI replaces in workflows: Old (A)"]


def test_torn_history_line_is_skipped(tmp_path: Path) -> None:
    layout = at(tmp_path)
    assert journal.last(journal.history(layout)) == {}
    append(layout.history, {"action": "deploy", "run": "1"})
    with layout.history.open("a") as file:
        file.write('{"action": "depl')
    assert journal.last(journal.history(layout))["run"] == "1"
    append(layout.history, {"action": "restart", "run": "3"})
    assert [each["run"] for each in journal.history(layout)] == ["1", "3"]
    assert journal.last(journal.history(layout), *journal.DEPLOYS)["run"] == "1"


def test_following_a_run_ends_if_it_cannot_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = at(tmp_path)
    write(layout.pending, json.dumps({"run": "r"}))
    started: list[Layout] = []
    monkeypatch.setattr("agent.change.runs.time.sleep", lambda _: None)
    manager = SimpleNamespace(start_apply=lambda: started.append(layout), apply_log=lambda: ["Traceback"])
    monkeypatch.setattr("agent.change.runs.manager_of", lambda _: manager)
    following = runs.follow(layout, "r")
    assert [next(following) for _ in range(3)] == [Event("alive")] * 3
    with pytest.raises(AgentError, match="fails at every start") as raised:
        next(following)
    assert raised.value.report["log"] == ["Traceback"]
    assert len(started) == 3


def test_following_reads_each_journal_line_once(tmp_path: Path) -> None:
    layout = at(tmp_path)
    log = journal.Journal(layout, "r")
    for number in range(3):
        log.add(Event("note", text=str(number)))
    following = runs.follow(layout, "r")
    assert [next(following).text for _ in range(3)] == ["0", "1", "2"]
    log.path.write_bytes(b" " * log.path.stat().st_size)  # returned events are not read again
    with log.path.open("ab") as file:
        file.write(b'{"event": "no')  # an incomplete record
    log.add(Event("note", text="3"))
    log.add(Event("end", result="done"))
    assert [each.text for each in following] == ["3", ""]


def test_notes_and_errors_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = at(tmp_path)

    def chatty(_: Layout, __: Json, note: Callable[[str], None]) -> None:
        for _number in range(3 * runs.NOTES):
            note("x" * 1_000_000)
        raise AgentError("step", "y" * 1_000_000, "z" * 1_000_000)

    monkeypatch.setitem(runs.STEPS, "serve", chatty)
    log = journal.Journal(layout, "r")
    error = runs._carry_out(layout, Plan(steps=(packed(Serve("t", "w", "u")),)), log)
    assert len(json.dumps(error)) < 30_000
    assert log.path.stat().st_size < 3_000_000
    assert log.events()[-1].text == "further notes are omitted"


def test_long_line_in_log_is_read_partly(tmp_path: Path) -> None:
    layout = at(tmp_path)
    manager = supervised.Supervised(layout)
    write(manager.output, "")
    os.truncate(manager.output, 4_000_000_000)
    with manager.output.open("a") as file:
        file.write("\n" + "x" * 5000 + "\nlast\n")
    assert manager.log(2) == ["x" * 2000, "last"]
    assert [line for _, line in manager.timed_log(25)][-1] == "last"
    assert last_of(["sh", "-c", "echo last; tr '\\0' x </dev/zero"], 5)[-1] == "last"
    assert last_of(["yes"], 3) == ["y"] * 3
    with pytest.raises(AgentError, match="sh -c echo"):
        last_of(["sh", "-c", "echo no >&2; exit 1"], 5)


def test_last_words_fall_back_to_the_previous_run(tmp_path: Path) -> None:
    manager = supervised.Supervised(at(tmp_path))
    write(manager.output, "starting\nI am broken\n")
    write(manager.record, json.dumps({"offset": manager.output.stat().st_size}))
    assert manager.log(25) == []
    assert managers.last_words(manager) == ["starting", "I am broken"]
    with manager.output.open("a") as log:
        log.write("once more\n")
    assert managers.last_words(manager) == ["once more"]


MISLEADING = {
    "options": 'exclude-newer = "2001-01-01T00:00:00Z"\nrequired-version = ">=99"\nlink-mode = "symlink"\n'
    '[pip]\ntarget = "{elsewhere}"\nprefix = "{elsewhere}"\nno-binary = [":all:"]\npython-version = "3.8"\n',
    "not TOML": "[[[",
}


@pytest.mark.process
@pytest.mark.parametrize("text", MISLEADING.values(), ids=MISLEADING)
def test_uv_configuration_does_not_change_an_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "config/uv").mkdir(parents=True)
    (tmp_path / "config/uv/uv.toml").write_text(text.format(elsewhere=tmp_path / "elsewhere"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    installed_whole(make(tmp_path, {"one.py": ""}, {"two.py": ""}))
    assert not (tmp_path / "elsewhere").exists()


def installed_whole(place: Path) -> None:
    found = [*place.glob("lib/*/site-packages/one.py"), *place.glob("lib/*/site-packages/two.py")]
    assert len(found) == 2
    assert not any(path.is_symlink() for path in found)


def test_the_callers_variables_do_not_change_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UV_CONSTRAINT", "UV_BUILD_CONSTRAINT", "UV_CONFIG_FILE", "UV_WORKING_DIRECTORY", "UV_OVERRIDE"):
        monkeypatch.setenv(name, str(tmp_path / "missing"))
    for name, value in {"UV_EXCLUDE_NEWER": "2001-01-01", "UV_LINK_MODE": "symlink", "UV_NO_BINARY": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("VIRTUAL_ENV", "PYTHONPYCACHEPREFIX", "PYTHONHOME", "PYTHONPATH"):
        monkeypatch.setenv(name, str(tmp_path / "other"))
    place = make(tmp_path, {"one.py": ""}, {"two.py": ""})
    installed_whole(place)
    assert list(place.glob("lib/*/site-packages/__pycache__/one.*.pyc"))
    assert not (tmp_path / "other").exists()


@pytest.mark.process
def test_untrusted_index_certificate_has_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-days", "1"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    layout = at(tmp_path)
    (layout.state / "tools").mkdir(parents=True, exist_ok=True)
    (layout.state / "tools/uv").symlink_to(str(shutil.which("uv")))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"https://127.0.0.1:{server.server_port}/simple")
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        with pytest.raises(AgentError) as raised:
            environment(layout, f"one==1 --hash=sha256:{'a' * 64}\n", offline=False)
    finally:
        server.shutdown()
        server.server_close()
        serving.join()
    assert raised.value.report["kind"] == "step"  # not "offline": the client would send gigabytes instead
    assert "does not trust the certificate" in raised.value.report["what"]
    assert "invalid peer certificate" in raised.value.report["cause"]
    assert "update-ca-certificates" in raised.value.report["hint"]
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:1/simple")
    with pytest.raises(AgentError) as raised:
        environment(layout, f"one==1 --hash=sha256:{'a' * 64}\n", offline=False)
    assert raised.value.report["kind"] == "offline"


def test_programs_get_an_allow_list_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/x")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    names = {line.partition("=")[0] for line in run(["env"], {"OWN": "1"}).splitlines()}
    assert {"PATH", "OWN", "XDG_RUNTIME_DIR"} <= names
    assert not {"HF_TOKEN", "LD_LIBRARY_PATH"} & names
    assert run(["/usr/bin/env"], {"OWN": "1"}, inherit=False) == "OWN=1\n"


def test_program_time_out_is_an_error(tmp_path: Path) -> None:
    began = time.monotonic()
    script = f"sleep 60 & echo $! > {tmp_path}/pid; wait"
    with pytest.raises(AgentError, match=r"sh -c .* did not end within 1 s"):
        run(["sh", "-c", script], timeout=1)
    assert time.monotonic() - began < 10  # although its child holds the pipe
    pid = (tmp_path / "pid").read_text().strip()
    assert processes.wait_for(lambda: gone(Path(f"/proc/{pid}/status")), 5)


def gone(status: Path) -> bool:
    """Whether a process has ended, even if it has not been reaped yet."""
    return not status.exists() or "\nState:\tZ" in status.read_text()


def installed(tmp_path: Path, script: str) -> Path:
    """Run an install.py in a node's tree; returns the tree."""
    layout, place = at(tmp_path), tmp_path / "tree"
    place.mkdir()
    (place / "install.py").write_text(script)
    (layout.parts / "env/bin").mkdir(parents=True)
    (layout.parts / "env/bin/python").symlink_to(sys.executable)
    step = Node("make node it", "w", "u", "it-1", sys.executable, install="env", environment={"HOME": "/nowhere"})
    trees._install(layout, step, place, lambda _: None)
    return place


def test_hanging_install_script_fails_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "INSTALL_SECONDS", 1)
    with pytest.raises(AgentError) as raised:
        installed(tmp_path, "import time; time.sleep(60)")
    assert raised.value.report["what"] == "install.py failed: make node it"
    assert "did not end within 1 s" in raised.value.report["cause"]


def test_install_script_output_keeps_only_regular_files(tmp_path: Path) -> None:
    script = """
import os
os.symlink("/etc/passwd", "link"); os.mkfifo("pipe"); os.makedirs("a/b"); open("a/b/c", "w").write("made")
os.makedirs("__pycache__"); open("__pycache__/x.pyc", "w").write("not what the source says")
open("tool", "w").close(); os.chmod("tool", 0o4755); print("on standard output")
"""
    place = installed(tmp_path, script)
    found = {str(path.relative_to(place)): path for path in place.rglob("*") if not path.is_dir()}
    assert set(found) == {"install.py", "a/b/c", "tool"}
    assert found["tool"].stat().st_mode & 0o7777 == 0o755


def test_install_script_gets_a_clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HTTPS_PROXY", "PIP_INDEX_URL", "SSH_AUTH_SOCK", "PYTHONPATH", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, "x")
    place = installed(tmp_path, "import json, os; json.dump(dict(os.environ), open('seen', 'w'))")
    seen = json.loads((place / "seen").read_text())
    assert set(seen) <= {"PATH", "HOME", "LANG", "LC_CTYPE", "PYTHONDONTWRITEBYTECODE", "XDG_CACHE_HOME", "TMPDIR"}
    assert seen["HOME"] == str(tmp_path / "state/install")


def test_prefix_state_has_deployed_settings_and_unit_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = at(tmp_path / "new")
    me = pwd.getpwuid(os.getuid()).pw_name
    layout.data.mkdir(parents=True)
    record(layout.state / "site.json", replace(layout.site, service="old", scope="system", user=me))
    told = prefix.prefix_state(layout)
    assert (told.service, told.scope, told.user, told.elsewhere) == ("old", "system", me, "")
    record(layout.state / "site.json", replace(layout.site, user="nobody"))
    assert prefix.prefix_state(layout).user == ""  # the data changed its owner since
    units = tmp_path / "home/.config/systemd/user"
    units.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    other = tmp_path / "other"
    (units / "s.service").symlink_to(other / "current/s.service")
    assert prefix.prefix_state(layout).elsewhere == ""  # deleted, or moved here
    write(other / "state/site.json", "{}")
    assert prefix.prefix_state(layout).elsewhere == str(other)
    (tmp_path / "way").symlink_to(other)
    assert prefix.prefix_state(Layout({**vars(layout.site), "prefix": str(tmp_path / "way")})).elsewhere == ""


@pytest.mark.process
@pytest.mark.parametrize(
    ("boot", "repair", "kept"), [("another boot", False, False), ("", False, True), ("", True, False)]
)
def test_uv_cache_is_deleted_if_it_may_be_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boot: str, repair: bool, kept: bool
) -> None:
    """After a power cut, because uv does not sync it, and with a damaged part, which may be hard-linked to it.

    Its replacement is where it was: /tmp is small on many machines, and an environment has gigabytes.
    """
    old = tmp_path / "state/cache/uv/old"
    write(old, "perhaps without content")
    write(tmp_path / "state/cache-in-use", boot or Path("/proc/sys/kernel/random/boot_id").read_text())
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    make(tmp_path, {"one.py": ""}, {"two.py": ""}, repair=repair)
    assert old.exists() == kept
    assert (tmp_path / "state/cache/uv/archive-v0").is_dir()
    assert not (tmp_path / "state/cache-in-use").exists()
