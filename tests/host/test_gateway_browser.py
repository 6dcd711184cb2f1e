"""A deployed gateway in front of two real ComfyUIs, used by people with a browser: `--browser`."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser
from tests.client import Client
from tests.gateway import PASSWORD
from tests.host.fleet import Fleet, fresh
from tests.host.machine import clear, free_port, place_for
from tests.host.test_gateway import install_gateway
from tests.host.test_local import Here

pytestmark = [
    pytest.mark.host,
    pytest.mark.browser,
    pytest.mark.needs("haproxy", "openssl", "chromium-headless-shell", "certutil"),
]

WORKFLOW: dict[str, dict[str, Any]] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 512, "height": 512, "batch_size": 1}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "gateway"}},
}
COLOURS = {"anna": 0x3366CC, "ben": 0xCC9933}


@dataclass
class House:
    """A machine with a gateway in front of two ComfyUIs of this machine: anna has one, ben the other."""

    fleet: Fleet
    ports: dict[str, int]
    address: str

    def jobs(self, name: str) -> set[str]:
        """The ids of the jobs of a person's ComfyUI."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[name]}/history", timeout=10) as answer:
            return {*json.load(answer)}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder, port = tmp_path_factory.mktemp("fleet"), free_port()
    more = ("--capability=CAP_NET_ADMIN",)  # the machine shares this machine's network: its firewall is ours
    with (
        comfyui(folder, "anna") as anna,
        comfyui(folder, "ben") as ben,
        fresh(folder, "browser", Fleet, bare=True, more=more) as one,
    ):
        one.machine.port = anna.port
        one.machine.boot()
        install_gateway(one.machine.root)
        one.configure(
            f'[hosts.ben]\naddress = "spark"\nprofile = "cpu"\nport = {ben.port}\nservice = "ben"\n'
            f'prefix = "/opt/ben"\n[gateways.home]\nhost = "spark"\nbehind = ["spark", "ben"]\nport = {port}\n'
            'listen = "127.0.0.1"\nnames = ["127.0.0.1"]\n'
            'users.anna = { host = "spark" }\nusers.ben = { host = "ben" }\n'
        )
        try:
            succeeds(one, "gateway", "deploy")
            yield House(one, {"anna": anna.port, "ben": ben.port}, f"https://127.0.0.1:{port}")
        finally:
            succeeds(one, "gateway", "remove", "--yes")


@contextmanager
def comfyui(folder: Path, name: str) -> Iterator[Here]:
    """A real ComfyUI on this machine."""
    one = Here(place_for(name), folder / f"{name}.toml", free_port())
    (one.prefix / "data/cache").mkdir(parents=True)
    one.configure()
    one.choose()
    try:
        succeeds(one, "deploy", "--no-trial")
        yield one
    finally:
        succeeds(one, "nuke", "--yes")
        clear(one.prefix)


def succeeds(client: Client, *words: str) -> str:
    done = client.inv(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def browser_of(fleet: Fleet, folder: Path, name: str) -> Browser:
    """A person's browser, which trusts the gateway's authority."""
    words = fleet.command("gateway", "users", "add", name)
    environment = fleet.environment()
    subprocess.run(words, input=f"{PASSWORD}\n", text=True, check=True, cwd=fleet.checkout, env=environment)
    authority = folder / "authority.pem"
    authority.write_text(succeeds(fleet, "gateway", "cert"))
    return Browser(folder, authority, name, PASSWORD)


@pytest.mark.parametrize("name", ["anna", "ben"])
def test_a_person_loads_the_page_queues_a_workflow_and_sees_the_picture(
    house: House, tmp_path: Path, name: str
) -> None:
    (other,) = {*house.ports} - {name}
    theirs = house.jobs(other)
    browser = browser_of(house.fleet, tmp_path, name)
    try:
        browser.call("Page.navigate", url=f"{house.address}/api/system_stats")
        # At its first visit, the page shows a dialog.
        done = "fetch('/api/settings/Comfy.TutorialCompleted', {method: 'POST', body: 'true'}).then(r => r.status)"
        assert browser.run(done) == 200
        browser.call("Page.navigate", url=house.address)
        browser.wait("websocket", lambda: any(each["type"] == "status" for each in browser.frames()))
        browser.wait("graph", lambda: browser.run("!!(window.app && app.graph && app.canvas)"))
        workflow = {**WORKFLOW["1"], "inputs": {**WORKFLOW["1"]["inputs"], "color": COLOURS[name]}}
        browser.run(f"app.loadApiJson({json.dumps({**WORKFLOW, '1': workflow})}, 'gateway')")
        browser.run("app.queuePrompt(0)")
        browser.wait("end of the job", lambda: any(each["type"] == "execution_success" for each in browser.frames()))
        browser.wait("picture", lambda: any(code == 200 and "/view?" in url for code, url in browser.responses()))
        time.sleep(2)  # it draws
        (tmp_path / "page.png").write_bytes(browser.picture())
        told = [each for each in browser.frames() if each["type"] == "execution_success"]
        assert {"execution_start", "progress_state", "executing", "executed"} <= {e["type"] for e in browser.frames()}
        assert {code for code, _ in browser.responses()} <= {
            200,
            304,
            404,
        }  # 404: files that the page has not stored yet
    finally:
        browser.close()
    assert {each["data"]["prompt_id"] for each in told} <= house.jobs(name)
    assert house.jobs(other) == theirs
