"""Questions and answers in the words of a base model's own chat template.

The template is rendered around questions of ours, and sees no row. Its markup becomes the tokens
that it names; what a row says is text, whatever it says.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from app.site.examples import FileTokenizer
from app.site.partition import SiteError

# What a template might escape, take for its own, or write in another case.
_TALKS = (('Why "a" & <b>\n{{ x }} = 1?', "It's [1]."), ("Ünd 'C' \\n e!", "No & {no}"))
# What a template that states the day states, here as everywhere: Llama 3.1's own. With the real day
# each would be another prompt.
_TODAY = date(2024, 7, 26)
_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class Chat:
    """The words of a template.

    Attributes:
        before, behind: those around a question; the model's answer begins behind them.
        gap: the white space in front of an answer, which belongs to it.
        close: what ends an answer: up to the first special token there, or EOS.
        strips: the template takes off the white space around a question.
    """

    before: str
    behind: str
    gap: str
    close: str
    strips: bool

    def asked(self, questions: Sequence[str], tokenizer: Any) -> list[list[int]]:
        """Token ids of each question as it is asked, up to where the answer begins."""
        markup = _Markup(tokenizer)
        before, behind = markup.ids([self.before, self.behind])
        given = self._given(questions)
        # One text, as it is for everybody who asks by this template.
        found = markup.ids([self.before + question + self.behind for question in given])
        ours = markup.of(before + behind)
        odd = [n for n, ids in enumerate(found) if markup.of(ids) != ours]
        for n, ids in zip(odd, markup.text([given[n] for n in odd]), strict=True):
            found[n] = [*before, *ids, *behind]
        return found

    def answered(
        self, questions: Sequence[str], answers: Sequence[str], tokenizer: Any
    ) -> tuple[list[tuple[list[int], list[int]]], int]:
        """Of each pair the ids in front of the answer, and the answer's with its end.

        With it how many are not the ids of one text: a row holds markup, or a token would be one
        of both sides of a seam.
        """
        markup, prompts = _Markup(tokenizer), self.asked(questions, tokenizer)
        *words, close = markup.ids([self.before, self.behind, self.close])
        ours = markup.of([*words[0], *words[1], *close])
        given = zip(self._given(questions), answers, strict=True)
        seam = self.behind + self.gap
        wholes = markup.ids([self.before + q + seam + a + self.close for q, a in given])
        found = [(p, whole[len(p) :]) for p, whole in zip(prompts, wholes, strict=True)]
        apart = [
            n
            for n, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True))
            if whole[: len(prompt)] != prompt or markup.of(whole) != ours
        ]
        alone = markup.text([self.gap + answers[n] for n in apart])
        for n, ids in zip(apart, alone, strict=True):
            found[n] = (prompts[n], [*ids, *close])
        return found, len(apart)

    def _given(self, questions: Sequence[str]) -> list[str]:
        return [question.strip() if self.strips else question for question in questions]


class _Markup:
    """A tokenizer that reads markup, or does not."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._special = {n for n, token in added.items() if token.special}

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Of texts of ours; with what stands between them, so ``of`` has to be asked."""
        return self._encoded(texts, False)

    def text(self, texts: list[str]) -> list[list[int]]:
        """Of texts in which nothing is markup."""
        return self._encoded(texts, True) if texts else []

    def of(self, ids: list[int]) -> list[int]:
        """The markup among these, in its order."""
        return [n for n in ids if n in self._special]

    def _encoded(self, texts: list[str], split: bool) -> list[list[int]]:
        made = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=split)
        found: list[list[int]] = made["input_ids"]
        return found


def chosen(prompt: str, folder: Path, name: str) -> Chat | None:
    """The words that ``model.prompt`` asks for; None: FlowerTune's (app/site/prompts.py).

    Args:
        folder: of the base model's tokenizer.
        name: of the base model, for the error.

    Raises:
        SiteError: the base model has no chat template that can be used.
    """
    if prompt != "chat":
        return None
    try:
        return _read(folder)
    except Exception as err:  # whatever jinja and a template raise: it is the model's, and no row's
        why = str(err) if isinstance(err, _UnfitError) else f"{type(err).__name__}: {err}"
        raise SiteError(
            f"run config: model.prompt = 'chat': the chat template of base model {name} cannot be "
            f"used: {' '.join(why.split())[:200]}; set it to 'alpaca', or take another model"
        ) from None


class _UnfitError(ValueError):
    """Why a template cannot be used, in words."""


def _read(folder: Path) -> Chat:
    """Raises _UnfitError, and what files, jinja and a template raise."""
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = settings.get("chat_template")
    if (folder / _FILE).is_file():
        template = (folder / _FILE).read_text(encoding="utf-8")
    if isinstance(template, list):  # several, each with a name
        template = {one["name"]: one["template"] for one in template}.get("default")
    if not isinstance(template, str):
        raise _UnfitError(f"it has none ({_FILE} in its prepared folder)")
    render = _renderer(template, settings)
    words = {_around(render, question, answer) for question, answer in _TALKS}
    if len(words) > 1:
        raise _UnfitError("it says other words around another question")
    ((before, behind, gap, rest, strips),) = words
    tokenizer = FileTokenizer(folder)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    ends = [(rest.index(t.content), t.content) for t in added if t.special and t.content in rest]
    if not ends:
        return Chat(before, behind, gap, tokenizer.eos_token, strips)
    at, first = min(ends, key=lambda end: (end[0], -len(end[1])))
    return Chat(before, behind, gap, rest[: at + len(first)], strips)


def _around(
    render: Callable[..., str], question: str, answer: str
) -> tuple[str, str, str, str, bool]:
    """The words in front of this question and behind it; the white space in front of this answer,
    and the words behind it; are the ends of a question taken off?

    Raises _UnfitError: it does not say question or answer as they are.
    """
    padded = f" {question}\n"
    said = render(padded)
    strips = said.count(padded) != 1
    before, found, behind = said.partition(question if strips else padded)
    prompt = before + question + behind
    if not found or question in behind or render(question) != prompt:
        raise _UnfitError("it does not say a question once and as it is")
    turns, found, rest = render(question, answer).partition(answer)
    if not found or answer in rest:
        raise _UnfitError("it does not say an answer once and as it is")
    # Nothing else that an answer may begin with there, as an empty thought: it is asked without.
    gap = turns.removeprefix(prompt)
    return before, behind, gap if gap.isspace() else "", rest, strips


def _renderer(template: str, settings: dict[str, Any]) -> Callable[..., str]:
    """Of a question, or a question and its answer, in the sandbox of Transformers."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template(template)
    named = {key: value for key, value in settings.items() if key.endswith("_token") and value}
    tokens = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items()}

    def render(*said: str) -> str:
        turns = zip(("user", "assistant"), said, strict=False)
        text: str = compiled.render(
            messages=[{"role": role, "content": content} for role, content in turns],
            tools=None, documents=None, add_generation_prompt=len(said) == 1,
            strftime_now=_TODAY.strftime, **tokens,
        )  # fmt: skip
        return text

    return render
