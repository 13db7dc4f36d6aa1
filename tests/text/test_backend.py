"""The library's tokenizer, built out of parsed JSON, is the one that the library reads itself."""

import json
import sys
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from benchmarks.interrupts import Raiser, count_steps, raised_at
from edgelm.errors import TokenizerError
from edgelm.text.backend import build_backend
from edgelm.text.tokenizer import Tokenizer
from edgelm.text.tokenizer_file import parse_tokenizer_json
from tests.text.goldens import DATA
from tests.text.tokenizer_kinds import KINDS, text_of

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)


def built(text: str) -> Backend:
    return build_backend(text, *parse_tokenizer_json(text))


def bpe(added_tokens: list[dict[str, Any]] | None = None, **model: Any) -> str:
    content = json.loads(Backend.from_str(text_of("gpt2")).to_str())
    content["model"] = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "aba": 3}, "merges": [], **model}
    content["added_tokens"] = added_tokens or []
    return json.dumps(content)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_built_as_the_library_reads_it(kind: str) -> None:
    text = text_of(kind)
    assert built(text).to_str() == Backend.from_str(text).to_str()


@pytest.mark.parametrize("name", sorted(path.name for path in (DATA / "finished").iterdir()))
def test_finished_tokenizers_are_built_as_the_library_reads_them(name: str) -> None:
    text = (DATA / "finished" / name).read_text(encoding="utf-8")
    assert built(text).to_str() == Backend.from_str(text).to_str()


@pytest.mark.parametrize("merges", [["a b", "ab a"], ["#version: 0.2", "a b"], [["a", "b"], ["ab", "a"]], []])
def test_merges_of_both_forms(merges: list[Any]) -> None:
    text = bpe(merges=merges)
    assert built(text).to_str() == Backend.from_str(text).to_str()


@pytest.mark.parametrize(
    "merges", [["ab"], ["a  b"], ["a b", ["ab", "a"]], [["a"]], [["a", "b", "a"]], ["a c"], [["a", 1]], [5], [None]]
)
def test_merges_that_the_library_refuses_are_refused(merges: list[Any]) -> None:
    text = bpe(merges=merges)
    with pytest.raises(TokenizerError, match=r"^tokenizer\.json cannot be read"):
        Tokenizer.from_json(text)
    with pytest.raises(Exception, match=r"."):
        Backend.from_str(text)


def test_added_tokens_of_both_kinds_keep_their_order_and_flags() -> None:
    added = [
        {"id": 0, "content": "a", **FLAGS},
        {"id": 4, "content": "<s>", **FLAGS, "special": True, "lstrip": True},
        {"id": 5, "content": "<tool>", **FLAGS, "rstrip": True},
        {"id": 6, "content": "</s>", **FLAGS, "special": True, "normalized": True},
        {"id": 7, "content": "<word>", **FLAGS, "single_word": True},
    ]
    text = bpe(added, merges=["a b"])
    mine, theirs = built(text), Backend.from_str(text)
    assert mine.to_str() == theirs.to_str()
    for skip in (False, True):
        ids = [0, 4, 5, 6, 7, 2]
        assert mine.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("value", [None, 0, False, {}])
def test_added_tokens_must_be_a_list(value: object) -> None:
    content = json.loads(bpe())
    content["added_tokens"] = value
    with pytest.raises(TokenizerError, match="needs a list of at most"):
        Tokenizer.from_json(json.dumps(content))


@pytest.mark.parametrize("name", ["id", "content", *FLAGS])
def test_an_added_token_has_all_its_fields(name: str) -> None:
    token = {"id": 4, "content": "<s>", **FLAGS}
    del token[name]
    with pytest.raises(TokenizerError, match=f"has an added token without {name}"):
        Tokenizer.from_json(bpe([token]))


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_exception_of_a_signal_handler_arrives_from_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    text = bpe([{"id": 4, "content": "<a>", **FLAGS}], merges=[["a", "b"], ["ab", "a"]])
    content, file = parse_tokenizer_json(text)
    in_finalizers: list[object] = []  # Python itself drops exceptions there
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: in_finalizers.append(lost.exc_value))
    for step in range(1, count_steps(lambda: build_backend(text, content, file)) + 1):
        handler = Raiser(ValueError("from a signal"))
        arrived: list[object] = []
        try:
            with raised_at(step, handler):
                build_backend(text, content, file)
        except ValueError as error:
            arrived.append(error)
        assert handler.exception in arrived + in_finalizers, handler.where
