"""The chat template that a bundle carries as data: what the source's tokenizer says about turning a chat into text."""

from dataclasses import dataclass
from typing import Annotated

from edgelm.bundle.folder import Bundle
from edgelm.bundle.small_files import SmallFileError
from edgelm.bundle.strict_json import Between, StrictJsonError, from_json, parse_json
from edgelm.errors import BundleError

CHAT_TEMPLATE_FILE = "chat_template.json"
MAX_CHAT_TEMPLATE_BYTES = 2**20
MAX_TEMPLATE_CHARACTERS = 2**16
"""The longest template. The templates of Llama 3.2 and Qwen3 have about 4,000 characters."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Jinja templates of a chat model, and the texts of the tokens that they name. Nothing here is ever run."""

    templates: dict[str, Annotated[str, Between(0, MAX_TEMPLATE_CHARACTERS)]]
    """Templates by name. A model with one template calls it "default"."""
    special_tokens: dict[str, str]
    """Texts of special tokens under the names that templates use: "bos_token", "eos_token" ..."""


def read_chat_template(bundle: Bundle) -> ChatTemplate | None:
    """The chat template of `bundle`; None where it has none. Raises BundleError if the file is damaged."""
    if CHAT_TEMPLATE_FILE not in bundle.manifest.files:
        return None
    try:
        content = parse_json(bundle.read_file(CHAT_TEMPLATE_FILE, MAX_CHAT_TEMPLATE_BYTES))
        return from_json(ChatTemplate, content)
    except (SmallFileError, StrictJsonError) as error:
        raise BundleError(f"{CHAT_TEMPLATE_FILE} {error}") from None
