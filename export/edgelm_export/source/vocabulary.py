"""A tokenizer cut down to the tokens that a domain needs. It still spells every string that it could spell before.

Text of the domain keeps its tokens. Other text falls into smaller tokens, down to bytes or characters.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from edgelm.errors import ExportError, TokenizerError
from edgelm.text.tokenizer import Tokenizer

_PIECE_CHARACTERS = 2**20
_LINE_END = re.compile(r"\n(?=\S)")  # a cut here splits no token of the usual tokenizers


@dataclass(frozen=True)
class Vocabulary:
    """A pruned tokenizer."""

    tokenizer: Tokenizer
    new_ids: dict[int, int]
    """The new id of every old id that was kept, in the order 0, 1, 2, ..."""


def prune_tokenizer(tokenizer: Tokenizer, text: str, needed: Collection[int] = ()) -> Vocabulary:
    """Keep the tokens of `text`, the tokens without which a string could not be spelt, and all added tokens.

    Byte-level and other BPE keep every token that no merge makes, such as the 256 bytes. They keep the merges whose
    parts and results are kept, and every merge that leads to one of them. BPE always applies the earliest merge that
    fits, so the text's own merges stay in their order. WordPiece and Unigram keep every single character, and each
    token with a character that has no token of its own.

    Args:
        text: text of the domain.
        needed: ids to keep in any case, with or without a token, such as the ends of text that a config names.

    Raises:
        ExportError: the text is empty, a pruned tokenizer of this kind could not spell every string, or the pruned
            tokenizer does not encode the text as before.
    """
    if not text.strip():
        raise ExportError("the vocabulary file is empty; give text of the domain")
    try:
        state = json.loads(tokenizer.to_json())
    except TokenizerError as error:
        raise ExportError(f"cannot prune this tokenizer: {error}") from None
    _drop_unusable(state, tokenizer.vocab_size)
    pieces = list(_pieces(text))
    encoded = [tokenizer.encode(piece) for piece in pieces]
    model, added = state["model"], {token["id"]: token["content"] for token in state["added_tokens"]}
    known = _ids_of(model)
    ids = {old: token for token, old in known.items()}
    always = set(needed) | {values[at] for values, at in _id_places(state["post_processor"])}
    names = {token for old, token in ids.items() if old in always} | {*added.values(), model.get("unk_token")}
    used = {ids[old] for old in set().union(*encoded) if old in ids}
    tokens = _SPELLERS[model["type"]](model, used | (names & known.keys()))
    # Added tokens that the model does not know get the ids after the model's, in their order, wherever they are read.
    kept = sorted(old for old, token in ids.items() if token in tokens)
    kept += sorted(added.keys() - ids.keys())
    kept += sorted(set(needed) - set(kept))
    new_ids = {old: new for new, old in enumerate(kept)}
    pruned = _renumbered(state, tokens, new_ids)
    for piece, old_ids in zip(pieces, encoded, strict=True):
        if pruned.encode(piece) != [new_ids[old] for old in old_ids]:
            raise ExportError("the pruned tokenizer does not encode the vocabulary file as before: please report this")
    return Vocabulary(pruned, new_ids)


def _drop_unusable(state: dict[str, Any], size: int) -> None:
    """Remove the tokens whose ids are `size` or more, because the model has no rows for them."""
    model = state["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {token: old for token, old in model["vocab"].items() if old < size}
    elif isinstance(model.get("vocab"), list):
        model["vocab"] = model["vocab"][:size]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of about a million characters, because the tokenizer needs a hundred times their size."""
    start = 0
    while start < len(text):
        cut = _LINE_END.search(text, start + _PIECE_CHARACTERS)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end


def _ids_of(model: dict[str, Any]) -> dict[str, int]:
    """The id of each token of a tokenizer.json's model, whatever its kind."""
    vocab = model.get("vocab")
    if model.get("type") == "Unigram":
        return {piece: i for i, (piece, _score) in enumerate(model["vocab"])}
    if model.get("type") not in _SPELLERS or not isinstance(vocab, dict):
        raise ExportError(
            f"cannot prune a {model.get('type')} tokenizer, because it has no other way to spell a pruned token; "
            "byte-level and other BPE, WordPiece and Unigram can be pruned"
        )
    return vocab


def _spell_bpe(model: dict[str, Any], tokens: set[str]) -> set[str]:
    makers: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for left, right, result in _merges(model):
        makers[result].append((left, right))
    kept = tokens | {token for token in model["vocab"] if token not in makers}
    open_ends = list(kept)
    while open_ends:
        # Where several merges make a token, all of them are kept, because the word decides which of them it takes.
        parts = {part for pair in makers.get(open_ends.pop(), ()) for part in pair} - kept
        kept |= parts
        open_ends += parts
    return kept


def _spell_wordpiece(model: dict[str, Any], tokens: set[str]) -> set[str]:
    vocab, prefix = model["vocab"], model["continuing_subword_prefix"]

    def letters(token: str) -> list[str]:
        inside = token.startswith(prefix) and token != prefix
        first, *rest = list(token[len(prefix) :] if inside else token) or [""]
        return [prefix + first if inside else first, *(prefix + letter for letter in rest)]

    return tokens | {token for token in vocab if _is_atom(token, letters(token), vocab)}


def _spell_unigram(model: dict[str, Any], tokens: set[str]) -> set[str]:
    vocab = model["vocab"]
    pieces = {piece for piece, _score in vocab}
    # An unknown character costs a fixed amount more than the worst piece, so that piece stays and no cost shifts.
    worst = min(vocab, key=lambda entry: entry[1])[0]
    unknown = set() if model["unk_id"] is None else {vocab[model["unk_id"]][0]}
    byte_pieces = {piece for piece in pieces if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", piece)}
    atoms = {piece for piece in pieces if _is_atom(piece, list(piece), pieces)}
    return tokens | {worst} | unknown | byte_pieces | atoms


def _is_atom(token: str, letters: list[str], vocab: Collection[str]) -> bool:
    """Whether only this token spells its letters: it is one letter, or one of them has no token of its own."""
    return len(letters) == 1 or any(letter not in vocab for letter in letters)


_SPELLERS = {"BPE": _spell_bpe, "WordPiece": _spell_wordpiece, "Unigram": _spell_unigram}
"""Each adds to `tokens` the tokens that make them and the tokens that spell every string."""


def _merges(model: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The left part, the right part and the result of each merge."""
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right, left + right.removeprefix(prefix)


def _id_places(processor: Any) -> Iterator[tuple[list[Any], int]]:
    """Where a post-processor names the token ids that it puts into texts: each place is a list and an index."""
    if isinstance(processor, dict) and "type" in processor:
        for step in processor.get("processors", ()):
            yield from _id_places(step)
        for token in (processor.get("special_tokens") or {}).values():
            yield from ((token["ids"], at) for at in range(len(token["ids"])))
        yield from ((processor[name], 1) for name in ("sep", "cls") if name in processor)


def _renumbered(state: dict[str, Any], tokens: set[str], new_ids: dict[int, int]) -> Tokenizer:
    """The tokenizer of `tokens`; changes `state`, the content of a tokenizer.json."""
    model = state["model"]
    if model["type"] == "Unigram":
        model["unk_id"] = None if model["unk_id"] is None else new_ids[model["unk_id"]]
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in tokens]
    else:
        model["vocab"] = {token: new_ids[old] for token, old in model["vocab"].items() if token in tokens}
    if model["type"] == "BPE":
        model["merges"] = [[left, right] for left, right, made in _merges(model) if {left, right, made} <= tokens]
    for token in state["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    for values, at in _id_places(state["post_processor"]):
        values[at] = new_ids[values[at]]
    if state["padding"] is not None:
        state["padding"]["pad_id"] = new_ids.get(state["padding"]["pad_id"], 0)
    expected = _ids_of(model) | {token["content"]: token["id"] for token in state["added_tokens"]}
    pruned = Tokenizer.from_json(json.dumps(state, ensure_ascii=False))
    if any(pruned.token_id(token) != new for token, new in expected.items()):
        raise ExportError("the pruned tokenizer numbers its tokens in another way: please report this")
    return pruned
