"""A gateway as its host reports it, and the answers to changes of its people and its certificate."""

from __future__ import annotations

from dataclasses import field

from agent.schema.change import Gateway
from agent.schema.facts import Holder
from agent.schema.installed import InstalledGateway
from agent.schema.record import Record


class Certificate(Record):
    """A certificate."""

    until: str  # the end of its validity, in openssl's words; empty: there is none
    expired: bool
    renew: bool  # it ends soon, or there is none
    uncovered: tuple[str, ...]  # those of the names asked for that it is not for


class Served(Certificate):
    """The certificate in service."""

    names: tuple[str, ...]  # that the gateway's own one was made for; empty: it is somebody else's


class Given(Certificate):
    """A file with another certificate for the gateway."""

    same: bool  # it is the one in service


class Certified(Certificate):
    """The gateway's own certificate, made or renewed where needed."""

    authority: str  # the certificate of its authority, as PEM
    made: bool  # by this request


class Person(Record):
    """What a person has to log in with."""

    password: bool = False
    tokens: int = 0  # their number


class Server(Record):
    """A host behind the gateway."""

    name: str
    state: str  # HAProxy's, such as "UP", "DOWN", "DRAIN", "MAINT"
    requests: int  # open ones


class LogDisk(Record):
    """Where the systemd journal keeps the audit log."""

    persistent: bool  # on a disk
    free: int
    total: int


class GatewayState(Record):
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


class Aside(Record):
    """The answer to a request to send people to another host, or to this one again."""

    done: bool  # false: people would have no other host, and had better wait


class Login(Record):
    """What `people.json` keeps of a person."""

    password: str = ""  # hashed; empty: none
    tokens: tuple[str, ...] = ()  # hashed


class CertificateNames(Record):
    """The names that the gateway's own certificate was made for (`names.json`), sorted."""

    names: tuple[str, ...] = ()


class GatewayBefore(Record):
    """The gateway before a change (`state/gateway-before.json`)."""

    gateway: InstalledGateway = field(default_factory=InstalledGateway)
    release: str = ""  # where its link `current` points; empty: nowhere


class PersonChanged(Record):
    """The answer to a change of a person."""

    token: str = ""  # a new one, which only the person gets to see
    known: bool = True  # false: there was no such person to remove
