"""SageAttention on its default dispatch path, as ComfyUI's --use-sage-attention calls it."""

import torch
from sageattention import sageattn

from kernels.smoke import compare

# QK is rounded to INT8, P and V to FP8 e4m3 on 8.9 and newer: 3 bits of mantissa give a relative error of at most
# 2^-4 and of 2^-4/sqrt(3) = 0.036 in the mean square, for P and V together 0.051; half as much again is slack.
# A wrong kernel is off by about 1.
TOLERANCE = {torch.float16: 0.08, torch.bfloat16: 0.08}


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    return sageattn(q, k, v, tensor_layout="HND", is_causal=causal)


compare(attention, TOLERANCE)
