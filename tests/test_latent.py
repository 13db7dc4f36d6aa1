"""The latent space of a bundle: what torch computes for the same maps, and what is refused."""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgelm
from edgelm.bundle.folder import Bundle
from edgelm.bundle.latent_maps import read_latent_maps, read_latent_reference
from edgelm.errors import BundleError, ConfigError, EdgelmError, PrefixError, PromptError
from edgelm.latent import Posterior
from edgelm.model import Model
from tests.conftest import DATA, TINY_BUNDLE, RunCommand, edit_manifest, make_latent_bundle, replace_file

GOLDEN: dict[str, Any] = json.loads((DATA / "tiny-latent" / "golden.json").read_text(encoding="utf-8"))
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_latent_bundle(tmp_path_factory.mktemp("latent"))


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return edgelm.load(bundle, threads=1)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return make_latent_bundle(tmp_path)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["text"])
def test_encoder_and_decoder_compute_what_torch_computes(model: Model, case: dict[str, Any]) -> None:
    found = model.latent.encode(case["text"])
    np.testing.assert_allclose(found.mean, case["mean"], atol=1e-3)
    np.testing.assert_allclose(found.log_variance, case["log_variance"], atol=1e-3)
    score = model.latent.score(case["text"], GOLDEN["z"])
    np.testing.assert_allclose([token.logprob for token in score.tokens], case["logprobs"], atol=1e-3)
    assert score.logprob == pytest.approx(sum(case["logprobs"]), abs=1e-3)
    assert score.tokens[-1].token_id == 0


def test_greedy_text_behind_a_vector_is_torchs(model: Model) -> None:
    completion = model.generate("", latent=GOLDEN["z"], max_new_tokens=12, do_sample=False)
    assert list(completion.choices[0].token_ids) == GOLDEN["greedy_ids"]
    assert completion.stats.prefix_tokens == 2 and completion.stats.prompt_tokens == 1
    chunks = list(model.stream("", latent=np.array(GOLDEN["z"]), max_new_tokens=12, do_sample=False))
    assert "".join(chunk.text for chunk in chunks) == str(completion)


def test_the_vector_decides_the_text_and_leaves_nothing_behind(model: Model) -> None:
    options = {"max_new_tokens": 12, "do_sample": False}
    before = model.generate("the cat", **options)  # type: ignore[arg-type]
    one, other = (model.generate("the cat", latent=z, **options) for z in ([1, 1, 1, 1], [-1, -1, -1, -1]))  # type: ignore[arg-type]
    assert str(one) != str(other)
    after = model.generate("the cat", **options)  # type: ignore[arg-type]
    assert after.choices[0].token_ids == before.choices[0].token_ids


def test_a_prompt_of_ids_stays_as_it_is(model: Model) -> None:
    ids = [0, *model.tokenizer.encode("the cat")]
    by_text, by_ids = (
        model.generate(p, latent=GOLDEN["z"], max_new_tokens=8, do_sample=False) for p in ("the cat", ids)
    )
    assert by_text.choices[0].token_ids == by_ids.choices[0].token_ids


def test_a_batch_has_a_vector_for_each_prompt(model: Model) -> None:
    vectors = model.latent.interpolate([-1, 0, 1, 0], [1, 2, -1, 0], 3)
    prompts = ["", "the cat", ""]
    alone = [
        model.generate(prompt, latent=z, max_new_tokens=10, do_sample=True, seed=5)
        for prompt, z in zip(prompts, vectors, strict=True)
    ]
    batch = model.generate_batch(prompts, latent=vectors, max_new_tokens=10, do_sample=True, seed=5)
    assert [c.choices[0].token_ids for c in batch] == [c.choices[0].token_ids for c in alone]
    listed = model.generate_batch(prompts, latent=vectors.tolist(), max_new_tokens=10, do_sample=True, seed=5)
    assert [c.choices[0].token_ids for c in listed] == [c.choices[0].token_ids for c in alone]
    same = model.generate_batch(["", ""], latent=vectors[0], max_rows=1, max_new_tokens=10, do_sample=True, seed=5)
    assert [c.choices[0].token_ids for c in same] == [alone[0].choices[0].token_ids] * 2


def test_other_ways_to_decode_stand_behind_a_vector_too(model: Model) -> None:
    greedy = model.generate("", latent=GOLDEN["z"], max_new_tokens=12, do_sample=False).choices[0].token_ids
    drafts = model.generate("", latent=GOLDEN["z"], max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert drafts.choices[0].token_ids == greedy
    rows = model.generate("", latent=GOLDEN["z"], max_new_tokens=6, do_sample=True, seed=1, num_return_sequences=3)
    assert len({choice.token_ids for choice in rows.choices}) > 1
    beams = model.generate("", latent=GOLDEN["z"], max_new_tokens=6, num_beams=2, do_sample=False)
    assert len(beams.choices[0].token_ids) > 0
    long = model.generate("", latent=GOLDEN["z"], max_new_tokens=100, context_overflow="window", do_sample=False)
    assert list(long.choices[0].token_ids[:12]) == GOLDEN["greedy_ids"] and long.stats.new_tokens == 100
    full = model.generate("", latent=GOLDEN["z"], max_new_tokens=100, do_sample=False)
    assert full.choices[0].finish_reason == "context" and full.stats.new_tokens == 64 - 2 - 1 + 1


@pytest.mark.anyio
async def test_asynchronous_generation_takes_a_vector(model: Model) -> None:
    completion = await model.agenerate("", latent=GOLDEN["z"], max_new_tokens=12, do_sample=False)
    assert list(completion.choices[0].token_ids) == GOLDEN["greedy_ids"]
    chunks = [c async for c in model.astream("", latent=GOLDEN["z"], max_new_tokens=12, do_sample=False)]
    assert "".join(chunk.text for chunk in chunks) == str(completion)


def test_draws_by_hand() -> None:
    posterior = Posterior(np.array([1, -2], np.float32), np.log(np.array([9, 4], np.float32)))
    assert posterior.kl_divergence == pytest.approx(0.5 * (1 + 9 - math.log(9) - 1) + 0.5 * (4 + 4 - math.log(4) - 1))
    draws = np.stack([posterior.sample(seed) for seed in range(4000)])
    np.testing.assert_allclose(draws.mean(axis=0), [1, -2], atol=0.2)
    np.testing.assert_allclose(draws.std(axis=0), [3, 2], atol=0.15)


def test_the_prior_is_standard_normal_and_seeds_decide(model: Model) -> None:
    draws = np.stack([model.latent.sample(seed) for seed in range(2000)])
    assert draws.dtype == np.float32 and draws.shape == (2000, 4)
    np.testing.assert_allclose(draws.mean(axis=0), 0, atol=0.1)
    np.testing.assert_allclose(draws.std(axis=0), 1, atol=0.1)
    assert (model.latent.sample(7) == model.latent.sample(7)).all()
    assert (model.latent.sample() != model.latent.sample()).any()


def test_interpolation_is_linear_with_both_ends(model: Model) -> None:
    found = model.latent.interpolate([0, 0, 0, 4], [4, 8, 0, 0], 5)
    assert found.tolist() == [[0, 0, 0, 4], [1, 2, 0, 3], [2, 4, 0, 2], [3, 6, 0, 1], [4, 8, 0, 0]]
    of_texts = model.latent.interpolate("a", "Hello, my name is", 2)
    np.testing.assert_allclose(of_texts, [GOLDEN["cases"][1]["mean"], GOLDEN["cases"][0]["mean"]], atol=1e-3)


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        ([1, 2, 3], "has 4 numbers, got int64 of shape (3,)"),
        ("abcd", "has 4 numbers, got 'abcd'"),
        (["a", "b", "c", "d"], "has 4 numbers, got ['a'"),
        ([1, 2, 3, float("nan")], "has 4 numbers from -1000 to 1000, got nan"),
        ([1, 2, 3, 1e39], "has 4 numbers from -1000 to 1000, got 1e+39"),
        ([1, 2, -1001, 3], "has 4 numbers from -1000 to 1000, got -1001"),
        (np.array([-(2**63), 1, 1, 1]), "has 4 numbers from -1000 to 1000, got -9223372036854775808"),
        ([2**63, 1, 1, 1], "has 4 numbers from -1000 to 1000, got 9.22"),
        ([True, False, True, True], "has 4 numbers"),
        ([10**400, 1, 1, 1], "has 4 numbers"),
        ([], "has 4 numbers"),
        (5, "has 4 numbers"),
        (np.zeros((2, 4)), "one for each of 1 prompts: got 2"),
        (np.zeros((1, 1, 4)), "has 4 numbers"),
        ({"z": [1, 2, 3, 4]}, "has 4 numbers, got {"),
    ],
)
def test_what_is_no_vector_is_refused_in_a_sentence(model: Model, latent: Any, message: str) -> None:
    with pytest.raises(PromptError) as error:
        model.generate("", latent=latent)
    assert message in str(error.value) and "\n" not in str(error.value)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=3), st.lists, max_leaves=6))
@settings(max_examples=50)
def test_any_object_is_a_vector_or_is_refused(model: Model, latent: Any) -> None:
    try:
        assert model.latent.vector(latent).shape == (4,)
    except PromptError as error:
        assert "has 4 numbers" in str(error)


def test_wrong_arguments(model: Model, bundle: Path, tmp_path: Path) -> None:
    for steps in (1, True, 2.5, 10_001):
        with pytest.raises(ConfigError, match="steps must be a whole number from 2 to 10,000"):
            model.latent.interpolate("a", "b", steps)  # type: ignore[arg-type]
    for seed in (-1, True, 2**64, "x"):
        with pytest.raises(ConfigError, match="seed must be a whole number from 0"):
            model.latent.sample(seed)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="the text is empty"):
        model.latent.encode("")
    with pytest.raises(PromptError, match="this model's context holds 64: shorten the text"):
        model.latent.encode("a" * 64)
    with pytest.raises(BundleError, match="has no latent part: train a checkpoint with `edgelm finetune --latent`"):
        _ = edgelm.load(TINY_BUNDLE).latent
    with pytest.raises(BundleError, match="has no latent part"):
        edgelm.load(TINY_BUNDLE).generate("", latent=[1])
    model.save_prefix(tmp_path / "p", "the cat sat")
    behind = model.with_prefix(tmp_path / "p")
    with pytest.raises(PrefixError, match="load the model without a prefix"):
        behind.generate("", latent=GOLDEN["z"])
    np.testing.assert_array_equal(behind.latent.encode("a").mean, model.latent.encode("a").mean)
    with pytest.raises(BundleError, match="leaves no room in a context of 3"):
        _ = edgelm.load(bundle, context=3).latent


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: m.update(required_features=[]),
            "the feature 'latent' without the entry 'latent', or the entry alone",
        ),
        (lambda m: m.pop("latent"), "the feature 'latent' without the entry"),
        (lambda m: m.update(latent=None), "the feature 'latent' without the entry"),
        (lambda m: m["latent"].update(file="none.bin"), "lists no file 'none.bin', which its latent part needs"),
        (lambda m: m["latent"].update(file="model.onnx.data"), "gives two parts of the bundle one file"),
        (lambda m: m["latent"].update(file="latent_reference.bin"), "gives two parts of the bundle one file"),
        (lambda m: m["latent"].update(begin_token_id=300), "latent.begin_token_id is 300, which is not in"),
        (lambda m: m["latent"].update(end_token_id=-1), "latent.end_token_id must be between 0"),
        (lambda m: m["latent"].update(size=0), "latent.size must be between 1 and 4096"),
        (lambda m: m["latent"].update(size=2**40), "latent.size must be between 1 and 4096"),
        (lambda m: m["latent"].update(prefix_tokens=65), "latent.prefix_tokens must be between 1 and 64"),
        (lambda m: m["latent"].update(dtype="float64"), "latent.dtype must be one of"),
        (lambda m: m["latent"].update(code="x"), "unknown field 'latent.code'"),
        (lambda m: m["latent"].pop("size"), "lacks the field 'latent.size'"),
        (lambda m: m["latent"]["reference"].update(texts=0), "latent.reference.texts must be between 1"),
        (lambda m: m["latent"]["reference"].update(posterior_noise=2), "posterior_noise must be between 0 and 1"),
    ],
)
def test_bad_latent_entries_are_refused_by_name(damaged: Path, edit: Edit, message: str) -> None:
    edit_manifest(damaged, edit)
    with pytest.raises(BundleError) as error:
        edgelm.load(damaged)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["latent"].update(size=5), "'latent.bin' has 6,176 bytes, but bundle.json describes"),
        (lambda m: m["latent"].update(prefix_tokens=3), "'latent.bin' has 6,176 bytes, but bundle.json describes"),
        (
            lambda m: m["latent"].update(dtype="float16"),
            "'latent.bin' has 6,176 bytes, but bundle.json describes 3,088",
        ),
        (lambda m: m["latent"]["reference"].update(texts=15), "'latent_reference.bin' has 7,488 bytes, but"),
        (lambda m: m["latent"]["reference"].update(longest=4096), "'latent_reference.bin' has 7,488 bytes, but"),
    ],
)
def test_files_have_exactly_the_size_that_the_entry_implies(damaged: Path, edit: Edit, message: str) -> None:
    edit_manifest(damaged, edit)
    bundle = Bundle.read(damaged)
    with pytest.raises(BundleError, match=message):
        read_latent_maps(bundle)
        read_latent_reference(bundle)


def test_damaged_numbers_are_refused(damaged: Path) -> None:
    content = bytearray((damaged / "latent.bin").read_bytes())
    content[100:104] = struct.pack("<f", float("inf"))
    (damaged / "latent.bin").write_bytes(content)
    with pytest.raises(BundleError, match=r"the content of 'latent\.bin' is not what bundle.json says"):
        edgelm.load(damaged)
    replace_file(damaged, "latent.bin", bytes(content))
    with pytest.raises(BundleError, match=r"'latent\.bin' holds a NaN or infinity: it is damaged"):
        _ = edgelm.load(damaged).latent
    reference = bytearray((damaged / "latent_reference.bin").read_bytes())
    reference[:4] = struct.pack("<I", 1)  # the length of the first text
    replace_file(damaged, "latent_reference.bin", bytes(reference))
    with pytest.raises(BundleError, match="holds a text of a wrong length"):
        read_latent_reference(Bundle.read(damaged))


@given(position=st.integers(0, 1543), value=st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=25)
def test_maps_of_any_finite_numbers_give_a_result_or_one_of_our_errors(
    bundle: Path, tmp_path_factory: pytest.TempPathFactory, position: int, value: float
) -> None:
    copy = make_latent_bundle(tmp_path_factory.mktemp("hostile"))
    content = bytearray((copy / "latent.bin").read_bytes())
    content[4 * position : 4 * position + 4] = struct.pack("<f", value)
    replace_file(copy, "latent.bin", bytes(content))
    with edgelm.load(copy, threads=1) as hostile:
        try:
            hostile.latent.encode("the cat")
            hostile.generate("", latent=[1, 1, 1, 1], max_new_tokens=3)
        except EdgelmError as error:
            assert "\n" not in str(error)


def test_verify_measures_the_latent_part(bundle: Path, edgelm_command: RunCommand) -> None:
    done = edgelm_command("verify", str(bundle), "--json")
    assert done.status == 0, done.stderr
    names = [check["name"] for check in json.loads(done.stdout)["measured"]["checks"]]
    assert sum(name.startswith("latent: ") for name in names) == 4


@pytest.mark.parametrize("part", ["posterior_weight", "posterior_bias", "prefix_weight", "prefix_bias"])
def test_altered_maps_with_corrected_hashes_fail_verify(damaged: Path, part: str, edgelm_command: RunCommand) -> None:
    counts = {"posterior_weight": 8 * 32, "posterior_bias": 8, "prefix_weight": 256 * 4, "prefix_bias": 256}
    start = sum(count for name, count in counts.items() if list(counts).index(name) < list(counts).index(part))
    numbers = np.frombuffer((damaged / "latent.bin").read_bytes(), "<f4").copy()
    numbers[start : start + counts[part]] *= 1.05
    replace_file(damaged, "latent.bin", numbers.tobytes())
    done = edgelm_command("verify", str(damaged))
    assert done.status == 1 and "FAILED" in done.stdout
    assert "latent: " in done.stderr.splitlines()[-1]


def test_a_reference_that_flatters_the_bundle_fails_verify(damaged: Path, edgelm_command: RunCommand) -> None:
    edit_manifest(damaged, lambda m: m["latent"]["reference"].update(source_perplexity=70.0))
    assert edgelm_command("verify", str(damaged)).status == 1


def test_the_commands_pass_vectors_on(bundle: Path, edgelm_command: RunCommand) -> None:
    options = ("-m", str(bundle), "--threads", "1")
    encoded = edgelm_command("latent", "encode", *options, stdin="a\nnaïve café ☕\n".encode())
    assert encoded.status == 0, encoded.stderr
    rows = [json.loads(line) for line in encoded.stdout.splitlines()]
    np.testing.assert_allclose(rows[1]["mean"], GOLDEN["cases"][2]["mean"], atol=1e-3)
    assert rows[0].keys() == {"mean", "log_variance", "kl"} and rows[0]["kl"] > 0
    greedy = ("-n", "5", "--greedy", "--json")
    decoded = edgelm_command("latent", "decode", *options, *greedy, stdin=encoded.stdout.encode())
    assert decoded.status == 0, decoded.stderr
    texts = [json.loads(line)["text"] for line in decoded.stdout.splitlines()]
    again = edgelm_command("latent", "interpolate", "a", "naïve café ☕", *options, *greedy, "--steps", "3")
    lines = [json.loads(line) for line in again.stdout.splitlines()]
    assert [lines[0]["text"], lines[2]["text"]] == texts
    vectors = edgelm_command(
        "latent", "interpolate", json.dumps(lines[0]), json.dumps(rows[1]), *options, *greedy, "--steps", "2"
    )
    assert [json.loads(line)["z"] for line in vectors.stdout.splitlines()] == [lines[0]["z"], rows[1]["mean"]]
    sampled = edgelm_command("latent", "sample", *options, *greedy, "--count", "2", "--seed", "3", "--prompt", "the")
    drawn = [json.loads(line) for line in sampled.stdout.splitlines()]
    assert drawn[0]["z"] == pytest.approx(edgelm.load(bundle).latent.sample(3).tolist())
    assert len(drawn) == 2 and all(row["text"].startswith("the") for row in drawn)


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["decode", "[1, 2]"], b"", "has 4 numbers, got int64 of shape (2,)"),
        (["decode", "[1, NaN, 2, 3]"], b"", "has 4 numbers from -1000 to 1000, got nan"),
        (["decode", "x"], b"", "a vector is a JSON list of numbers"),
        (["decode", "[" * 100_000], b"", "a vector is a JSON list of numbers"),
        (["decode", '{"mean": "x"}'], b"", "a vector is a JSON list of numbers"),
        (["decode", "[true, 1, 1, 1]"], b"", "a vector is a JSON list of numbers"),
        (["decode"], b"\n", "line 1 of standard input: a vector is a JSON list"),
        (["encode", ""], b"", "the text is empty"),
        (["interpolate", "a", "[1]"], b"", "has 4 numbers"),
        (["interpolate", "a", "b", "--steps", "0"], b"", "steps must be a whole number from 2"),
        (["sample", "--seed", "-1"], b"", "seed must be"),
        (["sample", "--count", "0"], b"", "--count"),
        ([], b"", "Missing command"),
    ],
)
def test_bad_input_gets_one_line(
    bundle: Path, arguments: list[str], stdin: bytes, message: str, edgelm_command: RunCommand
) -> None:
    model = ["-m", str(bundle)] if arguments else []
    done = edgelm_command("latent", *arguments, *model, stdin=stdin)
    assert done.status in (1, 2)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("edgelm: ")]) == 1
