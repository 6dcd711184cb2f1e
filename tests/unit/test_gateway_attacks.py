"""Attacks on a gateway: the real HAProxy on 127.0.0.1, in front of stand-ins for ComfyUI."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.gateways import Limits
from tests.gateway import PASSWORD, TOKENS, Running, StandIn, basic, closed, running

pytestmark = [pytest.mark.process, pytest.mark.needs("haproxy", "openssl")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, StandIn]]:
    """A gateway in front of one ComfyUI, for tests that use up no limit."""
    limits = Limits(logins=1000, requests=100_000, prompts=1000, upload="1M")
    with running(tmp_path_factory.mktemp("gateway"), limits=limits) as (gateway, (comfy,)):
        yield gateway, comfy


# --- who it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        basic("ben", "wrong"),
        basic("ben", ""),
        basic("", PASSWORD),
        basic("nobody", PASSWORD),
        {"Authorization": "Basic ben"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer ben"},
        {"Authorization": f"Digest {next(iter(TOKENS))}"},
        {"X-Hearth-User": "anna", "Comfy-User": "anna", "Remote-User": "anna"},
        {"Cookie": "user=anna"},
    ],
)
@pytest.mark.parametrize("path", ["/", "/system_stats", "/ws", "/api/prompt", "/view?filename=a.png"])
def test_nobody_gets_in_without_a_login(home: tuple[Running, StandIn], headers: dict[str, str], path: str) -> None:
    gateway, comfy = home
    before = len(comfy.requests)
    assert gateway.ask("GET", path, headers=headers).status == 401
    assert len(comfy.requests) == before


def test_people_log_in_with_passwords_and_scripts_with_tokens(home: tuple[Running, StandIn]) -> None:
    gateway, _ = home
    token = {"Authorization": f"Bearer {next(iter(TOKENS))}"}
    assert gateway.ask("GET", "/", "ben").status == 200
    assert gateway.ask("GET", "/", headers=token).status == 200
    assert gateway.ask("POST", "/free", headers=token).status == 403  # of ben, who is no administrator
    assert gateway.audit()[-1]["user"] == "ben"


def test_the_first_of_two_logins_in_a_request_is_not_believed(home: tuple[Running, StandIn]) -> None:
    """A login that was checked before, and another name in front of it."""
    gateway, comfy = home
    assert gateway.ask("GET", "/", "ben").status == 200
    before = len(comfy.requests)
    for first, second in (("anna", "ben"), ("ben", "anna")):
        logins = [
            basic(first, "wrong" if first == "anna" else PASSWORD),
            basic(second, "wrong" if second == "anna" else PASSWORD),
        ]
        lines = "".join(f"Authorization: {each['Authorization']}\r\n" for each in logins)
        head = f"POST /free HTTP/1.1\r\nHost: spark.local\r\n{lines}Content-Length: 0\r\nConnection: close"
        answer = gateway.raw(f"{head}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 400 ")
    assert len(comfy.requests) == before


def test_nothing_that_names_a_person_reaches_comfyui(home: tuple[Running, StandIn]) -> None:
    gateway, comfy = home
    forged = {"comfy-user": "anna", "X-Forwarded-User": "anna", "X-Forwarded-For": "10.0.0.1", "X-Real-IP": "10.0.0.1"}
    forged |= {"Forwarded": "for=10.0.0.1", "Remote-User": "anna", "X-Hearth-User": "anna", "X-Forwarded-Proto": "http"}
    assert gateway.ask("GET", "/forged", "ben", forged).status == 200
    (got,) = comfy.received("/forged")
    assert not got.headers.keys() & {each.lower() for each in forged if each != "X-Forwarded-Proto"}
    assert "authorization" not in got.headers
    assert got.headers["x-forwarded-proto"] == "https"


@pytest.mark.parametrize("right", [False, True])
def test_guessing_passwords_from_one_address_ends(tmp_path: Path, right: bool) -> None:
    """Also the right guess is refused then; whoever was logged in before is still served."""
    with running(tmp_path, limits=Limits(logins=5)) as (gateway, (comfy,)):
        assert gateway.ask("GET", "/", "anna").status == 200
        codes = [gateway.ask("GET", "/", headers=basic("ben", f"guess{i}")).status for i in range(8)]
        assert codes == [401] * 5 + [429] * 3
        last = gateway.ask("GET", "/", headers=basic("ben", PASSWORD if right else "guess"))
        assert (last.status, "retry-after" in last.headers) == (429, True)
        assert gateway.ask("GET", "/", "anna").status == 200
        assert gateway.ask("GET", "/", headers={"Authorization": f"Bearer {next(iter(TOKENS))}"}).status == 200
        assert len(comfy.requests) == 3


def test_guessing_the_password_of_one_person_from_many_addresses_ends(tmp_path: Path) -> None:
    """The source is loopback, any of whose addresses a client can use."""
    with running(tmp_path, limits=Limits(logins=2)) as (gateway, _):
        codes = [
            gateway.ask("GET", "/", headers=basic("ben", "guess"), source=f"127.0.0.{i + 2}").status for i in range(22)
        ]
        assert codes == [401] * 20 + [429] * 2
        assert gateway.ask("GET", "/", "ben", source="127.0.0.99").status == 429
        assert gateway.ask("GET", "/", "anna", source="127.0.0.99").status == 200


def test_a_removed_person_is_out_after_a_reload_and_the_others_stay(tmp_path: Path) -> None:
    with running(tmp_path) as (gateway, _):
        assert gateway.ask("GET", "/", "ben").status == 200
        gateway.write_people({"anna": PASSWORD, "cleo": "new"}, {"another": "cleo"})
        gateway.reload()
        assert gateway.ask("GET", "/", "ben").status == 401
        assert gateway.ask("GET", "/", headers={"Authorization": f"Bearer {next(iter(TOKENS))}"}).status == 401
        assert gateway.ask("GET", "/", "cleo").status == 401
        assert gateway.ask("GET", "/", headers=basic("cleo", "new")).status == 200
        assert gateway.ask("GET", "/", headers={"Authorization": "Bearer another"}).status == 200


def test_a_login_that_the_configuration_does_not_list_is_refused(tmp_path: Path) -> None:
    with running(tmp_path) as (gateway, _):
        gateway.write_people({"anna": PASSWORD, "old": PASSWORD}, {"old-token": "old"})
        gateway.reload()
        assert gateway.ask("GET", "/", "old").status == 401
        assert gateway.ask("GET", "/", headers={"Authorization": "Bearer old-token"}).status == 401
        assert gateway.ask("GET", "/", "anna").status == 200


# --- where it comes from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "spark.local.evil.example",
        "10.0.0.1",
        "",
        "[::1]",
        "spark.local@evil",
        "evil.example,spark.local",
        "spark.local,evil.example",
    ],
)
def test_a_forged_host_is_refused(home: tuple[Running, StandIn], host: str) -> None:
    """DNS rebinding: a page of another site whose name means this address."""
    gateway, _ = home
    assert gateway.ask("GET", "/", "anna", {"Host": host}).status in (400, 421)


@pytest.mark.parametrize(
    "request_line_and_hosts",
    [
        "GET http://evil.example/ HTTP/1.1\r\nHost: spark.local",
        "GET / HTTP/1.1\r\nHost: evil.example\r\nHost: spark.local",
        "GET / HTTP/1.1\r\nHost: spark.local\r\nHost: evil.example",
        "GET / HTTP/1.0",
        "GET / HTTP/1.1\r\nHost : spark.local",
    ],
)
def test_an_ambiguous_host_is_refused(home: tuple[Running, StandIn], request_line_and_hosts: str) -> None:
    gateway, comfy = home
    before = len(comfy.requests)
    login = f"Authorization: {basic('anna')['Authorization']}"
    answer = gateway.raw(f"{request_line_and_hosts}\r\n{login}\r\nConnection: close\r\n\r\n".encode())
    assert answer.split(b" ")[1] in (b"400", b"421")
    assert len(comfy.requests) == before


@pytest.mark.parametrize("name", ["spark.local", "SPARK.local", "127.0.0.1"])
def test_the_names_of_a_gateway_are_served_on_any_port(home: tuple[Running, StandIn], name: str) -> None:
    gateway, _ = home
    assert gateway.ask("GET", "/", "anna", {"Host": name}).status == 200
    assert gateway.ask("GET", "/", "anna", {"Host": f"{name}:{gateway.port}"}).status == 200


FROM = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://spark.local:{port}"},
    {"Origin": "https://spark.local:1"},
    {"Origin": "https://spark.local:{port}.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
]


@pytest.mark.parametrize("headers", FROM)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/prompt"), ("POST", "/free"), ("GET", "/ws"), ("GET", "/view?filename=a"), ("GET", "/manager/reboot")],
)
def test_requests_of_other_sites_are_refused(
    home: tuple[Running, StandIn], headers: dict[str, str], method: str, path: str
) -> None:
    """With the login of an administrator, which the browser adds."""
    gateway, comfy = home
    before = len(comfy.requests)
    given = {name: value.format(port=gateway.port) for name, value in headers.items()}
    assert gateway.ask(method, path, "anna", given).status == 403
    assert len(comfy.requests) == before


def test_a_link_on_another_site_opens_the_start_page_only(home: tuple[Running, StandIn]) -> None:
    gateway, _ = home
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert gateway.ask("GET", "/", "anna", link).status == 200
    assert gateway.ask("POST", "/", "anna", link).status == 403
    assert gateway.ask("GET", "/", "anna", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}).status == 403


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_requests_of_the_page_itself_are_served(home: tuple[Running, StandIn], site: str) -> None:
    gateway, _ = home
    headers = {"Origin": f"https://spark.local:{gateway.port}", "Sec-Fetch-Site": site}
    assert gateway.ask("POST", "/prompt", "ben", headers, b'{"prompt": {}}').status == 200


# --- what it may do -----------------------------------------------------------------------------------------------

RESERVED = [
    ("POST", "/free"),
    ("GET", "/manager/reboot"),
    ("POST", "/v2/manager/queue/install"),
    ("POST", "/customnode/install/git_url"),
    ("GET", "/snapshot/restore"),
    ("GET", "/internal/logs"),
    ("POST", "/users"),
    ("POST", "/interrupt"),
    ("POST", "/queue"),
    ("POST", "/history"),
    ("POST", "/jobs/cancel"),
    ("POST", "/jobs/1-a/cancel"),
]


@pytest.mark.parametrize(("method", "path"), RESERVED)
@pytest.mark.parametrize(
    "spelling", ["{}", "/api{}", "/api/api{}", "/%61pi{}", "{}?x=1", "{encoded}", "/./{}", "/x/..{}"]
)
def test_only_administrators_do_what_concerns_everybody(
    home: tuple[Running, StandIn], method: str, path: str, spelling: str
) -> None:
    """However the path is written: ComfyUI decodes it, so the gateway does, too."""
    gateway, comfy = home
    spelt = spelling.format(path, encoded="/" + "".join(f"%{ord(each):02x}" for each in path[1:]))
    before = len(comfy.requests)
    assert gateway.ask(method, spelt, "ben", body=b'{"clear": true}').status in (400, 403)
    assert len(comfy.requests) == before
    if ".." not in spelt and "/./" not in spelt:
        assert gateway.ask(method, spelt, "anna", body=b'{"clear": true}').status == 200


def test_people_end_and_delete_their_own_jobs_only(home: tuple[Running, StandIn]) -> None:
    gateway, _ = home
    job = gateway.ask("POST", "/api/prompt", "ben", body=b'{"prompt": {}}').json["prompt_id"]
    forms = {"/interrupt": f'{{"prompt_id": "{job}"}}', "/queue": f'{{"delete":["{job}"]}}'}
    forms["/history"] = forms["/queue"]
    forms |= {"/api/jobs/cancel": f'{{"job_ids":["{job}"]}}', f"/api/jobs/{job}/cancel": ""}
    for path, body in forms.items():
        assert gateway.ask("POST", path, "cleo", body=body.encode()).status == 403
        assert gateway.ask("POST", path, "ben", body=body.encode()).status == 200
        assert gateway.ask("POST", path, "anna", body=body.encode()).status == 200
    assert gateway.audit()[-1]["job"] == job


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt_id": "%(mine)s", "prompt_id": "%(other)s"}',  # Python reads the last one
        '{"prompt_id": "%(other)s", "prompt_id": "%(mine)s"}',
        '{"x": {"prompt_id": "%(mine)s"}, "prompt_id": "%(other)s"}',
        '{"prompt_id": ["%(mine)s"]}',
        '{"prompt_id": "%(other)s"}',
        '{"prompt_id": ""}',
        "{}",
        "",
        '"%(mine)s"',
    ],
)
def test_a_body_that_could_mean_the_job_of_another_is_refused(home: tuple[Running, StandIn], body: str) -> None:
    gateway, comfy = home
    mine, other = (
        gateway.ask("POST", "/prompt", who, body=b'{"prompt": {}}').json["prompt_id"] for who in ("ben", "cleo")
    )
    text = (body % {"mine": mine, "other": other}).encode()
    before = len(comfy.requests)
    assert gateway.ask("POST", "/interrupt", "ben", body=text).status == 403
    assert len(comfy.requests) == before


def test_nobody_takes_over_a_job_by_its_id(home: tuple[Running, StandIn]) -> None:
    """A client may choose the id of a job, and ComfyUI shows everybody the ids of all."""
    gateway, _ = home
    job = gateway.ask("POST", "/prompt", "cleo", body=b'{"prompt": {}}').json["prompt_id"]
    assert gateway.ask("POST", "/prompt", "ben", body=f'{{"prompt_id": "{job}"}}'.encode()).status == 200
    assert gateway.ask("POST", "/interrupt", "ben", body=f'{{"prompt_id": "{job}"}}'.encode()).status == 403
    assert gateway.ask("POST", "/interrupt", "cleo", body=f'{{"prompt_id": "{job}"}}'.encode()).status == 200


def websocket_code(gateway: Running, user: str, query: str) -> bytes:
    """The status of an attempt to open a websocket."""
    login = f"Host: spark.local\r\nAuthorization: {basic(user)['Authorization']}\r\nUpgrade: websocket"
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13"
    head = f"GET /ws{query} HTTP/1.1\r\n{login}\r\nConnection: Upgrade\r\n{key}\r\n\r\n"
    return gateway.raw(head.encode(), first=True).split(b" ")[1]


@pytest.mark.parametrize("first", ["socket", "prompt"])
def test_nobody_takes_over_the_progress_of_another_by_the_client_id(home: tuple[Running, StandIn], first: str) -> None:
    """ComfyUI sends progress and previews to the last websocket with an id, and /queue shows everybody all ids."""
    gateway, comfy = home
    name = f"id-of-cleo-{first}"
    prompt = f'{{"client_id": "{name}", "prompt": {{}}}}'.encode()
    if first == "socket":
        assert websocket_code(gateway, "cleo", f"?clientId={name}") == b"101"
    else:
        assert gateway.ask("GET", "/", "cleo").status == 200
        assert gateway.ask("POST", "/prompt", "cleo", body=prompt).status == 200
    before = comfy.sockets
    for each in ("ben", "anna"):
        assert websocket_code(gateway, each, f"?clientId={name}") == b"403"
        for body in (prompt, f'{{"extra_data": {{"client_id": "{name}"}}, "prompt": {{}}}}'.encode()):
            assert gateway.ask("POST", "/prompt", each, body=body).status == 403
    assert comfy.sockets == before
    assert websocket_code(gateway, "cleo", f"?clientId={name}") == b"101"
    assert gateway.ask("POST", "/prompt", "cleo", body=prompt).status == 200


@pytest.mark.parametrize(
    "query",
    ["?client%%49d=%s", "?clientId=x&clientId=%s", "?clientId=%%69%s", "?x=1&clientId=%s", "?clientId=%s;x", "?x=1"],
)
def test_a_client_id_that_comfyui_could_read_otherwise_is_refused(home: tuple[Running, StandIn], query: str) -> None:
    gateway, _ = home
    assert websocket_code(gateway, "ben", query % "abc" if "%s" in query else query) == b"400"


@pytest.mark.parametrize("query", ["", "?clientId=", "?clientId=0a1b-2c_3.d"])
def test_a_page_opens_its_websocket_with_or_without_a_client_id(home: tuple[Running, StandIn], query: str) -> None:
    """The page has none at first: ComfyUI tells it one."""
    gateway, _ = home
    assert websocket_code(gateway, "ben", query) == b"101"


# --- how much, and how slowly -------------------------------------------------------------------------------------


def test_requests_and_prompts_are_limited_for_each_person(tmp_path: Path) -> None:
    with running(tmp_path, limits=Limits(requests=20, prompts=3)) as (gateway, (comfy,)):
        codes = [gateway.ask("POST", "/prompt", "ben", body=b'{"prompt": {}}').status for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]
        codes = [gateway.ask("GET", "/queue", "ben").status for _ in range(20)]
        assert codes == [200] * 15 + [429] * 5
        assert gateway.ask("POST", "/prompt", "cleo", body=b'{"prompt": {}}').status == 200
        assert len(comfy.received("/prompt")) == 4


def test_a_request_that_is_too_large_is_refused_before_it_is_sent(home: tuple[Running, StandIn]) -> None:
    gateway, comfy = home
    limit = 1 << 20  # HAProxy 3.0 answers at once, too, and then waits for the body
    assert gateway.ask("POST", "/upload/image", "ben", body=b"x" * limit).status == 200
    assert len(comfy.received("/upload/image")) == 1
    login = f"Host: spark.local\r\nAuthorization: {basic('ben')['Authorization']}\r\nConnection: close"
    for size in (limit + 1, 2**31, 2**32 + 1, 10**12, 2**63 - 1, 2**63, 2**64 + 1):
        head = f"POST /upload/image HTTP/1.1\r\n{login}\r\nContent-Length: {size}\r\n\r\n"
        assert gateway.raw(head.encode(), first=True).split(b" ")[1] in (b"413", b"400")
    head = f"POST /upload/image HTTP/1.1\r\n{login}\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert gateway.raw(head.encode(), first=True).startswith(b"HTTP/1.1 411 ")
    both = f"POST /upload/image HTTP/1.1\r\n{login}\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert gateway.raw(both.encode(), first=True).split(b" ")[1] in (b"400", b"411")
    packed = {"Content-Encoding": "deflate"}
    assert gateway.ask("POST", "/upload/image", "ben", packed, b"x").status == 415
    assert len(comfy.received("/upload/image")) == 1


def test_slow_headers_and_bodies_end_and_hold_up_nobody(tmp_path: Path) -> None:
    edit = {"timeout http-request 10s": "timeout http-request 2s", "wait-for-body time 15s": "wait-for-body time 2s"}
    with running(tmp_path, edit=edit) as (gateway, (comfy,)):
        login = f"Host: spark.local\r\nAuthorization: {basic('ben')['Authorization']}"
        head = f"GET / HTTP/1.1\r\n{login}\r\nX: "
        body = f"POST /upload/image HTTP/1.1\r\n{login}\r\nContent-Length: 99\r\n\r\nx"

        async def trickle(text: str) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, ssl=gateway.tls)
            writer.write(text.encode())
            found = asyncio.ensure_future(reader.read(64))
            while not found.done():
                writer.write(b"x")
                await asyncio.sleep(0.2)
            await closed(writer)
            return await found

        async def all_of_them() -> list[bytes]:
            slow = [asyncio.ensure_future(trickle(each)) for each in [head, body] * 40]
            await asyncio.sleep(0.5)
            answer = await asyncio.to_thread(gateway.ask, "GET", "/", "anna")
            assert answer.status == 200
            return await asyncio.gather(*slow)

        answers = asyncio.run(asyncio.wait_for(all_of_them(), 60))
        assert {each.split(b" ")[1] for each in answers} == {b"408"}
        assert comfy.received("/upload/image") == []


def test_a_person_has_so_many_requests_at_the_same_time(tmp_path: Path) -> None:
    with running(tmp_path, limits=Limits(connections=3)) as (gateway, _):

        async def talk() -> list[int]:
            opened = [await gateway.websocket("ben") for _ in range(3)]
            codes = [(await asyncio.to_thread(gateway.ask, "GET", "/", who)).status for who in ("ben", "anna")]
            for _, writer in opened:
                await closed(writer)
            await asyncio.sleep(0.5)
            return [*codes, (await asyncio.to_thread(gateway.ask, "GET", "/", "ben")).status]

        assert asyncio.run(asyncio.wait_for(talk(), 60)) == [429, 200, 200]


# --- many -----------------------------------------------------------------------------------------------------------


def test_200_websockets_of_several_people(home: tuple[Running, StandIn]) -> None:
    gateway, comfy = home
    before, memory = comfy.sockets, gateway.memory()

    async def talk() -> list[bytes]:
        people = ["anna", "ben", "cleo"]
        opened = await asyncio.gather(*(gateway.websocket(people[i % 3]) for i in range(200)))
        assert gateway.memory() - memory < 200 * 200_000  # idle, each keeps the state of its TLS and no buffer
        answer = await asyncio.to_thread(gateway.ask, "GET", "/", "ben")
        assert answer.status == 200
        for i, (_, writer) in enumerate(opened):
            writer.write(f"{i:04}".encode())
        found = [await reader.readexactly(4) for reader, _ in opened]
        for _, writer in opened:
            await closed(writer)
        return found

    assert asyncio.run(asyncio.wait_for(talk(), 60)) == [f"{i:04}".encode() for i in range(200)]
    assert comfy.sockets == before + 200
