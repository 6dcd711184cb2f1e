"""SpargeAttn with every block selected, so that it is attention, and with blocks left out, which must not be NaN."""

from itertools import product

import torch
from spas_sage_attn import block_sparse_sage2_attn_cuda, spas_sage2_attn_meansim_topk_cuda

from kernels.smoke import reference, worst_row

# As recipes/sageattention: INT8 for Q and K; P and V in fp16 below 8.9, and in FP8 on it and newer.
CAPABILITY = torch.cuda.get_device_capability()
TOLERANCE = 2 * 2**-4 if CAPABILITY >= (8, 9) else 2**-4

LENGTHS = (128, 129, 191, 192, 193, 255, 256, 257, 511, 1111, 2048)  # at least 128; tiles have 64 and 128 rows
BLOCK_Q, BLOCK_K = (64, 128) if CAPABILITY == (9, 0) else (128, 64)


def check(name: str, got: torch.Tensor, wanted: torch.Tensor) -> int:
    error = worst_row(got, wanted)
    if error <= TOLERANCE:
        return 0
    print(f"FAILED {name}: error {error:.5f} of at most {TOLERANCE:.5f}")
    return 1


def main() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN then
    torch.manual_seed(0)
    failed = problems = 0
    for dtype, width, length, layout in product((torch.float16, torch.bfloat16), (64, 128), LENGTHS, ("HND", "NHD")):
        name = f"{dtype} head dimension {width} length {length} {layout}"
        q, k, v = (torch.randn(2, 4, length, width, device="cuda", dtype=dtype) for _ in range(3))
        turned = [each.transpose(1, 2) if layout == "NHD" else each for each in (q, k, v)]
        got = spas_sage2_attn_meansim_topk_cuda(*turned, topk=1.0, tensor_layout=layout)
        failed += check(f"{name}, all blocks", got.transpose(1, 2) if layout == "NHD" else got, reference(q, k, v))
        mask = torch.ones(2, 4, -(-length // BLOCK_Q), -(-length // BLOCK_K), device="cuda", dtype=torch.int8)
        got = block_sparse_sage2_attn_cuda(*turned, mask_id=mask, tensor_layout=layout)
        failed += check(f"{name}, mask", got.transpose(1, 2) if layout == "NHD" else got, reference(q, k, v))
        sparse = spas_sage2_attn_meansim_topk_cuda(*turned, topk=0.5, is_causal=True, tensor_layout=layout)
        if not sparse.isfinite().all():
            print(f"FAILED {name}, half of the blocks: NaN or infinite")
            failed += 1
        problems += 3
    gpu = torch.cuda.get_device_name()
    if failed:
        raise SystemExit(f"{failed} of {problems} problems failed on {gpu}")
    print(f"{problems} problems on {gpu}")


main()
