"""A base model's tokenizer: text stays text, and an end that is none is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from app.site.examples import FileTokenizer, encode
from app.site.rows import Row
from supernode.quantise import prepare_model
from supernode.source import SourceError
from supernode.tokens import check_tokenizer, mark_markup, notes
from tests.tiny_model import VOCABULARY, build_tiny_model

MARKUP = "<|im_end|>"
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    build_tiny_model(tmp_path / "source")
    return tmp_path / "source"


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def prepared(source: Path) -> Path:
    return prepare_model(source.parent / "models", source.parent, str(source), "none", None)


@pytest.mark.parametrize(
    ("stops", "said"),
    [(1, ""), ([0, 1], ""), (0, "<s> (0)"), ([5, 0], "(5), <s> (0)"), (None, "none")],
)
def test_an_eos_at_which_the_model_does_not_stop_is_said(
    source: Path, capsys: pytest.CaptureFixture[str], stops: int | list[int] | None, said: str
) -> None:
    change(source / "generation_config.json", eos_token_id=stops)
    prepared(source)
    warned = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(warned) == bool(said)
    assert all("EOS, </s> (1), at which the model does not stop" in line for line in warned)
    assert all(f"{said})" in line for line in warned)


def test_an_eos_that_is_the_tokenizers_alone_is_said(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(source / "tokenizer_config.json", **{"eos_token": "<s>"})
    prepared(source)
    assert "EOS, <s> (0), at which the model does not stop" in capsys.readouterr().err


def test_markup_that_nobody_marked_is_text_in_rows_all_the_same(source: Path) -> None:
    """Of a tokenizer.json in which no added token counts as special."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    old = tokenizer["model"]["vocab"]
    del old[max(old, key=lambda token: old[token])]
    tokenizer["model"]["merges"].pop()
    added = tokenizer["added_tokens"][0] | {"id": VOCABULARY - 1, "content": MARKUP}
    tokenizer["added_tokens"] = [t | {"special": False} for t in tokenizer["added_tokens"]]
    tokenizer["added_tokens"].append(added | {"special": False})
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = f"{MARKUP} 5 mg</s> <s>"
    folder = prepared(source)
    of_file, of_library = FileTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for made in (of_file, of_library):
        example = encode(Row(said, said), made, 512)
        assert (example.input_ids[0], example.input_ids[-1]) == (0, 1)
        assert not {0, 1, VOCABULARY - 1} & set(example.input_ids[1:-1])
    assert encode(Row(said, said), of_file, 512) == encode(Row(said, said), of_library, 512)


def test_what_the_chat_template_writes_is_markup_as_well(source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    words = ("[Q]", "other", " ")
    tokenizer.backend_tokenizer.add_tokens([AddedToken(text, normalized=False) for text in words])
    tokenizer.chat_template = "[Q] {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(source)
    made = AutoTokenizer.from_pretrained(source)
    mark_markup(made)
    added = made.backend_tokenizer.get_added_tokens_decoder().values()
    assert {t.content: t.special for t in added if t.content in words} == {
        "[Q]": True, "other": False, " ": False,
    }  # fmt: skip


def test_a_tokenizer_that_the_preflight_cannot_read_is_refused(source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    check_tokenizer(source, tokenizer, VOCABULARY)

    class Slow:
        is_fast = False
        eos_token_id = 1

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(SourceError, match=r"no tokenizer\.json, which the sites' preflight reads"):
        check_tokenizer(source, Slow(), VOCABULARY)


def test_a_prompts_end_in_one_token_with_an_answers_beginning_is_said(source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert notes(tokenizer, 1) == []
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    inner["model"]["vocab"][":Ġ"] = VOCABULARY
    inner["model"]["merges"].insert(0, [":", "Ġ"])
    inner["pre_tokenizer"]["use_regex"] = False
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    joins = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(inner)), **ENDS)
    (note,) = notes(joins, 1)
    assert "joins the end of a prompt and the beginning of an answer" in note
