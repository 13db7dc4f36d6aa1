"""A bundle gets a chat template only if the runtime writes conversations with it as transformers does."""

from pathlib import Path

import pytest

from edgelm.bundle.chat_template import ChatTemplate
from edgelm_export.certify.chats import CONVERSATIONS, chat_difference
from edgelm_export.pipeline import export
from tests.export.checkpoints import Shape, save_checkpoint
from tests.text.chat_templates import TEMPLATES, TOKENIZER_KINDS, chat_template, chat_tokenizer
from tests.text.tool_templates import TOOL_TEMPLATES

pytestmark = pytest.mark.export

_WITH_LINKS = "{{ messages[0]['content'] | urlize }}"
"""The runtime's sandbox has no such filter."""


def difference(template: str) -> str | None:
    return chat_difference(ChatTemplate({"default": template}, {"bos_token": "<s>"}), chat_tokenizer("gpt2").tokenizer)


def test_there_are_ten_conversations() -> None:
    assert len(CONVERSATIONS) == 10 and sum(1 for _, tools in CONVERSATIONS.values() if tools) == 2


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_every_style_are_alike(name: str, kind: str) -> None:
    assert chat_difference(chat_template(name), chat_tokenizer(kind).tokenizer) is None


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_templates_with_tools_are_alike(name: str) -> None:
    assert difference(TOOL_TEMPLATES[name]) is None


def test_a_template_that_fails_in_both_is_alike() -> None:
    assert difference("{{ raise_exception('never') }}") is None


def test_a_template_that_only_the_runtime_refuses_is_told() -> None:
    found = difference(_WITH_LINKS)
    assert found is not None and found.startswith("edgelm cannot write the conversation 'a question': ")


def test_another_text_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelm.text.chat.ChatFormat.text", lambda *_, **__: "Was it?")
    assert difference("Was {{ messages[0]['content'] }}") == (
        "edgelm writes 'it?' in the conversation 'a question', transformers 'What is the capital '"
    )


def test_a_template_that_only_transformers_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelm.text.chat.ChatFormat.text", lambda *_, **__: "")
    assert (
        difference("{{ raise_exception('no') }}")
        == "edgelm writes the conversation 'a question', and transformers fails"
    )


def test_several_templates_of_which_none_is_the_default() -> None:
    found = chat_difference(ChatTemplate({"rag": "{{ messages }}"}, {}), chat_tokenizer("gpt2").tokenizer)
    assert found is not None and "no chat template with the name" in found


@pytest.mark.usefixtures("few_tokens")
def test_an_export_leaves_a_template_out_and_says_so(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", Shape(layers=1, context=32, vocab=256))
    (source / "chat_template.jinja").write_text(_WITH_LINKS)
    made = export(str(source), tmp_path / "bundle", "fp32", accept_quality_loss=True)
    assert "chat_template.json" not in made.bundle.manifest.files
    assert [note for note in made.notes if note.startswith("the bundle has no chat template, because")]
