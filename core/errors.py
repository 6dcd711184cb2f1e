"""Every expected failure: what happened, the likely cause, the next command, a kind and an exit code.

Exit codes 0 to 2 are Python's and invoke's own (2 also says "there would be changes" on a dry run);
130 is an interrupt. Scripts may rely on the codes below and on the kinds, which stderr shows as `error[KIND]`.
"""

from __future__ import annotations

import errno
import re
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class HearthError(Exception):
    """An expected failure, shown without a traceback.

    `kind` is one of the class's `kinds`. `what` says what happened, `cause` the likely reason, `hint` the next step.
    """

    exit_code: ClassVar[int] = 1

    kinds: ClassVar[Mapping[str, str]] = {}
    """What each kind means."""

    refusals: tuple[Any, ...] = ()
    """Why a change was refused: each a `deploy.refusals.Refusal`."""

    previews: Mapping[str, Any] = MappingProxyType({})
    """What changes would break if they were made, by host: each a `lock.preview.Preview`."""

    def __init__(self, kind: str, what: str, *, cause: str = "", hint: str = "") -> None:
        super().__init__(kind, what)
        self.kind = kind
        self.what = what
        self.cause = cause
        self.hint = hint

    def __str__(self) -> str:
        parts = (("", self.what), ("  cause: ", self.cause), ("  next:  ", self.hint))
        # Continuation lines are indented: text of other programs could look like the next part.
        return "\n".join(name + re.sub(r"\n *", "\n         ", text) for name, text in parts if text or not name)


class ConfigError(HearthError):
    """A configuration or recipe file that is not valid."""

    exit_code = 10
    kinds: ClassVar[Mapping[str, str]] = {
        "config": "A file of `config/` or `recipes/` is not valid.",
        "secret": "A configuration file contains a secret.",
    }


class SupportError(HearthError):
    """A combination of arch, stack, Python and platform that is not supported."""

    exit_code = 13
    kinds: ClassVar[Mapping[str, str]] = {
        "arch": "The compute capability is malformed, unknown or missing.",
        "stack-arch": "The stack's compiler cannot target the compute capability.",
        "recipe-support": "The recipe or stack does not support the arch, stack, Python or platform.",
    }


class UsageError(HearthError):
    """A value on the command line that is not valid."""

    exit_code = 15
    kinds: ClassVar[Mapping[str, str]] = {
        "usage": "A value is not valid for this task.",
        "unknown-name": "No kernel, stack, platform, profile, host or directory of the cache has this name.",
        "recording": "The recording of GPUs is truncated or not a recording.",
    }


class ToolError(HearthError):
    """A program that Hearth needs is missing or has the wrong version."""

    exit_code = 25
    kinds: ClassVar[Mapping[str, str]] = {
        "compiler-missing": "There is no C++ compiler for this machine.",
        "cross-compiler-missing": "There is no C++ compiler for the requested platform.",
        "cuda-missing": "There is no CUDA compiler of the version that the stack needs.",
        "compiler-version": "CUDA does not accept the version of the host compiler.",
        "python-missing": "The interpreter or headers of the requested Python version are missing.",
        "program-missing": "A program that Hearth calls is not installed.",
    }


class LockError(HearthError):
    """A lock that is out of date or cannot be resolved."""

    exit_code = 26
    kinds: ClassVar[Mapping[str, str]] = {
        "lock-stale": "The lock is older than its inputs; `inv lock` renews it.",
        "resolution": "No set of versions meets all requirements of ComfyUI and its nodes.",
        "same-files": "Two packages install the same files, and only one of them would remain.",
    }


class SourceError(HearthError):
    """A source that cannot be fetched, verified, unpacked or patched."""

    exit_code = 31
    kinds: ClassVar[Mapping[str, str]] = {
        "source-unreachable": "No source could be fetched.",
        "hash-mismatch": "A file does not have its pinned hash.",
        "unpinned": "A recipe has no hash of its source yet; `inv kernels.pin` writes it.",
        "patch": "A patch does not apply to its source.",
        "generate": "A script of a source that writes more source files failed.",
        "nodes": "Several nodes or other upstreams could not be examined, for different reasons.",
        "tag-moved": "A tag of a repository does not point to the pinned commit any more.",
        "not-comfyui": "A source has no ComfyUI.",
        "unsafe-tree": "A source tree contains a link that leads out of it, or a special file.",
    }


class BundleError(HearthError):
    """A bundle that is damaged, unsuitable or not signed by a trusted key."""

    exit_code = 33
    kinds: ClassVar[Mapping[str, str]] = {
        "bundle": "The bundle is truncated, altered, or not for this host or version of Hearth.",
        "signature": "No trusted key signed the bundle, or a key cannot sign.",
    }


class ImageError(HearthError):
    """A container image that a registry does not accept, or that `run.sh` cannot start."""

    exit_code = 34
    kinds: ClassVar[Mapping[str, str]] = {
        "registry": "The registry refused the image, or cannot be reached.",
    }


class BuildError(HearthError):
    """A kernel that does not compile, or a wheel that fails inspection."""

    exit_code = 40
    kinds: ClassVar[Mapping[str, str]] = {
        "compile": "The compiler or the linker rejected a file.",
        "out-of-memory": "A compiler was killed for lack of memory.",
        "disk-full": "The disk is full.",
        "several": "Several builds failed, for different reasons.",
        "inspection": "A wheel is not what was requested, or is not a wheel.",
    }


class ProcessError(HearthError):
    """A program that Hearth called failed."""

    exit_code = 50
    kinds: ClassVar[Mapping[str, str]] = {
        "process": "A program failed, and no other kind describes the failure.",
    }

    status: int = 0
    """Its exit status, negative for the signal that killed it."""

    stderr: str = ""
    """What it wrote to stderr."""


class ConnectError(HearthError):
    """A host that cannot be reached, or grants no access."""

    exit_code = 60
    kinds: ClassVar[Mapping[str, str]] = {
        "unreachable": "The host cannot be reached, or the connection was lost.",
        "host-key": "The host's key is unknown, or has changed.",
        "sudo": "Root is needed on the host and not granted.",
    }


class RefusedError(HearthError):
    """A change that was refused or not confirmed. Nothing was changed."""

    exit_code = 63
    kinds: ClassVar[Mapping[str, str]] = {
        "refused": "The change would not work, or was not confirmed.",
    }


class BusyError(HearthError):
    """A host that is in use. Try again later."""

    exit_code = 64
    kinds: ClassVar[Mapping[str, str]] = {
        "busy": "Another operator is changing the host.",
        "drain": "ComfyUI still has jobs; none was interrupted.",
    }


class GateError(HearthError):
    """A change that did not reach the wanted state."""

    exit_code = 66
    kinds: ClassVar[Mapping[str, str]] = {
        "unhealthy": "The new release is not healthy; the previous one runs again.",
        "worse": "After a deploy with `--watch`, users' jobs got worse; it rolled back, or tried to.",
        "not-converged": "After the deploy, something still differs from the wanted state.",
    }


class HostError(HearthError):
    """A step or a resource failed on a host or on this machine."""

    exit_code = 69
    kinds: ClassVar[Mapping[str, str]] = {
        "step-failed": "A step on the host failed; the active release was not touched.",
        "disk-full": "The disk is full.",
        "not-writable": "A file or folder of this machine cannot be read or written.",
        "offline": "The host cannot reach the package index, and was not sent the packages.",
        "remote-command": "A command on the host failed; its output was shown.",
        "old-release": "An older Hearth made the release, and its manifest lacks what is needed.",
        "no-installation": "There is no ComfyUI to adopt, more than one, or no adopted one to restore.",
        "storage": "A folder of the host does not answer: its server or disk is gone.",
        "gpu": "No NVIDIA driver answers on the host.",
        "no-answer": "ComfyUI does not answer: it is stopped, hangs, or died while it started.",
        "log": "A log cannot be read on the host.",
        "changed": "Something that Hearth set outside its prefix was changed since; undoing leaves it.",
    }


class GroupError(HearthError):
    """Not every host of a group succeeded."""

    exit_code = 70
    kinds: ClassVar[Mapping[str, str]] = {
        "group": "At least one host failed or was skipped.",
    }


class AuditError(HearthError):
    """The vulnerability service did not answer."""

    exit_code = 74
    kinds: ClassVar[Mapping[str, str]] = {
        "audit-service": "The service did not answer; packages were not looked up.",
    }


_NO_ACCESS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG),
)


DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded")
"""How a program says that the file system, or its user's part of it, is full (glibc's messages in English)."""


def os_error(error: OSError) -> HearthError | None:
    """The HearthError for a file system's error that the user can resolve; None for any other OSError."""
    name = error.filename2 or error.filename  # of a copy or a rename: what could not be written
    where = f": {name}" if name else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space (inv cache shows what Hearth uses), then run the same command"
        return HostError("disk-full", f"the disk is full{where}", cause=error.strerror or "", hint=hint)
    if error.errno in _NO_ACCESS and where:
        hint = "use another folder: HEARTH_CACHE, HEARTH_WHEELHOUSE, TMPDIR"
        return HostError("not-writable", f"no access{where}", cause=error.strerror or "", hint=hint)
    return None


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a "did you mean" hint for an unknown name: the nearest known one, and all of them if they are few."""
    names = sorted(known)
    longer = [each for each in names if name and re.match(rf"{re.escape(name)}(?!\w)", each)]  # 0.30 means 0.30.0
    close = longer or get_close_matches(name, names, n=1)
    start = [f"perhaps you meant {close[0]!r}"] if close else []
    return "; ".join([*start, f"known: {', '.join(names)}"] if len(names) <= 20 or not close else start)
