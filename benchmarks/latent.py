"""A latent bundle on held-out texts: reconstruction, divergence, active dimensions, interpolations.

    edgelm finetune CHECKPOINT --data train.en --held-out val.en --latent --alone --epochs 1.25 --batch-size 32 \\
        --evaluations 3 --patience 0 --out captions
    edgelm export captions -o captions-int8
    python -m benchmarks.latent captions captions-int8 --texts val.en

`train.en` and `val.en` are the English captions of Multi30k, which are for research only; any file with a short text on
each line will do. The bundle is measured with the runtime. `captions/report.json` has what torch measured at the end of
training, and the loss of the same model trained without z. The first texts are compared with torch one by one. Prints
Markdown.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

import edgelm
from edgelm.model import Model

if TYPE_CHECKING:
    from edgelm_export.source.checkpoint import Checkpoint

PAIRS = 10
STEPS = 5


@dataclass(frozen=True, slots=True)
class Figures:
    """Measured on N texts behind their vectors; perplexities count the end token too."""

    texts: int
    tokens: int
    reconstruction: float
    """Perplexity with z drawn from q(z|x)."""
    of_means: float
    """Perplexity with the mean of q(z|x) as z."""
    shuffled: float
    """Perplexity with the z of another text."""
    kl_nats: float
    """KL(q(z|x) || p(z)) of a text, on average."""
    active_units: int
    """Dimensions whose means have a variance above 0.01 (Burda et al., arXiv 1509.00519)."""


def measure(model: Model, texts: list[str], seed: int) -> Figures:
    """Measure a latent bundle; `seed` decides the draws of z and the order of the shuffled ones."""
    space = model.latent
    posteriors = [space.encode(text) for text in texts]
    drawn = [posterior.sample(seed + at) for at, posterior in enumerate(posteriors)]
    nats = np.zeros(3)
    tokens = 0
    for at, text in enumerate(texts):
        vectors = (drawn[at], posteriors[at].mean, drawn[(at + 1) % len(texts)])
        scores = [space.score(text, z) for z in vectors]
        nats -= [score.logprob for score in scores]
        tokens += len(scores[0].tokens)
    means = np.stack([posterior.mean for posterior in posteriors])
    reconstruction, of_means, shuffled = (math.exp(of_tokens / tokens) for of_tokens in nats)
    return Figures(
        texts=len(texts),
        tokens=tokens,
        reconstruction=reconstruction,
        of_means=of_means,
        shuffled=shuffled,
        kl_nats=float(np.mean([posterior.kl_divergence for posterior in posteriors])),
        active_units=int((means.var(axis=0, ddof=1) > 0.01).sum()),
    )


@dataclass(frozen=True, slots=True)
class Differences:
    """How far a bundle is from torch on N texts."""

    texts: int
    largest_mean: float
    """Largest difference of a mean."""
    shift: float
    """Root mean square of the means' differences, in standard deviations of torch's q(z|x)."""
    largest_logprob: float
    """Largest difference of a token's log-probability behind torch's mean, in nats."""
    perplexity_ratio: float


def compare(model: Model, source: "Checkpoint", texts: list[str]) -> Differences:
    """Compare a bundle with its checkpoint, text by text."""
    from edgelm_export.model.latent import encode, token_logprobs

    assert source.latent is not None and model.bundle.manifest.latent is not None
    begin, end = model.bundle.manifest.latent.begin_token_id, model.bundle.manifest.latent.end_token_id
    shifts: list[npt.NDArray[np.float32]] = []
    largest_mean, logprobs = 0.0, []
    for text in texts:
        ids = [begin, *model.tokenizer.encode(text, add_special_tokens=False)]
        mean, log_variance = encode(source.model, source.latent, ids)
        difference = model.latent.encode(text).mean - mean.numpy()
        largest_mean = max(largest_mean, float(np.abs(difference).max()))
        shifts.append(difference / np.exp(0.5 * log_variance.numpy()))
        theirs = token_logprobs(source.model, source.latent, [*ids, end], mean).numpy()
        ours = [token.logprob for token in model.latent.score(text, mean.numpy()).tokens]
        logprobs.append(theirs - np.array(ours))
    lost = np.concatenate(logprobs)
    return Differences(
        len(texts),
        largest_mean,
        float(np.sqrt(np.square(shifts).mean())),
        float(np.abs(lost).max()),
        math.exp(float(lost.mean())),
    )


def interpolations(model: Model, texts: list[str], seed: int) -> list[str]:
    """The greedy texts on the way between `PAIRS` pairs of texts, as Markdown."""
    chosen = np.random.default_rng(seed).choice(len(texts), 2 * PAIRS, replace=False)
    lines = []
    for first, second in zip(chosen[::2], chosen[1::2], strict=True):
        lines += ["", f"{texts[first]} → {texts[second]}", ""]
        for z in model.latent.interpolate(texts[first], texts[second], STEPS):
            completion = model.generate("", latent=z, do_sample=False, max_new_tokens=48)
            lines.append(f"1. {' '.join(str(completion).split())}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="what `edgelm finetune --latent` wrote")
    parser.add_argument("bundles", nargs="+", help="its bundles")
    parser.add_argument("--texts", type=Path, required=True, help="held-out texts, one a line")
    parser.add_argument("--limit", type=int, help="only the first N texts")
    parser.add_argument("--compared", type=int, default=100, help="texts to compare with torch; default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import torch

    from edgelm_export.source.checkpoint import load_checkpoint

    torch.set_num_threads(1)
    texts = [line.strip() for line in arguments.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = texts[: arguments.limit]
    report = json.loads((arguments.checkpoint / "report.json").read_text(encoding="utf-8"))
    print("| torch, held-out texts | loss, nats per token | perplexity |\n|---|---|---|")
    for name, loss in report["losses"].items():
        print(f"| {name} | {loss:.4f} | {math.exp(loss):.2f} |")
    for name, value in report["facts"].items():
        print(f"| {name} | {value} | |")
    source = load_checkpoint(str(arguments.checkpoint))
    print(
        "\n| bundle | texts | tokens | reconstruction | z the mean | z of another text | KL, nats | active | ratio to "
        "torch | largest difference of a mean | shift | largest difference of a log-probability |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for path in arguments.bundles:
        with edgelm.load(path) as model:
            f, d = measure(model, texts, arguments.seed), compare(model, source, texts[: arguments.compared])
            print(
                f"| {Path(path).name} | {f.texts:,} | {f.tokens:,} | {f.reconstruction:.2f} | {f.of_means:.2f} | "
                f"{f.shuffled:.2f} | {f.kl_nats:.2f} | {f.active_units} of {model.latent.size} | "
                f"{d.perplexity_ratio:.4f} | {d.largest_mean:.4f} | {d.shift:.4f} | {d.largest_logprob:.4f} |",
                flush=True,
            )
    with edgelm.load(arguments.bundles[0]) as model:
        print("\n".join(interpolations(model, texts, arguments.seed)))


if __name__ == "__main__":
    main()
