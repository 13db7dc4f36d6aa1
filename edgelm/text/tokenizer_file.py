"""The content of a tokenizer.json, checked before the `tokenizers` library sees it.

In Rust a hostile file can end the process (a text that doubles thirty times, an index outside a table) or write a
panic to stderr. So the parts that a file may have are listed here with their fields, and everything that could grow or
take long has a limit: sizes, nesting, how often a text may grow, regular expressions (`edgelm.text.regexes`).
All kinds of parts that tokenizers 0.21 to 0.23 write are in the list.
"""

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from edgelm.bundle.strict_json import StrictJsonError, parse_json
from edgelm.errors import TokenizerError, pass_interrupts_on, shown
from edgelm.text.long_text import CutFacts, cut_facts
from edgelm.text.regexes import Regex, RegexError, read_regex

MAX_FILE_BYTES = 64 * 2**20
"""The largest tokenizer.json that is read; Gemma's, with 262,144 tokens, has 34 MB."""
MAX_TOKEN_ID = 2**22 - 1
"""As many tokens as a manifest's vocabulary may have."""

_MAX_VALUES = 2**22  # commas and brackets in the file, each of which stands for a Python object
_MAX_TOKEN_CHARACTERS = 1024
_MAX_TEXT_CHARACTERS = 1024
_MAX_ADDED_TOKENS = 2**15
_MAX_MERGES = 2**22
_MAX_PARTS = 64  # of one kind: normalizers, decoders, ...
_MAX_DEPTH = 4  # of sequences in sequences
_MAX_GROWTH = 64
_MAX_WORD_CHARACTERS = 1000
_UNICODE_GROWTH = 18  # of one character under NFKC, at most

Check = Callable[[Any, str], object]
"""Raises StrictJsonError if a value is not allowed; messages call the value by the second argument."""


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """What a checked file says about itself."""

    vocab_size: int
    """The highest token id plus one, added tokens included."""
    added_ids: Mapping[str, int]
    """The ids that the file gives its added tokens."""
    run_characters: int | None
    """The longest run of characters without a blank, or of blanks, that its regular expressions can take."""
    runs_cross_blanks: bool
    """Whether the whole text is one run, because an expression passes blanks, or blanks become other characters."""
    cuts: CutFacts | None
    """Where a long text may be cut; None if it has to stay whole."""


def parse_tokenizer_json(text: str | bytes) -> tuple[dict[str, Any], TokenizerFile]:
    """Parse and check a tokenizer.json. Returns its content, of which nothing was changed, and what it says.

    Raises:
        TokenizerError: it is no strict JSON, has an unknown part or field, or passes a limit.
    """
    try:
        if len(text) > MAX_FILE_BYTES:
            raise StrictJsonError(f"has {len(text):,} bytes, more than {MAX_FILE_BYTES:,}")
        return _parse(text.encode() if isinstance(text, str) else text)
    except UnicodeEncodeError:
        reason = "holds a lone surrogate"
    except StrictJsonError as error:
        reason = str(error)
    raise TokenizerError(f"tokenizer.json cannot be read: it {reason}; write it again with to_json or tokenizers")


def _parse(data: bytes) -> tuple[dict[str, Any], TokenizerFile]:
    if len(data) > MAX_FILE_BYTES:
        raise StrictJsonError(f"has {len(data):,} bytes, more than {MAX_FILE_BYTES:,}")
    if sum(map(data.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise StrictJsonError(f"holds more than {_MAX_VALUES:,} values")
    content = _object(parse_json(data), "the whole")
    _fields(content, _WHOLE, "")
    model = _object(content.get("model"), "model")
    ids = _check_model(model)
    added = _added_tokens(content.get("added_tokens", []))
    highest = max(max(ids, default=-1), max(added.values(), default=-1))
    parts = {name: _parts(content.get(name), name) for name in _KINDS}
    adding = [part for part in parts["post_processor"] if part["type"] != "ByteLevel"]
    if len(adding) > 1:  # Rust panics, because the first one takes the text apart
        raise StrictJsonError("has two post-processors that add tokens")
    for part in adding:
        _check_processor(part, highest)
    _check_growth(_text_growth([*parts["normalizer"], *parts["pre_tokenizer"]]), "normalizer and pre_tokenizer")
    _check_growth(_text_growth(parts["decoder"]), "decoder")
    regexes = [regex for part in chain(*parts.values()) if (regex := _regex_of(part)) is not None]
    runs = [regex.run_characters for regex in regexes if regex.run_characters is not None]
    crosses = any(regex.crosses_blanks for regex in regexes) or any(_changes_blanks(p) for p in parts["normalizer"])
    facts = TokenizerFile(highest + 1, added, min(runs, default=None), crosses, cut_facts(content, parts))
    return content, facts


# Values


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise StrictJsonError(f"has no object {where}")
    return value


def _flag(value: object, where: str) -> None:
    if not isinstance(value, bool):
        raise StrictJsonError(f"needs true or false for {where}")


def _text(value: object, where: str, least: int = 0, most: int = _MAX_TEXT_CHARACTERS) -> None:
    if not isinstance(value, str) or not least <= len(value) <= most:
        length = f"{least} to {most:,} characters" if most > 1 else "one character"
        raise StrictJsonError(f"needs a text of {length} for {where}")


def _whole(value: object, where: str, least: int = 0, most: int = MAX_TOKEN_ID) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise StrictJsonError(f"needs a whole number from {least} to {most:,} for {where}")


def _one_of(value: object, where: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise StrictJsonError(f"needs {', '.join(choices[:-1])} or {choices[-1]} for {where}")


def _or_null(value: object, where: str, check: Check) -> None:
    if value is not None:
        check(value, where)


def _any(value: object, where: str) -> None:
    """For a value that is checked elsewhere."""


def _token_and_id(value: object, where: str) -> None:
    if not isinstance(value, list) or len(value) != 2:
        raise StrictJsonError(f"needs a token and its id for {where}")
    _text(value[0], where)
    _whole(value[1], where)


def _pattern(value: object, where: str) -> None:
    if not isinstance(value, dict) or len(value) != 1 or not value.keys() <= {"String", "Regex"}:
        raise StrictJsonError(f"needs a String or a Regex for {where}")
    for kind, text in value.items():
        _text(text, f"{where}.{kind}", most=4096)
        if kind == "Regex":
            _read_regex(text, where)


def _read_regex(text: str, where: str) -> Regex:
    try:
        return read_regex(text)
    except RegexError as error:
        raise StrictJsonError(f"has the regular expression {text[:60]!r} for {where}, which {error}") from None


def _fields(value: Mapping[str, Any], allowed: Mapping[str, Check], where: str) -> None:
    for name, item in value.items():
        if name not in allowed:
            raise StrictJsonError(f"has the unknown field {(where + name)[:100]!r}")
        allowed[name](item, where + name)


# Parts: normalizers, pre-tokenizers, post-processors, decoders

_char = partial(_text, least=1, most=1)
_optional_flag = partial(_or_null, check=_flag)
_count = partial(_whole, most=2**31 - 1)
_FLAGS: dict[str, Check] = {"add_prefix_space": _optional_flag, "trim_offsets": _flag, "use_regex": _flag}
_METASPACE: dict[str, Check] = {
    "replacement": _char,
    "add_prefix_space": _optional_flag,
    "prepend_scheme": partial(_one_of, choices=("first", "never", "always")),
    "split": _flag,
    "str_rep": _text,
}
_BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_REPLACE: dict[str, Check] = {"pattern": _pattern, "content": _text}
_CLOSING: dict[str, Check] = {"sep": _token_and_id, "cls": _token_and_id}


def _charsmap(value: object, where: str) -> None:
    """Check a table of sentencepiece's normalization, into which Rust looks without checking its indices."""
    _text(value, where, most=2**24)
    try:
        data = base64.b64decode(value, validate=True)  # type: ignore[arg-type]  # a str
        trie_bytes = int.from_bytes(data[:4], "little")
        trie = memoryview(data)[4 : 4 + trie_bytes]
        texts = data[4 + trie_bytes :]
        if len(data) < 4 or len(trie) != trie_bytes or trie_bytes % 1024 or not trie_bytes:
            raise ValueError
        texts.decode("utf-8")
        _check_trie([int.from_bytes(trie[i : i + 4], "little") for i in range(0, trie_bytes, 4)], texts)
    except (ValueError, binascii.Error) as error:
        pass_interrupts_on(error)
        raise StrictJsonError(f"has a damaged table for {where}") from None


def _check_trie(units: list[int], texts: bytes) -> None:
    """Raise ValueError if a step through this double array (darts-clone's) leaves it, or leads outside `texts`.

    A unit has the byte that leads to it, and an offset. The next unit stands at the unit's place xor the offset, xor
    the next byte; its block of 256 has to exist. A unit that ends a key leads to the place of its text.
    """
    size = len(units)
    for place, unit in enumerate(units):
        if place and unit >> 31:
            continue  # a value, which no byte leads to
        base = place ^ ((unit >> 10) << ((unit & 512) >> 6))
        if base >= size:
            raise ValueError
        if place and unit & 256:
            start = units[base] & 0x7FFFFFFF
            if start > len(texts) or (start < len(texts) and texts[start] & 0xC0 == 0x80):
                raise ValueError


def _processor_pieces(value: object, where: str) -> None:
    if not isinstance(value, list) or len(value) > _MAX_PARTS:
        raise StrictJsonError(f"needs a list of at most {_MAX_PARTS} pieces for {where}")
    sequences = []
    for piece in value:
        if not isinstance(piece, dict) or len(piece) != 1 or not piece.keys() <= {"Sequence", "SpecialToken"}:
            raise StrictJsonError(f"needs a Sequence or a SpecialToken in {where}")
        for kind, fields in piece.items():
            _fields(_object(fields, where), {"id": _text, "type_id": _count}, f"{where}.")
            if kind == "Sequence":
                _one_of(fields.get("id"), f"{where}.id", ("A", "B"))
                sequences.append(fields["id"])
    if len(set(sequences)) < len(sequences):
        raise StrictJsonError(f"has a sequence twice in {where}")


def _special_tokens(value: object, where: str) -> None:
    for name, token in _object(value, where).items():
        place = f"{where}, {shown(name)}"
        if not isinstance(token, dict) or token.keys() != {"id", "ids", "tokens"}:
            raise StrictJsonError(f"needs id, ids and tokens for {place}")
        ids, tokens = token["ids"], token["tokens"]
        if not (isinstance(ids, list) and isinstance(tokens, list) and len(ids) == len(tokens) <= _MAX_PARTS):
            raise StrictJsonError(f"needs as many ids as tokens, at most {_MAX_PARTS}, for {place}")
        for token_id, text in zip(ids, tokens, strict=True):
            _token_and_id([text, token_id], place)


_KINDS: dict[str, dict[str, dict[str, Check]]] = {
    "normalizer": {
        "BertNormalizer": {
            "clean_text": _flag,
            "handle_chinese_chars": _flag,
            "strip_accents": _optional_flag,
            "lowercase": _flag,
        },
        **{name: {} for name in ("ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "StripAccents")},
        "Precompiled": {"precompiled_charsmap": _charsmap},
        "Prepend": {"prepend": _text},
        "Replace": _REPLACE,
        "Sequence": {"normalizers": _any},
        "Strip": {"strip_left": _flag, "strip_right": _flag},
    },
    "pre_tokenizer": {
        **{name: {} for name in ("BertPreTokenizer", "UnicodeScripts", "Whitespace", "WhitespaceSplit")},
        "ByteLevel": _FLAGS,
        "CharDelimiterSplit": {"delimiter": _char},
        "Digits": {"individual_digits": _flag},
        "FixedLength": {"length": partial(_whole, least=1)},
        "Metaspace": _METASPACE,
        "Punctuation": {"behavior": partial(_one_of, choices=_BEHAVIORS)},
        "Sequence": {"pretokenizers": _any},
        "Split": {"pattern": _pattern, "behavior": partial(_one_of, choices=_BEHAVIORS), "invert": _flag},
    },
    "post_processor": {
        "BertProcessing": _CLOSING,
        "ByteLevel": _FLAGS,
        "RobertaProcessing": {**_CLOSING, **_FLAGS},
        "Sequence": {"processors": _any},
        "TemplateProcessing": {
            "single": _processor_pieces,
            "pair": _processor_pieces,
            "special_tokens": _special_tokens,
        },
    },
    "decoder": {
        "BPEDecoder": {"suffix": _text},
        "ByteFallback": {},
        "ByteLevel": _FLAGS,
        "CTC": {"pad_token": _text, "word_delimiter_token": _text, "cleanup": _flag},
        "Fuse": {},
        "Metaspace": _METASPACE,
        "Replace": _REPLACE,
        "Sequence": {"decoders": _any},
        "Strip": {
            "content": _char,
            "start": partial(_whole, most=_MAX_TEXT_CHARACTERS),
            "stop": partial(_whole, most=_MAX_TEXT_CHARACTERS),
        },
        "WordPiece": {"prefix": _text, "cleanup": _flag},
    },
}
"""The parts of each place in the file, and the fields of each part beside its `type`."""

_PARTS_OF_SEQUENCE = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}

_MAY_MISS = {*_FLAGS, *_METASPACE, "behavior"}
"""Fields that files of old versions lack; Rust has defaults for them."""

Part = Mapping[str, Any]


def _parts(value: object, place: str, depth: int = 0) -> list[Part]:
    """The parts at a `place` of the file, checked, in the order in which they work; sequences are taken apart."""
    if value is None and depth == 0:
        return []
    part = _object(value, place)
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _KINDS[place]:
        raise StrictJsonError(f"has a {place} of the unknown type {shown(kind)}")
    _fields({name: item for name, item in part.items() if name != "type"}, _KINDS[place][kind], f"{place}.")
    if missing := _KINDS[place][kind].keys() - part.keys() - _MAY_MISS:
        raise StrictJsonError(f"has a {kind} without {min(missing)}")
    if kind != "Sequence":
        return [part]
    if depth == _MAX_DEPTH:
        raise StrictJsonError(f"has sequences of sequences deeper than {_MAX_DEPTH} for {place}")
    inner = part.get(_PARTS_OF_SEQUENCE[place])
    if not isinstance(inner, list) or len(inner) > _MAX_PARTS:
        raise StrictJsonError(f"needs a list of at most {_MAX_PARTS} parts for {place}")
    parts = [found for item in inner for found in _parts(item, place, depth + 1)]
    if len(parts) > _MAX_PARTS:
        raise StrictJsonError(f"has more than {_MAX_PARTS} parts for {place}")
    return parts


def _regex_of(part: Part) -> Regex | None:
    pattern = part.get("pattern")
    text = pattern.get("Regex") if isinstance(pattern, dict) else None
    return None if text is None else read_regex(text)


def _text_growth(parts: list[Part]) -> float:
    """How many times longer these parts can make a text. Normalization by Unicode's tables is not counted."""
    growth = 1.0
    for part in parts:
        match part["type"]:
            case "Prepend":
                growth *= 1 + len(part["prepend"])
            case "Metaspace":
                growth *= 2
            case "ByteLevel":
                growth *= 2
            case "BertNormalizer":
                growth *= 3
            case "Replace":
                regex, new = _regex_of(part), len(part["content"])
                least = len(part["pattern"].get("String", "")) if regex is None else regex.least_characters
                growth *= max(1.0, new / least) if least else 1 + new
            case "Precompiled":
                texts = base64.b64decode(part["precompiled_charsmap"])
                start = 4 + int.from_bytes(texts[:4], "little")
                longest = max(map(len, texts[start:].decode("utf-8").split("\0")))
                growth *= max(1.0, longest / _UNICODE_GROWTH)
    return growth


def _changes_blanks(part: Part) -> bool:
    """Whether a normalizer may turn blanks into other characters."""
    return part["type"] in ("ByteLevel", "Precompiled") or (part["type"] == "Replace" and not part["content"].isspace())


def _check_growth(growth: float, where: str) -> None:
    if growth > _MAX_GROWTH:
        raise StrictJsonError(f"can make a text more than {_MAX_GROWTH} times as long by its {where}")


def _check_processor(part: Part, highest: int) -> None:
    """Check that the tokens which a post-processor puts into a text exist."""
    ids = [part[name][1] for name in ("sep", "cls") if name in part]
    named = part.get("special_tokens", {})
    ids += [token_id for token in named.values() for token_id in token["ids"]]
    if ids and max(ids) > highest:
        raise StrictJsonError(f"puts the id {max(ids)} into texts, but its highest id is {highest}")
    for piece in [*part.get("single", ()), *part.get("pair", ())]:
        name = piece.get("SpecialToken", {}).get("id")
        if name is not None and name not in named:
            raise StrictJsonError(f"puts the token {name[:60]!r} into texts without an id")


# Added tokens

_ADDED: dict[str, Check] = {
    "id": _whole,
    "content": partial(_text, most=_MAX_TOKEN_CHARACTERS),
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), _flag),
}


def _added_tokens(value: object) -> dict[str, int]:
    if not isinstance(value, list) or len(value) > _MAX_ADDED_TOKENS:
        raise StrictJsonError(f"needs a list of at most {_MAX_ADDED_TOKENS:,} added_tokens")
    for token in value:
        _fields(_object(token, "in added_tokens"), _ADDED, "added_tokens.")
        if missing := _ADDED.keys() - token.keys():
            raise StrictJsonError(f"has an added token without {min(missing)}")
    # The library ignores tokens without content.
    return {token["content"]: token["id"] for token in value if token["content"]}


# Models


def _check_vocab(vocab: object) -> list[int]:
    """Check a vocabulary of tokens and ids; returns the ids."""
    if not isinstance(vocab, dict):
        raise StrictJsonError("needs an object for model.vocab")
    ids = list(vocab.values())
    if set(map(type, ids)) - {int}:
        raise StrictJsonError("has an id in model.vocab that is no whole number")
    if ids and not 0 <= min(ids) <= max(ids) <= MAX_TOKEN_ID:
        raise StrictJsonError(f"has an id in model.vocab that is not from 0 to {MAX_TOKEN_ID:,}")
    if len(set(ids)) < len(ids):
        raise StrictJsonError("gives two tokens of model.vocab the same id")
    _check_lengths(vocab)
    return ids


def _check_lengths(tokens: Mapping[str, int] | list[str]) -> None:
    if max(map(len, tokens), default=0) > _MAX_TOKEN_CHARACTERS:
        raise StrictJsonError(f"has a token in model.vocab of more than {_MAX_TOKEN_CHARACTERS:,} characters")


def _check_pieces(model: Mapping[str, Any]) -> list[int]:
    """Check a Unigram vocabulary, a list of pieces and scores; returns the ids."""
    vocab, unknown = model.get("vocab"), model.get("unk_id")
    is_list = isinstance(vocab, list) and not set(map(type, vocab)) - {list} and not set(map(len, vocab)) - {2}
    if not isinstance(vocab, list) or not is_list or len(vocab) > MAX_TOKEN_ID:
        raise StrictJsonError(f"needs a list of at most {MAX_TOKEN_ID:,} pieces and scores for model.vocab")
    pieces, scores = [piece for piece, _ in vocab], [score for _, score in vocab]
    if set(map(type, pieces)) - {str} or set(map(type, scores)) - {int, float}:
        raise StrictJsonError("has a wrong piece or score in model.vocab")
    if not all(-1e6 <= score <= 1e6 for score in scores):
        raise StrictJsonError("has a score in model.vocab that is not from -1,000,000 to 1,000,000")
    _check_lengths(pieces)
    if unknown is not None:
        _whole(unknown, "model.unk_id", most=len(vocab) - 1)
    return list(range(len(vocab)))


def _check_merges(merges: object, prefix: str) -> None:
    """Check the merges of BPE. Rust itself refuses wrong types, and a merge of tokens that do not exist."""
    if not isinstance(merges, list) or len(merges) > _MAX_MERGES:
        raise StrictJsonError(f"needs a list of at most {_MAX_MERGES:,} model.merges")
    for merge in merges if prefix else ():
        # Rust cuts the prefix off the second token without looking at it.
        second = merge.partition(" ")[2] if isinstance(merge, str) else merge[-1] if isinstance(merge, list) else None
        if not isinstance(second, str) or not second.startswith(prefix):
            raise StrictJsonError(f"has a merge whose second token does not begin with {prefix[:60]!r}")


def _no_dropout(value: object, where: str) -> None:
    if value not in (None, 0):
        raise StrictJsonError(f"draws tokens at random ({where} is {shown(value)}); set it to null")


_optional_text = partial(_or_null, check=_text)
_MODELS: dict[str, dict[str, Check]] = {
    "BPE": {
        "dropout": _no_dropout,
        **dict.fromkeys(("unk_token", "continuing_subword_prefix", "end_of_word_suffix"), _optional_text),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), _flag),
        "vocab": _any,
        "merges": _any,
    },
    "WordPiece": {
        "unk_token": _text,
        "continuing_subword_prefix": _text,
        "max_input_chars_per_word": partial(_whole, most=_MAX_WORD_CHARACTERS),
        "vocab": _any,
    },
    "WordLevel": {"unk_token": _text, "vocab": _any},
    "Unigram": {"unk_id": _any, "byte_fallback": _flag, "vocab": _any},
}


def _check_model(model: Mapping[str, Any]) -> list[int]:
    """Check the model; returns the ids of its tokens."""
    kind = model_kind(model)
    if not isinstance(kind, str) or kind not in _MODELS:
        raise StrictJsonError(f"has a model of the unknown type {shown(kind)}")
    _fields({name: item for name, item in model.items() if name != "type"}, _MODELS[kind], "model.")
    if kind == "Unigram":
        return _check_pieces(model)
    if kind == "BPE":
        _check_merges(model.get("merges"), model.get("continuing_subword_prefix") or "")
    return _check_vocab(model.get("vocab"))


def model_kind(model: Mapping[str, Any]) -> object:
    """The kind of a file's model, also of one without a type, as files before tokenizers 0.10 have it."""
    if "type" in model:
        return model["type"]
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


# The whole file

_TRUNCATION: dict[str, Check] = {
    "direction": partial(_one_of, choices=("Left", "Right")),
    "max_length": _count,
    "strategy": partial(_one_of, choices=("LongestFirst", "OnlyFirst", "OnlySecond")),
    "stride": _count,
}


def _truncation(value: object, where: str) -> None:
    _fields(_object(value, where), _TRUNCATION, f"{where}.")


def _strategy(value: object, where: str) -> None:
    if isinstance(value, dict) and value.keys() == {"Fixed"}:
        _count(value["Fixed"], where)
    elif value != "BatchLongest":
        raise StrictJsonError(f"needs BatchLongest or Fixed for {where}")


_PADDING: dict[str, Check] = {
    "strategy": _strategy,
    "direction": partial(_one_of, choices=("Left", "Right")),
    "pad_to_multiple_of": partial(_or_null, check=partial(_whole, least=1)),
    "pad_id": _whole,
    "pad_type_id": _count,
    "pad_token": _text,
}


def _padding(value: object, where: str) -> None:
    _fields(_object(value, where), _PADDING, f"{where}.")


def _version(value: object, where: str) -> None:
    if value != "1.0":
        raise StrictJsonError(f"has the {where} {shown(value)}, and only '1.0' is known")


_WHOLE: dict[str, Check] = {
    "version": _version,
    "truncation": partial(_or_null, check=_truncation),
    "padding": partial(_or_null, check=_padding),
    "added_tokens": _any,
    **dict.fromkeys(_KINDS, _any),
    "model": _any,
}
