"""Manifests are valid, strictly, by the schemas of three versions of Kubernetes; batch files for Slurm."""

from __future__ import annotations

import getpass
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from core import files
from ops import cluster_tasks, gateway_pods, manifests, slurm
from tests.conftest import Hearth
from tests.errors import kind_of, raises
from tests.gateway import check

IMAGE = "registry.example/comfyui@sha256:" + "0" * 64

HOSTS = """
[hosts.Spark_1]
address = "a"
profile = "dgx-spark"

[hosts.big]
address = "b"
profile = "cuda"
modes = ["no-metadata"]
[hosts.big.override]
memory_max = "48G"
network = "lan-deny"

[hosts.cpu]
address = "c"
profile = "cpu"
override.network = "offline"

[groups]
all = ["Spark_1", "big", "cpu"]
"""


@pytest.fixture(autouse=True)
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts.toml").write_text(HOSTS)
    monkeypatch.setenv("HEARTH_HOSTS", str(tmp_path / "hosts.toml"))


def objects(name: str, *, dra: bool = False, gpus: str = "2") -> dict[str, Any]:
    texts = manifests.kubernetes([name], IMAGE, gpus, "200Gi", cluster_tasks._gateway, dra=dra)
    (text,) = (text for file, text in texts.items() if file != "kustomization.yaml")
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def valid(value: dict[str, Any], version: str) -> None:
    """Raise ValueError if this is not valid in a version of Kubernetes."""
    import kubernetes_validate  # takes a second

    try:
        kubernetes_validate.validate(value, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(error.message) from error


@pytest.mark.parametrize("version", ["1.35", "1.36", "1.37"])
@pytest.mark.parametrize(("name", "dra"), [("Spark_1", False), ("big", False), ("big", True), ("cpu", False)])
def test_manifests_are_valid(version: str, name: str, dra: bool) -> None:
    found = objects(name, dra=dra)
    assert len(found) == 3 + dra
    for each in found.values():
        valid(each, version)
    found["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readonlyRoot"] = True
    with pytest.raises(ValueError, match="readonlyRoot"):
        valid(found["StatefulSet"], version)


def test_pods_have_the_limits_of_the_host() -> None:
    found = objects("big")
    assert {each["metadata"]["name"] for each in found.values()} == {"comfyui-big"}
    pod = found["StatefulSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "args" not in container  # the flags are in the image
    assert container["resources"] == {"limits": {"memory": "48Gi", "nvidia.com/gpu": 1}}
    assert container["image"] == IMAGE
    assert found["StatefulSet"]["spec"]["replicas"] == 2
    assert (pod["securityContext"]["runAsNonRoot"], container["securityContext"]["readOnlyRootFilesystem"]) == (
        True,
        True,
    )
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports["http"] == found["Service"]["spec"]["ports"][0]["port"] == 8188
    selected = found["StatefulSet"]["spec"]["selector"]["matchLabels"]
    assert selected == found["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert (
        selected == found["Service"]["spec"]["selector"] == found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    )
    assert found["StatefulSet"]["spec"]["serviceName"] == found["Service"]["metadata"]["name"]


def test_a_claim_replaces_the_device_plugin() -> None:
    found = objects("big", dra=True)
    pod = found["StatefulSet"]["spec"]["template"]["spec"]
    assert "nvidia.com/gpu" not in pod["containers"][0]["resources"]["limits"]
    (claim,) = pod["resourceClaims"]
    assert claim["resourceClaimTemplateName"] == found["ResourceClaimTemplate"]["metadata"]["name"]
    assert pod["containers"][0]["resources"]["claims"] == [{"name": claim["name"]}]


@pytest.mark.parametrize(
    ("name", "closed"),
    [("Spark_1", ["169.254.0.0/16"]), ("big", [*manifests.PRIVATE, "169.254.0.0/16"]), ("cpu", None)],
)
def test_the_network_is_the_hosts(name: str, closed: list[str] | None) -> None:
    spec = objects(name)["NetworkPolicy"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    if closed is None:
        assert spec["egress"] == []
    else:
        assert spec["egress"][0]["to"] == [{"ipBlock": {"cidr": "0.0.0.0/0", "except": closed}}]


def test_a_machine_without_a_gpu_requests_none_and_a_name_is_made_valid() -> None:
    assert objects("cpu")["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] == {}
    assert objects("Spark_1")["Service"]["metadata"]["name"] == "comfyui-spark-1"


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"image": ""}, "no image"),
        ({"gpus": "0"}, "number of GPUs"),
        ({"gpus": "two"}, "number of GPUs"),
        ({"storage": "200"}, "not a size"),
        ({"names": ["Spark_1"], "dra": True}, "GB10"),
    ],
)
def test_bad_values_are_refused(given: dict[str, Any], what: str) -> None:
    values: dict[str, Any] = {"names": ["big"], "image": IMAGE, "gpus": "1", "storage": "1Gi", "dra": False} | given
    values["render"] = cluster_tasks._gateway
    with raises("usage", match=what):
        manifests.kubernetes(**values)


def test_the_task_writes_a_folder_for_kustomize(hearth: Hearth, tmp_path: Path) -> None:
    words = ["manifests", "--group", "all", "--image", IMAGE, "--output", str(tmp_path / "out"), "--json"]
    hearth.env["HEARTH_HOSTS"] = str(tmp_path / "hosts.toml")
    assert kind_of(hearth.inv(*words).stderr) == "usage"
    done = hearth.inv(*words, "--kubernetes")
    listed = yaml.safe_load((tmp_path / "out/kustomization.yaml").read_text())["resources"]
    assert listed == ["comfyui-spark-1.yaml", "comfyui-big.yaml", "comfyui-cpu.yaml"]
    assert sorted(json.loads(done.stdout)) == sorted(str(path) for path in (tmp_path / "out").iterdir())
    before = {path: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert hearth.inv(*words, "--kubernetes").returncode == 0
    assert {path: path.read_text() for path in (tmp_path / "out").iterdir()} == before


# --- gateways --------------------------------------------------------------------------------------------------------

GATEWAY = """
[gateways.Home_1]
host = "big"
behind = ["big", "other"]
names = ["comfyui.example"]
users.anna.role = "administrator"
users.ben = {}

[hosts.other]
address = "d"
profile = "cuda"
listen = "10.0.0.2"

[groups]
two = ["big", "other"]
"""


def gateway(tmp_path: Path, more: str = "", gpus: str = "2") -> dict[str, dict[str, Any]]:
    """The objects of a gateway in front of two hosts."""
    text = HOSTS.partition("[groups]")[0] + GATEWAY + more
    (tmp_path / "hosts.toml").write_text(text)
    texts = manifests.kubernetes(["big", "other"], IMAGE, gpus, "1Gi", cluster_tasks._gateway, dra=False)
    assert json.loads(texts["kustomization.yaml"])["resources"][-1] == "gateway-home-1.yaml"
    return {each["kind"]: each for each in yaml.safe_load_all(texts["gateway-home-1.yaml"])}


@pytest.mark.parametrize("version", ["1.35", "1.36", "1.37"])
def test_a_gateway_is_valid(version: str, tmp_path: Path) -> None:
    found = gateway(tmp_path)
    assert {*found} == {"ConfigMap", "Deployment", "Service", "NetworkPolicy"}
    for each in found.values():
        valid(each, version)


def test_a_gateway_reaches_every_pod_and_nobody_goes_around_it(tmp_path: Path) -> None:
    found = gateway(tmp_path)
    servers = re.findall(r"^    server (\S+) \"(\S+)\"", found["ConfigMap"]["data"]["haproxy.cfg"], re.MULTILINE)
    domain = "${NAMESPACE}.svc.${CLUSTER_DOMAIN}:8188"
    pods = [("comfyui-big", 0), ("comfyui-big", 1), ("comfyui-other", 0), ("comfyui-other", 1)]
    assert servers == [(f"{name}-{number}", f"{name}-{number}.{name}.{domain}") for name, number in pods]
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    (allowed,) = objects("big")["NetworkPolicy"]["spec"]["ingress"][0]["from"]
    assert allowed["podSelector"]["matchLabels"].items() <= labels.items()
    assert found["Service"]["spec"]["selector"] == found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    (to,) = found["NetworkPolicy"]["spec"]["egress"][0]["to"]
    assert to["podSelector"]["matchLabels"].items() <= objects("big")["Service"]["metadata"]["labels"].items()
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (pod["securityContext"]["runAsNonRoot"], container["securityContext"]["readOnlyRootFilesystem"]) == (
        True,
        True,
    )


def test_another_configuration_starts_another_pod(tmp_path: Path) -> None:
    one, again, two = (gateway(tmp_path, more) for more in ("", "", "[gateways.Home_1.limits]\nprompts = 3\n"))
    assert one == again
    spec = [each["Deployment"]["spec"]["template"]["metadata"]["annotations"] for each in (one, two)]
    assert spec[0] != spec[1]


@pytest.mark.needs("haproxy", "openssl")
def test_haproxy_accepts_the_configuration_of_pods(tmp_path: Path) -> None:
    found = gateway(tmp_path, '[gateways.Home_1.users.cleo]\nhost = "other"\n', gpus="1")
    text = found["ConfigMap"]["data"]["haproxy.cfg"]
    assert "use_backend only_comfyui-other-0 if { var(txn.user) -m str cleo }" in text
    for folder in (gateway_pods.SECRETS, gateway_pods.RUN):
        text = text.replace(folder, str(tmp_path))
    check(tmp_path, text, NAMESPACE="default", CLUSTER_DOMAIN="cluster.local")


def test_a_person_of_one_host_has_one_pod(tmp_path: Path) -> None:
    with raises("usage", match="cleo"):
        gateway(tmp_path, '[gateways.Home_1.users.cleo]\nhost = "other"\n')


def test_a_gateway_of_further_hosts_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gateway(tmp_path)
    texts = manifests.kubernetes(["big"], IMAGE, "1", "1Gi", cluster_tasks._gateway, dra=False)
    assert [*texts] == ["kustomization.yaml", "comfyui-big.yaml"]
    assert "other" in capsys.readouterr().err


# --- Slurm; tests/host/test_local.py runs a job ----------------------------------------------------------------------

LOGIN = """
[hosts.Login_1]
address = "login.example"
user = "anna"
ssh_port = 2222
profile = "cuda"
scope = "user"
prefix = "/shared/anna"
port = 8190
override.memory_max = "48G"

[hosts.small]
address = "c"
profile = "cpu"
scope = "user"
mounts."/shared/models" = {}
"""


def batch(name: str) -> str:
    (text,) = slurm.batch_files([name]).values()
    compile(text, name, "exec")
    return text


def test_a_batch_file_has_the_limits_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "hosts.toml").write_text(LOGIN)
    assert [*slurm.batch_files(["Login_1", "small"])] == ["comfyui-login-1.sbatch", "comfyui-small.sbatch"]
    found = re.findall(r"^#SBATCH --(.*)$", batch("Login_1"), re.MULTILINE)
    assert {"job-name=comfyui-login-1", "gres=gpu:1", "mem=48G", "dependency=singleton"} <= {*found}
    assert "gres=gpu:1" not in batch("small")
    assert "mem=" not in batch("small")


def job(tmp_path: Path, name: str, prefix: Path | None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a batch file without Slurm, with another prefix."""
    text = batch(name)
    text = re.sub(r"(?<=^PREFIX = ).*$", json.dumps(str(prefix)), text, flags=re.MULTILINE) if prefix else text
    (tmp_path / "job").write_text(text)
    env = {"HOME": "/", "PATH": os.environ["PATH"], **env}
    argv = [sys.executable, str(tmp_path / "job")]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.process
def test_a_job_without_its_release_or_mounts_names_the_reason(tmp_path: Path) -> None:
    (tmp_path / "hosts.toml").write_text(LOGIN)
    failed = job(tmp_path, "Login_1", None)
    assert (failed.returncode, kind_of(failed.stderr)) == (1, "no-release")
    assert "/shared/anna" in failed.stderr
    files.write(tmp_path / "prefix/current/release.json", "{}")
    failed = job(tmp_path, "small", tmp_path / "prefix")
    assert (failed.returncode, kind_of(failed.stderr)) == (1, "not-mounted")


@pytest.mark.process
def test_a_job_confines_comfyui_to_its_port_and_passes_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "hosts.toml").write_text(LOGIN)
    show = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)])); sys.exit(3)"
    confined = [sys.executable, "-c", show, json.dumps({"bind": [1], "connect": []}), "--"]
    release = {"version": "1.2.3", "confined": confined, "argv": ["main.py"], "environment": {"HOME": "/data"}}
    files.write(tmp_path / "prefix/current/release.json", json.dumps(release))
    done = job(tmp_path, "Login_1", tmp_path / "prefix", CUDA_VISIBLE_DEVICES="1", PYTHONPATH="/modules")
    assert done.returncode == 3, done.stderr
    *told, shown = done.stdout.splitlines()
    assert re.search(rf"-L 8190:127\.0\.0\.1:\d+ -J anna@login\.example:2222 {getpass.getuser()}@", told[1])
    argv, environment = json.loads(shown)
    port = int(argv[-1])
    assert argv[1:] == ["--", "main.py", "--listen", "127.0.0.1", "--port", str(port)]
    assert json.loads(argv[0]) == {"bind": [1, port], "connect": []}
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["HOME"]) == ("1", "/data")
    assert "PYTHONPATH" not in environment


def test_a_host_whose_data_is_its_services_has_no_batch_file() -> None:
    with raises("usage", match="scope"):
        slurm.batch_files(["big"])


@pytest.mark.parametrize(
    "words",
    [(), ("--slurm", "--kubernetes"), ("--slurm", "--gpus", "2"), ("--slurm", "--image", "x"), ("--slurm", "--dra")],
)
def test_options_of_one_kind_of_cluster(hearth: Hearth, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = hearth.inv("manifests", "--output", str(tmp_path / "out"), *words)
    assert kind_of(done.stderr) == "usage"
    assert not (tmp_path / "out").exists()
