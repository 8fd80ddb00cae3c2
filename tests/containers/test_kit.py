"""Two sites with kits, each a compose project on a network of its own, and the operator's project.

They share nothing but the SuperLink's address: one of this host, where its port is published. One
site's key is in its kit, the other one's is made at the site. Images, base model and questions come
out of a bundle, since neither site reaches the hub or the package index: a dead proxy stands before
all but the SuperLink. Each test goes on from where the one before it ended.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.benchmarks import BENCHMARKS
from superlink.control import Control, public_keys
from superlink.onehost.processes import free_port
from supernode.entrypoint import HOPELESS, NOT_ACTIVATED, REFUSED
from tests.containers.conftest import ONLINE_TIMEOUT_S, Federation, ended, wait
from tests.containers.hospitals import DEAD, SUPERNODE, TAG, Hospital, Scene, as_root, bundled
from tests.containers.laptop import laptop
from tests.samples import ROWS, write_jsonl

NEXT_TAG = f"{TAG}-next"
SUPERNODE_NEXT = f"fedllm-medical/supernode:{NEXT_TAG}"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
UNKNOWN = HOPELESS[NOT_ACTIVATED]
RUN_CONFIG = (
    "num-server-rounds=1 train.training-arguments.max-steps=1 strategy.fraction-evaluate=0.0 "
    "strategy.min-nodes=SITES strategy.min-train-nodes=SITES strategy.min-replies=SITES"
)


def online(control: Control) -> int:
    return sum(node.status == "online" for node in control.nodes())


@pytest.fixture(scope="module")
def scene(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The operator's SuperLink, and two kits without rows; all else as a bundle would bring it."""
    bridge = ["docker", "network", "inspect", "bridge", "-f", "{{(index .IPAM.Config 0).Gateway}}"]
    host = subprocess.run(bridge, check=True, capture_output=True, text=True).stdout.strip()
    ports = {"FLEET_PORT": str(free_port()), "CONTROL_PORT": str(free_port())}
    env = ports | {"FLEET_BIND": host, "SUPERLINK_NAMES": host}
    operator = Federation(f"fedllm-kit-{os.getpid()}", env)
    made = Scene(operator, host, [], tmp_path_factory.mktemp("hospitals"))
    try:
        up = operator.compose("up", "-d", "serverapp", "register", "prepare")
        assert up.returncode == 0, up.stderr[-3000:]
        assert operator["prepare"].wait(timeout=ONLINE_TIMEOUT_S)["StatusCode"] == 0
        bundle = bundled(made)
        for site, *arguments in (("site-00",), ("site-01", "--key-at-site")):
            made.unpack(site, made.kit(site, *arguments))
            hospital = Hospital(made.work / site)
            made.hospitals.append(hospital)
            hospital.use(TAG)
            proxies = f"https_proxy={DEAD}\\nno_proxy={host}\\n"
            settings = f"printf '{proxies}' >> /kit/site/site.env"
            as_root("sh", "-c", settings, mounts=(f"{hospital.folder}:/kit",))
            for service, to, what in (
                ("prepare", "/models", "models.tar"), ("download", "/cache", "benchmarks.tar"),
            ):  # fmt: skip
                unpack = ("run", "--rm", "-T", "--no-deps", service, "tar", "-C", to, "-x")
                done = hospital.compose(*unpack, given=bundle / what)
                assert done.returncode == 0, done.stderr
        yield made
    finally:
        for hospital in made.hospitals:
            hospital.compose("--profile", "*", "down", "-v")
        operator.compose("--profile", "*", "down", "-v")
        as_root("sh", "-c", "rm -rf /kit/*", mounts=(f"{made.work}:/kit",))
        next_image = ["docker", "rmi", SUPERNODE_NEXT]
        subprocess.run(next_image, check=False, capture_output=True)
        ended(Path(__file__).name, tmp_path_factory).touch()


@pytest.fixture(scope="module")
def control(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Control:
    """The operator's view, by the CA of his folder as it was at first."""
    return scene.operator.control(scene.operator.public(tmp_path_factory.mktemp("public")))


def last_round(operator: Federation) -> tuple[list[int], dict[str, str]]:
    """Of the newest run: the sites that took part, and those that were left out."""
    line = json.loads(operator.shell("superlink", "cat /results/latest/metrics.jsonl"))
    return line["partitions"], line["rejected"]


def test_two_hospitals_join_with_their_kits_and_train(
    scene: Scene, control: Control, tmp_path: Path
) -> None:
    first, second = scene.hospitals
    # No rows yet: the gate is shut, by the row that says so.
    up = first.compose("up", "-d")
    assert up.returncode != 0
    assert 'service "check" didn\'t complete successfully: exit 1' in up.stderr
    assert first.compose("ps", "-q", "supernode").stdout == ""
    told = first.check()
    assert {n for n, r in told.items() if r["status"] == "error"} == {"rows"}, told

    for number, hospital in enumerate(scene.hospitals):
        given = write_jsonl(tmp_path / f"{number}.jsonl", ROWS[number * 10 : number * 10 + 10])
        to = "/kit/site/data/train.jsonl"
        as_root(
            "install", "--owner=10001", "--mode=0400", f"/from/{given.name}", to,
            mounts=(f"{tmp_path}:/from:ro", f"{hospital.folder}:/kit"),
        )  # fmt: skip
    assert {n for n, r in first.check().items() if r["status"] != "ok"} == set()

    # The other one makes its key, and is let in when the operator has admitted that.
    assert second.check()["key"]["status"] == "error"
    made = second.compose("run", "--rm", "-T", "keygen")
    assert made.returncode == 0, made.stderr
    assert {n for n, r in second.check().items() if r["status"] == "error"} == {"registered"}
    fingerprint = second.check()["key"]["what"].split(",")[0]
    assert fingerprint.encode() in scene.provision("admit", "site-01", "-", given=made.stdout)
    assert "1 of them new; 1 revoked keys shut out" in scene.register()
    assert {n for n, r in second.check().items() if r["status"] != "ok"} == set()

    for hospital in scene.hospitals:
        up = hospital.compose("up", "-d")
        assert up.returncode == 0, up.stderr + hospital.compose("logs", "check").stdout
    assert wait(lambda: online(control) == 2, ONLINE_TIMEOUT_S)
    assert first.check()["registered"]["status"] == "ok"  # beside its SuperNode, which stays online
    config = RUN_CONFIG.replace("SITES", "2")
    submit = ("run", "--rm", "-T", "--no-deps", "submit")
    done = scene.operator.compose(*submit, RUN_CONFIG=config)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert last_round(scene.operator) == ([0, 1], {})


def test_a_hospital_scores_the_adapter_out_of_the_bundle_without_a_hub(
    scene: Scene, tmp_path: Path
) -> None:
    first, _ = scene.hospitals
    copied = scene.operator.compose("cp", "superlink:/results", str(tmp_path / "results"))
    assert copied.returncode == 0, copied.stderr
    take = "cp -r /from/results/latest/peft_1 /kit/eval && chown -R 10001 /kit/eval"
    as_root("sh", "-c", take, mounts=(f"{tmp_path}:/from:ro", f"{first.folder}:/kit"))
    paths = ("--peft-path", "/eval/peft_1", "--out", "/eval/out")
    what = ("--quantization", "nf4-bf16", "--datasets", "medqa", "--limit", "2")
    done = first.compose("run", "--rm", "-T", "eval", *paths, *what)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((first.folder / "eval/out/report.json").read_text())
    scores = {s["name"]: {d: r["n"] for d, r in s["scores"].items()} for s in report["subjects"]}
    assert scores == {"base": {"medqa": 2}, "fl": {"medqa": 2}}
    assert report["datasets"]["medqa"]["source"].startswith(BENCHMARKS["medqa"].repository)


def test_a_site_with_a_new_image_comes_back_as_the_node_that_it_was(scene: Scene) -> None:
    first, _ = scene.hospitals
    build = ["docker", "build", "--quiet", "--tag", SUPERNODE_NEXT, "-"]
    layer = f"FROM {SUPERNODE}\nLABEL version={NEXT_TAG}\n"
    done = subprocess.run(build, check=False, input=layer, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = first.node()
    first.use(NEXT_TAG)
    up = first.compose("up", "-d")
    assert up.returncode == 0, up.stderr
    assert first.supernode().image.id == done.stdout.strip()
    assert wait(first.node)
    assert first.node() == before


def test_a_rotated_key_lets_the_site_in_again_and_the_old_one_nobody(scene: Scene) -> None:
    first, _ = scene.hospitals
    before = first.node()
    told = scene.provision("rotate", "site-00").decode()
    assert told.startswith("provision: site-00 has a new key, its old one is revoked")
    assert "1 of them new; 1 revoked keys shut out" in scene.register()
    assert wait(lambda: REFUSED in first.log())
    assert wait(lambda: UNKNOWN in first.log())  # once the engine has started it again
    assert first.check()["registered"]["status"] == "error"
    assert first.node() == ""

    # The engine starts a refused SuperNode again and again: the key is all that it needs.
    scene.unpack("site-00", scene.kit("site-00"), "site-00/site/supernode.key")
    assert wait(first.node, ONLINE_TIMEOUT_S)
    assert first.node() != before
    assert {n for n, r in first.check().items() if r["status"] != "ok"} == set()


def test_a_revoked_site_is_refused_and_the_superlink_says_by_which_key(
    scene: Scene, tmp_path: Path
) -> None:
    operator, (_, second) = scene.operator, scene.hospitals
    revoked_at = time.time()
    told = scene.provision("revoke", "site-01").decode()
    assert told.startswith("provision: site-01 is revoked; ")
    assert "19 sites at superlink:9093, 0 of them new; 1 revoked keys shut out" in scene.register()
    assert wait(lambda: REFUSED in second.log())
    assert wait(lambda: UNKNOWN in second.log())
    assert second.check()["registered"]["status"] == "error"
    keys = public_keys(operator.public(tmp_path) / "revoked")
    log = operator["superlink"].logs(since=revoked_at).decode().splitlines()
    refusals = [line for line in log if "ActivateNode][ApiError" in line]
    assert any(repr(k) in x for n, k in keys.items() if n[:7] == "site-01" for x in refusals), log
    shown = operator.compose("run", "--rm", "-T", "status", "--format", "json")
    states = {site["site"]: site["state"] for site in json.loads(shown.stdout)["sites"]}
    assert (states["site-00"], states["site-01"]) == ("online", "revoked")


def test_a_laptop_on_another_network_has_the_other_site_train_through_an_ssh_tunnel(
    scene: Scene, tmp_path: Path
) -> None:
    """What trains is the new image, with the new key, whoever was revoked."""
    operator = scene.operator
    ca_file = operator.public(tmp_path) / "ca.crt"
    keys = tmp_path / "keys"
    keys.mkdir()
    with laptop(keys, scene.host, operator.env["CONTROL_PORT"], ca_file) as run:
        code, told = run("python3", "-m", "superlink.connection", "localhost:9093", "/ca.crt")
        assert code == 0, told
        config = f'{RUN_CONFIG.replace("SITES", "1")} model.name="{MODEL}"'
        code, told = run("flwr", "run", ".", "deployment", "--stream", "--run-config", config)
        assert code == 0, told
        assert last_round(operator) == ([0], {})
        assert "[round 1/1] training at site-00\n" in told

        code, told = run("flwr", "run", ".", "deployment")  # of 20 sites, for which it waits
        waiting = re.findall(r"started run (\d+)", told)[0]
        assert run("flwr", "stop", waiting, "deployment")[0] == 0
        code, told = run("flwr", "list", "deployment", "--format", "json")
        runs = {str(r["run-id"]): r["status"] for r in json.loads(told)["runs"]}
        assert runs.pop(waiting) == "finished:stopped"
        assert set(runs.values()) == {"finished:completed"}


def test_a_site_that_is_stopped_is_missed_at_once(scene: Scene, control: Control) -> None:
    first, _ = scene.hospitals
    stopped = first.compose("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert wait(lambda: online(control) == 0)
    assert "SuperNode terminated gracefully" in first.log()
