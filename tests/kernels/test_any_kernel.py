"""What upstream projects ship: bindings in a kernel file, a library of NVIDIA's, operators without an init function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Hearth
from tests.errors import kind_of

pytestmark = [pytest.mark.toolchain, pytest.mark.needs("g++")]

BUILD = ("build-kernels", "--kernel", "any", "--python", "3.11", "--arch", "8.9", "--json")

RECIPE = """
name = "any"
version = "1"
license_files = ["LICENSE"]
files = ["any/*.py"]
requires = ["einops"]
root = "src"
memory_mb = 1500

[[source]]
folder = "upstream"

[archs]
"8.9" = "89"

[flags]
cxx = ["-O0"]
nvcc = ["-O0"]

[[modules]]
name = "any._blas"
kernels = ["blas.cu"]
kernels_include_python = true
libraries = ["cublas"]
defines = ["NAME=version number"]
include = ["shared"]
functions = ["_blas"]

[[modules]]
name = "any._operators"
bindings = ["operators.cpp"]
functions = ["same", "lost"]
libraries = ["cuda"] # the driver, of which it calls nothing: a build machine has none
"""

SOURCES = {
    "LICENSE": "GPL-3.0-or-later",
    "src/any/__init__.py": "import einops\n",  # which the stack lacks: the modules are loaded without their package
    "shared/shared.h": "#define TEXT(x) #x\n#define STRING(x) TEXT(x)\n",
    "blas.cu": """
#include <cublas_v2.h>
#include <pybind11/pybind11.h>
#include <shared.h>
__global__ void nothing() {}
static int blas_version() {
  cublasHandle_t handle;
  int version = 0;
  nothing<<<1, 1>>>();
  if (cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS) cublasGetVersion(handle, &version);
  return version;
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def(STRING(TORCH_EXTENSION_NAME), &blas_version, STRING(NAME)); }
""",
    "operators.cpp": """
#include <torch/library.h>
static at::Tensor same(const at::Tensor& x) { return x; }
TORCH_LIBRARY(any_operators, m) { m.def("same(Tensor x) -> Tensor", &same); }
""",
}

DEFINED = 'm.def("same(Tensor x) -> Tensor", &same);'


@pytest.fixture(scope="module")
def hearth(tmp_path_factory: pytest.TempPathFactory) -> Hearth:
    hearth = Hearth(tmp_path_factory.mktemp("any") / "hearth")
    place = hearth.recipes / "any"
    for name, text in {"recipe.toml": RECIPE, **{f"upstream/{name}": text for name, text in SOURCES.items()}}.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return hearth


def edit(hearth: Hearth, name: str, old: str, new: str) -> None:
    path: Path = hearth.recipes / "any" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_function_that_the_package_calls_is_looked_for(hearth: Hearth) -> None:
    done = hearth.inv(*BUILD)
    assert (done.returncode, kind_of(done.stderr)) == (40, "inspection"), done.stderr
    assert "any._operators lacks lost" in done.stderr
    assert not [*hearth.wheelhouse.rglob("*.whl")]


def test_a_library_and_operators_are_linked_inspected_and_loaded(hearth: Hearth) -> None:
    edit(hearth, "recipe.toml", '"same", "lost"', '"same"')
    done = hearth.inv(*BUILD)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    modules = {module["name"]: module for module in found["modules"]}
    assert "libcublas.so.13" in modules["any._blas"]["needed"]
    assert modules["any._blas"]["sass"] == ["sm_89"]
    assert "libcuda.so.1" in modules["any._operators"]["needed"]
    assert "registered 1 operators" in found["imported"]["detail"]


def test_a_module_that_nothing_can_load_is_refused(hearth: Hearth) -> None:
    edit(hearth, "upstream/operators.cpp", DEFINED, "")
    done = hearth.inv(*BUILD)
    edit(hearth, "upstream/operators.cpp", "{  }", f"{{ {DEFINED} }}")
    assert (done.returncode, kind_of(done.stderr)) == (40, "inspection"), done.stderr
    assert "has neither an init function nor an operator" in done.stderr


def test_a_module_that_breaks_the_promised_abi_is_refused(hearth: Hearth) -> None:
    edit(hearth, "recipe.toml", 'root = "src"', 'root = "src"\npython = ">=3.10"\nabi = "abi3"')
    edit(hearth, "recipe.toml", "memory_mb", 'torch = ">=2.9"\nstable_torch = true\nmemory_mb')
    # torch's headers refuse a file that includes unstable ones, unless the file hides that
    for name, first in (("blas.cu", "#include <pybind11"), ("operators.cpp", "#include <torch")):
        text = f"#undef Py_LIMITED_API\n#undef TORCH_TARGET_VERSION\n{first}"
        edit(hearth, f"upstream/{name}", first, text)
    done = hearth.inv(*BUILD)
    assert (done.returncode, kind_of(done.stderr)) == (40, "inspection"), done.stderr
    assert "any._blas: uses Python outside abi = 'abi3'" in done.stderr
    assert "any._operators: uses torch outside its stable ABI" in done.stderr
