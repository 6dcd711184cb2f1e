"""A DGX Spark without the hardware: the same deploy to an emulated arm64 Debian, with the real sm_121 wheels.

`nox -s host -- --spark`. Needs binfmt-support and qemu-user-static, and in the wheelhouse the wheels of: inv
build-kernels --arch 12.1 --python 3.11
"""

from __future__ import annotations

from pathlib import Path

import pytest

from core import workspace
from tests.host.fleet import Fleet, fresh

pytestmark = [pytest.mark.host, pytest.mark.spark]


def test_a_spark_takes_the_same_deploy(tmp_path: Path) -> None:
    with fresh(tmp_path, "spark", Fleet, bare=True, downloads=True, arch="arm64") as fleet:
        fleet.patience = 3600
        fleet.env["HEARTH_WHEELHOUSE"] = str(workspace.current().wheelhouse.folder)
        fleet.configure(
            "[hosts.spark.override]\n"
            'pythons = ["3.11"]\n'  # Debian 12's
            "cuda = false\nstart_seconds = 900\n"
            'flags."--cpu" = { why = "emulation has no GPU" }\n',
            profile="dgx-spark",
        )
        fleet.machine.boot()
        done = fleet.deploy()
        assert done.returncode == 0, done.stderr
        assert "the second picture arrived" in done.stderr
        assert "attention: sage attention" in done.stderr
        facts = fleet.facts()
        assert (facts["machine"], facts["manager"]) == ("aarch64", "systemd-system")
        (release,) = facts["releases"]
        assert set(release["kernels"]) == {"sageattention", "flash-attn"}
        assert all("sm121" in version for version in release["kernels"].values())
        status = fleet.inv("status", "--host", "spark")
        assert (status.returncode, "no problems found" in status.stdout) == (0, True), status.stdout + status.stderr
        again = fleet.deploy("--dry-run")
        assert again.returncode == 0, again.stderr
