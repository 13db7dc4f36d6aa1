"""The public API on the tiny bundle: text in, text out."""

import json
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgelm
from edgelm import ConfigError, ContextError, GenerationConfig, Model, PromptError
from edgelm.bundle.folder import default_bundle_path
from tests.conftest import TINY_BUNDLE, FakeSession, counting_rows, replace_file


@pytest.fixture(scope="module")
def model() -> Model:
    return edgelm.load(TINY_BUNDLE, device="cpu", threads=1)


@pytest.fixture(scope="module")
def story() -> Model:
    return edgelm.load(device="cpu", threads=1)


def test_greedy_text_is_transformers(model: Model, golden: dict[str, Any]) -> None:
    for case in golden["cases"]:
        # Token 0 ends a text; the golden run went past it.
        result = model.generate(case["prompt"], max_new_tokens=20, eos_token_id=None)
        assert result.choices[0].token_ids == tuple(case["greedy_ids"])
        assert result.text == model.tokenizer.decode(case["greedy_ids"], skip_special_tokens=True)
        assert result.stats.prompt_tokens == len(case["ids"])


def test_completion_prints_as_its_text_and_carries_facts(model: Model) -> None:
    result = model.generate("Hello", max_length=20, num_return_sequences=1)
    assert str(result) == result.text == result.choices[0].text
    assert result.prompt == "Hello"
    assert result.seed is None
    assert result.choices[0].finish_reason == "length"
    stats = result.stats
    assert stats.prompt_tokens + stats.new_tokens == 20
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0 and stats.load_seconds > 0
    assert stats.tokens_per_second == pytest.approx((stats.new_tokens - 1) / stats.decode_seconds)
    assert stats.peak_rss_bytes > 10_000_000


def test_stream_joins_to_generate(model: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": True, "temperature": 2.0, "seed": 7}
    chunks = list(model.stream("Once upon a time", **options))
    whole = model.generate("Once upon a time", **options)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert sum((chunk.token_ids for chunk in chunks), ()) == whole.choices[0].token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].stats is not None
    assert str(chunks[0]) == chunks[0].text


@pytest.mark.parametrize("seed", range(20))
def test_streams_never_split_a_character(model: Model, seed: int) -> None:
    """Random weights write broken UTF-8. Chunks have whole characters, and together equal decode() of all ids."""
    chunks = list(model.stream("é", max_new_tokens=60, do_sample=True, temperature=5.0, seed=seed, eos_token_id=()))
    ids = [token for chunk in chunks for token in chunk.token_ids]
    assert "".join(chunk.text for chunk in chunks) == model.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_seed_repeats_and_is_told(model: Model) -> None:
    first = model.generate("a", do_sample=True, max_new_tokens=30)
    assert first.seed is not None
    again = model.generate("a", do_sample=True, max_new_tokens=30, seed=first.seed)
    assert again.choices == first.choices
    assert model.generate("a", do_sample=True, max_new_tokens=30).choices != first.choices


def test_rows_come_one_after_another(model: Model) -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 8, "seed": 3}
    three = model.generate("abc", num_return_sequences=3, **options)
    assert len({choice.token_ids for choice in three.choices}) == 3
    assert three.choices[0] == model.generate("abc", **options).choices[0]
    assert three.stats.new_tokens == 24
    indices = [chunk.index for chunk in model.stream("abc", num_return_sequences=3, **options)]
    assert indices == sorted(indices) and set(indices) == {0, 1, 2}
    stats = [chunk.stats for chunk in model.stream("abc", num_return_sequences=3, **options)]
    assert stats[-1] is not None and not any(stats[:-1])


def test_stop_strings_end_each_row_and_are_not_in_it(story: Model) -> None:
    result = story.generate(
        "Once upon a time", stop_strings=[".", "zzz"], do_sample=True, seed=1, num_return_sequences=2
    )
    for choice in result.choices:
        assert choice.finish_reason == "stop"
        assert "." not in choice.text and choice.text
        assert story.tokenizer.decode(choice.token_ids) == choice.text
    whole = story.generate("Once upon a time", do_sample=True, seed=1, num_return_sequences=2)
    for stopped, full in zip(result.choices, whole.choices, strict=True):
        assert full.text.startswith(stopped.text + ".")


def test_logprobs_belong_to_the_tokens(model: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": True, "temperature": 3.0, "seed": 5, "logprobs": 3}
    result = model.generate("Hello", eos_token_id=(), **options)
    (choice,) = result.choices
    assert choice.logprobs is not None
    assert tuple(token.token_id for token in choice.logprobs) == choice.token_ids
    ids = model.tokenizer.encode("Hello") + list(choice.token_ids)
    model.session.reset()
    logits = model.session.score(ids)[len(model.tokenizer.encode("Hello")) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for token, row in zip(choice.logprobs, expected, strict=True):
        # The model's own distribution: neither the temperature nor a filter is in it.
        assert token.logprob == pytest.approx(row[token.token_id], abs=1e-4)
        assert token.text == model.tokenizer.decode([token.token_id])
        assert [other.token_id for other in token.top] == np.argsort(-row)[:3].tolist()
        assert [other.logprob for other in token.top] == pytest.approx(np.sort(row)[::-1][:3], abs=1e-4)
    chunks = list(model.stream("Hello", eos_token_id=(), **options))
    assert sum((chunk.logprobs or () for chunk in chunks), ()) == choice.logprobs
    assert all(len(chunk.logprobs or ()) == len(chunk.token_ids) for chunk in chunks)
    without = model.generate("Hello", eos_token_id=(), **(options | {"logprobs": None}))
    assert without.choices[0].logprobs is None and without.choices[0].token_ids == choice.token_ids
    assert not model.generate("a", max_new_tokens=1, logprobs=0).choices[0].logprobs[0].top  # type: ignore[index]


def test_logprobs_stop_where_the_text_stops(story: Model) -> None:
    options: dict[str, Any] = {"do_sample": True, "seed": 1, "num_return_sequences": 2, "logprobs": 1}
    result = story.generate("Once upon a time", stop_strings=["."], **options)
    for choice in result.choices:
        assert choice.logprobs is not None
        assert tuple(token.token_id for token in choice.logprobs) == choice.token_ids


def test_the_end_token_has_its_logprobs_too(story: Model) -> None:
    options: dict[str, Any] = {"do_sample": False, "logprobs": 2}
    (choice,) = story.generate("Once upon a time", max_new_tokens=300, **options).choices
    assert choice.finish_reason == "eos" and choice.end_logprobs is not None
    ids = [*story.tokenizer.encode_prompt("Once upon a time"), *choice.token_ids, choice.end_logprobs.token_id]
    expected = story.token_logprobs(ids, top=2)[-1]
    assert choice.end_logprobs.token_id == 0 and choice.end_logprobs.text == expected.text
    assert choice.end_logprobs.logprob == pytest.approx(expected.logprob, abs=1e-4)
    assert [token.token_id for token in choice.end_logprobs.top] == [token.token_id for token in expected.top]
    *chunks, last = story.stream("Once upon a time", max_new_tokens=300, **options)
    assert last.end_logprobs == choice.end_logprobs and all(chunk.end_logprobs is None for chunk in chunks)
    drafted = story.generate("Once upon a time", max_new_tokens=300, prompt_lookup_num_tokens=4, **options).choices[0]
    assert drafted.end_logprobs is not None and drafted.end_logprobs.token_id == 0
    assert story.generate("Once upon a time", max_new_tokens=9, **options).choices[0].end_logprobs is None
    assert story.generate("Once upon a time", stop_strings=["."], **options).choices[0].end_logprobs is None
    without = story.generate("Once upon a time", max_new_tokens=300, do_sample=False).choices[0]
    assert without.finish_reason == "eos" and without.end_logprobs is None


def test_a_stop_string_inside_tokens_cuts_the_text_exactly(story: Model) -> None:
    full = story.generate("Once upon a time", max_new_tokens=30, do_sample=False)
    stop = full.text[11:17]
    cut = story.generate("Once upon a time", max_new_tokens=30, do_sample=False, stop_strings=stop)
    assert cut.text == full.text[: full.text.index(stop)]
    assert cut.text.startswith(story.tokenizer.decode(cut.choices[0].token_ids))


def test_the_embedded_model_tells_a_story_to_its_end(story: Model) -> None:
    result = story.generate("Once upon a time", seed=2)
    assert result.choices[0].finish_reason == "eos"
    assert "<|endoftext|>" not in result.text
    assert len(result.text) > 200
    assert story.generation_config.do_sample and story.generation_config.temperature == 0.8


def test_the_end_of_the_context_is_a_clean_stop(model: Model) -> None:
    result = model.generate([1] * 60, max_new_tokens=100, eos_token_id=())
    assert result.choices[0].finish_reason == "context"
    assert len(result.choices[0].token_ids) == 5  # 64 cached positions, and one token that is never fed


def test_ids_as_prompt(model: Model) -> None:
    by_text = model.generate("Hello", max_new_tokens=5)
    ids = model.tokenizer.encode("Hello")
    assert model.generate(ids, max_new_tokens=5).choices == by_text.choices
    assert model.generate(np.array(ids), max_new_tokens=5).prompt == "Hello"  # type: ignore[arg-type]


def test_an_empty_prompt_begins_as_in_the_pipeline_of_transformers(model: Model, tiny_copy: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None}
    empty = model.generate("", **options)
    assert empty.prompt == "" and empty.choices == model.generate([0], **options).choices
    assert "".join(chunk.text for chunk in model.stream("", **options)) == empty.text
    first = next(iter(model.generate_batch(["", "a"], max_new_tokens=5)))
    assert first.text == model.generate("", max_new_tokens=5).text
    for settings in (b"{}", b'{"bos_token_id": null}', b'{"bos_token_id": 300}', b'{"bos_token_id": true}'):
        replace_file(tiny_copy, "generation_config.json", settings)
        with edgelm.load(tiny_copy, device="cpu", threads=1) as without, pytest.raises(PromptError, match="is empty"):
            without.generate("")


def test_an_empty_prompt_behind_a_prefix_continues_the_prefix(model: Model, tmp_path: Path) -> None:
    model.save_prefix(tmp_path / "prefix", "The cat sat")
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None}
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1, prefix=tmp_path / "prefix") as behind:
        assert behind.generate("", **options).text == model.generate("The cat sat", **options).text


def test_tokens_that_the_graph_lacks_are_refused_when_a_text_needs_them(tiny_copy: Path) -> None:
    content = json.loads((tiny_copy / "tokenizer.json").read_text(encoding="utf-8"))
    pad = {**content["added_tokens"][0], "id": 300, "content": "[PAD]"}
    content["added_tokens"].append(pad)
    replace_file(tiny_copy, "tokenizer.json", json.dumps(content).encode())
    with edgelm.load(tiny_copy, device="cpu", threads=1) as padded:
        assert padded.tokenizer.vocab_size == 300
        assert padded.generate("Hello").text == edgelm.load(TINY_BUNDLE, device="cpu").generate("Hello").text
        calls: list[Callable[[str], object]] = [padded.generate, padded.tokenizer.encode, padded.perplexity]
        calls.append(lambda text: padded.score("x", text))
        for call in calls:
            with pytest.raises(
                PromptError, match=r"the text needs the token '\[PAD\]' \(id 300\), but this model"
            ) as e:
                call("Hello [PAD]")
            assert "\n" not in str(e.value)
        for use in (padded.generate, padded.tokenizer.decode):
            with pytest.raises(PromptError, match="300 is out"):
                use([1, 300])


def test_a_bundle_keeps_split_special_tokens(model: Model, tiny_copy: Path) -> None:
    end = "<|endoftext|>"
    assert model.tokenizer.encode(end) == [0]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
    replace_file(tiny_copy, "tokenizer_config.json", json.dumps(config).encode())
    with edgelm.load(tiny_copy, device="cpu", threads=1) as split:
        assert len(split.tokenizer.encode(end)) > 1 and split.tokenizer.decode(split.tokenizer.encode(end)) == end


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate([]), PromptError, "there are no token ids"),
        (lambda m: m.generate([300]), PromptError, "token id 300 is out of range: this model knows 0 to 299"),
        (lambda m: m.generate("\ud800"), PromptError, "lone surrogate"),
        (lambda m: m.generate(b"x"), PromptError, "the prompt must be a text or a list of token ids, got bytes"),
        (lambda m: m.generate(None), PromptError, "the prompt must be a text or a list of token ids, got NoneType"),
        (lambda m: m.generate([1] * 65), ContextError, "the prompt has 65 tokens, but this model's context holds 64"),
        (lambda m: list(m.stream([1] * 65)), ContextError, "the prompt has 65 tokens"),
        (lambda m: m.generate("a", max_length=1), ConfigError, "max_length is 1 but the prompt already has 1"),
        (lambda m: m.generate("a", top_p=float("nan")), ConfigError, r"top_p must be in \(0, 1\], got nan"),
        (lambda m: m.generate("a", max_tokens=3), ConfigError, "did you mean 'max_new_tokens'"),
        (lambda m: m.stream("a", seed=-1), ConfigError, "seed must be"),
    ],
)
def test_bad_input_is_one_sentence(
    model: Model, call: Callable[[Model], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_nothing_new_still_ends_with_a_chunk(model: Model) -> None:
    chunks = list(model.stream("a", max_new_tokens=0))
    assert [(c.text, c.finish_reason) for c in chunks] == [("", "length")]
    assert chunks[0].stats is not None and chunks[0].stats.new_tokens == 0


def test_the_session_is_the_callers(model: Model) -> None:
    model.session.reset()
    logits = model.session.step([5, 6])
    assert logits.shape == (300,) and logits.dtype == np.float32
    model.generate("something else", max_new_tokens=5)
    assert model.session.position == 2
    model.session.rewind(1)
    model.session.reset()


def test_streams_may_be_interleaved(model: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": ()}
    expected = [model.generate(prompt, **options).text for prompt in ("abc", "xyz")]
    texts = ["", ""]
    for pair in zip(model.stream("abc", **options), model.stream("xyz", **options), strict=False):
        for i, chunk in enumerate(pair):
            texts[i] += chunk.text
    assert all(whole.startswith(part) for whole, part in zip(expected, texts, strict=True))


def test_threads_may_share_a_model(model: Model) -> None:
    prompts = [f"prompt {i}" for i in range(8)]
    expected = [model.generate(prompt, max_new_tokens=15).choices for prompt in prompts]
    choices: list[Any] = [None] * 8

    def work(i: int) -> None:
        choices[i] = model.generate(prompts[i], max_new_tokens=15).choices

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert choices == expected


def test_parts_can_be_fakes(model: Model) -> None:
    class FakePooledSession(FakeSession):
        prefix, high_water_tokens, bytes_per_token = None, 0, 1

    class FakeGraph:
        bundle = model.bundle

        def session(self, prefix: None) -> FakeSession:
            return FakePooledSession(counting_rows(300))

        def require_intact_files(self) -> None:
            """There are no files."""

    fake = Model(FakeGraph(), model.tokenizer, GenerationConfig(max_new_tokens=3))  # type: ignore[arg-type]
    assert fake.generate([10]).choices[0].token_ids == (11, 12, 13)


def test_default_config_when_the_bundle_says_nothing(model: Model) -> None:
    assert model.generation_config == replace(GenerationConfig(), eos_token_id=(0,))


@pytest.mark.parametrize("save", [Model.save_state, Model.save_prefix])
@pytest.mark.parametrize("dtype", ["int8", "float64", "bogus", 16])
def test_another_dtype_is_refused_and_the_file_stays(save: Callable[..., None], dtype: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1) as model:
        save(model, path, "Once upon a time")
        content = path.read_bytes()
        with pytest.raises(edgelm.ConfigError, match="dtype must be 'float32' or 'float16', got"):
            save(model, path, "Once upon a time", dtype=dtype)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_a_shorter_context_takes_less_memory_and_changes_no_token(model: Model) -> None:
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1, context=16) as short:
        assert short.session.context_length == 16
        assert 4 * short.memory.cache_bytes == model.memory.cache_bytes
        cut = short.generate("Once", eos_token_id=[]).choices[0]
        whole = model.generate("Once", eos_token_id=[], max_new_tokens=len(cut.token_ids)).choices[0]
        assert cut.finish_reason == "context"
        assert cut.token_ids == whole.token_ids
        with pytest.raises(ContextError, match="16"):
            short.generate([1] * 17)
        again = pickle.loads(pickle.dumps(short))
        assert again.session.context_length == 16
        again.close()


@pytest.mark.parametrize("context", [0, -1, 65, 2**70, 1.5, True, "16"])
def test_a_context_that_the_bundle_does_not_have_is_refused(context: Any) -> None:
    with pytest.raises(ConfigError, match="context must be a whole number from 1 to the bundle's own context of 64"):
        edgelm.load(TINY_BUNDLE, context=context)


def test_a_small_model_drafts_and_changes_no_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model drafts for itself, as if its steps cost little and as if it were sure of every token."""
    monkeypatch.setattr("edgelm.generation.text_generation.step_cost", lambda small, large: 0.05)
    monkeypatch.setattr("edgelm.decoding.draft_model._probability", lambda logits, token: 0.95)
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 0.4, "seed": 5, "num_return_sequences": 3}
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1, draft=TINY_BUNDLE) as drafting:
        assert drafting.draft is not None and drafting.draft.threads == 1
        for options in ({"do_sample": False, "repetition_penalty": 1.2}, sampled):
            plain = model.generate(list(range(20, 30)), max_new_tokens=40, eos_token_id=(), **options)
            fast = drafting.generate(list(range(20, 30)), max_new_tokens=40, eos_token_id=(), **options)
            assert [choice.token_ids for choice in fast.choices] == [choice.token_ids for choice in plain.choices]
        assert fast.stats.drafted_tokens == fast.stats.accepted_tokens > 10
        together = drafting.generate_batch([list(range(20, 30))] * 2, max_new_tokens=40, eos_token_id=(), **sampled)
        assert [[choice.token_ids for choice in one.choices] for one in together] == [
            [choice.token_ids for choice in fast.choices]
        ] * 2
        assert sum(one.stats.drafted_tokens for one in together) == 0
        text = drafting.generate("Once", max_new_tokens=5, num_beams=2, do_sample=False)
        assert text.stats.drafted_tokens == 0
        again = pickle.loads(pickle.dumps(drafting))
        assert again.draft is not None
        again.close()
        drafting.forget()
    with pytest.raises(edgelm.ClosedError):
        drafting.generate("Once")
    assert drafting.draft.closed


def test_another_vocabulary_cannot_draft() -> None:
    with pytest.raises(ConfigError, match="whose vocabulary is another one than that of"):
        edgelm.load(TINY_BUNDLE, device="cpu", threads=1, draft=default_bundle_path())
    with pytest.raises(ConfigError, match="draft must be a path"):
        edgelm.load(TINY_BUNDLE, draft=5)  # type: ignore[arg-type]
    with pytest.raises(edgelm.BundleError, match="nowhere"):
        edgelm.load(TINY_BUNDLE, device="cpu", threads=1, draft="./nowhere")
