"""Proofs: workflows that a release must run, with checks of the pictures that they make."""

from __future__ import annotations

import base64
import json
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent.api import Endpoint, checked, parsed, printable, seconds_of
from agent.files import AgentError, Json, Note
from agent.layout import PROOF, Layout
from agent.schema.change import Proof
from agent.schema.manifest import ReleaseManifest
from agent.serve.health import Process, fetch, finished, output
from agent.serve.sandbox import python_of, sandboxed, unit_of

PICTURES, MOST = 200_000_000, 16
"""Maximum total size in bytes and number of the pictures of a workflow that are fetched and checked."""

FORMATS = (".png", ".jpg", ".jpeg", ".webp")
"""Files that are checked. Others, such as videos, are only counted."""

EXAMINE_SECONDS = 120
"""Time limit for fetching and reading the pictures, with an import of numpy from a cold disk."""

NAN = "invalid value encountered in cast"
"""numpy's warning in ComfyUI's log when it saves a picture with NaN, which then are black pixels."""


class OutOfMemoryError(AgentError):
    """A workflow ran out of memory. Beside another release, that says nothing about this one."""


@dataclass
class Prover:
    """Runs workflows on a release. `command` is the command that started it; `clear` deletes the pictures."""

    layout: Layout
    process: Process
    release: ReleaseManifest
    command: Sequence[str]
    note: Note
    clear: Callable[[], None] = lambda: None

    def run(self, proofs: Sequence[Proof]) -> dict[str, float]:
        """Run the workflows and check their pictures; return the seconds of each. Raises AgentError.

        A workflow with a seed runs again with another one: an upstream regression hangs in the second job only
        (ComfyUI#15269), and only the second time is without loading the models.
        """
        times: dict[str, float] = {}
        for proof in proofs:
            second = (replace(proof, workflow=each, like="") for each in _other_seed(proof.workflow))
            for again, each in enumerate((proof, *second)):
                what = f"proof {proof.name}{', another seed' * again}"
                try:
                    times[proof.name], text = self._run(each, what)
                finally:
                    self.clear()
                self.note(f"{what}: {times[proof.name]:.1f} s, {text}")
        return times

    def _run(self, proof: Proof, what: str) -> tuple[float, str]:
        place, before = Endpoint.of(self.command), self._nan()
        try:
            done = finished(place, self.process, _apart(proof.workflow), proof.seconds, what)
            seconds = checked("/history", done, lambda entry: _seconds(entry, what))
            files = checked("/history", done, _files)
            pictures = [each for each in files if each["filename"].lower().endswith(FORMATS)][:MOST]
            raw: list[bytes] = []
            for each in pictures:
                raw.append(fetch(place, each, EXAMINE_SECONDS, PICTURES - sum(map(len, raw))))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise AgentError("gate", f"{what} did not run", printable(str(error), 1000)) from error
        number = f"{len(files)} file{'s' * (len(files) != 1)}"
        if len(files) != proof.images and (proof.images >= 0 or not files):
            wanted = proof.images if proof.images >= 0 else "at least one"
            raise AgentError("gate", f"{what} made {number}, not {wanted}")
        if not raw and (proof.size or proof.like):
            raise AgentError("gate", f"{what} made no picture to check", f"checked formats: {', '.join(FORMATS)}")
        found = self._examined(proof, raw) if raw else []
        texts = [_check(replace(proof, like=proof.like * (not at)), each, what) for at, each in enumerate(found)]
        if self._nan() > before:
            raise AgentError("gate", f"{what} made a picture with NaN", "its log shows numpy's warning about it")
        return seconds, f"{number}{f', the first of {texts[0]}' if texts else ''}"

    def _nan(self) -> int:
        return sum(NAN in line for line in output(Endpoint.of(self.command), self.process, ""))

    def _examined(self, proof: Proof, pictures: list[bytes]) -> list[Json]:
        """Read the pictures in the release's sandbox. Raises AgentError."""
        every = [base64.b64decode(proof.like), *pictures]
        source = json.dumps([len(each) for each in every]).encode() + b"\n" + b"".join(every)
        program = (pkgutil.get_data("agent.serve", "pictures.py") or b"").decode()
        argv = [python_of(self.layout, self.release), "-I", "-B", "-c", program]
        unit = unit_of(self.layout, self.release)
        try:
            answer = sandboxed(
                self.layout, unit, argv, self.release, seconds=EXAMINE_SECONDS, most=100_000, apart=True, given=source
            )
            return checked("the program that reads pictures", parsed(answer), list)
        except (AgentError, ValueError) as error:
            cause = error.report["cause"] if isinstance(error, AgentError) else str(error)
            raise AgentError("gate", f"the pictures of proof {proof.name} could not be read", cause) from error


def _check(proof: Proof, found: Json, what: str) -> str:
    """Check one picture; return it in words. Raises AgentError."""
    if error := found.get("error"):
        raise AgentError("gate", f"{what} made a damaged picture", printable(error, 500))
    size, difference = tuple(found["size"]), found["difference"]
    text = f"{size[0]}x{size[1]}"
    if proof.size and size != proof.size:
        raise AgentError("gate", f"{what} made a picture of {text}, not {proof.size[0]}x{proof.size[1]}")
    if found["flat"]:
        raise AgentError("gate", f"{what} made a picture of a single colour", "NaN would be black")
    if not proof.like:
        return text
    if difference is None:
        raise AgentError("gate", f"{what} made a picture of {text}, which is not the size of its reference")
    if difference > proof.within:
        cause = (
            f"the root mean square difference of their pixels is {difference:.3f}, at most {proof.within:g} is allowed"
        )
        raise AgentError("gate", f"{what} made a picture that differs from its reference", cause)
    return f"{text}, {difference:.3f} from its reference"


def _other_seed(workflow: Json) -> Iterator[Json]:
    """Yield the workflow with other seeds, if it has any."""
    copy = json.loads(json.dumps(workflow))
    seeds = [
        (node["inputs"], name)
        for node in copy.values()
        for name in ("seed", "noise_seed")
        if type(node["inputs"].get(name)) is int
    ]
    for inputs, name in seeds:
        inputs[name] += 1 if inputs[name] < 1 << 32 else -1  # stays in the input's range
    if seeds:
        yield copy


def _apart(workflow: Json) -> Json:
    """Return a workflow that saves to the proof's folder, so that its pictures can be told from the users'."""
    return {
        key: {**node, "inputs": {
            name: f"{PROOF}/{value}" if name == "filename_prefix" and isinstance(value, str) else value
            for name, value in node["inputs"].items()
        }}
        for key, node in workflow.items()
    }  # fmt: skip


def _seconds(entry: Json, what: str) -> float:
    """Return the time of a job in the history. Raises AgentError if it failed."""
    messages: dict[str, Any] = dict(entry["status"]["messages"])
    if entry["status"]["status_str"] != "success":
        error = messages.get("execution_error") or {}
        place = f"node {printable(error.get('node_id'))} ({printable(error.get('node_type'))})"
        kind = printable(error.get("exception_type"))
        cause = f"{place}: {kind}: {printable(error.get('exception_message'), 1000)}" if error else "it was interrupted"
        raise (OutOfMemoryError if "OutOfMemory" in kind else AgentError)("gate", f"{what} failed", cause)
    begun, ended = (seconds_of(messages[f"execution_{each}"]["timestamp"]) for each in ("start", "success"))
    return max(0.0, (ended or 0) - (begun or 0))


def _files(entry: Json) -> list[Json]:
    """Return the pictures and videos that a job saved, or its previews if it saved none."""
    found = [
        {name: str(each[name]) for name in ("filename", "subfolder", "type")}
        for output in entry["outputs"].values()
        for each in output.get("images", ())
    ]
    return [each for each in found if each["type"] == "output"] or found
