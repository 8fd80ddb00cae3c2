"""What compose.yaml says, as compose itself understands it."""

import json
import re
from typing import Any

import pytest

from tests.containers.conftest import CPU, NODES, REPOSITORY, compose

ONE_SHOT = {"provision", "prepare", "register", "submit", "fetch", "eval"}


@pytest.fixture(scope="module")
def gpu() -> dict[str, Any]:
    return _config()


@pytest.fixture(scope="module")
def cpu() -> dict[str, Any]:
    return _config(*CPU)


def _config(*files: str, **env: str) -> dict[str, Any]:
    done = compose("--profile", "eval", "config", "--format", "json", files=files or CPU[:1], **env)
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


def test_all_the_services_are_there(gpu: dict[str, Any]) -> None:
    assert set(gpu) == ONE_SHOT | {"superlink"} | set(NODES)


def _gpus(service: dict[str, Any]) -> Any:
    return service.get("deploy", {}).get("resources", {}).get("reservations")


def test_every_supernode_reserves_the_gpus(gpu: dict[str, Any]) -> None:
    for name in NODES:
        (device,) = _gpus(gpu[name])["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        assert gpu[name]["environment"]["DEVICE"] == "cuda"


def test_the_cpu_file_takes_every_reservation_away(cpu: dict[str, Any]) -> None:
    assert [name for name, service in cpu.items() if _gpus(service)] == []
    assert {cpu[name]["environment"]["DEVICE"] for name in NODES} == {"cpu"}


def test_a_supernode_mounts_its_own_site_and_nothing_else_of_the_federation(
    gpu: dict[str, Any],
) -> None:
    for number, name in enumerate(NODES):
        mounts = {m["source"]: m for m in gpu[name]["volumes"]}
        assert set(mounts) == {"models", "locks", "federation"}
        assert mounts["federation"]["volume"]["subpath"] == f"site-{number:02d}"
        assert mounts["models"]["read_only"]


def test_register_alone_writes_who_is_who_and_only_the_serverapps_container_reads_it(
    gpu: dict[str, Any],
) -> None:
    mounts = {
        name: (mount["target"], mount.get("read_only", False))
        for name, service in gpu.items()
        for mount in service.get("volumes", ())
        if mount["source"] == "sites"
    }
    assert mounts == {"register": ("/sites", False), "superlink": ("/sites", True)}
    assert all(gpu[name]["environment"]["SITES_DIR"] == "/sites" for name in mounts)


def test_no_supernode_starts_before_its_key_is_registered_and_its_data_prepared(
    gpu: dict[str, Any],
) -> None:
    for name in NODES:
        assert {s: d["condition"] for s, d in gpu[name]["depends_on"].items()} == {
            "register": "service_completed_successfully",
            "prepare": "service_completed_successfully",
        }


def test_everything_runs_unprivileged(gpu: dict[str, Any]) -> None:
    for name, service in gpu.items():
        assert service["user"] == ("10002:10001" if name == "eval" else "10001:10001"), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        assert service["read_only"], name
        for folder in service["tmpfs"]:
            assert f"uid={service['user'][:5]},gid=10001,mode=0700,size=" in folder, name


def test_limits_have_defaults_that_the_environment_overrides() -> None:
    def limits(**env: str) -> dict[str, int]:
        services = _config(**env)
        assert {s["pids_limit"] for s in services.values()} == {int(env.get("PIDS", "4096"))}
        return {n: int(s["mem_limit"]) >> 20 for n, s in services.items()}

    unset = limits()
    assert {unset[n] for n in NODES} == {32 << 10}
    assert min(unset.values()) >= 4 << 10
    names = ("SUPERNODE", "SUPERLINK", "PREPARE", "EVAL", "TASK")
    given = limits(PIDS="99", **{f"{n}_MEMORY": f"{i}m" for i, n in enumerate(names, start=10)})
    assert {given[n] for n in NODES} == {10}
    assert [given[n] for n in ("superlink", "prepare", "eval")] == [11, 12, 13]
    assert {given[n] for n in ("provision", "register", "submit", "fetch")} == {14}


def test_the_control_api_is_on_a_network_without_supernodes() -> None:
    done = compose("config", "--format", "json")
    made = json.loads(done.stdout)
    networks = {n: set(s.get("networks") or ()) for n, s in made["services"].items()}
    assert networks["superlink"] == {"federation", "control"}
    assert networks["submit"] == networks["register"] == {"control"}
    assert {frozenset(networks[n]) for n in NODES} == {frozenset({"federation"})}
    # An internal one leads nowhere, and published ports go to the other: to the Control API.
    assert made["networks"]["federation"]["internal"]
    assert not made["networks"]["control"].get("internal")


def test_what_runs_on_comes_back_after_a_crash_and_a_reboot_and_a_one_shot_does_not(
    gpu: dict[str, Any],
) -> None:
    assert {gpu[n].get("restart") for n in [*NODES, "superlink"]} == {"unless-stopped"}
    assert {gpu[n].get("restart") for n in ONE_SHOT} == {None}


def test_the_evaluation_has_no_network_and_changes_neither_model_nor_cache(
    gpu: dict[str, Any], cpu: dict[str, Any]
) -> None:
    for services in (gpu, cpu):
        service = services["eval"]
        assert service["network_mode"] == "none"
        mounts = {m["target"]: m.get("read_only", False) for m in service["volumes"]}
        assert mounts == {"/models": True, "/cache": True, "/data": True, "/results": False}
        asked = {services[s]["environment"]["EVAL_DATASETS"] for s in ("fetch", "eval")}
        assert len(asked) == 1


def test_only_the_superlink_publishes_ports_and_only_on_the_loopback(gpu: dict[str, Any]) -> None:
    published = {name: s["ports"] for name, s in gpu.items() if s.get("ports")}
    assert set(published) == {"superlink"}
    assert {p["target"]: p["host_ip"] for p in published["superlink"]} == {
        9092: "127.0.0.1",
        9093: "127.0.0.1",
    }


def test_a_health_check_costs_one_bare_python_without_site_packages(gpu: dict[str, Any]) -> None:
    for name in [*NODES, "superlink"]:
        assert gpu[name]["healthcheck"]["test"][1:3] == ["python3", "-ISc"]


def test_nothing_is_fetched_that_the_dockerfile_does_not_name() -> None:
    text = (REPOSITORY / "docker/Dockerfile").read_text()
    assert "# syntax=" not in text.replace('No "# syntax="', "")
    assert not re.search(r"https?://", text)
