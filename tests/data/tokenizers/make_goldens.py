"""Write the small tokenizers of this folder, finished/ and goldens.json; the goldens come from transformers 4.57.6.

python tests/data/tokenizers/make_goldens.py            # goldens.json and finished/ from the committed tokenizers
python tests/data/tokenizers/make_goldens.py --train    # the tokenizers as well

A case is a folder of this directory with some files laid over it. finished/ holds the tokenizer.json that the build
side makes of each case; cases with equal results share one file.
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizerFast, GPT2TokenizerFast, PreTrainedTokenizerFast

from edgelm.errors import TokenizerError
from edgelm_export.source.tokenizer import load_tokenizer

HERE = Path(__file__).parent

STORY = """The miller's daughter didn't sleep that night. She'd heard the wheel turning, though no water ran, and
she couldn't say why. "Who's there?" she called; nobody answered. In the morning there were 12 sacks of flour, 3 loaves
of bread and 1 letter by the door. The letter said: we've taken the river, but we'll bring it back before the winter.
They walked along the dry bed of the river for 40 miles, and they're walking still, I'm told. Once a year the wheel
turns again, and the bread tastes of salt. C'est la vie, said the baker, déjà vu! Straße, naïve, jalapeño.
磨坊主的女儿听见水轮在转。今天天气很好，我们去公园散步。
    for word in river:
        print(word, end=" ")
"""

HANZI = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动"
HANZI += "同工也能下过子说产种面而方后多定行学"
HANZI += "今天气很好磨坊女儿听见水轮转去公园散步龍馬飞鸟"
PIECES = """the of and river miller wheel un ##aff ##able play ##ing ##ed ##s cafe café Ca ##fe don do ##n not n't
hello world , . ! ? ' - : ; ( ) [ ] # ## ##、 、 。 ， ？ é ##é É"""

TEXTS = [
    "",
    " ",
    "  \t\n ",
    "Hello, world! The river isn't here.",
    "  leading and   inner  spaces and trailing  ",
    "don't can't we've I'm they're it's he'll 'quoted ' n't . , ? !",
    "Déjà vu: Straße NAÏVE jalapeño CAFÉ café cafe\u0301",
    "磨坊主的女儿听见水轮在转。今天天气很好，我们去公园散步？",
    "中英 mixed 文字 text，全角ＡＢＣ１２３　空格",
    "🎉 emoji 👨‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇨🇳",
    "العربية من اليمين، עברית\u200f mixed \u202eRTL\u202c",
    "a\u0301\u0302\u0303 zalgo " + "o" + "\u0336" * 40,
    "NUL \0 and \x01\x7f\x85\xa0\xad\ufeff\ufffd\u2028 controls",
    "<|endoftext|>before<|endoftext|> after <|endoftext|>",
    "[CLS] [SEP] [MASK] [PAD][UNK] [cls] <tool> <TOOL>x<tool>  <pad>",
    "def f(x):\n    return x ** 2  # ok\r\n\r\n\tend",
    "unaffable playing unplayed cafés ##ing # #ing",
    "x" * 300 + " " + "^" * 300 + " " * 300 + "y",
    "0123 4567 1,234.5 １２ ²³ ½ Ⅷ",
    "𝕏𝒴 𐍈 ﷽ ﬁ ǅ İ ß ŉ",
]

ADDED = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": False}
TOOL = {**ADDED, "content": "<tool>", "lstrip": True}
TYPED = {**ADDED, "content": "<pad>", "special": True, "normalized": False, "__type": "AddedToken"}

# name: (folder, transformers' class or "auto", files laid over the folder's)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bpe-json": ("byte_bpe_json", "auto", {}),
    "bpe-json-base": ("byte_bpe_json", "fast", {"tokenizer_config.json": {}}),
    "bpe-json-gpt2": ("byte_bpe_json", "gpt2", {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}),
    "bpe-json-model-type": (
        "byte_bpe_json",
        "auto",
        {"tokenizer_config.json": {}, "config.json": {"model_type": "gpt2"}},
    ),
    "bpe-json-prefix-space": (
        "byte_bpe_json",
        "auto",
        {
            "tokenizer_config.json": {
                "tokenizer_class": "GPT2Tokenizer",
                "add_prefix_space": True,
                "add_bos_token": True,
            }
        },
    ),
    "bpe-json-clean-up": (
        "byte_bpe_json",
        "auto",
        {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": True}},
    ),
    "bpe-json-added": (
        "byte_bpe_json",
        "auto",
        {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "added_tokens_decoder": {"0": {**ADDED, "content": "<|endoftext|>", "special": True}, "512": TOOL},
                "pad_token": "<pad>",
                "additional_special_tokens": ["river"],
                "extra_special_tokens": {"image_token": "<img>"},
            }
        },
    ),
    "bpe-json-split-special": (
        "byte_bpe_json",
        "auto",
        {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "split_special_tokens": True}},
    ),
    "bpe-files": ("byte_bpe", "gpt2", {}),
    "bpe-files-bos": (
        "byte_bpe",
        "gpt2",
        {"tokenizer_config.json": {"add_bos_token": True, "add_prefix_space": True, "pad_token": TYPED}},
    ),
    "bpe-files-legacy": (
        "byte_bpe",
        "gpt2",
        {
            "added_tokens.json": {"<tool>": 512, "<pad>": 513},
            "special_tokens_map.json": {
                "bos_token": {**ADDED, "content": "<|endoftext|>"},
                "pad_token": "<pad>",
                "additional_special_tokens": ["<tool>", "磨坊"],
            },
        },
    ),
    "chinese": ("chinese", "bert", {}),
    "chinese-auto": ("chinese", "auto", {"config.json": {"model_type": "gpt2", "tokenizer_class": "BertTokenizer"}}),
    "chinese-cased": (
        "chinese",
        "bert",
        {"tokenizer_config.json": {"do_lower_case": False, "clean_up_tokenization_spaces": False}},
    ),
    "chinese-accents": (
        "chinese",
        "bert",
        {"tokenizer_config.json": {"strip_accents": False, "tokenize_chinese_chars": False, "do_lower_case": True}},
    ),
    "chinese-names": (
        "chinese",
        "bert",
        {
            "tokenizer_config.json": {
                "cls_token": "<s>",
                "sep_token": "</s>",
                "bos_token": "[CLS]",
                "eos_token": "[SEP]",
            },
            # Lower case only: from tokenizers 0.23 on, an added token is decoded in its normalized form.
            "added_tokens.json": {"<tool>": 200, "[mask]": 201},
        },
    ),
    "byte-fallback": ("byte_fallback", "auto", {}),
    "chars": ("chars", "auto", {}),
    "chars-model-type": ("chars", "auto", {"tokenizer_config.json": {}, "config.json": {"model_type": "gpt2"}}),
}


def train() -> None:
    """Write the tokenizers themselves."""
    for name in ("byte_bpe", "byte_bpe_json", "byte_fallback", "chinese", "chars"):
        (HERE / name).mkdir(exist_ok=True)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([STORY], trainer)
    bpe.model.save(str(HERE / "byte_bpe"))
    bpe.save(str(HERE / "byte_bpe_json" / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 64}
    (HERE / "byte_bpe_json" / "tokenizer_config.json").write_text(json.dumps(config))

    special = ["<unk>", "<s>", "</s>"]
    pieces = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    pieces.decoder = decoders.Sequence(steps)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special + bytes_, limit_alphabet=60)
    pieces.train_from_iterator([STORY], trainer)
    state = json.loads(pieces.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    (HERE / "byte_fallback" / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (HERE / "byte_fallback" / "tokenizer_config.json").write_text(json.dumps(config))

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *HANZI, *letters, *PIECES.split()]
    tokens += ["##" + char for char in letters]
    lines = list(dict.fromkeys(tokens))
    (HERE / "chinese" / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    (HERE / "chinese" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))

    chars = {char: i for i, char in enumerate(sorted(set("\n .,?-:" + letters + letters.upper())))}
    char = Tokenizer(models.WordLevel(chars, unk_token="\n"))
    char.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    char.decoder = decoders.Fuse()
    char.save(str(HERE / "chars" / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "\n"}
    (HERE / "chars" / "tokenizer_config.json").write_text(json.dumps(config))


def lay_out(name: str, folder: Path) -> None:
    """Copy a case's tokenizer into `folder` and lay the case's own files over it; {} removes a file."""
    base, _, files = CASES[name]
    shutil.copytree(HERE / base, folder, dirs_exist_ok=True)
    for file, content in files.items():
        (folder / file).unlink(missing_ok=True)
        if content:
            (folder / file).write_text(json.dumps(content), encoding="utf-8")


def reference(name: str, folder: Path) -> Any:
    """Return transformers' tokenizer for a laid-out case."""
    classes = {"gpt2": GPT2TokenizerFast, "bert": BertTokenizerFast, "fast": PreTrainedTokenizerFast}
    return classes.get(CASES[name][1], AutoTokenizer).from_pretrained(str(folder), local_files_only=True)


def main() -> None:
    """Write goldens.json."""
    if "--train" in sys.argv:
        train()
    goldens: dict[str, Any] = {"texts": TEXTS, "cases": {}}
    shutil.rmtree(HERE / "finished", ignore_errors=True)
    (HERE / "finished").mkdir()
    finished: dict[str, str] = {}
    for name, (base, _, files) in CASES.items():
        with tempfile.TemporaryDirectory() as temporary:
            lay_out(name, Path(temporary))
            hf = reference(name, Path(temporary))
            try:
                content = load_tokenizer(temporary).to_json()
            except TokenizerError:  # split_special_tokens: one file cannot hold it
                content = None
        if content is not None and content not in finished:
            finished[content] = f"{name}.json"
            (HERE / "finished" / finished[content]).write_text(content, encoding="utf-8", newline="\n")
        rng = random.Random(7)
        streams = [[rng.randrange(max(hf.get_vocab().values()) + 1) for _ in range(60)] for _ in range(4)]
        ids = [hf(text).input_ids for text in TEXTS]
        goldens["cases"][name] = {
            "base": base,
            "files": files,
            "finished": None if content is None else finished[content],
            "ids": ids,
            "plain": [hf(text, add_special_tokens=False).input_ids for text in TEXTS],
            "streams": streams,
            "decoded": [hf.decode(one) for one in ids + streams],
            "skipped": [hf.decode(one, skip_special_tokens=True) for one in ids + streams],
        }
    (HERE / "goldens.json").write_text(json.dumps(goldens, ensure_ascii=True), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
