"""Trains a little, however its workers have been started, and writes what a test wants to know.

python launched.py FOLDER                  a worker that `torchrun` or a scheduler has started
python launched.py FOLDER notebook PORT    starts two workers by accelerate's `notebook_launcher`
"""

import json
import os
import sys
from pathlib import Path


def main(folder: str) -> None:
    from stock import arguments, gpt2, text  # here, as in a notebook: nothing is to touch a device before
    from worker import same_everywhere, write_result

    from layup_hf import LayupTrainer
    from layup_hf.fleet.started import launches

    args = arguments(Path(folder), max_steps=8, ddp_backend="gloo")
    trainer = LayupTrainer(model=gpt2(), args=args, train_dataset=text(64), eval_dataset=text(8))
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


if __name__ == "__main__":
    if sys.argv[2:3] == ["notebook"]:
        from accelerate import notebook_launcher

        notebook_launcher(main, (sys.argv[1],), num_processes=2, use_port=sys.argv[3])
    else:
        main(sys.argv[1])
