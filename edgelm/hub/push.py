"""``edgelm push``: the files of a bundle become one commit on the hub."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgelm.bundle.cache import DEFAULT_REVISION, HubName
from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import MANIFEST_NAME
from edgelm.bundle.packing import unpack
from edgelm.errors import HubError, pass_interrupts_on
from edgelm.hub.client import Tell, ask, import_huggingface_hub


def push(bundle: Bundle, name: HubName, *, private: bool = False, tell: Tell = lambda line: None) -> str:
    """Upload `bundle` to the branch that `name` means, and return the commit's page.

    The bundle is verified first. The model is made on the hub if it is not there, where only its owner sees it if
    `private`. Raises HubError if the hub cannot be reached or refuses, and BundleError if the bundle is damaged.
    """
    hub = import_huggingface_hub()
    bundle.verify()
    what, branch = f"push to {str(name)!r}", name.revision or DEFAULT_REVISION
    api = hub.HfApi()
    files = [MANIFEST_NAME, *bundle.manifest.files]

    def make() -> None:
        api.create_repo(name.repo, private=private, exist_ok=True)
        if name.revision is not None:
            api.create_branch(name.repo, branch=branch, exist_ok=True)

    ask(make, name, what, tell)
    try:
        with _as_folder(bundle) as folder:

            def upload() -> Any:
                message = f"{bundle.manifest.source.name} {bundle.manifest.recipe.name}, edgelm bundle"
                return api.upload_folder(
                    repo_id=name.repo,
                    folder_path=folder,
                    revision=branch,
                    allow_patterns=files,
                    commit_message=message,
                )

            return str(ask(upload, name, what, tell).commit_url)
    except OSError as error:
        pass_interrupts_on(error)
        raise HubError(f"cannot {what}: {error.strerror or error}") from None


@contextmanager
def _as_folder(bundle: Bundle) -> Iterator[Path]:
    """A folder with the files of `bundle`, which is temporary if the bundle is packed."""
    if bundle.packed is None:
        yield bundle.path
        return
    with tempfile.TemporaryDirectory(prefix="edgelm-") as scratch:
        unpack(bundle, Path(scratch) / "bundle")
        yield Path(scratch) / "bundle"
