"""Writes the generated pages of the reference, from tasks, errors and structs: `uv run python -m docs.generate`."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import re
import sys
import textwrap
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from core import errors, files
from core.stack import Stack, stacks
from deploy import gateways, host
from deploy.profile import Mode, Override, Profile, Prove, Setting
from tasks import ns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invoke.parser.argument import Argument
    from invoke.parser.context import ParserContext

PAGE = files.CHECKOUT / "docs/reference/tasks.md"
CONFIGURATION = files.CHECKOUT / "docs/reference/configuration.md"

HEAD = """\
# Tasks

<!-- Written by: python -m docs.generate. Change the docstrings and flags in the tasks, or core/errors.py. -->

`inv --list` lists all tasks, and `inv --help TASK` explains one. Results go to stdout, everything else to stderr. Tasks
also read [environment variables](environment.md)."""

CONFIGURATION_HEAD = """\
# Configuration

<!-- Written by: python -m docs.generate. Change the structs in deploy/host.py, gateways.py and profile.py. -->

`config/hosts.toml` lists hosts, groups and gateways. `config/profiles/` and `config/modes/` hold a file for each
profile and mode. Precedence, lowest first: the profile, the modes in the order listed, the host's `override`. An
unknown key is an error that names the closest known key. `inv hosts` shows the result for each host, and the origin of
each value.

`config/hosts.example.toml` is an example to copy."""

STACKS = """\
`config/stacks.toml` describes them. `stack = "NAME"` in a profile, mode or override, and `--stack NAME` of
`inv build-kernels`, choose one. A deploy refuses a stack that cannot run the host's ComfyUI. To add one, add a table
there and an extra of its name to `pyproject.toml`, list the extra in `conflicts`, and run `inv lock`."""

STRUCTS: dict[str, type[msgspec.Struct]] = {
    "`[hosts.NAME]`": host.Host,
    '`[hosts.NAME.mounts."PATH"]`': host.Mount,
    "`[gateways.NAME]`": gateways.Gateway,
    "`[gateways.NAME.users.PERSON]`": gateways.Person,
    "`[gateways.NAME.limits]`": gateways.Limits,
    "`[hosts.NAME.override]`": Override,
    "Flags and variables": Setting,
    "`[[prove]]` in a profile, `[[hosts.NAME.prove]]`": Prove,
    "`config/profiles/NAME.toml`": Profile,
    "`config/modes/NAME.toml`": Mode,
}

KINDS = "An error is shown as `error[KIND]: what happened`. The kind distinguishes errors with the same exit code."

OTHER_CODES = {
    0: "Done; on a dry run, nothing to do.",
    1: "A wheel in the wheelhouse differs from its manifest; a workflow needs a node type that no known node has; an "
    "audit has findings; `inv status` shows a problem; the doctor has warnings. Also an unknown task or flag.",
    2: "A dry run: there are changes. The doctor: there are errors.",
    130: "Interrupted.",
}
"""Exit codes that belong to no error of `core/errors.py`."""


@functools.cache
def contexts() -> dict[str, ParserContext]:
    """Every task as invoke's parser knows it, by name. Cached: invoke removes the help from a task that it reads."""
    return {str(each.name): each for each in ns.to_contexts()}


def render() -> str:
    """The page of tasks and exit codes."""
    parts, noun = [HEAD], ""
    for name, context in contexts().items():
        module = sys.modules[ns[name].__module__]
        if noun != module.__name__:
            noun = module.__name__
            parts.append(f"## {str(module.__doc__).partition(':')[0]}")
        text = re.sub(r"\bdocs/([\w/-]+\.md)", r"[docs/\1](../\1)", str(inspect.getdoc(ns[name])))
        rows = [
            _row(each, required=each in context.missing_positional_args and not each.optional)
            for each in context.args.values()
        ]
        parts += [f"### {name}", text, _table(("Flag", "Default", "Meaning"), rows)]
    classes = [each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, errors.HearthError)]
    codes = {each.exit_code: str(inspect.getdoc(each)).partition("\n")[0] for each in classes} | OTHER_CODES
    rows = [(str(code), meaning) for code, meaning in sorted(codes.items())]
    kinds = [(str(each.exit_code), f"`{kind}`", text) for each in classes for kind, text in each.kinds.items()]
    parts += ["## Exit codes", _table(("Code", "Meaning"), rows)]
    parts += ["## Kinds of errors", KINDS, _table(("Code", "Kind", "Meaning"), kinds)]
    return "\n\n".join(parts) + "\n"


def _row(argument: Argument, *, required: bool) -> tuple[str, ...]:
    found = re.fullmatch(r"(.*?)(?: \(default: (.*)\))?", str(argument.help))
    assert found is not None
    value = (" [STRING]" if argument.optional else " STRING") * argument.takes_value
    name = argument.names[0].upper() if required else f"--{argument.names[0]}{value}"
    return f"`{name}`", found[2] or "", found[1]


def configuration() -> str:
    """The page of `config/hosts.toml`, profiles and modes."""
    parts = [CONFIGURATION_HEAD]
    for title, struct in STRUCTS.items():
        parts += [f"## {title}", str(inspect.getdoc(struct)), _keys(struct)]
    rows = [
        (f"`{each.name}`", each.torch, ", ".join(each.pythons), ", ".join(each.platforms), each.driver, _note(each))
        for each in stacks().values()
    ]
    parts += ["## Stacks", STACKS, _table(("Stack", "torch", "Python", "Platforms", "Oldest driver", ""), rows)]
    return "\n\n".join(parts) + "\n"


def _note(stack: Stack) -> str:
    if stack.builds_only:
        return f"only for builds: {stack.builds_only}"
    return "the default" if stack.default else stack.deprecated and f"deprecated: {stack.deprecated}"


def _keys(struct: type[msgspec.Struct]) -> str:
    """A table of the keys that a TOML table has; an override's are explained where the profile's are."""
    meanings = {name: text for each in (Profile, *reversed(struct.__mro__)) for name, text in _docs(each).items()}
    rows: list[tuple[str, ...]] = []
    for each in msgspec.structs.fields(struct):
        required = each.default is msgspec.NODEFAULT and each.default_factory is msgspec.NODEFAULT
        default = "required" if required else _default(each)
        rows.append((f"`{each.encode_name}`", _type(each.type), default, meanings[each.name]))
    return _table(("Key", "Type", "Default", "Meaning"), rows)


def _docs(struct: type) -> dict[str, str]:
    """The docstrings below the fields of a struct, by field."""
    if not struct.__module__.startswith("deploy."):
        return {}
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(struct))).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def _default(field: msgspec.structs.FieldInfo) -> str:
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value is None or value in ("", (), {}) or isinstance(value, msgspec.Struct):
        return ""
    return f"`{msgspec.json.encode(value).decode()}`"


def _type(kind: Any) -> str:
    """A type as a reader of TOML knows it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{json.dumps(each)}`" for each in inner)
    if origin is Annotated:
        return _type(inner[0])
    if origin in (Union, UnionType):
        return _type(next(each for each in inner if each is not NoneType))
    if origin is tuple:
        return f"array of {_type(inner[0])}"
    if origin is dict or issubclass(kind, msgspec.Struct):
        return "table"
    return {str: "string", int: "integer", float: "number", bool: "boolean"}[kind]


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(re.sub(" +", " ", f"| {' | '.join(cells)} |") for cells in lines)


if __name__ == "__main__":
    PAGE.write_text(render())
    CONFIGURATION.write_text(configuration())
