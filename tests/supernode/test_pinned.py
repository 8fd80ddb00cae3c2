"""The SHA-256 of an app: of names and contents, whatever packed them."""

import io
import zipfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supernode import fab as app_fab
from supernode import pinned
from supernode.pinned import app_sha256
from tests.samples import REPOSITORY

FILES = st.dictionaries(
    st.text("abc/._", min_size=1, max_size=8).filter(lambda n: not n.endswith("/")),
    st.binary(max_size=200), min_size=1, max_size=5,
)  # fmt: skip


def packed(
    files: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED, system: int = 3,
    year: int = 1980,
) -> bytes:  # fmt: skip
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in files:
            entry = zipfile.ZipInfo(name, (year, 1, 1, 0, 0, 0))
            entry.create_system, entry.compress_type = system, method
            archive.writestr(entry, content)
    return out.getvalue()


@given(FILES, st.randoms())
@settings(max_examples=50)
def test_order_system_date_and_compression_change_nothing(
    files: dict[str, bytes], random: object
) -> None:
    entries = list(files.items())
    wanted = app_sha256(packed(entries))
    assert len(wanted) == 64
    assert app_sha256(packed(entries[::-1], zipfile.ZIP_STORED, system=0, year=2026)) == wanted


@given(FILES, st.data())
@settings(max_examples=50)
def test_a_name_a_byte_and_a_file_more_or_less_change_it(
    files: dict[str, bytes], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(files)))
    others = (
        files | {name: files[name] + b"\0"},
        {(n + "x" if n == name else n): c for n, c in files.items()},
        files | {"another": b""},
        {n: c for n, c in files.items() if n != name},
    )
    found = [app_sha256(packed(list(f.items()))) for f in (files, *others)]
    assert len(set(found)) == len(found)


def test_what_could_be_read_in_two_ways_has_none() -> None:
    good = packed([("a", b"1"), ("b", b"22")])
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = packed([("a", b"1"), ("a", b"2")])
    damaged = good.replace(zlib.compress(b"22")[2:-4], b"\xff" * len(zlib.compress(b"22")[2:-4]))
    assert damaged != good
    unknown = bytearray(packed([("a", b"1")]))  # a way of compression that nobody here knows
    unknown[8:10] = b"\x63\0"
    at = unknown.index(b"PK\1\2") + 10
    unknown[at : at + 2] = b"\x63\0"
    lzma = packed([("a", b"1" * 99)], zipfile.ZIP_LZMA).replace(b"\x5d\0\0", b"\xff\xff\xff")
    name = bytearray(packed([("ä", b"1")]).replace("ä".encode(), b"\xff\xff"))  # no UTF-8
    bad = (twice, damaged, bytes(unknown), lzma, bytes(name), good[:-10], b"", b"no zip")
    assert [app_sha256(fab) for fab in bad] == [""] * len(bad)


def test_an_app_that_would_fill_the_memory_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fab = packed([("a", b"\0" * 1000)])
    monkeypatch.setattr(pinned, "MOST_BYTES", 999)
    assert app_sha256(fab) == ""


def test_one_packed_on_another_system_is_the_same_app() -> None:
    fab = app_fab.build(REPOSITORY)
    with zipfile.ZipFile(io.BytesIO(fab)) as archive:
        entries = [(e.filename, archive.read(e)) for e in archive.infolist()]
    there = packed(entries, zipfile.ZIP_STORED, system=0)
    assert there != fab
    assert app_sha256(there) == app_sha256(fab)
