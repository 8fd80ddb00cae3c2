"""What a training step costs, lever by lever: real tokens per second, peak memory, the loss.

    python -m tests.benchmarks.training_step --data FILE [--steps 2] [--batch-size 16]

On the CPU with the prepared 135M model and its profile; on a GPU with an 8B model of Llama-3's
shape in random weights (made once in --models, 6 GB) and the reference recipe. Each row is a
process of its own and does what a ClientApp does (``app.site.training.train``) on the same rows,
without dropout, so that the losses can be compared. "padded" is the state of commit ab62da3. Prints
a line a lever as it comes, and the ratio of packed to padded last.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer

from app import plan
from app.config import RunConfig, merged_config
from app.site import base_model, training
from app.site.base_model import find, load_with_lora
from app.site.examples import encode_all
from app.site.partition import Row
from app.wire.adapter import Layout, initial_adapter
from supernode.quantise import prepare_model
from tests.samples import REPOSITORY

SMALL, LARGE = "HuggingFaceTB/SmolLM2-135M-Instruct", "ContactDoctor/Bio-Medical-Llama-3-8B"
PLENTY = 10**9
NEEDS_GPU = "needs GPU"


def _in_4_bits(config: RunConfig) -> RunConfig:
    base_model.EXPANDED_BYTES = 0
    return config


def _padded(config: RunConfig) -> RunConfig:
    _in_4_bits(config)
    training.can_pack = lambda model: False  # type: ignore[attr-defined]
    return replace(config, max_tokens_per_pass=PLENTY)


def _every_logit(config: RunConfig) -> RunConfig:
    """Transformers' Trainer as it is."""

    def init(self: Any, max_tokens: int, packed: bool, **kwargs: Any) -> None:
        Trainer.__init__(self, **kwargs)

    training._InPasses.__init__ = init  # type: ignore[method-assign]
    training._InPasses.training_step = Trainer.training_step  # type: ignore[method-assign]
    return _padded(config)


def _liger(config: RunConfig) -> RunConfig:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    # Not its loss, which would compute the logits of every place.
    apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)
    return config


def _other_checkpointing(config: RunConfig) -> RunConfig:
    return replace(config, gradient_checkpointing=config.gradient_checkpointing is False)


LEVERS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "padded, logits at every place": _every_logit,
    "padded": _padded,
    "packed, one pass a batch": lambda config: replace(config, max_tokens_per_pass=PLENTY),
    "packed, weights in 4 bits": _in_4_bits,
    "packed": lambda config: config,
    "packed, checkpointing the other way": _other_checkpointing,
    "packed, weights expanded once": lambda config: config,
    "packed, Liger's kernels": _liger,
}


def left_out(lever: str, device: str) -> str:
    """Why this lever cannot be measured here; empty if it can."""
    if device == "cpu" and "expanded" in lever:
        return "a small model's are, on a CPU"
    if lever != "packed, Liger's kernels":
        return ""
    if device == "cpu":
        return NEEDS_GPU
    return "" if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


def recipe(args: argparse.Namespace, device: str) -> RunConfig:
    profile = "demo" if device == "cpu" else "reference"
    pairs = f"train.seq-length={args.seq_length} model.lora.peft-lora-dropout=0.0 "
    pairs += f'train.training-arguments.max-steps={args.steps} model.name="{args.model}" '
    pairs += f"train.training-arguments.per-device-train-batch-size={args.batch_size}"
    overrides = [str(REPOSITORY / f"app/profiles/{profile}.toml"), pairs, *args.run_config]
    return merged_config(REPOSITORY, overrides)[1]


def measured(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """One lever, in this process."""
    config = recipe(args, device)
    base = find(args.models, config.model_name, config.quantization)
    layout = Layout.of(base.linear_layers, config)
    config = LEVERS[args.lever](config)
    model, tokenizer = load_with_lora(base, config, device, layout, initial_adapter(layout, 0))
    if "expanded" in args.lever:
        model.get_base_model().dequantize()
        for name, parameter in model.named_parameters():  # the new ones are not frozen
            parameter.requires_grad_(".lora_" in name)
    config = training.settled(config, base, device)
    said = json.loads(args.data.read_text(encoding="utf-8"))
    wanted = config.batch_size * args.steps
    rows = [Row(r["input"] or r["instruction"], r["output"]) for r in said[:: len(said) // wanted]]
    examples = encode_all(rows, tokenizer, config.seq_length)[:wanted]
    computed: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, output: computed.append(inputs[0].numel())
    )
    if device == "cuda":  # its first step is slow
        training.train(model, examples, replace(config, max_steps=1), 1e-12, 1)
        torch.cuda.reset_peak_memory_stats()
        computed.clear()
    result = training.train(model, examples, config, 1e-4, 1)
    return {
        "seconds": result.seconds, "loss": result.loss, "tokens": result.tokens,
        "computed": sum(computed), "passes": len(computed),
        "peak_mb": training.peak_memory_mb(device),
        "checkpointing": config.gradient_checkpointing,
    }  # fmt: skip


def in_a_process(args: argparse.Namespace, lever: str) -> dict[str, Any]:
    """Raises subprocess.CalledProcessError if it fails; its log is on stderr."""
    command = [sys.executable, "-m", "tests.benchmarks.training_step", *sys.argv[1:]]
    command += ["--model", args.model, "--lever", lever]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def random_model(args: argparse.Namespace, shape: tuple[int, ...]) -> str:
    """The folder of a Llama of this shape with random weights, which is prepared in --models."""
    layers, hidden, mlp, key_value, vocabulary = shape
    folder = args.models / "random-{}-{}-{}-{}-{}".format(*shape)
    head = min(128, hidden // 4)
    if not folder.exists():
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp,
            num_hidden_layers=layers, num_attention_heads=hidden // head, head_dim=head,
            num_key_value_heads=key_value // head, rope_theta=500000.0,
            max_position_embeddings=8192, tie_word_embeddings=False,
        )  # fmt: skip
        small = find(args.models, SMALL, 4)
        with tempfile.TemporaryDirectory(dir=args.models) as source:
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                model = LlamaForCausalLM(config).to(torch.bfloat16)
            model.save_pretrained(source)
            AutoTokenizer.from_pretrained(small.folder).save_pretrained(source)
            del model
            torch.cuda.empty_cache()
            prepare_model(args.models, args.models / "unused", source, "nf4", None)
            folder.mkdir()
            (folder / "name").write_text(source)
    return str((folder / "name").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON: input, instruction, output")
    parser.add_argument("--models", type=Path, default=REPOSITORY / ".demo" / "models")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--levers", default=",".join(str(n) for n in range(len(LEVERS))))
    parser.add_argument("--shape", help="layers,hidden,mlp,key-value,vocabulary: random weights")
    parser.add_argument("--run-config", action="append", default=[], metavar="FILE|PAIRS")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--lever", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.lever:
        print(json.dumps(measured(args, device)))
        return
    shape = tuple(map(int, args.shape.split(","))) if args.shape else plan.KNOWN[LARGE]
    args.model = SMALL if device == "cpu" and not args.shape else random_model(args, shape)
    table(args, device)


def table(args: argparse.Namespace, device: str) -> None:
    found: dict[str, dict[str, Any]] = {}
    print(
        f"{'':37} seconds   tokens computed passes  tokens/s  peak MiB  checkp.  loss", flush=True
    )
    for number in args.levers.split(","):
        lever = list(LEVERS)[int(number)]
        if why := left_out(lever, device):
            print(f"{lever:37} {why}", flush=True)
            continue
        try:
            each = [in_a_process(args, lever) for _ in range(args.repeat)]
        except subprocess.CalledProcessError as err:  # out of memory, say; the others go on
            print(f"{lever:37} ended with exit code {err.returncode}, see above", flush=True)
            continue
        row = each[0] | {"seconds": median(r["seconds"] for r in each)}
        found[lever] = row
        print(
            f"{lever:37} {row['seconds']:7.1f} {row['tokens']:8d} {row['computed']:8d} "
            f"{row['passes']:6d} {row['tokens'] / row['seconds']:9.1f} {row['peak_mb']:9.0f}  "
            f"{'on' if row['checkpointing'] else 'off':7} {row['loss']:.6f}",
            flush=True,
        )
    losses = [row["loss"] for row in found.values()]
    print(f"losses differ by up to {max(losses) - min(losses):.1e}")
    if {"padded", "packed"} <= found.keys():
        print(f"ratio {found['padded']['seconds'] / found['packed']['seconds']:.2f}")


if __name__ == "__main__":
    main()
