"""Every kernel, built for this machine's GPU, is numerically correct on every dispatch path, and can be measured."""

from __future__ import annotations

import json

import pytest

from kernels.recipe import recipes
from tests.conftest import Hearth


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", sorted(recipes()))
def test_smoke(hearth: Hearth, kernel: str) -> None:
    done = hearth.inv("build-kernels", "--kernel", kernel, "--json", HEARTH_RECIPES="")
    assert done.returncode == 0, done.stderr
    (manifest,) = json.loads(done.stdout)
    assert manifest["smoke"]["result"] == "passed", manifest["smoke"]


@pytest.mark.gpu
def test_backends_are_measured_on_this_gpu(hearth: Hearth) -> None:
    done = hearth.inv("bench-kernels", "--json", HEARTH_RECIPES="")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["recording"] == ""
    measured = [each for each in found["measurements"] if each["backend"] == "SDPA"]
    assert {each["shape"]["model"].split()[0] for each in measured} == {"SDXL", "Flux", "Qwen-Image", "Wan"}
    assert all(each["error"] <= each["tolerance"] and each["milliseconds"] > 0 for each in measured)
