"""Flower's config.toml: ours goes in, everything else of the user's stays."""

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from superlink.connection import main, write_connection


def connections(home: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((home / "config.toml").read_text())["superlink"]
    return found


def test_a_new_file_makes_deployment_the_default(tmp_path: Path) -> None:
    path = write_connection(tmp_path / "home", "localhost:9093", tmp_path / "ca.crt")
    assert path == tmp_path / "home" / "config.toml"
    assert connections(tmp_path / "home") == {
        "default": "deployment",
        "deployment": {
            "address": "localhost:9093",
            "root-certificates": str(tmp_path / "ca.crt"),
        },
    }


def test_the_certificates_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_connection(tmp_path, "localhost:9093", Path("ca.crt"))
    written = connections(tmp_path)["deployment"]["root-certificates"]
    assert written == str(tmp_path / "ca.crt")


def test_writing_again_changes_nothing_and_another_address_replaces_the_old(
    tmp_path: Path,
) -> None:
    path = write_connection(tmp_path, "localhost:9093", tmp_path / "ca.crt")
    first = path.read_text()
    write_connection(tmp_path, "localhost:9093", tmp_path / "ca.crt")
    assert path.read_text() == first
    write_connection(tmp_path, "localhost:9999", tmp_path / "other.crt")
    assert connections(tmp_path)["deployment"] == {
        "address": "localhost:9999",
        "root-certificates": str(tmp_path / "other.crt"),
    }
    assert "9093" not in path.read_text()


def test_the_users_other_connections_and_comments_stay(tmp_path: Path) -> None:
    mine = '# mine\n[superlink]\ndefault = "lab"\n\n[superlink.lab]\naddress = "lab:9093"'
    (tmp_path / "config.toml").write_text(mine)  # without a line end at its end
    for port in (9093, 9094):
        write_connection(tmp_path, f"localhost:{port}", tmp_path / "ca.crt")
        after = connections(tmp_path)
        assert after["default"] == "lab"
        assert after["lab"] == {"address": "lab:9093"}
        assert after["deployment"]["address"] == f"localhost:{port}"
        assert (tmp_path / "config.toml").read_text().startswith(mine)


@pytest.mark.parametrize(
    "own",
    [
        '[superlink.deployment]\naddress = "x:1"\n',
        '[superlink.deployment]\naddress = "x:1"\nroot-certificates = "c"\ninsecure = true\n',
        '[superlink.deployment]\nmax-retries = 3\naddress = "x:1"\nroot-certificates = "c"\n',
        '[superlink]\ndeployment = { address = "x:1", root-certificates = "c" }\n',
    ],
    ids=["fewer keys", "a key behind", "a key in front", "inline"],
)
def test_a_deployment_of_the_users_own_is_never_changed(tmp_path: Path, own: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text("\n" + own)
    with pytest.raises(ValueError, match=r"config\.toml"):
        write_connection(tmp_path, "localhost:9093", tmp_path / "ca.crt")
    assert path.read_text() == "\n" + own


def test_a_file_that_is_not_toml_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[superlink\n")
    with pytest.raises(ValueError, match="line 1"):
        write_connection(tmp_path, "localhost:9093", tmp_path / "ca.crt")
    assert (tmp_path / "config.toml").read_text() == "[superlink\n"


def test_the_command_writes_to_flwr_home_and_refuses_a_missing_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ca = tmp_path / "ca.crt"
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["superlink.connection", "localhost:9093", str(ca)])
    assert main() == 1
    assert str(ca) in capsys.readouterr().err
    assert not (tmp_path / "home").exists()
    ca.touch()
    assert main() == 0
    assert connections(tmp_path / "home")["deployment"]["address"] == "localhost:9093"
    monkeypatch.setattr(sys, "argv", ["superlink.connection"])
    assert main() == 2


def test_an_address_that_flwr_could_not_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ca.crt").touch()
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["x", "https://localhost:9093", str(tmp_path / "ca.crt")])
    assert main() == 1
    assert "host:port is needed" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_a_flwr_of_another_version_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another distribution is found first, as in a laptop's own environment."""
    (tmp_path / "ca.crt").touch()
    found = tmp_path / "flwr-1.40.0.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: flwr\nVersion: 1.40.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["x", "localhost:9093", str(tmp_path / "ca.crt")])
    assert main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "connection: this Python has flwr 1.40.0, and the federation is of another: "
        "pip install flwr==1.36.0"
    )
    assert not (tmp_path / "home").exists()
