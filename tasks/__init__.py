"""The front door: every `inv` task. Each parses, calls and prints; the work is in the subsystems."""

from __future__ import annotations

import sys
from pathlib import Path

from invoke.collection import Collection
from invoke.tasks import Task

# Invoke puts this folder on the path, where `deploy` would be ours. What is meant is the checkout, whatever starts it.
sys.path[:] = [str(Path(__file__).parents[1]) if Path(each) == Path(__file__).parent else each for each in sys.path]

# Invoke keeps no bytecode unless it is told to, so that every start would compile anew what it imports.
sys.dont_write_bytecode = bool(sys.flags.dont_write_bytecode)

from core import console  # noqa: E402  found by way of the path
from tasks import build, deploy, nodes, operate  # noqa: E402

console.guard()
ns = Collection(*(each for noun in (build, deploy, operate) for each in vars(noun).values() if isinstance(each, Task)))
ns.add_collection(Collection.from_module(nodes))
