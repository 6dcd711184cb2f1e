"""flash-attention's profiles: which kernels each has, and that the dispatch of `diffusion` stays within its own.

The kernels are stubs, so that the dispatch runs without a GPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from core import tools, workspace
from kernels import graph, source, toolchain
from kernels.matrix import Build, Request, select
from tests.conftest import Hearth

pytestmark = [pytest.mark.toolchain, pytest.mark.needs("g++")]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """The default build, its source in place."""
    hearth = Hearth(tmp_path_factory.mktemp("flash") / "hearth")
    sources = workspace.current().cache / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    (hearth.cache / "sources").symlink_to(sources)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hearth.variables().items():
            patch.setenv(name, value)
        (found,), _ = select(Request(arch="8.9", kernel="flash-attn", python="3.11"))
        source.lay_out(
            found.recipe,
            found.recipe.patches_for(found.toolchain.stack, found.profile),
            graph.root() / found.source_folder,
        )
        toolchain.assemble(found.toolchain)
        yield found


def kernels(build: Build, profile: str) -> set[str]:
    """The kernel files of a profile."""
    edges = graph.write([replace(build, profile=profile)], {"": 1}).edges.values()
    return {Path(edge.inputs[0]).name for edge in edges if edge.rule == "nvcc"}


def test_kernel_files_of_the_profiles(build: Build) -> None:
    assert build.profile == "diffusion"
    diffusion, inference, full = (kernels(build, each) for each in ("diffusion", "inference", "full"))
    sizes, types = ("64", "96", "128", "256"), ("fp16", "bf16")
    assert diffusion == {f"flash_fwd_hdim{size}_{each}_sm80.cu" for size in sizes for each in types}
    assert diffusion < inference < full
    assert (len(inference), len(full)) == (48, 72)


STUBS = r"""
#include <torch/python.h>
#include <ATen/cuda/CUDAContext.h>
#include "namespace_config.h"
#include "flash.h"
#include <cutlass/numeric_types.h>
static std::string called;
namespace FLASH_NAMESPACE {
KERNELS
}
#include "flash_api.cpp"
extern "C" const char *dispatch(int head_dim, bool bf16, bool causal, int splits, bool force) {
    FLASH_NAMESPACE::Flash_fwd_params params{};
    params.d = head_dim, params.is_bf16 = bf16, params.is_causal = causal, params.num_splits = splits;
    try { FLASH_NAMESPACE::run_mha_fwd(params, nullptr, force); }
    catch (const c10::Error &error) { called = error.what_without_backtrace(); }
    return called.c_str();
}
extern "C" int splits() { return FLASH_NAMESPACE::num_splits_heuristic(1, 264, 64, 128); }
"""

CALLS = r"""
import ctypes, json, sys, torch
library = ctypes.CDLL(sys.argv[1])
library.dispatch.restype = ctypes.c_char_p
found = {f"{d} {bf16}{causal}": library.dispatch(d, bf16, causal, 0, False).decode()
         for d in range(8, 257, 8) for bf16 in (0, 1) for causal in (0, 1)}
found["splits"] = library.splits()
found["split"], found["forced"] = (library.dispatch(64, 0, 0, *each).decode() for each in ((2, False), (0, True)))
print(json.dumps(found))
"""


def test_dispatch_names_only_the_kernels_of_the_profile(build: Build, tmp_path: Path) -> None:
    names = [re.fullmatch(r"flash_fwd_hdim(\d+)_(\w+)_sm80.cu", each) for each in sorted(kernels(build, "diffusion"))]
    kinds = {"fp16": "cutlass::half_t", "bf16": "cutlass::bfloat16_t"}
    stubs = [
        f"template <> void run_mha_fwd_<{kinds[each[2]]}, {each[1]}, false>(Flash_fwd_params &, cudaStream_t)"
        f' {{ called = "{each[2]} {each[1]}"; }}'
        for each in names
        if each
    ]
    (tmp_path / "dispatch.cpp").write_text(STUBS.replace("KERNELS", "\n".join(stubs)))
    edges = {edge.rule: edge.variables for edge in graph.write([build], {"": 1}).edges.values()}
    words = f"{edges['cxx']['cxx']} {edges['cxx']['flags']} -std={build.toolchain.stack.cxx} -O0 -fPIC -shared".split()
    library = tmp_path / "dispatch.so"
    # now: a call of a kernel that the profile leaves out is an error when the library is loaded
    words += [str(tmp_path / "dispatch.cpp"), "-o", str(library), "-Wl,-z,now", *edges["link"]["libs"].split()]
    tools.build("env", "-C", graph.root(), *words)
    env = {
        "PYTHONPATH": str(build.toolchain.site.resolve()),
        "PYTHONPYCACHEPREFIX": str(workspace.current().cache / "pycache"),
    }
    done = tools.build(build.toolchain.interpreter, "-c", CALLS, library, env=env)
    found = json.loads(done.stdout)
    for size in range(8, 257, 8):
        padded = next(each for each in (64, 96, 128, 256) if size <= each)
        for causal in (0, 1):
            assert [found[f"{size} {bf16}{causal}"] for bf16 in (0, 1)] == [f"fp16 {padded}", f"bf16 {padded}"]
    assert found["splits"] == 1
    for each in ("split", "forced"):
        assert "--profile inference" in found[each]
