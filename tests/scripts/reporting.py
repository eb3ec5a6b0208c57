"""Trains with reports to TensorBoard and Trackio; notes what was logged, and every connection that Python made."""

import os
import sys
from pathlib import Path

connections = []


def is_of_job():
    """Whether it is the store of the job that is started or spoken to."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith(
        ("layup_hf/fleet/store.py", "layup_hf/fleet/job.py")
    ):
        frame = frame.f_back
    return frame is not None


def note_connections(event, arguments):
    if event in ("socket.bind", "socket.connect") and not is_of_job():
        connections.append(f"{event} {arguments[1]}")


sys.addaudithook(note_connections)

from stock import arguments, gpt2, text  # noqa: E402 - the hook comes first
from worker import write_result  # noqa: E402

from layup_hf import LayupTrainer  # noqa: E402

folder = Path(os.environ["LAYUP_TEST_RESULTS"])
config = arguments(
    folder / "out",
    report_to=["tensorboard", "trackio"],
    run_name="parity",
    max_steps=8,
    eval_strategy="steps",
    eval_steps=4,
)
trainer = LayupTrainer(model=gpt2(), args=config, train_dataset=text(), eval_dataset=text(6))
trainer.train()
result = {"logs": trainer.state.log_history, "connections": connections}
write_result(config.process_index, result)
trainer.end()
