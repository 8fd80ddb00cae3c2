"""Local training and evaluation of the adapter on one site's rows."""

import logging
import math
import resource
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from app.base_model import device_and_dtype
from app.config import MIB, RunConfig
from app.examples import IGNORED, Example, collate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a local training did."""

    loss: float  # mean over steps of the loss per answer token
    steps: int
    tokens: int  # prompt and answer, without padding; repeated rows count again
    seconds: float


class _Progress(TrainerCallback):  # type: ignore[misc]
    """One line a step: number, loss, seconds. The loss is a mean over tokens, no text."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            logger.info(
                "step %d of %d: loss %.4f", state.global_step, state.max_steps, logs["loss"]
            )


class _AnswersOnly(Trainer):  # type: ignore[misc]
    """The model's own loss, with logits at the answers' places only (``answer_logits``)."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits, labels = answer_logits(model, inputs)
        loss_sum = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return loss_sum / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class _Proximal(TrainerCallback):  # type: ignore[misc]
    """FedProx (arXiv 1812.06127): mu / 2 times the squared distance to the received adapter.

    Its gradient, mu (w - received), is added to that of the loss, once per optimiser step and
    behind the clipping of the loss's own; the loss reported stays the task's.
    """

    def __init__(self, model: Any, mu: float) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.pairs = [(p, p.detach().clone()) for p in trained]
        self.mu = mu

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for parameter, received in self.pairs:
            parameter.grad.add_(parameter.detach() - received, alpha=self.mu)


def train(
    model: Any,
    examples: list[Example],
    config: RunConfig,
    lr: float,
    seed: int,
    proximal_mu: float = 0.0,
) -> Trained:
    """Train the model's adapter in place with ``transformers.Trainer`` at a constant ``lr``.

    The loss is summed over answer tokens and divided by their number once per optimiser step
    (Trainer's ``num_items_in_batch``), so gradient accumulation changes nothing.
    ``seed`` orders the rows; pass another one each round, or a site picked again would see
    the same rows. ``proximal_mu`` above 0 keeps the adapter near the received one (FedProx).

    Raises:
        FloatingPointError: the loss is not finite.
    """
    on_cpu = model.device.type == "cpu"
    _, compute_dtype = device_and_dtype(model.device.type)
    with tempfile.TemporaryDirectory() as unused_output:
        arguments = TrainingArguments(
            output_dir=unused_output,
            learning_rate=lr,
            lr_scheduler_type="constant",
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            num_train_epochs=config.num_train_epochs,
            max_steps=config.max_steps,
            activation_checkpointing=config.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            bf16=compute_dtype == torch.bfloat16,
            use_cpu=on_cpu,
            seed=seed,
            logging_steps=1,
            logging_nan_inf_filter=False,  # or Trainer hides what the check below looks for
            include_num_input_tokens_seen="non_padding",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=not on_cpu,
        )
        trainer = _AnswersOnly(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=collate,
            callbacks=[_Progress(), *([_Proximal(model, proximal_mu)] if proximal_mu else [])],
        )
        trainer.pop_callback(PrinterCallback)  # ours instead
        started = time.monotonic()
        result = trainer.train()
        seconds = time.monotonic() - started
    if not math.isfinite(result.training_loss):
        raise FloatingPointError("the training loss is not finite")
    tokens = int(trainer.state.num_input_tokens_seen)
    return Trained(result.training_loss, result.global_step, tokens, seconds)


def answer_logits(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, vocabulary] in float32 of the batch's N answer tokens, and their labels [N].

    A prompt's tokens and the padding have no labels. Their logits would take most of a GPU's
    memory (Llama-3: 12 bytes for each of 128,256 values at each place) and change nothing.
    """
    labels = batch["labels"][:, 1:]  # a place predicts the token after it
    picked = labels != IGNORED
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        logits_to_keep=torch.nn.functional.pad(picked, (0, 1)),
    ).logits
    return logits.float(), labels[picked]


@dataclass(frozen=True)
class Evaluated:
    """Sums over a holdout's answer tokens, so that the server can add sites up."""

    loss_sum: float
    num_correct: int
    num_tokens: int


@torch.inference_mode()
def evaluate(model: Any, examples: list[Example], batch_size: int) -> Evaluated:
    """Loss and next-token hits over the answers' tokens, EOS included."""
    model.eval()
    _, dtype = device_and_dtype(model.device.type)
    loss_sum, num_correct, num_tokens = 0.0, 0, 0
    ordered = sorted(examples, key=lambda e: len(e.input_ids))  # alike lengths: little padding
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size])
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            logits, labels = answer_logits(
                model, {name: values.to(model.device) for name, values in batch.items()}
            )
        loss_sum += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        num_correct += int((logits.argmax(-1) == labels).sum())
        num_tokens += len(labels)
    return Evaluated(loss_sum, num_correct, num_tokens)


def peak_memory_mb(device: str) -> float:
    """Peak of this process: the GPU's memory where it trains there, else its RSS. In MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
