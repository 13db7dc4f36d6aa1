"""Chats in files of records: turns with a role and a content, as OpenAI, TRL and ShareGPT write them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgelm.errors import TrainingError
from edgelm_train.data.records import Records, check_whole_characters, is_chat, turn_keys
from edgelm_train.data.templates import ChatTask

ASSISTANTS = ("assistant", "gpt", "chatgpt", "model", "bot")
"""Roles whose turns are learned."""
_PAIR = ("prompt", "completion")
"""Columns of TRL's chats in two parts. Only the second part is learned."""


@dataclass(frozen=True)
class Turn:
    """What one side says; `learned` where the model has to learn to say it."""

    role: str
    content: str
    learned: bool


def chat_columns(records: Records) -> tuple[str, ...]:
    """The columns that hold turns: one column, "prompt" and "completion", or none.

    Raises:
        TrainingError: several columns hold turns, so nobody knows which are meant.
    """
    found = tuple(column for column in records.nested if any(is_chat(row.get(column)) for row in records.values))
    if set(found) == set(_PAIR):
        return _PAIR
    if len(found) > 1:
        place = records.places[0]
        raise TrainingError(
            f"several columns hold the turns of a chat ({', '.join(map(repr, found))}, in {place}): keep one, "
            "because edgelm learns one answer and not a preference"
        )
    return found


def read_chats(records: Records) -> list[tuple[str, tuple[Turn, ...]]]:
    """The chat of each row with its place; a row without turns has an empty chat.

    A text in the column "system" becomes a first turn of that role.

    Raises:
        TrainingError: there are no chats, a turn has no role or no text, or no turn is an assistant's.
    """
    columns = chat_columns(records)
    if not columns:
        shown = ", ".join(map(repr, [*records.columns, *records.nested][:20]))
        raise TrainingError(
            f"{records.places[0]} has no chat: --turn needs a column with a list of turns, like "
            f'"messages": [{{"role": "user", "content": "Hi"}}, ...]; the columns are {shown}'
        )
    chats = []
    for where, row in zip(records.places, records.values, strict=True):
        system = row.get("system")
        turns = [Turn("system", system, False)] if isinstance(system, str) and system.strip() else []
        for column in columns:
            may_learn = columns != _PAIR or column == "completion"
            turns += _turns(row.get(column), column, where, may_learn=may_learn)
        chats.append((where, tuple(turns)))
    if not any(turn.learned for _, chat in chats for turn in chat):
        roles = sorted({turn.role for _, chat in chats for turn in chat})
        raise TrainingError(
            f"no turn in {records.places[0].partition(' of ')[2]} is an assistant's: its roles are "
            f"{', '.join(map(repr, roles[:8])) or 'none'}, and only turns of {', '.join(ASSISTANTS)} are learned; "
            "rename the role of the answers"
        )
    return chats


def prompts_and_completions(chat: Sequence[Turn], task: ChatTask) -> Iterator[tuple[str, str]]:
    """A pair for each learned turn: all before its content, and its content with what the template has after it."""
    before = ""
    for turn in chat:
        said, opening = task.said(turn.role, turn.content), task.opening(turn.role)
        if turn.learned and turn.content.strip():
            yield before + opening, said.removeprefix(opening)
        before += said


def roles_of(chats: Sequence[tuple[str, Sequence[Turn]]]) -> tuple[str, str]:
    """Who asks and who answers in the first chat with an answer, in the words of the data."""
    for _, chat in chats:
        for place, turn in enumerate(chat):
            if turn.learned:
                others = [other.role for other in chat[:place] if other.role not in (turn.role, "system")]
                return (others[-1] if others else "user"), turn.role
    return "user", "assistant"


def _turns(value: object, column: str, where: str, *, may_learn: bool) -> Iterator[Turn]:
    if value is None:
        return
    if not isinstance(value, list):
        raise TrainingError(f"{column!r} in {where} is not a list of turns, as in other rows; correct this row")
    for number, item in enumerate(value, 1):
        place = f"turn {number} of {column!r} in {where}"
        if not isinstance(item, dict) or (keys := turn_keys(item)) is None:
            raise TrainingError(f'{place} must have "role" and "content", or "from" and "value"; correct this row')
        role, content = item[keys[0]], _content(item.get(keys[1]))
        if not isinstance(role, str) or not role.strip():
            raise TrainingError(f"{place} has no role: {keys[0]!r} is {role!r:.40}; name who speaks")
        if content is None:
            calls = " (it calls a tool)" if item.get("tool_calls") or item.get("function_call") else ""
            raise TrainingError(f"{place} has no text in {keys[1]!r}{calls}, and edgelm learns text only; leave it out")
        check_whole_characters(content, place)
        yield Turn(role, content, may_learn and role.lower() in ASSISTANTS and item.get("weight") != 0)


def _content(value: object) -> str | None:
    """The text of a content: a text, or a list of parts that are texts; None where it is something else."""
    if isinstance(value, list) and value:
        parts = [part.get("text") if isinstance(part, dict) else None for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if len(texts) == len(parts) else None
    return value if isinstance(value, str) else None
