"""Answers of a model, as the leaderboard's loop would give them, in a fraction of the time.

Where every gold is one token the leaderboard generates one token, greedily: the arg-max behind
the prompt. So one forward pass a batch is enough, and the instruction that all prompts of a set
begin with is computed once. Batching moves logits a little: what is near a tie is asked again,
alone and whole, as the leaderboard asks.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from app.site.chat import Chat
from eval import EvalError
from eval.benchmarks import Question, wrap

CPU_TOKENS = 512  # of one forward pass: more is slower, one question fills the cores
NEAR_TIE = 1e-3  # at least; batching moves a float32 logit by about 5e-5
CALIBRATION = 4  # questions, long to short, asked both ways: how far does batching move a logit?
# Settings of generation_config.json that change what greedy generation gives, unless absent or
# as here.
_NEUTRAL = {
    "num_beams": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
    "bad_words_ids": [], "suppress_tokens": [], "begin_suppress_tokens": [], "sequence_bias": {},
    "forced_bos_token_id": None, "forced_eos_token_id": None,
}  # fmt: skip


class NotFiniteError(Exception):
    """The model's logits behind a question are no numbers to choose by; the question's index."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Answer(NamedTuple):
    """What the model says, and the likeliest of the set's labels (None if not known)."""

    output: str
    pick: str | None


class Inference:
    """One model that answers one set of questions after another.

    Attributes:
        tokens: tokens computed so far, padding included.
        repeated: questions asked again, alone: near ties, and a few to see what a near tie is.
        near_tie: gap of the two best logits below which the last set's questions were repeated.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int, chat: Chat | None = None
    ) -> None:
        """``chat``: asked in its words, not in the leaderboard's."""
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.chat = chat
        self.asked_batch_size = batch_size  # a GPU that is too small for it changes no answer
        self.tokens = self.repeated = 0
        self.near_tie = NEAR_TIE

    def answers(
        self, questions: Sequence[Question], labels: Sequence[str], done: Mapping[int, object]
    ) -> Iterator[tuple[int, Answer]]:
        """Index and answer of every question that is not in ``done``, in an order of its own.

        A few may come twice; the later answer holds.

        Raises:
            EvalError: the GPU is too small for a single question.
            NotFiniteError: NaN or infinite logits, also when the question is asked alone.
        """
        try:
            yield from self._answers(questions, labels, done)
        except torch.OutOfMemoryError:
            raise EvalError(
                "the GPU is too small for a single question; use --quantization 4 or nf4-bf16, "
                "or free its memory"
            ) from None

    def _answers(
        self, questions: Sequence[Question], labels: Sequence[str], done: Mapping[int, object]
    ) -> Iterator[tuple[int, Answer]]:
        todo = [i for i in range(len(questions)) if i not in done]
        if not todo:
            return
        prompts = self.encoded(questions)
        if not self.one_pass(questions):
            yield from self._generated(questions, prompts, set(todo))
            return
        # "yes" may be said as "Yes".
        spelled = [[self._ids(t) for t in {label, label.capitalize()}] for label in labels]
        label_ids = [[ids[0] for ids in ways if len(ids) == 1] for ways in spelled]

        def by_label(logits: torch.Tensor) -> torch.Tensor:
            return torch.stack([logits[ids].max() for ids in label_ids])

        def answer(logits: torch.Tensor) -> Answer:
            pick = labels[int(by_label(logits).argmax())] if all(label_ids) else None
            return Answer(self._text([int(logits.argmax())]), pick)

        def gap(logits: torch.Tensor) -> float:
            """Of the two best tokens, and of the two best labels: whichever is smaller."""
            if not logits.isfinite().all():
                return 0.0
            candidates = [logits, by_label(logits)] if all(label_ids) else [logits]
            pairs = [c.topk(2).values.tolist() for c in candidates]
            return min(float(first - second) for first, second in pairs)

        prefix = self._prefix(prompts)
        # The longest first: a GPU that is too small says so at once.
        todo.sort(key=lambda i: len(prompts[i]), reverse=True)
        self.near_tie, shift = NEAR_TIE, 0.0
        marks = {todo[len(todo) * n // CALIBRATION] for n in range(CALIBRATION)}
        gap_of: dict[int, float] = {}  # of questions not asked again, yet
        while todo:
            batch = self._batch(todo, prompts, prefix)
            logits = self._logits([prompts[i] for i in batch], prefix)
            gaps = [gap(row) for row in logits]
            closest = sorted(range(len(batch)), key=gaps.__getitem__)
            for row in closest:
                index, here = batch[row], logits[row]
                if index in marks or gaps[row] < self.near_tie:
                    here = self._alone(index, prompts[index])
                    if logits[row].isfinite().all():
                        shift = max(shift, float((logits[row] - here).abs().max()))
                    # A gap changes by two shifts at most; as much again for what was not seen.
                    self.near_tie = max(NEAR_TIE, 4 * shift)
                else:
                    gap_of[index] = gaps[row]
                yield index, answer(here)
            todo = todo[len(batch) :]
        for index in [i for i, g in gap_of.items() if g < self.near_tie]:
            # Judged when less was known of what a near tie is.
            yield index, answer(self._alone(index, prompts[index]))

    def encoded(self, questions: Sequence[Question]) -> list[list[int]]:
        """The token ids of each question as it is asked."""
        if self.chat:
            return self.chat.asked([q.prompt for q in questions], self.tokenizer)
        return [self.tokenizer.encode(wrap(q.prompt)) for q in questions]

    def one_pass(self, questions: Sequence[Question]) -> bool:
        """Whether what the leaderboard generates is the arg-max behind a fully seen prompt."""
        settings, eos = self.model.generation_config, self.tokenizer.eos_token_id
        stops = settings.eos_token_id
        if eos not in (stops if isinstance(stops, list) else [stops]) and any(
            eos in prompt for prompt in self.encoded(questions)
        ):
            return False  # its `generate` pads with EOS and then hides these tokens
        if any(len(self._ids(q.gold)) != 1 for q in questions):
            return False
        return all(getattr(settings, n, None) in (None, value) for n, value in _NEUTRAL.items())

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _prefix(self, prompts: Sequence[list[int]]) -> tuple[int, Any]:
        """Length, and keys and values per layer, of what all prompts begin with."""
        low, high = min(prompts), max(prompts)  # in lexicographic order: the most different two
        pairs = zip(low[:-1], high[:-1], strict=False)
        length = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(low), len(high)) - 1)
        if length == 0:
            return 0, None
        with torch.inference_mode():
            ids = torch.tensor([low[:length]], device=self.model.device)
            cache = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        self.tokens += length
        return length, [(layer.keys, layer.values) for layer in cache.layers]

    def _batch(
        self, todo: Sequence[int], prompts: Sequence[list[int]], prefix: tuple[int, Any]
    ) -> Sequence[int]:
        size = self.batch_size
        if self.model.device.type == "cpu":
            longest = max(len(prompts[i]) for i in todo[:size]) - prefix[0]
            size = max(1, min(size, CPU_TOKENS // longest))
        return todo[:size]

    def _alone(self, index: int, prompt: list[int]) -> torch.Tensor:
        """Logits behind a whole prompt, [vocabulary]; of question ``index``, if they are none."""
        logits = self._logits([prompt], None)[0]
        if not logits.isfinite().all():
            raise NotFiniteError(index)
        self.repeated += 1
        return logits

    def _logits(self, prompts: Sequence[list[int]], prefix: tuple[int, Any] | None) -> torch.Tensor:
        """Logits behind each prompt, [prompts, vocabulary], float32 on the CPU.

        A batch that does not fit the GPU is halved, from then on for all.
        """
        try:
            return self._forward(prompts, prefix)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise
        # Behind the except block: its traceback holds the tensors.
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        if half < self.batch_size:
            self.batch_size = half
            print(f"\neval: out of GPU memory; going on with --batch-size {half}", file=sys.stderr)
        parts = [prompts[n : n + half] for n in range(0, len(prompts), half)]
        return torch.cat([self._logits(part, prefix) for part in parts])

    @torch.inference_mode()
    def _forward(
        self, prompts: Sequence[list[int]], prefix: tuple[int, Any] | None
    ) -> torch.Tensor:
        shared, layers = prefix or (0, None)
        rows = len(prompts)
        lengths = [len(p) - shared for p in prompts]
        ids = torch.zeros(rows, max(lengths), dtype=torch.long)
        mask = torch.zeros(rows, shared + max(lengths), dtype=torch.long)
        mask[:, :shared] = 1
        for n, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            ids[n, :length] = torch.tensor(prompt[shared:])
            mask[n, shared : shared + length] = 1
        cache = None
        if layers:
            cache = DynamicCache()
            for n, (keys, values) in enumerate(layers):
                cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), n)
        # The head is computed only where a prompt ends.
        ends = torch.tensor(sorted({n - 1 for n in lengths}))
        which = torch.searchsorted(ends, torch.tensor(lengths) - 1)
        device = self.model.device
        logits: torch.Tensor = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=ends.to(device),
        ).logits
        self.tokens += ids.numel()
        return logits[torch.arange(rows), which.to(device)].float().cpu()

    def _generated(
        self, questions: Sequence[Question], prompts: Sequence[list[int]], todo: set[int]
    ) -> Iterator[tuple[int, Answer]]:
        """The leaderboard's own loop: each batch generates as many tokens as its first gold has."""
        size = self.asked_batch_size
        for start in range(0, len(questions), size):
            new_tokens = len(self._ids(questions[start].gold))
            for i in range(start, min(start + size, len(questions))):
                if i not in todo:
                    continue
                ids = torch.tensor([prompts[i]], device=self.model.device)
                with torch.inference_mode():
                    out = self.model.generate(
                        input_ids=ids,
                        max_new_tokens=new_tokens,
                        do_sample=False,
                        pad_token_id=self.tokenizer.eos_token_id,
                        return_dict_in_generate=True,
                        output_logits=True,
                    )
                if not all(step.isfinite().all() for step in out.logits):
                    raise NotFiniteError(i)
                new = out.sequences[0, len(prompts[i]) :]
                self.tokens += out.sequences.numel()
                yield i, Answer(self._text(new.tolist()), None)
