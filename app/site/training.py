"""Local training and evaluation of the adapter on one site's rows."""

import logging
import math
import resource
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from app.config import MIB, RunConfig
from app.site import memory
from app.site.base_model import BaseModel, device_and_dtype, mixed_precision
from app.site.examples import Example, collate
from app.site.last_lines import travels
from app.site.packing import can_pack, passes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a local training did."""

    loss: float  # mean over steps of the loss per answer token
    steps: int
    tokens: int  # prompt and answer, without padding; repeated rows count again
    seconds: float


def settled(config: RunConfig, base: BaseModel, device: str) -> RunConfig:
    """The config with true or false for gradient checkpointing "auto"; the log says why.

    Asked when the model is loaded. Where there is no GPU to run out of memory, it is off.
    """
    if config.gradient_checkpointing != "auto":
        return config
    on = False
    if device == "cuda":
        bf16 = device_and_dtype(device)[1] == torch.bfloat16
        weights = memory.stored(base.folder, base.bits, bf16)
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0] + unused
        on, why = memory.checkpointing(weights, base.linear_layers, config, free)
        logger.info("%s", why, extra=travels())
    return replace(config, gradient_checkpointing=on)


class _Progress(TrainerCallback):  # type: ignore[misc]
    """One line a step: number and loss, a mean over tokens. No loss leaves the site with an error:

    in a batch of one it is that row's.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            step = f"step {state.global_step} of {state.max_steps}"
            logger.info("%s: loss %.4f", step, logs["loss"], extra=travels(step))


class _InPasses(Trainer):  # type: ignore[misc]
    """Each batch in passes without padding (``app.site.packing``); their gradients add up."""

    def __init__(self, max_tokens: int, packed: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs, compute_loss_func=_loss)
        self.max_tokens, self.packed = max_tokens, packed

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = torch.zeros((), device=self.args.device)
        for one in passes(inputs, self.max_tokens, self.packed):
            loss += super().training_step(model, one, num_items_in_batch)
        return loss


def _loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """Of one pass, by the number of answer tokens in all passes of the optimiser step."""
    loss: torch.Tensor = _loss_sum(outputs.logits.float(), labels) / num_items_in_batch
    return loss


def _loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


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


def _arguments(
    config: RunConfig, lr: float, seed: int, device: str, output_dir: str
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=output_dir,
        learning_rate=lr,
        lr_scheduler_type="constant",
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        activation_checkpointing=config.gradient_checkpointing is not False,
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=device_and_dtype(device)[1] == torch.bfloat16,
        use_cpu=device == "cpu",
        seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # or Trainer hides what ``train`` looks for
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
    )


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
    (Trainer's ``num_items_in_batch``), so neither gradient accumulation nor the passes that a batch
    is computed in change anything.
    ``seed`` orders the rows; pass another one each round, or a site picked again would see
    the same rows. ``proximal_mu`` above 0 keeps the adapter near the received one (FedProx).

    Raises:
        FloatingPointError: the loss is not finite.
    """
    with tempfile.TemporaryDirectory() as unused_output:
        trainer = _InPasses(
            config.max_tokens_per_pass,
            can_pack(model),
            model=model,
            args=_arguments(config, lr, seed, model.device.type, unused_output),
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


@dataclass(frozen=True)
class Evaluated:
    """Sums over a holdout's answer tokens, so that the server can add sites up."""

    loss_sum: float
    num_correct: int
    num_tokens: int


def evaluate(model: Any, examples: list[Example], config: RunConfig) -> Evaluated:
    """Loss and next-token hits over the answers' tokens, EOS included."""
    packed = can_pack(model)
    model.eval()
    loss_sum, num_correct, num_tokens = 0.0, 0, 0
    ordered = sorted(examples, key=lambda e: len(e.input_ids))  # alike lengths together
    for start in range(0, len(ordered), config.batch_size):
        batch = collate(ordered[start : start + config.batch_size])
        batch = {name: values.to(model.device) for name, values in batch.items()}
        for one in passes(batch, config.max_tokens_per_pass, packed):
            labels = one.pop("labels")
            with torch.inference_mode(), mixed_precision(model.device.type):
                logits = model(**one).logits.float()
                loss_sum += float(_loss_sum(logits, labels))
                num_correct += int((logits.argmax(-1) == labels).sum())
            num_tokens += len(labels)
    return Evaluated(loss_sum, num_correct, num_tokens)


def peak_memory_mb(device: str) -> float:
    """Peak of this process: the GPU's memory where it trains there, else its RSS. In MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
