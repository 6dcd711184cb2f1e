"""The SBOM of a release: CycloneDX 1.6, made from the release's manifest alone.

The same release gives the same bytes: no timestamp, and a serial number derived from its id.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from agent.schema.manifest import KernelWheel, ReleaseManifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def write(manifest: ReleaseManifest, debian: Mapping[str, str] | None = None, architecture: str = "") -> str:
    """The SBOM of the release with that manifest, as JSON. The manifest must list packages and wheels.

    `debian` are the Debian packages of an image, by name, for an `architecture`.

    The release depends on everything that it runs. A kernel wheel depends on the compilers that built it: components
    with scope `excluded`, the standard's term for components absent at run time. (`formulation` could describe their
    use, but the library cannot write it; `metadata.tools` are the tools that made the SBOM.)
    """
    release = Component(
        type=ComponentType.APPLICATION,
        name="hearth-release",
        version=manifest.id,
        bom_ref=f"release:{manifest.id}",
        properties=_properties(manifest, "stack", "torch", "python", "platform", "profile"),
    )
    bom = Bom(serial_number=uuid5(NAMESPACE_URL, f"urn:hearth:release:{manifest.id}"))
    bom.metadata.timestamp = None  # type: ignore[assignment]  # optional in the standard; the default is now
    bom.metadata.component = release
    wheels = {name: _wheel(name, manifest) for name in manifest.wheels or ()}
    running = [_comfyui(manifest), *_nodes(manifest), *_packages(manifest), *wheels.values()]
    for name, version in (debian or {}).items():
        purl = PackageURL("deb", "debian", name, version, {"arch": architecture})
        running.append(Component(type=ComponentType.LIBRARY, name=name, version=version, bom_ref=f"{purl}", purl=purl))
    bom.register_dependency(release, running)
    bom.components.update(running)
    for name, wheel in wheels.items():
        compilers = list(_compilers((manifest.wheels or {})[name]))
        bom.register_dependency(wheel, compilers)
        bom.components.update(compilers)
    return str(JsonV1Dot6(bom).output_as_string(indent=2)) + "\n"


def _comfyui(manifest: ReleaseManifest) -> Component:
    """ComfyUI at its pinned commit, with the other sources of the same tree."""
    found = Component(
        type=ComponentType.APPLICATION,
        name="ComfyUI",
        version=manifest.version,
        bom_ref="comfyui",
        properties=_properties(manifest, "tree"),
    )
    for source in manifest.sources:
        if "git" in source:
            found.purl = found.purl or _repository(source["git"], source["commit"])
            found.external_references.add(_commit(source["git"], source["commit"]))
        elif "sdist" in source:
            reference = ExternalReference(
                type=ExternalReferenceType.SOURCE_DISTRIBUTION,
                url=XsUri(f"{PackageURL('pypi', None, source['sdist'], source['version'])}"),
                comment=f"carries the same tree, in {source.get('subfolder', 'its root')}",
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=source["sha256"])],
            )
            found.external_references.add(reference)
    return found


def _nodes(manifest: ReleaseManifest) -> Iterable[Component]:
    for name, node in manifest.nodes.items():
        yield Component(
            type=ComponentType.LIBRARY,
            name=name,
            version=node.commit,
            bom_ref=f"node:{name}",
            purl=_repository(node.url, node.commit),
            external_references=[_commit(node.url, node.commit)],
            properties=_properties(node, "tree"),
        )


def _packages(manifest: ReleaseManifest) -> Iterable[Component]:
    for name, version in (manifest.packages or {}).items():
        purl = PackageURL("pypi", None, name, version)
        yield Component(type=ComponentType.LIBRARY, name=name, version=version, bom_ref=f"{purl}", purl=purl)


def _wheel(name: str, manifest: ReleaseManifest) -> Component:
    """A kernel wheel. Hearth built it and no index has it, so its package URL is not pkg:pypi."""
    wheel, version = (manifest.wheels or {})[name], manifest.kernels[name]
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        bom_ref=f"wheel:{name}",
        purl=PackageURL("generic", None, name, version, {"checksum": f"sha256:{wheel.sha256}"}),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=wheel.sha256)],
        properties=_properties(wheel, "file", "arch"),
    )


def _compilers(wheel: KernelWheel) -> Iterable[Component]:
    """The compilers of a wheel; `kernels.toolchain` writes their identities."""
    for kind, identity in wheel.compilers.items():
        # g++ --version prints `g++ (Debian 12.2.0-14) 12.2.0`; other distributions append more.
        version = re.search(r"(?:\)|version) (\d[\d.]*)", identity)
        yield Component(
            type=ComponentType.APPLICATION,
            name="nvcc" if kind == "cuda" else identity.split()[0],
            version=wheel.cuda if kind == "cuda" else version and version[1],
            bom_ref=f"compiler:{identity}",
            scope=ComponentScope.EXCLUDED,
            properties=[Property(name="hearth:identity", value=identity)],
        )


def _repository(url: str, commit: str) -> PackageURL | None:
    """The package URL of a commit on GitHub. Elsewhere there is none; only the reference gives the address."""
    found = re.fullmatch(r"https://github\.com/([^/]+)/([^/]+?)(?:\.git)?/?", url)
    return PackageURL("github", found[1], found[2], commit) if found else None


def _commit(url: str, commit: str) -> ExternalReference:
    return ExternalReference(type=ExternalReferenceType.VCS, url=XsUri(url), comment=f"commit {commit}")


def _properties(values: object, *names: str) -> list[Property]:
    """Some attributes as properties; the standard recommends a namespace."""
    return [Property(name=f"hearth:{name}", value=getattr(values, name)) for name in names]
