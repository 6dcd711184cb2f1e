"""SSH signatures, made and checked by ssh-keygen (-Y, OpenSSH 8.2): every operator has an SSH key.

An `allowed_signers` file (ssh-keygen(1)) lists the permitted signers, one key per line. `valid-before` ends a line's
validity by the checking machine's clock, since a signature's own time could be forged by its maker. A line that starts
with `@revoked `, as in a known_hosts file, revokes its key, even if another line lists or certifies it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core import shell
from core.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core.shell import Done

NAMESPACE = "hearth-bundle"
"""The namespace of signatures: signatures of the same key for git or files are not accepted."""

LIMIT = 1_000_000
"""Maximum bytes of an allowed_signers file."""

_KEYS = ("id_ed25519", "id_ed25519_sk", "id_ecdsa", "id_ecdsa_sk", "id_rsa")


def own_key() -> Path | None:
    """The operator's signing key: $HEARTH_SIGNING_KEY, else the first of ssh's default keys, else None."""
    if chosen := os.environ.get("HEARTH_SIGNING_KEY"):
        return Path(chosen)
    return next((path for name in _KEYS if (path := Path.home() / ".ssh" / name).exists()), None)


def _keygen(action: str, *words: str | Path, stdin: str | None = None) -> Done:
    return shell.run(["ssh-keygen", "-Y", action, *words], input_text=stdin, check=False)


def sign(text: str, key: Path) -> Signed:
    """Sign a text with a private key, or with a public key whose private key is in ssh-agent.

    Raises BundleError.
    """
    done = (
        _keygen("sign", "-n", NAMESPACE, "-f", key, stdin=text) if key.is_file() else None
    )  # ssh-keygen would block on a pipe
    if done is None or done.returncode:
        cause = shell.last_words(done) if done else "the file does not exist"
        hint = "use --sign KEY for another key, --sign none for no signature, ssh-add for a key with a passphrase"
        raise BundleError("signature", f"ssh-keygen cannot sign with {key}", cause=cause, hint=hint)
    return Signed(text, done.stdout)


@dataclass(frozen=True)
class Signed:
    """A text and its signature, which is empty for an unsigned text."""

    text: str
    signature: str

    def key(self) -> str:
        """The type and fingerprint of the signing key; raises BundleError for an invalid signature."""
        with _files(signature=self.signature) as (place,):
            done = _keygen("check-novalidate", "-n", NAMESPACE, "-s", place, stdin=self.text)
        if done.returncode:
            cause = shell.last_words(done).replace(str(place), "it")
            raise BundleError("signature", "the signature does not match the content", cause=cause)
        return done.stdout.strip().partition(" with ")[2]

    def signer(self, allowed: str, where: str) -> str:
        """The signer, according to the text of an allowed_signers file; `where` names the file in messages.

        Raises BundleError when no listed signer signed it.
        """
        hint = f"have someone listed in {where} sign it, or add the signer after verifying the key with them"
        if not self.signature:
            raise BundleError("signature", "it is not signed", cause=f"{where} lists who may sign", hint=hint)
        key = self.key()
        valid, revoked = _without_revoked(allowed, where)
        if key.rpartition(" ")[2] in revoked:
            raise BundleError("signature", f"the key that signed it is revoked in {where}: {key}", hint=hint)
        with _files(signature=self.signature, allowed_signers=valid) as (place, listed):
            done = _keygen("find-principals", "-s", place, "-f", listed)
            for name in done.stdout.splitlines() if not done.returncode else ():
                done = _keygen("verify", "-n", NAMESPACE, "-f", listed, "-I", name, "-s", place, stdin=self.text)
                if not done.returncode:
                    return name
        cause = shell.last_words(done).replace(str(listed), where)
        raise BundleError("signature", f"no key in {where} signed it; its key is {key}", cause=cause, hint=hint)


_PUBLIC = re.compile(r"(?<!\S)((?:sk-)?(?:ssh|ecdsa)-[\w@.-]+)[ \t]+([A-Za-z0-9+/]+={0,2})(?!\S)", re.ASCII)


def _without_revoked(allowed: str, where: str) -> tuple[str, set[str]]:
    """The lines of an allowed_signers file without those of revoked keys, and the fingerprints of these keys.

    Raises BundleError for an unknown marker, and for a marker without a key, which would revoke nothing.
    """
    lines = [line.strip("\ufeff \t\r") for line in allowed.split("\n")]
    keys = {line: {_fingerprint(*found) for found in _PUBLIC.findall(line)} for line in lines}
    marked = [line for line in lines if line.startswith("@")]
    for line in marked:
        if line.split()[0] != "@revoked" or not keys[line] or "" in keys[line]:
            hint = "revoke a key by a mark before its line: @revoked anna@example.org ssh-ed25519 AAAA..."
            raise BundleError("signature", f"{where} has an invalid line: {line[:80]!r}", hint=hint)
    revoked = {key for line in marked for key in keys[line]}
    return "".join(f"{line}\n" for line in lines if line not in marked and not keys[line] & revoked), revoked


def _fingerprint(kind: str, encoded: str) -> str:
    """A public key's fingerprint, as ssh-keygen writes it; empty for invalid keys and for certificates."""
    try:
        blob = base64.b64decode(encoded, validate=True)
    except ValueError:
        return ""
    if "-cert-" in kind or not blob.startswith(len(kind).to_bytes(4, "big") + kind.encode()):
        return ""
    return f"SHA256:{base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip('=')}"


@contextmanager
def _files(**texts: str) -> Iterator[list[Path]]:
    """Temporary files with these texts, because ssh-keygen reads only files."""
    with tempfile.TemporaryDirectory(prefix="hearth-") as folder:
        places = [Path(folder, name) for name in texts]
        for place in places:
            place.write_text(texts[place.name], errors="backslashreplace")
        yield places
