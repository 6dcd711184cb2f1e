"""Measures every attention backend of an interpreter on shapes of real models, and prints JSON lines.

Runs in an interpreter with torch, such as ComfyUI's: `python -m kernels.attention`. The first line describes the GPU
and the versions, each further line is one measurement. kernels/bench.py reads them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels.shapes import SHAPES, Shape
from kernels.smoke import reference, worst_row

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes and returns (batch, length, heads, head dimension), as models produce it."""


EXACT = {"float16": 4 * 2**-11, "bfloat16": 4 * 2**-8}
"""At most this error of a row for backends that round to the input's type only: recipes/flash-attn/smoke.py."""

QUANTISED = {"float16": 2 * 2**-4, "bfloat16": 2 * 2**-4}
"""For backends that round Q, K, P and V to 8 bits: recipes/sageattention/smoke.py."""

ROWS = 256
"""The rows of queries that are compared with float32, evenly spread."""


def _sdpa(*kinds: SDPBackend) -> Attention:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        turned = (each.transpose(1, 2) for each in (q, k, v))
        if not kinds:
            return scaled_dot_product_attention(*turned).transpose(1, 2)
        with sdpa_kernel(list(kinds)):
            return scaled_dot_product_attention(*turned).transpose(1, 2)

    return attention


def _sage() -> Attention:
    from sageattention import sageattn

    return lambda q, k, v: sageattn(q, k, v, tensor_layout="NHD")


def _flash() -> Attention:
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v)


def _comfy_kitchen() -> Attention:
    from comfy_kitchen.sage_attention import int8_attention

    return lambda q, k, v: int8_attention(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2)


# Without SDPA's math backend, which holds all scores in memory: 86 GB for Wan at 480p.
BACKENDS: dict[str, tuple[str, Callable[[], Attention], dict[str, float]]] = {
    "SDPA": ("torch", lambda: _sdpa(), EXACT),
    "SDPA flash": ("torch", lambda: _sdpa(SDPBackend.FLASH_ATTENTION), EXACT),
    "SDPA cuDNN": ("torch", lambda: _sdpa(SDPBackend.CUDNN_ATTENTION), EXACT),
    "SDPA efficient": ("torch", lambda: _sdpa(SDPBackend.EFFICIENT_ATTENTION), EXACT),
    "flash-attention": ("flash-attn", _flash, EXACT),
    "SageAttention": ("sageattention", _sage, QUANTISED),
    "comfy-kitchen": ("comfy-kitchen", _comfy_kitchen, QUANTISED),
}
"""Each with its package, how to import it, and its tolerance. "SDPA" is what torch chooses."""


def machine(device: str) -> dict[str, Any]:
    """The GPU, and the versions of what is measured."""
    versions = {}
    for package in {package for package, _, _ in BACKENDS.values()}:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = device.startswith("cuda")
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else device,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)) if cuda else "",
        "cuda": torch.version.cuda or "",
        "versions": versions,
    }


def measure(shapes: tuple[Shape, ...] = SHAPES, device: str = "cuda:0") -> Iterator[dict[str, Any]]:
    """One measurement for each shape and installed backend.

    A backend that cannot be imported or fails is a measurement with a reason; raises only what a lost GPU raises.
    """
    loaded: dict[str, Attention | str] = {}
    for name, (_, load, _) in BACKENDS.items():
        try:
            loaded[name] = load()
        except Exception as error:
            if not isinstance(error, ModuleNotFoundError):
                loaded[name] = f"{type(error).__name__}: {error}"
    for shape in shapes:
        torch.manual_seed(0)
        dtype = getattr(torch, shape.dtype)
        q = torch.randn(shape.batch, shape.length, shape.heads, shape.head_dim, device=device, dtype=dtype)
        k, v = (
            torch.randn(shape.batch, shape.kv_length, shape.heads, shape.head_dim, device=device, dtype=dtype)
            for _ in range(2)
        )
        rows = torch.linspace(0, shape.length - 1, min(ROWS, shape.length), device=device).long()
        wanted = _wanted(q[:, rows], k, v)
        for name, attention in loaded.items():
            tolerance = BACKENDS[name][2][shape.dtype]
            found: dict[str, Any] = {"backend": name, "shape": asdict(shape), "tolerance": tolerance}
            if isinstance(attention, str):
                yield {**found, "reason": attention}
                continue
            try:
                yield {**found, **_one(attention, (q, k, v), rows, wanted, shape)}
            except Exception as error:
                if "CUDA error" in str(error):
                    raise
                lines = str(error).strip().splitlines() or [""]
                yield {**found, "reason": f"{type(error).__name__}: {lines[0][:200]}"}


def _wanted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The reference, head by head: all at once would take gigabytes."""
    each = ((x[:, :, head : head + 1].transpose(1, 2) for x in (q, k, v)) for head in range(q.shape[2]))
    return torch.cat([reference(*one) for one in each], dim=1)


def _one(
    attention: Attention,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    wanted: torch.Tensor,
    shape: Shape,
) -> dict[str, Any]:
    """Error, memory and time. The memory is what a call takes beyond its inputs, its result included."""
    cuda = given[0].is_cuda
    attention(*given)  # compiles what is compiled at the first call
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    error = worst_row(attention(*given)[:, rows].transpose(1, 2), wanted)
    memory = torch.cuda.max_memory_allocated() - before if cuda else None
    found: dict[str, Any] = {"error": error, "memory": memory, "reason": ""}
    if not math.isfinite(error):
        found.update(error=None, reason="the result holds NaN or infinity")
    if cuda:
        seconds = _seconds(lambda: attention(*given))
        found |= {"milliseconds": seconds * 1e3, "tflops": shape.operations / seconds / 1e12}
    return found


def _seconds(call: Callable[[], Any], least: float = 0.2) -> float:
    """The median of 5 to 100 calls, which together take about `least` seconds."""
    times: list[float] = []
    while len(times) < 5 or (sum(times) < least and len(times) < 100):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def main() -> None:
    """Print the machine and all measurements."""
    torch.set_float32_matmul_precision("highest")
    print(json.dumps(machine("cuda:0")), flush=True)
    for each in measure():
        print(json.dumps(each), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
