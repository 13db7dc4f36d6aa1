"""``edgelm serve``: models over HTTP."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm import __version__
from edgelm.cli.interrupt import EXIT_INTERRUPTED, ends_at_once
from edgelm.cli.shared import Size, device_options, read_text_file
from edgelm.cli.streams import note
from edgelm.errors import ConfigError, DeviceError, install_hint
from edgelm.serve.settings import ServeSettings, read_keys

if TYPE_CHECKING:
    from edgelm.serve.shelf import Place, ServedModel

_NEEDED = ("starlette", "uvicorn", "h11", "pydantic", "prometheus_client", "jinja2")
_DEFAULTS = ServeSettings()
_SECONDS = click.FloatRange(0, min_open=True)
Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def _texts(flag: str, name: str, metavar: str, meaning: str) -> Decorator:
    return click.option(flag, name, multiple=True, metavar=metavar, help=f"{meaning} Repeatable.")


def _count(flag: str, low: int, high: int | None, default: int, meaning: str) -> Decorator:
    kind = click.IntRange(low, high)
    return click.option(flag, type=kind, default=default, show_default=True, metavar="N", help=meaning)


def _seconds(flag: str, default: float | None, meaning: str) -> Decorator:
    shown = None if default is None else f"{default:g}"
    return click.option(flag, type=_SECONDS, default=shown, show_default=True, metavar="SECONDS", help=meaning)


@click.command(name="serve")
@click.option(
    "-m",
    "--model",
    "models",
    type=click.Path(),  # so that the environment variable is split like PATH
    multiple=True,
    metavar="BUNDLE",
    envvar="EDGELM_MODEL",
    show_envvar=True,
    help="Bundle, or NAME=BUNDLE; by default the embedded model. Repeatable; the first one is the default.",
)
@_texts(
    "--prefix",
    "prefixes",
    "NAME=FILE",
    "Model NAME: a prefix file before one of the models, on the same weights, with the prefix's own task.",
)
@click.option("--task", metavar="FILE", help="Task file (docs/tasks.md) of the first model, in place of its own task.")
@click.option(
    "--host",
    default=_DEFAULTS.host,
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen on. One that other machines reach needs an API key.",
)
@_count("--port", 0, 65535, _DEFAULTS.port, "Port to listen on; 0 takes a free one.")
@click.option(
    "--api-key-file",
    metavar="FILE",
    help="File with an API key on each line. EDGELM_API_KEYS may hold keys too, between commas.",
)
@_texts("--api-key", "keys", "KEY", "An API key; other users of this machine can see it here.")
@_texts("--allowed-host", "hosts", "NAME", "A name by which clients call this server, such as its public one.")
@_texts("--cors-origin", "origins", "URL", "Origin of web pages that may call this server.")
@_count("--max-rows", 1, 1024, _DEFAULTS.max_rows, "Maximum number of texts that a model decodes side by side.")
@_count("--max-waiting", 1, 100_000, _DEFAULTS.max_waiting, "Maximum number of texts that wait for a model.")
@_seconds("--max-seconds", _DEFAULTS.max_seconds, "Maximum time of a text, waiting included.")
@click.option(
    "--prefix-cache",
    type=Size(zero=True),
    default=f"{_DEFAULTS.prefix_cache_bytes // 10**6}M",
    show_default=True,
    help="Memory of each model for earlier prompts, which are not computed again.",
)
@click.option(
    "--drafts/--no-drafts",
    default=_DEFAULTS.drafts,
    show_default=True,
    help="Whether small models in bundles guess tokens; see docs/batches.md.",
)
@click.option(
    "--memory", type=Size(), help="Memory of all models together: idle ones make room for others.  [default: no limit]"
)
@_seconds("--idle-unload", None, "Unload a model that nobody used for this time.  [default: never]")
@_seconds("--drain", _DEFAULTS.drain_seconds, "How long running texts may go on when the server is stopped.")
@device_options
@click.option("--check", is_flag=True, help="Load every model once, and say whether the server would start.")
@click.option("--verbose", is_flag=True, help="Report loads, unloads and bad requests on stderr.")
def command(
    models: tuple[str, ...],
    prefixes: tuple[str, ...],
    task: str | None,
    host: str,
    port: int,
    api_key_file: str | None,
    keys: tuple[str, ...],
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    max_rows: int,
    max_waiting: int,
    max_seconds: float,
    prefix_cache: int,
    drafts: bool,
    memory: int | None,
    idle_unload: float | None,
    drain: float,
    device: str,
    threads: int | None,
    check: bool,
    verbose: bool,
) -> None:
    """Answer HTTP requests like OpenAI's API: completions, chats, embeddings, scores.

    \b
    edgelm serve
    edgelm serve -m small=models/gpt2-int4 -m models/gpt2-int8
    edgelm serve -m models/gpt2-int8 --prefix mood=mood.prefix --prefix topic=topic.prefix
    edgelm serve --host 0.0.0.0 --api-key-file keys.txt
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise DeviceError(f"serve needs {', '.join(missing)}; {install_hint('cpu,serve')}")
    with ends_at_once():
        from edgelm.bundle.folder import Bundle, default_bundle_path
        from edgelm.serve.app import create_app
        from edgelm.serve.loading import load_place
        from edgelm.serve.server import Server, listen
        from edgelm.serve.shelf import Shelf, place_of, read_place, read_place_behind_prefix, with_task

        settings = ServeSettings(
            host=host,
            port=port,
            keys=read_keys(_key_texts(keys, api_key_file)),
            allowed_hosts=hosts,
            cors_origins=origins,
            max_rows=max_rows,
            max_waiting=max_waiting,
            max_seconds=max_seconds,
            prefix_cache_bytes=prefix_cache,
            drafts=drafts,
            memory_bytes=memory,
            idle_unload_seconds=idle_unload,
            drain_seconds=drain,
        )
        places = [read_place(text) for text in models] or [place_of(Bundle.read(default_bundle_path()))]

        if task is not None:
            places[0] = with_task(places[0], task)
        places += [read_place_behind_prefix(text, places) for text in prefixes]

        def load(place: "Place", base: "ServedModel | None") -> "ServedModel":
            return load_place(place, base, settings, device=device, threads=threads)

        shelf = Shelf(places, settings, load)
    _log_to_stderr(verbose)
    with listen(settings) as listener:
        port = listener.getsockname()[1]
        if check:
            for place in places:
                with ends_at_once():
                    _try(place, places, load)
                note(f"{place.name}: loads, and takes about {place.memory_bytes(settings) / 1e6:,.0f} MB")
            note(f"edgelm serve would start on {_url(host, port)}")
            return
        for line in _start_screen(settings, places, _url(host, port)):
            note(line)
        server = Server(create_app(settings, shelf), settings, lambda words: note(f"edgelm: {words}"))
        server.run([listener])
    if server.failure:
        raise DeviceError(server.failure)
    sys.exit(EXIT_INTERRUPTED if server.stopped_by == signal.SIGINT else 0)


def _try(place: "Place", places: "list[Place]", load: "Callable[[Place, ServedModel | None], ServedModel]") -> None:
    """Load the model of `place` and free it again."""
    base = next((load(other, None) for other in places if other.name == place.base), None)
    load(place, base).close()
    if base is not None:
        base.close()


def _key_texts(given: tuple[str, ...], path: str | None) -> list[str]:
    """The texts that hold API keys: of the flags, of the environment, and of the file `path`."""
    texts = [*given, os.environ.get("EDGELM_API_KEYS", "")]
    if path is not None:
        texts.append(read_text_file(Path(path), ConfigError))
        if not texts[-1].strip():
            raise ConfigError(f"there is no API key in {path!r}: write one on each line")
        if os.name == "posix" and Path(path).stat().st_mode & 0o004:
            note(f"edgelm: every user of this machine can read the API keys in {path!r}: run chmod 600")
    return texts


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _start_screen(settings: ServeSettings, places: "list[Place]", url: str) -> list[str]:
    """What the server says when it starts."""
    rows = []
    for number, place in enumerate(places):
        architecture, recipe = place.bundle.manifest.architecture, place.bundle.manifest.recipe
        when = "loads now" if number == 0 else "loads when first asked for"
        megabytes = place.memory_bytes(settings) / 1e6
        on = "" if place.base is None else f" on {place.base}"
        job = "" if place.task is None else f", with a task ({place.task.kind})"
        rows.append(
            (
                "models" if number == 0 else "",
                f"{place.name}{on}: {recipe.name}, context {architecture.context_length:,}, "
                f"about {megabytes:,.0f} MB{job}; {when}",
            )
        )
    keys = f"{len(settings.keys)} API key{'s' if len(settings.keys) > 1 else ''}"
    rows += [
        ("texts", f"{settings.max_rows} at once, {settings.max_waiting} waiting, {settings.max_seconds:g} s each"),
        ("page", f"{url}/ in a browser"),
        ("access", keys if settings.keys else "no key, this machine only"),
        ("try", f"""curl {url}/v1/completions --json '{{"prompt": "Once upon a time"}}'"""
         + (' -H "Authorization: Bearer KEY"' if settings.keys else "")),
        ("stop", "Ctrl-C; twice to stop at once"),
    ]  # fmt: skip
    return [f"edgelm {__version__} serves on {url}", *(f"  {name:<8}{words}" for name, words in rows)]


def _log_to_stderr(verbose: bool) -> None:
    root = logging.getLogger()
    root.addHandler(_Notes())
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:  # every bad request would be a line
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


class _Notes(logging.Handler):
    """Log records as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"edgelm: {record.getMessage()}")
        if record.exc_info is not None:
            for line in "".join(traceback.format_exception(*record.exc_info)).splitlines():
                note(line)
