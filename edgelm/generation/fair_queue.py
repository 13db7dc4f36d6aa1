"""A queue in which those who ask take turns."""

from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items of one key come first in, first out; the keys that have items take turns, one item each."""

    def __init__(self) -> None:
        self._items: dict[str, deque[Item]] = {}  # the key whose turn it is stands first; none is empty
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, key: str, item: Item) -> None:
        """Add an item behind those of its key. A key that had none comes last in the round."""
        self._items.setdefault(key, deque()).append(item)
        self._size += 1

    def put_first(self, key: str, item: Item) -> None:
        """Give an item back that `take` returned: it comes when it is its key's turn again."""
        self._items.setdefault(key, deque()).appendleft(item)
        self._size += 1

    def take(self) -> Item:
        """Remove and return the item whose turn it is. Raises IndexError if the queue is empty."""
        if not self._items:
            raise IndexError("the queue is empty")
        key = next(iter(self._items))
        items = self._items.pop(key)
        item = items.popleft()
        if items:
            self._items[key] = items  # to the end of the round
        self._size -= 1
        return item

    def discard(self, key: str, item: Item) -> None:
        """Remove an item, if it is there."""
        items = self._items.get(key)
        if items is None or item not in items:
            return
        items.remove(item)
        if not items:
            del self._items[key]
        self._size -= 1
