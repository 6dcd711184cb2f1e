"""Workflows: their nodes in every format, and what of them a ComfyUI lacks."""

from __future__ import annotations

import json
import mmap
import os
import re
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from core import workspace
from core.errors import ConfigError, HearthError
from lock import embedded
from lock.embedded import TEXT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

    from lock.interface import Input, Interface, NodeType

_Part = tuple[str, str, str]  # kind, name and detail of a finding

EDITOR = {"MarkdownNote", "Note", "PrimitiveNode", "Reroute"}
"""Node types of the editor itself, which ComfyUI never receives."""

VIRTUAL = {
    "ComfyUI-Crystools": r"Show Metadata \[Crystools\]",
    "comfy_mtb": r"Note Plus \(mtb\)",
    "rgthree-comfy": r"(Bookmark|Fast \w+ ?\w*|Label|Mute / Bypass \w+|Node Co\w+|Random Unmuter|Reroute) \(rgthree\)",
    "ComfyUI-KJNodes": r"[GS]etNode",
    "ComfyUI-Easy-Use": r"easy [gs]etNode",
}
"""Node types that only the JavaScript of a custom node defines, as patterns: they are in no list of node types."""


class Node(msgspec.Struct):
    """A node of a workflow.

    `links` are its connected inputs with the node and output that each comes from, None if that is not a node with a
    type of its own. `values` are its inputs by name; in the editor's format they are a list, of which `names` are the
    names as far as the file has them. `muted` nodes may be bypassed instead; inputs of `grouped` ones that are not
    connected may be those of their group node.
    """

    id: str
    type: str
    links: dict[str, tuple[str, int] | None]
    values: dict[str, Any] | list[Any]
    names: list[str] = []
    muted: bool = False
    api: bool = False
    grouped: bool = False


class Finding(msgspec.Struct, frozen=True):
    """A part of a workflow that a ComfyUI lacks.

    `kind` is `type`, `input`, `output`, `value`, `range`, `link` (its ends have different types), `required` (an input
    without a value) or `replaced`: ComfyUI itself replaces the type by `name`.
    """

    node: str
    type: str
    kind: str
    name: str = ""
    detail: str = ""
    muted: bool = False


class Report(msgspec.Struct, frozen=True):
    """The findings of a workflow, or the reason why it cannot be read.

    With another version, findings are what it changes; `already` counts those that the pinned ComfyUI has as well.
    """

    file: str
    findings: tuple[Finding, ...] = ()
    already: int = 0
    error: str = ""

    @property
    def breaks(self) -> bool:
        """Whether the workflow does not run any more."""
        return any(not each.muted and each.kind != "replaced" for each in self.findings)


Workflows = dict[str, "list[list[Node]] | HearthError"]
"""Workflows by file name, or the reason why a file cannot be read."""


def read(path: Path) -> list[list[Node]]:
    """Read the workflows of a JSON file, or those embedded in a picture, video, sound, latent or 3D model.

    ComfyUI embeds a workflow twice, in both formats. Raises ConfigError for a file without one.
    """
    if not path.is_file():
        cause = "it is a folder" if path.is_dir() else "it is not a file" if path.exists() else "it does not exist"
        raise ConfigError("config", f"{path} cannot be read", cause=cause, hint="name workflow files")
    try:
        with path.open("rb") as file:
            start = file.read(16).lstrip(_MARKS)
            if text := start[:1] in (b"{", b"[", b""):
                file.seek(0)
                found: Iterable[Any] = [_parsed(path, file.read(TEXT + 1))]
            else:
                found = embedded.objects(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            return graphs(str(path), found, "it has no nodes" if text else "no workflow is embedded in it")
    except OSError as error:
        cause = error.strerror or ""
        raise ConfigError("config", f"{path} cannot be read", cause=cause, hint="name workflow files") from None


def read_api(path: Path) -> dict[str, Any]:
    """Read a workflow in the API format, which ComfyUI runs. Raises ConfigError.

    The editor's format is refused: converting it needs the front end's own code, and that of its extensions.
    """
    read(path)  # raises for anything that is no workflow
    raw = path.read_bytes()
    found = _parsed(path, raw) if raw.lstrip(_MARKS)[:1] == b"{" else {}
    steps = found.get("prompt", found)
    if steps and all(isinstance(each, dict) and "class_type" in each for each in steps.values()):
        return {key: {**each, "inputs": each.get("inputs") or {}} for key, each in steps.items()}
    raise ConfigError(
        "config",
        f"{path} is not in the API format",
        cause="ComfyUI cannot run the format of its editor",
        hint="export it in ComfyUI: File > Export (API)",
    )


def graphs(name: str, contents: Iterable[Any], none: str = "it has no nodes") -> list[list[Node]]:
    """The workflows in JSON values of a file or host; raises ConfigError with the cause `none` if there are none."""
    try:
        found = [graph for each in contents for graph in _graphs(each)]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _no_workflow(name, f"damaged: {error!r}"[:300]) from None
    if not found:
        raise _no_workflow(name, none)
    return found


def collect(names: Sequence[str] = ()) -> Workflows:
    """Read workflow files; without names or patterns, those in `config/workflows`."""
    own = workspace.current().checkout / "config/workflows"
    paths = [str(each) for each in sorted(own.rglob("*")) if each.is_file()] if not names else []
    for name in map(os.path.expanduser, names):
        paths += ("" if Path(name).exists() else sorted(glob(name, recursive=True))) or [name]  # noqa: PTH207  absolute patterns, too
    found: Workflows = {}
    for path in paths:
        try:
            found[path] = read(Path(path))
        except ConfigError as error:
            found[path] = error
    return found


_MARKS = b"\xef\xbb\xbf\xff\xfe\0 \t\r\n"
"""What may be before the first character of a text: byte order marks, spaces, and the zeros of UTF-16."""


def _no_workflow(path: Path | str, cause: str) -> ConfigError:
    return ConfigError("config", f"{path} is not a workflow", cause=cause, hint="save or export it again in ComfyUI")


def _parsed(path: Path, raw: bytes) -> Any:
    if len(raw) > TEXT:
        raise _no_workflow(path, f"it is larger than {TEXT // 1_000_000} MB")
    try:
        return json.loads(raw)  # UTF-8, UTF-16 or UTF-32, with or without a byte order mark
    except (ValueError, RecursionError) as error:
        raise _no_workflow(path, f"not JSON: {error}" if raw.strip(_MARKS) else "it is empty") from None


def _graphs(content: Any, depth: int = 4) -> Iterator[list[Node]]:
    """The workflows in a request, a history or metadata, which may be text in text; or the content itself."""
    if isinstance(content, str) and content[:1] == "{":
        try:
            content = json.loads(content)
        except (ValueError, RecursionError):
            return
    if isinstance(content, list):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return
    nodes = content.get("nodes")
    steps = {key: each for key, each in content.items() if isinstance(each, dict) and "class_type" in each}
    scene = "asset" in content  # glTF has nodes, too
    if isinstance(nodes, list) and not scene and all(isinstance(each, dict) and "type" in each for each in nodes):
        yield list(_editor_nodes(content))
    elif steps:
        yield [_api_node(key, each) for key, each in steps.items()]
    elif depth:
        for each in content.values():
            yield from _graphs(each, depth - 1)


def _api_node(key: str, step: dict[str, Any]) -> Node:
    inputs = step.get("inputs") or {}
    links = {
        name: (str(value[0]), value[1])
        for name, value in inputs.items()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
    }
    values = {name: value for name, value in inputs.items() if name not in links}
    return Node(key, _type(step["class_type"]), {**links}, values, api=True)


def _type(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError("a node type is not text")
    return name


def _editor_nodes(
    graph: dict[str, Any], prefix: str = "", outer: Set[str] = frozenset(), *, muted: bool = False
) -> Iterator[Node]:
    """The nodes of a graph in the editor's format, and of its subgraphs and group nodes, which a muted node mutes."""
    inner = {str(each["id"]): each for each in (graph.get("definitions") or {}).get("subgraphs") or ()}
    groups = (graph.get("extra") or {}).get("groupNodes") or {}
    named = {f"workflow{mark}{name}": each for name, each in groups.items() for mark in ">/"}
    defined, used = {*outer, *inner, *named}, _used(graph, {**inner, **named})
    sources = {}
    for each in graph.get("links") or ():
        link, node, slot = (each["id"], each["origin_id"], each["origin_slot"]) if isinstance(each, dict) else each[:3]
        sources[link] = (f"{prefix}{node}", int(slot))
    for node in graph["nodes"]:
        if node["type"] not in {None, *defined}:
            inputs = [each for each in node.get("inputs") or () if isinstance(each, dict)]
            yield Node(
                f"{prefix}{node.get('id')}",
                _type(node["type"]),
                {each["name"]: sources.get(each["link"]) for each in inputs if each.get("link") is not None},
                node.get("widgets_values") or [],
                [each["widget"]["name"] for each in inputs if each.get("widget")],
                muted or node.get("mode") in _MUTED,
                grouped=graph.get("grouped") is True,
            )
    for key, each in inner.items():
        off = muted or key not in used
        yield from _editor_nodes(each, f"{prefix}{each.get('name') or key}/", defined, muted=off)
    for name, each in groups.items():
        off = muted or not used & {f"workflow>{name}", f"workflow/{name}"}
        yield from _editor_nodes(_group(each), f"{prefix}{name}/", defined, muted=off)


_MUTED = (2, 4)
"""The editor's modes of nodes that do not run: never, and bypassed."""


def _used(graph: dict[str, Any], inner: Mapping[str, dict[str, Any]]) -> set[str]:
    """The subgraphs and group nodes that run: a node that is not muted stands for them, also inside another one."""
    found, waiting = set[str](), [graph]
    while waiting:
        types = {each.get("type") for each in waiting.pop()["nodes"] if each.get("mode") not in _MUTED}
        fresh = (types & inner.keys()) - found
        found |= fresh
        waiting += [inner[each] for each in fresh]
    return found


def _group(stored: dict[str, Any]) -> dict[str, Any]:
    """A group node as a graph: its links name nodes and inputs by their places."""
    nodes = [
        {**node, "id": at, "inputs": [{**each, "link": None} for each in node.get("inputs") or ()]}
        for at, node in enumerate(stored["nodes"])
    ]
    links: list[list[Any]] = []
    for source, slot, target, at, *_ in stored.get("links") or ():
        nodes[target]["inputs"][at]["link"] = len(links)
        links.append([len(links), source, slot])
    return {"nodes": nodes, "links": links, "grouped": True}


def pack(node_type: str) -> str:
    """The custom node whose JavaScript defines a type; "" if none is known to."""
    return next((name for name, pattern in VIRTUAL.items() if re.fullmatch(pattern, node_type)), "")


def check(nodes: Sequence[Node], known: Interface, order: Interface | None = None) -> list[Finding]:
    """What these nodes use and a ComfyUI lacks. What is not known of it is not reported.

    `order` is the ComfyUI with which the workflow was saved, if another one: the editor stores values without names.
    """
    found: list[Finding] = []
    by_id = {node.id: node for node in nodes}
    connectable = {part for each in known.types.values() for made in each.outputs or () for part in made.split(",")}
    for node in nodes:
        kind = known.types.get(node.type)
        if kind is None:
            found += _lacking(node, known)
        elif not node.muted:
            saved = (order or known).types.get(node.type, kind)
            values = {name: each for name, each in _values(node, saved).items() if name not in node.links}
            parts = [
                *_inputs(node, kind, values, connectable),
                *_unfit(kind, values),
                *_links(node, kind, known, by_id),
            ]
            found += [Finding(node.id, node.type, *each) for each in parts]
    return found


def _lacking(node: Node, known: Interface) -> Iterator[Finding]:
    virtual = pack(node.type)
    if node.type in EDITOR or (virtual and virtual.lower() in known.packs):
        return
    if (new := known.replaced.get(node.type)) and (new in known.types or known.unknown):
        yield Finding(node.id, node.type, "replaced", new, muted=node.muted)
    elif not known.unknown or node.type.startswith("workflow"):
        yield Finding(node.id, node.type, "type", detail=virtual and f"of {virtual}", muted=node.muted)


def _values(node: Node, kind: NodeType) -> dict[str, Any]:
    """The values of a node by name; empty if the file does not tell which is which."""
    if isinstance(node.values, dict):
        return node.values
    inputs = kind.inputs or {}
    for names in (node.names, [name for name, each in inputs.items() if each.widget]):
        found = _named(names, node.values, inputs)
        if found and all(_is(value, inputs[name].type) for name, value in found.items() if name in inputs):
            return found
    return {}


def _named(names: Sequence[str], values: Sequence[Any], inputs: Mapping[str, Input]) -> dict[str, Any]:
    """Values by name, if there is one for each. After a seed, the editor adds what happens to it with the next job."""
    found, rest = {}, [*values]
    for name in names:
        if not rest:
            return {}
        found[name] = rest.pop(0)
        kind = inputs[name].type if name in inputs else "INT"
        if rest and kind == "INT" and rest[0] in ("fixed", "increment", "decrement", "randomize"):
            rest.pop(0)
    return {} if rest else found


def _is(value: Any, kind: str) -> bool:
    if kind in ("INT", "FLOAT"):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, {"BOOLEAN": bool, "STRING": str}.get(kind, object))


def _input(kind: NodeType, name: str) -> Input | None:
    """The input of a type by name, or the one that stands for it."""
    inputs = kind.inputs or {}
    outer = inputs.get(name.partition(".")[0])
    return inputs.get(name) or (outer if outer and outer.open else None)


_SHOWN = {"audioUI", "upload"}
"""Widgets that the editor adds to a node: a player and a button."""


def _inputs(node: Node, kind: NodeType, values: Mapping[str, Any], connectable: Set[str]) -> Iterator[_Part]:
    """Connected or valued inputs that a type lacks, and required ones without a connection or value."""
    if kind.inputs is None:
        return
    used = {*node.links, *values} - _SHOWN
    if kind.complete:
        yield from (("input", name, "") for name in sorted(used) if not _input(kind, name))
    for name, each in kind.inputs.items():
        needed = node.api or not (node.grouped or each.widget or connectable.isdisjoint(each.type.split(",")))
        if each.required and not each.open and name not in used and needed:
            yield "required", name, each.type


def _unfit(kind: NodeType, values: Mapping[str, Any]) -> Iterator[_Part]:
    """Values that are not in the list or range of their input."""
    for name, value in values.items():
        each = (kind.inputs or {}).get(name)
        if each is None:
            continue
        if each.values is not None:
            wrong = [part for part in (value if isinstance(value, list) else [value]) if part not in each.values]
            if wrong and not isinstance(value, dict):
                yield "value", name, ", ".join(map(str, wrong))
        elif _is(value, "FLOAT") and each.type in ("INT", "FLOAT"):
            low, high = each.low, each.high
            if (low is not None and value < low) or (high is not None and value > high):
                yield (
                    "range",
                    name,
                    f"{value}, not {low:g} to {high:g}" if low is not None and high is not None else f"{value}",
                )


def _links(node: Node, kind: NodeType, known: Interface, by_id: Mapping[str, Node]) -> Iterator[_Part]:
    """Connections from outputs that do not exist, or of another type."""
    for name, source in node.links.items():
        origin = by_id.get(source[0]) if source else None
        made = known.types.get(origin.type) if origin else None
        if source is None or origin is None or made is None or made.outputs is None:
            continue
        if source[1] >= len(made.outputs):
            yield "output", name, f"output {source[1]} of {origin.type}"
        elif (each := (kind.inputs or {}).get(name)) and not _compatible(made.outputs[source[1]], each.type):
            yield "link", name, f"{made.outputs[source[1]]} of {origin.type}, not {each.type}"


def _compatible(output: str, wanted: str) -> bool:
    both = (set(output.split(",")), set(wanted.split(",")))
    loose = any(each in ("", "*", "COMBO") or each.startswith("COMFY_") for side in both for each in side)
    return loose or bool(both[0] & both[1])


def report(name: str, found: list[list[Node]] | HearthError, new: Interface, old: Interface | None) -> Report:
    """What a workflow uses and `new` lacks; with `old`, only what that one has."""
    if isinstance(found, HearthError):
        return Report(name, error=str(found))
    now = {each: None for graph in found for each in check(graph, new, old)}
    before = {each for graph in found for each in check(graph, old)} if old else set()
    return Report(name, tuple(each for each in now if each not in before), len(before & now.keys()))


SAYS = {
    "type": "{0.type} does not exist{1}",
    "replaced": "ComfyUI replaces {0.type} by {0.name}",
    "input": "{0.type} has no input {0.name}",
    "output": "{0.type}.{0.name} is connected to {0.detail}, which does not exist",
    "value": "{0.type}.{0.name} does not accept {0.detail}",
    "range": "{0.type}.{0.name} does not accept {0.detail}",
    "link": "{0.type}.{0.name} is connected to {0.detail}",
    "required": "{0.type}.{0.name} is required and has no value",
}


def rows(report: Report) -> Iterator[str]:
    """A line for each finding, with all nodes that have it."""
    nodes: dict[str, list[str]] = {}
    for one in report.findings:
        line = SAYS[one.kind].format(one, f" ({one.detail})" * bool(one.detail)) + ", but is muted" * one.muted
        nodes.setdefault(line, []).append(one.node)
    if nodes or report.already:
        yield f"{report.file}:"
    yield from (f"  {line}: node {', '.join(dict.fromkeys(ids))}" for line, ids in nodes.items())
    if report.already:
        yield f"  unchanged: {report.already} findings that the pinned ComfyUI has as well"
