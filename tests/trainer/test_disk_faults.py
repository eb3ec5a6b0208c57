"""Disks that are full or read-only, really: the reason is told, and earlier checkpoints stay."""

import contextlib

import pytest
from mounting import can_mount, mounted, remount
from stock import arguments, gpt2, text
from transformers import TrainerCallback

from layup_hf import LayupTrainer

pytestmark = pytest.mark.skipif(not can_mount(), reason="needs the right to mount")

FULL = "The disk is full: free some space there"
READ_ONLY = "The file system is read-only: write somewhere else"


class Spoils(TrainerCallback):
    """Spoils the disk at the third step, when there is one checkpoint."""

    def __init__(self, folder, fault):
        self.folder, self.fault = folder, fault

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            while not (self.folder / "checkpoint-2").exists():
                pass  # it is being written in the background
            if self.fault == FULL:
                fill(self.folder)
            else:
                remount(self.folder, "ro")


def fill(folder):
    with (folder / "of somebody").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


@pytest.mark.parametrize("fault", [FULL, READ_ONLY])
@pytest.mark.parametrize("checkpoints", ["wait", "background"])
def test_a_checkpoint_that_cannot_be_written(tmp_path, checkpoints, fault):
    with mounted(tmp_path / "disk", "size=64m") as folder:
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 100, "checkpoints": checkpoints}
        trainer = LayupTrainer(
            model=gpt2(),
            args=arguments(folder, **options),
            train_dataset=text(),
            callbacks=[Spoils(folder, fault)],
        )
        with pytest.raises(Exception) as error:  # noqa: PT011 # each library has its own
            trainer.train()
        said = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
        assert fault in said
        assert trainer.state.global_step < 10
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
        assert f"in {folder} are" in said


@pytest.mark.parametrize("fault", [FULL, READ_ONLY])
def test_a_trace_that_cannot_be_written(tmp_path, caplog, fault):
    with mounted(tmp_path / "disk", "size=1m") as folder:
        (folder / "checkpoint-2").mkdir()  # what the callback waits for
        args = arguments(tmp_path / "out", trace=str(folder / "trace.json"), max_steps=5)
        LayupTrainer(model=gpt2(), args=args, train_dataset=text(), callbacks=[Spoils(folder, fault)]).train()
    (message,) = [message for message in caplog.messages if "the trace could not be written" in message]
    assert fault.lower() in message


def test_a_trace_that_will_not_be_written_is_refused_at_once(tmp_path):
    refused = pytest.raises(ValueError, match=f"nothing can be written in .*, as {READ_ONLY.lower()}")
    with mounted(tmp_path / "disk", "ro") as folder, refused:
        arguments(tmp_path / "out", trace=str(folder / "trace.json"))
