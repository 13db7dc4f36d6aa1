"""Tiny tokenizers of every kind that comes with GPT-2 models, as the files that their owners would publish."""

import io
import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.against_transformers.combinations.draft import TOKENIZER, Draft, Oddity, some

STORY = """The miller's daughter didn't sleep that night. "Who's there?" she called; nobody answered. In the morning
there were 12 sacks of flour, 3 loaves of bread and 1 letter by the door: we've taken the river, but we'll bring it back
before the winter. They're walking still, I'm told. C'est la vie, déjà vu! Straße, naïve. Привет, мир.
今天天气很好，我们去公园散步。 日本語のテキスト、한국어
    for word in river:
        print(word, end=" ")
"""
LETTERS = sorted(set(STORY + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'- \n"))
END = "<|endoftext|>"


@cache
def _byte_bpe(word_ends: str) -> str:
    """A byte-level BPE as JSON; with `word_ends`, each word's last token ends with it, as in CLIP."""
    ends = {"end_of_word_suffix": word_ends} if word_ends else {}
    bpe = Tokenizer(models.BPE(**ends))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[END], initial_alphabet=alphabet, show_progress=False, **ends
    )
    bpe.train_from_iterator([STORY], trainer)
    return str(bpe.to_str())


def _byte_level(draft: Draft, rng: random.Random) -> None:
    """tokenizer.json of byte-level BPE, with everything that its parts can be told."""
    bpe = Tokenizer.from_str(_byte_bpe(""))
    prefix, regex, trim = rng.random() < 0.3, rng.random() < 0.85, rng.random() < 0.5
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = rng.choice(
        [
            None,
            processors.ByteLevel(trim_offsets=trim),
            processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)]),
            processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)]),
            processors.RobertaProcessing(("!", 1), (END, 0), trim_offsets=trim, add_prefix_space=prefix),
        ]
    )
    _save(draft, bpe)
    if rng.random() < 0.85:
        names = ["GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "RobertaTokenizer", "BartTokenizer"]
        names += ["CodeGenTokenizer", "Qwen2Tokenizer", "BloomTokenizerFast", "GPTNeoXTokenizerFast", "LlamaTokenizer"]
        draft.json_files[TOKENIZER] = {"tokenizer_class": rng.choice(names)}


def _byte_level_files(draft: Draft, rng: random.Random) -> None:
    """vocab.json and merges.txt, as openai-community/gpt2 had them first."""
    model = json.loads(_byte_bpe(""))["model"]
    if rng.random() < 0.25:  # a vocabulary of characters, without a token for the end
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        model = {"vocab": {character: i for i, character in enumerate(alphabet)}, "merges": []}
    _legacy_bpe(draft, model)
    if rng.random() < 0.6:
        config: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer"} if rng.random() < 0.5 else {}
        draft.json_files[TOKENIZER] = config | dict(
            some(
                rng,
                {
                    "add_prefix_space": rng.random() < 0.5,
                    "add_bos_token": True,
                    "unk_token": END,
                    "model_max_length": 1024,
                    "errors": "replace",
                    "pad_token": END,
                }.items(),
                0,
                3,
            )
        )


def _word_ends(draft: Draft, rng: random.Random) -> None:
    """BPE whose words end with </w>, as GPT-1 and CLIP have it."""
    if rng.random() < 0.5:
        bpe = Tokenizer.from_str(_byte_bpe("</w>"))
        bpe.decoder = rng.choice([decoders.ByteLevel(), decoders.BPEDecoder("</w>")])
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.normalizer = rng.choice([None, normalizers.Lowercase(), normalizers.NFC()])
        _save(draft, bpe)
        draft.json_files[TOKENIZER] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        return
    bpe = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.BertNormalizer(lowercase=True)
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bpe.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([STORY], trainer)
    if rng.random() < 0.5:
        _save(draft, bpe)
        draft.json_files[TOKENIZER] = {"tokenizer_class": rng.choice(["PreTrainedTokenizerFast", "OpenAIGPTTokenizer"])}
    else:
        _legacy_bpe(draft, json.loads(bpe.to_str())["model"])
        draft.json_files[TOKENIZER] = {"tokenizer_class": "OpenAIGPTTokenizer"}


PIECES = "the of and river miller wheel un ##aff ##able play ##ing ##ed ##s café do ##n not n't hello , . ! ? ' - : ##é"


def _word_pieces(draft: Draft, rng: random.Random) -> None:
    """Chinese and other GPT-2 models with BERT's tokenizer, as vocab.txt."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES.split(), *LETTERS]
    tokens += [f"##{letter}" for letter in LETTERS if letter.isalnum()]
    lines = list(dict.fromkeys(token for token in tokens if token.strip()))
    config: dict[str, Any] = {"tokenizer_class": "BertTokenizer"}
    config |= dict(
        some(
            rng,
            {
                "do_lower_case": rng.random() < 0.5,
                "strip_accents": rng.choice([True, False, None]),
                "tokenize_chinese_chars": rng.random() < 0.5,
                "clean_up_tokenization_spaces": rng.random() < 0.5,
                "bos_token": "[CLS]",
            }.items(),
            0,
            3,
        )
    )
    if rng.random() < 0.6:
        draft.other_files["vocab.txt"] = "\n".join(lines).encode()
        draft.json_files[TOKENIZER] = config
        if rng.random() < 0.2:
            del draft.json_files[TOKENIZER]  # uer/gpt2-chinese and others: the vocab.txt tells it
        return
    pieces = Tokenizer(models.WordPiece({token: i for i, token in enumerate(lines)}, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=rng.random() < 0.5)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece("##", cleanup=rng.random() < 0.5)
    if rng.random() < 0.6:
        single, ids = rng.choice([("[CLS] $A [SEP]", True), ("[CLS] $A", True)])
        special = [("[CLS]", 2), ("[SEP]", 3)] if ids else []
        pieces.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    pieces.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    _save(draft, pieces)
    draft.json_files[TOKENIZER] = rng.choice([config, {"tokenizer_class": "PreTrainedTokenizerFast"}])


def _words(draft: Draft, rng: random.Random) -> None:
    """Whole words of a small language: music, moves of chess, proteins."""
    words = sorted(set(STORY.replace("\n", " ").split()))
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *words, *LETTERS]))}
    word_level = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    word_level.pre_tokenizer = rng.choice(
        [
            pre_tokenizers.Whitespace(),
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.CharDelimiterSplit(" "),
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]),
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Whitespace()]),
            pre_tokenizers.Split(Regex(r"\s+"), rng.choice(["removed", "isolated", "merged_with_previous"])),
        ]
    )
    word_level.decoder = rng.choice([None, decoders.Fuse(), decoders.Replace("<unk>", "?"), decoders.WordPiece("##")])
    _save(draft, word_level)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if rng.random() < 0.6:
        config |= {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    draft.json_files[TOKENIZER] = config


def _characters(draft: Draft, rng: random.Random) -> None:
    """One token a character."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    unknown = rng.random() < 0.5
    kind = rng.choice(["words", "bpe", "unigram"])
    if kind == "words":
        characters = Tokenizer(models.WordLevel(vocabulary, unk_token="?" if unknown else "[none]"))
    elif kind == "bpe":
        characters = Tokenizer(models.BPE(vocabulary, [], unk_token="?" if unknown else None))
    else:
        characters = Tokenizer(models.Unigram([(letter, -1.0) for letter in LETTERS], 0 if unknown else None))
    characters.pre_tokenizer = rng.choice(
        [pre_tokenizers.Split("", "isolated"), pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")]
    )
    characters.decoder = decoders.Fuse()
    _save(draft, characters)
    draft.json_files[TOKENIZER] = {"tokenizer_class": "PreTrainedTokenizerFast"}


@cache
def _sentencepiece(kind: str, byte_fallback: bool, pad_id: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORY.splitlines() * 20),
        model_writer=model,
        vocab_size=420,
        model_type=kind,
        byte_fallback=byte_fallback,
        normalization_rule_name="identity" if byte_fallback else "nmt_nfkc",
        remove_extra_whitespaces=not byte_fallback,
        hard_vocab_limit=False,
        pad_id=pad_id,
        minloglevel=2,
    )
    return model.getvalue()


def _sentencepiece_file(draft: Draft, rng: random.Random) -> None:
    """A sentencepiece model of T5's kind (rinna/japanese-gpt2), of Llama's, or of Albert's."""
    file, name, kind, fallback, pad_id = rng.choice(
        [
            ("spiece.model", "T5Tokenizer", "unigram", False, 3),
            ("tokenizer.model", "LlamaTokenizer", "bpe", True, 3),
            ("spiece.model", "AlbertTokenizer", "unigram", False, 3),
            ("sentencepiece.bpe.model", "XLMRobertaTokenizer", "unigram", False, -1),
        ]
    )
    draft.other_files[file] = _sentencepiece(kind, fallback, pad_id)
    draft.json_files[TOKENIZER] = {"tokenizer_class": name} | dict(
        some(
            rng,
            {
                "legacy": rng.random() < 0.5,
                "add_prefix_space": rng.choice([True, False, None]),
                "extra_ids": 0,
                "do_lower_case": rng.random() < 0.5,
                "add_bos_token": rng.random() < 0.5,
                "add_eos_token": rng.random() < 0.5,
            }.items(),
            0,
            2,
        )
    )


def _unigram(draft: Draft, rng: random.Random) -> None:
    """tokenizer.json of Unigram behind Metaspace."""
    words = sorted({f"▁{word}" for word in STORY.split()}) + [f"▁{letter}" for letter in "abcdefgh"] + ["▁", *LETTERS]
    scores = [(word, -len(word) - rng.random()) for word in dict.fromkeys(words)]
    unigram = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scores], 2))
    scheme = rng.choice(["always", "first", "never"])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=rng.random() < 0.7)
    unigram.decoder = decoders.Metaspace("▁", scheme, split=rng.random() < 0.7)
    unigram.normalizer = rng.choice(
        [
            None,
            normalizers.Nmt(),
            normalizers.NFKC(),
            normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]),
        ]
    )
    if rng.random() < 0.5:
        unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    _save(draft, unigram)
    names = ["PreTrainedTokenizerFast", "T5Tokenizer", "T5TokenizerFast", "AlbertTokenizer"]
    draft.json_files[TOKENIZER] = {"tokenizer_class": rng.choice(names)}
    if draft.json_files[TOKENIZER]["tokenizer_class"].startswith("T5"):
        draft.json_files[TOKENIZER]["extra_ids"] = 0


@cache
def _byte_fallback_bpe() -> str:
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.train_from_iterator(
        [STORY], trainers.BpeTrainer(vocab_size=400, special_tokens=special, limit_alphabet=60, show_progress=False)
    )
    content = json.loads(bpe.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(content)


def _byte_fallback(draft: Draft, rng: random.Random) -> None:
    """tokenizer.json of Llama's kind: BPE over words with ▁, and a token for each byte."""
    bpe = Tokenizer.from_str(_byte_fallback_bpe())
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if rng.random() < 0.7:
        steps.append(decoders.Strip(" ", 1, 0))
    bpe.decoder = decoders.Sequence(steps)
    if rng.random() < 0.5:
        bpe.pre_tokenizer = None
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if rng.random() < 0.5:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    _save(draft, bpe)
    names = ["PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast"]
    draft.json_files[TOKENIZER] = {"tokenizer_class": rng.choice(names)}


def _save(draft: Draft, tokenizer: Tokenizer) -> None:
    draft.json_files["tokenizer.json"] = json.loads(tokenizer.to_str())


def _legacy_bpe(draft: Draft, model: dict[str, Any]) -> None:
    draft.json_files["vocab.json"] = model["vocab"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    draft.other_files["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""]).encode()


KINDS: dict[str, Callable[[Draft, random.Random], None]] = {
    "byte-level BPE": _byte_level,
    "byte-level BPE, older files": _byte_level_files,
    "words that end with </w>": _word_ends,
    "WordPiece": _word_pieces,
    "whole words": _words,
    "characters": _characters,
    "sentencepiece": _sentencepiece_file,
    "Unigram": _unigram,
    "byte fallback": _byte_fallback,
}


def _in_tokenizer(part: str, *entries: Any) -> Callable[[Draft, random.Random], None]:
    """Replaces a part of tokenizer.json by one of the entries; nothing where there is no such file."""

    def change(draft: Draft, rng: random.Random) -> None:
        if (content := draft.json_files.get("tokenizer.json")) is not None:
            content[part] = json.loads(json.dumps(rng.choice(entries)))

    return change


def _settings(**options: tuple[Any, ...]) -> Callable[[Draft, random.Random], None]:
    """Sets fields of tokenizer_config.json."""

    def change(draft: Draft, rng: random.Random) -> None:
        drawn = {name: rng.choice(values) for name, values in options.items()}
        draft.json_files[TOKENIZER] = draft.json_files.get(TOKENIZER, {}) | drawn

    return change


def _state(part: Any) -> Any:
    return json.loads(part.__getstate__())


ADDED = ["<tool>", "<|user|>", "river", " the", "é", "[PAD]", "Miller", "今天", "<extra_0>", "  ", "\n"]


def _added_tokens(draft: Draft, rng: random.Random) -> None:
    """Tokens that were added with every flag, where transformers writes them now or wrote them before."""
    if "tokenizer.json" not in draft.json_files:
        size = max(vocabulary(draft).values(), default=0) + 1
        tokens = some(rng, ADDED, 1, 3)
        if rng.random() < 0.5:
            draft.json_files["added_tokens.json"] = {token: size + i for i, token in enumerate(tokens)}
        else:
            config = draft.json_files.setdefault(TOKENIZER, {})
            config["added_tokens_decoder"] = {str(size + i): _flags(token, rng) for i, token in enumerate(tokens)}
        return
    content = draft.json_files["tokenizer.json"]
    backend = Tokenizer.from_str(json.dumps(content))
    for token in some(rng, ADDED, 1, 3):
        flags = _flags(token, rng)
        added = AddedToken(**flags)
        (backend.add_special_tokens if flags["special"] else backend.add_tokens)([added])
    draft.json_files["tokenizer.json"] = json.loads(backend.to_str())


def _flags(token: str, rng: random.Random) -> dict[str, Any]:
    flags = {name: rng.random() < 0.3 for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
    return {"content": token, **flags}


def vocabulary(draft: Draft) -> dict[str, int]:
    if "vocab.json" in draft.json_files:
        return dict(draft.json_files["vocab.json"])
    lines = draft.other_files.get("vocab.txt", b"").decode().splitlines()
    return {line: i for i, line in enumerate(lines)}


def _special_map(draft: Draft, rng: random.Random) -> None:
    names = some(rng, ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"], 1, 3)
    plain = rng.choice([END, "<s>", "[PAD]", "</s>", "the"])
    written = {"content": plain, "lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    draft.json_files["special_tokens_map.json"] = {name: rng.choice([plain, written]) for name in names}
    if rng.random() < 0.3:
        draft.json_files["special_tokens_map.json"]["additional_special_tokens"] = ["<tool>", "river"]


def _drop(name: str) -> Callable[[Draft, random.Random], None]:
    def change(draft: Draft, rng: random.Random) -> None:
        draft.json_files.pop(name, None)

    return change


_NORMALIZERS = [
    normalizers.Lowercase(),
    normalizers.NFKC(),
    normalizers.NFD(),
    normalizers.Strip(left=True, right=False),
    normalizers.Replace("river", "sea"),
    normalizers.Replace(Regex(r"\s+"), " "),
    normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    normalizers.Prepend("_"),
    normalizers.BertNormalizer(),
]
_DECODERS = [
    decoders.Fuse(),
    decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
    decoders.Sequence([decoders.Fuse(), decoders.Replace("e", "E")]),
    decoders.Sequence([decoders.Replace(Regex("[aeiou]+"), "*"), decoders.Fuse()]),
    decoders.WordPiece("##", cleanup=True),
    decoders.Metaspace(),
    decoders.BPEDecoder("</w>"),
    decoders.CTC(),
    decoders.ByteFallback(),
]

TOKENIZER_ODDITIES = [
    Oddity("normalizer", _in_tokenizer("normalizer", *map(_state, _NORMALIZERS))),
    Oddity("decoder", _in_tokenizer("decoder", None, *map(_state, _DECODERS))),
    Oddity(
        "truncation",
        _in_tokenizer("truncation", {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}),
    ),
    Oddity(
        "padding",
        _in_tokenizer(
            "padding",
            {
                "strategy": {"Fixed": 12},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            },
        ),
    ),
    Oddity("added tokens", _added_tokens),
    Oddity("added tokens", _added_tokens),
    Oddity("special map", _special_map),
    Oddity("clean-up", _settings(clean_up_tokenization_spaces=(True, True, False, None))),
    Oddity("prefix space", _settings(add_prefix_space=(True, False))),
    Oddity("prefix space of null", _settings(add_prefix_space=(None,)), only_edgelm=True),
    Oddity("begin and end", _settings(add_bos_token=(True, False), add_eos_token=(True, False))),
    Oddity("pad", _settings(pad_token=("[PAD]", END, None), padding_side=("left", "right"))),
    Oddity("length", _settings(model_max_length=(8, 512, 10**30, None), truncation_side=("left", "right"))),
    Oddity("split specials", _settings(split_special_tokens=(True, False))),
    Oddity("template", _settings(chat_template=("{% for m in messages %}{{ m.content }}{% endfor %}",))),
    Oddity("a class that does not exist", _settings(tokenizer_class=("MyTokenizer",))),
    Oddity("more specials", _settings(additional_special_tokens=(["<a>", "<b>"], ["river"], []))),
    Oddity("extra specials", _settings(extra_special_tokens=({"image_token": "<img>"}, {}))),
    Oddity("own code", _settings(auto_map=({"AutoTokenizer": ["tokenization.My", None]},))),
    Oddity("names of files", _settings(tokenizer_file=("/root/tokenizer.json", None), name_or_path=("gpt2", "")), True),
    Oddity("no tokenizer_config.json", _drop(TOKENIZER)),
    Oddity("ByT5", _settings(tokenizer_class=("ByT5Tokenizer",)), refused="tokenizer"),
]
