"""Makes a bundle of this folder from a checkpoint that ``edgelm pretrain`` wrote.

    python models/make_bundle.py stories stories-6m

Exports the checkpoint as int8. Its defaults sample, so that a first text reads well, and its card is written from the
report of the training run.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgelm_models import default_bundle_path

CARD = """---
license: apache-2.0
---
A GPT-2 of 6 layers, 256 wide, 4 heads, context 512, with a byte-level BPE of 4,096 tokens; 5.9 M parameters, tied head.
Trained from scratch by `edgelm pretrain` on {documents} {texts}:
{tokens} tokens in {steps} steps, {passes:.1f} passes, on 2 CPU cores.

Held out were {held_out_documents} other documents with {held_out_tokens} tokens. Perplexity on them is {perplexities}.

"""

STORIES = """\
It tells simple stories for small children and knows nothing else. It may contradict itself. It has not been made safe
for any use where that matters.
"""

CHATS = """\
It chats about films, music and sports of 2017 and before, as people do. What it says about them is made up, and it has
not been made safe for any use where that matters. Each line is a turn. `python examples/chat.py` answers each of your
turns with one turn, and `edgelm run` continues both sides.
"""


@dataclass(frozen=True, slots=True)
class Published:
    """A bundle of this folder."""

    folder: Path
    texts: str
    """The texts that the model was trained on."""
    use: str
    """Paragraph about the use of the model."""
    max_new_tokens: int


BUNDLES = {
    "stories": Published(
        folder=default_bundle_path(),
        texts="short English stories (a slice of TinyStories, CDLA-Sharing-1.0)",
        use=STORIES,
        max_new_tokens=300,
    ),
    "dialogue": Published(
        folder=Path(__file__).resolve().parent / "dialogue-6m-int8",
        texts="English chats (The Self-dialogue Corpus, Krause et al. 2017, arXiv 1709.09816, BSD-3-Clause)",
        use=CHATS,
        max_new_tokens=200,
    ),
}


def card(bundle: Published, report: Path) -> str:
    """The text of the model card.

    Args:
        bundle: the bundle to describe.
        report: ``report.json`` of the training run.
    """
    run = json.loads(report.read_text(encoding="utf-8"))
    facts, losses = run["facts"], run["held_out"].items()
    head = CARD.format(
        texts=bundle.texts,
        documents=f"{facts['documents to train on']:,}",
        tokens=f"{facts['tokens seen']:,}",
        steps=f"{facts['steps']:,}",
        passes=facts["passes over the data"],
        held_out_documents=facts["documents held out"],
        held_out_tokens=f"{facts['tokens held out']:,}",
        perplexities=" and ".join(f"{math.exp(loss):.2f} in windows of {window} tokens" for window, loss in losses),
    )
    return head + bundle.use


def main(bundle: Published, checkpoint: Path) -> None:
    """Export `checkpoint`, and replace the bundle by the result."""
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": bundle.max_new_tokens}
    sampling["top_k"] = 0  # otherwise transformers' default, 50
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / checkpoint.name
        shutil.copytree(checkpoint, source)
        settings = json.loads((source / "generation_config.json").read_text(encoding="utf-8"))
        (source / "generation_config.json").write_text(json.dumps({**settings, **sampling}), encoding="utf-8")
        (source / "README.md").write_text(card(bundle, checkpoint / "report.json"), encoding="utf-8")
        made = Path(folder) / bundle.folder.name
        command = [sys.executable, "-m", "edgelm", "export", str(source), "-o", str(made), "--precision", "int8"]
        subprocess.run(command, check=True)
        shutil.rmtree(bundle.folder, ignore_errors=True)
        shutil.move(made, bundle.folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a bundle of this folder from a checkpoint.")
    parser.add_argument("bundle", choices=BUNDLES)
    parser.add_argument("checkpoint", type=Path, help="folder that edgelm pretrain wrote")
    options = parser.parse_args()
    main(BUNDLES[options.bundle], options.checkpoint)
