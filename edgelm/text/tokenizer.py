"""Text to token ids and back, equal to transformers' fast tokenizers, and streaming that never splits a character."""

import codecs
import json
import operator
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from edgelm.bundle.folder import Bundle
from edgelm.errors import BundleError, PromptError, TokenizerError
from edgelm.text.tokenizer_files import load_backend, part_state, rust_errors

# transformers' clean_up_tokenization: these replacements, one after the other over the whole text.
_CLEANUP = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")]
_CLEANUP += [(" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]
# The same as decoder steps, so that a tokenizer.json alone can carry them.
_CLEANUP_STEPS: list[dict[str, Any]] = [{"type": "Fuse"}]
_CLEANUP_STEPS += [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in _CLEANUP]

# Decoders that treat every token by itself, apart from knowing whether it is the first.
_PIECEWISE = {"WordPiece", "Metaspace", "Replace", "Strip", "Fuse"}

# GPT-2 writes a byte as one printable character: itself, or the next free one from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in _PRINTABLE)}


class Tokenizer:
    """Text to token ids and back; equal to transformers' fast tokenizer on any text."""

    def __init__(self, backend: Backend, *, clean_up_tokenization_spaces: bool = False) -> None:
        """Take over `backend` (it is changed, not copied): truncation and padding go off, as transformers does.

        Raises:
            TokenizerError: the backend's parts cannot be read.
        """
        with rust_errors(TokenizerError, "the tokenizer's parts cannot be read", "give a tokenizers.Tokenizer"):
            backend.no_truncation()
            backend.no_padding()
            decoder = part_state(backend.decoder)
            steps = decoder.get("decoders", [])
            if len(steps) == len(_CLEANUP_STEPS) + 1 and steps[1:] == _CLEANUP_STEPS:
                # to_json wrote the clean-up as decoder steps; done here instead, streams can follow it.
                clean_up_tokenization_spaces, decoder = True, steps[0]
                inner = decoders.Fuse()  # any decoder: it takes the kind of the state it is given
                inner.__setstate__(json.dumps(decoder).encode())
                backend.decoder = inner
            self._closing = _closing_tokens(part_state(backend.post_processor))
            self._size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            self._special = _skipped_tokens(backend)
        self._backend, self._clean_up = backend, clean_up_tokenization_spaces
        self._decoder_kind = _decoder_kind(decoder)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Read tokenizer.json, vocab.json with merges.txt, or vocab.txt, and the settings transformers would honour.

        No code named by the folder (`auto_map`) is ever run.

        Raises:
            TokenizerError: no such folder or files, a damaged or too large file, or a class edgelm does not know.
        """
        backend, clean_up = load_backend(Path(folder))
        return cls(backend, clean_up_tokenization_spaces=clean_up)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Build from the content of one tokenizer.json, and from nothing else: what `to_json` wrote comes back equal.

        Raises:
            TokenizerError: the text is no tokenizer.json.
        """
        with rust_errors(TokenizerError, "tokenizer.json cannot be read", "write it again with to_json or tokenizers"):
            backend = Backend.from_str(text)
        return cls(backend)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> "Tokenizer":
        """Read a bundle's tokenizer.json, which says everything; the files beside it are for other tools.

        Raises:
            BundleError: the file is not UTF-8 text, or has more tokens than the graph.
            TokenizerError: the file cannot be read.
        """
        try:
            tokenizer = cls.from_json(bundle.file("tokenizer.json").read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise BundleError(f"tokenizer.json of {os.fspath(bundle.path)!r} is not UTF-8 text") from None
        vocab_size = bundle.manifest.architecture.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise BundleError(
                f"the tokenizer of {os.fspath(bundle.path)!r} knows {tokenizer.vocab_size} tokens but its graph only "
                f"{vocab_size}: they do not belong together"
            )
        tokenizer.pad_vocabulary(vocab_size)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """The highest token id plus one, added tokens included: what a graph must at least have."""
        return self._size

    def pad_vocabulary(self, size: int) -> None:
        """Take ids up to `size` - 1: a graph's vocabulary is often padded; ids without a token decode to nothing."""
        self._size = max(self._size, size)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids transformers' `tokenizer(text).input_ids` has.

        Raises:
            PromptError: `text` is no str, or holds a lone surrogate.
        """
        _check_text(text)
        with rust_errors(PromptError, "the tokenizer cannot encode this text", "shorten it or change it"):
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Like `encode`, without the special tokens that close a text (BERT's [SEP]): the model is to go on with it.

        Raises:
            PromptError: `text` is no str, or holds a lone surrogate.
        """
        ids = self.encode(text)
        return ids[: len(ids) - self._closing]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text transformers' `tokenizer.decode(ids)` gives; ids without a token give nothing.

        Raises:
            PromptError: an id is no whole number, or outside the vocabulary.
        """
        try:
            checked = [self._check_id(token_id) for token_id in ids]
        except TypeError:
            raise PromptError(f"token ids must come as a list of whole numbers, got {_show(ids)}") from None
        with rust_errors(PromptError, "the tokenizer cannot decode these ids", "give ids that this model produced"):
            text: str = self._backend.decode(checked, skip_special_tokens=skip_special_tokens)
        for old, new in _CLEANUP if self._clean_up else ():
            text = text.replace(old, new)
        return text

    def stream(self, *, skip_special_tokens: bool = False) -> "StreamDecoder":
        """Return a decoder for ids that come one by one; its texts join to `decode` of the same ids and option."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """Return the id of exactly this token, or None; PromptError where `token` is no text."""
        _check_text(token)
        found: int | None = self._backend.token_to_id(token)
        return found

    def to_json(self) -> str:
        """Return the content of a tokenizer.json that holds everything: `from_json` of it, or a folder of it, is equal.

        Raises:
            TokenizerError: `split_special_tokens` is on, the one setting that needs a second file: use `save`.
        """
        if self._backend.encode_special_tokens:
            raise TokenizerError("tokenizer.json cannot hold split_special_tokens=true; use save(folder) instead")
        return self._json()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, and a tokenizer_config.json that keeps a config.json beside it from changing anything.

        Raises:
            TokenizerError: the files cannot be written.
        """
        split = self._backend.encode_special_tokens
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": split}
        try:
            Path(folder, "tokenizer.json").write_text(self._json(), encoding="utf-8", newline="\n")
            Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8", newline="\n")
        except OSError as exc:
            raise TokenizerError(f"cannot write the tokenizer to {folder} ({exc.strerror}); choose another") from None

    def _json(self) -> str:
        data = json.loads(self._backend.to_str())
        if (data["pre_tokenizer"] or {}).get("add_prefix_space"):
            # transformers turns a bare add_prefix_space off again; one inside a sequence it leaves alone.
            data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [data["pre_tokenizer"]]}
        if self._clean_up:
            # Without a decoder tokens are joined by spaces: WordPiece does that too, given a prefix no token has.
            decoder = data["decoder"] or {"type": "WordPiece", "prefix": "\0no token\0", "cleanup": False}
            data["decoder"] = {"type": "Sequence", "decoders": [decoder, *_CLEANUP_STEPS]}
        for token in data["added_tokens"]:
            token["special"] = token["content"] in self._special
        return json.dumps(data, ensure_ascii=False)

    def _check_id(self, token_id: object) -> int:
        try:
            # A bool counts as a number in Python, but a token id it never is.
            number = -1 if isinstance(token_id, bool) else operator.index(token_id)  # type: ignore[arg-type]
        except TypeError:
            number = -1
        if not 0 <= number < self._size:
            raise PromptError(
                f"token id {_show(token_id)} is outside the vocabulary; ids go from 0 to {self._size - 1}"
            )
        return number

    def _token(self, token_id: int, skip_special_tokens: bool) -> str | None:
        token: str | None = self._backend.id_to_token(self._check_id(token_id))
        return None if skip_special_tokens and token in self._special else token

    def _join(self, tokens: list[str]) -> str:
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(tokens))


class StreamDecoder:
    """Turns ids into text as they come; made by `Tokenizer.stream`, good for one text after another."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._restart()

    def _restart(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._tokens: list[str] = []
        self._held = [""] * len(_CLEANUP)

    def push(self, token_id: int) -> str:
        """Return the text that is now certain, never half a character.

        A decoder of an unusual kind (byte fallback, CTC) makes nothing certain before `flush`.

        Raises:
            PromptError: the id is outside the vocabulary.
        """
        token = self._tokenizer._token(token_id, self._skip)
        return "" if token is None else self._clean(self._piece(token), last=False)

    def flush(self) -> str:
        """Return the rest, an unfinished character as U+FFFD; the next `push` begins a new text."""
        text = self._utf8.decode(b"", final=True)
        if self._tokens:
            text += self._tokenizer._join(self._tokens)
        text = self._clean(text, last=True)
        self._restart()
        return text

    def _piece(self, token: str) -> str:
        kind, join = self._tokenizer._decoder_kind, self._tokenizer._join
        if kind == "bytes":
            # As in Rust: a token with any character from outside the byte alphabet stands for itself.
            known = all(char in _BYTE_OF for char in token)
            return self._utf8.decode(bytes(_BYTE_OF[char] for char in token) if known else token.encode())
        if kind == "whole":
            self._tokens.append(token)
            return ""
        first, self._first = self._first, False
        return join([token]) if first else join(["a", token])[len(join(["a"])) :]

    def _clean(self, text: str, *, last: bool) -> str:
        """Apply the clean-up; each replacement holds back an ending that may be the start of its pattern."""
        if not self._tokenizer._clean_up:
            return text
        for i, (old, new) in enumerate(_CLEANUP):
            *done, rest = (self._held[i] + text).split(old)
            keep = 0 if last else next(n for n in range(len(old) - 1, -1, -1) if rest.endswith(old[:n]))
            cut = len(rest) - keep
            self._held[i] = rest[cut:]
            text = new.join([*done, rest[:cut]])
        return text


def _decoder_kind(state: dict[str, Any]) -> str:
    """Tell how a stream can follow a decoder: "bytes", "pieces" (token by token), or "whole" (only at the end)."""
    steps = state["decoders"] if state.get("type") == "Sequence" else [state] if state else []
    kinds = [step["type"] for step in steps]
    while len(kinds) > 1 and kinds[-1] == "Fuse":
        kinds.pop()
    if kinds == ["ByteLevel"]:
        return "bytes"
    return "pieces" if _PIECEWISE.issuperset(kinds) and ("Fuse" not in kinds or kinds == ["Fuse"]) else "whole"


def _closing_tokens(state: dict[str, Any]) -> int:
    """Count the special tokens that a post-processor puts after a single text."""
    match state.get("type"):
        case "Sequence":
            return sum(_closing_tokens(step) for step in state["processors"])
        case "BertProcessing" | "RobertaProcessing":
            return 1
        case "TemplateProcessing":
            pieces = state["single"]
            last = max((i for i, piece in enumerate(pieces) if "Sequence" in piece), default=-1)
            names = [piece["SpecialToken"]["id"] for piece in pieces[last + 1 :]]
            return sum(len(state["special_tokens"][name]["ids"]) for name in names)
    return 0


def _skipped_tokens(backend: Backend) -> set[str]:
    """Return the tokens that skip_special_tokens drops; asked by trial, as the flags alone do not always tell."""
    decoder, backend.decoder = backend.decoder, None
    added = backend.get_added_tokens_decoder()
    # Without a decoder two tokens are joined by a space, so only skipped ones can give nothing.
    skipped = {token.content for i, token in added.items() if backend.decode([i, i], skip_special_tokens=True) == ""}
    backend.decoder = decoder
    return skipped


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise PromptError(f"a text must be a str, got {_show(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise PromptError(f"the text has a lone surrogate, {text[exc.start]!r} at {exc.start}; remove it") from None


def _show(value: object) -> str:
    # Python refuses to print integers of more than 4,300 digits.
    return f"of {value.bit_length()} bits" if isinstance(value, int) and abs(value) >> 64 else reprlib.repr(value)
