"""Keys take turns; within a key first come, first served."""

import pytest

from edgelm.generation.fair_queue import FairQueue


def taken(queue: FairQueue[str]) -> str:
    return "".join(queue.take() for _ in range(len(queue)))


def filled(**items: str) -> FairQueue[str]:
    queue = FairQueue[str]()
    for key, letters in items.items():
        for letter in letters:
            queue.put(key, letter)
    return queue


def test_keys_take_turns() -> None:
    assert taken(filled(a="abcd", b="xy", c="1")) == "ax1bycd"


def test_a_key_that_comes_back_comes_last() -> None:
    queue = filled(a="ab", b="xy")
    assert queue.take() == "a"
    queue.put("c", "1")
    assert queue.take() + queue.take() == "xb"
    queue.put("a", "c")
    assert taken(queue) == "1yc"


def test_what_is_given_back_comes_when_it_is_its_keys_turn_again() -> None:
    queue = filled(a="ab", b="xy")
    queue.put_first("a", queue.take())
    assert taken(queue) == "xayb"
    queue = filled(a="a", b="xy")
    queue.put_first("a", queue.take())
    assert (len(queue), taken(queue)) == (3, "xay")


def test_what_is_discarded_is_gone() -> None:
    queue = filled(a="ab", b="x")
    for key, item in (("a", "a"), ("a", "z"), ("b", "x"), ("b", "x"), ("c", "1")):
        queue.discard(key, item)
    assert (len(queue), taken(queue)) == (1, "b")
    with pytest.raises(IndexError, match="the queue is empty"):
        queue.take()
