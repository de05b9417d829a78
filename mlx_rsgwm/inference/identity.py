"""What a pipeline's drafts and scores depend on, described once, and the part of it that a calibration holds for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlx_rsgwm.inference.draft import SAMPLED
from mlx_rsgwm.models.adapter import Adapter

if TYPE_CHECKING:
    from mlx_rsgwm.inference.loop import DraftVerify


def describe_pipeline(pipeline: DraftVerify, hash_of: Callable[[Adapter], str] = Adapter.files_hash) -> dict[str, Any]:
    """Base, adapters by ``hash_of`` them, both prompts and the loop's settings, as JSON values.

    Not ``check``: a report replays the loop with one on the same drafts. Of the kind of drafts nothing where they are
    sampled, so that runs of earlier versions go on.
    """
    slots = pipeline.slots
    verifiers = {name: hash_of(slots.adapter(name)) for name in pipeline.verifiers}
    several = len(verifiers) > 1
    without = ("check", "drafts", "layer") if pipeline.config.drafts == SAMPLED else ("check",)
    return {
        "base": slots.base.fingerprint,
        "adapters": {
            "drafter": pipeline.drafter_hashes(hash_of),
            "verifier": verifiers if several else next(iter(verifiers.values()), None),
            **({"combine": pipeline.combine} if several else {}),
        },
        "template": pipeline.template.describe(),
        "verify_template": pipeline.verify_template.describe(),
        "loop": {name: value for name, value in asdict(pipeline.config).items() if name not in without},
    }


def pipeline_identity(pipeline: DraftVerify) -> dict[str, Any]:
    """What a calibration holds for: base, prompts, adapters by the SHA-256 of their weights, sampling, attempts.

    So do the kind of drafts and where they are not sampled the layer that is grafted.
    ``template`` is the verifier's prompt; ``draft_template``, the drafter's, is missing from calibrations of earlier
    versions, which therefore cannot say whether it is another.
    """
    described = describe_pipeline(pipeline, Adapter.weights_hash)
    adapters, sampling = described["adapters"], described["loop"]["sampling"]
    verifier = adapters["verifier"]
    return {
        "base": described["base"],
        "template": described["verify_template"]["hash"],
        "draft_template": described["template"]["hash"],
        **adapters,
        "verifier": list(verifier.values()) if isinstance(verifier, dict) else verifier,
        "attempts": described["loop"]["attempts"],
        **{name: sampling[name] for name in ("temperature", "top_p", "max_tokens")},
        "drafts": pipeline.config.drafts,
        **({} if pipeline.config.drafts == SAMPLED else {"layer": pipeline.config.layer}),
    }
