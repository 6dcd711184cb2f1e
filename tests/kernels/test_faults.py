"""Failures of real sources, compilers and machines: the error, its exit code, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from core import files
from kernels.recipe import load_recipe
from tests.conftest import Hearth
from tests.errors import kind_of

pytestmark = [pytest.mark.toolchain, pytest.mark.needs("g++", "git", "unshare", "pgrep")]

BUILD = ("build-kernels", "--kernel", "tiny", "--python", "3.11", "--arch", "8.9")


SCALE = 'kernels = ["csrc/scale*.cu"]\n'
"""The files of the recipe that compile quickly: they include little."""


def steps(text: str) -> list[str]:
    """The files that a run compiled or linked."""
    return [line.rpartition("/")[2] for line in text.splitlines() if line.startswith("[")]


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def quick(hearth: Hearth, compiled: dict[str, str]) -> None:
    hearth.env |= compiled


@pytest.fixture
def upstream(hearth: Hearth) -> Path:
    """The tiny recipe's source as a real git repository; the recipe fetches it from there."""
    repository = hearth.place / "upstream"
    shutil.copytree(hearth.tiny / "src", repository)
    (repository / "unused").mkdir()
    (repository / "unused/large.bin").write_bytes(b"0" * 10000)
    git = ["git", "-C", str(repository), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    names = [str(path.relative_to(hearth.tiny / "src")) for path in (hearth.tiny / "src").rglob("*") if path.is_file()]
    tree = files.tree_hash(hearth.tiny / "src", names)
    gone = f'git = "file://{hearth.place}/gone"\ncommit = "{commit}"'
    there = f'git = "file://{repository}"\ncommit = "{commit}"'
    hearth.edit("recipe.toml", 'folder = "src"', f"{gone}\n\n[[source]]\n{there}")
    hearth.edit("recipe.toml", "headers = ", f'paths = ["csrc", "tiny", "LICENSE"]\ntree = "{tree}"\nheaders = ')
    shutil.rmtree(hearth.tiny / "src")
    return repository


@pytest.mark.usefixtures("quick")
def test_missing_source_falls_back_to_the_next(hearth: Hearth, upstream: Path) -> None:
    done = hearth.inv(*BUILD)
    assert done.returncode == 0, done.stderr
    assert f"fetching tiny 0.1 from file://{upstream}" in done.stderr
    (tree,) = (hearth.cache / "sources").iterdir()
    assert sorted(path.name for path in tree.iterdir()) == ["LICENSE", "csrc", "tiny"]


def test_an_unreachable_source_lists_what_was_tried(hearth: Hearth, upstream: Path) -> None:
    shutil.rmtree(upstream)
    done = hearth.inv(*BUILD)
    assert done.returncode == 31
    assert f"file://{hearth.place}/gone@" in done.stderr
    assert f"file://{upstream}@" in done.stderr
    assert not list((hearth.cache / "sources").glob("*"))


@pytest.mark.usefixtures("upstream")
def test_unpinned_source_is_refused(hearth: Hearth) -> None:
    hearth.edit("recipe.toml", 'paths = ["csrc", "tiny", "LICENSE"]', 'paths = ["csrc", "tiny"]')
    done = hearth.inv(*BUILD)
    assert (done.returncode, kind_of(done.stderr)) == (31, "hash-mismatch")
    assert "differs from the recipe's pin" in done.stderr
    assert not hearth.wheels()


def test_an_sdist_with_another_hash_is_refused(hearth: Hearth) -> None:
    hearth.edit("recipe.toml", 'folder = "src"', f'sdist = "iniconfig"\nversion = "2.1.0"\nsha256 = "{"0" * 64}"')
    hearth.edit("recipe.toml", 'version = "0.1"', f'version = "0.1"\ntree = "{"0" * 64}"')
    done = hearth.inv(*BUILD)
    assert (done.returncode, kind_of(done.stderr)) == (31, "hash-mismatch"), done.stderr
    assert "pinned sha256 0000" in done.stderr


def test_a_patch_that_does_not_apply(hearth: Hearth) -> None:
    hearth.edit("recipe.toml", 'cuda = "<13.0"', 'cuda = "<99.0"')
    hearth.edit("src/tiny/__init__.py", "CUDA =", "Cuda =")
    done = hearth.inv(*BUILD)
    assert (done.returncode, kind_of(done.stderr)) == (31, "patch")
    assert "0001-say-which-cuda.patch does not apply" in done.stderr


@pytest.mark.usefixtures("quick")
def test_a_compile_error_names_the_file_and_the_log_and_keeps_the_rest(hearth: Hearth) -> None:
    hearth.edit("src/csrc/sum.cu", "float total = 0;", "float total = nothing;")
    done = hearth.inv(*BUILD, "--jobs", "1")
    assert done.returncode == 40
    assert "src/csrc/sum.cu could not be compiled" in done.stderr
    assert 'identifier "nothing" is undefined' in done.stderr
    (log,) = (hearth.cache / "build/logs").iterdir()
    assert str(log) in done.stderr
    assert 'identifier "nothing" is undefined' in log.read_text()
    assert not hearth.wheels()
    finished = set(steps(done.stderr)) - {"sum.cu"}
    hearth.edit("src/csrc/sum.cu", "float total = nothing;", "float total = 0;")
    done = hearth.inv(*BUILD)
    assert done.returncode == 0, done.stderr
    assert not finished & set(steps(done.stderr))


@pytest.mark.usefixtures("quick")
@pytest.mark.usefixtures("quick")
def test_a_kernel_that_fails_withholds_no_other_wheel(hearth: Hearth) -> None:
    for name, kernel in (("broken", "csrc/sum.cu"), ("missing", "csrc/nothing.cu")):
        shutil.copytree(hearth.tiny, hearth.recipes / name)
        recipe = hearth.recipes / name / "recipe.toml"
        text = recipe.read_text().replace('name = "tiny"', f'name = "{name}"')
        recipe.write_text(text.replace('kernels = ["csrc/sum.cu"]', f'kernels = ["{kernel}"]'))
    source = hearth.recipes / "broken/src/csrc/sum.cu"
    source.write_text(source.read_text().replace("float total = 0;", "float total = nothing;"))
    done = hearth.inv("build-kernels", "--kernel", "broken,missing,tiny", "--arch", "8.9", "--python", "3.11")
    assert (done.returncode, kind_of(done.stderr)) == (40, "several"), done.stderr
    assert [each.name.partition("+")[0] for each in hearth.wheels()] == ["tiny-0.1"]
    assert "2 of 3 builds failed" in done.stderr
    assert "src/csrc/sum.cu could not be compiled" in done.stderr
    assert "no file of the source matches 'csrc/nothing.cu'" in done.stderr


def test_killed_compiler_is_out_of_memory(hearth: Hearth) -> None:
    """A compiler launcher stands in for the kernel's OOM killer: it kills the compiler proper."""
    killer = script(
        hearth.place / "killer",
        '#!/bin/sh\n"$@" &\nnvcc=$!\n'
        "for i in $(seq 400); do\n"
        "  for name in cicc cc1plus; do\n"
        '    for pid in $(pgrep -x "$name"); do\n'
        "      parent=$(cut -d' ' -f4 /proc/$pid/stat 2>/dev/null)\n"
        "      grand=$(cut -d' ' -f4 /proc/$parent/stat 2>/dev/null)\n"
        '      [ "$parent" = "$nvcc" ] || [ "$grand" = "$nvcc" ] && kill -9 "$pid"\n'
        "    done\n"
        "  done\n"
        '  kill -0 "$nvcc" 2>/dev/null || break\n'
        "  sleep 0.02\n"
        "done\nwait $nvcc\n",
    )
    done = hearth.inv(*BUILD, "--jobs", "2", HEARTH_COMPILER_LAUNCHER=killer)
    assert (done.returncode, kind_of(done.stderr)) == (40, "out-of-memory"), done.stderr
    assert "--jobs 1" in done.stderr
    assert not hearth.wheels()


@pytest.mark.usefixtures("quick")
def test_full_disk_is_reported_and_the_next_run_continues(hearth: Hearth) -> None:
    """The build folder is on a file system of 600 kB, in a separate mount namespace."""
    build = hearth.cache / "build"
    build.mkdir()
    inner = f"mount -t tmpfs -o size=600k none {build} && exec {' '.join(hearth.command(*BUILD))}"
    argv = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", inner]
    done = subprocess.run(
        argv, cwd=files.CHECKOUT, env=hearth.environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, kind_of(done.stderr)) == (40, "disk-full"), done.stderr
    assert "the disk is full" in done.stderr
    assert not hearth.wheels()
    assert hearth.inv(*BUILD).returncode == 0


def wait_for_a_step(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[1/"):
            return
    raise AssertionError("the build ended before its first step")


@pytest.mark.needs("ccache")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_interrupted_build_leaves_no_wheel_and_resumes(
    hearth: Hearth, compiled: dict[str, str], number: signal.Signals
) -> None:
    """The kill happens while a compiler runs, which lives on."""
    slow = hearth.place / "slow"
    slow.touch()
    launcher = script(hearth.place / "launcher", f'#!/bin/sh\n[ -e {slow} ] && sleep 1\nexec ccache "$@"\n')
    hearth.env |= compiled | {"HEARTH_COMPILER_LAUNCHER": launcher}
    process = hearth.start(*BUILD, "--jobs", "1")
    wait_for_a_step(process)
    process.send_signal(number)
    slow.unlink()
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert not list(hearth.wheelhouse.glob("*"))
    done = hearth.inv(*BUILD)
    assert done.returncode == 0, done.stderr
    assert "scale.cpp" not in steps(done.stderr) or "sum.cpp" not in steps(done.stderr)
    assert len(hearth.wheels()) == 1
    assert hearth.inv("wheels").returncode == 0


@pytest.mark.usefixtures("quick")
def test_concurrent_build_waits_and_hits_the_cache(hearth: Hearth) -> None:
    first, second = hearth.start(*BUILD), hearth.start(*BUILD)
    one, _ = first.communicate(timeout=300)
    two, _ = second.communicate(timeout=300)
    assert first.returncode == second.returncode == 0, one + two
    waited, worked = (one, two) if "waiting for it" in one else (two, one)
    assert "another build is running" in waited
    assert steps(worked)
    assert not steps(waited)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            SCALE,
            f'{SCALE}flags = {{ nvcc = ["-gencode=arch=compute_90,code=sm_90"] }}\n',
            "contains SASS for sm_89, sm_90",
        ),
        (
            SCALE,
            f'{SCALE}flags = {{ nvcc = ["-gencode=arch=compute_89,code=compute_89"] }}\n',
            "contains PTX for sm_89, requested none",
        ),
        (
            'kernels = ["csrc/sum.cu"]\n',
            'kernels = ["csrc/scale.cu"]\n',
            "no library provides: _Z3sumRKN2at10TensorBaseES2_",
        ),
    ],
    ids=["another arch", "ptx", "symbol"],
)
@pytest.mark.usefixtures("quick")
def test_wheel_that_differs_from_the_request_is_not_admitted(hearth: Hearth, old: str, new: str, says: str) -> None:
    hearth.edit("recipe.toml", old, new)
    done = hearth.inv(*BUILD)
    assert (done.returncode, kind_of(done.stderr)) == (40, "inspection"), done.stderr
    assert says in done.stderr
    assert not hearth.wheels()


@pytest.mark.usefixtures("quick")
def test_a_module_that_cannot_be_imported_is_not_admitted(hearth: Hearth) -> None:
    hearth.edit("src/csrc/sum.cpp", "m.def", 'throw std::runtime_error("no use"); m.def')
    done = hearth.inv(*BUILD)
    assert (done.returncode, kind_of(done.stderr)) == (40, "inspection")
    assert "cannot be imported" in done.stderr
    assert "no use" in done.stderr
    assert not hearth.wheels()


def test_invalid_wheel_is_refused(hearth: Hearth) -> None:
    broken = hearth.place / "broken.whl"
    broken.write_bytes(b"PK no")
    for path in (broken, hearth.place / "missing.whl", hearth.place):
        assert hearth.inv("inspect-wheel", str(path)).returncode == 40


def test_new_recipe_needs_only_a_folder(hearth: Hearth) -> None:
    """As in docs/how-to/add-a-kernel.md: a folder with a recipe and a patch, and the page's commands."""
    third = hearth.recipes / "causal-conv1d"
    page = (files.CHECKOUT / "docs/how-to/add-a-kernel.md").read_text()
    for block in page.split("```")[1::2]:
        path = third / block.partition("\n")[0].partition(" ")[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.partition("\n")[2])
    build = ("build-kernels", "--kernel", "causal-conv1d", "--arch", "8.9", "--python", "3.11")
    (plan,) = json.loads(hearth.inv(*build, "--dry-run", "--json").stdout)
    assert (plan["key"], plan["state"]) == (None, "not pinned: run inv kernels.pin causal-conv1d")
    done = hearth.inv(*build)
    assert (done.returncode, kind_of(done.stderr)) == (31, "unpinned")
    assert "inv kernels.pin causal-conv1d" in done.stderr
    (report,) = json.loads(hearth.inv("kernels.pin", "causal-conv1d", "--json").stdout)
    assert "LICENSE" in report["content"]
    pinned, shipped = load_recipe(third), load_recipe(files.CHECKOUT / "recipes/causal_conv1d")
    assert pinned.tree == report["tree"] == shipped.tree
    assert (pinned.summary, pinned.homepage, pinned.python) == (shipped.summary, shipped.homepage, shipped.python)
    done = hearth.inv(*build)
    assert done.returncode == 0, done.stderr
    assert "causal_conv1d-1.7.0+cu130.torch2.14.1.sm89" in done.stdout
