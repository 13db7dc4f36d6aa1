"""What a user of ``edgelm chat`` types behind a slash."""

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelm.bundle.strict_json import StrictJsonError, parse_json
from edgelm.cli.chat_session import OWN_OPTIONS, ChatSession
from edgelm.cli.conversation import Conversation
from edgelm.cli.shared import stats_line
from edgelm.cli.streams import note
from edgelm.decoding.generation_config import OPTIONS
from edgelm.errors import PromptError, shown


@dataclass(frozen=True, slots=True)
class _Command:
    """A command: what follows its name, what it does in one line, and the function that gets what follows."""

    argument: str
    meaning: str
    run: Callable[[ChatSession, str], None]


def run_command(session: ChatSession, line: str) -> None:
    """Do what `line` says, which begins with a slash. What there is to say goes to standard error.

    Raises PromptError if there is no such command or its argument is missing, ConfigError for an option,
    ConversationFileError for a file; and as `ChatSession.answer`.
    """
    word, _, argument = line.partition(" ")
    command = _COMMANDS.get(word)
    if command is None:
        similar = difflib.get_close_matches(word[:40], _COMMANDS, 1)
        hint = f"did you mean {similar[0]}?" if similar else "/help lists them"
        raise PromptError(
            f"there is no command {shown(word)} ({hint}); a message that begins with / is written with //"
        )
    argument = argument.strip()
    if not command.argument and argument:
        raise PromptError(f"{word} takes nothing behind it: give {word} alone")
    if command.argument and not command.argument.startswith("[") and not argument:
        raise PromptError(f"give {word} {command.argument}")
    command.run(session, argument)


def completed_words() -> Mapping[str, Collection[str]]:
    """The commands, each with the words that may follow it."""
    names = [name for name, option in OPTIONS.items() if option.rule.kind != "python" and name not in OWN_OPTIONS]
    return {name: names if name == "/set" else () for name in _COMMANDS}


def _reset(session: ChatSession, argument: str) -> None:
    session.conversation = Conversation(session.conversation.system)
    note("a new conversation" + (" with the same system message" if session.conversation.system else ""))


def _system(session: ChatSession, argument: str) -> None:
    session.conversation.system = argument or None
    note("the system message is set" if argument else "there is no system message")


def _retry(session: ChatSession, argument: str) -> None:
    turn = session.conversation.take_back()
    if turn is None:
        raise PromptError("there is no answer to try again")
    if session.repeats:
        note("edgelm: the answer stays the same: /set do_sample true, or change the seed")
    kept = False
    try:
        kept = session.answer(turn.user)
    finally:
        if not kept:
            session.conversation.add(turn)


def _save(session: ChatSession, argument: str) -> None:
    path = Path(argument).expanduser()
    session.conversation.save(path)
    note(f"saved {_turns(len(session.conversation.turns))} in {str(path)!r}")


def _load(session: ChatSession, argument: str) -> None:
    session.conversation = Conversation.read(Path(argument).expanduser())
    turns = session.conversation.turns
    note(f"loaded {_turns(len(turns))}" + (f"; the last message was: {turns[-1].user[:200]}" if turns else ""))


def _set(session: ChatSession, argument: str) -> None:
    given, _, text = argument.partition(" ")
    name = given.replace("-", "_")
    if not given:
        for key, value in session.options.items():
            note(f"{key} {json.dumps(value, ensure_ascii=False)}")
        if not session.options:
            note("every option has the bundle's value")
    elif not text.strip():
        if name not in OPTIONS:
            session.set(name, None)  # raises, because there is no such option
        session.unset(name)
        note(f"{name} has the bundle's value")
    else:
        value = _value(name, text.strip())
        session.set(name, value)
        note(f"{name} is {json.dumps(value, ensure_ascii=False)}")


def _value(name: str, text: str) -> object:
    """What `text` means: JSON, or the text itself, which an option of texts prefers to a number."""
    try:
        value = parse_json(text.encode("utf-8", "surrogatepass"))
    except StrictJsonError:
        return text
    takes_texts = name in OPTIONS and OPTIONS[name].rule.kind == "texts"
    return text if takes_texts and not isinstance(value, (str, list)) else value


def _stats(session: ChatSession, argument: str) -> None:
    if session.stats is not None:
        note(stats_line(session.stats, session.model))
    conversation = session.conversation
    dropped = f", of which {conversation.dropped} dropped" if conversation.dropped else ""
    note(f"{_turns(len(conversation.turns))}{dropped}; {session.tokens:,} of {session.context_tokens:,} tokens")


def _help(session: ChatSession, argument: str) -> None:
    rows = [(f"{name} {command.argument}".rstrip(), command.meaning) for name, command in _COMMANDS.items()]
    rows += [
        ('"""', "begins and ends a message of several lines; Alt-Enter begins a line too"),
        ("//", "begins a message that begins with a slash"),
        ("Ctrl-C", "stops an answer; twice at an empty line it ends the program"),
        ("Ctrl-D", "ends the program"),
    ]
    for name, meaning in rows:
        note(f"{name:<23}{meaning}")


def _quit(session: ChatSession, argument: str) -> None:
    session.ended = True


def _turns(count: int) -> str:
    return "1 turn" if count == 1 else f"{count:,} turns"


_COMMANDS = {
    "/retry": _Command("", "answer the last message again", _retry),
    "/reset": _Command("", "begin a new conversation", _reset),
    "/system": _Command("[TEXT]", "change the system message, or remove it", _system),
    "/set": _Command("[OPTION [VALUE]]", "change an option, reset it, or show what is set", _set),
    "/save": _Command("FILE", "write the conversation to a file", _save),
    "/load": _Command("FILE", "go on with the conversation in a file", _load),
    "/stats": _Command("", "times, memory, and how full the context is", _stats),
    "/help": _Command("", "show this", _help),
    "/quit": _Command("", "end the program", _quit),
}
