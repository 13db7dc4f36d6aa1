"""Chat templates of every style, conversations, and tokenizers that have the special tokens of the templates."""

from dataclasses import dataclass

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from edgelm.bundle.chat_template import ChatTemplate
from edgelm.text.messages import ChatMessage
from edgelm.text.tokenizer import Tokenizer
from tests.text.tokenizer_kinds import KINDS

# SmolLM2's own (Apache-2.0).
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

# In the manner of Llama 3: a date, slices, trimmed contents, tokens for headers.
LLAMA3 = """{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role is string and message.content is string %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.content is not string %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}{{ part['text'] }}{% endif %}
        {%- endfor %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# In the manner of Qwen3: a namespace, a reversed list, thoughts that are cut out of earlier answers, methods of str.
QWEN3 = """{%- if tools %}{{ raise_exception('no tools') }}{% endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" and message.content is string
            and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.found = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = message.content | map(attribute='text') | join('') %}
    {%- endif %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last %}
            {%- set content = '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

# In the manner of Gemma: the system's words before the first user's, roles that must alternate, a macro.
GEMMA = """{{ bos_token }}
{%- macro words(content) -%}
    {%- if content is string -%}
        {{ content | trim }}
    {%- else -%}
        {%- for part in content if part.type == 'text' -%}{{ part.text | trim }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = words(messages[0]['content']) + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {{- words(message['content']) }}{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""

# In the manner of Zephyr and TinyLlama: lines that trim_blocks takes away, eos_token as the end of a turn.
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# Everything else that templates use: loop controls, tojson, generation, blocks of text, tests, filters.
MIXED = """{% for message in messages %}
    {% if message.content == "" %}{% continue %}{% endif %}
    {% if loop.index > 50 %}{% break %}{% endif %}
    {% set block %}[{{ loop.index }}/{{ loop.length }} {{ loop.cycle('a', 'b') }}]{% endset %}
    {{ block }} {{ message | tojson }} {{ message.content | tojson(ensure_ascii=true, indent=2) }}
    {% generation %}{{ message['content'] | string | upper | replace('A', 'b') }}{% endgeneration %}<|im_end|>
    {% for key, value in message.items() | list if key != 'name' %}{{ key }}={{ value }};{% endfor %}
    {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ (loop.previtem | default({})).role }}
    {{ not loop.first and message.role in ['user', 'system'] }} {{ 7 // 2 * 3 - 1 }} {{ 'x' * 3 }} {{ [1, 2.5, none] }}
    {{ (message.content | string).title().split()[:2] | join('+') }} {{ {'a': {'b': 1}}.a['b'] }} {{ unknown }}
{% else %}nobody{% endfor %}{# a comment #}
{{ messages | map(attribute='role') | unique | join(', ') }}{{ '<|im_start|>' if add_generation_prompt else '' }}
"""

TEMPLATES = {
    "smollm2": SMOLLM2,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "mixed": MIXED,
}
WITH_PARTS = ("llama3", "qwen3", "gemma", "mixed")
"""Templates that take a list of parts as the content."""

SPECIAL_TOKENS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|user|>",
]  # fmt: skip


def user(content: str) -> ChatMessage:
    """A message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> ChatMessage:
    """A message of the assistant."""
    return {"role": "assistant", "content": content}


def system(content: str) -> ChatMessage:
    """A message of the system."""
    return {"role": "system", "content": content}


CONVERSATIONS: dict[str, list[ChatMessage]] = {
    "one": [user("Hello")],
    "system": [system("You are terse."), user("the a aa b")],
    "turns": [user("a b"), assistant("c  d\n"), user(" e ")],
    "all": [system("  Be kind. \n"), user("a"), assistant("b"), user("c"), assistant("d"), user("e")],
    "empty": [user("")],
    "empty answer": [user("a"), assistant(""), user("b")],
    "unicode": [user("今天 é e\u0301 😀 \u200b\ufeff Straße"), assistant("天今"), user("\n\n\t\u3000")],
    "code": [user("if a < b && c:\n    print('x')\r\n</p> {{ a }} {% if %} <think>"), assistant("```"), user("'\"\\")],
    "thoughts": [user("a"), assistant("<think>\nlong\n</think>\n\nb"), user("c"), assistant("<think>x</think>d")],
    "many": [user("a")] + [assistant("b c"), user("d <e> [f]")] * 30,
}  # fmt: skip
PARTS: list[ChatMessage] = [
    {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": " b"}]},
    assistant("c"),
    {"role": "user", "content": [{"type": "text", "text": ""}]},
]


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with the tokens of all templates."""

    json: str

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_json(self.json)


def chat_tokenizer(kind: str) -> ChatTokenizer:
    """The tokenizer `kind` of `tokenizer_kinds` with the special tokens, of which one swallows blanks."""
    backend: Backend = KINDS[kind]()
    backend.add_special_tokens([*SPECIAL_TOKENS, "<s>", "</s>", AddedToken("<|end|>", rstrip=True, special=True)])
    backend.add_tokens(["<think>", "</think>"])
    return ChatTokenizer(backend.to_str())


TOKENIZER_KINDS = ("gpt2", "qwen", "llama", "llama-legacy", "gemma")


def chat_template(name: str) -> ChatTemplate:
    """The template `name` as a bundle has it."""
    return ChatTemplate({"default": TEMPLATES[name]}, {"bos_token": "<s>", "eos_token": "</s>"})
