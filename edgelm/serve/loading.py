"""A place of the shelf becomes a model that decodes many texts at once."""

import logging

from edgelm.decoding.generation_config import GenerationConfig, GenerationOptions
from edgelm.loading import load
from edgelm.serve.settings import ServeSettings
from edgelm.serve.shelf import Place, ServedModel

log = logging.getLogger(__name__)


def load_place(
    place: Place,
    base: ServedModel | None,
    settings: ServeSettings,
    *,
    device: str = "auto",
    threads: int | None = None,
) -> ServedModel:
    """Load and warm up the model of `place`, on the weights of `base` where it has one. Raises as `edgelm.load`."""
    if base is None or place.prefix is None:
        model = load(
            place.bundle.path,
            device=device,
            threads=threads,
            task=place.task_file,
            draft=None if settings.drafts else False,
        )
    else:
        model = base.model.with_prefix(place.prefix.path)
    changed = batch_options(model.generation_config)
    if changed:
        log.warning("%r decodes many texts at once, so its defaults are changed: %s", place.name, changed)
        model.generation_config = model.generation_config.updated(dict(changed))
    model.warmup()
    scheduler = model.scheduler(
        max_rows=settings.max_rows,
        max_waiting=settings.max_waiting,
        prefix_cache_bytes=settings.prefix_cache_bytes,
        drafts=settings.drafts,
    )
    return ServedModel(place.name, model, scheduler)


def batch_options(config: GenerationConfig) -> GenerationOptions:
    """What to change in a bundle's defaults `config` that work on one text at a time only."""
    options = GenerationOptions()
    if config.num_beams > 1:
        options["num_beams"] = 1
    if config.penalty_alpha is not None:
        options["penalty_alpha"] = None
    if config.prompt_lookup_num_tokens is not None:
        options["prompt_lookup_num_tokens"] = None
    if config.num_return_sequences > 1:
        options["num_return_sequences"] = 1
    if config.context_overflow == "window":
        options["context_overflow"] = "truncate"
    return options
