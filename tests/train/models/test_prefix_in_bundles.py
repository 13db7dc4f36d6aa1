"""With a prefix that peft has learned, the runtime computes what torch and peft compute."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgelm
from edgelm import PrefixError
from edgelm_export.pipeline import export
from edgelm_export.source.checkpoint import load_checkpoint, quiet_torch
from edgelm_train.finetune import PREFIX_FILE, finetune
from edgelm_train.models.adapters import save_prefix, with_prefix
from edgelm_train.options import FinetuneOptions
from tests.train.conftest import Playground

pytest.importorskip("peft", reason="peft is not installed: pip install 'edgelm[train]'")

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("few_tokens")]

PROMPT = [70, 3, 41, 12, 200, 9]


def peft_greedy(adapted: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The greedy continuation by peft, which computes every token from the whole text."""
    ids = list(prompt)
    with quiet_torch(), torch.no_grad():
        for _ in range(new_tokens):
            ids.append(int(adapted(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def noisy_prefix(playground: Playground, tokens: int) -> Any:
    """A model whose prefix equals the keys and values of no text, so that the runtime cannot be right by chance."""
    checkpoint = load_checkpoint(str(playground.base))
    adapted = with_prefix(checkpoint.model, list(range(5, 5 + tokens))).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        adapted.prompt_encoder["default"].embedding.weight += torch.randn(tokens, 2 * 2 * 32)
    return adapted


@pytest.mark.parametrize("tokens", [2, 16])
def test_fp32_gives_peft_its_ids_and_logits(tokens: int, playground: Playground, tmp_path: Path) -> None:
    adapted = noisy_prefix(playground, tokens)
    save_prefix(adapted, load_checkpoint(str(playground.base)), tmp_path / "prefix.safetensors")
    export(str(playground.base), tmp_path / "bundle", "fp32")
    model = edgelm.load(tmp_path / "bundle", device="cpu", threads=1, prefix=tmp_path / "prefix.safetensors")
    plain = edgelm.load(tmp_path / "bundle", device="cpu", threads=1)
    room = 64 - tokens - len(PROMPT)
    ids = list(model.generate(PROMPT, max_new_tokens=room, do_sample=False, eos_token_id=[]).choices[0].token_ids)
    assert ids == peft_greedy(adapted, PROMPT, room)
    assert ids != list(
        plain.generate(PROMPT, max_new_tokens=room, do_sample=False, eos_token_id=[]).choices[0].token_ids
    )
    with quiet_torch(), torch.no_grad():
        expected = adapted(input_ids=torch.tensor([PROMPT])).logits[0, -1].numpy()
    assert np.abs(model.session.step(PROMPT) - expected).max() <= 1e-3


def test_one_learned_prefix_serves_every_precision(playground: Playground, tmp_path: Path) -> None:
    options = FinetuneOptions(method="prefix", prefix_tokens=6, epochs=6, learning_rate=0.1, evaluations=3)
    done = finetune(str(playground.base), playground.reversals, tmp_path / "out", options)
    assert done.report is not None and done.report.losses["after"] < done.report.losses["before"] - 0.3
    file = tmp_path / "out" / PREFIX_FILE
    assert file.stat().st_size < 10_000
    surprise = {}
    for precision in ("fp32", "int8"):
        bundle = tmp_path / precision
        export(str(playground.base), bundle, precision, accept_quality_loss=True)
        with (
            edgelm.load(bundle, device="cpu", threads=1, prefix=file) as tuned,
            edgelm.load(bundle, device="cpu", threads=1) as plain,
        ):
            surprise[precision] = [model.score("red dog ->", " dog red").logprob for model in (plain, tuned)]
        assert surprise[precision][1] > surprise[precision][0] + 1
    assert surprise["int8"] == pytest.approx(surprise["fp32"], abs=0.5)


def test_a_prefix_of_other_weights_is_refused(playground: Playground, tmp_path: Path) -> None:
    options = FinetuneOptions(epochs=1, learning_rate=0.01, evaluations=1)
    finetune(str(playground.base), playground.text, tmp_path / "full", replace(options, method="full"))
    finetune(str(playground.base), playground.text, tmp_path / "prefix", replace(options, method="prefix"))
    export(str(tmp_path / "full"), tmp_path / "bundle", "fp32")
    with pytest.raises(PrefixError, match="learned with other weights"):
        edgelm.load(tmp_path / "bundle", device="cpu", prefix=tmp_path / "prefix" / PREFIX_FILE)
