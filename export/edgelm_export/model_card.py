"""The bundle's README.md: a model card in the hub's form."""

import json

from edgelm.manifest import Certificate, Manifest

_PRECISION_TEXT = {
    "fp32": "32-bit floats, exact",
    "fp16": "16-bit floats",
    "int8": "8-bit weights and activations, one scale per token and per column; 8-bit token table and head",
    "int4": "4-bit weights in blocks; 8-bit token table and head",
}


def model_card(manifest: Manifest, certificate: Certificate, folder_name: str, source_card: str) -> str:
    """The text of the card; `source_card` is the source's own, quoted below ours."""
    source, recipe, c = manifest.source, manifest.recipe, certificate
    # JSON strings are YAML strings: quoted, so that a name cannot end the front matter.
    meta = ["library_name: edgelm", "pipeline_tag: text-generation", "tags: [edgelm, onnx, gpt2]"]
    if source.license:
        meta.append(f"license: {json.dumps(source.license)}")
    if source.revision:  # it came from the hub
        meta += [f"base_model: {json.dumps(source.name)}", "base_model_relation: quantized"]
    quoted = f"\n## The source's own card\n\n{source_card}\n" if source_card else ""
    return f"""---
{chr(10).join(meta)}
---

# {source.name}, {recipe.name}

An edgelm bundle of **{source.name}** ({source.architecture}, {source.parameters:,} parameters){_changes(manifest)}:
{_PRECISION_TEXT[recipe.name]}. It runs without torch:

```sh
edgelm run -m {folder_name} "Once upon a time"
```

## What it lost

Measured against {source.name} in float32, through the runtime that ships, on {c.tokens:,} tokens {c.text}:

| | source | this bundle |
|---|---|---|
| perplexity | {c.source_perplexity:.4f} | {c.bundle_perplexity:.4f} (× {c.perplexity_ratio:.4f}) |
| mean KL divergence, nats | 0 | {c.mean_kl_divergence:.6f} |
| same most likely token | 100% | {c.top1_agreement:.2%} |
| same greedy text | {c.greedy_tokens_compared} tokens | {c.greedy_tokens_equal} tokens before the first difference |
| largest difference of a logit | 0 | {c.max_abs_logit_difference:.2g} |

Gate: {c.gate}: **{"passed" if c.passed else "missed"}**.
Every matrix with its bits and its error is listed in `bundle.json`.
{quoted}"""


def _changes(manifest: Manifest) -> str:
    """What was done to the source before its weights were stored."""
    source, kept = manifest.source, manifest.architecture.vocab_size
    text = f"\nwith the adapter **{source.adapter}** merged into it" if source.adapter else ""
    if source.vocab_size and source.vocab_size > kept:
        text += f",\nits vocabulary cut to the {kept:,} of {source.vocab_size:,} tokens that a domain needs"
    return text
