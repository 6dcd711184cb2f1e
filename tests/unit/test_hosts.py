"""Hosts and profiles: merged strictly, with the origin of values; a ComfyUI's flags, read without running it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from core import files, workspace
from core.arch import Arch, LocalGpu
from deploy import host, look
from deploy.profile import Override, Profile, profiles
from deploy.secrets import names_secret
from lock import application
from tests.errors import raises
from tests.plans import wheel


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "hosts.toml"
    monkeypatch.setenv("HEARTH_HOSTS", str(path))
    return path


def test_the_example_loads_and_is_merged(written: Path) -> None:
    written.write_text((files.CHECKOUT / "config/hosts.example.toml").read_text())
    assert host.select("", "home") == ["box", "spark"]
    box = host.target("box")
    assert box.profile.pythons == ("3.13",)
    assert box.origin["pythons"] == "host box"
    assert (box.stack.default, box.origin["stack"]) == (True, "config/stacks.toml")
    assert box.origin["arch"] == "profile rtx-4070"
    assert "--reserve-vram" not in box.flags
    assert "--use-sage-attention" in box.flags


@pytest.mark.usefixtures("written")
def test_local_needs_no_file() -> None:
    assert host.select("", "") == ["local"]
    local = host.target("local")
    assert (local.profile_name, local.host.scope, local.prefix) == ("cpu", "user", "~/.local/share/hearth/comfyui")
    assert local.site.user == ""


@pytest.mark.parametrize(("text", "scope"), [("port = 8189", "user"), ('scope = "system"', "system")])
def test_an_entry_for_local_has_the_same_defaults_as_none(
    text: str, scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts.toml").write_text(f"[hosts.local]\n{text}\n")
    monkeypatch.setenv("HEARTH_HOSTS", str(tmp_path / "hosts.toml"))
    assert host.hosts().hosts["local"].scope == scope


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ('[hosts.a]\naddress = "a"\nprofil = "cpu"', "config", "profile"),
        ('[hosts.a]\naddress = "a"\nansible_become_password = "x"', "secret", "--ask-sudo"),
        ('[hosts.a]\naddress = "a"\noverride.env.HF_TOKEN = { value = "x", why = "y" }', "secret", "HF_TOKEN"),
        ("[hosts.a]", "config", "has no address"),
        ('[hosts.a]\naddress = "a"\nprefix = "/home/x"', "config", "hides home folders"),
        ('[hosts.a]\naddress = "a"\nport = 0', "config", "1 to 65535"),
        ('[hosts.a]\naddress = "a"\nservice = "a b"', "config", "plain lower-case name"),
        ('[hosts.a]\naddress = "a"\n[groups]\ng = ["b"]', "unknown-name", "known: a"),
        ('[hosts.a]\naddress = "a"', "config", "has no profile"),
        ('[hosts.a]\naddress = "a"\nmounts."/mnt/../etc" = {}', "config", "not a plain absolute path"),
        ('[hosts.a]\naddress = "a"\nmounts."/opt/comfyui/data/models" = {}', "config", "is in /opt/comfyui/data"),
        (
            '[hosts.a]\naddress = "a"\nmounts."/mnt/a/b" = {}\nfolders.input = "/mnt/a"',
            "config",
            "/mnt/a/b is in /mnt/a",
        ),
        (
            '[hosts.a]\naddress = "a"\nfolders.input = "/opt/comfyui/data/x/in"',
            "config",
            "is in /opt/comfyui/data",
        ),
        ('[hosts.a]\naddress = "a"\nmodel_roots = ["/mnt/my models"]', "config", "not a plain absolute path"),
        ('[hosts.a]\naddress = "a"\nfolders.output = "/home/anna/out"', "config", "hides from the service"),
        ('[hosts.a]\naddress = "a"\nfolders.custom_nodes = "/srv/x"', "config", "custom_nodes"),
        ('[hosts.a]\naddress = "a"\nmounts."/mnt/a" = { what = "nas:/a" }', "config", "`what` needs a `type`"),
        ('[hosts.a]\naddress = "a"\nmembers_may = ["stop"]', "config", "stop"),
        ('[hosts.a]\naddress = "a"\nmetrics_port = 0', "config", "metrics_port must be from 1 to 65535"),
        ('[hosts.a]\naddress = "a"\nmetrics_port = 8188', "config", "and not ComfyUI's 8188"),
        ("hosts = [", "config", "is not TOML"),
    ],
)
def test_invalid_hosts_toml_is_refused(written: Path, text: str, error: str, said: str) -> None:
    written.write_text(text)
    with raises(error) as raised:
        host.hosts()
    assert said in str(raised.value)


ODD = ["a b", "a\\nb", "a%b", 'a\\"b', "a'b", "a$b", "a;b", "a\\\\b", "../b", "-a"]


@pytest.mark.parametrize(
    "text",
    [
        *(f'prefix = "/opt/{each}"' for each in [*ODD[:-1], "x:y", "x/", "/x", "./x"]),
        *(f'scope = "user"\nprefix = "~/{each}"' for each in ODD[:-1]),
        *(f'scope = "user"\nprefix = "{each}"' for each in ("~", "~anna/x", "x", "~/", "$HOME/x")),
        *(f'address = "{each}"' for each in ODD if each not in ("a%b",)),
        *(f'user = "{each}"' for each in ODD if each != "a\\\\b"),
        *(f'members = ["{each}"]' for each in [*ODD, "a,b", ""]),
        *(
            f'listen = "{each}"'
            for each in ["", "localhost", "1.2.3", "::1,", "127.0.0.1, ::1", "fe80::1%eth0", "[::1]"]
        ),
        *(f'free_memory = "{each}"' for each in ("4", "h", "0h", "4 h", "4h\\n", "\u0664h", "-1h")),
        *(f'mounts."/mnt/a" = {{ what = "{each}", type = "nfs4" }}' for each in ["-o x", "x\\n[Mount]", "x\\\\", " "]),
        *(f'mounts."/mnt/a" = {{ what = "/dev/sdb", type = "{each}" }}' for each in ("ext4\\n", "a b", "a%b")),
        *(
            f'mounts."/mnt/a" = {{ what = "/dev/b", type = "xfs", options = "{each}" }}'
            for each in ("a b", "a\\nb", "a\\\\")
        ),
        *(f'override.memory_max = "{each}"' for each in ("lots", "1G\\nExecStartPre=/bin/x", "-1", "90 %")),
        'override.kernels = ["sageattention", "sageattention:full"]',
        *(f'override.pythons = ["{each}"]' for each in ("3", "3.11; x", "../3.11")),
        *(f'override.env.X = {{ why = "w", value = "{each}" }}' for each in ("a\\nb", "a\\u0000b", "a\\rb")),
        *(f'override.env."{each}" = {{ why = "w" }}' for each in ("A B", "A=B", "1A", "")),
        *(f'override.flags."--x" = {{ why = "w", value = "{each}" }}' for each in ("a\\nb", "a'b", 'a\\"b', "a\\\\nb")),
        *(f'override.flags."{each}" = {{ why = "w" }}' for each in ("x", "--x y", "--x\\ny", "-x")),
        *(f'members = ["{each}"]' for each in ("comfyui", "hearth-exporter", ".", "\uff52oot")),
        *(f'run_as = "{each}"' for each in ("hearth-exporter", "nobody", "daemon", "systemd-network")),
        *(f'service = "{each}"' for each in ("ssh", "dbus", "systemd-logind")),
        *(f'prefix = "{each}"' for each in ("/etc", "/etc/x", "/proc/x", "/usr/local/x", "/x", "/opt", "/tmp/x")),
        *(f'scope = "user"\nprefix = "{each}"' for each in ("/etc/x", "/run/user/1", "/x")),
        *(
            f'folders.output = "{each}"'
            for each in (
                "/mnt/a:b",
                "/etc",
                "/opt",
                "/tmp/x",
                "/opt/comfyui",
                "/opt/comfyui/data",
                "/opt/comfyui/state/x",
            )
        ),
        *(f'mounts."{each}" = {{}}' for each in ("/etc", "/usr/x", "/home", "/opt/comfyui/releases", "/var")),
        "ssh_port = 0",
        "ssh_port = 65536",
        'develop = ["/srv/a:b"]\nmodes = ["development"]',
    ],
)
def test_values_unsafe_in_units_are_refused(written: Path, text: str) -> None:
    address = "" if text.startswith("address") else 'address = "a"\n'
    written.write_text(f'[hosts.a]\n{address}profile = "cpu"\n{text}\n')
    with raises("config"):
        host.hosts()


@pytest.mark.parametrize(
    "text",
    [
        'prefix = "/opt/comfy-ui_2.0"',
        'scope = "user"\nprefix = "~/ai/comfyui"',
        'scope = "user"\nprefix = "/home/anna/comfyui"',
        'address = "fe80::1%eth0"',
        'address = "my_host.example.org"',
        'user = "CORP\\\\anna"',
        'user = "anna@corp"',
        'members = ["anna", "svc-art$"]',
        'listen = "0.0.0.0,::"',
        'listen = "192.168.1.2,127.0.0.1,::1"',
        'mounts."/mnt/a" = { what = "//nas/my share%1", type = "cifs", options = "credentials=/etc/x,uid=1000" }',
        'scope = "user"\nprefix = "/tmp/x/prefix"',
        'folders.output = "/srv/art"\nmounts."/models" = {}\nmounts."/opt/comfyui/data" = {}',
        'override.env.X = { why = "w", value = "http://host:8080/a@b ssh://git@host" }',
        'override.memory_max = "90%"',
        'override.memory_max = "48G"',
        'override.env.X = { why = "w", value = "a \\"b\\" $c %d é" }',
        'override.flags."--x" = { why = "w", value = "10 32%" }',
    ],
)
def test_values_safe_in_units_are_accepted(written: Path, text: str) -> None:
    address = "" if text.startswith("address") else 'address = "a"\n'
    written.write_text(f'[hosts.a]\n{address}profile = "cpu"\n{text}\n')
    assert "a" in host.hosts().hosts


@pytest.mark.parametrize(
    "text",
    [
        'mounts."/mnt/a" = { what = "//nas/x", type = "cifs", options = "username=anna,password=hunter2" }',
        'mounts."/mnt/a" = { what = "//nas/x", type = "cifs", options = "pass=hunter2" }',
        'override.env.X = { why = "w", value = "https://anna:p/w@host/simple" }',
        'override.env.X = { why = "w", value = "https://tok123456789@host/simple" }',
    ],
)
def test_secrets_are_found_at_any_depth(written: Path, text: str) -> None:
    written.write_text(f'[hosts.a]\naddress = "a"\nprofile = "cpu"\n{text}\n')
    with raises("secret"):
        host.hosts()


def test_unknown_names(written: Path) -> None:
    written.write_text('[hosts.spark]\naddress = "a"\nprofile = "dgx-sparc"\n[groups]\nall = ["spark"]')
    with raises("unknown-name", match="spark"):
        host.select("sparc", "")
    with raises("unknown-name", match="perhaps you meant 'all'"):
        host.select("", "al")
    with raises("unknown-name", match="dgx-spark"):
        host.target("spark")
    written.write_text('[hosts.spark]\naddress = "a"\nprofile = "cpu"')
    with raises("unknown-name", match=r"add \[groups\] to "):
        host.select("", "all")


def test_every_profile_loads_and_gives_reasons() -> None:
    found = profiles()
    assert set(found) == {"cpu", "cuda", "dgx-spark", "rtx-4070"}
    for profile in found.values():
        for setting in (profile.flags | profile.env).values():
            assert setting.why


CLI = """
parser = argparse.ArgumentParser()
parser.add_argument("--listen", type=str, default="127.0.0.1", nargs="?")
parser.add_argument("--size", type=int)
parser.add_argument("--hash", type=str, choices=['md5', 'sha1'])
vram = parser.add_mutually_exclusive_group()
vram.add_argument("--cpu", action="store_true")
vram.add_argument("--lowvram", action="store_true")
"""


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"--cpu": "", "--listen": "", "--size": "3", "--hash": "md5"}, []),
        ({"--cpus": ""}, ["no flag --cpus"]),
        ({"--cpu": "", "--lowvram": ""}, ["--cpu and --lowvram exclude each other"]),
        ({"--cpu": "yes"}, ["--cpu takes 0 value(s)"]),
        ({"--size": ""}, ["--size takes 1 value(s)"]),
        ({"--size": "big"}, ["--size takes a number"]),
        ({"--hash": "crc"}, ["does not know 'crc'"]),
    ],
)
def test_flags_are_checked_against_the_parser(chosen: dict[str, str], said: list[str]) -> None:
    found = application.wrong(chosen, application.flags(CLI))
    assert len(found) == len(said)
    for (what, remedy), part in zip(found, said, strict=True):
        assert part in what
        assert remedy


def test_a_host_may_override_all_that_a_profile_says() -> None:
    said = {field.name for field in msgspec.structs.fields(Profile)} - {"summary"}
    assert {field.name for field in msgspec.structs.fields(Override)} == said


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "HF_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "PRIVATE_KEY", "CIVITAI_AUTH", "MY_PASS"),
        *(
            "--api-key",
            "password",
            "ansible_become_pass",
            "DB_PWD",
            "GITHUB_PAT",
            "OPENAI_API_KEY",
            "apiKey",
            "hfToken",
        ),
        *("PGPASSWORD", "MYSQL_PASSPHRASE", "GOOGLE_APPLICATION_CREDENTIALS", "SESSION_COOKIE", "SENTRY_DSN"),
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert names_secret(name)


def test_ordinary_names_are_not_secret() -> None:
    names = [*host.Host.__struct_fields__, *Profile.__struct_fields__, "--tls-keyfile", "--comfy-api-base"]
    names += ["TOKENIZERS_PARALLELISM", "PYTORCH_CUDA_ALLOC_CONF"]
    names += ["MAX_TOKENS", "KEYBOARD_LAYOUT", "COMPASS", "PATH", "AUTHOR", "CUDA_MODULE_LOADING", "HF_HUB_OFFLINE"]
    assert [name for name in names if names_secret(name)] == []


@pytest.mark.parametrize(
    "value",
    [
        "hf_abcdefghijklmnopqrstuvwxyz",
        "ghp_0123456789abcdef0123",
        "sk-proj-0123456789abcdef",
        "AKIAIOSFODNN7EXAMPLE",
        "http://anna:word@proxy:3128",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)
def test_values_that_look_like_secrets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    (tmp_path / "hosts.toml").write_text(
        f'[hosts.a]\naddress = "a"\noverride.env.X = {{ value = "{value}", why = "y" }}'
    )
    monkeypatch.setenv("HEARTH_HOSTS", str(tmp_path / "hosts.toml"))
    with raises("secret", match=r"hosts\.a\.override\.env\.X\.value looks like a secret"):
        host.hosts()


def test_the_profile_fits_any_local_gpu_whose_wheels_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEARTH_WHEELHOUSE", str(tmp_path / "house"))
    gpus = [LocalGpu(Arch(12, 0), "GPU-1"), LocalGpu(Arch(8, 9), "GPU-2")]
    monkeypatch.setattr(look, "local_gpus", lambda: gpus)
    assert look._fitting_profile() == "cuda"
    place = tmp_path / "sageattention.whl"
    place.write_bytes(b"1")
    workspace.current().wheelhouse.admit(place, wheel("sageattention", arch="8.9;12.0"))
    assert look._fitting_profile() == "rtx-4070"
    gpus.clear()
    assert look._fitting_profile() == "cpu"
