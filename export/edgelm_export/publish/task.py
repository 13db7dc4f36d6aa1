"""The task of a bundle that is being made: read by the runtime's own reader before anything is exported."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelm.bundle.chat_template import ChatTemplate
from edgelm.bundle.manifest import TASK_FILE
from edgelm.bundle.small_files import read_small_file
from edgelm.bundle.task import MAX_TASK_BYTES, ChatTask, Task, parse_task, read_task_file
from edgelm.decoding.generation_config import config_from_file
from edgelm.errors import ConfigError, ExportError, PromptError
from edgelm.generation.task_format import TaskFormat
from edgelm.text.chat import ChatFormat
from edgelm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TaskPlan:
    """A task for a bundle, read before the bundle is made."""

    task: Task
    content: bytes
    """The file's own bytes, which the bundle gets unchanged."""

    def write(self, draft: Path) -> None:
        """Add the task's file to the folder `draft`."""
        (draft / TASK_FILE).write_bytes(self.content)


def plan_task(file: Path) -> TaskPlan:
    """Read a task's file; raises ExportError if it cannot be read."""
    try:
        read_task_file(file)  # its messages name the file
        content = read_small_file(file, MAX_TASK_BYTES)
        return TaskPlan(parse_task(content), content)
    except ConfigError as error:
        raise ExportError(str(error)) from None


def check_task(task: Task, tokenizer: Tokenizer, template: ChatTemplate | None, settings: Mapping[str, object]) -> None:
    """Raise ExportError unless a bundle with these parts can do `task`; `settings` are its generation settings."""
    try:
        chat = None if template is None or not isinstance(task, ChatTask) else ChatFormat(template, tokenizer)
        TaskFormat(task, tokenizer, chat, config_from_file(settings))
    except (ConfigError, PromptError) as error:
        raise ExportError(f"cannot use the task: {error}") from None
