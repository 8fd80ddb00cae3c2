"""What compose.yaml says, as compose itself understands it."""

import json
import re
from typing import Any

import pytest

from tests.containers.conftest import CPU, NODES, REPOSITORY, compose

TOOLS = {"status", "backup", "restore"}  # commands of the operator's; `up` starts none
ONE_SHOT = {"provision", "download", "prepare", "register", "submit", "fetch", "eval"} | TOOLS
USERS = {"eval": "10002:10001", "serverapp": "10003:10001"}
Mounts = dict[str, tuple[str, str, bool]]


def _mounts(service: dict[str, Any]) -> Mounts:
    """Target -> source, folder of it, read-only."""
    return {
        m["target"]: (
            m["source"],
            m.get("volume", {}).get("subpath", ""),
            m.get("read_only", False),
        )
        for m in service.get("volumes", ())
    }


@pytest.fixture(scope="module")
def gpu() -> dict[str, Any]:
    return _config()


@pytest.fixture(scope="module")
def cpu() -> dict[str, Any]:
    return _config(*CPU)


def _config(*files: str, **env: str) -> dict[str, Any]:
    profiles = ("--profile", "eval", "--profile", "tools")
    done = compose(*profiles, "config", "--format", "json", files=files or CPU[:1], **env)
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


def test_all_the_services_are_there(gpu: dict[str, Any]) -> None:
    assert set(gpu) == ONE_SHOT | {"superlink", "serverapp", "page"} | set(NODES)


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
        site = f"site-{number:02d}"
        assert _mounts(gpu[name]) == {
            "/site": ("federation", site, True),  # also its key: it can't change that
            "/site/state": ("federation", f"{site}/state", False),
            "/models": ("models", "", True),
            "/locks": ("locks", "", True),
        }


def test_keys_are_seen_whole_by_provision_and_backups_only_and_else_by_their_owner(
    gpu: dict[str, Any],
) -> None:
    of = {
        name: {folder for source, folder, _ in _mounts(s).values() if source == "federation"}
        for name, s in gpu.items()
    }
    whole = ("provision", "backup", "restore")
    for name in whole:
        assert of.pop(name) == {""}
        assert gpu[name]["network_mode"] == "none"
    rows = {f"site-{n:02d}/data" for n in range(20)}
    assert of.pop("prepare") == rows | {"prepared"}
    assert of == {
        "superlink": {"superlink"},
        "serverapp": {"serverapp"},
        "register": {"public"},
        "submit": {"public"},
        "status": {"public"},
        **{n: {f"site-{n[-2:]}", f"site-{n[-2:]}/state"} for n in NODES},
        **{n: set() for n in ("download", "fetch", "eval", "page")},
    }
    assert {n for n, s in gpu.items() if "/federation/ca" in _mounts(s)} == {*whole}
    # A backup changes nothing; SQLite's readers write beside the database, an act into its record.
    assert {t for t, (_, _, fixed) in _mounts(gpu["backup"]).items() if not fixed} == {
        "/state", "/audit", "/backup",
    }  # fmt: skip


def test_what_has_the_internet_holds_nothing_and_what_holds_rows_has_no_network(
    gpu: dict[str, Any], cpu: dict[str, Any]
) -> None:
    for services in (gpu, cpu):
        assert {s["network_mode"] for n, s in services.items() if n in ("prepare", "eval")} == {
            "none"
        }
        assert _mounts(services["download"]) == {
            "/cache": ("cache", "", False),
            "/models": ("models", "", True),  # what is prepared needs no hub
        }
        assert services["download"]["environment"]["HF_HOME"].startswith("/cache/")
        own = {t: m for t, m in _mounts(services["prepare"]).items() if "federation" not in t}
        assert own == {
            "/models": ("models", "", False),
            "/cache": ("cache", "", True),
            "/data": ("own-data", "", True),
        }
        assert not services["prepare"].get("secrets")
        assert services["prepare"]["environment"]["HF_HUB_OFFLINE"] == "1"
        same = ("MODEL_NAME", "DATA_SOURCE", "MODEL_CACHE", "QUANTIZATION", "MODELS_DIR")
        downloaded, prepared = (
            {k: services[n]["environment"][k] for k in same} for n in ("download", "prepare")
        )
        assert downloaded == prepared
    condition = gpu["prepare"]["depends_on"]["download"]["condition"]
    assert condition == "service_completed_successfully"


def test_how_the_hub_is_reached_gets_to_what_asks_it_and_what_decides_the_split_to_prepare() -> (
    None
):
    way = {
        "HTTP_PROXY": "http://p:1",
        "HTTPS_PROXY": "http://p:2",
        "NO_PROXY": "mirror.example.org",
    }
    split = {"DIRICHLET_ALPHA": "0.1", "DATA_SEED": "7"}
    services = _config(HF_ENDPOINT="https://mirror.example.org", **way, **split)
    unset = _config(HF_ENDPOINT="", **dict.fromkeys(way, ""))
    for name in ("download", "fetch"):
        given = services[name]["environment"]
        assert given["HF_ENDPOINT"] == "https://mirror.example.org"
        assert {k: given[f"HUB_{k}"] for k in way} == way
        assert unset[name]["environment"]["HF_ENDPOINT"] == "https://huggingface.co"
        # One that is set, though to nothing, would take away the Docker client's own.
        assert not set(way) & set(unset[name]["environment"])
        assert {s["source"] for s in services[name]["secrets"]} == {"hf-token", "ca"}
    assert split.items() <= services["prepare"]["environment"].items()


def test_a_serverapp_has_results_and_a_secret_and_no_network_but_the_superlinks(
    gpu: dict[str, Any],
) -> None:
    assert _mounts(gpu["serverapp"]) == {
        "/federation/serverapp": ("federation", "serverapp", True),
        "/results": ("results", "", False),
        "/sites": ("sites", "", True),
    }
    assert _mounts(gpu["superlink"])["/results"] == ("results", "", True)
    on_it = {n for n, s in gpu.items() if "runtime" in (s.get("networks") or ())}
    assert on_it == {"superlink", "serverapp"}
    assert set(gpu["serverapp"]["networks"]) == {"runtime"}


def test_register_alone_writes_who_is_who_and_only_the_serverapps_container_reads_it(
    gpu: dict[str, Any],
) -> None:
    mounts = {
        name: (mount["target"], mount.get("read_only", False))
        for name, service in gpu.items()
        for mount in service.get("volumes", ())
        if mount["source"] == "sites"
    }
    assert mounts == {
        "register": ("/sites", False), "serverapp": ("/sites", True), "backup": ("/sites", True),
        "restore": ("/sites", False),
    }  # fmt: skip
    assert all(gpu[name]["environment"]["SITES_DIR"] == "/sites" for name in mounts)


def test_who_acts_writes_the_record_and_no_serverapp_sees_it(gpu: dict[str, Any]) -> None:
    writers = {n: s for n, s in gpu.items() if "/audit" in _mounts(s)}
    assert set(writers) == {"provision", "superlink", "backup", "restore"}
    for service in writers.values():
        assert service["environment"]["AUDIT_DIR"] == "/audit"
        assert _mounts(service)["/audit"] == ("audit", "", False)


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
        assert service["user"] == USERS.get(name, "10001:10001"), name
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
    assert [given[n] for n in ("superlink", "serverapp", "prepare", "eval")] == [11, 11, 12, 13]
    assert {given[n] for n in ("provision", "register", "submit", "fetch", *TOOLS)} == {14}


def test_the_control_api_is_on_a_network_without_supernodes() -> None:
    done = compose("--profile", "tools", "config", "--format", "json")
    made = json.loads(done.stdout)
    networks = {n: set(s.get("networks") or ()) for n, s in made["services"].items()}
    assert networks["superlink"] == {"federation", "control", "runtime"}
    assert networks["submit"] == networks["register"] == networks["status"] == {"control"}
    assert {frozenset(networks[n]) for n in NODES} == {frozenset({"federation"})}
    # An internal one leads nowhere, and published ports go to the other: to the Control API.
    for inner in ("federation", "runtime"):
        assert made["networks"][inner]["internal"]
        # Not even this host, where the engine knows how.
        assert made["networks"][inner]["driver_opts"] == {
            "com.docker.network.bridge.gateway_mode_ipv4": "isolated"
        }
    assert not made["networks"]["control"].get("internal")


def test_what_runs_on_comes_back_after_a_crash_and_a_reboot_and_a_one_shot_does_not(
    gpu: dict[str, Any],
) -> None:
    running = [*NODES, "superlink", "serverapp", "page"]
    assert {gpu[n].get("restart") for n in running} == {"unless-stopped"}
    assert {gpu[n].get("restart") for n in ONE_SHOT - {"submit"}} == {None}
    assert gpu["submit"]["restart"] == "on-failure:1"


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


def test_superlink_and_page_alone_publish_ports_and_only_on_the_loopback(
    gpu: dict[str, Any],
) -> None:
    published = {name: s["ports"] for name, s in gpu.items() if s.get("ports")}
    assert {n: {p["target"] for p in ports} for n, ports in published.items()} == {
        "superlink": {9092, 9093},
        "page": {9080},
    }
    assert {p["host_ip"] for ports in published.values() for p in ports} == {"127.0.0.1"}


def test_the_page_reads_the_results_and_is_on_no_network_of_the_federation(
    gpu: dict[str, Any],
) -> None:
    assert _mounts(gpu["page"]) == {"/results": ("results", "", True)}
    assert set(gpu["page"]["networks"]) == {"page"}
    assert {n for n, s in gpu.items() if "page" in (s.get("networks") or ())} == {"page"}


def test_a_health_check_costs_one_bare_python_without_site_packages(gpu: dict[str, Any]) -> None:
    for name in [*NODES, "superlink", "serverapp", "page"]:
        assert gpu[name]["healthcheck"]["test"][1:3] == ["python3", "-ISc"]


def test_nothing_is_fetched_that_the_dockerfile_does_not_name() -> None:
    text = (REPOSITORY / "docker/Dockerfile").read_text()
    assert "# syntax=" not in text.replace('No "# syntax="', "")
    assert not re.search(r"https?://", text)
