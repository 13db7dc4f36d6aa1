"""Chat templates with tools, of every syntax of calls, and conversations with calls and their results."""

from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from edgelm.bundle.chat_template import ChatTemplate
from edgelm.text.messages import ChatMessage
from edgelm.text.tools import Tool
from tests.text.chat_templates import ChatTokenizer, assistant, chat_tokenizer, system, user

# In the manner of Qwen2.5 and Hermes: tags around JSON, any number of calls, results as the user's.
HERMES = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n\\n' }}{%- endif %}
    {{- "Functions inside <tools></tools>:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\nLike so:\\n<tool_call>\\n{\\"name\\": <the name>, \\"arguments\\": <the arguments>}\\n" }}
    {{- "</tool_call><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first)
            or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# In the manner of Qwen3: the content must be a text, thoughts stand before the last answer.
THINKING = """{%- if tools %}
    {{- '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>assistant\\n' }}{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        {{- content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# In the manner of Llama 3.1 and 3.2: the answer is a call or a text, one call at most, tools are indented.
LLAMA = """{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {{- 'Answer {"name": function name, "parameters": dictionary of names and values}.\\n\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("only single tool-calls") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}{{- tool_call.arguments | tojson }}
        {{- "}" }}{{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# In the manner of Mistral: a list behind a special token, with ids of nine characters.
MISTRAL = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- if tools is not none and loop.index0 == messages | selectattr('role', 'equalto', 'user') | list | length - 1
                or tools is not none and loop.last %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val | tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- endif %}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}{{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}
                {{- raise_exception("ids have length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message.role == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message.role == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""

# In the manner of DeepSeek: tokens around the name, fenced JSON, and None where there is no text.
DEEPSEEK = """{{- bos_token }}
{%- if tools %}{{- 'Functions: ' }}{{- tools | map(attribute='function') | list | tojson }}{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '<|user|>' + message['content'] }}{%- endif %}
    {%- if message['role'] == 'assistant' and message['content'] is none %}
        {{- '<|bot|><|calls|>' }}
        {%- for call in message['tool_calls'] %}
            {%- if not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<|call|>' + call['type'] + '<|sep|>' + call['function']['name'] + '\\n```json\\n' }}
            {{- call['function']['arguments'] | tojson + '\\n```<|/call|>' }}
        {%- endfor %}
        {{- '<|/calls|><|end|>' }}
    {%- elif message['role'] == 'assistant' %}{{- '<|bot|>' + message['content'] + '<|end|>' }}{%- endif %}
    {%- if message['role'] == 'tool' %}{{- '<|output|>' + message['content'] + '<|/output|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|bot|>' }}{%- endif %}"""

# In the manner of SmolLM3: tools under another name, written as Python does, and calls that only the text has.
SMOLLM3 = """{{- "<|im_start|>system\\n" -}}
{%- if xml_tools -%}
    {{- "Functions inside <tools></tools>:\\n<tools>\\n" -}}
    {%- for tool in xml_tools[:] -%}{{- (tool | string) ~ "\\n" -}}{%- endfor -%}
    {{- "</tools>\\nLike so:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}" -}}
    {{- "\\n</tool_call>\\n\\n" -}}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "tool" -%}
        {{- "<|im_start|>user\\n" + content + "<|im_end|>\\n" -}}
    {%- else -%}
        {{- "<|im_start|>" + message.role + "\\n" + content.lstrip("\\n") + "<|im_end|>\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}"""

TOOL_TEMPLATES = {
    "hermes": HERMES,
    "thinking": THINKING,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "deepseek": DEEPSEEK,
    "smollm3": SMOLLM3,
}
ONE_CALL = ("llama",)
"""Templates with one call in an answer at most."""
TOKENS = [
    "<|bot|>", "<|calls|>", "<|/calls|>", "<|call|>", "<|/call|>", "<|sep|>", "<|output|>", "<|/output|>",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[INST]", "[/INST]",
]  # fmt: skip
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
"""Tokens, but not special ones, in Qwen's vocabularies."""

WEATHER: Tool = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather "now" in a city: <b>warm</b> & dry, 今天 é.',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where."},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city"],
        },
    },
}
CLOCK: Tool = {"type": "function", "function": {"name": "clock", "description": "What time it is."}}
TOOLS = [WEATHER, CLOCK]
SHORT: Tool = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 6},
                "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2},
            },
            "required": ["city"],
        },
    },
}
"""The weather, with arguments that end soon whatever writes them."""


def call(name: str, arguments: Any, id: str = "abcdefgh1") -> Any:
    """A call as a message has it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*made: Any) -> ChatMessage:
    """An answer of calls only."""
    return {"role": "assistant", "content": None, "tool_calls": list(made)}


def result(content: str, id: str = "abcdefgh1") -> ChatMessage:
    """The result of a call."""
    return {"role": "tool", "tool_call_id": id, "content": content}


PARIS = call("get_weather", {"city": "Paris", "unit": "C"})
TIME = call("clock", {}, "abcdefgh2")
TOOL_CONVERSATIONS: dict[str, list[ChatMessage]] = {
    "asked": [user("How warm is it?")],
    "unicode": [user("a"), calls(call("get_weather", {"city": "Zürich <é> 今天 \"'\\ \n"})), result('{"n": "é"}')],
    "answered": [user("a"), calls(PARIS), result("21"), assistant("It is 21."), user("And now?")],
    "nested": [user("a"), calls(call("get_weather", {"city": "x", "more": {"b": [1, 2.5, None, True, {"a": ""}]}}))],
}
WITH_SYSTEM: list[ChatMessage] = [system("Be terse."), user("a"), calls(PARIS), result("21")]
TWO_CALLS: list[ChatMessage] = [user("a"), calls(PARIS, TIME), result("21"), result("12:00", "abcdefgh2")]


def tool_tokenizer(kind: str, *, special_tags: bool = False) -> ChatTokenizer:
    """A tokenizer of `chat_templates` with the tokens of these templates; tags are special, or added only."""
    backend = Backend.from_str(chat_tokenizer(kind).json)
    backend.add_special_tokens(TOKENS)
    backend.add_tokens([AddedToken(tag, special=special_tags, normalized=False) for tag in TAGS])
    return ChatTokenizer(backend.to_str())


def tool_template(name: str) -> ChatTemplate:
    """The template `name` as a bundle has it."""
    return ChatTemplate({"default": TOOL_TEMPLATES[name]}, {"bos_token": "<s>", "eos_token": "</s>"})
