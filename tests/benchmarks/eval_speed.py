"""Questions per second: our evaluation against the leaderboard's loop, same model, same run.

    python -m tests.benchmarks.eval_speed --data-dir DIR [--every 20] [--repeat 3] [--peft-path P]

The loop is written from its description (adap/flower, flowertune-llm/evaluation/medical): every
prompt alone through ``generate``, with as many new tokens as the first gold of its batch has.
Both use the model as ``python -m eval`` loads it and take turns, so that a busy moment of the
machine hits both. Prints, per set and in all, median seconds, tokens computed, how many answers
are the same, and the ratio last.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from eval.benchmarks import LEADERBOARD, Question, benchmark, load, wrap
from eval.inference import Inference
from eval.model import Adapter, attached, load_base


def leaderboard_loop(
    model: Any, tokenizer: Any, questions: Sequence[Question], batch_size: int
) -> tuple[list[str], int]:
    """Outputs in order, and the tokens computed."""
    outputs, tokens = [], 0
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        first = tokenizer(batch[0].gold, add_special_tokens=False)["input_ids"]
        for question in batch:
            ids = tokenizer.encode(wrap(question.prompt), return_tensors="pt").to(model.device)
            out = model.generate(
                inputs=ids,
                max_new_tokens=len(first),
                do_sample=False,
                top_p=1.0,
                temperature=1.0,
                pad_token_id=tokenizer.eos_token_id,
            )
            tokens += ids.numel() + len(first) - 1
            outputs.append(tokenizer.decode(out[0][ids.shape[1] :], skip_special_tokens=True))
    return outputs, tokens


def ours(inference: Inference, questions: Sequence[Question], labels: Sequence[str]) -> list[str]:
    answers = dict(inference.answers(questions, labels, {}))
    return [answers[i].output for i in range(len(questions))]


def _timed(run: Any) -> tuple[Any, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--datasets", default=",".join(LEADERBOARD[:3]))
    parser.add_argument("--every", type=int, default=20, help="take every Nth question")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--base-model-name-path", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--peft-path", type=Path)
    parser.add_argument("--quantization", default="4")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--models", type=Path, default=Path(".demo/models"))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/fedllm-medical")
    args = parser.parse_args()
    device = os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(args.base_model_name_path, args.quantization, device, args.models, args.cache)
    adapter = Adapter(args.peft_path or Path(), "adapter")
    if args.peft_path:
        with attached(adapter, base) as model:
            measure(args, model, base.tokenizer)
    else:
        measure(args, base.model, base.tokenizer)


def measure(args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    inference = Inference(model, tokenizer, args.batch_size)
    seconds, tokens, same, total = [0.0, 0.0], [0, 0], 0, 0
    print("set        questions  same   loop s    ours s   loop tok  our tok  alone  ratio")
    for dataset in args.datasets.split(","):
        labels = benchmark(dataset).labels
        questions, _ = load(dataset, args.data_dir, args.cache)
        questions = questions[:: args.every]  # all sets in proportion, as in a whole evaluation
        leaderboard_loop(model, tokenizer, questions[:2], args.batch_size)  # warm up
        their_times, our_times = [], []
        for _ in range(args.repeat):
            (theirs, their_tokens), s = _timed(
                lambda q=questions: leaderboard_loop(model, tokenizer, q, args.batch_size)
            )
            their_times.append(s)
            before, repeated = inference.tokens, inference.repeated
            mine, s = _timed(lambda q=questions, n=labels: ours(inference, q, n))
            our_times.append(s)
        their_s, our_s = median(their_times), median(our_times)
        our_tokens = inference.tokens - before
        equal = sum(a == b for a, b in zip(theirs, mine, strict=True))
        print(
            f"{dataset:<10} {len(questions):9d} {equal:5d} {their_s:8.2f}  {our_s:8.2f}  "
            f"{their_tokens:9d} {our_tokens:8d} {inference.repeated - repeated:6d}  "
            f"{their_s / our_s:.2f}",
            flush=True,
        )
        seconds = [seconds[0] + their_s, seconds[1] + our_s]
        tokens = [tokens[0] + their_tokens, tokens[1] + our_tokens]
        same, total = same + equal, total + len(questions)
    peak = f", peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" * torch.cuda.is_available()
    print(
        f"{same} of {total} answers the same; questions/s {total / seconds[0]:.2f} -> "
        f"{total / seconds[1]:.2f}; tokens {tokens[0]} -> {tokens[1]}{peak}\n"
        f"ratio {seconds[0] / seconds[1]:.2f}"
    )


if __name__ == "__main__":
    main()
