"""Runs of a comparison, as they are kept when they have been made."""

from recipes.measure.compare.comparison import make_run

SETTINGS = {
    "learning_rates": [1e-3, 2e-3],
    "seeds": [1, 2],
    "steps": 8,
    "workers": 2,
    "batch_size": 4,
    "block_size": 16,
    "hosts": None,
    "rate": "1gbit",
    "straggler": None,
}


def made(method, rate, seed, losses=(4.0, 3.0), **more):
    points = [{"samples": 32 * n, "seconds": 10.0 * n, "loss": loss} for n, loss in enumerate(losses, start=1)]
    figures = {"seconds": points[-1]["seconds"], "own_steps": [8, 8], "parameters": 1000, "bytes_per_step": 2e6}
    figures |= {"link_bytes_per_step": None, "waiting": 0.25, "failure": None}
    return {**make_run(method, rate, seed), "points": points, "loss": losses[-1], **figures, **more}


def memory(method, peak=2**20):
    return {**make_run(method, 1e-3, 1, memory=True), "failure": None, "peak_bytes": peak}
