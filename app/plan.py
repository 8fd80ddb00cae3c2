"""What a run will cost, before it starts.

python -m app.plan                                            the reference recipe
python -m app.plan --run-config app/profiles/efficient.toml --run-config num-server-rounds=5
"""

import argparse
import os
import sys
from pathlib import Path

from app.config import MIB, ConfigError, RunConfig, merged_config
from app.site import memory
from app.site.base_model import prepared
from app.site.partition import SiteError
from app.wire.adapter import Layout
from app.wire.codec import unpacked_bytes
from app.wire.noise import DELTA, epsilon, noise_norm

# Layers, hidden size, MLP size, rows of the key and value projections, vocabulary: config.json.
KNOWN = {
    "ContactDoctor/Bio-Medical-Llama-3-8B": (32, 4096, 14336, 1024, 128256),
    "HPAI-BSC/Llama3.1-Aloe-Beta-8B": (32, 4096, 14336, 1024, 128256),
    "mistralai/Mistral-7B-v0.3": (32, 4096, 14336, 1024, 32768),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (30, 576, 1536, 192, 49152),
}


def linear_layers(config: RunConfig, models: Path) -> dict[str, list[int]]:
    """The base model's linear layers, name -> [out, in]: as prepared, or of a known model.

    Raises:
        ConfigError: the model is neither.
    """
    for base in prepared(models):
        if base.name == config.model_name:
            return base.linear_layers
    if config.model_name not in KNOWN:
        raise ConfigError(
            f"run config: model.name = {config.model_name!r} is not prepared in {models}, and its "
            f"shape is known for {', '.join(KNOWN)} only; run supernode.prepare, or set MODELS_DIR"
        )
    count, hidden, mlp, key_value, vocabulary = KNOWN[config.model_name]
    shapes = {
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [key_value, hidden],
        "self_attn.v_proj": [key_value, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [mlp, hidden],
        "mlp.up_proj": [mlp, hidden],
        "mlp.down_proj": [hidden, mlp],
    }
    layers = {f"model.layers.{n}.{name}": s for n in range(count) for name, s in shapes.items()}
    return layers | {"lm_head": [vocabulary, hidden]}


def gpu_memory(config: RunConfig, layers: dict[str, list[int]], models: Path) -> str:
    """The line of what a site's GPU must have free; the preflight compares the same figure."""
    weights = memory.estimated(layers, config.quantization)
    for base in prepared(models):
        if (base.name, base.bits) == (config.model_name, config.quantization):
            weights = memory.stored(base.folder, base.bits, bf16=True)
    needed = memory.needed(weights, layers, config)
    return (
        f"a GPU: {needed / 1e9:.1f} GB, computed for passes of {memory.pass_tokens(config)} tokens "
        f"that are all answer; {weights.size / 1e9:.1f} GB of it weights"
    )


def plan(config: RunConfig, layout: Layout, sites: int) -> list[str]:
    """The lines that ``python -m app.plan`` prints."""
    rounds, n, arrays = config.num_server_rounds, layout.size, len(layout.names)
    train = max(int(sites * config.fraction_train), config.min_train_nodes)
    evaluated = 0
    if config.fraction_evaluate:
        evaluated = min(
            sites, max(int(sites * config.fraction_evaluate), config.min_evaluate_nodes)
        )
    # Fp32 arrays as .npy files, each with a header of 128 bytes, both ways.
    leaderboard = rounds * train * 2 * (4 * n + 128 * arrays) / MIB
    down, up = (unpacked_bytes(codec, n) / MIB for codec in (config.down, config.up))
    each = train * (down + up) + evaluated * down
    sent = rounds * each + evaluated * down  # the initial adapter is evaluated as well
    most = "" if config.down == config.up == "fp32" else "at most "
    batch = config.rows_per_step
    steps = f"{config.max_steps} steps, {config.max_steps * batch} rows"
    if config.max_steps < 0:
        steps = f"{config.num_train_epochs:g} epochs of its rows, {batch} a step"
    lines = [
        f"model: {config.model_name}, {config.quantization or 'no'} bits",
        f"adapter: {n:,} parameters in {arrays} arrays, {4 * n / MIB:.2f} MiB in float32",
        f"a round: {train} of {sites} sites train ({steps}), {evaluated} are evaluated",
        f"a transfer: {most}{down:.2f} MiB down ({config.down}), {up:.2f} MiB up ({config.up})",
        f"communication a round: {most}{each:.2f} MiB",
        f"communication (leaderboard counting): {leaderboard:.2f} MB",
        f"communication (sent): {most}{sent:.2f} MiB in {rounds} rounds, "
        f"{100 * sent / config.budget_mb:.2f} % of communication.budget-mb",
        f"checkpoints: {rounds * 4 * n / MIB:.2f} MiB",
    ]
    if config.clip_norm:
        lines.append(_privacy(config, n))
    return lines


def _privacy(config: RunConfig, size: int) -> str:
    clip = f"privacy: each site clips its change to {config.clip_norm:g}"
    if not config.noise_multiplier:
        return f"{clip}, without noise: no (epsilon, delta)"
    length, rounds = noise_norm(config, size), config.num_server_rounds
    spent = [epsilon(config.noise_multiplier, n) for n in (1, rounds)]
    said = f"{clip}, noise of length {length:.3g}; "
    if spent[0] is None:
        return f"{said}for (epsilon, delta): pip install 'fedllm-medical[privacy]'"
    return (
        f"{said}a site's rows, against who sees its adapters: epsilon {spent[0]:.3g} for each "
        f"that it sends, {spent[1]:.3g} for {rounds}, delta {DELTA:g} (a repeated round sends "
        "another; losses and counts are sent as they are)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="app.plan", description=__doc__.split("\n")[0])
    parser.add_argument("--run-config", action="append", default=[], metavar="FILE|PAIRS")
    args = parser.parse_args()
    try:
        _, config = merged_config(Path(__file__).parents[1], args.run_config)
        models = Path(os.environ.get("MODELS_DIR", "models"))
        layers = linear_layers(config, models)
        lines = plan(config, Layout.of(layers, config), config.min_nodes)
        lines.append(gpu_memory(config, layers, models))
    except (ConfigError, SiteError, ValueError) as err:
        print(f"plan: ERROR: {err}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
