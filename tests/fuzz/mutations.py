"""Seeded changes to a file: of its bytes, of its JSON, of its protobuf fields.

A mutator takes a random number generator, the file, and other files to splice from; it returns the changed file. The
same generator makes the same changes.
"""

import json
import random
import re
from collections.abc import Callable, Sequence

Mutator = Callable[[random.Random, bytes, Sequence[bytes]], bytes]

NUMBERS = [
    *(0, 1, -1, 2, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**53 + 1),
    *(2**62, 2**63 - 1, 2**63, -(2**63), 2**64 - 1, 2**64, 10**19, 10**100, 10**400),
]
"""Numbers at which readers break."""

STRINGS = [
    *(
        "",
        " ",
        "a",
        "..",
        "../x",
        "/etc/passwd",
        "\0",
        "\n",
        "\x1b[31mred",
        "\ud800",
        "\u202e",
        "ü",
        "🙂",
        "{layer}",
        "%s",
    ),
    *("a" * 130, "a" * 5000, "NaN", "1e400", "input_ids", "logits", "model.onnx.data", ".hidden", "CON", "null"),
]
"""Texts at which readers break."""

_BYTES = bytes([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5C, 0x7B, 0x7D, 0x5B, 0x5D, 0x0A, 0x08, 0x10, 0x12, 0x1A, 0x2A, 0x3A])


# Bytes


def flip_bits(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Flip up to eight bits."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Set up to four bytes to values that mean something in JSON or protobuf."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4) if data else 0):
        changed[rng.randrange(len(changed))] = rng.choice(_BYTES)
    return bytes(changed)


def truncate(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Keep the beginning."""
    return data[: rng.randrange(len(data) + 1)]


def delete(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Take out a piece."""
    start, stop = _piece(rng, data)
    return data[:start] + data[stop:]


def repeat(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Repeat a piece up to 100 times."""
    start, stop = _piece(rng, data)
    return data[:stop] + data[start:stop] * rng.choice([1, 2, 100]) + data[stop:]


def insert(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Put random bytes in."""
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice([1, 2, 10, 300])) + data[place:]


def splice(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Go on with the rest of another file."""
    other = rng.choice(others) if others else data
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def change_digits(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Write another number in place of one that is written in digits."""
    found = list(re.finditer(rb"-?\d+", data))
    if not found:
        return flip_bits(rng, data, others)
    match = rng.choice(found)
    return data[: match.start()] + str(rng.choice(NUMBERS)).encode() + data[match.end() :]


BYTE_MUTATORS: tuple[Mutator, ...] = (flip_bits, set_bytes, truncate, delete, repeat, insert, splice, change_digits)


def _piece(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice([1, 4, 16, 256]))


# JSON


def change_json(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change a value, a key or the nesting somewhere in a JSON file; bytes where the file is no JSON."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return rng.choice(BYTE_MUTATORS)(rng, data, others)
    text = json.dumps(_changed_value(rng, content), ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.05:  # a dict cannot hold a key twice
        text = re.sub(r'("[^"]{1,40}": )', r"\g<1>0, \g<1>", text, count=rng.randint(1, 40))
    return text.encode("utf-8", "surrogatepass")


def _changed_value(rng: random.Random, value: object) -> object:
    """`value` with one change in it, or in something that it contains."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        choice = rng.random()
        if choice < 0.06:
            return {name: item for name, item in value.items() if name != key}
        if choice < 0.12:
            return {rng.choice([*STRINGS, *value]) if name == key else name: item for name, item in value.items()}
        if choice < 0.18:
            return value | {rng.choice(STRINGS): rng.choice(list(value.values()))}
        return value | {key: _changed_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        choice = rng.random()
        if choice < 0.08:
            return value[:at] + value[at + 1 :]
        if choice < 0.16:
            return value[:at] + value[at:] * rng.choice([2, 3, 50])
        return [*value[:at], _changed_value(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, str) and rng.random() < 0.3:
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(STRINGS) + value[at:]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice([1, -1, 8, -8]) if rng.random() < 0.5 else -value
    return _other_value(rng, value)


def _other_value(rng: random.Random, value: object) -> object:
    """Something in place of `value`."""
    choice = rng.randrange(10)
    if choice < 4:
        return rng.choice(NUMBERS)
    if choice < 6:
        return rng.choice(STRINGS)
    if choice == 6:
        return rng.choice([None, True, False, [], {}, 0.5, -0.0, 1e308, float("nan"), float("inf")])
    if choice == 7:
        nested = value
        for _ in range(rng.choice([1, 2, 50, 400])):
            nested = [nested] if rng.random() < 0.5 else {"a": nested}
        return nested
    return [value] * rng.choice([0, 1, 2, 1000])


# Protobuf


def change_protobuf(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change a field somewhere in a protobuf message. The lengths around it still fit, mostly."""
    fields = split_message(data)
    if not fields:
        return rng.choice(BYTE_MUTATORS)(rng, data, others)
    at = rng.randrange(len(fields))
    number, wire, payload = fields[at]
    choice = rng.random()
    if choice < 0.1:  # something of the same kind from beside it
        alike = [other for n, w, other in fields if (n, w) == (number, wire)]
        return _joined([*fields[:at], (number, wire, rng.choice(alike)), *fields[at + 1 :]])
    if wire in (1, 5) and choice < 0.75:
        return _joined([*fields[:at], (number, wire, rng.randbytes(len(payload))), *fields[at + 1 :]])
    if wire == 2 and choice < 0.75:
        if not payload or split_message(payload) is None or rng.random() < 0.1:
            payload = _changed_text(rng, payload, others)
        else:
            payload = change_protobuf(rng, payload, others)
        return _joined([*fields[:at], (number, wire, payload), *fields[at + 1 :]])
    if choice < 0.81:
        return _joined(fields[:at] + fields[at + 1 :])
    if choice < 0.87:
        return _joined(fields[: at + 1] + [fields[at]] * rng.choice([1, 2, 200]) + fields[at + 1 :])
    if choice < 0.93:
        to = rng.randrange(len(fields))
        moved = fields[:at] + fields[at + 1 :]
        return _joined([*moved[:to], fields[at], *moved[to:]])
    if choice < 0.96:
        return _joined([*fields[:at], (rng.choice([*range(1, 28), 2**29]), wire, payload), *fields[at + 1 :]])
    if choice < 0.97:  # a length that does not fit
        before, after = _joined(fields[:at]), _joined(fields[at + 1 :])
        return before + varint(number << 3 | 2) + varint(rng.choice(NUMBERS) % 2**70) + payload + after
    value = rng.choice(NUMBERS) % 2**64
    return _joined([*fields[:at], (number, 0, varint(value)), *fields[at + 1 :]])


def split_message(data: bytes) -> list[tuple[int, int, bytes]] | None:
    """The fields of a message as number, wire type and payload; None if `data` cannot be a message."""
    fields, at = [], 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        wire, start = tag & 7, at
        if tag < 8 or wire not in (0, 1, 2, 5):
            return None
        if wire == 0:
            _, at = _read_varint(data, at)
        elif wire == 2:
            length, start = _read_varint(data, at)
            at = start + length
        else:
            at += 8 if wire == 1 else 4
        if at > len(data):
            return None
        fields.append((tag >> 3, wire, data[start:at]))
    return fields


def varint(value: int) -> bytes:
    """`value` as protobuf writes it."""
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def message(*fields: tuple[int, int | bytes | str]) -> bytes:
    """A protobuf message: each field's number, and a number, a text or a nested message."""
    return b"".join(
        varint(number << 3) + varint(value % 2**64)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(raw := value.encode() if isinstance(value, str) else value)) + raw
        for number, value in fields
    )


def _changed_text(rng: random.Random, payload: bytes, others: Sequence[bytes]) -> bytes:
    choice = rng.random()
    if choice < 0.4:
        return rng.choice(STRINGS).encode("utf-8", "surrogatepass")
    if choice < 0.5:
        return str(rng.choice(NUMBERS)).encode()
    return rng.choice(BYTE_MUTATORS)(rng, payload, others)


def _joined(fields: Sequence[tuple[int, int, bytes]]) -> bytes:
    parts = []
    for number, wire, payload in fields:
        parts.append(varint(number << 3 | wire))
        if wire == 2:
            parts.append(varint(len(payload)))
        parts.append(payload)
    return b"".join(parts)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while at < len(data) and shift < 70:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at
    return 0, len(data) + 1
