"""Runs uv, pip, git and compilers with an allow-list of environment variables: user settings do not change results."""

from __future__ import annotations

import fnmatch
import os
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

import tomli

from agent.schema.uv import index_settings
from core import shell, workspace
from core.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from core.shell import Done

# Paths, the user and the network: every program needs them.
_COMMON = """
PATH HOME USER LOGNAME TZ TMPDIR XDG_* NETRC SSL_* CURL_CA_BUNDLE NIX_SSL_CERT_FILE
HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy
"""

# Indexes, credentials, certificates, the network, the cache and Pythons. Nothing that selects packages or the place
# of an installation.
_UV = """
UV_INDEX* UV_DEFAULT_INDEX UV_EXTRA_INDEX_URL UV_KEYRING_PROVIDER UV_CREDENTIALS_DIR UV_NATIVE_TLS UV_SYSTEM_CERTS
UV_INSECURE_HOST UV_HTTP_* UV_REQUEST_TIMEOUT UV_OFFLINE UV_CONCURRENT_* UV_CACHE_DIR
UV_PYTHON UV_PYTHON_DOWNLOADS UV_PYTHON_INSTALL_* LANG LC_*
"""

# The same for pip, with its configuration file, which may name the index.
_PIP = """
PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX PIP_TRUSTED_HOST PIP_*CERT PIP_PROXY PIP_*TIMEOUT
PIP_RETRIES PIP_KEYRING_PROVIDER PIP_CACHE_DIR PIP_CONFIG_FILE REQUESTS_CA_BUNDLE LANG LC_*
"""

# Identity, access to servers, and the user's configuration, which names mirrors, proxies and credentials. Settings
# that change a file's bytes have no effect, because `core.source` checks nothing out.
_GIT = """
GIT_SSH* GIT_SSL_* GIT_PROXY_* GIT_ASKPASS SSH_* KRB5* GNUPGHOME DISPLAY WAYLAND_DISPLAY DBUS_SESSION_BUS_ADDRESS
GIT_CONFIG_GLOBAL GIT_CONFIG_SYSTEM GIT_CONFIG_NOSYSTEM GIT_CONFIG_COUNT GIT_CONFIG_KEY_* GIT_CONFIG_VALUE_*
"""

# The places of a compiler launcher's cache. Its settings that could return an object of another compile are in _BUILD.
_LAUNCHER = """
CCACHE_DIR CCACHE_CONFIGPATH CCACHE_REMOTE_* CCACHE_SECONDARY_STORAGE CCACHE_RESHARE CCACHE_MAXSIZE CCACHE_MAXFILES
CCACHE_TEMPDIR CCACHE_READONLY* CCACHE_RECACHE CCACHE_DISABLE CCACHE_DEBUG* CCACHE_LOGFILE CCACHE_STATS* SCCACHE_*
"""

# Messages are in English, __DATE__ is constant, and ccache compares everything, whatever its configuration file says,
# except the working directory: it takes -gencode for a debug flag, and no object contains a path of this machine.
_BUILD = {
    "LANG": "C",
    "LC_ALL": "C",
    "SOURCE_DATE_EPOCH": "315532800",
    "CCACHE_COMPILERCHECK": "content",
    "CCACHE_NOHASHDIR": "true",
    **dict.fromkeys(("CCACHE_COMPILER", "CCACHE_PREFIX", "CCACHE_SLOPPINESS", "CCACHE_IGNOREOPTIONS"), ""),
    **dict.fromkeys(("CCACHE_IGNOREHEADERS", "CCACHE_EXTRAFILES"), ""),
    **dict.fromkeys(("CCACHE_PATH", "CCACHE_PREFIX_CPP", "CCACHE_BASEDIR"), ""),  # other programs, other paths
    "CCACHE_COMPILERTYPE": "auto",
    "CCACHE_NODEPEND": "true",  # our dependency files leave out system headers
    "CCACHE_NOHARDLINK": "true",  # a later compile would write through the link, into ccache's own copy
}

# Git starts no programs except transports, changes no byte of a patch, and stores one pack instead of a file for each
# object, which is a third of the work. Large files are streamed.
_SETTINGS = """
core.hooksPath=/dev/null init.templateDir= core.fsmonitor=false core.symlinks=false core.autocrlf=false
core.attributesFile=/dev/null apply.ignoreWhitespace=no fetch.recurseSubmodules=false log.showSignature=false
transfer.unpackLimit=1 core.bigFileThreshold=20m
"""


def git(
    *words: str | Path,
    cwd: Path | None = None,
    check: bool = True,
    input_text: str | None = None,
    output: IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
) -> Done:
    """Run git as `shell.run` does, with `env` in addition to the allowed variables.

    Git never prompts, and uses only file, https and ssh. Put untrusted operands behind `--`.
    """
    passed = _passed(_COMMON + _GIT)
    before = int(passed.get("GIT_CONFIG_COUNT") or 0)  # what comes later wins
    settings = [each.partition("=") for each in _SETTINGS.split()]
    for number, (name, _, value) in enumerate(settings, before):
        passed |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    passed["GIT_CONFIG_COUNT"] = str(before + len(settings))
    passed["GIT_TERMINAL_PROMPT"] = "0"
    passed["GIT_ALLOW_PROTOCOL"] = "file:https:ssh"  # nothing unprotected, no helper that runs commands (ext::)
    passed["LC_ALL"] = "C"  # `core.source` reads its messages
    env = {**passed, **(env or {})}
    program = shell.find("git")
    limited = ["/bin/sh", "-c", f'ulimit -f {LARGEST_FILE // 512}; exec "$0" "$@"', program]
    return shell.run(
        [*limited, *words], cwd=cwd, env=env, inherit=False, check=check, input_text=input_text, output=output
    )


LARGEST_FILE = 4_000_000_000
"""Maximum bytes of a file that git writes: a server may send any number, and a small pack may hold huge files."""


def uv(*words: str | Path, cwd: Path | None = None, check: bool = True, input_text: str | None = None) -> Done:
    """Run uv as `shell.run` does, without configuration files except for their indexes and certificates."""
    env = {**_configured(), **_passed(_COMMON + _UV)}
    return shell.run(["uv", "--no-config", *words], cwd=cwd, env=env, inherit=False, check=check, input_text=input_text)


def pip(*words: str | Path) -> Done:
    """Run this environment's pip with the user's index: uv's, else the one in pip's configuration."""
    chosen = ["--index-url", index()] if index() else []
    return shell.run([sys.executable, "-I", "-m", "pip", *words, *chosen], env=_passed(_COMMON + _PIP), inherit=False)


def build_environment() -> dict[str, str]:
    """The environment of compilers, linkers and inspections: no variable that one of them reads, such as CPATH."""
    return _passed(f"PATH HOME TMPDIR {_LAUNCHER}") | _BUILD


def build(
    *argv: str | Path,
    cwd: Path | None = None,
    check: bool = True,
    input_text: str | None = None,
    stdin: IO[str] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> Done:
    """Run a compiler, an interpreter or an inspection as `shell.run` does, with `build_environment` and `env`."""
    env = {**build_environment(), **(env or {})}
    return shell.run(
        argv, cwd=cwd, env=env, inherit=False, check=check, input_text=input_text, stdin=stdin, timeout=timeout
    )


def apt(*argv: str | Path) -> Done:
    """Run Debian's package manager with the network's variables; the result has its status."""
    return shell.run(argv, env=_passed(_COMMON) | {"LC_ALL": "C"}, inherit=False, check=False)


def skopeo(*words: str | Path) -> Done:
    """Run skopeo with the network's variables and those that name a file with logins; the result has its status."""
    return shell.run(
        ["skopeo", *words], env=_passed(f"{_COMMON} REGISTRY_AUTH_FILE DOCKER_CONFIG"), inherit=False, check=False
    )


def index() -> str:
    """The user's package index, as uv would choose it; empty for PyPI."""
    env = {**_configured(), **os.environ}
    return env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL") or ""


def _passed(names: str) -> dict[str, str]:
    if workspace.current().bundled:  # each of these programs would use the network, or files outside the bundle
        raise BundleError("bundle", "the bundle is incomplete", hint="create it again: inv bundle")
    return {name: value for name, value in os.environ.items() if _pattern(names).match(name)}


@cache
def _pattern(names: str) -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, names.split())))


def _configured() -> dict[str, str]:
    """The indexes and certificates of the system's and the user's uv.toml, as uv's variables for them."""
    found: dict[str, str] = {}
    user = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    for place in (Path("/etc/uv/uv.toml"), user / "uv/uv.toml"):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # uv reports errors in it
            found |= index_settings(tomli.loads(place.read_text()))
    return found
