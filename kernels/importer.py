"""The import of a built wheel with its stack's torch, natively or under emulation."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from core import shell, tools, workspace
from core.errors import BuildError
from core.manifest import Proof
from kernels import emulation, toolchain
from kernels.elf import Elf
from kernels.inspection import driver_functions, modules, unpacked

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    from kernels.matrix import Build
    from kernels.recipe import Module
    from kernels.toolchain import Toolchain


class Importer:
    """An interpreter that imports torch from its creation on, and then one wheel.

    Torch takes most of the time; it can be imported while the wheel's last file is compiled. The interpreter ends with
    the context, or with this process.
    """

    def __init__(self, chain: Toolchain) -> None:
        reading, writing = os.pipe()
        self._request = os.fdopen(writing, "w")
        self._pool = ThreadPoolExecutor(1)
        self._result = self._pool.submit(self._run, chain, reading)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._pool.shutdown()

    def prove(self, wheel: Path, build: Build) -> Proof:
        """Import every module of the wheel.

        A module without an init function registers operators with torch, and is loaded by its path. GPU driver
        functions are stubs: Python binds all symbols at load time, and a build machine has no driver. Raises
        BuildError if an import fails; returns "not run" with the reason if no interpreter is available.
        """
        with unpacked(wheel) as folder:
            paths = {module: folder / build.module_file(module) for module in build.modules}
            loads = [(each.name, str(path), _is_python(path, each), each.functions) for each, path in paths.items()]
            required = [Requirement(each).name.replace("-", "_") for each in build.recipe.requires]
            elves = [Elf(path) for path in modules(folder)]
            needs_driver = any("libcuda.so.1" in elf.dynamic["DT_NEEDED"] for elf in elves)
            if needs_driver:
                called = {name for elf in elves for name in driver_functions(elf)}
                toolchain.driver_stub(build.toolchain, folder, sorted(called))
            with suppress(BrokenPipeError):  # the interpreter has failed
                self._request.write(json.dumps([str(folder), needs_driver, loads, required]))
                self._close()
            label, done = self._result.result()
            shutil.rmtree(f"{_pycache()}{folder}", ignore_errors=True)
        if done is None:
            return Proof("not run", label)
        if done.returncode:
            raise BuildError(
                "inspection",
                f"{wheel.name} cannot be imported",
                cause=shell.last_words(done),
                hint="it was not admitted to the wheelhouse",
            )
        return Proof("passed", f"{done.stdout.strip().splitlines()[-1]}, {label}")

    def _close(self) -> None:
        with suppress(BrokenPipeError):
            self._request.close()

    def _run(self, chain: Toolchain, reading: int) -> tuple[str, shell.Done | None]:
        """How the interpreter runs and its result, or the reason why there is none."""
        with os.fdopen(reading) as request:
            runner = native(chain) if chain.native else emulation.runner(chain.platform, chain.python)
            if isinstance(runner, str):
                return runner, None
            # Most of torch's import time is bytecode compilation: the installed stack has no bytecode.
            env = {**runner.env, "PYTHONPATH": str(chain.site.resolve()), "PYTHONPYCACHEPREFIX": _pycache()}
            return runner.label, tools.build(*runner.argv, "-c", _LOAD, env=env, check=False, stdin=request)


def _pycache() -> str:
    return str(workspace.current().cache / "pycache")


# Loads each module, and looks for the functions and operators that its package calls. The stack lacks packages that the
# recipe requires: a module whose own package needs one of them is loaded by its path, without that package.
_LOAD = """
import ctypes, importlib, importlib.util as util, json, sys, torch
operators = lambda: {*torch._C._dispatch_get_all_op_names()}
first = operators()
request = sys.stdin.read()
if not request:
    sys.exit("no wheel was named")
folder, needs_driver, modules, required = json.loads(request)
sys.path.insert(0, folder)
if needs_driver:
    ctypes.CDLL(f"{folder}/libcuda.so.1")
missing = []
for name, path, python, functions in modules:
    before, module = operators(), None
    try:
        module = importlib.import_module(name) if python else torch.ops.load_library(path)
    except ModuleNotFoundError as error:
        if error.name not in required:
            raise
        spec = util.spec_from_file_location(name, path)
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if not python and before == operators():
        sys.exit(f"{name} has neither an init function nor an operator")
    names = {each.partition("::")[2].partition(".")[0] for each in operators() - first} | {*dir(module)}
    missing += [f"{name} lacks {each}" for each in functions if each not in names]
if missing:
    sys.exit(", ".join(missing))
more = len(operators() - first)
print("imported with torch", torch.__version__, f"and registered {more} operators" if more else "")
"""


def _is_python(path: Path, module: Module) -> bool:
    """Whether a module has an init function; one without it only registers operators."""
    return bool(Elf(path).defines([f"PyInit_{module.init}"]))


def native(chain: Toolchain) -> emulation.Runner:
    """The build machine's own interpreter."""
    return emulation.Runner((chain.interpreter,), {}, f"natively on {chain.platform.cpu}")
