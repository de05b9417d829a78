"""The proof that an adapter means the same to torch as to MLX: logits of both, with and without it, compared.

One side is mlx-lm with the adapter folder as its own ``load_adapters`` reads it; the other is transformers and PEFT
with the PEFT folder. Both see the same base weights, dtype and token ids. Agreement alone would not show that an
adapter was applied at all, so the change it makes is compared as well, against the disagreement of the bare bases.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.adapter import Adapter
from mlx_rsgwm.base import load_base
from mlx_rsgwm.converters.peft import to_peft
from mlx_rsgwm.errors import AdapterError, RsgwmError
from mlx_rsgwm.progress import SILENT, Progress

TEXTS = (
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether?",
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n",
    "12 + 30 = 42. 7 * 6 = 42. 100 - 58 =",
)
TOLERANCE = 1e-3  # float32 logits of a base of 135M to 1B parameters differ by 1e-5 to 2e-4 between the two
DTYPES = ("float32", "float16", "bfloat16")
NOISE = 4.0  # times the bare bases' disagreement: what rounding alone may do to a difference of two logits
SHARE = 0.01  # of the adapter's largest effect: a wrong scale, layer or module moves more than this


@dataclass(frozen=True)
class Logits:
    """One framework's answer: float32 arrays (tokens, vocabulary), the texts one after the other."""

    base: np.ndarray
    adapted: np.ndarray
    modules: int

    @property
    def effect(self) -> float:
        """The largest change the adapter makes to a logit."""
        return _largest(self.adapted - self.base)


def check_parity(
    adapter_folder: Path,
    base_name: str,
    *,
    peft_folder: Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    tolerance: float = TOLERANCE,
    token_ids: Sequence[Sequence[int]] | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Compare logits of MLX and torch with one adapter, on the same base, dtype and tokens.

    Args:
        adapter_folder: the adapter, as mlx-lm reads it.
        base_name: as for ``load_base``; its folder is what transformers loads too.
        peft_folder: the same adapter in PEFT's format; converted on the fly when None.
        device: torch's: ``auto`` is MPS if present, else the CPU.
        dtype: float32, float16 or bfloat16, on both sides; the default tolerance is for float32.
        tolerance: largest absolute difference of two logits that passes.
        token_ids: sequences to compare on; ``TEXTS`` through the base's tokenizer when None.

    Returns:
        ``passed``, ``failures`` (in words), ``max_abs_logit`` (with the adapter), ``base_max_abs_logit`` (without),
        ``max_abs_delta_logit`` (of the adapter's effects), ``effect_mlx`` and ``effect_torch``, and what was compared.

    Raises:
        RsgwmError: torch or PEFT is not installed, the base or the device is not there, transformers cannot load it.
        AdapterError: an adapter that is damaged, of another base, or has no PEFT form.
    """
    if dtype not in DTYPES:
        raise RsgwmError(f"parity dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
    if not tolerance > 0:
        raise RsgwmError(f"parity tolerance must be above 0, found {tolerance}")
    torch = import_torch()
    device = torch_device(device)
    adapter = Adapter.load(adapter_folder)
    with tempfile.TemporaryDirectory(prefix="rsgwm-parity-") as temporary, progress.task("parity", 2) as advance:
        folder = peft_folder or to_peft(adapter, base_name, Path(temporary) / "peft")
        base_path, token_ids, ours, mlx_device = _mlx_logits(adapter, base_name, dtype, token_ids, progress)
        advance(1, "MLX")
        theirs = _torch_logits(base_path, folder, device, dtype, token_ids)
        advance(1, "torch")
    return {
        **compare(ours, theirs, len(adapter.modules()), tolerance),
        "tokens": sum(map(len, token_ids)),
        "dtype": dtype,
        "device": device,
        "mlx_device": mlx_device,
        "base": base_name,
        "adapter": str(adapter_folder),
        "torch": torch.__version__,
        "peft": _version("peft"),
        "transformers": _version("transformers"),
        "mlx": _version("mlx"),
        "mlx_lm": _version("mlx-lm"),
    }


def compare(ours: Logits, theirs: Logits, modules: int, tolerance: float) -> dict[str, Any]:
    """The verdict on two sets of logits, with every reason to fail in words.

    The effects must agree within ``NOISE`` times the bases' own disagreement plus ``SHARE`` of the effect, so that an
    adapter whose effect is smaller than ``tolerance`` still has to be applied, and applied right.
    """
    if ours.adapted.shape != theirs.adapted.shape:
        raise RsgwmError(
            f"MLX and torch give logits of shapes {ours.adapted.shape} and {theirs.adapted.shape}; "
            "their bases do not have the same vocabulary"
        )
    adapted = _largest(ours.adapted - theirs.adapted)
    base = _largest(ours.base - theirs.base)
    delta = _largest((ours.adapted - ours.base) - (theirs.adapted - theirs.base))
    allowed = NOISE * base + SHARE * max(ours.effect, theirs.effect)
    failures = []
    if not adapted <= tolerance:
        failures.append(f"logits with the adapter differ by {adapted:.1e}, beyond {tolerance:.1e}")
    if not base <= tolerance:
        failures.append(f"logits of the bare base differ by {base:.1e}, beyond {tolerance:.1e}")
    if not delta <= allowed:
        failures.append(f"what the adapter changes differs by {delta:.1e}, beyond {allowed:.1e}")
    for side, logits in (("MLX", ours), ("torch", theirs)):
        if not logits.effect > 0:
            failures.append(f"the adapter changes nothing in {side}")
        if logits.modules != modules:
            failures.append(f"{side} adapted {logits.modules} modules, the adapter has {modules}")
    return {
        "passed": not failures,
        "failures": failures,
        "max_abs_logit": adapted,
        "base_max_abs_logit": base,
        "max_abs_delta_logit": delta,
        "effect_mlx": ours.effect,
        "effect_torch": theirs.effect,
        "modules": modules,
        "tolerance": tolerance,
    }


def _largest(values: np.ndarray) -> float:
    """Largest absolute value, infinite where anything is not finite (NaN is not JSON, and agrees with nothing)."""
    largest = float(np.max(np.abs(values)))
    return largest if np.isfinite(largest) else float(np.finfo(np.float64).max)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


# --- MLX --------------------------------------------------------------------------------------------------------


def _mlx_logits(
    adapter: Adapter, base_name: str, dtype: str, token_ids: Sequence[Sequence[int]] | None, progress: Progress
) -> tuple[Path, list[list[int]], Logits, str]:
    """The base's folder, the token ids, the logits and the MLX device; the model is freed on return."""
    from mlx_lm.tuner.lora import LoRALinear
    from mlx_lm.tuner.utils import load_adapters

    with exact_float32() as device:
        base = load_base(base_name, dtype=dtype, progress=progress)
        if adapter.base_fingerprint and adapter.base_fingerprint != base.fingerprint:
            trained = (adapter.manifest.get("base") or {}).get("name")
            raise AdapterError(f"{adapter.where} was trained on {trained}, not on {base_name}: the weights differ")
        ids = [list(map(int, one)) for one in token_ids or [base.tokenizer.encode(text) for text in TEXTS]]
        bare = _mlx_forward(base.model, ids)
        try:
            load_adapters(base.model, str(adapter.path))
        except ValueError as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
            raise AdapterError(f"{adapter.where} does not fit {base_name}: {reason}") from error
        base.model.eval()  # mlx-lm's new layers start in training mode, with dropout
        adapted = _mlx_forward(base.model, ids)
        names = set(adapter.modules())
        modules = sum(name in names and isinstance(one, LoRALinear) for name, one in base.model.named_modules())
        path = base.path
        del base
    mx.clear_cache()
    return path, ids, Logits(bare, adapted, modules), device


def _mlx_forward(model: Any, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([np.array(model(mx.array([one]))[0].astype(mx.float32)) for one in token_ids])


@contextmanager
def exact_float32() -> Iterator[str]:
    """Run MLX where float32 products are float32, and yield that device's name.

    On M5 and on CUDA, MLX multiplies float32 matrices with 10-bit mantissas unless ``MLX_ENABLE_TF32=0`` was set
    before its first product (mlx issue 3860). Where that is too late, the CPU does the comparison.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    device = mx.default_device()
    a = mx.random.normal((64, 256), key=mx.random.key(0))
    b = mx.random.normal((256, 64), key=mx.random.key(1))
    error = float(mx.max(mx.abs(a @ b - mx.matmul(a, b, stream=mx.cpu))))
    exact = error < 1e-3  # products of 256 terms of size 1: float32 errs by 1e-5, ten bits by 1e-2
    with nullcontext() if exact else mx.stream(mx.cpu):
        name = str((device if exact else mx.Device(mx.cpu, 0)).type).rpartition(".")[2]
        yield name


# --- torch ------------------------------------------------------------------------------------------------------


def import_torch() -> ModuleType:
    """Torch, with PEFT and transformers known to be there, or one line on how to get them."""
    try:
        import peft  # noqa: F401
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise RsgwmError(
            f'comparing with torch needs {error.name or "torch"}: pip install "mlx-rsgwm[torch]"'
        ) from error
    return torch


def torch_device(name: str) -> str:
    """``auto`` as MPS where there is one, else the CPU; any other name must be usable here."""
    torch = import_torch()
    present = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    if name == "auto":
        return "mps" if present["mps"] else "cpu"
    if not present.get(name, False):
        usable = ", ".join(one for one, there in present.items() if there)
        raise RsgwmError(f"torch has no device {name!r} here; choose auto or one of {usable}")
    return name


def load_torch_base(path: Path, device: str, dtype: str, attention: str = "eager") -> Any:
    """The base in ``path`` as transformers loads it, in evaluation mode; nothing is fetched or executed."""
    torch = import_torch()
    from transformers import AutoModelForCausalLM

    with _quiet_transformers():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RsgwmError(f"transformers cannot load the base model in {path}: {reason}") from error
    return model.to(device).eval()


def apply_peft(model: Any, peft_folder: Path, widen: bool) -> Any:
    """``model`` with the adapter in ``peft_folder``, its arrays as saved, or in float32 if ``widen``.

    PEFT narrows the activations to a 16-bit adapter's dtype; MLX widens the adapter to the activations'. Widening
    first makes both compute the same thing on a float32 base.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of transformers, nothing a user can change
            adapted = PeftModel.from_pretrained(model, str(peft_folder), autocast_adapter_dtype=widen)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise AdapterError(f"PEFT cannot load {peft_folder} on this base: {reason}") from error
    return adapted.eval()


def _torch_logits(
    base_path: Path, peft_folder: Path, device: str, dtype: str, token_ids: Sequence[Sequence[int]]
) -> Logits:
    model = load_torch_base(base_path, device, dtype)
    bare = _torch_forward(model, device, token_ids)
    adapted_model = apply_peft(model, peft_folder, widen=dtype == "float32")
    adapted = _torch_forward(adapted_model, device, token_ids)
    modules = sum("default" in getattr(module, "lora_A", {}) for module in adapted_model.modules())
    return Logits(bare, adapted, modules)


def _torch_forward(model: Any, device: str, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
    import torch

    with torch.no_grad():
        found = [model(input_ids=torch.tensor([list(one)], device=device)).logits[0] for one in token_ids]
        return np.concatenate([one.float().cpu().numpy() for one in found])


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No loading bars of transformers inside our own progress."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
