"""Batches without padding: what one forward pass is given, and which models can be given it.

The rows of a pass stand one behind the other in a single row of tokens, and position ids start anew
with each. Without an attention mask and without a cache Transformers makes a block-diagonal mask of
those; with either, the rows would see each other, and nothing would say so.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import pad

from app.site.base_model import mixed_precision
from app.site.examples import IGNORED
from app.site.last_lines import travels

logger = logging.getLogger(__name__)
# bitsandbytes' layers give no gradients any more once they have been evaluated on a CPU.
_asked: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def passes(
    batch: dict[str, torch.Tensor], max_tokens: int, packed: bool
) -> Iterator[dict[str, Any]]:
    """A batch [B, T] of ``examples.collate`` in passes of at most ``max_tokens`` tokens each.

    A row that has more gets a pass of its own. Yields what the model takes, and the ``labels`` [N]
    of the N logits that it will give: at the places before the answers' tokens, no others. Logits
    at a prompt's places would take most of a GPU's memory (Llama-3: 12 bytes for each of 128,256
    values at each place) and change nothing. (Transformers' DataCollatorWithFlattening makes the
    same of a whole batch, but no passes, and leaves Trainer nothing to count tokens by.)
    """
    real = batch["attention_mask"].bool()
    following = pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # a place predicts the next
    places = torch.arange(real.shape[1], device=real.device).expand_as(real)
    for rows in _grouped(real.sum(1).tolist(), max_tokens, packed):
        kept = real[rows]
        if packed:
            ids, labels, positions = (
                values[rows][kept][None] for values in (batch["input_ids"], following, places)
            )
            where = {"position_ids": positions}
        else:
            longest = int(kept.sum(1).max())
            ids, labels, mask = (
                values[rows, :longest]
                for values in (batch["input_ids"], following, batch["attention_mask"])
            )
            where = {"attention_mask": mask}
        answers = labels != IGNORED
        yield where | {
            "input_ids": ids,
            "use_cache": False,
            "logits_to_keep": answers,
            "labels": labels[answers],
        }


def _grouped(lengths: list[int], max_tokens: int, packed: bool) -> list[list[int]]:
    """Numbers of the rows of each pass: the longest first, each where there is room for it."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        for group in groups:
            used = sum(lengths[r] for r in group)
            padded = (len(group) + 1) * lengths[group[0]]
            if (used + lengths[row] if packed else padded) <= max_tokens:
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def can_pack(model: Any) -> bool:
    """Whether rows that share a pass do not see each other in this PEFT model; if not, logs why.

    Asked of the loaded model, once: a few tokens of two rows go through one layer of each kind, and
    what the second row becomes must not depend on the first. If attention is masked, the gradient
    of that is zero to the last bit, in every precision.
    """
    if model not in _asked:
        base = model.get_base_model()
        _asked[model] = not (reason := _obstacle(base))
        if reason:
            logger.info(
                "%s has %s: its batches are padded", type(base).__name__, reason, extra=travels()
            )
    return _asked[model]


def _obstacle(base: Any) -> str:
    if base.config._attn_implementation == "eager":
        # It would hold a weight for every two tokens of a pass, in each head.
        return "only eager attention"
    was_training = base.training
    base.eval()  # no dropout: no random number may be drawn that training would miss
    ids = torch.arange(7, device=base.device)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=base.device)
    tokens = base.get_input_embeddings()(ids).detach().requires_grad_()
    # A copy of them, as some models write into what they are given.
    inputs = {"inputs_embeds": tokens.clone(), "position_ids": positions, "use_cache": False}
    try:
        with _few_layers(base), mixed_precision(base.device.type):
            second = base.base_model(**inputs)[0][:, 3:]
    except TypeError:
        return "no position ids"
    finally:
        base.train(was_training)
    (gradient,) = torch.autograd.grad(second.float().square().sum(), tokens)
    apart = gradient[:, 3:].any() and not gradient[:, :3].any()
    return "" if apart else "attention that does not stop where a row ends"


@contextmanager
def _few_layers(base: Any) -> Iterator[None]:
    """The model with no more of its first layers than hold one of each kind that it has."""
    inner, config = base.base_model, base.config.get_text_config()
    for name, layers in inner.named_children():
        if isinstance(layers, torch.nn.ModuleList) and len(layers) == config.num_hidden_layers:
            types = getattr(config, "layer_types", None) or [None] * len(layers)
            kinds = [(t, _kind(layer)) for t, layer in zip(types, layers, strict=True)]
            setattr(inner, name, layers[: 1 + max(kinds.index(kind) for kind in kinds)])
            try:
                yield
            finally:
                setattr(inner, name, layers)
            return
    yield


def _kind(layer: torch.nn.Module) -> list[Any]:
    """The same for layers that compute the same with other weights."""
    return [
        (place, type(module), key, value)
        for place, module in layer.named_modules()
        for key, value in [("", None), *vars(module).items()]
        if isinstance(value, bool | int | float | str | None) and "layer_i" not in key
    ]
