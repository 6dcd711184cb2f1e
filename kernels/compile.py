"""Runs ninja over a graph, shows its progress, and says in the user's words why a compile failed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import ninja

from core import console, files, shell
from core.errors import CompileError, DiskFullError, HearthError, OutOfMemoryError
from kernels import graph as graphs

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from kernels.graph import Graph

# finished / total / running, then the edge's description; parsed back below.
_STATUS = "@@ %f %t %r "


def compile_graph(graph: Graph, jobs: int, lock: int) -> None:
    """Bring every object and module of the graph up to date; what an interrupted run finished is kept.

    `lock` is the descriptor of the held build lock: compilers inherit it, so that it is held until the last of
    them is gone even when this process is killed.
    Raises CompileError with the failing file and the log's path, OutOfMemoryError or DiskFullError.
    """
    root = graphs.root()
    files.write(root / "build.ninja", graph.text)
    argv = [str(Path(ninja.BIN_DIR) / "ninja"), "-j", str(jobs)]
    pending = _pending(argv, root)
    if not pending:
        return
    weight = sum(map(graph.seconds, pending))
    log = root / "log.txt"
    with console.Progress("compiling", weight, len(pending)) as progress, log.open("w") as text:
        run = shell.lines(argv, cwd=root, env={"NINJA_STATUS": _STATUS}, pass_fds=[lock])
        status = _follow(run, graph, progress, text.write)
    if status:
        raise _explain(log.read_text(), graph, log, jobs)


def _pending(argv: Sequence[str], root: Path) -> list[str]:
    """The outputs that ninja would make, by a dry run."""
    done = shell.run([*argv, "-n"], cwd=root, env={"NINJA_STATUS": _STATUS}, check=False)
    return [line.split()[5] for line in done.stdout.splitlines() if line.startswith("@@")]


def _follow(
    run: Generator[str, None, int], graph: Graph, progress: console.Progress, log: Callable[[str], object]
) -> int:
    """Turn ninja's output into progress, keep all of it in the log; return ninja's exit status."""
    while True:
        try:
            line = next(run)
        except StopIteration as stop:
            return int(stop.value)
        log(line + "\n")
        if line.startswith("@@"):
            _, finished, total, running, _, output = line.split(maxsplit=5)
            # ninja counts the step that just ended among the running; another takes its place while there are any
            left = min(int(running), int(total) - int(finished))
            progress.step(graph.name(output), graph.seconds(output), left)


def _explain(text: str, graph: Graph, log: Path, jobs: int) -> HearthError:
    """The error for a failed run, from what the compilers said."""
    failed = re.search(r"^FAILED: (?:\[code=\d+\] )?(\S+)", text, re.MULTILINE)
    name = graph.name(failed[1]) if failed else "the build"
    said = text[failed.start() :] if failed else text
    # The command itself is long and of no use here; the log has it.
    tail = [line for line in said.splitlines()[2:] if line.strip() and not line.startswith(("@@", "ninja:"))][-12:]
    if re.search(r"No space left on device", said):
        return DiskFullError(
            f"the disk is full: {name} could not be written",
            cause="No space left on device",
            hint=f"free some space (inv wheels --prune; the cache is {files.cache()}), then run the same command: "
            "finished files are kept",
        )
    if re.search(r"died due to signal 9|Killed signal terminated|signal: Killed|^Killed$", said, re.MULTILINE):
        return OutOfMemoryError(
            f"the machine ran out of memory while compiling {name}",
            cause=f"a compiler was killed (signal 9) with {jobs} jobs at once",
            hint=f"run again with fewer: --jobs {max(1, jobs // 2)} (finished files are kept)",
        )
    return CompileError(f"{name} does not build", cause="\n         ".join(tail), hint=f"the whole log: {log}")
