"""Chats become prompts and completions by the template of a turn; only what assistants say is learned."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import tokenizers

from edgelm.bundle.chat_template import ChatTemplate
from edgelm.errors import ConfigError, TrainingError
from edgelm.text.chat import ChatFormat
from edgelm.text.messages import ChatMessage
from edgelm.text.tokenizer import Tokenizer
from edgelm_train.data.examples import Pairs, read_examples, read_pairs
from edgelm_train.data.templates import ChatTask, Task
from tests.export.checkpoints import save_tokenizer

pytestmark = pytest.mark.export

TURN = r"{role}: {content}\n"
OPENAI = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]
ANSWERS = (
    ("system: Be kind.\nuser: Hi\nassistant:", " Hello!\n"),
    ("system: Be kind.\nuser: Hi\nassistant: Hello!\nuser: Bye\nassistant:", " See you.\n"),
)


def pairs(folder: Path, *rows: object, turn: str = TURN, name: str = "a.jsonl") -> Pairs:
    content = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(content, encoding="utf-8")
    return read_pairs(folder / name, ChatTask.parse(turn))


def answers(read: Pairs) -> list[tuple[str, str]]:
    return [pair for _, row in read.by_row for pair in row]


def test_every_answer_is_learned_after_all_before_it(tmp_path: Path) -> None:
    read = pairs(tmp_path, {"messages": OPENAI, "id": 7})
    assert tuple(answers(read)) == ANSWERS
    assert read.task.prompt.shown() == "user: {content}\nassistant:"
    assert read.notes == ("learned of each chat: what 'assistant' says, each time after all before it",)


def test_the_forms_of_chats_mean_the_same(tmp_path: Path) -> None:
    sharegpt = [{"from": turn["role"], "value": turn["content"]} for turn in OPENAI]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in OPENAI]
    forms: list[object] = [
        {"conversations": sharegpt},
        {"conversations": sharegpt[1:], "system": "Be kind."},
        {"messages": parts},
        sharegpt,
    ]
    for form in forms:
        assert tuple(answers(pairs(tmp_path, form))) == ANSWERS
        assert tuple(answers(pairs(tmp_path, form, name="b.json"))) == ANSWERS
    assert answers(pairs(tmp_path, {"prompt": OPENAI[:4], "completion": OPENAI[4:]})) == [ANSWERS[1]]


def test_roles_of_sharegpt_stay_as_they_are(tmp_path: Path) -> None:
    read = pairs(tmp_path, {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]})
    assert answers(read) == [("human: Hi\ngpt:", " Yes?\n")]
    assert read.task.prompt.shown() == "human: {content}\ngpt:"


def test_a_new_line_before_the_content_belongs_to_the_prompt(tmp_path: Path) -> None:
    read = pairs(tmp_path, {"messages": OPENAI[1:3]}, turn=r"<|im_start|>{role}\n{content}<|im_end|>\n")
    assert answers(read) == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello!<|im_end|>\n"),
    ]


def test_two_questions_in_a_row_and_a_chat_that_ends_with_one(tmp_path: Path) -> None:
    chat = [OPENAI[1], OPENAI[1], OPENAI[2], OPENAI[3]]
    assert answers(pairs(tmp_path, {"messages": chat})) == [("user: Hi\nuser: Hi\nassistant:", " Hello!\n")]


def test_a_weight_of_zero_is_context_only(tmp_path: Path) -> None:
    chat = [OPENAI[1], {**OPENAI[2], "weight": 0}, *OPENAI[3:]]
    assert [completion for _, completion in answers(pairs(tmp_path, {"messages": chat}))] == [" See you.\n"]


CALL: dict[str, object] = {"role": "assistant", "content": None, "tool_calls": [{}]}
REFUSED: list[tuple[list[object], list[str]]] = [
    ([{"messages": [OPENAI[1], CALL]}], ["turn 2 of 'messages' in line 1", "calls a tool", "leave it out"]),
    ([{"messages": [{"role": "user", "content": [{"type": "image_url"}]}, OPENAI[2]]}], ["turn 1", "learns text only"]),
    ([{"messages": OPENAI}, {"messages": [OPENAI[1], {"content": "b"}]}], ["turn 2", "line 2", '"role" and "content"']),
    ([{"messages": OPENAI}, {"messages": "hi"}], ["'messages' in line 2", "is not a list of turns"]),
    ([{"messages": [{"role": "bob", "content": "a"}]}], ["is an assistant's", "'bob'", "assistant, gpt"]),
    ([{"chosen": OPENAI, "rejected": OPENAI}], ["'chosen', 'rejected'", "keep one"]),
    ([{"q": "a", "turns": ["a", "b"]}], ["line 1", "has no chat", "'q', 'turns'"]),
    ([{"messages": [{"role": None, "content": "a"}, *OPENAI]}], ["turn 1", "has no role"]),
    ([{"messages": [OPENAI[1], {"role": "assistant", "content": "\ud800"}]}], ["turn 2", "surrogate"]),
]


@pytest.mark.parametrize(("rows", "words"), REFUSED)
def test_a_chat_that_cannot_be_learned_is_refused(rows: list[object], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        pairs(tmp_path, *rows)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_without_an_answer_is_left_out(tmp_path: Path) -> None:
    read = pairs(tmp_path, {"messages": OPENAI}, {"messages": []}, {"messages": None}, {"messages": OPENAI[:2]})
    assert [len(row) for _, row in read.by_row] == [2, 0, 0, 0]


@pytest.mark.parametrize("turn", ["{role}", "{role}{content}{name}", "{content}{content}", "text"])
def test_a_turn_names_its_content_once(turn: str) -> None:
    with pytest.raises(ConfigError, match=r"--turn takes \{content\} once"):
        ChatTask.parse(turn)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": OPENAI}, ["has chats in 'messages'", "give --turn '{role}: {content}\\n'"]),
        ({"prompt": OPENAI[:2], "completion": OPENAI[2:3]}, ["chats in 'prompt' and 'completion'", "--turn"]),
        ({"prompt": "a", "completion": {"text": "b"}}, ["'completion'", "an object in line 1", "make it text first"]),
        ({"prompt": "a", "completion": ["b"]}, ["the column 'completion'", "a list in line 1"]),
        ({"topic": "t", "turns": ["a"]}, ["no column 'prompt', only 'topic'", "'turns' is a list in line 1"]),
    ],
)
def test_without_a_turn_nested_columns_are_named(row: Mapping[str, object], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(TrainingError) as caught:
        read_pairs(tmp_path / "a.jsonl", Task.parse(None, None))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_special_tokens_of_a_turn_are_those_of_the_runtime_s_chat(tmp_path: Path) -> None:
    """The template writes special tokens; an answer ends at the first one that ends a text; messages write none."""
    save_tokenizer(tmp_path, 256)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = Tokenizer.from_json(backend.to_str())
    jinja = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' "
        "}}{% endfor %}{{ '<|im_start|>assistant\n' }}"
    )
    chat = ChatFormat(ChatTemplate({"default": jinja}, {}), tokenizer)
    asked = [("user", "Hi <|im"), ("assistant", "Hello"), ("user", "How are you?")]
    turns = [{"role": role, "content": content} for role, content in (*asked, ("assistant", "Fine"))]
    injected = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "No"}]
    rows = [{"messages": turns}, {"messages": injected}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = ChatTask.parse(r"<|im_start|>{role}\n{content}<|im_end|>\n")
    end = tokenizer.token_id("<|im_end|>")
    found = read_examples(tmp_path / "chats.jsonl", task, tokenizer, eos_token_id=end, context_length=500)
    first, last = found.examples
    messages: list[ChatMessage] = [{"role": role, "content": content} for role, content in asked]
    assert list(first.ids[: first.prompt_length]) == chat.ids(messages[:1])
    assert list(last.ids[: last.prompt_length]) == chat.ids(messages)
    assert list(last.ids[last.prompt_length :]) == [*tokenizer.encode("Fine"), end]
    assert any(note.startswith("left out 1 of 2 chats: a message spells a special token") for note in found.notes)
