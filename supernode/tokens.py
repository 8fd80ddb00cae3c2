"""A base model's tokenizer: can rows be encoded with it, and do answers end where the model does?

What question and answer say is text. A library parses as markup whatever stands among the added
tokens, but for those that are marked as special: so what is markup has to be marked.
"""

import re
from pathlib import Path
from typing import Any

from supernode.source import SourceError

_MARKUP = re.compile(r"<\|.*\|>|</?s>|<(bos|eos|pad|start_of_turn|end_of_turn)>|\[/?INST\]")
# Where a row's prompt ends and its answer begins (app/site/prompts.py, which a run brings).
_PROMPT, _ANSWER = "Which organ pumps the blood?\n### Response:", " The heart."


def check_tokenizer(source: Path, tokenizer: Any, vocabulary: int) -> None:
    """Raises SourceError if rows cannot be encoded for a model of so many tokens."""
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= vocabulary:
        raise SourceError(
            f"{source}: the tokenizer has a token {last}, the model knows 0 to {vocabulary - 1}; "
            "give the model's own tokenizer, or resize_token_embeddings and save both"
        )
    if tokenizer.eos_token_id is None:
        raise SourceError(
            f"{source / 'tokenizer_config.json'} names no eos_token, which every answer ends in; "
            "add it"
        )
    if not tokenizer.is_fast:
        raise SourceError(
            f"{source}: its tokenizer has no tokenizer.json, which the sites' preflight reads; "
            "save it with a fast tokenizer of Transformers, or take another model"
        )


def mark_markup(tokenizer: Any) -> None:
    """As special, wherever it is kept: in the file that is saved it decides what a site encodes.

    What the chat template writes is markup as well.
    """
    from tokenizers import AddedToken

    backend, roles = tokenizer.backend_tokenizer, set(tokenizer.all_special_tokens)
    template = str(tokenizer.chat_template or "")
    for token in backend.get_added_tokens_decoder().values():
        text = token.content
        written = text.strip() and text in template
        if not token.special and (text in roles or _MARKUP.fullmatch(text) or written):
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def notes(tokenizer: Any, stops: int | list[int] | None) -> list[str]:
    """What to know of a tokenizer that works.

    Args:
        stops: the tokens at which the model ends a text, its eos_token_id.
    """
    found = []
    eos, text = tokenizer.eos_token_id, tokenizer.eos_token
    known = [stops] if isinstance(stops, int) else list(stops or [])
    if eos not in known:
        at = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in known) or "none"
        found.append(
            f"WARNING: answers end in the tokenizer's EOS, {text} ({eos}), at which the model does "
            f"not stop (its eos_token_id: {at}); name one token in tokenizer_config.json and "
            "generation_config.json, or what is made of it talks on"
        )
    prompt, whole = (
        tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for part in (_PROMPT, _PROMPT + _ANSWER)
    )
    if whole[: len(prompt)] != prompt:
        found.append(
            "the tokenizer joins the end of a prompt and the beginning of an answer in one token; "
            "they are encoded apart, as when an answer is asked for"
        )
    return found
