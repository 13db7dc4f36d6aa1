"""``edgelm chat``: a conversation at a terminal or over a pipe; answers on stdout, everything else on stderr."""

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import click

from edgelm.bundle.chat_template import read_chat_template
from edgelm.bundle.task import ChatTask
from edgelm.cli.chat_commands import completed_words, run_command
from edgelm.cli.chat_session import OWN_OPTIONS, ChatSession
from edgelm.cli.conversation import Conversation, ConversationFileError
from edgelm.cli.generation_flags import GroupedCommand, generation_options_without, given_options
from edgelm.cli.interrupt import sets
from edgelm.cli.line_reader import LineCleared, LineReader, Message, line_reader, read_message
from edgelm.cli.shared import OpenModel, draft_option, json_option, model_options
from edgelm.cli.streams import note
from edgelm.cli.task_flags import task_option
from edgelm.errors import ConfigError, PromptError, TokenizerError

if TYPE_CHECKING:
    from edgelm.model import Model
    from edgelm.text.plain_chat import PlainChatFormat, PlainForm

_PLAIN = {
    "lines": "every message is a line, and the answer is the next line",
    "labels": 'messages stand behind "User:" and "Assistant:"',
}
PLAIN_HELP = (
    f"How to write messages for a bundle without a chat template: lines ({_PLAIN['lines']}) or labels "
    f"({_PLAIN['labels']}).  [default: lines]"
)


@click.command(name="chat", cls=GroupedCommand)
@model_options
@task_option
@draft_option
@generation_options_without(*OWN_OPTIONS)
@click.option("--system", metavar="TEXT", help="The system message: what the model should know or do throughout.")
@click.option("--plain", type=click.Choice(list(_PLAIN)), help=PLAIN_HELP)
@json_option("Print one JSON object for each answer, on one line.")
@click.option("--stats", is_flag=True, help="Print times and memory on stderr after each answer.")
def command(
    open_model: OpenModel,
    task: str | None,
    draft: str | None,
    system: str | None,
    plain: str | None,
    as_json: bool,
    stats: bool,
    **options: object,  # the values of `generation_options_without`
) -> None:
    """Talk with a model. Every line is a message, and gets an answer; /help lists the commands.

    \b
    edgelm chat -m path/to/chat-bundle
    edgelm chat -m path/to/chat-bundle --system "Answer in one sentence." --do-sample
    printf 'Hi\\nHow are you?\\n' | edgelm chat -m models/dialogue-6m-int8
    """
    lines = line_reader(completed_words)
    interactive = sys.stdin.isatty()
    model = open_model(task=task, draft=draft)
    own = None if model.task_format is None else model.task_format.task
    if isinstance(own, ChatTask) and model.task_format is not None:
        model.generation_config = model.task_format.config(model.generation_config)  # this command's own model
        system, plain = own.system if system is None else system, own.plain if plain is None else plain
    elif task is not None:
        raise ConfigError(f"the task {task!r} is no chat: use it with edgelm run")
    session = ChatSession(
        model,
        Conversation(system),
        given_options(options),
        _plain_format(model, cast("PlainForm | None", plain)),
        as_json=as_json,
        show_stats=stats,
        interactive=interactive,
    )
    if interactive:
        source, recipe = model.bundle.manifest.source.name, model.bundle.manifest.recipe.name
        note(f"{source}, {recipe}, context {session.context_tokens:,}: /help lists the commands, Ctrl-D ends")
    if not _talk(session, lines, interactive=interactive):
        click.get_current_context().exit(1)


def _plain_format(model: "Model", form: "PlainForm | None") -> "PlainChatFormat | None":
    """How to write messages where the bundle does not say it; None where its template does."""
    from edgelm.text.plain_chat import PlainChatFormat

    if read_chat_template(model.bundle) is not None:
        if form is not None:
            raise ConfigError("--plain is for bundles without a chat template, and this one has a template: drop it")
        with suppress(PromptError):  # the template wants more; a damaged one, or one without jinja2, ends the program
            model.chat_prompt([{"role": "user", "content": "Hello"}])
        return None
    if form is None:
        form = "lines"
        note(f"edgelm: this bundle has no chat template, so {_PLAIN[form]} (or --plain labels: {_PLAIN['labels']})")
    return PlainChatFormat(form, model.tokenizer)


def _talk(session: ChatSession, lines: LineReader, *, interactive: bool) -> bool:
    """Answer messages until the input or the user ends; returns whether all of them were answered.

    Raises KeyboardInterrupt at the second Ctrl-C in a row at an empty line, or at the first without a terminal.
    """
    all_answered, about_to_end = True, False
    while not session.ended:
        message: Message | None = None
        try:
            message = read_message(lines)
            if message is None:
                break
            about_to_end = False
            session.cancel.clear()
            if interactive:
                with sets(session.cancel):
                    _handle(session, message)
            else:
                _handle(session, message)
        except LineCleared:
            about_to_end = False
        except KeyboardInterrupt:
            if about_to_end or not interactive:
                raise
            about_to_end = True
            note("Ctrl-C again, or Ctrl-D, ends")
        except (PromptError, ConfigError, TokenizerError, ConversationFileError) as error:
            all_answered = False
            session.refuse("" if message is None else message.text, error)
    return all_answered or interactive


def _handle(session: ChatSession, message: Message) -> None:
    """Answer a message, or do what a command says."""
    text = message.text
    if text.startswith("/") and not message.fenced:
        if not text.startswith("//"):
            run_command(session, text.strip())
            return
        text = text.removeprefix("/")
    if text.strip():
        session.answer(text)
