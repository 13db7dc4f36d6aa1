"""A GPT-2 of twice the width that computes what a trained one computes, and can learn more: a start for larger models.

    python -m benchmarks.grown_model CHECKPOINT OUT [--layers N]

Source: Net2Net (Chen et al., arXiv 1511.05641). Every channel stands twice, and what reads the two copies shares its
weights between them at random, so that training tells them apart. Layers that are added do nothing at first. Continue
with `edgelm pretrain --from OUT`.
"""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers
    from torch import Tensor

_PAPERS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def shared(weight: "Tensor") -> "Tensor":
    """A matrix (K, N) for an input whose channels stand twice, (2·K, N)."""
    import torch

    share = 0.25 + 0.5 * torch.rand(weight.shape)
    return torch.cat([weight * share, weight * (1 - share)])


def doubled(parameter: "Tensor", parts: int = 1) -> "Tensor":
    """Every output channel twice; `parts` outputs side by side, as of query, key and value, are doubled each."""
    import torch

    return torch.cat([copy for part in parameter.chunk(parts, dim=-1) for copy in (part, part)], dim=-1)


def grown(model: "transformers.GPT2LMHeadModel", layers: int) -> "transformers.GPT2LMHeadModel":
    """A model of `layers` layers and of twice the width and heads of `model`, with the same logits."""
    import torch
    import transformers

    config = transformers.GPT2Config(**model.config.to_dict())
    config.n_embd, config.n_head, config.n_layer = 2 * config.n_embd, 2 * config.n_head, layers
    config.n_inner = None if config.n_inner is None else 2 * config.n_inner
    larger = transformers.GPT2LMHeadModel(config).eval()
    old, added = model.state_dict(), layers - model.config.n_layer
    state = larger.state_dict()
    # The added layers are spread over the depth. Each is a copy of the layer before it that adds nothing.
    sources = sorted([*range(model.config.n_layer), *(i * model.config.n_layer // (added + 1) for i in range(added))])
    for name in state:
        place = name.split(".")
        is_new = False
        if name.startswith("transformer.h."):
            layer = int(place[2])
            is_new = layer > 0 and sources[layer] == sources[layer - 1]
            place[2] = str(sources[layer])
        value = old[".".join(place)]
        if place[-2] in ("c_attn", "c_fc", "c_proj"):
            parts = 3 if place[-2] == "c_attn" else 1
            value = doubled(shared(value) if place[-1] == "weight" else value, parts)
            if is_new and place[-2] == "c_proj":
                value = torch.zeros_like(value)
        else:
            value = doubled(value)
        if "ln_f" in place:  # the head sums twice as many products
            value = value / 2
        state[name] = value
    larger.load_state_dict(state)
    return larger


def main() -> None:
    """Grow a checkpoint, and check that it computes the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    chosen = parser.parse_args()
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel.from_pretrained(chosen.checkpoint).eval()
    larger = grown(model, chosen.layers)
    ids = torch.randint(model.config.vocab_size, (2, 64))
    with torch.no_grad():
        difference = (model(ids).logits - larger(ids).logits).abs().max().item()
    larger.save_pretrained(chosen.out)
    for name in _PAPERS:
        if (chosen.checkpoint / name).exists():
            shutil.copyfile(chosen.checkpoint / name, chosen.out / name)
    count = sum(parameter.numel() for parameter in larger.parameters())
    print(f"{chosen.out}: {count:,} parameters, largest difference of a logit {difference:.2g}")


if __name__ == "__main__":
    main()
