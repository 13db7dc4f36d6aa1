"""Small folders in the layout of the public data sets, and a tiny base that can read them."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "sun", "moon"]
ABROAD = {"red": "rot", "green": "gruen", "blue": "blau", "cat": "Katze", "dog": "Hund", "bird": "Vogel"}
TRAIN, DEV = 40, 6


@dataclass(frozen=True)
class Kitchen:
    """Files that tests must not change."""

    base: Path
    """A random GPT-2 in Hugging Face layout: 2 layers, 32 wide, context 128."""
    data: Path
    """A folder with a file or a folder for each recipe."""


def write_data_sets(folder: Path) -> None:
    """Write "sst2", "multi30k", "dialogsum", "stsb" and "self_dialogue.jsonl" into `folder`."""
    draw = random.Random(0)

    def sentence(count: int = 3) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    for name in ("sst2", "multi30k", "dialogsum", "stsb"):
        (folder / name).mkdir()
    for part, other, count in (("train", "train", TRAIN), ("dev", "val", DEV)):
        texts = [sentence() for _ in range(count)]
        translated = [" ".join(ABROAD.get(word, word) for word in text.split()) for text in texts]
        rows = "".join(f"{text}\t{int('cat' in text)}\n" for text in texts)
        (folder / "sst2" / f"{part}.tsv").write_text(rows, encoding="utf-8")
        for language, lines in (("en", texts), ("de", translated), ("fr", translated)):
            file = folder / "multi30k" / f"{other}.{language}"
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        dialogues = [
            {"fname": "1", "dialogue": f"#Person1#: {text}.\n#Person2#: {sentence()}!", "summary": text, "topic": "a"}
            for text in texts
        ]
        dump = repr if part == "train" else json.dumps
        file = folder / "dialogsum" / f"dialogsum.{part}.jsonl"
        file.write_text("\n".join(dump(one) for one in dialogues), encoding="utf-8")
        pairs = "".join(f'"{text}, yes",{sentence()},{draw.randint(0, 10) / 2}\n' for text in texts)
        (folder / "stsb" / f"stsb-en-{part}.csv").write_text(pairs, encoding="utf-8")
    chats = [{"topic": "a", "turns": [sentence(), sentence(2), sentence()]} for _ in range(90)]
    (folder / "self_dialogue.jsonl").write_text("\n".join(map(json.dumps, chats)) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Kitchen:
    import torch
    import transformers

    from edgelm_train.data.bpe import save_bpe, train_bpe
    from tests.export.checkpoints import randomize

    folder = tmp_path_factory.mktemp("kitchen")
    (folder / "data").mkdir()
    write_data_sets(folder / "data")
    text = "\n".join(file.read_text(encoding="utf-8") for file in (folder / "data").glob("*/*"))
    tokenizer = train_bpe([text], 320)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    randomize(model)
    model.save_pretrained(folder / "base")
    save_bpe(tokenizer, folder / "base")
    return Kitchen(folder / "base", folder / "data")
