"""Makes ``tests/data/tiny-latent``: ``python -m tests.make_tiny_latent`` (needs the build side).

A latent part with random maps for the bundle ``tiny-gpt2``: its files, its entry of the manifest, and a golden file
with what torch computes for it.
"""

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from edgelm_export import pipeline
from edgelm_export.certify.latent import MAPS_NAME, REFERENCE_NAME
from edgelm_export.model.latent import LatentMaps, encode, token_logprobs
from edgelm_export.source.checkpoint import load_checkpoint
from tests.make_tiny_bundle import BUNDLE, DATA, _save_checkpoint

FOLDER = DATA / "tiny-latent"
SIZE, TOKENS = 4, 2
GREEDY_TOKENS = 12
TEXTS = ["Hello, my name is", "a", "naïve café ☕", "the cat sat on the mat and the dog ran"]


def main() -> None:
    """Write the files."""
    pipeline.EVALUATION_TOKENS = 512
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "tiny-gpt2"
        model = _save_checkpoint(checkpoint)
        torch.manual_seed(1)
        maps = LatentMaps(model.config, SIZE, TOKENS)
        with torch.no_grad():
            for parameter in maps.parameters():
                parameter.normal_(std=0.4)
        maps.save(checkpoint)
        made = pipeline.export(str(checkpoint), Path(folder) / "bundle", "fp32").bundle
        assert made.manifest.latent is not None
        for name in ("model.onnx", "model.onnx.data"):  # the files belong to the bundle that is committed
            assert (made.path / name).read_bytes() == (BUNDLE / name).read_bytes(), name
        FOLDER.mkdir(exist_ok=True)
        for name in (MAPS_NAME, REFERENCE_NAME):
            shutil.copyfile(made.path / name, FOLDER / name)
        entry = json.dumps(asdict(made.manifest.latent), indent=1)
        (FOLDER / "latent.json").write_text(entry + "\n", encoding="utf-8")
        source = load_checkpoint(str(checkpoint))
        z = torch.linspace(-1.5, 1.5, SIZE)
        cases = []
        for text in TEXTS:
            ids = [0, *source.tokenizer.encode(text)]
            mean, log_variance = encode(source.model, maps, ids)
            logprobs = token_logprobs(source.model, maps, [*ids, 0], z)
            cases.append(
                {
                    "text": text,
                    "mean": mean.tolist(),
                    "log_variance": log_variance.tolist(),
                    "logprobs": logprobs.tolist(),
                }
            )
        greedy = [0]
        with torch.no_grad():
            while len(greedy) <= GREEDY_TOKENS:
                output = source.model(torch.tensor([greedy]), past_key_values=maps.cache(z[None]), use_cache=True)
                greedy.append(int(output.logits[0, -1].argmax()))
    golden = {"z": z.tolist(), "greedy_ids": greedy[1:], "cases": cases}
    (FOLDER / "golden.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
