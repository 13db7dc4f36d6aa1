"""The content of ``bundle.json``: facts, so that the runtime never asks which architecture it runs.

``docs/bundle-format.md`` describes the same fields for people. ``null`` means "not known". Only fields whose default
is None may be absent.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from edgelm.bundle.certificate import Certificate
from edgelm.bundle.latent_facts import LATENT_FEATURE, LatentFacts
from edgelm.bundle.strict_json import Between, Bytes, Count, StrictJsonError, from_json, parse_json
from edgelm.errors import UPGRADE_HINT, BundleError

FORMAT_VERSION = 2
MANIFEST_NAME = "bundle.json"
MAX_MANIFEST_BYTES = 4 * 2**20
PREFIX_FEATURE = "prefix"
PREFIX_FILE = "prefix.safetensors"
"""Keys and values that stand before every prompt. A bundle has both the feature and the file, or neither."""
TASK_FEATURE = "task"
TASK_FILE = "task.json"
"""What the bundle is for. A bundle has both the feature and the file, or neither."""
MAX_TASK_BYTES = 2**20
"""The longest task, in a bundle or in a prefix file."""
DRAFT_FEATURE = "draft"
TWO_STAGE_HEAD_FEATURE = "two_stage_head"
INT8_CACHE_FEATURE = "int8_cache"
VALUE_DIVISORS_FILE = "value_divisors.bin"
"""The factors by which smoothing divided the values, float32 (layers, H, D). Only smoothed bundles have this file."""
KNOWN_FEATURES: frozenset[str] = frozenset(
    {
        "pruned_vocabulary",
        PREFIX_FEATURE,
        LATENT_FEATURE,
        TASK_FEATURE,
        DRAFT_FEATURE,
        TWO_STAGE_HEAD_FEATURE,
        INT8_CACHE_FEATURE,
    }
)
"""Names that this version knows in `required_features`. A bundle with any other name needs a newer edgelm."""

_PLAIN_NAME = re.compile(r"(?=.{1,128}$)[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")
_WINDOWS_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
"""Names that Windows takes for devices, whatever follows the first dot. It also drops a dot at the end of a name."""

CacheType = Literal["float32", "float16", "int8"]
_CACHE_TYPES = {("float32", "float32"), ("float16", "float16"), ("float32", "int8")}
"""Types of the activations, each with a type of the cache that goes with it."""

FixedPrecision = Literal["fp32", "fp16", "int8", "w8a8", "int4", "int4-small"]
Precision = Literal[FixedPrecision, "mixed"]
"""Names of recipes. In "mixed" the bits were chosen matrix by matrix."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes from which the runtime allocates memory and refuses what does not fit."""

    num_layers: Annotated[int, Between(1, 1024)]
    num_heads: Annotated[int, Between(1, 4096)]
    """Heads of the queries."""
    num_key_value_heads: Annotated[int, Between(1, 4096)]
    """Heads of the keys and values, as cached."""
    head_dim: Annotated[int, Between(1, 4096)]
    """Width of one cached head, zero padding included."""
    source_head_dim: Annotated[int, Between(1, 4096)]
    """Width of one head in the source, without padding."""
    cache_values_per_token: Annotated[int, Between(2, 2**32)]
    """How many numbers a token takes in the cache: the keys and the values of all layers."""
    hidden_size: Annotated[int, Between(1, 2**20)]
    widest_activation: Annotated[int, Between(1, 2**24)]
    """How many numbers the widest activation has for each token; usually the inner width of the feed-forward part."""
    context_length: Annotated[int, Between(1, 2**20)]
    vocab_size: Annotated[int, Between(1, 2**22)]


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """The graph's files and the names of its inputs and outputs. ``{layer}`` stands for 0, 1, 2, ..."""

    file: str
    weights_file: str
    minimum_onnxruntime: str
    devices: tuple[Literal["cpu", "cuda"], ...]
    input_ids: str
    position_ids: str | None
    """null where the graph takes no positions as an input."""
    seqlens_k: str
    total_sequence_length: str
    query_seqlens: str
    logits_index: str
    logits: str
    hidden_states: str
    """Output of the final norm for every new token. A run that does not bind this output computes nothing for it."""
    dtype: Literal["float32", "float16"]
    """Type of the activations, and of `hidden_states`."""
    past_names: tuple[str, ...]
    present_names: tuple[str, ...]
    kv_layout: Literal["BHCD"]
    """Axes of the cache: batch, heads, capacity, head_dim."""
    kv_dtype: CacheType
    """Type of the keys and values in the cache. The graph itself holds the scales of an int8 cache."""
    exact_logits: Annotated[int, Between(1, 1024)] | None = None
    """The number of likeliest tokens whose logits the second stage of the head computes, from the table that
    `Recipe.matrices` lists. The first stage, a coarse head, gives all other logits. null where the head has one stage.
    """

    @property
    def features(self) -> tuple[str, ...]:
        """What a bundle with this graph names in `required_features` because of it."""
        two_stages = (TWO_STAGE_HEAD_FEATURE,) if self.exact_logits is not None else ()
        return (*two_stages, INT8_CACHE_FEATURE) if self.kv_dtype == "int8" else two_stages


@dataclass(frozen=True, slots=True)
class Matrix:
    """How one weight matrix of the source is stored."""

    name: str
    shape: tuple[Count, ...]
    format: Literal["float32", "float16", "int8_row", "block"]
    bits: Annotated[int, Between(1, 32)]
    block_size: Annotated[int, Between(16, 256)] | None
    relative_error: Annotated[float, Between(0, 1e6)]
    """Root mean square of (stored - source), divided by the root mean square of source."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The precision recipe: its name and how each matrix is stored."""

    name: Precision
    calibration_tokens: Count | None
    """Tokens drawn from the source that smoothing and GPTQ saw; null where no matrix was rounded to integers."""
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights came from."""

    name: str
    revision: str | None
    license: str | None
    architecture: str
    parameters: Annotated[int, Between(1, 2**44)]
    adapter: str | None = None
    """The LoRA adapter that was merged into the source; name@commit where the adapter came from the hub."""
    vocab_size: Count | None = None
    """Vocabulary size of the source; larger than the architecture's where the vocabulary was pruned."""
    body_sha256: str | None = None
    """Hash of all weights except the token table and the head. A learned prefix fits every bundle with this hash."""


@dataclass(frozen=True, slots=True)
class FileFact:
    """Size and SHA-256 (hex) of one file of the bundle."""

    size_bytes: Bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class DraftFacts:
    """A small model in the bundle that guesses tokens: what a bundle of its own would state. It has no certificate,
    because no token is chosen by it."""

    source_name: str
    architecture: Architecture
    graph: GraphFacts
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of ``bundle.json``."""

    format_version: Annotated[int, Between(1, 10**6)]
    required_features: tuple[str, ...]
    created_by: str
    architecture: Architecture
    graph: GraphFacts
    recipe: Recipe
    source: Source
    certificate: Certificate | None
    files: dict[str, FileFact] = field(default_factory=dict)
    digest: str = ""
    latent: LatentFacts | None = None
    """The latent part. A bundle has both this entry and the feature `latent`, or neither."""
    draft: DraftFacts | None = None
    """The small model that guesses tokens. A bundle has both this entry and the feature `draft`, or neither."""

    @property
    def graphs(self) -> tuple[GraphFacts, ...]:
        """The graphs of the bundle: the model's own, and that of the model that guesses, if there is one."""
        return (self.graph,) if self.draft is None else (self.graph, self.draft.graph)

    def sealed(self) -> "Manifest":
        """A copy of the manifest with its digest filled in."""
        return replace(self, digest=digest_of(self._content()))

    def to_json(self) -> str:
        """The text of ``bundle.json``."""
        return json.dumps(self._content(), indent=1, ensure_ascii=False) + "\n"

    def _content(self) -> dict[str, Any]:
        """The fields as written: an optional field that is None is left out."""
        return asdict(self, dict_factory=_without_absent)


_OPTIONAL = {field.name for cls in (GraphFacts, Source, Manifest) for field in fields(cls) if field.default is None}
"""Fields that may be absent. All other fields are written as null where they are None."""


def _without_absent(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of one dataclass as they are written."""
    return {name: value for name, value in items if value is not None or name not in _OPTIONAL}


def digest_of(content: dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of `content` without its digest: sorted keys, no spaces, UTF-8."""
    body = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_manifest(text: bytes) -> Manifest:
    """Read and check the text of ``bundle.json``.

    Raises BundleError if the text is longer than MAX_MANIFEST_BYTES; the format or a feature is newer than this
    version; a field is unknown, missing, mistyped or out of range; a file name is not a plain name; or the digest does
    not match.
    """
    try:
        if len(text) > MAX_MANIFEST_BYTES:
            raise StrictJsonError(f"has {len(text):,} bytes, more than {MAX_MANIFEST_BYTES:,}")
        content = parse_json(text)
        if not isinstance(content, dict):
            raise StrictJsonError("must be an object")
        _check_version(content)
        manifest = from_json(Manifest, content)
        _check_digest(content)
        _check_consistency(manifest)
    except StrictJsonError as error:
        raise BundleError(f"{MANIFEST_NAME} {error}") from None
    return manifest


def _check_version(content: dict[str, object]) -> None:
    # This check comes first, because a newer bundle must be distinguished from a damaged one.
    version = content.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleError(
            f"{MANIFEST_NAME} has format_version {version}, this edgelm reads up to {FORMAT_VERSION}: "
            f"needs a newer edgelm; {UPGRADE_HINT}"
        )
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise BundleError(
            f"{MANIFEST_NAME} has format_version {version}, which this edgelm no longer reads (it reads "
            f"{FORMAT_VERSION}): export the checkpoint again"
        )
    features = content.get("required_features")
    if isinstance(features, list):
        for name in features:
            if isinstance(name, str) and name not in KNOWN_FEATURES:
                raise BundleError(f"the bundle uses {name[:60]!r}: needs edgelm newer than this one; {UPGRADE_HINT}")


def _check_digest(content: dict[str, object]) -> None:
    if content["digest"] != digest_of(content):
        raise StrictJsonError("does not match its own digest: it was edited or damaged; export or download it again")


def _check_consistency(manifest: Manifest) -> None:
    names, graph = list(manifest.files), manifest.graph
    for name in names:
        if not _PLAIN_NAME.fullmatch(name) or _WINDOWS_DEVICE.fullmatch(name) or name == MANIFEST_NAME:
            raise StrictJsonError(f"names the file {name[:80]!r}, which is not a plain file name on every system")
        if not re.fullmatch(r"[0-9a-f]{64}", manifest.files[name].sha256):
            raise StrictJsonError(f"files.{name}.sha256 is not 64 hexadecimal digits")
    if len({name.lower() for name in names}) != len(names):
        raise StrictJsonError("names two files that differ only in upper and lower case")
    for feature, file in ((PREFIX_FEATURE, PREFIX_FILE), (TASK_FEATURE, TASK_FILE)):
        if (feature in manifest.required_features) != (file in manifest.files):
            raise StrictJsonError(f"has the feature {feature!r} without {file!r}, or the file alone")
    _check_latent(manifest)
    _check_draft(manifest)
    _check_model(manifest.architecture, manifest.graph)
    of_graphs = {feature for facts in manifest.graphs for feature in facts.features}
    for feature, sign in (
        (TWO_STAGE_HEAD_FEATURE, "'exact_logits', or the field alone"),
        (INT8_CACHE_FEATURE, "kv_dtype 'int8', or this alone"),
    ):
        if (feature in manifest.required_features) != (feature in of_graphs):
            raise StrictJsonError(f"has the feature {feature!r} without a graph's {sign}")
    needed = (graph.file, graph.weights_file, "tokenizer.json", "config.json", "generation_config.json")
    for name in needed:
        if name not in manifest.files:
            raise StrictJsonError(f"lists no file {name[:80]!r}, which every bundle needs")
    if len(set(needed)) != len(needed):
        raise StrictJsonError("gives two parts of the bundle one file: the graph, the weights and the settings differ")
    certificate = manifest.certificate
    if certificate is not None and certificate.reference.file not in manifest.files:
        raise StrictJsonError(f"lists no file {certificate.reference.file[:80]!r}, its certificate's reference")
    if certificate is not None and not certificate.texts:
        raise StrictJsonError("certificate.texts is empty")


def _check_model(facts: Architecture, graph: GraphFacts, where: str = "") -> None:
    """Check what the manifest states of a model; `where` stands before the names of its parts."""
    if facts.source_head_dim > facts.head_dim:
        sizes = f"{facts.source_head_dim}, more than the cache's head_dim of {facts.head_dim}"
        raise StrictJsonError(f"{where}architecture.source_head_dim is {sizes}")
    if facts.num_heads % facts.num_key_value_heads:
        sizes = f"{facts.num_heads}, which is not a multiple of num_key_value_heads, {facts.num_key_value_heads}"
        raise StrictJsonError(f"{where}architecture.num_heads is {sizes}")
    if len(graph.past_names) != 2 or len(graph.present_names) != 2:
        raise StrictJsonError(f"{where}graph.past_names and {where}graph.present_names must name a key and a value")
    if not re.fullmatch(r"\d{1,4}\.\d{1,4}(\.\d{1,4})?", graph.minimum_onnxruntime):
        raise StrictJsonError(
            f"{where}graph.minimum_onnxruntime must be like '1.32', got {graph.minimum_onnxruntime!r}"
        )
    if not graph.devices:
        raise StrictJsonError(f"{where}graph.devices is empty")
    if (graph.dtype, graph.kv_dtype) not in _CACHE_TYPES:
        raise StrictJsonError(f"{where}graph.kv_dtype is {graph.kv_dtype!r}, which no bundle of {graph.dtype} has")


def _check_draft(manifest: Manifest) -> None:
    draft = manifest.draft
    if (DRAFT_FEATURE in manifest.required_features) != (draft is not None):
        raise StrictJsonError(f"has the feature {DRAFT_FEATURE!r} without the entry 'draft', or the entry alone")
    if draft is None:
        return
    _check_model(draft.architecture, draft.graph, "draft.")
    files = [name for graph in manifest.graphs for name in (graph.file, graph.weights_file)]
    for name in files:
        if name not in manifest.files:
            raise StrictJsonError(f"lists no file {name[:80]!r}, which its model that drafts needs")
    others = {"tokenizer.json", "config.json", "generation_config.json"}
    if manifest.latent is not None:
        others.add(manifest.latent.file)
    if len(set(files)) != len(files) or others & set(files):
        raise StrictJsonError("gives two parts of the bundle one file: the graphs and the weights of its two models")


def _check_latent(manifest: Manifest) -> None:
    latent = manifest.latent
    if (LATENT_FEATURE in manifest.required_features) != (latent is not None):
        raise StrictJsonError(f"has the feature {LATENT_FEATURE!r} without the entry 'latent', or the entry alone")
    if latent is None:
        return
    if manifest.graph.kv_dtype == "int8":
        raise StrictJsonError("has a latent part and an int8 cache, and the keys and values of a vector are floats")
    graph, files = manifest.graph, [latent.file, *([] if latent.reference is None else [latent.reference.file])]
    for name in files:
        if name not in manifest.files:
            raise StrictJsonError(f"lists no file {name[:80]!r}, which its latent part needs")
    if len({*files, graph.file, graph.weights_file}) != len(files) + 2:
        raise StrictJsonError("gives two parts of the bundle one file: the graph, the weights and the latent part")
    for name, token in (("begin_token_id", latent.begin_token_id), ("end_token_id", latent.end_token_id)):
        if token >= manifest.architecture.vocab_size:
            raise StrictJsonError(f"latent.{name} is {token}, which is not in the vocabulary")
