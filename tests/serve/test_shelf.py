"""Models by name: loaded when asked for, unloaded when idle or when another one needs the memory."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from edgelm import BundleError, ConfigError, PrefixError, load
from edgelm.bundle.folder import Bundle
from edgelm.serve.errors import ApiError
from edgelm.serve.settings import ServeSettings
from edgelm.serve.shelf import Place, ServedModel, Shelf, place_of, read_place, read_place_behind_prefix
from tests.conftest import TINY_BUNDLE, replace_file
from tests.serve.conftest import loaded, tiny_shelf

PLACE = place_of(Bundle.read(TINY_BUNDLE), "one")
NEEDED = PLACE.memory_bytes(ServeSettings())


Load = Callable[[Place, ServedModel | None], ServedModel]


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shelf_of(settings: ServeSettings, load: Load | None = None, clock: Clock | None = None) -> Shelf:
    places = [PLACE, place_of(PLACE.bundle, "two"), place_of(PLACE.bundle, "three")]
    return Shelf(places, settings, load or (lambda place, base: loaded(place, base, settings)), clock or Clock())


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def loaded_names(shelf: Shelf) -> list[str]:
    return [state.name for state in shelf.states() if state.loaded]


def test_a_model_loads_once_for_all_who_wait() -> None:
    loads: list[str] = []
    settings = ServeSettings()

    def load(place: Place, base: ServedModel | None) -> ServedModel:
        loads.append(place.name)
        return loaded(place, base, settings)

    async def test() -> None:
        shelf = shelf_of(settings, load)
        assert not shelf.ready
        lent: list[ServedModel] = []

        async def ask(name: str | None) -> None:
            async with shelf.lend(name) as served:
                lent.append(served)

        impatient = asyncio.create_task(ask("one"))
        await asyncio.sleep(0)
        impatient.cancel()  # a client that leaves does not stop the load
        await asyncio.gather(*(ask(name) for name in ("one", None, "one", "two")))
        assert loads == ["one", "two"]
        assert len({id(served) for served in lent}) == 2
        assert shelf.ready
        assert loaded_names(shelf) == ["one", "two"]
        await shelf.close()
        assert loaded_names(shelf) == []
        with pytest.raises(ApiError, match="stopping"):
            await ask("one")

    run(test())


def test_idle_models_make_room_in_the_order_of_their_last_use() -> None:
    settings = ServeSettings(memory_bytes=2 * NEEDED)

    async def test() -> None:
        clock = Clock()
        shelf = shelf_of(settings, clock=clock)
        for name in ("one", "two", "one", "three"):
            clock.now += 1
            async with shelf.lend(name):
                pass
        assert loaded_names(shelf) == ["one", "three"]
        async with shelf.lend("one"), shelf.lend("three"):
            with pytest.raises(ApiError, match="no memory for 'two'") as refused:
                async with shelf.lend("two"):
                    pass
            assert refused.value.status == 503
            assert refused.value.retry_seconds
        async with shelf.lend("two"):
            assert "two" in loaded_names(shelf)
        await shelf.close()

    run(test())


def test_a_model_that_nobody_used_is_unloaded() -> None:
    settings = ServeSettings(idle_unload_seconds=10)

    async def test() -> None:
        clock = Clock()
        shelf = shelf_of(settings, clock=clock)
        async with shelf.lend("one") as first:
            async with shelf.lend("two"):
                pass
            clock.now = 11
            await shelf.unload_unused()
            assert loaded_names(shelf) == ["one"]
        await shelf.unload_unused()
        assert loaded_names(shelf) == ["one"]
        clock.now = 21
        await shelf.unload_unused()
        assert loaded_names(shelf) == []
        assert shelf.ready
        assert first.model.closed
        async with shelf.lend("one") as again:
            assert again is not first
        await shelf.close()

    run(test())


def test_a_load_that_failed_is_tried_again() -> None:
    settings = ServeSettings()
    failures = [BundleError("the folder '/secret/place' was replaced")]

    def load(place: Place, base: ServedModel | None) -> ServedModel:
        if failures:
            raise failures.pop()
        return loaded(place, base, settings)

    async def test() -> None:
        shelf = shelf_of(settings, load)
        with pytest.raises(ApiError, match="did not load") as refused:
            async with shelf.lend("one"):
                pass
        assert refused.value.status == 503
        assert "secret" not in refused.value.message
        assert "replaced" in shelf.first_failure
        assert not shelf.ready
        async with shelf.lend("one"):
            assert shelf.first_failure == ""
        await shelf.close()

    run(test())


def test_tasks_share_the_weights(tmp_path: Path) -> None:
    with load(TINY_BUNDLE, device="cpu", threads=1) as model:
        model.save_prefix(tmp_path / "task.prefix", "Hello there, ")
    settings = ServeSettings(idle_unload_seconds=5)
    task = read_place_behind_prefix(f"task={tmp_path / 'task.prefix'}", [PLACE])
    assert (task.name, task.base) == ("task", "one")
    assert task.memory_bytes(settings) < PLACE.memory_bytes(settings)
    with pytest.raises(ConfigError, match="give NAME=FILE"):
        read_place_behind_prefix("task", [PLACE])
    with pytest.raises(PrefixError):
        read_place_behind_prefix(f"task={tmp_path / 'missing'}", [PLACE])

    async def test() -> None:
        clock = Clock()
        shelf = Shelf(
            [PLACE, task],
            ServeSettings(idle_unload_seconds=5),
            lambda place, base: loaded(place, base, settings),
            clock,
        )
        async with shelf.lend("task") as served:
            assert loaded_names(shelf) == ["one", "task"]
            text = (await served.scheduler.submit("my friend", max_new_tokens=8).acompletion()).text
            async with shelf.lend("one") as base:
                assert base.model.graph is served.model.graph
                whole = await base.scheduler.submit("Hello there, my friend", max_new_tokens=8).acompletion()
                assert whole.text == text
        clock.now = 6
        await shelf.unload_unused()
        assert loaded_names(shelf) == ["one"]  # the task has used it until now
        async with shelf.lend("one") as base:
            assert not base.model.closed
            assert (await base.scheduler.submit("Hello", max_new_tokens=2).acompletion()).text
        clock.now = 12
        await shelf.unload_unused()
        assert loaded_names(shelf) == []
        async with shelf.lend("task"):
            pass
        await shelf.close()
        assert loaded_names(shelf) == []

    run(test())


@pytest.mark.parametrize(
    "defaults",
    [
        {"num_beams": 4, "num_return_sequences": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 4},
        {"context_overflow": "window", "pinned_tokens": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
)
def test_defaults_that_work_on_one_text_are_changed(tiny_copy: Path, defaults: dict[str, object]) -> None:
    content = json.dumps({**defaults, "max_new_tokens": 5}).encode()
    replace_file(tiny_copy, "generation_config.json", content)
    served = loaded(place_of(Bundle.read(tiny_copy)), None, ServeSettings())
    with served.scheduler:
        completion = served.scheduler.submit("Hello").completion()
    assert len(completion.choices) == 1
    assert completion.stats.new_tokens == 5
    served.close()


def test_an_unknown_name() -> None:
    async def test() -> None:
        with pytest.raises(ApiError) as refused:
            async with tiny_shelf(ServeSettings()).lend("a" * 200):
                pass
        assert (refused.value.status, refused.value.message) == (404, "no such model")

    run(test())


def test_places(tmp_path: Path) -> None:
    assert read_place(str(TINY_BUNDLE)).name == "tiny-gpt2"
    assert read_place(f"a/b:c={TINY_BUNDLE}").name == "a/b:c"
    odd = tmp_path / "x=y"
    odd.symlink_to(TINY_BUNDLE)
    assert read_place(str(odd)).name == "tiny-gpt2"
    for text in (f"={TINY_BUNDLE}", f"with space={TINY_BUNDLE}", f"{'a' * 101}={TINY_BUNDLE}", f"ü={TINY_BUNDLE}"):
        with pytest.raises(ConfigError, match="cannot be a model's name"):
            read_place(text)
    with pytest.raises(BundleError):
        read_place(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="two models are called 'one'"):
        Shelf([PLACE, PLACE], ServeSettings(), lambda place, base: loaded(place, base, ServeSettings()))
    with pytest.raises(ConfigError, match="memory budget"):
        shelf_of(ServeSettings(memory_bytes=NEEDED - 1))
