"""Every formula of docs/learn.md, computed with numpy beside the code that the page names.

Each test carries its formula as the page writes it; `test_learn.py` asserts that the page has these formulas and no
other ones.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

import edgelm
from edgelm.decoding.beams import beam_search
from edgelm.decoding.contrastive_search import contrastive_search
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.logprobs import log_softmax
from edgelm.decoding.request import Request
from edgelm.decoding.sampling import TokenChoice, candidates, top_p_filter
from edgelm.scoring.comparison import compare_logits
from edgelm.scoring.token_scores import continuation_logprobs, perplexity
from tests.build_side import MISSING, TRAINING_MISSING
from tests.conftest import TINY_BUNDLE, FakeSession

Array = npt.NDArray[np.floating]
Test = TypeVar("Test", bound=Callable[..., None])

FORMULAS: dict[str, str] = {}
"""The name of the test that computes each formula, by the formula's TeX without white space."""

build_side = pytest.mark.skipif(bool(MISSING), reason=f"the build side is not installed ({', '.join(MISSING)} missing)")
training = pytest.mark.skipif(
    bool(MISSING or TRAINING_MISSING), reason=f"{', '.join(MISSING + TRAINING_MISSING)} missing"
)


def formula(tex: str) -> Callable[[Test], Test]:
    """Marks a test as the one that computes the formula `tex` of docs/learn.md."""

    def register(test: Test) -> Test:
        key = "".join(tex.split())
        assert key not in FORMULAS, f"{FORMULAS[key]} and {test.__name__} compute the same formula"
        FORMULAS[key] = test.__name__
        return test

    return register


def softmax(x: Array) -> Array:
    """Along the last axis."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def normal(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# What the model is, and tokens


@formula(r"p(x_1, \dots, x_T) = \prod_{t=1}^{T} p(x_t \mid x_1, \dots, x_{t-1})")
def test_a_text_has_the_product_of_its_tokens_probabilities() -> None:
    ids = [3, 1, 4, 1, 5]
    with edgelm.load(TINY_BUNDLE) as model:
        factors = []
        for t in range(1, len(ids)):
            model.session.reset()
            factors.append(softmax(model.session.step(ids[:t]).astype(np.float64))[ids[t]])
        model.session.reset()
        (logprobs,) = continuation_logprobs(model.session, ids[:1], [ids[1:]])
    assert np.exp(logprobs.sum()) == pytest.approx(np.prod(factors), rel=1e-4)


@training
@formula(r"(a, b)^{*} = \arg\max_{(a, b)} \mathrm{count}(a, b)")
def test_the_most_frequent_pair_is_joined_first() -> None:
    from edgelm_train.data.bpe import train_bpe

    text = "low lower lowest new newer newest"
    words = [("Ġ" if index else "") + word for index, word in enumerate(text.split())]
    pairs = Counter(first + second for word in words for first, second in pairwise(word))
    tokenizer = train_bpe([text] * 2, 258)  # <|endoftext|>, the bytes, and one more
    assert tokenizer.id_to_token(257) == max(pairs, key=lambda pair: pairs[pair])


# Embeddings and positions


@dataclass(frozen=True)
class Small:
    """A small random checkpoint: the model of transformers, its weights, and the code's forward pass."""

    model: Any
    weights: Any
    forward: Any

    def product_inputs(self, layer: Any) -> dict[str, Array]:
        """What enters each product of `layer`, the first layer, by the product's name."""
        seen = {}

        def visit(linear: Any, x: Any) -> Any:
            seen[linear.name] = x[0].numpy()
            return linear

        self.forward.layer(layer, self.forward.embed(IDS[None]), visit)
        return seen


def _small(config: Any) -> Small:
    import torch
    import transformers

    from edgelm_export.model.families import collect_weights
    from edgelm_export.model.forward import DecoderForward
    from tests.export.checkpoints import randomize

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(model)
    weights = collect_weights(model)
    return Small(model, weights, DecoderForward(weights))


@pytest.fixture(scope="module")
def gpt2() -> Small:
    import transformers

    return _small(
        transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=4, n_positions=24, vocab_size=50, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    )


@pytest.fixture(scope="module")
def llama() -> Small:
    import transformers

    return _small(
        transformers.LlamaConfig(
            num_hidden_layers=2,
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=24,
            vocab_size=50,
            tie_word_embeddings=False,
        )
    )


IDS = np.array([3, 1, 4, 1, 5, 9, 2, 6])


@build_side
@formula(r"r_t = E_{x_t} + P_t")
def test_a_token_enters_as_the_sum_of_two_rows(gpt2: Small) -> None:
    table, positions = gpt2.weights.token_table.weight, gpt2.weights.position_table.weight
    expected = np.stack([table[token] + positions[t] for t, token in enumerate(IDS)])
    np.testing.assert_allclose(gpt2.forward.embed(IDS[None])[0].numpy(), expected, rtol=1e-6)


@build_side
@formula(
    r"\theta_i = 10000^{-2i/D}, \qquad S_{t,2i} = \sin(t\,\theta_i), \qquad S_{t,2i+1} = \cos(t\,\theta_i)",
)
def test_rotary_tables_have_the_sinusoids_that_no_model_adds(llama: Small, gpt2: Small) -> None:
    rotary = llama.weights.layers[0].rotary
    width = 2 * rotary.cos.shape[1]
    angle = np.arange(24)[:, None] * 10000.0 ** (-2 * np.arange(width // 2) / width)
    sinusoid = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(24, width)
    np.testing.assert_allclose(rotary.sin[:24], sinusoid[:, 0::2], atol=1e-5)
    np.testing.assert_allclose(rotary.cos[:24], sinusoid[:, 1::2], atol=1e-5)
    assert llama.weights.position_table is None
    # GPT-2's table is a parameter that training changes.
    assert dict(gpt2.model.named_parameters())["transformer.wpe.weight"].requires_grad


@build_side
@formula(
    r"""\begin{pmatrix} q'_i \\ q'_{i+h/2} \end{pmatrix} =
    \begin{pmatrix} \cos t\theta_i & -\sin t\theta_i \\ \sin t\theta_i & \cos t\theta_i \end{pmatrix}
    \begin{pmatrix} q_i \\ q_{i+h/2} \end{pmatrix}, \qquad \theta_i = b^{-2i/h}, \quad 0 \le i \lt h/2"""
)
def test_rotary_embeddings_turn_pairs(llama: Small) -> None:
    import torch

    from edgelm_export.model.forward import _turned

    base, h, tokens = llama.model.config.rope_theta, 16, 20
    q = normal(tokens, h)

    def turned(q: Array, t: int) -> Array:
        result = np.empty(h)
        for i in range(h // 2):
            theta = base ** (-2 * i / h)
            turn = np.array([[np.cos(t * theta), -np.sin(t * theta)], [np.sin(t * theta), np.cos(t * theta)]])
            result[i], result[i + h // 2] = turn @ [q[i], q[i + h // 2]]
        return result

    found = _turned(torch.from_numpy(q)[None, None], llama.weights.layers[0].rotary)[0, 0].numpy()
    np.testing.assert_allclose(found, [turned(q[t], t) for t in range(tokens)], atol=1e-5)
    # Only the distance counts.
    assert turned(q[0], 9) @ turned(q[1], 5) == pytest.approx(turned(q[0], 14) @ turned(q[1], 10))


# Norms


def layer_norm(x: Array, norm: Any) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + norm.epsilon) * norm.weight + norm.bias)


def rms_norm(x: Array, norm: Any) -> Array:
    return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + norm.epsilon) * norm.weight)


@build_side
@formula(
    r"""\mathrm{LN}(x) = \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} \odot g + b, \qquad
    \mu = \frac{1}{D}\sum_{i=1}^{D} x_i, \qquad \sigma^2 = \frac{1}{D}\sum_{i=1}^{D} (x_i - \mu)^2"""
)
def test_layer_norm(gpt2: Small) -> None:
    import torch

    from edgelm_export.model.forward import _norm

    norm, x = gpt2.weights.layers[0].attention_norm, 3 * normal(5, 32) + 1
    np.testing.assert_allclose(_norm(norm, torch.from_numpy(x)).numpy(), layer_norm(x, norm), atol=1e-5)


@build_side
@formula(r"\mathrm{RMS}(x) = \frac{x}{\sqrt{\frac{1}{D}\sum_{i=1}^{D} x_i^2 + \varepsilon}} \odot g")
def test_rms_norm(llama: Small) -> None:
    import torch

    from edgelm_export.model.forward import _norm

    norm, x = llama.weights.layers[0].attention_norm, 3 * normal(5, 64) + 1
    assert norm.bias is None
    np.testing.assert_allclose(_norm(norm, torch.from_numpy(x)).numpy(), rms_norm(x, norm), atol=1e-5)


# Attention


def linear(x: Array, of: Any) -> Array:
    return np.asarray(x @ of.weight + of.bias)


def heads(x: Array, count: int) -> Array:
    """(T, heads·h) as (heads, T, h)."""
    return x.reshape(len(x), count, -1).swapaxes(0, 1)


def attention_weights(x: Array, layer: Any, count: int) -> tuple[Array, Array]:
    """The weights (H, T, T) and the values (H, T, h) of GPT-2's attention, where `x` (T, D) enters the qkv product."""
    q, k, v = (heads(part, count) for part in np.split(linear(x, layer.qkv), 3, axis=-1))
    scores = np.full((count, len(x), len(x)), -np.inf)
    for n in range(count):
        for t in range(len(x)):
            for u in range(t + 1):
                scores[n, t, u] = q[n, t] @ k[n, u] / math.sqrt(q.shape[-1])
    return softmax(scores), v


@build_side
@formula(r"q_t = \bar{r}_t W_Q + b_Q, \qquad k_t = \bar{r}_t W_K + b_K, \qquad v_t = \bar{r}_t W_V + b_V")
def test_query_key_and_value_are_three_products(gpt2: Small) -> None:
    import torch

    qkv, x = gpt2.weights.layers[0].qkv, normal(5, 32)
    with torch.no_grad():
        made = gpt2.model.transformer.h[0].attn.c_attn(torch.from_numpy(x)).numpy()
    w, b = np.split(qkv.weight, 3, axis=1), np.split(qkv.bias, 3)
    np.testing.assert_allclose(made, np.concatenate([x @ w[i] + b[i] for i in range(3)], axis=1), atol=1e-5)
    assert not np.allclose(w[2], w[0].T) and not np.allclose(w[2], w[1].T)


@build_side
@formula(r"""s_{tu} = \begin{cases} q_t k_u^\top / \sqrt{h} & u \le t \\ -\infty & u \gt t \end{cases}""")
def test_attention_weights_are_those_of_transformers(gpt2: Small) -> None:
    import torch

    layer = gpt2.weights.layers[0]
    x = layer_norm(gpt2.forward.embed(IDS[None])[0].numpy(), layer.attention_norm)
    with torch.no_grad():
        expected = gpt2.model(torch.from_numpy(IDS[None]), output_attentions=True).attentions[0][0].numpy()
    assert layer.attention_scale == pytest.approx(1 / math.sqrt(8))
    np.testing.assert_allclose(attention_weights(x, layer, 4)[0], expected, atol=1e-5)


@build_side
@formula(r"""a_{tu} = \frac{e^{s_{tu}}}{\sum_{w=1}^{T} e^{s_{tw}}}, \qquad o_t = \sum_{u=1}^{T} a_{tu}\, v_u""")
def test_attention_is_a_weighted_mean_of_values(gpt2: Small) -> None:
    layer = gpt2.weights.layers[0]
    seen = gpt2.product_inputs(layer)
    weights, values = attention_weights(seen[layer.qkv.name], layer, 4)
    out = np.stack([[sum(weights[n, t, u] * values[n, u] for u in range(8)) for t in range(8)] for n in range(4)])
    np.testing.assert_allclose(seen[layer.attention_out.name], out.swapaxes(0, 1).reshape(8, -1), atol=1e-5)


@build_side
def test_query_head_n_reads_the_key_head_that_the_page_says(llama: Small) -> None:
    layer, count, groups, h = llama.weights.layers[0], 4, 2, 16
    seen = llama.product_inputs(layer)
    qkv = seen[layer.qkv.name] @ layer.qkv.weight
    value = heads(qkv[:, (count + groups) * h :], groups)
    # The first token sees itself alone, so it gets its own value.
    expected = np.concatenate([value[n * groups // count, 0] for n in range(count)])
    np.testing.assert_allclose(seen[layer.attention_out.name][0], expected, atol=1e-5)


# Feed-forward, layers, the head


def gelu(x: Array) -> Array:
    return np.asarray(x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


@build_side
@formula(
    r"""\mathrm{gelu}(x) = x\,\Phi(x) \approx
    \frac{x}{2}\left(1 + \tanh\left(\sqrt{2/\pi}\,\left(x + 0.044715\,x^3\right)\right)\right)"""
)
def test_gelu_is_x_times_a_probability(gpt2: Small) -> None:
    import torch

    x = np.linspace(-5, 5, 2001)
    exact = x * (1 + np.array([math.erf(value / math.sqrt(2)) for value in x])) / 2
    assert 4e-4 < np.abs(gelu(x) - exact).max() < 5e-4
    computed = gpt2.weights.layers[0].activation.function(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(computed, gelu(x), atol=1e-6)


@build_side
@formula(r"\mathrm{FF}(x) = \mathrm{gelu}(x W_1 + b_1)\, W_2 + b_2")
def test_feed_forward(gpt2: Small) -> None:
    import torch

    layer, x = gpt2.weights.layers[1], normal(5, 32)
    with torch.no_grad():
        expected = gpt2.model.transformer.h[1].mlp(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(linear(gelu(linear(x, layer.mlp_in)), layer.mlp_out), expected, atol=1e-4)


@build_side
@formula(r"\mathrm{FF}_{\mathrm{gated}}(x) = \left(\mathrm{silu}(x W_G) \odot x W_U\right) W_2")
def test_gated_feed_forward(llama: Small) -> None:
    import torch

    layer, x = llama.weights.layers[1], normal(5, 64)
    gate, up = np.split(x @ layer.mlp_in.weight, 2, axis=1)
    with torch.no_grad():
        expected = llama.model.model.layers[1].mlp(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(gate / (1 + np.exp(-gate)) * up @ layer.mlp_out.weight, expected, atol=1e-4)


@build_side
@formula(r"r' = r + \mathrm{Attention}(\mathrm{LN}_1(r)), \qquad r'' = r' + \mathrm{FF}(\mathrm{LN}_2(r'))")
def test_a_layer_adds_twice(gpt2: Small) -> None:
    layer, x = gpt2.weights.layers[0], gpt2.forward.embed(IDS[None])
    r = x[0].numpy()
    weights, values = attention_weights(layer_norm(r, layer.attention_norm), layer, 4)
    r = r + linear((weights @ values).swapaxes(0, 1).reshape(8, -1), layer.attention_out)
    r = r + linear(gelu(linear(layer_norm(r, layer.mlp_norm), layer.mlp_in)), layer.mlp_out)
    np.testing.assert_allclose(gpt2.forward.layer(layer, x)[0].numpy(), r, atol=1e-4)


@build_side
@formula(r"z_t = y_t E^\top")
def test_a_tied_head_is_the_token_table_transposed(gpt2: Small, llama: Small) -> None:
    import torch

    assert gpt2.weights.head is None and llama.weights.head is not None
    with torch.no_grad():
        found = gpt2.model(torch.from_numpy(IDS[None]), output_hidden_states=True)
    hidden, table = found.hidden_states[-1][0].numpy(), gpt2.weights.token_table.weight
    np.testing.assert_allclose(found.logits[0].numpy(), hidden @ table.T, atol=1e-4)


@formula(r"p(j \mid x_1, \dots, x_t) = \frac{e^{z_{t,j}}}{\sum_{v=1}^{V} e^{z_{t,v}}}")
def test_softmax() -> None:
    z = 5 * normal(3, 40).astype(np.float64)
    p = np.exp(log_softmax(z))
    np.testing.assert_allclose(p, np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(np.exp(log_softmax(z + 1000)), p, rtol=1e-9)


# Loss and training


@build_side
@formula(r"\mathcal{L} = -\frac{1}{N} \sum_{t} \log p(x_t \mid x_1, \dots, x_{t-1})")
def test_loss_of_pretraining(gpt2: Small) -> None:
    import torch

    pytest.importorskip("accelerate")
    from edgelm_train.run.held_out import loss_in_windows

    with torch.no_grad():
        logits = gpt2.model(torch.from_numpy(IDS[None])).logits[0].numpy()
    p = softmax(logits.astype(np.float64))
    expected = -np.mean([math.log(p[t, IDS[t + 1]]) for t in range(7)])
    ids = IDS.astype(np.int32)
    assert loss_in_windows(gpt2.model, ids, 8).per_token == pytest.approx(expected, rel=1e-5)
    # What the Trainer minimizes is the same number.
    with torch.no_grad():
        trained = gpt2.model(torch.from_numpy(IDS[None]), labels=torch.from_numpy(IDS[None])).loss
    assert float(trained) == pytest.approx(expected, rel=1e-5)


@formula(r"\mathrm{PPL} = e^{\mathcal{L}}")
def test_perplexity() -> None:
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    with edgelm.load(TINY_BUNDLE) as model:
        p = softmax(model.session.score(ids).astype(np.float64))
        loss = -np.mean([math.log(p[t, ids[t + 1]]) for t in range(7)])
        assert perplexity(model.session, ids).value == pytest.approx(math.exp(loss), rel=1e-3)


@training
@formula(
    r"""\begin{aligned}
    m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad s \leftarrow \beta_2 s + (1 - \beta_2) g^2 \\
    w &\leftarrow (1 - \eta\lambda)\, w - \eta\, \frac{m / (1 - \beta_1^n)}{\sqrt{s / (1 - \beta_2^n)} + 10^{-8}}
    \end{aligned}"""
)
def test_adamw_trains_tables() -> None:
    before, after, gradients = _optimized("transformer.wte.weight", rate=0.01, decay=0.1, beta2=0.95, steps=3)
    w, m, s = before.astype(np.float64), 0.0, 0.0
    for n, g in enumerate(gradients, 1):
        m, s = 0.9 * m + 0.1 * g, 0.95 * s + 0.05 * g**2
        w = (1 - 0.01 * 0.1) * w - 0.01 * (m / (1 - 0.9**n)) / (np.sqrt(s / (1 - 0.95**n)) + 1e-8)
    np.testing.assert_allclose(after, w, atol=1e-6)


@training
@formula(r"W \leftarrow (1 - \eta\lambda)\, W - 0.2\,\eta\sqrt{\max(A, B)}\; Q R^\top")
def test_muon_takes_the_stretch_out_of_a_step() -> None:
    before, after, (gradient,) = _optimized("transformer.h.0.mlp.c_fc.weight", rate=0.01, decay=0.1, steps=1)
    step = ((1 - 0.01 * 0.1) * before - after) / (0.2 * 0.01 * math.sqrt(max(before.shape)))
    # After one step the momentum points where the gradient does.
    u, _, vt = np.linalg.svd(gradient, full_matrices=False)
    singular = np.diagonal(u.T @ step @ vt.T)
    assert singular.min() > 0.6 and singular.max() < 1.3  # near 1, after five iterations in bfloat16
    assert np.abs(u.T @ step @ vt.T - np.diag(singular)).max() < 0.05


def _optimized(name: str, *, rate: float, decay: float, beta2: float = 0.95, steps: int) -> tuple[Any, Any, list[Any]]:
    """The parameter `name` of a small GPT-2 before and after steps of MuonAdamW, and its gradients."""
    import torch
    import transformers

    from edgelm_train.run.muon import MuonAdamW

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=50))
    optimizer = MuonAdamW(model, rate, decay, beta2)
    parameter = dict(model.named_parameters())[name]
    before, gradients = parameter.detach().numpy().copy(), []
    for _ in range(steps):
        for each in model.parameters():
            each.grad = torch.randn_like(each)
        gradients.append(parameter.grad.numpy().copy())
        optimizer.step()
    return before, parameter.detach().numpy(), gradients


@training
@formula(
    r"""\eta_n = \eta_0 \cdot \begin{cases} n / n_0 & n \lt n_0 \\
    0.05 + 0.95 \cdot \frac{1}{2}\left(1 + \cos \pi \frac{n - n_0}{n_1 - n_0}\right) & n \ge n_0 \end{cases}"""
)
def test_learning_rate(tmp_path: Path) -> None:
    import torch
    import transformers

    from edgelm_train.run.loop import Schedule, _arguments

    schedule = Schedule(steps=50, batch_tokens=8, learning_rate=0.3, warmup_steps=5, weight_decay=0.0)
    chosen = _arguments(tmp_path, schedule, "cpu", False)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=schedule.learning_rate)
    scheduler = transformers.get_scheduler(
        chosen.lr_scheduler_type,
        optimizer,
        num_warmup_steps=chosen.get_warmup_steps(50),
        num_training_steps=50,
        scheduler_specific_kwargs=chosen.lr_scheduler_kwargs,
    )
    for n in range(51):
        part = n / 5 if n < 5 else 0.05 + 0.95 * (1 + math.cos(math.pi * (n - 5) / 45)) / 2
        assert scheduler.get_last_lr()[0] == pytest.approx(0.3 * part)
        optimizer.step()
        scheduler.step()


@training
@formula(
    r"""\mathcal{L}_{\mathrm{task}} = -\frac{1}{|\mathcal{A}|} \sum_{t \in \mathcal{A}}
    \log p(x_t \mid x_1, \dots, x_{t-1}),
    \qquad \mathcal{A} = \{\, t : \ell_t \ne -100 \,\}"""
)
def test_loss_of_fine_tuning_leaves_out_the_prompt(gpt2: Small) -> None:
    import torch

    from edgelm_train.data.examples import Example, pad
    from edgelm_train.run.held_out import loss_on_completions

    example = Example(tuple(IDS.tolist()), prompt_length=5)
    with torch.no_grad():
        logits = gpt2.model(torch.from_numpy(IDS[None])).logits[0].numpy()
    p = softmax(logits.astype(np.float64))
    answer = [t for t, label in enumerate(example.labels) if label != -100]
    assert answer == [5, 6, 7]
    expected = -np.mean([math.log(p[t - 1, IDS[t]]) for t in answer])
    assert loss_on_completions(gpt2.model, [example], 0).per_token == pytest.approx(expected, rel=1e-5)
    ids, labels = map(torch.tensor, pad([example], 0))
    with torch.no_grad():
        assert float(gpt2.model(ids, labels=labels).loss) == pytest.approx(expected, rel=1e-5)


@training
@formula(r"W' = W + \frac{\alpha}{r}\, A B")
def test_low_rank_adapters_are_added(gpt2: Small) -> None:
    import copy

    import torch

    from edgelm_train.models.adapters import with_low_rank

    before = gpt2.weights.layers[0].mlp_in.weight
    adapted = with_low_rank(copy.deepcopy(gpt2.model), 8)
    adapter = adapted.base_model.model.transformer.h[0].mlp.c_fc
    assert not adapter.lora_B["default"].weight.any()  # training starts from the old model
    torch.nn.init.normal_(adapter.lora_B["default"].weight)
    a, b = (matrix["default"].weight.detach().numpy().T for matrix in (adapter.lora_A, adapter.lora_B))
    assert a.shape == (32, 8) and b.shape == (8, 128)
    merged = adapted.merge_and_unload().transformer.h[0].mlp.c_fc.weight.detach().numpy()
    np.testing.assert_allclose(merged, before + 16 / 8 * a @ b, atol=1e-5)


@training
def test_a_prefix_is_read_like_the_tokens_it_starts_as(gpt2: Small) -> None:
    import copy

    import torch

    from edgelm_train.models.adapters import with_prefix

    adapted = with_prefix(copy.deepcopy(gpt2.model), IDS[:3].tolist()).eval()
    with torch.no_grad():
        behind = adapted(torch.from_numpy(IDS[None, 3:])).logits[0]
        whole = gpt2.model(torch.from_numpy(IDS[None])).logits[0, 3:]
    np.testing.assert_allclose(behind.numpy(), whole.numpy(), atol=1e-4)


@training
@formula(r"\mathcal{L}_{\mathrm{soft}} = \tau^2 \sum_{j=1}^{V} p^\tau_j \log \frac{p^\tau_j}{q^\tau_j}")
def test_loss_of_distillation() -> None:
    import torch

    from edgelm_train.models.distillation_loss import soft_target_loss

    teacher, student = 3 * normal(1, 5, 20), 3 * normal(1, 5, 20, seed=1)
    p, q = softmax(teacher[0, :4] / 2), softmax(student[0, :4] / 2)
    expected = 4 * (p * np.log(p / q)).sum(axis=-1).mean()
    labels = torch.zeros(1, 5, dtype=torch.int64)
    found = soft_target_loss(torch.from_numpy(student), torch.from_numpy(teacher), labels, 2.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)


# Decoding


@formula(r"x_{t+1} = \arg\max_j z_{t,j}")
def test_greedy() -> None:
    z = normal(50)
    assert TokenChoice(GenerationConfig(do_sample=False), 0, 0)(z, 0) == max(range(50), key=lambda j: z[j])


@formula(r"p^\tau_j = \frac{e^{z_j / \tau}}{\sum_{v=1}^{V} e^{z_v / \tau}}")
def test_temperature() -> None:
    z = 3 * normal(50)
    for tau in (0.5, 2.0):
        _, cooled = candidates(z, tau, ())
        np.testing.assert_allclose(softmax(cooled), np.exp(z / tau) / np.exp(z / tau).sum(), rtol=1e-5)


@formula(r"m = \min \left\{\, n : \sum_{i=1}^{n} p_{(i)} \ge \pi \,\right\}")
def test_top_p() -> None:
    z = 2 * normal(300)
    p = softmax(z.astype(np.float64))
    order = np.argsort(-p)
    for least in (0.1, 0.5, 0.9, 0.99):
        m = min(n for n in range(1, 301) if p[order[:n]].sum() >= least)
        np.testing.assert_array_equal(top_p_filter(z, least), np.sort(order[:m]))


@formula(r"\mathrm{rank}(y) = \frac{1}{n^{\lambda}} \sum_{t=1}^{n} \log p(y_t \mid \dots)")
def test_beams_rank_by_the_length() -> None:
    session = FakeSession(normal(6, 6))
    config = GenerationConfig(
        num_beams=3, length_penalty=0.7, max_new_tokens=4, eos_token_id=(0,), num_return_sequences=3
    )
    texts = list(beam_search(session, Request.of(session, [2], config, 0), session.step([2])))
    p = softmax(session.rows.astype(np.float64))
    for text in texts:
        tokens = [2, *text.tokens, *([0] if text.reason == "eos" else [])]
        logprob = sum(math.log(p[last, token]) for last, token in pairwise(tokens))
        assert text.rank == pytest.approx(logprob / (len(tokens) - 1) ** 0.7, rel=1e-5)
    assert [text.rank for text in texts] == sorted((text.rank for text in texts), reverse=True)


@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.6])
@formula(r"x_{t+1} = \arg\max_{j} \; (1 - \alpha)\, p_j - \alpha \max_{u \le t} \cos(y_j, y_u)")
def test_contrastive_search_weighs_likelihood_and_likeness(alpha: float) -> None:
    session = FakeSession(normal(30, 30))
    config = GenerationConfig(penalty_alpha=alpha, top_k=8, max_new_tokens=15)
    steps = contrastive_search(session, Request.of(session, [7, 3], config, 0))
    found = [step.token_id for step in steps if step.token_id is not None]
    direction = session.hidden / np.linalg.norm(session.hidden, axis=1, keepdims=True)
    text = [7, 3]
    for _ in range(15):
        p = softmax(session.rows[text[-1]])
        score = {
            j: (1 - alpha) * p[j] - alpha * max(direction[j] @ direction[u] for u in text) for j in np.argsort(-p)[:8]
        }
        text.append(int(max(score, key=lambda j: score[j])))
    assert found == text[2:]


# Quantization


@build_side
@formula(r"s = -\frac{w_*}{2^{b-1}}")
def test_the_largest_weight_gets_the_lowest_code() -> None:
    from edgelm_export.quantize.storage import quantize_blocks

    w = normal(3, 64)
    stored = quantize_blocks(w, 8, 32)
    for row, scales in zip(w.reshape(3, 2, 32), stored.scales, strict=True):
        for block, scale in zip(row, scales, strict=True):
            assert scale == pytest.approx(-block[np.abs(block).argmax()] / 128)
    assert (stored.scales < 0).any() and (stored.packed.min(axis=2) == 0).all()  # code -128 is stored as 0


@build_side
@formula(r"""c = \mathrm{clip}\left(\mathrm{round}(w / s),\, -2^{b-1},\, 2^{b-1} - 1\right), \qquad \hat{w} = s\,c""")
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_become_whole_multiples(bits: int) -> None:
    from edgelm_export.quantize.storage import quantize_blocks

    w = normal(3, 64)
    stored = quantize_blocks(w, bits, 32)
    blocks, scales = w.reshape(3, 2, 32), stored.scales[:, :, None]
    codes = np.clip(np.rint(blocks / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    np.testing.assert_allclose(stored.restored(), (scales * codes).reshape(3, 64), rtol=1e-6)


@build_side
@formula(r"\hat{x} = s_x\, \mathrm{round}(x / s_x), \qquad s_x = \frac{\max_i |x_i|}{127}")
def test_matmulnbits_rounds_its_input_in_blocks() -> None:
    """ONNX Runtime's own operator, at accuracy level 4, computes with the rounded input, and so does the imitation."""
    import onnx
    import onnxruntime
    import torch
    from onnx import TensorProto, helper, numpy_helper

    from edgelm_export.quantize.smooth import _rounded_rows
    from edgelm_export.quantize.storage import Storage, quantize_blocks

    x, w = normal(3, 512), normal(16, 512, seed=1)
    blocks = x.reshape(3, 2, 256)
    scales = np.abs(blocks).max(axis=2, keepdims=True) / 127
    rounded = (np.rint(blocks / scales) * scales).reshape(3, 512)
    np.testing.assert_allclose(_rounded_rows(torch.from_numpy(x), 127, Storage("block", 8, 256)), rounded, atol=1e-6)

    stored = quantize_blocks(w, 8, 256)
    sizes = {"K": 512, "N": 16, "bits": 8, "block_size": 256, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **sizes)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 16])],
        [numpy_helper.from_array(stored.packed, "codes"), numpy_helper.from_array(stored.scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(made)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    assert np.abs(y - rounded @ stored.restored().T).max() < 1e-3
    assert np.abs(y - x @ stored.restored().T).max() > 1e-2


@build_side
@formula(r"x W = \left(x \oslash f\right)\left(\mathrm{diag}(f)\, W\right)")
def test_smoothing_moves_factors_into_the_norm(gpt2: Small) -> None:
    from edgelm_export.quantize.smooth import fold_norm

    layer, x, factors = gpt2.weights.layers[0], normal(5, 32), np.exp(normal(32, seed=1))
    norm, mlp_in = fold_norm(layer.mlp_norm, layer.mlp_in, factors)
    np.testing.assert_allclose(layer_norm(x, norm), layer_norm(x, layer.mlp_norm) / factors, atol=1e-5)
    np.testing.assert_allclose(mlp_in.weight, np.diag(factors) @ layer.mlp_in.weight, rtol=1e-5)
    before = linear(layer_norm(x, layer.mlp_norm), layer.mlp_in)
    np.testing.assert_allclose(linear(layer_norm(x, norm), mlp_in), before, atol=1e-4)


@build_side
@formula(r"f_i = \frac{\max_t |x_{t,i}|^{\alpha}}{\max_j |W_{ij}|^{1-\alpha}}")
def test_factors_of_smoothing() -> None:
    import torch

    from edgelm_export.quantize.smooth import ALPHAS, _candidates

    x, w = normal(20, 16), normal(16, 8, seed=1)
    tried = [factors.numpy() for factors in _candidates(torch.from_numpy(w), torch.from_numpy(x), (1, 1))]
    assert len(ALPHAS) == 4
    for alpha in ALPHAS:
        factors = np.abs(x).max(axis=0) ** alpha / np.abs(w).max(axis=1) ** (1 - alpha)
        factors /= np.exp(np.log(factors).mean())  # only ratios matter
        assert any(np.allclose(factors, each, rtol=1e-4) for each in tried)


@build_side
@formula(r"\min_{\hat{W}} \left\lVert X W - X \hat{W} \right\rVert^2, \qquad \mathcal{H} = X^\top X")
def test_gptq_changes_the_product_less_than_rounding_does() -> None:
    from edgelm_export.quantize.gptq import gptq_blocks
    from edgelm_export.quantize.storage import quantize_blocks

    x = normal(500, 64) @ normal(64, 64, seed=2)  # inputs that are related
    w = normal(64, 24, seed=1)
    rows = np.ascontiguousarray(w.T)
    gptq, nearest = gptq_blocks(rows, x.T @ x, 4, 32).restored().T, quantize_blocks(rows, 4, 32).restored().T
    loss = [float(np.square(x @ w - x @ hat).sum()) for hat in (gptq, nearest)]
    assert loss[0] < 0.7 * loss[1]


@build_side
@formula(r"W_k \leftarrow W_k - \frac{W_j - \hat{W}_j}{U_{jj}}\, U_{jk}, \qquad k \gt j")
def test_gptq_makes_good_each_error_in_the_rows_to_come() -> None:
    from edgelm_export.quantize.gptq import DAMPING, gptq_blocks

    x, w = normal(500, 32) @ normal(32, 32, seed=2), normal(32, 6, seed=1)
    hessian = x.T @ x
    stored = gptq_blocks(np.ascontiguousarray(w.T), hessian, 4, 32)
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    damped = hessian.astype(np.float64) + DAMPING * np.diagonal(hessian).mean() * np.eye(32)
    upper = np.linalg.cholesky(np.linalg.inv(damped[order][:, order])).T
    left, scale = w[order].astype(np.float64), stored.scales[:, 0]
    hat = np.empty_like(left)
    for j in range(32):
        hat[j] = np.clip(np.rint(left[j] / scale), -8, 7) * scale
        for k in range(j + 1, 32):
            left[k] -= (left[j] - hat[j]) / upper[j, j] * upper[j, k]
    np.testing.assert_allclose(stored.restored().T[order], hat, atol=1e-6)


# The certificate


@pytest.fixture(scope="module")
def two_models() -> tuple[Any, Any, Any]:
    """Logits of a source and of a bundle, (T, V), and the tokens that follow."""
    source = 3 * normal(40, 30)
    return source, source + normal(40, 30, seed=1) / 2, np.arange(40) % 30


@build_side
@formula(r"\frac{\mathrm{PPL}_q}{\mathrm{PPL}_p} = \exp\left(\frac{1}{N} \sum_t \log \frac{p(x_t)}{q(x_t)}\right)")
def test_ratio_of_perplexities(two_models: tuple[Any, Any, Any]) -> None:
    from edgelm_export.certify.judgement import Greedy, quality

    source, bundle, targets = two_models
    p, q = (softmax(z.astype(np.float64))[np.arange(40), targets] for z in (source, bundle))
    measured = quality("", compare_logits(source, bundle, targets), Greedy(0, 0, None))
    assert measured.perplexity_ratio == pytest.approx(np.exp(np.log(p / q).mean()))
    assert measured.bundle_perplexity == pytest.approx(np.exp(-np.log(q).mean()))


@formula(r"\mathrm{KL} = \frac{1}{N} \sum_{t} \sum_{j=1}^{V} p_t(j) \log \frac{p_t(j)}{q_t(j)}")
def test_divergence(two_models: tuple[Any, Any, Any]) -> None:
    source, bundle, targets = two_models
    p, q = softmax(source.astype(np.float64)), softmax(bundle.astype(np.float64))
    measured = compare_logits(source, bundle, targets)
    assert measured.kl_nats / measured.tokens == pytest.approx((p * np.log(p / q)).sum(axis=1).mean())


@formula(r"""\mathrm{top1} = \frac{1}{N} \sum_{t} \left[\arg\max_j p_t(j) = \arg\max_j q_t(j)\right]""")
def test_agreement(two_models: tuple[Any, Any, Any]) -> None:
    source, bundle, targets = two_models
    measured = compare_logits(source, bundle, targets)
    assert measured.same_top1 == (source.argmax(axis=1) == bundle.argmax(axis=1)).sum()
    assert 0 < measured.same_top1 < 40


# The latent GPT-2

LATENT = find_spec("edgelm_train") is not None and find_spec("edgelm_train.models.latent_loss") is not None
latent_model = pytest.mark.skipif(
    bool(MISSING or TRAINING_MISSING) or not LATENT, reason="the latent model cannot be imported"
)


@latent_model
@formula(
    r"\log p(x) \ge \mathbb{E}_{q}\left[\log p(x \mid z)\right] - \mathrm{KL}\left(q(z \mid x) \,\Vert\, p(z)\right)"
)
def test_the_bound_is_below_the_log_probability() -> None:
    """For a model whose integrals are known: z and x are numbers, p(z) = N(0, 1), p(x|z) = N(z, 1)."""
    import torch

    from edgelm_train.models.latent_loss import kl_divergence

    x = 1.3
    exact = -math.log(2 * math.pi * 2) / 2 - x**2 / 4  # p(x) = N(0, 2)

    def bound(mean: float, variance: float) -> float:
        reconstruction = -math.log(2 * math.pi) / 2 - ((x - mean) ** 2 + variance) / 2
        divergence = kl_divergence(torch.tensor([[mean]]), torch.tensor([[math.log(variance)]]))
        return reconstruction - float(divergence.sum())

    assert bound(x / 2, 0.5) == pytest.approx(exact, rel=1e-5)  # q is the true p(z|x)
    for mean, variance in ((0.0, 1.0), (x, 0.5), (x / 2, 0.2), (-1.0, 2.0)):
        assert bound(mean, variance) < exact


@pytest.fixture(scope="module")
def latent(gpt2: Small) -> Any:
    import torch

    from edgelm_train.models.latent import LatentGPT2

    torch.manual_seed(1)
    return LatentGPT2.of(gpt2.model, 4, 2, free_bits=0.1).eval()


@latent_model
@formula(r"(\mu,\ \log \sigma^2) = \bar{y}\, W_q + b_q, \qquad q(z \mid x) = \mathcal{N}(\mu, \sigma^2)")
def test_encoder(latent: Any) -> None:
    import torch

    ids = torch.from_numpy(IDS[None])
    with torch.no_grad():
        hidden = latent.transformer(ids).last_hidden_state
        found = np.concatenate([part[0].numpy() for part in latent.latent.of_hidden(hidden, ids >= 0)])
    maps = latent.latent.posterior
    expected = hidden[0].numpy().mean(axis=0) @ maps.weight.detach().numpy().T + maps.bias.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@latent_model
@formula(r"z = \mu + \sigma \odot \epsilon")
def test_draw_of_z() -> None:
    import torch

    from edgelm_train.models.latent_loss import sample

    mean, log_variance, noise = normal(3, 4), normal(3, 4, seed=1), normal(3, 4, seed=2)
    found = sample(*map(torch.from_numpy, (mean, log_variance, noise))).numpy()
    np.testing.assert_allclose(found, mean + np.sqrt(np.exp(log_variance)) * noise, rtol=1e-5)


@latent_model
@formula(r"\mathcal{L}_{\mathrm{rec}} = -\sum_{t} \log p(x_t \mid x_1, \dots, x_{t-1}, z)")
def test_reconstruction_loss(latent: Any) -> None:
    import torch

    from edgelm_train.models.latent_loss import reconstruction_loss

    ids, z = torch.from_numpy(IDS[None]), torch.from_numpy(normal(1, 4))
    with torch.no_grad():
        logits = latent.decode(ids, z)
        assert not torch.allclose(logits, latent.decode(ids, -z))  # the prefix is read
    p = softmax(logits[0].numpy().astype(np.float64))
    expected = -sum(math.log(p[t, IDS[t + 1]]) for t in range(7))
    assert float(reconstruction_loss(logits, ids)) == pytest.approx(expected, rel=1e-5)


@latent_model
@formula(r"\mathrm{KL}_j = \frac{1}{2}\left(\mu_j^2 + \sigma_j^2 - \log \sigma_j^2 - 1\right)")
def test_divergence_from_the_prior() -> None:
    """The closed form is the integral of q log(q / p)."""
    import torch

    from edgelm_train.models.latent_loss import kl_divergence

    for mean, sigma in ((0.0, 1.0), (1.2, 0.4), (-0.5, 1.7)):
        z = np.linspace(mean - 12 * sigma, mean + 12 * sigma, 20001)
        q = np.exp(-(((z - mean) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        log_ratio = -(((z - mean) / sigma) ** 2) / 2 - math.log(sigma) + z**2 / 2
        found = kl_divergence(torch.tensor([[mean]]), torch.tensor([[2 * math.log(sigma)]]))
        assert float(found) == pytest.approx(float((q * log_ratio).sum() * (z[1] - z[0])), abs=1e-5)


@latent_model
@formula(r"\mathcal{L}_{\mathrm{KL}} = \sum_{j=1}^{Z} \max\left(\kappa,\ \overline{\mathrm{KL}_j}\right)")
def test_free_bits() -> None:
    import torch

    from edgelm_train.models.latent_loss import with_free_bits

    divergence = np.abs(normal(5, 6)) * np.array([0.01, 0.1, 0.5, 1, 2, 0], np.float32)
    expected = sum(max(0.3, float(column.mean())) for column in divergence.T)
    assert float(with_free_bits(torch.from_numpy(divergence), 0.3)) == pytest.approx(expected, rel=1e-5)


@latent_model
@formula(
    r"""\beta_n = \min\left(1,\ \frac{2\,(n \bmod C)}{C}\right), \qquad
    \mathcal{L}_{\mathrm{VAE}} = \mathcal{L}_{\mathrm{rec}} + \beta_n\, \mathcal{L}_{\mathrm{KL}}"""
)
def test_annealed_loss(latent: Any) -> None:
    import torch

    from edgelm_train.models.latent_loss import kl_divergence, kl_weight, reconstruction_loss, sample, with_free_bits

    for n in range(40):
        assert kl_weight(n, 40, 4) == pytest.approx(min(1, 2 * (n % 10) / 10))
    ids = torch.from_numpy(np.stack([IDS, IDS[::-1]]))
    labels = ids.clone()
    labels[:, 0] = -100
    beta = torch.tensor(0.6)
    with torch.no_grad():
        torch.manual_seed(3)
        found = float(latent(ids, labels=labels, kl_weight=beta).loss)
        mean, log_variance = latent.posterior(ids, labels)
        torch.manual_seed(3)
        z = sample(mean, log_variance, torch.randn_like(mean))
        reconstruction = float(reconstruction_loss(latent.decode(ids, z), labels).mean())
        divergence = float(with_free_bits(kl_divergence(mean, log_variance), 0.1))
    assert found == pytest.approx((reconstruction + 0.6 * divergence) / 7, rel=1e-5)  # nats a token
