"""A conversation becomes the token ids that the bundle's chat template asks for, as in transformers.

Only the template writes special tokens. What a message says stays text, even if it says "<|im_end|>".
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

from edgelm.bundle.chat_template import CHAT_TEMPLATE_FILE, ChatTemplate
from edgelm.errors import EdgelmError, PromptError, install_hint, shown
from edgelm.text.tokenizer import Tokenizer, check_text

if TYPE_CHECKING:
    from edgelm.text.jinja import JinjaTemplate

MAX_MESSAGES = 4_096
MAX_CHAT_CHARACTERS = 2**20
"""The longest conversation, in characters of all its messages."""

_WORK_PER_CHARACTER = 50
_WORK_PER_MESSAGE = 5_000
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
# Private use, one of which stands for each character of a message that could begin a special token.
_PRIVATE = range(0xF0000, 0xFFFFE)


class TextPart(TypedDict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(TypedDict):
    """One message of a conversation."""

    role: str
    """Who speaks, a word that the template knows: "system", "user", "assistant"."""
    content: str | Sequence[TextPart]
    """What is said. Parts reach the template as a list; not every template takes one."""
    name: NotRequired[str]
    """The speaker's name, for templates that write it."""


class ChatFormat:
    """A bundle's chat template and tokenizer. Several threads may call it."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        """Join finished parts.

        Raises PromptError if the bundle has several templates and none of them is called "default".
        """
        self._tokenizer, self._template = tokenizer, template
        if "default" not in template.templates:
            names = ", ".join(shown(name) for name in sorted(template.templates)) or "none"
            raise PromptError(f'the bundle has no chat template with the name "default", but {names}: export it again')

    def text(self, messages: Sequence[ChatMessage], *, now: datetime | None = None) -> str:
        """The conversation as the template writes it, with the beginning of the assistant's answer.

        Args:
            messages: who said what, at least one message.
            now: the date and time for templates that write the date; None for the present.

        Raises:
            PromptError: the messages are no conversation, are too long, or the template refuses them.
            BundleError: the template cannot be read.
            EdgelmError: jinja2 is missing.
        """
        return self._render(checked_messages(messages), now)

    def ids(self, messages: Sequence[ChatMessage], *, now: datetime | None = None) -> list[int]:
        """The token ids of `text`, those of transformers' ``apply_chat_template(..., add_generation_prompt=True)``.

        Where messages would add a special token, their text is encoded as text, and the special tokens are those that
        the template writes. Args and errors are those of `text`; PromptError also where the tokenizer would still read
        a special token out of the messages.
        """
        own = checked_messages(messages)
        now = now or datetime.now()
        text = self._render(own, now)
        ids = self._encode(text)
        openings = self._openings("".join(_texts(own)))
        if not openings:
            return ids
        unused = _unused_characters(len(openings), "".join(_texts(own)) + self._template.templates["default"])
        hidden = dict(zip(openings, unused, strict=True))
        # What the template writes of messages in which nothing can begin a special token.
        plain = self._render(_translated(own, str.maketrans(hidden)), now)
        control = self._special(self._encode(plain), unused)
        if self._special(ids, unused) == control:
            return ids
        ids = self._encode_as_text(plain, {stand_in: opening for opening, stand_in in hidden.items()})
        if self._special(ids, unused) != control:
            raise PromptError("a message has text that this tokenizer reads as a special token: leave it out")
        return ids

    @cached_property
    def _jinja(self) -> "JinjaTemplate":
        try:
            from edgelm.text.jinja import JinjaTemplate
        except ModuleNotFoundError as error:
            if error.name != "jinja2":
                raise
            raise EdgelmError(f"chat templates need jinja2, which is missing; {install_hint('chat')}") from None
        return JinjaTemplate(self._template.templates["default"], f"the template in {CHAT_TEMPLATE_FILE}")

    @cached_property
    def _specials(self) -> dict[str, int]:
        """Special tokens, with those that the template may name although they are not marked as special."""
        named = {text: self._tokenizer.token_id(text) for text in self._template.special_tokens.values() if text}
        return self._tokenizer.special_tokens | {text: i for text, i in named.items() if i is not None}

    @cached_property
    def _first_characters(self) -> frozenset[str]:
        normalized = {self._tokenizer.normalized(token) for token in self._specials}
        return frozenset(token[0] for token in {*self._specials, *normalized} if token)

    def _render(self, messages: list[ChatMessage], now: datetime | None) -> str:
        variables = {
            **self._template.special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        size = _WORK_PER_CHARACTER * sum(map(len, _texts(messages))) + _WORK_PER_MESSAGE * len(messages)
        return self._jinja.render(variables, now or datetime.now(), size)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _openings(self, text: str) -> list[str]:
        """Characters of `text` with which a special token begins, as it is or normalized."""
        firsts = self._first_characters
        return sorted(c for c in set(text) if c in firsts or firsts.intersection(self._tokenizer.normalized(c)))

    def _special(self, ids: list[int], unused: Sequence[str]) -> list[int]:
        """The special tokens among `ids`, without the one for characters that the tokenizer does not know."""
        special = set(self._specials.values()).difference(self._encode(unused[0]))
        return [token_id for token_id in ids if token_id in special]

    def _encode_as_text(self, plain: str, openings: Mapping[str, str]) -> list[int]:
        """Encode `plain` with the `openings` that stand in for characters put back, as text.

        Text is cut behind the first character of what would be a special token, so the tokenizer cannot see it. A
        tokenizer that begins each text with a space has one more there.
        """
        text = "".join(openings.get(c, c) for c in plain)
        begins_token = re.compile(f"(?={'|'.join(map(re.escape, self._specials))})")
        cuts = [found.start() + 1 for found in begins_token.finditer(text) if plain[found.start()] in openings]
        pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [token_id for piece in pieces for token_id in self._encode(piece)]


def checked_messages(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """A copy of `messages` that holds lists, dicts and str alone.

    Raises PromptError if they are not a conversation of `MAX_MESSAGES` messages and `MAX_CHAT_CHARACTERS` characters at
    most, or have a field that is not supported.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise PromptError(f"messages must be a list of messages, got {type(messages).__name__}")
    if not messages:
        raise PromptError("messages is empty: give at least one message")
    if len(messages) > MAX_MESSAGES:
        raise PromptError(f"there are {len(messages):,} messages, more than {MAX_MESSAGES:,}: leave the oldest out")
    checked = [_checked(message, f"messages[{index}]") for index, message in enumerate(messages)]
    characters = sum(map(len, _texts(checked)))
    if characters > MAX_CHAT_CHARACTERS:
        raise PromptError(
            f"the messages have {characters:,} characters, more than {MAX_CHAT_CHARACTERS:,}: leave the oldest out"
        )
    return checked


def _checked(message: object, place: str) -> ChatMessage:
    if not isinstance(message, Mapping):
        raise PromptError(f'{place} must be a dict with "role" and "content", got {type(message).__name__}')
    for name in message:
        if name not in ChatMessage.__annotations__:
            raise PromptError(f'{place} has {shown(name)}, which is not supported: a message has "role" and "content"')
    role, content, speaker = message.get("role"), message.get("content"), message.get("name")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise PromptError(f'the role of {place} must be a word such as "user", got {shown(role)}')
    if isinstance(content, str):
        checked = ChatMessage(role=str(role), content=_text(content, f"the content of {place}"))
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        checked = ChatMessage(
            role=str(role), content=[_part(p, f"{place}.content[{i}]") for i, p in enumerate(content)]
        )
    else:
        raise PromptError(f"the content of {place} must be a text or a list of text parts, got {shown(content)}")
    if speaker is not None:
        if not isinstance(speaker, str):
            raise PromptError(f"the name of {place} must be a text, got {shown(speaker)}")
        checked["name"] = _text(speaker, f"the name of {place}")
    return checked


def _part(part: object, place: str) -> TextPart:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise PromptError(f'{place} must be {{"type": "text", "text": ...}}, got {shown(kind)}: only text is supported')
    text = part.get("text")
    if not isinstance(text, str) or len(part) > 2:
        raise PromptError(f'{place} must have a "text" and nothing else besides its type, got {shown(dict(part))}')
    return TextPart(type="text", text=_text(text, place))


def _text(text: str, place: str) -> str:
    check_text(text, place)
    return str(text)


def _texts(messages: Sequence[ChatMessage]) -> list[str]:
    """All texts of checked messages; roles are words of the program."""
    texts = [message["name"] for message in messages if "name" in message]
    for message in messages:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [part["text"] for part in content]
    return texts


def _translated(messages: Sequence[ChatMessage], table: Mapping[int, str]) -> list[ChatMessage]:
    """Checked messages with the characters of all texts replaced as in `table`."""
    translated = []
    for message in messages:
        content = message["content"]
        new: str | list[TextPart]
        if isinstance(content, str):
            new = content.translate(table)
        else:
            new = [TextPart(type="text", text=part["text"].translate(table)) for part in content]
        translated.append(ChatMessage(role=message["role"], content=new))
        if "name" in message:
            translated[-1]["name"] = message["name"].translate(table)
    return translated


def _unused_characters(count: int, text: str) -> list[str]:
    """Characters for private use that are not in `text`."""
    used = set(text)
    found = list(islice((chr(code) for code in _PRIVATE if chr(code) not in used), count))
    if len(found) < count:
        raise PromptError("the messages use all characters for private use: leave some of them out")
    return found
