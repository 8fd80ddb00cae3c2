"""Rows to token ids and labels, and batches of them.

Question and answer are text, whatever they say: no "</s>" in them becomes the end of a sequence.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.site.last_lines import travels
from app.site.prompts import training_prompt
from app.site.rows import Row

if TYPE_CHECKING:
    import torch

    from app.site.chat import Chat

logger = logging.getLogger(__name__)
IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class Example:
    """Token ids and labels [T]: the prompt's labels are IGNORED, the answer's are its ids."""

    input_ids: list[int]
    labels: list[int]
    cut: bool = False  # its answer goes on

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORED for label in self.labels)


class FileTokenizer:
    """A prepared model's tokenizer without transformers: what the preflight can afford.

    Of the same tokenizer.json that transformers reads, and called in the same way. Whatever is
    wrong with the file raises some Exception.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.backend_tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        eos = settings["eos_token"]
        self.eos_token: str = eos["content"] if isinstance(eos, dict) else eos
        self.eos_token_id = self.backend_tokenizer.token_to_id(self.eos_token)
        if self.eos_token_id is None:
            raise ValueError("no EOS")

    def __call__(
        self, texts: list[str], add_special_tokens: bool, split_special_tokens: bool
    ) -> dict[str, list[list[int]]]:
        self.backend_tokenizer.encode_special_tokens = split_special_tokens
        found = self.backend_tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return {"input_ids": [one.ids for one in found]}


def _ids(texts: list[str], tokenizer: Any, special: bool = False) -> list[list[int]]:
    made = tokenizer(texts, add_special_tokens=special, split_special_tokens=True)
    ids: list[list[int]] = made["input_ids"]
    return ids


def _start(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text: BOS, or nothing. What it puts behind is ours."""
    (bare,), (whole,) = (_ids(["a"], tokenizer, special) for special in (False, True))
    return whole[: next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)]


def _puts_a_space(tokenizer: Any) -> bool:
    """True if the tokenizer itself puts a space in front of a text, as Llama-2's does."""
    (one,), (two,) = _ids(["a"], tokenizer), _ids(["a a"], tokenizer)
    return two == one + one


def encode_rows(
    rows: Sequence[Row], tokenizer: Any, seq_length: int, chat: "Chat | None" = None
) -> list[Example]:
    """A training example of each row, of at most ``seq_length`` tokens.

    The ids are those of the whole text, and those in front of the answer the prompt's own, as at
    inference. The answer ends in EOS, or as it does in the chat template ``chat``, and its end is
    learned: its label is real, and padding is masked by the attention mask, not by its id (many
    tokenizers pad with EOS). A row that is cut ends without it, since its answer does not end
    there; if the prompt alone fills the length, no label is left (``num_labels`` is 0).
    """
    if not rows:
        return []
    if chat:
        questions, answers = [row.question for row in rows], [row.answer for row in rows]
        parts, num_apart = chat.answered(questions, answers, tokenizer)
    else:
        parts, num_apart = _alpaca(rows, tokenizer)
    if num_apart:
        logger.info(
            "%d of %d prompts and answers are tokenised apart", num_apart, len(rows),
            extra=travels(),
        )  # fmt: skip
    examples = []
    for prompt, answer in parts:
        ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
        examples.append(Example(ids[:seq_length], labels[:seq_length], len(ids) > seq_length))
    return examples


def _alpaca(rows: Sequence[Row], tokenizer: Any) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Ids in front of each answer and its own; and of how many rows the two are encoded apart."""
    texts = [training_prompt(row.question) for row in rows]
    answers = [f" {row.answer}" for row in rows]
    start, prompts = _start(tokenizer), _ids(texts, tokenizer)
    wholes = _ids([t + a for t, a in zip(texts, answers, strict=True)], tokenizer)
    apart = [n for n, p in enumerate(prompts) if wholes[n][: len(p)] != p]
    if apart:  # a token of both: the prompt is kept as at inference
        space = slice(1, None) if _puts_a_space(tokenizer) else slice(None)
        for n, ids in zip(apart, _ids([answers[n][space] for n in apart], tokenizer), strict=True):
            wholes[n] = prompts[n] + ids
    end = [tokenizer.eos_token_id]
    parts = zip(prompts, wholes, strict=True)
    return [([*start, *p], whole[len(p) :] + end) for p, whole in parts], len(apart)


def encode(row: Row, tokenizer: Any, seq_length: int, chat: "Chat | None" = None) -> Example:
    return encode_rows([row], tokenizer, seq_length, chat)[0]


def encode_all(
    rows: Sequence[Row], tokenizer: Any, seq_length: int, chat: "Chat | None" = None
) -> list[Example]:
    """Examples of the rows that keep at least one label."""
    return [e for e in encode_rows(rows, tokenizer, seq_length, chat) if e.num_labels]


def sizes(rows: Sequence[Row], tokenizer: Any, chat: "Chat | None" = None) -> list[tuple[int, int]]:
    """Of each row its tokens, however many they are, and those in front of the answer."""
    found = []
    for at in range(0, len(rows), 1000):  # not the ids of all of them at once
        for example in encode_rows(rows[at : at + 1000], tokenizer, sys.maxsize, chat):
            tokens = len(example.input_ids)
            found.append((tokens, tokens - example.num_labels))
    return found


def lengths(found: Sequence[tuple[int, int]], seq_length: int) -> dict[str, int]:
    """How many rows of these ``sizes`` keep nothing of their answer, and how many lose its end."""
    too_long = sum(prompt >= seq_length for _, prompt in found)
    cut = sum(prompt < seq_length < tokens for tokens, prompt in found)
    return {"too_long": too_long, "cut": cut}


def collate(examples: list[Example]) -> "dict[str, torch.Tensor]":
    """input_ids, attention_mask and labels [B, T], padded on the right to the longest."""
    import torch

    length = max(len(e.input_ids) for e in examples)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for e in examples:
        padding = length - len(e.input_ids)
        # The padded id is never seen (mask 0, label IGNORED); 0 is valid in every vocabulary.
        batch["input_ids"].append(e.input_ids + [0] * padding)
        batch["attention_mask"].append([1] * len(e.input_ids) + [0] * padding)
        batch["labels"].append(e.labels + [IGNORED] * padding)
    return {name: torch.tensor(rows) for name, rows in batch.items()}
