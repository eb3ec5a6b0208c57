"""What a run leaves behind besides the model: its losses over time, as JSON and as a picture."""

import json
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TimedLog(TrainerCallback):
    """Notes every log entry with the seconds since training began.

    Attributes:
        points: one dict per entry: ``seconds``, ``step`` and whatever was logged.
        seconds: wall-clock time of the training, evaluations during it included.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0
        self._start = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds = time.perf_counter() - self._start

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        elapsed = round(time.perf_counter() - self._start, 3)
        self.points.append({"seconds": elapsed, "step": state.global_step, **(logs or {})})


def write_results(file: Path, results: Any) -> None:
    """Write `results` as JSON; the file appears whole or not at all."""
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, file)


def draw_curve(points: list[dict[str, float]], title: str, file: Path, unit: str = "nats per token") -> bool:
    """Draw training and held-out loss (in `unit`) over time (seconds) into the PNG `file`.

    Returns:
        False, with a line saying how to install it, if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("No curve drawn, matplotlib is missing: pip install matplotlib")
        return False
    # A canvas of its own rather than pyplot: no display, and no global state.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o-")):
        chosen = [(point["seconds"], point[key]) for point in points if key in point]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="seconds", ylabel=f"loss ({unit})", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    return True
