"""The recipe for fine-tuning: its data, and runs with two workers."""

import json

from launching import ROOT, run
from peft import PeftModel
from sft import docstrings
from transformers import AutoModelForCausalLM

RECIPE = ROOT / "recipes" / "sft.py"
SHORT = ["--max_steps=4", "--per_device_train_batch_size=2", "--eval_strategy=no", "--logging_steps=2"]


def test_docstrings_are_split_by_file_into_prompt_and_completion(tmp_path):
    source = 'def add(a, b):\n    """Add two numbers.\n\n    Both are given.\n    """\n\n\ndef plain():\n    pass\n'
    for number in range(40):
        (tmp_path / f"file{number}.py").write_text(source)
    train, held_out = (list(docstrings(str(tmp_path), part)) for part in (False, True))
    assert len(train) + len(held_out) == 40
    assert len(train) > len(held_out) > 0
    assert train[0] == {"prompt": "def add(a, b):\n", "completion": '    """Add two numbers."""'}


def test_two_workers_train_a_model_and_then_adapters_of_it(hub_cache, tmp_path):
    model = tmp_path / "model"
    output = run(RECIPE, 2, [*SHORT, f"--output_dir={model}"], tmp_path, timeout=100).output
    assert "LayUp: steps by worker" in output
    assert "Held-out loss" in output
    assert "mean_token_accuracy" in output
    AutoModelForCausalLM.from_pretrained(model)

    data, adapters = tmp_path / "data", tmp_path / "adapters"
    data.mkdir()
    rows = [{"text": f"def f{number}(): pass"} for number in range(24)]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = [f"--model_name_or_path={model}", f"--dataset_name={data}", "--lora_rank=2", f"--output_dir={adapters}"]
    assert f"In {adapters}: the adapters." in run(RECIPE, 2, [*SHORT, *given], tmp_path, timeout=100).output
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapters)
    assert not (adapters / "model.safetensors").exists()
