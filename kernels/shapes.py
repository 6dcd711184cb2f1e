"""Attention calls of real models, which `inv bench-kernels` measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """An attention call of a model: `length` queries and `kv_length` keys in each of `batch` x `heads`."""

    model: str
    dtype: str
    batch: int
    heads: int
    length: int
    kv_length: int
    head_dim: int

    @property
    def operations(self) -> int:
        """Floating-point operations of both matrix products."""
        return 4 * self.batch * self.heads * self.length * self.kv_length * self.head_dim


# SDXL: self-attention of both resolutions and cross-attention with 77 text tokens; its batch of 2 is the guidance.
# Flux: 64x64 patches and 512 text tokens. Qwen-Image: 83x83 patches of 1328x1328 and 256 text tokens. Wan 2.2 14B: 21
# frames of 30x52 or 45x80 patches, and cross-attention with 512 text tokens.
SHAPES = (
    Shape("SDXL 1024x1024, 64x64", "float16", 2, 10, 4096, 4096, 64),
    Shape("SDXL 1024x1024, 32x32", "float16", 2, 20, 1024, 1024, 64),
    Shape("SDXL 1024x1024, text", "float16", 2, 10, 4096, 77, 64),
    Shape("Flux 1024x1024", "bfloat16", 1, 24, 4608, 4608, 128),
    Shape("Qwen-Image 1328x1328", "bfloat16", 1, 24, 7145, 7145, 128),
    Shape("Wan 2.2 480p, 81 frames", "bfloat16", 1, 40, 32760, 32760, 128),
    Shape("Wan 2.2 480p, text", "bfloat16", 1, 40, 32760, 512, 128),
    Shape("Wan 2.2 720p, 81 frames", "bfloat16", 1, 40, 75600, 75600, 128),
)
