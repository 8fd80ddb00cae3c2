"""Prepare what SuperNodes need before a run: the quantised base model and the partitions.

    python -m supernode.prepare model --name ContactDoctor/Bio-Medical-Llama-3-8B
    python -m supernode.prepare data --source medalpaca/medical_meadow_medical_flashcards
    python -m supernode.prepare all

It downloads what it needs (supernode.download) unless HF_HUB_OFFLINE=1, as in compose.yaml. Every
flag can come from the environment instead (in capitals: MODEL_NAME, QUANTIZATION, DATA_SOURCE,
SITES, ...).
"""

import argparse
import os
import sys
from pathlib import Path

from supernode.download import CACHE, DATA, MODEL, PrepareError
from supernode.hub import HubError, find_the_way, hub_token
from supernode.node_log import quiet
from supernode.partitions import BUNDLED, Split, prepare_data
from supernode.quantise import prepare_model


def main() -> int:
    env = os.environ.get
    parser = argparse.ArgumentParser(prog="supernode.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("model", "data", "all"))
    model = parser.add_argument_group("model")
    model.add_argument(
        "--name",
        help="hub id or local folder",
        default=env("MODEL_NAME", MODEL),
    )
    model.add_argument(
        "--quantization",
        default=env("QUANTIZATION", "nf4"),
        help="nf4 (default), fp4, int8 or none",
    )
    model.add_argument("--models", type=Path, default=env("MODELS_DIR", "models"))
    parser.add_argument("--cache", type=Path, default=CACHE, help="what comes from the hub")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--source",
        help="hub id, file, folder (partitioner files), or 'bundled'",
        default=env("DATA_SOURCE", DATA),
    )
    data.add_argument("--federation", type=Path, default=env("FEDERATION_DIR", "federation"))
    data.add_argument("--sites", type=int, default=env("SITES", "20"))
    data.add_argument(
        "--partitioner",
        default=env("PARTITIONER", "iid"),
        help="iid (default), dirichlet, or files (one file a site)",
    )
    data.add_argument("--partition-by", default=env("PARTITION_BY", ""))
    data.add_argument("--alpha", type=float, default=env("DIRICHLET_ALPHA", "0.5"))
    data.add_argument("--seed", type=int, default=env("DATA_SEED", "2025"))
    data.add_argument(
        "--columns",
        default=env("DATA_COLUMNS", ""),
        help="QUESTION,ANSWER: the columns, where they have other names than the usual ones",
    )
    args = parser.parse_args()
    quiet()
    find_the_way()
    try:
        token = hub_token()
        if args.what in ("model", "all"):
            folder = prepare_model(args.models, args.cache, args.name, args.quantization, token)
            print(f"prepare: base model in {folder}", flush=True)
        if args.what in ("data", "all"):
            source = str(BUNDLED) if args.source == "bundled" else args.source
            split = Split(
                source, args.sites, args.partitioner, args.partition_by, args.alpha, args.seed,
                args.columns,
            )  # fmt: skip
            for line in prepare_data(args.federation, split, args.cache, token):
                print(f"prepare: {line}", flush=True)
    except (PrepareError, HubError, OSError) as err:
        print(f"prepare: ERROR: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
