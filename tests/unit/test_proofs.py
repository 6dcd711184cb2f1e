"""Proofs: workflows that a release must run, against a ComfyUI that gives prepared answers."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from agent.change import trial
from agent.files import AgentError, Json
from agent.journal import history
from agent.layout import Layout
from agent.schema.change import CutOver, Proof, packed, unpacked
from agent.schema.facts import Service
from agent.schema.manifest import ReleaseManifest
from agent.serve import pictures, proofs
from core.errors import ConfigError
from deploy import host as hosts
from deploy import plan
from deploy import proofs as configured
from deploy.host import Target
from deploy.profile import Prove
from lock import workflows
from tests.plans import inputs, settled, spark
from tests.servers import RUNNING
from tests.unit.test_cutover import SCENARIOS, World

WORKFLOW: Json = {
    "1": {"class_type": "Sampler", "inputs": {"seed": 7, "model": ["4", 0]}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "mine"}},
}
PROOF = Proof("portrait.json", WORKFLOW, 20, -1, (), "", 0.05, 0)
SEEDLESS = replace(PROOF, workflow={"2": WORKFLOW["2"]})


def picture(*colours: int, size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    """A picture of vertical stripes."""
    pixels = np.resize(np.array(colours, np.uint8), size[0])
    output = io.BytesIO()
    Image.fromarray(np.broadcast_to(pixels[None, :, None], (size[1], size[0], 3)).copy()).save(output, kind)
    return output.getvalue()


STRIPES = picture(10, 200)


@dataclass
class ComfyUI:
    """Runs every workflow with the same result. `dies`: the process ends with the first one."""

    pictures: dict[str, bytes] = field(default_factory=lambda: {"a.png": STRIPES})
    messages: list[Any] = field(default_factory=list)
    status: str = "success"
    lines: list[str] = field(default_factory=lambda: ["it starts"])
    refusal: str = ""
    ends: bool = True
    dies: bool = False
    asked: list[Json] = field(default_factory=list)
    port: int = 0

    def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/prompt":
            self.asked.append(json.loads(body)["prompt"])
            return (400, self.refusal.encode()) if self.refusal else (200, b'{"prompt_id": "p"}')
        if path.startswith("/view"):
            name = path.partition("filename=")[2].partition("&")[0]
            assert path.endswith("&subfolder=hearth-gate&type=output")
            return 200, self.pictures[name]
        if not self.ends:
            return 200, b"{}"
        self.lines += ["a line"]
        listed = [{"filename": name, "subfolder": "hearth-gate", "type": "output"} for name in self.pictures]
        previews = [{"filename": "x.png", "subfolder": "", "type": "temp"}]
        times = [[f"execution_{each}", {"timestamp": at}] for each, at in (("start", 1000), ("success", 3500))]
        status = {"status_str": self.status, "messages": [*times, *self.messages]}
        outputs = {"2": {"images": listed}, "3": {"images": previews}, "4": {"text": ["words"]}}
        return 200, json.dumps({"p": {"outputs": outputs, "status": status}}).encode()

    def process(self) -> Service:
        return replace(RUNNING, active=not (self.dies and self.asked))

    def log(self, lines: int) -> list[str]:
        return self.lines[-lines:]


class Process:
    def __init__(self, comfyui: ComfyUI) -> None:
        self.status, self.log = comfyui.process, comfyui.log


@pytest.fixture
def comfyui() -> Iterator[ComfyUI]:
    found = ComfyUI()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, content = found.answer(self.path, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815  http.server's name

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield found
        server.shutdown()
        thread.join()


def run(comfyui: ComfyUI, *given: Proof) -> tuple[dict[str, float], list[str], int]:
    """Run proofs; the times, the notes, and how often the pictures were deleted."""
    layout = Layout({"prefix": "/nowhere", "service": "s", "scope": "user", "user": "", "address": "", "port": 1})
    manifest = ReleaseManifest(parts={"env": sys.prefix})
    notes: list[str] = []
    cleared: list[int] = []
    command = ["main.py", "--listen", "127.0.0.1", "--port", str(comfyui.port)]
    prover = proofs.Prover(layout, Process(comfyui), manifest, command, notes.append, lambda: cleared.append(1))
    try:
        return prover.run(given), notes, len(cleared)
    finally:
        assert len(cleared) == len(comfyui.asked)


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.mark.process
def test_a_workflow_passes_its_checks(comfyui: ComfyUI) -> None:
    comfyui.pictures["clip.mp4"] = b"not read"
    like = encoded(picture(12, 202))
    times, notes, _ = run(comfyui, replace(PROOF, images=2, size=(64, 48), like=like, within=0.01))
    assert times == {"portrait.json": 2.5}
    assert notes[0] == "proof portrait.json: 2.5 s, 2 files, the first of 64x48, 0.008 from its reference"
    first, second = comfyui.asked
    assert [each["1"]["inputs"]["seed"] for each in (first, second)] == [7, 8]
    assert first["2"]["inputs"]["filename_prefix"] == "hearth-gate/mine"
    assert PROOF.workflow["2"]["inputs"]["filename_prefix"] == "mine"
    assert unpacked(json.loads(json.dumps(packed(CutOver("t", "w", "u", 0, False, "x", "yes", (PROOF,)))))) == CutOver(
        "t", "w", "u", 0, False, "x", "yes", (PROOF,)
    )


@pytest.mark.usefixtures("here")
def test_without_a_seed_a_workflow_runs_once(comfyui: ComfyUI) -> None:
    assert run(comfyui, SEEDLESS, replace(SEEDLESS, name="b"))[0] == {"portrait.json": 2.5, "b": 2.5}
    assert len(comfyui.asked) == 2


FAILED = [
    "execution_error",
    {"node_id": "1", "node_type": "Sampler", "exception_type": "KeyError", "exception_message": "q"},
]
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "too few pictures": ({}, {"images": 2}, "made 1 file, not 2"),
    "too many pictures": ({}, {"images": 0}, "made 1 file, not 0"),
    "another size": ({}, {"size": (64, 64)}, "64x48, not 64x64"),
    "one colour": ({"pictures": {"a.png": picture(0)}}, {}, "single colour"),
    "the second of one": ({"pictures": {"a.png": STRIPES, "b.jpg": picture(9, kind="JPEG")}}, {}, "single colour"),
    "damaged": ({"pictures": {"a.png": STRIPES[:60]}}, {}, "damaged picture"),
    "unlike": ({}, {"like": encoded(picture(10, 230))}, "differs from its reference"),
    "the reference of another size": ({}, {"like": encoded(picture(10, 200, size=(64, 64)))}, "not the size"),
    "a damaged reference": ({}, {"like": encoded(STRIPES[:60])}, "could not be read"),
    "a video to compare": ({"pictures": {"a.mp4": b"x"}}, {"size": (64, 48)}, "no picture to check"),
    "a failed node": ({"status": "error", "messages": [FAILED]}, {}, "failed"),
    "interrupted": ({"status": "error"}, {}, "failed"),
    "refused": ({"refusal": '{"error": "node Sampler not found"}'}, {}, "did not run"),
    "late": ({"ends": False}, {"seconds": 1}, "did not end within 1 s"),
    "dead": ({"ends": False, "dies": True}, {}, "ComfyUI died"),
}  # fmt: skip


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads pictures in this process: another one takes a second to import numpy."""

    def read(*_: object, given: bytes, **__: object) -> bytes:
        try:
            return json.dumps(pictures.examine(io.BytesIO(given))).encode()
        except OSError as error:  # Pillow's for a damaged reference
            raise AgentError("step", "it ended with 1") from error

    monkeypatch.setattr(proofs, "sandboxed", read)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", BROKEN)
def test_a_bad_result_fails_the_proof(comfyui: ComfyUI, case: str) -> None:
    state, checks, what = BROKEN[case]
    for name, value in state.items():
        setattr(comfyui, name, value)
    with pytest.raises(AgentError) as caught:
        run(comfyui, replace(PROOF, **checks))
    assert caught.value.report["kind"] == "gate"
    assert what in caught.value.report["what"]
    assert "portrait.json" in caught.value.report["what"]
    assert not isinstance(caught.value, proofs.OutOfMemoryError)


@pytest.mark.usefixtures("here")
def test_a_picture_with_nan_fails_the_proof(comfyui: ComfyUI) -> None:
    """A PNG has no NaN: the pixels are black, and only the log tells."""
    with np.errstate(invalid="warn"), pytest.warns(RuntimeWarning) as warned:
        np.array([np.nan], np.float32).astype(np.uint8)
    answer = comfyui.answer

    def saving(path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/prompt":
            comfyui.lines.append(f"nodes.py:1: RuntimeWarning: {warned[0].message}")
        return answer(path, body)

    comfyui.lines.append(f"an earlier one: {proofs.NAN}")
    comfyui.answer = saving  # type: ignore[method-assign]
    with pytest.raises(AgentError, match="with NaN"):
        run(comfyui, PROOF)


def test_lack_of_memory_is_told_from_other_failures(comfyui: ComfyUI) -> None:
    comfyui.status = "error"
    comfyui.messages = [[FAILED[0], {**FAILED[1], "exception_type": "torch.OutOfMemoryError"}]]  # type: ignore[dict-item]
    with pytest.raises(proofs.OutOfMemoryError):
        run(comfyui, PROOF)


# --- the trial and the cut-over ------------------------------------------------------------------------------------


@dataclass
class Runs:
    """Stands in for `Prover.run`: which releases ran what, and what fails on them."""

    fails: dict[str, Exception] = field(default_factory=dict)
    seen: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, prover: proofs.Prover, given: tuple[Proof, ...]) -> dict[str, float]:
        where = "trial" if isinstance(prover.process, trial.Trial) else "gate"
        for _ in given:
            self.seen.append((where, prover.release.id))
            if error := self.fails.get(f"{where} {prover.release.id}"):
                raise error
        return {each.name: 2.0 if prover.release.id == "new" else 3.0 for each in given}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(proofs.Prover, "run", lambda prover, given: found(prover, given))
    monkeypatch.setattr(trial, "first_answer", lambda *_: {})
    monkeypatch.setattr(trial, "memory_shortage", lambda _: "")
    return found


def world(place: Path, **values: Any) -> World:
    found = World(place, SCENARIOS[0]).make()
    found.plan(proofs=[packed_proof()], **values)
    return found


def packed_proof() -> Json:
    step = packed(CutOver("", "", "", 0, False, "", "", (PROOF,)))
    return dict(step["proofs"][0])


def notes(of: World) -> list[str]:
    events = (of.site.state / "runs/r1.jsonl").read_text().splitlines()
    return [event["text"] for event in map(json.loads, events) if event["event"] == "note"]


def test_the_trial_runs_the_workflows_on_both_releases(tmp_path: Path, ran: Runs) -> None:
    host = world(tmp_path)
    assert host.apply() == 0
    assert ran.seen == [("trial", "new"), ("trial", "old")]
    assert "proof portrait.json: 2.0 s, with release old 3.0 s" in notes(host)
    assert (host.site.release(), host.faults()) == ("new", [])


def test_a_failing_proof_stops_nothing(tmp_path: Path, ran: Runs) -> None:
    ran.fails["trial new"] = AgentError("gate", "proof portrait.json failed", "why")
    host = world(tmp_path)
    assert host.apply() == 0
    (line,) = history(host.site)
    assert (line["result"], host.site.release(), host.faults()) == ("failed", "old", [])
    assert "proof portrait.json" in line["error"]
    assert not any("not healthy" in each for each in notes(host))


def test_a_failure_on_the_current_release_is_only_noted(tmp_path: Path, ran: Runs) -> None:
    ran.fails["trial old"] = AgentError("gate", "proof portrait.json failed")
    host = world(tmp_path)
    assert host.apply() == 0
    assert host.site.release() == "new"
    assert any("could not be run on release old" in each for each in notes(host))


@pytest.mark.parametrize("reason", ["no memory for a trial", "no memory for the workflow", "no trial"])
def test_without_a_trial_the_workflows_run_after_the_cut_over(tmp_path: Path, ran: Runs, reason: str) -> None:
    ran.fails["gate new"] = AgentError("gate", "proof portrait.json failed")
    host = world(tmp_path, **({"trial": "no"} if reason == "no trial" else {}))
    if reason == "no memory for a trial":
        host.short = "little"
    if reason == "no memory for the workflow":
        ran.fails["trial new"] = proofs.OutOfMemoryError("gate", "proof portrait.json failed")
    assert host.apply() == 0
    (line,) = history(host.site)
    assert (line["result"], host.site.release(), host.faults()) == ("reverted", "old", [])
    assert ran.seen[-1] == ("gate", "new")
    assert not (host.site.releases / "new/proven").exists()


def test_a_trial_alone_fails_without_memory(tmp_path: Path, ran: Runs) -> None:
    ran.fails["trial new"] = proofs.OutOfMemoryError("gate", "proof portrait.json failed")
    host = world(tmp_path, trial="only")
    assert host.apply() == 0
    assert [line["result"] for line in history(host.site)] == ["failed"]


def test_a_proof_states_the_memory_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "meminfo", lambda: {"MemAvailable": 10_000_000_000})
    monkeypatch.setattr(trial, "gpus", list)
    assert trial.memory_shortage([PROOF]) == ""
    assert "needed" in trial.memory_shortage([PROOF, replace(PROOF, memory=8_000_000_000)])


def test_the_trial_gets_the_input_files_of_its_workflows(tmp_path: Path) -> None:
    host = World(tmp_path, SCENARIOS[0]).make()
    (host.site.data / "input/faces").mkdir()
    for name in ("faces/anna.png", "other.png"):
        (host.site.data / "input" / name).write_text(name)
    (tmp_path / "secret").write_text("x")
    words = {
        "image": "faces/anna.png",
        "a": "../../../secret",
        "b": "",
        "c": "gone.png",
        "d": "faces",
        "g": f"{tmp_path}/secret",
        "e": "a\0b",
        "f": "\u6c34" * 150,
    }
    found = trial.Trial(host.site)
    found.proofs = (replace(PROOF, workflow={"1": {"class_type": "LoadImage", "inputs": words}}),)
    found.prepare(host.site.manifest("old"), host.site.data / "models")
    made = found.scratch / "input"
    assert [str(each.relative_to(made)) for each in made.rglob("*") if each.is_file()] == ["faces/anna.png"]
    assert list(found.room.rglob("secret")) == []


# --- configuration -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own checkout's folder for workflows."""
    monkeypatch.setattr(configured, "files", SimpleNamespace(CHECKOUT=tmp_path))
    found = tmp_path / "config/workflows"
    found.mkdir(parents=True)
    (found / "a.json").write_text(json.dumps(WORKFLOW))
    (found / "a.png").write_bytes(STRIPES)
    return found


SPARK = spark()


def host(*prove: Prove) -> Target:
    return replace(SPARK, profile=msgspec.structs.replace(SPARK.profile, prove=prove))


def test_entries_of_profile_and_host_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = folder / "hosts.toml"
    monkeypatch.setenv("HEARTH_HOSTS", str(written))
    monkeypatch.setattr(hosts, "profiles", lambda: {"cpu": host(Prove(file="config/workflows/a.json")).profile})
    written.write_text(
        '[hosts.box]\naddress = "box"\nprofile = "cpu"\n[[hosts.box.prove]]\nfile = "a.json"\nimages = 1\n'
        'size = "64x48"\nlike = "a.png"\nwithin = 0.1\nmemory = "24G"\n'
    )
    found = hosts.target("box")
    first, second = configured.read(found)
    assert first == replace(PROOF, name="config/workflows/a.json", seconds=300)
    assert second == Proof("a.json", WORKFLOW, 300, 1, (64, 48), encoded(STRIPES), 0.1, 24_000_000_000)
    (row,) = (each.split() for each in hosts.rows(found) if "prove" in each)
    assert row == ["prove", "=", "config/workflows/a.json,", "a.json", "profile", "cpu,", "host", "box"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no file": ({"file": "b.json"}, "no file b.json"),
    "a folder": ({"file": "config"}, "no file config"),
    "no workflow": ({"file": "text.json"}, "not a workflow"),
    "not JSON": ({"file": "a.png"}, "not a workflow"),
    "the editor's format": ({"file": "editor.json"}, "not in the API format"),
    "a workflow in a picture": ({"file": "embedded.png"}, "not in the API format"),
    "too large": ({"file": "large.json"}, "larger than 2 MB"),
    "no reference": ({"like": "b.png"}, "no file b.png"),
    "a reference that is no picture": ({"like": "a.json"}, "not a PNG, JPEG or WebP"),
    "a large reference": ({"like": "large.png"}, "larger than 8 MB"),
    "no time": ({"seconds": 0}, "seconds = 0"),
    "a negative number": ({"images": -1}, "images = -1"),
    "no size": ({"size": "64 x 48"}, "size = '64 x 48'"),
    "half a size": ({"size": "64x"}, "size = '64x'"),
    "a bound above 1": ({"within": 1.5}, "within = 1.5"),
    "no memory": ({"memory": "much"}, "memory = 'much'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_entries_are_refused(folder: Path, case: str) -> None:
    editor = {"nodes": [{"id": 1, "type": "SaveImage", "inputs": [], "widgets_values": ["x"]}], "links": []}
    (folder / "editor.json").write_text(json.dumps(editor))
    (folder / "text.json").write_text('{"a": 1}')
    (folder / "large.json").write_text(json.dumps({**WORKFLOW, "3": {"class_type": "x" * 2_000_000}}))
    (folder / "large.png").write_bytes(STRIPES + bytes(8_000_000))
    (folder / "embedded.png").write_bytes(STRIPES + json.dumps(WORKFLOW).encode())
    values, what = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        configured.read(host(Prove(**{"file": "a.json", **values})))
    assert what in caught.value.what
    assert caught.value.hint


def test_all_proofs_of_a_host_have_a_limit_and_own_names(folder: Path) -> None:
    (folder / "wide.png").write_bytes(STRIPES + bytes(7_000_000))
    for name in "bcde":
        (folder / f"{name}.json").write_text(json.dumps(WORKFLOW))
    with pytest.raises(ConfigError) as caught:
        configured.read(host(*(Prove(file=f"{name}.json", like="wide.png") for name in "bcde")))
    assert "37 MB" in caught.value.what
    with pytest.raises(ConfigError, match="twice"):
        configured.read(host(Prove(file="a.json"), Prove(file="a.json")))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_api_format_is_read_in_every_form(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"prompt": {**WORKFLOW, "5": {"class_type": "Empty"}}}), encoding=encoding)
    assert workflows.read_api(path) == {**WORKFLOW, "5": {"class_type": "Empty", "inputs": {}}}


def test_plans_contain_the_proofs() -> None:
    stock = replace(inputs(), proofs=(PROOF,))
    changed = replace(settled(), current="", releases=(), proven=())
    found = plan.make(spark(), changed, stock, plan.Options())
    (step,) = (each for each in found.steps if isinstance(each, CutOver))
    assert step.proofs == (PROOF,)
    assert any("portrait.json" in note for note in found.notes)
    back = plan.back(spark(), replace(settled(), current=""), settled().current, plan.Options())
    assert any(isinstance(each, CutOver) and each.proofs == () for each in back.steps)


def test_a_changed_proof_deploys_nothing() -> None:
    stock = replace(inputs(), proofs=(PROOF,))
    target = host(Prove(file="other.json"))
    assert plan.make(target, settled(), stock, plan.Options()).steps == ()
    (tried,) = plan.make(target, settled(), stock, plan.Options(trial="only")).steps
    assert isinstance(tried, CutOver)
    assert (tried.trial, tried.proofs) == ("only", (PROOF,))
    assert plan.make(target, settled(), inputs(), plan.Options(trial="only")).steps == ()
