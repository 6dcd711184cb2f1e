"""One wheel for every torch and Python: LibTorch's stable ABI, and Python's limited API."""

from __future__ import annotations

import json
import subprocess
import zipfile

import pytest

from core.stack import Platform, stacks
from kernels import pythons, toolchain
from kernels.recipe import load_recipe
from tests.conftest import Hearth

pytestmark = [pytest.mark.toolchain, pytest.mark.needs("g++")]

RECIPE = """
name = "stable"
version = "1"
python = ">=3.10"
torch = ">=2.9"
cuda = ">=13"
abi = "abi3"
stable_torch = true
memory_mb = 700

[[source]]
folder = "src"

[archs]
"8.9" = "89"

[flags]
cxx = ["-O1"]
nvcc = ["-O1"]

[[modules]]
name = "_stable"
bindings = ["stable.cpp"]
kernels = ["stable.cu"]
"""

BINDING = """
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
void twice(float* data, long n);
static void twice_boxed(StableIValue* stack, uint64_t, uint64_t) {
  auto x = torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
  twice(static_cast<float*>(x.data_ptr()), x.numel());
}
STABLE_TORCH_LIBRARY(stable_test, m) { m.def("twice(Tensor(a!) x) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(stable_test, CUDA, m) { m.impl("twice", &twice_boxed); }
PyMODINIT_FUNC PyInit__stable(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_stable", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
"""

KERNEL = """
static __global__ void kernel(float* data, long n) { if (threadIdx.x < n) data[threadIdx.x] *= 2; }
void twice(float* data, long n) { kernel<<<1, 32>>>(data, n); }
"""

LOAD = "import torch, _stable; print(torch.__version__, torch.ops.stable_test.twice.default)"


def test_one_wheel_registers_its_operators_with_every_torch_and_python(hearth: Hearth) -> None:
    place = hearth.recipes / "stable"
    (place / "src").mkdir(parents=True)
    for name, text in {"recipe.toml": RECIPE, "src/stable.cpp": BINDING, "src/stable.cu": KERNEL}.items():
        (place / name).write_text(text)
    done = hearth.inv("build-kernels", "--kernel", "stable", "--arch", "8.9", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["file"].startswith("stable-1+cu130.sm89-cp310-abi3-")
    assert (found["torch"], found["python"]) == (">=2.9", "")
    (module,) = found["modules"]
    assert not {"libtorch_python.so", "libc10.so"} & {*module["needed"]}
    with zipfile.ZipFile(next(hearth.wheelhouse.rglob(found["file"]))) as archive:
        archive.extractall(hearth.place / "site")
    recipe, tried = load_recipe(place), []
    path, compiled = hearth.place / "site", str(hearth.cache / "pycache")
    for stack in (each for each in stacks().values() if not recipe.unsupported_version(each)):
        known = [found for python in stack.pythons if (found := pythons.known(python))]
        for program, version, *_ in known[: 1 + stack.default]:  # each Python has another torch of a gigabyte
            site = toolchain.install_stack(stack, Platform.local(), version.rpartition(".")[0])
            env = {"PYTHONPATH": f"{path}:{site}", "PYTHONPYCACHEPREFIX": compiled}
            argv = [program, "-c", LOAD]
            text = subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout
            assert text == f"{stack.torch}+{stack.name} stable_test.twice.default\n"
            tried.append((stack.torch, version))
    assert tried
