"""Shared by all recipes' smoke tests: random attention problems, and a comparison that NaN cannot pass."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Not a multiple of any kernel's tile size (64 or 128), so that the masked last tile is tested, too.
LENGTH = 1111
BATCH, HEADS = 2, 4


def compare(attention: Callable[..., torch.Tensor], tolerance: Mapping[torch.dtype, float]) -> None:
    """Compare `attention(q, k, v, causal)` with float32 scaled_dot_product_attention; exit non-zero on a mismatch.

    Tensors are (batch, heads, length, head dimension) on the GPU, for head dimensions 64 and 128, causal and not, in
    each dtype of `tolerance`, which bounds the relative Frobenius error |got - wanted| / |wanted|.
    """
    torch.manual_seed(0)
    failed = 0
    worst = 0.0
    for head_dim, causal, dtype in itertools.product((64, 128), (False, True), tolerance):
        q, k, v = (torch.randn(BATCH, HEADS, LENGTH, head_dim, device="cuda", dtype=dtype) for _ in range(3))
        wanted = scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal)
        got = attention(q, k, v, causal).float()
        error = float(((got - wanted).norm() / wanted.norm()).item())
        passed = error <= tolerance[dtype]  # false for NaN, too
        print(
            f"head_dim {head_dim}, {'causal' if causal else 'full'}, {dtype}: error {error:.5f},"
            f" at most {tolerance[dtype]:.5f}: {'passed' if passed else 'FAILED'}"
        )
        failed += not passed
        worst = max(worst, error / tolerance[dtype])
    if failed:
        raise SystemExit(f"{failed} problems failed on {torch.cuda.get_device_name()}")
    problems = 4 * len(tolerance)
    print(f"{problems} problems on {torch.cuda.get_device_name()}, worst error {worst:.0%} of its tolerance")
