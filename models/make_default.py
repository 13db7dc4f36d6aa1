"""Makes the embedded default model from what ``edgelm pretrain`` wrote: ``python models/make_default.py stories-6m``.

The checkpoint is exported as int8; sampling, and room for a whole story, are its defaults: a first run reads well.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from edgelm_models import default_bundle_path

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 300}

CARD = """---
license: apache-2.0
---
A GPT-2 of 6 layers, 256 wide, 4 heads, context 512, with a byte-level BPE of 4,096 tokens; 5.9 M parameters, tied head.
Trained from scratch by `edgelm pretrain` on {documents} short English stories (a slice of TinyStories,
CDLA-Sharing-1.0): {tokens} tokens in {steps} steps, {passes:.1f} passes, on 2 CPU cores.

Held out: {held_out_documents} other stories of the slice, {held_out_tokens} tokens; perplexity there {perplexities}.

It tells simple stories for small children and knows nothing else. It may contradict itself; it has not been made safe
for any use where that matters.
"""


def card(report: Path) -> str:
    """The model card, from the ``report.json`` of the training run."""
    run = json.loads(report.read_text(encoding="utf-8"))
    facts, losses = run["facts"], run["held_out"].items()
    return CARD.format(
        documents=f"{facts['documents to train on']:,}",
        tokens=f"{facts['tokens seen']:,}",
        steps=f"{facts['steps']:,}",
        passes=facts["passes over the data"],
        held_out_documents=facts["documents held out"],
        held_out_tokens=f"{facts['tokens held out']:,}",
        perplexities=" and ".join(f"{math.exp(loss):.2f} in windows of {window} tokens" for window, loss in losses),
    )


def main(checkpoint: Path) -> None:
    """Export `checkpoint` over the embedded default."""
    target = default_bundle_path()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / checkpoint.name
        shutil.copytree(checkpoint, source)
        settings = json.loads((source / "generation_config.json").read_text(encoding="utf-8"))
        (source / "generation_config.json").write_text(json.dumps({**settings, **SAMPLING}), encoding="utf-8")
        (source / "README.md").write_text(card(checkpoint / "report.json"), encoding="utf-8")
        made = Path(folder) / target.name
        command = [sys.executable, "-m", "edgelm", "export", str(source), "-o", str(made), "--precision", "int8"]
        subprocess.run(command, check=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(made, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
