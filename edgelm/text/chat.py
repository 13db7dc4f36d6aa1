"""A conversation becomes the token ids that the bundle's chat template asks for, as in transformers.

Only the template writes special tokens. What a message says stays text, even if it says "<|im_end|>".
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgelm.bundle.chat_template import CHAT_TEMPLATE_FILE, ChatTemplate
from edgelm.errors import ConfigError, EdgelmError, PromptError, install_hint, shown
from edgelm.text.call_syntax import CallSyntax, TemplateTools, template_tools
from edgelm.text.constraints import Constraint, JsonSchema, ToolUse
from edgelm.text.control_tokens import ControlTokens, unused_characters
from edgelm.text.messages import (
    ChatMessage,
    Message,
    characters_of,
    checked_messages,
    field_names,
    said,
    translated,
    translated_messages,
    uses_tools,
)
from edgelm.text.tokenizer import Tokenizer
from edgelm.text.tools import Tool, ToolChoice, checked_tools, chosen_function

if TYPE_CHECKING:
    from edgelm.text.jinja import JinjaTemplate

_WORK_PER_CHARACTER = 50
_WORK_PER_MESSAGE = 5_000
_DEFAULT, _WITH_TOOLS = "default", "tool_use"
_NO_TOOLS = "this bundle's chat template knows no tools"

Tools = list[dict[str, Any]]
"""Checked tools."""


class ChatFormat:
    """A bundle's chat template and tokenizer. Several threads may call it."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        """Join finished parts.

        Raises PromptError if the bundle has several templates and none of them is called "default".
        """
        self._tokenizer, self._template = tokenizer, template
        self._compiled: dict[str, JinjaTemplate] = {}
        self._tools: dict[str, TemplateTools | None] = {}
        if _DEFAULT not in template.templates:
            names = ", ".join(shown(name) for name in sorted(template.templates)) or "none"
            raise PromptError(f'the bundle has no chat template with the name "default", but {names}: export it again')

    def text(
        self, messages: Sequence[ChatMessage], *, tools: Sequence[Tool] | None = None, now: datetime | None = None
    ) -> str:
        """The conversation as the template writes it, with the beginning of the assistant's answer.

        Args:
            messages: who said what, at least one message.
            tools: functions that the model may call; none is the same as None.
            now: the date and time for templates that write the date; None for the present.

        Raises:
            PromptError: the messages are no conversation, are too long, or the template refuses them; or it knows no
                tools, and there are tools, calls or their results.
            BundleError: the template cannot be read.
            EdgelmError: jinja2 is missing.
        """
        own, declared = checked_messages(messages), checked_tools(tools)
        return self._render(own, now, declared, self._checked_use(own, declared))

    def ids(
        self, messages: Sequence[ChatMessage], *, tools: Sequence[Tool] | None = None, now: datetime | None = None
    ) -> list[int]:
        """The token ids of `text`, those of transformers' ``apply_chat_template(..., add_generation_prompt=True)``.

        Where messages would add a special token, their text is encoded as text, and the special tokens are those that
        the template writes; likewise what tools are described by. Where tools are in use, this holds for the tokens
        around calls and results too, special or not. Args and errors are those of `text`; PromptError also where the
        tokenizer would still read a special token out of the messages.
        """
        own, declared = checked_messages(messages), checked_tools(tools)
        use = self._checked_use(own, declared)
        control = self._special if use is None else self._special_with(use)
        now = now or datetime.now()
        ids = control.encode(self._render(own, now, declared, use))
        texts = "".join(said([own, declared]))
        for name in field_names([own, declared] if use else []):
            if control.are_in(name):
                raise PromptError(
                    f"the field {shown(name)} of a tool has a special token of this model in its name: rename it"
                )
        openings = control.openings(texts)
        if not openings:
            return ids
        names = "".join(field_names([own, declared]))
        unused = unused_characters(len(openings), texts + names + "".join(self._template.templates.values()))
        hidden = dict(zip(openings, unused, strict=True))
        table = str.maketrans(hidden)

        def hide(text: str) -> str:
            return text.translate(table)

        # What the template writes of messages in which nothing can begin a special token.
        plain = self._render(translated_messages(own, hide), now, translated(declared, hide), use)
        expected = control.among(control.encode(plain), unused[0])
        if control.among(ids, unused[0]) == expected:
            return ids
        ids = control.encode_as_text(plain, {stand_in: opening for opening, stand_in in hidden.items()})
        if control.among(ids, unused[0]) != expected:
            raise PromptError("a message has text that this tokenizer reads as a special token: leave it out")
        return ids

    def tool_use(
        self, tools: Sequence[Tool], tool_choice: ToolChoice = "auto", parallel_tool_calls: bool = True
    ) -> ToolUse:
        """What an answer must be that may, or must, call `tools`: a constraint.

        Raises:
            PromptError: the tools are no tools, or the template knows none.
            ConfigError: `tool_choice` is unknown, or a function's parameters are no schema of an object.
        """
        declared = checked_tools(tools)
        if not declared:
            raise PromptError("there are no tools to call: give at least one")
        syntax = self._call_syntax(declared)
        functions = [tool["function"] for tool in declared]
        named = chosen_function(tool_choice)
        if named is not None:
            functions = [function for function in functions if function["name"] == named]
            if not functions:
                raise ConfigError(f"tool_choice names the function {shown(named)}, which is not among the tools")
        if not isinstance(parallel_tool_calls, bool):
            raise ConfigError(f"parallel_tool_calls must be True or False, got {shown(parallel_tool_calls)}")
        choice = tool_choice if isinstance(tool_choice, str) else "required"
        parallel = parallel_tool_calls and named is None
        return ToolUse(tuple(map(_function, functions)), syntax, choice, parallel)

    def constraint(
        self,
        given: Constraint | None,
        tools: Sequence[Tool] | None,
        tool_choice: ToolChoice,
        parallel_tool_calls: bool,
    ) -> Constraint | None:
        """What an answer must be, with a constraint that was `given` beside tools.

        Raises as `tool_use`, and ConfigError where the two contradict each other, or where tools are missing.
        """
        if not tools:
            if chosen_function(tool_choice) is not None or tool_choice == "required":
                raise ConfigError(f"tool_choice is {shown(tool_choice)}, but there are no tools: give tools too")
            return given
        if given is None:
            return self.tool_use(tools, tool_choice, parallel_tool_calls)
        if chosen_function(tool_choice) is not None or tool_choice != "none":
            raise ConfigError('tools and constraint contradict each other: give one of them, or tool_choice="none"')
        return given

    def _call_syntax(self, declared: Tools) -> CallSyntax:
        found = self._template_tools(declared)
        if found is None:
            raise PromptError(f"{_NO_TOOLS}: leave tools out, or export a model that was trained to call them")
        if found.syntax is None:
            raise PromptError(
                "this bundle's chat template does not tell how its model writes calls of tools: give tools to "
                "chat_prompt alone, and read the answer yourself"
            )
        return found.syntax

    def _checked_use(self, messages: Sequence[Message], declared: Tools) -> TemplateTools | None:
        """What the template does with tools, where they are in use. Raises PromptError if it cannot be done."""
        in_use = [index for index, message in enumerate(messages) if uses_tools(message)]
        if not declared and not in_use:
            return None
        found = self._template_tools(declared)
        if found is None:
            place = "tools" if declared else f"messages[{in_use[0]}]"
            raise PromptError(f"{_NO_TOOLS}: leave {place} out, or export a model that was trained to call them")
        for index in in_use:
            is_result = messages[index]["role"] == "tool"
            if not (found.takes_results if is_result else found.writes_calls or found.syntax is not None):
                what = "results" if is_result else "calls"
                raise PromptError(f"this bundle's chat template writes no {what} of tools: drop messages[{index}]")
        return found

    def _template_tools(self, declared: Tools) -> TemplateTools | None:
        name = self._template_name(declared)
        if name not in self._tools:
            jinja = self._jinja(name)

            def render(messages: Sequence[Mapping[str, Any]], tools: Mapping[str, Any]) -> str:
                variables = self._variables(messages, tools) | {"add_generation_prompt": False}
                return jinja.render(variables, datetime.now())

            self._tools[name] = template_tools(render, self._tokenizer.added_tokens)
        return self._tools[name]

    def _template_name(self, declared: Tools) -> str:
        """As in transformers: a template of the name "tool_use" is for conversations with tools."""
        return _WITH_TOOLS if declared and _WITH_TOOLS in self._template.templates else _DEFAULT

    def _jinja(self, name: str) -> "JinjaTemplate":
        try:
            from edgelm.text.jinja import JinjaTemplate
        except ModuleNotFoundError as error:
            if error.name != "jinja2":
                raise
            raise EdgelmError(f"chat templates need jinja2, which is missing; {install_hint('chat')}") from None
        if name not in self._compiled:
            self._compiled[name] = JinjaTemplate(
                self._template.templates[name], f"the template in {CHAT_TEMPLATE_FILE}"
            )
        return self._compiled[name]

    @cached_property
    def _special(self) -> ControlTokens:
        """Special tokens, with those that the template may name although they are not marked as special."""
        return ControlTokens(
            self._tokenizer, {*self._tokenizer.special_tokens, *self._template.special_tokens.values()}
        )

    def _special_with(self, use: TemplateTools) -> ControlTokens:
        return ControlTokens(self._tokenizer, {*self._special.tokens, *use.tokens})

    def _render(self, messages: list[Message], now: datetime | None, declared: Tools, use: TemplateTools | None) -> str:
        characters = sum(map(characters_of, messages)) + len(json.dumps(declared, ensure_ascii=False))
        size = _WORK_PER_CHARACTER * characters + _WORK_PER_MESSAGE * len(messages)
        if use is not None:
            messages = [_for_template(message, use) for message in messages]
        variables = self._variables(messages, {use.variable: declared} if use is not None and declared else {})
        return self._jinja(self._template_name(declared)).render(variables, now or datetime.now(), size)

    def _variables(self, messages: Sequence[Mapping[str, Any]], tools: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **self._template.special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **tools,
        }


def _for_template(message: Message, use: TemplateTools) -> Message:
    """A message as the template takes it: what stands for no text, and calls that it does not write, as text."""
    if "tool_calls" not in message:
        return message
    if use.writes_calls:
        return message if message["content"] is not None else message | {"content": use.no_text}
    assert use.syntax is not None
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    for call in message["tool_calls"]:
        function, first = call["function"], call is message["tool_calls"][0]
        text += ("\n" if text and first else "") + use.syntax.written(
            function["name"], function["arguments"], first=first
        )
    return {name: value for name, value in message.items() if name != "tool_calls"} | {"content": text}


def _function(function: Mapping[str, Any]) -> tuple[str, JsonSchema]:
    """A function's name and the schema of its arguments.

    Without a word about further fields, the function has the listed ones only: a small model invents others.
    """
    name, given = function["name"], function.get("parameters")
    schema: dict[str, Any] = {"type": "object", **(given or {"properties": {}})}
    if schema["type"] != "object":
        raise ConfigError(f"the parameters of the function {name!r} must be the schema of an object: give its type so")
    open_keys = {"additionalProperties", "unevaluatedProperties", "patternProperties", "$ref"}
    if "properties" in schema and not open_keys.union(("allOf", "anyOf", "oneOf")).intersection(schema):
        schema["additionalProperties"] = False
    try:
        return name, JsonSchema(schema)
    except ConfigError as error:
        raise ConfigError(f"the parameters of the function {name!r} are no usable schema: {error}") from None
