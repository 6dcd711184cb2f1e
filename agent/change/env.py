"""The step that creates the virtual environment."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from agent.change.bytecode import compile_part, take_bytecode
from agent.change.trees import receive_blob
from agent.deletion import remove
from agent.files import AgentError, Note, link, read_text, write
from agent.layout import Layout
from agent.parts import part
from agent.processes import INDEX, dies_with_parent, inherited, run
from agent.schema.change import Env
from agent.schema.uv import index_settings


def _run_long(argv: list[str], env: dict[str, str] | None = None) -> None:
    """Run a program that is killed with the agent, since the resumed run rebuilds or deletes the same part.

    Not for compileall, which ends in seconds: its workers would wait forever for a killed parent.
    """
    run(argv, env, preexec_fn=dies_with_parent())


_NEVER_IMPORTED = ("tests", "test", "docs", "examples", "benchmarks")
"""Folders that packages install at the top level by mistake; many packages install the same ones."""


def _refuse_overwritten(environment: Path) -> None:
    """Raise AgentError if two packages install the same module with different contents: the last one overwrites it."""
    owners: dict[str, tuple[str, str]] = {}
    for record in sorted(environment.glob("lib/python*/site-packages/*.dist-info/RECORD")):
        package = record.parent.name.partition("-")[0].replace("_", "-")
        with record.open(newline="") as file:
            for path, digest, _ in csv.reader(file):
                if path.partition("/")[0] in _NEVER_IMPORTED or not path.endswith((".py", ".so")):
                    continue
                other, held = owners.setdefault(path, (package, digest))
                if held != digest:
                    raise AgentError(
                        "step",
                        f"{other} and {package} both install {path}; one has overwritten the other's",
                        "the order of the installation decides which one remains",
                        f"choose one with [override.{package}] in nodes.toml, then run inv lock",
                    )


_NO_NETWORK = (
    "failed to fetch|error sending request|dns error|connection refused|network is unreachable|timed out"
    "|network connectivity is disabled"
)
_UNTRUSTED = "invalid peer certificate|certificate verify failed"


def _configured(python: str) -> dict[str, str]:
    """Return the index and certificate settings of the system's and the user's uv.toml as uv's variables.

    This is the only way to configure a system service. `python` parses the files: the agent's may lack tomllib.
    """
    code = "import json, sys, tomllib; print(json.dumps(tomllib.load(open(sys.argv[1], 'rb')), default=str))"
    user = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    found: dict[str, str] = {}
    for path in (Path("/etc/uv/uv.toml"), user / "uv/uv.toml"):
        with suppress(AgentError, ValueError, LookupError, TypeError, AttributeError):  # skip a file that uv rejects
            found |= index_settings(json.loads(run([python, "-ISc", code, str(path)]))) if path.exists() else {}
    return found


def env(layout: Layout, step: Env, note: Note) -> None:
    """Create the virtual environment from the locked list and the kernel wheels, with hashes checked.

    Raises AgentError.
    """
    # uv hard-links installed files to its cache. In a shared cache, other users could change a part's files.
    own_cache = str(layout.state / "cache/uv")
    environment = {**_configured(step.python), **inherited(*INDEX)}
    environment |= {"UV_CACHE_DIR": own_cache, "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"}
    # A damaged part may be hard-linked to the cache, which is then damaged, too. And uv does not sync: a power loss
    # may leave empty files in its cache; a kill within the same boot does not.
    boot, used = read_text(Path("/proc/sys/kernel/random/boot_id")), layout.state / "cache-in-use"
    if step.repair or (used.exists() and read_text(used) != boot):
        remove(layout.state / "cache")
    write(used, boot)
    wheels = layout.state / "wheels"
    wheels.mkdir(exist_ok=True)
    for wheel in step.wheels:
        if "/" in wheel.file:
            raise AgentError(
                "step", f"{wheel.file} is not a wheel's file name", "its manifest was altered", "build the wheel again"
            )
        link(wheels / wheel.file, receive_blob(layout, wheel.sha256))
    with part(layout, step.part) as place:
        _install(layout, step, place, wheels, environment)
        _refuse_overwritten(place)
        take_bytecode(layout, step.part, place)
        # Some packages ship templates and tests that Python cannot parse; those are never imported.
        with suppress(AgentError):
            compile_part(layout, step.part, place, step.python)
    used.unlink()  # sealing the part has synced everything
    shutil.rmtree(wheels)


def _install(layout: Layout, step: Env, place: Path, wheels: Path, environment: dict[str, str]) -> None:
    uv = [str(layout.state / "tools" / step.tool), "--no-config"]
    venv = ["venv", "--quiet", "--relocatable", "--no-project", "--python", step.python]
    _run_long([*uv, *venv, str(place)], environment)
    listed = layout.state / f"requirements-{os.getpid()}.txt"
    listed.write_text(step.requirements)
    argv = [*uv, "pip", "sync", "--quiet", "--python", f"{place}/bin/python", "--require-hashes", "--strict"]
    argv += ["--only-binary", ":all:", "--find-links", str(wheels)]
    argv += ["--no-index"] if step.offline else []
    try:
        _run_long([*argv, str(listed)], environment)
    except AgentError as error:
        if not step.offline and re.search(_UNTRUSTED, error.report["cause"], re.IGNORECASE):
            what = "the host does not trust the certificate of the package index, or of a proxy in front of it"
            hint = "on the host: install the CA (update-ca-certificates), and add system-certs = true to "
            hint += "/etc/uv/uv.toml; or deploy from a bundle, which needs no index (inv bundle)"
            raise AgentError("step", what, error.report["cause"], hint) from None
        if not step.offline and re.search(_NO_NETWORK, error.report["cause"], re.IGNORECASE):
            raise AgentError("offline", "the host cannot reach the package index", error.report["cause"]) from None
        raise
    finally:
        listed.unlink()
    if step.inside:
        use_interpreter(place, Path(step.inside))


def use_interpreter(place: Path, python: Path) -> None:
    """Replace an environment's interpreter by the container's."""
    link(place / "bin/python", python)
    config = place / "pyvenv.cfg"
    write(config, re.sub(r"^home = .*", f"home = {python.parent}", config.read_text(), flags=re.MULTILINE))
