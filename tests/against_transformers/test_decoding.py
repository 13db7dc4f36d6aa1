"""Every decoding method gives the ids of transformers, for random settings and prompts.

Sampling is compared too, because transformers draws with edgelm's random numbers. A difference is accepted only where
the case proves a near tie, which the float32 rounding of the two programs decides.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers

from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.loop import generate
from edgelm.decoding.request import DecodingSession
from edgelm.decoding.sampling import beam_uniforms, candidates, draw, draw_without_replacement, filters_of, uniform
from edgelm.engine.graph import Graph
from edgelm.engine.session import Session
from edgelm_export.pipeline import export
from tests.export.checkpoints import Shape, TinyExport

pytestmark = pytest.mark.export

NEW_TOKENS = 12
SHAPES = [
    Shape(width=32, heads=4, layers=2, context=64, vocab=300),
    Shape(family="llama", width=48, heads=6, kv_heads=2, context=64, vocab=300),
]
EOS = (5, 9)
CASES = 20
"""Random cases of each of the four kinds."""


def ours(session: Session, prompt: list[int], options: dict[str, Any], seed: int) -> list[list[int]]:
    """The new tokens of every row without the end-of-text token, which transformers keeps."""
    session.reset()
    config = GenerationConfig().updated(options)
    fake: DecodingSession = session
    rows = []
    for steps in generate(fake, prompt, config, seed):
        rows.append([step.token_id for step in steps if step.token_id is not None])
    return rows


FEW_LEFT = ("top_k", "top_p", "typical_p", "min_p", "epsilon_cutoff", "forced_eos_token_id", "forced_bos_token_id")


class TooFewCandidates(Exception):
    """Tells whether the filters left fewer candidates than a beam step draws; transformers then draws undefined ids."""


class OurRandomNumbers:
    """Replaces `torch.multinomial`, and draws as edgelm draws."""

    def __init__(self, seed: int) -> None:
        self._seed, self._step = seed, 0

    def __call__(self, probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        logits = torch.log(probabilities).numpy()
        if num_samples == 1:
            places = [[draw(row, uniform(self._seed, index, self._step))] for index, row in enumerate(logits)]
        else:
            kept = np.flatnonzero(logits[0] > -np.inf)
            if len(kept) < num_samples:
                raise TooFewCandidates
            chosen = draw_without_replacement(
                logits[0][kept], num_samples, beam_uniforms(self._seed, self._step, logits.size)[kept]
            )
            places = [kept[chosen].tolist()]
        self._step += 1
        return torch.tensor(places)


def theirs(model: Any, prompt: list[int], options: dict[str, Any], seed: int) -> list[list[int]]:
    """The ids of transformers, cut at the end-of-text token."""
    given = dict(options)
    end = given.get("eos_token_id")
    if "top_k" not in given:
        given["top_k"] = 0  # the default of transformers is 50
    config = transformers.GenerationConfig(pad_token_id=0, use_cache=True, **given)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    ids, mask = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long)
    with mock.patch("torch.multinomial", OurRandomNumbers(seed)), torch.no_grad():
        output = model.generate(ids, attention_mask=mask, generation_config=config)
    actual = []
    for row in output[:, len(prompt) :].tolist():
        ends = [place for place, token in enumerate(row) if end and token in end]
        actual.append(row[: ends[0]] if ends else row)
    return actual


def some(rng: np.random.Generator, vocab: int, most: int) -> list[int]:
    return [int(i) for i in rng.choice(vocab, int(rng.integers(1, most + 1)), replace=False)]


def random_processors(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    """Some of the processors, with random values."""
    choices: dict[str, Callable[[], Any]] = {
        "repetition_penalty": lambda: float(rng.uniform(0.7, 2)),
        "no_repeat_ngram_size": lambda: int(rng.integers(1, 4)),
        "sequence_bias": lambda: {
            tuple(some(rng, vocab, 2)): float(rng.normal() * 4) for _ in range(int(rng.integers(1, 8)))
        },
        "bad_words_ids": lambda: [some(rng, vocab, 2) for _ in range(int(rng.integers(1, 20)))],
        "suppress_tokens": lambda: some(rng, vocab, 40),
        "begin_suppress_tokens": lambda: some(rng, vocab, 100),
        "forced_eos_token_id": lambda: [EOS[0]],
        "forced_bos_token_id": lambda: int(rng.integers(10, vocab)),
        "min_new_tokens": lambda: int(rng.integers(1, 10)),
        "min_length": lambda: int(rng.integers(1, 20)),
        "exponential_decay_length_penalty": lambda: (int(rng.integers(0, 6)), float(rng.uniform(1.01, 1.6))),
    }
    names = {str(name) for name in rng.choice(list(choices), int(rng.integers(0, 4)), replace=False)}
    if "exponential_decay_length_penalty" in names:  # NaN in transformers where the end is forbidden
        names -= {"min_new_tokens", "min_length", "bad_words_ids", "suppress_tokens", "forced_eos_token_id"}
    return {name: choices[name]() for name in sorted(names)}


def random_filters(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    """Sampling with some of the filters."""
    choices: dict[str, Callable[[], Any]] = {
        "temperature": lambda: float(rng.uniform(0.3, 2)),
        "top_k": lambda: int(rng.integers(1, vocab + 20)),
        "top_p": lambda: float(rng.uniform(0.05, 0.99)),
        "min_p": lambda: float(rng.uniform(0.001, 0.5)),
        "typical_p": lambda: float(rng.uniform(0.05, 0.99)),
        "epsilon_cutoff": lambda: float(rng.uniform(1e-4, 0.05)),
        "eta_cutoff": lambda: float(rng.uniform(1e-4, 0.05)),
    }
    names = rng.choice(list(choices), int(rng.integers(0, 4)), replace=False)
    return {"do_sample": True, **{str(name): choices[str(name)]() for name in names}}


def random_beams(rng: np.random.Generator) -> dict[str, Any]:
    beams = int(rng.integers(2, 6))
    return {
        "num_beams": beams,
        "num_return_sequences": int(rng.integers(1, beams + 1)),
        "length_penalty": float(rng.choice([0.0, 0.5, 1.0, 2.0, -1.0])),
        "early_stopping": [True, False, "never"][rng.integers(3)],
        "renormalize_logits": bool(rng.integers(2)),
    }


def random_case(kind: str, rng: np.random.Generator, vocab: int) -> tuple[list[int], dict[str, Any]]:
    """A prompt and its options."""
    prompt = [int(i) for i in rng.integers(10, vocab, 1 if rng.random() < 0.1 else int(rng.integers(1, 12)))]
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, **random_processors(rng, vocab)}
    if rng.random() < 0.8:
        options["eos_token_id"] = list(EOS)[: int(rng.integers(1, 3))]
    else:
        options.pop("exponential_decay_length_penalty", None)  # transformers needs an end-of-text token for it
    if kind in ("sampling", "beam sampling"):
        options |= random_filters(rng, vocab)
    if kind == "beam sampling" and rng.random() < 0.8:  # few candidates are the rare case, not the usual one
        options = {name: value for name, value in options.items() if name not in FEW_LEFT}
    if kind in ("beams", "beam sampling"):
        options |= random_beams(rng)
    if kind == "sampling":
        options["num_return_sequences"] = int(rng.integers(1, 4))
    return prompt, options


def check(model: Any, session: Session, kind: str, cases: int, seed: int) -> None:
    """The ids of edgelm and of transformers are equal in `cases` random cases."""
    rng, vocab, case, wrong = np.random.default_rng(seed), session.vocab_size, 0, []
    while case < cases:
        prompt, options = random_case(kind, rng, vocab)
        try:
            expected, actual = theirs(model, prompt, options, case), ours(session, prompt, options, case)
        except TooFewCandidates:
            continue
        case += 1
        if actual != expected:
            wrong.append((prompt, options, actual, expected))
    assert not wrong, f"{len(wrong)} of {cases}; the first: {wrong[0]}"


KINDS = ["greedy", "sampling", "beams", "beam sampling"]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.family)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids_as_transformers(tiny_export: TinyExport, kind: str, shape: Shape) -> None:
    tiny = tiny_export(shape, "fp32")
    check(tiny.torch.model, tiny.session(), kind, CASES, seed=len(kind))


@pytest.mark.shared
@pytest.mark.usefixtures("few_tokens")
def test_the_same_ids_on_a_trained_model(shared_folder: Path, tmp_path: Path) -> None:
    checkpoint = shared_folder / "checkpoints" / "stories-6m"
    bundle = export(str(checkpoint), tmp_path / "stories", "fp32").bundle
    session = Graph.open(bundle, device="cpu", threads=1).session()
    model = transformers.GPT2LMHeadModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    for kind in KINDS:
        check(model, session, kind, 6, seed=1)


WARPERS: dict[str, tuple[str, list[Any]]] = {
    "top_k": ("TopKLogitsWarper", [1, 40, 3000, 60_000]),
    "top_p": ("TopPLogitsWarper", [0.1, 0.9, 0.95, 0.999]),
    "min_p": ("MinPLogitsWarper", [0.001, 0.05, 0.5]),
    "typical_p": ("TypicalLogitsWarper", [0.1, 0.5, 0.95]),
    "epsilon_cutoff": ("EpsilonLogitsWarper", [1e-5, 3e-4, 0.01]),
    "eta_cutoff": ("EtaLogitsWarper", [1e-5, 3e-4, 0.01]),
}


@pytest.mark.parametrize("at_least", [1, 3])
@pytest.mark.parametrize("name", WARPERS)
def test_filters_give_the_distribution_of_transformers_warpers(name: str, at_least: int) -> None:
    rng, size = np.random.default_rng(len(name)), 50_257
    warper, values = WARPERS[name]
    for value in values:
        for spread in (0.5, 4.0):
            logits = (rng.normal(size=size) * spread).astype(np.float32)
            logits[rng.choice(size, 500, replace=False)] = -np.inf  # forbidden already
            row = torch.tensor(logits)[None]
            expected = getattr(transformers, warper)(value, min_tokens_to_keep=at_least)(None, row)[0]
            config = GenerationConfig().updated({name: value})
            tokens, left = candidates(logits, 1.0, filters_of(config, at_least))
            actual = np.full(size, -np.inf, np.float32)
            actual[tokens] = left
            difference = torch.softmax(expected, -1) - torch.softmax(torch.tensor(actual), -1)
            assert float(difference.abs().max()) <= 1e-5, (value, spread)
