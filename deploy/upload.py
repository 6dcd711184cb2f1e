"""Uploads: packs and sends the files that a plan's steps need on the host."""

from __future__ import annotations

import gzip
import io
import shlex
import tarfile
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agent.schema import change as schema
from core import console, files, lockfile, source, workspace
from core.console import counted
from core.errors import SourceError
from core.stack import Platform
from core.typed import convert
from deploy import containers
from lock import nodes, requirements

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from agent.schema.change import Step
    from deploy.connection import Agent
    from deploy.facts import Facts
    from deploy.inputs import Inputs


@dataclass
class Upload:
    """The files that a host needs for some steps, by SHA-256 in `blobs`; archives are created in `scratch`.

    `offline`: the host fetches nothing itself, so the packages of its environment are sent, too.
    """

    agent: Agent
    facts: Facts
    inputs: Inputs
    scratch: Path
    offline: bool = False
    blobs: dict[str, Path] = field(default_factory=dict)

    def pack(self, steps: Sequence[Step]) -> list[Step]:
        """The steps, with everything that the agent needs for them."""
        # fetch all nodes in parallel, not one by one
        nodes.fetch({step.node: self.inputs.nodes[step.node] for step in steps if isinstance(step, schema.Node)})
        return [self.pack_step(step) for step in steps]

    def pack_step(self, step: Step) -> Step:
        """The step, with everything that the agent needs for it."""
        platform = Platform.parse(self.facts.platform)
        if isinstance(step, schema.Tool):
            blob = self._blob(lockfile.install("uv", platform, "3.11") / "bin/uv")
            return replace(step, name=self.inputs.uv, blob=blob)
        if isinstance(step, schema.Base):
            cuda = containers.base_part(platform, cuda=True) == step.part
            return replace(step, blobs=tuple(map(self._blob, containers.archives(platform, self.scratch, cuda=cuda))))
        if isinstance(step, schema.App):
            return self.pack_tree(step, "app", source.intact(self.inputs.application))
        if isinstance(step, schema.Node):
            tree = source.intact(self.inputs.nodes[step.node].pinned(step.node))
            return self.pack_tree(step, f"custom_nodes/{step.node}", tree)
        if isinstance(step, schema.Env):
            return self._pack_environment(step, platform)
        return step

    def _pack_environment(self, step: schema.Env, platform: Platform) -> Step:
        kernels = [wheel for wheel in self.inputs.wheels if wheel.file in step.kernels]
        self.blobs |= {wheel.sha256: workspace.current().wheelhouse.path(wheel) for wheel in kernels}
        wheels = [schema.WheelFile(wheel.file, wheel.sha256) for wheel in kernels]
        if self.offline:
            lock = self.inputs.locks[self.facts.platform, step.version]
            folder = requirements.download(lock, step.requesters, platform)
            packages = [schema.WheelFile(each.name, self._blob(each)) for each in sorted(folder.glob("*.whl"))]
            if damaged := [each.file for each in packages if each.sha256 not in lock.text]:
                what = f"{folder / damaged[0]} is damaged: its hash differs from the locked one"
                raise SourceError(
                    "hash-mismatch", what, hint=f"rm -r {shlex.quote(str(folder))}, then run the same command again"
                )
            wheels += packages
            step = replace(step, requirements=requirements.offline(step.requirements))
        return replace(step, tool=self.inputs.uv, wheels=tuple(wheels), offline=self.offline)

    def pack_tree(self, step: schema.Tree, kind: str, tree: Path) -> Step:
        """The step, with an archive of the files that none of the host's parts of the same `kind` contain."""
        wanted = {
            name: files.sha256(path) + ("x" if path.stat().st_mode & 0o100 else "") for name, path in files.tree(tree)
        }
        if "PART.json" in wanted:  # the agent's record of a part
            raise SourceError("unsafe-tree", f"{tree.name} has a file PART.json, a name that Hearth reserves")
        used = {each.parts.get(kind) for each in self.facts.releases}
        there = sorted(name for name, error in self.facts.parts.items() if name in used and not error)
        held: dict[str, str] = {}
        found = self.agent.call("contents", parts=there) if there else {}
        for part, listed in convert(found, dict[str, dict[str, str]]).items():
            held |= {digest: f"{part}/{name}" for name, digest in listed.items()}
        reuse = {name: held[digest] for name, digest in wanted.items() if digest in held}
        archive = self.scratch / f"{tree.name}.tar.gz"
        with (
            archive.open("wb") as raw,
            gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            for name in sorted(wanted.keys() - reuse.keys()):
                content = (tree / name).read_bytes()
                info = tarfile.TarInfo(name)
                info.size = len(content)
                info.mode = 0o755 if wanted[name].endswith("x") else 0o644
                tar.addfile(info, io.BytesIO(content))
        return replace(step, files=wanted, reuse=reuse, blob=self._blob(archive))

    def _blob(self, path: Path) -> str:
        digest = files.sha256(path)
        self.blobs[digest] = path
        return digest

    def send(self) -> None:
        """Send the files that the host lacks; an interrupted upload resumes where it ended."""
        incoming = self.facts.incoming
        missing = {digest: path for digest, path in self.blobs.items() if digest not in incoming}
        offsets = {digest: incoming.get(f"{digest}.part", 0) for digest in missing}
        total = sum(path.stat().st_size - offsets[digest] for digest, path in missing.items())
        if not missing:
            return
        console.say(f"sending {counted(len(missing), 'file')}, {console.size(total)}")
        with console.Progress("sending", total, len(missing)) as progress:
            for digest, path in missing.items():
                self.agent.send(path, digest, offsets[digest], progress.advance)
                progress.step(path.name, 0, 0)
