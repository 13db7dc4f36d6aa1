"""Options of the training commands are refused before torch is loaded, and declared once for shell and Python."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest

from edgelm.errors import TrainingError
from edgelm_train.cli import distill_command, finetune_command, pretrain_command
from edgelm_train.options import DistillOptions, FinetuneOptions, Option, PretrainOptions, TrainingOptions

pytestmark = pytest.mark.export

PRETRAIN = ("pretrain", "--data", "text.txt", "-o", "out")
FINETUNE = ("finetune", "base", "-o", "out", "--data")
DISTILL = ("distill", "base", "--data", "text.txt", "-o", "out")
REFUSED = [
    ((*PRETRAIN, "--dropout", "1.5"), "--dropout must be at least 0 and less than 1, got 1.5"),
    ((*PRETRAIN, "--dropout", "nan"), "--dropout must be at least 0 and less than 1, got nan"),
    ((*PRETRAIN, "--short-windows", "1.5"), "--short-windows must be at most 1, got 1.5"),
    ((*PRETRAIN, "--size", "7M"), "'7M' is no size"),
    ((*PRETRAIN, "--vocab-size", "100"), "257 to 262144 tokens, got 100"),
    ((*PRETRAIN, "--from", "a", "--tokenizer", "b"), "leave out --tokenizer"),
    ((*PRETRAIN, "--optimizer", "sgd"), "'sgd' is not one of 'muon', 'adamw'"),
    ((*PRETRAIN, "--tokens", "many"), "'many' is not a number like 500K or 12.4M"),
    (("pretrain", "--data", "missing.txt", "-o", "out"), "cannot read missing.txt: No such file"),
    (("pretrain", "--data", "text.txt", "-o", "text.txt"), "text.txt is a file; give a new folder as --out"),
    ((*FINETUNE, "text.txt", "--epochs", "0"), "--epochs must be more than 0, got 0.0"),
    ((*FINETUNE, "text.txt", "--seed", "-1"), "--seed must be at least 0, got -1"),
    ((*FINETUNE, "text.txt", "--prompt", "{a}", "--completion", "{b}"), "taken as plain text"),
    ((*FINETUNE, "rows.csv", "--prompt", "{", "--completion", "{b}"), "the template '{' cannot be read"),
    ((*FINETUNE, "rows.csv", "--window", "8"), "--window is for plain text"),
    ((*FINETUNE, "text.txt", "--held-out", "missing.txt"), "cannot read missing.txt: No such file"),
    ((*DISTILL, "--soft", "0", "--hidden", "0"), "the teacher would teach nothing"),
    ((*FINETUNE, "semicolons.csv"), "line 1 of 'semicolons.csv' separates columns by semicolons"),
    ((*FINETUNE, "latin1.csv"), "latin1.csv is not UTF-8: byte 4 (line 2)"),
    ((*FINETUNE, "chats.jsonl"), "'chats.jsonl' has chats in 'messages'"),
    ((*FINETUNE, "chats.jsonl", "--turn", "{role}"), "--turn takes {content} once"),
    ((*FINETUNE, "text.txt", "--turn", "{content}"), "--turn needs chats, but 'text.txt' is taken as plain text"),
    ((*FINETUNE, "chats.jsonl", "--turn", "{content}", "--prompt", "a"), "give one or the other"),
    ((*FINETUNE, "rows.csv.gz"), "'rows.csv.gz' seems to be compressed; decompress it to rows.csv first"),
    ((*FINETUNE, "rows.csv", "--held-out", "text.txt"), "is not a file of records"),
    ((*FINETUNE, "text.txt", "--window", "65"), "--window must be 2 to 64 tokens, got 65"),
    ((*FINETUNE, "text.txt", "--method", "prefix", "--prefix-tokens", "60"), "give at most 56"),
    (("finetune", "llama", "-o", "out", "--data", "rows.csv", "--window", "9"), "--window is for plain text"),
    (
        ("finetune", "llama", "-o", "out", "--data", "text.txt", "--method", "prefix", "--prefix-tokens", "60"),
        "leaves no room in the context of 64: give at most 56",
    ),
    ((*FINETUNE, "rows.csv", "--similarity", "score"), "needs all of --prompt, --second and --similarity"),
    ((*FINETUNE, "rows.csv", "--pooling", "last"), "needs all of --prompt, --second and --similarity"),
    (
        (*FINETUNE, "rows.csv", "--prompt", "{prompt}", "--second", "{b}", "--similarity", "prompt"),
        "has no column 'b'",
    ),
    (("finetune", "no/such/base", "-o", "out", "--data", "rows.csv"), "there is no folder 'no/such/base'"),
    (("finetune", "empty", "-o", "out", "--data", "rows.csv"), "'empty' holds no config.json"),
    (("finetune", "adapter", "-o", "out", "--data", "rows.csv"), "an adapter of '/gone', which is not here"),
    (("distill", "adapter", "-o", "out", "--data", "text.txt"), "an adapter of '/gone', which is not here"),
    (
        ("finetune", "llama", "-o", "out", "--data", "text.txt", "--latent"),
        "--latent takes GPT-2 only, and 'llama' is a model of the type 'llama'",
    ),
    (("distill", "gemma", "-o", "out", "--data", "text.txt"), "and 'gemma' is a model of the type 'gemma3_text'"),
    (
        ("finetune", "llama-adapter", "-o", "out", "--data", "text.txt", "--latent"),
        "GPT-2 only, and 'llama' is a model of the type",
    ),
    ((*PRETRAIN, "--from", "llama"), "llama/config.json: pretraining takes GPT-2 only, and it is of the type 'llama'"),
    ((*PRETRAIN, "--size", "gemma/config.json"), "pretraining takes GPT-2 only, and it is of the type 'gemma3_text'"),
    ((*PRETRAIN, "--from", "adapter"), "adapter is an adapter; train on with it by edgelm finetune"),
    ((*PRETRAIN, "--separator", "==="), "the separator '===' is nowhere in text.txt"),
    ((*PRETRAIN, "--held-out", "9"), "cannot hold out 9 of 1 document"),
    ((*PRETRAIN, "--batch-tokens", "1000"), "--batch-tokens must be a multiple of 512"),
    ((*PRETRAIN, "--size", "wrong.json"), "n_embd 32 is not a multiple of n_head 3"),
    (("pretrain", "--data", "latin1.csv", "-o", "out"), "latin1.csv is not UTF-8"),
    ((*DISTILL, "--layers", "0"), "--layers must be at least 1, got 0"),
    ((*DISTILL, "--size", "2M"), "'2M' is no size"),
]
SCRIPT = """
import json, sys
from edgelm.cli import cli
messages = []
for command in json.load(sys.stdin):
    try:
        cli.main(command, standalone_mode=False)
        messages.append("nothing was refused")
    except Exception as error:
        messages.append(str(error))
print(json.dumps([messages, sorted({"torch", "transformers"} & sys.modules.keys())]))
"""


def test_a_wrong_option_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    shape = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    files = {
        "text.txt": "a,b\n1,2\n",
        "rows.csv": "prompt,completion\n1,2\n",
        "rows.csv.gz": "no matter",
        "semicolons.csv": "a;b\n1;2\n",
        "latin1.csv": "a,b\n\xe9,2\n",
        "chats.jsonl": '{"messages": [{"role": "assistant", "content": "a"}]}',
        "wrong.json": json.dumps({**shape, "n_head": 3}),
        "base/config.json": json.dumps(shape),
        "llama/config.json": json.dumps(
            {"model_type": "llama", "intermediate_size": 64, "max_position_embeddings": 64}
        ),
        "gemma/config.json": json.dumps({"model_type": "gemma3_text", "intermediate_size": 64}),
        "llama-adapter/adapter_config.json": '{"base_model_name_or_path": "llama"}',
        "empty/readme": "",
        "adapter/adapter_config.json": '{"base_model_name_or_path": "/gone"}',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="latin-1")
    commands = json.dumps([command for command, _ in REFUSED])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=commands, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    messages, loaded = json.loads(done.stdout)
    for (command, reason), message in zip(REFUSED, messages, strict=True):
        assert reason in message, command
        assert "\n" not in message
    assert loaded == []
    assert "loading torch" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command, options",
    [
        (pretrain_command, PretrainOptions),
        (finetune_command, FinetuneOptions),
        (distill_command, DistillOptions),
    ],
    ids=["pretrain", "finetune", "distill"],
)
def test_the_shell_has_the_defaults_of_python(command: click.Command, options: type[TrainingOptions]) -> None:
    flags = {flag.name: flag.default for flag in command.params}
    assert {field.name: flags[field.name] for field in fields(options)} == vars(options())


def test_a_choice_that_does_not_exist_is_refused_in_python() -> None:
    with pytest.raises(TrainingError, match="--optimizer must be one of muon, adamw, got sgd"):
        PretrainOptions(optimizer="sgd")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.0])
def test_a_value_out_of_range_breaks_its_limit(value: float) -> None:
    assert Option("", above=0).limit_broken_by(value) == "more than 0"
