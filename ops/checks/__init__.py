"""The doctor's checks of a host, by subject; `docs/troubleshooting.md` is generated from them."""

from __future__ import annotations

from ops.checks import gateway, gpu, host, memory, release, service
from ops.checks.case import Case, Check, Severity

__all__ = ["CHECKS", "Case", "Check", "Severity"]

CHECKS = (*release.CHECKS, *service.CHECKS, *memory.CHECKS, *gpu.CHECKS, *host.CHECKS, *gateway.CHECKS)
