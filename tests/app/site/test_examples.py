"""Rows to token ids and labels: what is learned, what is not, and what is cut."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from app.site.examples import (
    IGNORED,
    Example,
    FileTokenizer,
    collate,
    encode,
    encode_all,
    encode_rows,
    lengths,
    sizes,
)
from app.site.partition import Row
from app.site.prompts import training_prompt
from tests.samples import ROWS

ALL = [Row(r["input"], r["output"]) for r in ROWS]
WORDS = st.text("abc defé漢\n.,?", min_size=1, max_size=40).filter(lambda t: bool(t.strip()))
LONG = 10_000


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def learned(example: Example) -> list[int]:
    return [label for label in example.labels if label != IGNORED]


def test_the_answer_and_its_end_are_learned_and_the_prompt_is_not(tokenizer: Any) -> None:
    @settings(max_examples=50)
    @given(WORDS, WORDS)
    def check(question: str, answer: str) -> None:
        example = encode(Row(question, answer), tokenizer, LONG)
        labels = learned(example)
        assert labels[-1] == tokenizer.eos_token_id
        assert example.input_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(labels[:-1]) == " " + answer
        split = len(example.labels) - len(labels)
        assert example.labels[:split] == [IGNORED] * split
        assert example.labels[split:] == example.input_ids[split:]
        start = tokenizer.decode(example.input_ids[:split])
        assert start == tokenizer.bos_token + training_prompt(question)
        assert example.num_labels == len(labels)

    check()


def test_the_prompt_and_the_answer_join_as_one_text_would(tokenizer: Any) -> None:
    # At inference the model sees the prompt and goes on: the seam must not matter.
    for row in ALL:
        whole = tokenizer(training_prompt(row.question) + " " + row.answer)["input_ids"]
        assert encode(row, tokenizer, LONG).input_ids[:-1] == whole


def test_a_row_that_is_cut_does_not_learn_to_end_there(tokenizer: Any) -> None:
    @settings(max_examples=50)
    @given(st.sampled_from(ALL), st.data())
    def check(row: Row, data: st.DataObject) -> None:
        whole = encode(row, tokenizer, LONG)
        length = data.draw(st.integers(1, len(whole.input_ids) - 1))
        cut = encode(row, tokenizer, length)
        assert cut.input_ids == whole.input_ids[:length]
        assert cut.labels == whole.labels[:length]
        assert tokenizer.eos_token_id not in cut.labels
        # The exact length is enough for all of it.
        assert encode(row, tokenizer, len(whole.input_ids)) == whole

    check()


def test_rows_whose_prompt_fills_the_length_are_dropped(tokenizer: Any) -> None:
    lengths = {row: len(tokenizer(training_prompt(row.question))["input_ids"]) for row in ALL}
    limit = sorted(lengths.values())[len(ALL) // 2]
    kept = encode_all(ALL, tokenizer, limit)
    assert len(kept) == sum(n < limit for n in lengths.values())
    assert 0 < len(kept) < len(ALL)
    assert all(e.num_labels and len(e.input_ids) <= limit for e in kept)
    assert encode_all(ALL, tokenizer, 16) == []


def test_the_order_of_the_rows_is_kept(tokenizer: Any) -> None:
    examples = encode_all(ALL, tokenizer, LONG)
    assert [tokenizer.decode(learned(e)[:-1]) for e in examples] == [" " + r.answer for r in ALL]


ENDS = {"bos_token": "<s>", "eos_token": "</s>"}


def behind_as_well(tokenizer: Any) -> Any:
    """The tiny tokenizer, but it puts EOS behind each text by itself."""
    made = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    made._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>",
        special_tokens=[("<s>", made.bos_token_id), ("</s>", made.eos_token_id)],
    )  # fmt: skip
    return made


def nothing_in_front(tokenizer: Any) -> Any:
    """As GPT-2's and SmolLM2's: it has a BOS, and puts it nowhere."""
    made = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    made._tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


def a_space_in_front(tokenizer: Any) -> Any:
    """As Llama-2's: a normalizer puts a space in front of each text. No merge crosses words."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    letters = [chr(c) for c in range(32, 127)] + ["é", "漢", "▁", "\n"]
    special = list(ENDS.values())
    trainer = trainers.BpeTrainer(
        vocab_size=len(letters) + 2, initial_alphabet=letters, special_tokens=special,
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(["a"], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **ENDS)


KINDS = {
    "as Llama-3's": lambda tokenizer: tokenizer,
    "EOS behind": behind_as_well,
    "no BOS": nothing_in_front,
    "as Llama-2's": a_space_in_front,
}


@pytest.mark.parametrize("kind", KINDS)
def test_question_and_answer_are_text_whatever_they_say(tokenizer: Any, kind: str) -> None:
    made = KINDS[kind](tokenizer)
    bos = [] if kind == "no BOS" else [made.bos_token_id]
    marks = st.sampled_from(["<s>", "</s>", "<s>5</s> 6 mg", "a</s>", " <s>", "5 mg."])

    @settings(max_examples=40)
    @given(marks | WORDS, marks | WORDS.filter(lambda t: not t.startswith((" ", "\n"))))
    def check(question: str, answer: str) -> None:
        example = encode(Row(question, answer), made, LONG)
        labels = learned(example)
        prompt = example.input_ids[: -len(labels)]
        assert labels[-1] == made.eos_token_id
        assert prompt[: len(bos)] == bos
        text = [*prompt[len(bos) :], *labels[:-1]]
        assert not {made.bos_token_id, made.eos_token_id} & set(text)
        assert made.decode(text) == training_prompt(question) + " " + answer
        # As at inference, and as one text would be.
        asked = made(training_prompt(question), split_special_tokens=True)["input_ids"]
        assert prompt == (asked[:-1] if kind == "EOS behind" else asked)
        assert text == made(
            training_prompt(question) + " " + answer, split_special_tokens=True,
            add_special_tokens=False,
        )["input_ids"]  # fmt: skip

    check()


def test_where_prompt_and_answer_would_share_a_token_no_space_is_added(tokenizer: Any) -> None:
    """A vocabulary with ":▁5" in it: the prompt stays as at inference."""
    made = a_space_in_front(tokenizer)
    inner = json.loads(made._tokenizer.to_str())
    for token in (":▁", ":▁5"):
        inner["model"]["vocab"][token] = len(inner["model"]["vocab"])
    inner["model"]["merges"] += [[":", "▁"], [":▁", "5"]]
    changed = Tokenizer.from_str(json.dumps(inner))
    made = PreTrainedTokenizerFast(tokenizer_object=changed, **ENDS)
    example = encode(Row("Dose?", "5 mg."), made, LONG)
    ids = example.input_ids
    assert made.convert_ids_to_tokens(learned(example)) == ["▁", "5", "▁", "m", "g", ".", "</s>"]
    assert ids[: -len(learned(example))] == made(training_prompt("Dose?"))["input_ids"]


@pytest.mark.parametrize("name", ["as Llama-3's", "EOS behind", "no BOS"])
def test_the_preflights_tokenizer_is_the_one_that_trains(
    tokenizer: Any, tmp_path: Path, name: str
) -> None:
    KINDS[name](tokenizer).save_pretrained(tmp_path)
    of_file, of_library = FileTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    rows = [*ALL, Row("<s>?", "</s> é漢\n")]
    for length in (LONG, 250, 230, 10):
        assert encode_rows(rows, of_file, length) == encode_rows(rows, of_library, length)


def test_a_row_is_too_long_or_cut_or_whole(tokenizer: Any) -> None:
    whole = encode_rows(ALL, tokenizer, LONG)
    most = sorted(len(e.input_ids) for e in whole)[len(ALL) // 2]
    kept = encode_all(ALL, tokenizer, most)
    counts = lengths(sizes(ALL * 50, tokenizer), most)  # more than are encoded at once
    assert counts["too_long"] == 50 * (len(ALL) - len(kept))
    assert counts["cut"] == 50 * sum(e.input_ids[-1] != tokenizer.eos_token_id for e in kept)
    assert counts["cut"] > 0
    of_all = sizes(ALL, tokenizer)
    assert of_all == [(len(e.input_ids), len(e.input_ids) - e.num_labels) for e in whole]
    assert lengths(of_all, LONG) == {"too_long": 0, "cut": 0}
    assert lengths(of_all, 16) == {"too_long": len(ALL), "cut": 0}
    assert lengths(sizes([], tokenizer), 16) == {"too_long": 0, "cut": 0}


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=12), min_size=1, max_size=6))
def test_a_batch_holds_each_example_and_only_padding_beside(ids: list[list[int]]) -> None:
    examples = [Example(x, [IGNORED, *x[1:]]) for x in ids]
    batch = collate(examples)
    longest = max(map(len, ids))
    assert {n: tuple(t.shape) for n, t in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (len(ids), longest)
    )
    for row, x in enumerate(ids):
        assert batch["input_ids"][row, : len(x)].tolist() == x
        assert batch["labels"][row, : len(x)].tolist() == [IGNORED, *x[1:]]
        assert batch["attention_mask"][row].tolist() == [1] * len(x) + [0] * (longest - len(x))
        assert (batch["labels"][row, len(x) :] == IGNORED).all()


def test_an_end_of_sequence_that_is_the_padding_token_too_is_still_learned(tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token  # as is usual with Llama models
    short, long = sorted(encode_all(ALL, tokenizer, LONG), key=lambda e: len(e.input_ids))[
        :: len(ALL) - 1
    ]
    batch = collate([short, long])
    end = len(short.input_ids) - 1
    assert batch["labels"][0, end] == tokenizer.eos_token_id
    assert batch["attention_mask"][0, end] == 1


def test_neither_padding_nor_the_neighbour_in_the_batch_changes_what_the_model_sees(
    tiny_model: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    short, long = sorted(encode_all(ALL, tokenizer, LONG), key=lambda e: len(e.input_ids))[
        :: len(ALL) - 1
    ]
    assert len(short.input_ids) < len(long.input_ids)
    with torch.inference_mode():
        alone = model(**collate([short]))
        both = model(**collate([short, long]))
        other = model(**collate([long]))
    length = len(short.input_ids)
    torch.testing.assert_close(both.logits[0, :length], alone.logits[0], rtol=1e-4, atol=1e-5)
    n_short, n_long = short.num_labels, long.num_labels
    mean = (alone.loss * n_short + other.loss * n_long) / (n_short + n_long)
    torch.testing.assert_close(both.loss, mean, rtol=1e-5, atol=1e-5)


def test_the_prompts_labels_never_reach_the_loss(tiny_model: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    example = encode(ALL[0], tokenizer, LONG)
    batch = collate([example])
    with torch.inference_mode():
        output = model(**batch)
        rows = torch.log_softmax(output.logits[0, :-1].double(), dim=-1)
    picked = [
        -float(rows[t, label]) for t, label in enumerate(example.labels[1:]) if label != IGNORED
    ]
    assert len(picked) == example.num_labels
    assert float(output.loss) == pytest.approx(sum(picked) / len(picked), rel=1e-5)
