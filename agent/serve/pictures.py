"""A program that reads pictures with the release's Python, in the sandbox: a damaged one must not reach the agent.

Input: a line of JSON with the byte lengths of the pictures, the reference first (0: none), then their bytes.
Output: for each picture a JSON object with `size`, `flat` (a single colour), and `difference` from the reference (root
mean square, 0 to 1; null: none, or of another size), or with `error`.
"""

import io
import json
import sys
from typing import Any, BinaryIO


def examine(source: BinaryIO) -> list[dict[str, Any]]:
    """Read the input and return a result for each picture."""
    import numpy as np
    from PIL import Image

    def pixels(length: int) -> Any:
        with Image.open(io.BytesIO(source.read(length))) as image:
            return np.asarray(image.convert("RGB"), np.float32)

    first, *lengths = json.loads(source.readline())
    reference, found = pixels(first) if first else None, list[dict[str, Any]]()
    for length in lengths:
        try:
            values = pixels(length)
        except Exception as error:  # Pillow raises many kinds for damaged files
            found.append({"error": repr(error)[:500]})
            continue
        same = reference is not None and reference.shape == values.shape
        difference = float(np.sqrt(np.mean((values - reference) ** 2)) / 255) if same else None
        flat = bool((values == values[:1, :1]).all())
        found.append({"size": [values.shape[1], values.shape[0]], "flat": flat, "difference": difference})
    return found


if __name__ == "__main__":
    print(json.dumps(examine(sys.stdin.buffer)))
