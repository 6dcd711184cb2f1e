"""The SBOM in a wheel (PEP 770): CycloneDX 1.6 with the wheel's sources, torch, and compilers.

It depends on the wheel's key alone, so that the same inputs give the same bytes.
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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core.source import Pinned
    from kernels.matrix import Build


def write(build: Build) -> bytes:
    """The SBOM of a build's wheel, as JSON. Compilers have scope `excluded`: they are absent at run time."""
    recipe, stack = build.recipe, build.toolchain.stack
    wheel = Component(
        type=ComponentType.LIBRARY,
        name=recipe.name,
        version=build.version,
        bom_ref="wheel",
        purl=PackageURL("generic", None, recipe.name, build.version),
        properties=[Property(name="hearth:key", value=build.key)],
    )
    torch = PackageURL("pypi", None, "torch", stack.torch)
    parts = [
        *_sources(build),
        Component(type=ComponentType.LIBRARY, name="torch", version=stack.torch, bom_ref=f"{torch}", purl=torch),
        *(
            Component(
                type=ComponentType.APPLICATION,
                name={"cuda": "nvcc", "cxx": "g++"}[kind],
                version=stack.cuda if kind == "cuda" else None,
                bom_ref=f"compiler:{kind}",
                scope=ComponentScope.EXCLUDED,
                properties=[Property(name="hearth:identity", value=identity)],
            )
            for kind, identity in build.toolchain.parts
            if kind in ("cuda", "cxx")
        ),
    ]
    bom = Bom(serial_number=uuid5(NAMESPACE_URL, f"urn:hearth:wheel:{build.key}"))
    bom.metadata.timestamp = None  # type: ignore[assignment]  # optional in the standard; the default is now
    bom.metadata.component = wheel
    bom.register_dependency(wheel, parts)
    bom.components.update(parts)
    return f"{JsonV1Dot6(bom).output_as_string(indent=2)}\n".encode()


def _sources(build: Build) -> Iterator[Component]:
    """The source tree with its patches, and the additional sources."""
    recipe = build.recipe
    properties = [
        Property(name="hearth:patch", value=each.file)
        for each in recipe.patches_for(build.toolchain.stack, build.profile)
    ]
    yield _source(recipe, "source", build.inputs["source"], properties)
    for each, (into, tree) in zip(recipe.extra, build.inputs["extra"], strict=True):
        yield _source(each, f"source:{into}", tree, [])


def _source(recipe: Pinned, reference: str, tree: str, properties: list[Property]) -> Component:
    """One source. All origins contain the same tree, so the first one identifies it."""
    source = recipe.source[0]
    found = Component(
        type=ComponentType.LIBRARY,
        name=source.sdist or recipe.name,
        version=source.commit or source.version or recipe.version,
        bom_ref=reference,
        properties=[*properties, Property(name="hearth:tree", value=tree)],
    )
    if source.git:
        github = re.fullmatch(r"https://github\.com/([^/]+)/([^/]+?)(?:\.git)?/?", source.git)
        found.purl = PackageURL("github", github[1], github[2], source.commit) if github else None
        found.external_references.add(ExternalReference(type=ExternalReferenceType.VCS, url=XsUri(source.git)))
    elif source.sdist:
        found.purl = PackageURL("pypi", None, source.sdist, source.version)
        found.hashes.add(HashType(alg=HashAlgorithm.SHA_256, content=source.sha256))
    return found
