"""Graphs that crash, hang or deceive ONNX Runtime, each made of a good graph by one addition.

The protobuf is written by hand, because the tests of the runtime have no onnx package.
"""

from collections.abc import Callable

from tests.fuzz.mutations import message, split_message, varint

INT64_MIN, INT64, FLOAT = -(2**63), 7, 1

Fields = list[tuple[int, int, bytes]]
"""A message as numbers, wire types and payloads of its fields."""


def changed_graph(data: bytes, change: Callable[[Fields], Fields]) -> bytes:
    """An ONNX file whose graph has other fields."""
    return joined([(n, w, joined(change(split(p))) if n == 7 else p) for n, w, p in split(data)])


def with_fields(data: bytes, *fields: tuple[int, bytes]) -> bytes:
    """An ONNX file with more fields in its graph: nodes are field 1, stored tensors field 5."""
    return changed_graph(data, lambda old: old + [(number, 2, payload) for number, payload in fields])


def split(data: bytes) -> Fields:
    """The fields of a message."""
    fields = split_message(data)
    assert fields is not None
    return fields


def joined(fields: Fields) -> bytes:
    """The message of `fields`."""
    return b"".join(
        varint(number << 3 | wire) + (varint(len(payload)) if wire == 2 else b"") + payload
        for number, wire, payload in fields
    )


def node(operator: str, inputs: str, outputs: str, *attributes: bytes, domain: str = "") -> bytes:
    """A node; names are separated by blanks."""
    return message(
        *((1, name) for name in inputs.split()),
        *((2, name) for name in outputs.split()),
        (3, outputs.partition(" ")[0]),
        (4, operator),
        *((5, attribute) for attribute in attributes),
        (7, domain),
    )


def tensor(name: str, dims: list[int], dtype: int, raw: bytes) -> bytes:
    """A tensor inside the graph file."""
    return message(*((1, size) for size in dims), (2, dtype), (8, name), (9, raw))


def external(name: str, dims: list[int], **entries: object) -> bytes:
    """A float32 tensor in another file."""
    pairs = [(13, message((1, key), (2, str(value)))) for key, value in entries.items()]
    return message(*((1, size) for size in dims), (2, FLOAT), (8, name), *pairs, (14, 1))


def whole_number(value: int) -> bytes:
    """The eight bytes of an int64."""
    return value.to_bytes(8, "little", signed=True)


def dangling_division(good: bytes) -> bytes:
    """Constant folding divides INT64_MIN by -1, which ends the process."""
    return with_fields(
        good,
        (5, tensor("a", [1], INT64, whole_number(INT64_MIN))),
        (5, tensor("b", [1], INT64, whole_number(-1))),
        (1, node("Div", "a b", "c")),
    )


def unique_of_nothing(good: bytes) -> bytes:
    """Constant folding takes the unique rows of an empty axis, which ends the process."""
    axis = message((1, "axis"), (3, 0), (20, 2))
    return with_fields(good, (5, tensor("a", [0, 2], FLOAT, b"")), (1, node("Unique", "a", "b", axis)))


def many_nodes(good: bytes, count: int = 100_000) -> bytes:
    """A chain of nodes that nobody needs."""
    chain = [(1, node("Identity", f"n{i}" if i else "logits", f"n{i + 1}")) for i in range(count)]
    return with_fields(good, *chain)


def doubling_functions(good: bytes, depth: int = 30) -> bytes:
    """Each function calls the next one twice, so that inlining makes 2^depth nodes."""
    opsets = [(9, message((1, domain), (2, version))) for domain, version in (("", 21), ("edgelm", 1))]
    functions = []
    for level in range(depth):
        below = f"F{level + 1}" if level + 1 < depth else "Identity"
        domain = "edgelm" if level + 1 < depth else ""
        body = [node(below, "x", "t", domain=domain), node(below, "t", "y", domain=domain)]
        functions.append(
            message((1, f"F{level}"), (4, "x"), (5, "y"), *((7, part) for part in body), *opsets, (10, "edgelm"))
        )
    whole = with_fields(good, (1, node("F0", "logits", "twice", domain="edgelm")))
    return whole + message((8, message((1, "edgelm"), (2, 1))), *((25, function) for function in functions))


def endless_loop(good: bytes) -> bytes:
    """A Loop without a limit, whose condition stays true."""
    boolean = message((1, message((1, 9), (2, b""))))
    port = [message((1, name), (2, boolean)) for name in ("i", "cond", "on")]
    body = message((1, node("Identity", "cond", "on")), (2, "body"), (11, port[0]), (11, port[1]), (12, port[2]))
    attribute = message((1, "body"), (6, body), (20, 5))
    loop = message((2, "never"), (3, "never"), (4, "Loop"), (5, attribute))
    return with_fields(good, (1, loop))


def deep_nesting(good: bytes, depth: int = 1000) -> bytes:
    """Branches in branches."""
    inner = b""
    for _ in range(depth):
        inner = message((1, message((4, "If"), (5, message((1, "then_branch"), (6, inner), (20, 5))))))
    return with_fields(good, *[(number, payload) for number, _, payload in split(inner)])


def in_another_file(good: bytes, file: str = ".hidden") -> bytes:
    """Weights in a file that no manifest lists."""

    def moved(fields: Fields) -> Fields:
        old, new = b"model.onnx.data", file.encode()
        entry, other = message((1, "location"), (2, old)), message((1, "location"), (2, new))
        return [
            (n, w, joined([(k, v, other if p2 == entry else p2) for k, v, p2 in split(p)]) if n == 5 else p)
            for n, w, p in fields
        ]

    return changed_graph(good, moved)


def beyond_the_file(good: bytes) -> bytes:
    """A tensor that ends behind the end of the weights file."""
    return with_fields(good, (5, external("far", [4], location="model.onnx.data", offset=2**40, length=16)))


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "dangling-division": dangling_division,
    "unique-of-nothing": unique_of_nothing,
    "many-nodes": many_nodes,
    "doubling-functions": doubling_functions,
    "endless-loop": endless_loop,
    "deep-nesting": deep_nesting,
    "in-another-file": in_another_file,
    "beyond-the-file": beyond_the_file,
}
"""By name, each with the good graph that it changes."""
