from __future__ import annotations

import sys

import pytest

from core.arch import Arch, LocalGpu, device_environment, known_archs, parse_list
from core.stack import find_stack
from tests import nvml
from tests.errors import raises


@pytest.mark.parametrize(
    ("text", "arch"),
    [
        ("12.1", Arch(12, 1)),
        ("9.0a", Arch(9, 0, "a")),
        ("9.0A", Arch(9, 0, "a")),
        ("8.9+PTX", Arch(8, 9, "", ptx=True)),
        ("10.0f", Arch(10, 0, "f")),
    ],
)
def test_arch_parses_torchs_notation(text: str, arch: Arch) -> None:
    assert Arch.parse(text) == arch


@pytest.mark.parametrize(
    "text", ["12.10", "abc", "12", "sm_89", "8,9", "-8.9", "8.9b", "", "Ada", "All", "8.9+ptx+ptx"]
)
def test_invalid_capability_is_refused(text: str) -> None:
    with raises("arch"):
        Arch.parse(text)


@pytest.mark.parametrize("text", ["8.9;12.0", "8.9,12.0", "12.0 8.9", " 8.9 ; 12.0;8.9 "])
def test_a_list_takes_every_separator_of_torch_and_drops_repeats(text: str) -> None:
    assert parse_list(text, known_archs()) == [Arch(8, 9), Arch(12, 0)]


@pytest.mark.parametrize("text", ["7.5", "8.7", "8.8", "10.0f", "10.3", "10.3a", "11.0", "12.0f", "12.1f"])
def test_a_list_takes_every_capability_of_the_compiler(text: str) -> None:
    assert parse_list(text, known_archs()) == [Arch.parse(text)]


@pytest.mark.parametrize(
    ("text", "hint"), [("5.2", "nvidia-smi"), ("12.5", "nvidia-smi"), ("8.9a", "use 8.9"), ("9.0f", "use 9.0 or 9.0a")]
)
def test_what_no_compiler_knows_is_refused_without_the_nearest_number(text: str, hint: str) -> None:
    with raises("arch") as raised:
        parse_list(text, known_archs())
    assert hint in raised.value.hint
    assert "perhaps" not in str(raised.value)


def test_a_list_without_a_capability_is_refused() -> None:
    with raises("arch"):
        parse_list(";", known_archs())


def test_a_list_may_skip_what_is_unknown() -> None:
    skipped: list[str] = []
    found = parse_list("5.2 8.9;Ada,12.5", known_archs(), lambda error: skipped.append(error.what))
    assert found == [Arch(8, 9)]
    assert [next(text for text in ("5.2", "Ada", "12.5") if text in each) for each in skipped] == ["5.2", "Ada", "12.5"]


def test_arch_round_trips_through_text() -> None:
    for text in ("12.1", "9.0a", "8.9+PTX"):
        assert str(Arch.parse(text)) == text


ADA, BLACKWELL, SECOND = (
    LocalGpu(Arch(8, 9), "GPU-aa1"),
    LocalGpu(Arch(12, 0), "GPU-ab2"),
    LocalGpu(Arch(8, 9), "GPU-b3"),
)


def machine(*gpus: LocalGpu) -> str:
    """A recording of a machine with these GPUs."""
    lines = ["driver 590.48.01", "cuda 13010", f"gpus {len(gpus)}"]
    for gpu in gpus:
        lines += ["gpu", f"uuid {gpu.uuid}", f"capability {gpu.arch.major} {gpu.arch.minor}"]
    return "\n".join(lines) + "\n"


@pytest.mark.process
@pytest.mark.parametrize(
    ("gpus", "env", "seen"),
    [
        ([], {}, []),
        ([ADA, BLACKWELL], {}, ["GPU-aa1", "GPU-ab2"]),
        ([ADA, BLACKWELL], {"CUDA_VISIBLE_DEVICES": ""}, []),
        ([ADA, BLACKWELL], {"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ([ADA, BLACKWELL], {"CUDA_VISIBLE_DEVICES": "GPU-ab"}, ["GPU-ab2"]),
        ([ADA, BLACKWELL, SECOND], {"CUDA_VISIBLE_DEVICES": " GPU-b3 , GPU-ab2"}, ["GPU-b3", "GPU-ab2"]),
        ([ADA, BLACKWELL], {"CUDA_VISIBLE_DEVICES": "GPU-ab,GPU-x,GPU-aa"}, ["GPU-ab2"]),
        # CUDA's numbers are not NVML's: the fastest is first, and nobody says which that is
        ([ADA, BLACKWELL], {"CUDA_VISIBLE_DEVICES": "0"}, ["GPU-aa1", "GPU-ab2"]),
        ([ADA, BLACKWELL], {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, ["GPU-ab2"]),
        ([ADA, SECOND], {"CUDA_VISIBLE_DEVICES": "1"}, ["GPU-b3"]),
        ([ADA, SECOND], {"CUDA_VISIBLE_DEVICES": "7"}, []),
        ([ADA], {"CUDA_VISIBLE_DEVICES": "MIG-1234"}, ["GPU-aa1"]),
    ],
)
def test_all_visible_gpus_are_found(gpus: list[LocalGpu], env: dict[str, str], seen: list[str]) -> None:
    code = f"""
import os
for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
    os.environ.pop(name, None)
os.environ |= {env!r}
from core.arch import local_gpus
print(*(f"{{gpu.uuid}}={{gpu.arch}}" for gpu in local_gpus()))
"""
    found = nvml.python(code, machine(*gpus)).split()
    assert found == [f"{gpu.uuid}={gpu.arch}" for uuid in seen for gpu in gpus if gpu.uuid == uuid]


def test_the_first_device_of_cuda_has_the_requested_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert device_environment([ADA, BLACKWELL, SECOND], "12.0") == {"CUDA_VISIBLE_DEVICES": "GPU-ab2"}
    assert device_environment([ADA, BLACKWELL, SECOND], "8.9") == {"CUDA_VISIBLE_DEVICES": "GPU-aa1,GPU-b3"}
    assert device_environment([ADA, SECOND], "8.9") == {"CUDA_VISIBLE_DEVICES": "1,0"}


def test_builds_are_for_the_python_that_runs_hearth() -> None:
    stack = find_stack()
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert stack.python == (running if running in stack.pythons else stack.pythons[-1])
    old = type(stack)(
        **{**{name: getattr(stack, name) for name in stack.__struct_fields__}, "pythons": ("3.9", "3.10")}
    )
    assert old.python == "3.10"
