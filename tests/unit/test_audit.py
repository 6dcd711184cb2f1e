"""The audit: the real `uv audit` against a local OSV service, and the curated list."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core import console, files
from core.errors import AuditError
from deploy.inputs import gather
from lock import advisory, application, audit, nodes, requirements
from lock.advisory import Advisory, Repository
from lock.audit import Inventory
from tests.client import Client
from tests.errors import killed, raises
from tests.plans import spark
from tests.unit.test_sbom import manifest


@dataclass
class Osv:
    """OSV's API with expectations: the packages of each request, and their known vulnerabilities."""

    packages: set[tuple[str, str]] = field(default_factory=set)
    known: dict[tuple[str, str], str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, path: str, body: bytes) -> dict[str, Any] | None:
        """The answer to a request; None to an unexpected one."""
        if path == "/v1/querybatch" and body:
            queries = json.loads(body)["queries"]
            asked = [(each["package"]["name"], each["version"]) for each in queries]
            if set(asked) != self.packages or {each["package"]["ecosystem"] for each in queries} != {"PyPI"}:
                return None
            named = [[self.known[each]] if each in self.known else [] for each in asked]
            date = "2025-01-01T00:00:00Z"
            return {"results": [{"vulns": [{"id": one, "modified": date} for one in each]} for each in named]}
        for (name, _), identifier in self.known.items():
            if path == f"/v1/vulns/{identifier}" and not body:
                ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99"}]}]
                return {
                    "id": identifier,
                    "aliases": ["CVE-1"],
                    "modified": "2025-01-01T00:00:00Z",
                    "summary": f"a hole in {name}",
                    "affected": [{"package": {"name": name, "ecosystem": "PyPI"}, "ranges": ranges}],
                    "references": [{"type": "WEB", "url": "https://example.org/hole"}],
                }
        return None


@pytest.fixture(autouse=True)
def plain_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))  # uv caches answers, and a port may be reused
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")  # otherwise it waits between them


@pytest.fixture
def osv() -> Iterator[Osv]:
    told = Osv()

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            found = told.answer(self.path, body)
            if found is None:
                told.refused.append(f"{self.command} {self.path} {body.decode()}")
            content = json.dumps(found).encode()
            self.send_response(400 if found is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = reply  # noqa: N815 - the names are http.server's

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield told
        finally:
            server.shutdown()
            thread.join()
    assert told.refused == []


def stock(*packages: tuple[str, str], repositories: tuple[Repository, ...] = ()) -> Inventory:
    return Inventory({each: ["a-list"] for each in packages}, repositories)


def test_every_version_is_looked_up_and_named_with_its_remedy(osv: Osv) -> None:
    osv.packages = {("torch", "2.6.0"), ("torch", "2.11.0"), ("idna", "3.4")}
    osv.known = {("torch", "2.6.0"): "PYSEC-1"}
    found = audit.check(stock(*osv.packages), osv.url)
    assert found.error is None
    assert found.packages == 3
    (each,) = found.findings
    assert (each.name, each.at, each.ids, each.what) == ("torch", "2.6.0", ("PYSEC-1", "CVE-1"), "a hole in torch")
    assert (each.remedy, each.source, each.where) == ("fixed in 99", "https://example.org/hole", ("a-list",))


def test_curated_findings_are_not_repeated(osv: Osv) -> None:
    osv.packages = {("ultralytics", "8.3.41")}
    osv.known = {("ultralytics", "8.3.41"): "PYSEC-2024-154"}
    (each,) = audit.check(stock(*osv.packages), osv.url).findings
    assert "mine cryptocurrency" in each.what


def test_refusing_service_is_an_error(osv: Osv) -> None:
    found = audit.check(stock(("idna", "3.4")), osv.url)
    assert isinstance(found.error, AuditError)
    assert "400" in found.error.cause
    assert osv.refused
    osv.refused.clear()


def test_a_killed_uv_has_a_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(tmp_path, monkeypatch, "uv")
    found = audit.check(stock(("idna", "3.4")))
    assert found.error
    assert found.error.cause == "it was killed by signal 9 (Killed)"


def test_curated_findings_are_shown_without_the_service() -> None:
    bad = Repository("x", "https://github.com/applebotzz/comfyui_llmvision.git", "a" * 40, "")
    found = audit.check(stock(("litellm", "1.82.8"), repositories=(bad,)), "http://127.0.0.1:1")
    assert [(each.name, each.at) for each in found.findings] == [("x", "a" * 40), ("litellm", "1.82.8")]
    assert found.error is not None
    assert "1 package not looked up" in found.error.what
    assert "127.0.0.1:1" in found.error.cause


@pytest.mark.parametrize(("certain", "said"), [(True, "x 1: a hole"), (False, "x 1: possibly: a hole")])
def test_uncertain_findings_are_marked(certain: bool, said: str) -> None:
    finding = audit.Finding("x", "1", ("CVE-1",), "a hole", "fixed in 2", "https://example.org", certain=certain)
    first, second, last = audit.rows(audit.Audit(1, 0, 0, (finding,), None))
    assert (first, second) == (said, "    CVE-1; fixed in 2; https://example.org")
    assert last.startswith("1 finding: 1 package ")


@dataclass
class Own(Client):
    """`inv` with the test's own nodes, and the real lists."""

    place: Path

    def variables(self) -> dict[str, str]:
        return {"HEARTH_APP": str(self.place)}

    def list_nodes(self, text: str) -> None:
        (self.place / "src/comfy").mkdir(parents=True, exist_ok=True)
        for name in ("comfy/cli_args.py", "folder_paths.py", "requirements.txt"):  # nothing in them is needed
            (self.place / "src" / name).write_text("")
        app = (files.CHECKOUT / "recipes/comfyui/app.toml").read_text().partition("[[source]]")[0]
        (self.place / "app.toml").write_text(f'{app}[[source]]\nfolder = "src"\n')
        (self.place / "nodes.toml").write_text(text)


STEALER = (
    '[nodes.vision]\nurl = "https://github.com/AppleBotzz/ComfyUI_LLMVISION"\ncommit = "' + "a" * 40 + '"\n'
    'tree = "t"\nwhy = "a test"\n'
)


@pytest.mark.process
def test_audit_covers_all_locks(osv: Osv, tmp_path: Path) -> None:
    osv.packages = set(audit.locked().packages)
    assert {"torch", "cyclonedx-python-lib", "nvidia-cuda-nvcc"} <= {name for name, _ in osv.packages}
    own = Own(tmp_path)
    own.list_nodes("")
    clean = own.inv("audit", "--service", osv.url)
    assert clean.returncode == 0, clean.stderr
    size = len(advisory.advisories())
    kept = len(audit.check(Inventory(dict.fromkeys(osv.packages, ()), ()), osv.url).findings)
    findings = console.counted(kept, "finding")
    looked = f"{findings}: {len(osv.packages)} packages (by the vulnerability service); packages and 1 repository"
    assert clean.stdout.splitlines()[-1] == f"{looked} by the {size} entries of known-bad.toml"
    assert clean.stdout.count("it is kept: ") == kept
    own.list_nodes(STEALER)
    bad = own.inv("audit", "--service", osv.url, "--json")
    assert bad.returncode == 1, bad.stderr
    (finding,) = (each for each in json.loads(bad.stdout)["findings"] if not each["tolerated"])
    assert finding["name"] == "vision"
    assert json.loads(bad.stdout)["error"] == ""


@pytest.mark.process
def test_a_service_that_is_gone_has_its_own_exit_code(tmp_path: Path) -> None:
    own = Own(tmp_path)
    own.list_nodes(STEALER)
    for words in ([], ["--json"]):
        done = own.inv("audit", "--service", "http://127.0.0.1:1", *words)
        assert done.returncode == 74
        assert "vision" in done.stdout
        assert "not looked up" in done.stderr


def test_a_deploy_refuses_malware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Own(tmp_path)
    own.list_nodes(STEALER)
    monkeypatch.setenv("HEARTH_APP", str(tmp_path))
    target = spark()
    with_node = msgspec.structs.replace(target.profile, nodes=("vision",))
    with raises("refused") as raised:
        gather(replace(target, profile=with_node))
    assert "vision: stole browser passwords" in raised.value.cause
    assert "ComfyUI_LLMVISION/issues/6" in raised.value.cause


def test_a_release_is_audited_by_its_manifest() -> None:
    old = manifest()
    found = audit.deployed(old)
    assert found.packages["torch", "2.14.1"] == [f"release {old.id}"]
    assert len(found.packages) == len(old.packages or {})
    assert [each.name for each in found.repositories] == ["ComfyUI", *old.nodes]
    assert found.repositories[0].version == "0.30.0"


def test_a_nodes_own_version_is_read_from_its_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path))
    release = manifest(Manager=nodes.Node(url="https://x.y/z", commit="c" * 40, tree="t" * 64, why="a test"))

    def version() -> str:
        (found,) = (each for each in audit.deployed(release).repositories if each.name == "Manager")
        return found.version

    assert version() == ""
    tree = tmp_path / "sources" / f"Manager-{'t' * 16}"
    tree.mkdir(parents=True)
    assert version() == ""
    (tree / "pyproject.toml").write_text('[project]\nversion = "3.37.1"\n')
    assert version() == "3.37.1"
    (tree / "pyproject.toml").write_text("[project\n")
    assert version() == ""


MANAGER = Advisory(what="w", source="s", urls=("https://github.com/a/b",), versions=("<3.39.2", ">=4,<4.0.5"))
FIXED = "f" * 40


@pytest.mark.parametrize(
    ("entry", "version", "held", "expected"),
    [
        (MANAGER, "3.39.1", None, True),
        (MANAGER, "3.39.2", None, False),
        (MANAGER, "4.0.4", None, True),
        (MANAGER, "4.0.5rc1", None, False),
        (MANAGER, "", None, None),
        (MANAGER, "of today", None, None),
        (msgspec.structs.replace(MANAGER, fixed=FIXED), "3.39.2", False, False),  # the version decides
        (msgspec.structs.replace(MANAGER, fixed=FIXED), "", False, True),
        (msgspec.structs.replace(MANAGER, fixed=FIXED), "", True, False),
        (msgspec.structs.replace(MANAGER, fixed=FIXED), "", None, None),
        (msgspec.structs.replace(MANAGER, versions=(), fixed=FIXED), "1", True, False),
        (msgspec.structs.replace(MANAGER, versions=()), "", None, True),
        (msgspec.structs.replace(MANAGER, versions=()), "1", None, True),
    ],
)
def test_advisory_version_and_commit_ranges(
    entry: Advisory, version: str, held: bool | None, expected: bool | None
) -> None:
    there = Repository("b", "https://github.com/A/b.git/", "c" * 40, version)
    assert advisory.of("https://github.com/A/b.git/", [entry]) == [entry]
    assert advisory.of("https://github.com/A/bb", [entry]) == []
    asked: list[tuple[str, str, str]] = []

    def holds(*words: str) -> bool | None:
        asked.append((words[0], words[1], words[2]))
        return held

    assert advisory.applies(entry, there, holds) is expected
    assert asked in ([], [(there.url, there.commit, FIXED)])


def test_the_curated_list_names_its_sources_and_none_of_ours() -> None:
    known = advisory.advisories()
    assert all(each.source.startswith("https://") and each.what for each in known)
    assert all(len(each.fixed) in (0, 40) for each in known)
    chosen = nodes.catalogue().nodes.values()
    assert not [each for node in chosen for each in advisory.of(node.url, known) if each.outright]


@pytest.mark.parametrize(
    ("package", "version", "bad"),
    [
        *(("nvidia-cublas", each, True) for each in ("13.2.0.9", "13.3.0.5", "13.4.0.1")),
        *(("nvidia-cublas", each, False) for each in ("13.1.1.3", "13.4.1.1", "13.4.1.3", "13.10.0.20")),
        *(("comfy-aimdo", "0.4.11", True), ("comfy-aimdo", "0.4.13", False)),
    ],
)
def test_known_bad_releases(package: str, version: str, bad: bool) -> None:
    found = advisory.bad_packages({package: version, "six": "1"})
    assert [(each.name, each.version, each.constraint) for each in found] == (
        [(package, version, f"{package}!={version}")] * bad
    )


def test_our_lists_have_no_known_bad_package_that_can_be_avoided() -> None:
    for stack, platform, python in requirements.combinations(application.version()):
        lock = requirements.find(stack.name, platform.value, python)
        assert lock
        assert all(each.advisory.tolerated for each in advisory.bad_packages(lock.versions()))
        assert not advisory.clashing(lock.versions())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('what = "w"\nsource = "s"', "set either `package` or `urls`"),
        ('what = "w"\nsource = "s"\npackage = "a"\nurls = ["b"]', "set either `package` or `urls`"),
        ('what = "w"\nsource = "s"\npackage = "a"\nversions = ["1.0"]', "such as"),
        ('what = "w"\npackage = "a"', "source"),
    ],
)
def test_incomplete_advisory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    (tmp_path / "recipes/comfyui").mkdir(parents=True)
    (tmp_path / "recipes/comfyui/known-bad.toml").write_text(f"[[advisory]]\n{text}\n")
    monkeypatch.setattr(files, "CHECKOUT", tmp_path)
    with raises("config", match=said):
        advisory.advisories()
