"""Scoring: the leaderboard's rules restated, golden intervals and tests, files re-scored."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eval import EvalError
from eval.__main__ import main
from eval.scoring import compare, read_answer, right, score, score_file
from tests.samples import write_jsonl

LETTERS = ("A", "B", "C", "D")
YES_NO = ("yes", "no", "maybe")

# fmt: off
FRAGMENTS = (
    "yes", "no", "maybe", "Yes", "NO", "yesyes", "yesno", "A", "B", "e", "Edema", "f",
    "\n##", "##", "###", "\n###", "answer is:", "Answer is:", ".", ",", "-", "(", "'",
    " ", "  ", "\n", "\t", "1", "42", "é", "ß", "İ", "K", "yes。", "\u00a0", "_",
)
# fmt: on
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)

# Golds that end in a worked answer.
WORKED = st.lists(
    st.sampled_from(("answer is:", "###", " yes ", "A", "\n")), min_size=2, max_size=7
).map("".join)


def by_the_rules(output: str, answer: str, boolean: bool) -> tuple[str, str]:
    """The leaderboard's format_answer, step by step as its rules say."""
    output, answer = output.lower(), answer.lower()
    as_they_came = output, answer
    if "\n##" in output:
        start = output.index("\n##") + 3
        end = output.find("\n", start)
        output = output[start : end if end >= 0 else len(output)].strip().lower()
    if "###" in answer:
        parts = answer.split("answer is:")
        if len(parts) < 2:
            return as_they_came
        answer = parts[1]
        if "###" in answer:
            answer = answer[: answer.index("###")]
        answer = answer.strip()
    allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    output = "".join(c if c in allowed else " " for c in output).strip()
    while "  " in output:
        output = output.replace("  ", " ")
    if boolean:
        if "yesyes" in output:
            output = output.replace("yesyes", "yes")
        elif "nono" in output:
            output = output.replace("nono", "no")
        elif "yesno" in output:
            output = output.replace("yesno", "yes")
        elif "noyes" in output:
            output = output.replace("noyes", "no")
    elif output:
        output = output[0]
    if output in ("a", "b", "c", "d", "e", "yes", "no"):
        return output, answer
    return as_they_came


@settings(max_examples=1500)
@given(TEXTS, TEXTS | WORKED, st.booleans())
@example("Edema", "E", False)
@example("x\n## a b\n## c\nd", "A", False)
@example("yes", "so the answer is: yes ### end", True)
@example("yes", "so ### yes", True)
def test_an_answer_is_read_by_the_leaderboards_rules(output: str, gold: str, boolean: bool) -> None:
    assert read_answer(output, gold, boolean) == by_the_rules(output, gold, boolean)


@pytest.mark.parametrize(
    ("output", "gold", "boolean", "read"),
    [
        ("B", "B", False, ("b", "b")),
        (" (C) because", "C", False, ("c", "c")),
        ("Edema", "E", False, ("e", "e")),
        ("F", "A", False, ("f", "a")),
        ("", "A", False, ("", "a")),
        ("The", "t", False, ("the", "t")),
        ("é b", "B", False, ("b", "b")),  # only ASCII letters count
        ("Yes.", "yes", True, ("yes", "yes")),
        ("yesyes", "yes", True, ("yes", "yes")),
        ("nono", "no", True, ("no", "no")),
        ("yesno", "no", True, ("yes", "no")),
        ("noyes", "no", True, ("no", "no")),
        ("yesyesyesyes", "yes", True, ("yesyesyesyes", "yes")),  # each pair becomes one
        ("Maybe", "maybe", True, ("maybe", "maybe")),
        ("maybe.", "maybe", True, ("maybe.", "maybe")),
        ("yes it is", "yes", True, ("yes it is", "yes")),
        ("b", "yes", True, ("b", "yes")),
        ("thinking\n## B.\nmore", "b", False, ("b", "b")),
        ("thinking\n##x y\nmore", "A", True, ("thinking\n##x y\nmore", "a")),
        ("a", "The answer is: A ### tail", False, ("a", "a")),
        ("b", "answer is: B answer is: C ###", False, ("b", "b")),
        ("a", "It is A ###", False, ("a", "it is a ###")),
        ("q", "The answer is: A ### tail", True, ("q", "the answer is: a ### tail")),
    ],
)
def test_golden_answers(output: str, gold: str, boolean: bool, read: tuple[str, str]) -> None:
    assert read_answer(output, gold, boolean) == read


@given(st.lists(st.tuples(TEXTS, st.sampled_from(YES_NO)), min_size=1, max_size=20))
def test_accuracy_is_the_share_of_right_answers(rows: list[tuple[str, str]]) -> None:
    outputs, golds = [o for o, _ in rows], [g for _, g in rows]
    expected = [a == g for a, g in (by_the_rules(o, g, True) for o, g in rows)]
    assert right(outputs, golds, boolean=True) == expected
    assert score(outputs, golds, YES_NO)["accuracy"] == sum(expected) / len(rows)


# Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3; the last two by hand.
@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_golden_wilson_intervals(correct: int, n: int, low: float, high: float) -> None:
    outputs = ["A"] * correct + ["B"] * (n - correct)
    result = score(outputs, ["A"] * n, LETTERS)
    assert result["accuracy"] == correct / n
    assert result["ci95"] == pytest.approx([low, high], abs=5e-5)


@given(st.integers(1, 6000), st.data())
def test_the_interval_is_wilsons_and_contains_the_accuracy(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    result = score(["A"] * k + ["x"] * (n - k), ["A"] * n, LETTERS)
    (low, high), p, z = result["ci95"], k / n, 1.959963984540054
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-9)
    assert 0 <= low <= result["accuracy"] <= high <= 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*LETTERS, "E", "x", "", "yes", "Dose"]), st.sampled_from("ABCDE")
        ),
        min_size=1,
    )
)
def test_the_confusion_counts_every_question_once(rows: list[tuple[str, str]]) -> None:
    golds = [g for _, g in rows]
    result = score([o for o, _ in rows], golds, LETTERS)
    confusion: dict[str, dict[str, int]] = result["confusion"]
    assert {g: sum(row.values()) for g, row in confusion.items()} == {
        g: golds.count(g) for g in set(golds)
    }
    hits = sum(row.get(g, 0) for g, row in confusion.items())
    assert hits / result["n"] == result["accuracy"]
    unparsed = sum(o in ("x", "", "yes") for o, _ in rows)
    assert result["unparsed"] == unparsed
    assert sum(row.get("unparsed", 0) for row in confusion.values()) == unparsed
    assert json.loads(json.dumps(result)) == result


def test_a_golden_confusion() -> None:
    outputs = ["yes", "No.", "maybe", "Maybe ", "yesno", "b", "", "no"]
    golds = ["yes", "yes", "maybe", "maybe", "no", "no", "no", "maybe"]
    result = score(outputs, golds, YES_NO)
    assert result["confusion"] == {
        "yes": {"yes": 1, "no": 1},
        "no": {"yes": 1, "unparsed": 2},
        "maybe": {"maybe": 1, "unparsed": 1, "no": 1},
    }
    assert list(result["confusion"]) == ["yes", "no", "maybe"]  # in the order of the labels
    assert (result["n"], result["accuracy"], result["unparsed"]) == (8, 0.25, 3)


def test_a_letter_beyond_the_options_is_an_answer_but_wrong() -> None:
    result = score(["E", "e", "F"], ["A", "E", "A"], LETTERS)
    assert result["confusion"] == {"A": {"E": 1, "unparsed": 1}, "E": {"E": 1}}
    assert (result["accuracy"], result["unparsed"]) == (1 / 3, 1)


@pytest.mark.parametrize(
    ("labels", "golds", "outputs"),
    [
        (("A", "B", "C", "D"), ["A", "B", "B", "E", "D"], ["A", "B", "c", "e", "The"]),
        (("yes", "no", "maybe"), ["yes", "no", "maybe", "yes"], ["Yes", "yes", "maybe", "?"]),
    ],
)
def test_golds_in_another_case_give_the_same_score(
    labels: tuple[str, ...], golds: list[str], outputs: list[str]
) -> None:
    picks = ["B", *golds[1:]]
    expected = score(outputs, golds, labels, picks)
    assert expected["label_accuracy"] == (len(golds) - 1) / len(golds)
    for other in (str.lower, str.upper, str.title):
        assert score(outputs, [other(gold) for gold in golds], labels, picks) == expected


def test_the_majority_is_the_commonest_gold() -> None:
    golds = ["no", "yes", "yes", "maybe"]
    assert score([""] * 4, golds, YES_NO)["majority"] == {"label": "yes", "accuracy": 0.5}


@pytest.mark.parametrize(
    ("picks", "expected"),
    [
        (["A", "B", "B"], 2 / 3),
        (["C", "A", "A"], 0.0),
        (["A", None, "B"], None),
        ([None, None, None], None),
        (None, None),
    ],
)
def test_label_accuracy_needs_every_pick(
    picks: Sequence[str | None] | None, expected: float | None
) -> None:
    result = score(["the", "the", "the"], ["A", "C", "B"], LETTERS, picks)
    assert (result["accuracy"], result["label_accuracy"]) == (0, expected)


def test_the_note_says_what_maybe_costs() -> None:
    outputs = ["maybe", "Maybe", "maybe.", "yes", "no", "maybe", "yes", "no"]
    golds = ["maybe", "maybe", "maybe", "maybe", "no", "yes", "yes", "yes"]
    (note,) = score(outputs, golds, YES_NO)["notes"]
    assert note == (
        "4 of 8 golds are 'maybe', which counts only verbatim: answered 3 times, 2 times rightly. "
        "Answering yes and no alone reaches at most 0.5000; of the 4 others 2 are right."
    )


def test_without_maybe_there_is_no_note() -> None:
    assert score(["maybe"], ["yes"], YES_NO)["notes"] == []
    assert score(["maybe"], ["A"], LETTERS)["notes"] == []


# Two-sided, exact: 2 * P(X <= the smaller), X ~ Bin(discordant, 1/2), at most 1.
@pytest.mark.parametrize(
    ("only_base", "only_adapter", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (3, 3, 1.0),
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (1, 9, 2 * 11 / 1024),
        (8, 2, 2 * 56 / 1024),
        (4, 5, 1.0),
    ],
)
def test_golden_p_values_of_mcnemars_test(only_base: int, only_adapter: int, p: float) -> None:
    base = [True] * only_base + [False] * only_adapter + [True, False, True]
    adapter = [False] * only_base + [True] * only_adapter + [True, False, True]
    result = compare(base, adapter)
    assert result["p_value"] == pytest.approx(p, abs=1e-12)
    assert (result["only_base"], result["only_adapter"]) == (only_base, only_adapter)
    assert result["difference"] == (only_adapter - only_base) / (only_base + only_adapter + 3)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_comparison_is_symmetric(pairs: list[tuple[bool, bool]]) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    there, back = compare(one, other), compare(other, one)
    assert there["p_value"] == back["p_value"]
    assert there["difference"] == -back["difference"]
    assert there["difference"] == pytest.approx((sum(other) - sum(one)) / len(pairs))
    assert 0 < there["p_value"] <= 1


@given(st.lists(st.booleans(), min_size=1))
def test_identical_lists_do_not_differ(one: list[bool]) -> None:
    assert compare(one, one) == {
        "difference": 0, "only_base": 0, "only_adapter": 0, "p_value": 1,
    }  # fmt: skip


ROWS = [
    {"prompt": "p", "gold": "A", "output": "A"},
    {"prompt": "p", "gold": "B", "output": "Because"},
    {"prompt": "p", "gold": "C", "output": "the"},
    {"prompt": "p", "gold": "D", "output": "E"},
]
BOOLEAN = [
    {"prompt": "p", "gold": "yes", "output": "yesno"},
    {"prompt": "p", "gold": "no", "output": "No"},
    {"prompt": "p", "gold": "maybe", "output": "maybe "},
]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("generation_medmcqa_fl.jsonl", "medmcqa"),
        ("generation_medqa_gccl_r10.jsonl", "medqa"),
        ("generation_demo-four_peft_3.jsonl", "demo-four"),
        ("careqa.json", "careqa"),
        ("generation_mine_fl.jsonl", "generation_mine_fl"),
        ("answers.jsonl", "answers"),
    ],
)
def test_a_file_is_scored_under_its_sets_name_or_its_own(
    tmp_path: Path, file: str, name: str
) -> None:
    path = tmp_path / file
    path.write_text(json.dumps(ROWS))
    found, result = score_file(path)
    assert (found, result["accuracy"], result["n"], result["unparsed"]) == (name, 0.5, 4, 1)


@pytest.mark.parametrize("file", ["generation_pubmedqa_fl.jsonl", "mine.jsonl"])
def test_yes_and_no_are_told_from_name_or_golds(tmp_path: Path, file: str) -> None:
    path = write_jsonl(tmp_path / file, BOOLEAN)
    _, result = score_file(path)
    assert (result["accuracy"], result["unparsed"]) == (2 / 3, 1)
    assert result["notes"]


@pytest.mark.parametrize("row", [{"gold": "A"}, {"gold": "A", "output": None}, {"output": "A"}])
@pytest.mark.parametrize("array", [False, True])
def test_a_row_without_output_or_gold_is_named(
    tmp_path: Path, row: dict[str, object], array: bool
) -> None:
    path = tmp_path / "generation_medqa_fl.jsonl"
    rows = [*ROWS, row]
    path.write_text(json.dumps(rows) if array else "\n".join(map(json.dumps, rows)))
    with pytest.raises(EvalError) as caught:
        score_file(path)
    place = "row 5" if array else "line 5"
    assert str(caught.value) == f"{path}, {place}: no text in 'gold' or 'output'"


def test_a_file_without_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(EvalError, match=re.escape(f"{tmp_path / 'x.jsonl'} holds no answer")):
        score_file(tmp_path / "x.jsonl")


def test_the_command_prints_a_line_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four = write_jsonl(tmp_path / "generation_medmcqa_fl.jsonl", ROWS)
    yes_no = write_jsonl(tmp_path / "generation_pubmedqa_fl.jsonl", BOOLEAN)
    assert main(["score", str(four), str(yes_no)]) == 0
    assert capsys.readouterr().out == "medmcqa 0.5 4 1\npubmedqa 0.6666666666666666 3 1\n"


def test_the_command_names_a_file_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", str(tmp_path / "gone.jsonl")]) == 1
    assert capsys.readouterr().err == (
        f"eval: ERROR: cannot read {tmp_path / 'gone.jsonl'}: No such file or directory\n"
    )
