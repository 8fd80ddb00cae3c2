"""The words that adapters are to be asked in: those that they were trained with."""

from collections.abc import Sequence

from safetensors import SafetensorError, safe_open

from app.config import PROMPTS
from app.site.chat import Chat, chosen
from app.wire.adapter import PROMPT
from eval import EvalError
from eval.model import Adapter, Base


def trained_with(adapters: Sequence[Adapter]) -> str:
    """Their run's model.prompt; alpaca where nothing is recorded, or nothing is to be scored.

    Raises:
        EvalError: it is unknown here, or not the same for all.
    """
    found = {_recorded(adapter): adapter for adapter in adapters}
    for name, adapter in found.items():
        if name not in PROMPTS:
            raise EvalError(
                f"{adapter.weights}: {PROMPT} = {name!r} must be one of {', '.join(PROMPTS)}; "
                "evaluate it with the version that wrote it"
            )
    if len(found) > 1:
        folders = " and ".join(str(adapter.folder) for adapter in found.values())
        raise EvalError(f"{folders} were trained with different {PROMPT}; evaluate them apart")
    return next(iter(found), "alpaca")


def words(prompt: str, base: Base) -> Chat | None:
    """What questions are put in; None: the leaderboard's. Raises SiteError: it cannot be."""
    return chosen(prompt, base.folder, base.name)


def _recorded(adapter: Adapter) -> str:
    try:
        with safe_open(adapter.weights, "np") as file:
            return str((file.metadata() or {}).get(PROMPT, "alpaca"))
    except (OSError, SafetensorError):  # eval.model.check says what is wrong with it
        return "alpaca"
