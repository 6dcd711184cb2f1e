"""Checks of the gateway that runs on a host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core import console
from ops.checks.case import Case, Check
from ops.status import Problem

if TYPE_CHECKING:
    from ops.checks.case import Found

LEAST = 0.05
"""The journal's disk is nearly full if less than this share is free: journald then deletes the oldest lines."""


def _service(case: Case) -> Found:
    if not case.gateway:
        return
    name, found = case.gateway
    deploy = f"inv gateway deploy --gateway {name}"
    if not found.installed.unit:
        yield Problem(f"gateway {name} is not deployed", deploy)
    elif not found.active:
        yield Problem(
            f"gateway {name} does not run", f"{deploy}; its log: journalctl -u {case.target.host.service}-gateway"
        )
    elif not found.guarded:
        yield Problem(f"every login on the host reaches ComfyUI around gateway {name}: its firewall is gone", deploy)
    for each in found.servers:
        if each.state in ("DRAIN", "MAINT"):
            what = f"gateway {name} sends no requests to {each.name}: it is being changed, or was taken out by hand"
            yield Problem(what, deploy)
        elif each.state != "UP":
            yield Problem(f"gateway {name} does not reach {each.name}", f"inv doctor --host {each.name}")


def _port(case: Case) -> Found:
    if case.gateway and (holder := case.gateway[1].holder):
        yield Problem(
            f"the port of gateway {case.gateway[0]} is in use by {holder['command']} (pid {holder['pid']})",
            f"on the host: systemctl disable --now {holder['unit'] or 'UNIT'}; then inv gateway deploy",
        )


def _certificate(case: Case) -> Found:
    if not case.gateway or not (until := case.gateway[1].certificate.until):
        return
    name, found = case.gateway
    remedy = f"{'renew the file; then ' if found.given else ''}inv gateway deploy --gateway {name}"
    if found.certificate.expired:
        yield Problem(f"the certificate of gateway {name} expired: {until}", remedy)
    elif found.certificate.renew:
        yield Problem(f"the certificate of gateway {name} ends soon: {until}", remedy)
    if names := found.certificate.uncovered:
        yield Problem(f"the certificate of gateway {name} is not for {', '.join(names)}", remedy)


def _audit(case: Case) -> Found:
    if not case.gateway:
        return
    journal = case.gateway[1].journal
    if not journal.persistent:
        what = "the audit log is lost when the host restarts: the journal is in memory"
        yield Problem(what, "on the host: mkdir /var/log/journal; systemctl restart systemd-journald")
    elif journal.free < journal.total * LEAST:
        left = f"{console.size(journal.free)} of {console.size(journal.total)}"
        what = f"the audit log loses its oldest lines: {left} left at /var/log/journal"
        yield Problem(what, "on the host: free some space, or journalctl --vacuum-size=1G")


CHECKS = (
    Check(
        name="gateway",
        question="Does the gateway run, is ComfyUI reached only through it, and does it reach its hosts?",
        detected_by="the state of its unit, nftables, and HAProxy's runtime socket",
        fix="inv gateway deploy",
        find=_service,
    ),
    Check(
        name="gateway-port",
        question="Does another program use the gateway's port?",
        detected_by="the process that listens on it",
        fix="stop that program, or set another `port`; then inv gateway deploy",
        find=_port,
    ),
    Check(
        name="gateway-certificate",
        question="Is the gateway's certificate valid for 30 more days, and for all its names?",
        detected_by="openssl x509 on the certificate in service",
        fix="inv gateway deploy renews its own certificate; renew one of yours, then deploy",
        find=_certificate,
    ),
    Check(
        name="audit-log",
        question="Does the audit log survive restarts, and does its disk have free space?",
        detected_by="/var/log/journal and its file system",
        fix="make /var/log/journal, or free some space there",
        severity="warning",
        find=_audit,
    ),
)
