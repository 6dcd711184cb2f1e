"""Builds kernels natively on a host from this checkout, and downloads the wheels."""

from __future__ import annotations

import json

import pytest

from core import files
from tests.conftest import FIXTURES
from tests.errors import kind_of
from tests.host.fleet import Fleet

pytestmark = pytest.mark.host


@pytest.mark.faults
def test_remote_build_returns_the_wheel(fleet: Fleet) -> None:
    """Downloads compiler and torch on the host, 6 GB: part of the long run. Another host is off."""
    fleet.configure('[hosts.gone]\naddress = "127.0.0.1"\nssh_port = 1\nprofile = "cpu"\n')
    fleet.machine.run("apt-get update -qq && apt-get install -qq -y --no-install-recommends g++ python3-dev git")
    words = ("build-kernels", "--host", "spark", "--kernel", "tiny", "--arch", "8.9", "--python", "3.11")
    env = {"HEARTH_RECIPES": str(FIXTURES / "recipes")}
    plan = fleet.inv(*words, "--dry-run", **env)
    assert plan.returncode == 0, plan.stderr
    assert "tiny-0.1-cu130-sm89-cp311" in plan.stdout
    several = ["gone,spark" if word == "spark" else word for word in words]
    done = fleet.inv(*several, "--json", **env)
    assert done.returncode == 0, done.stderr
    assert "gone: tiny for 8.9 failed: error[unreachable]" in done.stderr
    assert "spark: inspecting tiny-0.1" in done.stderr
    assert "uv pip install" not in done.stderr
    (wheel,) = json.loads(done.stdout)
    assert wheel["imported"]["result"] == "passed"
    place = fleet.place / "wheelhouse/cu130/sm_89" / wheel["file"]
    assert files.sha256(place) == wheel["sha256"]
    assert json.loads((place.parent / f"{place.name}.json").read_text()) == wheel


def test_failed_remote_build_has_its_own_error(fleet: Fleet) -> None:
    done = fleet.inv("build-kernels", "--host", "spark", "--kernel", "nothing", "--arch", "8.9")
    assert (done.returncode, kind_of(done.stderr)) == (69, "remote-command"), done.stderr
    assert "there is no kernel 'nothing'" in done.stderr
