"""Answers in batches are those of the leaderboard's own loop, one question at a time."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval import EvalError
from eval.benchmarks import Question, wrap
from eval.inference import Answer, Inference, NotFiniteError
from tests.samples import ROWS

LABELS = ("A", "B", "C", "D")
TEXTS = [row["input"] for row in ROWS]
INSTRUCTION = "You are a medical doctor taking an exam. Select one answer of A, B, C and D.\n"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def loaded(tiny_model: Path, tokenizer: Any) -> Any:
    """The tiny model, but it says only what can be told apart, and likes A to D."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32").eval()
    head = loaded.lm_head.weight.data
    for token in range(len(head)):
        text = tokenizer.decode([token])
        if not (text.isascii() and text.isprintable()):
            head[token] = 0
        elif text in LABELS:
            head[token] *= 1.3
    return loaded


@pytest.fixture
def model(loaded: Any) -> Iterator[Any]:
    """The tiny model; its head and its settings may be changed."""
    head, generation = loaded.lm_head.weight.data.clone(), loaded.generation_config.to_dict()
    yield loaded
    loaded.lm_head.weight.data.copy_(head)
    loaded.generation_config = type(loaded.generation_config).from_dict(generation)


@pytest.fixture(autouse=True)
def whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too as many prompts at once as the batch size says."""
    monkeypatch.setattr("eval.inference.CPU_TOKENS", 10**6)


def questions(count: int, instruction: str = INSTRUCTION) -> list[Question]:
    """Prompts of very different lengths, golds of one token."""
    return [
        Question(
            instruction + " ".join(TEXTS[n % 30 : n % 30 + 1 + n * 7 % 5]) + f" {n}\n",
            LABELS[n % 4],
        )
        for n in range(count)
    ]


def last_logits(model: Any, tokenizer: Any, prompt: str) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokenizer.encode(wrap(prompt))])).logits
    return logits[0, -1].float()


def one_by_one(
    model: Any, tokenizer: Any, asked: Sequence[Question], labels: Sequence[str] = LABELS
) -> list[Answer]:
    """A plain forward pass a question: the likeliest token, and the likeliest label."""
    answers = []
    for q in asked:
        logits = last_logits(model, tokenizer, q.prompt)
        of_label = {label: float(logits[tokenizer.encode(label)[1]]) for label in labels}
        output = tokenizer.decode([int(logits.argmax())], skip_special_tokens=True)
        answers.append(Answer(output, max(of_label, key=lambda label: of_label[label])))
    return answers


def generated(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 1) -> str:
    """As the leaderboard asks."""
    ids = tokenizer.encode(wrap(prompt), return_tensors="pt")
    out = model.generate(
        inputs=ids,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(out[0][len(ids[0]) :], skip_special_tokens=True))


def collect(
    inference: Inference,
    asked: Sequence[Question],
    labels: Sequence[str] = LABELS,
    done: Sequence[int] = (),
) -> list[Answer]:
    """All answers in the order of the questions; of one that was judged again, the last."""
    answers = dict(inference.answers(asked, labels, dict.fromkeys(done)))
    assert sorted(answers) == [i for i in range(len(asked)) if i not in done]
    return [answers[i] for i in sorted(answers)]


CASES: dict[str, list[Question]] = {
    "a common prefix": questions(40),
    "only the wrapper in common": [
        Question(f"{chr(65 + n)} {q.prompt}", q.gold) for n, q in enumerate(questions(20, ""))
    ],
    "one question": questions(1),
    "two questions": questions(2),
    "identical questions": questions(1) * 9,
    "one prompt begins another": [Question(TEXTS[0] * n, "A") for n in range(5)],
    "very long and very short": [Question("x " * n, "B") for n in (1, 150, 0, 40, 3)],
}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("case", CASES)
def test_batched_answers_are_those_of_one_question_at_a_time(
    model: Any, tokenizer: Any, case: str, batch_size: int
) -> None:
    asked = CASES[case]
    answers = collect(Inference(model, tokenizer, batch_size), asked)
    assert answers == one_by_one(model, tokenizer, asked)
    assert [a.output for a in answers] == [generated(model, tokenizer, q.prompt) for q in asked]


def test_the_tiny_model_has_something_to_say(model: Any, tokenizer: Any) -> None:
    """Else equal answers would mean nothing."""
    answers = one_by_one(model, tokenizer, CASES["a common prefix"])
    assert len({a.output for a in answers} - {"\ufffd"}) > 5
    assert {a.output for a in answers} & set(LABELS)
    assert len({a.pick for a in answers}) > 1


def test_prompts_with_nothing_in_common_are_answered_too(
    model: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(tiny_model)
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    monkeypatch.setattr("eval.inference.wrap", str)
    asked = [Question(f"{chr(65 + n)} {text}", "A") for n, text in enumerate(TEXTS[:12])]
    prompts = [bare.encode(q.prompt) for q in asked]
    assert len({ids[0] for ids in prompts}) == 12
    with torch.inference_mode():
        best = [int(model(torch.tensor([ids])).logits[0, -1].argmax()) for ids in prompts]
    answers = collect(Inference(model, bare, 5), asked)
    assert [a.output for a in answers] == [bare.decode([i]) for i in best]


def test_the_common_prefix_is_computed_once(model: Any, tokenizer: Any) -> None:
    asked = [Question(INSTRUCTION * 5 + f"{n}", "A") for n in range(10, 50)]
    inference = Inference(model, tokenizer, 16)
    collect(inference, asked)
    plain = sum(len(tokenizer.encode(wrap(q.prompt))) for q in asked)
    assert 0 < inference.tokens < plain / 2


def test_an_end_of_text_is_an_empty_answer(model: Any, tokenizer: Any) -> None:
    asked = questions(12)
    eos_likes_to_win(model, tokenizer, asked)
    answers = collect(Inference(model, tokenizer, 4), asked)
    assert "" in {a.output for a in answers}
    assert [a.output for a in answers] == [generated(model, tokenizer, q.prompt) for q in asked]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(done=st.sets(st.integers(0, 11)), batch_size=st.sampled_from([1, 3, 16]))
def test_what_is_done_is_not_asked_again(
    model: Any, tokenizer: Any, done: set[int], batch_size: int
) -> None:
    asked = CASES["a common prefix"][:12]
    expected = one_by_one(model, tokenizer, asked)
    answers = collect(Inference(model, tokenizer, batch_size), asked, done=sorted(done))
    assert answers == [a for i, a in enumerate(expected) if i not in done]


def test_where_all_is_done_nothing_is_computed(model: Any, tokenizer: Any) -> None:
    inference = Inference(model, tokenizer, 4)
    assert collect(inference, questions(5), done=range(5)) == []
    assert inference.tokens == 0


def test_the_order_of_the_questions_does_not_matter(model: Any, tokenizer: Any) -> None:
    asked = questions(25)
    there = collect(Inference(model, tokenizer, 4), asked)
    back = collect(Inference(model, tokenizer, 4), asked[::-1])
    assert there == back[::-1]


def test_one_model_answers_set_after_set(model: Any, tokenizer: Any) -> None:
    inference = Inference(model, tokenizer, 4)
    for asked in CASES.values():
        assert collect(inference, asked) == one_by_one(model, tokenizer, asked)


def test_a_label_of_several_tokens_has_no_pick(model: Any, tokenizer: Any) -> None:
    asked = questions(6)
    answers = collect(Inference(model, tokenizer, 4), asked, ("A", "B", "yes"))
    assert [a.pick for a in answers] == [None] * 6
    outputs = [a.output for a in one_by_one(model, tokenizer, asked)]
    assert [a.output for a in answers] == outputs


def several_tokens(count: int) -> list[Question]:
    """Golds of 2, 5, 2 and 1 tokens in turn."""
    golds = ("yes", "maybe", "no", "A")
    return [Question(q.prompt, golds[n % 4]) for n, q in enumerate(questions(count))]


def generated_in_batches(
    model: Any, tokenizer: Any, asked: Sequence[Question], batch_size: int
) -> list[str]:
    """The leaderboard's loop: a batch's first gold says how many tokens all of it gets."""
    outputs = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        gold = tokenizer(batch[0].gold, add_special_tokens=False)["input_ids"]
        outputs += [generated(model, tokenizer, q.prompt, len(gold)) for q in batch]
    return outputs


@pytest.mark.parametrize("done", [(), (0,), (0, 1, 2, 3, 7), (5, 9)])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_golds_of_several_tokens_are_generated_as_the_first_of_a_batch_says(
    model: Any, tokenizer: Any, batch_size: int, done: Sequence[int]
) -> None:
    asked = several_tokens(10)
    lengths = [len(tokenizer(q.gold, add_special_tokens=False)["input_ids"]) for q in asked]
    assert set(lengths) == {1, 2, 5}
    expected = generated_in_batches(model, tokenizer, asked, batch_size)
    answers = collect(Inference(model, tokenizer, batch_size), asked, ("yes", "no", "maybe"), done)
    assert [a.output for a in answers] == [o for i, o in enumerate(expected) if i not in done]
    assert {a.pick for a in answers} <= {None}


def eos_likes_to_win(model: Any, tokenizer: Any, asked: Sequence[Question]) -> None:
    """EOS says what the commonest answer says, a little louder."""
    best = [int(last_logits(model, tokenizer, q.prompt).argmax()) for q in asked]
    head = model.lm_head.weight.data
    head[tokenizer.eos_token_id] = head[max(set(best), key=best.count)] * 1.01


@pytest.mark.parametrize(
    ("setting", "value", "matters"),
    [
        ("repetition_penalty", 1.5, True),
        ("repetition_penalty", 1.0, False),
        ("no_repeat_ngram_size", 2, False),
        ("no_repeat_ngram_size", 1, True),
        ("suppress_tokens", [*range(2, 50)], True),
        ("begin_suppress_tokens", [*range(2, 200)], True),
        ("forced_eos_token_id", 1, True),
        ("forced_eos_token_id", 35, True),
        ("num_beams", 3, False),
        ("min_new_tokens", 1, True),
        ("min_length", 100_000, True),
        ("do_sample", True, False),
    ],
)
@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
def test_settings_of_the_models_generation_count(
    model: Any, tokenizer: Any, setting: str, value: object, matters: bool
) -> None:
    asked = questions(20)
    eos_likes_to_win(model, tokenizer, asked)
    plain = [a.output for a in one_by_one(model, tokenizer, asked)]
    setattr(model.generation_config, setting, value)
    expected = [generated(model, tokenizer, q.prompt) for q in asked]
    assert (plain != expected) == matters
    answers = collect(Inference(model, tokenizer, 4), asked)
    assert [a.output for a in answers] == expected


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of more than one are off by up to 0.01 a logit, as on a GPU in low precision."""
    exact: Callable[..., torch.Tensor] = Inference._forward
    generator = torch.Generator().manual_seed(1)

    def noisy(self: Inference, prompts: Sequence[list[int]], prefix: Any) -> torch.Tensor:
        logits = exact(self, prompts, prefix)
        if len(prompts) > 1:
            logits = logits + (torch.rand(logits.shape, generator=generator) * 2 - 1) * 0.01
        return logits

    monkeypatch.setattr(Inference, "_forward", noisy)


def in_a_tie(model: Any, tokenizer: Any, asked: Sequence[Question]) -> None:
    """Give the commonest answers rivals that are a hair better or worse."""
    best = [int(last_logits(model, tokenizer, q.prompt).argmax()) for q in asked]
    commonest = sorted(set(best), key=best.count, reverse=True)
    head = model.lm_head.weight.data
    for token, rival in zip(commonest, "uvwxyz", strict=False):
        other = tokenizer.encode(rival)[1]
        head[other] = head[token] + torch.linspace(-1, 1, head.shape[1]) * 1e-4


@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize("batch_size", [3, 16])
def test_near_ties_are_asked_again_alone(model: Any, tokenizer: Any, batch_size: int) -> None:
    asked = questions(60)
    in_a_tie(model, tokenizer, asked)
    expected = one_by_one(model, tokenizer, asked)
    gaps = [last_logits(model, tokenizer, q.prompt).topk(2).values for q in asked]
    close = sum(float(g[0] - g[1]) < 0.005 for g in gaps)
    assert close >= 10, "the noise would change nothing"
    inference = Inference(model, tokenizer, batch_size)
    answers = collect(inference, asked)
    assert [a.output for a in answers] == [a.output for a in expected]
    assert close <= inference.repeated < len(asked)
    assert 0.01 < inference.near_tie < 0.1


@pytest.mark.usefixtures("noise")
def test_labels_in_a_near_tie_are_asked_again_as_well(model: Any, tokenizer: Any) -> None:
    asked = questions(60)
    head = model.lm_head.weight.data
    ids = [tokenizer.encode(label)[1] for label in LABELS]
    for n, i in enumerate(ids[1:], 1):
        head[i] = head[ids[0]] + torch.linspace(-1, 1, head.shape[1]).roll(n * 16) * 1e-4
    expected = one_by_one(model, tokenizer, asked)
    assert len({a.pick for a in expected}) > 1
    assert collect(Inference(model, tokenizer, 16), asked) == expected


def test_without_noise_few_questions_are_asked_again(model: Any, tokenizer: Any) -> None:
    inference = Inference(model, tokenizer, 16)
    collect(inference, questions(60))
    assert inference.near_tie < 0.01
    assert inference.repeated <= 12


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_only_a_batch_overflows_on_is_asked_alone(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    exact: Callable[..., torch.Tensor] = Inference._forward

    def overflowing(self: Inference, prompts: Sequence[list[int]], prefix: Any) -> torch.Tensor:
        logits = exact(self, prompts, prefix).clone()
        if len(prompts) > 1:
            logits[0, 0] = value  # of the longest question of each batch
        return logits

    monkeypatch.setattr(Inference, "_forward", overflowing)
    asked = questions(40)
    inference = Inference(model, tokenizer, 4)
    assert collect(inference, asked) == one_by_one(model, tokenizer, asked)
    assert 10 <= inference.repeated <= 20
    assert inference.near_tie < 0.01


@pytest.mark.parametrize("gold", ["A", "yes"])
def test_a_question_without_finite_logits_gets_no_answer(
    model: Any, tokenizer: Any, gold: str
) -> None:
    """The arg-max of NaN would be token 0."""
    model.lm_head.weight.data[3] = torch.nan
    asked = [Question(q.prompt, gold) for q in questions(5)]
    with pytest.raises(NotFiniteError) as caught:
        collect(Inference(model, tokenizer, 2), asked)
    assert caught.value.index in range(5)


@pytest.fixture
def room(model: Any) -> Iterator[Callable[[int], None]]:
    """Set how many rows the model's forward takes before it is out of memory."""
    handles = []

    def most(rows: int) -> None:
        def refuse(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            if ids.shape[0] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        handles.append(model.register_forward_pre_hook(refuse, with_kwargs=True))

    yield most
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("batch_size", "rows", "left"), [(16, 5, 4), (7, 1, 1), (3, 2, 1)])
def test_a_batch_that_does_not_fit_is_halved_for_good(
    model: Any,
    tokenizer: Any,
    room: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    batch_size: int,
    rows: int,
    left: int,
) -> None:
    asked = questions(50)
    expected = one_by_one(model, tokenizer, asked)
    room(rows)
    inference = Inference(model, tokenizer, batch_size)
    assert collect(inference, asked) == expected
    assert inference.batch_size == left
    lines = capsys.readouterr().err.split("\n")
    said = [line for line in lines if line]
    assert all(line.startswith("eval: out of GPU memory") for line in said)
    assert said[-1].endswith(f"--batch-size {left}")
    assert len(said) == len(set(said)), "once for each size is enough"


@pytest.mark.parametrize("gold", ["A", "yes"])
def test_a_gpu_too_small_for_one_question_is_an_eval_error(
    model: Any, tokenizer: Any, room: Callable[[int], None], gold: str
) -> None:
    room(0)
    asked = [Question(q.prompt, gold) for q in questions(5)]
    with pytest.raises(EvalError, match="too small for a single question"):
        collect(Inference(model, tokenizer, 4), asked)


def test_a_gpu_that_takes_the_prefix_but_no_question_is_an_eval_error(
    model: Any, tokenizer: Any, room: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    room(0)
    monkeypatch.setattr(Inference, "_prefix", lambda *_: (0, None))
    with pytest.raises(EvalError, match="too small for a single question"):
        collect(Inference(model, tokenizer, 4), questions(5))
