"""The models that are served: a base, adapters on it, pairs; put in and taken out while others answer.

Slots are named by what their adapters hold, so that a name can be given to another adapter while rows of the former
are still written; what no model and no request uses is let go. What changes it happens in the engine's
thread; any may look models up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.inference.identity import pipeline_identity
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import open_pipeline, settings_doubts
from mlx_rsgwm.inference.pair import VerifierSource, load_verifier
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.routed import RoutedDraftVerify
from mlx_rsgwm.inference.speaker import spoken_template
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.tokenizer import embedding_rows
from mlx_rsgwm.serving.errors import ModelNotFound, RequestError
from mlx_rsgwm.serving.events import time_of_day
from mlx_rsgwm.serving.grammar import Grammars

NAME = "lora_name"  # what requests call a model's name that is loaded or unloaded


@dataclass(frozen=True)
class AdapterSum:
    """Adapters that are added for a request: the models that it names, and how often each slot counts."""

    models: tuple[ServedModel, ...]
    weights: Mapping[str, float]

    @property
    def slot(self) -> str | None:
        """Of the sum: an adapter's where it is that alone, None where nothing is left of any."""
        if list(self.weights.values()) == [1.0]:
            return next(iter(self.weights))
        return " + ".join(f"{weight!r}·{slot}" for slot, weight in self.weights.items()) or None


@dataclass(frozen=True)
class Pair:
    """A drafter and its verifiers, and what is settled when they are opened; the rest a request may say.

    ``router``: a pool whose router chooses what drafts, and ``drafter`` only where none is sure. The others are as in
    :func:`~mlx_rsgwm.inference.open.open_pipeline`.
    """

    drafter: AdapterSource
    verifier: VerifierSource
    router: str | Path | None = None
    drafts: str = LoopConfig.drafts
    layer: int | None = None
    combine: str = "max"
    check: str = "auto"


@dataclass(eq=False)
class ServedModel:
    """A name that requests may give. ``slot``: of what answers alone, None for the bare base; ``pipeline``: of a pair.

    ``slots``: all that it uses. ``warnings``: what is odd about it; ``differing``: what its calibration was not made
    for, by the names of a pipeline's identity. ``users``: requests under way; ``removed``: it is named no more.
    ``sum``: what a request adds to it, which has no name.
    """

    name: str
    kind: str
    template: Template
    end_ids: frozenset[int]
    slot: str | None = None
    slots: tuple[str, ...] = ()
    pipeline: DraftVerify | None = None
    details: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    created: int = field(default_factory=time_of_day)
    users: int = 0
    removed: bool = False
    sum: AdapterSum | None = None


class Noted(Progress):
    """Keeps warnings, for who asks later, and hands everything on."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.warnings: list[str] = []

    def message(self, text: str) -> None:
        """Hand it on."""
        self._progress.message(text)

    def warning(self, text: str) -> None:
        """Keep it without its first word, and hand it on."""
        self.warnings.append(text.removeprefix("warning: "))
        self._progress.warning(text)


class Library:
    """Models by name on one resident base; ``most`` adapters beside it."""

    def __init__(self, base: Base, most: int = 64) -> None:
        self.base, self.most = base, most
        self.slots = AdapterSlots(base)
        self.base_bytes: int = self.slots.memory()["base"]
        self.vocabulary = embedding_rows(base.model) or len(base.tokenizer.get_vocab())
        self.tokenizer = base.tokenizer
        self.grammars = Grammars(base.tokenizer, self.vocabulary)
        self._nameless: list[ServedModel] = []  # removed models and sums, while requests use them
        template = spoken_template(None, self.tokenizer, None, "")
        self.bare = ServedModel(base.name, "base", template, self.end_ids(template))
        self._models = {base.name: self.bare}  # replaced, never changed: any thread may read it

    def end_ids(self, template: Template) -> frozenset[int]:
        """The tokens that end a text written with a template."""
        ids = {*self.tokenizer.eos_token_ids, self.tokenizer.eos_token_id} - {None}
        return frozenset(ids) | template.stop_ids(self.tokenizer)

    def models(self) -> list[ServedModel]:
        """All that are served, the base first."""
        return list(self._models.values())

    def find(self, name: str, param: str = "model") -> ServedModel:
        """The model of exactly that name, which ``param`` of a request gives; ``base:adapter`` is the adapter.

        Raises:
            ModelNotFound: there is none.
        """
        models = self._models
        model = models.get(name) or models.get(name.removeprefix(f"{self.base.name}:"))
        if model is None:
            raise ModelNotFound(name, ", ".join(list(models)[:20]), param)
        return model

    def with_added(self, model: ServedModel, added: Sequence[tuple[str, float]]) -> ServedModel:
        """The base or an adapter plus adapters by name, each times its scale; its own counts once, if it is not named.

        Raises:
            ModelNotFound: one is not served.
            RequestError: one cannot be added, or is named twice.
        """
        if not added:
            return model
        scales = {} if model is self.bare else {model: 1.0}
        named = [self.find(name, "lora") for name, _ in added]
        for part, (name, scale) in zip(named, added, strict=True):
            if part.kind != "adapter":
                raise RequestError(f"lora: {name!r} is not an adapter", code="invalid_value", param="lora")
            if named.count(part) > 1:
                raise RequestError(f"lora names {name!r} twice", code="invalid_value", param="lora")
            scales[part] = scale
        weights: dict[str, float] = {}  # two names may have one slot
        for part, scale in scales.items():
            slot = str(part.slot)
            weights[slot] = weights.get(slot, 0.0) + scale
        chosen = AdapterSum(tuple(scales), {slot: weight for slot, weight in sorted(weights.items()) if weight})
        doras = [part.name for part, scale in scales.items() if scale and part.details["fine_tune_type"] == "dora"]
        if doras and chosen.slot not in (None, *chosen.weights):
            message = f"{doras[0]!r} is a DoRA, which cannot be scaled or added to others"
            raise RequestError(message, code="unsupported_parameter", param="lora")
        slots = (*chosen.weights, *([chosen.slot] if chosen.slot else []))
        return replace(model, slot=chosen.slot, slots=slots, sum=chosen, users=0)

    def add_adapter(self, name: str, adapter: Adapter, digest: str) -> ServedModel:
        """Serve an adapter, whose content hash is ``digest``, under a name; what had the name before answers its
        requests to their ends.

        Raises:
            AdapterError: it does not fit the base.
            RequestError: a name that cannot be given, or more adapters than may be.
        """
        self.check_name(name)
        self.check_is_adapter(name)
        template = spoken_template(adapter, self.tokenizer, None, "")
        end_ids = self.end_ids(template)
        self.hold({digest: adapter})
        details = {
            "fine_tune_type": adapter.spec.fine_tune_type,
            "rank": adapter.spec.rank,
            "scale": adapter.spec.scale,
            "bytes": sum(value.nbytes for value in adapter.weights.values()),
            "sha256": digest,
            "root": adapter.name or name,
        }
        return self.put(ServedModel(name, "adapter", template, end_ids, digest, (digest,), details=details))

    def add_pair(self, name: str, pair: Pair, progress: Progress = SILENT) -> ServedModel:
        """Serve a drafter and a verifier under a name; what the pair leaves open is as in ``rsgwm ask``.

        Raises:
            RsgwmError: no pair, or of another base; whatever reading raises.
        """
        self.check_name(name)
        noted = Noted(progress)
        drafting = load_adapter(pair.drafter, self.base.name, progress=noted)
        verifying = load_verifier(pair.verifier, self.base.name, noted)
        pipeline = open_pipeline(
            drafting,
            verifying,
            self.slots,
            router=pair.router,
            drafts=pair.drafts,
            layer=pair.layer,
            combine=pair.combine,
            check=pair.check,
            progress=noted,
        )
        slots = tuple(slot for slot in (*pipeline.drafters, *pipeline.verifiers) if slot is not None)
        judges = {adapter.content_hash(): adapter.name for adapter in verifying}  # a slot may have another's name
        details = {
            "drafter": {"name": drafting.name, "sha256": pipeline.drafter},
            "verifier": [{"name": judges[slot], "sha256": slot} for slot in pipeline.verifiers],
            "calibrated": pipeline.calibration is not None,
            "threshold": pipeline.config.threshold,
            "score": pipeline.config.score,
            "drafts": pipeline.config.drafts,
            "bytes": sum(self.slots.nbytes()[slot] for slot in set(slots)),
        }
        if isinstance(pipeline, RoutedDraftVerify):
            drafters = [{"name": each, "sha256": slot} for each, slot in pipeline.place.items()]
            details["router"] = {"sha256": pipeline.router.digest(), "drafters": drafters}
        model = ServedModel(name, "verified", pipeline.template, pipeline.end_ids, slots[0], slots, pipeline, details)
        # What differs from the calibration's settings is told of each request, which may name them.
        warnings = [warning for warning in noted.warnings if warning not in settings_doubts(pipeline)]
        model.warnings = tuple(_by_names(warning, (drafting, *verifying)) for warning in warnings)
        if pipeline.calibration is not None:
            model.differing = tuple(pipeline.calibration.differences(pipeline_identity(pipeline)))
        return self.put(model)

    def put(self, model: ServedModel) -> ServedModel:
        """Serve a model whose slots are filled, in the place of one that has its name."""
        former = self._models.get(model.name)
        self._models = {**self._models, model.name: model}
        if former is not None:
            self._retire(former)
        return model

    def check_name(self, name: str) -> None:
        """Refuse the base's name, one that says nothing or stands for ``base:adapter``, and one model more than may be.

        Raises:
            RequestError: it cannot be given.
        """
        if name == self.base.name:
            raise RequestError(f"{name!r} is the base; give the adapter another name", 400, "name_taken", NAME)
        if name.startswith(f"{self.base.name}:"):
            known = name.removeprefix(f"{self.base.name}:")
            raise RequestError(
                f"{name!r} stands for {known!r} on the base; leave the base out", 400, "name_taken", NAME
            )
        if not name.strip() or len(name) > 200 or not name.isprintable():
            raise RequestError("a model's name has 1 to 200 printable characters", 400, "invalid_name", NAME)
        if name not in self._models and len(self._models) > self.most:
            raise RequestError(f"{self.most} models are served already; unload one first", code="too_many_adapters")

    def check_is_adapter(self, name: str) -> None:
        """Refuse what came as a verified pair, whose name promises that its answers are checked; unknown names pass.

        Raises:
            RequestError: it stays as long as the server runs.
        """
        model = self._models.get(name) or self._models.get(name.removeprefix(f"{self.base.name}:"))
        if model is not None and model.kind == "verified":
            raise RequestError(f"{model.name!r} is a verified pair, which stays as it is", 400, "name_taken", NAME)

    def hold(self, adapters: Mapping[str, Adapter]) -> None:
        """Load adapters, by their content hashes, where no model has them yet.

        Raises:
            AdapterError: one does not fit; nothing is held then that was not before.
        """
        try:
            for slot, adapter in adapters.items():
                if slot not in self.slots.names():
                    self.slots.load(slot, adapter)
        except RsgwmError:
            self.tidy()
            raise

    def remove(self, name: str) -> ServedModel:
        """Serve a model no more; requests under way are answered to their ends.

        Raises:
            ModelNotFound: there is none.
            RequestError: it is the base.
        """
        model = self.find(name)
        if model is self.bare:
            raise RequestError("the base cannot be unloaded", 400, "base_model", NAME)
        self._models = {name: other for name, other in self._models.items() if other is not model}
        self._retire(model)
        return model

    def begin(self, model: ServedModel) -> None:
        """A request under way uses a model.

        Raises:
            ModelNotFound: it was removed since, or an adapter that is added to it.
        """
        for each in (model, *(model.sum.models if model.sum else ())):
            if each.removed:
                raise ModelNotFound(each.name)
        if model.sum is not None and not model.users:
            if model.slot not in (None, *self.slots.names(), *self.slots.sums()):
                self.slots.add(str(model.slot), model.sum.weights)
            self._nameless.append(model)
        model.users += 1

    def end(self, model: ServedModel) -> None:
        """The request is over."""
        model.users -= 1
        if model.removed or model.sum is not None:
            self.tidy()

    def _retire(self, model: ServedModel) -> None:
        model.removed = True
        self._nameless.append(model)
        self.tidy()

    def tidy(self) -> None:
        """Let go of slots that no model and no request uses."""
        self._nameless = [model for model in self._nameless if model.users]
        used = {slot for model in (*self._models.values(), *self._nameless) for slot in model.slots}
        for slot in [slot for slot in (*self.slots.names(), *self.slots.sums()) if slot not in used]:
            self.slots.unload(slot)


def _by_names(text: str, adapters: Sequence[Adapter]) -> str:
    """What is said of adapters without their folders, which are nobody's business who asks."""
    for where in sorted({adapter.where for adapter in adapters}, key=len, reverse=True):
        text = text.replace(where, PurePath(where).name)
    return text
