"""What an update breaks: the real ComfyUI against a tree made of it, and what custom nodes use of it."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from agent.schema.manifest import NodeSource
from core import files, foreign, shell, source
from core.errors import ConnectError, HostError
from core.stack import stacks
from deploy import connection
from deploy import preview as hosts_preview
from deploy import release as releases
from deploy.selection import choose
from lock import ahead, api, interface, nodes, preview, workflows
from lock.application import application
from lock.interface import Change, Interface
from lock.preview import COMFYUI, Preview, Release
from lock.readings import kept
from lock.requirements import LockedList
from lock.updates import report
from lock.updates.proposal import Proposal
from tests import comfyui, plans

if TYPE_CHECKING:
    from deploy.host import Target
    from lock.workflows import Workflows

EDITS = {
    **comfyui.OLDER,  # removes LatentFlip, denoise and values of KSampler
    "comfy/cli_args.py": comfyui.swap(
        ('parser.add_argument("--cpu-vae", action="store_true", help="Run the VAE on the CPU.")\n', ""),
        ('parser.add_argument("--reserve-vram", type=float', 'vram_group.add_argument("--reserve-vram", type=float'),
        ('parser.add_argument("--fast", nargs="*"', 'parser.add_argument("--fast", nargs="?"'),
    ),
    "comfy/utils.py": comfyui.swap(
        ("def common_upscale(", "def _common_upscale("),
        ("def repeat_to_batch_size(tensor, batch_size, dim=0)", "def repeat_to_batch_size(tensor, size)"),
    ),
    "comfy/taesd/taehv.py": None,
    "comfy/conds.py": lambda text: text + "\ndef __getattr__(name): return 1\n",
    "alembic_db/versions/0006_add_loader_path.py": None,
}
"""From the pinned tree to the other one."""

NODE = """
import comfy.utils
import nodes
import comfy.sd as sd
from comfy import conds
from comfy.utils import common_upscale
from .part import use
def f(x):
    comfy.utils.repeat_to_batch_size(x, 2, dim=0)
    comfy.utils.repeat_to_batch_size(x, 2)
    return nodes.LatentFlip, sd.load_lora_for_models, conds.anything, conds.CONDRegular
class A:
    RETURN_TYPES = ("LATENT",)
    @classmethod
    def INPUT_TYPES(cls): return {"required": {"a": ("INT", {})}}
NODE_CLASS_MAPPINGS = {"Theirs": A}
"""


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comfyui.derived(tmp_path_factory.mktemp("derived"), EDITS, without=("ldm", "text_encoders"))


@pytest.fixture(scope="session")
def apis(other: Path) -> tuple[api.Api, api.Api]:
    return kept(api.Api, api.read, comfyui.tree()), api.read(other)


def node(place: Path, **modules: str) -> Path:
    place.mkdir()
    for name, text in modules.items():
        (place / f"{name}.py").write_text(text)
    return place


def tiny(place: Path) -> Path:
    """A ComfyUI without node types."""
    (place / "comfy").mkdir(parents=True)
    (place / "nodes.py").write_text("NODE_CLASS_MAPPINGS = {}")
    (place / "comfy/cli_args.py").write_text("")
    return place


def locked(name: str, text: str) -> LockedList:
    stack, platform, _ = name.split("-")
    return LockedList(stack, platform, "3.12", text)


def release(tree: Path | None, version: str, **values: Any) -> Release:
    return Release(**{"version": version, "tree": tree, "nodes": {}, "packages": {}, **values})


@pytest.fixture(scope="module")
def found(other: Path, tmp_path_factory: pytest.TempPathFactory) -> Preview:
    """The preview from the pinned tree to the other one, with a custom node that stays and one that changes."""
    place = tmp_path_factory.mktemp("nodes")
    part = "import comfy.taesd.taehv\ndef use(): return 1\n"
    stays = node(place / "stays", __init__=NODE, part=part)
    old_code = NODE.replace('"Theirs"', '"Former"').replace("use", "part")
    before, after = node(place / "before", __init__=old_code, part="part = 1"), node(place / "after", __init__="x = 1")
    arm = "cu130-linux_aarch64-cp312"
    x86 = "cu130-linux_x86_64-cp312"
    lists = {
        arm: locked(arm, "# Without Theirs: no wheel of insightface\nnumpy==2.1\n    # via comfyui.txt\n"),
        x86: locked(
            x86, "numpy==2.1\n    # via comfyui.txt\n    # via -r Stays.node.txt\n    # via accelerate\ntorch==2.14.1\n"
        ),
    }
    old = release(
        comfyui.tree(), "0.30.0", nodes={"Stays": stays, "Changes": before},
        packages={arm: {"numpy": "1.26"}, x86: {"numpy": "1.26", "torch": "2.11.0"}},
    )  # fmt: skip
    new = release(
        other, "0.31.0", nodes={"Stays": stays, "Changes": after}, locks=lists,
        packages={name: each.versions() for name, each in lists.items()},
    )  # fmt: skip
    saved: Workflows = {
        "gone.json": workflows.graphs("gone.json", [{"1": {"class_type": "LatentFlip", "inputs": {}}}]),
        "node.json": workflows.graphs("node.json", [{"1": {"class_type": "Former", "inputs": {"a": 1}}}]),
        "fits.json": workflows.graphs("fits.json", [{"1": {"class_type": "Theirs", "inputs": {"a": 1}}}]),
    }
    plain = {"--cpu-vae": "", "--reserve-vram": "1", "--fast": "a", "--lowvram": ""}
    chosen = {
        "profile a": (plain, plain),
        "mode b": ({"--fast": "a b"}, {"--fast": "a b"}),
        "host c": ({}, {"--fast": "a"}),  # only set for the new version
    }
    return preview.preview(old, new, chosen, saved)


def test_node_types(found: Preview) -> None:
    assert Change("LatentFlip", "removed") in found.types[COMFYUI]
    assert Change("KSampler", "input-removed", "denoise", "FLOAT") in found.types[COMFYUI]
    assert "Stays" not in found.types  # the same code
    assert "Changes" not in found.types  # what the new code has is not known
    assert found.unknown == {"types of Changes": "__init__"}


def test_workflows_that_use_what_is_gone(found: Preview) -> None:
    broken = {each.file: [(part.type, part.kind) for part in each.findings] for each in found.workflows}
    assert broken == {"gone.json": [("LatentFlip", "type")], "node.json": [], "fits.json": []}


def test_flags_of_profiles_modes_and_hosts(found: Preview) -> None:
    assert [(each.owner, each.flag, each.kind) for each in found.flags] == [
        ("profile a", "--cpu-vae", "removed"),
        ("profile a", "--fast", "changed"),
        ("profile a", "--reserve-vram", "conflict"),
        ("mode b", "--fast", "value"),
    ]


def test_packages(found: Preview) -> None:
    arm, x86 = "cu130-linux_aarch64-cp312", "cu130-linux_x86_64-cp312"
    (numpy,) = found.packages  # torch's major version stays
    assert (numpy.name, numpy.old, numpy.new, numpy.lists) == ("numpy", "1.26", "2.1", (arm, x86))
    assert numpy.by == (COMFYUI, "Stays")
    assert [(each.node, each.list) for each in found.unavailable] == [("Theirs", arm)]
    assert "insightface" in found.unavailable[0].reason


def test_migrations_of_the_database(found: Preview, tmp_path: Path) -> None:
    assert (found.migrations, found.newer) == ((), ("0006_add_loader_path",))
    texts = {"a": 'revision: str = "one"', "b": "revision = made()", "c": "x = 1"}
    for place, names in (("older", "a"), ("newer", "abc")):
        (tmp_path / place / "alembic_db/versions").mkdir(parents=True)
        for name in names:
            (tmp_path / place / f"alembic_db/versions/{name}.py").write_text(f'{texts[name]}\ndown_revision = "none"\n')
    none, older, newer = (release(tiny(tmp_path / name), name) for name in ("none", "older", "newer"))

    def compared(old: Release, new: Release) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
        made = preview.preview(old, new, {}, {})
        assert sum("database" in row for row in preview.rows(made)) == 2 * bool(made.migrations) + bool(made.newer)
        return made.migrations, made.newer, made.restores

    assert compared(older, newer) == (("b", "c"), (), True)
    assert compared(newer, older) == ((), ("b", "c"), False)
    # a ComfyUI without migrations starts with every database
    assert compared(none, newer) == (("b", "c", "one"), (), False)
    assert compared(newer, none) == ((), (), False)


def test_custom_nodes_that_fail(found: Preview) -> None:
    assert {(each.name, each.kind, each.places) for each in found.broken["Stays"]} == {
        ("comfy.utils.common_upscale", "missing", ("__init__.py:6",)),
        ("comfy.taesd.taehv", "missing", ("part.py:1",)),
    }
    assert found.broken.keys() == {"Stays"}


@pytest.mark.parametrize("fetched", [True, False])
def test_types_of_custom_nodes_that_a_server_reports(tmp_path: Path, fetched: bool) -> None:
    """`Stays` is in both releases, `Moves` has other code, `Leaves` is no longer configured, `Own` never was."""
    kind = interface.NodeType("", {}, ())
    running = Interface({each: msgspec.structs.replace(kind, module=f"custom_nodes.{each.rstrip('12')}") for each in (
        "Stays", "Moves1", "Moves2", "Leaves", "Own",
    )})  # fmt: skip
    tree = tiny(tmp_path / "comfyui")
    places = {name: node(tmp_path / name, __init__="NODE_CLASS_MAPPINGS = {}") for name in ("Stays", "Moves", "Leaves")}
    text = "class A:\n    RETURN_TYPES = ()\n    def INPUT_TYPES(): return {}\nNODE_CLASS_MAPPINGS = {'Moves1': A}\n"
    moved = node(tmp_path / "moved", __init__=text)
    gone = {} if fetched else {"Moves": "gone", "Leaves": "gone"}
    old = release(tree, "1", nodes={name: each for name, each in places.items() if name not in gone}, unknown=gone)
    new = release(tree, "1", nodes={"Stays": places["Stays"], "Moves": moved})
    saved: Workflows = {
        name: workflows.graphs(name, [{"1": {"class_type": name, "inputs": {}}}]) for name in running.types
    }
    made = preview.preview(old, new, {}, saved, running)
    assert {each.file for each in made.workflows if each.breaks} == {"Moves2", "Leaves"}


def test_types_of_an_unchanged_node_may_depend_on_comfyui(tmp_path: Path) -> None:
    old, new = (tiny(tmp_path / name) for name in ("old", "new"))
    (new / "comfy/fresh.py").write_text("class Fresh: pass\n")
    text = "NODE_CLASS_MAPPINGS = dict()\ntry:\n    from comfy.fresh import {}\nexcept ImportError:\n    pass\n"
    names = {"Uses": "Fresh", "Others": "Nothing", "Changes": "Fresh"}
    places = {name: node(tmp_path / name, __init__=text.format(each)) for name, each in names.items()}
    changed = {**places, "Changes": node(tmp_path / "after", __init__=text.format("Fresh"))}
    for before, after in ((old, new), (new, old)):
        made = preview.preview(release(before, "1", nodes=places), release(after, "2", nodes=changed), {}, {})
        assert made.unknown == {"types of Uses": "its code asks for what only one ComfyUI has: comfy.fresh.Fresh"}
        assert made.broken == {}


def test_every_change_has_a_row(found: Preview) -> None:
    rows = "\n".join(preview.rows(found))
    for part in (
        "LatentFlip removed", "gone.json:", "2 of 3 workflows", "--cpu-vae", "common_upscale", "__init__.py:6", "numpy",
        "insightface", "0006_add_loader_path", "unknown: types of Changes",
    ):  # fmt: skip
        assert part in rows
    assert json.loads(json.dumps(msgspec.to_builtins(found)))["new"] == "0.31.0"


def test_the_text_of_a_long_preview_is_bounded() -> None:
    changes = tuple(Change(f"Type{each}", kind) for kind in interface.KINDS for each in range(100))
    many = {f"node{each}": changes for each in range(100)}
    broken: dict[str, tuple[api.Broken, ...]] = {
        f"node{each}": (api.Broken("comfy.x", "missing", "", ("a.py:1",)),) for each in range(100)
    }
    rows = [*preview.rows(Preview(old="1", new="2", types=many, broken=broken, unknown=dict.fromkeys(many, "why")))]
    assert len(rows) == 1 + 4 * (preview.SHOWN + 1)
    assert [row for row in rows if "100 removed" in row]
    assert "... and 79980 more lines; --json has all" in rows
    assert all("removed" in row for row in rows if ": Type" in row)  # the worst ones first


def test_a_preview_without_differences_says_so() -> None:
    assert [*preview.rows(Preview(old="1", new="1"))] == ["ComfyUI 1: no differences were found"]


# --- what nodes use ---------------------------------------------------------------------------------------------------


def fails(apis: tuple[api.Api, api.Api], place: Path, text: str, **others: str) -> set[tuple[str, str]]:
    uses = api.uses(node(place / "node", __init__=text, **others))
    return {(each.name, each.kind) for each in api.broken(uses, *apis, uses)}


CALL = ("comfy.utils.repeat_to_batch_size", "call")
GONE = ("comfy.utils.common_upscale", "missing")


@pytest.mark.parametrize(
    ("text", "failing"),
    [
        ("from comfy.utils import common_upscale", {GONE}),
        ("import comfy.utils\ndef f(x): return comfy.utils.common_upscale(x)", {GONE}),
        ("import comfy.utils as u\nu.common_upscale", {GONE}),
        ("from comfy import utils\nutils.common_upscale", {GONE}),
        ("import comfy.taesd.taehv", {("comfy.taesd.taehv", "missing")}),
        ("from comfy.taesd.taehv import TAEHV", {("comfy.taesd.taehv", "missing")}),
        ("from comfy.utils import repeat_to_batch_size as r\nr(1, 2, dim=3)", {CALL}),
        ("from comfy.utils import repeat_to_batch_size as r\nr(1, 2)", set()),
        ("from comfy.utils import repeat_to_batch_size as r\nr(*a, dim=3)", set()),
        ("from comfy.utils import repeat_to_batch_size as r\nr(1, 2, **a)", set()),
        ("from comfy.utils import repeat_to_batch_size as r\nif new: r(1, 2)\nelse: r(1, 2, 3)", set()),
        ("from comfy.utils import load_torch_file, never_there", set()),
        ("from comfy.utils import *\ncommon_upscale", set()),
        ("from comfy.conds import anything", set()),
        ("try:\n from comfy.utils import common_upscale\nexcept ImportError: pass", set()),
        ("try:\n from comfy.utils import common_upscale\nexcept (KeyError, Exception): pass", set()),
        ("try:\n from comfy.utils import common_upscale\nexcept KeyError: pass", {GONE}),
        ("try: from comfy.new import x\nexcept ImportError:\n from comfy.utils import common_upscale", set()),
        ("import contextlib\nwith contextlib.suppress(ImportError):\n from comfy.utils import common_upscale", set()),
        ("import comfy.utils\nif hasattr(comfy.utils, 'common_upscale'): f = comfy.utils.common_upscale", set()),
        ("import comfy.utils\nf = getattr(comfy.utils, 'common_upscale', None)", set()),
        ("import comfy.utils\nif VERSION < (0, 31): f = comfy.utils.common_upscale", set()),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n from comfy.utils import common_upscale", set()),
        ("import comfy\ndef f(comfy): comfy.utils.common_upscale", set()),
        ("from .comfy.utils import common_upscale", set()),
        ("from .part import x", {GONE}),
        ("from . import part", {GONE}),
        ("import importlib\nimportlib.import_module('.part', __name__)", {GONE}),
        ("x = 1", set()),
        ("def f(:", set()),
        ("import comfy.utils\nx = " + "-" * 5000 + "comfy.utils.common_upscale", set()),
    ],
)  # fmt: skip
def test_uses(apis: tuple[api.Api, api.Api], tmp_path: Path, text: str, failing: set[tuple[str, str]]) -> None:
    assert fails(apis, tmp_path, text, part="from comfy.utils import common_upscale") == failing


PATCHED = """
def kept(a, b=1): pass
def longer(a, b): pass
def shorter(a, b, c): pass
def looser(a, b): pass
def named(a, *, b): pass
def gone(a): pass
def _wrap(f): return f
@_wrap
def unknown(a): pass
class Model:
    def run(self, a): pass
"""
MORE = {
    "longer(a, b)": "longer(a, b, c)", "shorter(a, b, c)": "shorter(a, b)", "looser(a, b)": "looser(a, b=1)",
    "named(a, *, b)": "named(a, *, b, c)", "def gone(a): pass": "", "unknown(a)": "unknown(a, b)",
    "run(self, a)": "run(self, a, b)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "failing"),
    [
        ("def mine(a, b=2): pass\nm.kept = mine", {}),
        ("def mine(a, b): pass\nm.longer = mine", {"longer": "patch"}),
        ("def mine(a, b): pass\nsetattr(m, 'longer', mine)", {"longer": "patch"}),
        ("def apply():\n def mine(a, b): pass\n m.longer = mine", {"longer": "patch"}),
        ("m.longer = lambda a, b: 1", {"longer": "patch"}),
        ("m.longer = x = lambda a, b: 1", {"longer": "patch"}),
        ("def mine(*a, **b): pass\nm.longer = m.named = m.shorter = mine", {}),
        ("def mine(a, b, c=1): pass\nm.longer = mine", {}),
        ("def mine(a): pass\nm.longer = mine", {}),  # nor did it fit before
        ("def mine(a, b, c): pass\nm.shorter = mine", {"shorter": "patch"}),
        ("def mine(a, b): pass\nm.looser = mine", {"looser": "patch"}),
        ("def mine(a, *, b): pass\nm.named = mine", {"named": "patch"}),
        ("def mine(self, a): pass\nm.Model.run = mine", {"Model.run": "patch"}),
        ("def mine(a): pass\nm.gone = mine", {"gone": "missing"}),
        ("def mine(a): pass\nif hasattr(m, 'gone'): m.gone = mine", {}),
        ("def mine(a): pass\nm.unknown = mine", {}),
        ("m.gone = make()", {"gone": "missing"}),
        ("from .part import wrapped\nm.gone = wrapped", {"gone": "missing"}),
        ("m.new = make()", {}),
        ("@wrap\ndef mine(a, b): pass\nm.longer = mine", {}),
        ("def mine(a, b): pass\nm.longer = wrap(mine)", {}),
        ("def mine(a, b): pass\ndef make():\n def mine(a, b, c): pass\n m.longer = mine", {}),
        ("def mine(a, b): pass\nm.longer = mine\nm.longer(1, 2, 3)", {"longer": "patch"}),
        ("from .part import mine\nm.longer = mine", {"longer": "patch"}),
        ("from .part import mine as other\nm.longer = other", {"longer": "patch"}),
        ("from . import part\nm.longer = part.mine", {"longer": "patch"}),
        ("from .part import wrapped\nm.longer = wrapped", {}),
        ("from .part import twice\nm.longer = twice", {}),
        ("from elsewhere import mine\nfrom . import part\nm.longer = mine", {}),
        ("def one(a, b): pass\ndef two(a, b, c): pass\nm.longer = one if old else two", {}),
    ],
)
def test_functions_of_comfyui_that_a_node_replaces(tmp_path: Path, text: str, failing: dict[str, str]) -> None:
    old, new = tiny(tmp_path / "old"), tiny(tmp_path / "new")
    (old / "comfy/mod.py").write_text(PATCHED)
    changed = PATCHED
    for before, after in MORE.items():
        changed = changed.replace(before, after)
    (new / "comfy/mod.py").write_text(changed)
    part = "def mine(a, b): pass\n@some\ndef wrapped(a, b): pass\ndef twice(a, b): pass\ndef twice(*a): pass\n"
    place = node(tmp_path / "node", __init__=f"import comfy.mod as m\n{text}", part=part)
    nodes = {"Mine": place}
    made = preview.preview(release(old, "1", nodes=nodes), release(new, "2", nodes=nodes), {}, {})
    found = made.broken.get("Mine", ())
    assert {each.name.removeprefix("comfy.mod."): each.kind for each in found if each.kind != "call"} == failing
    for each in found:
        verb = "replaces" if each.kind == "patch" else "uses" if each.kind == "missing" else "calls"
        assert [row for row in preview.rows(made) if row.startswith(f"custom node Mine {verb} {each.name}")]


def test_changed_code_must_fit_the_new_comfyui(apis: tuple[api.Api, api.Api], tmp_path: Path) -> None:
    text = "from comfy.utils import from_the_future\nimport comfy.utils\ncomfy.utils.load_torch_file(1, 2, 3, 4, 5)\n"
    uses, none = api.uses(node(tmp_path / "node", __init__=text)), api.Uses(())
    assert {(each.name, each.kind) for each in api.broken(uses, *apis, none)} == {
        ("comfy.utils.from_the_future", "missing"),
        ("comfy.utils.load_torch_file", "call"),
    }
    assert api.broken(uses, *apis, uses) == []


def test_own_module_with_a_name_of_comfyui(apis: tuple[api.Api, api.Api], tmp_path: Path) -> None:
    text = "import sys\nsys.path.append(here)\nfrom comfy.utils import common_upscale"
    assert fails(apis, tmp_path, text, comfy="") == set()


def test_files_that_cannot_be_read_are_left_out(apis: tuple[api.Api, api.Api], tmp_path: Path) -> None:
    deep = "from comfy.utils import common_upscale\nx = " + "comfy" + ".utils" * 3000
    place = node(
        tmp_path / "node",
        __init__="from . import large, deep, folder, part",
        deep=deep,
        part="import comfy.taesd.taehv",
    )
    (place / "large.py").write_text("from comfy.utils import common_upscale\n" + "#" * 1_000_001)
    (place / "folder.py").mkdir()
    uses = api.uses(place)
    assert "comfy.taesd.taehv" in {each.name for each in api.broken(uses, *apis, uses)}


def test_names_that_stars_and_code_may_define(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "comfy/sub").mkdir(parents=True)
    files = {
        "a": "from .b import *\nfrom .c import *", "b": "x = 1\nwith open(1) as w: pass\nif w: y = 2", "c": "z = 1",
        "d": "from torch import *", "e": "globals()['q'] = 1", "f": "def g():\n global made\n made = 1", "h": "def (",
        "i": "from .c import\\\n*",
    }  # fmt: skip
    for name, text in files.items():
        (tree / f"comfy/{name}.py").write_text(text)
    (tree / "comfy/sub/inner.py").write_text("")
    found = api.read(tree)
    names = "a.x a.z a.none b.w b.y d.any e.any f.made f.none h.any i.z sub sub.inner sub.none"
    states = {name: found.find(f"comfy.{name}")[1] for name in names.split()}
    assert {name for name, state in states.items() if state is False} == {"a.none", "f.none", "sub.none"}
    assert {name for name, state in states.items() if state is None} == {"d.any", "e.any", "h.any"}


def test_known_nodes_fit_the_pinned_comfyui(apis: tuple[api.Api, api.Api]) -> None:
    """Of all imports and calls in their code, as far as the cache has it, none is reported."""
    known = {name: source.cached(node.pinned(name)) for name, node in nodes.catalogue().nodes.items()}
    found = set()
    for name, place in known.items():
        uses = kept(api.Uses, api.uses, place) if place else api.Uses(())
        found |= {(name, each.name) for each in api.broken(uses, apis[0], apis[0], api.Uses(()))}
    assert found == set()


# --- hosts ------------------------------------------------------------------------------------------------------------


class Machine:
    """An agent that answers with node types and a workflow, or not."""

    def __init__(self, error: HostError | None = None) -> None:
        self.error = error

    def call(self, verb: str, **values: Any) -> Any:
        assert (verb, values) == ("node-types", {"workflows": True})
        if self.error:
            raise self.error
        kind = {"input": {"required": {"a": ["INT", {}]}}, "output": [], "python_module": "nodes"}
        gone = {"1": {"class_type": "Gone", "inputs": {"a": 1}}}
        return {"types": {"Gone": kind, "A": kind}, "workflows": {"mine.json": gone}}


TINY = """
class A:
    RETURN_TYPES = ()
    @classmethod
    def INPUT_TYPES(cls): return {"required": {"a": ("INT",)}}
"""


@pytest.fixture
def deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Spark with a release of a small ComfyUI 1.0, and the inputs of 1.1, which lacks a node type and a flag."""
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    trees = {}
    for version, types, flags in (("1.0", "{'A': A, 'Gone': A}", "--old"), ("1.1", "{'A': A}", "--new")):
        place = tmp_path / "draft"
        (place / "comfy").mkdir(parents=True)
        (place / "nodes.py").write_text(f"{TINY}NODE_CLASS_MAPPINGS = {types}\n")
        (place / "comfy/cli_args.py").write_text(f"parser.add_argument('{flags}', action='store_true')\n")
        trees[version] = files.tree_hash(place)
        (tmp_path / "cache/sources").mkdir(parents=True, exist_ok=True)
        place.rename(tmp_path / f"cache/sources/comfyui-{trees[version][:16]}")
    git = (source.Source(git="https://localhost:1/none", commit="0" * 40),)

    def stock(version: str) -> Any:
        made = plans.inputs()
        values = {"version": version, "tree": trees[version], "source": git}
        return replace(made, application=msgspec.structs.replace(made.application, **values))

    selection, _ = choose(plans.spark(), plans.FRESH, stock("1.0"))
    assert selection
    manifest = releases.manifest(selection, plans.FRESH.prefix)
    facts = replace(plans.settled(), current=manifest.id, releases=(manifest,))
    return facts, stock("1.1"), tmp_path / f"cache/sources/comfyui-{trees['1.0'][:16]}"


def test_preview_of_a_host(deployed: Any) -> None:
    facts, stock, _ = deployed
    found = hosts_preview.preview(Machine(), plans.spark(), facts, stock)  # type: ignore[arg-type]
    assert found
    assert (found.old, found.new) == ("1.0", "1.1")
    assert found.types == {COMFYUI: (Change("Gone", "removed"),)}
    assert {each.file: each.breaks for each in found.workflows} == {"spark:mine.json": True}
    assert found.drivers["spark"].fits
    assert found.unknown == {}


HOSTS = "".join(
    f'[hosts.{name}]\naddress = "localhost"\nprofile = "{profile}"\n{more}\n'
    for name, profile, more in (
        ("enough", "cuda", ""), ("older", "cuda", ""), ("silent", "cuda", ""), ("away", "cuda", ""), ("cpu", "cpu", ""),
        ("other", "cuda", 'override.stack = "cu124"'),
        ("elsewhere", "cuda", 'comfyui = "0.1.0"\noverride.stack = "cu124"'),
    )
)  # fmt: skip


def test_an_update_asks_hosts_for_the_driver_that_the_new_stack_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts.toml").write_text(HOSTS)
    monkeypatch.setenv("HEARTH_HOSTS", str(tmp_path / "hosts.toml"))
    drivers, asked = {"enough": "595.45.04", "older": "580.95.05", "silent": ""}, set[str]()

    @contextmanager
    def connect(target: Target, *_: object, **__: object) -> Iterator[Any]:
        asked.add(target.name)
        if target.name not in drivers:
            raise ConnectError("unreachable", "no route")
        facts = msgspec.to_builtins(replace(plans.FRESH, driver=drivers[target.name]))
        yield SimpleNamespace(call=lambda *_, **__: facts)

    monkeypatch.setattr(connection, "connect", connect)
    old = release(tiny(tmp_path / "comfyui"), application().version, stacks=stacks())
    new = msgspec.structs.replace(stacks()["cu130"], torch="2.15.0", cuda="13.2", driver="595.45.04")
    found = hosts_preview.of_update(old, replace(old, version="0.46.0", stacks={**stacks(), "cu130": new}))
    assert asked == {"enough", "older", "silent", "away"}
    assert {host: (each.fits, each.needs) for host, each in found.drivers.items()} == {
        "enough": (True, "595.45.04"), "older": (False, "595.45.04"), "silent": (None, "595.45.04"),
    }  # fmt: skip
    assert [name for name in found.unknown if name.startswith("driver")] == ["driver of away"]
    assert found.unfit.keys() == {"other"}
    assert "cu124" in found.unfit["other"]
    assert "2 hosts cannot run it" in report.summary(Proposal(preview=found), None, [])
    asked.clear()
    assert hosts_preview.of_update(old, old).drivers == {}
    assert asked == set()


@pytest.mark.parametrize("kind", ["stopped", "no source", "damaged", "other manifest"])
def test_what_cannot_be_had_is_unknown(deployed: Any, kind: str) -> None:
    facts, stock, tree = deployed
    error = HostError("no-answer", "ComfyUI does not answer") if kind == "stopped" else None
    if kind == "no source":
        tree.rename(tree.with_name("gone"))
    elif kind == "damaged":
        (tree / "nodes.py").write_text("x = 1")
    elif kind == "other manifest":
        facts = replace(facts, releases=(replace(facts.releases[0], sources=({"later": "field"},)),))
    found = hosts_preview.preview(Machine(error), plans.spark(), facts, stock)  # type: ignore[arg-type]
    assert found
    parts = {"stopped": {"workflows saved on spark"}, "no source": {"ComfyUI in service"}}
    assert found.unknown.keys() == parts.get(kind, {"preview"})
    if kind == "no source":  # the running server knows its types
        assert [each.breaks for each in found.workflows] == [True]


def test_release_whose_source_has_other_files_now(deployed: Any, tmp_path: Path) -> None:
    """Other `paths` than those with which it was deployed, and a cache that was cleared."""
    facts, stock, tree = deployed
    (tree / "README").write_text("more")
    config = ("user.name a", "user.email a@b", "uploadpack.allowAnySHA1InWant true", "uploadpack.allowFilter true")
    for words in ("init -q", *(f"config {each}" for each in config), "add -A", "commit -qm x"):
        subprocess.run(["git", "-C", str(tree), *words.split()], check=True)
    commit = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    tree.rename(tmp_path / "repository")
    sources = ({"git": f"file://{tmp_path}/repository", "commit": commit.stdout.strip()},)
    facts = replace(facts, releases=(replace(facts.releases[0], sources=sources),))
    found = hosts_preview.preview(Machine(), plans.spark(), facts, stock)  # type: ignore[arg-type]
    assert found
    assert (found.unknown, found.types) == ({}, {COMFYUI: (Change("Gone", "removed"),)})


def test_release_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "fetch", lambda known: {name: Path(name) for name in known})
    lock = locked("cu130-linux_aarch64-cp312", "numpy==2.1\n")
    made = preview.of_checkout(application(), nodes.Catalogue(), [lock])
    assert (made.tree, made.packages) == (comfyui.tree(), {lock.name: {"numpy": "2.1"}})


def test_no_preview_without_a_change(deployed: Any) -> None:
    facts, stock, _ = deployed
    machine: Any = Machine()
    assert hosts_preview.preview(machine, plans.spark(), plans.FRESH, stock) is None
    same = msgspec.structs.replace(stock.application, tree=facts.releases[0].tree, version="1.0")
    assert hosts_preview.preview(machine, plans.spark(), facts, replace(stock, application=same)) is None
    former = NodeSource("https://a/b", "0" * 40, "0" * 64)
    facts = replace(facts, releases=(replace(facts.releases[0], nodes={"Former": former}),))
    assert hosts_preview.preview(machine, plans.spark(), facts, replace(stock, application=same))


def test_flags_of_this_checkout_fit_both_versions() -> None:
    chosen = hosts_preview.chosen_flags("0.30.0", "0.30.0")
    assert {"profile dgx-spark", "mode low-memory", "mode low-memory (unified memory)", "host local"} <= chosen.keys()
    known = preview._known(comfyui.tree())
    assert [*preview._flags(known, known, chosen)] == []
    assert interface.compare(Interface({}), Interface({})) == []


def test_what_two_versions_share_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"same.py": "import os\ndef same(a): pass\n", "changed.py": "def old(a): global other\n"}
    for version in ("old", "new"):
        for name, text in texts.items():
            path = tmp_path / version / "comfy" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("old", version) + f"# {tmp_path.name}\n" * (name == "same.py"))
    parsed, parse = [], foreign.parsed

    def counted(path: Path) -> object:
        parsed.append(path.name)
        assert not gc.isenabled()
        return parse(path)

    monkeypatch.setattr(foreign, "parsed", counted)
    old, new = (kept(api.Api, api.read, tmp_path / version) for version in ("old", "new"))
    assert sorted(parsed) == ["changed.py", "changed.py", "same.py"]
    assert gc.isenabled()
    assert old.modules["comfy.same"] == new.modules["comfy.same"]
    assert [{*each.modules["comfy.changed"].names} for each in (old, new)] == [{"old", "other"}, {"new", "other"}]


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A ComfyUI and a custom node among the fetched sources."""
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path))
    (tmp_path / "sources").mkdir()
    tree = tiny(tmp_path / "sources/comfyui")
    (tree / "comfy/samplers.py").write_text("def sample(a): pass\n")
    return tree, node(tmp_path / "sources/node", __init__="import comfy.samplers\ncomfy.samplers.sample(1)\n")


def test_another_process_reads_what_nodes_use(fetched: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tree, place = fetched
    with ahead.reading([tree], [place.with_name("gone"), place]):
        pass

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(foreign, "parsed", never)
    monkeypatch.setattr(foreign, "python", never)
    assert kept(api.Api, api.read, tree).modules["comfy.samplers"].names.keys() == {"sample"}
    assert {each.name for each in kept(api.Uses, api.uses, place).uses} == {"comfy.samplers", "comfy.samplers.sample"}
    monkeypatch.setattr(shell, "run", never)
    with ahead.reading([tree], [place.with_name("new")]):
        pass


@pytest.mark.parametrize("program", ["false", "nothing-of-this-name"])
def test_what_another_process_cannot_read_is_read_here(
    fetched: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    tree, place = fetched
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", program)
        with ahead.reading([tree], [place]):
            pass
    assert kept(api.Api, api.read, tree).modules.keys() == {"comfy", "comfy.cli_args", "comfy.samplers", "nodes"}
