"""Writes docs/reference/tasks.md from the tasks and errors themselves: python -m docs.generate."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import TYPE_CHECKING

from core import errors, files
from tasks import ns

if TYPE_CHECKING:
    from invoke.parser.argument import Argument
    from invoke.parser.context import ParserContext

PAGE = files.CHECKOUT / "docs/reference/tasks.md"

HEAD = """\
# Tasks

<!-- Written by: python -m docs.generate. Change the docstrings and flags in */tasks.py, or core/errors.py. -->

`inv --list` lists them, `inv --help TASK` explains one. Results go to stdout, everything else to stderr. Variables that
they heed: [environment](environment.md)."""

OTHER_CODES = {
    0: "Done; on a dry run, nothing to do.",
    1: "A wheel of the wheelhouse is not what was inspected; a workflow needs a node type that no known node has; an "
    "audit found something; a host is not well; the doctor warns. Also a task or flag that does not exist.",
    2: "A dry run: there would be changes. The doctor: there are errors.",
    130: "Interrupted.",
}
"""What is no error of `core/errors.py`."""


@functools.cache
def contexts() -> dict[str, ParserContext]:
    """Every task as invoke's parser knows it, by name. Made once: invoke takes the help from a task that it asks."""
    return {str(each.name): each for each in ns.to_contexts()}


def render() -> str:
    """The page."""
    parts, noun = [HEAD], ""
    for name, context in contexts().items():
        module = sys.modules[ns[name].__module__]
        if noun != module.__name__:
            noun = module.__name__
            parts.append(f"## {str(module.__doc__).partition(':')[0]}")
        text = re.sub(r"\bdocs/([\w/-]+\.md)", r"[docs/\1](../\1)", str(inspect.getdoc(ns[name])))
        rows = [_row(each, required=each in context.missing_positional_args) for each in context.args.values()]
        parts += [f"### {name}", text, "\n".join(["| flag | default | |", "| --- | --- | --- |", *rows])]
    classes = [each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, errors.HearthError)]
    codes = {each.exit_code: str(inspect.getdoc(each)).partition("\n")[0] for each in classes} | OTHER_CODES
    rows = [f"| {code} | {meaning} |" for code, meaning in sorted(codes.items())]
    return "\n\n".join([*parts, "## Exit codes", "\n".join(["| code | |", "| ---: | --- |", *rows])]) + "\n"


def _row(argument: Argument, *, required: bool) -> str:
    found = re.fullmatch(r"(.*?)(?: \(default: (.*)\))?", str(argument.help))
    assert found is not None
    value = (" [STRING]" if argument.optional else " STRING") * argument.takes_value
    name = argument.names[0].upper() if required else f"--{argument.names[0]}{value}"
    return f"| `{name}` | {f'{found[2]} ' if found[2] else ''}| {found[1]} |"


if __name__ == "__main__":
    PAGE.write_text(render())
