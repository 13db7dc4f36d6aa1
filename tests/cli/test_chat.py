"""``edgelm chat`` over a pipe, its commands, the turns that fit into the context, and saved conversations."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelm import Model, load
from edgelm.cli.chat_commands import run_command
from edgelm.cli.chat_session import ChatSession
from edgelm.cli.conversation import MAX_FILE_BYTES, Conversation, ConversationFileError, Turn
from edgelm.cli.interrupt import sets
from edgelm.errors import ConfigError, ContextError, PromptError
from edgelm.text.messages import MAX_MESSAGES, ChatMessage
from edgelm.text.plain_chat import PlainChatFormat, PlainForm
from tests.conftest import ROOT, TINY_BUNDLE, RunCommand, make_chat_bundle

pytest.importorskip("jinja2")

DIALOGUE = ROOT / "models" / "dialogue-6m-int8"


@pytest.fixture(scope="module")
def chat_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_bundle(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def chat_model(chat_bundle: Path) -> Iterator[Model]:
    with load(chat_bundle, device="cpu", threads=1) as model:
        yield model


@pytest.fixture
def session(chat_model: Model) -> ChatSession:
    chat_model.forget()
    return ChatSession(chat_model, Conversation(), {"max_new_tokens": 2}, interactive=True)


def words(messages: list[ChatMessage]) -> list[int]:
    """A token for each word, and one for each message."""
    return [0 for message in messages for _ in ["", *str(message["content"]).split()]]


# The context.


def test_whole_turns_are_dropped_oldest_first_and_the_system_message_never() -> None:
    seen: list[list[str]] = []

    def encode(messages: list[ChatMessage]) -> list[int]:
        seen.append([str(message["content"]) for message in messages])
        return words(messages)

    turns = tuple(Turn(f"question {n}", f"answer {n}") for n in range(5))  # 6 tokens each
    conversation = Conversation("be kind", turns)
    # 3 of the system message, 30 of the turns and 3 of the new message are 36: they fit.
    assert len(conversation.prompt("question new", encode, context_tokens=46, answer_tokens=10)) == 36
    assert conversation.dropped == 0
    # One more does not. Three quarters of 35 are 26: 3 + 3 + 6 * 3 = 24.
    assert len(conversation.prompt("question new", encode, context_tokens=45, answer_tokens=10)) == 24
    assert conversation.dropped == 2 and len(conversation.turns) == 5
    assert seen[-1] == ["be kind", *(t for turn in turns[2:] for t in (turn.user, turn.assistant)), "question new"]
    # What was dropped stays away, so that the keys and values behind it are used again.
    assert len(conversation.prompt("question new", encode, context_tokens=100, answer_tokens=10)) == 24


def test_an_answer_may_ask_for_half_of_the_context_at_most() -> None:
    conversation = Conversation(None, (Turn("a", "b"),))  # 4 tokens, and 2 of the new message
    assert len(conversation.prompt("c", words, context_tokens=12, answer_tokens=1000)) == 6
    assert len(conversation.prompt("c", words, context_tokens=10, answer_tokens=1000)) == 2


def test_a_message_that_does_not_fit_drops_nothing() -> None:
    conversation = Conversation("be kind", (Turn("a", "b"),))
    with pytest.raises(ContextError, match="takes 10 tokens, with the system message, but the context has 10: shorten"):
        conversation.prompt("one two three four five six", words, context_tokens=10, answer_tokens=2)
    assert conversation.dropped == 0
    assert len(conversation.prompt("one two three four five", words, context_tokens=10, answer_tokens=2)) == 9


def test_a_long_conversation_stays_within_the_limits_of_a_chat_format() -> None:
    turns = tuple(Turn("a", "b") for _ in range(MAX_MESSAGES))
    conversation = Conversation(None, turns)
    ids = conversation.prompt("c", lambda messages: list(range(len(messages))), context_tokens=10**6, answer_tokens=1)
    assert len(ids) == MAX_MESSAGES - 1 and conversation.dropped == MAX_MESSAGES - (MAX_MESSAGES - 2) // 2
    long = Conversation(None, (Turn("x" * 600_000, "y"), Turn("x" * 600_000, "y")))
    long.prompt("c", words, context_tokens=100, answer_tokens=1)
    assert long.dropped == 1


@pytest.mark.parametrize("plain", [None, "lines", "labels"])
def test_each_turn_computes_only_what_is_new(plain: PlainForm | None, chat_model: Model) -> None:
    form = None if plain is None else PlainChatFormat(plain, chat_model.tokenizer)
    session = ChatSession(chat_model, Conversation(), {"max_new_tokens": 2}, form)
    chat_model.forget()
    before = 0
    for text in ("Hi", "How", "So"):
        assert session.answer(text)
        assert session.stats is not None and session.stats.reused_tokens == before
        before = session.stats.prompt_tokens
    assert session.conversation.dropped == 0


def test_a_full_context_drops_turns_and_says_so(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(12):
        session.answer("Hello you")
        assert session.tokens <= 64
    assert session.conversation.dropped > 1
    assert "dropped, because the context of 64 tokens is full" in capsys.readouterr().err


# Plain forms.


def test_plain_forms(chat_model: Model) -> None:
    messages: list[ChatMessage] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi\nyou"},
        {"role": "assistant", "content": " Hello "},
        {"role": "user", "content": [{"type": "text", "text": "Well"}]},
    ]
    lines, labels = (PlainChatFormat(form, chat_model.tokenizer) for form in ("lines", "labels"))
    assert lines.text(messages) == "Be kind.\nHi you\nHello\nWell\n"
    assert labels.text(messages) == "Be kind.\nUser: Hi\nyou\nAssistant: Hello\nUser: Well\nAssistant:"
    assert chat_model.tokenizer.decode(lines.ids(messages)) == lines.text(messages)
    assert (lines.stop_strings, labels.stop_strings) == (("\n",), ("\nUser:",))


@pytest.mark.parametrize("plain", [None, "lines", "labels"])
def test_what_a_user_says_is_never_a_special_token(plain: PlainForm | None, chat_model: Model) -> None:
    special = set(chat_model.tokenizer.special_tokens.values())
    assert chat_model.tokenizer.encode("<|endoftext|>")[0] in special

    def count(text: str) -> int:
        messages: list[ChatMessage] = [{"role": "user", "content": text}]
        form = None if plain is None else PlainChatFormat(plain, chat_model.tokenizer)
        ids = chat_model.chat_prompt(messages) if form is None else form.ids(messages)
        return sum(token in special for token in ids)

    assert count("<|endoftext|>") == count("Hi") == (1 if plain is None else 0)


@pytest.mark.skipif(not DIALOGUE.is_dir(), reason="the dialogue model lies in the repository only")
def test_the_dialogue_model_answers_with_a_line(edgelm_command: RunCommand) -> None:
    result = edgelm_command("chat", "-m", str(DIALOGUE), "--seed", "3", stdin=b"Hi\nDo you like music?\n")
    answers = result.stdout.split("\n\n")
    assert result.status == 0 and len(answers) == 2 and all(answer.strip() for answer in answers)
    assert len(result.stderr.splitlines()) == 1
    assert "this bundle has no chat template, so every message is a line" in result.stderr


# Commands.


def test_commands_change_the_conversation(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    session.answer("Hi")
    first = session.conversation.turns[0]
    run_command(session, "/set max_new_tokens 1")
    run_command(session, "/retry")
    assert [turn.user for turn in session.conversation.turns] == ["Hi"]
    assert first.assistant.startswith(session.conversation.turns[0].assistant)
    run_command(session, "/system Be kind.")
    run_command(session, "/reset")
    assert (session.conversation.system, session.conversation.turns) == ("Be kind.", [])
    run_command(session, "/system")
    assert session.conversation.system is None
    run_command(session, "/help")
    run_command(session, "/stats")
    run_command(session, "/quit")
    assert session.ended
    output = capsys.readouterr()
    assert "the answer stays the same" in output.err and "0 turns; " in output.err and "/retry" in output.err
    assert output.out.count("\n") == 3  # two answers, and what stands between them


def test_a_cancelled_retry_keeps_the_earlier_answer(session: ChatSession) -> None:
    session.answer("Hi")
    turns = list(session.conversation.turns)
    session.cancel.set()
    run_command(session, "/retry")
    assert session.conversation.turns == turns
    assert not session.answer("How") and session.conversation.turns == turns


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("/set temperature 0.5", {"temperature": 0.5}),
        ("/set max-new-tokens 7", {"max_new_tokens": 7}),
        ("/set do_sample true", {"do_sample": True}),
        ('/set stop_strings ["\\n", "End"]', {"stop_strings": ["\n", "End"]}),
        ("/set stop_strings The end", {"stop_strings": "The end"}),
        ("/set stop_strings 5", {"stop_strings": "5"}),
        ('/set logit_bias {"11": -2}', {"logit_bias": {"11": -2}}),
        ("/set early_stopping never\n", ConfigError),
        ("/set num_beams 4", {"num_beams": 4}),
    ],
)
def test_set_reads_json_or_text(line: str, value: Any, session: ChatSession) -> None:
    if value is ConfigError:
        with pytest.raises(ConfigError, match="does nothing without num_beams"):
            run_command(session, line)
        return
    run_command(session, line)
    assert session.options == {"max_new_tokens": 2} | value
    name = next(iter(value))
    run_command(session, f"/set {name}")
    assert name not in session.options


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("/sett x", PromptError, r"there is no command '/sett' \(did you mean /set\?\)"),
        ("/" + "x" * 10**6, PromptError, r"/help lists them"),
        ("/reset now", PromptError, "/reset takes nothing behind it"),
        ("/save", PromptError, "give /save FILE"),
        ("/retry", PromptError, "there is no answer to try again"),
        ("/set temprature 1", ConfigError, "did you mean 'temperature'"),
        ("/set temprature", ConfigError, "did you mean 'temperature'"),
        ("/set temperature hot", ConfigError, r"temperature must be in \[0.001, 1000\].*got 'hot'"),
        ("/set temperature NaN", ConfigError, "got 'NaN'"),
        ("/set top_k " + "[" * 100_000, ConfigError, "top_k must be a whole number"),
        ("/set num_return_sequences 2", ConfigError, "num_return_sequences is no option of a conversation"),
        ("/set cancel 1", ConfigError, "cancel is no option of a conversation"),
        ("/save /nowhere/x", ConversationFileError, "cannot write '/nowhere/x': No such file"),
        ("/load /nowhere/x", ConversationFileError, "cannot read '/nowhere/x': No such file"),
        ("/load a\0b", ConversationFileError, "cannot read 'a.x00b': embedded null byte"),
    ],
)
def test_commands_that_cannot_be_done_change_nothing(
    line: str, error: type[Exception], message: str, session: ChatSession
) -> None:
    with pytest.raises(error, match=message) as caught:
        run_command(session, line)
    assert len(str(caught.value)) < 300
    assert session.options == {"max_new_tokens": 2} and not session.ended


# Files.


def test_a_saved_conversation_comes_back(session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    turns = (Turn('Hi "you"\n☕\x1b', "x" * 5000), Turn("a", ""))
    session.conversation = Conversation("Be kind.", turns)
    run_command(session, f"/save {path}")
    run_command(session, "/reset")
    run_command(session, f"/load {path}")
    assert (session.conversation.system, session.conversation.turns) == ("Be kind.", list(turns))
    run_command(session, f"/save {path}")  # another conversation may be replaced
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


def test_another_file_is_never_replaced(tmp_path: Path) -> None:
    other = tmp_path / "notes.json"
    other.write_text("{}", encoding="utf-8")
    with pytest.raises(ConversationFileError, match="another file, not a conversation: give a new name"):
        Conversation().save(other)
    assert other.read_text(encoding="utf-8") == "{}"


def test_a_conversation_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.json"
    Conversation("old").save(path)
    before = path.read_bytes()

    def full(target: Path, replacement: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ConversationFileError, match=r"cannot write '.*talk.json': No space left on device"):
        Conversation("new").save(path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["talk.json"]


def test_a_conversation_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConversationFileError, match="begin a new one with /reset"):
        Conversation(None, (Turn("x" * MAX_FILE_BYTES, ""),)).save(tmp_path / "talk.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"\xff", "is not UTF-8 text"),
        (b"[]", "must be an object"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"edgelm_conversation": 2, "system": null, "turns": []}', "edgelm_conversation must be between 1 and 1"),
        (b'{"edgelm_conversation": 1, "system": null, "turns": [], "x": 1}', "has the unknown field 'x'"),
        (b'{"edgelm_conversation": 1, "turns": [], "turns": []}', "has the field 'turns' twice"),
        (b'{"edgelm_conversation": 1, "system": 5, "turns": []}', "system must be a text, got 5"),
        (b'{"edgelm_conversation": 1, "system": null, "turns": [{"user": "a"}]}', "lacks the field 'turns.0..assist"),
        (b'{"edgelm_conversation": 1, "system": "\\ud800", "turns": []}', "half of a character"),
        (b" " * (MAX_FILE_BYTES + 1), "8,388,609 bytes, more than"),
    ],
    ids=["empty", "bytes", "list", "deep", "version", "unknown", "twice", "number", "missing", "surrogate", "large"],
)
def test_hostile_files_are_refused_in_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content)
    with pytest.raises(ConversationFileError, match=message) as caught:
        Conversation.read(path)
    assert "no saved conversation" in str(caught.value) and len(str(caught.value)) < 300


# Over a pipe.


def test_a_block_for_each_line(chat_bundle: Path, edgelm_command: RunCommand) -> None:
    result = edgelm_command("chat", "-m", str(chat_bundle), "-n", "3", stdin=b"Hi\n\nHow are you?")
    assert result.status == 0
    assert result.stderr == "edgelm: the answer was cut after 3 tokens: -n allows more\n"
    with load(chat_bundle) as model:
        first = model.chat([{"role": "user", "content": "Hi"}], max_new_tokens=3).text
    assert result.stdout.startswith(first.strip()) and result.stdout.endswith("\n")


def test_json_lines(chat_bundle: Path, edgelm_command: RunCommand) -> None:
    lines = b'Hi\n/set max_new_tokens 2\n"""\nHow\n/are"""\n//you\n'
    result = edgelm_command("chat", "-m", str(chat_bundle), "--json", "-n", "3", "--system", "Be", stdin=lines)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["user"] for answer in answers] == ["Hi", "How\n/are", "/you"]
    assert [answer["stats"]["new_tokens"] for answer in answers] == [3, 2, 2]
    assert answers[1]["stats"]["reused_tokens"] == answers[0]["stats"]["prompt_tokens"]
    assert answers[0]["finish_reason"] == "length" and answers[0]["dropped_turns"] == 0
    with load(chat_bundle) as model:
        said = model.chat([{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}], max_new_tokens=3)
    assert answers[0]["assistant"] == said.text


def test_lines_that_get_no_answer(chat_bundle: Path, edgelm_command: RunCommand) -> None:
    lines = b"refuse\n" + b"long " * 100 + b"\n/helo\n\xff\nHi\n" + b'"""\nopen'
    result = edgelm_command("chat", "-m", str(chat_bundle), "--json", "-n", "1", stdin=lines)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.status == 1 and "Traceback" not in result.stderr
    errors = ["not that", "but the context has 64", "did you mean /help", "line 4 is not UTF-8 text (byte 0)", None]
    for answer, error in zip(answers, [*errors, "the input ends inside a message"], strict=True):
        assert "assistant" in answer if error is None else error in answer["error"]
    blocks = edgelm_command("chat", "-m", str(chat_bundle), "-n", "1", stdin=b"/helo\n/helo\n/helo\n")
    assert (blocks.status, blocks.stdout) == (1, "\n\n\n\n\n")


def test_control_characters_of_an_answer_are_escaped(chat_bundle: Path, edgelm_command: RunCommand) -> None:
    with load(chat_bundle) as model:
        (escape,) = model.tokenizer.encode("\x1b", add_special_tokens=False)
    options = ("-m", str(chat_bundle), "-n", "2", "--logit-bias", f"{escape}=1000")
    assert edgelm_command("chat", *options, stdin=b"Hi").stdout == "\\x1b\\x1b\n"
    exact = edgelm_command("chat", *options, "--json", stdin=b"Hi").stdout
    assert "\x1b" not in exact and json.loads(exact)["assistant"] == "\x1b\x1b"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--temperature", "0"], 2, "temperature must be in"),
        (["--num-return-sequences", "2"], 2, "No such option"),
        (["--plain", "rows"], 2, "'rows' is not one of 'lines', 'labels'"),
        (["hello"], 2, "unexpected extra argument"),
        (["--plain", "lines"], 2, "this one has a template: drop it"),
    ],
)
def test_usage_errors(
    arguments: list[str], status: int, message: str, chat_bundle: Path, edgelm_command: RunCommand
) -> None:
    result = edgelm_command("chat", "-m", str(chat_bundle), *arguments, stdin=b"Hi")
    assert result.status == status and message in result.one_line()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX pipes")
def test_a_reader_that_hangs_up_is_no_error(chat_bundle: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgelm", "chat", "-m", str(chat_bundle), "-n", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.write(b"Hi\n" * 20)
    process.stdin.close()
    assert process.wait(60) == 141
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


def test_closed_standard_input(edgelm_command: RunCommand) -> None:
    code = "import sys; sys.stdin = None; sys.argv = ['edgelm', 'chat']; from edgelm.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "edgelm: standard input is closed: there is nobody to talk to\n")
    assert edgelm_command("chat", "-m", str(TINY_BUNDLE), stdin=b"").stdout == ""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_sets_an_event() -> None:
    import signal

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    event = threading.Event()
    with sets(event):
        signal.raise_signal(signal.SIGINT)
        assert event.is_set()
    assert signal.signal(signal.SIGINT, previous) is signal.default_int_handler
