"""Answers on the disk: none is lost or asked twice, and the files are the leaderboard's."""

import gc
import json
from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import EvalError
from eval.answers import Journal, write_results
from eval.benchmarks import Question
from eval.inference import Answer
from tests.full_disk import full_disk

FACTS = {"model": "m", "adapter": None, "questions": ["a", "b"]}
COUNT = 6
ANSWERS = {0: Answer("A", "B"), 4: Answer("é\n\u2028", None), 2: Answer("", "C")}


def journal_of(folder: Path) -> Path:
    """The folder's only journal."""
    (path,) = folder.glob(".answers_set_fl_*.jsonl")
    return path


def write(folder: Path, answers: dict[int, Answer]) -> None:
    journal = Journal(folder, "set_fl", FACTS, COUNT)
    try:
        for index, answer in answers.items():
            journal.add(index, answer)
    finally:
        journal.close()


def read(folder: Path, facts: dict[str, Any] = FACTS) -> dict[int, Answer]:
    journal = Journal(folder, "set_fl", facts, COUNT)
    journal.close()
    return journal.answers


def test_a_journal_continues_where_it_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert read(folder) == {}
    write(folder, ANSWERS)
    assert read(folder) == ANSWERS
    write(folder, {1: Answer("x", None)})
    assert read(folder) == ANSWERS | {1: Answer("x", None)}
    assert len(journal_of(folder).read_text().splitlines()) == 1 + 4


def test_an_answer_is_on_the_disk_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "set_fl", FACTS, COUNT)
    path = journal_of(tmp_path)
    for n, (index, answer) in enumerate(ANSWERS.items(), 1):
        journal.add(index, answer)
        assert len(path.read_text().splitlines()) == 1 + n
    journal.close()


def test_whatever_a_killed_process_left_of_the_last_line_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, ANSWERS)
    path = journal_of(tmp_path)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    kept = {i: a for i, a in ANSWERS.items() if i != 2}
    for end in range(last, len(whole) - 1):  # the last line without its newline is whole
        path.write_bytes(whole[:end])
        assert read(tmp_path) == kept
        write(tmp_path, {2: ANSWERS[2]})  # asked again, on a line of its own
        assert path.read_bytes() == whole
        assert read(tmp_path) == ANSWERS


def test_from_a_damaged_line_on_answers_are_asked_again(tmp_path: Path) -> None:
    write(tmp_path, ANSWERS)
    path = journal_of(tmp_path)
    head, *lines = path.read_bytes().split(b"\n")
    for n in range(len(ANSWERS)):
        damaged = bytearray(lines[n])
        damaged[len(damaged) // 2] ^= 0x80  # no UTF-8
        path.write_bytes(b"\n".join([head, *lines[:n], bytes(damaged), *lines[n + 1 :]]))
        assert list(read(tmp_path)) == list(ANSWERS)[:n]
    path.write_bytes(b"\xff" + head[1:] + b"\n" + lines[0])
    with pytest.raises(EvalError, match="is not what it is called; move it away"):
        read(tmp_path)


def test_half_a_first_line_starts_anew(tmp_path: Path) -> None:
    write(tmp_path, {})
    path = journal_of(tmp_path)
    identity = path.read_bytes()
    for end in (0, 1, len(identity) - 2, len(identity) - 1):
        path.write_bytes(identity[:end])
        assert read(tmp_path) == {}
        write(tmp_path, ANSWERS)
        assert read(tmp_path) == ANSWERS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"adapter": "1f"}, "adapter differs"),
        ({"questions": ["b", "a"]}, "questions differs"),
        ({"adapter": "1f", "model": "n"}, "adapter, model differ"),
        ({"more": 1}, "more differs"),
    ],
    ids=str,
)
def test_other_facts_have_a_journal_of_their_own_and_it_is_said_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], said: str
) -> None:
    write(tmp_path, ANSWERS)
    Journal(tmp_path, "set_fl_0", FACTS | {"adapter": "of a longer name"}, COUNT).close()
    (tmp_path / ".answers_set_fl_0123abcd.jsonl").write_text("0" * 64 + "\n")  # of a version before
    assert capsys.readouterr().out == ""
    assert read(tmp_path, FACTS | change) == {}
    assert capsys.readouterr().out == f"eval: set_fl: answering anew: {said}\n"
    assert read(tmp_path) == ANSWERS  # and these are still there
    assert capsys.readouterr().out == ""


def test_answers_of_a_version_that_did_not_say_what_they_are_to_are_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / ".answers_set_fl_0123abcd.jsonl"
    old.write_text("0123abcd" * 8 + '\n[0, "A", "B"]\n')
    before = old.read_bytes()
    assert read(tmp_path) == {}
    said = capsys.readouterr().out
    assert said == "eval: set_fl: answering anew: the evaluation's version differs\n"
    assert old.read_bytes() == before


def test_what_only_has_a_journals_name_is_neither_taken_nor_overwritten(tmp_path: Path) -> None:
    write(tmp_path, ANSWERS)
    path = journal_of(tmp_path)
    path.write_text("of something else\n" + path.read_text().partition("\n")[2])
    before = path.read_bytes()
    with pytest.raises(EvalError, match="move it away") as caught:
        read(tmp_path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "line", ["5", "[1]", '[-1, "A", null]', '[6, "A", null]', "[1, 2, null]", '[1, "A", 3]', "{}"]
)
def test_a_line_that_is_no_answer_to_a_question_of_the_set_is_dropped(
    tmp_path: Path, line: str
) -> None:
    write(tmp_path, ANSWERS)
    with journal_of(tmp_path).open("a") as file:
        file.write(f"{line}\n")
    assert read(tmp_path) == ANSWERS


def test_the_order_of_the_facts_does_not_matter(tmp_path: Path) -> None:
    write(tmp_path, ANSWERS)
    assert read(tmp_path, dict(reversed(FACTS.items()))) == ANSWERS


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_an_eval_error_and_what_is_answered_is_kept(tmp_path: Path) -> None:
    write(tmp_path, ANSWERS)
    path = journal_of(tmp_path)
    journal = Journal(tmp_path, "set_fl", FACTS, COUNT)
    with full_disk(path.stat().st_size + 5):
        with pytest.raises(EvalError, match="make room") as caught:
            journal.add(5, Answer("x" * 100, None))
        assert str(path) in str(caught.value)
    del journal, caught
    gc.collect()  # closes the file, which may or may not have room now
    assert read(tmp_path).items() >= ANSWERS.items()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_closing_on_a_full_disk_does_not_hide_the_eval_error(tmp_path: Path) -> None:
    """``close`` stands in a finally: an error of its own would replace the one for the user."""
    write(tmp_path, ANSWERS)
    size = journal_of(tmp_path).stat().st_size
    with full_disk(size + 5), pytest.raises(EvalError, match="make room"):
        write(tmp_path, {5: Answer("x" * 100, None)})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("room", [0, 70])
def test_a_full_disk_on_opening_loses_no_answer(tmp_path: Path, room: int) -> None:
    write(tmp_path, ANSWERS)
    with full_disk(room):
        try:
            Journal(tmp_path, "set_fl", FACTS, COUNT).close()
        except (EvalError, OSError):  # which of them, the tests above say
            gc.collect()
    assert read(tmp_path) == ANSWERS


def test_a_folder_that_cannot_be_made_is_an_eval_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "eval"
    with pytest.raises(EvalError, match="--out") as caught:
        Journal(folder, "set_fl", FACTS, COUNT)
    assert str(folder) in str(caught.value)


# By hand, from pandas' rules: no blanks, ASCII, a slash escaped; one array whatever the suffix.
GOLDEN = (
    r'[{"prompt":"M\u00e9ni\u00e8re\n5 mg\/kg \"x\" \\","gold":"A","output":"\u2028"},'
    r'{"prompt":"\ud83d\ude00","gold":"B","output":""}]'
)
GOLDEN_QUESTIONS = [Question('Ménière\n5 mg/kg "x" \\', "A"), Question("😀", "B")]


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_the_two_files_are_the_leaderboards_byte_for_byte(tmp_path: Path) -> None:
    write_results(tmp_path, "medqa", "fl", GOLDEN_QUESTIONS, ["\u2028", ""], 1 / 3)
    assert files(tmp_path) == {"acc_medqa_fl.txt", "generation_medqa_fl.jsonl"}
    accuracy = (tmp_path / "acc_medqa_fl.txt").read_bytes()
    assert accuracy == b"Accuracy: 0.3333333333333333. "
    assert (tmp_path / "generation_medqa_fl.jsonl").read_bytes() == GOLDEN.encode()


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=12)


@settings(max_examples=200)
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=3))
def test_the_generations_are_written_as_pandas_writes_them(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    questions = [Question(prompt, gold) for prompt, gold, _ in rows]
    write_results(folder, "medqa", "h", questions, [o for *_, o in rows], 0.5)
    written = (folder / "generation_medqa_h.jsonl").read_text(encoding="utf-8")
    frame = pandas.DataFrame(rows, columns=["prompt", "gold", "output"])
    assert written == frame.to_json(orient="records")
    assert [tuple(row.values()) for row in json.loads(written)] == rows


def test_the_one_control_character_that_pandas_does_not_escape(tmp_path: Path) -> None:
    write_results(tmp_path, "medqa", "fl", [Question("\\u007f", "A")], ["\x7f"], 0.0)
    frame = pandas.DataFrame([["\\u007f", "A", "\x7f"]], columns=["prompt", "gold", "output"])
    written = (tmp_path / "generation_medqa_fl.jsonl").read_text()
    assert written == frame.to_json(orient="records")


def test_results_replace_those_before(tmp_path: Path) -> None:
    for outputs in (["a" * 1000, "b"], ["x", "y"]):
        write_results(tmp_path, "medqa", "fl", GOLDEN_QUESTIONS, outputs, 0.0)
    rows = json.loads((tmp_path / "generation_medqa_fl.jsonl").read_text())
    assert [row["output"] for row in rows] == ["x", "y"]


@pytest.mark.parametrize("file", ["acc_medqa_fl.txt", "generation_medqa_fl.jsonl"])
def test_a_folder_in_the_way_is_an_eval_error(tmp_path: Path, file: str) -> None:
    (tmp_path / file).mkdir()
    with pytest.raises(EvalError) as caught:
        write_results(tmp_path, "medqa", "fl", GOLDEN_QUESTIONS, ["", ""], 0.0)
    assert str(caught.value).startswith(f"cannot write {tmp_path / file}: ")


def test_a_full_disk_leaves_the_results_before_as_they_were(tmp_path: Path) -> None:
    write_results(tmp_path, "medqa", "fl", GOLDEN_QUESTIONS, ["x", "y"], 0.5)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with full_disk(10), pytest.raises(EvalError, match="cannot write"):
        write_results(tmp_path, "medqa", "fl", GOLDEN_QUESTIONS, ["u", "v"], 0.25)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in before}
    assert after == before
