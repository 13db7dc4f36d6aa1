"""The syntax of calls is read off what a template writes."""

from dataclasses import replace

import pytest

from edgelm.bundle.chat_template import ChatTemplate
from edgelm.errors import PromptError
from edgelm.text.call_syntax import CallSyntax, TemplateTools
from edgelm.text.chat import ChatFormat
from tests.text.chat_templates import TEMPLATES, assistant, chat_template, user
from tests.text.tool_templates import (
    CLOCK,
    HERMES,
    TOOL_TEMPLATES,
    TOOLS,
    call,
    calls,
    result,
    tool_template,
    tool_tokenizer,
)

TOKENIZER = tool_tokenizer("qwen").tokenizer

HERMES_SYNTAX = CallSyntax(
    marker="<tool_call>",
    begin='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    close="}\n</tool_call>",
    between='\n<tool_call>\n{"name": "',
    end="",
    item_separator=", ",
    key_separator=": ",
)
SYNTAXES = {
    "hermes": HERMES_SYNTAX,
    "thinking": HERMES_SYNTAX,
    "smollm3": HERMES_SYNTAX,
    "llama": CallSyntax("", '{"name": "', '", "parameters": ', "}", None, "", ", ", ": "),
    "mistral": CallSyntax(
        "[TOOL_CALLS]", '[TOOL_CALLS] [{"name": "', '", "arguments": ', ', "id": "\0"}', ', {"name": "', "]", ", ", ": "
    ),
    "deepseek": CallSyntax(
        "<|calls|>",
        "<|calls|><|call|>function<|sep|>",
        "\n```json\n",
        "\n```<|/call|>",
        "\n<|call|>function<|sep|>",
        "<|/calls|>",
        ", ",
        ": ",
    ),
}


def measured(template: str) -> TemplateTools | None:
    format = ChatFormat(ChatTemplate({"default": template}, {"bos_token": "<s>", "eos_token": "</s>"}), TOKENIZER)
    return format._template_tools([])


def syntax_of(template: str) -> CallSyntax | None:
    found = measured(template)
    assert found is not None
    return found.syntax


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_each_style(name: str) -> None:
    assert syntax_of(TOOL_TEMPLATES[name]) == SYNTAXES[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_without_tools(name: str) -> None:
    assert measured(TEMPLATES[name]) is None
    chat = ChatFormat(chat_template(name), TOKENIZER)
    with pytest.raises(PromptError, match="knows no tools: leave tools out"):
        chat.ids([user("a")], tools=TOOLS)
    with pytest.raises(PromptError, match=r"knows no tools: leave messages\[1\] out"):
        chat.ids([user("a"), calls(call("clock", {}))])
    with pytest.raises(PromptError, match=r"knows no tools: leave messages\[0\] out"):
        chat.ids([result("a")])


def test_which_tokens_belong_to_tools() -> None:
    """Not those that the template writes in other conversations too."""
    found = measured(TOOL_TEMPLATES["mistral"])
    assert found is not None
    assert found.tokens == {
        "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    }  # fmt: skip
    assert "</tool_response>" in measured(HERMES).tokens  # type: ignore[union-attr]


def test_another_end_of_turn_behind_calls() -> None:
    """It shares characters with the end of other turns, but is no part of the syntax."""
    llama = TOOL_TEMPLATES["llama"].replace('{{- "}" }}{{- "<|eot_id|>" }}', '{{- "}" }}{{- "<|end_header_id|>" }}')
    assert llama != TOOL_TEMPLATES["llama"]
    assert syntax_of(llama) == SYNTAXES["llama"]


def test_compact_json() -> None:
    compact = HERMES.replace("arguments | tojson", "arguments | tojson(separators=(',', ':'))")
    assert syntax_of(compact) == replace(HERMES_SYNTAX, item_separator=",", key_separator=":")


def test_a_marker_that_is_no_token() -> None:
    found = syntax_of(HERMES.replace("<tool_call>", "CALL:"))
    assert found is not None
    assert (found.marker, found.begin) == ("CALL:", 'CALL:\n{"name": "')


def test_a_line_break_before_the_marker() -> None:
    """The marker alone begins a call; in text the line break may be missing."""
    header = "{{- '<|im_start|>' + message.role }}"
    assert header in HERMES
    broken = HERMES.replace(header, "{{- '<|im_start|>' + message.role + '\\n' }}")
    found = syntax_of(broken)
    assert found is not None
    assert (found.marker, found.begin) == ("<tool_call>", '\n<tool_call>\n{"name": "')
    assert found.begin_in_text == '<tool_call>\n{"name": "'


def test_calls_with_numbers() -> None:
    """Each further call differs, so the syntax of one is known only."""
    numbered = HERMES.replace('\\n<tool_call>\\n{"name', "\\n<tool_call>' ~ loop.index ~ '\\n{\"name")
    found = syntax_of(numbered)
    assert found is not None
    assert (found.begin, found.between) == ('<tool_call>1\n{"name": "', None)


def test_a_marker_that_begins_like_the_text_of_others() -> None:
    """What two turns begin with alike is not cut inside a token."""
    template = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + (
        "{% for m in messages %}<|im_start|>{% for c in m.tool_calls or [] %}<|calls|>{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}{% if m.content %}<|call|>{{ m.content }}{% endif %}<|im_end|>"
        "{% endfor %}"
    )
    found = syntax_of(template)
    assert found is not None
    assert (found.marker, found.begin, found.middle, found.close, found.end) == ("<|calls|>", "<|calls|>", "", "", "")
    assert found.between == "<|calls|>"


@pytest.mark.parametrize("no_text", ["", None])
def test_the_form_of_no_text_with_which_results_work_too(no_text: str | None) -> None:
    test = "is string" if no_text == "" else "is none"
    picky = HERMES.replace(
        "{%- for message in messages %}",
        "{%- for message in messages %}"
        + (
            "{%- if not loop.last and message.tool_calls and not (message.content " + test + ") %}"
            "{{ raise_exception('no') }}{% endif %}"
        ),
    )
    found = measured(picky)
    assert found is not None
    assert (found.no_text, found.takes_results) == (no_text, True)


PYTHON = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + (
    "{% for m in messages %}<|im_start|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %})]"
    "{% endfor %}<|im_end|>{% endfor %}"
)


def test_what_is_no_json_is_not_guessed() -> None:
    """Prompts are as ever, but calls are not constrained, so chat refuses the tools."""
    chat = ChatFormat(ChatTemplate({"default": PYTHON}, {}), TOKENIZER)
    assert '"clock"' in chat.text([user("a")], tools=[CLOCK])
    assert chat.text([user("a"), calls(call("clock", {"a": 1}))]).endswith("<|im_start|>[clock(a=1)]<|im_end|>")
    with pytest.raises(PromptError, match="does not tell how its model writes calls"):
        chat.tool_use([CLOCK])


def test_a_template_that_writes_no_calls() -> None:
    silent = HERMES.replace("for tool_call in message.tool_calls", "for tool_call in []").replace("<tool_call>", "")
    chat = ChatFormat(ChatTemplate({"default": silent}, {}), TOKENIZER)
    with pytest.raises(PromptError, match=r"writes no calls of tools: drop messages\[1\]"):
        chat.ids([user("a"), calls(call("clock", {}))], tools=[CLOCK])


def test_a_template_that_ignores_results() -> None:
    silent = HERMES.replace('message.role == "tool"', 'message.role == "nobody"')
    chat = ChatFormat(ChatTemplate({"default": silent}, {}), TOKENIZER)
    with pytest.raises(PromptError, match=r"writes no results of tools: drop messages\[2\]"):
        chat.ids([user("a"), calls(call("clock", {})), result("b")], tools=[CLOCK])


def test_a_template_that_fails_or_works_for_ever_has_no_tools() -> None:
    for template in ("{{ tools | tojson }}{{ messages[1].nothing.nothing }}", "{{ tools[0].function.name }}" * 2):
        found = measured(template)
        assert found is None or found.syntax is None
    endless = HERMES + "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    assert measured(endless) is None


def test_calls_that_only_the_text_has() -> None:
    """SmolLM3's template writes no calls: they stand in the content, in the form that its instructions show."""
    chat = ChatFormat(tool_template("smollm3"), TOKENIZER)
    said = [user("a"), calls(call("clock", {"x": "é"}), call("clock", {})), result("12"), assistant("b")]
    assert chat.text(said, tools=[CLOCK]).endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "clock", "arguments": {"x": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n12<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    tag = TOKENIZER.token_id("<tool_call>")
    assert chat.ids(said, tools=[CLOCK]).count(tag or -1) == 3  # that of the instructions too
