"""How many of a site's rows a run can use, and what becomes of the others: counts, no text.

Asked by the preflight of a run, and before any run by ``app.site.check``.
"""

import logging
from collections.abc import Mapping

from app.config import RunConfig
from app.site.base_model import BaseModel
from app.site.last_lines import travels
from app.site.partition import Part, SiteError

logger = logging.getLogger(__name__)


def token_sizes(part: Part, base: BaseModel, config: RunConfig) -> list[tuple[int, int]]:
    """Of each row its tokens and those of its question, by this model's tokenizer.

    Raises:
        SiteError: the model has no tokenizer of the usual form, or not the prompt of the run.
    """
    from app.site.chat import chosen
    from app.site.examples import FileTokenizer, sizes

    try:
        tokenizer = FileTokenizer(base.folder)
    except Exception:  # the library's errors have no class of their own
        raise SiteError(
            f"base model {base.name}: no tokenizer.json with an EOS; run supernode.prepare again, "
            "or take another model"
        ) from None
    return sizes(part.rows, tokenizer, chosen(config.prompt, base.folder, base.name))


def counted(part: Part, sizes: list[tuple[int, int]], config: RunConfig) -> dict[str, int]:
    """What became of the rows that were read; ``used`` is what is left of them."""
    from app.site.examples import lengths

    counts = part.counts() | lengths(sizes, config.seq_length)
    return counts | {"used": len(part.rows) - counts["too_long"]}


def check_some_used(part: Part, counts: Mapping[str, int], config: RunConfig) -> None:
    """Raises SiteError: there is nothing to train on."""
    if not counts["used"]:
        raise SiteError(
            f"{part.name}: no row keeps an answer within train.seq-length = "
            f"{config.seq_length} tokens"
        )


def check_positions(
    part: Part, sizes: list[tuple[int, int]], base: BaseModel, config: RunConfig
) -> None:
    """Raises SiteError: a row is longer than the model takes."""
    from app.site.examples import lengths

    if base.positions and config.seq_length > base.positions:
        longer = sum(lengths(sizes, base.positions).values())
        if longer:
            raise SiteError(
                f"{part.name}: {longer} rows are longer than the {base.positions} tokens that "
                f"{base.name} takes; lower train.seq-length = {config.seq_length} to that"
            )


def rows_used(
    parts: Mapping[str, Part], base: BaseModel, config: RunConfig
) -> dict[str, dict[str, int]]:
    """The counts by part of the data; each text is encoded, and they are logged.

    Raises: SiteError as ``token_sizes``, ``check_positions`` and ``check_some_used``.
    """
    found = {}
    for name, part in parts.items():
        sizes = token_sizes(part, base, config)
        found[name] = counted(part, sizes, config)
        check_positions(part, sizes, base, config)
        if part.name:
            told = ", ".join(f"{n} {key.replace('_', ' ')}" for key, n in found[name].items())
            logger.info("%s: %s", part.name, told, extra=travels())
    check_some_used(parts["train"], found["train"], config)
    return found
