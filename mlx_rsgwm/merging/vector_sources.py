"""Quantization vectors from and to what adapters are named by: folders, files, the Hub."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.data.batching import tell_rows
from mlx_rsgwm.data.corpus import Corpus
from mlx_rsgwm.data.loading import load_data
from mlx_rsgwm.data.mlx_lm_rows import Examples
from mlx_rsgwm.data.row_hashes import record_of
from mlx_rsgwm.inference.open import load_base_for
from mlx_rsgwm.merging.quantisation_vector import check_plain, extract, patch, require_base, vector_format
from mlx_rsgwm.merging.vector_weight import WeightChoice, choose_weight
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter
from mlx_rsgwm.models.base import resolve_base
from mlx_rsgwm.training.checkpoints import claim_adapter_folder
from mlx_rsgwm.training.config import TrainConfig


def extract_vector(
    qat: AdapterSource, plain: AdapterSource, out: str | Path | None = None, *, progress: Progress = SILENT
) -> Adapter:
    """The quantization vector: the update of an adapter trained through rounding less that of its plain twin.

    Both are trained from one start on the same rows (arXiv 2604.03420, 3).

    Args:
        qat: as for :func:`load_adapter`, trained with ``TrainConfig.qat``.
        plain: trained alike, without.
        out: the folder to write; None keeps the vector in memory.
        progress: told of an unrecorded base, and of what else the two were trained with differently.

    Returns:
        The vector, of the sum of their ranks, exactly; ``manifest["quantization"]`` is the format that it is for. It is
        a difference and no adapter to answer with.

    Raises:
        RsgwmError: an adapter that was not trained as said, two bases, other layers than linear ones with LoRA.

    Example::

        vector = rs.extract_vector("pool/change-4bit", "pool/change", "vectors/change-4bit")
    """
    through, twin = (load_adapter(source, progress=progress) for source in (qat, plain))
    vector = extract(through, twin)
    _tell_unrecorded(twin, through, progress)
    if names := vector.manifest["trained_differently"]:
        progress.warning(
            f"warning: {through.where} and {twin.where} were trained differently in {', '.join(names)} too; "
            "the vector holds that as well"
        )
    with _claimed(out):
        return _saved(vector, out)


def apply_vector(
    receiver: AdapterSource,
    vector: AdapterSource,
    out: str | Path | None = None,
    *,
    weight: float | None = None,
    choose: Corpus | Examples | str | Path | None = None,
    base: str | Path | None = None,
    seed: int = DEFAULT_SEED,
    progress: Progress = SILENT,
) -> Adapter:
    """Put a quantization vector on an adapter that was trained without rounding: ΔW + λ V.

    Args:
        receiver: as for :func:`load_adapter`.
        vector: of :func:`extract_vector`, on the same base.
        out: the folder to write; None keeps the adapter in memory.
        weight: λ; None for 1, which takes no row of the receiver's task (zero-shot).
        choose: rows of the receiver's task by which λ is chosen instead, on the model rounded to the vector's format.
        base: the base's name; None for the one that the adapters record.
        seed: deals the rows of ``choose`` to the parts of a nested split.
        progress: told of an unrecorded base, of rows that the receiver was trained on, of the λ that are tried.

    Returns:
        The patched adapter, of the sum of both ranks; ``manifest["quantization_vector"]`` has ``lambda``, whether it is
        ``zero_shot``, and of a choice the losses of every λ and what choosing hides.

    Raises:
        RsgwmError: both ``weight`` and ``choose``; no vector, or one of another base; a receiver that has one already;
            too few rows to choose by, a base that is quantised already.

    Example::

        rs.fuse(rs.apply_vector("pool/groups", "vectors/change-4bit"), "groups-4bit", format="4bit")
    """
    if weight is not None and choose is not None:
        raise RsgwmError("λ is given, and rows to choose it by; leave out --lambda or --choose")
    name = None if base is None else str(base)
    adapter, quantvec = (load_adapter(source, name, progress=progress) for source in (receiver, vector))
    vector_format(quantvec)
    check_plain(adapter)
    if name is not None:
        require_base(resolve_base(name, progress), [adapter, quantvec])
    with _claimed(out):
        if choose is None:
            patched = patch(adapter, quantvec, 1.0 if weight is None else weight)
        else:
            choice = _choice(adapter, quantvec, choose, name, seed, progress)
            patched = patch(adapter, quantvec, choice.weight, choice.describe())
        _tell_unrecorded(adapter, quantvec, progress)
        return _saved(patched, out)


def _choice(
    adapter: Adapter,
    vector: Adapter,
    rows: Corpus | Examples | str | Path,
    base_name: str | None,
    seed: int,
    progress: Progress,
) -> WeightChoice:
    data = rows if isinstance(rows, (Corpus, Examples)) else load_data(Path(rows), None)[0]
    base = load_base_for([adapter, vector], base_name, progress)
    token_rows, dropped = data.token_rows(base.tokenizer, TrainConfig.max_tokens, "drop")
    tell_rows(token_rows, dropped, TrainConfig.max_tokens, progress)
    trained_on = sum(record_of(adapter.manifest, adapter.name).has(row.keys) for row in token_rows)
    if trained_on:
        progress.warning(f"NOT NEW: {adapter.where} was trained on what {trained_on} of these rows ask")
    return choose_weight(base, adapter, vector, token_rows, seed, progress=progress)


def _tell_unrecorded(adapter: Adapter, other: Adapter, progress: Progress) -> None:
    if adapter.base_fingerprint is None:
        progress.warning(f"warning: {adapter.where} does not record its base; it is taken to be {other.base_name}")


def _claimed(out: str | Path | None) -> AbstractContextManager[object]:
    return nullcontext() if out is None else claim_adapter_folder(Path(out))


def _saved(adapter: Adapter, out: str | Path | None) -> Adapter:
    if out is not None:
        adapter.save(Path(out))
    return adapter
