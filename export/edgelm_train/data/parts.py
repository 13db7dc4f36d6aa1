"""Rows of a batch in parts that are computed one after another: of similar lengths, and not too many tokens."""

from collections.abc import Sequence

_PADDING_TOKENS = 64
"""A part has at most this much padding."""


def parts_of_rows(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """The numbers of all rows, in parts that begin with their longest row.

    Args:
        lengths: of the rows, in tokens.
        most_tokens: of a part with its padding; a longer row has a part of its own.
    """
    parts: list[list[int]] = []
    padding = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[parts[-1][0]] if parts else 0
        padding += longest - lengths[row]
        if parts and padding <= _PADDING_TOKENS and (len(parts[-1]) + 1) * longest <= most_tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
            padding = 0
    return parts
