"""Files of benchmark rows: the same rows from every layout, and the authors' own test set."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval import EvalError
from eval.benchmarks import Question, load, render
from tests.samples import write_jsonl

ABSTRACT = {"QUESTION": "Does it?", "CONTEXTS": ["Of 41,", "38 did."], "final_decision": "no"}


def layouts(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The same rows as text, in every layout."""
    keyed = {str(9 - n): row for n, row in enumerate(rows)}
    names = [*rows[0]]
    return {
        "lines": "\n".join(map(json.dumps, rows)),
        "an array": json.dumps(rows),
        "an array, indented": json.dumps(rows, indent=1),
        "keys": json.dumps(keyed),
        "keys, indented": json.dumps(keyed, indent=4),
        "an object around": json.dumps({"version": "1", "data": rows}),
        "an object around, a row a line": json.dumps({"version": 1, "questions": rows}).replace(
            "}, {", "},\n{"
        ),
        "columns": json.dumps({n: [row[n] for row in rows] for n in names}),
        "columns by number": json.dumps(
            {n: {str(i): row[n] for i, row in enumerate(rows)} for n in names}
        ),
        "behind a byte order mark": "\ufeff\n" + json.dumps(keyed),
    }


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", layouts([ABSTRACT]))
@pytest.mark.parametrize("suffix", ["json", "jsonl", "JSON"])
def test_the_same_rows_are_read_from_every_layout(
    tmp_path: Path, layout: str, count: int, suffix: str
) -> None:
    rows = [ABSTRACT | {"QUESTION": f"Number {n}?"} for n in range(count)]
    text = layouts(rows)[layout]
    (tmp_path / f"pubmedqa.{suffix}").write_text(text, encoding="utf-8")
    assert load("pubmedqa", tmp_path, tmp_path)[0] == [
        Question(*render("pubmedqa", r)) for r in rows
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"train": [{"question": "?"}], "test": [{"question": "?"}]}',
            ": which of 'train', 'test'?",
        ),
        ('{"question": ["?", "?"], "answer": ["x"]}', ": its columns are not of one length"),
        ('{"7": {"question": "?"},\n "8": "yes"}', ", line 1: no text in 'question'; "),
        ('{"7": {"question": "?"},\n "8": {"question"', ", line 2: not JSON"),
        ('{"question": "?"\n{"question": "?"}\n', ", line 1: not JSON"),
        ('{"7": "B"}', ", line 1: no text in 'question'; "),
    ],
)
def test_a_layout_that_is_not_certain_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "medqa.json").write_text(text)
    with pytest.raises(EvalError) as caught:
        load("medqa", tmp_path, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'medqa.json'}{said}")
    assert "\n" not in str(caught.value)


def labelled(folder: Path, truth: dict[str, str]) -> Path:
    """PubMedQA as its authors have it: keyed abstracts and, beside them, those to test on."""
    keyed = {
        str(n): ABSTRACT | {"QUESTION": f"Number {n}?", "final_decision": ("yes", "no")[n % 2]}
        for n in range(100, 106)
    }
    (folder / "ori_pqal.json").write_text(json.dumps(keyed, indent=4))
    (folder / "test_ground_truth.json").write_text(json.dumps(truth, indent=4))
    return folder / "ori_pqal.json"


def test_beside_the_authors_ground_truth_only_their_test_set_is_asked(tmp_path: Path) -> None:
    path = labelled(tmp_path, {"104": "yes", "101": "no", "102": "Yes"})
    questions, origin = load("pubmedqa", tmp_path, tmp_path)
    numbers = [q.prompt.split("Number ")[1][:3] for q in questions]
    assert (numbers, [q.gold for q in questions]) == (["101", "102", "104"], ["no", "yes", "yes"])
    assert origin == f"{path}, those in test_ground_truth.json"
    (tmp_path / "test_ground_truth.json").unlink()
    questions, origin = load("pubmedqa", tmp_path, tmp_path)
    assert (len(questions), origin) == (6, str(path))


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ({"101": "no", "7": "yes", "8": "no"}, "2 of its 3 are not in the file beside it"),
        ({"101": "no", "102": "no"}, "another answer than the file beside it has in row 3"),
    ],
)
def test_a_ground_truth_of_other_abstracts_is_refused(
    tmp_path: Path, truth: dict[str, str], said: str
) -> None:
    labelled(tmp_path, truth)
    with pytest.raises(EvalError) as caught:
        load("pubmedqa", tmp_path, tmp_path)
    assert str(caught.value) == f"{tmp_path / 'test_ground_truth.json'}: {said}"


def test_rows_without_a_pmid_are_all_asked(tmp_path: Path) -> None:
    labelled(tmp_path, {"101": "no"})
    (tmp_path / "ori_pqal.json").unlink()
    write_jsonl(tmp_path / "pubmedqa.jsonl", [ABSTRACT] * 2)
    assert load("pubmedqa", tmp_path, tmp_path)[0] == [Question(*render("pubmedqa", ABSTRACT))] * 2
