"""The chat template that a bundle carries as data: what the source's tokenizer says about turning a chat into text."""

from dataclasses import dataclass

from edgelm.bundle.folder import Bundle
from edgelm.bundle.strict_json import StrictJsonError, from_json, parse_json
from edgelm.errors import BundleError

CHAT_TEMPLATE_FILE = "chat_template.json"
MAX_CHAT_TEMPLATE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Jinja templates of a chat model, and the texts of the tokens that they name. Nothing here is ever run."""

    templates: dict[str, str]
    """Templates by name. A model with one template calls it "default"."""
    special_tokens: dict[str, str]
    """Texts of special tokens under the names that templates use: "bos_token", "eos_token" ..."""


def read_chat_template(bundle: Bundle) -> ChatTemplate | None:
    """The chat template of `bundle`; None where it has none. Raises BundleError if the file is damaged."""
    fact = bundle.manifest.files.get(CHAT_TEMPLATE_FILE)
    if fact is None:
        return None
    if fact.size_bytes > MAX_CHAT_TEMPLATE_BYTES:
        limit = f"more than {MAX_CHAT_TEMPLATE_BYTES:,}"
        raise BundleError(f"{CHAT_TEMPLATE_FILE} has {fact.size_bytes:,} bytes, {limit}: export the checkpoint again")
    try:
        content = parse_json(bundle.file(CHAT_TEMPLATE_FILE).read_bytes())
        return from_json(ChatTemplate, content)
    except StrictJsonError as error:
        raise BundleError(f"{CHAT_TEMPLATE_FILE} {error}") from None
