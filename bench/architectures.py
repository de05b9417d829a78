"""PEFT adapters there and back on a tiny random model of every architecture that mlx-lm and transformers share.

    python bench/architectures.py [--only NAME ...] [--out docs/architectures.md] [--json results.json]

A model is a few layers wide and deep, its values random (norms and biases too). Four things are tried with it:

- ``base``: mlx-lm's logits of the bare model against torch's; where these differ, nothing can be said of adapters;
- ``linear``: a PEFT adapter on all linear layers (and experts) → from-peft → MLX's logits against torch's;
- ``rest``: where that is refused, the linear layers without the names that some architectures cannot convert;
- ``saved``: final norm, a block's norms and the head trained whole (modules_to_save) → from-peft → the same;
- ``to``: a random MLX adapter on every layer that mlx-lm adapts → to-peft → PEFT's logits against MLX's.

Each is within 1e-4 of the largest logit, or refused with a reason, or wrong. The last line is JSON: how many of each.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.bench.architecture_configs import ARCHITECTURES, make_config
from mlx_rsgwm.converters.base_layers import BaseLayers, read_base_layers
from mlx_rsgwm.converters.parity.mlx import apply_adapter
from mlx_rsgwm.converters.parity.torch import apply_peft, load_torch_base
from mlx_rsgwm.converters.peft.convert import convert_from_peft, convert_to_peft
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import load_base

IDS = [1, 5, 9, 2, 33, 60, 41, 8, 55, 3, 17]
TOLERANCE = 1e-4
BASE_TOLERANCE = 5e-5  # an adapter's logits cannot agree better than the bare models'
RANK = 3
# Layers that some mixtures cannot convert, or that PEFT takes for experts, and so drops.
REFUSED = ("kv_b_proj", "gate", "gate_proj", "up_proj", "down_proj", "out_proj", "w1", "w2", "w3")


@dataclass(frozen=True)
class Finding:
    """What became of one trial: ``error`` (of the largest logit), or the ``refusal``, or a ``crash``; else nothing."""

    error: float | None = None
    effect: float | None = None
    refusal: str | None = None
    crash: str | None = None

    @property
    def verdict(self) -> str:
        """``crash``, ``refused``, ``none`` for what was not tried, ``right`` or ``WRONG``."""
        if self.crash is not None:
            return "crash"
        if self.refusal is not None:
            return "refused"
        if self.error is None:
            return "none"
        return "right" if self.error <= TOLERANCE else "WRONG"


@dataclass
class Row:
    """An architecture, and what was found by trial."""

    name: str
    findings: dict[str, Finding] = field(default_factory=dict)


def save_model(name: str, folder: Path) -> None:
    """A random model of the architecture as a Hugging Face folder with a tokenizer."""
    import torch
    import transformers

    config, kind = make_config(name)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, kind)(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
    model = model.float().eval()
    generator = torch.Generator().manual_seed(7)
    for _, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    if prefix := ARCHITECTURES[name].get("strip"):
        rename_arrays(folder / "model.safetensors", prefix)
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    saved.update(ARCHITECTURES[name].get("json", {}))
    path.write_text(json.dumps({key: value for key, value in saved.items() if value != "absent"}))
    save_tokenizer(folder)


def rename_arrays(file: Path, prefix: str) -> None:
    """Drop a prefix of every name, and the tied head, as the published file of an older model has them."""
    arrays: Any = mx.load(str(file))
    trunk_arrays = {
        name.removeprefix(prefix): value for name, value in arrays.items() if not name.startswith("lm_head")
    }
    mx.save_safetensors(str(file), trunk_arrays, {"format": "pt"})


def save_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def torch_logits(model: Any) -> np.ndarray:
    """Logits (tokens, vocabulary) float32 of ``IDS`` by a torch model."""
    import torch

    with torch.no_grad():
        return np.asarray(model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].float().numpy())


def mlx_logits(base: Path, adapter: Path | None = None) -> np.ndarray:
    """The same of a base folder in MLX, with an adapter where one is given."""
    model: Any = load_base(str(base), "float32").model
    if adapter is not None:
        apply_adapter(model, Adapter.load(adapter), str(base))
    return np.array(model(mx.array([IDS]))[0].astype(mx.float32))


def random_peft(model: Any, folder: Path, **settings: Any) -> np.ndarray:
    """A PEFT adapter with random values in ``folder``, made by PEFT; returns torch's logits with it."""
    import peft
    import torch

    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": RANK, "lora_alpha": 4, "task_type": "CAUSAL_LM", **settings}
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape) * (0.1 if "lora_" in name else 0.2)
                parameter.data = step if "lora_" in name else parameter.data + step
        logits = torch_logits(adapted)
        adapted.save_pretrained(str(folder))
    return logits


def random_mlx(base: BaseLayers, folder: Path, excluded: Sequence[str] = ()) -> None:
    """A random adapter on every layer of the base that mlx-lm adapts, but for embeddings and some names."""
    rng = np.random.default_rng(3)
    weights: dict[str, mx.array] = {}

    def draw(name: str, *shape: int) -> None:
        weights[name] = mx.array(0.1 * rng.standard_normal(shape).astype(np.float32))

    for module, layer in base.layers.items():
        if any(name in module for name in excluded):
            continue
        if layer.kind == "linear":
            draw(f"{module}.lora_a", layer.inputs, RANK)
            draw(f"{module}.lora_b", RANK, layer.outputs)
        elif layer.kind == "experts":
            draw(f"{module}.lora_a", layer.experts, RANK, layer.inputs)
            draw(f"{module}.lora_b", layer.experts, layer.outputs, RANK)
    keys = tuple(dict.fromkeys(name.rpartition(".")[0] for name in weights))
    manifest = {"kind": "test", "base": base.description}
    Adapter(LoraSpec(RANK, 4 / RANK, 0.0, keys, -1), weights, manifest=manifest).save(folder)


def saved_modules(model: Any) -> list[str]:
    """A choice of norms of a model, by full name, and its head where it is one of its own."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    norms = [name for name, kind in kinds.items() if "Norm" in kind and "visual" not in name and "vision" not in name]
    norm_names = [name for name in norms if getattr(model.get_submodule(name), "weight", None) is not None]
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    tied = tied or getattr(model.config, "tie_word_embeddings", False)
    return list(dict.fromkeys([*norm_names[:4], *norm_names[-1:], *([] if tied else heads_of(model))]))


def heads_of(model: Any) -> list[str]:
    """Names of a torch model's output heads."""
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ("lm_head", "embed_out")]


def attempt(trial: Callable[[], Finding]) -> Finding:
    """What a trial finds; a refusal or crash is a finding too."""
    try:
        return trial()
    except RsgwmError as error:
        return Finding(refusal=str(error))
    except (Exception, SystemExit) as error:  # the sweep goes on, the table says so
        if os.environ.get("RAISE"):
            raise
        return Finding(crash=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def compare(values: np.ndarray, other: np.ndarray, bare: np.ndarray) -> Finding:
    """Largest difference of two logits, and the adapter's effect on the bare ones, over the largest logit."""
    size = float(np.abs(other).max())
    return Finding(float(np.abs(values - other).max()) / size, float(np.abs(other - bare).max()) / size)


def sweep(name: str, work: Path, trials: tuple[str, ...] = ("linear", "saved", "to")) -> Row:
    """All trials with one architecture."""
    row = Row(name)
    folder = work / "base"
    state: dict[str, Any] = {}

    def base() -> Finding:
        save_model(name, folder)
        state["model"] = load_torch_base(folder, "cpu", "float32")
        state["bare"] = torch_logits(state["model"])
        return compare(mlx_logits(folder), state["bare"], 0 * state["bare"])

    def converted(kind: str, **settings: Any) -> Finding:
        model = copy.deepcopy(state["model"])
        expected = random_peft(model, work / f"{kind}-peft", **settings)
        convert_from_peft(work / f"{kind}-peft", read_base_layers(str(folder), folder), work / f"{kind}-mlx")
        return compare(mlx_logits(folder, work / f"{kind}-mlx"), expected, state["bare"])

    def linear() -> Finding:
        excluded = ARCHITECTURES[name].get("exclude")
        return converted("linear", target_modules="all-linear", **({"exclude_modules": excluded} if excluded else {}))

    def rest() -> Finding:
        """What remains where one layer keeps all the others from being converted."""
        modules = [key for key, module in state["model"].named_modules() if type(module).__name__ == "Linear"]
        targets = [
            key for key in modules if key.rpartition(".")[2] not in REFUSED and key not in heads_of(state["model"])
        ]
        return converted("rest", target_modules=targets)

    def saved() -> Finding:
        model = state["model"]
        targets = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
        inner = [
            target
            for target in targets
            if target not in heads_of(model) and "vis" not in target and "out_proj" not in target
        ]
        return converted("saved", target_modules=inner[:1], modules_to_save=saved_modules(model))

    def to() -> Finding:
        excluded = ARCHITECTURES[name].get("to exclude", ARCHITECTURES[name].get("exclude", ()))
        random_mlx(read_base_layers(str(folder), folder), work / "to-mlx", excluded)
        convert_to_peft(work / "to-mlx", str(folder), work / "to-peft")
        adapted = apply_peft(copy.deepcopy(state["model"]), work / "to-peft", widen=True)
        return compare(torch_logits(adapted), mlx_logits(folder, work / "to-mlx"), state["bare"])

    row.findings["base"] = attempt(base)
    if row.findings["base"].verdict == "right" and (row.findings["base"].error or 0) < BASE_TOLERANCE:
        for trial in (linear, saved, to):
            if trial.__name__ in trials:
                row.findings[trial.__name__] = attempt(trial)
        if "linear" in trials and row.findings["linear"].verdict == "refused":
            row.findings["rest"] = attempt(rest)
    return row


HEADER = """# Architectures

Adapters of every architecture that mlx-lm and transformers share and that a tiny random model can be made of, tried by

    python bench/architectures.py --out docs/architectures.md

{about}

A number is the largest difference of logits in the unit of the largest logit, float32, mlx-lm {mlx_lm} against
transformers {transformers} and PEFT {peft}; up to 1e-4 is right. "Refused" quotes the command's reason. Where the bare
models differ already ("base"), or one of the libraries cannot load the model, nothing more is tried.

| architecture | base | linear | rest | saved | to PEFT |
|---|---|---|---|---|---|
"""


def write_table(rows: Sequence[Row], path: Path) -> None:
    """The Markdown table of all rows, with the versions it was made with."""
    from importlib.metadata import version

    about = (__doc__ or "").split("\n\n")[3].replace("``", "`")
    versions = {name.replace("-", "_"): version(name) for name in ("mlx-lm", "transformers", "peft")}
    lines = [
        f"| {row.name} | " + " | ".join(cell(row.findings.get(trial)) for trial in ("base", *TRIALS)) + " |"
        for row in rows
    ]
    path.write_text(HEADER.format(about=about, **versions) + "\n".join(lines) + "\n")


TRIALS = ("linear", "rest", "saved", "to")


def cell(finding: Finding | None) -> str:
    """One cell of the table."""
    if finding is None:
        return ""
    if finding.verdict == "crash":
        return f"fails: {finding.crash}"[:160].replace("|", "\\|")
    if finding.error is not None:
        return f"{finding.error:.0e}" if finding.verdict == "right" else f"**{finding.error:.0e}**"
    text = (finding.refusal or finding.crash or "").replace("|", "\\|")
    text = text.partition(": ")[2] or text
    return f"{finding.verdict}: {text[:160]}"


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="leave every folder below this one")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only or sorted(ARCHITECTURES):
        with tempfile.TemporaryDirectory() as temporary:
            work = (arguments.keep or Path(temporary)) / name
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            row = sweep(name, work)
        rows.append(row)
        print(name, *(f"{trial}: {cell(seen)};" for trial, seen in row.findings.items()), flush=True)
    counts: dict[str, int] = {"bases that differ or do not load": 0}
    for row in rows:
        for trial, finding in row.findings.items():
            untried = trial == "base" and finding.verdict != "right"
            verdict = "bases that differ or do not load" if untried else finding.verdict
            counts[verdict] = counts.get(verdict, 0) + 1
    if arguments.out:
        write_table(rows, arguments.out)
    if arguments.json:
        table = {row.name: {key: vars(value) for key, value in row.findings.items()} for row in rows}
        arguments.json.write_text(json.dumps(table, indent=1))
    print(json.dumps({"architectures": len(rows), **counts}))
    sys.exit(1 if counts.get("WRONG") or counts.get("crash") else 0)


if __name__ == "__main__":
    main()
