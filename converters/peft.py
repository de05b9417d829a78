"""LoRA adapters between this project's folders and PEFT's, bit for bit in both directions.

The two formats hold the same numbers: ``lora_A.weight`` (r, in) is ``lora_a`` (in, r) transposed, ``lora_B.weight``
(out, r) is ``lora_b`` (r, out) transposed, and ``lora_alpha / r`` (``/ sqrt(r)`` for rsLoRA) is ``scale``. What PEFT
has no place for (importance, initialisation, manifest, a scale that no alpha divides back to) travels in the folder
``mlx_rsgwm/`` beside PEFT's two files; it counts only while those two files are the ones it was written with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from safetensors import safe_open

from mlx_rsgwm import files
from mlx_rsgwm.adapter import WEIGHTS_FILE, Adapter, LoraSpec, versions
from mlx_rsgwm.base import ALIASES, describe_base, fingerprint_of, resolve_base, weight_files
from mlx_rsgwm.converters.peft_config import alpha_for, config_problems, scale_of
from mlx_rsgwm.converters.peft_sidecar import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE, read_sidecar, restore, write_sidecar
from mlx_rsgwm.errors import AdapterError, RsgwmError, raise_problems
from mlx_rsgwm.progress import SILENT, Progress

PREFIX = "base_model.model."
LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
BLOCK_MODULE = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<key>.+)")


class ModuleName(NamedTuple):
    """Where a module sits: its block and its name inside the block."""

    layer: int
    key: str


# --- MLX to PEFT ------------------------------------------------------------------------------------------------


def to_peft(adapter: Adapter, base_name: str, out: Path) -> Path:
    """Write ``adapter`` as a PEFT folder that ``PeftModel.from_pretrained`` loads.

    Arrays keep their dtype and bits. ``adapter_config.json`` is written last, so a folder that holds it is whole.

    Args:
        adapter: linear LoRA on modules of ``model.layers.N``.
        base_name: what ``base_model_name_or_path`` says (an alias as its Hub id, which PEFT can find).
        out: a folder that does not exist yet, or an empty one.

    Raises:
        AdapterError: naming every reason why this adapter has no PEFT form here.
        RsgwmError: the folder is not empty or cannot be written.
    """
    raise_problems(adapter.where, [*adapter.problems(), *_unconvertible(adapter)], AdapterError)
    config = peft_config(adapter, base_name)
    arrays = {}
    for module, a, b in adapter.factors():
        arrays[f"{PREFIX}{module}.lora_A.weight"] = mx.contiguous(a.T)
        arrays[f"{PREFIX}{module}.lora_B.weight"] = mx.contiguous(b.T)
    groups = (arrays, adapter.importance, adapter.init)
    require_empty(out)
    files.require_space(out, sum(value.nbytes for group in groups for value in group.values()) + 2**20)
    files.make_folder(out)
    files.write_safetensors(out / PEFT_WEIGHTS_FILE, arrays, {"format": "pt"})
    write_sidecar(adapter, config, out)
    files.write_json(out / PEFT_CONFIG_FILE, config)
    return out


def require_empty(out: Path) -> None:
    """Refuse an output folder that holds anything: a half-old, half-new adapter must never exist."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RsgwmError(f"{out} exists and is not an empty folder; choose another one or remove it")


def peft_config(adapter: Adapter, base_name: str) -> dict[str, Any]:
    """PEFT's ``adapter_config.json`` for ``adapter``.

    An adapter that came from PEFT, and whose rank, scale, dropout and modules are still the same, gets its own
    configuration back.
    """
    if base_name in ALIASES:
        base_name = ALIASES[base_name].hub_id
    original = _original_config(adapter)
    if original is not None:
        return {**original, "base_model_name_or_path": base_name}
    spec = adapter.spec
    targets, layers = _targets(adapter)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": spec.rank,
        "lora_alpha": alpha_for(spec.scale, spec.rank),
        "lora_dropout": spec.dropout,
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": None if layers is None else "layers",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }


def _unconvertible(adapter: Adapter) -> list[str]:
    problems = []
    if adapter.spec.fine_tune_type != "lora":
        problems.append(f"fine_tune_type {adapter.spec.fine_tune_type} is not converted yet, only lora")
    for name, value in adapter.weights.items():
        module = name.rpartition(".")[0]
        if value.ndim != 2:
            problems.append(f"{name} has shape {value.shape}: expert stacks are not converted yet")
        elif reason := _module_problem(module):
            problems.append(reason)
        if value.dtype not in DTYPES:
            problems.append(f"{name} is {_dtype_name(value)}; float32, float16 and bfloat16 are converted")
    return list(dict.fromkeys(problems))


def _module_problem(module: str) -> str | None:
    """Why this project has no place for an adapter on ``module``, or None."""
    if "embed" in module.rpartition(".")[2] or module == "lm_head":
        return f"{module}: embeddings and lm_head are not converted yet"
    if ".experts." in module or ".switch_mlp." in module:
        return f"{module}: expert layers are not converted yet"
    if not BLOCK_MODULE.fullmatch(module):
        return f"{module}: only modules of model.layers.N are converted"
    return None


def _dtype_name(value: mx.array) -> str:
    return str(value.dtype).removeprefix("mlx.core.")


def module_name(module: str) -> ModuleName:
    """``model.layers.3.self_attn.q_proj`` as ``(3, "self_attn.q_proj")``."""
    match = BLOCK_MODULE.fullmatch(module)
    assert match is not None, module
    return ModuleName(int(match["layer"]), match["key"])


def _targets(adapter: Adapter) -> tuple[list[str], list[int] | None]:
    """``target_modules`` and ``layers_to_transform`` that select exactly the adapted modules.

    Names inside the block, matched as suffixes, when every adapted block has the same ones; full names otherwise.
    """
    modules = adapter.modules()
    names = [module_name(module) for module in modules]
    layers, keys = sorted({name.layer for name in names}), list(dict.fromkeys(name.key for name in names))
    if len(set(names)) != len(layers) * len(keys):
        return modules, None
    depth = (adapter.manifest.get("base") or {}).get("num_layers")
    return keys, None if layers == list(range(depth or 0)) else layers


def _original_config(adapter: Adapter) -> dict[str, Any] | None:
    source = adapter.manifest.get("source") or {}
    config = source.get("config")
    if source.get("format") != "peft" or not isinstance(config, dict):
        return None
    same = (
        scale_of(config) == adapter.spec.scale
        and config.get("r") == adapter.spec.rank
        and float(config.get("lora_dropout") or 0.0) == adapter.spec.dropout
        and source.get("modules_sha256") == _modules_hash(adapter.modules())
    )
    return config if same else None


def _modules_hash(modules: Iterable[str]) -> str:
    return files.sha256_json(sorted(modules))


# --- PEFT to MLX ------------------------------------------------------------------------------------------------


def from_peft(folder: Path, base: Mapping[str, Any] | None = None) -> Adapter:
    """Read a PEFT folder as an :class:`Adapter` (in memory; ``Adapter.save`` writes it).

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: ``Base.describe()`` of the base model, recorded in the manifest; with its ``num_layers`` the adapted
            blocks are counted from the last, as mlx-lm does, and layer numbers are checked.

    Raises:
        AdapterError: one line with every reason: a missing, pickled or damaged file, a PEFT option without a
            counterpart, wrong names, shapes, dtypes or values, layers the base does not have.
    """
    folder = Path(folder)
    _require_peft_files(folder)
    config = files.read_json_object(folder / PEFT_CONFIG_FILE)
    problems = config_problems(config)
    arrays, metadata = files.read_safetensors(folder / PEFT_WEIGHTS_FILE)
    weights, found = _weights_from(arrays, config)
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in weights))
    depth = (base or {}).get("num_layers")
    if depth is not None:
        beyond = sorted({module_name(module).layer for module in modules} - set(range(depth)))
        found += [f"layer {layer} is not in the base model, which has {depth} layers" for layer in beyond]
    raise_problems(str(folder), problems + found, AdapterError)
    adapter = Adapter(_spec_from(config, modules, depth), weights, path=folder)
    sidecar = read_sidecar(folder, config)
    if sidecar is not None:
        adapter = restore(adapter, sidecar, folder)
        _require_same_base(adapter, base)
    if not adapter.manifest:
        adapter.manifest = _manifest_for(config, modules, metadata, base)
    raise_problems(str(folder), adapter.problems(), AdapterError)
    return adapter


def from_peft_on(folder: Path, base_name: str, progress: Progress = SILENT) -> Adapter:
    """:func:`from_peft` for a named base, with every module's shape checked against the base's weights.

    The base is resolved (fetched if need be) only once the adapter itself is known to be sound; it is not loaded.
    """
    from_peft(folder)
    path = resolve_base(base_name, progress)
    adapter = from_peft(
        folder, describe_base(base_name, fingerprint_of(path), files.read_json_object(path / "config.json"))
    )
    problems = _fit_problems(adapter, path)
    raise_problems(f"{folder} does not fit {base_name}", problems, AdapterError)
    return adapter


def _fit_problems(adapter: Adapter, path: Path) -> list[str]:
    """Modules the base in ``path`` does not have, or has with other dimensions; packed weights have no plain shape."""
    shapes = {}
    for file in weight_files(path):
        with safe_open(str(file), framework="np") as tensors:
            shapes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118
    problems = []
    for module, a, b in adapter.factors():
        found, wanted = shapes.get(f"{module}.weight"), (b.shape[1], a.shape[0])
        if found is None:
            problems.append(f"the base has no {module}")
        elif found != wanted and f"{module}.scales" not in shapes:
            problems.append(f"{module} is {found} in the base, the adapter is for {wanted}")
    return problems


def _spec_from(config: Mapping[str, Any], modules: list[str], depth: int | None) -> LoraSpec:
    names = [module_name(module) for module in modules]
    return LoraSpec(
        rank=int(config["r"]),
        scale=scale_of(config),
        dropout=float(config.get("lora_dropout", 0.0)),
        keys=tuple(dict.fromkeys(name.key for name in names)),
        num_layers=-1 if depth is None else depth - min(name.layer for name in names),
    )


def _weights_from(arrays: Mapping[str, mx.array], config: Mapping[str, Any]) -> tuple[dict[str, mx.array], list[str]]:
    """mlx-lm's names and layout for PEFT's arrays, in layer order, and every problem found on the way."""
    rank = config.get("r")
    pairs: dict[str, dict[str, mx.array]] = {}
    problems = []
    for name, value in arrays.items():
        leaf = next((ours for ours, theirs in LEAVES.items() if name.endswith("." + theirs)), None)
        if not name.startswith(PREFIX) or leaf is None:
            problems.append(f"unknown array {name}{_explain_array(name)}")
            continue
        module = name[len(PREFIX) : -len(LEAVES[leaf]) - 1]
        if reason := _module_problem(module):
            problems.append(reason)
        elif value.dtype not in DTYPES:
            problems.append(f"{name} is {_dtype_name(value)}; float32, float16 and bfloat16 are converted")
        elif value.ndim != 2 or value.shape[0 if leaf == "lora_a" else 1] != rank:
            problems.append(f"{name} has shape {value.shape}, which does not have rank {rank}")
        else:
            pairs.setdefault(module, {})[leaf] = mx.contiguous(value.T)
    weights = {}
    for module in sorted(pairs, key=module_name):
        missing = [theirs for ours, theirs in LEAVES.items() if ours not in pairs[module]]
        problems += [f"{module} has no sound {theirs}" for theirs in missing]
        if not missing:
            weights.update({f"{module}.{leaf}": pairs[module][leaf] for leaf in LEAVES})
    if not weights and not problems:
        problems.append(f"{PEFT_WEIGHTS_FILE} holds no LoRA arrays")
    mx.eval(weights)
    return weights, list(dict.fromkeys(problems))


def _explain_array(name: str) -> str:
    hints = {
        "lora_magnitude_vector": "DoRA magnitudes are not converted yet",
        "lora_embedding_": "LoRA on embeddings is not converted yet",
        "lora_B.bias": "a bias on lora_B is not converted",
        "modules_to_save": "fully trained modules are not converted yet",
        "hada_": "this is LoHa",
        "lokr_": "this is LoKr",
        "lora_E": "this is AdaLoRA",
        "ia3_": "this is IA3",
    }
    found = next((text for part, text in hints.items() if part in name), None)
    return f" ({found})" if found else ""


def _manifest_for(
    config: Mapping[str, Any], modules: list[str], metadata: Mapping[str, str], base: Mapping[str, Any] | None
) -> dict[str, Any]:
    named = {"name": config.get("base_model_name_or_path"), "fingerprint": None}
    return {
        "kind": "converted",
        "base": dict(base) if base is not None else named,
        "source": {
            "format": "peft",
            "config": dict(config),
            "metadata": dict(metadata),
            "modules_sha256": _modules_hash(modules),
        },
        "versions": versions(),
    }


def _require_same_base(adapter: Adapter, base: Mapping[str, Any] | None) -> None:
    ours, given = adapter.base_fingerprint, (base or {}).get("fingerprint")
    if ours and given and ours != given:
        name = (adapter.manifest.get("base") or {}).get("name")
        raise AdapterError(
            f"{adapter.where} was trained on {name} ({ours[:12]}), not on {(base or {}).get('name')} ({given[:12]})"
        )


def _require_peft_files(folder: Path) -> None:
    if not folder.is_dir():
        raise AdapterError(f"PEFT folder {folder} does not exist")
    names = {file.name for file in folder.iterdir()}
    if PEFT_WEIGHTS_FILE not in names:
        pickles = sorted(name for name in names if Path(name).suffix in files.PICKLE_SUFFIXES)
        if pickles:
            raise AdapterError(
                f"{folder}: {pickles[0]} is a pickle file, which can run code when loaded; "
                f"only {PEFT_WEIGHTS_FILE} is read"
            )
        if f"{PEFT_WEIGHTS_FILE}.index.json" in names:
            raise AdapterError(f"{folder}: sharded adapters are not converted yet, only one {PEFT_WEIGHTS_FILE}")
        if WEIGHTS_FILE in names:
            raise AdapterError(f"{folder} is an mlx-lm adapter already; rsgwm convert to-peft goes the other way")
        raise AdapterError(f"{folder} holds no {PEFT_WEIGHTS_FILE}; it is not a PEFT adapter folder")
    if PEFT_CONFIG_FILE not in names:
        raise AdapterError(f"{folder} holds no {PEFT_CONFIG_FILE}; it is not a whole PEFT adapter folder")
