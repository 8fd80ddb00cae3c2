"""The site's check: each row right and wrong, its exit code, and no word of the site's data."""

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from superlink import certificates, site_keys
from superlink.onehost.processes import free_port
from superlink.provision import provision
from supernode import check, check_rows
from supernode.apps import APPROVED, approve, note_refused, withdraw
from supernode.check_rows import Site
from tests.samples import REPOSITORY, ROWS, write_jsonl
from tests.supernode.test_reach import moved_clock

PIN = "a" * 64


@pytest.fixture
def env(tmp_path: Path, models_dir: Path) -> dict[str, str]:
    """A SuperNode's environment around a site's folder; no SuperLink listens at its address."""
    federation = tmp_path / "federation"
    provision(federation, 1, f"127.0.0.1:{free_port()}", [])
    write_jsonl(federation / "site-00" / "data" / "train.jsonl", ROWS[:8])
    return {
        "PATH": os.environ["PATH"], "SITE_DIR": str(federation / "site-00"),
        "MODELS_DIR": str(models_dir), "LOCK_DIR": str(tmp_path), "DEVICE": "cpu",
        "APP_SHA256": PIN,
    }  # fmt: skip


@pytest.fixture
def config(tiny_model: Path) -> list[str]:
    return [f'--run-config=model.name="{tiny_model}" model.quantization=4 train.seq-length=256']


def run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "supernode.check", *arguments], cwd=REPOSITORY, env=env, check=False,
        capture_output=True, text=True,
    )  # fmt: skip


def rows(env: dict[str, str], *arguments: str) -> dict[str, dict[str, str]]:
    done = run(env, "--format=json", *arguments)
    assert done.returncode in (check.READY, check.NOT_READY), done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    assert facts["ready"] == (done.returncode == check.READY)
    return {row["row"]: row for row in facts["rows"]}


def of_this_host(env: dict[str, str]) -> dict[str, check.Row]:
    """The rows that need no app, asked in this process."""
    with patch.dict(os.environ):
        return {row.row: row for row in check.asked(Site(dict(env)))}


def test_each_row_is_there_once_and_without_a_superlink_the_site_is_not_ready(
    env: dict[str, str], config: list[str]
) -> None:
    done = run(env, *config)
    assert done.returncode == check.NOT_READY
    *lines, end = done.stdout.splitlines()
    found = {line[9:25].strip(): line[:7].strip() for line in lines}
    assert {name for name, status in found.items() if status == "ERROR"} == {
        "connection", "registered"
    }  # fmt: skip
    assert {name for name, status in found.items() if status == "WARNING"} == {"clock"}
    assert list(found) == [
        *check_rows.ROWS,
        "policy",
        "base model",
        "rows",
        "held-out rows",
        "device",
        "memory",
    ]
    assert "nothing listens at port" in done.stdout
    assert end == "check: 2 errors, 1 warnings; site-00 is not ready: no SuperNode starts"
    assert [r["status"] for r in rows(env, *config).values()] == [
        {"ok": "ok", "WARNING": "warning", "ERROR": "error"}[s] for s in found.values()
    ]


def test_whatever_goes_wrong_in_a_row_is_an_error_row_by_its_type_alone(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(site: Site) -> str:
        raise KeyError("a secret")

    monkeypatch.setitem(check_rows.ROWS, "clock", broken)
    told = of_this_host(env)
    assert told["clock"] == check.Row("clock", "error", "the check itself failed here: KeyError")
    assert told["disk"].status == "ok"


def test_what_the_check_itself_cannot_use_has_an_exit_code_of_its_own(
    env: dict[str, str],
) -> None:
    for arguments, said in (
        (["--bad"], "unrecognized arguments: --bad"),
        (["--format=xml"], "invalid choice: 'xml'"),
        (["--run-config=no-such-key=1"], "no-such-key"),
        (["--run-config=app/profiles/none.toml"], "none.toml"),
    ):
        done = run(env, *arguments)
        assert (done.returncode, done.stdout) == (check.NOT_CHECKED, "")
        assert said in done.stderr
    done = run(env | {"DEVICE": "tpu"})
    assert (done.returncode, done.stderr) == (4, "check: ERROR: DEVICE=tpu: cuda or cpu\n")
    assert run({k: v for k, v in env.items() if k != "MODELS_DIR"}).returncode == 4


def test_the_key_is_read_and_its_mode_and_shown_as_the_operator_sees_it(
    env: dict[str, str],
) -> None:
    path = Path(env["SITE_DIR"]) / "supernode.key"
    pub = path.parents[1] / "public" / "site-00.pub"
    assert of_this_host(env)["key"].what == f"{site_keys.fingerprint(pub)}, mode 0600"
    path.chmod(0o640)
    assert "has mode 0640, so others can read it: chmod 0600" in of_this_host(env)["key"].what
    path.chmod(0o600)
    certificates.write_key(path, certificates.new_key())  # PEM, as the CA's
    assert "is no private key of a site" in of_this_host(env)["key"].what
    path.unlink()
    told = of_this_host(env)
    assert "docker compose run --rm keygen" in told["key"].what
    assert [told[n].status for n in ("settings", "key", "clock")] == ["ok", "error", "warning"]


def test_a_ca_certificate_that_ends_is_told_before(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(env["SITE_DIR"]) / "superlink-ca.crt"
    for days_ago, status, said in ((0, "ok", "in 399 days"), (380, "warning", "ask the operator"),
                                   (402, "error", "by this host's clock")):  # fmt: skip
        with monkeypatch.context() as made:
            made.setattr(certificates, "CA_DAYS", 400)
            moved_clock(made, timedelta(days=-days_ago))
            certificate = certificates.ca_certificate(certificates.new_key())
        certificates.write_certificate(file, certificate)
        row = of_this_host(env)["CA certificate"]
        assert (row.status, said in row.what) == (status, True), row
    file.write_text("no certificate")
    assert "is no PEM certificate" in of_this_host(env)["CA certificate"].what


def test_wrong_settings_leave_nothing_unsaid_and_nobody_is_asked(env: dict[str, str]) -> None:
    file = Path(env["SITE_DIR"]) / "site.env"
    file.write_text("SUPERLINK=https://fed.example.org:9092\nPARTITION_ID=0\nNUM_PARTITIONS=1\n")
    told = of_this_host(env)
    assert "host:port is needed, without a scheme" in told["settings"].what
    for name in ("name", "connection", "clock", "registered"):
        assert (told[name].status, told[name].what[:9]) == ("error", "not asked"), told[name]
    file.write_text("SUPERLINK=no-such-host.invalid:9092\nPARTITION_ID=0\nNUM_PARTITIONS=1\n")
    assert "no-such-host.invalid cannot be resolved" in of_this_host(env)["name"].what
    assert "left to the proxy that https_proxy names" in (
        of_this_host(env | {"https_proxy": "http://127.0.0.1:1"})["name"].what
    )


def test_a_proxy_in_site_env_is_that_of_every_row(env: dict[str, str]) -> None:
    """The SuperNode takes its environment from there as well."""
    file = Path(env["SITE_DIR"]) / "site.env"
    provision(Path(env["SITE_DIR"]).parent, 1, "fed.example.org:9092", [])
    file.write_text(file.read_text() + "https_proxy=http://127.0.0.1:1\n")
    with patch.dict(os.environ):
        told = {row.row: row.what for row in check.asked(Site(dict(env)))}
        assert os.environ["https_proxy"] == "http://127.0.0.1:1"  # gRPC's
    assert told["name"] == "fed.example.org is left to the proxy that https_proxy names"
    assert "the proxy that https_proxy names gives no way to" in told["connection"]


def test_which_app_is_run_and_whether_state_can_be_written(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert of_this_host(env)["app"].what == f"{PIN[:12]} and no other"
    assert of_this_host(env | {"ALLOW_APP_UPDATES": "1"})["app"].status == "warning"
    assert "is no SHA-256" in of_this_host(env | {"APP_SHA256": "7"})["app"].what
    state = Path(env["SITE_DIR"]) / "state"
    note_refused(state, "b" * 64, "", 7)
    approve(state, "b" * 64, "Dr. Weiss")
    assert of_this_host(env)["app"].what == f"{PIN[:12]}, and approved here {'b' * 12}"
    withdraw(state, "b" * 64, "Dr. Rot", PIN)
    assert of_this_host(env)["app"].what == f"{PIN[:12]} and no other"
    (state / APPROVED).write_text("[{}]")
    assert "is no list of approved apps" in of_this_host(env)["app"].what
    shutil.rmtree(state)
    state.mkdir()
    for free, status in ((2048, "ok"), (500, "warning"), (100, "error")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, f=free: SimpleNamespace(free=f << 20))
        assert of_this_host(env)["disk"].status == status
    (Path(env["SITE_DIR"]) / "state").rmdir()
    assert "can write; make it that" in of_this_host(env)["disk"].what


def test_rows_are_counted_and_what_is_lost_is_said_without_a_word_of_them(
    env: dict[str, str], config: list[str], models_dir: Path
) -> None:
    word = "Zanzibar"
    long = {"instruction": f"{word} " * 80, "input": "", "output": "Yes."}
    empty = {"instruction": word, "input": "", "output": "", word: word}
    data = Path(env["SITE_DIR"]) / "data"
    write_jsonl(data / "train.jsonl", [*ROWS[:8], ROWS[0], long, empty])
    write_jsonl(data / "holdout.jsonl", [*ROWS[7:12]])
    done = run(env, *config)
    assert word not in done.stdout + done.stderr
    told = rows(env, *config)
    assert told["rows"]["status"] == "ok"
    assert told["rows"]["what"].startswith(
        "data/train.jsonl: 11 rows, 8 of them used, 1 empty, 1 repeated, 1 too long; columns "
        "instruction, input, output and 1 more; "
    )
    assert told["held-out rows"]["status"] == "warning"  # one of five is known by heart
    assert "5 rows, 4 of them used, 1 known" in told["held-out rows"]["what"]
    assert "fingerprint" in told["base model"]["what"]
    without = rows(env, "--run-config=model.quantization=8", '--run-config=model.name="none"')
    assert "no base model none (8 bits) among the prepared" in without["base model"]["what"]
    assert without["rows"]["status"] == "warning"
    assert "9 of them used, 1 empty, 1 repeated" in without["rows"]["what"]
    (data / "train.jsonl").write_text(f'{{"question": "{word}", "answer": \n')
    broken = run(env, *config)
    assert "data/train.jsonl, line 1: not valid JSON" in broken.stdout
    assert word not in broken.stdout + broken.stderr


def test_a_gpu_that_torch_cannot_use_is_an_error_and_what_it_needs_is_not_guessed(
    env: dict[str, str], config: list[str]
) -> None:
    told = rows(env | {"DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "none"}, *config)
    assert (told["device"]["status"], told["memory"]["status"]) == ("error", "warning")
    assert "hides every GPU" in told["device"]["what"]


def test_the_sites_policy_is_in_force_or_wrong(env: dict[str, str], config: list[str]) -> None:
    file = Path(env["SITE_DIR"]) / "policy.toml"
    assert rows(env, *config)["policy"]["what"].startswith("no policy.toml")
    file.write_text("min-rows = 5\n")
    assert "is in force: min-rows = 5" in rows(env, *config)["policy"]["what"]
    file.write_text("min-row = 5\n")
    told = rows(env, *config)["policy"]
    assert (told["status"], "line 1: unknown key min-row" in told["what"]) == ("error", True)


def test_a_flipped_bit_in_the_base_model_is_an_error(
    env: dict[str, str], config: list[str], models_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(models_dir, tmp_path / "models")
    (weights,) = (tmp_path / "models").glob("*-nf4/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    told = rows(env | {"MODELS_DIR": str(tmp_path / "models")}, *config)
    assert told["base model"]["status"] == "error"
    assert "model.safetensors is not what supernode.prepare wrote" in told["base model"]["what"]


def test_in_the_image_it_is_the_pinned_app_that_is_asked(
    env: dict[str, str], config: list[str], tmp_path: Path
) -> None:
    """Laid out as the Dockerfile does: the app apart, and its reader of rows beside supernode/."""
    image = tmp_path / "image"
    shutil.copytree(REPOSITORY / "supernode", image / "supernode")
    shutil.copytree(REPOSITORY / "app", image / "pinned" / "app")
    (image / "app" / "site").mkdir(parents=True)
    for name in ("rows.py", "row_files.py", "audit.py"):
        shutil.copy(REPOSITORY / "app/site" / name, image / "app" / "site")
    project = (REPOSITORY / "pyproject.toml").read_text()
    (image / "pinned" / "pyproject.toml").write_text(
        re.sub(r"(?m)^seq-length = \d+", "seq-length = 199", project)
    )
    done = subprocess.run(
        [sys.executable, "-m", "supernode.check", config[0].replace("train.seq-length=256", "")],
        cwd=image, env=env | {"PYTHONPATH": str(image)}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "of 199 (train.seq-length)" in done.stdout, done.stdout + done.stderr
    copied = (REPOSITORY / "docker" / "Dockerfile").read_text()
    assert "COPY pyproject.toml ./pinned/\nCOPY app ./pinned/app\n" in copied
