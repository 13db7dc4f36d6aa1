"""Oddities of config.json and of the weights' names."""

import random
from collections.abc import Callable
from typing import Any

import torch
import transformers

from edgelm_export.model.activations import ACTIVATIONS
from tests.against_transformers.combinations.draft import Draft, Oddity, some
from tests.export.checkpoints import randomize

# Sizes as (hidden size, heads): head dims of 1, 3, 5, 8, 12, 16 and 32.
SIZES = [(4, 4), (9, 3), (20, 4), (32, 4), (24, 2), (48, 3), (32, 1), (12, 4), (30, 2), (16, 2)]
CONTEXTS = [4, 11, 16, 24, 33, 48, 64, 64]
DESIGNS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "inverse layer scale": lambda rng: {"scale_attn_by_inverse_layer_idx": True, "n_layer": 2},
    "unscaled attention": lambda rng: {"scale_attn_weights": False},
    "upcast attention": lambda rng: {"reorder_and_upcast_attn": True},
    "all three of attention": lambda rng: {
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
        "reorder_and_upcast_attn": True,
        "n_layer": 2,
    },
    "activation": lambda rng: {"activation_function": rng.choice(sorted(ACTIVATIONS))},
    "inner": lambda rng: {"n_inner": rng.choice([1, 7, 33, 50, 100])},
    "untied": lambda rng: {"tie_word_embeddings": False},
    "epsilon": lambda rng: {"layer_norm_epsilon": rng.choice([0, 1e-12, 1e-3, 0.1, 1])},
    "dropout": lambda rng: {"resid_pdrop": 0.9, "attn_pdrop": 0.9, "embd_pdrop": 0},
    "two layers": lambda rng: {"n_layer": 2},
    "range": lambda rng: {"initializer_range": 0},
}


def draw_model(rng: random.Random, vocab_size: int) -> tuple[Draft, list[str]]:
    """A random model with random weights, and the names of what is odd about its design."""
    width, heads = rng.choice(SIZES)
    names = some(rng, DESIGNS, 0, 3)
    context = rng.choice(CONTEXTS)
    fields = {"n_layer": 1, "n_positions": context, "n_embd": width, "n_head": heads, "vocab_size": vocab_size}
    for name in names:
        fields |= DESIGNS[name](rng)
    torch.manual_seed(rng.randrange(2**31))
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).eval()
    randomize(model)
    if heads > 1 and rng.random() < 0.1:
        names.append("pruned heads")
        model.prune_heads({0: rng.sample(range(heads), rng.randint(1, heads - 1))})
    config = model.config.to_dict()
    if rng.random() < 0.5:
        config = model.config.to_diff_dict()
    config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return Draft(config, weights, vocab_size=vocab_size), [f"{width}x{heads}", f"context {context}", *names]


def _set(**fields: Any) -> Callable[[Draft, random.Random], None]:
    return lambda draft, rng: draft.config.update(fields)


def _one_of(name: str, *values: Any) -> Callable[[Draft, random.Random], None]:
    return lambda draft, rng: draft.config.update({name: rng.choice(values)})


def _without(*names: str) -> Callable[[Draft, random.Random], None]:
    def change(draft: Draft, rng: random.Random) -> None:
        for name in names:
            draft.config.pop(name, None)

    return change


def _ends(draft: Draft, rng: random.Random) -> None:
    """Ids of the beginning and the end, some of them odd."""
    last = draft.vocab_size - 1
    draft.config["eos_token_id"] = rng.choice([0, last, 1, [0, last], [1], None, draft.vocab_size, 50256, -1])
    draft.config["bos_token_id"] = rng.choice([0, last, None, draft.vocab_size, 50256])


def _older_names(draft: Draft, rng: random.Random) -> None:
    """The names that other families have for the same fields; GPT2Config maps them."""
    for ours, others in (
        ("n_embd", "hidden_size"),
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
    ):
        if rng.random() < 0.7:
            draft.config[others] = draft.config.pop(ours, getattr(transformers.GPT2Config(), ours))


def _more_layers(draft: Draft, rng: random.Random) -> None:
    """One layer in the file that config.json does not state; the reverse is refused."""
    count = draft.config.get("n_layer", 12)
    for key in [key for key in draft.weights if key.startswith("transformer.h.0.")]:
        draft.weights[key.replace(".h.0.", f".h.{count}.")] = draft.weights[key].clone()


CONFIGS = [
    Oddity("no model_type", _without("model_type"), only_edgelm=True),
    Oddity("another model_type", _one_of("model_type", "gpt_bigcode", "GPT2", "nonsense", None, 3, ["gpt2"]), True),
    Oddity("another class", _one_of("architectures", ["GPT2Model"], ["GPT2HeadWithValueModel"], None, [], "x", 5)),
    Oddity("n_ctx", _one_of("n_ctx", 1024, 8, None, "1024")),
    Oddity("torch_dtype", _one_of("torch_dtype", "float16", "bfloat16", "float64", None)),
    Oddity("dtype", _one_of("dtype", "float16", "bfloat16", None)),
    Oddity("odd dtype", _one_of("torch_dtype", "float99", 16), only_edgelm=True),
    Oddity("null fields", _set(pad_token_id=None, problem_type=None, finetuning_task=None, id2label=None)),
    Oddity("ends", _ends),
    Oddity("ends and pad", _set(bos_token_id=1, eos_token_id=2, pad_token_id=0, sep_token_id=99_999)),
    Oddity("names of other families", _older_names),
    Oddity("summary fields", _set(summary_type="cls_index", summary_use_proj=True, summary_first_dropout=0.1)),
    Oddity("task fields", _set(task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}})),
    Oddity("no cache", _set(use_cache=False, gradient_checkpointing=True)),
    Oddity("outputs", _set(output_attentions=True, output_hidden_states=True)),
    Oddity("tuples", _set(return_dict=False, torchscript=True), only_edgelm=True),
    Oddity("attention", _one_of("_attn_implementation", "sdpa", "eager", "flash_attention_2")),
    Oddity("names", _set(_name_or_path="/root/out", name_or_path="gpt2", transformers_version="2.1.0")),
    Oddity("labels", _set(num_labels=3, label2id={"A": 0, "B": 1, "C": 2}, is_decoder=True)),
    Oddity("unknown fields", _set(n_special=0, predict_special_tokens=True, output_past=True, vocab="v", x={"y": []})),
    Oddity("fields of an encoder", _set(is_encoder_decoder=False, cross_attention_hidden_size=None, chunk_size=0)),
    Oddity("own code", _set(auto_map={"AutoModelForCausalLM": "modeling.Model"}), refused="never runs"),
    Oddity("layers", _more_layers),
]


def _cast(draft: Draft, rng: random.Random) -> None:
    kind = rng.choice([torch.float16, torch.bfloat16, torch.float64])
    draft.weights = {key: value.to(kind) for key, value in draft.weights.items()}


def _masks(draft: Draft, rng: random.Random) -> None:
    size = draft.config.get("n_positions", 1024)
    draft.weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, size, size).tril()
    draft.weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)


def _prefix(*prefixes: str) -> Callable[[Draft, random.Random], None]:
    def change(draft: Draft, rng: random.Random) -> None:
        prefix = rng.choice(prefixes)
        draft.weights = {prefix + key: value for key, value in draft.weights.items()}

    return change


def _bare(draft: Draft, rng: random.Random) -> None:
    draft.weights = {key.removeprefix("transformer."): value for key, value in draft.weights.items()}


def _extra(draft: Draft, rng: random.Random) -> None:
    width = draft.config.get("n_embd", 768)
    names = ("v_head.summary.weight", "multiple_choice_head.summary.weight", "lm_head.bias", "transformer.extra.weight")
    draft.weights[rng.choice(names)] = torch.ones(1, width)


def _table_as_head(draft: Draft, rng: random.Random) -> None:
    draft.weights["lm_head.weight"] = draft.weights.pop("transformer.wte.weight")


def _twice(draft: Draft, rng: random.Random) -> None:
    table = draft.weights["transformer.wte.weight"]
    draft.weights.setdefault("lm_head.weight", table + rng.choice([0, 0, 1]))


def _lose(*endings: str) -> Callable[[Draft, random.Random], None]:
    def change(draft: Draft, rng: random.Random) -> None:
        ending = rng.choice(endings)
        draft.weights = {key: value for key, value in draft.weights.items() if not key.endswith(ending)}

    return change


def _transposed(draft: Draft, rng: random.Random) -> None:
    draft.weights = {k: v.T.contiguous() if "c_attn.weight" in k else v for k, v in draft.weights.items()}


def _is_tied(draft: Draft) -> bool:
    return bool(draft.config.get("tie_word_embeddings", True))


def _if_tied(change: Callable[[Draft, random.Random], None]) -> Callable[[Draft, random.Random], None]:
    return lambda draft, rng: change(draft, rng) if _is_tied(draft) else None


WEIGHTS = [
    Oddity("another dtype", _cast),
    Oddity("masks", _masks),
    Oddity("a wrapper", _prefix("module.", "_orig_mod.", "pretrained_model.", "model.", "_forward_module."), True),
    Oddity("two wrappers", _prefix("module._orig_mod.", "_orig_mod.module.", "base_model.model."), True),
    Oddity("a bare body", _if_tied(_bare)),
    Oddity("a bare body with a head", _bare, only_edgelm=True),
    Oddity("extra weights", _extra),
    Oddity("the table as head", _if_tied(_table_as_head), only_edgelm=True),
    Oddity("a head that is tied", _twice),
]


def _classifier(draft: Draft, rng: random.Random) -> None:
    draft.config["architectures"] = ["GPT2ForSequenceClassification"]
    draft.weights.pop("lm_head.weight", None)
    draft.weights["score.weight"] = torch.ones(2, draft.config.get("n_embd", 768))


def _missing_layer(draft: Draft, rng: random.Random) -> None:
    draft.config["n_layer"] = draft.config.get("n_layer", 12) + 1


def _wrong_size(draft: Draft, rng: random.Random) -> None:
    draft.config[rng.choice(["n_embd", "n_positions"])] = 40


def _size_as_text(draft: Draft, rng: random.Random) -> None:
    draft.config["vocab_size"] = str(draft.vocab_size)


# What neither edgelm nor, for the most part, transformers can use.
BROKEN = [
    Oddity("missing layers", _missing_layer),
    Oddity("a wrong size", _wrong_size),
    Oddity("a size as text", _size_as_text, refused="vocab"),
    Oddity("epsilon as text", _set(layer_norm_epsilon="1e-5"), refused="layer_norm_epsilon"),
    Oddity("quantized", _set(quantization_config={"quant_method": "gptq", "bits": 4}), refused="quantized"),
    Oddity("cross attention", _set(add_cross_attention=True), refused="cross attention"),
    Oddity("a classifier", _classifier, refused="generates no text"),
    Oddity("a lost weight", _lose("ln_1.bias", "c_attn.bias", "wpe.weight", "ln_f.weight", "mlp.c_fc.weight")),
    Oddity("a lost head", _lose("lm_head.weight")),
    Oddity("transposed", _transposed),
]
