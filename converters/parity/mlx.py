"""MLX's side of a parity check: logits, states and adapted layers of mlx-lm's own model with an adapter."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_rsgwm.converters.parity.trace import TRACED_TOKENS, Logits, Probe, Trace
from mlx_rsgwm.converters.untied_base import adapts_head
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.models.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.hooks import block_names, inputs_seen, outputs_changed
from mlx_rsgwm.models.token_layers import has_head


def apply_adapter(model: Any, adapter: Adapter, name: str) -> None:
    """Put an adapter into mlx-lm's model by mlx-lm's own ``load_adapters``; the model is in evaluation mode after.

    Its configuration is written anew for that, in the fields that mlx-lm reads today.

    Parameters that the adapter replaces go into the base first, which mlx-lm cannot do.

    Raises:
        AdapterError: it does not fit the model.
    """
    from mlx_lm.tuner.utils import load_adapters

    if adapts_head(adapter) and not has_head(dict(model.named_modules())):
        raise AdapterError(
            f"{adapter.where} has a head apart from the embedding, which {name} ties; "
            "make an untied model of it first (rsgwm fuse)"
        )
    try:
        if adapter.full:
            replace_parameters(model, adapter)
        with tempfile.TemporaryDirectory(prefix="rsgwm-parity-") as temporary:
            folder = Path(temporary)
            # mlx-lm needs fields that its older versions did not write.
            files.write_json(folder / CONFIG_FILE, adapter.spec.to_config())
            if adapter.path is None or adapter.full:
                mx.save_safetensors(str(folder / WEIGHTS_FILE), adapter.weights)
            else:
                (folder / WEIGHTS_FILE).symlink_to((adapter.path / WEIGHTS_FILE).resolve())
            load_adapters(model, str(folder))
            flat: Any = tree_flatten(model.parameters())
            mx.eval([value for name, value in flat if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")])
    except ValueError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise AdapterError(f"{adapter.where} does not fit {name}: {reason}") from error
    model.eval()  # mlx-lm's new layers start in training mode, with dropout


def replace_parameters(model: nn.Module, adapter: Adapter) -> None:
    """Put the parameters of the base that ``adapter`` replaces into ``model``, in the dtypes the model has.

    Raises:
        AdapterError: naming those that the model has not, or in another shape.
    """
    from mlx_rsgwm.core.errors import raise_problems

    flat: Any = tree_flatten(model.parameters())
    present = dict(flat)
    problems = [
        f"the base has no {name}" if (old := present.get(name)) is None else _shape_problem(name, value, old)
        for name, value in adapter.full.items()
    ]
    raise_problems(adapter.where, [problem for problem in problems if problem], AdapterError)
    model.load_weights(
        [(name, value.astype(present[name].dtype)) for name, value in adapter.full.items()], strict=False
    )


def _shape_problem(name: str, value: mx.array, old: mx.array) -> str:
    """Why ``value`` cannot stand in the place of ``old``; empty where it can. fuse makes room for other rows first."""
    if value.shape == old.shape:
        return ""
    differs = f"{name} is {tuple(old.shape)} in the base, {tuple(value.shape)} in the adapter"
    resized = value.ndim == old.ndim == 2
    return f"{differs} (rsgwm fuse makes a model of base and adapter)" if resized else differs


def probe_ids(base: Base, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts to compare models on.

    Raises:
        RsgwmError: the base's tokenizer leaves nothing of one of them.
    """
    ids = [[int(token) for token in base.tokenizer.encode(text)] for text in texts]
    if not all(ids):
        raise RsgwmError(
            f"the tokenizer of {base.name} makes no tokens of {texts[ids.index([])][:30]!r}…, so there is nothing to "
            "compare on; mend the base's tokenizer.json"
        )
    return ids


def trace_mlx(base: Base, adapter: Adapter, token_ids: Sequence[Sequence[int]], continuation: int) -> Trace:
    """Run the base without and with ``adapter`` over the texts; the model keeps the adapter."""
    model: Any = base.model
    first = list(token_ids[0][:TRACED_TOKENS])
    states = _block_states(model, first)
    bare = _logits(model, token_ids)
    names = set(adapter.modules())
    apply_adapter(model, adapter, base.name)
    adapted = _logits(model, token_ids)
    layers = {name: module for name, module in model.named_modules() if name in names and hasattr(module, "lora_a")}
    probes = _probes(model, layers, first)
    continuations, margins = [], []
    for text in token_ids:
        tokens, ahead = _greedy(model, text, continuation)
        continuations.append(tokens)
        margins.append(ahead)
    return Trace(Logits(bare, adapted, len(layers)), states, probes, continuations, margins)


def _block_states(model: Any, tokens: list[int]) -> list[np.ndarray]:
    """The state (tokens, dims) after every block."""
    states: list[mx.array] = []

    def record(_: str, x: mx.array, y: Any) -> Any:
        states.append(y[0] if isinstance(y, tuple) else y)
        return y

    with outputs_changed(model, block_names(model), record):
        model(mx.array([tokens]))
    return [np.array(state[0].astype(mx.float32)) for state in states]


def _logits(model: Any, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([np.array(model(mx.array([list(ids)]))[0].astype(mx.float32)) for ids in token_ids])


def _greedy(model: Any, text: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """The most likely ``count`` tokens after ``text``, and each one's lead over the second in logits."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    tokens: list[int] = []
    margins: list[float] = []
    given = list(text)
    for _ in range(count):
        logits = np.array(model(mx.array([given]), cache=cache)[0, -1].astype(mx.float32))
        best = int(logits.argmax())
        tokens.append(best)
        margins.append(float(logits[best] - np.delete(logits, best).max()))
        given = [best]
    return tokens, margins


def _probes(model: Any, layers: dict[str, Any], tokens: list[int]) -> dict[str, Probe]:
    """What the adapter adds to every adapted layer's output, for the inputs the layer has in a run over ``tokens``."""
    inputs_of: dict[str, mx.array] = {}

    def record(name: str, x: mx.array) -> None:
        inputs_of.setdefault(name, x)

    with inputs_seen(model, layers, record):
        model(mx.array([tokens]))
    probes = {}
    for name, layer in layers.items():
        if layer.lora_a.ndim == 3:
            x = np.random.default_rng(0).standard_normal(layer.lora_a.shape[2]).astype(np.float32)
            added = layer.scale * (layer.lora_b @ (layer.lora_a @ mx.array(x)[:, None]))[..., 0]
            probes[name] = Probe(x, np.array(added.astype(mx.float32)), 0.0)
            continue
        x_in = inputs_of.get(name)
        if x_in is None:
            continue
        plain = (layer.embedding if hasattr(layer, "embedding") else layer.linear)(x_in)
        adapted = layer(x_in)
        added = (adapted - plain).astype(mx.float32)[0]
        ids = x_in.dtype in (mx.int32, mx.int64, mx.uint32)
        inputs = np.array(x_in[0] if ids else x_in[0].astype(mx.float32))
        probes[name] = Probe(inputs, np.array(added), float(mx.max(mx.abs(adapted))))
    return probes


@contextmanager
def exact_float32() -> Iterator[str]:
    """Run MLX where float32 products are float32, and yield that device's name.

    On M5 and on CUDA, MLX multiplies float32 matrices with 10-bit mantissas unless ``MLX_ENABLE_TF32=0`` was set
    before its first product (ml-explore/mlx#3860). Where that is too late, the CPU does the comparison.
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
