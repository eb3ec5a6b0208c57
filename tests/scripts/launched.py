"""Trains a little, however its workers have been started, and writes what a test wants to know.

python launched.py FOLDER                  a worker that `torchrun` or a scheduler has started
python launched.py FOLDER notebook PORT    starts two workers by accelerate's `notebook_launcher`
python launched.py FOLDER ray              starts two workers by Ray Train's `TorchTrainer`
"""

import json
import os
import sys
import time
from pathlib import Path


def main(folder: str, callbacks: tuple = (), **options: object) -> None:
    from stock import arguments, gpt2, text  # here, as in a notebook: nothing is to touch a device before
    from worker import same_everywhere, write_result

    from layup_hf import LayupTrainer
    from layup_hf.fleet.started import launches

    class Together(LayupTrainer):
        """No worker makes all the steps before the other has made one, so that there is something to merge."""

        def training_step(self, *args: object, **kwargs: object) -> object:
            loss = super().training_step(*args, **kwargs)
            ledger, end = self.layup.exchange.ledger, time.monotonic() + 60
            while self.layup.state.steps_done == 1 and min(ledger.done) < 1 and time.monotonic() < end:
                time.sleep(0.01)
            return loss

    args = arguments(Path(folder), max_steps=8, ddp_backend="gloo", **options)
    data = {"train_dataset": text(64), "eval_dataset": text(8)}
    trainer = Together(model=gpt2(), args=args, callbacks=list(callbacks), **data)
    output = trainer.train()
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    result = {
        "rank": args.process_index,
        "workers": args.world_size,
        "launches": launches(),
        "has_lease": trainer.layup.members.membership is not None,
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "global_step": output.global_step,
        "merges": logged["layup/merges"],
        "mass": logged["layup/mass"],
        "same": all(same_everywhere(parameter.detach()) for parameter in trainer.model.parameters()),
        "eval_loss": trainer.evaluate()["eval_loss"],
    }
    write_result(args.process_index, result)
    print(json.dumps(result), flush=True)


def by_ray(folder: str) -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.huggingface.transformers import RayTrainReportCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    def loop() -> None:
        saved = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
        main(folder, (RayTrainReportCallback(),), **saved)

    temporary = os.path.join(os.environ["TMPDIR"], "ray")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=10**8, _temp_dir=temporary)
    workers = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
    run = RunConfig(name="run", storage_path=folder)
    result = TorchTrainer(loop, torch_config=TorchConfig("gloo"), scaling_config=workers, run_config=run).fit()
    saved = sorted(path.name for path in Path(result.checkpoint.path, "checkpoint").iterdir())
    reported = {"step": result.metrics["step"], "eval_loss": result.metrics["eval_loss"], "saved": saved}
    Path(folder, "reported.json").write_text(json.dumps(reported))
    ray.shutdown()


if __name__ == "__main__":
    if sys.argv[2:] == ["ray"]:
        by_ray(sys.argv[1])
    elif sys.argv[2:3] == ["notebook"]:
        from accelerate import notebook_launcher

        notebook_launcher(main, (sys.argv[1],), num_processes=2, use_port=sys.argv[3])
    else:
        main(sys.argv[1])
