"""A site's own policy, SITE_DIR/policy.toml: what a run has to keep to at this site.

The file is the site's, and the code that reads it the app that the site has pinned: a run can ask
for less than the policy allows, never for more. It is read for every message, so what is changed
in it counts from the next one on. Every key is explained in docs/hospital.md.
"""

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, tzinfo
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from app.config import CODECS, STRATEGIES, RunConfig
from app.site.partition import SiteError

FILE = "policy.toml"
NONE = "none"  # in the place of the hash, where there is no file
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


class PolicyFileError(SiteError):
    """The policy cannot be used; the message is for this site's log."""


class RefusedError(SiteError):
    """The site keeps out of it: the policy's line, and what the run asks for instead."""


def _key(name: str, allowed: str, check: Callable[[Any], bool], default: Any = None) -> Any:
    return field(default=default, metadata={"key": name, "allowed": allowed, "check": check})


def _each(what: str, allowed: Callable[[Any], bool]) -> tuple[str, Callable[[Any], bool]]:
    def check(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(map(allowed, value))

    return f"a list of one or more of {what}", check


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _hours(value: Any) -> bool:
    form = _HOURS.fullmatch(value) if isinstance(value, str) else None
    return form is not None and form.groups()[:2] != form.groups()[2:]


def _zone(name: Any) -> tzinfo | None:
    try:
        return UTC if name == "UTC" else ZoneInfo(name)
    except (OSError, ValueError, TypeError, KeyError):  # ZoneInfoNotFoundError is a KeyError
        return None


_COUNT = ("a whole number, 1 or more", lambda v: type(v) is int and v >= 1)
_YES_NO = ("true or false", lambda v: type(v) is bool)
_POSITIVE = ("a number above 0", _number)
_PRINT = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One checked policy; None in a field: no such rule.

    Attributes:
        sha256: of the file's bytes, or NONE.
        lines: key -> its line in the file, from 1.
    """

    min_rows: int | None = _key("min-rows", *_COUNT)
    max_rows: int | None = _key("max-rows-per-round", *_COUNT)
    max_steps: int | None = _key("max-steps-per-round", *_COUNT)
    max_rounds: int | None = _key("max-rounds-per-day", *_COUNT)
    max_messages: int | None = _key("max-messages-per-day", *_COUNT)
    hours: str | None = _key("hours", 'a text as "20:00-06:30"', _hours)
    time_zone: str = _key(
        "time-zone", 'the name of a time zone that this host knows, as "Europe/Berlin"',
        lambda v: _zone(v) is not None, default="UTC",
    )  # fmt: skip
    base_models: tuple[str, ...] | None = _key(
        "base-models",
        *_each("fingerprints (16 hex digits)", lambda v: bool(_PRINT.fullmatch(str(v)))),
    )
    strategies: tuple[str, ...] | None = _key(
        "strategies", *_each(", ".join(STRATEGIES), lambda v: v in STRATEGIES)
    )
    codecs: tuple[str, ...] | None = _key(
        "codecs", *_each(", ".join(CODECS), lambda v: v in CODECS)
    )
    max_clip_norm: float | None = _key("max-clip-norm", *_POSITIVE)
    min_noise: float | None = _key("min-noise-multiplier", *_POSITIVE)
    held_out_losses: bool = _key("held-out-losses", *_YES_NO, default=True)
    error_lines: bool = _key("error-lines", *_YES_NO, default=True)
    sha256: str = NONE
    lines: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, site_dir: Path) -> "Policy":
        """The policy of this site's folder; without a file it has no rule.

        Raises:
            PolicyFileError: the file cannot be read, or a key or a value cannot be meant.
        """
        path = site_dir / FILE
        try:
            content = path.read_bytes()
            given = tomllib.loads(content.decode())
        except FileNotFoundError:
            if path.is_symlink():  # to what a container, for one, does not see
                raise PolicyFileError(
                    f"{FILE} is a link that leads nowhere here; put the file itself there"
                ) from None
            return cls()
        except OSError as err:
            raise PolicyFileError(f"{FILE} cannot be read: {err.strerror}") from None
        except UnicodeDecodeError:
            raise PolicyFileError(f"{FILE} is not UTF-8; save it as that") from None
        except tomllib.TOMLDecodeError as err:
            raise PolicyFileError(f"{FILE} is no TOML: {err}") from None
        except (ValueError, RecursionError):
            raise PolicyFileError(
                f"{FILE} cannot be read: it has a number of too many digits, or too many brackets"
            ) from None
        lines = {key: _line(key, content.decode()) for key in given}
        known = {f.metadata["key"]: f for f in fields(cls) if f.metadata}
        checked: dict[str, Any] = {}
        for key, value in given.items():
            where = f"{FILE}, line {lines[key]}"
            if key not in known:
                near = get_close_matches(key, known, cutoff=0.5) or sorted(known)
                raise PolicyFileError(f"{where}: unknown key {key}; known: {', '.join(near)}")
            f = known[key]
            if not f.metadata["check"](value):
                said, allowed = json.dumps(value, default=str), f.metadata["allowed"]
                raise PolicyFileError(f"{where}: {key} = {said} must be {allowed}")
            checked[f.name] = tuple(value) if isinstance(value, list) else value
        return cls(**checked, sha256=hashlib.sha256(content).hexdigest(), lines=lines)

    def __str__(self) -> str:
        """The rules that the file names, for the site's log."""
        rules = [self._rule(key) for key in self.lines]
        if self.sha256 == NONE:
            return f"no {FILE}: the run's settings alone count"
        return f"{FILE} {self.sha256[:12]} is in force: {', '.join(rules) or 'it has no rule'}"

    def _rule(self, key: str) -> str:
        (name,) = (f.name for f in fields(self) if f.metadata.get("key") == key)
        return f"{key} = {json.dumps(getattr(self, name))}"

    def refuse(self, key: str, but: str) -> RefusedError:
        """To be raised: the rule of this key, with its line, and what is at odds with it."""
        return RefusedError(f"{FILE}, line {self.lines[key]}: {self._rule(key)}; {but}")

    @property
    def counts_by_day(self) -> bool:
        """Whether ``check_day`` has to know what was done before."""
        return bool(self.max_rounds or self.max_messages)

    def day(self, now: datetime) -> datetime:
        """When the site's day of ``now`` began."""
        here = now.astimezone(_zone(self.time_zone))
        return here.replace(hour=0, minute=0, second=0, microsecond=0)

    def check_day(self, now: datetime, kind: str, kinds: Iterable[str]) -> None:
        """May a message of this kind be answered now? ``kinds``: of those answered today.

        Raises:
            RefusedError: it is not an hour for that, or enough has been done today.
        """
        here, today = now.astimezone(_zone(self.time_zone)), list(kinds)
        if self.hours and not _within(self.hours, f"{here:%H:%M}"):
            raise self.refuse("hours", f"it is {here:%H:%M} {self.time_zone}")
        if self.max_messages and len(today) >= self.max_messages:
            raise self.refuse("max-messages-per-day", f"{len(today)} were answered today")
        rounds = today.count("train")
        # What was trained may still be scored.
        if self.max_rounds and kind != "evaluate" and rounds >= self.max_rounds:
            raise self.refuse("max-rounds-per-day", f"{rounds} were trained today")

    def check_run(self, config: RunConfig, fingerprint: str) -> None:
        """Do the run's settings fit, and its base model?

        Raises:
            RefusedError: no.
        """
        if self.base_models and fingerprint not in self.base_models:
            raise self.refuse("base-models", f"{config.model_name} here is {fingerprint}")
        if self.strategies and config.strategy_name not in self.strategies:
            raise self.refuse("strategies", f"the run's strategy.name = {config.strategy_name}")
        if self.codecs and config.up not in self.codecs:
            raise self.refuse("codecs", f"the run has its changes sent as {config.up}")
        if self.max_clip_norm and not 0 < config.clip_norm <= self.max_clip_norm:
            raise self.refuse(
                "max-clip-norm", f"the run's privacy.clip-norm = {config.clip_norm:g}"
            )
        if self.min_noise and config.noise_multiplier < self.min_noise:
            given = f"{config.noise_multiplier:g}"
            raise self.refuse(
                "min-noise-multiplier", f"the run's privacy.noise-multiplier = {given}"
            )

    def check_round(self, config: RunConfig, rows: int) -> None:
        """Does a round of training fit, of ``rows`` that could be used?

        Raises:
            RefusedError: no.
        """
        steps = config.steps(rows)
        used = min(rows, steps * config.rows_per_step)
        if self.min_rows and used < self.min_rows:
            raise self.refuse("min-rows", f"a round of this run trains on {used} rows here")
        if self.max_rows and used > self.max_rows:
            raise self.refuse("max-rows-per-round", f"a round of this run trains on {used} here")
        if self.max_steps and steps > self.max_steps:
            raise self.refuse("max-steps-per-round", f"a round of this run has {steps} here")

    def check_evaluation(self) -> None:
        """Raises RefusedError if held-out losses may not be told."""
        if not self.held_out_losses:
            raise self.refuse("held-out-losses", "the run asks for them")


def _line(key: str, text: str) -> int:
    begins = re.compile(rf"\s*\[*[\"']?{re.escape(key)}\b")
    found = (n for n, line in enumerate(text.splitlines(), 1) if begins.match(line))
    return next(found, 1)


def _within(hours: str, now: str) -> bool:
    first, last = hours.split("-")
    return first <= now < last if first < last else now >= first or now < last
