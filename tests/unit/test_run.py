"""The output of ninja and of compilers: which build failed, and why."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import pytest

from core import console
from kernels.graph import Edge, Graph
from kernels.run import _explain, _explain_ninja, _pending, _steps, run
from tests.errors import killed, raises

GRAPH = Graph("", {"a.o": Edge(rule="cxx", output="a.o", inputs=["a.cpp"], seconds=1, variables={})}, {}, {}, {})


def kind(said: str, code: int = 1) -> str:
    failed = f"FAILED: [code={code}] a.o \ng++ -c a.cpp -o a.o\n{said}\n"
    return _explain(GRAPH, "build", {"a.o", "m.so"}, {"a.o": failed, "other.o": failed}, 4).kind


@pytest.mark.parametrize(
    "said",
    [
        "g++: fatal error: Killed signal terminated program cc1plus\ncompilation terminated.",
        "nvcc error   : 'cicc' died due to signal 9 (Kill signal)",
        "nvcc error   : 'ptxas' died due to signal 9 (Kill signal)",
        "collect2: fatal error: ld terminated with signal 9 [Killed]",
        "g++: internal compiler error: Killed (program cc1plus)",
        "Killed",
        "/bin/sh: line 1:  4711 Killed                  g++ -c a.cpp",
        "virtual memory exhausted: Cannot allocate memory",
        "cc1plus: out of memory allocating 65536 bytes after a total of 1 bytes",
        "a.cpp:3:5: fatal error: out of memory",
        "/usr/bin/ld: final link failed: memory exhausted",
        "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc",
        "LLVM ERROR: out of memory",
        "ptxas fatal   : Memory allocation failure",
        "fork: Cannot allocate memory",
    ],
)
def test_each_way_to_run_out_of_memory_is_recognised(said: str) -> None:
    assert kind(said) == "out-of-memory"


def test_a_command_killed_without_a_word_ran_out_of_memory() -> None:
    assert kind("", code=137) == "out-of-memory"


@pytest.mark.parametrize(
    "said",
    [
        'a.cu(3): error: identifier "nothing" is undefined\n      throw std::runtime_error("out of memory: Killed");\n',
        "a.cpp:3:5: error: 'x' was not declared\n    3 | catch (std::bad_alloc&) { puts(\"Cannot allocate memory\"); }",
        "a.cpp:3:5: error: 'bad_alloc' is not a member of 'std'",
    ],
)
def test_a_compile_error_that_quotes_such_words_is_a_compile_error(said: str) -> None:
    assert kind(said) == "compile"


@pytest.mark.parametrize("said", ["a.o: No space left on device", "error: a.o: Disk quota exceeded"])
def test_a_full_disk_is_recognised(said: str) -> None:
    assert kind(said) == "disk-full"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("ninja: build stopped: Error writing to build log: No space left on device.", "disk-full"),
        ("ninja: error: build.ninja:3: expected build command name", "compile"),
        ("", "compile"),
    ],
)
def test_an_error_of_ninja_itself_is_explained(said: str, kind: str) -> None:
    found = _explain_ninja(said)
    assert found.kind == kind
    assert found.cause


def test_a_killed_dry_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lists no outputs, as if all were up to date."""
    killed(tmp_path, monkeypatch, "ninja")
    with raises("compile") as caught:
        _pending([str(tmp_path / "killed/ninja")], tmp_path)
    assert caught.value.cause == "it was killed by signal 9 (Killed)"


@pytest.mark.parametrize("text", ["rule x\n", "rule x\n  command = true\nbuild a: x missing\n"])
def test_a_graph_that_ninja_refuses_is_no_finished_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path))
    completed: list[str] = []
    with raises("compile", match="ninja failed"):
        run(replace(GRAPH, text=text, outputs={"build": {"a"}}), 1, 0, completed.append, lambda _: None)
    assert not completed


@pytest.mark.parametrize(("jobs", "objects", "at"), [(1, 2, 2), (2, 1, 0), (2, 2, 1), (3, 2, 0), (2, 5, 4)])
def test_a_build_is_prepared_once_a_job_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, objects: int, at: int
) -> None:
    """When the last `jobs` steps are left: one of them is the link, which waits for a compile."""
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path))
    names = [f"{number}.o" for number in range(objects)]
    text = "rule x\n  command = echo > $out\n  description = x $out\n"
    text += "".join(f"build {name}: x\n" for name in names) + f"build m.so: x {' '.join(names)}\n"
    seen: list[int] = []
    (tmp_path / "build").mkdir()

    def prepare(build: str) -> None:
        assert build == "build"
        seen.append(sum(1 for _ in (tmp_path / "build").glob("*.o")))

    run(replace(GRAPH, text=text, outputs={"build": {*names, "m.so"}}), jobs, 0, lambda _: None, prepare)
    assert len(seen) == 1
    assert at <= seen[0]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _overwrite(path: Path) -> None:
    path.write_text("wrote")


def _replace_by_a_folder(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


def _date_tomorrow(path: Path) -> None:
    os.utime(path, (time.time() + 86_400,) * 2)


def _forget(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").unlink()


def _truncate_record(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").write_text("")


def _damage_dependencies(path: Path) -> None:
    path.with_name(f"{path.name}.d").write_bytes(b"\0" * 20)


def _lose_dependencies(path: Path) -> None:
    path.with_name(f"{path.name}.d").unlink()


def _keep(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "ran"),
    [
        (_truncate, 2),
        (_overwrite, 2),
        (_replace_by_a_folder, 2),
        (_date_tomorrow, 2),
        (_forget, 2),
        (_truncate_record, 2),
        (_damage_dependencies, 2),
        (_lose_dependencies, 2),
        (_keep, 1),
    ],
)
def test_an_object_that_its_command_did_not_write_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], ran: int
) -> None:
    """Ninja compares only times: it takes what a crash, another program or a wrong clock left."""
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path))
    place = tmp_path / "build"
    place.mkdir()
    (place / "a.cpp").write_text("right")
    command = "echo ran >> runs && cp $in $out && echo $out: $in > $out.d && sha256sum $out $out.d > $out.sha256"
    rule = f"rule cxx\n  command = {command}\n  depfile = $out.d\n  description = cxx $out\n"
    text = f"{rule}build a.o: cxx a.cpp\n"
    for _ in range(2):
        assert run(replace(GRAPH, text=text, outputs={"build": {"a.o"}}), 1, 0, lambda _: None, lambda _: None) == {}
        assert (place / "a.o").read_text() == "right"
        assert (place / "runs").read_text().count("ran") in (1, ran)
        change(place / "a.o")
    assert (place / "runs").read_text().count("ran") == ran


def test_a_step_ends_with_the_line_of_the_next() -> None:
    def ninja() -> Generator[str, None, int]:
        yield "@@ 1 3 1 cxx a.o"
        yield "a.cpp:1: warning: unused"
        yield "@@ 2 3 1 cxx b.o"
        yield "FAILED: [code=1] b.o "
        yield "g++"
        yield "@@ 3 3 0 link m.so"
        yield "ninja: build stopped: subcommand failed."
        return 1

    with console.Progress("compiling", 3, 3) as progress:
        found = list(_steps(ninja(), GRAPH, progress))
    assert found == [
        ("a.o", "a.cpp:1: warning: unused\n"),
        ("b.o", "FAILED: [code=1] b.o \ng++\n"),
        ("m.so", ""),
        ("", "ninja: build stopped: subcommand failed.\n"),
    ]
