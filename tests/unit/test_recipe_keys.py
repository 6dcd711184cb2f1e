"""Keys of a recipe: refused values, and what each changes: the source, the commands, the wheel and its key."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from core import source
from core.stack import find_stack
from kernels import graph, sbom, wheel
from kernels import source as sources
from kernels.listing import summary
from kernels.matrix import Build, Request, select
from kernels.pin import pin
from kernels.recipe import Module, Recipe, find_recipes, for_stack, load_recipe, recipes
from tests.conftest import FIXTURES
from tests.errors import raises
from tests.repositories import repository

pytestmark = pytest.mark.needs("g++")

MODULE = 'kernels = ["csrc/sum.cu"]'


def recipe(place: Path, *edits: tuple[str, str]) -> Path:
    """The tiny recipe, edited."""
    if not (place / "tiny").exists():
        shutil.copytree(FIXTURES / "recipes/tiny", place / "tiny")
    file = place / "tiny/recipe.toml"
    for old, new in edits:
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    return place / "tiny"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('torch = ">=2.6"', 'torch = "2.6 or newer"'),
        ('torch = ">=2.6"', 'cuda = ">12,8"'),
        ('cuda = "<13.0"', 'cuda = "13.0"'),
        ('cuda = "<13.0"', 'profiles = ["smal"]'),
        ('python = ">=3.11"', 'python = "3.11"'),
        ('python = ">=3.11"', 'abi = "abi3"\npython = "!=3.12.0"'),
        ('python = ">=3.11"', 'abi = "abi4"'),
        ('torch = ">=2.6"', "stable_torch = true"),
        ('torch = ">=2.6"', 'stable_torch = true\ntorch = "<3"'),
        (
            "[[modules]]",
            '[[extra]]\nname = "x"\nversion = "1"\ninto = ".."\nsource = [{folder = "src"}]\n\n[[modules]]',
        ),
        ("[[modules]]", '[[extra]]\nname = "x"\nversion = "1"\ninto = ""\nsource = [{folder = "src"}]\n\n[[modules]]'),
        ("[[modules]]", '[[extra]]\nname = "x"\nversion = "1"\ninto = "x"\nsource = [{git = "x"}]\n\n[[modules]]'),
        ("[[modules]]", '[[generate]]\nscript = "../autogen.py"\n\n[[modules]]'),
        ("[[modules]]", '[[generate]]\nscript = "/autogen.py"\n\n[[modules]]'),
        ('headers = "include"', 'headers = "include"\nroot = "../x"'),
        ('folder = "src"', 'folder = "src"\nsubfolder = "x"'),
        ('folder = "src"', f'git = "https://x/y"\ncommit = "{"a" * 40}"\nsubfolder = "../x"'),
        (MODULE, f'{MODULE}\ndefines = ["-DX"]'),
        (MODULE, f'{MODULE}\ndefines = ["X=1\\n"]'),
        (MODULE, f'{MODULE}\ninclude = ["../x"]'),
        (MODULE, f'{MODULE}\nlibraries = ["-lcublas"]'),
        (MODULE, f'{MODULE}\nlibraries = ["../x"]'),
        (MODULE, f'{MODULE}\nflags = {{ nvcc = [""] }}'),
        (MODULE, f'{MODULE}\nflags = {{ gcc = ["-O1"] }}'),
        (MODULE, 'kernels = ["/etc/*.cu"]'),
        (MODULE, 'kernels = ["csrc/**.cu"]'),
        ('files = ["tiny/**/*.py"]', 'files = ["**.py"]'),
        ('"csrc/*.cu" = 2', '"csrc/*.cu" = nan'),
        ('"csrc/*.cu" = 2', '"csrc/*.cu" = -1'),
        (f'bindings = ["csrc/sum.cpp"]\n{MODULE}', ""),
        ('"12.1" = "121a"', '"12.1" = "121a"\n"12.0" = "120a"\n[unsupported]'),
        ('headers = "include"', 'headers = "include/tiny.h"'),
        ('file = "0001-say-which-cuda.patch"', 'file = "."'),
        ('name = "tiny._driver"', 'name = "tiny._sum"'),
    ],
)
def test_a_value_that_is_not_valid_is_refused(tmp_path: Path, old: str, new: str) -> None:
    with raises("config"):
        load_recipe(recipe(tmp_path, (old, new)))


def test_modules_of_one_name_may_have_different_archs(tmp_path: Path) -> None:
    loaded = load_recipe(
        recipe(tmp_path, ('name = "tiny._driver"', 'name = "tiny._sum"'), (MODULE, f'{MODULE}\narchs = ["8.9"]'))
    )
    assert [len(loaded.modules_for(arch)) for arch in ("8.9", "9.0")] == [2, 2]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Build]:
    """The tiny recipe's build for 8.9, edited. The stack's libraries and headers are stand-ins."""
    monkeypatch.setenv("HEARTH_RECIPES", str(tmp_path))
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))

    def make(*edits: tuple[str, str], python: str = "3.11", profile: str = "") -> Build:
        recipe(tmp_path, *edits)
        (found,), _ = select(Request(arch="8.9", kernel="tiny", python=python, profile=profile))
        shutil.copytree(found.recipe.path / "src", graph.root() / found.source_folder, dirs_exist_ok=True)
        libraries = found.toolchain.site / "nvidia/cu13/lib"
        libraries.mkdir(parents=True, exist_ok=True)
        for name in ("libcudart.so", "libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13"):
            (libraries / name).touch()
        return found

    return make


def edges(build: Build) -> dict[str, graph.Edge]:
    return {Path(name).name: edge for name, edge in graph.write([build], {"": 1}).edges.items()}


def test_a_modules_flags_reach_its_files_alone(build: Callable[..., Build]) -> None:
    own = 'defines = ["A=$x y"]\ninclude = ["more"]\nflags = { cxx = ["-g1"], nvcc = ["-lineinfo"] }'
    found = edges(build((MODULE, f"{MODULE}\n{own}")))
    for name, flag in (("sum.cu.o", "-lineinfo"), ("sum.cpp.o", "-g1")):
        flags = found[name].variables["flags"]
        assert f"{flag} '-DA=$$x y'" in flags
        assert "/src/more -I" in flags
    assert "/obj/tiny/_sum/csrc/sum.cu.o" in found["sum.cu.o"].output
    others = " ".join(edge.variables.get("flags", "") for name, edge in found.items() if "scale" in name)
    assert not any(each in others for each in ("-lineinfo", "-g1", "-DA", "more"))


def test_kernels_that_include_python_are_compiled_for_each_version(build: Callable[..., Build]) -> None:
    plain = edges(build())["sum.cu.o"]
    found = build((MODULE, f"{MODULE}\nkernels_include_python = true"))
    edge = edges(found)["sum.cu.o"]
    assert edge.output.startswith(found.python_folder)
    assert f"-isystem {graph._view(found)}/{found.toolchain.python_folder}/include" in edge.variables["flags"]
    assert "-DTORCH_EXTENSION_NAME=_sum" in edge.variables["flags"]
    assert "TORCH_EXTENSION_NAME" not in plain.variables["flags"]


def test_a_new_header_compiles_everything_again(build: Callable[..., Build]) -> None:
    """It may hide one of torch's or CUDA's, which no dependency file names."""
    found = build()
    tree = graph.root() / found.source_folder

    def commands() -> dict[str, str]:
        """What ninja compares, by output."""
        text = graph.write([found], {"": 1}).text.split("\nbuild ")
        return {each.partition(":")[0]: each for each in text[1:]}

    before = commands()
    (tree / "csrc/sum.cu").write_text("// edited")
    assert commands() == before
    (tree / "include/cuda").mkdir(parents=True)
    (tree / "include/cuda/pipeline").touch()
    changed = {name.rpartition(".")[2] for name, each in commands().items() if each != before[name]}
    assert changed == {"o"}
    assert all(name.endswith(".so") for name, each in commands().items() if each == before[name])


@pytest.mark.parametrize("name", ["su m.cu", "su$m.cu", "su'm.cu", "su:m.cu", "süm.cu"])
def test_a_file_name_that_ninja_would_misread_is_refused(build: Callable[..., Build], name: str) -> None:
    found = build((MODULE, 'kernels = ["csrc/s*m.cu"]'))
    (graph.root() / found.source_folder / "csrc/sum.cu").rename(graph.root() / found.source_folder / "csrc" / name)
    (error,) = graph.write([found], {"": 1}).errors.values()
    assert error.kind == "config"
    assert repr(f"csrc/{name}") in error.what


def test_a_file_that_two_patterns_match_is_compiled_once(build: Callable[..., Build]) -> None:
    found = build((MODULE, 'kernels = ["csrc/sum.cu", "csrc/s*m.cu", "**/sum.cu"]'))
    (graph.root() / found.source_folder / "csrc/folder.cu").mkdir()
    link = edges(found)["_sum.so"]
    assert [Path(name).name for name in link.inputs] == ["sum.cu.o", "sum.cpp.o"]


@pytest.mark.parametrize(
    ("python", "works"), [(">=3.11", True), (">=3.12", False), (">=3.8,<3.11", False), ("==3.11.*", True)]
)
def test_a_python_that_the_wheel_would_refuse_is_not_built_for(
    build: Callable[..., Build], python: str, works: bool
) -> None:
    edit = ('python = ">=3.11"', f'python = "{python}"')
    with nullcontext() if works else raises("recipe-support", match=r"Python 3\.11"):
        build(edit)


def test_nvidias_libraries_are_linked_under_their_versioned_names(build: Callable[..., Build]) -> None:
    found = build((MODULE, f'{MODULE}\nlibraries = ["cublas", "cuda"]'))
    libs = edges(found)["_sum.so"].variables["libs"]
    assert "nvidia/cu13/lib -l:libcublas.so.13" in libs
    assert libs.endswith("-lcuda")
    assert found.toolchain.nvidia_library("cublas") == found.toolchain.site / "nvidia/cu13/lib/libcublas.so.13"
    assert found.toolchain.nvidia_library("cud") is None


def test_each_abi_has_its_own_tag_suffix_and_macro(build: Callable[..., Build]) -> None:
    found = build()
    assert (found.python_tag, found.module_file(found.modules[1])) == (
        "cp311-cp311",
        "tiny/_sum.cpython-311-x86_64-linux-gnu.so",
    )
    found = build(('python = ">=3.11"', 'python = ">=3.10,<4"\nabi = "abi3"'))
    assert (found.python_tag, found.module_file(found.modules[1])) == ("cp310-abi3", "tiny/_sum.abi3.so")
    assert "-DPy_LIMITED_API=0x030A0000" in edges(found)["sum.cpp.o"].variables["flags"]
    found = build(('abi = "abi3"', 'abi = "none"'))
    assert (found.python_tag, found.module_file(found.modules[1])) == ("py3-none", "tiny/_sum.so")
    flags = edges(found)["sum.cpp.o"].variables["flags"]
    assert "Py_LIMITED_API" not in flags
    assert f"{found.toolchain.python_folder}/include" not in flags


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('license_files = ["LICENSE"]', 'license_files = ["COPYING"]', "license_files: COPYING"),
        ('license_files = ["LICENSE"]', 'license_files = ["csrc"]', "license_files: csrc"),
        ('files = ["tiny/**/*.py"]', 'files = ["tiny/**/*.py", "tyni/*.py"]', "files: tyni/*.py"),
        ('files = ["tiny/**/*.py"]', 'files = ["tiny/**/*"]', "tiny/_sum.cpython-311-x86_64-linux-gnu.so"),
        ('files = ["tiny/**/*.py"]', 'files = ["**/*"]', "other.dist-info/RECORD"),
    ],
)
def test_files_that_a_wheel_cannot_have_are_an_error(
    build: Callable[..., Build], old: str, new: str, says: str
) -> None:
    found = build((old, new))
    tree = graph.root() / found.source_folder
    (tree / "tiny/_sum.cpython-311-x86_64-linux-gnu.so").touch()
    (tree / "other.dist-info").mkdir()
    (tree / "other.dist-info/RECORD").touch()
    with raises("config") as raised:
        wheel.source_files(found, tree)
    assert says in raised.value.what


def test_a_wheel_for_every_python_and_torch_has_one_key(build: Callable[..., Build]) -> None:
    build(('python = ">=3.11"', 'python = ">=3.10"\nabi = "abi3"\nstable_torch = true'))
    found, _ = select(Request(arch="8.9", kernel="tiny", python="3.11,3.12,3.13"))
    assert [each.wheel_name("linux_x86_64") for each in found] == [
        "tiny-0.1+cu130.sm89.plain-cp310-abi3-linux_x86_64.whl"
    ]
    assert "cp310-abi3" in found[0].identifier
    (other,), _ = select(Request(arch="8.9", kernel="tiny", python="3.13"))
    assert other.key == found[0].key
    assert b"Requires-Dist: torch>=2.6\n" in wheel.metadata(found[0])
    libs = edges(build())["_sum.so"].variables["libs"]
    assert libs.index("-lstdc++ -lgcc_s") < libs.index("-ltorch")  # its versions are recorded, whatever torch exports
    flags = [edge.variables["flags"] for edge in edges(build()).values() if edge.rule != "link"]
    assert all("-DTORCH_TARGET_VERSION=0x0206000000000000" in each for each in flags)


def test_optional_metadata_is_left_out(build: Callable[..., Build]) -> None:
    lines = ("summary", "license", "homepage", "python")
    text, _, _ = (FIXTURES / "recipes/tiny/recipe.toml").read_text().partition("[[source]]")
    found = build(*((f"{line}\n", "") for line in text.splitlines() if line.split(" = ")[0] in lines))
    names = [line.partition(b":")[0] for line in wheel.metadata(found).strip().splitlines()]
    assert names == [b"Metadata-Version", b"Name", b"Version", b"License-File", b"Requires-Dist"]


@pytest.mark.parametrize(
    "edit",
    [
        (MODULE, f"{MODULE}\nkernels_include_python = true"),
        (MODULE, f'{MODULE}\ndefines = ["X"]'),
        (MODULE, f'{MODULE}\ninclude = ["csrc"]'),
        (MODULE, f'{MODULE}\nflags = {{ cxx = ["-g1"] }}'),
        (MODULE, f'{MODULE}\nflags = {{ nvcc = ["-lineinfo"] }}'),
        (MODULE, f'{MODULE}\nlibraries = ["cublas"]'),
        ('python = ">=3.11"', 'python = ">=3.11"\nabi = "abi3"'),
        ('python = ">=3.11"', 'python = ">=3.11"\nabi = "none"'),
        ('torch = ">=2.6"', 'torch = ">=2.6"\nstable_torch = true'),
        ('headers = "include"', 'headers = "include"\nroot = "tiny"'),
        ('[[modules]]\nname = "tiny._scale"', '[[generate]]\nscript = "a.py"\n\n[[modules]]\nname = "tiny._scale"'),
        (
            "[[source]]",
            '[[extra]]\nname = "x"\nversion = "1"\ninto = "x"\nsource = [{folder = "include"}]\n\n[[source]]',
        ),
        ('cuda = "<13.0"', 'profiles = ["plain"]'),
    ],
)
def test_each_key_that_changes_a_byte_is_in_the_builds_key(build: Callable[..., Build], edit: tuple[str, str]) -> None:
    assert build().key != build(edit).key


def test_keys_that_change_no_byte_are_not_in_the_builds_key(build: Callable[..., Build]) -> None:
    before = build()
    after = build(('"csrc/*.cu" = 2', '"csrc/*.cu" = 3'), ('torch = ">=2.6"', 'torch = ">=2.5"\ndefault = false'))
    assert before.key == after.key


def test_an_additional_folder_is_in_the_key_and_the_tree(build: Callable[..., Build], tmp_path: Path) -> None:
    extra = '[[extra]]\nname = "x"\nversion = "1"\ninto = "csrc/x"\nsource = [{folder = "more"}]\n\n[[source]]'
    (tmp_path / "tiny/more").mkdir(parents=True)
    (tmp_path / "tiny/more/x.h").write_text("one")
    shutil.copytree(FIXTURES / "recipes/tiny", tmp_path / "tiny", dirs_exist_ok=True)
    first = build(("[[source]]", extra))
    sources.lay_out(first.recipe, [], tmp_path / "laid")
    assert (tmp_path / "laid/csrc/x/x.h").read_text() == "one"
    assert b'"name": "x"' in sbom.write(first)
    (tmp_path / "tiny/more/x.h").write_text("two")
    assert replace(first).key != first.key


def test_patches_apply_to_their_profiles_and_versions(build: Callable[..., Build]) -> None:
    found = build(('cuda = "<13.0"', 'profiles = ["small"]'))
    small = build(profile="small")
    cu130, cu124 = find_stack("cu130"), find_stack("cu124")
    assert [len(found.recipe.patches_for(cu130, name)) for name in ("plain", "small")] == [0, 1]
    assert found.folder != small.folder
    for versions, expected in (('torch = "<2.7"', [0, 1]), ('cuda = ">=13"', [1, 0])):
        edited = msgspec.structs.replace(
            found.recipe.patches[0], profiles=(), **{versions.split(" = ")[0]: versions.split('"')[1]}
        )
        patched = msgspec.structs.replace(found.recipe, patches=(edited,))
        assert [len(patched.patches_for(each, "plain")) for each in (cu130, cu124)] == expected


def test_two_recipes_of_a_name_share_the_stacks(build: Callable[..., Build], tmp_path: Path) -> None:
    build(('torch = ">=2.6"', 'cuda = ">=13"'))
    shutil.copytree(tmp_path / "tiny", tmp_path / "tiny-older")
    older = tmp_path / "tiny-older/recipe.toml"
    older.write_text(older.read_text().replace('cuda = ">=13"', 'cuda = "<13"'))
    found = find_recipes("tiny")
    assert [for_stack(found, find_stack(name)).path.name for name in ("cu130", "cu124")] == ["tiny", "tiny-older"]
    older.write_text(older.read_text().replace('cuda = "<13"', 'cuda = "<13.1"'))
    with raises("config", match="both build tiny"):
        find_recipes("tiny")
    assert "tiny" not in recipes()


def test_a_recipe_without_default_is_built_only_if_named(build: Callable[..., Build]) -> None:
    build(('torch = ">=2.6"', "default = false"))
    assert "tiny" not in {each.recipe.name for each in select(Request(arch="8.9", python="3.11"))[0]}
    assert select(Request(arch="8.9", python="3.11", kernel="tiny"))[0]


# --- sources ----------------------------------------------------------------------------------------------------------


def loaded(place: Path, text: str) -> Recipe:
    (place / "recipe.toml").write_text(
        f'name = "x"\nversion = "1"\narchs = {{ "8.9" = "89" }}\n{text}\n[[modules]]\nname = "x"\nkernels = ["*.cu"]\n'
    )
    return load_recipe(place)


AUTOGEN = 'import sys\nfor name in sys.argv[1:]: open(f"csrc/{name}.cu", "w").write("// written")\n'


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The source table of a repository with two folders and a script."""
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    content = {"LICENSE": "L", "one/a.cu": "a", "one/csrc/b.cu": "b", "two/c.cu": "c", "one/autogen.py": AUTOGEN}
    commit = repository(tmp_path / "upstream", content)
    return f'git = "file://{tmp_path}/upstream"\ncommit = "{commit}"\n'


def test_pin_writes_the_hashes_of_all_sources_and_scripts(tmp_path: Path, upstream: str) -> None:
    text = f'[[source]] # why\n{upstream}subfolder = "one"\n\n[[extra]]\nname = "e"\nversion = "1"\ninto = "more/e"\n'
    text += f'[[extra.source]]\n{upstream}subfolder = "two"\n\n[[generate]]\nscript = "autogen.py"\nargs = ["g", "h"]\n'
    first = loaded(tmp_path, text)
    assert first.unpinned == ["x", "e", "autogen.py"]
    with raises("unpinned", match="not pinned"):
        sources.lay_out(first, [], tmp_path / "laid")
    found = pin(first)
    assert [each.content for each in found] == [("a.cu", "autogen.py", "csrc/"), ("c.cu",), ()]
    second = load_recipe(tmp_path)
    assert not second.unpinned
    assert "# why" in (tmp_path / "recipe.toml").read_text()
    sources.lay_out(second, [], tmp_path / "laid")
    laid = {str(path.relative_to(tmp_path / "laid")) for path in (tmp_path / "laid").rglob("*") if path.is_file()}
    assert laid == {"a.cu", "autogen.py", "csrc/b.cu", "csrc/g.cu", "csrc/h.cu", "more/e/c.cu"}
    before = (tmp_path / "recipe.toml").read_bytes()
    assert [(each.tree, each.tree == each.before) for each in pin(second)] == [(each.tree, True) for each in found]
    assert (tmp_path / "recipe.toml").read_bytes() == before


def test_a_changed_pin_is_only_replaced_on_request(tmp_path: Path, upstream: str) -> None:
    wrong = loaded(tmp_path, f'tree = "{"0" * 64}"\n[[source]]\n{upstream}')
    with raises("hash-mismatch", match="differs from its pin"):
        pin(wrong)
    assert load_recipe(tmp_path).tree == wrong.tree
    pin(wrong, replace=True)
    assert source.fetch(load_recipe(tmp_path))


@pytest.mark.parametrize(
    ("script", "kind"), [("raise SystemExit('no')", "generate"), ("pass", "generate"), (AUTOGEN, "hash-mismatch")]
)
def test_a_script_that_fails_or_writes_other_files_is_refused(tmp_path: Path, script: str, kind: str) -> None:
    (tmp_path / "src/csrc").mkdir(parents=True)
    (tmp_path / "src/autogen.py").write_text(script)
    text = f'[[source]]\nfolder = "src"\n[[generate]]\nscript = "autogen.py"\nargs = ["g"]\ntree = "{"0" * 64}"'
    with raises(kind):
        sources.lay_out(loaded(tmp_path, text), [], tmp_path / "laid")


def test_a_script_runs_with_the_compilers_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "SECRET_TOKEN", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "src").mkdir()
    script = 'import os\nassert not {"PYTHONPATH", "SECRET_TOKEN"} & {*os.environ}\nopen("a.cu", "w").write("x")\n'
    (tmp_path / "src/autogen.py").write_text(script)
    first = loaded(tmp_path, '[[source]]\nfolder = "src"\n[[generate]]\nscript = "autogen.py"')
    pin(first)
    sources.lay_out(load_recipe(tmp_path), [], tmp_path / "laid")
    assert sorted(path.name for path in (tmp_path / "laid").iterdir()) == ["a.cu", "autogen.py"]


def test_a_script_writes_the_same_files_every_time(tmp_path: Path) -> None:
    """The order of a set of strings depends on a random seed."""
    (tmp_path / "src").mkdir()
    script = "open('a.cu', 'w').write(' '.join({str(number) for number in range(20)}))"
    (tmp_path / "src/autogen.py").write_text(script)
    first = loaded(tmp_path, '[[source]]\nfolder = "src"\n[[generate]]\nscript = "autogen.py"')
    pin(first)
    sources.lay_out(load_recipe(tmp_path), [], tmp_path / "laid")
    assert len((tmp_path / "laid/a.cu").read_text().split()) == 20


def test_an_edited_source_in_the_cache_is_not_built(tmp_path: Path, upstream: str) -> None:
    recipe = loaded(tmp_path, f'tree = ""\n[[source]]\n{upstream}')
    pin(recipe)
    recipe = load_recipe(tmp_path)
    sources.lay_out(recipe, (), tmp_path / "laid")
    (source.fetch(recipe) / "two/c.cu").write_text("edited")
    with raises("hash-mismatch"):
        sources.lay_out(recipe, (), tmp_path / "laid")


@pytest.mark.parametrize("missing", ['subfolder = "three"', ""])
def test_a_source_without_a_wanted_file_is_refused(tmp_path: Path, upstream: str, missing: str) -> None:
    paths = "" if missing else 'paths = ["three"]\n'
    with raises("config", match="has no file in three"):
        pin(loaded(tmp_path, f"{paths}[[source]]\n{upstream}{missing}"))


def test_a_dry_run_says_that_a_source_is_not_pinned(
    tmp_path: Path, upstream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEARTH_RECIPES", str(tmp_path))
    (tmp_path / "x").mkdir()
    loaded(tmp_path / "x", f"[[source]]\n{upstream}")
    ((found,), _) = select(Request(arch="8.9", kernel="x", python="3.11"))
    assert summary([found], [])[0]["key"] is None
    assert str(summary([found], [])[0]["state"]).startswith("not pinned")


def test_a_module_registers_its_name() -> None:
    assert Module(name="a.b").init == "b"
