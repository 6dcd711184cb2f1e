"""The docs are correct: the reference and schema are current, examples parse, links resolve."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from invoke.parser import Parser
from invoke.parser.context import ParserContext

import tasks
from core import errors, files
from core.manifest import Manifest
from docs import generate
from docs.kernels import PAGE, merged
from tests import plans

REFERENCE = generate.PAGE.read_text()
PAGES = [*files.CHECKOUT.glob("*.md"), *(files.CHECKOUT / "docs").rglob("*.md")]
README = (files.CHECKOUT / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(tasks.ns.task_names))
def test_every_task_is_in_the_reference_with_its_flags(name: str) -> None:
    section = REFERENCE.partition(f"### {name}\n")[2].partition("\n##")[0]
    assert tasks.ns[name].__doc__.partition("\n")[0] in section
    for argument in generate.contexts()[name].args.values():
        assert argument.help, f"{argument.name} has no help"
        flag = argument.names[0]
        assert f"`--{flag}" in section or f"`{flag.upper()}`" in section, flag
        if isinstance(argument.default, str) and argument.default:
            assert argument.help.endswith(f"(default: {argument.default})")


def test_reference_is_up_to_date() -> None:
    """To update it: python -m docs.generate."""
    assert generate.render() == REFERENCE
    assert generate.configuration() == generate.CONFIGURATION.read_text()


def test_every_variable_is_in_the_reference() -> None:
    page = (files.CHECKOUT / "docs/reference/environment.md").read_text()
    sources = (
        path.read_text()
        for folder in ("core", "kernels", "lock", "deploy", "ops", "gateway")
        for path in _python(folder)
    )
    used = {name for text in sources for name in re.findall(r"environ(?:\.get\(|\[)\"(HEARTH_\w+)\"", text)}
    assert used == set(re.findall(r"`(HEARTH_\w+)`", page))


def _python(folder: str) -> Iterator[Path]:
    yield from (files.CHECKOUT / folder).rglob("*.py")


def parsed(words: list[str]) -> ParserContext:
    """What invoke understands of a command with one task."""
    known = [each for each in generate.contexts().values() if words[0] in (each.name, *each.aliases)]
    (found,) = Parser(contexts=known).parse_argv(words)  # copies each context that it gets: of 60, give it one
    return found


@pytest.mark.parametrize("name", sorted(tasks.ns.task_names))
def test_every_task_has_examples_that_invoke_understands(name: str) -> None:
    lines = str(inspect.getdoc(tasks.ns[name])).splitlines()
    assert not [line for line in lines if line.startswith("inv ")], "an example that is not indented"
    examples = [shlex.split(line, comments=True) for line in lines if line.startswith("    inv ")]
    assert examples
    for _, *words in examples:
        assert parsed(words).name == name


def test_every_error_has_its_own_exit_code_and_is_in_the_reference() -> None:
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, errors.HearthError)]
    codes = [each.exit_code for each in classes]
    assert len(codes) == len(set(codes))
    for code in codes:
        assert re.search(rf"^\| {code} \|", REFERENCE, re.MULTILINE), code
    for each in classes:
        for kind in each.kinds:
            assert f"| {each.exit_code} | `{kind}` |" in REFERENCE


def test_manifest_schema_is_up_to_date() -> None:
    """To update it: python -m tests.unit.test_docs."""
    assert (files.CHECKOUT / "docs/reference/manifest.schema.json").read_text() == schema()


def schema() -> str:
    found = msgspec.json.schema(Manifest)
    for each in found["$defs"].values():  # Python 3.13 removes the indentation of docstrings itself
        each["description"] = inspect.cleandoc(each["description"])
    return json.dumps(found, indent=2) + "\n"


def commands(text: str) -> Iterator[list[str]]:
    """Every `inv` command in the code blocks of a page, as words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```|^((?: {4}[^\n]*\n)+)", text, re.DOTALL | re.MULTILINE)
    lines = "".join(fenced or indented for fenced, indented in blocks).splitlines()
    for part in itertools.chain.from_iterable(re.split(r"; |&& |\|\|? ", line) for line in lines):
        if found := re.fullmatch(r"\s*(?:.*\buv run )?inv (.*)", part):
            yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_can_be_typed(page: Path) -> None:
    for words in commands(page.read_text()):
        if words[:1] in (["--list"], ["--print-completion-script"]):  # invoke's own flags
            continue
        assert parsed(words).name in generate.contexts()


def test_commands_of_pages_are_found() -> None:
    assert ["deploy", "--host", "spark", "--dry-run"] in [*commands(README)]
    assert ["secret", "set", "HF_TOKEN", "--host", "spark", "--keyring"] in [
        *commands((files.CHECKOUT / "docs/how-to/secrets.md").read_text())
    ]


def test_the_readme_is_short_and_ci_runs_its_test_command() -> None:
    """tests/host/test_readme.py runs the commands themselves."""
    assert len(README.split()) <= 700
    found = re.search(r"^## Test\n\n```bash\n(.+)\n```", README, re.MULTILINE)
    assert found
    assert (files.CHECKOUT / ".ci/run").read_text().endswith(f"\n{found[1]}\n")


def test_every_page_is_on_the_site() -> None:
    """`nox -s docs` checks the links between them."""
    listed = re.findall(r"[\w/.-]+\.md$", (files.CHECKOUT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(
        str(page.relative_to(files.CHECKOUT / "docs")) for page in PAGES if page.is_relative_to(files.CHECKOUT / "docs")
    )


def test_the_table_of_wheels_is_written_from_their_manifests() -> None:
    """Rows of wheels that are not in the wheelhouse stay; the next tables are not touched."""
    text = PAGE.read_text()
    stable = plans.wheel("sageattention", file="s-1-cp310-abi3-x.whl", python="", arch="8.9;12.0", torch=">=2.9")
    stable = msgspec.structs.replace(stable, version="1+x", inputs={"stack": ["cu130", "2.99"]})
    once = merged(text, [stable])
    (added,) = {*once.splitlines()} - {*text.splitlines()}
    assert added.startswith("| sageattention 1 | 8.9 and 12.0 | cu130, torch 2.99 | 3.10 or newer, aarch64 |")
    assert {*text.splitlines()} < {*once.splitlines()}
    changed = merged(once, [msgspec.structs.replace(stable, size=5_000_000)])
    assert len(changed.splitlines()) == len(once.splitlines())
    assert "5.0 MB" in changed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for name in re.findall(
        r"`((?:agent|bench|config|core|deploy|docs|kernels|lock|ops|recipes|tests)/[\w./-]+\.\w+)`", text
    ):
        mine = name == "config/hosts.toml" or "NAME" in name  # the user's own
        assert mine or (files.CHECKOUT / name).exists(), name


if __name__ == "__main__":
    (files.CHECKOUT / "docs/reference/manifest.schema.json").write_text(schema())
