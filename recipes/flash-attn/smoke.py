"""flash-attention, as ComfyUI's --use-flash-attention calls it. It chooses split-KV kernels itself, if it has them."""

import torch
from flash_attn import flash_attn_func

from kernels.smoke import DispatchPath, check

# P and the result are rounded to the input's type; four units of its rounding error (2^-11, 2^-8) cover both.
TOLERANCE = {"float16": 4 * 2**-11, "bfloat16": 4 * 2**-8}


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: str, causal: bool) -> torch.Tensor:
    return flash_attn_func(q, k, v, causal=causal)


path = DispatchPath(
    name="flash_attn_func",
    attention=attention,
    tolerance=TOLERANCE,
    tiles=(64, 128),
    head_dims=(32, 64, 80, 96, 128, 160, 256),  # those of kernels, and some that kernels pad
    layouts=("NHD",),  # its only one: (batch, length, heads, head dimension)
)
check([path])
