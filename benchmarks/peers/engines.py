"""Loaders of the peers. Each peer is driven by its own API, with token ids in and out.

Loaders run in the peers' own environments, so imports happen inside them only. `docs/performance.md` lists the
settings, and the settings that were not tried.
"""

import ctypes
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import ROOM_TOKENS, Loaded, Prompts, Timing, single_prompt


def load_llama_cpp(folder: Path, threads: int) -> Loaded:
    """llama.cpp through the C API that llama-cpp-python binds, with one argmax in Python between tokens."""
    started = time.perf_counter()
    import llama_cpp
    import numpy as np

    imported = time.perf_counter()
    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    model_options = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(folder / "model.gguf").encode(), model_options)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {folder / 'model.gguf'}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = min(llama_cpp.llama_model_n_ctx_train(model), ROOM_TOKENS)
    options.n_batch = options.n_ctx  # tokens of a call; n_ubatch, the tokens computed at once, stays 512
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)
    batches: dict[int, Any] = {}  # contexts for several sequences, made when first asked for
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    memory = llama_cpp.llama_get_memory(context)
    loaded = time.perf_counter()

    def step(ids: Sequence[int]) -> int:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (vocabulary,))))

    def step_rows(context: Any, rows: Sequence[Sequence[int]], past: int) -> list[int]:
        """Append tokens to every sequence.

        Args:
            context: llama.cpp's context of the batch.
            rows: token ids (B, T) to append.
            past: number of earlier tokens of each sequence.

        Returns:
            The most likely next token of each sequence.
        """
        width = len(rows[0])
        batch = llama_cpp.llama_batch_init(width * len(rows), 0, 1)
        batch.n_tokens = width * len(rows)
        for place, token in enumerate(token for row in rows for token in row):
            row, column = divmod(place, width)
            batch.token[place], batch.pos[place] = token, past + column
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
            batch.logits[place] = column == width - 1
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_batch_free(batch)
        ends = [llama_cpp.llama_get_logits_ith(context, width * (row + 1) - 1) for row in range(len(rows))]
        return [int(np.argmax(np.ctypeslib.as_array(logits, (vocabulary,)))) for logits in ends]

    def generate_rows(prompts: Prompts, new_tokens: int) -> Timing:
        if len(prompts) not in batches:
            batch_options = llama_cpp.llama_context_default_params()
            batch_options.n_seq_max = len(prompts)
            batch_options.n_ctx = batch_options.n_batch = options.n_ctx * len(prompts)
            batch_options.n_threads = batch_options.n_threads_batch = threads
            batches[len(prompts)] = llama_cpp.llama_init_from_model(model, batch_options)
        batch_context = batches[len(prompts)]
        called = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(batch_context), False)
        new = [step_rows(batch_context, prompts, 0)]
        first = time.perf_counter()
        while len(new) < new_tokens:
            new.append(step_rows(batch_context, [[token] for token in new[-1]], len(prompts[0]) + len(new) - 1))
        return Timing(first - called, time.perf_counter() - first, [tokens[0] for tokens in new])

    def generate(prompts: Prompts, new_tokens: int) -> Timing:
        if len(prompts) > 1:
            return generate_rows(prompts, new_tokens)
        called = time.perf_counter()
        llama_cpp.llama_memory_clear(memory, False)
        ids = [step(single_prompt(prompts))]
        first = time.perf_counter()
        while len(ids) < new_tokens:
            ids.append(step(ids[-1:]))
        return Timing(first - called, time.perf_counter() - first, ids)

    generate.keep = quiet  # type: ignore[attr-defined]  # llama.cpp calls it while it runs
    return Loaded(generate, imported - started, loaded - imported)


def load_openvino(folder: Path, threads: int) -> Loaded:
    """OpenVINO GenAI's `LLMPipeline` without its prefix cache, which would skip the prefill."""
    started = time.perf_counter()
    import numpy as np
    import openvino
    import openvino_genai

    imported = time.perf_counter()
    pipeline = openvino_genai.LLMPipeline(
        folder,
        "CPU",
        ATTENTION_BACKEND="SDPA",
        INFERENCE_NUM_THREADS=threads,
        NUM_STREAMS=1,
        PERFORMANCE_HINT="LATENCY",
    )
    loaded = time.perf_counter()

    def generate(prompts: Prompts, new_tokens: int) -> Timing:
        ids = openvino.Tensor(np.array(prompts, np.int64))  # (B, T)
        # Without an end-of-text token it would use -1 and then refuse it.
        settings = openvino_genai.GenerationConfig(
            max_new_tokens=new_tokens, ignore_eos=True, eos_token_id=0, do_sample=False
        )
        called = time.perf_counter()
        result = pipeline.generate(ids, settings)
        seconds = time.perf_counter() - called
        prefill = result.perf_metrics.get_ttft().mean / 1000
        return Timing(prefill, seconds - prefill, result.tokens[0])

    return Loaded(generate, imported - started, loaded - imported)


def load_ctranslate2(folder: Path, threads: int) -> Loaded:
    """CTranslate2's `Generator.generate_batch`. Its tokens are words, which are looked up before the timed call."""
    started = time.perf_counter()
    import ctranslate2

    imported = time.perf_counter()
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type="int8", intra_threads=threads, inter_threads=1
    )
    loaded = time.perf_counter()
    words: list[str] = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(prompts: Prompts, new_tokens: int) -> Timing:
        rows = [[words[token_id] for token_id in prompt] for prompt in prompts]
        first = 0.0

        def note(step: Any) -> bool:
            nonlocal first
            first = first or time.perf_counter()
            return False  # continue

        called = time.perf_counter()
        results = generator.generate_batch(
            rows,
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=note,
        )
        returned = time.perf_counter()
        return Timing(first - called, returned - first, results[0].sequences_ids[0])

    return Loaded(generate, imported - started, loaded - imported)


def load_onnxruntime_genai(folder: Path, threads: int) -> Loaded:
    """onnxruntime-genai's `Generator`, with the KV cache in one shared buffer."""
    started = time.perf_counter()
    import numpy as np
    import onnxruntime_genai

    imported = time.perf_counter()
    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = onnxruntime_genai.Model(config)
    loaded = time.perf_counter()

    def generate(prompts: Prompts, new_tokens: int) -> Timing:
        ids = np.array(prompts, np.int32)  # (B, T)
        called = time.perf_counter()
        settings = onnxruntime_genai.GeneratorParams(model)
        length = ids.shape[1] + new_tokens
        settings.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(ids))
        generator = onnxruntime_genai.Generator(model, settings)
        generator.append_tokens(ids)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        new = generator.get_sequence(0)[ids.shape[1] :]
        return Timing(first - called, time.perf_counter() - first, new.tolist())

    return Loaded(generate, imported - started, loaded - imported)
