"""The questions that others hold: a file of the hub, at a pinned revision."""

from pathlib import Path
from typing import Any

from eval import EvalError
from supernode.hub import HubError, OfflineError, asking, hub_token


def fetch(dataset: str, repository: str, file: str, revision: str, cache: Path) -> Path:
    """The hub's file of a set, from the cache or else the network.

    Raises:
        EvalError: neither has it.
        OSError: HF_TOKEN_FILE cannot be read.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    where: dict[str, Any] = {
        "repo_type": "dataset",
        "revision": revision,
        "cache_dir": cache / "hub",
    }
    if isinstance(there := try_to_load_from_cache(repository, file, **where), str):
        return Path(there)
    try:
        token = hub_token()
        with asking(repository, "dataset", token):
            return Path(hf_hub_download(repository, file, token=token, **where))
    except OfflineError as err:
        way = (
            f"run `python -m eval fetch --datasets {dataset}` (compose: EVAL_DATASETS={dataset}) "
            "where the hub can be reached, or give --data-dir"
        )
        raise EvalError(f"{dataset}: {repository} is not in {cache}, and {err}; {way}") from None
    except HubError as err:
        raise EvalError(
            f"{dataset}: {repository}@{revision[:12]} is not in {cache}, and {err}; or give "
            "--data-dir"
        ) from None
