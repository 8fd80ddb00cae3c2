"""Federated fine-tuning in Flower's Simulation Engine, as the reference does it.

    python -m tests.benchmarks.simulated JOB.json        (what against_simulation starts)

Written from the reference's description: every fit builds the model anew, out of unquantised
weights that bitsandbytes quantises (FP4, float32 computation) and PEFT prepares; batches are padded
to their longest row and give logits at every place; the adapter travels as one array for each of
its matrices; the server builds the model too, for the first adapter, and aggregates with Flower's
FedAvg. Rows, their order, sites, steps and learning rates are those of the run beside it.
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from app.config import RunConfig
from app.server.site_list import site_name
from app.site import partition

client, server = ClientApp(), ServerApp()


def _read(job_file: str) -> tuple[dict[str, Any], RunConfig]:
    job: dict[str, Any] = json.loads(Path(job_file).read_text())
    return job, RunConfig.from_flat(job["config"])


def build(folder: str, config: RunConfig) -> tuple[Any, Any]:
    """Model with a fresh LoRA adapter, quantised on load, and tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=bool(config.gradient_checkpointing)
    )
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.targets,
    )
    model.config.use_cache = False
    return get_peft_model(model, lora), AutoTokenizer.from_pretrained(folder)


@client.train()
def fit(message: Message, context: Context) -> Message:
    """One site's fit: model, rows, steps, and the adapter's arrays back."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from app.site.examples import encode_all

    order = message.content.config_records["config"]
    job, config = _read(cast(str, order["job"]))
    server_round, number = (cast(int, order[k]) for k in ("server-round", "partition-id"))
    started = time.monotonic()
    model, tokenizer = build(job["model"], config)
    arrays = message.content.array_records["arrays"]
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    rows = partition.load(Path(job["federation"]) / site_name(number), "train")
    examples = encode_all(rows, tokenizer, config.seq_length)
    load_s = time.monotonic() - started
    seed = np.random.SeedSequence([config.seed, server_round, number]).generate_state(1)[0]
    lr = config.learning_rate(server_round)
    loss, train_s = _train(model, tokenizer, examples, config, lr, int(seed))
    metrics = MetricRecord(
        {"num-examples": len(examples), "loss": loss, "load-s": load_s, "train-s": train_s}
    )
    trained = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)


def _train(
    model: Any, tokenizer: Any, examples: list[Any], config: RunConfig, lr: float, seed: int
) -> tuple[float, float]:
    """Transformers' Trainer and its own loss; returns the mean loss and seconds."""
    import tempfile

    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as unused_output:
        arguments = TrainingArguments(
            output_dir=unused_output,
            learning_rate=lr,
            lr_scheduler_type="constant",
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            max_steps=config.max_steps,
            use_cpu=True,
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[
                {
                    "input_ids": e.input_ids,
                    "labels": e.labels,
                    "attention_mask": [1] * len(e.labels),
                }
                for e in examples
            ],
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )
        started = time.monotonic()
        result = trainer.train()
        return result.training_loss, time.monotonic() - started


class _FedAvg(FedAvg):  # type: ignore[misc]
    """Flower's FedAvg at the sites that the run beside it asked; notes each round's seconds."""

    def __init__(self, job_file: str, partitions: list[list[int]]) -> None:
        super().__init__(fraction_evaluate=0.0, fraction_train=0.1, min_train_nodes=2)
        self.job_file, self.partitions = job_file, partitions
        self.lines: list[dict[str, Any]] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        sampled = super().configure_train(server_round, arrays, config, grid)
        self.started = time.monotonic()  # round 1 has waited for the engine
        messages = []
        for message, number in zip(sampled, self.partitions[server_round - 1], strict=True):
            order = ConfigRecord(
                {"server-round": server_round, "partition-id": number, "job": self.job_file}
            )
            content = RecordDict({"arrays": arrays, "config": order})
            to = message.metadata.dst_node_id
            messages.append(Message(content, dst_node_id=to, message_type="train"))
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        if any(r.has_error() for r in replies):
            raise RuntimeError(
                f"round {server_round}: {[r.error for r in replies if r.has_error()]}"
            )
        aggregated = super().aggregate_train(server_round, replies)
        metrics = [r.content.metric_records["metrics"] for r in replies]
        line = {key: [m[key] for m in metrics] for key in ("loss", "load-s", "train-s")}
        self.lines.append(line | {"seconds": time.monotonic() - self.started})
        return aggregated


@server.main()
def main_of_the_server(grid: Grid, context: Context) -> None:
    from peft import get_peft_model_state_dict

    job_file = sys.argv[1]
    job, config = _read(job_file)
    first = ArrayRecord(get_peft_model_state_dict(build(job["model"], config)[0]))
    strategy = _FedAvg(job_file, job["partitions"])
    strategy.start(grid, first, num_rounds=len(job["partitions"]))
    Path(job["out"]).write_text(json.dumps(strategy.lines))


def main() -> None:
    from flwr.simulation import run_simulation

    job, _ = _read(sys.argv[1])
    cores = os.cpu_count() or 1
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=job["num-sites"],
        backend_config={
            "init_args": {"num_cpus": cores},
            "client_resources": {"num_cpus": cores, "num_gpus": 0.0},  # one fit at a time
        },
    )


if __name__ == "__main__":
    main()
