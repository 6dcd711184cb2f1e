"""Workflows in every format, and what a ComfyUI lacks of them.

The media in `fixtures/workflows` were saved by ComfyUI 0.30.0: 14 nodes in the API's format, and 3 in the editor's.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import subprocess
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from core import tools
from lock import embedded, interface, workflows
from lock.interface import Interface
from lock.updates import node_updates
from lock.workflows import Finding, Node
from ops import workflows as checks
from tests import comfyui
from tests.conftest import FIXTURES, Hearth
from tests.errors import kind_of, raises
from tests.servers import serving

MEDIA = sorted(each for each in (FIXTURES / "workflows").iterdir() if each.suffix != ".gz")

API: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "a"}},
}
EDITOR: dict[str, Any] = {
    "nodes": [
        {"id": 1, "type": "EmptyImage", "outputs": [{"name": "IMAGE", "links": [5]}], "widgets_values": [8, 8, 1, 0]},
        {"id": 2, "type": "SaveImage", "inputs": [{"name": "images", "link": 5}], "widgets_values": ["a"]},
        {"id": 3, "type": "Note", "widgets_values": ['said {"a": 1}']},
    ],
    "links": [[5, 1, 0, 2, 0, "IMAGE"]],
    "version": 0.4,
}


def saved(place: Path, content: object, encoding: str = "utf-8") -> Path:
    path = place / "workflow.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding=encoding)
    return path


def read(place: Path, content: object) -> list[Node]:
    (graph,) = workflows.read(saved(place, content))
    return graph


def found(place: Path, content: object, known: Interface | None = None) -> set[tuple[str, str, str]]:
    findings = workflows.check(read(place, content), known or comfyui.pinned())
    return {(each.type, each.kind, each.name) for each in findings}


@pytest.mark.parametrize("path", MEDIA, ids=lambda path: path.stem)
def test_media_that_comfyui_saved(path: Path) -> None:
    graphs = workflows.read(path)
    assert sorted((graph[0].api, len(graph)) for graph in graphs) == [(False, 3), (True, 14)]
    assert {graph[0].type for graph in graphs} == {"EmptyImage"}
    assert [each for graph in graphs for each in workflows.check(graph, comfyui.real())] == []


TEXT = json.dumps(json.dumps(API))


@pytest.mark.parametrize(
    "raw",
    [
        b'<?xml version="1.0"?><svg><metadata><![CDATA[\n%s\n]]></metadata></svg>'
        % json.dumps({"prompt": API}).encode(),
        b"glTF\2\0\0\0\xff\0\0\0\x99\0\0\0JSON"
        + f'{{"asset":{{"extras":{{"prompt":{TEXT}}}}},"nodes":[]}}'.encode()
        + b"\xff\0BIN",
        b"\x90\1\0\0\0\0\0\0" + f'{{"__metadata__":{{"prompt":{TEXT}}},"w":{{"shape":[1]}}}}'.encode() + bytes(999),
        b"\xff\xd8\xff\xe1" + b'{"a":1{"b":{' * 50 + json.dumps(API).encode(),
        b"\x7f"
        + os.urandom(1 << 16).replace(b"{", b"x")
        + json.dumps(EDITOR).encode()
        + os.urandom(1 << 16).replace(b"{", b"x"),
    ],
    ids=["svg", "glb", "safetensors", "jpeg", "noise"],
)
def test_workflows_in_other_files(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "file").write_bytes(raw)
    (graph,) = workflows.read(tmp_path / "file")
    assert [node.type for node in graph][:2] == ["EmptyImage", "SaveImage"]


def test_compressed_texts_of_a_png(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + b"\0\0\0\0"

    packed, bomb = zlib.compress(json.dumps(EDITOR).encode()), zlib.compress(bytes(embedded.TEXT + 1))
    for text in (chunk(b"zTXt", b"workflow\0\0" + packed), chunk(b"iTXt", b"workflow\0\1\0de\0Ablauf\0" + packed)):
        (tmp_path / "a.png").write_bytes(PNG[:33] + chunk(b"zTXt", b"broken\0\0x") + text + PNG[33:])
        assert workflows.read(tmp_path / "a.png") == [read(tmp_path, EDITOR)]
    (tmp_path / "a.png").write_bytes(PNG[:33] + chunk(b"zTXt", b"workflow\0\0" + bomb) + PNG[33:])
    with raises("config"):
        workflows.read(tmp_path / "a.png")


def test_sound_with_a_workflow_that_spans_pages(tmp_path: Path) -> None:
    """Opus in Ogg, as ComfyUI writes it: a page has 255 segments of 255 bytes."""
    whole = b"OpusTags" + json.dumps({**EDITOR, "extra": {"note": "{" + "y" * 150_000}}).encode()
    pages = b""
    for at in range(0, len(whole), 255 * 255):
        part = whole[at : at + 255 * 255]
        sizes = [255] * (len(part) // 255) + [len(part) % 255] * bool(len(part) % 255)
        pages += b"OggS\0" + b"\xab" * 21 + bytes([len(sizes), *sizes]) + part
    (tmp_path / "sound.opus").write_bytes(pages)
    assert [len(graph) for graph in workflows.read(tmp_path / "sound.opus")] == [3]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("content", [API, EDITOR], ids=["api", "editor"])
def test_encodings(tmp_path: Path, encoding: str, content: dict[str, Any]) -> None:
    (graph,) = workflows.read(saved(tmp_path, json.dumps(content, ensure_ascii=False), encoding))
    assert {node.type for node in graph} >= {"EmptyImage", "SaveImage"}


@pytest.mark.parametrize(
    "content",
    [
        {"prompt": API, "client_id": "x"},
        {"some-id": {"prompt": [0, "some-id", API, {}, ["2"]], "outputs": {}}},
        {"prompt": json.dumps(API)},
    ],
    ids=["request", "history", "text"],
)
def test_workflow_inside_other_json(tmp_path: Path, content: dict[str, Any]) -> None:
    assert [node.type for node in read(tmp_path, content)] == ["EmptyImage", "SaveImage"]


def test_both_formats_give_the_same_links_and_values(tmp_path: Path) -> None:
    kinds = comfyui.pinned().types
    both = [read(tmp_path, content)[:2] for content in (API, EDITOR)]
    values = [[workflows._values(node, kinds[node.type]) for node in graph] for graph in both]
    assert values[0] == values[1] == [{"width": 8, "height": 8, "batch_size": 1, "color": 0}, {"filename_prefix": "a"}]
    assert [node.links for graph in both for node in graph] == [{}, {"images": ("1", 0)}] * 2


SUBGRAPH = {
    "nodes": [{"id": 1, "type": "outer"}, {"id": 2, "type": "lost-uuid"}],
    "definitions": {
        "subgraphs": [
            {"id": "outer", "name": "Outer", "nodes": [{"id": 5, "type": "inner"}, {"id": 6, "type": "Gone"}]},
            {
                "id": "inner",
                "name": "Inner",
                "nodes": [
                    {"id": 7, "type": "AlsoGone"},
                    {"id": 8, "type": "InvertMask", "inputs": [{"name": "mask", "link": 1}]},
                ],
                "links": [{"id": 1, "origin_id": 7, "origin_slot": 0, "target_id": 8, "target_slot": 0}],
            },
        ]
    },
}
GROUP = {
    "nodes": [
        {"id": 1, "type": "workflow>mine"},
        {"id": 2, "type": "workflow/mine"},
        {"id": 3, "type": "workflow>lost"},
    ],
    "extra": {
        "groupNodes": {
            "mine": {
                "nodes": [
                    {"type": "EmptyImage", "widgets_values": [8, 8, 1, 0]},
                    {"type": "SaveImage", "inputs": [{"name": "images", "link": 99}], "widgets_values": ["a"]},
                    {"type": "Gone"},
                    {"type": "InvertMask", "inputs": [{"name": "mask", "link": None}]},  # an input of the group
                    {"type": "KSampler"},
                ],
                "links": [[0, 0, 1, 0, 1, "IMAGE"]],
            }
        }
    },
}


def test_subgraphs(tmp_path: Path) -> None:
    assert found(tmp_path, SUBGRAPH) == {(name, "type", "") for name in ("Gone", "AlsoGone", "lost-uuid")}
    by_id = {node.id: node for node in read(tmp_path, SUBGRAPH)}
    assert by_id.keys() == {"2", "Outer/6", "Inner/7", "Inner/8"}
    assert by_id["Inner/8"].links == {"mask": ("Inner/7", 0)}


def test_group_nodes(tmp_path: Path) -> None:
    assert found(tmp_path, GROUP) == {("Gone", "type", ""), ("workflow>lost", "type", "")}
    by_id = {node.id: node for node in read(tmp_path, GROUP)}
    assert by_id["mine/1"].links == {"images": ("mine/0", 0)}


@pytest.mark.parametrize(("mode", "muted"), [(0, False), (2, True), (4, True)])
def test_muted_nodes_need_nothing(tmp_path: Path, mode: int, muted: bool) -> None:
    nodes = [{"id": 1, "type": "Gone", "mode": mode}, {"id": 2, "type": "SaveImage", "mode": mode}]
    findings = workflows.check(read(tmp_path, {"nodes": nodes}), comfyui.pinned())
    required = [] if muted else [Finding("2", "SaveImage", "required", "images", "IMAGE")]
    assert findings == [Finding("1", "Gone", "type", muted=muted), *required]
    assert workflows.Report("a", tuple(findings)).breaks != muted


@pytest.mark.parametrize("modes", [(2, 0), (0, 4), (4, 4)])
@pytest.mark.parametrize("graph", [SUBGRAPH, GROUP], ids=["subgraph", "group"])
def test_what_is_inside_of_muted_nodes_is_muted(tmp_path: Path, graph: dict[str, Any], modes: tuple[int, int]) -> None:
    changed = json.loads(json.dumps(graph))
    outer = (
        changed["nodes"][:2]
        if graph is GROUP
        else [changed["nodes"][0], *changed["definitions"]["subgraphs"][0]["nodes"]]
    )
    for node, mode in zip(outer, modes, strict=False):
        node["mode"] = mode
    states = {node.id: node.muted for node in read(tmp_path, changed)}
    if graph is GROUP:  # two nodes stand for it
        assert states["mine/2"] == all(modes)
    else:
        assert (states["Outer/6"], states["Inner/7"]) == (bool(modes[0]), any(modes))


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("Reroute", None),
        ("PrimitiveNode", None),
        ("MarkdownNote", None),
        ("SetNode", "ComfyUI-KJNodes"),
        ("easy getNode", "ComfyUI-Easy-Use"),
        ("Fast Groups Bypasser (rgthree)", "rgthree-comfy"),
        ("Mute / Bypass Repeater (rgthree)", "rgthree-comfy"),
        ("Node Collector (rgthree)", "rgthree-comfy"),
        ("Note Plus (mtb)", "comfy_mtb"),
        ("Show Metadata [Crystools]", "ComfyUI-Crystools"),
        ("Seed (rgthree)", ""),  # Python defines it
    ],
)
def test_types_of_javascript_belong_to_a_custom_node(tmp_path: Path, name: str, pack: str | None) -> None:
    workflow = {"nodes": [{"id": 1, "type": name}]}
    findings = workflows.check(read(tmp_path, workflow), comfyui.pinned())
    assert [each.detail for each in findings] == ([] if pack is None else [f"of {pack}" if pack else ""])
    installed = interface.reported(
        {"X": {"input": {}, "output": [], "python_module": f"custom_nodes.{(pack or '').lower()}"}}
    )
    assert (workflows.check(read(tmp_path, workflow), installed) == []) == (pack != "")


def sampler(**changes: Any) -> dict[str, Any]:
    """A KSampler in the API's format; None leaves an input out."""
    given = {"seed": 1, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    given |= {name: ["9", 0] for name in ("model", "positive", "negative", "latent_image")} | changes
    return {"1": {"class_type": "KSampler", "inputs": {key: each for key, each in given.items() if each is not None}}}


@pytest.mark.parametrize(
    ("changes", "findings"),
    [
        ({}, []),
        ({"steps": "20"}, []),  # ComfyUI converts it
        ({"scheduler": ["9", 0]}, []),
        ({"sampler_name": "older"}, [("value", "sampler_name", "older")]),
        ({"cfg": None}, [("required", "cfg", "FLOAT")]),
        ({"strength": 1.0}, [("input", "strength", "")]),
        ({"denoise": 2}, [("range", "denoise", "2, not 0 to 1")]),
        ({"seed": 2**64 - 1}, []),
        ({"seed": 2**70}, [("range", "seed", f"{2**70}, not 0 to 1.84467e+19")]),
    ],
)
def test_inputs_and_values(tmp_path: Path, changes: dict[str, Any], findings: list[tuple[str, str, str]]) -> None:
    assert workflows.check(read(tmp_path, sampler(**changes)), comfyui.pinned()) == [
        Finding("1", "KSampler", kind, name, detail) for kind, name, detail in findings
    ]


@pytest.mark.parametrize(
    ("values", "names", "checked"),
    [
        ([1, "fixed", 20, 8.0, "older", "normal", 1.0], [], True),
        ([1, 20, 8.0, "older", "normal", 1.0], [], True),  # without the editor's addition to a seed
        ([1, "fixed", 20, 8.0, "older", "normal"], [], False),  # saved by another version
        ([20, "older", 1, 8.0, "normal", 1.0], [], False),  # the types show another order
        (
            [8.0, 1, "fixed", 20, "older", "normal", 1.0],
            ["cfg", "seed", "steps", "sampler_name", "scheduler", "denoise"],
            True,
        ),
        ({"sampler_name": "older", "steps": 20}, [], True),
        (None, [], False),
    ],
)
def test_values_of_the_editor_have_names_only_if_all_fit(
    tmp_path: Path, values: Any, names: list[str], checked: bool
) -> None:
    inputs: list[dict[str, Any]] = [
        {"name": name, "link": 1} for name in ("model", "positive", "negative", "latent_image")
    ]
    inputs += [{"name": name, "widget": {"name": name}} for name in names]
    workflow = {"nodes": [{"id": 1, "type": "KSampler", "inputs": inputs, "widgets_values": values}]}
    assert (found(tmp_path, workflow) == {("KSampler", "value", "sampler_name")}) == checked
    assert checked or found(tmp_path, workflow) == set()


def test_links(tmp_path: Path) -> None:
    workflow: dict[str, Any] = {**API, "3": {"class_type": "InvertMask", "inputs": {"mask": ["1", 0]}}}
    workflow["4"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 1], "filename_prefix": "b"}}
    workflow["5"] = {"class_type": "SaveImage", "inputs": {"images": ["Nobodys", 0], "filename_prefix": "b"}}
    assert found(tmp_path, workflow) == {("InvertMask", "link", "mask"), ("SaveImage", "output", "images")}


def test_dynamic_inputs(tmp_path: Path) -> None:
    inputs: dict[str, Any] = {"format": "exr", "format.bit_depth": "16-bit", "images": ["9", 0], "filename_prefix": "a"}
    workflow = {"1": {"class_type": "SaveImageAdvanced", "inputs": inputs}}
    assert found(tmp_path, workflow) == set()
    inputs["format"] = "gif"
    assert found(tmp_path, workflow) == {("SaveImageAdvanced", "value", "format")}


def test_what_is_unknown_is_not_reported(tmp_path: Path) -> None:
    kinds = {"EmptyImage": interface.NodeType("", None, None, complete=False)}
    assert found(tmp_path, API, Interface(kinds, unknown=("nodes",))) == set()
    partly = {"SaveImage": interface.NodeType("", {"images": interface.Input("", required=True)}, None, complete=False)}
    assert found(tmp_path, API, Interface({**kinds, **partly})) == set()


def test_replaced_type_does_not_break_a_workflow(tmp_path: Path) -> None:
    workflow = {"1": {"class_type": "Load3DAnimation", "inputs": {}}}
    findings = workflows.check(read(tmp_path, workflow), comfyui.pinned())
    assert findings == [Finding("1", "Load3DAnimation", "replaced", "Load3D")]
    assert not workflows.Report("a", tuple(findings)).breaks


# --- files that are none, and the task --------------------------------------------------------------------------------

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


@pytest.mark.parametrize(
    "raw",
    [
        b"", b" ", b"\xef\xbb\xbf", b"{", b'{"nodes": [{"id": 1', b"[]", b"{}", b"[" * 100_000, b'{"a":' * 100_000,
        b"9" * 5000, b'{"nodes": [1]}', b'{"nodes": [{"type": []}]}',
        b'{"1": {"class_type": 1}}', b'{"1": {"class_type": "A", "inputs": 1}}',
        b'{"nodes": [{"type": "A", "inputs": [{"link": 1}]}]}', b'{"nodes": [{"type": "A"}], "links": [1]}',
        b'{"nodes": [{"type": "A"}], "definitions": {"subgraphs": [1]}}',
        b'{"nodes": [{"type": "A"}], "definitions": [1]}', b'{"nodes": [{"type": "A"}], "extra": {"groupNodes": [1]}}',
        PNG, PNG[:20], b"\x89PNG\r\n\x1a\n", b"not a workflow", b"OggS", b"OggS" + bytes(30), b'\x89{"a": 1}' * 5000,
    ],
    ids=lambda raw: repr(raw[:24]),
)  # fmt: skip
def test_file_without_a_workflow_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "file").write_bytes(raw)
    with raises("config"):
        workflows.read(tmp_path / "file")


def test_other_places_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-itself").symlink_to("to-itself")
    for path in (tmp_path, tmp_path / "none", tmp_path / "pipe", tmp_path / "to-itself"):
        with raises("config"):
            workflows.read(path)


def test_large_files(tmp_path: Path) -> None:
    """A text of 200 MB is refused; a video may be that large."""
    for start, end in ((b'{"a": "', b'"}'), (b"\0video", json.dumps(API).encode())):
        with (tmp_path / "large").open("wb") as file:
            file.write(start)
            file.seek(200_000_000)
            file.write(end)
        if start == b"\0video":
            assert len(workflows.read(tmp_path / "large")[0]) == 2
        else:
            with raises("config", match="larger than"):
                workflows.read(tmp_path / "large")


@pytest.fixture
def host(tmp_path: Path, hearth: Hearth) -> Hearth:
    """A client that needs no network: everything that the workflows use is part of ComfyUI, which it has read."""
    saved(tmp_path, API)
    comfyui.read_by(hearth)
    return hearth


@pytest.mark.process
def test_unreadable_file_does_not_stop_the_others(tmp_path: Path, host: Hearth) -> None:
    (tmp_path / "bad.json").write_text("{")
    gone = tmp_path / "gone.json"
    gone.write_text(json.dumps(sampler(sampler_name="older")))
    good = str(tmp_path / "workflow.json")
    done = host.inv(
        "workflows.check", "--file", str(tmp_path / "bad.json"), "--file", str(gone), "--file", good, "--json"
    )
    told = json.loads(done.stdout)
    assert done.returncode == 10
    assert kind_of(done.stderr) == "config"
    assert [(Path(each["file"]).name, each["breaks"], bool(each["error"])) for each in told["workflows"]] == [
        ("bad.json", False, True), ("gone.json", True, False), ("workflow.json", False, False),
    ]  # fmt: skip
    done = host.inv("workflows.check", "--file", f"{tmp_path}/[gw]*.json")
    assert (done.returncode, kind_of(done.stderr)) == (1, "")
    assert "KSampler.sampler_name does not accept older: node 1" in done.stdout
    assert done.stdout.endswith("1 of 2 workflows fit ComfyUI 0.30.0\n")


@pytest.mark.process
def test_another_version_lists_only_what_it_changes(tmp_path: Path, host: Hearth) -> None:
    other = comfyui.derived(tmp_path / "older", comfyui.OLDER, without=comfyui.LARGE)
    workflow: dict[str, Any] = {**sampler(sampler_name="none"), "2": {"class_type": "LatentFlip", "inputs": {}}}
    (tmp_path / "gone.json").write_text(json.dumps(workflow))
    done = host.inv("workflows.check", "--file", str(tmp_path / "gone.json"), "--to", str(other), "--json")
    (report,) = json.loads(done.stdout)["workflows"]
    assert done.returncode == 1
    assert {(each["type"], each["kind"], each["name"]) for each in report["findings"]} == {
        ("LatentFlip", "type", ""), ("KSampler", "input", "denoise"), ("KSampler", "required", "strength"),
    }  # fmt: skip
    assert report["already"] == 1  # KSampler's value; LatentFlip's inputs are not known once it is gone
    same = host.inv("workflows.check", "--file", str(tmp_path / "gone.json"), "--to", "0.30.0")
    assert same.returncode == 0
    compared = host.inv("workflows.compare", "--to", str(other))
    assert "KSampler.denoise input-removed: FLOAT\n" in compared.stdout


@pytest.mark.process
def test_host_lists_its_types_and_the_workflows_saved_on_it(tmp_path: Path, host: Hearth) -> None:
    """Through the real agent, from what a running ComfyUI answers."""
    answers = {
        "/object_info": json.loads(gzip.decompress(comfyui.RECORD.read_bytes())),
        "/userdata": ["good.json", "gone.json", "bad.json"],
        "/userdata/workflows%2Fgood.json": EDITOR,
        "/userdata/workflows%2Fgone.json": sampler(sampler_name="older"),
        "/userdata/workflows%2Fbad.json": b"{",
    }
    with serving(answers) as port:
        (tmp_path / "hosts.toml").write_text(f'[hosts.local]\nprofile = "cpu"\nport = {port}\n')
        settings = {"HEARTH_HOSTS": str(tmp_path / "hosts.toml"), "HOME": str(tmp_path)}
        done = host.inv("workflows.check", "--host", "local", "--json", **settings)
        own = host.inv("workflows.check", "--host", "local", "--file", str(tmp_path / "workflow.json"), **settings)
    told = {each["file"]: (each["breaks"], bool(each["error"])) for each in json.loads(done.stdout)["workflows"]}
    assert told == {
        "local:good.json": (False, False),
        "local:gone.json": (True, False),
        "local:bad.json": (False, True),
    }
    assert (done.returncode, kind_of(done.stderr), done.stderr.count("bad.json")) == (10, "config", 1)
    assert (own.returncode, own.stdout) == (0, "1 of 1 workflow fits local\n"), own.stderr
    stopped = host.inv("workflows.check", "--host", "local", **settings)
    assert (stopped.returncode, kind_of(stopped.stderr)) == (69, "no-answer")


def test_version_is_fetched_by_its_tag(tmp_path: Path, host: Hearth) -> None:
    code = "class A:\n    RETURN_TYPES = ()\n    @classmethod\n    def INPUT_TYPES(cls): return {}\n"
    place, pinned = tmp_path / "repository", tmp_path / "app/src/nodes.py"
    place.mkdir()
    pinned.parent.mkdir(parents=True)
    pinned.write_text(f"{code}NODE_CLASS_MAPPINGS = {{'A': A, 'Gone': A}}\n")
    (place / "nodes.py").write_text(f"{code}NODE_CLASS_MAPPINGS = {{'A': A}}\n")
    config = ("user.name a", "user.email a@b", "uploadpack.allowAnySHA1InWant true", "uploadpack.allowFilter true")
    for words in ("init -q", *(f"config {each}" for each in config), "add -A", "commit -qm x", "tag -am x v1.1"):
        subprocess.run(["git", "-C", str(place), *words.split()], check=True)
    app: dict[str, Any] = {"name": "comfyui", "version": "1.0", "tree": "", "extra": [], "size": 1, "files": 1}
    app["source"] = [{"folder": "src"}, {"git": f"file://{place}", "commit": "0" * 40}]
    (tmp_path / "app/app.toml").write_text(tomlkit.dumps(app))
    done = host.inv("workflows.compare", "--to", "1.1", HEARTH_APP=str(tmp_path / "app"))
    assert done.stdout == "Gone removed\n0 node types added\n", done.stderr
    done = host.inv("workflows.compare", "--to", "1.2", HEARTH_APP=str(tmp_path / "app"))
    assert (kind_of(done.stderr), done.returncode) == ("unknown-name", 15)


@pytest.mark.parametrize(
    ("words", "kind", "code"),
    [
        (["check"], "usage", 15),
        (["check", "--host", "a", "--to", "b"], "usage", 15),
        (["check", "--file", "/none/*.json"], "config", 10),
        (["check", "--host", "nowhere"], "unknown-name", 15),
        (["compare"], "usage", 15),
    ],
)
def test_usage(host: Hearth, words: list[str], kind: str, code: int) -> None:
    done = host.inv(f"workflows.{words[0]}", *words[1:])
    assert (kind_of(done.stderr), done.returncode) == (kind, code), done.stderr


def test_types_of_known_nodes_are_no_findings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(node_updates, "providers", lambda types: {each: ["A"] * (each == "Theirs") for each in types})
    path = saved(tmp_path, {"1": {"class_type": "Theirs"}, "2": {"class_type": "Nobodys"}})
    (report,) = checks.check([str(path)], "", "", ask_sudo=False).reports
    assert [each.type for each in report.findings] == ["Nobodys"]


# --- the corpus -------------------------------------------------------------------------------------------------------

VERSION = "0.1.123"
"""Of comfyui-workflow-templates-json: newer than ComfyUI 0.30.0, whose types, inputs and values some of it lacks."""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("templates")
    tools.pip("download", "--quiet", "--no-deps", "--dest", place, f"comfyui-workflow-templates-json=={VERSION}")
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    names = r"(index.*|fuse_options)\.json"
    return [each for each in sorted(place.rglob("templates/*.json")) if not re.fullmatch(names, each.name)]


@pytest.mark.installer
def test_corpus_against_the_code_and_the_running_server(corpus: list[Path]) -> None:
    """Both find the same, but for files: the record has no models, and the code does not know which there are."""
    static, real = comfyui.pinned(), comfyui.real()
    broken = 0
    for path in corpus:
        nodes = [node for graph in workflows.read(path) for node in graph]
        findings = workflows.check(nodes, static)
        broken += bool(findings)
        assert findings == [each for each in workflows.check(nodes, real) if not files_of(static, each)], path.name
    assert (len(corpus), broken) == (644, 190)


@pytest.mark.installer
def test_every_finding_of_the_corpus_is_explained_by_the_server(corpus: list[Path]) -> None:
    """By what the server answers, without Hearth's reading of it: the templates are of a newer ComfyUI."""
    raw = json.loads(gzip.decompress(comfyui.RECORD.read_bytes()))
    found = {
        each for path in corpus for graph in workflows.read(path) for each in workflows.check(graph, comfyui.pinned())
    }
    assert [each for each in found if not explained(each, raw)] == []
    assert {each.kind for each in found} == {"type", "input", "output", "value", "required"}


def explained(each: Finding, raw: dict[str, Any]) -> bool:
    if each.kind == "type":
        return each.type not in raw
    sections = raw[each.type]["input"]
    inputs = {name: given for section in sections.values() for name, given in section.items()}
    name, _, part = each.name.partition(".")
    if each.kind == "output":
        wanted = re.fullmatch(r"output (\d+) of (\S+)", each.detail)
        return bool(wanted and int(wanted[1]) >= len(raw[wanted[2]]["output"]))
    if each.kind == "value":
        given = json.dumps(inputs[name])
        return json.dumps(each.detail) not in given
    if each.kind == "required":
        return name in sections["required"]
    return name not in inputs or (part != "" and json.dumps(part) not in json.dumps(inputs[name]))


def files_of(static: Interface, each: Finding) -> bool:
    kind = static.types.get(each.type)
    return each.kind == "value" and kind is not None and (kind.inputs or {})[each.name].values is None
