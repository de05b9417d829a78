"""The proof that an adapter means the same to torch as to MLX: both run the same base with it, and are compared.

One side is mlx-lm with the adapter folder as its own ``load_adapters`` reads it; the other is transformers and PEFT
with the PEFT folder, eager attention, the same weights, dtype and token ids. Agreement alone would not show that an
adapter was applied at all, so the change it makes is compared as well, against the disagreement of the bare bases; and
every adapted layer is compared alone, on the input it has in MLX, so that the first one that differs is known by name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.dense_base import dense_base
from mlx_rsgwm.converters.module_names import SWITCH, Names
from mlx_rsgwm.converters.parity.certificate import sign
from mlx_rsgwm.converters.parity.mlx import exact_float32, probe_ids, trace_mlx
from mlx_rsgwm.converters.parity.torch import import_torch, quiet_libraries, torch_device, trace_torch
from mlx_rsgwm.converters.parity.trace import Probe, Trace, perplexity
from mlx_rsgwm.converters.parity.verdict import NOISE, compare_continuations, compare_logits, first_difference
from mlx_rsgwm.converters.peft.convert import to_peft
from mlx_rsgwm.converters.peft.folder import open_peft
from mlx_rsgwm.core.dtypes import DTYPES
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.config import window_left_out
from mlx_rsgwm.models.fit_check import base_of

TEXTS = (
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether?",
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n",
    "12 + 30 = 42. 7 * 6 = 42. 100 - 58 =",
)
TOLERANCE = 1e-3  # float32 logits of a base of 135M to 1B parameters differ by 1e-5 to 2e-4 between the two
CONTINUATION = 12


def check_parity(
    source: AdapterSource,
    base_name: str | None,
    *,
    peft_folder: Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    tolerance: float = TOLERANCE,
    token_ids: Sequence[Sequence[int]] | None = None,
    continuation: int = CONTINUATION,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Compare MLX and torch with one adapter, on the same base, dtype and tokens.

    Args:
        source: the adapter, as for ``load_adapter``.
        base_name: as for ``load_base``; None: the one that the adapter records. Its folder is what transformers loads
            too, dequantised where it is quantised.
        peft_folder: the same adapter in PEFT's format; when None the source, if it is that, else converted on the fly.
        device: torch's: ``auto`` is MPS or CUDA if present, else the CPU.
        dtype: float32, float16 or bfloat16, on both sides; the default tolerance is for float32.
        tolerance: largest absolute difference of two logits that passes.
        token_ids: sequences to compare on; ``TEXTS`` through the base's tokenizer when None.
        continuation: tokens to continue each text by, greedily.

    Returns:
        A certificate: ``passed``, ``failures`` (in words), ``first_difference`` (the layer, or None), the figures of
        :func:`compare_logits`, :func:`compare_continuations` and the perplexities, and what was compared.

    Raises:
        RsgwmError: torch or PEFT is not installed, the base or the device is not there, transformers cannot load it.
        AdapterError: an adapter that is damaged, of another base, or has no PEFT form.
    """
    if dtype not in DTYPES:
        raise RsgwmError(f"parity dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
    if not 0 < tolerance < float("inf"):
        raise RsgwmError(f"parity tolerance must be a number above 0, found {tolerance}")
    adapter = load_adapter(source, base_name, progress=progress)  # first, for torch's import takes seconds
    name, path = base_of(adapter, base_name, progress)
    if peft_folder is not None:
        open_peft(peft_folder)
    torch_version = import_torch().__version__
    device = torch_device(device)
    if peft_folder is None and adapter.origin is not None and adapter.origin.is_dir():
        peft_folder = adapter.origin
    with tempfile.TemporaryDirectory(prefix="rsgwm-parity-") as temporary, progress.task("parity", 2) as advance:
        folder = peft_folder or to_peft(adapter, name, Path(temporary) / "peft")
        weights_sha256 = open_peft(folder).sha256()
        mlx_run = _run_mlx(adapter, name, dtype, token_ids, continuation, progress)
        advance(1, "MLX")
        torch_path = dense_base(path, Path(temporary) / "dense")
        torch_trace = _run_torch(
            mlx_run, read_base_layers(name, path).names, torch_path, folder, device, dtype, continuation
        )
        advance(1, "torch")
    result = {
        **_compare_traces(mlx_run, torch_trace, len(adapter.modules()), dtype, tolerance, continuation),
        "tokens": sum(map(len, mlx_run.token_ids)),
        "dtype": dtype,
        "device": device,
        "mlx_device": mlx_run.device,
        "attention": "eager",
        "base": name,
        "adapter": adapter.where,
        "peft_weights_sha256": weights_sha256,
        "torch": torch_version,
        "peft": version("peft"),
        "transformers": version("transformers"),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }
    return sign(result, adapter, mlx_run.fingerprint)


@dataclass(frozen=True)
class MlxRun:
    """What MLX computed, on which device, and of the base what the comparison needs once its model is gone.

    ``window``: the sliding window of the base that mlx-lm does not apply, None where there is none.
    """

    trace: Trace
    token_ids: list[list[int]]
    fingerprint: str
    device: str
    window: int | None


def _run_mlx(
    adapter: Adapter,
    base_name: str,
    dtype: str,
    token_ids: Sequence[Sequence[int]] | None,
    continuation: int,
    progress: Progress,
) -> MlxRun:
    """Load the base, run it without and with ``adapter``, and let it go."""
    with exact_float32() as device:
        base = load_base(base_name, dtype=dtype, progress=progress)
        ids = [list(map(int, text)) for text in token_ids or probe_ids(base, TEXTS)]
        window = window_left_out(base.path, base.model)
        trace = trace_mlx(base, adapter, ids, continuation)
        run = MlxRun(trace, ids, base.fingerprint, device, window)
        del base
    mx.clear_cache()
    return run


def _run_torch(
    mlx_run: MlxRun, names: Names, torch_path: Path, peft_folder: Path, device: str, dtype: str, continuation: int
) -> Trace:
    """The same in torch, on the inputs that the adapted layers had in MLX."""
    probes = mlx_run.trace.probes
    modules = {module: torch_module(module, names) for module in probes}
    with quiet_libraries():
        trace = trace_torch(torch_path, peft_folder, device, dtype, mlx_run.token_ids, probes, modules, continuation)
    return replace(trace, probes=scaled_probes(trace.probes, names))


def _compare_traces(
    mlx_run: MlxRun, torch_trace: Trace, modules: int, dtype: str, tolerance: float, continuation: int
) -> dict[str, Any]:
    """The verdict with every figure, and the failures in the order in which to look at them."""
    mlx_trace = mlx_run.trace
    verdict = compare_logits(mlx_trace.logits, torch_trace.logits, modules, tolerance)
    first = first_difference(mlx_trace, torch_trace, dtype, base_differs=verdict["base_max_abs_logit"] > tolerance)
    greedy = compare_continuations(mlx_trace, torch_trace, 2 * tolerance + NOISE * verdict["max_abs_logit"])
    failures = verdict["failures"] + greedy.pop("failures")
    if first is not None:
        failures = [f"the first layer that differs is {first['layer']}, by {first['difference']:.1e}", *failures]
    window, longest = mlx_run.window, max(map(len, mlx_run.token_ids)) + continuation
    if failures and window is not None and longest > window:
        failures = [window_failure(window, longest), *failures]
    return {
        **verdict,
        "passed": not failures,
        "failures": failures,
        "first_difference": first,
        "layers_compared": len(mlx_trace.probes) + len(mlx_trace.blocks),
        "greedy": greedy,
        "perplexity": {
            side: {
                "base": perplexity(trace.logits.base, mlx_run.token_ids),
                "adapted": perplexity(trace.logits.adapted, mlx_run.token_ids),
            }
            for side, trace in (("mlx", mlx_trace), ("torch", torch_trace))
        },
        **({"window_left_out": window} if window is not None else {}),
    }


def window_failure(window: int, longest: int) -> str:
    """What is said where texts are longer than a window that mlx-lm does not apply."""
    return (
        f"mlx-lm does not apply this model's window of {window:,} tokens, and the texts with their continuations have "
        f"up to {longest:,}: within the window both compute the same model, beyond it they do not"
    )


def scaled_probes(probes: dict[str, Probe], names: Names) -> dict[str, Probe]:
    """What torch's layers add times the factors that mlx-lm puts into their weights, and torch beside the layers."""
    scaled = {}
    for module, probe in probes.items():
        link = names.link(f"{module}.weight")
        factor: Any = 1.0 if link is None or SWITCH.fullmatch(module) else link.scale
        scaled[module] = replace(probe, added=(probe.added * factor).astype(np.float32))
    return scaled


def torch_module(module: str, names: Names) -> str:
    """transformers' name of an adapted module of mlx-lm; for experts, the module of their stacked parameters."""
    if SWITCH.fullmatch(module):
        return f"{names.experts_block(module.rpartition('.')[0])}.experts"
    return names.transformers_module(module)
