"""The recipe as a whole: its options, what it leaves behind, and a run with two workers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpt2 import DEFAULTS, STEPS, DataArguments, ModelArguments, parse_arguments, prepare, tokens_per_step
from launching import ROOT, run
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPE = ROOT / "recipes" / "gpt2.py"
TINY = ["--block_size", "32", "--vocab_size", "300", "--config_overrides", "n_layer=1,n_embd=16,n_head=2"]
TINY += ["--max_eval_blocks", "19"]  # not a multiple of the batch


def test_without_arguments_the_recipe_has_its_own_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_args, data_args, args = parse_arguments([])
    assert (model_args.trainer, data_args.train_file, args.max_steps) == ("layup", None, STEPS)
    assert args.learning_rate == DEFAULTS["learning_rate"]


def test_the_command_line_overrides_every_default(tmp_path):
    given = [
        "--output_dir",
        str(tmp_path),
        "--learning_rate",
        "0.5",
        "--peers_per_step",
        "1",
        "--save_strategy",
        "epoch",
    ]
    args = parse_arguments(given)[2]
    assert (args.learning_rate, args.peers_per_step, args.save_strategy) == (0.5, 1, "epoch")


@pytest.mark.parametrize(("given", "expected"), [([], (STEPS, 1)), (["--max_steps", "7"], (7, 1))])
def test_steps_count(tmp_path, given, expected):
    args = parse_arguments([*given, "--output_dir", str(tmp_path)])[2]
    assert (args.max_steps, args.num_train_epochs) == expected


def test_epochs_asked_for_are_not_cut_short_by_the_default_steps(tmp_path):
    args = parse_arguments(["--num_train_epochs", "2", "--output_dir", str(tmp_path)])[2]
    assert (args.max_steps, args.num_train_epochs) == (-1, 2)


def test_tokens_per_step_count_accumulated_batches(tmp_path):
    given = ["--output_dir", str(tmp_path), "--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "4"]
    args = parse_arguments([*given, "--use_cpu"])[2]
    assert tokens_per_step(args, 10) == 120 * args.world_size


def test_help_names_the_options():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, RECIPE, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert result.returncode == 0, result.stderr
    assert all(option in result.stdout for option in ("--train_file", "--peers_per_step", "--learning_rate"))
    assert "accelerate launch --multi_gpu --num_processes 2 recipes/gpt2.py\n" in result.stdout
    groups = [result.stdout.index(f"\n{name}:\n") for name in ("model", "text")]
    groups.append(result.stdout.index("\ntraining: all of TrainingArguments, and then the options of LayUp:\n"))
    assert groups == sorted(groups)
    assert "--clip {auto,estimate,exact}" in result.stdout


@pytest.mark.parametrize(
    ("model_options", "data_options", "message"),
    [
        ({}, {"block_size": 10**6}, r"tokens, less than one block of 1000000"),
        ({"config_overrides": "n_positions=8"}, {"block_size": 16}, "more than the model's 8 positions"),
        ({"config_overrides": "layers=2"}, {}, "no option 'layers'"),
        ({}, {"text_column": "body"}, "No column 'body'"),
        ({"vocab_size": 10}, {}, "257 or more"),
    ],
)
def test_bad_options_are_refused_before_training(hub_cache, text_file, model_options, data_options, message):
    with pytest.raises(ValueError, match=message):
        prepare(ModelArguments(**model_options), DataArguments(train_file=str(text_file), **data_options), seed=1)


@pytest.mark.parametrize("trainer", ["ddp", "layup"])
def test_two_workers_train_a_model_that_loads(hub_cache, tmp_path, text_file, trainer):
    folder = tmp_path / "output"
    given = ["--trainer", trainer, "--max_steps", "5", "--output_dir", str(folder), "--train_file", str(text_file)]
    given += ["--straggler", "rank=1,compute=0.3"]
    output = run(RECIPE, 2, [*given, *TINY], tmp_path, timeout=100, forked=trainer == "ddp").output

    assert output.count("2 worker(s) on") == 1
    assert "Held-out loss" in output
    results = json.loads((folder / "results.json").read_text())
    assert (results["trainer"], results["world_size"], results["steps"]) == (trainer, 2, 5)
    assert results["tokens_seen"] == 5 * 2 * DEFAULTS["per_device_train_batch_size"] * 32
    assert results["perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert results["points"][-1]["eval_loss"] == results["eval_loss"]
    seconds = [point["seconds"] for point in results["points"]]
    assert seconds == sorted(seconds)
    if trainer == "ddp":
        assert results["seconds"] > 5 * 0.3  # every step waits for the straggler
    else:
        assert "LayUp: steps by worker" in output
    assert (folder / "curve.png").stat().st_size > 1000

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.n_layer == 1
    text = Path(text_file).read_text("utf-8")[:100]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
