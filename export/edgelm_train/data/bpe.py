"""A byte-level BPE like GPT-2's: trained (with <|endoftext|> as token 0), saved, loaded, applied."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from edgelm.errors import TrainingError
from edgelm_train.data.corpus import END_OF_TEXT

_VOCABULARY_SIZES = range(257, 262_144 + 1)
"""The smallest vocabulary has the 256 bytes and <|endoftext|>."""
_PIECE_CHARACTERS = 1_000_000
"""Maximum length of a text for the tokenizer, because one huge line costs more than many short lines."""
_WORD_CHARACTERS = 100
"""The trainer gets longer words in parts, because its time grows with words times merges."""
_LONG_WORD = re.compile(rf"\S{{{_WORD_CHARACTERS + 1}}}")


def train_bpe(documents: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of at most `vocab_size` tokens.

    A pair must occur twice to become a token. So a short text gives fewer tokens than `vocab_size`.

    Raises:
        TrainingError: `vocab_size` is outside 257 to 262,144.
    """
    check_vocabulary_size(vocab_size)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for document in documents for text in _short_texts(document)), trainer)
    return tokenizer


def check_vocabulary_size(vocab_size: int) -> None:
    """Raises TrainingError where a byte-level vocabulary cannot have `vocab_size` tokens."""
    if vocab_size not in _VOCABULARY_SIZES:
        low, high = _VOCABULARY_SIZES[0], _VOCABULARY_SIZES[-1]
        raise TrainingError(f"a byte-level vocabulary has {low} to {high} tokens, got {vocab_size}")


def save_bpe(tokenizer: tokenizers.Tokenizer, folder: Path, end_of_text: str = END_OF_TEXT) -> None:
    """Write the three files that transformers' AutoTokenizer reads; `folder` is created."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_of_text)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")


def load_bpe(folder: Path) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer of a Hugging Face folder, without truncation and padding, and its end-of-text token.

    That is the tokenizer's own, as its files name it, or else <|endoftext|>.

    Raises:
        TrainingError: tokenizer.json cannot be read, or has no such token.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TrainingError(f"cannot read the tokenizer {path}: there is no such file")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise TrainingError(f"cannot read the tokenizer {path}: {error}") from None
    named = [_eos_token(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    token = next((t for t in (*named, END_OF_TEXT) if t is not None and tokenizer.token_to_id(t) is not None), None)
    if token is None:
        raise TrainingError(
            f"the tokenizer {path} has no token {END_OF_TEXT}, and no other eos_token in tokenizer_config.json; such a "
            "token precedes every document: give another tokenizer"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, token


def _eos_token(path: Path) -> str | None:
    """The end-of-text token that a file of a Hugging Face folder names; None where it names none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from None
    token = content.get("eos_token") if isinstance(content, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def encode(tokenizer: tokenizers.Tokenizer, document: str) -> list[int]:
    """The ids of `document`; no special token is added.

    Raises:
        TrainingError: the tokenizer has no token for a part of the text.
    """
    try:
        encodings = tokenizer.encode_batch(list(_pieces(document)), add_special_tokens=False)
    except Exception as error:  # tokenizers raises bare Exception
        raise TrainingError(
            f"the tokenizer cannot encode the text that begins with {document[:40]!r}: {error}; leave out characters "
            "for which it has no token"
        ) from None
    return [token_id for encoding in encodings for token_id in encoding.ids]


def _short_texts(document: str) -> Iterator[str]:
    for piece in _pieces(document):
        if _LONG_WORD.search(piece) is None:
            yield piece
        else:
            yield from (piece[i : i + _WORD_CHARACTERS] for i in range(0, len(piece), _WORD_CHARACTERS))


def _pieces(document: str) -> Iterator[str]:
    start = 0
    while len(document) - start > _PIECE_CHARACTERS:
        # A space belongs to the word after it. Without any space, the cut may split a word.
        space = document.rfind(" ", start + 1, start + _PIECE_CHARACTERS)
        end = space if space > start else start + _PIECE_CHARACTERS
        yield document[start:end]
        start = end
    yield document[start:]
