"""mlx-lm's LoRA and DoRA layers on a base model, for the length of a training run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.nearest import nearest
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.fit_check import linear_shape
from mlx_rsgwm.models.hooks import Call, block_names, calls_wrapped, modules_replaced, outputs_changed
from mlx_rsgwm.models.linux_cpu import Dropout, applies

LAYERS: dict[str, Any] = {"lora": LoRALinear, "dora": DoRALinear}
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


def initial_factors(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, mx.array]:
    """lora_a (in, rank) ~ U(±1/sqrt(in)) for every module of ``shapes`` (module → (in, out)), float32.

    The stream is named by seed and module, so that adapters of a pool share A whatever modules each of them adapts.
    """
    factors = {}
    for module, (inputs, _) in shapes.items():
        digest = hashlib.sha256(f"{seed}/{module}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))
        bound = 1 / math.sqrt(inputs)
        factors[f"{module}.lora_a"] = mx.array(generator.uniform(-bound, bound, (inputs, rank)).astype(np.float32))
    return factors


def target_modules(model: Any, spec: LoraSpec) -> dict[str, nn.Module]:
    """The layers that ``spec`` names, by full name, in the model's order.

    As in mlx-lm a key names a linear layer inside the last blocks, or by its full name one outside of them: the head
    (``lm_head``) or, for LoRA, the embedding (``model.embed_tokens``).

    Raises:
        RsgwmError: a key that matches nothing, more layers than there are, a rank above a layer's dimensions.
    """
    inside = {name for block in model.layers for name, _ in block.named_modules()}
    present = dict(model.named_modules())
    unmatched = sorted(set(spec.keys) - inside - set(present))
    if unmatched:
        known = [name for name, module in model.layers[-1].named_modules() if hasattr(module, "weight")]
        blocks = {id(module) for block in model.layers for module in block.modules()}
        known += [name for name, module in present.items() if hasattr(module, "weight") and id(module) not in blocks]
        raise RsgwmError(f"no layer has a module {', '.join(unmatched)}; {_meant(unmatched, sorted(known))}")
    if spec.num_layers > len(model.layers):
        raise RsgwmError(f"num_layers is {spec.num_layers}, but the model has {len(model.layers)} layers")
    blocks = model.layers if spec.num_layers == -1 else model.layers[-spec.num_layers :]
    wanted = {id(module) for block in blocks for name, module in block.named_modules() if name in spec.keys}
    modules = {name: module for name, module in present.items() if id(module) in wanted or name in spec.keys}
    problems, narrow = [], {}
    for name, module in modules.items():
        embedding = isinstance(module, EMBEDDINGS)
        if not embedding and not isinstance(module, (nn.Linear, nn.QuantizedLinear)):
            problems.append(f"{name} is a {type(module).__name__}; only linear layers and embeddings can be adapted")
        elif embedding and spec.fine_tune_type == "dora":
            problems.append(f"{name} is an embedding; DoRA there cannot be trained")
        elif spec.rank > min(linear_shape(module)):
            narrow[name] = linear_shape(module)
    if narrow:
        problems.append(_too_high(spec.rank, narrow))
    raise_problems("target keys", problems)
    return modules


def _too_high(rank: int, narrow: Mapping[str, tuple[int, int]]) -> str:
    """What is wrong with a rank that is above the dimensions of some layers, and the highest that is not."""
    name, (inputs, outputs) = min(narrow.items(), key=lambda layer: (min(layer[1]), layer[0]))
    where = f"{name} ({inputs}→{outputs})" + (f" and of {len(narrow) - 1} more layers" if len(narrow) > 1 else "")
    return f"rank {rank} is above the dimensions of {where}; take {min(inputs, outputs)} or less"


def _meant(keys: list[str], known: list[str]) -> str:
    """Which layers keys that match none may mean: mlx-lm takes ``self_attn.q_proj``, PEFT ``q_proj``."""
    leaves = {name.rpartition(".")[2] for name in known}
    near = {key: nearest(key.rpartition(".")[2], leaves) for key in keys}
    full = {key: [name for name in known if name.split(".")[-1] == near[key]] for key in keys}
    if all(full.values()):
        return f"write {', '.join(name for names in full.values() for name in names)}"
    return f"there are {', '.join(known)}"


def factor_shape(module: nn.Module) -> tuple[int, int]:
    """``(in, out)`` of the factors of a layer: lora_a (in, r), lora_b (r, out); of an embedding (entries, dims)."""
    shape = linear_shape(module)
    return shape[::-1] if isinstance(module, EMBEDDINGS) else shape


def expert_keys(model: Any) -> tuple[str, ...]:
    """Names of the experts' layers inside the blocks, which mlx-lm adapts where no keys are named and this does not."""
    kinds = (SwitchLinear, QuantizedSwitchLinear)
    modules = (pair for block in model.layers for pair in block.named_modules())
    return tuple(dict.fromkeys(name for name, module in modules if isinstance(module, kinds)))


def linear_keys(model: Any) -> tuple[str, ...]:
    """Names of every linear layer inside the model's blocks, in order."""
    return tuple(
        dict.fromkeys(
            name
            for block in model.layers
            for name, module in reversed(block.named_modules())
            if isinstance(module, (nn.Linear, nn.QuantizedLinear))
        )
    )


@contextmanager
def adapted(
    model: Any, modules: Mapping[str, nn.Module], spec: LoraSpec, weights: Mapping[str, mx.array]
) -> Iterator[None]:
    """Wrap ``modules`` of ``model`` in trainable layers that hold ``weights``; put them back at the end.

    What ``weights`` does not name stays as mlx-lm makes it: lora_b zero, DoRA's m the norms of the base's rows.
    """
    model.freeze()
    layers = {}
    for name, module in modules.items():
        kind: Any = LoRAEmbedding if isinstance(module, EMBEDDINGS) else LAYERS[spec.fine_tune_type]
        layers[name] = kind.from_base(module, r=spec.rank, dropout=spec.dropout, scale=spec.scale)
        if applies():
            layers[name].dropout = Dropout(spec.dropout)
    try:
        with modules_replaced(model, layers):
            model.update(tree_unflatten(list(weights.items())))
            mx.eval(model.trainable_parameters())
            yield
    finally:
        model.freeze()
        model.eval()


@contextmanager
def lora_layers(model: Any, spec: LoraSpec, seed: int) -> Iterator[dict[str, mx.array]]:
    """Put mlx-lm's layers into ``model`` with seeded factors; take them out again at the end.

    Yields lora_a at initialisation by parameter name. lora_b starts at zero.
    """
    modules = target_modules(model, spec)
    init = initial_factors({name: factor_shape(module) for name, module in modules.items()}, spec.rank, seed)
    with adapted(model, modules, spec, init):
        yield init


@contextmanager
def updates_beneath(model: Any, adapter: Adapter | None) -> Iterator[None]:
    """The layers of ``model`` also add what ``adapter`` adds, which is not trained; without one, nothing changes.

    Raises:
        RsgwmError: it adapts an embedding, or a layer with several experts.
    """
    if adapter is None:
        yield
        return
    present = dict(model.named_modules())
    factors = {module: (a, adapter.spec.scale * b) for module, a, b in adapter.factors()}
    raise_problems(
        "cannot be trained on top of",
        [name for name, (a, _) in factors.items() if a.ndim != 2 or isinstance(present.get(name), LoRAEmbedding)],
    )

    def add(name: str, x: mx.array, y: mx.array) -> mx.array:
        a, b = factors[name]
        return y + ((x @ a) @ b).astype(y.dtype)

    with outputs_changed(model, factors, add):
        yield


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """The trained parameters by name, sorted."""
    flat: Any = tree_flatten(model.trainable_parameters())
    return dict(sorted(flat))


@contextmanager
def recomputed_blocks(model: Any, next_seed: Callable[[], int]) -> Iterator[None]:
    """Gradient checkpointing: a block keeps only its inputs and runs again in the backward pass.

    Running again draws dropout again, and ``mx.checkpoint`` would then differentiate through other masks than those of
    the forward pass (mlx-lm 0.32.2 with ``--grad-checkpoint`` and dropout does). So every run of a block starts by
    seeding the stream with a number that ``next_seed`` gave its first run.
    """

    def checkpointed(_: str, call: Call) -> Call:
        def recomputing(block: Any, *arguments: Any, **options: Any) -> Any:
            if not block.training:
                return call(block, *arguments, **options)
            seed = next_seed()

            def inner(parameters: Any, *arguments: Any, **options: Any) -> Any:
                mx.random.seed(seed)
                block.update(parameters)
                return call(block, *arguments, **options)

            return mx.checkpoint(inner)(block.trainable_parameters(), *arguments, **options)

        return recomputing

    with calls_wrapped(model, block_names(model), checkpointed):
        yield
