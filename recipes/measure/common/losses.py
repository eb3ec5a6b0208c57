"""Held-out loss over time."""


class Curve:
    """Held-out loss over the seconds of training, from the log of one run."""

    def __init__(self, points: list[dict[str, float]]) -> None:
        self.points = points

    def seconds_to(self, loss: float) -> float | None:
        """When the loss was first as low as this, interpolated; None: never."""
        before = self.points[0]
        for point in self.points:
            if point["loss"] <= loss:
                if point is before:
                    return point["seconds"]
                share = (before["loss"] - loss) / (before["loss"] - point["loss"])
                return before["seconds"] + share * (point["seconds"] - before["seconds"])
            before = point
        return None

    def at_step(self, step: int) -> dict[str, float]:
        return next(point for point in self.points if point["step"] == step)
