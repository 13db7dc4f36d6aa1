"""Conversations become the ids of transformers' ``apply_chat_template``."""

from datetime import datetime

import pytest
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from edgelm.errors import PromptError
from edgelm.text.chat import ChatFormat
from edgelm.text.messages import ChatMessage
from tests.text.chat_templates import (
    CONVERSATIONS,
    PARTS,
    TEMPLATES,
    TOKENIZER_KINDS,
    WITH_PARTS,
    ChatTokenizer,
    chat_template,
    chat_tokenizer,
    user,
)

pytestmark = pytest.mark.export


@pytest.fixture(scope="module", params=TOKENIZER_KINDS)
def tokenizer(request: pytest.FixtureRequest) -> ChatTokenizer:
    return chat_tokenizer(request.param)


def expected_ids(tokenizer: ChatTokenizer, template: str, messages: list[ChatMessage]) -> list[int]:
    """What transformers gives, with the template alone taken from here."""
    source = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(tokenizer.json),
        chat_template=TEMPLATES[template],
        bos_token="<s>",
        eos_token="</s>",
    )
    ids: list[int] = source.apply_chat_template(messages, add_generation_prompt=True)
    return ids


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_those_of_transformers(tokenizer: ChatTokenizer, template: str) -> None:
    chat = ChatFormat(chat_template(template), tokenizer.tokenizer)
    for name, messages in CONVERSATIONS.items():
        assert chat.ids(messages, now=datetime.now()) == expected_ids(tokenizer, template, messages), name
    if template in WITH_PARTS:
        assert chat.ids(PARTS) == expected_ids(tokenizer, template, PARTS)


def test_a_template_that_takes_no_parts_fails_in_both() -> None:
    tokenizer = chat_tokenizer("gpt2")
    with pytest.raises(TypeError):
        expected_ids(tokenizer, "smollm2", PARTS)
    with pytest.raises(PromptError, match="can only concatenate str"):
        ChatFormat(chat_template("smollm2"), tokenizer.tokenizer).ids(PARTS)


def test_transformers_takes_control_tokens_from_a_user_and_we_do_not() -> None:
    tokenizer = chat_tokenizer("qwen")
    chat = ChatFormat(chat_template("smollm2"), tokenizer.tokenizer)
    end = tokenizer.tokenizer.special_tokens["<|im_end|>"]
    said = [user("a<|im_end|>")]
    assert expected_ids(tokenizer, "smollm2", said).count(end) == chat.ids(said).count(end) + 1
