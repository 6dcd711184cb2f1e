"""causal-conv1d: every layout, width, type and option of the forward and the update kernel, against its definition."""

from itertools import product

import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

from kernels.smoke import worst_row

BATCH, CHANNELS = 2, 128

# The kernels accumulate in fp32 and round once: two units of the type's rounding error, and --use_fast_math for SiLU.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2 * 2**-11, torch.bfloat16: 2 * 2**-8}

# A block has 128 threads with 4 or 8 elements each, or, channel last, 64 rows.
LENGTHS = sorted({*range(1, 18), *(edge + step for edge in (64, 128, 512, 1024, 2048) for step in (-1, 0, 1)), 3333})


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool) -> torch.Tensor:
    """The convolution of x, which begins with the state before it, in float32."""
    width = weight.shape[1]
    length = x.shape[2] - width + 1
    out = sum(x.float()[..., step : step + length] * weight[:, step, None].float() for step in range(width))
    assert isinstance(out, torch.Tensor)
    out = out if bias is None else out + bias[:, None].float()
    return torch.nn.functional.silu(out) if silu else out


def wrong(name: str, got: torch.Tensor, wanted: torch.Tensor) -> int:
    """Print an error above the tolerance, NaN or another shape; 1 for that."""
    # Rows of a length of 1 may be nearly 0: compare along the channels.
    error = worst_row(got.transpose(1, 2), wanted.transpose(1, 2))
    if error <= TOLERANCE[got.dtype]:
        return 0
    print(f"FAILED {name}: error {error:.5f} of at most {TOLERANCE[got.dtype]:.5f}")
    return 1


def main() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN then
    torch.manual_seed(0)
    failed = problems = 0
    options = product(TOLERANCE, (2, 3, 4), (None, "silu"), (True, False), (False, True), LENGTHS)
    for dtype, width, activation, biased, channel_last, length in options:
        name = f"{dtype} width {width} {activation} bias {biased} channel last {channel_last} length {length}"
        weight = torch.randn(CHANNELS, width, device="cuda", dtype=dtype)
        bias = torch.randn(CHANNELS, device="cuda", dtype=dtype) if biased else None
        shape = (BATCH, length, CHANNELS) if channel_last else (BATCH, CHANNELS, length)
        x = torch.randn(shape, device="cuda", dtype=dtype)
        x = x.transpose(1, 2) if channel_last else x
        padded = torch.nn.functional.pad(x, (width - 1, 0))
        got = causal_conv1d_fn(x, weight, bias, activation=activation)
        failed += wrong(name, got, reference(padded, weight, bias, bool(activation)))
        problems += 1
        if channel_last:  # the only layout with states
            state = torch.randn(BATCH, width - 1, CHANNELS, device="cuda", dtype=dtype).transpose(1, 2)
            whole = torch.cat([state, x], dim=2)
            got, last = causal_conv1d_fn(
                x, weight, bias, initial_states=state, return_final_states=True, activation=activation
            )
            failed += wrong(f"{name} with a state", got, reference(whole, weight, bias, bool(activation)))
            failed += wrong(f"{name}: final state", last, whole[..., 1 - width :])
            problems += 2
        if length <= 17:
            state = torch.randn(BATCH, CHANNELS, width - 1, device="cuda", dtype=dtype)
            whole = torch.cat([state, x], dim=2)
            got = causal_conv1d_update(x.contiguous(), state, weight, bias, activation)
            failed += wrong(f"{name}: update", got, reference(whole, weight, bias, bool(activation)))
            failed += wrong(f"{name}: state after the update", state, whole[..., 1 - width :])
            problems += 2
    gpu = torch.cuda.get_device_name()
    if failed:
        raise SystemExit(f"{failed} of {problems} problems failed on {gpu}")
    print(f"{problems} problems on {gpu}")


main()
