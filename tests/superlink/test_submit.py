"""What a submission sends: files and pairs, in order, and no typo unnoticed; and which of the runs
that the SuperLink knows is its own."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.config import GIVEN_UP, SILENT, ConfigError, flatten, merged_config
from superlink import submit
from superlink.control import Control, ControlError, KnownRun, RunStatus, public_keys
from superlink.provision import provision
from superlink.submit import MAX_RESUMES, _cut_off, _for_good, _newest, _resume_after
from tests.samples import REPOSITORY, flat_config, run_config
from tests.stand_in_grid import Clock


def overrides(*texts: str) -> dict[str, object]:
    flat, _ = merged_config(REPOSITORY, list(texts))
    return flat


def test_without_overrides_the_config_is_pyproject_tomls() -> None:
    assert merged_config(REPOSITORY, []) == ({}, run_config())


def test_files_and_pairs_mix_and_later_ones_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("seed = 1\nnum-server-rounds = 4\n[model.lora]\npeft-lora-r = 8\n")
    flat, config = merged_config(
        REPOSITORY, ["seed=7 strategy.min-nodes=5", str(file), "model.lora.peft-lora-r=2"]
    )
    assert flat == {
        "seed": 1,
        "strategy.min-nodes": 5,
        "num-server-rounds": 4,
        "model.lora.peft-lora-r": 2,
    }
    assert (config.seed, config.min_nodes, config.num_server_rounds, config.lora_r) == (1, 5, 4, 2)
    assert config == run_config(seed=1, min_nodes=5, num_server_rounds=4, lora_r=2)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('model.name="a/b"', "a/b"),
        ("model.name='a/b'", "a/b"),
        ('seed=1 model.name="a b  c" num-server-rounds=2', "a b  c"),
        ('model.name="a=b c=d"', "a=b c=d"),
        ("""model.name='say "x y"'""", 'say "x y"'),
        ('model.name = "with spaces around"', "with spaces around"),
        ('seed=1\nmodel.name="on two lines"', "on two lines"),
    ],
)
def test_quoted_texts_keep_their_spaces_and_signs(text: str, name: str) -> None:
    assert overrides(text)["model.name"] == name


def test_each_kind_of_value_keeps_its_type() -> None:
    flat = overrides(
        "strategy.require-all-nodes=false train.learning-rate-max=1e-3 seed=3 "
        "train.training-arguments.max-steps=-1"
    )
    assert flat == {
        "strategy.require-all-nodes": False,
        "train.learning-rate-max": 1e-3,
        "seed": 3,
        "train.training-arguments.max-steps": -1,
    }
    assert type(flat["seed"]) is int
    assert type(flat["strategy.require-all-nodes"]) is bool


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.sampled_from(["seed", "num-server-rounds", "strategy.min-nodes", "train.seq-length"]),
        st.integers(20, 99),
    ),
    st.integers(1, 4),
)
def test_how_pairs_are_grouped_does_not_matter(pairs: dict[str, int], group: int) -> None:
    texts = [f"{k}={v}" for k, v in pairs.items()]
    grouped = [" ".join(texts[i : i + group]) for i in range(0, len(texts), group)]
    assert overrides(*grouped) == pairs


@pytest.mark.parametrize(
    "text",
    [
        "model.name=not-quoted",
        "seed=",
        "seed",
        "=3",
        "seed=1 seed=2",
        'model.name="open',
        "seed=1 oops",
        "oops seed=1",
        "seed=1, num-server-rounds=2",
        'seed=1 "num-server-rounds"',
    ],
)
def test_what_is_not_a_list_of_pairs_is_refused_and_nothing_is_dropped(text: str) -> None:
    with pytest.raises(ConfigError):
        merged_config(REPOSITORY, [text])


def test_spaces_around_the_sign_lose_no_pair() -> None:
    try:
        flat = overrides("seed = 7 num-server-rounds=2")
    except ConfigError:
        return  # as good: the user is told
    assert flat == {"seed": 7, "num-server-rounds": 2}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.toml", b"seed = \n"),
        ("latin.toml", 'model.name = "Bücher"'.encode("latin-1")),
        ("missing.toml", None),
        ("folder.toml", b""),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    if name == "folder.toml":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        merged_config(REPOSITORY, [str(tmp_path / name)])


def test_a_folder_without_the_app_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pyproject\.toml"):
        merged_config(tmp_path, [])


@pytest.mark.parametrize("text", ["sed=1", "model.lora.peft-lora-rank=4", "lora.peft-lora-r=4"])
def test_an_unknown_key_is_an_error_before_anything_starts(text: str) -> None:
    with pytest.raises(ConfigError, match=text.split("=")[0]):
        merged_config(REPOSITORY, [text])


def test_an_impossible_value_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('[model]\nquantization = "4"\n')
    with pytest.raises(ConfigError, match=r"model\.quantization"):
        merged_config(REPOSITORY, [str(tmp_path / "x.toml")])


def test_flattening_joins_the_names_of_nested_tables() -> None:
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}, "f.g": 4}}) == {
        "a": 1,
        "b.c": 2,
        "b.d.e": 3,
        "b.f.g": 4,
    }
    assert all(not isinstance(v, dict) for v in flat_config().values())


# --- which run is this submission's, and may it go on? ------------------------------------------

RAISED = "ServerApp failed with exception: "
RESUMED = ",".join(["7"] * MAX_RESUMES) + ",0"


def state(status: str, details: str = "") -> RunStatus:
    return RunStatus(status, details, 0, 0)


class Knows(Control):
    def __init__(self, *runs: KnownRun) -> None:
        self.known = list(runs)

    def runs(self) -> list[KnownRun]:
        return self.known


def known(run_id: int, app: str = "aa", **config: object) -> KnownRun:
    return KnownRun(run_id, config, app, state("running"), 0.0)


def test_a_run_is_ones_own_by_its_app_and_its_config_whatever_it_resumed() -> None:
    others = [known(5, "bb", seed=7), known(4, seed=8), known(3, seed=7, more=1)]
    own = [known(2, seed=7, resume="1,0"), known(1, seed=7)]
    assert _newest(Knows(*others, *own), "aa", {"seed": 7}) == own[0]
    assert _newest(Knows(*others, *own), "aa", {"seed": 7, "resume": "9"}) == own[0]
    assert _newest(Knows(*others), "aa", {"seed": 7}) is None


@pytest.mark.parametrize(
    ("ended", "cut_off", "for_good", "for_good_resumed"),
    [
        (state("running"), False, False, False),
        (state("finished:completed"), False, False, False),
        (state("finished:stopped"), False, False, False),
        (state("finished:failed", "No heartbeat received from the task"), True, False, False),
        (state("finished:failed", RAISED + "round 3: 0 usable replies"), True, False, True),
        (state("finished:failed", RAISED + SILENT + "node 5"), True, False, True),
        (state("finished:failed", RAISED + GIVEN_UP + "a full disk"), False, True, True),
        # A site's words in an error are none of ours.
        (state("finished:failed", f"{RAISED}round 3: site-01: {GIVEN_UP}"), True, False, True),
    ],
)
def test_a_run_that_was_cut_off_may_go_on_but_not_for_ever(
    ended: RunStatus, cut_off: bool, for_good: bool, for_good_resumed: bool
) -> None:
    assert _cut_off(ended) == cut_off
    assert _for_good(KnownRun(8, {}, "aa", ended, 1.0)) == for_good
    assert _for_good(KnownRun(8, {"resume": RESUMED}, "aa", ended, 1.0)) == for_good_resumed


@pytest.mark.parametrize(
    ("resume", "details", "key"),
    [
        (None, "No heartbeat", "8,0"),
        ("7,0", "No heartbeat", "8,7,0"),
        ("latest", "No heartbeat", "8,latest"),
        # It has no round of its own, and no site was at work for it.
        (None, RAISED + SILENT, ""),
        ("7,0", RAISED + SILENT, "7,0"),
    ],
)
def test_the_next_run_goes_on_with_the_last_that_has_a_round(
    resume: str | None, details: str, key: str
) -> None:
    assert _resume_after(8, resume, state("finished:failed", details)) == key


class Sites(Control):
    """In the place of a SuperLink: which sites are online at which time."""

    def __init__(self, public: Path, clock: Clock, online_at_s: dict[str, float]) -> None:
        self.keys, self.clock, self.online_at_s = public_keys(public), clock, online_at_s

    def node_status(self) -> dict[bytes, str]:
        there = [s for s, at in self.online_at_s.items() if self.clock.now >= at]
        return {self.keys[s]: "online" for s in there}


def test_who_waits_for_sites_is_told_where_to_look_long_before_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provision(tmp_path, 3, "superlink:9092", [])
    public, clock = tmp_path / "public", Clock()
    monkeypatch.setattr(submit, "time", clock)
    told: list[tuple[float, str]] = []
    monkeypatch.setattr(submit, "_say", lambda text: told.append((clock.now, text)))
    with pytest.raises(ControlError, match="1 of 3 SuperNodes online after 600 s"):
        submit.wait_for_nodes(Sites(public, clock, {"site-01": 50.0}), public, 3, 600)
    advice = (
        "not online: site-00, site-02; the log of each one's SuperNode says why "
        "(compose: docker compose logs supernode-00); waiting"
    )
    assert [text for _, text in told] == [
        "0 of 3 SuperNodes online", "1 of 3 SuperNodes online", advice,
    ]  # fmt: skip
    assert told[-1][0] == pytest.approx(50 + 60, abs=5)
    # Nobody is told anything where all come in their time.
    told.clear()
    soon = {f"site-{n:02d}": clock.now + 40.0 * n for n in range(3)}
    submit.wait_for_nodes(Sites(public, clock, soon), public, 3, 600)
    assert [text for _, text in told] == [f"{n} of 3 SuperNodes online" for n in (1, 2, 3)]
    # Nor is one counted that the run does without.
    with pytest.raises(ControlError, match="2 of 3 SuperNodes online"):
        submit.wait_for_nodes(Sites(public, clock, soon), public, 3, 5, ["site-02"])


class Untaken(Control):
    """In the place of a SuperLink: a run that nobody takes up until ``taken_at_s``."""

    def __init__(self, clock: Clock, taken_at_s: float) -> None:
        self.clock, self.taken_at_s = clock, taken_at_s

    def run_status(self, run_id: int) -> RunStatus:
        return state("running" if self.clock.now >= self.taken_at_s else "pending")


def test_a_run_that_nobody_takes_up_is_told_and_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(submit, "time", clock)
    submit._wait_until_taken_up(Untaken(clock, clock.now + submit.PENDING_S - 5), 7)
    began = clock.now
    with pytest.raises(ControlError, match=r"run 7 has been pending for 180 s.*flwr stop 7"):
        submit._wait_until_taken_up(Untaken(clock, float("inf")), 7)
    assert clock.now - began == pytest.approx(submit.PENDING_S, abs=5)
