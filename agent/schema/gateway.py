"""A gateway as its host reports it, and the answers to changes of its people and its certificate."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.schema.change import Gateway
from agent.schema.facts import Holder
from agent.schema.installed import InstalledGateway


@dataclass(frozen=True)
class Certificate:
    """A certificate."""

    until: str  # the end of its validity, in openssl's words; empty: there is none
    expired: bool
    renew: bool  # it ends soon, or there is none
    uncovered: tuple[str, ...]  # those of the names asked for that it is not for


@dataclass(frozen=True)
class Served(Certificate):
    """The certificate in service."""

    names: tuple[str, ...]  # that the gateway's own one was made for; empty: it is somebody else's


@dataclass(frozen=True)
class Given(Certificate):
    """A file with another certificate for the gateway."""

    same: bool  # it is the one in service


@dataclass(frozen=True)
class Certified(Certificate):
    """The gateway's own certificate, made or renewed where needed."""

    authority: str  # the certificate of its authority, as PEM
    made: bool  # by this request


@dataclass(frozen=True)
class Person:
    """What a person has to log in with."""

    password: bool = False
    tokens: int = 0  # their number


@dataclass(frozen=True)
class Server:
    """A host behind the gateway."""

    name: str
    state: str  # HAProxy's, such as "UP", "DOWN", "DRAIN", "MAINT"
    requests: int  # open ones


@dataclass(frozen=True)
class LogDisk:
    """Where the systemd journal keeps the audit log."""

    persistent: bool  # on a disk
    free: int
    total: int


@dataclass(frozen=True)
class GatewayState:
    """The gateway of a host."""

    installed: InstalledGateway
    active: bool  # its unit runs
    guarded: bool  # its firewall is in force
    people: dict[str, Person]
    certificate: Served
    given: Given | None  # None: not asked for
    holder: Holder  # another program that listens on its port; empty: none
    journal: LogDisk
    servers: tuple[Server, ...]
    previous: Gateway | None  # the step of the release before; None: there is none
    missing: tuple[str, ...]  # programs that are not installed
    kept: bool  # there is anything of it


@dataclass(frozen=True)
class Aside:
    """The answer to a request to send people to another host, or to this one again."""

    done: bool  # false: people would have no other host, and had better wait


@dataclass(frozen=True)
class Login:
    """What `people.json` keeps of a person."""

    password: str = ""  # hashed; empty: none
    tokens: tuple[str, ...] = ()  # hashed


@dataclass(frozen=True)
class CertificateNames:
    """The names that the gateway's own certificate was made for (`names.json`), sorted."""

    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class GatewayBefore:
    """The gateway before a change (`state/gateway-before.json`)."""

    gateway: InstalledGateway = field(default_factory=InstalledGateway)
    release: str = ""  # where its link `current` points; empty: nowhere


@dataclass(frozen=True)
class PersonChanged:
    """The answer to a change of a person."""

    token: str = ""  # a new one, which only the person gets to see
    known: bool = True  # false: there was no such person to remove
