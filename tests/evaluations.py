"""Ways to evaluate and to predict, on which several workers and one process have to agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stock import text
from torch import Tensor, nn
from transformers import EvalPrediction

BATCH = 4
ROWS = text(32)
for number, row in enumerate(ROWS):  # rows, and so batches, have different numbers of tokens that count
    row["labels"] = row["labels"].masked_fill(torch.arange(8) < number % 5, -100)
EVEN, ODD = ROWS, ROWS[:21]
"""Sets whose lengths are, and are not, a multiple of what two or four workers take at once."""


def completed(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """With the last batch filled up from the beginning, as accelerate does it for several workers."""
    return rows + rows[: -len(rows) % BATCH]


def flat(parts: Any) -> np.ndarray:
    """One array, out of what may be one for each batch, or for each sample of each batch."""
    if isinstance(parts, np.ndarray):
        return parts
    return np.concatenate([batch if isinstance(batch, np.ndarray) else np.stack(batch) for batch in parts])


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits, labels = flat(prediction.predictions), flat(prediction.label_ids)
    hits, count = _hits(logits.argmax(-1), labels)
    return {"accuracy": hits / count, "rows": len(labels)}


def accuracy_of_choices(prediction: EvalPrediction) -> dict[str, float]:
    hits, count = _hits(prediction.predictions, prediction.label_ids)
    return {"accuracy": hits / count}


def of_inputs_and_losses(prediction: EvalPrediction) -> dict[str, float]:
    return {
        **accuracy(prediction),
        "inputs": prediction.inputs.sum(),
        "first_loss": prediction.losses[0],
        "losses": len(prediction.losses),
    }


class AccuracyByBatch:
    """Sees one batch at a time, of all workers together."""

    def __init__(self) -> None:
        self._hits = self._count = 0

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float] | None:
        hits, count = _hits(prediction.predictions.argmax(-1), prediction.label_ids)
        self._hits, self._count = self._hits + int(hits), self._count + int(count)
        if not compute_result:
            return None
        result = {"accuracy": self._hits / self._count, "tokens": self._count}
        self._hits = self._count = 0
        return result


def _hits(choices: Any, labels: Any) -> tuple[Any, Any]:
    """Right choices of the next token, and tokens to choose."""
    counts = labels[:, 1:] != -100
    return ((choices[:, :-1] == labels[:, 1:]) & counts).sum(), counts.sum()


@dataclass(frozen=True)
class Evaluation:
    """Options of the configuration, and arguments of the trainer."""

    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], dict[str, Any]] = lambda: {"compute_metrics": accuracy}


EVALUATIONS = {
    "loss alone": Evaluation(inputs=dict),
    "metrics": Evaluation(),
    "metrics by batch": Evaluation({"batch_eval_metrics": True}, lambda: {"compute_metrics": AccuracyByBatch()}),
    "choices instead of logits": Evaluation(
        inputs=lambda: {
            "compute_metrics": accuracy_of_choices,
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        }
    ),
    "inputs and losses": Evaluation(
        {"include_for_metrics": ["inputs", "loss"]}, lambda: {"compute_metrics": of_inputs_and_losses}
    ),
    "kept on the device for a batch": Evaluation({"eval_accumulation_steps": 1}),
    "batches apart": Evaluation({"eval_do_concat_batches": False}),
    "objects": Evaluation({"eval_use_gather_object": True, "eval_do_concat_batches": False}),
    "predictions left out": Evaluation({"prediction_loss_only": True}),
}

_TIMES = ("runtime", "per_second", "preparation_time")


def results(
    trainer_class: type, config: type, model: nn.Module, folder: Path, evaluation: Evaluation
) -> dict[str, Any]:
    """Metrics of both sets, of one by name, of one given, and a prediction with all that it returns."""
    args = config(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_eval_batch_size=BATCH,
        average_tokens_across_devices=False,  # as LayupTrainer has it
        **evaluation.options,
    )
    trainer = trainer_class(model=model, args=args, eval_dataset={"even": EVEN, "odd": ODD}, **evaluation.inputs())
    metrics = [trainer.evaluate(), trainer.evaluate("odd"), trainer.evaluate(ODD, metric_key_prefix="given")]
    prediction = trainer.predict(ODD)
    metrics.append(prediction.metrics)
    return {
        "metrics": [{key: value for key, value in one.items() if not key.endswith(_TIMES)} for one in metrics],
        "predictions": prediction.predictions,
        "label_ids": prediction.label_ids,
    }
