"""SageAttention 3: attention with Q, K, P and V in FP4."""

import torch
from sageattn3 import sageattn3_blackwell

from kernels.smoke import DispatchPath, check

# FP4 e2m1 has 1 bit of mantissa: a relative error of up to 2^-2 for each of P and V. Not measured on a GPU yet; a wrong
# kernel is off by about 1.
TOLERANCE = {"float16": 2 * 2**-2, "bfloat16": 2 * 2**-2}


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: str, causal: bool) -> torch.Tensor:
    return sageattn3_blackwell(q, k, v, is_causal=causal)


path = DispatchPath(
    name="sageattn3_blackwell",
    attention=attention,
    tolerance=TOLERANCE,
    tiles=(64, 128),
    head_dims=(64, 128),
    layouts=("HND",),
    grouped=False,
    magnitudes=False,  # the scales of 16 elements are FP8
)
check([path])
