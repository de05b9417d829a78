"""LoRA training: this project against mlx_lm.lora's trainer and against a plain torch + PEFT loop, on the same rows.

    python bench/training.py --data FOLDER [--rows 32] [--trials 3] [--no-torch] [--no-mlx-lm]

All sides train the same GSM8K rows (FOLDER/gsm8k/train.jsonl) once, prompt masked, from the same token ids, with
rank 16, alpha 32, q/k/v/o of every layer, dropout 0.05, Adam, batch size 4, float32, trial by trial in turns. Each
side has a process of its own: torch with its own libraries, and the number of threads and kind of attention that were
quickest in a short search; mlx_lm.lora as it ships, and once more with this project's ways around MLX's slow spots on
the CPU (``mlx_rsgwm/models/linux_cpu.py``). Speed is completion tokens (the trained ones, as many on every
side) over the wall-clock time of the training call.

The last line is JSON: ``ratio_vs_mlx_lm``, ``ratio_vs_mlx_lm_quickened``, ``ratio_vs_torch`` (above 1: this project is
faster), ``importance_overhead`` and ``directions_overhead`` (shares of a step that keeping these takes) and
``padding_share`` (of all input cells, for each side).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten

from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.bench.sides import SideProcess, loaded_blas, side_process
from mlx_rsgwm.core.machine import examine_machine
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.batching import TokenRow, make_batch, plan_epoch
from mlx_rsgwm.data.corpus import load_corpus, make_rows, save_corpus, tokenize
from mlx_rsgwm.data.questions import load_questions
from mlx_rsgwm.data.template import find_template
from mlx_rsgwm.models.base import load_base, resolve_base
from mlx_rsgwm.models.linux_cpu import lazily
from mlx_rsgwm.models.quicken import quicken
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.directions import DirectionSums
from mlx_rsgwm.training.importance import Importance
from mlx_rsgwm.training.loop import train

PEERS = ("mlx_lm", "mlx_lm_quickened", "torch")
BATCH_SIZE = 4
KEYS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LEARNING_RATE = 1e-4


class OurSide:
    """This project's ``train``, tokenisation included."""

    def __init__(self, base_name: str, corpus: Path) -> None:
        self.base, self.corpus = load_base(base_name, dtype="float32"), load_corpus(corpus)
        self.config = TrainConfig(
            epochs=1, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, schedule="constant", keys=KEYS
        )
        self.facts = {"blas": loaded_blas()}

    def trial(self) -> None:
        """One training call."""
        train(self.base, self.corpus, self.config)
        mx.synchronize()


class Rows:
    """Token rows as mlx-lm's cached data set wants them: mappings of two keys, as its prompt/completion rows are.

    Its length sorting looks at the number of keys, so here as there every row counts as equally long.
    """

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": self.rows[index].tokens, "offset": self.rows[index].prompt_length}

    def process(self, row: dict[str, Any]) -> tuple[list[int], int]:
        """The call mlx-lm's cached data set makes."""
        return list(row["tokens"]), row["offset"]


class MlxLmSide:
    """mlx-lm's own trainer on its own model object, as ``mlx_lm.lora --mask-prompt`` runs it."""

    def __init__(self, base_path: Path, rows: Sequence[TokenRow], folder: Path, quickened: bool) -> None:
        from mlx_lm.utils import load_model

        self.model, _ = load_model(base_path)
        if quickened:
            quicken(self.model)
        self.rows, self.folder = rows, folder
        self.facts = {"blas": loaded_blas()}

    def trial(self) -> None:
        """One training call on new layers."""
        from mlx_lm.tuner.datasets import CacheDataset
        from mlx_lm.tuner.trainer import TrainingArgs
        from mlx_lm.tuner.trainer import train as mlx_lm_train
        from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers

        model, steps = self.model, len(self.rows) // BATCH_SIZE
        model.freeze()
        parameters = {"rank": 16, "scale": 2.0, "dropout": 0.05, "keys": list(KEYS)}
        linear_to_lora_layers(model, len(model.layers), parameters)
        arguments = TrainingArgs(
            batch_size=BATCH_SIZE,
            iters=steps,
            steps_per_report=steps,
            adapter_file=str(self.folder / "adapters.safetensors"),
        )
        with redirect_stdout(sys.stderr), lazily():
            mlx_lm_train(model, optimizers.Adam(LEARNING_RATE), CacheDataset(Rows(self.rows)), None, arguments)
        mx.synchronize()
        remove_lora_layers(model)


class TorchSide:
    """The loop people write: transformers, PEFT, right-padded batches of like length, labels −100 on the prompt."""

    def __init__(self, base_path: Path, rows: Sequence[TokenRow]) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        self.device = "mps" if torch.backends.mps.is_available() else "cpu"
        plain: Any = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
        names = [key.rpartition(".")[2] for key in KEYS]
        settings = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=names)
        self.model: Any = get_peft_model(plain, settings).to(self.device)
        self.plan = plan_epoch(rows, BATCH_SIZE, seed=0, epoch=0)
        self.rows = rows
        self.facts = {"searched": self._search()}

    def trial(self) -> None:
        """One pass over the rows."""
        self._train(self.plan)

    def _search(self) -> dict[str, Any]:
        """Set the threads and the attention that take least time for one batch."""
        import torch

        cores = os.cpu_count() or 1
        tried = {}
        self._train(self.plan[:1])  # allocates
        for threads in sorted({cores, max(1, cores // 2), 1}, reverse=True) if self.device == "cpu" else [cores]:
            for attention in ("sdpa", "eager"):
                torch.set_num_threads(threads)
                self.model.get_base_model().set_attn_implementation(attention)
                started = time.perf_counter()
                self._train(self.plan[:1])
                tried[threads, attention] = time.perf_counter() - started
        threads, attention = min(tried, key=tried.__getitem__)
        torch.set_num_threads(threads)
        self.model.get_base_model().set_attn_implementation(attention)
        seconds = {f"{count} threads, {kind}": round(value, 2) for (count, kind), value in tried.items()}
        return {"threads": threads, "attention": attention, "tried_seconds": seconds}

    def _train(self, plan: Sequence[Sequence[int]]) -> None:
        import torch

        model: Any = self.model
        model.train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
        for indices in plan:
            chosen = [self.rows[index] for index in indices]
            longest = max(len(row.tokens) for row in chosen)
            ids, labels = (np.full((len(chosen), longest), fill) for fill in (0, -100))
            for position, row in enumerate(chosen):
                ids[position, : len(row.tokens)] = row.tokens
                labels[position, row.prompt_length : len(row.tokens)] = row.tokens[row.prompt_length :]
            mask = torch.tensor(ids != 0).to(self.device)
            inputs = {"attention_mask": mask, "labels": torch.tensor(labels).to(self.device), "use_cache": False}
            loss = model(torch.tensor(ids).to(self.device), **inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()


def importance_seconds(base_name: str) -> float:
    """Median seconds that one update of the importance takes at this model's adapter shapes."""
    base = load_base(base_name, dtype="float32")
    from mlx_rsgwm.training.loop import lora_layers

    with lora_layers(base.model, TrainConfig(keys=KEYS).spec(), 0):
        trainable: Any = tree_flatten(base.model.trainable_parameters())
        gradients = {name: mx.ones(value.shape) for name, value in trainable}
    importance = Importance({name: value.shape for name, value in gradients.items()}, 0.999)
    mx.eval(gradients, importance.moments)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        importance.update("draft", gradients)
        mx.eval(importance.moments)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def directions_seconds(base_name: str, rows: Sequence[TokenRow]) -> float:
    """Median seconds that a step's sums over inputs take, at this model's widths and these rows' lengths."""
    base, config = load_base(base_name, dtype="float32"), TrainConfig(keys=KEYS)
    from mlx_rsgwm.training.loop import lora_layers

    with lora_layers(base.model, config.spec(), 0):
        trainable: Any = tree_flatten(base.model.trainable_parameters())
        modules = dict.fromkeys(name.rpartition(".")[0] for name, _ in trainable)
        sums = DirectionSums(base.model, modules, {"draft"}, config.directions, config.directions_every)
    times = []
    for number, indices in enumerate(plan_epoch(rows, BATCH_SIZE, 42, 0)):
        chosen = [rows[index] for index in indices]
        length = make_batch(chosen).inputs.shape[1]
        inputs = {name: mx.random.normal((len(chosen), length, entry.width)) for name, entry in sums.inputs.items()}
        mx.eval(inputs, sums.totals)
        started = time.perf_counter()
        sums.start(chosen, length, [number + index for index in indices])
        for name, x in inputs.items():
            sums.see(name, x)
        sums.add(sums.end())
        mx.eval(sums.totals)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def padding_shares(rows: Sequence[TokenRow]) -> dict[str, float]:
    """Share of input cells that hold padding: our batches, and mlx-lm's (multiples of 32, in its order)."""
    batches = [make_batch([rows[i] for i in batch]) for batch in plan_epoch(rows, BATCH_SIZE, 42, 0)]
    padded, real = sum(b.padded_tokens for b in batches), sum(b.real_tokens for b in batches)
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    peer_batches = list(iterate_batches(CacheDataset(Rows(rows)), BATCH_SIZE, 2048))
    cells = sum(ids[:, :-1].size for ids, _ in peer_batches)
    used = sum(int((lengths[:, 1] - 1).sum().item()) for _, lengths in peer_batches)
    return {"ours": round(padded / (padded + real), 4), "mlx_lm": round(1 - used / cells, 4)}


def measure(
    sides: Mapping[str, SideProcess], parts: Mapping[str, Callable[[], float]], trials: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every side in every trial, taken in turns, and of what is measured in parts of a step.

    The first call of a side also allocates; a trial lasts a minute, so with three or more the median is past it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    in_parts: dict[str, list[float]] = {name: [] for name in parts}
    for trial in range(trials):
        for name, side in sides.items():
            started = time.perf_counter()
            side.call("trial")
            seconds[name].append(time.perf_counter() - started)
            print(f"trial {trial + 1}, {name}: {seconds[name][-1]:.1f} s", flush=True)
        for name, part in parts.items():
            in_parts[name].append(part())
    return seconds, in_parts


def overheads_of(parts: Mapping[str, Sequence[float]], runs: Sequence[float], steps: float) -> dict[str, float]:
    """Medians over trials of the share of a step that each part takes; ``runs`` are the seconds of ``steps`` steps."""
    shares = {name: [part * steps / run for part, run in zip(t, runs, strict=True)] for name, t in parts.items()}
    return {f"{name}_overhead": round(statistics.median(values), 5) for name, values in shares.items()}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/train.jsonl")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=32, help="a multiple of 4: mlx-lm drops the last partial batch")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--no-mlx-lm", action="store_true")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    questions = load_questions("gsm8k", "train", options.data, limit=options.rows)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = save_corpus(folder / "corpus", make_rows(questions, options.rows, 0, 0), find_template("plain"), {})
        rows, _ = tokenize(corpus, load_base(options.base, dtype="float32").tokenizer, 1024)
        path = resolve_base(options.base)
        with ExitStack() as stack:

            def start(name: str, make: Any, *arguments: Any, without_mlx: bool = False) -> SideProcess:
                return stack.enter_context(side_process(name, make, *arguments, without_mlx=without_mlx))

            sides = {"ours": start("this project", OurSide, options.base, folder / "corpus")}
            for name, quickened in () if options.no_mlx_lm else (("mlx_lm", False), ("mlx_lm_quickened", True)):
                sides[name] = start(name, MlxLmSide, path, rows, folder, quickened)
            if not options.no_torch:
                sides["torch"] = start("torch", TorchSide, path, rows, without_mlx=True)
            parts = {
                "importance": partial(importance_seconds, options.base),
                "directions": partial(directions_seconds, options.base, rows),
            }
            seconds, in_parts = measure(sides, parts, options.trials)
            facts = {name: side.facts for name, side in sides.items()}
    trained = sum(len(row.tokens) - row.prompt_length for row in rows)
    overheads = overheads_of(in_parts, seconds["ours"], len(rows) / BATCH_SIZE)
    ratios = {
        name: statistics.median(other / mine for other, mine in zip(times, seconds["ours"], strict=True))
        for name, times in seconds.items()
    }
    result: dict[str, Any] = {
        **{f"ratio_vs_{peer}": round(ratios[peer], 3) if peer in ratios else None for peer in PEERS},
        **overheads,
        "padding_share": padding_shares(rows),
        "completion_tokens": trained,
        "completion_tokens_per_second": {n: round(trained / statistics.median(t), 1) for n, t in seconds.items()},
        "seconds": {name: [round(t, 2) for t in times] for name, times in seconds.items()},
        "rows": len(rows),
        "batch_size": BATCH_SIZE,
        "sides": facts,
        "machine": {"chip": examine_machine(Path.cwd()).chip, "cores": os.cpu_count()},
        "versions": versions(),
    }
    print(f"{result['machine']['chip']}, {result['machine']['cores']} cores")
    for name, rate in result["completion_tokens_per_second"].items():
        print(f"{name:<18}{rate:>8.1f} completion tokens/s  {json.dumps(facts[name])}")
    give_result(result, options.out)


if __name__ == "__main__":
    main()
