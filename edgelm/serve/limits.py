"""Limits of single fields of a request. ``docs/serve.md`` lists them; the OpenAPI document states them."""

MAX_CHOICES = 8
MAX_PROMPTS = 64
"""Prompts of one request."""
MAX_INPUTS = 2048
"""Texts of one `/v1/embeddings`."""
MAX_PROMPT_CHARACTERS = 65_536
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_OPTIONS = 64
"""Options of one `/v1/choose`."""
MAX_ATTENTION_BYTES = 24 * 10**6
"""Attention of one `/v1/explain`, as float32; its answer has a sixth of it."""
MAX_LIST_ITEMS = 1024
"""Items of any other list."""
MAX_IDS = 65_536
"""Token ids of a prompt."""
MAX_MESSAGES = 1024
"""Messages of one conversation, whose texts have `MAX_PROMPT_CHARACTERS` together."""
MAX_PARTS = 64
"""Parts of one message."""
MAX_METADATA = 16
MAX_TOOLS = 128
"""Functions of one conversation, and calls of one answer."""
