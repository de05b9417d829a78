"""Importance: Adam's second moment of every parameter (a proxy of the diagonal Fisher), kept for each role as well.

s = sqrt(v / (1 - beta2^t)) with v the exponential moving average of squared gradients. The gradients are
those of the loss, before clipping and weight decay. Steps of a role update only ``all`` and that role's moments, so
``draft`` and ``verify`` are what Adam would hold had it seen those batches alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from mlx_rsgwm.models.adapter import SIGNALS


class Importance:
    """Second moments in float32 for every signal, each of the trained parameters' shapes."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], beta2: float) -> None:
        self.beta2 = beta2
        self.steps = dict.fromkeys(SIGNALS, 0)
        self.moments = {signal: {name: mx.zeros(shape) for name, shape in shapes.items()} for signal in SIGNALS}

    def update(self, role: str, gradients: Mapping[str, mx.array]) -> None:
        """Take one step's gradients (lazily: the caller evaluates ``moments`` with the rest of the step)."""
        squares = {name: mx.square(gradient.astype(mx.float32)) for name, gradient in gradients.items()}
        for signal in ("all", role):
            self.steps[signal] += 1
            moments = self.moments[signal]
            for name, square in squares.items():
                moments[name] = self.beta2 * moments[name] + (1 - self.beta2) * square

    def copy(self) -> Importance:
        """The state as it is now; arrays are shared, since they are never changed in place."""
        twin = Importance({}, self.beta2)
        twin.steps = dict(self.steps)
        twin.moments = {signal: dict(moments) for signal, moments in self.moments.items()}
        return twin

    def state(self, prefix: str) -> dict[str, mx.array]:
        """The raw moments under ``{prefix}{signal}/{parameter}``, for a checkpoint."""
        return {
            f"{prefix}{signal}/{name}": moment
            for signal, moments in self.moments.items()
            for name, moment in moments.items()
        }

    def restore(self, arrays: Mapping[str, mx.array], prefix: str, steps: Mapping[str, int]) -> None:
        """Take up what :meth:`state` gave, and the steps that went into it."""
        self.steps = {signal: steps[signal] for signal in SIGNALS}
        for signal, moments in self.moments.items():
            self.moments[signal] = {name: arrays[f"{prefix}{signal}/{name}"] for name in moments}

    def arrays(self) -> dict[str, mx.array]:
        """``{signal}/{parameter}`` → s, float32 of the parameter's shape, for the signals that saw a step."""
        return {
            f"{signal}/{name}": mx.sqrt(moment / (1 - self.beta2**steps))
            for signal, steps in self.steps.items()
            if steps
            for name, moment in self.moments[signal].items()
        }

    def metadata(self) -> dict[str, str]:
        """What ``importance.safetensors`` says about itself."""
        return {
            "beta2": repr(self.beta2),
            "bias_correction": "true",
            "source": "training gradients before clipping and weight decay",
            **{f"steps/{signal}": str(steps) for signal, steps in self.steps.items()},
        }
