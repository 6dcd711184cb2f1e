"""The node types of a ComfyUI or a custom node: inputs, values and outputs, read from its code without running it.

What cannot be read stays unknown, and is never reported as removed.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

import msgspec

from core import foreign
from core.console import counted
from core.errors import ConfigError, HostError
from core.typed import convert
from lock.evaluate import Code, LimitError
from lock.readings import kept
from lock.values import UNKNOWN, Class, Instance, Module

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


class Input(msgspec.Struct, frozen=True):
    """An input: its type ("" if not known), the values of a list (None if not known or not a list), and its range.

    `open` is an input that stands for several, `NAME.PART`.
    """

    type: str
    required: bool
    values: tuple[Any, ...] | None = None
    low: float | None = None
    high: float | None = None
    widget: bool = False
    open: bool = False


class NodeType(msgspec.Struct, frozen=True):
    """A node type: the module that defines it, its inputs by name, and the types of its outputs.

    None are inputs or outputs that are not known. `complete` says that `inputs` are all of them.
    """

    module: str
    inputs: dict[str, Input] | None
    outputs: tuple[str, ...] | None
    complete: bool = True


class Interface(msgspec.Struct, frozen=True):
    """The node types of a ComfyUI by name.

    `replaced` are former types, for which ComfyUI uses others; `unknown` are modules with types that are not known;
    `packs` are the names of its custom nodes in lower case.
    """

    types: dict[str, NodeType]
    replaced: dict[str, str] = {}
    unknown: tuple[str, ...] = ()
    packs: frozenset[str] = frozenset()


def read_cached(tree: Path) -> Interface:
    """Like `read`; the node types of a fetched source, which never changes, are read once."""
    return kept(Interface, read, tree)


def read_node_cached(tree: Path, comfyui: Path) -> Interface:
    """Like `read_node`, read once."""
    return kept(Interface, read_node, tree, comfyui)


def read(tree: Path) -> Interface:
    """Read the node types of a ComfyUI tree; raises ConfigError for another folder."""
    code = Code(tree)
    main = code.module("nodes")
    if main is None or "NODE_CLASS_MAPPINGS" not in main.statements:
        raise ConfigError(
            "config", f"{tree} is not a ComfyUI", cause="its nodes.py is missing or defines no node types",
            hint="name a folder with ComfyUI's main.py",
        )  # fmt: skip
    names = ["nodes", *_listed(main, tree, "extras_files", "comfy_extras")]
    names += _listed(main, tree, "api_nodes_files", "comfy_api_nodes")
    return _read(code, names)


def read_node(tree: Path, comfyui: Path) -> Interface:
    """Read the node types of a custom node; its code may use ComfyUI's."""
    return _read(Code(tree, comfyui), [""])


def _listed(main: Module, tree: Path, variable: str, folder: str) -> list[str]:
    """The modules of a folder that ComfyUI imports: as its nodes.py lists them, else all."""
    for node in ast.walk(ast.Module(main.body, [])):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.List)
            and ast.unparse(node.targets[0]) == variable
        ):
            return [f"{folder}.{ast.literal_eval(each).removesuffix('.py')}" for each in node.value.elts]
    return sorted(f"{folder}.{path.stem}" for path in (tree / folder).glob("nodes_*.py"))


def _read(code: Code, names: list[str]) -> Interface:
    types: dict[str, NodeType] = {}
    replaced: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        module = code.module(name)
        found = _classes(code, module) if module else {UNKNOWN: UNKNOWN}
        for key, kind in found.items():
            if isinstance(key, str):
                types[key] = _limited(code, name, kind)
            else:
                unknown.append(name)
        if module and module.path and b"NodeReplace" in foreign.content(module.path):
            replaced = {**_replacements(module), **replaced}
    return Interface(types, replaced, tuple(unknown))


def _classes(code: Code, module: Module) -> dict[Any, Any]:
    """The classes of a module's node types by name; with the key UNKNOWN if there are others."""
    code.steps = 0
    try:
        if "NODE_CLASS_MAPPINGS" in module.statements:
            found = code.value(module, "NODE_CLASS_MAPPINGS")
            return found if isinstance(found, dict) else {UNKNOWN: UNKNOWN}
        extension = code.call(code.value(module, "comfy_entrypoint"))
        listed = code.call(code.attribute(extension, "get_node_list"))
        if not isinstance(listed, list):
            return {UNKNOWN: UNKNOWN}
        return {_node_id(code, each): each for each in listed}
    except (LimitError, RecursionError):
        return {UNKNOWN: UNKNOWN}


def _node_id(code: Code, kind: Any) -> Any:
    found = code.attribute(_schema(code, kind), "node_id")
    return found if isinstance(found, str) else UNKNOWN


def _schema(code: Code, kind: Any) -> Any:
    return code.call(code.attribute(kind, "define_schema")) if isinstance(kind, Class) else UNKNOWN


def _limited(code: Code, module: str, kind: Any) -> NodeType:
    code.steps = 0
    try:
        schema = _schema(code, kind)
        if isinstance(schema, Instance):
            return _new_style(code, module, schema)
        return _old_style(code, module, kind)
    except (LimitError, RecursionError):
        return NodeType(module, None, None, complete=False)


def _old_style(code: Code, module: str, kind: Any) -> NodeType:
    """A node type with INPUT_TYPES and RETURN_TYPES."""
    declared = code.call(code.attribute(kind, "INPUT_TYPES"))
    outputs = code.attribute(kind, "RETURN_TYPES")
    known = isinstance(declared, dict)
    inputs: dict[str, Input] = {}
    complete = known and UNKNOWN not in declared
    for section in ("required", "optional"):
        entries = declared.get(section, {}) if known else {}
        if not isinstance(entries, dict) or UNKNOWN in entries:
            complete = False
        for name, value in entries.items() if isinstance(entries, dict) else ():
            if name is not UNKNOWN:
                parts = value if isinstance(value, (tuple, list)) else (UNKNOWN,)
                options = parts[1] if len(parts) > 1 else {}
                inputs[name] = _input(parts[0], options, required=section == "required")
    return NodeType(module, inputs if known else None, _outputs(outputs), complete)


def _outputs(types: Any) -> tuple[str, ...] | None:
    if not isinstance(types, (list, tuple)) or UNKNOWN in types:
        return None
    return tuple(
        "COMBO" if isinstance(each, (list, tuple)) else each if isinstance(each, str) else "" for each in types
    )


def _input(kind: Any, options: Any, *, required: bool) -> Input:
    """An input as a V1 node or `/object_info` describes it."""
    options = options if isinstance(options, dict) else {UNKNOWN: UNKNOWN}
    listed = kind if isinstance(kind, (list, tuple)) else options.get("options") if kind == "COMBO" else None
    name = "COMBO" if isinstance(kind, (list, tuple)) else kind if isinstance(kind, str) else ""
    if name == "COMFY_DYNAMICCOMBO_V3" and isinstance(options.get("options"), list):
        listed = [each["key"] for each in options["options"]]
    shown = name.partition(",")[0] in _WIDGETS or bool({"default", "socketless", "widgetType"} & options.keys())
    return Input(
        name, required, _values(listed), _number(options.get("min")), _number(options.get("max")),
        shown and not options.get("forceInput"), name in _OPEN,
    )  # fmt: skip


_WIDGETS = ("BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3", "FLOAT", "INT", "STRING")
_OPEN = ("COMFY_AUTOGROW_V3", "COMFY_DYNAMICCOMBO_V3", "COMFY_DYNAMICSLOT_V3")


def _values(listed: Any) -> tuple[Any, ...] | None:
    known = isinstance(listed, (list, tuple)) and all(isinstance(each, (str, int, float)) for each in listed)
    return tuple(listed) if known else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else None


def _new_style(code: Code, module: str, schema: Instance) -> NodeType:
    """A node type with a schema of `comfy_api`."""
    listed = schema.values.get("inputs")
    listed = [] if listed is None else listed
    known = isinstance(listed, list)
    inputs = dict(_declared(code, each) for each in listed if isinstance(each, Instance)) if known else None
    complete = known and all(isinstance(each, Instance) for each in listed) and "" not in (inputs or {})
    made = schema.values.get("outputs")
    outputs = _outputs([_type(code, each) for each in made]) if isinstance(made, list) else () if made is None else None
    ordered = sorted((inputs or {}).items(), key=lambda each: not each[1].required)  # as `/object_info` lists them
    inputs = None if inputs is None else {name: each for name, each in ordered if name}
    accepts = schema.values.get("accept_all_inputs") is True
    return NodeType(module, inputs, outputs, complete and not accepts)


def _declared(code: Code, made: Instance) -> tuple[str, Input]:
    """The name and description of an input of a schema; the name "" if it is not known."""
    values = made.values
    name, kind = values.get("id", UNKNOWN), _type(code, made)
    if isinstance(inner := values.get("slot", name), Instance):  # an input around another one
        name, _ = _declared(code, inner)
        values = inner.values | {key: value for key, value in values.items() if value is not None}
    required = values.get("optional") is not True and kind != "COMFY_DYNAMICSLOT_V3"
    options = values.get("options")
    if kind == "COMFY_DYNAMICCOMBO_V3" and isinstance(options, list):
        options = [each.values.get("key") if isinstance(each, Instance) else UNKNOWN for each in options]
    if isinstance(options, Class):
        options = code.items(options)
    names = {"min": "min", "max": "max", "default": "default", "socketless": "socketless", "force_input": "forceInput"}
    given = {new: values[old] for old, new in names.items() if values.get(old) is not None}
    found = _input(kind, given, required=required)
    return name if isinstance(name, str) else "", msgspec.structs.replace(found, values=_values(options))


def _type(code: Code, made: Any) -> str:
    """The type of an input or output of a schema: that of the class in which its class is defined."""
    if not isinstance(made, Instance):
        return ""
    if isinstance(own := made.values.get("widget_type"), str):
        return own
    owner = made.kind.owner
    kind = _io_type(code, owner) if owner else ""
    if kind == "COMFY_MULTITYPED_V3":
        types = made.values.get("types")
        first = made.values.get("id")
        names = [_type(code, first)] if isinstance(first, Instance) else []
        names += [_io_type(code, each) for each in types] if isinstance(types, (list, tuple)) else [""]
        return "" if "" in names else ",".join(dict.fromkeys(names))
    return kind


def _io_type(code: Code, kind: Any) -> str:
    """The type that `@comfytype(io_type=...)` gives to a class, or `Custom(...)`; "" if it is not known."""
    for mark in kind.node.decorator_list if isinstance(kind, Class) else ():
        if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("comfytype"):
            words = {word.arg: code.evaluate(word.value, kind.scope) for word in mark.keywords}
            return words["io_type"] if isinstance(words.get("io_type"), str) else ""
    return ""


def _replacements(module: Module) -> dict[str, str]:
    """The node types that ComfyUI replaces by others when it loads a workflow, if it lacks them."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.Module(module.body, [])):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("NodeReplace"):
            given = [*zip(("new_node_id", "old_node_id"), node.args, strict=False)]
            given += [(word.arg or "", word.value) for word in node.keywords]
            words = {name: getattr(value, "value", None) for name, value in given}
            old, new = words.get("old_node_id"), words.get("new_node_id")
            if isinstance(old, str) and isinstance(new, str):
                found.setdefault(old, new)  # ComfyUI uses the first one
    return found


class _Reported(msgspec.Struct):
    inputs: dict[str, dict[str, Any]] = msgspec.field(name="input")
    output: list[Any]
    python_module: str = ""


def reported(object_info: Any) -> Interface:
    """The node types that a running ComfyUI reports at `/object_info`; raises HostError for anything else."""
    try:
        listed = convert(object_info, dict[str, _Reported])
        types = {
            name: NodeType(
                each.python_module,
                {
                    key: _input(value[0], value[1] if len(value) > 1 else {}, required=section == "required")
                    for section in ("required", "optional")
                    for key, value in each.inputs.get(section, {}).items()
                },
                _outputs(each.output),
            )
            for name, each in listed.items()
        }
    except (msgspec.ValidationError, LookupError, TypeError) as error:
        raise HostError("no-answer", "ComfyUI's list of node types is not in its format", cause=str(error)) from None
    packs = {each.module.removeprefix("custom_nodes.").lower() for each in types.values()}
    return Interface(types, packs=frozenset(packs))


class Change(msgspec.Struct, frozen=True):
    """A difference between two ComfyUIs in a node type, or in one of its inputs or outputs (`name`); see KINDS."""

    type: str
    kind: str
    name: str = ""
    old: str = ""
    new: str = ""

    @property
    def severity(self) -> int:
        """Its rank by what it may break, 0 is the worst."""
        return KINDS.index(self.kind)

    @property
    def said(self) -> str:
        """The change in words."""
        part = f"{self.type}.{self.name}" if self.name else self.type
        old, new = _short(self.old), _short(self.new)
        if self.kind == "replaced":
            return f"{part} replaced by {new}"
        if self.kind == "values":
            return f"{part} values " + "; ".join([f"removed: {old}"] * bool(old) + [f"added: {new}"] * bool(new))
        if self.kind in ("input-type", "outputs"):
            return f"{part} {self.kind}: {old or 'none'} -> {new or 'none'}"
        return f"{part} {self.kind}" + (f": {old or new}" if old or new else "")


KINDS = ("removed", "input-removed", "required", "input-type", "values", "outputs", "replaced", "input-added", "added")
"""The kinds of changes, those that break workflows first."""


def compare(old: Interface, new: Interface) -> list[Change]:
    """The differences between two ComfyUIs that are known, by type."""
    found: list[Change] = []
    for name in sorted(old.types.keys() | new.types.keys()):
        before, after = old.types.get(name), new.types.get(name)
        if before and after:
            found += _changes(name, before, after)
        elif before and not new.unknown:
            other = new.replaced.get(name, "")
            kind = "replaced" if other in new.types else "removed"
            found.append(Change(name, kind, new=other if other in new.types else ""))
        elif after and not old.unknown:
            found.append(Change(name, "added"))
    return found


def _changes(kind: str, old: NodeType, new: NodeType) -> Iterator[Change]:
    before, after = old.inputs or {}, new.inputs or {}
    for name in [*before, *(each for each in after if each not in before)]:
        one, other = before.get(name), after.get(name)
        if one and other:
            if one.type and other.type and one.type != other.type:
                yield Change(kind, "input-type", name, one.type, other.type)
            elif one.values is not None and other.values is not None and set(one.values) != set(other.values):
                gone = [str(each) for each in one.values if each not in other.values]
                more = [str(each) for each in other.values if each not in one.values]
                yield Change(kind, "values", name, ", ".join(gone), ", ".join(more))
            if other.required and not one.required:
                yield Change(kind, "required", name)
        elif one and new.complete:
            yield Change(kind, "input-removed", name, one.type)
        elif other and old.complete:
            yield Change(kind, "input-added", name, "", f"{other.type}, required" if other.required else other.type)
    if old.outputs is not None and new.outputs is not None and _differ(old.outputs, new.outputs):
        yield Change(kind, "outputs", "", ", ".join(old.outputs), ", ".join(new.outputs))


def _differ(old: Sequence[str], new: Sequence[str]) -> bool:
    """Whether outputs are known to differ; the type of some may be unknown ("")."""
    return len(old) != len(new) or any(one and other and one != other for one, other in zip(old, new, strict=True))


def rows(changes: Sequence[Change]) -> Iterator[str]:
    """A line per removed or changed part, and the number of added types."""
    yield from (each.said for each in changes if each.kind != "added")
    yield f"{counted(sum(each.kind == 'added' for each in changes), 'node type')} added"


def counts(changes: Sequence[Change]) -> str:
    """The number of changes of each kind."""
    found = {kind: sum(each.kind == kind for each in changes) for kind in KINDS}
    return f"node types: {', '.join(f'{count} {kind}' for kind, count in found.items() if count)}"


def _short(listed: str) -> str:
    """The start of a list of hundreds of values."""
    return f"{listed[:80]}..." if len(listed) > 83 else listed
