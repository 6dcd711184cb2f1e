"""Turns a function into a task: defines its flags and displays its errors."""

from __future__ import annotations

import functools
import inspect
import sys
from dataclasses import fields, is_dataclass
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from invoke.exceptions import Exit
from invoke.parser.parser import ParseMachine
from invoke.tasks import Task, task

from core import console
from core.errors import HearthError, os_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from invoke.context import Context


class _Task(Task[Any]):
    """A task whose flags have the usual short forms; invoke would take any letter of the name."""

    def arg_opts(self, name: str, default: str, taken_names: set[str]) -> dict[str, Any]:
        found = super().arg_opts(name, default, taken_names)
        if short := _SHORT.get(name):
            found["names"] = [found["names"][0], short]
        return found


def _complete_context(
    machine: ParseMachine, complete: Callable[[ParseMachine], None] = ParseMachine.complete_context
) -> None:
    """End a task's arguments. One that is positional and `optional` may be left out, which invoke does not provide."""
    for each in machine.context.missing_positional_args if machine.context else ():
        if each.optional:
            each.value = ""
    complete(machine)


def _handle(
    machine: ParseMachine, token: str, handle: Callable[[ParseMachine, str], None] = ParseMachine.handle
) -> None:
    """Read a word. `--help` after a task asks for its help; invoke would take it for a positional argument.

    A positional argument that is iterable takes any number of words.
    """
    context, initial = machine.context, machine.initial
    lists = [each for each in context.positional_args if each.kind is list] if context else []
    if token in ("--help", "-h") and context and initial and context is not initial and token not in context.flags:
        initial.flags["--help"].value = context.name
        for each in context.missing_positional_args:
            each.value = ""
    elif lists and not machine.waiting_for_flag_value and not token.startswith("-"):
        lists[0].value = token
    else:
        handle(machine, token)


ParseMachine.complete_context = _complete_context  # type: ignore[assignment, method-assign]
ParseMachine.handle = _handle  # type: ignore[assignment, method-assign]

_SHORT = {"lines": "n"}  # as in tail and journalctl


def command(*, help: dict[str, str] | None = None, **options: Any) -> Callable[[Callable[..., int | None]], Any]:  # noqa: A002  invoke's name
    """An invoke task that shows a HearthError without a traceback and exits with its code.

    A parameter annotated with a dataclass of `core/flags.py` is replaced by flags, one for each field; the body
    receives the filled dataclass. `help` describes the task's own flags.
    """

    def wrap(body: Callable[..., int | None]) -> Any:
        signature = inspect.signature(body, eval_str=True)
        parameters = signature.parameters.values()
        shared: dict[str, Any] = {each.name: each.annotation for each in parameters if is_dataclass(each.annotation)}

        @functools.wraps(body)
        def run(context: Context, **given: Any) -> None:
            filled = {
                name: kind(**{each.name: given.pop(each.name) for each in fields(kind)})
                for name, kind in shared.items()
            }
            try:
                status = body(context, **given, **filled)
            except BrokenPipeError:
                raise Exit(code=0) from None
            except (HearthError, OSError) as caught:
                error = os_error(caught) if isinstance(caught, OSError) else caught
                if error is None:
                    raise
                if error.refusals and any(getattr(each, "json", False) for each in filled.values()):
                    about = {"error": error.what, "kind": error.kind, "previews": dict(error.previews)}
                    console.data_json({**about, "refusals": [vars(each) for each in error.refusals]})
                console.say(f"error[{error.kind}]: {error}")
                raise Exit(code=error.exit_code) from error
            except KeyboardInterrupt:
                console.say("interrupted; run the same command again to continue")
                raise Exit(code=130) from None
            if status:
                sys.exit(status)

        expanded: list[Parameter] = []
        meanings = dict(help or {})
        for each in parameters:
            flags = fields(shared[each.name]) if each.name in shared else ()
            expanded += [Parameter(flag.name, each.kind, default=flag.default) for flag in flags] or [each]
            meanings |= {flag.name: flag.metadata["help"] for flag in flags}
        run.__signature__ = signature.replace(parameters=expanded)  # type: ignore[attr-defined]  # what invoke reads
        return task(klass=_Task, **options, help=meanings)(run)

    return wrap
