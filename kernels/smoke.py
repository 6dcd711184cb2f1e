"""Shared by all recipes' smoke tests: attention problems, and a comparison that NaN cannot pass.

Runs in the interpreter of a wheel, which has torch. A recipe's smoke.py describes its dispatch paths and calls `check`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

LENGTH = 1111
"""Not a multiple of any kernel's tile (64 or 128), so that the masked last tile is tested, too."""

BATCH, HEADS = 2, 4

CROSS = ((1, 77), (1, 4096), (9, 512), (77, LENGTH), (LENGTH, 9), (LENGTH, 77), (LENGTH, 512), (129, 4096))
"""Lengths of queries and keys that differ. Few queries and many keys take flash-attention's split-KV kernels."""

EDGES = (12, 129, LENGTH)
"""Lengths at which all variants are tested: less than a tile, a tile and a bit, many tiles."""

MAGNITUDES = (2.0**-8, 2.0**8)
"""Scales of the two batches, where those differ: powers of two, which change no mantissa."""

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str, bool], torch.Tensor]
"""`attention(q, k, v, layout, causal)`, for tensors as `layout` says: HND or NHD."""


@dataclass(frozen=True, kw_only=True)
class DispatchPath:
    """A way to call a kernel, and what it supports there.

    `tolerance` bounds the error of every row, relative to that row, for each dtype. `tiles` are the lengths of the
    kernel's tiles of queries and keys. `magnitudes`: batches may differ widely in magnitude.
    """

    name: str
    attention: Attention
    tolerance: Mapping[str, float]
    tiles: tuple[int, ...]
    head_dims: tuple[int, ...] = (64, 96, 128, 256)
    layouts: tuple[str, ...] = ("HND", "NHD")
    causal: tuple[bool, ...] = (False, True)
    grouped: bool = True
    magnitudes: bool = True


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of one call. `memory` is how they lie in memory; `stream`: they are written on a stream of their own."""

    dtype: str
    head_dim: int
    length: int
    kv_length: int
    causal: bool
    layout: str
    kv_heads: int = HEADS
    memory: str = "contiguous"
    magnitudes: tuple[float, float] = (1.0, 1.0)
    device: str = "cuda:0"
    stream: bool = False

    def __str__(self) -> str:
        q = f"q {BATCH}x{HEADS}x{self.length}x{self.head_dim}"
        kv = f"kv {BATCH}x{self.kv_heads}x{self.kv_length}x{self.head_dim}"
        told = [q, kv, self.dtype, "causal" if self.causal else "full", self.layout, self.memory]
        told += [f"magnitudes {' and '.join(map(str, self.magnitudes))}"] if self.magnitudes != (1.0, 1.0) else []
        told += [self.device] if not self.device.endswith("0") else []
        return ", ".join([*told, *(["on a stream of its own"] if self.stream else [])])


@dataclass
class Result:
    """The results of a dispatch path. `worst` is the largest error as a fraction of its tolerance."""

    path: str
    problems: int = 0
    failed: int = 0
    not_finite: int = 0
    worst: float = 0.0
    worst_error: float = 0.0
    worst_problem: str = ""
    failures: list[str] = dataclasses.field(default_factory=list)

    def add(self, problem: Problem, error: float, tolerance: float) -> bool:
        """Count a problem, and return whether it passed."""
        self.problems += 1
        if error / tolerance > self.worst and math.isfinite(error):
            self.worst, self.worst_error, self.worst_problem = error / tolerance, error, str(problem)
        passed = error <= tolerance  # false for NaN
        self.not_finite += not math.isfinite(error)
        if not passed:
            self.failed += 1
            self.failures.append(f"{problem}: error {error:.5f}, at most {tolerance:.5f}")
        return passed

    def __str__(self) -> str:
        state = f"{self.failed} of {self.problems} problems FAILED" if self.failed else f"{self.problems} problems"
        return f"{self.path}: {state}, worst error {self.worst_error:.5f}, {self.worst:.0%} of its tolerance"


def lengths(tiles: Iterable[int]) -> list[int]:
    """1 to 129, around the edges of the first eight tiles, and LENGTH."""
    edges = (tile * number for tile in tiles for number in range(1, 9))
    return sorted({*range(1, 130), *(edge + step for edge in edges for step in (-1, 0, 1)), LENGTH})


def problems(path: DispatchPath, devices: Sequence[str]) -> Iterator[Problem]:
    """Every problem that the path supports: all lengths plainly, and all variants at a few lengths."""
    for dtype, head_dim in itertools.product(path.tolerance, path.head_dims):
        plain = Problem(
            dtype=dtype, head_dim=head_dim, length=LENGTH, kv_length=LENGTH, causal=False, layout=path.layouts[0],
            device=devices[0],
        )  # fmt: skip
        for causal, length in itertools.product(path.causal, lengths(path.tiles)):
            yield dataclasses.replace(plain, length=length, kv_length=length, causal=causal)
        if False in path.causal:
            for length, kv_length in CROSS:
                yield dataclasses.replace(plain, length=length, kv_length=kv_length)
        for causal, layout, length in itertools.product(path.causal, path.layouts, EDGES):
            one = dataclasses.replace(plain, length=length, kv_length=length, causal=causal, layout=layout)
            for kv_heads, memory in itertools.product((HEADS, 2, 1) if path.grouped else (HEADS,), MEMORY):
                yield dataclasses.replace(one, kv_heads=kv_heads, memory=memory)
            if path.magnitudes:
                yield dataclasses.replace(one, magnitudes=MAGNITUDES)
            if devices[0].startswith("cuda"):
                yield dataclasses.replace(one, stream=True)
            for device in devices[1:]:
                yield dataclasses.replace(one, device=device)
                yield dataclasses.replace(one, device=device, stream=True)


# --- inputs -----------------------------------------------------------------------------------------------------------


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous()


def _transposed(x: torch.Tensor) -> torch.Tensor:
    """As models that keep the other layout pass it: a view."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _window(x: torch.Tensor) -> torch.Tensor:
    """A part of a larger tensor; NaN surrounds it along the heads and the lengths, so that a read outside shows."""
    batch, first, second, width = x.shape
    outer = x.new_full((batch, first + 2, second + 2, width), math.nan)
    inner = outer[:, 1:-1, 1:-1]
    inner.copy_(x)
    return inner


def _strided(x: torch.Tensor) -> torch.Tensor:
    """Rows that do not follow each other, as slices of a fused QKV projection."""
    batch, first, second, width = x.shape
    outer = x.new_full((batch, first, second, 3 * width), math.nan)
    inner = outer[..., width : 2 * width]
    inner.copy_(x)
    return inner


MEMORY = {"contiguous": _contiguous, "transposed": _transposed, "window": _window, "strided": _strided}
"""Ways for a tensor to lie in memory. The last dimension is always contiguous, which kernels require."""


def inputs(problem: Problem) -> list[torch.Tensor]:
    """Random q, k and v as (batch, heads, length, head dimension), contiguous.

    A batch's magnitude scales q and v, and k inversely, so that the scores stay the same.
    """
    shapes = ((HEADS, problem.length), (problem.kv_heads, problem.kv_length), (problem.kv_heads, problem.kv_length))
    dtype = getattr(torch, problem.dtype)
    scale = torch.tensor(problem.magnitudes, device=problem.device, dtype=dtype).reshape(BATCH, 1, 1, 1)
    made = [torch.randn(BATCH, *shape, problem.head_dim, device=problem.device, dtype=dtype) for shape in shapes]
    return [made[0] * scale, made[1] / scale, made[2] * scale]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """Attention in float32, from its definition; (batch, heads, length, head dimension)."""
    k, v = (each.float().repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
    scores = q.float() @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores.masked_fill_(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(dim=-1) @ v


def worst_row(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest error of a row, relative to that row; NaN if there is one, infinite for another shape.

    An error over the whole tensor would hide one wrong row, and a batch of small magnitude.
    """
    if got.shape != wanted.shape:
        return math.inf
    return float(((got.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item())


# --- the comparison ---------------------------------------------------------------------------------------------------


class Poison:
    """Leaves NaN in the GPU's shared memory, so that a kernel which reads more than it wrote gives NaN.

    SageAttention's NaN at short lengths (thu-ml#377) depends on what ran before; this makes it certain.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, str, int], torch.Tensor] = {}

    def leave(self, path: DispatchPath, problem: Problem) -> None:
        """Call the path with NaN, in the problem's type and head dimension, on all multiprocessors."""
        key = (problem.device, problem.dtype, problem.head_dim)
        if key not in self._values:  # 512 tiles of 128 queries: several for each multiprocessor
            shape = (8, 32, 256, problem.head_dim)
            dtype = getattr(torch, problem.dtype)
            self._values[key] = torch.full(shape, math.nan, device=problem.device, dtype=dtype)
        value = self._values[key]
        path.attention(value, value, value, path.layouts[0], False in path.causal)


def attend(path: DispatchPath, problem: Problem, given: Sequence[torch.Tensor]) -> torch.Tensor:
    """Call the path with inputs in the problem's layout and memory; the result as (batch, heads, length, width)."""
    turned = problem.layout == "NHD"
    q, k, v = (MEMORY[problem.memory](each.transpose(1, 2) if turned else each) for each in given)
    if problem.stream:
        # A kernel on any other stream reads its inputs before they are written.
        late = [torch.full_like(each, math.nan) for each in (q, k, v)]
        torch.cuda.synchronize(problem.device)
        with torch.cuda.stream(torch.cuda.Stream(problem.device)):
            torch.cuda._sleep(10_000_000)  # about 5 ms
            for empty, each in zip(late, (q, k, v), strict=True):
                empty.copy_(each)
            got = path.attention(late[0], late[1], late[2], problem.layout, problem.causal)
            torch.cuda.current_stream().synchronize()
    else:
        got = path.attention(q, k, v, problem.layout, problem.causal)
    return got.transpose(1, 2) if turned else got


def compare(path: DispatchPath, devices: Sequence[str]) -> Result:
    """Compare a dispatch path with `reference` on every problem; prints each failure, with its shape.

    Raises what a lost GPU raises, after it printed the problem: nothing can be run after that.
    """
    result = Result(path.name)
    poison = Poison()
    for problem in problems(path, devices):
        given = inputs(problem)
        wanted = reference(given[0], given[1], given[2], problem.causal)
        try:
            if devices[0].startswith("cuda"):
                poison.leave(path, problem)
            error = worst_row(attend(path, problem, given), wanted)
        except Exception as raised:
            told = f"{problem}: {type(raised).__name__}: {raised}"
            print(f"FAILED {path.name}: {told}")
            if "CUDA error" in str(raised):
                raise
            result.problems, result.failed = result.problems + 1, result.failed + 1
            result.failures.append(told)
            continue
        if not result.add(problem, error, path.tolerance[problem.dtype]) and result.failed <= 20:
            print(f"FAILED {path.name}: {result.failures[-1]}")
    return result


def check(paths: Sequence[DispatchPath], devices: Sequence[str] = ()) -> None:
    """Compare all dispatch paths, and exit non-zero if one fails.

    A file named on the command line gets the results as JSON. `devices` are the GPUs of the first one's kind, unless
    given.
    """
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    devices = devices or alike()
    # torch.empty holds NaN then, from a kernel's own code, too: uninitialised memory shows in the result.
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(devices[0]) if devices[0].startswith("cuda") else devices[0]
    results: list[Result] = []
    for path in paths:
        results.append(compare(path, devices))
        print(results[-1], flush=True)
        if place:
            told = [{**dataclasses.asdict(each), "failures": each.failures[:50]} for each in results]
            place.write_text(json.dumps({"gpu": name, "torch": torch.__version__, "results": told}, indent=1))
    failed = sum(each.failed for each in results)
    if failed:
        # Again at the end, which is what `inv build-kernels` shows.
        first = "\n".join(f"{each.path}: {each.failures[0]}" for each in results if each.failures)
        raise SystemExit(f"{first}\n{failed} problems failed on {name}")
    worst = max(results, key=lambda each: each.worst)
    count = sum(each.problems for each in results)
    print(f"{count} problems on {name}, worst error {worst.worst:.0%} of its tolerance ({worst.path})")


def alike() -> list[str]:
    """The GPUs of the same compute capability as the first."""
    first, *rest = (torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count()))
    return ["cuda:0", *(f"cuda:{number}" for number, each in enumerate(rest, 1) if each == first)]
