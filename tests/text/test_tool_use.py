"""Texts with calls: what may be written token by token, and how it is read again."""

import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.bundle.chat_template import ChatTemplate
from edgelm.errors import ConfigError
from edgelm.text.call_reader import CallReader
from edgelm.text.chat import ChatFormat
from edgelm.text.constraints import ToolUse
from edgelm.text.stop_strings import TextPiece, TextStream
from edgelm.text.token_matcher import ConstraintReader, Matcher
from edgelm.text.tokenizer import Tokenizer
from edgelm.text.tools import Tool, ToolCall
from tests.text.chat_templates import user
from tests.text.random_constraints import matches
from tests.text.tool_templates import SHORT, TOOL_TEMPLATES, TOOLS, tool_template, tool_tokenizer

NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
PREFIX: Tool = {"type": "function", "function": {"name": "get"}}
"""Its name begins the other one."""


@dataclass(frozen=True)
class Model:
    """A tokenizer, a template and what reads constraints; there are no weights: tokens are drawn at random."""

    tokenizer: Tokenizer
    chat: ChatFormat
    reader: ConstraintReader

    @property
    def end(self) -> int:
        return self.tokenizer.special_tokens["<|im_end|>"]

    def matcher(self, use: ToolUse) -> Matcher:
        return self.reader.read(use, [self.end]).matcher.copy()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


@cache
def model(template: str, kind: str = "qwen", special_tags: bool = False) -> Model:
    tokenizer = tool_tokenizer(kind, special_tags=special_tags).tokenizer
    return Model(tokenizer, ChatFormat(tool_template(template), tokenizer), ConstraintReader(tokenizer))


def allows(matcher: Matcher, ids: Iterable[int]) -> bool:
    """Whether a text may go on with `ids`; takes as many of them as are allowed."""
    for token in ids:
        if matcher.is_finished or not matcher.mask()[token]:
            return False
        matcher.take(token)
    return True


@dataclass
class Answer:
    """A text that was drawn, and what was read of it."""

    ids: list[int]
    text: str
    calls: list[ToolCall]
    is_whole: bool


def drawn(model: Model, use: ToolUse, seed: int, limit: int = 300) -> Answer:
    """A random text that obeys, as the decoding loop makes it: forced tokens where there are some."""
    rng, matcher, reader = random.Random(seed), model.matcher(use), CallReader(use)
    kept = [token for token in model.tokenizer.special_tokens if token in "".join(use.syntax.parts)]
    stream = TextStream(model.tokenizer.stream(skip_special_tokens=True, kept=kept))
    added, quotes = set(model.tokenizer.added_tokens.values()), {*map(model.tokenizer.token_id, '"}]')}
    textless = {i for token, i in model.tokenizer.special_tokens.items() if token not in kept}
    answer, handed_out = Answer([], "", [], False), list[int]()

    def take(piece: TextPiece, calls: tuple[ToolCall, ...]) -> None:
        answer.text += piece.text
        answer.calls += calls
        handed_out.extend(piece.token_ids)

    while len(answer.ids) < limit:
        allowed = [] if matcher.is_finished else np.flatnonzero(matcher.mask()).tolist()
        if not allowed or (matcher.accepts and rng.random() < 0.05):
            answer.is_whole = True
            break
        likely = [token for token in allowed if token in added] or [token for token in allowed if token in quotes]
        tokens = matcher.forced() or [rng.choice(likely if likely and rng.random() < 0.3 else allowed)]
        for token in tokens:
            matcher.take(token)
            answer.ids.append(token)
            if token in textless:
                reader.gap()
            take(*reader.push(stream.push(token)))
    take(*reader.finish(stream.finish()))
    assert handed_out == answer.ids
    assert reader.made_calls == bool(answer.calls)
    return answer


@pytest.mark.parametrize("choice", ["auto", "required", "none", NAMED], ids=str)
@pytest.mark.parametrize("template", TOOL_TEMPLATES)
def test_random_answers_obey_and_are_what_the_template_writes(template: str, choice: Any) -> None:
    for kind, special in (("qwen", True), ("qwen", False), ("llama", False)):
        chat_model = model(template, kind, special)
        chat, tokenizer = chat_model.chat, chat_model.tokenizer
        schemas = {tool["function"]["name"]: chat.tool_use([tool]).functions[0][1] for tool in (SHORT, PREFIX)}
        for parallel in (True, False):
            use = chat.tool_use([SHORT, PREFIX], choice, parallel)
            for seed in range(4):
                answer = drawn(chat_model, use, seed)
                whole = tokenizer.decode(answer.ids)
                if choice == "none":
                    assert not answer.calls
                    assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)
                if choice in ("required", NAMED) and answer.is_whole:
                    assert answer.calls and not answer.text
                assert (parallel and choice != NAMED) or len(answer.calls) <= 1
                for made in answer.calls:
                    assert matches(schemas[made.name], made.arguments)
                    assert len(made.id) == 9 and made.id.isalnum()
                if answer.is_whole and answer.calls and not answer.text:
                    said: Any = {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": c.id, "function": {"name": c.name, "arguments": c.arguments}} for c in answer.calls
                        ],
                    }
                    if template == "deepseek":
                        said["tool_calls"] = [{**c, "type": "function"} for c in said["tool_calls"]]
                    assert whole in chat.text([user("a"), said], tools=TOOLS)


def test_the_calls_of_auto_begin_where_the_model_wants() -> None:
    """With the token, or with its characters where there is no such token."""
    for special in (False, True):
        chat_model = model("hermes", special_tags=special)
        use = chat_model.chat.tool_use([SHORT], "auto")
        call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a"}}\n</tool_call>'
        for before in ("", "I look. ", "a < b <tool", "<|im_en", "{"):
            matcher = chat_model.matcher(use)
            assert allows(matcher, chat_model.ids(before))
            assert matcher.accepts
            assert allows(matcher, chat_model.ids(call)), before
            assert matcher.accepts
            assert not allows(matcher.copy(), chat_model.ids(" and"))
            assert allows(matcher, chat_model.ids("\n" + call))
        matcher = chat_model.matcher(use)
        assert allows(matcher, chat_model.ids("<tool_call>"))
        assert not matcher.accepts
        assert chat_model.tokenizer.decode(matcher.forced()) == '\n{"name": "get_weather", "arguments": {"city": "'
        assert not allows(matcher, chat_model.ids(" "))


def test_free_text_cannot_spell_the_marker() -> None:
    """Where the marker is a token, its characters would be taken for it."""
    for choice in ("auto", "none"):
        chat_model = model("mistral")
        use = chat_model.chat.tool_use([SHORT], choice)
        letters = [token for c in "see [TOOL_CALLS]" for token in chat_model.ids(c)]
        matcher = chat_model.matcher(use)
        assert allows(matcher, letters[:-1])
        assert not allows(matcher, letters[-1:])
        assert allows(chat_model.matcher(use), chat_model.ids("[TOOL_CALLS]")) is (choice == "auto")


def test_free_text_may_have_other_tokens() -> None:
    """Thoughts, where <think> is a token, and special tokens, as without tools; not those of calls, and no end."""
    for template in ("hermes", "mistral", "llama"):
        chat_model = model(template)
        for choice in ("auto", "none"):
            use = chat_model.chat.tool_use([SHORT], choice)
            assert allows(chat_model.matcher(use), chat_model.ids("<think>\nlong\n</think>\n\nb"))
            assert allows(chat_model.matcher(use), chat_model.ids("a<|im_start|>b"))
            assert not allows(chat_model.matcher(use), [chat_model.end])
    hermes = model("hermes")
    assert not allows(hermes.matcher(hermes.chat.tool_use([SHORT], "auto")), hermes.ids("a</tool_call>"))


def test_where_a_call_is_the_whole_answer() -> None:
    llama = model("llama")
    use = llama.chat.tool_use([SHORT, PREFIX], "auto")
    for text, is_allowed in {
        '{"name": "get", "parameters": {}}': True,
        '{"nam": 1}': True,
        'see {"name": "x"}': True,
        '{"name": "x"': False,
        '{"name": "get", "parameters": {"a"': False,
        '{"name": "get", "parameters": {}} ': False,
    }.items():
        assert allows(llama.matcher(use), llama.ids(text)) is is_allowed, text
    none = llama.chat.tool_use([SHORT, PREFIX], "none")
    assert not allows(llama.matcher(none), llama.ids('{"name": "'))


# Reading.


def pieces_of(text: str, cuts: Iterable[int]) -> list[TextPiece]:
    """`text` in pieces of a token each, whose ids are their numbers."""
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    return [TextPiece(text[a:b], (i,)) for i, (a, b) in enumerate(itertools.pairwise(places))]


def read(use: ToolUse, pieces: list[TextPiece]) -> tuple[str, list[ToolCall], list[str]]:
    """The free text, the calls, and what each piece brought."""
    reader, text, calls, ids = CallReader(use), "", list[ToolCall](), list[int]()
    brought = []
    for number, piece in enumerate([*pieces, TextPiece("", ())]):
        free, made = reader.finish(piece) if number == len(pieces) else reader.push(piece)
        text, calls = text + free.text, calls + list(made)
        ids += free.token_ids
        brought.append(free.text + "".join(call.arguments for call in made))
    assert ids == list(range(len(pieces)))
    return text, calls, brought


HARD = '{"city": "</tool_call> {\\"a\\": \\\\\\" } ] [TOOL_CALLS] \\u00e9 <tool_call>\\n", "x": [{"a": "}"}, {}]}'
"""Arguments with everything that could be taken for an end."""


@given(cuts=st.lists(st.integers(0, 400), max_size=40))
@settings(max_examples=60)
@pytest.mark.parametrize("template", ["hermes", "mistral", "deepseek"])
def test_calls_are_read_however_the_text_comes(template: str, cuts: list[int]) -> None:
    use = model(template).chat.tool_use([SHORT, PREFIX], "auto")
    syntax = use.syntax
    close = syntax.close.replace("\0", "abcdefgh1")
    text = f"I <tool see. {syntax.begin}get_weather{syntax.middle}{HARD}{close}"
    text += f"{syntax.between}get{syntax.middle}{{}}{close}{syntax.end}"
    free, calls, _ = read(use, pieces_of(text, cuts))
    assert free == "I <tool see. "
    assert [(call.name, call.arguments) for call in calls] == [("get_weather", HARD), ("get", "{}")]
    if template == "mistral":
        assert [call.id for call in calls] == ["abcdefgh1"] * 2
    assert json.loads(HARD) == calls[0].parsed_arguments


@given(length=st.integers(0, 200))
def test_a_cut_call_is_text_and_no_call(length: int) -> None:
    use = model("hermes").chat.tool_use([SHORT], "auto")
    whole = f'ab<tool_call>\n{{"name": "get_weather", "arguments": {HARD}}}\n</tool_call>'
    cut = whole[: min(length, len(whole) - 1)]
    text, calls, _ = read(use, pieces_of(cut, range(0, 400, 3)))
    assert (text, calls) == (cut, [])


def test_a_cut_second_call_is_text_behind_the_first() -> None:
    use = model("hermes").chat.tool_use([PREFIX], "required")
    call = '<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'
    text, calls, _ = read(use, pieces_of(f"{call}\n{call[:20]}", range(0, 400, 7)))
    assert (text, [made.name for made in calls]) == ("\n" + call[:20], ["get"])


def test_text_is_held_back_no_longer_than_it_may_be_a_marker() -> None:
    use = model("hermes").chat.tool_use([PREFIX], "auto")
    text, calls, brought = read(
        use, [TextPiece(t, (i,)) for i, t in enumerate(["a <", "b", "<tool", "_", "x <tool_call"])]
    )
    assert (text, calls) == ("a <b<tool_x <tool_call", [])
    assert brought == ["a ", "<b", "", "", "<tool_x ", "<tool_call"]
    llama = model("llama").chat.tool_use([PREFIX], "auto")
    said = ['{"na', "me", '":', " 1", '{"name": "']
    _, _, brought = read(llama, [TextPiece(text, (number,)) for number, text in enumerate(said)])
    assert brought == ["", "", "", '{"name": 1', '{"name": "', ""]


def test_user_text_is_never_read() -> None:
    """Without tools nothing looks for calls; with "none" nothing is a call."""
    use = model("hermes").chat.tool_use([PREFIX], "none")
    text = '<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'
    assert read(use, pieces_of(text, [5]))[:2] == (text, [])


# What cannot be constrained.


def test_the_function_with_an_unknown_keyword_is_named() -> None:
    chat_model = model("hermes")
    bad: Tool = {
        "type": "function",
        "function": {"name": "bad", "parameters": {"properties": {"a": {"type": "array", "uniqueItems": True}}}},
    }
    use = chat_model.chat.tool_use([SHORT, bad])
    with pytest.raises(
        ConfigError, match=r"parameters of the function 'bad' cannot be read: .*'uniqueItems'.*#/properties/a"
    ):
        chat_model.matcher(use)


def test_many_tools_are_read_in_time() -> None:
    tools: list[Tool] = [
        {"type": "function", "function": {**SHORT["function"], "name": f"get_{number}"}} for number in range(128)
    ]
    for template in ("hermes", "llama"):
        chat_model = model(template)
        matcher = chat_model.matcher(chat_model.chat.tool_use(tools, "required"))
        syntax = chat_model.chat.tool_use(tools).syntax
        assert allows(matcher, chat_model.ids(f'{syntax.begin}get_127{syntax.middle}{{"city": "a"}}{syntax.close}'))


def test_blanks_before_the_marker_belong_to_the_text_of_auto() -> None:
    tokenizer = tool_tokenizer("qwen").tokenizer
    header = "{{- '<|im_start|>' + message.role }}"
    broken = TOOL_TEMPLATES["hermes"].replace(header, "{{- '<|im_start|>' + message.role + '\\n' }}")
    chat = ChatFormat(ChatTemplate({"default": broken}, {}), tokenizer)
    chat_model = Model(tokenizer, chat, ConstraintReader(tokenizer))
    call = '<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'
    auto, required = (chat.tool_use([PREFIX], choice) for choice in ("auto", "required"))
    for before in ("", "\n", "a\n"):
        assert allows(chat_model.matcher(auto), chat_model.ids(before + call))
        assert read(auto, pieces_of(before + call, [1, 5]))[0] == before
        assert allows(chat_model.matcher(required), chat_model.ids(before + call)) is (before == "\n")
    text, calls, _ = read(required, pieces_of("\n" + call, [3]))
    assert (text, len(calls)) == ("", 1)


def test_a_token_without_text_does_not_glue_a_marker() -> None:
    """Special tokens are skipped in texts, so what is around one looks like a marker, and was never one."""
    for template, parts in (("hermes", ["a<tool", "_call>\n"]), ("llama", ['{"na', 'me": "'])):
        chat_model = model(template)
        use = chat_model.chat.tool_use([PREFIX], "auto")
        gap = chat_model.tokenizer.special_tokens["<|user|>"]
        rest = '{"name": "get", "arguments": {"wrong": 1}}\n'
        ids = [*chat_model.ids(parts[0]), gap, *chat_model.ids(parts[1] + rest)]
        assert allows(chat_model.matcher(use), ids)
        reader, text, calls = CallReader(use), "", list[ToolCall]()
        for number, part in enumerate([parts[0], None, parts[1] + rest]):
            if part is None:
                reader.gap()
            free, made = reader.push(TextPiece(part or "", (number,)))
            text, calls = text + free.text, [*calls, *made]
        free, made = reader.finish(TextPiece("", ()))
        assert (text + free.text, [*calls, *made]) == ("".join(parts) + rest, [])
