"""requirements.txt and pyproject.toml of unknown authors: read as pip reads them, and nothing else of the machine."""

from __future__ import annotations

import codecs
import os
import random
import re
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from pip._internal.exceptions import PipError
from pip._internal.network.session import PipSession
from pip._internal.req.constructors import install_req_from_line
from pip._internal.req.req_file import parse_requirements

from core.errors import HearthError
from lock import nodes, requirement_files, requirements
from tests.errors import raises

SHA = "0" * 64


def write(tree: Path, **contents: str | bytes) -> Path:
    """Write files such as `sub__base_txt`."""
    for name, content in contents.items():
        path = tree / name.replace("__", "/").replace("_txt", ".txt").replace("_toml", ".toml")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tree


def by_pip(tree: Path) -> tuple[list[str], list[str]] | None:
    """Requirements and constraints by pip's own parser; None if it rejects the file."""
    try:
        parsed = list(parse_requirements(str(tree / "requirements.txt"), PipSession()))
    except (PipError, UnicodeError, LookupError):
        return None
    required, limited = (
        [each.requirement.strip() for each in parsed if each.constraint is kind] for kind in (False, True)
    )
    return required, limited


def by_us(tree: Path) -> tuple[list[str], list[str]] | None:
    try:
        found = requirement_files.read(tree)
    except HearthError as error:
        assert error.kind == "config"
        assert error.cause
        assert error.hint
        return None
    return found.requirements, found.constraints


FILES: dict[str, str | bytes] = {
    "BOM of UTF-8": codecs.BOM_UTF8 + b"colour\n",
    "BOM of UTF-16, as PowerShell writes it": "colour\r\nsix>=1\r\n".encode("utf-16"),
    "UTF-16 BE": codecs.BOM_UTF16_BE + "colour\n".encode("utf-16-be"),
    "UTF-32": "colour\n".encode("utf-32"),
    "PEP 263": "# -*- coding: latin-1 -*-\n# für Bilder\nsix".encode("latin-1"),
    "PEP 263 in line 2": "#!x\n# vim: set fileencoding=cp1252 :\nsix # ä".encode("cp1252"),
    "PEP 263, unknown": b"# coding: nothing\nsix",
    "PEP 263, wrong": b"# coding: ascii\nsix # \xe9",
    "PEP 263, no encoding of text": b"# coding: zlib\nsix",
    "UTF-8": "six # Größe\n",
    "continued": "ftfy \\\n  >=6.0\nsix",
    "continued comment": "# a \\\nsix\nftfy # b \\\n>=6\nlark",
    "continued into a comment": "ftfy \\\n# b\n>=6",
    "continued at the end": "six\\",
    "several backslashes": "six\\\\\n\\>=1\\\nlark",
    "CRLF": "six\r\n\r\nlark \\\r\n >=1\r\n",
    "other line breaks": "six\vlark\x0cftfy\x85einops\u2028numpy",
    "tabs": "six\t# a\n\tlark\nftfy#not-a-comment",
    "hashes": f"six==1 --hash=sha256:{SHA} --hash=sha512:1\nlark==1 \\\n    --hash=sha256:1 \\\n    --hash sha256:2",
    "no hash": "six==1 --hash=md5:00",
    "options": "--extra-index-url https://a/simple\n-i https://b\n-f c --pre\n--no-binary :all:\n--pypi-url=https://d\nsix",
    "abbreviated": "--extra https://a/simple\n--require-h\nsix",
    "ambiguous": "--no https://a\nsix",
    "unknown option": "--frobnicate\nsix",
    "unknown option of a requirement": "six -x",
    "value missing": "six\n-r",
    "open quote": "six --hash='sha",
    "settings of a build": "six --config-settings=x=y",
    "included": "-r base.txt\n--requirement=sub/more.txt\nsix",
    "included twice": "-r base.txt -r sub/more.txt\nsix\n-c base.txt",
    "constraints": "-c limits.txt\nsix",
    "included and constraints": "-c limits.txt -r base.txt",
    "beside a requirement": "six -r base.txt",
    "missing": "-r nothing.txt",
    "editable": "-e .\n-e git+https://x/y#egg=z\n--editable=./sub\nsix -e .",
    "address": f"https://x/six-1-py3-none-any.whl#sha256={SHA}\nlark @ https://x/y.whl ; sys_platform == 'win32'",
    "marker": "six ; python_version < '4' # why\nlark; sys_platform == \"win32\"",
    "marker with an option's look": "six ; sys_platform == '-x'",
    "empty": "",
    "line ends of old Macs": "six\rlark\rftfy",
    "NUL": b"six\0\nlark",
    "two BOMs": codecs.BOM_UTF8 * 2 + b"six\n",
    "BOM and PEP 263": codecs.BOM_UTF8 + b"# coding: latin-1\nsix # \xc3\xa4",
    "UTF-16 without BOM": "six\nlark\n".encode("utf-16-le"),
    "PEP 263 with CRLF": b"# -*- coding: cp1252 -*-\r\nsix # \x80\r\n",
    "quoted file": '-r "base.txt"\nsix',
    "no space before the file": "-rbase.txt\n-climits.txt",
    "short option with =": "-r=base.txt\nsix",
    "tab before the file": "-r\tbase.txt",
    "backslash in a path": "-r sub\\more.txt\nsix",
    "comment without a space after a file": "-r base.txt#x\nsix",
    "upper-case option": "-R base.txt",
    "comment between a requirement and its hash": f"six==1 \\\n # c\n --hash=sha256:{SHA}\nlark",
    "hash without a requirement": f"six==1\n--hash=sha256:{SHA}",
    "empty hash": "six==1 --hash=",
    "one hash that is none": f"six==1 --hash=sha256:{SHA} --hash=md5:0",
    "options of pip install": "-U six",
    "options of setup.py": "six --install-option='x'",
    "settings of a build alone": "--config-settings six=1\nsix",
    "packages of a page of links": "--find-links=https://x/whl torch",
    "continued over a blank line": "six \\\n\n>=1",
    "space after a backslash": "six \\ \n>=1",
    "comment that ends with a backslash": "six # \\",
    "another list": "- six=1.0",
    "a web page": "<!DOCTYPE html>\n<html>",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_pip_reads_it(tmp_path: Path, name: str) -> None:
    nested = {
        "base_txt": "-c limits.txt\nbase>=1\n",
        "limits_txt": "numpy<2\n",
        "sub__more_txt": "-r ../base.txt\nmore",
    }
    write(tmp_path, **nested, requirements_txt=FILES[name])
    wanted = by_pip(tmp_path)
    if wanted:  # pip repeats a file that is included twice
        wanted = list(dict.fromkeys(wanted[0])), list(dict.fromkeys(wanted[1]))
    assert by_us(tmp_path) == wanted


PIECES = [
    *("six", "lark>=1", "numpy<2,>1", "a[b]", "x @ https://y/z.whl", "; sys_platform == 'win32'", "#", "# c", "\\"),
    *(
        " ",
        " ",
        "\n",
        "\n",
        "\n",
        "\t",
        "\r\n",
        "-r base.txt",
        "-c base.txt",
        "-e .",
        "-i https://x",
        "--pre",
        "--hash",
    ),
    *(f"--hash=sha256:{SHA}", "--extra-index-url", "'", '"', "=", "-", "--no-index", "é", "\x0b", "--bad", "\\\n"),
]


def test_random_files_are_read_as_pip_reads_them(tmp_path: Path) -> None:
    choice = random.Random(os.environ["HEARTH_SEED"])
    write(tmp_path, base_txt="base==1\n")
    accepted = 0
    for _ in range(400):
        text = "".join(choice.choices(PIECES, k=choice.randint(1, 14)))
        write(tmp_path, requirements_txt=text)
        wanted, found = by_pip(tmp_path), by_us(tmp_path)
        if wanted and text.count("base.txt") > 1:
            continue
        if wanted and found:  # the hash of an address is in the address
            found = [re.sub(f"[#&]sha256={SHA}", "", each) for each in found[0]], found[1]
        assert found == wanted, repr(text)
        accepted += wanted is not None
    assert accepted > 100


LINES = [
    *(
        "six\t>=1",
        "a[b,c]>=1 ; python_version >= '3.8'",
        "a (>=1,<2)",
        "a>=1,",
        "a;",
        "a.b===weird",
        "a ; os.name == 'posix'",
    ),
    *(
        "a=1",
        "a 1",
        "a~=1",
        "a^1",
        "a[b",
        "'a'",
        "a>=1.*",
        "_a",
        "pip install a",
        "six\u00a0>=1",
        "six\u200b",
        "\ufeffsix",
    ),
    *("https://x/A_b-1.0-py3-none-any.whl", "https://x/a-1.0-py3-none-any.whl?x=1", "HTTPS://x/a-1.0-py3-none-any.whl"),
    *("https://x/a-1-py3-none-any.whl; sys_platform == 'win32'", "https://x/a-1%2Bcu1-py3-none-any.whl#md5=00"),
    *(f"https://x/a-1.zip#subdirectory=b&egg=a&sha256={SHA}", f"a[b] @ https://x/a-1.zip#sha256={SHA}&subdirectory=c"),
    *(
        "a@https://x/a-1-py3-none-any.whl",
        "a @ git+https://x/y.git@main ; sys_platform == 'linux'",
        "https://x/b.zip#egg=a",
    ),
    *("a @ https://x/a-1-py3-none-any.whl;sys_platform=='win32'", "a ; python_version>'3' or sys_platform=='win32'"),
    *("a==1!2.0", "a==1.*,!=1.5.*", "a>=1,,<2", "a lark", "a > = 1", "a==1.0+cu118", "a ; (python_version > '3'"),
    *("./wheels/a-1-py3-none-any.whl", "wheels/a-1-py3-none-any.whl ; sys_platform == 'win32'"),
    "file:///wheels/a-1-py3-none-any.whl",
]


@pytest.mark.parametrize("line", LINES)
def test_a_requirement_means_what_it_means_to_pip(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, wheels__x_txt=""))
    (tmp_path / "wheels/a-1-py3-none-any.whl").touch()
    found = requirements.parsed(line)
    try:
        wanted = install_req_from_line(line)
    except PipError:
        assert found is None
        return
    assert found
    assert wanted.name
    assert canonicalize_name(found.name) == canonicalize_name(wanted.name)
    assert (found.extras, str(found.marker or "")) == (wanted.extras, str(wanted.markers or ""))
    assert bool(found.url) == bool(wanted.link)
    if wanted.link is None:
        assert wanted.req
        assert str(found.specifier) == str(wanted.req.specifier)
    elif wanted.link.scheme != "file":
        assert found.url == wanted.link.url


def test_only_addresses_of_servers_go_to_uv() -> None:
    for line in ("./wheels/a-1-py3-none-any.whl", "a @ file:///wheels/a-1-py3-none-any.whl"):
        with raises("config"):
            requirements.plain(line)
    assert requirements.plain("a @ https://x/a-1-py3-none-any.whl")


def test_a_wheel_of_the_tree_for_windows_does_not_matter() -> None:
    lines = ["./wheels/a-1-cp312-cp312-win_amd64.whl ; sys_platform == 'win32'"]
    assert requirements.pinnable("mine", lines, nodes.Catalogue()) == []
    with raises("config", match="not a wheel that a hash pins"):
        requirements.pinnable("mine", ["./wheels/a-1-py3-none-any.whl"], nodes.Catalogue())


def test_a_source_archive_is_named_after_its_package() -> None:
    for address in ("https://x/foo_bar-1.0.tar.gz", "https://x/foo-bar-1.0.zip?a#sha256=0"):
        found = requirements.parsed(address)
        assert found
        assert found.name == "foo-bar"


def test_other_encodings_are_latin_1(tmp_path: Path) -> None:
    write(tmp_path, requirements_txt="# für Bilder\ncolour\n".encode("latin-1"))
    assert requirement_files.read(tmp_path).requirements == ["colour"]


def test_the_hash_of_an_address_becomes_a_part_of_it(tmp_path: Path) -> None:
    lines = [
        f"a @ https://x/a.whl --hash=sha256:{SHA}",
        f"a @ https://x/a.whl ; python_version > '3' --hash=sha256:{SHA}",
        f"https://x/a.whl#egg=a --hash=sha256:{SHA} --hash=sha512:00",
        f"a @ https://x/a.whl --hash=sha256:{SHA} --hash=sha256:{'1' * 64}",
        f"a==1 --hash=sha256:{SHA}",
    ]
    write(tmp_path, requirements_txt="\n".join(lines))
    assert requirement_files.read(tmp_path).requirements == [
        f"a @ https://x/a.whl#sha256={SHA}",
        f"a @ https://x/a.whl#sha256={SHA} ; python_version > '3'",
        f"https://x/a.whl#egg=a&sha256={SHA}",
        "a @ https://x/a.whl",
        "a==1",
    ]


def test_options_that_have_no_effect_are_listed(tmp_path: Path) -> None:
    write(tmp_path, requirements_txt="--extra-index-url https://a/simple\nsix\n--pre\n")
    found = requirement_files.read(tmp_path)
    assert (found.requirements, found.ignored) == (["six"], ["--extra-index-url https://a/simple", "--pre"])


@pytest.mark.parametrize(
    "line",
    ["-r /etc/passwd", "-r ../other.txt", "-r sub/../../x", "-r https://x/y.txt", "-r file:///etc/passwd", "-r 'a\tb'"],
)
def test_nothing_outside_the_tree_is_read(tmp_path: Path, line: str) -> None:
    write(tmp_path, other_txt="six", tree__requirements_txt=line)
    with raises("config", match="of the same tree"):
        requirement_files.read(tmp_path / "tree")


def test_special_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path, requirements_txt="-r sub", sub__x_txt="six")
    with raises("unsafe-tree", match="sub is not a regular file"):
        requirement_files.read(tmp_path)
    (tmp_path / "requirements.txt").unlink()
    os.mkfifo(tmp_path / "requirements.txt")
    with raises("unsafe-tree", match=r"requirements\.txt is not a regular file"):
        requirement_files.read(tmp_path)
    (tmp_path / "requirements.txt").unlink()
    write(tmp_path, requirements_txt="six\n" * 100_000)
    with raises("unsafe-tree", match=r"requirements\.txt is larger than 256 kB"):
        requirement_files.read(tmp_path)


def test_no_variable_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    write(tmp_path, requirements_txt="a @ https://${SECRET}/a.whl\n-r ${SECRET}.txt")
    with raises("config", match=r"\$\{SECRET\}\.txt"):
        requirement_files.read(tmp_path)


def test_inclusion_is_finite(tmp_path: Path) -> None:
    write(tmp_path, requirements_txt="-r base.txt\n-r base.txt\nsix", base_txt="-r requirements.txt\nlark")
    assert requirement_files.read(tmp_path).requirements == ["lark", "six"]
    for number in range(60):
        write(tmp_path, **{f"f{number}_txt": f"-r f{number + 1}.txt\n" * 2})
    write(tmp_path, requirements_txt="-r f0.txt")
    with raises("config", match="up to 50 files"):
        requirement_files.read(tmp_path)


def test_hostile_text_ends_in_time(tmp_path: Path) -> None:
    for text in ("a" + " " * 250_000 + "b\\", "-r x\n" * 40_000, "a " * 120_000, "-" * 250_000, "\\\n" * 120_000):
        write(tmp_path, requirements_txt=text, x_txt="six")
        by_us(tmp_path)
    write(tmp_path, requirements_txt=b"# coding: punycode\na-" + b"b9" * 100_000)
    with raises("config", match="punycode"):
        requirement_files.read(tmp_path)


SETUPTOOLS = (
    '[project]\ndynamic = ["version", "dependencies"]\n[tool.setuptools.dynamic]\ndependencies = {{ file = {} }}'
)
HATCH = '[project]\ndynamic = ["dependencies"]\n[tool.hatch.metadata.hooks.requirements_txt]\nfiles = ["sub/deps.txt"]'


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[project]\ndependencies = ["one", "two>1"]', ["one", "two>1"]),
        ('\ufeff[project]\ndependencies = ["one"]', ["one"]),
        ('[project]\nname = "x"', []),
        ("[tool.black]", []),
        ('[tool.poetry.dependencies]\npython = "^3.9"', []),
        ('[project]\ndependencies = ["one"]\n[tool.poetry.dependencies]\none = {source = "a"}', ["one"]),
        ("[tool]\npoetry = 1\nflit = [1]", []),
        (SETUPTOOLS.format('"sub/deps.txt"'), ["dep>=1"]),
        (SETUPTOOLS.format('["sub/deps.txt", "more.txt"]'), ["dep>=1", "more"]),
        (HATCH, ["dep>=1"]),
        (HATCH.replace('files = ["sub/deps.txt"]', 'filename = "sub/deps.txt"'), ["dep>=1"]),
    ],
)
def test_dependencies_of_a_project(tmp_path: Path, text: str, wanted: list[str]) -> None:
    write(tmp_path, pyproject_toml=text, sub__deps_txt=codecs.BOM_UTF8 + b"dep>=1 # why\n", more_txt="more")
    assert requirement_files.read(tmp_path).requirements == wanted


@pytest.mark.parametrize(
    "text",
    [
        *("project = 1", "[project\n", "a = " + "[" * 20_000, "[project]\nname = " + "9" * 5_000),
        *('[project]\ndependencies = "einops"', "[project]\ndependencies = 3", "[project]\ndependencies = [1]"),
        *('[project]\ndynamic = ["dependencies"]', '[project]\ndynamic = "dependencies"'),
        *(SETUPTOOLS.format('"none.txt"'), SETUPTOOLS.format('"../x.txt"'), SETUPTOOLS.format('{ attr = "a.b" }')),
        *(SETUPTOOLS.format("3"), SETUPTOOLS.format("[]"), SETUPTOOLS.format("[1]"), SETUPTOOLS.format("true")),
        *('[tool.poetry.dependencies]\npython = "^3.9"\nsix = "^1"', '[tool.flit.metadata]\nrequires = ["six"]'),
        "[project]\ndependencies = ['\udcef']",
    ],
)
def test_dependencies_that_cannot_be_read_are_not_lost(tmp_path: Path, text: str) -> None:
    write(tmp_path, pyproject_toml=text.encode(errors="surrogateescape"))
    (tmp_path.parent / "x.txt").write_text("six")
    if "udcef" in ascii(text):  # replaced; no requirement, which `pinnable` says
        assert requirement_files.read(tmp_path).requirements == ["\ufffd"]
    else:
        with raises("config", match="extra"):
            requirement_files.read(tmp_path)
