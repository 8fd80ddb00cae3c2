"""Benchmarks in the shapes that people hold: the same questions and golds, or one line that says
what is not certain."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import EvalError
from eval.benchmarks import Question, labels_of, load, render
from eval.shapes import RowError, choices
from tests.samples import write_jsonl

TEXTS = st.text(
    st.characters(categories=["L", "N", "P", "S"], include_characters=" "), min_size=1, max_size=8
).filter(str.strip)
FORMS: dict[str, Callable[[int], Any]] = {
    "a number": int,
    "a text": str,
    "a float": float,
    "a float's text": lambda n: str(float(n)),
}


def hub_row(question: str, options: list[Any], gold: int) -> dict[str, Any]:
    """As the hub has MedQA: the right option's text."""
    pairs = [{"key": "ABCDE"[n], "value": option} for n, option in enumerate(options)]
    return {"question": question, "options": pairs, "answer": options[gold]}


def asked(dataset: str, folder: Path, rows: list[dict[str, Any]]) -> list[Question]:
    write_jsonl(folder / f"{dataset}.jsonl", rows)
    return load(dataset, folder, folder)[0]


def refused(dataset: str, folder: Path, rows: list[dict[str, Any]], line: int = 1) -> str:
    with pytest.raises(EvalError) as caught:
        asked(dataset, folder, rows)
    message = str(caught.value)
    assert "\n" not in message
    start = f"{folder / f'{dataset}.jsonl'}, line {line}: "
    assert message.startswith(start)
    return message.removeprefix(start)


def golds(dataset: str, folder: Path, rows: list[dict[str, Any]]) -> str:
    return "".join(q.gold for q in asked(dataset, folder, rows))


def exam(cop: Any, letters: str = "abcd", first: str = "op") -> dict[str, Any]:
    return {"question": "Which?", "cop": cop} | {f"{first}{x}": f"option {x}" for x in letters}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all examples of a property."""
    return tmp_path_factory.mktemp("rows")


@given(
    st.lists(
        st.tuples(TEXTS, st.lists(TEXTS, min_size=2, max_size=5, unique=True), st.integers(0, 4)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["texts", "object", "pairs in any order"]),
    st.sampled_from(["answer_idx", "cop", "answer", "Correct Option"]),
    st.booleans(),
)
def test_medqa_is_read_alike_in_every_shape_of_options_and_of_answer(
    folder: Path, content: list[tuple[str, list[str], int]], shape: str, column: str, low: bool
) -> None:
    rows, hub = [], []
    for number, (question, options, any_gold) in enumerate(content):
        gold = any_gold % len(options)
        # A letter, alone or before a text, could be an option's: another test's matter.
        options = [f"is {option}" for option in options]
        letters = "ABCDE"[: len(options)]
        pairs = [{"key": k, "value": v} for k, v in zip(letters, options, strict=True)]
        pairs = pairs[number:] + pairs[:number]
        rows.append(
            {
                "question": question,
                column: letters[gold].lower() if low else letters[gold],
                "options": {
                    "texts": options,
                    "object": {p["key"]: p["value"] for p in pairs},
                    "pairs in any order": pairs,
                }[shape],
            }
        )
        prompt, letter = render("medqa", hub_row(question, options, gold))
        assert letter == letters[gold]
        hub.append(Question(prompt, letter))
    assert asked("medqa", folder, rows) == hub


@pytest.mark.parametrize("dataset", ["medmcqa", "careqa", "medqa", "demo-four"])
@given(st.lists(st.integers(0, 3), max_size=6), st.sampled_from([0, 1]), st.sampled_from([*FORMS]))
def test_the_files_own_lowest_and_highest_cop_tell_what_it_counts_from(
    folder: Path, dataset: str, others: list[int], first: int, form: str
) -> None:
    right = [3 * first, *others]  # A, which only 0 can be, or D, which only 4 can
    letters = "1234" if dataset == "careqa" else "abcd"
    rows = [exam(FORMS[form](n + first), letters) for n in right]
    if dataset == "medqa":
        rows = [
            {"question": "Which?", "answer_idx": r["cop"], "options": [r[f"op{x}"] for x in "abcd"]}
            for r in rows
        ]
    assert golds(dataset, folder, rows) == "".join("ABCD"[n] for n in right)


def test_a_cop_that_may_count_from_either_is_refused_with_what_the_file_has(tmp_path: Path) -> None:
    rows = [exam("c"), exam(2), exam(3), exam(1)]
    said = refused("medmcqa", tmp_path, rows, line=2)
    assert said.startswith("cop = 2 is B or C: with 1 to 3 in the file it may count from 0 or from")
    assert "write letters, A to D, in 'cop'" in said
    assert golds("medmcqa", tmp_path, [*rows, exam(0)]) == "CCDBA"
    assert golds("medmcqa", tmp_path, [*rows, exam(4)]) == "CBCAD"
    # One text beside the numbers tells as well.
    assert golds("medmcqa", tmp_path, [exam(2) | {"answer": "option b"}, exam(3)]) == "BC"
    assert golds("medmcqa", tmp_path, [exam(2) | {"answer": "option c"}, exam(3)]) == "CD"


def test_careqas_columns_are_numbered_from_one_and_so_is_its_cop(tmp_path: Path) -> None:
    assert golds("careqa", tmp_path, [exam(2, "1234"), exam(3, "1234")]) == "BC"
    assert golds("careqa", tmp_path, [exam(2, "1234"), exam(0, "1234")]) == "CA"


@pytest.mark.parametrize(
    ("cops", "line", "said"),
    [
        ([0, 1, 4], 3, "cop = 4 is none of its 4 options, counted from 0; "),
        ([1, 4, 3, 0, 4], 4, "cop = 0 is none of its 4 options, counted from 1; "),
        ([0, 1, -1], 3, "cop = -1 is no answer (a test split's golds are kept back; MedMCQA has "),
        ([-1, -1], 1, "cop = -1 is no answer "),
        ([0, 1.7], 2, "cop = 1.7 is none of its 4 options; "),
        ([0, "E"], 2, "cop = 'E' is none of its 4 options; "),
        ([0, True], 2, "cop = True is none of its 4 options; "),
        ([0, None], 2, "no answer in 'cop'; "),
        (["A", "B", "a long text, of which no more than some is shown"], 3, "cop = 'a long text, "),
    ],
)
def test_a_cop_that_is_no_option_is_refused_by_its_row(
    tmp_path: Path, cops: list[Any], line: int, said: str
) -> None:
    message = refused("medmcqa", tmp_path, [exam(cop) for cop in cops], line)
    assert message.startswith(said)
    assert "wanted: question, options (texts, or " in message


def test_letters_and_numbers_may_stand_beside_each_other(tmp_path: Path) -> None:
    assert golds("medmcqa", tmp_path, [exam("d"), exam(0), exam("2.0"), exam(" C ")]) == "DACC"


def test_of_equal_options_the_letter_names_one_and_a_text_the_first(tmp_path: Path) -> None:
    row = {"question": "Next?", "options": ["Ice", "Rest", "Heat", "Rest"], "answer": "Rest"}
    assert golds("medqa", tmp_path, [row]) == "B"
    assert golds("medqa", tmp_path, [row | {"answer_idx": "D"}]) == "D"
    assert golds("medqa", tmp_path, [row | {"answer": "D"}]) == "D"
    assert golds("medmcqa", tmp_path, [exam("c") | {"opb": "same", "opc": "same"}]) == "C"
    hub = hub_row("Next?", ["Ice", "Rest", "Heat", "Rest"], 3)
    assert render("medqa", hub)[1] == "B"
    assert render("medqa", hub | {"answer_idx": "D"})[1] == "D"
    assert render("medqa", hub | {"answer_idx": "A"})[1] == "B"  # the leaderboard asks the text


@pytest.mark.parametrize("idx", ["A", "C", "a", 3])
def test_an_answer_and_a_letter_that_contradict_each_other_are_refused(
    tmp_path: Path, idx: Any
) -> None:
    row = {"question": "?", "options": ["w", "x", "y", "z"], "answer": "x", "answer_idx": idx}
    said = refused("medqa", tmp_path, [row])
    assert said.startswith(f"answer_idx = {idx!r} and answer = 'x' are not the same option; ")


def test_a_text_that_is_a_letter_too_is_told_by_the_other_rows_or_refused(tmp_path: Path) -> None:
    vitamins = {"question": "Which vitamin?", "options": ["K", "C", "A", "D"], "answer": "C"}
    said = refused("medqa", tmp_path, [vitamins])
    assert said.startswith("answer = 'C' is B or C: an option's letter and another one's text; ")
    by_text = {"question": "?", "options": ["w", "x", "y", "z"], "answer": "x"}
    assert golds("medqa", tmp_path, [vitamins, by_text]) == "BB"
    assert golds("medqa", tmp_path, [vitamins, by_text | {"answer": "D"}]) == "CD"
    assert golds("medqa", tmp_path, [vitamins | {"answer_idx": "B"}]) == "B"
    assert render("medqa", hub_row("?", ["K", "C", "A", "D"], 1))[1] == "B"  # the hub's is a text


BLANKS = [None, float("nan"), "", " \t"]


@pytest.mark.parametrize("blank", BLANKS, ids=repr)
@pytest.mark.parametrize("column", ["opa", "opc", "opd"])
def test_a_blank_option_is_refused_not_made_up(tmp_path: Path, column: str, blank: Any) -> None:
    """ "None" is a real option of some questions, so a null must not become one."""
    said = refused("medmcqa", tmp_path, [exam(0), exam("b") | {column: blank}], line=2)
    assert said.startswith(f"{column} is empty; ")
    assert golds("medmcqa", tmp_path, [exam("b") | {column: "None"}]) == "B"
    texts = ["w", "x", "y", "z"]
    texts["abcd".index(column[2])] = blank
    letters: Any = dict(zip("ABCD", texts, strict=True))
    pairs = [{"key": key, "value": text} for key, text in letters.items()]
    for options in (texts, letters, pairs):
        row = {"question": "Which?", "options": options, "answer_idx": "B"}
        said = refused("medqa", tmp_path, [row])
        assert said.startswith(f"option {column[2].upper()} is empty; ")


@pytest.mark.parametrize("blank", BLANKS, ids=repr)
def test_a_fifth_option_that_is_blank_is_none(tmp_path: Path, blank: Any) -> None:
    texts = ["w", "x", "y", "z", blank]
    letters = dict(zip("ABCDE", texts, strict=True))
    pairs = [{"key": key, "value": text} for key, text in letters.items()]
    row = {"question": "Which?", "answer_idx": "D"}
    rows = [row | {"options": options} for options in (texts, letters, pairs)]
    for start in ("abcde", "12345"):
        rows.append(row | {f"op{x}": text for x, text in zip(start, texts, strict=True)})
    four = render("medqa", hub_row("Which?", ["w", "x", "y", "z"], 3))
    for one in rows:
        assert asked("medqa", tmp_path, [one]) == [Question(*four)]
        said = refused("medqa", tmp_path, [one | {"answer_idx": "E"}])
        assert said.startswith("answer_idx = 'E' is none of its 4 options; ")


def test_all_options_blank_are_refused_and_the_hubs_worded_as_the_leaderboard_does(
    tmp_path: Path,
) -> None:
    blank = exam("b") | {f"op{x}": "" for x in "abcd"}
    assert refused("medmcqa", tmp_path, [blank]).startswith("opa is empty; ")
    prompt, _ = render("medmcqa", exam(0) | {"opb": None, "opc": "", "ope": None})
    assert prompt.endswith("\nA. option a\nB. None\nC. \nD. option d\nThe answer is:\n")


@pytest.mark.parametrize("question", ["", " \n"])
def test_a_question_without_a_word_is_refused(tmp_path: Path, question: str) -> None:
    said = refused("medmcqa", tmp_path, [exam(0), exam(1) | {"question": question}], line=2)
    assert said.startswith("'question' is empty; wanted: question, options (texts, or ")


@pytest.mark.parametrize("form", ["{}. {}", "{}) {}", "({}) {}", "{}: {}", " {}.{} "])
@pytest.mark.parametrize("low", [False, True])
def test_options_that_carry_their_own_letters_get_none_twice(
    tmp_path: Path, form: str, low: bool
) -> None:
    texts = ["Ice", "Rest", "B. cereus", "(C) Heat"]
    letters = "abcd" if low else "ABCD"
    carried = [form.format(letter, text) for letter, text in zip(letters, texts, strict=True)]
    wanted = [Question(*render("medqa", hub_row("Next?", texts, 1)))]
    row = {"question": "Next?", "options": carried}
    for gold in ({"answer_idx": "B"}, {"answer": carried[1]}, {"answer": "Rest"}):
        assert asked("medqa", tmp_path, [row | gold]) == wanted
    columns = {f"op{x}": text for x, text in zip("abcd", carried, strict=True)}
    assert asked("medqa", tmp_path, [row | columns | {"options": None, "cop": "b"}]) == wanted
    # The answer's letter must be the option's, and an option must be more than its letter.
    wrong = {"answer": form.format("A", "Rest")}
    assert " is none of its 4 options; " in refused("medqa", tmp_path, [row | wrong])
    bare = row | {"options": [*carried[:3], form.format("D", "")], "answer_idx": "B"}
    assert refused("medqa", tmp_path, [bare]).startswith("option D is empty; ")


@pytest.mark.parametrize(
    "options",
    [
        ["B. cereus", "C. difficile", "E. coli", "A. baumannii"],
        ["A. fumigatus", "Aspirin", "C. albicans", "D. medinensis"],
        ["A", "B", "C", "D"],
        ["A-type", "B-type", "C-type", "D-type"],
        ["(A. one", "(B. two", "(C. three", "(D. four"],
    ],
)
def test_a_letter_that_is_not_certainly_the_options_own_stays(
    tmp_path: Path, options: list[str]
) -> None:
    row = {"question": "Which?", "options": options, "answer_idx": "B"}
    wanted = render("medqa", hub_row("Which?", options, 1))
    assert asked("medqa", tmp_path, [row]) == [Question(*wanted)]


def test_the_hubs_options_keep_their_letters() -> None:
    prompt, _ = render("medqa", hub_row("Which?", ["A. one", "B. two"], 1))
    assert "\nA. A. one\nB. B. two\n" in prompt


def test_an_answer_in_words_is_not_said_to_be_counted(tmp_path: Path) -> None:
    row = {"question": "How many?", "options": ["10", "20", "30", "40"], "answer": "50"}
    assert refused("medqa", tmp_path, [row]).startswith(
        "answer = '50' is none of its 4 options; wanted: "
    )


def test_two_columns_of_one_name_must_say_the_same(tmp_path: Path) -> None:
    row = exam("b")
    said = refused("medmcqa", tmp_path, [row, row | {"Question": "Another?"}], line=2)
    assert said.startswith("more than one column 'question', and they differ; wanted: ")
    assert golds("medmcqa", tmp_path, [row | {"Question": "Which?", "COP": None}]) == "B"
    assert golds("medmcqa", tmp_path, [{"Question": float("nan"), "Cop": " "} | row]) == "B"
    said = refused("medmcqa", tmp_path, [row | {"Cop": "c"}])
    assert said.startswith("more than one column 'cop', and they differ; ")
    said = refused("pubmedqa", tmp_path, [ABSTRACT | {"contexts": ["Another."]}])
    assert said.startswith("more than one column 'contexts', and they differ; wanted: QUESTION")


def test_four_and_five_options_of_one_parquet_file_are_what_they_were(tmp_path: Path) -> None:
    """Where one row has an E, parquet gives a null one to all others."""
    four, five = ({k: f"is {k}" for k in letters} for letters in ("ABCD", "ABCDE"))
    rows = [
        {"question": "Which?", "options": options, "answer": f"is {gold}", "answer_idx": gold}
        for options, gold in ((four, "D"), (five, "E"))
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "medqa.parquet")
    (first, second), _ = load("medqa", tmp_path, tmp_path)
    assert [first.gold, second.gold] == ["D", "E"]
    assert first.prompt.endswith("\nD. is D\nThe answer is:\n")
    assert second.prompt.endswith("\nD. is D\nE. is E\nThe answer is:\n")
    assert labels_of("medqa", [first]) == ("A", "B", "C", "D")
    assert labels_of("medqa", [first, second]) == ("A", "B", "C", "D", "E")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": None}, "no text in 'question'; "),
        ({"options": None}, "no column 'options'; "),
        ({"options": "A) w B) x"}, "'options' is no list or object; "),
        ({"options": ["w"]}, "1 options; "),
        ({"options": list("uvwxyz")}, "6 options; "),
        ({"options": [["w"], ["x"]]}, "an option is no text; "),
        ({"options": {"A": "w", "C": "x"}}, "the keys of 'options' are not A, B, C"),
        ({"options": {"1": "w", "2": "x"}}, "the keys of 'options' are not A, B, C"),
        ({"options": {"A": "w", "a": "x"}}, "the keys of 'options' are not A, B, C"),
        ({"options": [{"id": "A", "text": "w"}] * 2}, "no 'key' and 'value' in each of 'options'"),
        ({"answer": "none of them"}, "answer = 'none of them' is none of its 4 options; "),
        ({"answer": None}, "no answer in 'answer'; "),
    ],
)
def test_what_no_shape_is_is_named_with_the_one_that_is_wanted(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    row = {"question": "Which?", "options": ["w", "x", "y", "z"], "answer": "x"}
    message = refused("medqa", tmp_path, [row, row | change], line=2)
    assert message.startswith(said)
    assert "wanted: question, options (texts, or " in message


def test_a_missing_option_column_is_named(tmp_path: Path) -> None:
    said = refused("medmcqa", tmp_path, [exam("a", "abc")])
    assert said.startswith("no column 'opd'; ")


def test_the_rows_of_an_open_leaderboards_copy_are_nested(tmp_path: Path) -> None:
    data = {"Question": "Which?", "Options": {"A": "w", "B": "x"}, "Correct Option": "B"}
    row = {"id": "1", "data": data | {"Correct Answer": "x"}, "subject_name": None}
    assert golds("medqa", tmp_path, [row]) == "B"
    assert refused("medqa", tmp_path, [row | {"data": data | {"Correct Answer": "w"}}])


ABSTRACT = {"QUESTION": "Does it?", "CONTEXTS": ["Of 41,", "38 did."], "final_decision": "no"}
PROMPT, _ = render("pubmedqa", ABSTRACT)


@pytest.mark.parametrize("gold", ["no", "No", "NO", " no\n"])
@pytest.mark.parametrize(
    "context",
    [
        {"CONTEXTS": ABSTRACT["CONTEXTS"]},
        {"contexts": ABSTRACT["CONTEXTS"]},
        {"context": {"contexts": ABSTRACT["CONTEXTS"], "labels": ["A", "B"], "meshes": []}},
        {"Context": ABSTRACT["CONTEXTS"]},
    ],
)
@pytest.mark.parametrize("question", ["QUESTION", "question"])
def test_an_abstract_is_read_in_every_shape(
    tmp_path: Path, question: str, context: dict[str, Any], gold: str
) -> None:
    row = {"pubid": 7, question: "Does it?", "long_answer": "Yes!", "final_decision": gold}
    assert asked("pubmedqa", tmp_path, [row | context]) == [Question(PROMPT, "no")]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([row | context]), tmp_path / "demo-yesno.parquet"
    )
    assert load("demo-yesno", tmp_path, tmp_path)[0] == [Question(PROMPT, "no")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"final_decision": "perhaps"}, "final_decision = 'perhaps' is none of yes, no, maybe; "),
        ({"final_decision": None}, "final_decision = None is none of yes, no, maybe; "),
        ({"final_decision": True}, "final_decision = True is none of yes, no, maybe; "),
        ({"CONTEXTS": "all of it, and maybe its conclusion"}, "no list of texts in 'CONTEXTS'; "),
        ({"CONTEXTS": ["a", None]}, "no list of texts in 'CONTEXTS'; "),
        ({"CONTEXTS": []}, "'CONTEXTS' is empty; "),
        ({"CONTEXTS": ["", " "]}, "'CONTEXTS' is empty; "),
        ({"QUESTION": ["a"]}, "no text in 'QUESTION'; "),
        ({"QUESTION": "  "}, "'QUESTION' is empty; "),
    ],
)
def test_an_abstract_of_no_such_shape_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    message = refused("pubmedqa", tmp_path, [ABSTRACT, ABSTRACT | change], line=2)
    assert message.startswith(said)
    assert "wanted: QUESTION, CONTEXTS (a list of texts), final_decision (yes, no" in message


def test_worded_pairs_are_asked_as_they_are_with_golds_in_the_labels_spelling(
    tmp_path: Path,
) -> None:
    pairs = [{"prompt": " p\n", "gold": gold} for gold in ("b", "A", " C\n", "e")]
    found = asked("medqa", tmp_path, pairs)
    assert found == [Question(" p\n", label) for label in "BACE"]
    assert labels_of("medqa", found) == ("A", "B", "C", "D", "E")
    assert labels_of("medqa", found[:3]) == ("A", "B", "C", "D")
    assert golds("pubmedqa", tmp_path, [{"prompt": "p", "gold": " Maybe "}]) == "maybe"
    assert labels_of("pubmedqa", found) == ("yes", "no", "maybe")


@pytest.mark.parametrize(
    ("dataset", "gold"),
    [
        ("medqa", "B. Heparin"),
        ("medmcqa", "2"),
        ("careqa", "F"),
        ("demo-four", "###"),
        ("demo-five", "yes"),
        ("pubmedqa", "Yes."),
        ("demo-yesno", "A"),
        ("medqa", " "),
    ],
)
def test_a_gold_that_no_answer_can_match_is_refused(
    tmp_path: Path, dataset: str, gold: str
) -> None:
    labels = "yes, no, maybe" if dataset in ("pubmedqa", "demo-yesno") else "A, B, C, D, E"
    pairs = [{"prompt": "p", "gold": labels.split(", ")[0]}, {"prompt": "p", "gold": gold}]
    said = refused(dataset, tmp_path, pairs, line=2)
    assert said == f"gold = {gold!r} is none of {labels}"


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_a_pair_that_asks_nothing_is_refused(tmp_path: Path, prompt: str) -> None:
    pairs = [{"prompt": "p", "gold": "A"}, {"prompt": prompt, "gold": "A"}]
    assert refused("medqa", tmp_path, pairs, line=2) == "prompt is empty"


def test_a_row_error_has_its_rows_index() -> None:
    rows = [exam("a"), exam("b"), exam("x")]
    with pytest.raises(RowError) as caught:
        choices(rows, (0, 1), held=True)
    assert caught.value.index == 2
