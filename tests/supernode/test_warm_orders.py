"""When a SuperNode has a fork server; the ones here only say that they were started."""

import os
import stat
from pathlib import Path

import pytest

from supernode.warm.orders import Keeper
from tests.supernode.test_warm import until


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A line for each fork server that a Keeper has started; these end as the file ``end`` says."""
    package = tmp_path / "supernode" / "warm"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, pathlib, sys, time\n"
        "here = pathlib.Path('.')\n"
        "with (here / 'starts').open('a') as file: print(*sys.argv[1:], file=file)\n"
        "while not (here / 'end').is_file(): time.sleep(0.02)\n"
        "sys.exit(int((here / 'end').read_text()))"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starts").touch()
    return tmp_path / "starts"


def test_only_an_order_to_compute_starts_a_server_and_one_is_enough(
    starts: Path, tmp_path: Path
) -> None:
    keeper, end = Keeper(tmp_path / "warm.socket", 7.0), tmp_path / "end"
    keeper.order_received("query")
    assert keeper._server is None
    for kind in ("train", "evaluate", "train.again"):
        keeper.order_received(kind)
    assert keeper._server
    until(lambda: starts.read_text().count("\n") == 1)
    assert starts.read_text().split()[1:] == ["7.0", str(os.getpid())]
    mode = (tmp_path / "warm.socket").stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert os.getsid(keeper._server.pid) == keeper._server.pid  # not a terminal's to interrupt
    end.write_text("0")  # idle
    keeper._server.wait(20)
    end.unlink()
    keeper.order_received("evaluate")
    until(lambda: starts.read_text().count("\n") == 2)
    end.write_text("1")  # it could not serve, and will not the next time
    keeper._server.wait(20)
    keeper.order_received("train")
    assert keeper._server.poll() == 1


def test_without_a_place_for_its_socket_the_orders_are_done_cold(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Keeper(tmp_path / "gone" / "warm.socket", 7.0).order_received("train")
    said = f"supernode: no warm ClientApps: {tmp_path}/gone/warm.socket: No such file or directory"
    assert capfd.readouterr().out == f"{said}\n"
    Keeper(tmp_path / ("long" * 30), 7.0).order_received("train")
    assert "too long" in capfd.readouterr().out
