"""torch's side of a parity check: transformers' and PEFT's own model with an adapter, eager attention."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mlx_rsgwm.converters.module_names import SWITCH
from mlx_rsgwm.converters.parity.trace import TRACED_TOKENS, Logits, Probe, Trace
from mlx_rsgwm.converters.peft.folder import is_of_wrapped_model, open_peft
from mlx_rsgwm.converters.peft.names import is_other_tower
from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.models.token_layers import is_embedding, is_head


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
        return next(device for device in ("mps", "cuda", "cpu") if present[device])
    if not present.get(name, False):
        usable = ", ".join(device for device, there in present.items() if there)
        raise RsgwmError(f"torch has no device {name!r} here; choose auto or one of {usable}")
    return name


def load_torch_base(path: Path, device: str, dtype: str, attention: str = "eager", wrapped: bool = False) -> Any:
    """The base in ``path`` as transformers loads it, in evaluation mode; nothing is fetched or executed.

    ``wrapped``: as the model of text and images, where its language model could be loaded alone.
    """
    torch = import_torch()
    with quiet_libraries():
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
    loader = getattr(transformers, str((config.architectures or [""])[0]), None)
    return loader if loader is not None else transformers.AutoModelForCausalLM  # which says what it does not know


def apply_peft(model: Any, peft_folder: Path, widen: bool) -> Any:
    """``model`` with the adapter in ``peft_folder``, its arrays as saved, or in float32 if ``widen``.

    PEFT narrows the activations to a 16-bit adapter's dtype; MLX widens the adapter to the activations'. Widening
    first makes both compute the same thing on a float32 base.
    """
    from peft import PeftModel

    try:
        with quiet_libraries():
            adapted = PeftModel.from_pretrained(model, str(peft_folder), autocast_adapter_dtype=widen)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise AdapterError(f"PEFT cannot load {peft_folder} on this base: {reason}") from error
    return adapted.eval()


def trace_torch(
    base_path: Path,
    peft_folder: Path,
    device: str,
    dtype: str,
    token_ids: Sequence[Sequence[int]],
    probes: dict[str, Probe],
    names: dict[str, str],
    continuation: int,
) -> Trace:
    """What transformers and PEFT compute of ``token_ids``: logits of base and adapter, and what each module adds.

    Args:
        probes: by mlx-lm's module, the inputs (tokens, in) float32 that its layers were given.
        names: PEFT's module by mlx-lm's.
        continuation: tokens to generate greedily after each text.

    Raises:
        AdapterError: PEFT cannot load the folder on this base.
    """
    wrapped = is_of_wrapped_model(open_peft(peft_folder).arrays()[0])
    model = load_torch_base(base_path, device, dtype, wrapped=wrapped)
    if wrapped:
        present = {name for name, _ in model.named_modules()}
        names = {module: wrapped_name(name, present) for module, name in names.items()}
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


def wrapped_name(name: str, present: set[str]) -> str:
    """The name in a model of text and images of what is called ``name`` in its language model."""
    inside = name.replace("model.", "model.language_model.", 1)
    return inside if ".language_model." not in name and inside in present else name


def _find(layers: dict[str, Any], name: str, module: str) -> Any:
    """PEFT's layer for a module of mlx-lm whose name in transformers is ``name``; None where there is none."""
    if not SWITCH.fullmatch(module):
        return layers.get(name)
    parameter = "down_proj" if module.endswith("down_proj") else "gate_up_proj"
    wrappers = [layers.get(name), layers.get(f"{name}.base_layer")]
    return next((layer for layer in wrappers if getattr(layer, "parameter_name", None) == parameter), None)


def _count_modules(layers: dict[str, Any], names: dict[str, str]) -> int:
    """Adapted layers as mlx-lm counts them: gate and up apart, a tied head with its embedding."""
    known = set(names.values())
    others = {name.removesuffix(".base_layer") for name in layers} - known
    tied = {name for name in others if is_head(name) and any(map(is_embedding, names))}
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
        logits = [model(input_ids=torch.tensor([list(text)], device=device)).logits[0] for text in token_ids]
        return np.concatenate([rows.float().cpu().numpy() for rows in logits])


def _greedy(model: Any, device: str, text: Sequence[int], count: int) -> list[int]:
    """The most likely ``count`` tokens after ``text``; generate() would follow the model's own sampling settings."""
    import torch

    tokens: list[int] = []
    given, cache = list(text), None
    with torch.no_grad():
        for _ in range(count):
            ids = torch.tensor([given], device=device)
            step = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            tokens.append(int(step.logits[0, -1].argmax()))
            given = tokens[-1:]
    return tokens


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No loading bars and warnings of torch, transformers and PEFT: they speak of each other's use and of missing
    kernels, which no user of ours can change, and whether the adapter is applied is measured."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
