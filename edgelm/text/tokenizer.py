"""Text becomes token ids and token ids become text, as with transformers' fast tokenizers; read from a tokenizer.json.

The build side (`edgelm_export.source.tokenizer`) makes that file of whatever a checkpoint holds.
"""

import json
import operator
import os
import re
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from edgelm.bundle.folder import Bundle
from edgelm.bundle.small_files import SmallFileError
from edgelm.bundle.strict_json import StrictJsonError, parse_json
from edgelm.errors import BundleError, PromptError, TokenizerError, pass_interrupts_on, shown
from edgelm.text.backend import build_backend
from edgelm.text.decoder_steps import CLEAN_UP, Strip, decoder_steps
from edgelm.text.long_text import PIECE_CHARACTERS, LongTexts
from edgelm.text.rust import rust_errors
from edgelm.text.stream_decoder import StreamDecoder
from edgelm.text.tokenizer_file import MAX_FILE_BYTES, TokenizerFile, parse_tokenizer_json

MAX_TEXT_CHARACTERS = 2**24
"""The longest text; most tokenizers take hundreds of bytes for each character (docs/reliability.md)."""

# The clean-up as decoder steps, with which a tokenizer.json alone can carry it.
_CLEAN_UP_STEPS: list[dict[str, Any]] = [{"type": "Fuse"}]
_CLEAN_UP_STEPS += [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in CLEAN_UP]

_CONFIG = "tokenizer_config.json"
_MAX_CONFIG_BYTES = 2**20
_SAVED = {"tokenizer_class": "PreTrainedTokenizerFast"}
_RUNS = re.compile(r"\s+|\S+")


class Tokenizer:
    """Text to token ids and back, equal to transformers' fast tokenizer on any text."""

    def __init__(
        self, backend: Backend, *, clean_up_tokenization_spaces: bool = False, file: TokenizerFile | None = None
    ) -> None:
        """Take over a tokenizer of the `tokenizers` library.

        Args:
            backend: is changed, not copied: truncation and padding are turned off, as in transformers.
            clean_up_tokenization_spaces: whether decoded text gets transformers' clean-up of spaces before marks.
            file: the facts of the file that `backend` was made of, if it was made of a checked one.

        Raises:
            TokenizerError: the parts of `backend` cannot be read, or its decoder is of an unknown type.
        """
        with rust_errors(TokenizerError, "the tokenizer's parts cannot be read", "give a tokenizers.Tokenizer"):
            backend.no_truncation()
            backend.no_padding()
            decoder = _part_state(backend.decoder)
            steps = decoder.get("decoders", [])
            if len(steps) == len(_CLEAN_UP_STEPS) + 1 and steps[1:] == _CLEAN_UP_STEPS:
                # to_json wrote the clean-up as decoder steps; taken out of the decoder, streams can follow it.
                clean_up_tokenization_spaces, decoder = True, steps[0]
                inner = decoders.Fuse()  # any decoder: __setstate__ gives it the kind that the state names
                inner.__setstate__(json.dumps(decoder).encode())
                backend.decoder = inner
            self._closing = _closing_tokens(_part_state(backend.post_processor))
            self._size: int = _vocab_size(backend) if file is None else file.vocab_size
            self._special = _skipped_tokens(backend)
            self._steps = decoder_steps(decoder, clean_up=clean_up_tokenization_spaces)
            self._beyond: dict[int, str] = {}  # tokens with ids that the model does not know
        self._backend, self._clean_up, self._file = backend, clean_up_tokenization_spaces, file
        self._long_texts = None if file is None or file.cuts is None else LongTexts(backend, file.cuts)
        # Rust panics where such a decoder meets a short token, and a panic writes to stderr.
        self._may_panic = any(isinstance(step, Strip) and step.stop for step in self._steps)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Build a tokenizer from the content of a tokenizer.json alone; what `to_json` wrote comes back equal.

        Args:
            text: content of the file.

        Raises:
            TokenizerError: `text` is not a tokenizer.json, or `edgelm.text.tokenizer_file` refuses it.
        """
        content, file = parse_tokenizer_json(text)
        return cls(build_backend(text, content, file), file=file)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> "Tokenizer":
        """Read the tokenizer.json of a bundle, and `split_special_tokens` in the tokenizer_config.json beside it.

        Raises:
            BundleError: a file is too large, is not UTF-8 text, or is no JSON.
            TokenizerError: tokenizer.json cannot be read.
        """
        try:
            text = bundle.read_file("tokenizer.json", MAX_FILE_BYTES).decode("utf-8")
        except (SmallFileError, UnicodeDecodeError) as error:
            reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
            raise BundleError(f"tokenizer.json of {os.fspath(bundle.path)!r} {reason}") from None
        tokenizer = cls.from_json(text)
        if _CONFIG in bundle.manifest.files:
            try:
                config = parse_json(bundle.read_file(_CONFIG, _MAX_CONFIG_BYTES))
            except (StrictJsonError, SmallFileError) as error:
                raise BundleError(f"{_CONFIG} of {os.fspath(bundle.path)!r} {error}") from None
            tokenizer._backend.encode_special_tokens = config == {**_SAVED, "split_special_tokens": True}
        tokenizer.limit_vocabulary(bundle.manifest.architecture.vocab_size)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """The highest token id plus one, added tokens included; or the size that `limit_vocabulary` was given."""
        return self._size

    def vocabulary(self) -> dict[str, int]:
        """Every token with its id, added tokens included."""
        known: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return known

    @property
    def added_tokens(self) -> dict[str, int]:
        """The tokens that are found in a text before it is cut into others, special or not, with their ids."""
        return {token.content: token_id for token_id, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def special_tokens(self) -> dict[str, int]:
        """The added tokens that are marked as special, such as the end of a text, with their ids."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.content in self._special}

    def normalized(self, text: str) -> str:
        """`text` as the tokenizer's normalizer leaves it, in which some added tokens are looked for."""
        check_text(text)
        normalizer = self._backend.normalizer
        with rust_errors(PromptError, "the tokenizer cannot normalize this text", "shorten it or change it"):
            return text if normalizer is None else str(normalizer.normalize_str(text))

    def limit_vocabulary(self, size: int) -> list[str]:
        """Accept the ids from 0 to `size` - 1 only, which a graph knows, and return the tokens with higher ids.

        A graph's vocabulary is often padded; ids without a token decode to nothing. A tokenizer may also have tokens
        that were added without resizing the model; a text that contains one of them is then refused.
        """
        known = self.vocabulary() if self._size > size else {}
        self._size = size
        self._beyond = {token_id: token for token, token_id in known.items() if token_id >= size}
        return [token for _, token in sorted(self._beyond.items())]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids that transformers' `tokenizer(text).input_ids` holds.

        Raises:
            PromptError: `text` is not a str, holds a lone surrogate, has more than `MAX_TEXT_CHARACTERS`, has a token
                beyond the model's vocabulary, or has a run of characters that would take this tokenizer too long.
        """
        return self._known(self._encode(text, add_special_tokens=add_special_tokens))

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a text that the model is to continue: `encode` without the special tokens at the end (BERT's [SEP]).

        Raises PromptError as `encode`. The model need not know the tokens that are left out.
        """
        ids = self._encode(text, add_special_tokens=True)
        return self._known(ids[: len(ids) - self._closing])

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        check_text(text)
        self._check_length(text)
        with rust_errors(PromptError, "the tokenizer cannot encode this text", "shorten it or change it"):
            if self._long_texts is None or len(text) <= PIECE_CHARACTERS:
                return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
            ids = self._long_texts.encode(text)
            around = self._backend.encode("", add_special_tokens=add_special_tokens).ids
        opening = len(around) - self._closing if add_special_tokens else 0
        return [*around[:opening], *ids, *around[opening:]]

    def _known(self, ids: list[int]) -> list[int]:
        """`ids`, after a check that the model knows each of them."""
        if self._beyond and not self._beyond.keys().isdisjoint(ids):
            first = next(token_id for token_id in ids if token_id in self._beyond)
            raise PromptError(
                f"the text needs the token {self._beyond[first]!r} (id {first}), but this model knows only the ids 0 "
                f"to {self._size - 1}: leave it out of the text"
            )
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text that transformers' `tokenizer.decode(ids)` gives; ids without a token are left out.

        Raises:
            PromptError: an id is not a whole number, or is outside the vocabulary.
        """
        checked = self._check_ids(ids)
        if self._may_panic:
            stream = self.stream(skip_special_tokens=skip_special_tokens)
            return "".join(map(stream.push, checked)) + stream.flush()
        with rust_errors(PromptError, "the tokenizer cannot decode these ids", "give ids that this model produced"):
            text: str = self._backend.decode(checked, skip_special_tokens=skip_special_tokens)
        for old, new in CLEAN_UP if self._clean_up else ():
            text = text.replace(old, new)
        return text

    def stream(
        self, after: Sequence[int] = (), *, skip_special_tokens: bool = False, kept: Collection[str] = ()
    ) -> "StreamDecoder":
        """Return a decoder for ids that come one by one.

        Its texts join to `decode(after + ids)[len(decode(after)):]`, with the same `skip_special_tokens`.

        Args:
            after: ids before those that will come, e.g. of a prompt.
            skip_special_tokens: whether special tokens have no text.
            kept: special tokens that have text in any case.

        Raises:
            PromptError: `after` cannot be decoded.
        """
        token_of = partial(self._token, skip_special_tokens=skip_special_tokens, kept=kept)
        return StreamDecoder(token_of, self._steps, self._check_ids(after))

    def spellings(self) -> list[bytes]:
        """The bytes for which each token stands in the middle of a text, by its id; none for special tokens.

        Raises TokenizerError if they depend on the tokens beside it, as with WordPiece.
        """
        if not all(step.is_local for step in self._steps):
            raise TokenizerError("the text of this tokenizer's tokens depends on the tokens beside them")
        tokens = {i: self._token(i, skip_special_tokens=True) for i in range(self._size)}
        stream = StreamDecoder({**tokens, -1: "a"}.__getitem__, self._steps, [-1])
        spelled = []
        for i, token in tokens.items():
            pieces = (step.bytes_of(token) for step in self._steps) if token is not None else ()
            data = next((piece for piece in pieces if piece is not None), None)
            spelled.append((stream.push(i) + stream.flush()).encode() if data is None else data)
        return spelled

    def token_id(self, token: str) -> int | None:
        """Return the id of exactly this token, or None; PromptError where `token` is not a str."""
        check_text(token)
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def to_json(self) -> str:
        """Return the content of a tokenizer.json that holds every setting: `from_json` gives an equal tokenizer.

        Raises:
            TokenizerError: `split_special_tokens` is on, the one setting that needs a second file; use `save`. Or
                `from_json` would refuse the file.
        """
        if self._backend.encode_special_tokens:
            raise TokenizerError("tokenizer.json cannot hold split_special_tokens=true; use save(folder) instead")
        return self._json()

    def backend_json(self) -> str:
        """The tokenizer of the `tokenizers` library as JSON: its vocabulary and its decoder, for other libraries.

        Raises TokenizerError if decoded text is changed after that (`clean_up_tokenization_spaces`).
        """
        if self._clean_up:
            raise TokenizerError("this tokenizer removes blanks from decoded text (clean_up_tokenization_spaces)")
        with rust_errors(TokenizerError, "the tokenizer cannot be written", "give another tokenizer"):
            return str(self._backend.to_str())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, and a tokenizer_config.json that keeps transformers from looking into a config.json.

        Raises:
            TokenizerError: the files cannot be written, or `of_bundle` would refuse them.
        """
        config = {**_SAVED, "split_special_tokens": self._backend.encode_special_tokens}
        try:
            Path(folder, "tokenizer.json").write_text(self._json(), encoding="utf-8", newline="\n")
            Path(folder, _CONFIG).write_text(json.dumps(config), encoding="utf-8", newline="\n")
        except OSError as exc:
            pass_interrupts_on(exc)
            raise TokenizerError(f"cannot write the tokenizer to {folder} ({exc.strerror}); choose another") from None

    def _json(self) -> str:
        with rust_errors(TokenizerError, "the tokenizer cannot be written", "give another tokenizer"):
            data = json.loads(self._backend.to_str())
        if (data["pre_tokenizer"] or {}).get("add_prefix_space"):
            # transformers turns add_prefix_space off again, unless the pre-tokenizer stands inside a sequence.
            data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [data["pre_tokenizer"]]}
        if self._clean_up:
            # Without a decoder, tokens are joined by spaces. WordPiece does that too, with a prefix no token has.
            decoder = data["decoder"] or {"type": "WordPiece", "prefix": "\0no token\0", "cleanup": False}
            data["decoder"] = {"type": "Sequence", "decoders": [decoder, *_CLEAN_UP_STEPS]}
        for token in data["added_tokens"]:
            token["special"] = token["content"] in self._special
        text = json.dumps(data, ensure_ascii=False)
        parse_tokenizer_json(text)
        return text

    def _check_length(self, text: str) -> None:
        """Refuse what takes Rust all memory, or more than linear time."""
        file, length = self._file, len(text)
        if length > MAX_TEXT_CHARACTERS:
            raise PromptError(
                f"the text has {length:,} characters, more than {MAX_TEXT_CHARACTERS:,}: give it in several parts"
            )
        if file is None or file.run_characters is None or length <= file.run_characters:
            return
        longest = length if file.runs_cross_blanks else max(len(run[0]) for run in _RUNS.finditer(text))
        if longest > file.run_characters:
            where = "" if file.runs_cross_blanks else " without a blank, or of blanks"
            raise PromptError(
                f"the text has a run of {longest:,} characters{where}, and this tokenizer's regular expression takes "
                f"{file.run_characters:,} at most: shorten it, or break it up"
            )

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        try:
            return [self._check_id(token_id) for token_id in ids]
        except TypeError:
            raise PromptError(f"token ids must come as a list of whole numbers, got {shown(ids)}") from None

    def _check_id(self, token_id: object) -> int:
        try:
            # A bool is an int in Python, but never a token id.
            number = -1 if isinstance(token_id, bool) else operator.index(token_id)  # type: ignore[arg-type]
        except TypeError:
            number = -1
        if not 0 <= number < self._size:
            raise PromptError(
                f"token id {shown(token_id)} is outside the vocabulary; ids go from 0 to {self._size - 1}"
            )
        return number

    def _token(self, token_id: int, skip_special_tokens: bool, kept: Collection[str] = ()) -> str | None:
        """Return the token of an id, or None for an id without a token and for a special token to skip."""
        token: str | None = self._backend.id_to_token(self._check_id(token_id))
        return None if skip_special_tokens and token in self._special and token not in kept else token


def _vocab_size(backend: Backend) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _part_state(part: Any) -> dict[str, Any]:
    """Return the entry of one part (decoder, post-processor) in tokenizer.json; {} for a missing part."""
    return {} if part is None else dict(json.loads(part.__getstate__()))


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
    """Return the tokens that skip_special_tokens drops; found by trial, because the flags do not always tell."""
    decoder, backend.decoder = backend.decoder, None
    added = backend.get_added_tokens_decoder()
    # Without a decoder, a space joins two tokens, so the text is empty only where both are skipped.
    skipped = {token.content for i, token in added.items() if backend.decode([i, i], skip_special_tokens=True) == ""}
    backend.decoder = decoder
    return skipped


def check_text(text: object, name: str = "the text") -> None:
    """Raise PromptError, which calls the text `name`, unless it is a str that UTF-8 can write."""
    if not isinstance(text, str):
        raise PromptError(f"a text must be a str, got {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise PromptError(f"{name} has a lone surrogate, {text[exc.start]!r} at {exc.start}; remove it") from None
