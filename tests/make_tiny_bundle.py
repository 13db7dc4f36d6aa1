"""Makes ``tests/data/tiny-gpt2`` and its golden ids: ``python tests/make_tiny_bundle.py`` (needs the build side).

A GPT-2 of 2 layers, 32 wide, with random weights and a byte-level BPE of 300 tokens, as an fp32 bundle: small enough
to commit, real enough to run the whole path. The golden file holds what transformers computes for the same weights.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

from edgelm_export import pipeline

DATA = Path(__file__).parent / "data"
BUNDLE = DATA / "tiny-gpt2"
GOLDEN = DATA / "tiny-gpt2-golden.json"
PROMPTS = ["Hello, my name is", "a", "naïve café ☕", "你好，世界", "🙂🙃", "  spaces\n\nand lines\t", "1 + 1 = 2" * 3]
CONTEXT = 64


def main() -> None:
    """Write the bundle and the golden file."""
    pipeline.EVALUATION_TOKENS = 512
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "tiny-gpt2"
        model = _save_checkpoint(checkpoint)
        shutil.rmtree(BUNDLE, ignore_errors=True)
        pipeline.export(str(checkpoint), BUNDLE, "fp32")
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        cases = [_golden_case(model, tokenizer, prompt) for prompt in PROMPTS]
    text = json.dumps({"made_with": f"transformers {transformers.__version__}", "cases": cases}, ensure_ascii=False)
    GOLDEN.write_text(text + "\n", encoding="utf-8")


def _save_checkpoint(folder: Path) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # the usual 0.02 gives nearly flat logits, which test nothing
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        ["Hello, my name is Tiny. The cat sat on the mat and the dog ran to the house, and then the end."],
        vocab_size=300,
        min_frequency=1,
        special_tokens=["<|endoftext|>"],
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    return model


def _golden_case(model: transformers.GPT2LMHeadModel, tokenizer: object, prompt: str) -> dict[str, object]:
    ids = tokenizer(prompt).input_ids  # type: ignore[operator]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]  # (V,)
        greedy = model.generate(
            torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
        )[0, len(ids) :].tolist()
    return {
        "prompt": prompt,
        "ids": ids,
        "last_logits": [round(float(x), 5) for x in logits],
        "greedy_ids": greedy,
        "greedy_text": tokenizer.decode(greedy),  # type: ignore[attr-defined]
    }


if __name__ == "__main__":
    main()
