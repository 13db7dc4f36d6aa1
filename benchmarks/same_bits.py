"""Compares two checkouts bit for bit: what they export, and what they compute with what they exported.

    python -m benchmarks.same_bits OLD_CHECKOUT [--new CHECKOUT] [--checkpoint FOLDER ...]

Both checkouts export the same seeded checkpoints in every recipe, each in a process of its own. For every bundle the
table says whether these are equal: the graph file, the weights file, the logits of prompts that are given in pieces
and token by token, and the ids of greedy decoding, sampling, beam search and a batch. The exit status is 1 where
something differs.
"""

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("fp32", "fp16", "int8", "w8a8", "int4", "int4-small", "budget")
CHECKED = ("graph", "weights", "logits", "greedy", "sampled", "beams", "batch")
EXPORT_TOKENS = 512
"""Tokens to draw for measuring and for calibration: random weights need no more."""
BUDGET_PERPLEXITY_RATIO = 1.05
"""Limit of the recipe "budget". Each random checkpoint keeps it with more than one kind of matrix."""
NEW_TOKENS = 24


def make_checkpoints(folder: Path) -> list[Path]:
    """Write seeded checkpoints of different shapes into `folder`; returns their folders."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from benchmarks.make_gpt2 import Shape, save_byte_tokenizer

    shape = Shape(layers=2, width=64, heads=4, vocabulary=300, context=64)
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "odd-widths": {"n_embd": 60, "n_head": 5, "n_inner": 75, "n_layer": 3, "activation_function": "gelu"},
        "untied-head": {"tie_word_embeddings": False, "activation_function": "xielu", "n_embd": 256, "n_inner": 288},
        "pruned-heads": {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu2"},
    }
    folders = []
    for seed, (name, changes) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 300, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**(sizes | changes), bos_token_id=0, eos_token_id=None)).eval()
        with torch.no_grad():
            # transformers starts with nearly flat logits and biases of zero, which would hide differences.
            for path, parameter in model.named_parameters():
                std = 0.2 if parameter.ndim < 2 else 1.2 / parameter.shape[-1] ** 0.5
                parameter.normal_(1.0 if ".ln_" in path and path.endswith("weight") else 0.0, std)
        if name == "pruned-heads":
            model.prune_heads({0: [1], 1: [0, 3]})
        model.save_pretrained(folder / name)
        save_byte_tokenizer(folder / name, shape)
        folders.append(folder / name)
    return folders


def run_checkout(checkout: Path, checkpoints: list[Path], folder: Path) -> dict[str, dict[str, str]]:
    """Export every checkpoint with the code of `checkout` and run the bundles; returns the digests by bundle."""
    path = os.pathsep.join(str(checkout / part) for part in ("", "export", "models"))
    # -P: the folder of this file must not be searched for modules.
    command = [sys.executable, "-P", __file__, "--worker", str(folder), *map(str, checkpoints)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True)
    digests: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return digests


def export_and_run(folder: Path, checkpoints: list[Path]) -> dict[str, dict[str, str]]:
    """Export the checkpoints into `folder` and run the bundles, with the checkout on the path of this process."""
    import edgelm

    pipeline = _first_module("edgelm_export.pipeline", "edgelm_export.export")
    fit = _first_module("edgelm_export.fit")
    certificate = _first_module("edgelm_export.certify.certificate", "edgelm_export.certificate")
    budget = _first_module("edgelm_export.quantize.budget", "edgelm_export.budget")
    pipeline.EVALUATION_TOKENS = fit.CALIBRATION_TOKENS = fit.JUDGED_TOKENS = EXPORT_TOKENS
    footprint = certificate.Footprint("not measured", "not measured", "1.32.0", 1, 8, 8, 1.0, 1.0, 1)
    certificate.measure_footprint = lambda bundle: footprint
    results = {}
    for checkpoint in checkpoints:
        for recipe in RECIPES:
            print(f"  {checkpoint.name} {recipe}", file=sys.stderr)
            output = folder / f"{checkpoint.name}-{recipe}"
            precision = budget.Budget(None, None, BUDGET_PERPLEXITY_RATIO) if recipe == "budget" else recipe
            pipeline.export(str(checkpoint), output, precision, accept_quality_loss=True)
            files = {name: (output / file).read_bytes() for name, file in _FILES.items()}
            with edgelm.load(output, device="cpu", threads=1) as model:
                contents = files | {name: repr(value).encode() for name, value in computed(model)}
            results[output.name] = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
            kinds = {(m["format"], m["bits"], m["block_size"]) for m in _matrices(output)}
            print(f"    {len(kinds)} ways of storing a matrix", file=sys.stderr)
    return results


def _matrices(bundle: Path) -> list[dict[str, Any]]:
    matrices: list[dict[str, Any]] = json.loads((bundle / "bundle.json").read_bytes())["recipe"]["matrices"]
    return matrices


_FILES = {"graph": "model.onnx", "weights": "model.onnx.data"}


def computed(model: Any) -> Iterator[tuple[str, object]]:
    """What a loaded model computes, by the name of the check."""
    import numpy as np

    session = model.session
    room = session.context_length
    ids = [int(i) for i in np.random.default_rng(0).integers(0, session.vocab_size, room)]
    logits = []
    for pieces in ([room], [room // 2, room - room // 2], [2, 3, room - 5], [room - 4, 1, 1, 1, 1]):
        session.reset()
        start = 0
        for piece in pieces:
            logits.append(session.step(ids[start : start + piece]).tobytes())
            start += piece
    session.reset()
    logits.append(session.score(ids[: room // 2]).tobytes())
    session.reset()
    yield "logits", [hashlib.sha256(data).hexdigest() for data in logits]
    prompts = [ids[:1], ids[1:8], ids[8 : 8 + room // 3]]
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "seed": 7, "top_k": 40, "top_p": 0.95, "num_return_sequences": 2},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
    }
    for name, options in ways.items():
        made = [model.generate(prompt, max_new_tokens=NEW_TOKENS, **options) for prompt in prompts]
        yield name, [[list(choice.token_ids) for choice in completion.choices] for completion in made]
    batch = model.generate_batch(prompts, max_new_tokens=NEW_TOKENS, do_sample=True, seed=3, temperature=1.2)
    yield "batch", [[list(choice.token_ids) for choice in completion.choices] for completion in batch]


def _first_module(*names: str) -> Any:
    """The first of these modules that this checkout has: modules move between versions."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not error.name or not name.startswith(error.name):
                raise
    raise SystemExit(f"this checkout has none of the modules {', '.join(names)}")


def print_table(old: dict[str, dict[str, str]], new: dict[str, dict[str, str]]) -> int:
    """Print a row for each bundle; returns how many values differ."""
    print(f"| bundle | {' | '.join(CHECKED)} |\n|---|{'---|' * len(CHECKED)}")
    differing = 0
    for name, digests in old.items():
        cells = ["same" if digests[check] == new[name][check] else "**differs**" for check in CHECKED]
        differing += cells.count("**differs**")
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\n{differing} of {len(old) * len(CHECKED)} values differ")
    return differing


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        folder, *checkpoints = map(Path, sys.argv[2:])
        print(json.dumps(export_and_run(folder, checkpoints)))
        return
    parser = argparse.ArgumentParser(description="Compare what two checkouts export and compute, bit for bit.")
    parser.add_argument("old", type=Path, help="the checkout to compare with")
    parser.add_argument("--new", type=Path, default=ROOT, help="the checkout that changed; default: this one")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="a checkpoint to compare on too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        checkpoints = make_checkpoints(Path(work)) + [path.resolve() for path in options.checkpoint]
        results = []
        for name in ("old", "new"):
            checkout = getattr(options, name).resolve()
            print(f"{name}: {checkout}", file=sys.stderr)
            results.append(run_checkout(checkout, checkpoints, Path(work) / name))
        sys.exit(1 if print_table(*results) else 0)


if __name__ == "__main__":
    main()
