"""Starting a SuperNode: its settings, its GPU, its flags, and when to give up."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from superlink.onehost.processes import free_port
from superlink.provision import provision
from supernode import entrypoint, gpus
from supernode.entrypoint import (
    EX_TEMPFAIL,
    HOPELESS,
    NOT_ACTIVATED,
    REFUSED,
    WARM_PROGRAMS,
    command,
    main,
    warm_client_apps,
    watch,
)
from supernode.gpus import NoGpuError, choose_gpu, set_gpu, visible_gpus
from supernode.site_env import SETTINGS, read_site, settings
from tests.samples import IDLE, REPOSITORY

PIN = "0123456789abcdef" * 4


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A provisioned site, as its SuperNode's environment names it."""
    provision(tmp_path / "federation", 3, "superlink:9092", [])
    return {
        "SITE_DIR": str(tmp_path / "federation" / "site-02"),
        "MODELS_DIR": str(tmp_path / "models"),
        "LOCK_DIR": str(tmp_path / "locks"),
        "APP_SHA256": PIN,
    }


def flag(argv: list[str], name: str) -> str:
    assert argv.count(name) == 1
    return argv[argv.index(name) + 1]


def test_the_sites_own_settings_complete_the_environment(env: dict[str, str]) -> None:
    site = read_site(env)
    assert (site["SUPERLINK"], site["PARTITION_ID"], site["NUM_PARTITIONS"]) == (
        "superlink:9092",
        "2",
        "3",
    )
    assert env.items() <= site.items()


def test_settings_from_the_environment_win(env: dict[str, str]) -> None:
    site = read_site(env | {"SUPERLINK": "tunnel:19092", "PARTITION_ID": "0"})
    assert (site["SUPERLINK"], site["PARTITION_ID"], site["NUM_PARTITIONS"]) == (
        "tunnel:19092",
        "0",
        "3",
    )


def test_an_empty_variable_leaves_the_sites_own_choice(env: dict[str, str]) -> None:
    """Both compose files set these whether somebody chose something or not."""
    chosen = {
        "SUPERNODE_GPU": "1", "ALLOW_APP_UPDATES": "1", "WARM_S": "0", "DATA_COLUMNS": "Q,A",
        "RUNTIME_PORT": "9999",
    }  # fmt: skip
    file = Path(env["SITE_DIR"]) / "site.env"
    file.write_text(file.read_text() + "".join(f"{n}={v}\n" for n, v in chosen.items()))
    empty = dict.fromkeys([*chosen, "SUPERLINK", "PARTITION_ID", "NUM_PARTITIONS"], "")
    site = read_site(env | empty)
    assert chosen.items() <= site.items()
    assert (site["SUPERLINK"], site["PARTITION_ID"]) == ("superlink:9092", "2")
    assert choose_gpu(site, 4) == 1
    assert command(site)[4] == "any"


def test_a_variable_that_is_empty_everywhere_gives_the_default(env: dict[str, str]) -> None:
    site = read_site(env | {"RUNTIME_PORT": "", "HEALTH_PORT": ""})
    assert flag(command(site), "--port") == "9094"


def test_a_wrong_setting_is_shown_in_its_line_whatever_is_empty(env: dict[str, str]) -> None:
    file = Path(env["SITE_DIR"]) / "site.env"
    file.write_text(file.read_text().replace("PARTITION_ID=2", "PARTITION_ID=two"))
    with pytest.raises(SystemExit, match=r"PARTITION_ID='two' cannot work; see .*env, line 2$"):
        read_site(env | {"PARTITION_ID": ""})


@pytest.mark.parametrize("name", ["SITE_DIR", "MODELS_DIR", "LOCK_DIR"])
@pytest.mark.parametrize("how", ["absent", "empty"])
def test_a_missing_variable_is_named(env: dict[str, str], name: str, how: str) -> None:
    del env[name]
    if how == "empty":
        env[name] = ""
    with pytest.raises(SystemExit, match=name):
        read_site(env)


@pytest.mark.parametrize("file", ["supernode.key", "superlink-ca.crt", "site.env"])
def test_a_missing_file_of_the_kit_is_named(env: dict[str, str], file: str) -> None:
    (Path(env["SITE_DIR"]) / file).unlink()
    with pytest.raises(SystemExit, match=file):
        read_site(env)


@pytest.mark.parametrize("name", ["SUPERLINK", "PARTITION_ID", "NUM_PARTITIONS"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_setting_that_nobody_gives_is_named_in_one_line(
    env: dict[str, str], name: str, value: str | None
) -> None:
    file = Path(env["SITE_DIR"]) / "site.env"
    lines = [x for x in file.read_text().splitlines() if not x.startswith(f"{name}=")]
    file.write_text("\n".join([*lines, *([f"{name}={value}"] if value is not None else [])]))
    with pytest.raises(SystemExit, match=name):
        command(read_site(env))


@pytest.mark.parametrize("value", ["site-02", "²", "0" * 5000])
def test_a_setting_that_is_no_number_is_named_in_one_line(env: dict[str, str], value: str) -> None:
    with pytest.raises(SystemExit, match="PARTITION_ID"):
        command(read_site(env | {"PARTITION_ID": value}))


@pytest.mark.parametrize(
    "line",
    [
        "SUPERLINK='fed:9092'",
        'SUPERLINK="fed:9092"',
        " SUPERLINK=fed:9092 ",
        "\ufeffSUPERLINK=fed:9092",
    ],
)
def test_quotes_spaces_around_and_a_byte_order_mark_are_taken_off(
    env: dict[str, str], line: str
) -> None:
    file = Path(env["SITE_DIR"]) / "site.env"
    rest = [x for x in file.read_text().splitlines() if not x.startswith("SUPERLINK")]
    file.write_text("\n".join([line, *rest, "EMPTY=", "EQUALS=a=b"]), encoding="utf-8")
    assert read_site(env)["SUPERLINK"] == "fed:9092"
    assert settings(file)["EMPTY"] == ""
    assert settings(file)["EQUALS"] == "a=b"


@pytest.mark.parametrize(
    "line",
    ["export SUPERLINK=fed:9092", "SUPERLINK = fed:9092", "SUPERLINK= fed:9092", "SUPERLINK",
     "SUPERLINK='fed:9092", 'SUPERLINK="', "=fed:9092", "SUPERLINK: fed:9092",
     "SUPERLINK=fed:9092 # ours", "DATA_COLUMNS=A,B\0"],
)  # fmt: skip
def test_another_line_in_the_settings_is_named_by_its_number(
    env: dict[str, str], line: str
) -> None:
    file = Path(env["SITE_DIR"]) / "site.env"
    file.write_text(f"# ours\n{line}\n" + file.read_text())
    with pytest.raises(SystemExit, match=r"site.env, line 2 is not of the form NAME=value"):
        read_site(env)


@pytest.mark.parametrize("address", ["https://fed:9092", "fed", "fed:99999"])
def test_an_address_that_cannot_work_is_named(env: dict[str, str], address: str) -> None:
    with pytest.raises(SystemExit, match=r"SUPERLINK: .*host:port is needed.*see .*site.env$"):
        read_site(env | {"SUPERLINK": address})
    file = Path(env["SITE_DIR"]) / "site.env"
    rest = [x for x in file.read_text().splitlines() if not x.startswith("SUPERLINK")]
    file.write_text("\n".join([*rest, f"SUPERLINK={address}"]))
    with pytest.raises(SystemExit, match=r"SUPERLINK: .*host:port is needed.*site.env, line 3$"):
        read_site(env)


def test_an_address_that_only_a_server_listens_on_is_named(env: dict[str, str]) -> None:
    said = r"SUPERLINK: 0\.0\.0\.0 is what a server listens on, not where .*; see .*site.env$"
    with pytest.raises(SystemExit, match=said):
        read_site(env | {"SUPERLINK": "0.0.0.0:9092"})


def test_a_setting_twice_is_not_chosen_from(env: dict[str, str]) -> None:
    file = Path(env["SITE_DIR"]) / "site.env"
    file.write_text("SUPERLINK=other:9092\n" + file.read_text())
    with pytest.raises(
        SystemExit, match=r"site.env, lines 1 and 2 set SUPERLINK twice; keep one of them"
    ):
        read_site(env)


@pytest.mark.parametrize(
    ("name", "near"),
    [("DATA_COLUMN", "DATA_COLUMNS"), ("supernode_gpu", "SUPERNODE_GPU"), ("WARMS", "WARM_S")],
)
def test_a_name_that_is_nearly_a_settings_is_told_by_its_line(
    env: dict[str, str], capsys: pytest.CaptureFixture[str], name: str, near: str
) -> None:
    file = Path(env["SITE_DIR"]) / "site.env"
    others = ("https_proxy", "HF_HOME", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "TMPDIR", near)
    file.write_text(file.read_text() + "".join(f"{n}=1\n" for n in others) + f"{name}=1\n")
    read_site(env)
    assert capsys.readouterr().err == (
        f"supernode: WARNING: {file}, line 10: {name} is no setting of a site; {near} is\n"
    )


def test_every_setting_of_the_table_is_one_of_a_site() -> None:
    table = [x.split("|")[1] for x in (entrypoint.__doc__ or "").splitlines() if x.startswith("|")]
    assert {n.strip() for cell in table[2:] for n in cell.split(",")} == set(SETTINGS)


def test_a_hash_in_quotes_is_a_part_of_a_value(env: dict[str, str]) -> None:
    file = Path(env["SITE_DIR"]) / "site.env"
    file.write_text(file.read_text() + "DATA_COLUMNS='Question #1,Answer'\n")
    assert read_site(env)["DATA_COLUMNS"] == "Question #1,Answer"


def test_a_partition_beyond_the_last_is_named(env: dict[str, str]) -> None:
    with pytest.raises(SystemExit, match=r"PARTITION_ID=3 cannot work: NUM_PARTITIONS=3"):
        read_site(env | {"PARTITION_ID": "3"})


def test_comments_and_windows_line_ends_in_the_settings_do_no_harm(env: dict[str, str]) -> None:
    file = Path(env["SITE_DIR"]) / "site.env"
    file.write_bytes(b"# our site\r\n\r\n" + file.read_bytes().replace(b"\n", b"\r\n"))
    argv = command(read_site(env))
    assert flag(argv, "--superlink") == "superlink:9092"
    assert flag(argv, "--node-config") == "partition-id=2 num-partitions=3"


@pytest.mark.parametrize(
    "extra", [{}, {"HEALTH_PORT": "9999"}, {"RUNTIME_PORT": "1"}, {"INSECURE": "1"}]
)
def test_tls_and_the_sites_key_are_always_among_the_flags(
    env: dict[str, str], extra: dict[str, str]
) -> None:
    argv = command(read_site(env | extra))
    pinned = [sys.executable, "-m", "supernode.pinned", "run", PIN, "site-02"]
    assert argv[: argv.index("--superlink")] == pinned
    assert "--insecure" not in argv
    site = Path(env["SITE_DIR"])
    assert flag(argv, "--root-certificates") == str(site / "superlink-ca.crt")
    assert flag(argv, "--auth-supernode-private-key") == str(site / "supernode.key")
    assert flag(argv, "--node-config") == "partition-id=2 num-partitions=3"


@pytest.mark.parametrize("pin", ["", "0123", PIN.upper(), PIN + "0"])
def test_without_a_pinned_app_a_site_starts_only_if_it_says_so(
    env: dict[str, str], pin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"APP_SHA256=.* ALLOW_APP_UPDATES=1"):
        command(read_site(env | {"APP_SHA256": pin}))
    argv = command(read_site(env | {"APP_SHA256": pin, "ALLOW_APP_UPDATES": "1"}))
    assert "WARNING: ALLOW_APP_UPDATES=1 is set: no app is checked" in capsys.readouterr().err
    unpinned = [sys.executable, "-m", "supernode.pinned", "run", "any", "site-02"]
    assert argv[: argv.index("--superlink")] == unpinned
    with pytest.raises(SystemExit, match="ALLOW_APP_UPDATES=yes"):
        command(read_site(env | {"ALLOW_APP_UPDATES": "yes"}))


def test_nothing_listens_beyond_the_loopback(env: dict[str, str]) -> None:
    argv = command(read_site(env | {"HEALTH_PORT": "9999", "RUNTIME_PORT": "1234"}))
    assert flag(argv, "--host") == "127.0.0.1"
    assert flag(argv, "--port") == "1234"
    assert flag(argv, "--health-server-address") == "127.0.0.1:9999"
    assert "--health-server-address" not in command(read_site(env))


@hypothesis_settings(max_examples=50)
@given(st.integers(1, 16), st.integers(1, 99))
def test_the_gpus_of_a_host_are_shared_out_evenly(gpus: int, nodes: int) -> None:
    chosen = [choose_gpu({"PARTITION_ID": str(n)}, gpus) for n in range(nodes)]
    counts = [chosen.count(gpu) for gpu in range(gpus)]
    assert sum(counts) == nodes  # none beyond those that are visible
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("empty", [{}, {"SUPERNODE_GPU": ""}])
def test_a_chosen_gpu_is_taken_and_an_empty_choice_is_none(empty: dict[str, str]) -> None:
    assert choose_gpu({"PARTITION_ID": "0", "SUPERNODE_GPU": "3"}, 4) == 3
    assert choose_gpu({"PARTITION_ID": "5", **empty}, 4) == 1


@pytest.mark.parametrize("gpu", ["4", "-1", "cuda:0", "1.0", "all", "²", "9" * 5000])
def test_a_gpu_that_is_not_there_is_named(gpu: str) -> None:
    with pytest.raises(NoGpuError, match="SUPERNODE_GPU"):
        choose_gpu({"PARTITION_ID": "0", "SUPERNODE_GPU": gpu}, 4)


def test_no_gpu_at_all_points_to_the_cpu() -> None:
    with pytest.raises(NoGpuError, match="DEVICE=cpu"):
        choose_gpu({"PARTITION_ID": "0"}, 0)


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_node_with_gpus_says_which_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "for n in 0 1 2 3; do echo GPU $n: Stand-in; done")
    env = {"PARTITION_ID": "7"}
    set_gpu(env)
    assert env["CUDA_VISIBLE_DEVICES"] == "3"
    assert "DEVICE_ERROR" not in env
    assert capfd.readouterr().out == "supernode: GPU 3, one of 4\n"
    env = {"PARTITION_ID": "7", "CUDA_VISIBLE_DEVICES": "2,GPU-abc"}
    set_gpu(env)
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-abc"


def test_a_driver_that_answers_with_other_bytes_keeps_no_node_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = r"printf 'GPU 0: \377 (UUID: GPU-1)\nGPU 1: \376 (UUID: GPU-2)\n'"
    nvidia_smi(tmp_path, monkeypatch, listed)
    assert visible_gpus() == ["0", "1"]


def test_slices_of_a_gpu_are_what_its_sites_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = """cat <<'L'
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5d5ba0d6)
  MIG 3g.40gb     Device  0: (UUID: MIG-7f4b)
  MIG 3g.40gb     Device  1: (UUID: MIG-91aa)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-7c1e)
L"""
    nvidia_smi(tmp_path, monkeypatch, listed)
    assert visible_gpus() == ["MIG-7f4b", "MIG-91aa", "1"]
    env = {"PARTITION_ID": "4"}
    set_gpu(env)
    assert env["CUDA_VISIBLE_DEVICES"] == "MIG-91aa"
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.mark.parametrize(
    ("given", "first", "count"),
    [
        ("2", "2", 1), (" 1 , 3 ", "1", 2), ("GPU-ab,GPU-cd,MIG-ef", "GPU-ab", 3),
        ("3,-1,0", "3", 1), ("0,none,1", "0", 1), ("", "0", 4),
    ],
)  # fmt: skip
def test_cuda_visible_devices_means_what_cuda_takes_it_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    given: str, first: str, count: int,
) -> None:  # fmt: skip
    nvidia_smi(tmp_path, monkeypatch, "for n in 0 1 2 3; do echo GPU $n: Stand-in; done")
    env = {"PARTITION_ID": "0", "CUDA_VISIBLE_DEVICES": given}
    set_gpu(env)
    assert env["CUDA_VISIBLE_DEVICES"] == first
    assert f"one of {count}\n" in capfd.readouterr().out


@pytest.mark.parametrize("given", ["-1", "none", "NoDevFiles", ",0", "void"])
def test_where_every_gpu_is_hidden_it_is_said_by_what(given: str) -> None:
    env = {"PARTITION_ID": "0", "CUDA_VISIBLE_DEVICES": given}
    set_gpu(env)
    assert env["DEVICE_ERROR"].startswith(f"CUDA_VISIBLE_DEVICES={given} hides every GPU")


def test_a_driver_that_does_not_answer_does_not_keep_a_node_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "exec sleep 600")
    monkeypatch.setattr(gpus, "SMI_TIMEOUT_S", 0.5)
    assert len(visible_gpus()) == len(list(Path("/dev").glob("nvidia[0-9]*")))


def test_a_node_without_gpu_starts_and_leaves_the_reason_to_the_preflight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo GPU 0: Stand-in")
    env = {"PARTITION_ID": "7", "SUPERNODE_GPU": "2"}
    set_gpu(env)
    assert env["DEVICE_ERROR"] == "SUPERNODE_GPU=2: this host shows GPUs 0 to 0"
    assert "CUDA_VISIBLE_DEVICES" not in env
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"supernode: ERROR: {env['DEVICE_ERROR']}; no run can start with it"


def test_a_device_that_does_not_exist_is_refused(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (env | {"DEVICE": "tpu"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="DEVICE=tpu"):
        main()


@pytest.mark.parametrize("setting", [{}, {"WARM_S": ""}, {"WARM_S": "45"}])
def test_clientapps_are_warm_unless_told_otherwise(setting: dict[str, str]) -> None:
    env = {"PATH": "/usr/bin", **setting}
    with warm_client_apps(env):
        folder = Path(env["WARM_SOCKET"]).parent
        assert env["PATH"] == f"{WARM_PROGRAMS}:/usr/bin"
        assert env["WARM_S"] == setting.get("WARM_S") or "600"
        assert os.access(WARM_PROGRAMS / "flower-superexec", os.X_OK)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()
    env = {"PATH": "/usr/bin", "WARM_S": "0"}
    with warm_client_apps(env):
        assert env == {"PATH": "/usr/bin", "WARM_S": "0"}


@pytest.mark.parametrize("seconds", ["-1", "1.5", "ten", "1e3", " 5", "12345678"])
def test_a_time_to_keep_the_libraries_that_is_none_is_refused(seconds: str) -> None:
    with (
        pytest.raises(SystemExit, match=f"supernode: WARM_S={seconds}: whole seconds, or 0"),
        warm_client_apps({"PATH": "/usr/bin", "WARM_S": seconds}),
    ):
        pass


# --- watching a real child process --------------------------------------------------------------


@pytest.fixture
def _own_signal_handlers() -> Iterator[None]:
    """``watch`` takes the process's handlers; give them back."""
    old = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.usefixtures("_own_signal_handlers")
def test_the_nodes_log_and_exit_code_are_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    script = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    assert watch(child(script), dict(os.environ)) == 3
    assert sorted(capfd.readouterr().out.splitlines()) == ["one", "two"]


@pytest.mark.usefixtures("_own_signal_handlers")
@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "UNIMPLEMENTED"])
def test_a_node_whose_key_is_refused_says_so(code: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Flower's own answer to what a SuperLink says, here one that refuses every call."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    refuse = Refuse(getattr(grpc.StatusCode, code))
    server.add_generic_rpc_handlers([refuse])
    server.start()
    calls = (
        "import grpc, supernode.pinned as p; p.install_refusal()\n"
        "from flwr.supercore.retry.grpc_retry import make_simple_grpc_retry_invoker as retry\n"
        f"call = grpc.insecure_channel('127.0.0.1:{port}').unary_unary('/flwr.proto.Fleet/Any')\n"
        "retry().invoke(call, b'')"
    )
    try:
        assert watch(child(calls), dict(os.environ)) == 1
    finally:
        server.stop(None)
    refused = f"supernode: ERROR: {REFUSED}\n" if code == "UNAUTHENTICATED" else ""
    assert capfd.readouterr().err == refused
    assert refuse.asked


@pytest.mark.usefixtures("_own_signal_handlers")
@pytest.mark.parametrize("ended_by", ["itself", "somebody"])
def test_an_end_that_is_no_refusal_is_not_called_one(
    ended_by: str, capfd: pytest.CaptureFixture[str]
) -> None:
    # As Flower's SuperNode does, whose process anybody may end, and not its entrypoint only.
    ends = "import os, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
    ends += "os.kill(os.getpid(), signal.SIGTERM); " if ended_by == "somebody" else ""
    assert watch(child(f"{ends}print('bye')"), dict(os.environ)) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("_own_signal_handlers")
def test_a_node_that_is_stopped_and_then_refused_was_stopped(
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Revoked a moment before, it cannot sign off.
    node = (
        "import os, signal; signal.signal(signal.SIGTERM, lambda *_: os._exit(os.EX_NOPERM))\n"
        f"os.kill(os.getppid(), signal.SIGTERM)\n{IDLE}"
    )
    assert watch(child(node), dict(os.environ)) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("_own_signal_handlers")
def test_a_log_of_strange_bytes_does_not_end_the_node(capfd: pytest.CaptureFixture[str]) -> None:
    script = r"import os, sys; os.write(1, b'caf\xe9\nlast\n'); sys.exit(3)"
    assert watch(child(script), dict(os.environ)) == 3
    assert capfd.readouterr().out.splitlines()[-1] == "last"


class Refuse(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Every call ends with this status."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.code, self.asked = code, False

    def service(self, _: object) -> Any:
        def end(_: bytes, context: Any) -> None:
            self.asked = True
            context.abort(self.code, "no")

        return grpc.unary_unary_rpc_method_handler(end)


def failure(reason: str) -> str:
    """As Flower 1.36 logs it when it cannot join."""
    return (
        "\x1b[91mERROR \x1b[0m:     <_InactiveRpcError of RPC that terminated with:\n"
        f'\tstatus = StatusCode.UNAVAILABLE\n\tdetails = "{reason}"\n'
        f'\tdebug_error_string = "{reason}"\n>\n'
    )


JOINED = "\x1b[92mINFO \x1b[0m:      SuperNode ID: 8087837277720571498\n"


@pytest.mark.usefixtures("_own_signal_handlers")
@pytest.mark.parametrize("sign", HOPELESS)
def test_a_node_that_cannot_join_is_ended_with_advice(
    env: dict[str, str], sign: str, capfd: pytest.CaptureFixture[str]
) -> None:
    script = (
        "import os, time; print(os.getpid(), flush=True); "
        f"print({failure(f'x {sign} y')!r}, flush=True); time.sleep(60)"
    )
    started = time.monotonic()
    again = EX_TEMPFAIL if sign == NOT_ACTIVATED else 1
    nobody = f"127.0.0.1:{free_port()}"
    assert watch(child(script), {**os.environ, **env, "SUPERLINK": nobody}) == again
    assert time.monotonic() - started < 20
    out, err = capfd.readouterr()
    assert not alive(int(out.splitlines()[0]))
    seen = f"no connection to the SuperLink at {nobody}: nothing listens"  # by then
    assert (HOPELESS[sign] if sign == NOT_ACTIVATED else seen) in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.usefixtures("_own_signal_handlers")
@pytest.mark.parametrize("sign", HOPELESS)
@pytest.mark.parametrize(
    "said",
    [
        # What a run's code prints, or chooses as a round's name, once the node has joined.
        JOINED + "{sign}\n" + failure("{sign}"),
        JOINED + "\x1b[92mINFO \x1b[0m:      [RUN 1, ROUND {sign}]\n",
        # Nor is it Flower's word on joining before that.
        "\x1b[92mINFO \x1b[0m:      Starting {sign}\n",
        'ERROR :     no such error\n\tdetails = "{sign}"\n',
    ],
)
def test_nobody_but_flower_can_say_that_a_node_cannot_join(
    said: str, sign: str, capfd: pytest.CaptureFixture[str]
) -> None:
    text = said.replace("{sign}", sign)
    assert watch(child(f"import sys; print({text!r}); sys.exit(3)"), dict(os.environ)) == 3
    out, err = capfd.readouterr()
    assert sign in out
    assert err == ""


@pytest.mark.usefixtures("_own_signal_handlers")
def test_nothing_that_steers_a_terminal_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    text = (
        "\x1b[92mINFO \x1b[0m:\tcolour\n"
        "\x1b]0;a new title\x07title\n"
        "\x1b]8;;http://a.example\x1b\\link\x1b]8;;\x1b\\\n"
        "\x1b[2J\x1b[1;1Hcleared\x1bc\x9b31m\n"
        "\x1bPdevice\x1b\\control\x08\x07\x00\n"
        "turned \u202eround\u2028here\u061c\n"
        "unfinished \x1b]0;\n"
        "Grüße, 10 µg – 医\n"
    )
    assert watch(child(f"import sys; print({text!r}, end=''); sys.exit(3)"), dict(os.environ)) == 3
    assert capfd.readouterr().out == (
        "INFO :\tcolour\ntitle\nlink\ncleared31m\ncontrol\nturned roundhere\nunfinished \n"
        "Grüße, 10 µg – 医\n"
    )


def test_a_stopped_container_stops_the_node_too() -> None:
    script = (
        "import os, sys; from supernode.entrypoint import watch; "
        "code = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'; "
        "sys.exit(watch([sys.executable, '-c', code], dict(os.environ)))"
    )
    with subprocess.Popen(child(script), stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as node:
        assert node.stdout
        pid = int(node.stdout.readline())
        assert alive(pid)
        node.send_signal(signal.SIGTERM)
        node.wait(20)
    assert not alive(pid)


def test_a_child_that_waits_for_the_nodes_end_does_not_keep_it_from_ending() -> None:
    # Flower's own children hold the log open until their parent's process is gone for good.
    grandchild = (
        "import os, sys, time\n"
        "while os.path.exists('/proc/' + sys.argv[1]): time.sleep(0.05)\n"
        "print('the child ended too', flush=True)"
    )
    node = (
        "import os, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {grandchild!r}, str(os.getpid())])\n"
        "sys.exit(4)"
    )
    script = (
        "import os, sys; from supernode.entrypoint import watch; "
        f"sys.exit(watch([sys.executable, '-c', {node!r}], dict(os.environ)))"
    )
    done = subprocess.run(
        child(script), cwd=REPOSITORY, timeout=30, check=False, capture_output=True, text=True
    )
    assert done.returncode == 4
    assert "the child ended too" in done.stdout
