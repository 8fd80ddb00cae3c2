"""Rows to token ids and labels, and batches of them."""

from dataclasses import dataclass
from typing import Any

import torch

from app.site.partition import Row
from app.site.prompts import training_prompt

IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class Example:
    """Token ids and labels [T]: the prompt's labels are IGNORED, the answer's are its ids."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def encode(row: Row, tokenizer: Any, seq_length: int) -> Example:
    """One training example of at most ``seq_length`` tokens.

    The answer ends in EOS, and EOS is learned: its label is real, and padding is masked by
    the attention mask, not by its id (many tokenizers pad with EOS). A row that is cut ends
    without EOS, since its answer does not end there; if the prompt alone fills the length,
    no label is left (``num_labels`` is 0).
    """
    prompt = tokenizer(training_prompt(row.question))["input_ids"]
    answer = tokenizer(" " + row.answer, add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    ids = (prompt + answer)[:seq_length]
    labels = ([IGNORED] * len(prompt) + answer)[:seq_length]
    return Example(ids, labels)


def encode_all(rows: list[Row], tokenizer: Any, seq_length: int) -> list[Example]:
    """Examples of the rows that keep at least one label."""
    examples = (encode(row, tokenizer, seq_length) for row in rows)
    return [e for e in examples if e.num_labels]


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels [B, T], padded on the right to the longest."""
    length = max(len(e.input_ids) for e in examples)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for e in examples:
        padding = length - len(e.input_ids)
        # The padded id is never seen (mask 0, label IGNORED); 0 is valid in every vocabulary.
        batch["input_ids"].append(e.input_ids + [0] * padding)
        batch["attention_mask"].append([1] * len(e.input_ids) + [0] * padding)
        batch["labels"].append(e.labels + [IGNORED] * padding)
    return {name: torch.tensor(rows) for name, rows in batch.items()}
