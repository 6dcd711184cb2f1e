"""The same service for pyinfra. Nothing changes in a second run."""

from __future__ import annotations

from io import StringIO

from pyinfra import host
from pyinfra.operations import apt, files, pip, server, systemd

apt.packages(name="packages", packages=["python3", "python3-venv", "python3-packaging", "ca-certificates"], _sudo=True)
server.group(name="group", group="peer", system=True, _sudo=True)
server.user(
    name="user", user="peer", group="peer", system=True, home="/srv/peer", shell="/usr/sbin/nologin", _sudo=True
)
for folder in ("models", "input", "output", "user"):
    files.directory(name=folder, path=f"/srv/peer/{folder}", user="peer", group="peer", mode="2775", _sudo=True)
pip.packages(
    name="environment",
    packages=["pyyaml==6.0.2", "tqdm==4.67.1", "packaging==25.0"],
    virtualenv="/srv/peer/venv",
    _sudo=True,
)
UNIT = f"""[Service]
User=peer
ExecStart=/usr/bin/python3 -m http.server {host.data.service_port} --bind 127.0.0.1
[Install]
WantedBy=multi-user.target
"""
files.put(name="unit", src=StringIO(UNIT), dest="/etc/systemd/system/peer.service", _sudo=True)
systemd.service(name="service", service="peer", running=True, enabled=True, _sudo=True)
