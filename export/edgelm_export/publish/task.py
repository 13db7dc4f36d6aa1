"""The task of a bundle that is being made: read by the runtime's own reader before anything is exported."""

from collections.abc import Mapping
from pathlib import Path

from edgelm.bundle.chat_template import ChatTemplate
from edgelm.bundle.task import ChatTask, Task, TaskFile, read_task_file
from edgelm.decoding.generation_config import config_from_file
from edgelm.errors import ConfigError, ExportError, PromptError
from edgelm.generation.task_format import TaskFormat
from edgelm.text.chat import ChatFormat
from edgelm.text.tokenizer import Tokenizer


def plan_task(file: Path) -> TaskFile:
    """Read a task's file; raises ExportError if it cannot be read."""
    try:
        return read_task_file(file)
    except ConfigError as error:
        raise ExportError(str(error)) from None


def check_task(task: Task, tokenizer: Tokenizer, template: ChatTemplate | None, settings: Mapping[str, object]) -> None:
    """Raise ExportError unless a bundle with these parts can do `task`; `settings` are its generation settings."""
    try:
        chat = None if template is None or not isinstance(task, ChatTask) else ChatFormat(template, tokenizer)
        TaskFormat(task, tokenizer, chat, config_from_file(settings))
    except (ConfigError, PromptError) as error:
        raise ExportError(f"cannot use the task: {error}") from None
