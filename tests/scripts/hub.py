"""Trains a tiny GPT-2, pushes it to the Hub at HF_ENDPOINT, which fails as told, and writes down what happened.

Several cases, with `--then` between their options, run one after the other in the same processes.
"""

import hashlib
import json
import os
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import http_backoff
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, TrainerCallback
from worker import run_cases

from layup_hf import LayupConfig, LayupTrainer
from layup_hf.trainer import hollow

http_backoff.__kwdefaults__.update(max_retries=1, base_wait_time=0.05)  # the same retries, sooner over


@dataclass
class HubConfig(LayupConfig):
    """`LayupConfig` with faults of the Hub to be made."""

    faults: str = "{}"
    """JSON: what the Hub's faults are from a step on; step 0 is before the trainer is made."""
    waits: bool = True
    """Whether the faults change only when the push in progress has ended."""
    final_push: str = "blocking"
    """How push_to_hub() is called at the end: blocking, future or not."""
    wait_at: int = -1
    """Step at which rank 0 waits until the Hub holds a request."""


def ask(what, **request):
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/{what}", **request).close()


def set_faults(faults):
    ask("faults", data=json.dumps(faults).encode(), timeout=30)


class Observer(TrainerCallback):
    def __init__(self, config, result):
        self.config, self.result, self.faults = config, result, json.loads(config.faults)

    def on_step_end(self, args, state, control, **kwargs):
        self.result["times"][state.global_step] = time.time()
        if args.process_index == 0 and state.global_step == self.config.wait_at:
            ask("held")
        if args.process_index == 0 and str(state.global_step) in self.faults:
            if self.config.waits:
                self.trainer._finish_current_push()
            set_faults(self.faults[str(state.global_step)])
        time.sleep(0.01)

    def on_save(self, args, state, control, **kwargs):
        if args.process_index == 0:
            weights = Path(args.output_dir, f"checkpoint-{state.global_step}", "model.safetensors")
            self.result["saved"][state.global_step] = hashlib.sha256(weights.read_bytes()).hexdigest()

    def on_push_begin(self, args, state, control, **kwargs):
        self.result["pushes"].append(state.global_step)


class InBackground(Observer):
    """Needs no complete checkpoint but to push it."""

    on_save = TrainerCallback.on_save

    def on_push_begin(self, args, state, control, **kwargs):
        super().on_push_begin(args, state, control, **kwargs)
        Observer.on_save(self, args, state, control)


class LateTrainer(LayupTrainer):
    """Rank 1 takes its time to write its part of a checkpoint."""

    def _save_rng_state(self, output_dir):
        if self.args.process_index == 1:
            time.sleep(0.1)
        super()._save_rng_state(output_dir)


def run_case(options):
    config = HfArgumentParser(HubConfig).parse_args_into_dataclasses(
        ["--use_cpu", "--report_to=none", "--disable_tqdm=True", "--max_steps=9", "--push_to_hub=True", *options]
    )[0]
    rank = config.process_index
    result = {"rank": rank, "times": {}, "saved": {}, "pushes": [], "error": "", "output_dir": config.output_dir}
    hollow._SMALL = 1 if config.checkpoints == "background" else 1 << 20  # as if the model were large
    observer = (InBackground if config.checkpoints == "background" else Observer)(config, result)
    if rank == 0:
        set_faults(observer.faults.get("0", []))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    )
    data = [{"input_ids": (torch.arange(16) + n) % 64, "labels": (torch.arange(16) + n) % 64} for n in range(64)]
    trainer = LateTrainer(model=model, args=config, train_dataset=data, callbacks=[observer])
    observer.trainer = trainer
    trainer.train()
    result["after_training"] = time.time()
    if config.final_push != "not":
        try:
            pushed = trainer.push_to_hub(blocking=config.final_push == "blocking")
            if rank == 0:
                result["pushed"] = (pushed if config.final_push == "blocking" else pushed.result()).oid
        except Exception as error:
            result["error"] = "\n".join([str(error), *error.__notes__])
    if rank == 0:
        trainer._finish_current_push()
        set_faults([])
        if trainer.hub_model_id is not None:
            revision = config.hub_revision or "main"
            downloaded = GPT2LMHeadModel.from_pretrained(trainer.hub_model_id, revision=revision).state_dict()
            own = trainer.model.state_dict()
            result["downloaded_is_model"] = all(torch.equal(downloaded[name], own[name]) for name in own)
        result["left"] = [path.name for path in Path(config.output_dir).glob("_*")]
    trainer.accelerator.wait_for_everyone()
    return result


run_cases(run_case)
