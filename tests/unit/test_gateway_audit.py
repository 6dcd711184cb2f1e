"""The audit log of a gateway, and its view of ComfyUI's routes: the real HAProxy on 127.0.0.1."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from agent.processes import wait_for
from deploy.gateways import Limits
from tests import comfyui
from tests.gateway import Running, StandIn, basic, running

pytestmark = [pytest.mark.process, pytest.mark.needs("haproxy", "openssl")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, StandIn]]:
    with running(tmp_path_factory.mktemp("gateway"), limits=Limits(requests=100_000, prompts=1000)) as (
        gateway,
        (one,),
    ):
        yield gateway, one


def logged(gateway: Running, status: int, *request: Any, **values: Any) -> dict[str, Any]:
    """What the log has of a request, which it gets when the connection has ended."""
    before = len(gateway.audit())
    assert gateway.ask(*request, **values).status == status
    assert wait_for(lambda: len(gateway.audit()) > before, 10)
    (line,) = gateway.audit()[before:]
    return line


@pytest.mark.parametrize(("length", "status"), [(1200, 200), (7900, 200), (8100, 414), (60_000, 414)])
def test_a_long_address_does_not_cut_off_who_asked_for_it(
    home: tuple[Running, StandIn], length: int, status: int
) -> None:
    gateway, comfy = home
    before = len(comfy.requests)
    path = "/prompt?" + '"\\/'.ljust(length, '"')
    line = logged(gateway, status, "POST", path, "ben", body=b'{"prompt": {}}')
    assert (line["status"], line["user"]) == (status, "ben" if status == 200 else "-")
    assert line["path"] == path[:8000]
    assert len(comfy.requests) - before == (status == 200)


@pytest.mark.parametrize("method", ["post", "TRACE", "X" * 40_000])
def test_methods_that_comfyui_does_not_need_are_refused(home: tuple[Running, StandIn], method: str) -> None:
    gateway, comfy = home
    before = len(comfy.requests)
    assert logged(gateway, 405, method, "/interrupt", "ben")["method"] == method[:16]
    assert len(comfy.requests) == before


def test_a_long_id_of_a_job_does_not_cut_off_its_line(home: tuple[Running, StandIn]) -> None:
    """Older versions of ComfyUI accept any."""
    gateway, _ = home
    body = json.dumps({"prompt": {}, "prompt_id": '"' * 60_000}).encode()
    line = logged(gateway, 200, "POST", "/prompt", "ben", body=body)
    assert (line["user"], len(line["job"])) == ("ben", 64)


def test_names_that_are_no_text_do_not_break_the_log(home: tuple[Running, StandIn]) -> None:
    gateway, _ = home
    line = logged(gateway, 401, "GET", '/"},{"user":"anna', "", basic('an"na\n{:', "x"))
    assert (line["path"], line["user"]) == ('/"},{"user":"anna', "-")


def test_what_only_administrators_may_do_is_logged_also_if_it_reads(home: tuple[Running, StandIn]) -> None:
    """ComfyUI-Manager installs by GET."""
    gateway, _ = home
    assert logged(gateway, 200, "GET", "/manager/reboot", "anna")["user"] == "anna"
    assert gateway.ask("GET", "/queue", "anna").status == 200
    assert logged(gateway, 200, "GET", "/internal/logs", "anna")["path"] == "/internal/logs"  # and nothing before


def test_http_2_has_no_way_around_the_limits(home: tuple[Running, StandIn]) -> None:
    """A client may begin with it unasked. Its bodies need no length."""
    gateway, _ = home
    settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    assert gateway.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings, first=True).startswith(b"HTTP/1.1 400 ")


EVERYBODY = {
    "POST /upload/image",
    "POST /upload/mask",
    "POST /prompt",
    "POST /settings",
    "POST /settings/{id}",
    "POST /userdata/{file}",
    "POST /userdata/{file}/move/{dest}",
    "DELETE /userdata/{file}",
    # The index of the shared files.
    "POST /api/assets",
    "POST /api/assets/from-hash",
    "POST /api/assets/prune",
    "POST /api/assets/seed",
    "POST /api/assets/seed/cancel",
    "POST /api/assets/{id:UUID}/tags",
    "PUT /api/assets/{id:UUID}",
    "DELETE /api/assets/{id:UUID}",
    "DELETE /api/assets/{id:UUID}/tags",
}
RESERVED = {
    "POST /free",
    "POST /history",
    "POST /interrupt",
    "POST /queue",
    "POST /users",
    "POST /api/jobs/cancel",
    "POST /api/jobs/{job_id}/cancel",
    "PATCH /internal/logs/subscribe",
}


def test_every_change_that_comfyui_offers_is_for_everybody_or_refused(home: tuple[Running, StandIn]) -> None:
    """A new version of ComfyUI with another route fails here until it is in one of the two lists."""
    gateway, comfy = home
    tree = comfyui.tree()
    found = set[str]()
    for path in [tree / "server.py", *tree.glob("app/**/*.py"), *tree.glob("api_server/**/*.py")]:
        prefix = "/internal" if path.name == "internal_routes.py" else ""
        for method, route in re.findall(r"\.(post|put|patch|delete)\(f?['\"](/[^'\"]*)['\"]\)", path.read_text()):
            plain = route.replace("{{", "{").replace("{UUID_RE}}}", "UUID}")
            found.add(f"{method.upper()} {prefix}{plain}")
    assert found == EVERYBODY | RESERVED
    before = len(comfy.requests)
    for method, _, route in (each.partition(" ") for each in RESERVED):
        logged(gateway, 403, method, re.sub(r"{.*?}", "1-a", route), "ben", body=b"{}")
    assert len(comfy.requests) == before
