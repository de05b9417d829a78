"""Whether a drafter and a verifier belong together, and the base that they were made for, before any weight is loaded.

Everything is compared by manifest: the role an adapter was merged for, the pool it came from, its template, its base.
An adapter without a manifest (mlx-lm's own) says nothing, and nothing is held against it.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import Base, load_base, resolve_base
from mlx_rsgwm.models.folder import base_difference, fingerprint_of
from mlx_rsgwm.models.slots import check_made_for

DEFAULT_BASE = "smollm2-135m"
ROLES = {"drafter": "draft", "verifier": "verify"}


def load_base_for(adapters: Sequence[Adapter], given: str | None, progress: Progress = SILENT) -> Base:
    """The base that :func:`find_base` names, loaded."""
    return load_base(find_base(adapters, given, progress), progress=progress)


def find_base(adapters: Sequence[Adapter], given: str | None, progress: Progress = SILENT) -> str:
    """The name of the base that ``adapters`` record, or the ``given`` one once it is known to be that.

    Raises:
        RsgwmError: adapters of several bases, a base that is not the recorded one (its fingerprint differs), or none
            to be found.
    """
    made_for = [one for one in adapters if one.base_fingerprint is not None]
    if any(_other_base(made_for[0], one) for one in made_for[1:]):
        told = ", ".join(f"{one.where} for {_base_name(one)} ({_brief(one)})" for one in made_for)
        raise RsgwmError(f"adapters of different bases cannot be used together: {told}")
    recorded = [name for one in adapters if (name := _base_name(one))]
    name = given or next(iter(recorded), None)
    if name is None:
        name = DEFAULT_BASE
        if adapters:
            progress.message(f"{adapters[0].where} does not say what its base is; taking {name}, --base names another")
    try:
        fingerprint = fingerprint_of(resolve_base(name, progress))
    except RsgwmError as error:
        if given is not None or not recorded:
            raise
        raise RsgwmError(
            f"the base that {adapters[0].where} records cannot be had; say where it is with --base ({error})"
        ) from None
    for adapter in adapters:
        check_made_for(adapter, name, fingerprint)
    return name


def _other_base(one: Adapter, other: Adapter) -> str:
    """In what the bases of two adapters differ; empty where they do not, or where one does not say."""
    recorded = one.base_fingerprint, other.base_fingerprint
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
    if _other_base(drafter, verifier):
        problems.append(
            f"{drafter.where} was made for {_base_name(drafter)} ({_brief(drafter)}) and {verifier.where} for "
            f"{_base_name(verifier)} ({_brief(verifier)})"
        )
    return problems


def pair_doubts(drafter: Adapter, verifier: Adapter) -> list[str]:
    """What a user should know of a pair that can be used: it is another one than merges of one pool make."""
    if drafter.path is not None and drafter.path == verifier.path:
        return [f"drafter and verifier are the same adapter, {drafter.where}"]
    drafted, verified = _sources(drafter), _sources(verifier)
    if drafted and verified and set(drafted) != set(verified):
        return [
            f"drafter and verifier come from different pools, or the pool was changed in between: {drafter.where} from "
            f"{_listed(drafted)}, {verifier.where} from {_listed(verified)}"
        ]
    if bool(drafted) != bool(verified) and drafter.manifest and verifier.manifest:
        merged, trained = (drafter, verifier) if drafted else (verifier, drafter)
        return [f"{merged.where} was merged from {_listed(drafted or verified)}, {trained.where} was not merged"]
    return []


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
    listed = [one for one in sources if isinstance(one, dict)] if isinstance(sources, list) else []
    return {str(one.get("manifest_sha256")): str(one.get("name")) for one in listed if one.get("manifest_sha256")}


def _listed(sources: dict[str, str]) -> str:
    return ", ".join(sources.values())


def _base_name(adapter: Adapter) -> str | None:
    name = (adapter.manifest.get("base") or {}).get("name")
    return name if isinstance(name, str) and name else None


def _brief(adapter: Adapter) -> str:
    return f"fingerprint {(adapter.base_fingerprint or '')[:12]}"
