"""The questions: worded as the leaderboard's to the letter, and every bad file named."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import EvalError
from eval.benchmarks import BENCHMARKS, LEADERBOARD, Question, load, render, wrap
from eval.files import read_rows
from tests.samples import write_jsonl

ABSTRACT = {
    "QUESTION": "Does it help?",
    "CONTEXTS": ["It was given to 41 patients.", "38 of them got better (p<0.01)."],
    "LONG_ANSWER": "It does.",
    "final_decision": "maybe",
}
EXAM = {
    "question": "The cystic artery is a branch of the:",
    "opa": "Gastroduodenal artery",
    "opb": "Right hepatic artery",
    "opc": "Left gastric artery",
    "opd": "Splenic artery",
    "cop": 1,
    "exp": None,
}
CARE = {
    "exam_id": 1,
    "question": "Which one? ",
    "op1": "One",
    "op2": "Two",
    "op3": "Three",
    "op4": "Four",
    "cop": 1,
}
LICENCE = {
    "question": "What is next?",
    "answer": "Rest",
    "options": [
        {"key": "A", "value": "Surgery"},
        {"key": "B", "value": "Rest"},
        {"key": "C", "value": "Ice"},
        {"key": "D", "value": "Rest"},
    ],
}
FIVE = {
    "question": "He is\nwell.",
    "answer": "v",
    "options": [{"key": k, "value": v} for k, v in zip("ABCDE", "xyzwv", strict=True)],
}
ROWS: dict[str, dict[str, Any]] = {
    "pubmedqa": ABSTRACT,
    "medmcqa": EXAM,
    "medqa": LICENCE,
    "careqa": CARE,
    "demo-yesno": ABSTRACT,
    "demo-four": EXAM,
    "demo-five": FIVE,
}
USED = {
    "pubmedqa": ("QUESTION", "CONTEXTS", "final_decision"),
    "medmcqa": ("question", "opa", "opb", "opc", "opd", "cop"),
    "medqa": ("question", "answer", "options"),
    "careqa": ("question", "op1", "op2", "op3", "op4", "cop"),
}

ABSTRACT_PROMPT = (
    "As an expert doctor in clinical science and medical knowledge, can you tell me if the "
    "following statement is correct? Answer yes, no, or maybe.\n"
    "It was given to 41 patients.\n"
    "38 of them got better (p<0.01).\n"
    "Does it help?\n"
    "The answer is:\n"
)
EXAM_PROMPT = (
    "You are a medical doctor answering realworld medical entrance exam questions. Based on your "
    "understanding of basic and clinical science, medical knowledge, and mechanisms underlying "
    "health, disease, patient care, and modes of therapy, answer the following multiple-choice "
    "question. Select one correct answer from A to D. Base your answer on the current and "
    "standard practices referenced in medical guidelines.\n"
    "Question: The cystic artery is a branch of the:?\n"
    "\n"
    "Options:\n"
    "A. Gastroduodenal artery\n"
    "B. Right hepatic artery\n"
    "C. Left gastric artery\n"
    "D. Splenic artery\n"
    "The answer is:\n"
)
CARE_PROMPT = (
    "You are a medical doctor answering realworld medical entrance exam questions. Based on your "
    "understanding of basic and clinical science, medical knowledge, and mechanisms underlying "
    "health, disease, patient care, and modes of therapy, answer the following multiple-choice "
    "question. Select one correct answer from A to D. Base your answer on the current and "
    "standard practices referenced in medical guidelines.\n"
    "Question: Which one? ?\n"
    "\n"
    "Options:\n"
    "A. One\n"
    "B. Two\n"
    "C. Three\n"
    "D. Four\n"
    "The answer is:\n"
)
LICENCE_PROMPT = (
    "You are a medical doctor taking the US Medical Licensing Examination. You need to "
    "demonstrate your understanding of basic and clinical science, medical knowledge, and "
    "mechanisms underlying health, disease, patient care, and modes of therapy. Show your ability "
    "to apply the knowledge essential for medical practice. For the following multiple-choice "
    "question, select one correct answer from A to E. Base your answer on the current and "
    "standard practices referenced in medical guidelines.\n"
    "Question: What is next?\n"
    "\n"
    "Options:\n"
    "A. Surgery\n"
    "B. Rest\n"
    "C. Ice\n"
    "D. Rest\n"
    "The answer is:\n"
)
FIVE_PROMPT = (
    "You are a medical doctor taking the US Medical Licensing Examination. You need to "
    "demonstrate your understanding of basic and clinical science, medical knowledge, and "
    "mechanisms underlying health, disease, patient care, and modes of therapy. Show your ability "
    "to apply the knowledge essential for medical practice. For the following multiple-choice "
    "question, select one correct answer from A to E. Base your answer on the current and "
    "standard practices referenced in medical guidelines.\n"
    "Question: He is\n"
    "well.\n"
    "\n"
    "Options:\n"
    "A. x\n"
    "B. y\n"
    "C. z\n"
    "D. w\n"
    "E. v\n"
    "The answer is:\n"
)
GOLDEN = {
    "pubmedqa": (ABSTRACT_PROMPT, "maybe"),
    "medmcqa": (EXAM_PROMPT, "B"),
    "medqa": (LICENCE_PROMPT, "B"),
    "careqa": (CARE_PROMPT, "A"),
    "demo-yesno": (ABSTRACT_PROMPT, "maybe"),
    "demo-four": (EXAM_PROMPT, "B"),
    "demo-five": (FIVE_PROMPT, "E"),
}
PAIRS = [{"prompt": f"Question {n}\n", "gold": gold} for n, gold in enumerate("ABCD")]
QUESTIONS = [Question(p["prompt"], p["gold"]) for p in PAIRS]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def in_the_cache(cache: Path, dataset: str) -> Path:
    """Where the hub's client keeps a set's file."""
    chosen = BENCHMARKS[dataset]
    repository = "datasets--" + chosen.repository.replace("/", "--")
    return cache / "hub" / repository / "snapshots" / chosen.revision / chosen.file


def refused(folder: Path, dataset: str = "medqa") -> str:
    """The message, always one line, with which ``load`` refuses a data folder."""
    with pytest.raises(EvalError) as caught:
        load(dataset, folder, folder / "cache")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_there_is_a_golden_prompt_for_every_set() -> None:
    assert set(GOLDEN) == set(ROWS) == set(BENCHMARKS)
    assert LEADERBOARD == ("pubmedqa", "medmcqa", "medqa", "careqa")


@pytest.mark.parametrize("dataset", GOLDEN)
def test_a_row_becomes_the_leaderboards_prompt_and_gold(dataset: str) -> None:
    assert render(dataset, ROWS[dataset]) == GOLDEN[dataset]


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        ("Is it?", "Is it?"),
        ("It is.", "It is."),
        ("It is:", "It is:?"),
        ("It is ___", "It is ___?"),
        ("Is it? ", "Is it? ?"),
        ("Is it?\n", "Is it?\n?"),
        ("Is it？", "Is it？?"),
        ("Never!", "Never!?"),
        ("...", "..."),
        ("", "?"),
    ],
)
@pytest.mark.parametrize("dataset", ["medmcqa", "medqa", "careqa"])
def test_a_question_mark_is_added_unless_there_is_one_or_a_full_stop(
    dataset: str, question: str, asked: str
) -> None:
    prompt, _ = render(dataset, ROWS[dataset] | {"question": question})
    assert f"\nQuestion: {asked}\n\nOptions:\nA. " in prompt


@pytest.mark.parametrize("question", ["It is:", "Is it", "Is it? "])
def test_abstracts_get_no_question_mark(question: str) -> None:
    prompt, _ = render("pubmedqa", ABSTRACT | {"QUESTION": question})
    assert prompt.endswith(f"\n{question}\nThe answer is:\n")


@given(st.lists(st.sampled_from(["x", "y", "z", "w", "v"]), min_size=2, max_size=5), st.data())
def test_medqas_gold_is_the_first_option_of_that_value(values: list[str], data: Any) -> None:
    answer = data.draw(st.sampled_from(values))
    options = [{"key": k, "value": v} for k, v in zip("ABCDE", values, strict=False)]
    _, gold = render("medqa", {"question": "?", "options": options, "answer": answer})
    assert gold == "ABCDE"[values.index(answer)]


def test_an_answer_that_is_no_option_is_refused() -> None:
    with pytest.raises(ValueError, match="option"):
        render("medqa", LICENCE | {"answer": "rest"})


@pytest.mark.parametrize(("dataset", "first"), [("medmcqa", 0), ("demo-four", 0), ("careqa", 1)])
@pytest.mark.parametrize("text", [False, True])
def test_cop_counts_from_where_the_set_does(dataset: str, first: int, text: bool) -> None:
    golds = [
        render(dataset, ROWS[dataset] | {"cop": str(n) if text else n})[1]
        for n in range(first, first + 4)
    ]
    assert golds == ["A", "B", "C", "D"]
    for n in (first - 1, first + 4):
        with pytest.raises(ValueError, match=f"cop = {n}"):
            render(dataset, ROWS[dataset] | {"cop": n})


@pytest.mark.parametrize(("dataset", "column"), [(d, c) for d, cs in USED.items() for c in cs])
def test_a_missing_column_is_named(dataset: str, column: str) -> None:
    row = {k: v for k, v in ROWS[dataset].items() if k != column}
    with pytest.raises(ValueError, match=column):
        render(dataset, row)


@pytest.mark.parametrize("wrong", [None, 5, ["a"], {"a": "b"}], ids=str)
@pytest.mark.parametrize("dataset", USED)
def test_a_column_of_another_type_is_a_value_error(dataset: str, wrong: object) -> None:
    taken = []
    for column in USED[dataset]:
        an_option = column.startswith("op") and not isinstance(wrong, list | dict)
        if column == "cop" or an_option:  # options are worded as Python words them
            continue
        is_list = column == "CONTEXTS" and isinstance(wrong, list)
        value = "one text instead of a list" if is_list else wrong
        try:
            render(dataset, ROWS[dataset] | {column: value})
        except ValueError:
            continue
        taken.append(column)
    assert not taken


@pytest.mark.parametrize("cop", [None, "F", "BC", [1], "", 1.7, "1.7", True, 1e400, 10**400])
def test_a_cop_that_is_no_number_is_a_value_error(cop: object) -> None:
    with pytest.raises(ValueError, match=r"^(cop = .* is none of its 4|no answer in 'answer_idx')"):
        render("careqa", CARE | {"cop": cop})


def test_a_decision_that_is_no_option_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="perhaps"):
        render("pubmedqa", ABSTRACT | {"final_decision": "perhaps"})


@pytest.mark.parametrize("dataset", ["medqa4", "", "MedQA", "medqa,careqa"])
def test_an_unknown_set_is_named_with_those_there_are(dataset: str) -> None:
    with pytest.raises(EvalError, match="--datasets") as caught:
        render(dataset, LICENCE)
    assert repr(dataset) in str(caught.value)
    assert all(known in str(caught.value) for known in BENCHMARKS)


def test_the_wrapper_is_plain_text_and_ends_with_a_newline() -> None:
    assert wrap("Well?\nThe answer is:\n") == (
        "<|im_start|>question\nWell?\nThe answer is:\n<|im_end|>\n<|im_start|>answer\n"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("medqa.jsonl", "".join(json.dumps(p) + "\n" for p in PAIRS)),
        ("medqa.jsonl", json.dumps(PAIRS)),  # as the leaderboard's own .jsonl
        ("medqa.json", "\n " + json.dumps(PAIRS, indent=2)),
        ("medqa.json", "\n\n".join(json.dumps(p) for p in PAIRS)),
        ("medqa.jsonl", "\r\n".join(json.dumps(p) for p in PAIRS)),
        ("medqa.jsonl", "\r".join(json.dumps(p) for p in PAIRS)),
    ],
    ids=["JSONL", "an array in a .jsonl", "an array", "JSONL in a .json", "CR LF", "CR"],
)
def test_pairs_are_read_from_every_kind_of_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert load("medqa", tmp_path, tmp_path) == (QUESTIONS, str(tmp_path / name))


def test_pairs_are_read_from_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "medqa.parquet", PAIRS)
    assert load("medqa", tmp_path, tmp_path) == (QUESTIONS, str(path))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("dataset", GOLDEN)
def test_the_hubs_columns_are_read_from_every_kind(tmp_path: Path, dataset: str, kind: str) -> None:
    path = tmp_path / f"{dataset}.{kind}"
    # A cop of 0 says that they count from 0.
    rows = [ROWS[dataset], ROWS[dataset] | ({"cop": 0} if ROWS[dataset] is EXAM else {})]
    if kind == "parquet":
        write_parquet(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    prompt, gold = GOLDEN[dataset]
    asked = [Question(prompt, gold), Question(prompt, "A" if rows[0] is EXAM else gold)]
    assert load(dataset, tmp_path, tmp_path)[0] == asked


def test_a_separator_within_a_text_cuts_no_line(tmp_path: Path) -> None:
    odd = "one\u2028two\u2029three\x85four\x0bfive"
    rows = [{"prompt": odd, "gold": "A"}, {"prompt": "next", "gold": "B"}]
    write_jsonl(tmp_path / "medqa.jsonl", rows)
    assert "\u2028" in (tmp_path / "medqa.jsonl").read_text(encoding="utf-8")
    assert load("medqa", tmp_path, tmp_path)[0] == [Question(odd, "A"), Question("next", "B")]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"prompt": "p", "gold": "A"}\n\n{"prompt": "p"', "line 3"),
        ('{"prompt": "p", "gold": "A"}\n["p", "A"]\n', "line 2"),
        ('{"prompt": "p", "gold": "A"}\nnull\n', "line 2"),
        ('{"prompt": "p", "gold": ""}\n', "line 1"),
        ('{"prompt": "p", "gold": 1}\n', "line 1"),
        ('{"prompt": ["p"], "gold": "A"}\n', "line 1"),
        ('{"prompt": "p", "gold": "A"}\n{"prompt": "p"}\n', "line 2"),
        ('[{"prompt": "p", "gold": "A"}, {"gold": "A"}]', "row 2"),
        ('[{"prompt": "p", "gold": "A"},\n 7]', "row 2"),
        ('[{"prompt": "p", "gold": "A"},\n\n', "line 3"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path: Path, text: str, place: str) -> None:
    (tmp_path / "medqa.jsonl").write_text(text)
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / 'medqa.jsonl'}, {place}: ")


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "careqa.parquet", [CARE, CARE | {"cop": 5}])
    message = refused(tmp_path, "careqa")
    assert message.startswith(f"{tmp_path / 'careqa.parquet'}, row 2: ")
    assert "cop = 5" in message


@pytest.mark.parametrize(
    "name",
    [
        "medqa.jsonl",
        "generation_medqa_fl.jsonl",
        "MedQA.json",
        "test-medqa-2.jsonl",
        "my medqa (1).jsonl",
        "v1.medqa.jsonl",
    ],
)
def test_a_file_is_found_by_the_sets_name_as_a_word(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / name, PAIRS)
    for other in ("pubmedqa.jsonl", "xmedqa.jsonl", "medqa4.jsonl", "medqa.txt", "medqa"):
        write_jsonl(tmp_path / other, [{"prompt": "another", "gold": "A"}])
    assert load("medqa", tmp_path, tmp_path) == (QUESTIONS, str(tmp_path / name))


@pytest.mark.parametrize("name", ["pubmedqa.jsonl", "xmedqa.jsonl", "medqa4.jsonl", "medqa.txt"])
def test_another_sets_file_is_not_taken(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / name, PAIRS)
    message = refused(tmp_path)
    assert "--data-dir" in message
    assert "no medqa.jsonl" in message


def test_two_files_for_one_set_are_an_error_naming_both(tmp_path: Path) -> None:
    for name in ("medqa.json", "old_medqa.parquet", "careqa.json"):
        (tmp_path / name).touch()
    message = refused(tmp_path)
    assert "medqa.json and old_medqa.parquet" in message
    assert "careqa" not in message


def test_a_missing_data_folder_is_named(tmp_path: Path) -> None:
    assert f"--data-dir: no folder {tmp_path / 'gone'}" in refused(tmp_path / "gone")


@pytest.mark.parametrize("limit", [1, 3, 4, 99, None])
def test_limit_takes_the_first_questions(tmp_path: Path, limit: int | None) -> None:
    write_jsonl(tmp_path / "medqa.jsonl", PAIRS)
    assert load("medqa", tmp_path, tmp_path, limit)[0] == QUESTIONS[:limit]


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_a_file_without_a_question_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "medqa.jsonl").write_text(text)
    assert refused(tmp_path) == f"{tmp_path / 'medqa.jsonl'} holds no question"


def test_a_parquet_file_without_a_row_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": pyarrow.array([], "string")})
    pyarrow.parquet.write_table(table, tmp_path / "medqa.parquet")
    assert refused(tmp_path) == f"{tmp_path / 'medqa.parquet'} holds no question"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32"])
def test_pairs_are_read_from_every_unicode(tmp_path: Path, encoding: str) -> None:
    text = '{"prompt": "Ménière?", "gold": "A"}\n'
    (tmp_path / "medqa.jsonl").write_bytes(text.encode(encoding))
    assert load("medqa", tmp_path, tmp_path)[0] == [Question("Ménière?", "A")]


def test_a_file_in_another_encoding_is_refused_with_the_line_and_a_way_out(tmp_path: Path) -> None:
    text = '{"prompt": "p", "gold": "A"}\n{"prompt": "Ménière?", "gold": "A"}\n'
    path = tmp_path / "medqa.jsonl"
    path.write_bytes(text.encode("latin-1"))
    assert refused(tmp_path) == (
        f"{path}, line 2, byte 42 (0xe9): not UTF-8; save the file as UTF-8 "
        "(iconv -f LATIN1 -t UTF-8)"
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer, not "),
        (b"\n<!DOCTYPE html><html>", "a web page, not the file; "),
        (b"\xef\xbb\xbf<html lang='en'>", "a web page, not the file; "),
        (b"PK\x03\x04\x14\x00", "a zip archive or an Excel file; "),
        (b"\x1f\x8b\x08\x00", "compressed with gzip; unpack it"),
    ],
)
def test_what_is_no_file_of_rows_is_named_as_what_it_is(
    tmp_path: Path, start: bytes, said: str, suffix: str
) -> None:
    path = tmp_path / f"medqa.{suffix}"
    path.write_bytes(start)
    assert refused(tmp_path).startswith(f"{path}: {said}")


@pytest.mark.parametrize("damage", ["empty", "half", "head", "footer", "page"])
def test_a_damaged_parquet_file_is_named_as_such(tmp_path: Path, damage: str) -> None:
    path = write_parquet(tmp_path / "medqa.parquet", PAIRS * 50)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "empty": b"",
            "half": whole[:middle],
            "head": b"PAR1" + whole[4:middle],
            "footer": whole[:-60] + b"\xff" * 52 + whole[-8:],
            "page": whole[:4] + b"\xff" * 60 + whole[64:],
        }[damage]
    )
    message = refused(tmp_path)
    assert str(path) in message
    assert "None" not in message


def test_a_parquet_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    texts = pyarrow.array(["Ménière".encode("latin-1")]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), tmp_path / "medqa.parquet")
    assert refused(tmp_path) == f"{tmp_path / 'medqa.parquet'} is no parquet file of UTF-8 texts"


def test_an_unreadable_path_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "medqa.jsonl").mkdir()
    assert refused(tmp_path) == f"cannot read {tmp_path / 'medqa.jsonl'}: Is a directory"


def test_rows_come_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": 2}')
    assert list(read_rows(path)) == [("line 2", {"a": 1}), ("line 4", {"a": 2})]
    path.write_text('[{"a": 1},\n{"a": 2}]')
    assert list(read_rows(path)) == [("row 1", {"a": 1}), ("row 2", {"a": 2})]


@pytest.mark.parametrize("dataset", LEADERBOARD)
def test_without_hub_and_cache_one_line_says_what_to_do(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(EvalError) as caught:
        load(dataset, None, tmp_path / "cache")
    message = str(caught.value)
    assert "\n" not in message
    wanted = (BENCHMARKS[dataset].repository, "eval fetch", "--data-dir", str(tmp_path / "cache"))
    assert all(text in message for text in wanted)


def test_without_the_hub_its_file_in_the_cache_is_enough(tmp_path: Path) -> None:
    path = in_the_cache(tmp_path, "careqa")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([CARE] * 5621))
    questions, origin = load("careqa", None, tmp_path, limit=2)
    assert questions == [Question(*GOLDEN["careqa"])] * 2
    assert origin == "HPAI-BSC/CareQA@743ea64415b8, CareQA_en.json"


def test_a_hub_file_of_another_length_is_refused(tmp_path: Path) -> None:
    write_parquet(in_the_cache(tmp_path, "medqa"), [LICENCE] * 3)
    with pytest.raises(EvalError, match="3 questions, 1273 expected"):
        load("medqa", None, tmp_path, limit=1)


@pytest.mark.parametrize("dataset", ["demo-yesno", "demo-four", "demo-five"])
def test_a_bundled_set_has_44_sound_questions(tmp_path: Path, dataset: str) -> None:
    questions, origin = load(dataset, None, tmp_path)
    chosen = BENCHMARKS[dataset]
    assert (len(questions), origin) == (44, "bundled")
    assert set(Counter(q.gold for q in questions)) == set(chosen.labels)
    for q in questions:
        assert q.prompt.startswith(chosen.instruction + "\n")
        assert q.prompt.endswith("\nThe answer is:\n")
    if dataset != "demo-yesno":
        for label in chosen.labels:
            assert all(f"\n{label}. " in q.prompt for q in questions)


def test_no_bundled_question_is_there_twice(tmp_path: Path) -> None:
    names = [name for name, chosen in BENCHMARKS.items() if not chosen.repository]
    prompts = [q.prompt for name in names for q in load(name, None, tmp_path)[0]]
    assert len(prompts) == len(set(prompts)) == 132
