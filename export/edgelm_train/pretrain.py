"""``edgelm pretrain``: from text files to a tokenizer and a GPT-2, in a Hugging Face folder."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from edgelm.errors import TrainingError
from edgelm_train.data.bpe import load_bpe, save_bpe, train_bpe
from edgelm_train.data.corpus import END_OF_TEXT, Corpus, counted, read_corpus
from edgelm_train.data.packing import BatchStream, Packed, Phase, pack, refuse_too_little
from edgelm_train.models.sizes import defaults_for, load_weights, named_config, shape_name
from edgelm_train.options import PretrainOptions
from edgelm_train.run.checkpoints import follow_umask
from edgelm_train.run.folder import RUN_FOLDER, RunRecord, check_out, refuse_changes, saving, sha256_of_weights
from edgelm_train.run.held_out import loss_in_windows
from edgelm_train.run.lock import locked
from edgelm_train.run.loop import Outcome, Schedule, train
from edgelm_train.run.machine import device_for, fastest_precision, free_bytes, parts_that_fit
from edgelm_train.run.muon import muon_seconds
from edgelm_train.run.report import Finished, TrainingReport, draw_samples

_SAMPLES, _SAMPLE_TOKENS = 3, 200
_SAMPLE_SEED = 0
"""Of the training documents that are measured, as many tokens as are held out: the first ones may be of one file."""
_PASSES = 4
_HOURS_USED = 0.9
"""Part of the time limit for which steps are planned, because measurements take time too."""


def pretrain(
    files: Sequence[Path], out: Path, options: PretrainOptions, *, say: Callable[[str], None] = lambda line: None
) -> Finished[TrainingReport]:
    """Train a tokenizer and a GPT-2 on UTF-8 text files, or resume the unfinished run in `out`.

    A finished run leaves a checkpoint for ``edgelm export`` in `out`, with report.md, report.json and curves.svg. A
    resumed run has the same loss curve as an uninterrupted run on the same machine with the same number of threads.
    `say` gets lines about the progress.

    Raises:
        TrainingError: data or options cannot be used, `out` contains another or a finished run or another process is at
            work there, or the loss diverged.
    """
    check_out(out)
    with locked(out, "edgelm pretrain"):
        return _pretrain(files, out, options, say)


def _pretrain(
    files: Sequence[Path], out: Path, options: PretrainOptions, say: Callable[[str], None]
) -> Finished[TrainingReport]:
    started, folder = check_out(out), out / RUN_FOLDER
    corpus = read_corpus(files, separator=options.separator, held_out=options.held_out)
    size = options.size or "6M" if options.start_from is None else str(options.start_from / "config.json")
    config = named_config(size)
    recorded = {"data": corpus.sha256, **options.recorded(), "size": shape_name(config), "config": _fields(config)}
    if options.start_from is not None:
        recorded["weights"] = sha256_of_weights(options.start_from)
    if started is not None:
        refuse_changes(started, recorded, out)
    given_tokenizer = options.tokenizer or options.start_from if started is None else folder / "tokenizer"
    if given_tokenizer is None:
        tokenizer, token = train_bpe(corpus.training, options.vocab_size or config.vocab_size), END_OF_TEXT
    else:
        tokenizer, token = load_bpe(given_tokenizer)
    end_of_text = tokenizer.token_to_id(token)
    _fit_vocabulary(config, tokenizer, end_of_text, options)
    training, held_out = (pack(part, tokenizer, end_of_text) for part in (corpus.training, corpus.held_out))
    say(
        f"to train on: {counted(len(corpus.training), 'document')}, {counted(len(training), 'token')}; "
        f"held out: {counted(len(corpus.held_out), 'document')}, {counted(len(held_out), 'token')}; "
        f"vocabulary: {counted(config.vocab_size, 'token')}"
    )
    if corpus.repeated:
        say(f"left out {counted(corpus.repeated, 'document')} because an equal one is held out")
    model = _model(config, options, say)
    record = started or RunRecord(recorded, _decide(model, len(training), options, say))
    schedule, phases = _schedule(record, config, options)
    windows = [phase.window for phase in phases]
    refuse_too_little({"to train on": training, "held out": held_out}, max(windows), "a size with a shorter context")
    if started is None:  # nothing is written before everything is checked
        save_bpe(tokenizer, folder / "tokenizer", token)
        record.write(folder)
    say(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {counted(schedule.steps, 'step')} of "
        f"{schedule.batch_tokens:,} tokens in {schedule.precision} on {model.device.type}"
    )
    stream = BatchStream(training, phases, schedule.batch_tokens, schedule.accumulate, options.seed)

    def measure(model: Any) -> float:
        return loss_in_windows(model, held_out.ids, windows[0]).per_token

    outcome = train(model, stream, measure, folder, schedule, device=options.device, say=say)
    if outcome.ended == "signal":
        return Finished(None, outcome)
    losses = {window: loss_in_windows(model, held_out.ids, window).per_token for window in windows}
    report = TrainingReport(
        facts=_facts(model, corpus, training, held_out, losses[windows[0]], outcome, schedule),
        held_out=losses,
        training=loss_in_windows(model, training.shuffled(_SAMPLE_SEED)[: len(held_out)], windows[0]).per_token,
        samples=draw_samples(model, tokenizer, range(_SAMPLES), min(_SAMPLE_TOKENS, config.n_positions - 1)),
        log=outcome.log,
    )
    if model.config.activation_function == "gelu_pytorch_tanh":
        model.config.activation_function = "gelu_new"  # the name that every reader of GPT-2 knows
    model.config.use_cache = model.generation_config.use_cache = True
    with saving(out):
        model.save_pretrained(out)
        save_bpe(tokenizer, out, token)
        follow_umask(out)
    return Finished.with_report(report, outcome, {"": outcome.log}, schedule.batch_tokens, out)


def _fields(config: transformers.GPT2Config) -> str:
    """Every field of `config` as text: two different configurations have different texts."""
    fields = {name: value for name, value in config.to_dict().items() if name != "transformers_version"}
    return json.dumps(fields, sort_keys=True)


def _fit_vocabulary(
    config: transformers.GPT2Config, tokenizer: tokenizers.Tokenizer, end_of_text: int, options: PretrainOptions
) -> None:
    """Give a new model the tokenizer's vocabulary, and every model the tokenizer's end-of-text token."""
    tokens = max(tokenizer.get_vocab().values()) + 1
    if options.start_from is None:
        config.vocab_size = tokens
    elif tokens > config.vocab_size:
        raise TrainingError(
            f"the tokenizer of {options.start_from} has {tokens} tokens, its model only {config.vocab_size}; give a "
            "checkpoint whose tokenizer fits its model"
        )
    config.bos_token_id = config.eos_token_id = end_of_text


def _model(config: transformers.GPT2Config, options: PretrainOptions, say: Callable[[str], None]) -> Any:
    device = device_for(options.device)  # raises before the model takes time
    config.embd_pdrop = config.resid_pdrop = options.dropout
    config.attn_pdrop = 0.0  # torch's fused attention on CPUs has no dropout
    if config.activation_function == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel
    config.use_cache = False
    torch.manual_seed(options.seed)
    if options.start_from is None:
        model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    else:
        model = load_weights(options.start_from, config, say)
        model.generation_config.bos_token_id = config.bos_token_id
        model.generation_config.eos_token_id = config.eos_token_id
    return model.to(device)


def _decide(
    model: Any, training_tokens: int, options: PretrainOptions, say: Callable[[str], None]
) -> dict[str, object]:
    usual = defaults_for(model.config)
    context = model.config.n_positions
    window = max(2, context // 2) if options.short_windows else context
    least = options.least_batch_tokens(context)
    asked = options.batch_tokens or max(least, usual.batch_tokens // least * least)
    batch_tokens = min(asked, max(least, training_tokens // least * least))
    if batch_tokens < asked:
        say(f"a step of {asked:,} tokens is more than the text has ({training_tokens:,}): it takes {batch_tokens:,}")
    accumulate = options.accumulate or parts_that_fit(model.config, batch_tokens, free_bytes(model.device))
    micro_tokens = batch_tokens // accumulate
    fastest, seconds = fastest_precision(model, micro_tokens, window)
    precision = fastest if options.precision == "auto" else options.precision
    tokens = options.tokens
    if tokens is None and options.hours is not None:
        step_seconds = accumulate * seconds[precision]
        if options.optimizer == "muon":
            step_seconds += muon_seconds(model)
        tokens = int(_HOURS_USED * options.hours * 3600 / step_seconds * batch_tokens)
    elif tokens is None:
        tokens = _PASSES * training_tokens
    return {
        "precision": precision,
        "seconds per micro-batch": seconds,
        "batch_tokens": batch_tokens,
        "accumulate": accumulate,
        "steps": max(1, round(tokens / batch_tokens)),
        "learning_rate": options.learning_rate or usual.learning_rate / (1 if options.optimizer == "muon" else 2),
        "threads": torch.get_num_threads(),
    }


def _schedule(record: RunRecord, config: Any, options: PretrainOptions) -> tuple[Schedule, list[Phase]]:
    decided: dict[str, Any] = dict(record.decided)
    steps = decided["steps"]
    short = round(steps * options.short_windows)
    phases = [Phase(short, max(2, config.n_positions // 2)), Phase(steps - short, config.n_positions)]
    schedule = Schedule(
        steps=steps,
        batch_tokens=decided["batch_tokens"],
        learning_rate=decided["learning_rate"],
        warmup_steps=round(steps * options.warmup),
        weight_decay=options.weight_decay,
        accumulate=decided["accumulate"],
        optimizer=options.optimizer,
        precision=decided["precision"],
        seed=options.seed,
        evaluate_every=max(1, steps // options.evaluations),
        patience=options.patience or None,
        keep=options.keep,
        limit_seconds=None if options.hours is None else options.hours * 3600,
    )
    return schedule, [phase for phase in phases if phase.steps]


def _facts(
    model: Any, corpus: Corpus, training: Packed, held_out: Packed, loss: float, outcome: Outcome, schedule: Schedule
) -> dict[str, object]:
    """The facts of the report; `loss` is that of `held_out`, in nats per token."""
    seen = outcome.steps * schedule.batch_tokens
    characters, held_out_characters = sum(map(len, corpus.training)), sum(map(len, corpus.held_out))
    shape = (getattr(model.config, name) for name in ("n_layer", "n_embd", "n_head", "n_positions"))
    return {
        "documents to train on": len(corpus.training),
        "documents held out": len(corpus.held_out),
        "documents left out because an equal one is held out": corpus.repeated,
        "characters to train on": characters,
        "tokens to train on": len(training),
        "tokens held out": len(held_out),
        "characters per token": characters / len(training),
        "held-out loss, nats per character": loss * len(held_out) / held_out_characters,
        "vocabulary": model.config.vocab_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers, width, heads, context": ", ".join(map(str, shape)),
        "ended": outcome.ended,
        "steps": outcome.steps,
        f"best step (the {schedule.keep} weights were kept)": outcome.best_step,
        "tokens seen": seen,
        "passes over the data": seen / len(training),
        "seconds": outcome.seconds,
        "tokens per second": seen / outcome.seconds,
        "device, precision, threads": f"{model.device.type}, {schedule.precision}, {torch.get_num_threads()}",
        "peak learning rate, weight decay, dropout": (
            f"{schedule.learning_rate:g}, {schedule.weight_decay:g}, {model.config.resid_pdrop:g}"
        ),
    }
