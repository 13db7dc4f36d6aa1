"""The bundle's README.md: a model card in the hub's form."""

import json

from edgelm.manifest import Certificate, Recipe, Source

_PRECISION_TEXT = {
    "fp32": "32-bit floats, exact",
    "fp16": "16-bit floats",
    "int8": "8-bit weights and activations, one scale per token and per column; 8-bit token table and head",
    "int4": "4-bit weights in blocks; 8-bit token table and head",
}


def model_card(source: Source, recipe: Recipe, certificate: Certificate, weights_bytes: int, folder_name: str) -> str:
    """The text of the card."""
    # JSON strings are YAML strings: quoted, so that a name cannot end the front matter.
    meta = ["---", "library_name: edgelm", "pipeline_tag: text-generation", "tags: [edgelm, onnx, gpt2]"]
    if source.license:
        meta.append(f"license: {json.dumps(source.license)}")
    meta += [f"base_model: {json.dumps(source.name)}", "base_model_relation: quantized", "---"]
    c = certificate
    return (
        "\n".join(meta)
        + f"""

# {source.name}, {recipe.name}

An [edgelm](https://pypi.org/project/edgelm/) bundle of **{source.name}** ({source.parameters:,} parameters,
{source.architecture}): {_PRECISION_TEXT[recipe.name]}; {weights_bytes / 1e6:.1f} MB of weights. It runs without torch:

```sh
edgelm run -m {folder_name} "Once upon a time"
```

## What it lost

Measured against {source.name} in float32, through the runtime that ships, on {c.tokens:,} tokens ({c.text}):

| | source | this bundle |
|---|---|---|
| perplexity | {c.source_perplexity:.4f} | {c.bundle_perplexity:.4f} (× {c.perplexity_ratio:.4f}) |
| mean KL divergence, nats | 0 | {c.mean_kl_divergence:.6f} |
| same most likely token | 100% | {c.top1_agreement:.2%} |
| same greedy text | {c.greedy_tokens_compared} tokens | {c.greedy_tokens_equal} tokens before the first difference |
| largest difference of a logit | 0 | {c.max_abs_logit_difference:.2g} |

Gate: {c.gate}: **{"passed" if c.passed else "missed"}**.
Every matrix with its bits and its error is listed in `bundle.json`.
"""
    )
