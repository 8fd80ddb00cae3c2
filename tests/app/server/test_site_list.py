"""The operator's list of sites: read as it was written, or refused."""

import json
from pathlib import Path

import pytest

from app.server.site_list import SiteListError, read_site_list, site_name


def test_node_ids_and_partitions_are_those_of_the_file(tmp_path: Path) -> None:
    listed = {"18446744073709551615": "site-07", "5": "site-00", "6": "site-123"}
    (tmp_path / "sites.json").write_text(json.dumps(listed))
    assert read_site_list(tmp_path) == {2**64 - 1: 7, 5: 0, 6: 123}
    assert [site_name(p) for p in (7, 0, 123)] == ["site-07", "site-00", "site-123"]


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "7", '{"a": "site-00"}', '{"1": 0}', '{"1": "site-0"}', '{"1": "site--1"}',
        '{"1": "hospital"}', '{"1": "site-00", "2": "site-00"}', '{"1": "site-00\\n"}',
    ],
)  # fmt: skip
def test_what_register_has_not_written_is_refused_with_the_file_and_the_cure(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "sites.json").write_text(content)
    with pytest.raises(SiteListError, match=r"sites\.json .*run superlink\.register") as caught:
        read_site_list(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_list_at_all_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(SiteListError, match=r"sites\.json is missing; run superlink\.register"):
        read_site_list(tmp_path)


def test_a_list_that_cannot_be_read_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "sites.json").mkdir()
    with pytest.raises(SiteListError, match=r"sites\.json cannot be read: Is a directory"):
        read_site_list(tmp_path)
