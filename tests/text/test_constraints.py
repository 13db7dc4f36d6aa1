"""Constraints as values, and what is said about those that cannot be used."""

import json
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from edgelm import Choices, ConfigError, Grammar, JsonSchema, Model, Regex, Tokenizer, load
from edgelm.text import token_matcher
from edgelm.text.constraints import Constraint
from edgelm.text.token_matcher import ConstraintReader
from tests.conftest import TINY_BUNDLE
from tests.text.tokenizer_kinds import KINDS


@pytest.fixture(scope="module")
def model() -> Model:
    return load(TINY_BUNDLE, device="cpu", threads=1)


@pytest.fixture(scope="module")
def reader(model: Model) -> ConstraintReader:
    return ConstraintReader(model.tokenizer)


def test_they_are_values() -> None:
    assert Choices(["a", "b", "a"]) == Choices(("a", "b"))
    assert JsonSchema({"type": "integer"}) == JsonSchema('{"type": "integer"}')
    for value in (Choices(["a"]), Regex("a+"), JsonSchema(True), Grammar('start: "a"')):
        assert pickle.loads(pickle.dumps(value)) == value
        assert hash(value) == hash(pickle.loads(pickle.dumps(value)))
        with pytest.raises(FrozenInstanceError):
            setattr(value, fields(value)[0].name, "other")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Choices("yes"), "Choices takes a list of texts"),
        (lambda: Choices([]), "at least one text"),
        (lambda: Choices(["a", ""]), "none of them empty"),
        (lambda: Choices(["a", 3]), "Choices takes texts, got 3"),  # type: ignore[list-item]
        (lambda: Choices(str(i) for i in range(10**9)), "at most 4,096 texts"),
        (lambda: Choices(["a" * 40_000, "b" * 40_000]), "80,000 characters, more than 65,536"),
        (lambda: Choices(["a\0b"]), "NUL character at 1"),
        (lambda: Regex(b"a"), "Regex takes a text"),  # type: ignore[arg-type]
        (lambda: Regex("(" * 60_000 + ")" * 60_000), "at most 16,384 characters, got 120,000"),
        (lambda: Regex("a\\"), "ends with a backslash"),
        (lambda: Regex("a\udc00"), "lone surrogate"),
        (lambda: JsonSchema([1]), "a schema as a dict or as JSON"),  # type: ignore[arg-type]
        (lambda: JsonSchema("[1]"), "is an object, true or false"),
        (lambda: JsonSchema('{"a": 1, "a": 2}'), "has the field 'a' twice"),
        (lambda: JsonSchema("{"), r"is not valid JSON \(line 1"),
        (lambda: JsonSchema({"const": {1, 2}}), "cannot be written as JSON"),
        (lambda: JsonSchema({"const": float("nan")}), "cannot be written as JSON"),
        (lambda: JsonSchema('{"not":' * 20_000), "at most 65,536 characters"),
        (lambda: JsonSchema('{"not":' * 5_000 + "true" + "}" * 5_000), "nested"),
        (lambda: JsonSchema({"properties": {"x": {"multipleOf": 9_999_991}}}), "multipleOf at #/properties/x"),
        (lambda: JsonSchema({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}), "multipleOf at #/allOf/1"),
        (lambda: Grammar("start: %json {"), "%json in line 1 cannot be read"),
        (lambda: Grammar('start: x\nx: %json {"multipleOf": 3.0000001}'), "multipleOf"),
        (lambda: Grammar("x" * 70_000), "at most 65,536 characters"),
    ],
)
def test_what_is_no_constraint_is_refused_at_once(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_usual_multiples_are_fine() -> None:
    JsonSchema({"properties": {"price": {"multipleOf": 0.01}, "seats": {"multipleOf": 5}, "mass": {"multipleOf": 250}}})


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Regex("a(?=b)"), r"look-around.* \(at character 2\)"),
        (Regex(r"(a)\1"), r"backreferences are not supported \(at character 4\)"),
        (Regex("ab[b-a]"), r"invalid character class range.* \(at character 4\)"),
        (Regex("(" * 8_000 + "a" + ")" * 8_000), "nested parentheses"),
        (Grammar('start: "a" b'), r'unknown name: "b" \(line 1, column 8\)'),
        (Grammar("begin: /a/"), "start"),
        (Grammar('start: "a'), r"lexer error \(line 1, column 10\)"),
        (Grammar("start: " + "(" * 1000 + '"a"' + ")" * 1000), "too deeply nested"),
        (Grammar("start: start"), "there is no text that it allows"),
        (JsonSchema({"properties": {"x": {"uniqueItems": True}}}), "'uniqueItems' is not supported .at #/properties/x"),
        (JsonSchema({"type": "strange"}), "the JSON schema cannot be read"),
        (JsonSchema({"$ref": "#"}), "there is no text that it allows"),
        (JsonSchema({"$ref": "https://example.com/schema"}), "does not fetch"),
        (JsonSchema({"type": "string", "pattern": "("}), "unclosed group"),
        (JsonSchema({"type": "string", "pattern": "(" * 20_000}), "the JSON schema cannot be read"),
    ],
)
def test_what_cannot_be_read_says_why_and_where(reader: ConstraintReader, constraint: Constraint, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        reader.read(constraint, ())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def chain(rules: int) -> str:
    return "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(rules)) + f'r{rules}: "a"\n'


def references(count: int) -> str:
    definitions: dict[str, object] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
    return json.dumps({"$defs": {**definitions, f"a{count}": {"const": 1}}, "$ref": "#/$defs/a0"})


HOSTILE: dict[str, Constraint] = {
    "a chain of rules": Grammar(chain(4_000)),
    "a chain of terminals": Grammar(chain(4_000).replace("r", "R").replace("staRt: R0", "start: R0")),
    "doubling rules": Grammar("start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40: "a"'),
    "doubling terminals": Grammar(
        "start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(40)) + 'T40: "a"'
    ),
    "ambiguous rules": Grammar('start: a\na: a a | "x"'),
    "a billion": Regex("((a{1,1000}){1,1000}){1,1000}"),
    "many states": Regex("(a|b)*a(a|b){200}"),
    "many choices in a row": Regex("(a|bc)?" * 2_000),
    "letters of all languages": Regex(r"(\p{L}|\p{N}|[^\w])*" * 700),
    "a chain of references": JsonSchema(references(1_800)),
    "many optional fields": JsonSchema({"type": "object", "properties": {f"p{i}": {} for i in range(1_500)}}),
    "many alternatives": JsonSchema({"anyOf": [{"properties": {f"p{i}": {"const": i}}} for i in range(800)]}),
    "all of any of": JsonSchema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(4)]} for i in range(12)]}
    ),
    "a long list": JsonSchema({"type": "array", "items": {"type": "integer"}, "minItems": 10**5, "maxItems": 10**9}),
    "a long text": JsonSchema({"type": "string", "minLength": 10**5, "maxLength": 10**9}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_end_in_a_text_or_in_a_sentence(model: Model, name: str) -> None:
    """In this process: a crash would end the tests."""
    try:
        model.generate("Hello", constraint=HOSTILE[name], max_new_tokens=8)
    except ConfigError as error:
        assert "\n" not in str(error)


def test_a_small_stack_is_enough_for_the_callers_thread(model: Model) -> None:
    """llguidance reads by recursion; a thread of a server may have little stack."""
    code = (
        "import threading, edgelm\n"
        "from tests.text.test_constraints import HOSTILE\n"
        f"model = edgelm.load({str(TINY_BUNDLE)!r}, device='cpu', threads=1)\n"
        "def work():\n"
        "    for name in ('a chain of rules', 'a chain of references'):\n"
        "        try: model.generate('Hello', constraint=HOSTILE[name], max_new_tokens=8)\n"
        "        except edgelm.ConfigError: pass\n"
        "    print('alive')\n"
        "threading.stack_size(512 * 1024)\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_reading_does_not_take_for_ever(reader: ConstraintReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one constraint is read for too long, others are refused instead of waiting; afterwards all is well."""
    monkeypatch.setattr(token_matcher, "READING_SECONDS", 0.05)
    release = threading.Event()
    monkeypatch.setattr(token_matcher, "_source", lambda constraint, words: release.wait(30) and 'start: "a"')
    with pytest.raises(ConfigError, match="takes longer than"):
        reader.read(Regex("slow"), ())
    with pytest.raises(ConfigError, match="another constraint is being read"):
        reader.read(Regex("late"), ())
    release.set()
    monkeypatch.undo()
    for _ in range(100):
        try:
            reader.read(Regex("in time"), ())
            break
        except ConfigError:
            time.sleep(0.1)
    reader.read(Regex("again"), ())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_obeys_or_is_refused(kind: str) -> None:
    """What llguidance takes for a token's text is what we decode it to."""
    tokenizer = Tokenizer(KINDS[kind]())
    reader = ConstraintReader(tokenizer)
    refused = {"clip", "bert", "t5", "albert", "xlm", "words", "speech"}
    if kind in refused:
        with pytest.raises(ConfigError, match="do not know this model's kind of tokenizer"):
            reader.read(Regex("a"), (0,))
        return
    read = reader.read(Choices([" abc", " 今天!"]), (0,))
    assert 1 <= read.least_tokens(0) <= 8
    before = tokenizer.encode("a", add_special_tokens=False)
    for seed in range(4):
        one, new = read.matcher.copy(), list[int]()
        while not one.is_finished:
            allowed = one.mask().nonzero()[0]
            new.append(int(allowed[seed % len(allowed)]))
            one.take(new[-1])
        text = tokenizer.decode([*before, *new])[len(tokenizer.decode(before)) :]
        assert text in (" abc", " 今天!")


def test_the_fewest_tokens_of_choices(reader: ConstraintReader, model: Model) -> None:
    for texts in (["Hello there", "a"], ["Hello there"], ["xyzzy", "plugh"]):
        least = reader.read(Choices(texts), ()).least_tokens(0)
        assert 1 <= least <= min(len(model.tokenizer.encode(text)) for text in texts)
    assert reader.read(Choices(["a", "Hello"]), ()).least_tokens(0) == 1
    assert reader.read(Choices(["a", "Hello"]), ()).least_tokens(1) <= 1
    assert reader.read(Regex("Hello there.*"), ()).least_tokens(1) >= 2
    assert reader.read(Regex("x?Hello there.*"), ()).least_tokens(0) == 0


def test_text_is_text_whatever_it_means_elsewhere(model: Model) -> None:
    for text in (r"a.b*c+d?(e)[f]{g}|h^i$j\k", "a/b", "x#y&z~-", 'say "hi"', "line\nend", " tab\t", "é今\u200d🎉"):
        choice = model.generate("Hello", constraint=Choices([text]), max_new_tokens=100).choices[0]
        assert (choice.text, choice.finish_reason) == (text, "stop")


def test_a_slash_in_a_regular_expression(model: Model) -> None:
    assert model.generate("Hello", constraint=Regex("a/i|b/"), max_new_tokens=9).text in ("a/i", "b/")


def test_without_llguidance_a_sentence_says_what_to_install(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"llguidance, which is missing; run: pip install 'edgelm\[constrain\]'"):
        ConstraintReader(model.tokenizer).read(Regex("a"), ())


def test_a_tokenizer_that_cleans_text_up_is_refused() -> None:
    tokenizer = Tokenizer(KINDS["gpt2"](), clean_up_tokenization_spaces=True)
    with pytest.raises(ConfigError, match="removes blanks"):
        ConstraintReader(tokenizer).read(Regex("a"), ())


def test_the_fewest_tokens_are_found_whatever_the_order(reader: ConstraintReader, model: Model) -> None:
    """The reference tries every way to cut a text into tokens."""
    ids = range(model.tokenizer.vocab_size)
    pieces = {model.tokenizer.decode([i], skip_special_tokens=True) for i in ids} - {""}

    def fewest(text: str) -> int:
        if not text:
            return 0
        return 1 + min(fewest(text[end:]) for end in range(1, len(text) + 1) if text[:end] in pieces)

    texts = ["Hello the", "there", "and then", "zzz", "He said no"]
    for count in range(1, len(texts) + 1):
        for chosen in (texts[:count], texts[-count:]):
            assert reader.read(Choices(chosen), ()).least_tokens(0) == min(map(fewest, chosen))
