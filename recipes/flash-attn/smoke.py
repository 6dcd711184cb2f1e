"""flash-attention on its default path, as ComfyUI's --use-flash-attention calls it."""

import torch
from flash_attn import flash_attn_func

from kernels.smoke import compare

# P and the result are rounded to the input's type; four units of its rounding error (2^-11, 2^-8) cover both.
TOLERANCE = {torch.float16: 4 * 2**-11, torch.bfloat16: 4 * 2**-8}


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    # flash-attention takes (batch, length, heads, head dimension)
    got = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)
    return got.transpose(1, 2)


compare(attention, TOLERANCE)
