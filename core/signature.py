"""Signatures by SSH keys, which every operator has: made and checked by ssh-keygen (its -Y, OpenSSH 8.2).

Who may sign is listed in an `allowed_signers` file (ssh-keygen(1)), a line a key; a line's `valid-before` ends that,
and so does taking the line out.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core import shell
from core.errors import SignatureError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core.shell import Done

NAMESPACE = "hearth-bundle"
"""What a signature is for: one that the same key made for git or a file counts for nothing here."""

_KEYS = ("id_ed25519", "id_ed25519_sk", "id_ecdsa", "id_ecdsa_sk", "id_rsa")


def own_key() -> Path | None:
    """The key that the operator signs with: $HEARTH_SIGNING_KEY, else the first of ssh's usual ones; None without."""
    if chosen := os.environ.get("HEARTH_SIGNING_KEY"):
        return Path(chosen)
    return next((path for name in _KEYS if (path := Path.home() / ".ssh" / name).exists()), None)


def _keygen(action: str, *words: str | Path, said: str | None = None) -> Done:
    return shell.run(["ssh-keygen", "-Y", action, *words], input_text=said, check=False)


def sign(text: str, key: Path) -> Signed:
    """Sign a text. `key` is a private one, or a public one whose private one ssh-agent has.

    Raises SignatureError.
    """
    done = _keygen("sign", "-n", NAMESPACE, "-f", key, said=text)
    if done.returncode:
        hint = "--sign KEY names another one, --sign none signs nothing; ssh-add unlocks one that has a passphrase"
        raise SignatureError(f"ssh-keygen cannot sign with {key}", cause=done.stderr.strip(), hint=hint)
    return Signed(text, done.stdout)


@dataclass(frozen=True)
class Signed:
    """A text and its signature, which is empty where nobody signed it."""

    text: str
    signature: str

    def key(self) -> str:
        """The kind and fingerprint of the key that signed it; raises SignatureError when none did."""
        with _files(signature=self.signature) as (place,):
            done = _keygen("check-novalidate", "-n", NAMESPACE, "-s", place, said=self.text)
        if done.returncode:
            cause = (done.stderr.strip() or done.stdout.strip()).replace(str(place), "it")
            raise SignatureError("the signature is not one of this content", cause=cause)
        return done.stdout.strip().partition(" with ")[2]

    def signer(self, allowed: str, where: str) -> str:
        """Who signed it, of those that the text of an allowed_signers file lists; `where` names the file in messages.

        Raises SignatureError when nobody of them did.
        """
        hint = f"have one of {where} sign it; or add who did, with the key that they name to you themselves"
        if not self.signature:
            raise SignatureError("it is not signed", cause=f"{where} lists who may sign", hint=hint)
        key = self.key()
        with _files(signature=self.signature, allowed_signers=allowed) as (place, listed):
            done = _keygen("find-principals", "-s", place, "-f", listed)
            for name in done.stdout.splitlines() if not done.returncode else ():
                done = _keygen("verify", "-n", NAMESPACE, "-f", listed, "-I", name, "-s", place, said=self.text)
                if not done.returncode:
                    return name
        cause = (done.stderr.strip() or done.stdout.strip()).replace(str(listed), where)
        raise SignatureError(f"nobody of {where} signed it: its key is {key}", cause=cause, hint=hint)


@contextmanager
def _files(**texts: str) -> Iterator[list[Path]]:
    """Files with these texts, which ssh-keygen takes in no other way."""
    with tempfile.TemporaryDirectory(prefix="hearth-") as folder:
        places = [Path(folder, name) for name in texts]
        for place in places:
            place.write_text(texts[place.name])
        yield places
