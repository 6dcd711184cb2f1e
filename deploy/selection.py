"""The selection of what runs on a host: Python, locked list, wheels, nodes; and the resulting parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from packaging.version import Version

from core.stack import Platform
from deploy import container_refusals, containers
from deploy import release_refusals as refusals
from deploy.refusals import Refusal, refused
from deploy.release import digest, requesters
from lock import image_base

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from core.manifest import Manifest
    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.inputs import Inputs
    from lock.application import Application
    from lock.nodes import Node
    from lock.requirements import LockedList

LAYOUT = 4
"""Increase it when the agent creates parts or releases differently, so that existing ones are replaced."""


@dataclass(frozen=True)
class Selection:
    """Everything that determines a host's release."""

    target: Target
    application: Application
    lock: LockedList
    python: str
    interpreter: str
    wheels: tuple[Manifest, ...]
    uv: str
    nodes: Mapping[str, Node]
    model_folders: Mapping[str, Sequence[str]]
    secrets: Mapping[str, str] = field(default_factory=dict)
    base_part: str = ""
    """The part that holds the root file system of a container; empty: no container."""
    prefix: str = ""
    """The host's prefix, with a container."""
    own_python: str = ""
    """The host's own Python, with a container."""

    @property
    def app_part(self) -> str:
        """The part that holds ComfyUI's tree."""
        return f"app-{digest([LAYOUT, self.application.tree, self.application.writable])}"

    @property
    def env_part(self) -> str:
        """The part that holds the virtual environment."""
        wheels = sorted(wheel.sha256 for wheel in self.wheels)
        return f"env-{digest([LAYOUT, self._locked, self.interpreter, wheels, self.uv])}"

    @property
    def agent_python(self) -> str:
        """The Python that runs the agent's units, outside of a container."""
        return self.own_python or self.interpreter

    @property
    def part_python(self) -> str:
        """The Python that makes parts. A container's runs outside of it, too, from its part."""
        return f"{self.prefix}/parts/{self.base_part}{self.interpreter}" if self.base_part else self.interpreter

    @property
    def pinned(self) -> dict[str, Node]:
        """The nodes that run at their pinned commit. A node under development replaces its namesake."""
        return {name: node for name, node in self.nodes.items() if name not in self.target.host.developed}

    @property
    def node_parts(self) -> dict[str, str]:
        """The parts that hold the nodes' trees, by the node's name."""
        return {
            # the result of an install.py depends on its environment
            name: f"node-{digest([LAYOUT, name, node.tree, node.writable, self._installs(node)])}"
            for name, node in self.pinned.items()
        }

    def _installs(self, node: Node) -> list[str]:
        """The inputs of a node's install.py: the environment that runs it, and whether it has network access."""
        return [self.env_part, str(bool(node.install_network))] if node.install else []

    @property
    def requesters(self) -> list[str]:
        """The requesters of packages in addition to ComfyUI."""
        return requesters(self.target, self.nodes)

    @cached_property
    def _locked(self) -> str:
        return self.lock.select(self.requesters)

    @property
    def requirements(self) -> str:
        """The needed part of the locked list, and the kernel wheels, each with its hash."""
        lines = [f"{wheel.kernel}=={wheel.version} --hash=sha256:{wheel.sha256}" for wheel in self.wheels]
        return self._locked + "".join(f"{line}\n" for line in lines)


def choose(target: Target, facts: Facts, inputs: Inputs) -> tuple[Selection | None, list[Refusal]]:
    """Choose Python, locked list and wheels for a host; returns None with the reasons if no combination fits."""
    profile = target.profile
    if found := refusals.no_torch(target, facts):
        return None, found
    found = refusals.flags(target, inputs.flags)
    if profile.cuda:
        found += refusals.gpu(target, facts)
    listed = [each for each in profile.pythons if (facts.platform, each) in inputs.locks]
    contained = target.host.runtime == "podman"
    python = next((each for each in listed if each in facts.pythons), "")
    if not (python or (contained and facts.pythons)):
        return None, [*found, refusals.no_python(listed, facts)]
    if contained and not image_base.recipe():
        return None, [*found, container_refusals.no_base()]
    if contained:
        python, found = image_base.base().python, found + container_refusals.lacking(target, facts)
        if (facts.platform, python) not in inputs.locks:
            return None, [*found, refusals.no_lock(facts.platform, python, inputs)]
    wheels: list[Manifest] = []
    for kernel in profile.kernel_profiles:
        wheel = find_wheel(inputs, kernel, target, facts.platform, python)
        if isinstance(wheel, Refusal):
            found.append(wheel)
        else:
            found += refusals.old_libraries(wheel, image_base.base() if contained else facts)
            wheels.append(wheel)
    lock = inputs.locks[facts.platform, python]
    found += refusals.uncovered(target, inputs, lock)
    selection = Selection(
        target=target,
        application=inputs.application,
        lock=lock,
        python=python,
        interpreter=f"/usr/bin/python{python}" if contained else facts.pythons[python],
        wheels=tuple(wheels),
        uv=inputs.uv,
        nodes={name: node for name, node in inputs.nodes.items() if name not in lock.unavailable},
        model_folders=inputs.model_folders,
        secrets={name: facts.secrets.get(name, "plain") for name in target.host.secrets},
        base_part=containers.base_part(Platform.parse(facts.platform), cuda=profile.cuda) if contained else "",
        prefix=facts.prefix if contained else "",
        own_python=next(iter(facts.pythons.values())) if contained else "",
    )
    return selection, found


def unseen(target: Target, inputs: Inputs, platform: str, python: str, nothing: str) -> list[Manifest]:
    """The wheels for a platform and Python of a host that is not asked; raises RefusedError with all reasons.

    `nothing` is what then was not done.
    """
    if found := refusals.unfit_stack(target):
        raise refused(nothing, found)
    if (platform, python) not in inputs.locks:
        raise refused(nothing, [refusals.no_lock(platform, python, inputs)])
    if found := refusals.uncovered(target, inputs, inputs.locks[platform, python]):
        raise refused(nothing, found)
    if found := refusals.recipes(inputs):
        raise refused(nothing, found)
    wheels = [find_wheel(inputs, kernel, target, platform, python) for kernel in target.profile.kernel_profiles]
    if missing := [wheel for wheel in wheels if isinstance(wheel, Refusal)]:
        raise refused("kernel wheels are missing", missing)
    return [wheel for wheel in wheels if not isinstance(wheel, Refusal)]


def find_wheel(inputs: Inputs, kernel: str, target: Target, platform: str, python: str) -> Manifest | Refusal:
    """The matching wheel: the recipe's version and default profile; without that, the highest version.

    Of such, the one for the fewest GPUs. If the target names a profile, only its wheels.
    """
    stack, arch, asked = target.stack, target.profile.arch, target.profile.kernel_profiles[kernel]
    fitting = [
        wheel
        for wheel in inputs.wheels
        if wheel.kernel == kernel
        and arch in wheel.capabilities
        and (wheel.stack, wheel.platform) == (stack.name, platform)
        and wheel.suits(python, stack.torch)
        and asked in ("", wheel.profile)
    ]
    if fitting:
        version, profile = inputs.recipes.get(kernel, ("", ""))

        def rank(wheel: Manifest) -> tuple[bool, Version, bool, int, str]:
            public = wheel.version.partition("+")[0]  # the local label names arch and profile, and sorts as text
            return public == version, Version(public), wheel.profile == profile, -len(wheel.arch), wheel.key

        return max(fitting, key=rank)
    words = ["--kernel", kernel, "--arch", arch, "--stack", stack.name, "--python", python, "--platform", platform]
    words += ["--profile", asked] if asked else []
    what = f"{kernel}{asked and f' ({asked})'} for {arch}, {stack.name}, Python {python}, {platform}"
    return refusals.no_wheel(what, tuple(words))
