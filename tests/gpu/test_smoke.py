"""Every kernel, built for this machine's GPU, is numerically correct on its default path."""

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
