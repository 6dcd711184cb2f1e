"""A deployed gateway in front of two real ComfyUIs, used by people with a browser: `--browser`."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser
from tests.client import Client
from tests.gateway import PASSWORD
from tests.host.fleet import Fleet, fresh
from tests.host.machine import free_port
from tests.host.test_gateway import ask, install_gateway

pytestmark = [
    pytest.mark.host,
    pytest.mark.browser,
    pytest.mark.needs("haproxy", "openssl", "chromium-headless-shell", "certutil"),
]

WORKFLOW: dict[str, dict[str, Any]] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 512, "height": 512, "batch_size": 1, "color": 0}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "gateway"}},
}
COLOURS = {"anna": 0x3366CC, "ben": 0xCC9933}


@dataclass
class House:
    """A machine with a gateway in front of two ComfyUIs: anna has one, ben the other, cleo and dora either."""

    fleet: Fleet
    ports: dict[str, int]
    port: int

    @property
    def address(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def configure(self, more: str = "") -> None:
        self.fleet.configure(
            f'[hosts.ben]\naddress = "spark"\nprofile = "cpu"\nport = {self.ports["ben"]}\nservice = "ben"\n'
            f'run_as = "ben"\nprefix = "/opt/ben"\n[groups]\nboth = ["spark", "ben"]\n'
            f'[gateways.home]\nhost = "spark"\nbehind = ["both"]\nport = {self.port}\nlisten = "127.0.0.1"\n'
            'names = ["127.0.0.1"]\nusers.anna = { host = "spark" }\nusers.ben = { host = "ben" }\n'
            f"users.cleo = {{}}\nusers.dora = {{}}\nlimits.prompts = 1000\nlimits.requests = 10000\n{more}"
        )

    def jobs(self, name: str) -> set[str]:
        """The ids of the jobs of a person's ComfyUI."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[name]}/history", timeout=10) as answer:
            return {*json.load(answer)}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    more = ("--capability=CAP_NET_ADMIN",)  # the machine shares this machine's network: its firewall is ours
    with fresh(tmp_path_factory.mktemp("fleet"), "browser", Fleet, more=more) as fleet:
        fleet.machine.boot()
        install_gateway(fleet.machine.root)
        # The other prefix has the environment, too: installing it takes minutes.
        mount = "mkdir -p /opt/ben/parts/$each && mount --bind $each /opt/ben/parts/$each"
        fleet.machine.run(f"cd /opt/comfyui/parts && for each in env-*; do {mount}; done")
        one = House(fleet, {"anna": fleet.machine.port, "ben": free_port()}, free_port())
        one.configure()
        succeeds(fleet, "deploy", "--group", "both", "--no-trial", "--yes")
        try:
            succeeds(fleet, "gateway", "deploy")
            yield one
        finally:
            succeeds(fleet, "gateway", "remove", "--yes")


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


def test_no_request_fails_while_a_group_is_updated(house: House) -> None:
    """Whoever has no host of their own is moved, host by host."""
    tokens = {
        name: succeeds(house.fleet, "gateway", "users", "add", name, "--token").strip() for name in ["cleo", "dora"]
    }
    authority = succeeds(house.fleet, "gateway", "cert")
    done, codes = threading.Event(), list[int]()

    def use(name: str) -> None:
        while not done.wait(0.2):
            codes.append(
                ask(
                    house.port, authority, {"Authorization": f"Bearer {tokens[name]}"}, json.dumps({"prompt": WORKFLOW})
                )
            )

    threads = [threading.Thread(target=use, args=[name]) for name in tokens]
    for each in threads:
        each.start()
    try:
        house.configure('[hosts.spark.override]\nmetadata = "none"\n[hosts.ben.override]\nmetadata = "none"\n')
        changed = house.fleet.inv("deploy", "--group", "both", "--no-trial", "--yes")
    finally:
        done.set()
        for each in threads:
            each.join()
    assert changed.returncode == 0, changed.stderr
    assert changed.stderr.count("new users go to other hosts") == 2
    assert {*codes} == {200}
    states = {
        each["name"]: each["state"]
        for each in json.loads(house.fleet.inv("gateway", "status", "--json").stdout)["hosts"]
    }
    assert states == {"spark": "UP", "ben": "UP"}
