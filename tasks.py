"""The `inv` tasks: a `Collection` of those of each package."""

from __future__ import annotations

import sys

from invoke.collection import Collection
from invoke.tasks import Task

# Invoke keeps no bytecode unless it is told to; every start would then compile anew what it imports.
sys.dont_write_bytecode = bool(sys.flags.dont_write_bytecode)

from core import console  # noqa: E402  after the line above
from deploy import tasks as deploy  # noqa: E402
from gateway import tasks as gateway  # noqa: E402
from kernels import tasks as kernels  # noqa: E402
from lock import tasks as lock  # noqa: E402
from ops import cluster_tasks as clusters  # noqa: E402
from ops import output_tasks as outputs  # noqa: E402
from ops import settings_tasks as settings  # noqa: E402
from ops import tasks as ops  # noqa: E402
from ops import workflow_tasks as workflows  # noqa: E402

console.guard()
grouped = {kernels.list_kernels, kernels.pin}
ns = Collection(
    *(
        each
        for room in (kernels, deploy, ops, settings, outputs, clusters, gateway)
        for each in vars(room).values()
        if isinstance(each, Task) and each not in grouped
    )
)
ns.add_collection(Collection("kernels", kernels.list_kernels, kernels.pin))
top = {"lock", "update_all", "list_outdated"}
for name in sorted(top):
    ns.add_task(getattr(lock, name))
ns.add_collection(
    Collection("nodes", *(each for name, each in vars(lock).items() if isinstance(each, Task) and name not in top))
)
ns.add_collection(Collection("workflows", *(each for each in vars(workflows).values() if isinstance(each, Task))))
