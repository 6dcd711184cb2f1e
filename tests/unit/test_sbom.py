"""The SBOM: complete, valid against the standard's schema, and the same bytes for the same release."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.schema.manifest import ReleaseManifest
from core import files
from core.typed import from_json
from deploy import release
from deploy.selection import choose
from kernels import matrix
from kernels import sbom as wheel_sbom
from lock import application, nodes, requirements, sbom
from tests.errors import raises
from tests.plans import FRESH, inputs, spark, wheel

TOOLCHAIN = {
    "cuda": "nvcc-cu130 c461d9ef",
    "cxx": "aarch64-linux-gnu-g++ (Debian 12.2.0-14) 12.2.0; GNU ld (GNU Binutils for Debian) 2.40; glibc 2.36",
    "torch": "64cf33f1",
}
INPUTS = {"stack": ["cu130", "2.14.1", "13.0", True], "toolchain": TOOLCHAIN}


def manifest(**more: nodes.Node) -> ReleaseManifest:
    """The manifest of a real list, with the real nodes, and wheels as `kernels` describes them."""
    lock = requirements.find("cu130", "linux_aarch64", "3.12")
    assert lock is not None
    stock = replace(
        inputs(wheel("sageattention", inputs=INPUTS), wheel("flash-attn", sha256="f" * 64, inputs=INPUTS)),
        application=application.application(),
        locks={("linux_aarch64", "3.12"): lock},
        nodes={**nodes.choose(nodes.catalogue(), ["recommended"]), **more},
    )
    selection, against = choose(spark(), FRESH, stock)
    assert selection is not None
    assert not against
    found = release.manifest(selection, FRESH.prefix)
    # the host stores it as JSON, and a deploy compares it
    assert from_json(msgspec.json.encode(found), ReleaseManifest) == found
    return found


@pytest.fixture(scope="module")
def known() -> ReleaseManifest:
    return manifest()


@pytest.fixture(scope="module")
def parts(known: ReleaseManifest) -> dict[str, Any]:
    """The SBOM's components by their reference."""
    return {each["bom-ref"]: each for each in json.loads(sbom.write(known))["components"]}


def properties(component: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in component["properties"]}


@pytest.mark.needs("g++")
def test_sbom_is_valid_cyclonedx(known: ReleaseManifest) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator  # a second of grammars

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    (build,), _ = matrix.select(matrix.Request(arch="8.9", kernel="sageattention", python="3.11"))
    assert validator.validate_str(wheel_sbom.write(build).decode()) is None
    assert validator.validate_str(sbom.write(known)) is None
    assert validator.validate_str(sbom.write(known).replace('"hashes"', '"hashs"')) is not None


def test_the_manifest_has_the_packages_that_the_environment_gets(known: ReleaseManifest) -> None:
    lock = requirements.find("cu130", "linux_aarch64", "3.12")
    assert lock is not None
    pinned = [f"{name}=={version}" for name, version in (known.packages or {}).items()]
    assert pinned == [line.split()[0] for line in lock.select(known.nodes).splitlines() if "==" in line]
    assert len(lock.versions([])) < len(pinned) < len(lock.versions()) + 1


def test_every_package_is_named_as_the_index_names_it(known: ReleaseManifest, parts: dict[str, Any]) -> None:
    assert parts["pkg:pypi/torch@2.14.1"]["purl"] == "pkg:pypi/torch@2.14.1"
    purls = [each["purl"] for each in parts.values() if each.get("purl", "").startswith("pkg:pypi/")]
    assert len(purls) == len(known.packages or {}) > 100


def test_comfyui_component_has_commit_and_carrier(known: ReleaseManifest, parts: dict[str, Any]) -> None:
    git, sdist = application.application().source
    found = parts["comfyui"]
    assert (found["version"], found["purl"]) == (known.version, f"pkg:github/comfy-org/comfyui@{git.commit}")
    assert properties(found) == {"hearth:tree": application.application().tree}
    (carrier,) = (each for each in found["externalReferences"] if each["type"] == "source-distribution")
    assert carrier["hashes"] == [{"alg": "SHA-256", "content": sdist.sha256}]


def test_node_components_have_commits(parts: dict[str, Any]) -> None:
    node = nodes.catalogue().nodes["rgthree-comfy"]
    found = parts["node:rgthree-comfy"]
    assert found["purl"] == f"pkg:github/rgthree/rgthree-comfy@{node.commit}"
    assert properties(found) == {"hearth:tree": node.tree}


def test_a_node_from_elsewhere_has_its_address() -> None:
    node = nodes.Node(url="https://git.example.org/a/b.git", commit="a" * 40, tree="t", why="a test")
    (found,) = (each for each in json.loads(sbom.write(manifest(b=node)))["components"] if each["name"] == "b")
    assert "purl" not in found
    assert found["externalReferences"] == [{"type": "vcs", "url": node.url, "comment": f"commit {node.commit}"}]


def test_kernel_wheels_have_hash_arch_and_compilers(known: ReleaseManifest, parts: dict[str, Any]) -> None:
    found = parts["wheel:flash-attn"]
    assert found["hashes"] == [{"alg": "SHA-256", "content": "f" * 64}]
    assert properties(found) == {"hearth:file": "flash-attn.whl", "hearth:arch": "12.1"}
    needs = {each["ref"]: each.get("dependsOn", []) for each in json.loads(sbom.write(known))["dependencies"]}
    compilers = [parts[name] for name in needs["wheel:flash-attn"]]
    assert {(each["name"], each["version"], each["scope"]) for each in compilers} == {
        ("nvcc", "13.0", "excluded"),
        ("aarch64-linux-gnu-g++", "12.2.0", "excluded"),
    }
    running = [name for name, each in parts.items() if each.get("scope") != "excluded"]
    assert sorted(needs[f"release:{known.id}"]) == sorted(running)


def test_sbom_is_reproducible(known: ReleaseManifest, tmp_path: Path) -> None:
    (tmp_path / "release.json").write_bytes(msgspec.json.encode(known))
    program = (
        "import sys; from agent.files import recorded; from agent.schema.manifest import ReleaseManifest as R\n"
        "from lock import sbom; from pathlib import Path; print(sbom.write(recorded(Path(sys.argv[1]), R)), end='')"
    )
    words = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "release.json")]

    def said(seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run(words, cwd=files.CHECKOUT, env=env, check=True, capture_output=True, text=True).stdout

    assert said("1") == said("2") == sbom.write(known)
    other = json.loads(sbom.write(replace(known, id="0" * 16)))
    assert other["serialNumber"] != json.loads(sbom.write(known))["serialNumber"]


def test_release_without_package_list_is_refused() -> None:
    old = replace(manifest(), packages=None, wheels=None, sources=(), tree="")
    with raises("old-release", match=f"release {old.id} does not list its packages"):
        release.require_complete(old)


def test_wheel_without_compilers_is_listed() -> None:
    stock = inputs()
    selection, _ = choose(spark(), FRESH, stock)
    assert selection is not None
    folder = msgspec.structs.replace(selection.application, version="1.2.3")
    found = json.loads(sbom.write(release.manifest(replace(selection, application=folder), FRESH.prefix)))
    assert {each["name"] for each in found["components"]} == {"ComfyUI", "sageattention", "flash-attn"}
