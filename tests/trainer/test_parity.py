"""One process: what a script or a callback sees of LayupTrainer is what it sees of the stock Trainer."""

import gc
import inspect
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from stock import BOTH, arguments, gpt2, same, text
from transformers import EarlyStoppingCallback, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

MEASURED = ("runtime", "samples_per_second", "steps_per_second", "preparation_time")


class Recorder(TrainerCallback):
    """Notes every event with all that comes with it."""

    def __init__(self):
        self.events = []


def _recording(event):
    def record(self, args, state, control, **given):
        values = {
            name: list(value) if isinstance(value, dict) else type(value).__name__ for name, value in given.items()
        }
        self.events.append((event, state.global_step, state.epoch, dict(vars(control)), values))

    return record


for _event in dir(TrainerCallback):
    if _event.startswith("on_"):
        setattr(Recorder, _event, _recording(_event))


class Wishes(TrainerCallback):
    """Sets flags of `control` at given steps: {(event, step): (flag, ...)}."""

    def __init__(self, wishes):
        self.wishes = wishes

    def on_step_end(self, args, state, control, **kwargs):
        self._set("on_step_end", state, control)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._set("on_epoch_begin", state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._set("on_epoch_end", state, control)

    def _set(self, event, state, control):
        for flag in self.wishes.get((event, state.global_step), ()):
            setattr(control, flag, True)


@dataclass
class Case:
    """A training: options, callbacks, and from what checkpoint it goes on."""

    options: dict[str, Any]
    callbacks: Callable[[], list[TrainerCallback]] = list
    resume: str | None = None
    steps: int = 6
    """Where it ends, and below, events that must have come: so that the case shows what it is for."""
    events: set[str] = field(default_factory=set)


STEPS = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
EPOCHS = {"max_steps": -1, "num_train_epochs": 2.0, "logging_strategy": "epoch", "save_strategy": "epoch"}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 1}
CASES = {
    "steps": Case({**STEPS, "logging_first_step": True, "eval_delay": 3}, events={"on_evaluate", "on_save"}),
    "epochs": Case({**EPOCHS, "eval_strategy": "epoch", "gradient_accumulation_steps": 3}, events={"on_substep_end"}),
    "evaluation first": Case({"eval_on_start": True, "max_steps": 2}, steps=2, events={"on_evaluate"}),
    "flags": Case(
        {**EPOCHS, "num_train_epochs": 3.0, "logging_strategy": "no", "save_strategy": "no"},
        lambda: [
            Wishes(
                {
                    ("on_step_end", 1): ["should_log"],
                    ("on_step_end", 2): ["should_evaluate", "should_save"],
                    ("on_step_end", 3): ["should_epoch_stop"],
                    ("on_epoch_end", 3): ["should_evaluate"],
                    ("on_step_end", 5): ["should_training_stop", "should_save"],
                }
            )
        ],
        steps=5,
        events={"on_log", "on_evaluate", "on_save"},
    ),
    "early stopping": Case(
        {**STEPS, **BEST, "max_steps": 20},
        lambda: [EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=9.0)],
        steps=6,
    ),
    "best": Case({**STEPS, **BEST, "save_strategy": "best", "learning_rate": 1.0}, events={"on_save"}),
    "resumed": Case({**STEPS, "gradient_accumulation_steps": 2}, resume="checkpoint-4"),
    "resumed at the epoch's beginning": Case({**STEPS, "ignore_data_skip": True}, resume="checkpoint-4"),
    "resumed with callbacks": Case(
        {**STEPS, **BEST, "save_total_limit": None, "restore_callback_states_from_checkpoint": True},
        lambda: [EarlyStoppingCallback(early_stopping_patience=5)],
        resume="checkpoint-4",
    ),
}


@dataclass
class Run:
    """What is left of a training."""

    trainer: Trainer
    output: Any
    events: list
    folder: Path


def train(cls, config, folder, case):
    recorder = Recorder()
    for resume in (None, case.resume) if case.resume else (None,):
        recorder.events.clear()
        trainer = cls(
            model=gpt2(),
            args=arguments(folder, config, **case.options),
            train_dataset=text(),
            eval_dataset=text(6),
            callbacks=[recorder, *case.callbacks()],
        )
        output = trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    trainer.save_model()
    trainer.save_state()
    return Run(trainer, output, list(recorder.events), folder)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """The same training by LayupTrainer and by the Trainer."""
    case = CASES[request.param]
    # The folder's name is in some of the values compared, so both runs have the same one.
    runs = [train(*kind, tmp_path_factory.mktemp("run") / "out", case) for kind in BOTH]
    assert case.events <= {event for event, *_ in runs[0].events}
    assert runs[0].output.global_step == case.steps
    return runs


def test_events(pair):
    ours, theirs = pair
    assert ours.events == theirs.events
    assert [ours.events[place][0] for place in (0, 1, -1)] == ["on_init_end", "on_train_begin", "on_train_end"]


def test_return_value(pair):
    ours, theirs = (run.output for run in pair)
    assert type(ours) is type(theirs)
    assert list(ours.metrics) == list(theirs.metrics)
    assert (ours.global_step, ours.training_loss) == (theirs.global_step, theirs.training_loss)


def without_times(entries):
    return [{key: value for key, value in entry.items() if not key.endswith(MEASURED)} for entry in entries]


def test_log_history(pair):
    """Entry by entry the same keys, LayUp's own figures being none of them, and the same values."""
    ours, theirs = (run.trainer.state.log_history for run in pair)
    assert [list(entry) for entry in ours] == [list(entry) for entry in theirs]
    for entry, other in zip(without_times(ours), without_times(theirs), strict=True):
        norms = [norm.pop("grad_norm", 0.0) for norm in (entry, other)]
        assert entry == other
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_model(pair):
    ours, theirs = (run.trainer.model for run in pair)
    assert same(ours, theirs)
    assert not same(ours, gpt2())


def test_files(pair):
    ours, theirs = (sorted(str(path.relative_to(run.folder)) for path in run.folder.rglob("*")) for run in pair)
    assert ours == theirs
    for name in ours:
        if name.endswith("trainer_state.json"):
            state, other = (json.loads((run.folder / name).read_text()) for run in pair)
            for one in (state, other):
                del one["log_history"]
                one["best_model_checkpoint"] = one["best_model_checkpoint"] and Path(one["best_model_checkpoint"]).name
            assert state == other


def test_saved_model_is_the_model(pair):
    ours, _ = pair
    assert same(GPT2LMHeadModel.from_pretrained(ours.folder), ours.trainer.model)


def test_the_stock_trainer_goes_on_from_every_checkpoint(pair, tmp_path):
    ours, _ = pair
    for checkpoint in ours.folder.glob("checkpoint-*"):
        step = int(checkpoint.name.split("-")[1])
        args = arguments(tmp_path, TrainingArguments, max_steps=step + 1, logging_strategy="no")
        stock = Trainer(model=gpt2(seed=1), args=args, train_dataset=text())
        assert stock.train(resume_from_checkpoint=str(checkpoint)).global_step == step + 1
        assert stock.optimizer.state_dict()["state"][0]["step"] == step + 1


# ---- Outside of training ----


def test_evaluation_and_prediction(tmp_path):
    """Without and after training; a dictionary of data sets, one by name, and one given."""
    seen = []
    for cls, config in BOTH:
        recorder = Recorder()
        sets = {"first": text(6), "second": text(9)}
        args = arguments(tmp_path, config, per_device_eval_batch_size=4, include_for_metrics=["inputs", "loss"])
        trainer = cls(
            model=gpt2(),
            args=args,
            train_dataset=text(),
            eval_dataset=sets,
            compute_metrics=lambda p: {"sum": p.predictions.sum(), "count": len(p.losses) + len(p.inputs)},
            callbacks=[recorder],
        )
        results = []
        for _ in range(2):
            results += [
                trainer.evaluate(),
                trainer.evaluate("second"),
                trainer.evaluate(text(3), metric_key_prefix="x"),
            ]
            prediction = trainer.predict(text(5))
            results.append(prediction.metrics)
            trainer.train()
        seen.append((type(prediction), prediction, without_times(results), [list(r) for r in results], recorder.events))
    (kind, ours, *rest), (other_kind, theirs, *other_rest) = seen
    assert kind is other_kind
    assert (ours.predictions == theirs.predictions).all()
    assert (ours.label_ids == theirs.label_ids).all()
    assert rest == other_rest


def test_signatures():
    (ours, our_config), (theirs, their_config) = BOTH
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert inspect.signature(ours.__init__) == inspect.signature(theirs.__init__)
    options, others = (list(inspect.signature(config).parameters) for config in (our_config, their_config))
    assert options[: len(others)] == others  # LayUp's own come last


def test_nothing_keeps_a_trainer_alive(tmp_path):
    """As the Trainer's, its memory is free as soon as nobody refers to it, not when cycles are next collected."""
    for cls, config in BOTH:
        trainer = cls(model=gpt2(), args=arguments(tmp_path, config), train_dataset=text())
        trainer.train()
        gc.disable()
        left = [weakref.ref(thing) for thing in (trainer, trainer.model, trainer.optimizer.optimizer)]
        del trainer
        alive = [thing() for thing in left]
        gc.enable()
        assert alive == [None] * 3
