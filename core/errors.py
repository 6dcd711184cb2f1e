"""Every error Hearth raises on purpose: what happened, the likely cause, the next command, an exit code.

Exit codes 0 to 2 are Python's and invoke's own (2 also says "there would be changes" on a dry run);
130 is an interrupt. The codes below are a promise to scripts: a new error takes a new number.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable


class HearthError(Exception):
    """An expected failure, shown without a traceback.

    `what` says what happened, `cause` why that is likely, `hint` what to do next.
    """

    exit_code: ClassVar[int] = 1

    refusals: tuple[Any, ...] = ()
    """Why a change was refused: each a `deploy.refusals.Refusal`."""

    def __init__(self, what: str, *, cause: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.cause = cause
        self.hint = hint

    def __str__(self) -> str:
        told = (("", self.what), ("  cause: ", self.cause), ("  next:  ", self.hint))
        # What follows in the same part is further in: it may be others' text, and look like the next part.
        return "\n".join(name + re.sub(r"\n *", "\n         ", text) for name, text in told if text or not name)


class UsageError(HearthError):
    """A value on the command line that no task can take."""

    exit_code = 15


class ConfigError(HearthError):
    """A TOML file of `config/` or `recipes/` that does not say what it must."""

    exit_code = 10


class ArchError(HearthError):
    """A compute capability that is malformed or unknown, or none given."""

    exit_code = 11


class StackArchError(HearthError):
    """A compute capability that the stack's compiler cannot target."""

    exit_code = 12


class RecipeSupportError(HearthError):
    """An arch, stack, Python or platform that the recipe or stack does not support."""

    exit_code = 13


class UnknownNameError(HearthError):
    """A kernel, stack, platform or profile that does not exist."""

    exit_code = 14


class CompilerMissingError(HearthError):
    """No C++ compiler for the machine we are on."""

    exit_code = 20


class CrossCompilerMissingError(HearthError):
    """No C++ compiler for the platform asked for."""

    exit_code = 21


class CudaMissingError(HearthError):
    """No CUDA compiler of the version that the stack needs."""

    exit_code = 22


class CompilerVersionError(HearthError):
    """A host compiler that this CUDA does not accept."""

    exit_code = 23


class PythonMissingError(HearthError):
    """No interpreter or headers of the Python version asked for."""

    exit_code = 24


class ToolMissingError(HearthError):
    """A program that Hearth calls is not installed."""

    exit_code = 25


class LockStaleError(HearthError):
    """A lock that does not answer any more to what it was made from: `inv lock` renews it."""

    exit_code = 26


class ResolutionError(HearthError):
    """No versions suit all that ComfyUI and its nodes ask for."""

    exit_code = 27


class HashMismatchError(HearthError):
    """A source arrived, and is not what the recipe pins."""

    exit_code = 30


class SourceUnreachableError(HearthError):
    """No source of a recipe could be fetched."""

    exit_code = 31


class PatchError(HearthError):
    """A patch of a recipe does not apply to its source."""

    exit_code = 32


class BundleError(HearthError):
    """A bundle that is cut short, altered, or not for this host or Hearth."""

    exit_code = 33


class TreeError(HearthError):
    """A source tree with a link that leads out of it, or with what is neither file nor folder."""

    exit_code = 34


class SignatureError(HearthError):
    """A bundle that nobody signed who may, or a key that cannot sign."""

    exit_code = 35


class CompileError(HearthError):
    """The compiler or the linker refused a file."""

    exit_code = 40


class OutOfMemoryError(HearthError):
    """A compiler was killed: out of memory."""

    exit_code = 41


class DiskFullError(HearthError):
    """No space left on the device."""

    exit_code = 42


class InspectionError(HearthError):
    """A wheel that is not what was asked for, or a file that is no wheel."""

    exit_code = 43


class ProcessError(HearthError):
    """A program that Hearth called failed in a way that Hearth has no better name for."""

    exit_code = 50

    status: int = 0
    """Its exit status, negative for the signal that killed it."""

    said: str = ""
    """What it wrote to stderr."""


class ConnectError(HearthError):
    """A host that cannot be reached, or whose connection was lost."""

    exit_code = 60


class HostKeyError(HearthError):
    """A host whose key is unknown, or not the known one."""

    exit_code = 61


class SudoError(HearthError):
    """No root on a host that needs it."""

    exit_code = 62


class RefusedError(HearthError):
    """A change that would not work, or that nobody agreed to: every reason was shown, nothing was changed."""

    exit_code = 63


class BusyError(HearthError):
    """Someone else is changing the host."""

    exit_code = 64


class DrainError(HearthError):
    """ComfyUI still has jobs, and nothing was cut short."""

    exit_code = 65


class GateError(HearthError):
    """A release that is not healthy; what ran before runs again."""

    exit_code = 66


class ConvergeError(HearthError):
    """A deploy after which something is still not as wanted."""

    exit_code = 67


class SecretError(HearthError):
    """A secret in a configuration file."""

    exit_code = 68


class AgentError(HearthError):
    """A step on the host failed; the release in service was not touched."""

    exit_code = 69


class HostOfflineError(HearthError):
    """A host that cannot reach the package index, and was not sent the packages."""

    exit_code = 71


class RemoteError(HearthError):
    """A command on a host failed; what it said was shown."""

    exit_code = 72


class OldReleaseError(HearthError):
    """A kept release whose manifest, an older Hearth's, does not say what is asked."""

    exit_code = 73


class AuditServiceError(HearthError):
    """The service that knows vulnerabilities did not answer: packages were not looked up."""

    exit_code = 74


class NoInstallationError(HearthError):
    """No ComfyUI to adopt, more than one, or nothing adopted that could be put back."""

    exit_code = 75


class StorageError(HearthError):
    """A folder of a host that does not answer: its server or its disk is gone."""

    exit_code = 76


class GpuError(HearthError):
    """A host without an NVIDIA driver that answers."""

    exit_code = 80


class RecordingError(HearthError):
    """A recording of GPUs that is cut short, or is none."""

    exit_code = 81


class NoAnswerError(HearthError):
    """ComfyUI does not answer: it does not run, it hangs, or it died while it started."""

    exit_code = 82


class LogError(HearthError):
    """A log that cannot be read on the host."""

    exit_code = 83


class ChangedSinceError(HearthError):
    """Something outside the prefix that Hearth set was changed since: undoing leaves it as it is."""

    exit_code = 84


class GroupError(HearthError):
    """Not every host of a group came through."""

    exit_code = 70


def near(name: str, known: Iterable[str]) -> str:
    """A sentence that helps whoever mistyped `name`: the nearest known name, then all of them if they are few."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    start = [f"perhaps you meant {close[0]!r}"] if close else []
    return "; ".join([*start, f"known: {', '.join(names)}"] if len(names) <= 20 or not close else start)
