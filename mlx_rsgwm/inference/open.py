"""Opening a pipeline: the one way from a drafter and a verifier, wherever they are, to answers.

Both adapters are read, what they record is compared before any weight of the base is loaded (the role each was merged
for, the pool, the template, the base), the base is loaded once with both in slots, and the verifier's calibration
settles score and threshold. An adapter without a record (mlx-lm's own) can be used, and the user is told what nobody
knows then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.template import Template, find_template
from mlx_rsgwm.inference.calibration import (
    UNCALIBRATED_SCORE,
    Calibration,
    NothingToTellApart,
    score_and_threshold,
    stored_calibration,
)
from mlx_rsgwm.inference.identity import pipeline_identity
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.pair import VerifierSource, brief, check_pair, check_pool, load_verifier, other_base, roles_of
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.pool import check_rule
from mlx_rsgwm.inference.routed import RoutedDraftVerify, RoutedPool, load_routed
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter
from mlx_rsgwm.models.base import DEFAULT_BASE, Base, load_base, recorded_base, resolve_base
from mlx_rsgwm.models.base_folder import fingerprint_of
from mlx_rsgwm.models.fit_check import check_made_for, names_other_base, other_base_note
from mlx_rsgwm.models.slots import AdapterSlots

# What of a calibration's ``made_for`` an option of the same name sets.
OPTIONS = {"attempts", "temperature", "top_p", "max_tokens", "drafts", "layer"}


def open_pipeline(
    drafter: AdapterSource | None,
    verifier: VerifierSource | None = None,
    base: str | Path | Base | AdapterSlots | None = None,
    *,
    router: str | Path | None = None,
    template: str | Template | None = None,
    verify_template: str | Template | None = None,
    template_mismatch: str = "refuse",
    attempts: int = LoopConfig.attempts,
    score: str = "auto",
    threshold: float | Literal["auto"] = "auto",
    temperature: float = Sampling.temperature,
    top_p: float = Sampling.top_p,
    max_tokens: int = Sampling.max_tokens,
    seed: int = Sampling.seed,
    mode: str = LoopConfig.mode,
    abstain: bool = LoopConfig.abstain,
    check: str = "auto",
    drafts: str = LoopConfig.drafts,
    layer: int | None = None,
    combine: str = "max",
    calibration: Calibration | Literal["stored"] | None = "stored",
    calibrate: Callable[[DraftVerify], Calibration] | None = None,
    progress: Progress = SILENT,
) -> DraftVerify:
    """Load a base, a drafter and a verifier that belong together, ready to answer.

    Args:
        drafter, verifier: as for :func:`~mlx_rsgwm.models.adapter_sources.load_adapter`; without a verifier the bare
            base judges. Several verifiers, or a folder of them, read each draft together.
        router: a pool's folder with a router in it (:func:`~mlx_rsgwm.inference.routing.fit_router`): its adapters
            draft, each on the questions that are its own, and ``drafter`` where none is sure; that may then be None.
        base: Hub id, folder, ``.gguf`` file, alias, or a loaded base; None: the one that the adapters record. With the
            slots of a base the pair comes to lie beside the adapters there, each by its content hash.
        template: the prompt template (``plain``, ``chat``, or one of your own); None: the one that the drafter was
            trained with. ``verify_template``: other words for the verifier's question.
        template_mismatch: where an adapter was trained with another template, ``refuse`` or ``warn``.
        attempts: drafts in all, the first included.
        score, threshold: ``auto`` takes those of ``calibration``, by default the one stored beside the verifier;
            without one what ``calibrate`` returns, called with the pipeline; without either the paper's reading
            (mean_logprob, 0.7), and says so.
        temperature, top_p, max_tokens, seed: of the drafts; see :class:`~mlx_rsgwm.inference.sampling.Sampling`.
        check: ``auto`` does not accept a draft that states a false equation where its answer is a number,
            ``arithmetic`` wherever it does, ``none`` leaves it to the verifier.
        drafts: ``sampled``, ``grafted`` (the first ``attempts`` of eight grafted chains) or ``mixed`` (those once every
            sampled draft was rejected); ``layer``: the one that is grafted. See
            :mod:`~mlx_rsgwm.inference.grafting`.
        mode, abstain: see :class:`~mlx_rsgwm.inference.policy.LoopConfig`.
        combine: what several verifiers say together: ``max``, ``mean``, or ``learned`` by the calibration.
        progress: told what is odd about the pair, its calibration and its base.

    Raises:
        AdapterError: an adapter that cannot be read or does not fit the base.
        RsgwmError: no pair, no base, no template, or a setting out of range.

    Example::

        pipeline = rs.open_pipeline("runs/demo/drafter", "runs/demo/verifier")
        print(pipeline.answer("Ada has 12 pens and gets 7 more. How many pens does Ada have now?").text)
    """
    shared = base if isinstance(base, AdapterSlots) else None
    base = base.base if isinstance(base, AdapterSlots) else base
    named = base.name if isinstance(base, Base) else base
    routed = None if router is None else load_routed(router, named, progress)
    drafting, verifying = _load_pair(_first_drafter(drafter, routed), verifier, named, progress)
    check_rule(combine, len(verifying))
    first_score, first_threshold = score_and_threshold(score, threshold, None)
    config = LoopConfig(
        attempts,
        first_threshold,
        first_score,
        Sampling(temperature, top_p, max_tokens, seed),
        mode,
        abstain,
        check,
        drafts,
        layer,
    )
    if calibration == "stored":
        calibration, needed = stored_calibration(verifying, combine), True
    else:
        needed = calibration is not None
    if calibration is not None and "auto" in (score, threshold):
        calibration.require_both_classes(", ".join(adapter.where for adapter in verifying) or "the bare base")
    spoken = template_of([drafting], template)
    asked_in = find_template(verify_template) if isinstance(verify_template, str) else verify_template
    if not isinstance(base, Base):
        base = load_base_for([drafting, *verifying], None if base is None else str(base), progress)
    judges = roles_of(verifying)
    options = (config, asked_in, template_mismatch, calibration, combine)
    beside = judges if routed is None else routed.beside(judges)
    slots, place = _placed(shared or base, {"drafter": drafting, **beside})
    verifiers = [place[name] for name in judges]
    if routed is None:
        pipeline = DraftVerify(slots, spoken, place["drafter"], verifiers, *options)
    else:
        merged = None if drafter is None else "drafter"
        pipeline = RoutedDraftVerify(slots, spoken, routed.router, merged, verifiers, *options, place=place)
    for warning in (*pipeline.warnings, *_calibration_doubts(pipeline)):
        progress.warning(f"warning: {warning}")
    pipeline = pipeline.with_config(_settled(pipeline, config, score, threshold, calibrate, progress))
    if needed:
        pipeline.scorer(pipeline.config.score)  # a learned rule that was never fitted is refused before any draft
    return pipeline


def _placed(base: Base | AdapterSlots, adapters: Mapping[str, Adapter]) -> tuple[AdapterSlots, dict[str, str]]:
    """Slots with the adapters, and the slot of each: its own name on a base that has no slots yet, its content hash
    among others."""
    if isinstance(base, Base):
        return slots_of(base, adapters), {name: name for name in adapters}
    place = {name: adapter.content_hash() for name, adapter in adapters.items()}
    for name, adapter in adapters.items():
        if place[name] not in base.names():
            base.load(place[name], adapter)
    return base, place


def _first_drafter(drafter: AdapterSource | None, routed: RoutedPool | None) -> AdapterSource:
    if drafter is not None:
        return drafter
    if routed is None:
        raise RsgwmError("no drafter: name one, or a router whose adapters draft")
    return next(iter(routed.adapters.values()))


def _load_pair(
    drafter: AdapterSource, verifier: VerifierSource | None, base: str | Path | None, progress: Progress
) -> tuple[Adapter, tuple[Adapter, ...]]:
    """``drafter`` and the adapters that verify, known to belong together; what is odd about them is told."""
    drafting = load_adapter(drafter, base, progress=progress)
    verifying = load_verifier(verifier, None if base is None else str(base), progress)
    doubts = check_pair(drafting, *verifying) if len(verifying) == 1 else []
    for doubt in check_pool(drafting, verifying) if len(verifying) > 1 else doubts:
        progress.warning(f"warning: {doubt}")
    return drafting, verifying


def slots_of(base: Base, adapters: Mapping[str, AdapterSource]) -> AdapterSlots:
    """Slots on ``base`` with each of the adapters, read where it is not loaded yet, under its name.

    Raises:
        AdapterError: one of them cannot be read, or does not fit.
    """
    slots = AdapterSlots(base)
    for name, source in adapters.items():
        slots.load(name, load_adapter(source, base.name))
    return slots


def template_of(adapters: Sequence[Adapter], given: str | Template | None = None) -> Template:
    """The ``given`` template, else the one that the first of ``adapters`` which records any was trained with.

    Raises:
        RsgwmError: none of that name, or none is recorded.
    """
    if given is not None:
        return find_template(given) if isinstance(given, str) else given
    recorded = [adapter.manifest["template"] for adapter in adapters if adapter.manifest.get("template")]
    if not recorded:
        names = ", ".join(adapter.where for adapter in adapters)
        said = f"{names} does not say" if len(adapters) == 1 else f"none of {names} says"
        raise RsgwmError(f"{said} which prompt template it was trained with; give --template")
    return Template.from_description(recorded[0])


def _calibration_doubts(pipeline: DraftVerify) -> list[str]:
    """What of the pipeline the verifier's calibration was not made for."""
    calibration = pipeline.calibration
    if calibration is None:
        return []
    doubts = settings_doubts(pipeline)
    bound = calibration.risk_bound
    if bound is not None and bound.check != pipeline.config.check:
        doubts.append(
            f"the verifier's risk bound was tested with --check {bound.check}, and drafts are now checked with "
            f"{pipeline.config.check}; it may not hold here"
        )
    if not calibration.made_for:
        doubts.append("the verifier's calibration does not say which pair it was made for; see rsgwm calibrate")
    return doubts


def settings_doubts(pipeline: DraftVerify) -> list[str]:
    """A sentence on what differs from the pipeline that was calibrated, if anything does."""
    calibration = pipeline.calibration
    changed = {} if calibration is None else _changed_since(calibration, pipeline_identity(pipeline))
    if not changed:
        return []
    options = changed.keys() <= OPTIONS  # the rest are hashes
    named = ", ".join(_told(name, was, now, options) for name, (was, now) in changed.items())
    given = {name: was for name, (was, _) in changed.items() if was is not None}
    same = " ".join(f"--{name.replace('_', '-')} {was}" for name, was in given.items())
    return [
        f"the verifier was calibrated with another {named}; its threshold and what its scores mean may not hold "
        f"here; {f'take {same}, or ' if options and same else ''}calibrate again with: rsgwm calibrate"
    ]


def _told(name: str, was: object, now: object, values: bool) -> str:
    told = "kind of drafts" if name == "drafts" else name
    return f"{told} ({was}, now {now})" if values else told


def _changed_since(calibration: Calibration, identity: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """What differs from the pipeline that was calibrated: as it was and as it is, by name."""
    names = calibration.differences(identity)
    return {name: (calibration.recorded[name], identity[name]) for name in names}


def _settled(
    pipeline: DraftVerify,
    config: LoopConfig,
    score: str,
    threshold: float | Literal["auto"],
    calibrate: Callable[[DraftVerify], Calibration] | None,
    progress: Progress,
) -> LoopConfig:
    """``config`` with score and threshold as they were asked for, by a calibration that is made where one is needed."""
    if score == "auto" and pipeline.calibration is None and calibrate is not None:
        try:
            pipeline.calibration = calibrate(pipeline)
        except NothingToTellApart as error:
            progress.message(f"warning: {error}")
    if score == "auto" and pipeline.calibration is None:
        progress.message(f"the verifier is not calibrated: its score is {UNCALIBRATED_SCORE}")
    score, threshold = score_and_threshold(score, threshold, pipeline.calibration)
    return replace(config, threshold=threshold, score=score)


def load_base_for(adapters: Sequence[Adapter], given: str | None, progress: Progress = SILENT) -> Base:
    """The base that :func:`find_base` names, loaded."""
    return load_base(find_base(adapters, given, progress), progress=progress)


def find_base(adapters: Sequence[Adapter], given: str | None, progress: Progress = SILENT) -> str:
    """The name of the base that ``adapters`` record, or the ``given`` one once it is known to be that.

    Raises:
        RsgwmError: adapters of several bases, a base that is not the recorded one (its fingerprint differs), or none
            to be found.
    """
    made_for = [candidate for candidate in adapters if candidate.base_fingerprint is not None]
    if any(other_base(made_for[0], candidate) for candidate in made_for[1:]):
        told = ", ".join(f"{candidate.where} for {candidate.base_name} ({brief(candidate)})" for candidate in made_for)
        raise RsgwmError(f"adapters of different bases cannot be used together: {told}")
    recorded = [candidate for candidate in adapters if candidate.base_name]
    if given is None and recorded:
        name, folder = recorded_base(str(recorded[0].base_name), recorded[0].where, progress)
    else:
        name = given or DEFAULT_BASE
        if adapters and given is None:
            progress.message(f"{adapters[0].where} does not say what its base is; taking {name}, --base names another")
        folder = resolve_base(name, progress)
    fingerprint = fingerprint_of(folder)
    for adapter in adapters:
        check_made_for(adapter, name, fingerprint)
        if given is None and adapter.base_fingerprint is None and names_other_base(adapter, name):
            progress.warning(f"warning: {other_base_note(adapter, name)}")
    return name
