"""``edgelm serve``: models over HTTP."""

import logging
import os
import signal
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm import __version__
from edgelm.cli.interrupt import EXIT_INTERRUPTED, ends_at_once
from edgelm.cli.shared import Size, device_options, read_text_file
from edgelm.cli.streams import note
from edgelm.errors import ConfigError, DeviceError, install_hint

if TYPE_CHECKING:
    from edgelm.serve.settings import ServeSettings
    from edgelm.serve.shelf import Place, ServedModel

_NEEDED = ("starlette", "uvicorn", "h11", "pydantic", "prometheus_client", "minijinja")
_MODEL = "Bundle folder, or NAME=FOLDER. Repeatable: the first is the default.  [default: the embedded model]"
_SECONDS = click.FloatRange(0, min_open=True)


@click.command(name="serve")
@click.option(
    "-m", "--model", "models", type=click.Path(), multiple=True, metavar="FOLDER", envvar="EDGELM_MODEL", help=_MODEL
)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Any but this needs a key.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="N", help="0: a free one."
)
@click.option("--api-key-file", metavar="FILE", help="File of API keys, one a line. EDGELM_API_KEYS may hold them too.")
@click.option(
    "--api-key", "keys", multiple=True, metavar="KEY", help="Repeatable. Other users of the machine can see it here."
)
@click.option(
    "--allowed-host", "hosts", multiple=True, metavar="NAME", help="A name this server is called. Repeatable."
)
@click.option("--cors-origin", "origins", multiple=True, metavar="URL", help="Web pages that may call it. Repeatable.")
@click.option(
    "--max-rows", type=click.IntRange(1, 1024), default=8, show_default=True, metavar="N", help="Texts at once."
)
@click.option(
    "--max-waiting", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="Texts that wait."
)
@click.option("--max-seconds", type=_SECONDS, default=300, show_default=True, metavar="SECONDS", help="Time of a text.")
@click.option(
    "--prefix-cache", type=Size(), default="64M", show_default=True, help="Memory of a model for earlier prompts."
)
@click.option("--memory", type=Size(), help="Memory for all models: idle ones make room.  [default: no limit]")
@click.option("--idle-unload", type=_SECONDS, metavar="SECONDS", help="Unload models nobody used for so long.")
@click.option(
    "--drain", type=_SECONDS, default=30, show_default=True, metavar="SECONDS", help="Time to finish at the end."
)
@device_options
@click.option("--check", is_flag=True, help="Say whether it would start, and do not.")
@click.option("--verbose", is_flag=True, help="Say more on stderr.")
def command(
    models: tuple[str, ...],
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
    edgelm serve --host 0.0.0.0 --api-key-file keys.txt
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise DeviceError(f"serve needs {', '.join(missing)}; {install_hint('cpu,serve')}")
    with ends_at_once():
        from edgelm.bundle.folder import Bundle, default_bundle_path
        from edgelm.model import load as load_model
        from edgelm.serve.app import create_app
        from edgelm.serve.server import Server, listen
        from edgelm.serve.settings import ServeSettings, read_keys
        from edgelm.serve.shelf import ServedModel, Shelf, place_of, read_place

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
            memory_bytes=memory,
            idle_unload_seconds=idle_unload,
            drain_seconds=drain,
        )
        places = [read_place(text) for text in models] or [place_of(Bundle.read(default_bundle_path()))]

        def load(place: "Place") -> "ServedModel":
            model = load_model(place.bundle.path, device=device, threads=threads)
            model.warmup()
            scheduler = model.scheduler(
                max_rows=max_rows, max_waiting=max_waiting, prefix_cache_bytes=settings.prefix_cache_bytes
            )
            return ServedModel(place.name, model, scheduler)

        shelf = Shelf(places, settings, load)
    _log_to_stderr(verbose)
    with listen(settings) as listener:
        port = listener.getsockname()[1]
        if check:
            for place in places:
                with ends_at_once():
                    load(place).close()
                note(f"{place.name}: loads, and takes about {place.memory_bytes(settings) / 1e6:,.0f} MB")
            note(f"edgelm serve would start on {_url(host, port)}")
            return
        for line in _start_screen(settings, places, _url(host, port)):
            note(line)
        server = Server(create_app(settings, shelf), settings, lambda: note(_stopping(settings)))
        server.run([listener])
    if server.failure:
        raise DeviceError(server.failure)
    sys.exit(EXIT_INTERRUPTED if server.stopped_by == signal.SIGINT else 0)


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


def _start_screen(settings: "ServeSettings", places: "list[Place]", url: str) -> list[str]:
    """What the server says when it starts."""
    rows = []
    for number, place in enumerate(places):
        architecture, recipe = place.bundle.manifest.architecture, place.bundle.manifest.recipe
        when = "loads now" if number == 0 else "loads when first asked for"
        megabytes = place.memory_bytes(settings) / 1e6
        rows.append(
            (
                "models" if number == 0 else "",
                f"{place.name}: {recipe.name}, context {architecture.context_length:,}, "
                f"about {megabytes:,.0f} MB; {when}",
            )
        )
    keys = f"{len(settings.keys)} API key{'s' if len(settings.keys) > 1 else ''}"
    rows += [
        ("texts", f"{settings.max_rows} at once, {settings.max_waiting} waiting, {settings.max_seconds:g} s each"),
        ("access", keys if settings.keys else "no key, this machine only"),
        ("try", f"""curl {url}/v1/completions --json '{{"prompt": "Once upon a time"}}'"""
         + (' -H "Authorization: Bearer KEY"' if settings.keys else "")),
        ("stop", "Ctrl-C; twice to stop at once"),
    ]  # fmt: skip
    return [f"edgelm {__version__} serves on {url}", *(f"  {name:<8}{words}" for name, words in rows)]


def _stopping(settings: "ServeSettings") -> str:
    return f"edgelm: stopping; running texts may go on for {settings.drain_seconds:g} s (again: stop at once)"


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
