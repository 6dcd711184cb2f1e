"""A release's manifest: its content, how it runs, and what the health gate requires. The client writes it."""

from __future__ import annotations

from dataclasses import field

from agent.schema.record import Record


class NodeSource(Record):
    """A custom node's source."""

    url: str = ""
    commit: str = ""
    tree: str = ""  # hash of its content


class KernelWheel(Record):
    """A kernel wheel's file, and its compilers if its own manifest names them."""

    file: str = ""
    sha256: str = ""
    arch: str = ""
    cuda: str = ""  # its version
    compilers: dict[str, str] = field(default_factory=dict)  # `kernels.toolchain`


class Gate(Record):
    """What the health gate requires."""

    seconds: int = 0  # for ComfyUI to start
    version: str = ""  # ComfyUI's
    torch: str = ""
    cuda: bool = False  # ComfyUI must use a CUDA device
    attention: str = ""  # the line in ComfyUI's log that names it; empty: any
    required: tuple[str, ...] = ()  # nodes that must be imported
    imports: tuple[str, ...] = ()  # the kernels' modules


class ReleaseManifest(Record):
    """`release.json`. Older agents wrote releases without some fields, which then have their defaults."""

    id: str = ""
    version: str = ""  # ComfyUI's
    stack: str = ""
    torch: str = ""
    python: str = ""  # minor version
    platform: str = ""
    profile: str = ""
    parts: dict[str, str] = field(default_factory=dict)  # by the place of their link in the release
    sources: tuple[dict[str, str], ...] = ()  # ComfyUI's; `core.source.Source` without empty fields
    tree: str = ""  # hash of ComfyUI's content
    packages: dict[str, str] | None = None  # versions; None: an older Hearth's release
    nodes: dict[str, NodeSource] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)  # versions of wheels
    wheels: dict[str, KernelWheel] | None = None  # by kernel; None: an older Hearth's release
    gate: Gate = Gate()
    code: str = ""  # ComfyUI's folder
    argv: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # text by place in the release
    links: dict[str, str] = field(default_factory=dict)  # targets by place in the release
    empty: tuple[str, ...] | None = None  # folders in the release; None: an older Hearth's, with unlisted ones
    confined: tuple[str, ...] = ()  # prefix of its commands, without a system unit
    develop: tuple[str, ...] = ()  # folders of nodes under development
    free_memory: int = 0  # seconds without a job, after which ComfyUI frees its memory; 0: never
