"""The adapter's size out of a run.json that any ServerApp may have written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from superlink.adapter_size import adapter_bytes


def test_the_size_is_what_the_serverapp_wrote(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "run.json").write_text(json.dumps({"adapter_parameters": 13_631_488}))
    assert adapter_bytes(tmp_path, 7) == 4 * 13_631_488
    assert adapter_bytes(tmp_path, 8) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda p: os.mkfifo(p),
        lambda p: p.mkdir(),
        lambda p: p.symlink_to(p.with_name("other.json")),
        lambda p: p.symlink_to("/dev/zero"),
        lambda p: p.write_bytes(b" " * 2**23),
        lambda p: p.write_text("[" * 10**6),
        *(
            lambda p, text=text: p.write_text(text)
            for text in (
                "", "[]", "7", "{}", '{"adapter_parameters": null}', '{"adapter_parameters": -7}',
                '{"adapter_parameters": Infinity}', '{"adapter_parameters": "x"}',
            )
        ),
    ],
)  # fmt: skip
def test_what_is_no_run_json_is_no_size_and_nobody_waits_for_it(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "other.json").write_text('{"adapter_parameters": 7}')
    make(tmp_path / "7" / "run.json")
    assert adapter_bytes(tmp_path, 7) == 0
