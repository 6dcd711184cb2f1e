"""Inputs of a deploy: the files and data available on this client."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core import console, lockfile, workspace
from core.errors import ConfigError, LockError, UsageError
from deploy import proofs
from deploy.refusals import refused
from deploy.release_refusals import known_bad
from kernels.recipe import for_stack, known
from lock import advisory, nodes, requirements
from lock import application as applications
from lock.updates import transaction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from agent.schema.change import Proof
    from core.errors import HearthError
    from core.manifest import Manifest
    from deploy.host import Target
    from lock.application import Application, Flag
    from lock.nodes import Node
    from lock.requirements import LockedList


@dataclass(frozen=True)
class Inputs:
    """ComfyUI with its flags, locked lists by platform and Python, kernel wheels, uv, pinned nodes.

    `required` are ComfyUI's own requirements. `recipes` has the current version and the default profile of each
    kernel's recipe, and `recipe_errors` why the recipe of one of the target's kernels cannot be read.
    """

    application: Application
    flags: Mapping[str, Flag]
    locks: Mapping[tuple[str, str], LockedList]
    wheels: Sequence[Manifest]
    uv: str
    nodes: Mapping[str, Node] = field(default_factory=dict)
    model_folders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    required: Sequence[str] = ()
    recipes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    recipe_errors: Sequence[HearthError] = ()
    proofs: Sequence[Proof] = ()

    @property
    def packages(self) -> list[str]:
        """The Debian packages that the nodes need."""
        return sorted({each for node in self.nodes.values() for each in node.system})


@transaction.reading()
def gather(target: Target) -> Inputs:
    """Collect the inputs for hosts of a profile. Raises LockError, or RefusedError for known-bad nodes."""
    app = applications.application(target.host.comfyui)
    tree = applications.tree(app)
    (uv,) = (line.split()[0].replace("==", "-") for line in lockfile.requirements("uv"))
    listed = [each for each in requirements.combinations(app.version) if each[0] == target.stack]
    locks = {
        (lock.platform, lock.python): lock
        for each, platform, python in listed
        if (lock := requirements.find(each.name, platform.value, python, app.path))
    }
    if listed and not locks and not workspace.current().bundled:
        what = f"the packages of ComfyUI {app.version} on stack {target.stack.name} were never resolved"
        raise LockError("lock-stale", what, hint="inv lock")
    known = nodes.catalogue()
    chosen = nodes.choose(known, target.profile.nodes)
    _refuse_known_bad(target, chosen)
    if chosen and (stale := [lock.name for lock in locks.values() if not lock.fits(known)]):
        raise LockError(
            "lock-stale",
            f"nodes were changed but not resolved: {', '.join(stale)}",
            hint="run inv lock, then the same command again",
        )
    known_recipes, recipe_errors = _recipes(target)
    return Inputs(
        application=app,
        flags=applications.flags(applications.text(tree, "comfy/cli_args.py")),
        locks=locks,
        wheels=[each for each in workspace.current().wheelhouse.wheels() if target.profile.arch in each.capabilities],
        uv=uv,
        nodes=chosen,
        model_folders=applications.model_folders(applications.text(tree, "folder_paths.py")),
        required=requirements.required(app, known),
        recipes=known_recipes,
        recipe_errors=recipe_errors,
        proofs=proofs.read(target),
    )


def _recipes(target: Target) -> tuple[dict[str, tuple[str, str]], list[HearthError]]:
    """The current version and the profile of a target's kernels, and the errors of their recipes.

    A bundle has one wheel of each, and no recipe.
    """
    kernels = target.profile.kernel_profiles
    if not kernels or workspace.current().bundled:
        return {}, []
    try:
        valid, invalid = known()
    except UsageError as error:  # a folder of $HEARTH_RECIPES may have any of them
        return {}, [error]
    errors = {name: each for name, each in invalid.items() if name in kernels and name not in valid}
    for name in sorted(invalid.keys() - errors.keys()):
        console.say(f"the recipe of {name} is not valid, and not used: {invalid[name].what}")
    chosen = {name: for_stack(same, target.stack) for name, same in valid.items() if name in kernels}
    for name, recipe in chosen.items():
        if kernels[name] and kernels[name] not in recipe.profiles:
            what = f"{target.name}: {name} has no profile {kernels[name]}"
            errors[name] = ConfigError("config", what, hint=f"profiles: {', '.join(recipe.profiles) or 'none'}")
    found = {name: (recipe.version, kernels[name] or recipe.default_profile) for name, recipe in chosen.items()}
    return found, list(errors.values())


def _refuse_known_bad(target: Target, chosen: Mapping[str, Node]) -> None:
    """Refuse nodes with no good version; `inv audit` reports the others, depending on their version."""
    listed = advisory.advisories()
    bad = {name: each for name, node in chosen.items() for each in advisory.of(node.url, listed) if each.outright}
    if bad:
        what = f"{target.name} would get nodes with known problems; nothing was changed"
        raise refused(what, [known_bad(name, each) for name, each in bad.items()], host=target.name)
