"""How many compiles run at once."""

from __future__ import annotations

import os
from dataclasses import replace

import msgspec
import pytest

from kernels.graph import plan_jobs
from kernels.matrix import Build, Request, select


@pytest.fixture(scope="module")
def build() -> Build:
    (found,), _ = select(Request(arch="8.9", kernel="sageattention", python="3.11"))
    return found


def needing(build: Build, megabytes: int) -> Build:
    return replace(build, recipe=msgspec.structs.replace(build.recipe, memory_mb=megabytes))


def test_a_compile_a_core_while_memory_allows(build: Build) -> None:
    assert plan_jobs([needing(build, 1)], None) == len(os.sched_getaffinity(0))


def test_the_largest_compile_of_all_kernels_limits_them(build: Build) -> None:
    assert plan_jobs([needing(build, 1), needing(build, 10**9)], None) == 1


def test_the_user_knows_better(build: Build) -> None:
    assert plan_jobs([needing(build, 10**9)], 64) == 64
