"""The proof that an adapter means the same to torch as to MLX: both run the same base with it, and are compared.

One side is mlx-lm with the adapter folder as its own ``load_adapters`` reads it; the other is transformers and PEFT
with the PEFT folder, eager attention, the same weights, dtype and token ids. Agreement alone would not show that an
adapter was applied at all, so the change it makes is compared as well, against the disagreement of the bare bases; and
every adapted layer is compared alone, on the input it has in MLX, so that the first one that differs is known by name.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.dense_base import dense_base
from mlx_rsgwm.converters.module_names import SWITCH, Names
from mlx_rsgwm.converters.parity.certificate import sign
from mlx_rsgwm.converters.parity.mlx import exact_float32, probe_ids, trace_mlx
from mlx_rsgwm.converters.parity.trace import TRACED_TOKENS, Logits, Probe, Trace, perplexity
from mlx_rsgwm.converters.parity.verdict import NOISE, compare, compare_continuations, first_difference
from mlx_rsgwm.converters.peft.convert import to_peft
from mlx_rsgwm.converters.peft.folder import is_of_wrapped_model, open_peft
from mlx_rsgwm.converters.peft.names import is_other_tower
from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.fit_check import base_of
from mlx_rsgwm.models.token_layers import is_embedding

TEXTS = (
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether?",
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n",
    "12 + 30 = 42. 7 * 6 = 42. 100 - 58 =",
)
TOLERANCE = 1e-3  # float32 logits of a base of 135M to 1B parameters differ by 1e-5 to 2e-4 between the two
DTYPES = ("float32", "float16", "bfloat16")
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
        :func:`compare`, :func:`compare_continuations` and the perplexities, and what was compared.

    Raises:
        RsgwmError: torch or PEFT is not installed, the base or the device is not there, transformers cannot load it.
        AdapterError: an adapter that is damaged, of another base, or has no PEFT form.
    """
    if dtype not in DTYPES:
        raise RsgwmError(f"parity dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
    if not 0 < tolerance < float("inf"):
        raise RsgwmError(f"parity tolerance must be a number above 0, found {tolerance}")
    torch = import_torch()
    device = torch_device(device)
    adapter = load_adapter(source, base_name, progress=progress)
    name, path = base_of(adapter, base_name, progress)
    if peft_folder is None and adapter.origin is not None and adapter.origin.is_dir():
        peft_folder = adapter.origin
    with tempfile.TemporaryDirectory(prefix="rsgwm-parity-") as temporary, progress.task("parity", 2) as advance:
        folder = peft_folder or to_peft(adapter, name, Path(temporary) / "peft")
        weights_sha256 = open_peft(folder).sha256()
        with exact_float32() as mlx_device:
            base = load_base(name, dtype=dtype, progress=progress)
            ids = [list(map(int, one)) for one in token_ids or probe_ids(base, TEXTS)]
            ours = trace_mlx(base, adapter, ids, continuation)
            fingerprint = base.fingerprint
            del base
        mx.clear_cache()
        advance(1, "MLX")
        torch_path = dense_base(path, Path(temporary) / "dense")
        known = read_base_layers(name, path).names
        names = {module: torch_module(module, known) for module in ours.probes}
        theirs = _trace_torch(torch_path, folder, device, dtype, ids, ours.probes, names, continuation)
        theirs = replace(theirs, probes=scaled_probes(theirs.probes, known))
        advance(1, "torch")
    verdict = compare(ours.logits, theirs.logits, len(adapter.modules()), tolerance)
    first = first_difference(ours, theirs, dtype, base_differs=verdict["base_max_abs_logit"] > tolerance)
    greedy = compare_continuations(ours, theirs, 2 * tolerance + NOISE * verdict["max_abs_logit"])
    failures = verdict["failures"] + greedy.pop("failures")
    if first is not None:
        failures = [f"the first layer that differs is {first['layer']}, by {first['difference']:.1e}", *failures]
    result = {
        **verdict,
        "passed": not failures,
        "failures": failures,
        "first_difference": first,
        "layers_compared": len(ours.probes) + len(ours.blocks),
        "greedy": greedy,
        "perplexity": {
            side: {
                "base": perplexity(trace.logits.base, ids),
                "adapted": perplexity(trace.logits.adapted, ids),
            }
            for side, trace in (("mlx", ours), ("torch", theirs))
        },
        "tokens": sum(map(len, ids)),
        "dtype": dtype,
        "device": device,
        "mlx_device": mlx_device,
        "attention": "eager",
        "base": name,
        "adapter": adapter.where,
        "peft_weights_sha256": weights_sha256,
        "torch": torch.__version__,
        "peft": _version("peft"),
        "transformers": _version("transformers"),
        "mlx": _version("mlx"),
        "mlx_lm": _version("mlx-lm"),
    }
    return sign(result, adapter, fingerprint)


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


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


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
    """``auto`` as MPS or CUDA where there is one, else the CPU; any other name must be usable here."""
    torch = import_torch()
    present = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    if name == "auto":
        return next(one for one in ("mps", "cuda", "cpu") if present[one])
    if not present.get(name, False):
        usable = ", ".join(one for one, there in present.items() if there)
        raise RsgwmError(f"torch has no device {name!r} here; choose auto or one of {usable}")
    return name


def load_torch_base(path: Path, device: str, dtype: str, attention: str = "eager", wrapped: bool = False) -> Any:
    """The base in ``path`` as transformers loads it, in evaluation mode; nothing is fetched or executed.

    ``wrapped``: as the model of text and images, where its language model could be loaded alone.
    """
    torch = import_torch()
    with _quiet_transformers():
        try:
            model: Any = _torch_class(path, wrapped).from_pretrained(
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


def _torch_class(path: Path, wrapped: bool) -> Any:
    """The class that loads a base: a causal language model's, where transformers has one for it, else its own."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    classes = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    for auto in reversed(classes) if wrapped else classes:
        if type(config) in auto._model_mapping:
            return auto
    own = getattr(transformers, str((config.architectures or [""])[0]), None)
    return own if own is not None else transformers.AutoModelForCausalLM  # which says what it does not know


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


def _trace_torch(
    base_path: Path,
    peft_folder: Path,
    device: str,
    dtype: str,
    token_ids: Sequence[Sequence[int]],
    probes: dict[str, Probe],
    names: dict[str, str],
    continuation: int,
) -> Trace:
    wrapped = is_of_wrapped_model(open_peft(peft_folder).arrays()[0])
    model = load_torch_base(base_path, device, dtype, wrapped=wrapped)
    if wrapped:
        present = {name for name, _ in model.named_modules()}
        names = {module: full_name(name, present) for module, name in names.items()}
    blocks = _block_states(model, device, token_ids[0][:TRACED_TOKENS])
    bare = _torch_forward(model, device, token_ids)
    adapted_model = apply_peft(model, peft_folder, widen=dtype == "float32")
    adapted = _torch_forward(adapted_model, device, token_ids)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted_model.named_modules()
        if "default" in getattr(module, "lora_A", {}) or "default" in getattr(module, "lora_embedding_A", {})
    }
    modules = _count_modules(layers, names)
    seen = {name: _probe(layers, names[name], name, probe, device) for name, probe in probes.items()}
    continuations = [_greedy(adapted_model, device, text, continuation) for text in token_ids]
    return Trace(
        Logits(bare, adapted, modules),
        blocks,
        {name: probe for name, probe in seen.items() if probe is not None},
        continuations,
    )


def full_name(name: str, present: set[str]) -> str:
    """The name in a model of text and images of what is called ``name`` in its language model."""
    inside = name.replace("model.", "model.language_model.", 1)
    return inside if ".language_model." not in name and inside in present else name


def _find(layers: dict[str, Any], name: str, module: str) -> Any:
    """PEFT's layer for a module of mlx-lm whose name in transformers is ``name``; None where there is none."""
    if not SWITCH.fullmatch(module):
        return layers.get(name)
    parameter = "down_proj" if module.endswith("down_proj") else "gate_up_proj"
    wrappers = [layers.get(name), layers.get(f"{name}.base_layer")]
    return next((one for one in wrappers if getattr(one, "parameter_name", None) == parameter), None)


def _count_modules(layers: dict[str, Any], names: dict[str, str]) -> int:
    """Adapted layers as mlx-lm counts them: gate and up apart, a tied head with its embedding."""
    known = set(names.values())
    others = {name.removesuffix(".base_layer") for name in layers} - known
    tied = {name for name in others if name.rpartition(".")[2] == "lm_head" and any(map(is_embedding, names))}
    return sum(_find(layers, name, module) is not None for module, name in names.items()) + len(others - tied)


def _probe(layers: dict[str, Any], name: str, module: str, probe: Probe, device: str) -> Probe | None:
    """What the adapter adds in torch to the output of one layer for the input that MLX had; None where it is not."""
    import torch

    layer = _find(layers, name, module)
    if layer is None:
        return None
    with torch.no_grad():
        x = torch.tensor(probe.inputs, device=device)
        if SWITCH.fullmatch(module):
            added = _expert_outputs(layer, x, module)
        elif hasattr(layer, "parameter_name"):  # a router, which is no linear layer to transformers
            added = x @ layer.get_delta_weight("default").to(x.dtype).T
        else:
            x = x.long() if is_embedding(module) else x.to(layer.get_base_layer().weight.dtype)
            added = layer(x) - layer.base_layer(x)
            pair: Any = getattr(layer.lora_B, "default", None)
            if getattr(pair, "bias", None) is not None:  # MLX has it in the layer's own bias
                added = added - layer.scaling["default"] * pair.bias
    return Probe(probe.inputs, added.float().cpu().numpy(), probe.size)


def _expert_outputs(layer: Any, x: Any, module: str) -> Any:
    """What is added to the output of every expert that gets ``x``: gate's or up's half of their parameter."""
    left, right, scale = layer.get_delta_factors("default")
    added = (scale * (left @ (right @ x.to(left.dtype))[..., None]))[..., 0]
    half = added.shape[1] // 2
    if layer.parameter_name == "down_proj":
        return added
    return added[:, :half] if module.endswith("gate_proj") else added[:, half:]


def _block_states(model: Any, device: str, tokens: Sequence[int]) -> list[np.ndarray]:
    """The bare base's state after every block."""
    import torch

    depth = model.config.get_text_config().num_hidden_layers
    stacks = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth and not is_other_tower(name)
    ]
    states: list[np.ndarray] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        states.append(state[0].float().cpu().numpy())

    hooks = [block.register_forward_hook(keep) for block in (stacks[0] if stacks else [])]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(tokens)], device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return states


def _torch_forward(model: Any, device: str, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
    import torch

    with torch.no_grad():
        found = [model(input_ids=torch.tensor([list(one)], device=device)).logits[0] for one in token_ids]
        return np.concatenate([one.float().cpu().numpy() for one in found])


def _greedy(model: Any, device: str, text: Sequence[int], count: int) -> list[int]:
    """The most likely ``count`` tokens after ``text``; generate() would follow the model's own sampling settings."""
    import torch

    tokens: list[int] = []
    given, cache = list(text), None
    with torch.no_grad():
        for _ in range(count):
            ids = torch.tensor([given], device=device)
            found = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            tokens.append(int(found.logits[0, -1].argmax()))
            given = tokens[-1:]
    return tokens


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
