"""The smoke tests' own checks, on the CPU: torch's attention passes them, and wrong kernels fail with their shape."""

from __future__ import annotations

import functools
import json
import subprocess
from typing import Any

import pytest

from core import files, tools, workspace
from core.stack import Platform, find_stack
from kernels import toolchain

pytestmark = [pytest.mark.toolchain, pytest.mark.needs("g++")]

RIGHT = """
import json, math, sys, torch
from torch.nn.functional import scaled_dot_product_attention
from kernels import smoke
torch.set_num_threads(1)
smoke.lengths, smoke.EDGES, smoke.CROSS = lambda tiles: [1, 9, 65], (9,), ((9, 77),)

def right(q, k, v, layout, causal):
    q, k, v = (each.transpose(1, 2) if layout == "NHD" else each for each in (q, k, v))
    got = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return got.transpose(1, 2) if layout == "NHD" else got

def path(attention, **more):
    given = dict(tolerance={"float16": 4 * 2**-11, "bfloat16": 4 * 2**-8}, tiles=(64,), head_dims=(64, 96))
    return smoke.DispatchPath(name="sdpa", attention=attention, **{**given, **more})
"""


@functools.cache
def interpreter() -> tuple[str, dict[str, str]]:
    chain = toolchain.describe(find_stack(), Platform.local(), "3.11")
    site = toolchain.install_stack(chain.stack, chain.platform, chain.python)
    env = {"PYTHONPATH": f"{site}:{files.CHECKOUT}", "PYTHONPYCACHEPREFIX": str(workspace.current().cache / "pycache")}
    return chain.interpreter, {**tools.build_environment(), **env}


def run(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    program, env = interpreter()
    return subprocess.run([program, "-c", RIGHT + code, *argv], env=env, capture_output=True, text=True, check=False)


def test_torch_passes_and_the_results_are_json(tmp_path: Any) -> None:
    place = tmp_path / "smoke.json"
    done = run("smoke.check([path(right)], ['cpu'])", str(place))
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(place.read_text())["results"]
    assert (result["failed"], result["not_finite"], result["failures"]) == (0, 0, [])
    assert result["problems"] == 2 * 2 * (2 * 3 + 1 + 2 * 2 * (3 * 4 + 1))
    assert 0 < result["worst"] <= 1


@pytest.mark.parametrize(
    ("wrong", "shape"),
    [
        pytest.param("got[..., -1:, :] *= math.nan if q.shape[2] == 9 else 1", "q 2x4x9x64", id="NaN at one length"),
        pytest.param("got[..., -1, :] *= 1.1", "q 2x4x1x64", id="one row of many"),
        pytest.param("got[0] += 1e-3", "magnitudes 0.00390625 and 256.0", id="a batch of small magnitude"),
        pytest.param("got = got[..., :-1]", "q 2x4x1x64", id="another shape"),
        pytest.param("assert q.is_contiguous()", "strided", id="only contiguous inputs"),
        pytest.param("got = got if k.shape[1] == 4 else got.flip(1)", "kv 2x2x9x64", id="grouped queries"),
    ],
)
def test_a_wrong_kernel_fails_and_its_shape_is_printed(wrong: str, shape: str) -> None:
    code = f"""
def wrong(q, k, v, layout, causal):
    got = right(q, k, v, layout, causal).clone()
    {wrong}
    return got

smoke.check([path(wrong, layouts=("HND",), causal=(False,), head_dims=(64,))], ["cpu"])
"""
    done = run(code)
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(line.startswith("FAILED sdpa: ") and shape in line for line in done.stdout.splitlines()), done.stdout
    assert "sdpa: q 2x4x" in done.stderr  # the first failure, at the end of the output
    assert "problems failed on cpu" in done.stderr


def test_the_problems_cover_lengths_tiles_and_variants() -> None:
    code = """
import importlib
smoke = importlib.reload(smoke)
found = list(smoke.problems(path(right, tiles=(64, 192), head_dims=(64, 96, 128, 256)), ["cuda:0", "cuda:1"]))
print(json.dumps([{**vars(each)} for each in found]))
"""
    done = run(code)
    found = json.loads(done.stdout)
    plain = [each for each in found if each["memory"] == "contiguous" and each["kv_heads"] == 4]
    for head_dim in (64, 96, 128, 256):
        for causal in (False, True):
            seen = {
                each["length"]
                for each in plain
                if (each["head_dim"], each["causal"], each["length"]) == (head_dim, causal, each["kv_length"])
            }
            assert seen >= {*range(1, 130), 191, 192, 193, 383, 384, 385, 511, 512, 513, 1535, 1536, 1537}
    for name, values in {
        "dtype": {"float16", "bfloat16"},
        "layout": {"HND", "NHD"},
        "kv_heads": {1, 2, 4},
        "memory": {"contiguous", "transposed", "window", "strided"},
        "device": {"cuda:0", "cuda:1"},
        "stream": {False, True},
    }.items():
        assert {each[name] for each in found} == values
    assert any(each["magnitudes"][1] > 1e4 * each["magnitudes"][0] for each in found)
    assert any(each["length"] < 10 and each["kv_length"] > 1000 for each in found)
    assert not [each for each in found if each["causal"] and each["length"] != each["kv_length"]]


def test_the_backends_are_measured_against_the_definition() -> None:
    code = """
from kernels import attention
shapes = (attention.Shape("tiny", "bfloat16", 1, 2, 300, 77, 64),)
attention.BACKENDS["wrong"] = ("torch", lambda: lambda q, k, v: torch.full_like(q, math.nan), attention.EXACT)
print(json.dumps(list(attention.measure(shapes, "cpu"))))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    found = {each["backend"]: each for each in json.loads(done.stdout)}
    assert found["SDPA"]["error"] < found["SDPA"]["tolerance"]
    assert found["wrong"]["error"] is None
    assert found["wrong"]["reason"]
    assert found["SDPA cuDNN"]["reason"]  # needs a GPU
    assert "SageAttention" not in found  # not installed
