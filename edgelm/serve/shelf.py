"""The models of a server, by name: loaded when first asked for, unloaded when idle or when another needs the memory."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from edgelm.bundle.folder import Bundle
from edgelm.bundle.task import Task, read_task, read_task_file
from edgelm.engine.memory import ModelMemory
from edgelm.errors import ConfigError, EdgelmError, InsufficientMemoryError, PrefixError, QueueFullError
from edgelm.reuse.prefix import Prefix, read_prefix
from edgelm.serve.errors import ApiError, unavailable
from edgelm.serve.metrics import ModelState
from edgelm.serve.settings import ServeSettings

if TYPE_CHECKING:
    from edgelm.generation.text_scheduler import TextScheduler
    from edgelm.model import Model

log = logging.getLogger(__name__)

Result = TypeVar("Result")

LOADING_SECONDS = 2.0
"""When a client shall ask again for a model that is loading."""
_IDLE_CHECK_SECONDS = 1.0
_MAX_COMPUTING = 64
"""Scores and vectors that wait for a model, whose computations run one after another."""


@dataclass(frozen=True, slots=True)
class Place:
    """A model that the shelf has room for."""

    name: str
    bundle: Bundle
    """Read and checked; nothing of it is loaded."""
    base: str | None = None
    """The name of the model whose weights this one uses, behind a prefix of its own; None for one with own weights."""
    prefix: Prefix | None = None
    """The prefix, where there is a `base`."""
    task: Task | None = None
    """What the model is for."""
    task_file: str | None = None
    """The file of the task, where it is neither the bundle's own nor the prefix's."""

    def memory_bytes(self, settings: ServeSettings) -> int:
        """Forecast of the loaded model: all texts that it decodes side by side, one more, and the prefix cache."""
        memory, draft = ModelMemory.of(self.bundle), self.bundle.draft if settings.drafts else None
        if draft is not None:
            memory = memory.with_another(ModelMemory.of(draft))
        texts = settings.max_rows * memory.cache_bytes + settings.prefix_cache_bytes
        if self.prefix is not None:
            return memory.cache_bytes + self.prefix.size_bytes + texts
        return memory.forecast_bytes + texts


class ServedModel:
    """A loaded model with its scheduler, one thread for scores and vectors, and one that reads constraints."""

    def __init__(self, name: str, model: "Model", scheduler: "TextScheduler") -> None:
        self.name, self.model, self.scheduler = name, model, scheduler
        self._worker = ThreadPoolExecutor(1, f"edgelm-{name[:16]}")
        self.constraint_thread = ThreadPoolExecutor(1, f"edgelm-constraints-{name[:16]}")
        self._computing = 0

    async def compute(self, function: Callable[[], Result]) -> Result:
        """``function()``, computed in the model's thread after the earlier ones. Raises QueueFullError."""
        if self._computing >= _MAX_COMPUTING:
            raise QueueFullError(f"{_MAX_COMPUTING} computations wait for {self.name!r}: try again")
        self._computing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, function)
        finally:
            self._computing -= 1

    def close(self, drain_seconds: float = 0.0) -> None:
        """Let running texts go on for so long, end the threads, and free the memory."""
        self.scheduler.close(drain_seconds=drain_seconds)
        self._worker.shutdown(wait=True, cancel_futures=True)
        self.constraint_thread.shutdown(wait=False, cancel_futures=True)
        self.model.close()


@dataclass
class _Slot:
    """A place, and what stands in it. Only the event loop changes it."""

    place: Place
    memory_bytes: int
    served: ServedModel | None = None
    loading: "asyncio.Task[ServedModel] | None" = None
    users: int = 0
    used: float = 0.0
    """When the last user left."""
    failure: str = field(default="", repr=False)
    """Why the last try to load it failed."""


class Shelf:
    """Lends models by name. Everything but loading and closing runs on the event loop."""

    def __init__(
        self,
        places: Sequence[Place],
        settings: ServeSettings,
        load: Callable[[Place, ServedModel | None], ServedModel],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a shelf of `places`, the first of which is the default.

        `load` loads a place's model, in a thread; it also gets the loaded base, where the place has one. Raises
        ConfigError if there is no place, two have one name, or a model alone needs more than the settings allow.
        """
        if not places:
            raise ConfigError("a server needs a model: give -m BUNDLE")
        self._settings, self._load, self._clock = settings, load, clock
        self._slots: dict[str, _Slot] = {}
        for place in places:
            if place.name in self._slots:
                raise ConfigError(f"two models are called {place.name!r}: name one of them, as in -m NAME=BUNDLE")
            needed = place.memory_bytes(settings)
            alone = needed + (0 if place.base is None else self._slots[place.base].memory_bytes)
            if settings.memory_bytes is not None and alone > settings.memory_bytes:
                raise ConfigError(
                    f"{place.name!r} needs about {alone / 1e6:,.0f} MB, but the memory budget is "
                    f"{settings.memory_bytes / 1e6:,.0f} MB: raise it, or decode fewer texts side by side"
                )
            self._slots[place.name] = _Slot(place, needed)
        self._turn = asyncio.Lock()  # one model loads at a time, because loading decides which others have to go
        self._closing = False
        self._loaded_one = False

    @property
    def places(self) -> list[Place]:
        """All places, the default first."""
        return [slot.place for slot in self._slots.values()]

    @property
    def default_name(self) -> str:
        """The name of the first place."""
        return next(iter(self._slots))

    @property
    def closing(self) -> bool:
        """Whether the server is stopping."""
        return self._closing

    @property
    def ready(self) -> bool:
        """Whether a model can be lent: one was loaded at least once."""
        return not self._closing and self._loaded_one

    @property
    def first_failure(self) -> str:
        """Why the default model did not load when the server started; empty if it did, or is loading."""
        return "" if self._loaded_one else self._slots[self.default_name].failure

    def states(self) -> Iterator[ModelState]:
        """The state of each place, for the metrics."""
        for name, slot in self._slots.items():
            load = None if slot.served is None else slot.served.scheduler.load()
            yield ModelState(
                name,
                slot.served is not None,
                slot.users,
                0 if load is None else load.waiting,
                0 if load is None else load.decoding,
                0 if slot.served is None else slot.memory_bytes,
            )

    @asynccontextmanager
    async def lend(self, name: str | None = None) -> AsyncIterator[ServedModel]:
        """The model `name`, or the default, which stays loaded inside this context. Raises ApiError."""
        slot = self._slots.get(self.default_name if name is None else name)
        if slot is None:
            raise ApiError(
                404,
                f"there is no model {name!r} here: /v1/models lists them"
                if len(name or "") <= 100
                else "no such model",
                param="model",
                code="model_not_found",
            )
        if self._closing:
            raise unavailable("the server is stopping", "stopping")
        slot.users += 1
        try:
            yield slot.served or await self._loaded(slot)
        finally:
            slot.users -= 1
            slot.used = self._clock()

    async def _loaded(self, slot: _Slot) -> ServedModel:
        """The model of `slot`, once it is loaded; several requests wait for one load, which no leaving client stops."""
        if slot.loading is None or slot.loading.done():
            slot.loading = asyncio.create_task(self._load_in_turn(slot))
            slot.loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # it is told to users
        return await asyncio.shield(slot.loading)

    async def _load_in_turn(self, slot: _Slot) -> ServedModel:
        async with self._turn:
            if slot.place.base is None:
                return await self._load_now(slot, None)
            base = self._slots[slot.place.base]
            base.users += 1  # as long as the model on its weights is loaded
            try:
                return await self._load_now(slot, base.served or await self._load_now(base, None))
            except BaseException:
                base.users -= 1
                raise

    async def _load_now(self, slot: _Slot, base: ServedModel | None) -> ServedModel:
        await self._make_room(slot)
        started = self._clock()
        try:
            served = await asyncio.to_thread(self._load, slot.place, base)
        except EdgelmError as error:
            slot.failure = str(error)
            log.error("the model %r did not load: %s", slot.place.name, error)
            seconds = 10.0 if isinstance(error, InsufficientMemoryError) else 60.0
            words = f"the model {slot.place.name!r} did not load; the server's log says why"
            raise unavailable(words, "model_not_loaded", seconds) from None
        if self._closing:
            await asyncio.to_thread(served.close)
            raise unavailable("the server is stopping", "stopping")
        slot.served, slot.failure, slot.used, self._loaded_one = served, "", self._clock(), True
        log.info("loaded %r in %.2f s", slot.place.name, self._clock() - started)
        return served

    async def _make_room(self, slot: _Slot) -> None:
        """Unload idle models, the one unused for longest first, until `slot`'s model fits; raises ApiError."""
        budget = self._settings.memory_bytes
        while budget is not None:
            loaded = [other for other in self._slots.values() if other.served is not None]
            if sum(other.memory_bytes for other in loaded) + slot.memory_bytes <= budget:
                return
            idle = [other for other in loaded if not other.users]
            if not idle:
                raise unavailable(
                    f"there is no memory for {slot.place.name!r} while other models are in use", "out_of_memory", 5.0
                )
            await self._unload(min(idle, key=lambda other: other.used))

    async def _unload(self, slot: _Slot) -> None:
        served, slot.served = slot.served, None
        if served is not None:
            await asyncio.to_thread(served.close)
            log.info("unloaded %r", slot.place.name)
            if slot.place.base is not None:
                base = self._slots[slot.place.base]
                base.users, base.used = base.users - 1, self._clock()

    async def unload_idle(self) -> None:
        """Unload, again and again, what nobody used for `idle_unload_seconds`; never returns."""
        while True:
            await asyncio.sleep(_IDLE_CHECK_SECONDS)
            async with self._turn:
                await self.unload_unused()

    async def unload_unused(self) -> None:
        """Unload what nobody used for `idle_unload_seconds`."""
        limit = self._settings.idle_unload_seconds
        for slot in self._slots.values():
            if limit is not None and slot.served and not slot.users and self._clock() - slot.used >= limit:
                await self._unload(slot)

    def stop_lending(self) -> None:
        """Refuse further requests; those that have a model keep it."""
        self._closing = True

    async def end_texts(self) -> None:
        """End all texts within a token; their answers say how far they came."""
        served = [slot.served for slot in self._slots.values() if slot.served is not None]
        await asyncio.gather(*(asyncio.to_thread(one.scheduler.close) for one in served))

    async def close(self) -> None:
        """Free all models; running texts end within a token."""
        self._closing = True
        for slot in reversed(self._slots.values()):  # what uses the weights of another one stands after it
            await self._unload(slot)


def read_place(text: str) -> Place:
    """The place that ``NAME=BUNDLE`` or ``BUNDLE`` describes; the bundle's name is the default name.

    Raises:
        BundleError: the folder holds no usable bundle.
        ConfigError: the name is empty, too long, or has characters that a URL would escape.
    """
    name, separator, folder = text.partition("=")
    if not separator or Path(text).exists():
        return place_of(Bundle.read(text))
    return place_of(Bundle.read(folder), name)


def with_task(place: Place, file: str) -> Place:
    """`place` with the task in `file` in place of its own; raises ConfigError if it cannot be read."""
    if "=" in file and not Path(file).exists():
        raise ConfigError(f"--task takes a task file, got {file!r}: a prefix is given as --prefix NAME=FILE")
    return replace(place, task=read_task_file(file).task, task_file=file)


def read_place_behind_prefix(text: str, places: Sequence[Place]) -> Place:
    """The place that ``NAME=FILE`` describes: a prefix file before the first of `places` that it was made for.

    Its task is the prefix's own, or else that of the place with its weights.

    Raises:
        PrefixError: the file is no prefix, was made for none of the models, or has a task that cannot be read.
        ConfigError: there is no name, or it has characters that a URL would escape.
    """
    name, _, path = text.partition("=")
    if not path:
        raise ConfigError(f"{text!r} has no name or no prefix file: give NAME=FILE")
    bases = [place for place in places if place.base is None]
    for base in bases:
        try:
            prefix = read_prefix(path, base.bundle)
        except PrefixError:
            if base is bases[-1]:
                raise
            continue
        task = base.task if prefix.task is None else prefix.task
        return replace(place_of(base.bundle, name), base=base.name, prefix=prefix, task=task)
    raise ConfigError("a prefix needs a model: give -m BUNDLE")


def place_of(bundle: Bundle, name: str | None = None) -> Place:
    """`bundle` under `name`, or under its folder's name; raises ConfigError as `read_place`."""
    name = bundle.name if name is None else name
    if not name or len(name) > 100 or not all(part.isalnum() or part in "-_.:/" for part in name) or not name.isascii():
        raise ConfigError(f"{name!r} cannot be a model's name: use letters, digits and -_.:/, as in -m NAME=BUNDLE")
    return Place(name, bundle, task=read_task(bundle))
