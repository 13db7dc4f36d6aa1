"""A checkpoint's tokenizer files become one finished tokenizer.json; transformers does it, and no foreign code runs.

transformers turns vocab.json with merges.txt, vocab.txt (WordPiece) or a sentencepiece model into a tokenizer of the
`tokenizers` library, and settles all that tokenizer_config.json and its neighbours say. The runtime reads the result.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from edgelm.errors import EdgelmError, ExportError, PromptError, TokenizerError, pass_interrupts_on
from edgelm.text.rust import is_panic
from edgelm.text.tokenizer import Tokenizer
from edgelm_export.source.hub import first_line, read_json

MAX_FILE_BYTES = 64 * 2**20

_SENTENCEPIECE = ("spiece.model", "spm.model", "sentencepiece.bpe.model", "sentencepiece.model", "tokenizer.model")
# Each tuple of files is a whole vocabulary, with the tokenizer class of a folder that names none.
_VOCABULARIES = {
    ("tokenizer.json",): "PreTrainedTokenizer",
    ("vocab.json", "merges.txt"): "GPT2Tokenizer",
    ("vocab.txt",): "BertTokenizer",
} | {(name,): "" for name in _SENTENCEPIECE}
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
TOKENIZER_FILES = frozenset(_SETTINGS).union(*_VOCABULARIES)
"""Names of the files that decide how a checkpoint's tokenizer works."""
VOCABULARY_FILES = frozenset(names[0] for names in _VOCABULARIES)
"""Names of the files of which a folder with a tokenizer has at least one."""

# Settings that lead to code, or to files inside or outside the folder.
_POINTERS = ("auto_map", "fast_tokenizer_files", "tokenizer_file", "vocab_file", "merges_file", "init_inputs")

# No text is empty or begins with a space, because transformers' slow and fast GPT-2 differ there on add_prefix_space.
_SAMPLES = (
    "Hello, world! The river isn't here.",
    "two  spaces,\ta tab and a line end\n\n",
    "don't can't we've I'm they're it's he'll",
    "Déjà vu: Straße, naïve, jalapeño, CAFÉ",
    "今天天气很好，我们去公园散步。",
    "日本語のテキスト、한국어 텍스트",
    "Привет, мир! Γειά σου",
    "1234 5,678.90 (a+b)*c == d[0] # {x: 'y'}",
    "🎉 emoji 👩‍👧 flag 🇨🇳",
)
# What else a tokenizer may treat in a way of its own: blanks and marks at the ends, control characters, joined signs.
_RARE = (
    "",
    " leading, trailing ",
    "\n\n  \t",
    "a\u00a0b\u2003c\u3000d\u200be\u2028f\ufeff",
    "a\x00b\x07c\x1bd\x7fe\x85f\rg\r\nh",
    "e\u0301 ﬁ Å ½ ﷺ ẞ İ",
    "مرحبا بالعالم، שלום, नमस्ते दुनिया, สวัสดี",
    "<s></s><unk><pad>[CLS][SEP][MASK]<|endoftext|>",
)
_CHECKED_SPECIALS = 64
_CHECKED_TOKENS = 300


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Finish the tokenizer of a checkpoint: the tokenizer of `load_tokenizer_and_eos`, which raises the same errors."""
    return load_tokenizer_and_eos(folder)[0]


def load_tokenizer_and_eos(folder: str | os.PathLike[str]) -> tuple[Tokenizer, int | None]:
    """Finish the tokenizer of a checkpoint, as transformers' fast tokenizer understands its files.

    Code of the folder (`auto_map`) never runs, and settings that point to further files are ignored. What the bundle
    will read must give the ids and texts of the tokenizer that transformers loads.

    Args:
        folder: a local folder with a tokenizer.json, a vocab.json and merges.txt, a vocab.txt or a sentencepiece model.

    Returns:
        The tokenizer, and the id of its own end-of-text token; None where it has none. transformers may have added that
        token, so that the id can lie beyond the model's vocabulary.

    Raises:
        TokenizerError: the folder has no tokenizer, a file is damaged or larger than 64 MB, transformers cannot load
            the tokenizer, or a tokenizer.json cannot hold what it does.
    """
    with _prepared(Path(folder)) as (load, what, _):
        fast = load(use_fast=True)
        if not fast.is_fast:
            raise TokenizerError(
                f"{what} is a {type(fast).__name__}, of which transformers has no fast version; give a tokenizer.json, "
                "whose tokenizer_class is PreTrainedTokenizerFast"
            )
        expected, backend = _behaviour(fast), fast.backend_tokenizer  # `Tokenizer` changes the backend
        tokenizer = Tokenizer(backend, clean_up_tokenization_spaces=bool(fast.clean_up_tokenization_spaces))
        splits = backend.encode_special_tokens  # a tokenizer.json cannot say so, and `save` writes it elsewhere
        different = _first_difference(tokenizer if splits else Tokenizer.from_json(tokenizer.to_json()), expected)
        if different is not None:
            if not splits:
                tokenizer = Tokenizer.from_json(_with_specials_as_they_are(tokenizer.to_json()))
            if _first_difference(tokenizer, expected) is not None:
                raise TokenizerError(
                    f"transformers treats {different[:40]!r} in a way that a tokenizer.json cannot hold, so {what} "
                    "cannot be used; give another tokenizer.json"
                )
        return tokenizer, fast.eos_token_id


def conversion_notes(folder: Path, tokenizer: Tokenizer) -> tuple[str, ...]:
    """A note on a text that transformers' slow tokenizer encodes differently, if there is such a text.

    AutoTokenizer loads the fast one, which transformers converts where there is no tokenizer.json. Its conversions of
    sentencepiece models treat blanks at the end and some scripts in another way.

    Args:
        folder: from which `tokenizer` was loaded.
        tokenizer: what `load_tokenizer` made of it.
    """
    with suppress(TokenizerError, PromptError), _prepared(folder) as (load, _, files):
        if "tokenizer.json" in files:
            return ()
        slow = load(use_fast=False)
        for text in _SAMPLES:
            if tokenizer.encode(text) != slow(text).input_ids:
                return (
                    f"the slow tokenizer ({type(slow).__name__}, use_fast=False) encodes {text!r} differently; the "
                    "bundle does what AutoTokenizer does by default",
                )
    return ()


@contextmanager
def _prepared(folder: Path) -> Iterator[tuple[partial[Any], str, set[str]]]:
    """A function that loads the tokenizer of `folder`, words for it, and the names of its files.

    transformers gets a folder of its own, which contains only known files.
    """
    if not folder.is_dir():
        raise TokenizerError(f"{folder} is not a folder; give the folder that holds tokenizer.json")
    files = _checked_files(folder)
    settings = _settings(folder, files)
    what = f"the tokenizer of {folder} ({', '.join(sorted(files))})"
    with (
        tempfile.TemporaryDirectory() as clean,
        _one_sentence(f"transformers cannot load {what}", "correct these files or download them again"),
    ):
        for name in files - {"config.json"}:
            shutil.copyfile(folder / name, Path(clean, name))
        Path(clean, "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        yield (
            partial(AutoTokenizer.from_pretrained, clean, local_files_only=True, trust_remote_code=False),
            what,
            files,
        )


@contextmanager
def _one_sentence(what: str, advice: str) -> Iterator[None]:
    """Turn whatever transformers raises, or Rust, into a TokenizerError: `what` failed, and what to do about it."""
    try:
        yield
    except (EdgelmError, MemoryError):
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        pass_interrupts_on(error)
        raise TokenizerError(f"{what} ({first_line(error)[:200]}); {advice}") from None


def _checked_files(folder: Path) -> set[str]:
    """The names of the tokenizer files in `folder`, after a check of kind and size."""
    files = {name for name in TOKENIZER_FILES if os.path.lexists(folder / name)}
    for name in sorted(files):
        path = folder / name
        if not path.is_file():  # a pipe or a device could keep the reader waiting forever
            raise TokenizerError(f"{path} is not a file; put a regular file there")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TokenizerError(f"{path} is larger than {MAX_FILE_BYTES} bytes; no tokenizer file needs that much")
    return files


def _settings(folder: Path, files: set[str]) -> dict[str, Any]:
    """The content of tokenizer_config.json without pointers to code and files, and with a tokenizer class."""
    try:
        # Every file is read here, because transformers does not name a damaged file.
        content = {name: read_json(folder / name) for name in (*_SETTINGS, "vocab.json") if name in files}
    except ExportError as error:
        raise TokenizerError(f"{error}; download it again") from None
    for token, token_id in content.get("added_tokens.json", {}).items():
        if type(token_id) is not int:  # transformers' fast tokenizer would number the token anew
            raise TokenizerError(
                f"{folder / 'added_tokens.json'} gives {token!r} the id {token_id!r}; a whole number belongs there"
            )
    config, model = content.get("tokenizer_config.json", {}), content.get("config.json", {})
    settings = {key: value for key, value in config.items() if key not in _POINTERS}
    if settings.get("add_prefix_space", False) is None:  # a fast copy of a T5 tokenizer says so
        del settings["add_prefix_space"]
    settings["tokenizer_class"] = _class_name(folder, files, config, model)
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 5 writes a list, transformers 4 reads an object
        settings["extra_special_tokens"] = {f"extra_{i}_token": token for i, token in enumerate(extra)}
    return settings


def _class_name(folder: Path, files: set[str], config: dict[str, Any], model: dict[str, Any]) -> str:
    """The name of transformers' slow tokenizer class: as stated, of the model type, or of the files."""
    vocabulary = next((names for names in _VOCABULARIES if files.issuperset(names)), None)
    if vocabulary is None:
        raise TokenizerError(
            f"{folder} has no tokenizer; looked for tokenizer.json, or vocab.json with merges.txt, or vocab.txt, or a "
            "sentencepiece model such as spiece.model; give the folder that has them"
        )
    stated = config.get("tokenizer_class") or model.get("tokenizer_class")
    if stated is None:
        slow, fast = TOKENIZER_MAPPING_NAMES.get(str(model.get("model_type")), (None, None))
        # Chinese GPT-2 models often come with BERT's vocab.txt alone, so these files overrule the model type.
        if _VOCABULARIES[vocabulary] != "BertTokenizer" or slow != "GPT2Tokenizer":
            stated = slow or fast
    if stated == "TokenizersBackend":  # the name in transformers 5 for the class of a lone tokenizer.json
        stated = "PreTrainedTokenizer"
    name = stated or _VOCABULARIES[vocabulary]
    if not isinstance(name, str) or not name:
        raise TokenizerError(
            f"{folder} names no tokenizer class for {vocabulary[0]} (tokenizer_class is {str(stated)[:80]!r}); "
            "set it in tokenizer_config.json"
        )
    if vocabulary[0] in _SENTENCEPIECE and find_spec("sentencepiece") is None:
        raise TokenizerError(
            f"reading {folder / vocabulary[0]} needs the package sentencepiece: pip install 'edgelm[export]'"
        )
    name = name.removesuffix("Fast")
    wanted = _files_of(name)
    if vocabulary != ("tokenizer.json",) and wanted and files.isdisjoint(wanted):
        raise TokenizerError(
            f"the tokenizer class {name} of {folder} reads "
            f"{' and '.join(wanted)}, but the folder has {vocabulary[0]}; set tokenizer_class in tokenizer_config.json"
        )
    return name


def _files_of(name: str) -> list[str]:
    """The files of a vocabulary that transformers' slow tokenizer class reads; none for a class that it lacks."""
    found = getattr(tokenizer_class_from_name(name), "vocab_files_names", None)
    return sorted(set(found.values()) - {"tokenizer.json"}) if isinstance(found, dict) else []


def _behaviour(tokenizer: Any) -> list[tuple[str, bool, list[int], str]]:
    """What transformers' tokenizer does: a text, a flag, the text's ids (with special tokens?), and their text."""
    added = list(tokenizer.added_tokens_encoder)[:_CHECKED_SPECIALS]
    own = tokenizer.decode(range(min(len(tokenizer), _CHECKED_TOKENS)))
    result = []
    for text in (*_SAMPLES, *_RARE, own, "".join(f" {token}x{token}  " for token in added)):
        for flag in (False, True):
            # Without a token for unknown characters, transformers cannot encode every text.
            with suppress(TokenizerError), _one_sentence("", ""):
                ids = tokenizer(text, add_special_tokens=flag).input_ids
                result.append((text, flag, ids, tokenizer.decode(ids, skip_special_tokens=flag)))
    return result


def _first_difference(tokenizer: Tokenizer, expected: list[tuple[str, bool, list[int], str]]) -> str | None:
    """The first text that `tokenizer` treats in another way than transformers does; None if there is no such text."""
    for text, flag, ids, decoded in expected:
        try:
            same = tokenizer.encode(text, add_special_tokens=flag) == ids
            same = same and tokenizer.decode(ids, skip_special_tokens=flag) == decoded
        except PromptError:
            same = False
        if not same:
            return text
    return None


def _with_specials_as_they_are(tokenizer_json: str) -> str:
    """The same tokenizer, which finds special tokens in the text itself, and not in normalized text.

    transformers adds a special token twice where special_tokens_map.json names one of a converted tokenizer. The
    library then follows the flags of the first time, and writes those of the second time.
    """
    content = json.loads(tokenizer_json)
    for token in content["added_tokens"]:
        if token["special"]:
            token["normalized"] = False
    return json.dumps(content, ensure_ascii=False)
