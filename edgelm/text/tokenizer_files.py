"""A checkpoint's tokenizer files, put together the way transformers' fast tokenizers do it; no code is ever run.

The order of the steps follows transformers 4.57 (`_from_pretrained`, then `PreTrainedTokenizerFast.__init__`), because
the order in which tokens are added decides their ids.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from edgelm.errors import EdgelmError, TokenizerError

MAX_FILE_BYTES = 64 * 2**20

_NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_GPT2 = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
_BERT = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
# The special tokens each tokenizer class (without its ending "Fast") takes for granted.
_CLASSES: dict[str, dict[str, str]] = {"GPT2Tokenizer": _GPT2, "BertTokenizer": _BERT, "DistilBertTokenizer": _BERT}
_CLASSES |= {"PreTrainedTokenizer": {}, "TokenizersBackend": {}}
_BY_MODEL_TYPE = {"gpt2": "GPT2Tokenizer", "bert": "BertTokenizer", "distilbert": "DistilBertTokenizer"}
_SLOW_ONLY = ["*.model", "*.spm", "*.tiktoken", "tekken.json"]
_CONVERT = "save it with transformers as tokenizer.json with tokenizer_class PreTrainedTokenizerFast"
_FIELDS = ["content", "single_word", "lstrip", "rstrip", "normalized", "special"]
Special: TypeAlias = "str | AddedToken"


def load_backend(folder: Path) -> tuple[Backend, bool]:
    """Return the folder's tokenizer, settled as transformers would, and whether decoded text gets its clean-up.

    Raises:
        TokenizerError: no such folder or files, a damaged or too large file, or a class edgelm does not know.
    """
    if not folder.is_dir():
        raise TokenizerError(f"{folder} is not a folder; give the folder that holds tokenizer.json")
    config = _optional(folder / "tokenizer_config.json")
    name, files = _choose(folder, config)
    bert = _CLASSES[name] is _BERT or files == ["vocab.txt"]
    gpt2 = _CLASSES[name] is _GPT2 or files == ["vocab.json", "merges.txt"]
    path = folder / files[0]
    with rust_errors(TokenizerError, f"{path} is not a tokenizer file of this version of tokenizers", _CONVERT):
        if path.name == "tokenizer.json":
            backend = Backend.from_str(_read_text(path))
        else:
            backend = _wordpiece(path) if bert else _byte_level(path, folder / "merges.txt")
    with rust_errors(TokenizerError, f"the settings beside {path} do not fit it", "correct its JSON files"):
        from_vocab = path.name != "tokenizer.json"
        listed = _merge_files(folder, config, {} if from_vocab else backend.get_added_tokens_decoder())
        settings = {**(_BERT if bert else _GPT2 if gpt2 else {}), **config}
        if backend.padding is not None:
            settings.setdefault("pad_token", backend.padding["pad_token"])
        if from_vocab:  # the slow class in between turns some strings into tokens, and its copies settle their flags
            for key in (*_GPT2, "pad_token") if gpt2 else ():
                settings[key] = AddedToken(settings[key]) if isinstance(settings.get(key), str) else settings.get(key)
            # An added token is normalized as it is added, so the normalizer must stand before.
            off = dict.fromkeys(("do_lower_case", "strip_accents", "tokenize_chinese_chars"), False)
            _override_parts(backend, settings if _flag(settings, "do_basic_tokenize", True) else settings | off, bert)
        _add_tokens(backend, listed, copy.deepcopy(_flat(settings)) if from_vocab else _flat(settings))
        if from_vocab:
            _finish_conversion(backend, settings, listed, bert)
        _override_parts(backend, settings, bert)
        backend.encode_special_tokens = _flag(settings, "split_special_tokens", False)
        clean_up: bool = _flag(settings, "clean_up_tokenization_spaces", bert and from_vocab)
    return backend, clean_up


@contextmanager
def rust_errors(error: type[EdgelmError], what: str, advice: str) -> Iterator[None]:
    """Turn whatever the Rust side throws into one sentence; a panic is a BaseException, not an Exception."""
    try:
        yield
    except (EdgelmError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as exc:
        reason = (str(exc) or type(exc).__name__).splitlines()[0][:200]
        raise error(f"{what} ({reason}); {advice}") from None


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():  # a pipe or a device could keep us reading forever
            raise TokenizerError(f"{path} is not a file; put a regular file there")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise TokenizerError(f"{path} is larger than {MAX_FILE_BYTES} bytes; no tokenizer file needs that much")
        return data.decode("utf-8")
    except OSError as exc:
        raise TokenizerError(f"{path} cannot be read ({exc.strerror}); check it") from None
    except UnicodeDecodeError as exc:
        raise TokenizerError(f"{path} is not UTF-8 (at byte {exc.start}); download it again") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read_text(path))
    except (ValueError, RecursionError) as exc:
        raise TokenizerError(f"{path} is not valid JSON ({exc}); download it again") from None
    if not isinstance(data, dict):
        raise TokenizerError(f"{path} holds a {type(data).__name__}, not a JSON object; download it again")
    return data


def _optional(path: Path) -> dict[str, Any]:
    return _read_object(path) if path.exists() else {}


def _lines(path: Path) -> list[str]:
    # Only these line ends count, as in Python's text files; str.splitlines would also cut at U+2028 and others.
    return _read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _choose(folder: Path, config: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the tokenizer class, without "Fast", and the files it is read from."""
    model = _optional(folder / "config.json") if config.get("tokenizer_class") is None else {}
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    stated = name is not None
    name = str(name if stated else _BY_MODEL_TYPE.get(str(model.get("model_type")), "PreTrainedTokenizer"))
    name = name.removesuffix("Fast")
    slow = sorted(path.name for pattern in _SLOW_ONLY for path in folder.glob(pattern))
    if name not in _CLASSES:
        where = f" ({', '.join(slow)})" if slow else ""
        raise TokenizerError(f"{folder} has a tokenizer of the unknown class {name!r}{where}; {_CONVERT}")
    choices = [["tokenizer.json"]]
    # A class that merely follows from the model type yields to the files that are there (BERT's, in Chinese GPT-2).
    if not stated or _CLASSES[name] is not _BERT:
        choices.append(["vocab.json", "merges.txt"])
    if not stated or _CLASSES[name] is not _GPT2:
        choices.append(["vocab.txt"])
    for files in choices:
        if all((folder / file).exists() for file in files):
            fits = files == ["tokenizer.json"] or (_CLASSES[name] is _BERT) == (files == ["vocab.txt"])
            return (name if fits else "PreTrainedTokenizer"), files
    looked = ", or ".join(" with ".join(files) for files in choices)
    if slow:
        raise TokenizerError(f"{folder} has only {', '.join(slow)}, no {looked}; {_CONVERT}")
    raise TokenizerError(f"{folder} has no tokenizer; looked for {looked}; give the folder that has them")


def _byte_level(vocab_path: Path, merges_path: Path) -> Backend:
    vocab = _read_object(vocab_path)
    if not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise TokenizerError(f"{vocab_path} must map every token to a whole number; download it again")
    # The first line is a version and the last one ends with a line feed: both are dropped unseen, as transformers does.
    merges = dict.fromkeys(tuple(line.split()) for line in _lines(merges_path)[1:-1])
    for merge in merges:
        if len(merge) != 2:
            raise TokenizerError(f"{merges_path} has the line {' '.join(merge)[:80]!r}, not two tokens; get it again")
    backend = Backend(models.BPE(vocab, list(merges), continuing_subword_prefix="", end_of_word_suffix=""))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _wordpiece(path: Path) -> Backend:
    lines = _lines(path)
    vocab = {token: i for i, token in enumerate(lines if lines[-1] else lines[:-1])}
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _flag(settings: dict[str, Any], key: str, default: bool | None) -> Any:
    value = settings.get(key, default)
    if not isinstance(value, bool) and value is not default:
        raise ValueError(f"{key} in tokenizer_config.json is {str(value)[:80]!r}, neither true nor false")
    return value


def _token(value: object, *, special: bool = False) -> Special:
    """Return a token as settings write them: a string, or an object with the fields of AddedToken."""
    if isinstance(value, dict):
        # AddedToken prints a line on stdout about every field it does not know.
        fields = {key: value[key] for key in _FIELDS if key in value} | ({"special": True} if special else {})
        value = AddedToken(**fields) if isinstance(value.get("content"), str) else None
    if not isinstance(value, str | AddedToken):
        raise ValueError(f"{str(value)[:80]!r} is given as a token in tokenizer_config.json or beside it")
    return value


def _text(token: Special) -> str:
    return str(token.content) if isinstance(token, AddedToken) else token


def _merge_files(folder: Path, config: dict[str, Any], known: dict[int, AddedToken]) -> dict[int, AddedToken]:
    """Return the added tokens by id; put the special tokens that name one of them, or stand in a file, into config."""
    named: dict[str, AddedToken] = {}
    if "added_tokens_decoder" in config:
        known = listed = {int(i): _token(value) for i, value in dict(config["added_tokens_decoder"]).items()}
        if not all(isinstance(token, AddedToken) for token in listed.values()):
            raise ValueError("added_tokens_decoder in tokenizer_config.json holds a bare string")
    else:
        listed, last = {}, "None"
        for key, value in _optional(folder / "special_tokens_map.json").items():
            if key == "additional_special_tokens" and isinstance(value, list):
                tokens = [_token(item) for item in config.get(key) or []]
                for item in value:
                    token = _token(item, special=True)
                    tokens += [] if token in tokens else [token]
                    last = _text(token)
                config[key] = tokens
            else:
                config[key] = _token(value, special=True) if isinstance(value, dict) else value
        names = {_text(token) for token in _flat(config | {"extra_special_tokens": None})}
        for content, i in _optional(folder / "added_tokens.json").items():
            if type(i) is not int:
                raise ValueError(f"added_tokens.json gives {content!r} the id {str(i)[:80]!r}")
            listed[i] = AddedToken(content, normalized=content not in names, special=content in names)
            named[last] = listed[i]  # transformers' slip: filed under the name its variable last held
        listed |= known
    named |= {token.content: token for token in known.values()}
    for key in _NAMES:
        if config.get(key) is not None:
            config[key] = named.get(_text(_token(config[key])), _token(config[key]))
    return listed


def _flat(settings: dict[str, Any]) -> list[Special]:
    """Return the special tokens in transformers' order; it drops repetitions, but not those within one list."""
    extra = settings.get("extra_special_tokens") or {}
    tokens = {key: settings[key] for key in (*_NAMES, "additional_special_tokens") if settings.get(key)}
    # transformers 4 writes an object of names and tokens here, transformers 5 a list.
    tokens |= extra if isinstance(extra, dict) else {"extra_special_tokens": extra}
    found: list[Special] = []
    seen: set[str] = set()
    for key, value in tokens.items():
        several = key in ("additional_special_tokens", "extra_special_tokens")
        if several and not isinstance(value, list):
            raise ValueError(f"{key} in tokenizer_config.json is no list")
        fresh = [token for token in map(_token, value if several else [value]) if _text(token) not in seen]
        found += fresh
        seen |= set(map(_text, fresh))
    return found


def _add_tokens(backend: Backend, listed: dict[int, AddedToken], specials: list[Special]) -> None:
    tokens: list[Special] = [listed[i] for i in sorted(listed)]
    present = [token.content for token in backend.get_added_tokens_decoder().values()]
    present += [_text(token) for token in tokens]
    # An AddedToken never equals a string, so it is added again, with its flags; a string that is there is not.
    tokens += [token for token in specials if token not in present and token not in tokens]
    names = {_text(token) for token in specials}
    for i, token in enumerate(tokens):
        tokens[i] = token = token if isinstance(token, AddedToken) else AddedToken(token)
        token.special = token.special or token.content in names
    backend.add_tokens(tokens)


def _finish_conversion(backend: Backend, settings: dict[str, Any], listed: dict[int, AddedToken], bert: bool) -> None:
    """Give a tokenizer made of vocabulary files the special tokens it puts around a text."""
    ids = {token.content: i for i, token in listed.items()}

    def special(key: str) -> tuple[str, int]:
        content = _text(_token(settings.get(key)))
        found: int | None = backend.token_to_id(content)
        if found is None or ids.get(content, found) != found:
            raise ValueError(f"{key} {content!r} in tokenizer_config.json has not the id it is listed with")
        return content, found

    if bert:
        backend.model.unk_token = _text(_token(settings.get("unk_token")))
        cls, sep = special("cls_token"), special("sep_token")
        single = f"{cls[0]}:0 $A:0 {sep[0]}:0"
        pair = f"{single} $B:1 {sep[0]}:1"
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[cls, sep])
    elif _flag(settings, "add_bos_token", False):
        bos = special("bos_token")
        single, pair = f"{bos[0]}:0 $A:0", f"{bos[0]}:0 $A:0 $B:1"
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[bos])


def _override_parts(backend: Backend, settings: dict[str, Any], bert: bool) -> None:
    """Let the settings win over what tokenizer.json says, where transformers does."""
    wanted = _flag(settings, "add_prefix_space", False)
    state = part_state(backend.pre_tokenizer)
    if state.get("type") == "ByteLevel" and state["add_prefix_space"] != wanted:
        state.pop("type")
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(**(state | {"add_prefix_space": wanted}))
    if bert and part_state(backend.normalizer).get("type") == "BertNormalizer":
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=part_state(backend.normalizer)["clean_text"],
            handle_chinese_chars=_flag(settings, "tokenize_chinese_chars", True),
            strip_accents=_flag(settings, "strip_accents", None),
            lowercase=_flag(settings, "do_lower_case", True),
        )


def part_state(part: Any) -> dict[str, Any]:
    """Return what tokenizer.json says of one part of a tokenizer; nothing for a missing part."""
    return {} if part is None else dict(json.loads(part.__getstate__()))
