"""What counts as right, by the leaderboard's rules, and how sure one can be of it.

No model and no Flower here: outputs and golds in, figures out.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import EvalError
from eval.benchmarks import BENCHMARKS
from eval.files import read_rows

_ANSWERS = {"a", "b", "c", "d", "e", "yes", "no"}
_DOUBLED = (("yesyes", "yes"), ("nono", "no"), ("yesno", "yes"), ("noyes", "no"))


def read_answer(output: str, gold: str, boolean: bool) -> tuple[str, str]:
    """The answer that the leaderboard reads out of an output, and the gold to compare it with.

    Both in lower case. Only letters and digits count; a multiple-choice answer is its first
    character ("Edema" is an "e"). What then is none of a to e, yes and no (so "maybe" as well)
    counts only where the whole output equals the gold verbatim.
    Source: format_answer in adap/flower, benchmarks/flowertune-llm/evaluation/medical/utils.py.
    """
    output, gold = output.lower(), gold.lower()
    whole = (output, gold)
    if "###" in gold:
        _, found, tail = gold.partition("answer is:")
        if not found:
            return whole
        gold = tail.split("answer is:")[0].split("###")[0].strip()
    text = output.split("\n##")[1].split("\n")[0] if "\n##" in output else output
    text = " ".join(re.sub("[^a-z0-9]", " ", text).split())
    if boolean:
        for doubled, single in _DOUBLED:
            if doubled in text:
                text = text.replace(doubled, single)
                break
    else:
        text = text[:1]
    return (text, gold) if text in _ANSWERS else whole


def right(outputs: Sequence[str], golds: Sequence[str], boolean: bool) -> list[bool]:
    """Per question, whether the leaderboard counts the output as right."""
    pairs = (read_answer(o, g, boolean) for o, g in zip(outputs, golds, strict=True))
    return [answer == gold for answer, gold in pairs]


def score(
    outputs: Sequence[str],
    golds: Sequence[str],
    labels: Sequence[str],
    picks: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Accuracy with its 95 % interval (Wilson), and what an accuracy alone would hide.

    Args:
        labels: the answers that the set offers: yes/no/maybe, or letters.
        picks: the likeliest label per question, if known; gives ``label_accuracy``, which tells
            a model that does not know from one that does not answer in labels.
    """
    from scipy.stats import binomtest

    n, boolean = len(golds), "yes" in labels
    by_name = {label.lower(): label for label in (*labels, *([] if boolean else "E"))}
    golds = [by_name.get(gold.lower(), gold) for gold in golds]  # the rules know no case
    correct = sum(right(outputs, golds, boolean))
    interval = binomtest(correct, n).proportion_ci(0.95, "wilson")
    confusion: dict[str, Counter[str]] = {label: Counter() for label in labels if label in golds}
    for output, gold in zip(outputs, golds, strict=True):
        answer, _ = read_answer(output, gold, boolean)
        confusion.setdefault(gold, Counter())[by_name.get(answer, "unparsed")] += 1
    majority, majority_n = Counter(golds).most_common(1)[0]
    result: dict[str, Any] = {
        "n": n,
        "accuracy": correct / n,
        "ci95": [float(interval.low), float(interval.high)],
        "unparsed": sum(row["unparsed"] for row in confusion.values()),
        "label_accuracy": None,
        "majority": {"label": majority, "accuracy": majority_n / n},
        "confusion": {gold: dict(row) for gold, row in confusion.items()},
        "notes": _notes(outputs, golds) if boolean else [],
    }
    if picks and None not in picks:
        result["label_accuracy"] = sum(p == g for p, g in zip(picks, golds, strict=True)) / n
    return result


def _notes(outputs: Sequence[str], golds: Sequence[str]) -> list[str]:
    maybe = [o for o, g in zip(outputs, golds, strict=True) if g == "maybe"]
    if not maybe:
        return []
    found = sum(o.lower() == "maybe" for o in maybe)
    given = sum(o.lower() == "maybe" for o in outputs)
    decided = [(o, g) for o, g in zip(outputs, golds, strict=True) if g != "maybe"]
    correct = sum(right([o for o, _ in decided], [g for _, g in decided], boolean=True))
    return [
        f"{len(maybe)} of {len(golds)} golds are 'maybe', which counts only verbatim: answered "
        f"{given} times, {found} times rightly. Answering yes and no alone reaches at most "
        f"{len(decided) / len(golds):.4f}; of the {len(decided)} others {correct} are right."
    ]


def compare(base: Sequence[bool], adapter: Sequence[bool]) -> dict[str, Any]:
    """The adapter against the base on the same questions: McNemar's exact test, two-sided.

    Only questions that one of the two answers rightly tell them apart.
    """
    from scipy.stats import binomtest

    only_base = sum(b and not a for b, a in zip(base, adapter, strict=True))
    only_adapter = sum(a and not b for b, a in zip(base, adapter, strict=True))
    discordant = only_base + only_adapter
    p_value = binomtest(only_adapter, discordant).pvalue if discordant else 1.0
    return {
        "difference": (only_adapter - only_base) / len(base),
        "only_base": only_base,
        "only_adapter": only_adapter,
        "p_value": float(p_value),
    }


def score_file(path: Path) -> tuple[str, dict[str, Any]]:
    """The name and the score of a generation file: prompt, gold and output a row.

    The set is the one in the file's name (generation_<dataset>_<run>), else told from the golds.

    Raises:
        EvalError: a row without text in ``gold`` or ``output``, or no row.
    """
    golds, outputs = [], []
    for place, row in read_rows(path):
        if not all(isinstance(row.get(key), str) for key in ("gold", "output")):
            raise EvalError(f"{path}, {place}: no text in 'gold' or 'output'")
        golds.append(row["gold"])
        outputs.append(row["output"])
    if not golds:
        raise EvalError(f"{path} holds no answer")
    name = path.stem.removeprefix("generation_").split("_")[0]
    if name in BENCHMARKS:
        return name, score(outputs, golds, BENCHMARKS[name].labels)
    boolean = {gold.lower() for gold in golds} <= {"yes", "no", "maybe"}
    return path.stem, score(outputs, golds, ("yes", "no", "maybe") if boolean else tuple("ABCDE"))
