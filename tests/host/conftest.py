"""One booted Debian with a deployed ComfyUI, shared by all host tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host import machine
from tests.host.fleet import Fleet, fresh, unchanged
from tests.host.small import small


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name not in (
            "test_image.py",
            "test_local.py",
            "test_ssh.py",
        ):
            item.add_marker(pytest.mark.needs(*machine.NEEDS))
    left_out = [
        name for name in ("faults", "spark", "browser", "podman") if not config.getoption(f"--{name}", default=False)
    ]
    deselected = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    items[:] = [item for item in items if item not in deselected]
    config.hook.pytest_deselected(items=deselected)


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The booted machine; nothing is deployed yet."""
    with fresh(tmp_path_factory.mktemp("fleet"), "shared", Fleet, downloads=True) as one:
        one.machine.add_disk("blocks", "300M")
        one.machine.add_disk("inodes", "2G", "-N", "300")
        one.machine.boot()
        one.default = None
        yield one


def _runs(fleet: Fleet, app: str) -> Fleet:
    """The machine with this application by default, and some user files in data/."""
    fleet.run_by_default(app)
    for name, text in (("models/checkpoints/one.safetensors", "weights"), ("output/picture.png", "art")):
        path = fleet.prefix / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return fleet


@pytest.fixture(scope="module")
def deployed(fleet: Fleet) -> Fleet:
    """The machine with ComfyUI."""
    return _runs(fleet, "")


@pytest.fixture
def steady(deployed: Fleet) -> Iterator[Fleet]:
    """The deployed machine. After the test it must be unchanged."""
    with unchanged(deployed):
        yield deployed


@pytest.fixture(scope="module")
def stand_in(fleet: Fleet) -> Iterator[Fleet]:
    """The machine, where a stand-in for ComfyUI runs from here to the end of the file."""
    place = fleet.place / "small"
    _runs(fleet, str(place if place.exists() else small(fleet.place, "small")))
    data = fleet.data()
    yield fleet
    assert fleet.data() == data


@pytest.fixture
def service(stand_in: Fleet) -> Iterator[Fleet]:
    """Like `steady`, but with a stand-in for ComfyUI: for what concerns the service, in the last tests of a file."""
    with unchanged(stand_in):
        yield stand_in


@pytest.fixture
def healthy(stand_in: Fleet) -> Fleet:
    """The same machine with any release of the file's tests."""
    stand_in.configure()
    stand_in.default = None
    return stand_in
