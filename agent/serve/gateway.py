"""What a gateway keeps secret on its host: hashed passwords and tokens of people, and the key of its certificate.

Below `gateway/secrets/`, which only root and the gateway's group can open:

    people.json        for each person, the hash of the password and of each token; the next two files follow from it
    users.cfg          the passwords for HAProxy: SHA-512 crypt(3), with a salt for each
    tokens.map         the tokens for HAProxy: SHA-256; tokens have 256 bits, so that hashing slowly would add nothing
    hosts.map          each person's host before the last reload, if there are several
    ca.pem, ca.key     the gateway's own certificate authority, limited to the gateway's names; the key is root's alone
    certificate.pem    the certificate and its key
"""

from __future__ import annotations

import grp
import hashlib
import ipaddress
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from agent.files import AgentError, record, recorded, write
from agent.journal import note_change, now
from agent.layout import Layout
from agent.locks import flock
from agent.processes import run
from agent.schema.gateway import Certificate, CertificateNames, Certified, Login, Person, PersonChanged
from agent.schema.requests import GatewaySecret
from agent.serve.balance import assigned
from agent.serve.systemd import Systemd

GROUP = "hearth-gateway"
AUTHORITY_DAYS, DAYS, RENEW_DAYS = 3650, 397, 30
"""Validity of the authority and of a certificate (browsers refuse more than 398 days), and when it is renewed."""


def gateway(layout: Layout, asked: GatewaySecret) -> Certified | PersonChanged:
    """Carry out a change and return the result. Raises AgentError."""
    action, person, folder = asked.action, asked.person, folder_of(layout)
    folder.mkdir(parents=True, exist_ok=True)
    with flock(folder / "lock", wait=30):
        if action == "certificate":
            return certify(folder, asked.names)
        known = _logins(folder)
        if not re.fullmatch(r"[a-z][a-z0-9._-]{0,31}", person):
            raise AgentError("usage", f"{person!r} is not a user name", "", "use a lower-case letter first, as in anna")
        result, login = PersonChanged(), known.get(person, Login())
        if action == "password":
            known[person] = replace(login, password=_hash(asked.value))
        elif action == "token":
            result = PersonChanged(secrets.token_urlsafe(32))
            digest = hashlib.sha256(result.token.encode()).hexdigest()
            known[person] = replace(login, tokens=(*login.tokens, digest))
        elif action == "remove":
            result = PersonChanged(known=known.pop(person, None) is not None)
        else:
            raise AgentError("usage", f"a gateway has no action {action!r}")
        keep(folder, known)
    _reload(layout)
    note_change(layout, f"gateway {action} {person}", asked.who)
    return result


def people(layout: Layout) -> dict[str, Person]:
    """Return what each person has to log in with. Raises AgentError."""
    known = _logins(folder_of(layout))
    return {name: Person(bool(each.password), len(each.tokens)) for name, each in sorted(known.items())}


def _logins(folder: Path) -> dict[str, Login]:
    return recorded(folder / "people.json", dict[str, Login])


def _reload(layout: Layout) -> None:
    """Let a gateway in service read its people again; open connections stay. Raises AgentError."""
    systemd, unit = Systemd(layout), f"{layout.service}-gateway.service"
    if (systemd.units / unit).exists():
        remember(layout)
        run([*systemd.ctl, "reload-or-restart", unit])


def folder_of(layout: Layout) -> Path:
    """Return the folder of a gateway's secrets."""
    return layout.prefix / "gateway" / "secrets"


def keep(folder: Path, people: dict[str, Login]) -> None:
    """Write the files of people. HAProxy reads them at its next start or reload. Raises OSError."""
    listed = sorted(people.items())
    users = [f"    user {name} password {each.password}" for name, each in listed if each.password]
    tokens = [f"{digest} {name}" for name, each in listed for digest in each.tokens]
    record(folder / "people.json", people, 0o600)
    write(folder / "users.cfg", "\n".join(["userlist people", *users, ""]), 0o640)
    write(folder / "tokens.map", "".join(f"{line}\n" for line in tokens), 0o640)
    share(folder)


def remember(layout: Layout) -> None:
    """Record each person's host for HAProxy's next start or reload. Raises OSError."""
    path, found = folder_of(layout) / "hosts.map", assigned(layout)
    if found or not path.exists():
        write(path, "".join(f"{person} {host}\n" for person, host in sorted(found.items())), 0o640)
    share(path.parent)


def share(folder: Path) -> None:
    """Let the gateway's group read what it needs, if the group exists. Raises OSError."""
    group = -1
    with suppress(KeyError):
        group = grp.getgrnam(GROUP).gr_gid
    folder.chmod(0o750)
    os.chown(folder, -1, group)
    for name in ("users.cfg", "tokens.map", "hosts.map", "certificate.pem"):
        with suppress(FileNotFoundError):
            os.chown(folder / name, -1, group, follow_symlinks=False)


def _hash(password: str) -> str:
    """Return a password's SHA-512 crypt(3) hash. Raises AgentError. The password is on no command line."""
    if not password or re.search(r"[\0\r\n]", password):
        raise AgentError("usage", "the password is empty, or has a line break")
    try:
        words = ["openssl", "passwd", "-6", "-stdin"]
        done = subprocess.run(words, input=password, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        hint = "on the host: apt-get install openssl"
        raise AgentError("step", "openssl could not hash the password", type(error).__name__, hint) from None
    return done.stdout.strip()


# --- certificates --------------------------------------------------------------------------------------------------


def certify(folder: Path, names: Sequence[str]) -> Certified:
    """Make or renew the authority and the certificate for these names; return their state. Raises AgentError.

    The authority may sign for these names only, so whoever trusts it risks nothing else. Other names need a new one,
    which people must trust again.
    """
    listed = folder / "names.json"
    dns, addresses = [each for each in names if not _address(each)], [each for each in names if _address(each)]
    wanted = CertificateNames(tuple(sorted(names)))
    fresh = recorded(listed, CertificateNames, lenient=True) != wanted
    if fresh or not (folder / "ca.pem").exists():
        _make_authority(folder, dns, addresses)
        record(listed, wanted)
        fresh = True
    certificate = folder / "certificate.pem"
    if fresh or not certificate.exists() or _expires_within(certificate, RENEW_DAYS):
        _make_certificate(folder, dns, addresses)
        fresh = True
    share(folder)
    return Certified(**vars(validity(certificate)), authority=(folder / "ca.pem").read_text(), made=fresh)


def validity(certificate: Path, names: Sequence[str] = ()) -> Certificate:
    """Return until when a certificate is valid, and which of the names it is not for."""
    ask = ["openssl", "x509", "-in", str(certificate), "-noout"]
    try:
        until = run([*ask, "-enddate"]).strip().partition("=")[2]
    except AgentError:
        return Certificate("", expired=False, renew=True, uncovered=())
    uncovered = tuple(
        each for each in names if "does match" not in run([*ask, "-checkip" if _address(each) else "-checkhost", each])
    )
    expired, renew = (_expires_within(certificate, days) for days in (0, RENEW_DAYS))
    return Certificate(until, expired, renew, uncovered)


def _expires_within(certificate: Path, days: int) -> bool:
    words = ["openssl", "x509", "-in", str(certificate), "-noout", "-checkend", str(days * 86400)]
    return subprocess.run(words, capture_output=True).returncode != 0


_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]


def _make_authority(folder: Path, dns: Sequence[str], addresses: Sequence[str]) -> None:
    # A kind of name without any constraint would be free: `invalid` is a name that nobody has (RFC 6761).
    limits = [f"permitted;DNS:{each}" for each in dns or ["invalid"]]
    limits += [f"permitted;IP:{each}/{'255.255.255.255' if _address(each) == 4 else 'f' * 4 + ':ffff' * 7}"
               for each in addresses] or ["excluded;IP:0.0.0.0/0.0.0.0", "excluded;IP:::/::"]  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        key, certificate = Path(scratch) / "key", Path(scratch) / "certificate"
        words = ["openssl", "req", "-x509", *_KEY, "-keyout", str(key), "-out", str(certificate)]
        words += ["-days", str(AUTHORITY_DAYS), "-subj", f"/CN=Hearth gateway {now()}"]
        for each in ("basicConstraints=critical,CA:TRUE,pathlen:0", "keyUsage=critical,keyCertSign,cRLSign"):
            words += ["-addext", each]
        run([*words, "-addext", f"nameConstraints=critical,{','.join(limits)}"])
        write(folder / "ca.key", key.read_bytes(), 0o600)
        write(folder / "ca.pem", certificate.read_bytes())


def _make_certificate(folder: Path, dns: Sequence[str], addresses: Sequence[str]) -> None:
    own = ",".join([*(f"DNS:{each}" for each in dns), *(f"IP:{each}" for each in addresses)])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        key, certificate = Path(scratch) / "key", Path(scratch) / "certificate"
        words = ["openssl", "req", "-x509", "-CA", str(folder / "ca.pem"), "-CAkey", str(folder / "ca.key"), *_KEY]
        words += ["-keyout", str(key), "-out", str(certificate), "-days", str(DAYS), "-subj", "/CN=Hearth gateway"]
        for each in ("basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature"):
            words += ["-addext", each]
        run([*words, "-addext", "extendedKeyUsage=serverAuth", "-addext", f"subjectAltName={own}"])
        write(folder / "certificate.pem", certificate.read_bytes() + key.read_bytes(), 0o640)


def _address(name: str) -> int:
    """Return the version of an IP address; 0 for any other name."""
    with suppress(ValueError):
        return ipaddress.ip_address(name).version
    return 0
