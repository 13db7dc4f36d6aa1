"""Makes ``tests/data/tiny-gpt2-searches.json``: what the last transformers that hold two methods compute for the tiny
bundle's weights. Group beam search left the library after 4.56.2, contrastive search after 4.55.4.

    python3 -m venv /tmp/tf456 && /tmp/tf456/bin/pip install torch==2.13.0 transformers==4.56.2
    python3 -m venv /tmp/tf455 && /tmp/tf455/bin/pip install torch==2.13.0 transformers==4.55.4
    python -m tests.make_decoding_goldens /tmp/tf456/bin/python /tmp/tf455/bin/python
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "data" / "tiny-gpt2-searches.json"
VOCAB, NEW_TOKENS = 300, 14
GROUP_CASES, CONTRASTIVE_CASES = 60, 40


def main() -> None:
    """Let each interpreter compute its half, and write the file."""
    if sys.argv[1] == "compute":
        sys.stdout.write(json.dumps(compute(sys.argv[2], Path(sys.argv[3]))))
        return
    from tests.make_tiny_bundle import _save_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "tiny-gpt2"
        _save_checkpoint(checkpoint)
        content = {}
        for kind, python in zip(("groups", "contrastive"), sys.argv[1:3], strict=True):
            command = [python, __file__, "compute", kind, str(checkpoint)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            content[kind] = json.loads(done.stdout.splitlines()[-1])
    GOLDEN.write_text(json.dumps(content) + "\n", encoding="utf-8")


def compute(kind: str, checkpoint: Path) -> dict[str, Any]:
    """Random prompts and options, and the new ids of every returned row."""
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    rng, cases = random.Random(kind), []
    for _ in range(GROUP_CASES if kind == "groups" else CONTRASTIVE_CASES):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
        options = (group_options if kind == "groups" else contrastive_options)(rng)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=options["eos_token_id"][0], **options
            )
        rows = []
        for row in output[:, len(prompt) :].tolist():
            ends = [place for place, token in enumerate(row) if token in options["eos_token_id"]]
            rows.append(row[: ends[0]] if ends else row)
        cases.append({"prompt": prompt, "options": options, "rows": rows})
    return {"made_with": f"transformers {transformers.__version__}", "cases": cases}


def common_options(rng: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "eos_token_id": rng.sample(range(VOCAB), rng.choice([1, 1, 40])),
    }
    if rng.random() < 0.3:
        options["repetition_penalty"] = round(rng.uniform(1.05, 1.6), 2)
    if rng.random() < 0.3:
        options["no_repeat_ngram_size"] = rng.randint(2, 3)
    if rng.random() < 0.2:
        options["suppress_tokens"] = rng.sample(range(VOCAB), 30)
    if rng.random() < 0.2:
        options["min_new_tokens"] = rng.randint(1, 8)
    return options


def group_options(rng: random.Random) -> dict[str, Any]:
    groups = rng.randint(2, 4)
    beams = groups * rng.randint(1, 3)
    return common_options(rng) | {
        "num_beams": beams,
        "num_beam_groups": groups,
        "diversity_penalty": round(rng.uniform(0.1, 4), 2),
        "num_return_sequences": rng.randint(1, beams),
        "length_penalty": rng.choice([0.0, 0.5, 1.0, 2.0]),
        "early_stopping": rng.choice([True, False, "never"]),
        "do_sample": False,
    }


def contrastive_options(rng: random.Random) -> dict[str, Any]:
    return common_options(rng) | {"penalty_alpha": round(rng.uniform(0.1, 1), 2), "top_k": rng.randint(2, 12)}


if __name__ == "__main__":
    main()
