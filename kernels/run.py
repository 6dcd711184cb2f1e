"""Runs a ninja file: progress, one log per build, and the error of each build that failed."""

from __future__ import annotations

import re
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import ninja

from core import console, files, shell, tools, workspace
from core.errors import DISK_FULL, BuildError, HearthError
from kernels.graph import root

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from kernels.graph import Graph

# finished / total / running, then the edge's description. `_steps` parses this.
_STATUS = "@@ %f %t %r "


def run(
    graph: Graph, jobs: int, lock: int, complete: Callable[[str], None], prepare: Callable[[str], None]
) -> dict[str, HearthError]:
    """Bring every object and module of the graph up to date; returns an error for each build that failed.

    A failed compile ends no other one. `complete` is called with each build as soon as its modules are linked.
    `prepare` is called once, with a build that is still incomplete, once fewer compiles than `jobs` are left.
    `lock` is the file descriptor of the held build lock. Compilers inherit it, so the lock is held until the last one
    has exited, even if this process is killed. Results of an interrupted run are kept.
    """
    place = root()
    files.write(place / "build.ninja", graph.text)
    argv = [str(Path(ninja.BIN_DIR) / "ninja"), "-j", str(jobs), "-k", "0"]
    _discard(graph.edges, place)
    pending = _pending(argv, place)
    left = {build: outputs & pending for build, outputs in graph.outputs.items()}
    failed: dict[str, str] = {}

    def finished(output: str) -> None:
        for build, outputs in left.items():
            if output in outputs:
                outputs.discard(output)
                if not outputs:
                    complete(build)

    for build in [build for build, outputs in left.items() if not outputs]:
        complete(build)
    if pending:
        if len(pending) <= jobs:  # its last one is a link, which waits for a compile
            prepare(next(build for build, outputs in left.items() if outputs))
        weight = sum(map(graph.seconds, pending))
        with console.Progress("compiling", weight, len(pending)) as progress, ExitStack() as stack:
            logs = {build: stack.enter_context(log(build).open("w", encoding="utf-8")) for build in left}
            env = tools.build_environment() | {"NINJA_STATUS": _STATUS}
            lines = shell.lines(argv, cwd=place, env=env, pass_fds=[lock])
            for output, said in _steps(lines, graph, progress):
                for build in (build for build, outputs in graph.outputs.items() if output in outputs):
                    logs[build].write(said)
                    logs[build].flush()
                if re.search("^FAILED: ", said, re.MULTILINE):
                    failed[output] = said
                elif output:
                    finished(output)
                elif any(left.values()) and (not failed or DISK_FULL.search(said)):
                    raise _explain_ninja(said.strip())
                pending.discard(output)
                if output and len(pending) == jobs and any(left.values()):
                    prepare(next(build for build, outputs in left.items() if outputs))
    return {build: _explain(graph, build, outputs, failed, jobs) for build, outputs in left.items() if outputs}


def log(build: str) -> Path:
    """The log of a build's last run."""
    place = root() / "logs" / f"{build}.txt"
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _discard(outputs: Iterable[str], place: Path) -> None:
    """Delete the outputs that are not what their command wrote, or are newer than now; ninja compares only times.

    They may be damaged by a power cut or another program, or be from a time when the clock was wrong. So may the lists
    of the files that they include.
    """
    now = (place / "build.ninja").stat().st_mtime  # by the clock of this file system
    for path in (place / each for each in outputs):
        included = path.with_name(f"{path.name}.d")
        if path.is_file() and path.stat().st_mtime <= now:
            with suppress(OSError, UnicodeError):
                recorded = path.with_name(f"{path.name}.sha256").read_text().split()[::2]
                both = (path, included)[: len(recorded)]
                if recorded and recorded == [files.sha256(each) for each in both]:
                    continue
        for each in (path, included):
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink(missing_ok=True)


def _pending(argv: Sequence[str], place: Path) -> set[str]:
    """The outputs that ninja would make, from a dry run. Raises BuildError if that fails."""
    done = tools.build(*argv, "-n", "-C", place, env={"NINJA_STATUS": _STATUS}, check=False)
    if done.returncode:  # otherwise everything would count as up to date
        raise _explain_ninja(shell.last_words(done))
    return {line.split()[5] for line in done.stdout.splitlines() if line.startswith("@@")}


def _steps(lines: Generator[str, None, int], graph: Graph, progress: console.Progress) -> Iterator[tuple[str, str]]:
    """Yield each finished step with its messages, and show the progress; last "", with ninja's own messages."""
    output, said = "", ""
    for line in lines:
        if line.startswith("@@") or (line.startswith("ninja: ") and output):
            if output:
                yield output, said
            output, said = "", ""
        if line.startswith("@@"):
            _, finished, total, running, _, output = line.split(maxsplit=5)
            # ninja still counts the finished step as running; another one takes its place while any are left
            left = min(int(running), int(total) - int(finished))
            progress.step(graph.name(output), graph.seconds(output), left)
        else:
            said += f"{line}\n"
    if output:
        yield output, said
        said = ""
    yield "", said


# Each way in which a compiler, linker or shell reports that memory ran out, or that it was killed for it. Compilers
# indent the source lines that they quote, and those may contain anything.
_OUT_OF_MEMORY = re.compile(
    r"^FAILED: \[code=137\]|^(?=\S).*("
    r"signal:? (9\b|Killed)|\bKilled\b|[Oo]ut of memory|memory exhausted|instance of 'std::bad_alloc'"
    r"|[Cc]annot allocate memory|[Mm]emory allocation fail)",
    re.MULTILINE,
)


def _disk_full(name: str) -> BuildError:
    return BuildError(
        "disk-full",
        f"the disk is full: {name} could not be written",
        cause="No space left on device",
        hint=f"free some space (the cache is {workspace.current().cache}), then run the same command again "
        "(finished files are kept)",
    )


def _explain_ninja(said: str) -> BuildError:
    """The error of ninja itself, which stops all builds: its records did not fit on the disk, or it was killed."""
    if DISK_FULL.search(said):
        return _disk_full("ninja's record of the build")
    return BuildError("compile", "ninja failed", cause=said or "it was killed")


def _explain(graph: Graph, build: str, outputs: set[str], failed: dict[str, str], jobs: int) -> HearthError:
    """The error of a build whose `outputs` are missing, derived from the compilers' messages."""
    own = sorted(outputs & failed.keys())
    if not own:
        return BuildError("compile", f"{build} was not finished", hint="run the same command again")
    name, said = graph.name(own[0]), failed[own[0]]
    more = f" (and {len(own) - 1} more files)" if len(own) > 1 else ""
    if DISK_FULL.search(said):
        return _disk_full(name)
    if _OUT_OF_MEMORY.search(said):
        return BuildError(
            "out-of-memory",
            f"the machine ran out of memory while compiling {name}{more}",
            cause=f"a compiler was killed or got no memory, with {jobs} jobs at once",
            hint=f"run the same command again with fewer jobs: --jobs {max(1, jobs // 2)} (finished files are kept)",
        )
    # The command line is long and not useful here; it is in the log.
    tail = [line for line in said.splitlines()[2:] if line.strip()][-12:]
    what = f"{name} could not be compiled{more}"
    return BuildError("compile", what, cause="\n".join(tail), hint=f"read the complete log: {log(build)}")
