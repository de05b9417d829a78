"""Whether a drafter and a verifier belong together, by what they record; and what a verifier of several adapters is."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.files import sha256_file
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.models.adapter import MANIFEST_FILE, Adapter
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapters
from mlx_rsgwm.models.base_folder import base_difference
from mlx_rsgwm.models.slots import AdapterSlots

ROLES = {"drafter": "draft", "verifier": "verify"}
VerifierSource = AdapterSource | Sequence[AdapterSource]


def load_verifier(
    source: VerifierSource | None, base: str | None = None, progress: Progress = SILENT
) -> tuple[Adapter, ...]:
    """The adapters that verify, none for the bare base; one given twice is told, and reads once.

    Args:
        source: one or several, each as for :func:`~mlx_rsgwm.models.adapter_sources.load_adapters`: a folder whose
            subfolders are adapters stands for them.
        base: the base that adapters of other formats are read for.
        progress: told of pools and of adapters given twice.

    Raises:
        RsgwmError: no adapter at all; whatever reading raises.
    """
    sources: list[AdapterSource] = (
        [] if source is None else [source] if isinstance(source, AdapterSource) else [*source]
    )
    if source is not None and not sources:
        raise RsgwmError("the verifier is a list without an adapter; name at least one")
    loaded = load_adapters(sources, base, progress=progress)
    if len(loaded) < 2:
        return tuple(loaded)
    adapters: dict[tuple[str | None, ...], Adapter] = {}
    for adapter in loaded:
        # One that says it is for another base or role is looked at by itself, and refused.
        content = (adapter.weights_hash(), str(adapter.spec.scale), adapter.base_fingerprint, merge_role(adapter))
        if content in adapters:
            same = adapters[content].where
            progress.warning(f"warning: {adapter.where} and {same} are the same adapter, which verifies once")
        adapters.setdefault(content, adapter)
    return tuple(adapters.values())


def roles_of(verifiers: Sequence[Adapter]) -> dict[str, Adapter]:
    """The adapters that verify by what they are called beside the drafter, which are also their slots.

    A single verifier is ``verifier``; of several each has its own name, or where that tells them not apart, its path.
    """
    if len(verifiers) == 1:
        return {"verifier": verifiers[0]}
    for names in ([adapter.name for adapter in verifiers], [adapter.where for adapter in verifiers]):
        if all(names) and len({*names, *ROLES}) == len(names) + len(ROLES):
            return dict(zip(names, verifiers, strict=True))
    return {f"verifier {number}": adapter for number, adapter in enumerate(verifiers, 1)}


def check_pool(drafter: Adapter, verifiers: Sequence[Adapter]) -> list[str]:
    """:func:`check_pair` for a verifier of several adapters, which a merged drafter is expected to be merged from.

    Raises:
        RsgwmError: every problem of the drafter with any of them.
    """
    problems = [problem for adapter in verifiers for problem in pair_problems(drafter, adapter)]
    raise_problems("these cannot draft and verify together", list(dict.fromkeys(problems)), RsgwmError)
    doubts = _unrecorded([drafter, *verifiers])
    sources = _sources(drafter)
    strangers = [adapter.where for adapter in verifiers if _manifest_hash(adapter) not in sources]
    if sources and strangers and not doubts:
        doubts = [
            f"{drafter.where} was merged from {_listed(sources)}; {', '.join(strangers)} "
            f"{'is' if len(strangers) == 1 else 'are'} not among them, or changed since"
        ]
    return doubts


def _manifest_hash(adapter: Adapter) -> str:
    file = adapter.path / MANIFEST_FILE if adapter.path is not None else None
    return sha256_file(file) if file is not None and file.is_file() else ""


def other_base(adapter: Adapter, other: Adapter) -> str:
    """In what the bases of two adapters differ; empty where they do not, or where one does not say."""
    recorded = adapter.base_fingerprint, other.base_fingerprint
    return base_difference(recorded[0], recorded[1], chat=False) if recorded[0] and recorded[1] else ""


def pair_problems(drafter: Adapter, verifier: Adapter) -> list[str]:
    """Why these two cannot be the pair that is asked for; empty where nothing speaks against it."""
    roles = {"drafter": merge_role(drafter), "verifier": merge_role(verifier)}
    folders = {"drafter": drafter.where, "verifier": verifier.where}
    if (roles["drafter"], roles["verifier"]) == ("verify", "draft"):
        return [f"drafter and verifier are swapped: {drafter.where} was merged to verify, {verifier.where} to draft"]
    problems = [
        f"{folders[name]} was merged to {roles[name]}, not to {wanted}; give another --{name}"
        for name, wanted in ROLES.items()
        if roles[name] in ROLES.values() and roles[name] != wanted
    ]
    if other_base(drafter, verifier):
        problems.append(
            f"{drafter.where} was made for {drafter.base_name} ({brief(drafter)}) and {verifier.where} for "
            f"{verifier.base_name} ({brief(verifier)})"
        )
    return problems


def pair_doubts(drafter: Adapter, verifier: Adapter) -> list[str]:
    """What a user should know of a pair that can be used: it is another one than merges of one pool make."""
    places = [adapter.path or adapter.origin for adapter in (drafter, verifier)]
    if places[0] is not None and places[0] == places[1]:
        return [f"drafter and verifier are the same adapter, {drafter.where}"]
    drafted, verified = _sources(drafter), _sources(verifier)
    if drafted and verified and set(drafted) != set(verified):
        return [
            f"drafter and verifier come from different pools, or the pool was changed in between: {drafter.where} from "
            f"{_listed(drafted)}, {verifier.where} from {_listed(verified)}"
        ]
    if doubts := _unrecorded([drafter, verifier]):
        return doubts
    if bool(drafted) != bool(verified):
        merged, trained = (drafter, verifier) if drafted else (verifier, drafter)
        return [f"{merged.where} was merged from {_listed(drafted or verified)}, {trained.where} was not merged"]
    return []


def _unrecorded(adapters: Sequence[Adapter]) -> list[str]:
    """The doubt about adapters that do not say how they were made; none where all do."""
    if unknown := [adapter.where for adapter in adapters if not _has_record(adapter)]:
        return [
            f"{' and '.join(unknown)} {'has' if len(unknown) == 1 else 'have'} no record of training or merging, so "
            "that nobody can tell whether drafter and verifier belong together and were trained with the same prompts"
        ]
    return []


def _has_record(adapter: Adapter) -> bool:
    """Whether its manifest says how it was made; what only names a base says nothing of that."""
    return any(adapter.manifest.get(name) for name in ("merge", "template", "data"))


def check_pair(drafter: Adapter, verifier: Adapter) -> list[str]:
    """Doubts to tell, once there is no problem.

    Raises:
        RsgwmError: every problem of the pair.
    """
    raise_problems("these two are not a pair", pair_problems(drafter, verifier), RsgwmError)
    return pair_doubts(drafter, verifier)


def merge_role(adapter: Adapter) -> str | None:
    """The role an adapter was merged for; None where it was not, or its manifest does not say."""
    merged = adapter.manifest.get("merge")
    role = merged.get("role") if isinstance(merged, dict) else None
    return role if isinstance(role, str) else None


def _sources(adapter: Adapter) -> dict[str, str]:
    """Names of the adapters it was merged from, by the hash of their manifests."""
    merged = adapter.manifest.get("merge")
    sources = merged.get("sources") if isinstance(merged, dict) else None
    listed = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    return {
        str(source.get("manifest_sha256")): str(source.get("name"))
        for source in listed
        if source.get("manifest_sha256")
    }


def _listed(sources: dict[str, str]) -> str:
    return ", ".join(sources.values())


def brief(adapter: Adapter) -> str:
    """The base that an adapter was trained on, by the first 12 digits of its fingerprint, for messages."""
    return f"fingerprint {(adapter.base_fingerprint or '')[:12]}"


def template_mismatches(
    slots: AdapterSlots, drafter: str | None, verifiers: Sequence[str], drafts: Template, verifies: Template
) -> list[str]:
    """Which adapter in its slot was trained with another template than it drafts or verifies with."""
    mismatches = []
    uses: list[tuple[str, str | None, Template]] = [("drafter", drafter, drafts)]
    for verifier in verifiers:
        uses.append(("verifier" if len(verifiers) == 1 else f"verifier {verifier}", verifier, verifies))
    for role, name, used in uses:
        trained_with = slots.adapter(name).template_hash if name is not None else None
        if trained_with is not None and trained_with != used.hash:
            mismatches.append(
                f"the {role} was trained with another prompt template than {used.name!r} "
                f"({trained_with[:12]} against {used.hash[:12]})"
            )
    return mismatches
