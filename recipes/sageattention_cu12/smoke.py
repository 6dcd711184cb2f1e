"""The smoke test of recipes/sageattention, which chooses what this version supports by its CUDA."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parent.parent / "sageattention/smoke.py"))
