"""``edgelm pull``, ``push``, ``list`` and ``rm``: bundles of the hub, and those on this machine."""

from dataclasses import dataclass
from pathlib import Path

import click

from edgelm.bundle.cache import CachedModel, HubName, cache_folder, cached_refs
from edgelm.bundle.folder import Bundle
from edgelm.cli.interrupt import ends_at_once
from edgelm.cli.progress import percent, progress
from edgelm.cli.shared import json_option, print_json, print_table
from edgelm.cli.streams import note
from edgelm.errors import BundleError, EdgelmError


class _HubNameType(click.ParamType):  # type: ignore[type-arg]  # generic in new versions of click only
    """OWNER/NAME or OWNER/NAME@REVISION."""

    name = "OWNER/NAME[@REVISION]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> HubName:
        """The parts of the name."""
        parsed = HubName.parsed(value)
        if parsed is None:
            self.fail(f"{value!r} is no name of a model on the hub like 'owner/name' or 'owner/name@v1'", param, ctx)
        return parsed


@click.command(name="pull")
@click.argument("name", metavar="OWNER/NAME[@REVISION]", type=_HubNameType())
def pull_command(name: HubName) -> None:
    """Fetch a ready bundle from the Hugging Face hub into the cache.

    All hashes are checked before the bundle appears. After a cut or a kill the same command goes on where it stopped.
    Afterwards no network is needed. The cache is in EDGELM_CACHE, or in the system's folder for caches.

    \b
    edgelm pull owner/name
    edgelm run -m owner/name "Hello"
    """
    with ends_at_once():
        from edgelm.hub.pull import pull

    with progress("fetched") as show:
        bundle, ref = pull(name, note, percent(show))
    note(f"{name}: commit {ref.commit[:12]}, {bundle.size_bytes / 1e6:.1f} MB, digest {bundle.manifest.digest}")


@click.command(name="push")
@click.argument("bundle", metavar="BUNDLE")
@click.argument("name", metavar="OWNER/NAME[@BRANCH]", type=_HubNameType())
@click.option("--private", is_flag=True, help="Make a model that is new on the hub visible for its owner only.")
def push_command(bundle: str, name: HubName, private: bool) -> None:
    """Upload a bundle to the Hugging Face hub, as one commit.

    Log in before with `hf auth login`, or set HF_TOKEN.
    """
    with ends_at_once():
        from edgelm.hub.push import push

    page = push(Bundle.read(bundle), name, private=private, tell=note)
    note(f"pushed: {page}")


@dataclass(frozen=True, slots=True)
class _Row:
    """A model on this machine."""

    name: str
    version: str
    """The commit of a pulled model, and the version of an installed package."""
    size_bytes: int | None
    precision: str
    path: str
    error: str = ""


@click.command(name="list")
@json_option("Print one JSON object for each model.")
def list_command(as_json: bool) -> None:
    """List the bundles that were pulled from the hub, and those that were installed as packages."""
    rows = _pulled() + _installed()
    for row in rows if as_json else ():
        print_json({"name": row.name, "version": row.version, "size_bytes": row.size_bytes,
                    "precision": row.precision, "path": row.path, "error": row.error or None})  # fmt: skip
    if as_json:
        return
    if not rows:
        note(f"no models were pulled into {str(cache_folder())!r}, and none are installed as packages")
        return
    table = [("name", "version", "size", "precision")]
    for row in rows:
        size = "" if row.size_bytes is None else f"{row.size_bytes / 1e6:.1f} MB"
        table.append((row.name, row.version[:12], size, row.precision or f"cannot be used: {row.error}"))
    print_table(table)


@click.command(name="rm")
@click.argument("name", metavar="OWNER/NAME[@REVISION]", type=_HubNameType())
def rm_command(name: HubName) -> None:
    """Remove a pulled bundle from the cache: one revision, or without @REVISION all of them."""
    model = CachedModel.of(name.repo)
    refs = model.refs()
    if name.revision is None:
        known = bool(refs) or model.partial_folder("").is_dir()
    else:
        known = any(ref.revision == name.revision for ref in refs)
    if not known:
        raise BundleError(f"{str(name)!r} was not pulled; `edgelm list` shows what was")
    try:
        with model.locked() as held:
            if not held:
                raise BundleError(f"another process pulls {name.repo!r} now: try again later")
            model.forget(name.revision)
    except OSError as error:
        advice = "; end the programs that use it" if isinstance(error, PermissionError) else ""
        raise BundleError(f"cannot remove {str(name)!r}: {error.strerror or error}{advice}") from None
    note(f"removed {name}")


def _pulled() -> list[_Row]:
    return [_row(str(HubName(ref.repo, ref.revision)), ref.commit, folder) for ref, folder in cached_refs()]


def _installed() -> list[_Row]:
    from edgelm.bundle.installed import installed_models

    rows = []
    for model in installed_models():
        try:
            rows.append(_row(model.name, model.version, model.folder()))
        except EdgelmError as error:
            rows.append(_Row(model.name, model.version, None, "", "", str(error)))
    return rows


def _row(name: str, version: str, folder: Path) -> _Row:
    try:
        bundle = Bundle.read(folder)
    except EdgelmError as error:
        return _Row(name, version, None, "", str(folder), str(error))
    return _Row(name, version, bundle.size_bytes, bundle.manifest.recipe.name, str(folder))
