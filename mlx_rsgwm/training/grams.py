"""Gram matrices XᵀX / n of the inputs of an adapter's modules, collected in one pass over data: what RegMean needs.

They stand beside the adapter's weights in ``grams.safetensors``: float32, one (in, in) array under a module's name.
Modules that are handed the same input (the query, key and value projections) share one; the file's metadata says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import AdapterError, RsgwmError, raise_problems
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.safetensors_io import read_safetensors
from mlx_rsgwm.data.batching import TokenRow, make_batch, plan_epoch, tell_rows
from mlx_rsgwm.models.adapter import MANIFEST_FILE, WEIGHTS_FILE, Adapter, put_beside
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.fit_check import fitting_modules
from mlx_rsgwm.models.hooks import GramSums, inputs_seen
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.training.layers import adapted
from mlx_rsgwm.training.loop import TrainingData
from mlx_rsgwm.training.memory import device_limit

GRAMS_FILE = "grams.safetensors"


def collect_grams(
    base: Base,
    adapter: Adapter,
    data: TrainingData,
    batch_size: int = 8,
    max_tokens: int = 1024,
    rows: int = 0,
    seed: int = 0,
    progress: Progress = SILENT,
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """XᵀX / n (in, in) float32 for every module of ``adapter``, base and adapter active, over all tokens of ``data``.

    ``rows`` above 0 takes that many, drawn by ``seed``. Returns the matrices by module, one object for modules with the
    same input, and metadata. Prompts count, padding does not; the base model is left as it was found.

    Raises:
        AdapterError: the adapter does not fit ``base``.
        RsgwmError: the data gives no rows; the matrices do not fit into memory; a value that is not finite.
    """
    modules = fitting_modules(base, adapter)
    fitting, dropped = data.token_rows(base.tokenizer, max_tokens, "drop")
    tell_rows(fitting, dropped, max_tokens, progress)
    chosen = _chosen(fitting, rows, seed)
    _check_memory(adapter)
    plan = plan_epoch(chosen, batch_size, seed=0, epoch=0)
    weights = {name: value.astype(mx.float32) for name, value in adapter.weights.items()}
    sums = GramSums()
    model: Any = base.model
    with ExitStack() as stack:
        stack.enter_context(adapted(model, modules, replace(adapter.spec, dropout=0.0), weights))
        hidden, _ = split_head(model)  # tries the model, so nothing must look yet
        stack.enter_context(inputs_seen(model, modules, sums.add))
        advance = stack.enter_context(progress.task("Gram matrices", len(plan)))
        model.eval()
        for indices in plan:
            batch = [chosen[index] for index in indices]
            inputs = make_batch(batch).inputs
            sums.start(real_positions(batch, inputs.shape[1]))
            hidden(inputs)
            mx.eval(sums.sums)  # and nothing behind the last of them
            advance(1, f"{sum(sums.counts.values()) // max(len(sums.counts), 1)} tokens")
    raise_problems(
        f"{adapter.where} on {base.name}", [f"{name} is never used" for name in modules if name not in sums.owners]
    )
    means = {name: total / sums.counts[name] for name, total in sums.sums.items()}
    finite = {name: mx.all(mx.isfinite(mean)) for name, mean in means.items()}
    mx.eval(means, finite)
    raise_problems(
        "Gram matrices", [f"the inputs of {name} are not finite" for name, ok in finite.items() if not ok.item()]
    )
    metadata = {
        "rows": str(len(chosen)),
        "tokens": str(max(sums.counts.values())),
        "data_hash": data.hash,
        "source": "mean of XᵀX over the tokens of the data, base and adapter active",
    }
    return {name: means[sums.owners[name]] for name in modules}, metadata


def real_positions(rows: Sequence[TokenRow], length: int) -> mx.array:
    """Where the tokens are in a right-padded batch of ``rows`` × ``length``, flattened; int32. A row's last token is
    no input (see :func:`make_batch`).
    """
    ranges = [index * length + np.arange(len(row.tokens) - 1) for index, row in enumerate(rows)]
    return mx.array(np.concatenate(ranges).astype(np.int32))


def _chosen(rows: list[TokenRow], limit: int, seed: int) -> list[TokenRow]:
    if not limit or limit >= len(rows):
        return rows
    return [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))[:limit]]


def _check_memory(adapter: Adapter) -> None:
    inputs = {
        name.rpartition(".")[0]: value.shape[0] for name, value in adapter.weights.items() if name.endswith(".lora_a")
    }
    # Which modules share an input shows only once the model runs; the blocks of Llama's kind share a good half.
    need = sum(4 * width * width for width in inputs.values()) // 2
    limit, source = device_limit()
    if need > limit:
        raise RsgwmError(
            f"{adapter.where}: the Gram matrices of {len(inputs)} modules take {need / 1e9:.0f} GB and {source} is "
            f"{limit / 1e9:.0f} GB; RegMean needs adapters of fewer modules"
        )


def save_grams(
    adapter: Adapter, base: Base, data: TrainingData, grams: Mapping[str, mx.array], metadata: Mapping[str, str]
) -> Path:
    """Put collected matrices beside an adapter's weights: ``grams.safetensors``, then the manifest.

    See :func:`~mlx_rsgwm.models.adapter.put_beside`.
    """
    folder = adapter.path
    assert folder is not None
    owners: dict[int, str] = {}
    shared = {name: owners.setdefault(id(gram), name) for name, gram in grams.items()}
    arrays = {name: gram for name, gram in grams.items() if shared[name] == name}
    aliases = {name: owner for name, owner in shared.items() if owner != name}
    of_weights = (adapter.manifest.get("files") or {}).get(WEIGHTS_FILE) or files.sha256_file(folder / WEIGHTS_FILE)
    about = {**metadata, "weights_sha256": of_weights, "shared": json.dumps(aliases)}
    entry = {**metadata, "data": data.describe()}
    return put_beside(adapter, GRAMS_FILE, arrays, about, base.describe(), {"grams": entry})


def load_grams(folder: Path) -> dict[str, mx.array]:
    """The matrices of an adapter folder by module, each read when it is first used; one object for a shared one.

    That the file is whole, its SHA-256 tells, which ``Adapter.load`` checks.

    Raises:
        RsgwmError: there are none, they are of other weights than the folder's, or not square.
    """
    remedy = f"collect them: rsgwm adapter grams {folder} --corpus ROWS"
    path = folder / GRAMS_FILE
    if not files.is_present(path):
        raise RsgwmError(f"{folder} has no Gram matrices; {remedy}")
    manifest = files.read_json_object(folder / MANIFEST_FILE) if files.is_present(folder / MANIFEST_FILE) else {}
    hashes = manifest.get("files") or {}
    arrays, metadata = read_safetensors(path, evaluate=False)
    if GRAMS_FILE not in hashes or metadata.get("weights_sha256") != hashes.get(WEIGHTS_FILE):
        raise RsgwmError(f"{path} belongs to earlier weights of this folder; {remedy}")
    wrong = [f"{name} has shape {gram.shape}" for name, gram in arrays.items() if gram.shape != gram.shape[::-1]]
    raise_problems(f"{path}: Gram matrices are square", wrong, AdapterError)
    try:
        aliases = json.loads(metadata.get("shared", "{}"))
        return {**arrays, **{str(name): arrays[owner] for name, owner in aliases.items()}}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise AdapterError(f"{path}: its list of shared matrices is damaged; {remedy} --replace") from None
