"""Small tokenizers of every kind that the `tokenizers` library writes, built like those of popular models."""

import base64
import json
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = GPT4.replace(r"\p{N}{1,3}", r"\p{N}")
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CASES + "|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CASES + "|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
DEEPSEEK = ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\s+$", "[一-龥ࠀ-一가-퟿]+", r"\p{N}+"]

LETTERS = [*"abcdefgh", *"今天", "é", "\u0301"]


def _byte_bpe(added: int = 0) -> Backend:
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("a", "a"), ("aa", "aa"), ("Ġ", "a"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("t", "h"), ("th", "e")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def _split(*patterns: str) -> Callable[[], Backend]:
    def build() -> Backend:
        backend = _byte_bpe()
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        return backend

    return build


def _roberta() -> Backend:
    backend = _byte_bpe()
    backend.add_special_tokens(["<s>", "</s>", AddedToken("<mask>", lstrip=True, special=True)])
    ids = [(token, backend.token_to_id(token)) for token in ("</s>", "<s>")]
    backend.post_processor = processors.RobertaProcessing(*ids)
    return backend


def _codegen() -> Backend:
    backend = _byte_bpe()
    backend.add_tokens([AddedToken(" " * n, normalized=True) for n in range(2, 6)])
    backend.add_tokens([AddedToken("\t\t", rstrip=True, normalized=False), AddedToken("def", single_word=True)])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _clip() -> Backend:
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"{letter}</w>": 256 + i for letter, i in vocab.items()} | {"<|endoftext|>": 512}
    suffixed = models.BPE(vocab, [], unk_token="<|endoftext|>", end_of_word_suffix="</w>")
    backend = Backend(suffixed)
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(CLIP), "removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.BPEDecoder()
    backend.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return backend


def _bert() -> Backend:
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "##aa", "the"]
    backend = Backend(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    backend.add_special_tokens(words[:4])
    return backend


def _template(backend: Backend, first: str, last: str) -> Any:
    ids = [(token, backend.token_to_id(token)) for token in (first, last)]
    single, pair = f"{first} $A {last}", f"{first} $A {last} $B:1 {last}:1"
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _llama(legacy: bool) -> Backend:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, "aa", "▁a", "▁▁"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("a", "a"), ("▁", "a"), ("▁", "▁")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.Sequence([processors.ByteLevel(), _template(backend, "<s>", "</s>")])
    return backend


def _gemma() -> Backend:
    backend = _llama(legacy=True)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _unigram(normalizer: Any) -> Backend:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS), ("aaaa", -4.0)]
    backend = Backend(models.Unigram(pieces, 0, False))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return backend


def _t5() -> Backend:
    spaces = normalizers.Replace(Regex(" {2,}"), "▁")
    return _unigram(normalizers.Sequence([normalizers.Precompiled(charsmap({"a": "ab"})), spaces]))


def _albert() -> Backend:
    quotes = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    accents = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    rest = [normalizers.Precompiled(charsmap({"a": "b"})), normalizers.Replace(Regex(" {2,}"), " ")]
    return _unigram(normalizers.Sequence([*quotes, *accents, *rest]))


def _xlm() -> Backend:
    backend = _unigram(normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Strip()]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend


def _words() -> Backend:
    backend = Backend(models.WordLevel({"<unk>": 0, "a": 1, "the": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Whitespace(),
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.UnicodeScripts(),
            pre_tokenizers.CharDelimiterSplit("x"),
        ]
    )
    return backend


def _speech() -> Backend:
    backend = Backend(models.WordLevel({"<pad>": 0, "|": 1, "a": 2, "b": 3}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.CTC()
    return backend


def _byte_normalizer() -> Backend:
    backend = _byte_bpe()
    backend.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.ByteLevel()])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{N}+"), "merged_with_next")
    return backend


KINDS: dict[str, Callable[[], Backend]] = {
    "gpt2": _byte_bpe,
    "gpt4": _split(GPT4),
    "qwen": _split(QWEN),
    "gpt4o": _split(GPT4O),
    "bloom": _split(BLOOM),
    "falcon": _split(r"[0-9][0-9][0-9]"),
    "deepseek": _split(*DEEPSEEK),
    "roberta": _roberta,
    "codegen": _codegen,
    "clip": _clip,
    "bert": _bert,
    "llama-legacy": lambda: _llama(legacy=True),
    "llama": lambda: _llama(legacy=False),
    "gemma": _gemma,
    "t5": _t5,
    "albert": _albert,
    "xlm": _xlm,
    "words": _words,
    "speech": _speech,
    "byte-normalizer": _byte_normalizer,
}


def text_of(kind: str) -> str:
    """The tokenizer.json of a kind."""
    text: str = KINDS[kind]().to_str()
    return text


def charsmap(rules: dict[str, str]) -> bytes:
    """A table of sentencepiece's normalization (a double array and texts), with rules for single ASCII characters."""
    units = [0] * 512
    units[0] = 256 << 10  # the root's children stand in the second block
    texts = b""
    for i, (old, new) in enumerate(rules.items()):
        place, value_place = 256 ^ ord(old), 257 + i
        assert len(old.encode()) == 1 and not 257 <= place < 257 + len(rules)
        units[place] = (place ^ value_place) << 10 | 1 << 8 | ord(old)
        units[value_place] = 1 << 31 | len(texts)
        texts += new.encode() + b"\0"
    trie = b"".join(unit.to_bytes(4, "little") for unit in units)
    return len(trie).to_bytes(4, "little") + trie + texts


def with_charsmap(table: bytes) -> str:
    """A tokenizer.json whose only normalizer has this table."""
    content = json.loads(text_of("words"))
    encoded = base64.b64encode(table).decode()
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": encoded}
    return json.dumps(content)
