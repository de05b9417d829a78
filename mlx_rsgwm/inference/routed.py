"""The draft–verify loop over a pool: a router chooses for every question the adapter that drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.inference.draft import Draft, Step
from mlx_rsgwm.inference.loop import DraftVerify, Watch
from mlx_rsgwm.inference.pair import ROLES
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.routing import Route, Router
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import load_adapter
from mlx_rsgwm.models.prompt_states import StateReader
from mlx_rsgwm.models.slots import AdapterSlots

T = TypeVar("T")
ROUTER_FILE = "router.safetensors"
MOST_KNOWN = 10_000  # questions whose routes are remembered


@dataclass(frozen=True)
class RoutedPool:
    """A router and the adapters that it chooses among, by their names."""

    router: Router
    adapters: Mapping[str, Adapter]

    def beside(self, judges: Mapping[str, Adapter]) -> dict[str, Adapter]:
        """Slots of both: an adapter of one name in both is one.

        Raises:
            RsgwmError: two different adapters of one name, or one that is called as a role is.
        """
        if taken := self.adapters.keys() & set(ROLES):
            raise RsgwmError(f"a router's adapter cannot be called {min(taken)}; rename its folder and fit again")
        for name in self.adapters.keys() & judges.keys():
            if self.adapters[name].weights_hash() != judges[name].weights_hash():
                raise RsgwmError(f"the router's pool and the verifiers have different adapters named {name}")
        return {**judges, **self.adapters}


def save_router(router: Router, pool: Path, adapters: Sequence[Adapter]) -> Path:
    """Write the router of the ``adapters`` in the folder ``pool`` with what tells them from others; its path."""
    hashes = {adapter.name: adapter.weights_hash() for adapter in adapters}
    replace(router, about={**router.about, "adapters": hashes}).save(pool / ROUTER_FILE)
    return pool / ROUTER_FILE


def load_routed(pool: str | Path, base: str | Path | None, progress: Progress = SILENT) -> RoutedPool:
    """The router in a pool's folder, and the adapters in it that the router names.

    Raises:
        RsgwmError: no router there, an adapter that is missing, cannot be read, or is another than it was fitted for.
    """
    folder = files.expanded(str(pool))
    if not (folder / ROUTER_FILE).is_file():
        raise RsgwmError(f"{folder} has no router; make one: rsgwm pool route {folder}")
    router = Router.load(folder / ROUTER_FILE)
    outside = [name for name in router.names if Path(name).name != name or not (folder / name).is_dir()]
    if outside:
        raise RsgwmError(f"the router of {folder} chooses among adapters that are not there: {', '.join(outside)}")
    adapters = {name: load_adapter(folder / name, base, progress=progress) for name in router.names}
    fitted = router.about.get("adapters", {})  # routers from before have none
    others = [name for name, adapter in adapters.items() if fitted and fitted.get(name) != adapter.weights_hash()]
    if others:
        raise RsgwmError(
            f"{folder}: {', '.join(others)} is not what the router was fitted for; fit it again: "
            f"rsgwm pool route {folder} --replace"
        )
    return RoutedPool(router, adapters)


class RoutedDraftVerify(DraftVerify):
    """As :class:`DraftVerify`, but the drafter of a question is the slot that ``router`` names, and below the router's
    margin the slot ``merged`` (None: there is none, and the router's first choice drafts).

    Every drafter's questions are drafted together. The verifier, the calibration and the settings are one for all.
    ``options``: what :class:`DraftVerify` takes besides. ``place``: the slot of each drafter, the merged one too, by
    its name; None: its name.

    Raises:
        RsgwmError: an adapter of the router without a slot, another base or template than the router was fitted with.
    """

    def __init__(
        self,
        slots: AdapterSlots,
        template: Template,
        router: Router,
        merged: str | None,
        verifier: str | Sequence[str] | None,
        config: LoopConfig,
        *options: Any,
        place: Mapping[str, str] | None = None,
    ) -> None:
        names = (*router.names, *([merged] if merged else ()))
        place = {name: name for name in names} if place is None else place
        missing = [name for name in router.names if place.get(name) not in slots.names()]
        if missing:
            raise RsgwmError(f"the router chooses among adapters that are not in the pool: {', '.join(missing)}")
        router.require(slots.base, template)
        super().__init__(slots, template, place[merged or router.names[0]], verifier, config, *options)
        self.router, self.merged, self.place = router, merged, {name: place[name] for name in names}
        self._by_drafter = {
            name: DraftVerify(slots, template, place[name], verifier, config, *options) for name in names
        }
        self.warnings = list(dict.fromkeys(line for each in self._by_drafter.values() for line in each.warnings))
        self._states = StateReader(slots.base, router.layer)
        self._known: dict[str, Route] = {}

    def with_config(self, config: LoopConfig) -> RoutedDraftVerify:
        """The same adapters and router on the same base with other settings."""
        other = super().with_config(config)
        assert isinstance(other, RoutedDraftVerify)
        other._by_drafter = {name: each.with_config(config) for name, each in self._by_drafter.items()}
        for each in other._by_drafter.values():
            each.calibration = self.calibration  # which may have been made since they were
        return other

    def drafter_hashes(self, hash_of: Callable[[Adapter], str]) -> dict[str, str]:
        """All that may draft by their hashes, and how one of them is chosen."""
        hashes = {name: hash_of(self.slots.adapter(str(each.drafter))) for name, each in self._by_drafter.items()}
        return hashes | {"router": self.router.digest()}

    @property
    def drafters(self) -> tuple[str | None, ...]:
        """The slots that may draft."""
        return tuple(dict.fromkeys(each.drafter for each in self._by_drafter.values()))

    def of_question(self, question: str) -> DraftVerify:
        """The pipeline of the question's drafter."""
        (name,) = self.drafters_of([question])
        return self._by_drafter[name]

    def routes(self, questions: Sequence[str]) -> list[Route]:
        """The router's choice for each question; one that was asked before is not read again."""
        if len(self._known) > MOST_KNOWN:
            self._known.clear()  # a server is asked for ever
        new = [text for text in dict.fromkeys(questions) if text not in self._known]
        if new:
            with self.slots.using(None):
                states = self._states.states([self.prompt(text) for text in new])
            self._known.update(zip(new, self.router.routes(states), strict=True))
        return [self._known[text] for text in questions]

    def drafters_of(self, questions: Sequence[str]) -> list[str]:
        """The name of what drafts on each question."""
        return [
            self.merged if self.merged is not None and route.margin < self.router.margin else route.name
            for route in self.routes(questions)
        ]

    def steps(self, question: str, watch: Watch | None = None) -> Iterator[Step]:
        """As :meth:`DraftVerify.steps`, by the question's drafter."""
        yield from self.of_question(question).steps(question, watch)

    def steps_many(self, questions: Sequence[str], batch_rows: int = 32) -> Iterator[tuple[int, Step]]:
        """As :meth:`DraftVerify.steps_many`, the questions of one drafter after those of another."""
        yield from self._by_each(questions, lambda pipeline, texts: pipeline.steps_many(texts, batch_rows))

    def drafts_as_they_end(
        self, questions: Sequence[str], attempts: int, batch_rows: int = 32
    ) -> Iterator[tuple[int, list[Draft]]]:
        """As :meth:`DraftVerify.drafts_as_they_end`, the questions of one drafter after those of another."""
        yield from self._by_each(
            questions, lambda pipeline, texts: pipeline.drafts_as_they_end(texts, attempts, batch_rows)
        )

    def _by_each(
        self, questions: Sequence[str], made: Callable[[DraftVerify, Sequence[str]], Iterator[tuple[int, T]]]
    ) -> Iterator[tuple[int, T]]:
        chosen = self.drafters_of(questions)
        for name, pipeline in self._by_drafter.items():
            places = [index for index, drafter in enumerate(chosen) if drafter == name]
            for index, value in made(pipeline, [questions[place] for place in places]) if places else ():
                yield places[index], value
