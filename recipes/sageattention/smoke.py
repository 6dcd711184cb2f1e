"""SageAttention: the path that `sageattn` takes, as ComfyUI's --use-sage-attention calls it, and every other one."""

from collections.abc import Callable
from itertools import product

import torch
from sageattention import core, sageattn

from kernels.smoke import DispatchPath, check

# QK is rounded to INT8, which changes a row by about 0.01. P and V are rounded to FP8 e4m3 on 8.9 and newer: 3 bits of
# mantissa give a relative error of at most 2^-4 each. A wrong kernel is off by about 1.
FP8 = {"float16": 2 * 2**-4, "bfloat16": 2 * 2**-4}

# P and V stay fp16, so that INT8's part remains. It is 0.01 to 0.02 for most rows; 0.051 is the worst of 10^7 rows seen
# on an H200.
FP16 = {"float16": 2**-4, "bfloat16": 2**-4}

# Head dimensions that are no power of two are padded. The version for CUDA 13 has kernels for 256, except on 9.0.
SMALL = (64, 96, 128)
HEAD_DIMS = (*SMALL, 256) if int(str(torch.version.cuda).partition(".")[0]) >= 13 else SMALL


def path(
    name: str,
    tolerance: dict[str, float],
    function: Callable[..., torch.Tensor],
    head_dims: tuple[int, ...] = HEAD_DIMS,
    **more: object,
) -> DispatchPath:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, causal: bool) -> torch.Tensor:
        return function(q, k, v, tensor_layout=layout, is_causal=causal, **more)

    return DispatchPath(name=name, attention=attention, tolerance=tolerance, tiles=(64, 128), head_dims=head_dims)


capability = torch.cuda.get_device_capability()
chosen = SMALL if capability == (9, 0) else HEAD_DIMS
paths = [path("sageattn", FP8 if capability >= (8, 9) else FP16, sageattn, chosen)]
paths.append(path("triton fp16", FP16, core.sageattn_qk_int8_pv_fp16_triton, SMALL))
granularities = ("per_warp", "per_thread")
if core.SM80_ENABLED:
    fp16 = core.sageattn_qk_int8_pv_fp16_cuda
    for gran, accumulate in product(granularities, ("fp32", "fp16+fp32", "fp16")):
        name = f"fp16 {accumulate} {gran}"
        paths.append(path(name, FP16, fp16, qk_quant_gran=gran, pv_accum_dtype=accumulate))
    paths.append(path("fp16 fp16 smooth_v", FP16, fp16, pv_accum_dtype="fp16", smooth_v=True))
if core.SM89_ENABLED and capability >= (8, 9):
    fp8 = core.sageattn_qk_int8_pv_fp8_cuda
    for gran, accumulate in product(granularities, ("fp32", "fp32+fp32", "fp32+fp16")):
        name = f"fp8 {accumulate} {gran}"
        paths.append(path(name, FP8, fp8, qk_quant_gran=gran, pv_accum_dtype=accumulate))
    paths.append(path("fp8 fp32 smooth_v", FP8, fp8, pv_accum_dtype="fp32", smooth_v=True))
if core.SM90_ENABLED and capability == (9, 0):
    for gran in granularities:
        function = core.sageattn_qk_int8_pv_fp8_cuda_sm90
        paths.append(path(f"fp8 sm90 {gran}", FP8, function, SMALL, qk_quant_gran=gran))
check(paths)
