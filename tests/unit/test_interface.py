"""Node types read from code: as the real ComfyUI reports them, from an older tree, and from code that hides them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lock import interface, workflows
from lock.interface import Change, Interface
from tests import comfyui
from tests.errors import raises

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def former(tmp_path_factory: pytest.TempPathFactory) -> Interface:
    return interface.read(comfyui.older(tmp_path_factory.mktemp("older")))


LISTED = {
    *("ckpt_name", "config_name", "vae_name", "clip_name", "clip_name1", "clip_name2", "clip_name3", "clip_name4"),
    *("unet_name", "lora_name", "existing_lora", "control_net_name", "style_model_name", "gligen_name", "model_name"),
    *("hypernetwork_name", "photomaker_model_name", "model_path", "name", "audio_encoder_name", "bg_removal_name"),
    *("text_encoder", "image", "audio", "file", "latent", "folder", "folder_name", "model_file"),
}
"""Inputs whose values are the files of a folder, which the code does not tell."""

NOT_READ = {("PorterDuffImageComposite", "mode"): "an enumeration made by a call: `Enum('PorterDuffMode', [...])`"}
SYSTEM = {("PrimitiveInt", "value"), ("PrimitiveFloat", "value"), ("SeedNode", "seed")}
"""Inputs whose range is that of the running Python: `sys.maxsize`."""


def test_types_inputs_and_outputs_are_those_that_comfyui_reports() -> None:
    read, real = comfyui.pinned(), comfyui.real()
    assert read.unknown == ()
    assert read.types.keys() == real.types.keys()
    assert len(read.types) == 826
    for name, each in real.types.items():
        found = read.types[name]
        assert (found.inputs or {}).keys() == (each.inputs or {}).keys(), name
        assert list(found.inputs or ()) == list(each.inputs or ()), name
        assert found.outputs == each.outputs, name
    assert {name for name, each in read.types.items() if not each.complete} == {"CustomCombo"}  # it takes any input


def test_values_are_those_that_comfyui_reports_or_unknown() -> None:
    read, real = comfyui.pinned(), comfyui.real()
    unknown = set()
    for name, kind in real.types.items():
        for key, each in (kind.inputs or {}).items():
            found = (read.types[name].inputs or {})[key]
            assert (found.type, found.required, found.widget, found.open) == (
                each.type,
                each.required,
                each.widget,
                each.open,
            ), (name, key)
            if found.values is None and each.values is not None:
                unknown.add((name, key))
            else:
                assert found.values == each.values, (name, key)
            if (name, key) in SYSTEM:
                assert found.high is None
            else:
                assert (found.low, found.high) == (each.low, each.high), (name, key)
    assert {each for each in unknown if each[1] not in LISTED} == NOT_READ.keys()


def test_differences_of_two_trees(former: Interface) -> None:
    read = comfyui.pinned()
    changes = interface.compare(former, read)
    assert Change("LatentFlip", "added") in changes
    assert Change("LatentCutToBatch", "added") in changes
    assert Change("ImageSaver", "removed") in changes
    assert Change("KSampler", "input-removed", "strength", "FLOAT") in changes
    assert Change("KSampler", "input-added", "denoise", "", "FLOAT, required") in changes
    assert Change("KSampler", "values", "sampler_name", "older", "") in changes
    assert Change("LatentMultiply", "input-type", "multiplier", "INT", "FLOAT") in changes
    assert Change("InvertMask", "outputs", "", "IMAGE, MASK", "MASK") in changes
    assert {each.kind for each in changes} == {
        *("added", "removed", "input-removed", "input-added", "input-type", "values", "outputs")
    }
    back = interface.compare(read, former)
    assert Change("LatentFlip", "removed") in back
    assert len(back) == len(changes)
    assert interface.compare(read, read) == []
    rows = [*interface.rows(changes)]
    assert rows[-1] == "2 node types added"
    assert {
        "ImageSaver removed",
        "KSampler.strength input-removed: FLOAT",
        "KSampler.denoise input-added: FLOAT, required",
        "KSampler.sampler_name values removed: older",
        "LatentMultiply.multiplier input-type: INT -> FLOAT",
        "InvertMask outputs: IMAGE, MASK -> MASK",
    } <= {*rows}
    both = [Change("A", "values", "mode", "a, b", "none"), Change("B", "values", "mode", "", "none")]
    replaced = Change("C", "replaced", new="D")
    assert [*interface.rows([*both, replaced])][:-1] == [
        "A.mode values removed: a, b; added: none", "B.mode values added: none", "C replaced by D"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "differ"),
    [(("",), ("TRACKS",), 0), (("A", ""), ("", "B"), 0), (("A", ""), ("C", ""), 1), (("",), ("", "A"), 1), ((), (), 0)],
)
def test_outputs_of_unknown_types_are_no_change(old: tuple[str, ...], new: tuple[str, ...], differ: int) -> None:
    one, other = (Interface({"A": interface.NodeType("", {}, outputs)}) for outputs in (old, new))
    assert [each.kind for each in interface.compare(one, other)] == ["outputs"] * differ


def test_replaced_type_is_not_removed() -> None:
    read = comfyui.pinned()
    old = Interface({"Load3DAnimation": read.types["Load3D"], "Nobodys": read.types["Load3D"]})
    assert [each for each in interface.compare(old, read) if each.kind != "added"] == [
        Change("Load3DAnimation", "replaced", new="Load3D"),
        Change("Nobodys", "removed"),
    ]


def test_a_replacement_needs_a_type_that_exists() -> None:
    kind = comfyui.pinned().types["Load3D"]
    old = Interface({"A": kind, "B": kind})
    new = Interface({"New": kind}, {"A": "New", "B": "Lost"})
    assert [(each.type, each.kind) for each in interface.compare(old, new)] == [
        ("A", "replaced"), ("B", "removed"), ("New", "added"),
    ]  # fmt: skip
    graph = workflows.graphs("a", [{"1": {"class_type": "B", "inputs": {}}}])
    assert [each.kind for one in graph for each in workflows.check(one, new)] == ["type"]


def test_replacements_of_custom_nodes(tmp_path: Path) -> None:
    """By position, and by keyword; ComfyUI uses the first one."""
    text = """from comfy_api.latest import io
async def register(api):
    await api.node_replacement.register(io.NodeReplace("New", "Old"))
    await api.node_replacement.register(io.NodeReplace("Other", old_node_id="Old"))
    await api.node_replacement.register(io.NodeReplace(old_node_id="Former", new_node_id="New"))
"""
    assert node(tmp_path / "mine", text).replaced == {"Old": "New", "Former": "New"}


def node(place: Path, text: str, **others: str) -> interface.Interface:
    """The node types of a custom node with this code."""
    place.mkdir(exist_ok=True)
    for name, each in {"__init__": text, **others}.items():
        (place / f"{name}.py").write_text(each)
    return interface.read_node(place, place)


ONE = """
class One:
    RETURN_TYPES = ("IMAGE",)
    @classmethod
    def INPUT_TYPES(cls):
        {body}
NODE_CLASS_MAPPINGS = {{"One": One}}
"""


@pytest.mark.parametrize(
    ("body", "complete", "inputs"),
    [
        ('return {"required": {"a": ("INT", {})}}', True, {"a"}),
        ('return {"required": {"a": ("INT",), **more()}}', False, {"a"}),
        ('return {"required": {"a": ("INT",), name(): ("INT",)}}', False, {"a"}),
        ('return {"required": {"a": ("INT",)}, **more()}', False, {"a"}),
        ('d = {"required": {"a": ("INT",)}}; patch(d); return d', False, {"a"}),
        ('d = {"required": {"a": ("INT",)}}; d["required"].pop("a"); return d', False, {"a"}),
        ('d = {"required": {"a": ("INT",)}}; d.setdefault("optional", {}); return d', False, {"a"}),
        ('return {"required": dict(zip("ab", [("INT",)] * 2))}', False, set()),
        ("return more()", False, None),
        ("while more(): return {}", False, None),
        ('if more(): return {"required": {}}\n        return {"required": {}}', False, None),
        ('d = {"required": {}}\n        if more(): d["required"]["a"] = 1\n        return d', False, set()),
        ('return {"required": {f"a{i}": ("INT",) for i in range(2)}}', False, set()),
        (
            'd = {}\n        for i in range(2): d[f"a{i}"] = ("INT",)\n        return {"required": d}',
            True,
            {"a0", "a1"},
        ),
        (
            'd = {}\n        for i in [1]:\n            d["a"] = 1\n            break\n        return {"required": d}',
            False,
            set(),
        ),
    ],
)
def test_inputs_made_at_run_time_are_unknown(
    tmp_path: Path, body: str, complete: bool, inputs: set[str] | None
) -> None:
    found = node(tmp_path, ONE.format(body=body)).types["One"]
    assert (found.complete, None if found.inputs is None else set(found.inputs)) == (complete, inputs)
    empty = Interface({"One": interface.NodeType("", {}, ("IMAGE",))})
    removed = {each.name for each in interface.compare(Interface({"One": found}), empty)}
    assert removed == (inputs or set())
    full = Interface({"One": interface.NodeType("", {"z": interface.Input("INT", required=False)}, ("IMAGE",))})
    gone = [each for each in interface.compare(full, Interface({"One": found})) if each.kind == "input-removed"]
    assert bool(gone) == complete


@pytest.mark.parametrize(
    ("text", "types", "known"),
    [
        ("NODE_CLASS_MAPPINGS = make()", set(), False),
        ("from elsewhere import NODE_CLASS_MAPPINGS", set(), False),
        ("class A: pass\nNODE_CLASS_MAPPINGS = {'A': A, **make()}", {"A"}, False),
        ("class A: pass\nNODE_CLASS_MAPPINGS = {'A': A}\nfor k in names(): NODE_CLASS_MAPPINGS[k] = A", {"A"}, False),
        ("class A: pass\nNODE_CLASS_MAPPINGS = {}\nNODE_CLASS_MAPPINGS.update({'A': A})", {"A"}, True),
        ("class A: pass\nNODE_CLASS_MAPPINGS = {}\nif some():\n    NODE_CLASS_MAPPINGS['A'] = A", set(), False),
        ("from .b import *\nNODE_CLASS_MAPPINGS = {**MAPS, 'B': B}", {"A", "B"}, True),
        ("from . import b\nNODE_CLASS_MAPPINGS = {}\nfor m in [b]: NODE_CLASS_MAPPINGS.update(m.MAPS)", {"A"}, True),
        ("NODE_CLASS_MAPPINGS = NODE_CLASS_MAPPINGS", set(), False),
        ("x = 1", set(), False),
        ("def f(:", set(), False),
    ],
)
def test_types_made_at_run_time_are_unknown(tmp_path: Path, text: str, types: set[str], known: bool) -> None:
    found = node(tmp_path, text, b="class A: pass\nclass B: pass\nMAPS = {'A': A}\n")
    assert (set(found.types), found.unknown == ()) == (types, known)
    old = Interface({"Gone": interface.NodeType("", {}, ())})
    assert (Change("Gone", "removed") in interface.compare(old, found)) == known


@pytest.mark.parametrize(
    "expression",
    [
        "[0] * 10**9",
        "10 ** 10 ** 10",
        "'x' * 10**9",
        "list(range(10**10))",
        "'{:999999999}'.format(1)",
        "f'{1:999999999}'",
        "[a for a in range(9999) for b in range(9999)]",
        "f()",
        "__import__('os').system('touch " + "{0}/ran')",
        "open('{0}/ran', 'w')",
        "-" * 5000 + "1",
    ],
)
def test_hostile_code_is_not_run_and_ends(tmp_path: Path, expression: str) -> None:
    code = expression.replace("{0}", str(tmp_path))
    text = f"def f(): return f()\nclass A:\n    def INPUT_TYPES():\n        x = {code}\n"
    text += "        return {'required': {'a': (x,)}}\nNODE_CLASS_MAPPINGS = {'A': A}"
    found = node(tmp_path / "node", text)
    kind = found.types.get("A")
    values = [each.values for each in (kind.inputs or {}).values()] if kind else []
    assert values in ([], [None])
    assert not (tmp_path / "ran").exists()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with raises("config"):
        interface.read(tmp_path)
    (tmp_path / "nodes.py").write_text("x = 1")
    with raises("config"):
        interface.read(tmp_path)


@pytest.mark.parametrize("answer", [None, [], {"A": 1}, {"A": {"input": [], "output": []}}, {"A": {"output": []}}])
def test_answer_of_another_program_is_refused(answer: Any) -> None:
    with raises("no-answer"):
        interface.reported(answer)
