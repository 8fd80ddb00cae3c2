"""The one reader of rows: what prepare passes a site reads, and a question is the whole of it."""

import csv
import datetime
import io
import json
import subprocess
import sys
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.site import partition
from app.site.partition import Row, SiteError
from supernode.download import PrepareError
from supernode.partitions import Split, prepare_data
from tests.samples import REPOSITORY, ROWS, write_jsonl

PLAIN = [{"question": f"Wozu dient Organ {n}, ü?", "answer": f"Für {n} ß."} for n in range(12)]
EXPECTED = [Row(r["question"], r["answer"]) for r in PLAIN]


def site_rows(folder: Path, name: str, content: bytes, columns: str = "") -> list[Row]:
    """What a site reads from a file of this name and content, as its own data/train.*."""
    path = folder / "data" / f"train{Path(name).suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return partition.load(folder, "train", columns)


def prepared_rows(folder: Path, name: str, content: bytes, columns: str = "") -> list[Row]:
    """What two sites read after prepare has split that file, in whatever order."""
    source = folder / f"source{Path(name).suffix}"
    source.write_bytes(content)
    federation = folder / "federation"
    prepare_data(federation, Split(str(source), 2, columns=columns))
    parts = [(n, part) for n in (0, 1) for part in ("train", "holdout")]
    return [r for n, p in parts for r in partition.load(federation / f"site-{n:02d}", p)]


def both(folder: Path, name: str, content: bytes, columns: str = "") -> list[Row]:
    """The rows of a file that a site and prepare read alike."""
    rows = site_rows(folder, name, content, columns)
    assert sorted(prepared_rows(folder, name, content, columns), key=repr) == sorted(rows, key=repr)
    return rows


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


ARRAY = json.dumps(PLAIN, indent=2, ensure_ascii=False)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(PLAIN).encode()),
        ("a.JSONL", lines(PLAIN).encode()),
        ("a.jsonl", lines(PLAIN).encode("utf-8-sig")),
        ("a.jsonl", lines(PLAIN).encode("utf-16")),
        ("a.jsonl", b"\xfe\xff" + lines(PLAIN).encode("utf-16-be")),
        ("a.json", ARRAY.encode("utf-32")),
        ("a.jsonl", lines(PLAIN).replace("\n", "\r\n").encode()),
        ("a.jsonl", lines(PLAIN).replace("\n", "\n\n  \n").encode()),
        ("a.jsonl", lines(PLAIN).removesuffix("\n").encode()),
        ("a.jsonl", ARRAY.encode()),
        ("a.json", ARRAY.encode()),
        ("a.Json", b"\n \r\n" + ARRAY.encode()),
        ("a.json", b"\xef\xbb\xbf\n" + ARRAY.encode()),
        ("a.json", lines(PLAIN).encode()),
        ("a.csv", as_csv(PLAIN).encode()),
        ("a.CSV", as_csv(PLAIN, ";").encode("utf-8-sig")),
        ("a.csv", as_csv(PLAIN, "\t").encode("utf-16")),
        ("a.json", ARRAY.encode("utf-16-le")),
        ("a.csv", as_csv(PLAIN).encode("utf-16-be")),
        ("a.jsonl", lines(PLAIN).replace("\n", "\r").encode()),
        ("a.jsonl", b"".join(line.encode("utf-8-sig") for line in lines(PLAIN).splitlines(True))),
        ("a.csv", ("sep=;\n" + as_csv(PLAIN, ";")).encode("utf-8-sig")),
        ("a.csv", as_csv(PLAIN).replace("\n", "\n \n").encode()),
    ],
)
def test_the_same_rows_come_out_of_whatever_a_program_writes(
    tmp_path: Path, name: str, content: bytes
) -> None:
    assert both(tmp_path, name, content) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            lines(PLAIN).encode("latin-1"),
            r"line 1, byte 34 \(0xfc\): not UTF-8; save the file as UTF-8",
        ),
        ("a.csv", as_csv(PLAIN).encode("cp1252"), r"line 2, byte 38 \(0xfc\): not UTF-8"),
        (
            "a.jsonl",
            b"\xef\xbb\xbf" + b'{"question": "A?"}\n\n{"q": "f\xfcr Organ"}',
            r"line 3, byte 31 \(0xfc\): not UTF-8",
        ),
        ("a.jsonl", b"\xff\xfea", r"byte 2 \(0x61\): not UTF-16"),
    ],
)
def test_another_encoding_is_refused_with_the_byte_and_what_to_do(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    for read, error in ((site_rows, SiteError), (prepared_rows, PrepareError)):
        with pytest.raises(error, match=words) as caught:
            read(tmp_path, name, content)
        assert "Organ" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("a.json", b"\n<!DOCTYPE html><html>", "a web page"),
        ("a.csv", b"PK\x03\x04\x14\0", "a zip archive or an Excel file"),
        ("a.jsonl", b"\x1f\x8b\x08\0", "compressed with gzip"),
    ],
)
def test_what_is_no_file_of_rows_is_told_as_what_it_is(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    for read, error in ((site_rows, SiteError), (prepared_rows, PrepareError)):
        with pytest.raises(error, match=words):
            read(tmp_path, name, content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"question": "A?", "answer": "B.", "answer": "C."}'),
        ("a.json", '[{"question": "A?", "Answer": "B.", "answer ": "C."}]'),
        ("a.csv", "question,answer,Answer\nA?,B.,C.\n"),
    ],
)
def test_a_column_that_is_there_twice_is_not_chosen_from(
    tmp_path: Path, name: str, content: str
) -> None:
    with pytest.raises(SiteError, match="column 'answer' is there twice"):
        site_rows(tmp_path, name, content.encode())


def test_columns_twice_that_nobody_asks_for_do_no_harm(tmp_path: Path) -> None:
    content = "question,answer,,\nA?,B.,,\n"  # as Excel leaves empty columns
    assert site_rows(tmp_path, "a.csv", content.encode()) == [Row("A?", "B.")]


def test_nothing_is_guessed_and_what_is_not_there_is_empty(tmp_path: Path) -> None:
    rows = """
        {"instruction": "Dose of A in mg?", "input": null, "output": 5}
        {"instruction": "Dose of B in mg?", "output": 0.50}
        {"instruction": "Born?", "input": "", "output": "2020-01-01"}
        {"instruction": "Opened?", "output": 1e5, "score": NaN}
        {"instruction": "Alive?", "output": true}
        {"instruction": 112, "input": "Which number?", "output": 9007199254740993}
        {"instruction": "Cell count?", "output": 123456789012345678901234567890}
        {"instruction": "No answer?", "output": null}
        {"instruction": "None at all?"}
        {"output": "No question."}
        {"instruction": "Not a number?", "output": NaN}
    """
    assert both(tmp_path, "a.jsonl", rows.encode()) == [
        Row("Dose of A in mg?", "5"),
        Row("Dose of B in mg?", "0.50"),
        Row("Born?", "2020-01-01"),
        Row("Opened?", "1e5"),
        Row("Alive?", "true"),
        Row("112\nWhich number?", "9007199254740993"),
        Row("Cell count?", "123456789012345678901234567890"),
    ]
    part = partition.part_of(tmp_path, "train")
    assert part.counts() == {"read": 11, "empty": 4, "repeated": 0, "known": 0}


def test_the_columns_of_a_parquet_file_are_texts_whatever_their_type(tmp_path: Path) -> None:
    answers: list[pa.Array] = [
        pa.array([5.0, None], pa.float64()),
        pa.array([0.1, 2.0], pa.float32()),
        pa.array([7, 8], pa.int16()),
        pa.array([datetime.date(2020, 1, 1), None]),
        pa.array([datetime.datetime(2020, 1, 1, 8, 30), None]),
        pa.array([Decimal("1.50"), None]),
        pa.array([True, False]),
        pa.array(["mild", "mild"]).dictionary_encode(),
        pa.array([None, None]),
    ]
    found = []
    for values in answers:
        table = pa.table({"question": ["A?", "B?"], "answer": values})
        path = tmp_path / "data" / "train.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, path)
        try:
            found.append([r.answer for r in partition.load(tmp_path, "train")])
        except SiteError:
            found.append([])
    assert found == [
        ["5"], ["0.1", "2"], ["7", "8"], ["2020-01-01"], ["2020-01-01 08:30:00"], ["1.50"],
        ["true", "false"], ["mild", "mild"], [],
    ]  # fmt: skip


BAD = {
    "not valid JSON": '{"question": "Lindqvist',
    "no text in column 'answer'": '{"question": "Lindqvist?", "answer": ["Lindqvist"]}',
    "half a character": '{"question": "Lindqvist \\ud83d", "answer": "Lindqvist"}',
    "not an object of columns": '"Lindqvist"',
}


def test_all_bad_lines_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    good = lines(PLAIN[:1])
    content = "".join(good + BAD[why] + "\n" for why in sorted(BAD) for _ in range(4))
    for read, error in ((site_rows, SiteError), (prepared_rows, PrepareError)):
        with pytest.raises(error) as caught:
            read(tmp_path, "a.jsonl", content.encode())
        message = str(caught.value)
        assert "16 rows cannot be taken, the first ten: " in message
        named = [f"line {n}" for n in range(2, 22, 2)]
        assert ", ".join(named[:4]) + ": half a character" in message
        assert ", ".join(named[4:8]) + ": no text in column 'answer'" in message
        assert ", ".join(named[8:]) + ": not an object of columns" in message
        assert "line 22" not in message
        assert "Lindqvist" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("question,answer\nA?,B.\nC?,D.,E.\nF?\n", "line 3: 3 fields, and 2 columns; .*line 4: 1 "),
        ('question,answer\nA?,"B.\n', "line 2: not valid CSV"),
        ('question,answer\n"A\n?",B.\n"C"?,D.\n', "line 4: not valid CSV"),
    ],
)
def test_a_csv_file_whose_fields_are_no_columns_is_refused_by_the_line(
    tmp_path: Path, content: str, words: str
) -> None:
    with pytest.raises(SiteError, match=words):
        site_rows(tmp_path, "a.csv", content.encode())


NOTES = [(f"Is sign {n} in the note?", f"Note {n // 5}.", f"Answer {n}.") for n in range(20)]
ASKED = [Row(f"{question}\n{note}", answer) for question, note, answer in NOTES]


def alpaca(rows: list[tuple[str, str, str]]) -> list[dict[str, str]]:
    return [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]


def test_a_question_and_the_note_that_it_is_about_are_both_asked(tmp_path: Path) -> None:
    assert both(tmp_path, "a.jsonl", lines(alpaca(NOTES)).encode()) == ASKED


def test_an_instruction_that_all_rows_share_is_no_part_of_the_question(tmp_path: Path) -> None:
    assert both(tmp_path, "a.jsonl", lines(list(ROWS)).encode()) == [
        Row(r["input"], r["output"]) for r in ROWS
    ]
    # One other row, and it says something.
    mixed = [*alpaca([("Summarise", "A note.", "A.")]), *ROWS]
    assert site_rows(tmp_path, "a.jsonl", lines(mixed).encode())[1].question == (
        f"{ROWS[0]['instruction']}\n{ROWS[0]['input']}"
    )


@pytest.mark.parametrize(
    "nothing",
    [
        "<noinput>",
        "N/A",
        "n/a",
        "None",
        "null",
        "NaN",
        " ",
        None,
        "<NoInput> ",
        "<no_input>",
        "[No input]",
        "no-input",
        "#N/A",
        "n.a.",
        "-",
        "--",
        "None.",
        "<NA>",
        "\\N",
        "-" * 40,
    ],
)
def test_a_placeholder_is_nothing(tmp_path: Path, nothing: str | None) -> None:
    rows = [{"instruction": f"What is {n}?", "input": nothing, "output": "A."} for n in range(9)]
    rows += [{"instruction": nothing, "input": f"And {n}?", "output": "A."} for n in range(9)]
    found = both(tmp_path, "a.jsonl", lines(rows).encode())
    wanted = [f"What is {n}?" for n in range(9)] + [f"And {n}?" for n in range(9)]
    assert [row.question for row in found] == wanted


@pytest.mark.parametrize(
    "text",
    [
        "-" * 40 + "\nDischarge note: no fever.",
        "_" * 40 + "\nDear colleague, no fever.",
        "| --- | --- | --- | --- | --- |\n| fever | no |",
        "- - - - - - - - - - - -\nNo fever.",
        "[" * 30 + "no fever" + "]" * 30,
        "None known, not any.",
    ],
)
def test_a_text_that_only_begins_like_a_placeholder_is_kept_whole(
    tmp_path: Path, text: str
) -> None:
    rows = [{"instruction": f"Fever {n}?", "input": text, "output": text} for n in range(9)]
    rows += [{"instruction": text, "input": f"And {n}?", "output": text} for n in range(9)]
    found = both(tmp_path, "a.jsonl", lines(rows).encode())
    wanted = [f"Fever {n}?\n{text}" for n in range(9)] + [f"{text}\nAnd {n}?" for n in range(9)]
    assert [row.question for row in found] == wanted
    assert {row.answer for row in found} == {text}


def test_none_is_an_answer_and_other_placeholders_are_none(tmp_path: Path) -> None:
    answers = [
        "None", "N/A", "<nooutput>", "nan", "No", "Na", "(none)", "<NA>", "\\N", "NA",
    ]  # fmt: skip
    rows = [{"question": f"Known allergy {a}?", "answer": a} for a in answers]
    rows += PLAIN
    found = both(tmp_path, "a.jsonl", lines(rows).encode())
    assert [row.answer for row in found if row not in EXPECTED] == [
        "None", "No", "Na", "(none)", "NA",
    ]  # fmt: skip


def turns(*said: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def test_a_chat_of_one_turn_each_is_a_question_and_its_answer(tmp_path: Path) -> None:
    chats = [
        turns(("system", f"You are {n % 2}."), ("user", f"Why {n}?"), ("assistant", f"So {n}."))
        for n in range(10)
    ]
    found = both(tmp_path, "a.jsonl", lines(chats).encode())
    assert found == [Row(f"You are {n % 2}.\nWhy {n}?", f"So {n}.") for n in range(10)]
    shared = [turns(("system", "You help."), ("user", f"{n}?"), ("assistant", "Y")) for n in "ab"]
    path = tmp_path / "data" / "train.jsonl"
    path.unlink()
    pq.write_table(pa.Table.from_pylist(shared), path.with_suffix(".parquet"))
    assert partition.load(tmp_path, "train") == [Row("a?", "Y"), Row("b?", "Y")]


def test_each_row_of_files_put_together_has_its_own_form(tmp_path: Path) -> None:
    rows = [
        {"instruction": "A?", "output": "1"}, {"question": "B?", "answer": "2"},
        turns(("User", "C?"), ("Assistant", "3")), {"instruction": "D?", "output": "4"},
        {"question": "", "answer": ""},
        {"instruction": "In a word", "question": "E?", "answer": "5"},
    ]  # fmt: skip
    found = site_rows(tmp_path, "a.jsonl", lines(rows).encode())
    assert found == [
        Row("A?", "1"), Row("B?", "2"), Row("C?", "3"), Row("D?", "4"), Row("In a word\nE?", "5"),
    ]  # fmt: skip
    assert partition.part_of(tmp_path, "train").counts()["empty"] == 1


@pytest.mark.parametrize(
    "chat",
    [
        turns(("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D.")),
        turns(("user", "A?")),
        turns(("assistant", "B."), ("user", "A?")),
        turns(("human", "A?"), ("gpt", "B.")),
        {"messages": "A? B."},
        {"messages": ["A?", "B."]},
    ],
)
def test_any_other_chat_is_named_by_its_line(tmp_path: Path, chat: dict[str, Any]) -> None:
    good = turns(("user", "Q?"), ("assistant", "A."))
    with pytest.raises(SiteError, match=r"data/train\.jsonl, line 2: .*'messages'"):
        site_rows(tmp_path, "a.jsonl", lines([good, chat]).encode())


def test_a_single_row_keeps_its_instruction(tmp_path: Path) -> None:
    content = lines(alpaca(NOTES[:1])).encode()
    assert site_rows(tmp_path, "a.jsonl", content) == ASKED[:1]


def test_a_column_of_data_columns_that_is_not_there_is_named(tmp_path: Path) -> None:
    content = lines([{"prompt": "A?", "output": "B.", "input": "C."}]).encode()
    with pytest.raises(SiteError, match=r"no column 'reply' \(DATA_COLUMNS\)"):
        site_rows(tmp_path, "a.jsonl", content, "prompt,reply")
    with pytest.raises(SiteError, match="two names are needed"):
        site_rows(tmp_path, "a.jsonl", content, "prompt,Prompt")


def test_columns_of_other_names_are_given_by_two_names(tmp_path: Path) -> None:
    rows = [{"Prompt": r["question"], "chosen": r["answer"], "rejected": "x"} for r in PLAIN]
    content = lines(rows).encode()
    assert both(tmp_path, "a.jsonl", content, "prompt, CHOSEN") == EXPECTED
    with pytest.raises(SiteError, match=r"no column 'output'.*DATA_COLUMNS=QUESTION,ANSWER"):
        site_rows(tmp_path, "a.jsonl", content)
    # What prepare has made of such a file is read all the same.
    site = tmp_path / "federation" / "site-00"
    assert partition.load(site, "train", "prompt,chosen") == partition.load(site, "train")


@pytest.mark.parametrize("columns", ["output,input", "instruction,output", "Input,Output"])
def test_what_prepare_wrote_is_read_as_it_stands_whatever_data_columns_says(
    tmp_path: Path, columns: str
) -> None:
    """Both have them from one environment, and prepare has taken the columns by them already."""
    question, answer = columns.lower().split(",")
    names = dict.fromkeys(("instruction", "input", "output"), "other")
    rows = [names | {question: r["question"], answer: r["answer"]} for r in PLAIN]
    found = prepared_rows(tmp_path, "a.jsonl", lines(rows).encode(), columns)
    assert sorted(found, key=repr) == sorted(EXPECTED, key=repr)
    site = tmp_path / "federation" / "site-00"
    written = partition.load(site, "train")
    assert written
    assert partition.load(site, "train", columns) == written
    # A file of the site's own, whose instruction says something, is read as it asks.
    assert site_rows(tmp_path, "a.jsonl", lines(rows).encode(), columns) == EXPECTED


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ("output,input", {"instruction": "In a word", "input": "A?", "output": "B."}),
        ("prompt,reply", {"prompt": "A?", "reply": "B."}),
    ],
)
def test_prepares_rows_and_others_in_one_file_are_not_guessed_apart(
    tmp_path: Path, columns: str, row: dict[str, str]
) -> None:
    content = lines([*alpaca([("", "Q?", "A."), ("", "R?", "A.")]), row]).encode()
    with pytest.raises(SiteError, match=r"data/train\.jsonl: 2 rows as supernode\.prepare wrote"):
        site_rows(tmp_path, "a.jsonl", content, columns)
    alike = [Row("Q?", "A."), Row("R?", "A."), Row("A?", "B.")]
    if "input" in row:
        assert site_rows(tmp_path, "a.jsonl", content, "input,output") == alike


def test_a_held_out_question_is_known_by_the_form_that_is_trained_on(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "train.jsonl", alpaca(NOTES))
    same = [("Is sign 3 in the note?", "Note 0.", "Another answer.")]
    write_jsonl(tmp_path / "data" / "holdout.jsonl", alpaca(same))  # one instruction in all of it
    assert partition.load(tmp_path, "holdout") == []
    write_jsonl(tmp_path / "data" / "train.jsonl", ROWS)
    other = [ROWS[0] | {"input": "What else?"}, ROWS[1], ROWS[2] | {"instruction": "In a word"}]
    write_jsonl(tmp_path / "data" / "holdout.jsonl", other)
    assert [row.question for row in partition.load(tmp_path, "holdout")] == [
        "What else?", f"In a word\n{ROWS[2]['input']}",
    ]  # fmt: skip


TEXT = st.text(max_size=8) | st.sampled_from(["N/A", "None", "<noinput>", " ", "a", "b"])


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=12))
def test_every_row_is_used_or_counted_and_none_is_made_up(rows: list[tuple[str, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / "data" / "train.jsonl", [{"question": "Q?", "answer": "A."}])
        write_jsonl(folder / "data" / "holdout.jsonl", alpaca(rows))
        part = partition.part_of(folder, "holdout")
    lost = part.empty + part.repeated + part.known
    assert part.read == len(rows) == len(part.rows) + lost
    said = {text.strip() for row in rows for text in row}
    for row in part.rows:
        assert row.answer in said
        assert row.question in said | {f"{a}\n{b}" for a in said for b in said}
    assert all(row.question.strip() and row.answer.strip() for row in part.rows)


def test_what_the_supernodes_image_has_of_the_app_hides_nothing_of_a_runs_own(
    tmp_path: Path,
) -> None:
    """Its few files, as the Dockerfile copies it, first on the path; the app as a run brings it."""
    ((*copied, folder),) = [
        line.split()[1:]
        for line in (REPOSITORY / "docker" / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY app/site")
    ]
    target = tmp_path / "image" / folder
    target.mkdir(parents=True)
    assert {*copied} == {f"app/site/{name}.py" for name in ("rows", "row_files", "audit")}
    for file in copied:
        (target / Path(file).name).write_bytes((REPOSITORY / file).read_bytes())
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; from app.site import audit, row_files, rows; "
        "print(rows.__file__, row_files.__file__, audit.__file__)"
    )
    for paths, wanted in (
        ([tmp_path / "image"], tmp_path / "image"),
        ([tmp_path / "image", REPOSITORY], REPOSITORY),
        ([REPOSITORY, tmp_path / "image"], REPOSITORY),
    ):
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, *map(str, paths)], text=True,
            capture_output=True, check=True,
        )  # fmt: skip
        assert done.stdout.split() == [str(wanted / file) for file in copied]
