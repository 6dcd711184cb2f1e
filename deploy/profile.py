"""Profiles and modes: flags, environment and limits of a kind of machine (`config/profiles/`, `config/modes/`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from packaging.specifiers import SpecifierSet

from core import workspace
from core.config import load
from core.errors import ConfigError
from deploy.host_rules import check_settings
from deploy.secrets import refuse_secrets

if TYPE_CHECKING:
    from collections.abc import Sequence


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The value of a flag or environment variable, and the reason for it."""

    why: str
    """The reason."""
    value: str = ""
    """The value; empty for a flag without one."""
    torch: str = ""
    """The torch versions that it applies to, such as `>=2.8` (PEP 440); empty: all."""
    comfyui: str = ""
    """The ComfyUI versions that it applies to; empty: all."""
    off: bool = False
    """Remove what the profile or a mode sets."""

    def active(self, torch: str, comfyui: str) -> bool:
        """Whether it applies to these versions and is not off."""
        given = ((self.torch, torch), (self.comfyui, comfyui))
        return not self.off and all(SpecifierSet(limit).contains(each, prereleases=True) for limit, each in given)

    @property
    def versions(self) -> str:
        """The versions that it applies to, in words; empty: all."""
        limits = (("torch", self.torch), ("ComfyUI", self.comfyui))
        return ", ".join(f"{name} {wanted}" for name, wanted in limits if wanted)


class Prove(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A workflow that a release must run before it takes traffic, and what its pictures must be.

    A picture of a single colour or with NaN fails, too. A workflow with a seed also runs with another one.
    """

    file: str
    """A workflow in the API format: a file in `config/workflows/`, or relative to the checkout."""
    seconds: int = 300
    """Time limit of a run, with loading the models."""
    images: int | None = None
    """The number of pictures and videos that it saves; left out: at least one."""
    size: str = ""
    """Their width and height, such as `1024x1024`; empty: any."""
    like: str = ""
    """A picture that the first one resembles, found as `file` is; empty: none."""
    within: float = 0.05
    """The largest root mean square difference from `like`, from 0 (equal) to 1."""
    memory: str = ""
    """Memory that it needs, such as `24G`. With less free beside the active release, it runs after the cut-over."""

    def __str__(self) -> str:
        return self.file


Network = Literal["open", "lan-deny", "offline"]
Metadata = Literal["keep", "none"]


KernelName = Annotated[str, msgspec.Meta(pattern=r"^\w[\w.-]*(:\w[\w.-]*)?$(?!\n)")]
"""`NAME` or `NAME:PROFILE`."""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Flags, environment and limits for a kind of machine."""

    summary: str
    """One line for `inv profiles`."""
    pythons: tuple[str, ...]
    """Python versions, in order of preference."""
    start_seconds: int
    """How long the health gate waits for ComfyUI to start."""
    stack: str = ""
    """A stack of `config/stacks.toml`; empty: its default."""
    arch: str = ""
    """The compute capability that the kernels are built for."""
    cuda: bool = False
    """The health gate requires a CUDA device."""
    unified: bool = False
    """CPU and GPU share their memory."""
    kernels: tuple[KernelName, ...] = ()
    """Kernel wheels to install, by the names of their recipes. `NAME:PROFILE` is not the default profile's wheel."""
    nodes: tuple[str, ...] = ()
    """Sets and names of custom nodes in `recipes/comfyui/nodes.toml`."""
    flags: dict[str, Setting] = {}
    """ComfyUI's flags."""
    env: dict[str, Setting] = {}
    """ComfyUI's environment variables."""
    device_policy: Literal["closed", "auto"] = "closed"
    """The unit's `DevicePolicy=`."""
    memory_max: str = "90%"
    """The unit's `MemoryMax=`."""
    cpu_max: str = ""
    """The unit's `CPUQuota=`, such as "400%" for four processors; empty: no limit."""
    network: Network = "open"
    """Whom ComfyUI can reach: everyone except link-local and metadata addresses ("open"), no private network either
    ("lan-deny"), or only its own machine ("offline")."""
    metadata: Metadata = "keep"
    """Whether ComfyUI saves the workflow in its outputs ("keep"), or not ("none", by its flag `--disable-metadata`)."""
    restart: Literal["on-failure", "always"] = "on-failure"
    """The unit's `Restart=`."""
    prove: tuple[Prove, ...] = ()
    """Workflows that a release must run."""

    @property
    def kernel_profiles(self) -> dict[str, str]:
        """The profile of each kernel by its name; empty: the recipe's default."""
        return {name: profile for name, _, profile in (each.partition(":") for each in self.kernels)}


class Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Values that differ from the profile. Keys that are left out keep the profile's value."""

    stack: str | None = None
    pythons: tuple[str, ...] | None = None
    start_seconds: int | None = None
    arch: str | None = None
    cuda: bool | None = None
    unified: bool | None = None
    kernels: tuple[KernelName, ...] | None = None
    nodes: tuple[str, ...] | None = None
    flags: dict[str, Setting] = {}
    env: dict[str, Setting] = {}
    device_policy: Literal["closed", "auto"] | None = None
    memory_max: str | None = None
    cpu_max: str | None = None
    network: Network | None = None
    metadata: Metadata | None = None
    restart: Literal["on-failure", "always"] | None = None
    prove: tuple[Prove, ...] | None = None


class Mode(Override, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a machine is used for. A mode changes values of the profile; later modes take precedence."""

    summary: str
    """One line for `inv profiles`."""
    excludes: tuple[str, ...] = ()
    """Modes that cannot be combined with this one."""
    develop: bool = False
    """A host with this mode may list nodes under `develop`."""
    on_unified: Override | None = None
    """Values to use instead where CPU and GPU share their memory."""
    why: dict[str, str] = {}
    """The reason for each value that is neither a flag nor a variable."""

    def on(self, *, unified: bool) -> Override:
        """Its values for a machine whose CPU and GPU share their memory, or not."""
        return self.on_unified if self.on_unified and unified else self


def profiles() -> dict[str, Profile]:
    """The profiles of `config/profiles/`, by name."""
    found: dict[str, Profile] = {}
    for path in sorted((workspace.current().checkout / "config/profiles").glob("*.toml")):
        refuse_secrets(path)
        found[path.stem] = load(path, Profile)
        check_settings(str(path), found[path.stem])
    return found


def modes() -> dict[str, Mode]:
    """The modes of `config/modes/`, by name."""
    found: dict[str, Mode] = {}
    for path in sorted((workspace.current().checkout / "config/modes").glob("*.toml")):
        refuse_secrets(path)
        found[path.stem] = mode = load(path, Mode)
        check_settings(str(path), mode)
        check_settings(f"{path}: on_unified", mode.on(unified=True))
        unexplained = plain(mode).keys() - mode.why.keys()
        if unexplained:
            raise ConfigError(
                "config", f"{path}: no reason for {', '.join(sorted(unexplained))}", hint="add it to [why]"
            )
    return found


def plain(override: Override) -> dict[str, Any]:
    """The given values other than flags and variables."""
    names = [field.name for field in msgspec.structs.fields(Override) if field.name not in ("flags", "env")]
    return {name: value for name in names if (value := getattr(override, name)) is not None}


def merged(base_origin: str, base: Profile, layers: Sequence[tuple[str, Override]]) -> tuple[Profile, dict[str, str]]:
    """A profile with layers applied in their order, and the layer that each value comes from."""
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in ((each.name, getattr(base, each.name)) for each in msgspec.structs.fields(Profile)):
        values[name] = dict(value) if isinstance(value, dict) else value
        origin |= {f"{name}.{key}": base_origin for key in value} if isinstance(value, dict) else {name: base_origin}
    for layer, override in layers:
        for kind in ("flags", "env"):
            settings: dict[str, Setting] = getattr(override, kind)
            values[kind] |= settings
            origin |= {f"{kind}.{key}": layer for key in settings}
        given = {name: getattr(override, name) for name in values if name not in ("flags", "env", "summary")}
        for name, value in given.items():
            if value is not None:
                values[name], origin[name] = value, layer
    return Profile(**values), origin
