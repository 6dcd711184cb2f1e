"""Image layouts: valid, the same bytes everywhere, and never half written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deploy.image_layout import EMPTY, EPOCH, INDEX, MANIFEST, NAME, Layout, file, folder, link, tree
from tests.conftest import FIXTURES
from tests.errors import raises
from tests.kills import killer

if TYPE_CHECKING:
    from deploy.image_layout import Descriptor, Entry

NAMED = "localhost/a:1"
BILL = b'{"bomFormat": "CycloneDX"}'


def schema_file(uri: str) -> Any:
    """A schema of github.com/opencontainers/image-spec at 13cff54 (Apache-2.0)."""
    return json.loads((FIXTURES / "oci" / uri.rpartition("/")[2]).read_bytes())


def validate(content: Any, kind: str) -> None:
    """Raises ValueError unless the content is valid."""
    import jsonschema  # type: ignore[import-untyped]  # a second of grammars
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT4

    registry: Registry[Any] = Registry(retrieve=lambda uri: Resource(schema_file(uri), DRAFT4))  # type: ignore[call-arg]
    try:
        jsonschema.Draft4Validator(schema_file(f"{kind}.json"), registry=registry).validate(content)
    except jsonschema.ValidationError as error:
        raise ValueError(f"not a valid {kind}") from error


def write(place: Path, records: Path, text: bytes = b"one", leave: str = "") -> Descriptor:
    """An image of two layers with an SBOM."""
    layout = Layout(place, records)
    layers = {
        "base": layout.layer(
            "base", lambda: nullcontext([file("bin/sh", b"sh", executable=True), link("sh", "bin/sh")])
        ),
        "app": layout.layer(f"app {text!r}", lambda: nullcontext([file("a/b/c", text), folder("data", user=7)])),
    }
    config = {"User": "1000:1000", "Env": ["A=b"], "Healthcheck": {"Test": ["CMD", "true"]}}
    image = layout.image(layers, config, "arm64", {"org.opencontainers.image.title": "x"})
    listed = layout.index([layout.referrer(image, BILL, "application/vnd.cyclonedx+json")])
    if leave != "unfinished":
        layout.finish([{**image, "annotations": {NAME: "1"}}, {**listed, "annotations": {NAME: "sbom"}}], NAMED)
    return image


def read(place: Path, found: Descriptor) -> Any:
    content = (place / "blobs/sha256" / found["digest"].removeprefix("sha256:")).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (found["size"], found["digest"][7:])
    return json.loads(content) if "json" in found["mediaType"] else content


def reached(place: Path, found: Descriptor) -> set[str]:
    """The digests that a descriptor leads to, each read and checked."""
    content, digests = read(place, found), {found["digest"]}
    if found["mediaType"] in (INDEX, MANIFEST):
        validate(content, "image-index-schema" if found["mediaType"] == INDEX else "image-manifest-schema")
        inner = [
            content.get("config"),
            content.get("subject"),
            *content.get("layers", []),
            *content.get("manifests", []),
        ]
        digests |= {digest for each in inner if each for digest in reached(place, each)}
    return digests


def check(place: Path) -> set[str]:
    """Check a whole layout against the format's schemas; return the digests of its images."""
    validate(json.loads((place / "oci-layout").read_bytes()), "image-layout-schema")
    index = json.loads((place / "index.json").read_bytes())
    validate(index, "image-index-schema")
    digests = {digest for each in index["manifests"] for digest in reached(place, each)}
    assert digests <= {f"sha256:{path.name}" for path in (place / "blobs/sha256").iterdir()}
    return digests


def test_a_layout_is_valid_and_has_no_other_blob(tmp_path: Path) -> None:
    place = tmp_path / "image"
    image = write(place, tmp_path / "records")
    assert check(place) == {f"sha256:{path.name}" for path in (place / "blobs/sha256").iterdir()}
    manifest = read(place, image)
    config = read(place, manifest["config"])
    validate(config, "config-schema")
    assert config["rootfs"]["diff_ids"] == [each["digest"] for each in manifest["layers"]]
    assert (config["architecture"], config["os"]) == ("arm64", "linux")
    (docker,) = json.loads((place / "manifest.json").read_bytes())
    assert docker["RepoTags"] == [NAMED]
    assert [f"sha256:{name.rpartition('/')[2]}" for name in docker["Layers"]] == config["rootfs"]["diff_ids"]
    assert json.loads((place / docker["Config"]).read_bytes()) == config


def test_the_sbom_refers_to_its_image(tmp_path: Path) -> None:
    place = tmp_path / "image"
    image = write(place, tmp_path / "records")
    listed = read(place, json.loads((place / "index.json").read_bytes())["manifests"][1])
    (found,) = listed["manifests"]
    assert found["artifactType"] == "application/vnd.cyclonedx+json"
    about = read(place, found)
    assert about["subject"] == {name: image[name] for name in ("mediaType", "digest", "size")}
    assert (about["config"]["mediaType"], read(place, about["config"])) == (EMPTY, {})
    assert read(place, about["layers"][0]) == json.loads(BILL)


def test_schemas_refuse_another_digest(tmp_path: Path) -> None:
    write(tmp_path / "image", tmp_path / "records")
    index = json.loads((tmp_path / "image/index.json").read_bytes())
    index["manifests"][0]["digest"] = "md5-of-it"
    with pytest.raises(ValueError, match="not a valid image-index-schema"):
        validate(index, "image-index-schema")


def members(place: Path, found: Descriptor) -> list[tarfile.TarInfo]:
    return tarfile.open(fileobj=io.BytesIO(read(place, found))).getmembers()


def test_a_layer_does_not_depend_on_the_machine(tmp_path: Path) -> None:
    found = []
    for number, names in enumerate((["z/y", "z.txt", "a"], ["a", "z.txt", "z/y"])):
        root, before = tmp_path / f"{number}", os.umask(0o022 if number else 0o077)
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
        (root / "z/run").write_text("#!/bin/sh")
        (root / "z/run").chmod(0o700)
        (root / "l").symlink_to("a")
        (root / "empty").mkdir()
        os.utime(root / "a", (number, number))
        os.umask(before)
        layout = Layout(tmp_path / f"image{number}", tmp_path / f"records{number}")
        found.append(layout.layer("x", lambda root=root: nullcontext(tree(root, "opt"))))  # type: ignore[misc]
    assert found[0] == found[1]
    listed = members(tmp_path / "image0", found[0])
    assert [each.name for each in listed] == [
        *("opt", "opt/a", "opt/empty", "opt/l", "opt/z", "opt/z/run", "opt/z/y", "opt/z.txt")
    ]
    assert {(each.uid, each.gid, each.uname, each.mtime) for each in listed} == {(0, 0, "", EPOCH)}
    assert [oct(each.mode) for each in listed if each.isreg()] == ["0o644", "0o755", "0o644", "0o644"]


def test_folders_precede_their_contents_and_keep_their_user(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "image", tmp_path / "records")
    entries: list[Entry] = [file("a/b/c", b"1"), folder("a/b", user=7), file("a-b", b"2"), file("a/b/c", b"other")]
    listed = members(tmp_path / "image", layout.layer("x", lambda: nullcontext(entries)))
    assert [(each.name, each.uid) for each in listed] == [("a", 0), ("a/b", 7), ("a/b/c", 0), ("a-b", 0)]


def test_known_layers_stay_and_old_blobs_go(tmp_path: Path) -> None:
    place, records = tmp_path / "image", tmp_path / "records"
    first = write(place, records)
    base, app = (place / "blobs/sha256" / each["digest"][7:] for each in read(place, first)["layers"])
    kept = base.stat().st_ino
    second = write(place, records, b"two")
    assert base.stat().st_ino == kept
    assert not app.exists()
    assert second["digest"] != first["digest"]
    assert check(place) == {f"sha256:{path.name}" for path in (place / "blobs/sha256").iterdir()}
    base.unlink()  # for example with the folder
    assert write(place, records) == first
    assert first["digest"] in check(place)


def test_a_layer_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    place = tmp_path / "image"
    image = write(place, tmp_path / "records")
    base = place / "blobs/sha256" / read(place, image)["layers"][0]["digest"][7:]
    os.truncate(base, 512)
    write(place, tmp_path / "records")
    check(place)


def killed_at(number: int, place: Path, records: Path) -> bool:
    """Write another image in a process that is killed at its Nth rename or deletion; False if it had fewer."""
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            counted = killer(number - 1)
            for name in ("replace", "rename", "unlink"):
                setattr(os, name, counted(getattr(os, name)))
            write(place, records, b"two")
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.process
def test_a_killed_run_leaves_the_old_image_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the system goes on
    place, records = tmp_path / "image", tmp_path / "records"
    old = write(place, records)["digest"]
    new = write(tmp_path / "other", tmp_path / "r", b"two")["digest"]
    number, seen = 0, set()
    while True:
        number += 1
        if not killed_at(number, place, records):
            break
        seen |= {old, new} & check(place)
        assert {old, new} & check(place)
        assert write(place, records)["digest"] == old
        assert not [path for path in (place / "blobs/sha256").iterdir() if path.name.startswith(".")]
    assert number > 10
    assert seen == {old, new}
    assert new in check(place)


def test_a_killed_first_run_leaves_no_image(tmp_path: Path) -> None:
    write(tmp_path / "image", tmp_path / "records", leave="unfinished")
    assert not (tmp_path / "image/index.json").exists()
    assert not (tmp_path / "image/oci-layout").exists()
    assert write(tmp_path / "image", tmp_path / "records")["digest"] in check(tmp_path / "image")


def test_another_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_text("")
    with raises("usage"):
        Layout(tmp_path / "photos", tmp_path / "records")
