"""What a hub says no with, and what its user reads: one line with the reason and the way out."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from supernode.download import MODEL
from tests.hub.conftest import Command
from tests.hub.server import Asked, Front, Refusal

TOKEN = "hf_thisIsNobodysToken"  # noqa: S105  # pragma: allowlist secret
PASSWORD = "pa55word"  # noqa: S105  # pragma: allowlist secret
DOWNLOAD = ("supernode.download", "--source", "bundled")
FETCH = ("eval", "fetch", "--datasets", "medqa")
SCORE = ("eval", "--peft-path", "none", "--base-model-name-path", MODEL, "--datasets", "demo-yesno")
SET = "bigbio/med_qa"
GATED = "Access to model X is restricted. You must have access to it and be authenticated."
Refuse = Callable[[Asked], Refusal | None]


def files(status: int, code: str, message: str) -> Refuse:
    """Everybody may see that a gated repository is there, and only its files are refused."""
    return lambda asked: Refusal(status, code, message) if "/resolve/" in asked.path else None


def everything(status: int, code: str = "", message: str = "") -> Refuse:
    return lambda asked: None if asked.path == "/" else Refusal(status, code, message)


class Case(NamedTuple):
    command: tuple[str, ...]
    refuse: Refuse
    with_token: bool
    says: str  # before the colon, without the hub's address
    advice: str  # {page}: the repository's


CASES = {
    "gated, nobody logged in": Case(
        DOWNLOAD, files(401, "GatedRepo", GATED), False, f"says 401 ({GATED})",
        "accept the licence at {page}, and name a file with your token in HF_TOKEN_FILE",
    ),
    "gated, not accepted": Case(
        DOWNLOAD, files(403, "GatedRepo", "Not in the authorized list."), True,
        "says 403 (Not in the authorized list.)",
        "the account of the token in HF_TOKEN_FILE must have accepted the licence at {page}",
    ),
    "a token without the right": Case(
        DOWNLOAD, files(403, "", "Please enable access to public gated repositories."), True,
        "says 403 (Please enable access to public gated repositories.)",
        "the token in HF_TOKEN_FILE valid, the licence at {page} accepted?",
    ),
    "an expired token": Case(
        FETCH, everything(401, "", "Invalid credentials in Authorization header"), True,
        "says 401 (Invalid credentials in Authorization header)",
        "the token in HF_TOKEN_FILE valid",
    ),
    "a token that the hub repeats": Case(
        DOWNLOAD, everything(401, "", f"no such token: {TOKEN}"), True,
        "says 401 (no such token: ***)", "the token in HF_TOKEN_FILE valid",
    ),
    "no such name, or private": Case(
        DOWNLOAD, everything(404, "RepoNotFound", "Repository not found"), True,
        "says 404 (Repository not found)", "is the name right, the token in HF_TOKEN_FILE valid",
    ),
    "too often": Case(
        DOWNLOAD, everything(429), False, "says 429", "wait some minutes, or name a token",
    ),
    "disabled": Case(
        DOWNLOAD, everything(403, "", "Access to this resource is disabled."), False,
        "says 403 (Access to this resource is disabled.)", "is the name right?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_refusal_is_one_line_with_the_hubs_words_and_the_way_out(
    front: Front, run: Command, tmp_path: Path, case: Case
) -> None:
    front.refuse = case.refuse
    (tmp_path / "hf-token").write_text(f"{TOKEN}\n")
    settings = {"HF_TOKEN_FILE": str(tmp_path / "hf-token")} if case.with_token else {}
    done = run(front.address, *case.command, **settings)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    name = f"datasets/{SET}" if case.command == FETCH else MODEL
    sent = {a.headers.get("authorization") for a in front.asked if f"/{name}/" in a.path}
    assert sent == ({f"Bearer {TOKEN}"} if case.with_token else {None})
    assert f", and {front.address} {case.says}: " in line
    assert case.advice.format(page=f"{front.address}/{name}") in line
    assert line.endswith("; or give --data-dir") == (case.command == FETCH)
    assert TOKEN not in line


def test_the_base_model_of_an_evaluation_is_refused_in_the_same_words(
    front: Front, run: Command
) -> None:
    front.refuse = files(401, "GatedRepo", GATED)
    done = run(front.address, *SCORE)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"eval: ERROR: base model {MODEL} is neither prepared for ")
    assert f", and {front.address} says 401 ({GATED}): accept the licence at " in line


def test_a_gated_model_is_given_to_the_token_whose_account_was_let_in(
    front: Front, run: Command, tmp_path: Path
) -> None:
    def refuse(asked: Asked) -> Refusal | None:
        let_in = asked.headers.get("authorization") == f"Bearer {TOKEN}"
        return None if let_in or "/resolve/" not in asked.path else Refusal(401, "GatedRepo")

    front.refuse = refuse
    (tmp_path / "hf-token").write_bytes(
        b"\xef\xbb\xbf" + f"{TOKEN}\r\n".encode()
    )  # as Notepad does
    assert run(front.address, *DOWNLOAD).returncode == 1
    done = run(front.address, *DOWNLOAD, HF_TOKEN_FILE=str(tmp_path / "hf-token"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"download: base model {MODEL} in ")


@pytest.mark.parametrize(
    ("command", "content"),
    [
        (DOWNLOAD, f"{TOKEN}\n{TOKEN}"), (FETCH, f"token={TOKEN} # mine"), (DOWNLOAD, "hf_tökén\0"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_token_is_said_before_anybody_sees_it(
    front: Front, run: Command, tmp_path: Path, content: str, command: tuple[str, ...]
) -> None:
    path = tmp_path / "hf-token"
    path.write_text(content, encoding="utf-8")
    done = run(front.address, *command, HF_TOKEN_FILE=str(path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"HF_TOKEN_FILE={path}: holds no token, which is one word, as hf_..." in line
    assert "hf_t" not in line
    assert front.asked == []


@pytest.mark.parametrize(
    ("command", "settings", "words"),
    [
        (DOWNLOAD, {}, "http://127.0.0.1:9 cannot be reached ([Errno 111] Connection refused): "
         "check the network, HF_ENDPOINT (a mirror) and CA_FILE (its CA)"),
        (FETCH, {"HF_ENDPOINT": "https://hub.invalid"}, "https://hub.invalid cannot be reached ("),
        (DOWNLOAD, {"HF_ENDPOINT": f"http://me:{PASSWORD}@127.0.0.1:9/of/hf"},
         "and http://127.0.0.1:9/of/hf cannot be reached"),
        (DOWNLOAD, {"HF_ENDPOINT": f"me:{PASSWORD}@mirror.example.org"},
         "HF_ENDPOINT=mirror.example.org: an address as https://NAME is needed"),
        (FETCH, {"HF_ENDPOINT": ""}, "HF_ENDPOINT=: an address as https://NAME is needed"),
        (DOWNLOAD,
         {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": f"http://me:{PASSWORD}@127.0.0.1:9"},
         "Connection refused, through the proxy in HTTP_PROXY): check the network"),
        (FETCH, {"HF_ENDPOINT": "http://hub.invalid", "all_proxy": "socks5://127.0.0.1:9"},
         "all_proxy names a SOCKS proxy, which cannot be used: give one at http://NAME:PORT"),
        (DOWNLOAD, {"HF_ENDPOINT": "http://hub.invalid", "HUB_HTTP_PROXY": "http://127.0.0.1:9"},
         "Connection refused, through the proxy in http_proxy): check the network"),
        (DOWNLOAD, {"HF_HUB_OFFLINE": "1"},
         "/cache, and HF_HUB_OFFLINE forbids to ask the hub; run supernode.download (compose: "),
    ],
)  # fmt: skip
def test_a_hub_that_cannot_be_asked_is_one_line_that_says_why(
    run: Command, command: tuple[str, ...], settings: dict[str, str], words: str
) -> None:
    done = run("http://127.0.0.1:9", *command, **settings)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert words in line
    assert PASSWORD not in line


def test_what_answers_but_is_no_hub_is_said(front: Front, run: Command) -> None:
    front.refuse = lambda _: Refusal(200)
    for command in (DOWNLOAD, FETCH):
        done = run(front.address, *command)
        (line,) = done.stderr.splitlines()
        assert f"{front.address} does not answer as a hub does (" in line


@pytest.mark.parametrize("name", ["/models/nothing", "a/b/c", "https://hub.example.org/a/b"])
def test_what_is_neither_here_nor_a_name_is_said(run: Command, name: str) -> None:
    done = run("http://127.0.0.1:9", "supernode.prepare", "model", "--name", name)
    (line,) = done.stderr.splitlines()
    assert line.startswith("prepare: ERROR: base model ")
    assert line.endswith(": no folder here, and the hub has no such names, only ORG/NAME")


def test_a_name_that_the_hub_does_not_have_is_said_by_a_real_one(mirror: str, run: Command) -> None:
    done = run(mirror, *DOWNLOAD, "--name", "nobody/nothing")
    assert done.stderr == (
        f"download: ERROR: base model nobody/nothing: no folder here, and {mirror} says 401 "
        "(Repository not found): is the name right? What is private, or has a licence to be "
        f"accepted at {mirror}/nobody/nothing, needs a file with a token in HF_TOKEN_FILE\n"
    )
