"""The recipe for learning from rewards: two workers, by LayUp and by TRL's own trainer."""

import os
import re
from pathlib import Path

from launching import ROOT, run
from transformers import AutoModelForCausalLM

RECIPE = ROOT / "recipes" / "grpo.py"
SHORT = ["--max_steps=2", "--per_device_train_batch_size=4", "--num_generations=4", "--max_completion_length=6"]
SHORT += ["--per_device_eval_batch_size=32", "--pretraining_steps=2", "--logging_steps=1", "--disable_tqdm=true"]


def test_two_workers_learn_by_either_trainer_from_one_model(tmp_path):
    for trainer in ("layup", "ddp"):
        folder = tmp_path / trainer
        options = [*SHORT, f"--trainer={trainer}", f"--output_dir={folder}", "--straggler=rank=1,compute=0.1"]
        output = run(RECIPE, 2, options, tmp_path, timeout=150).output
        assert re.search(r"Reward on held-out prompts: \d\.\d+ before, \d\.\d+ after\. \d+ completions per", output)
        assert output.count("LayUp: steps by worker") == (2 if trainer == "layup" else 0)  # it is made once
        assert "rewards/different_statements/mean" in output
        AutoModelForCausalLM.from_pretrained(folder)
    assert len(list(Path(os.environ["HF_HOME"], "layup").glob("functions-*"))) == 1
