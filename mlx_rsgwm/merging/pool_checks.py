"""What is wrong with the adapters of a pool, or odd about them, by what they record: no array is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_rsgwm.models.base_folder import base_difference
from mlx_rsgwm.models.token_layers import is_embedding

if TYPE_CHECKING:
    from mlx_rsgwm.merging.pool import PoolAdapter

SHOWN = 4  # modules of an adapter that shares none with another


def importance_remedy(source: PoolAdapter) -> str:
    """What to do about importance that a source has not: what leads to the same error again is not said."""
    if "all" in source.signals:
        return "--set signal=shared takes what it has"
    out = "" if source.folder else " --out FOLDER"
    return (
        f"collect it (rsgwm adapter importance {source.label} --corpus ROWS{out}), or leave out --method: auto takes "
        "one that needs none"
    )


def _of_bases(other: PoolAdapter, first: PoolAdapter) -> str:
    """Which bases, where both are named and not alike."""
    names = [str((source.manifest.get("base") or {}).get("name") or "") for source in (other, first)]
    return f" ({names[0]}, not {names[1]})" if all(names) and names[0] != names[1] else ""


def misfits(sources: Sequence[PoolAdapter]) -> list[str]:
    """Why these adapters cannot be merged at all."""
    first, problems = sources[0], []
    for other in sources[1:]:
        both = other.base_fingerprint and first.base_fingerprint
        if both and base_difference(other.base_fingerprint, first.base_fingerprint, chat=False):
            problems.append(f"{other.label} was made for another base than {first.label}{_of_bases(other, first)}")
        for name, (rows, _, columns) in other.shapes.items():
            expected = first.shapes.get(name, (rows, 0, columns))
            if (rows, columns) != (expected[0], expected[2]):
                problems.append(
                    f"{other.label}: {name} maps {rows} to {columns}, in {first.label} {expected[0]} to {expected[2]}"
                )
                break
        if not first.shapes.keys() & other.shapes.keys():
            problems.append(
                f"{other.label} and {first.label} have no module in common "
                f"({_some(list(other.shapes))} against {_some(list(first.shapes))})"
            )
    if apart := next((source.label for source in sources if source.untied), None):
        # Their embedding's update is the head's as well, of which a merge with a head of its own would know nothing.
        problems += [
            f"{source.label} adapts the embedding that its base has as head, and {apart} has a head apart from it: "
            "make models of them (rsgwm fuse)"
            for source in sources
            if not source.untied and any(map(is_embedding, source.shapes))
        ]
    return problems


def _some(names: Sequence[str]) -> str:
    """The first few of several names, and how many more there are."""
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def doubts(sources: Sequence[PoolAdapter]) -> list[str]:
    """What a careful person would want to know before trusting a merge of them."""
    warnings = []
    folders = [source.folder.resolve() for source in sources if source.folder]
    twice = list(dict.fromkeys(str(folder) for folder in folders if folders.count(folder) > 1))
    if twice:
        warnings.append(f"given more than once, and counted as often: {', '.join(twice)}")
    warnings += _descents(sources)
    unknown = [source.label for source in sources if not source.base_fingerprint]
    if unknown:
        warnings.append(f"the base of {', '.join(unknown)} is not recorded: make sure that it is the same one")
    if len({source.template_hash for source in sources if source.template_hash}) > 1:
        warnings.append("the adapters were trained with different prompt templates: the merge may follow neither")
    shared = set.intersection(*(set(source.shapes) for source in sources))
    if any(set(source.shapes) != shared for source in sources):
        warnings.append("the adapters differ in modules: where an adapter has none its update counts as zero")
    return warnings


def _descents(sources: Sequence[PoolAdapter]) -> list[str]:
    """Merges that stand beside adapters that they were merged from."""
    merges = [(source, source.merged_from()) for source in sources]
    if not any(parts for _, parts in merges):
        return []
    hashes = {source.label: {source.content_hash(), source.weights_hash()} for source in sources}
    return [
        f"{source.label} was merged from {' and '.join(again)}, which counts again here; name the adapters to take"
        for source, parts in merges
        if (again := [label for label, known in hashes.items() if known & parts and label != source.label])
    ]
