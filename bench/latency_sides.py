"""The two sides of the latency bench, each made in a process of its own: bare first, then with adapters, then fused.

The MLX side comes first: it resolves the base, picks the dtype and writes the adapters that torch loads.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlx_rsgwm.bench import works
from mlx_rsgwm.bench.latency import (
    ATTEMPTS,
    LatencyConfig,
    apply_mlx,
    bench_adapter,
    floating_dtype,
    in_dtype,
    question_of,
    random_adapter,
    token_ids,
)
from mlx_rsgwm.bench.sides import loaded_blas
from mlx_rsgwm.bench.works import Times, Trial

Setting = dict[str, Any]


class MlxSide:
    """This project, with the libraries that the environment preloads for it."""

    def __init__(self, config: LatencyConfig, folder: Path) -> None:
        from mlx_rsgwm.converters.peft.convert import to_peft
        from mlx_rsgwm.models.base import load_base

        self.config = config
        started = time.perf_counter()
        self.base = load_base(config.base, dtype=config.dtype)
        load_ms = round((time.perf_counter() - started) * 1e3, 1)
        self.dtype = floating_dtype(self.base.model)
        self.vocabulary = int(self.base.describe()["vocab_size"])
        first = bench_adapter(self.base, config, self.dtype)
        self.spec = first.spec
        seeds = range(config.seed + 1, config.seed + config.pool)
        others = [random_adapter(self.base, first.spec.rank, seed, first.spec.keys) for seed in seeds]
        self.pool: list[Path] = []
        for number, adapter in enumerate([first, *others]):
            converted = in_dtype(adapter, self.base, self.dtype)
            self.pool.append(converted.save(folder / f"adapter-{number}"))
            to_peft(converted, config.base, folder / f"adapter-{number}-peft")
        self.question = question_of(self.base.tokenizer, config.prompt_tokens)
        self.stack = ExitStack()
        self.adapted = False
        self._trial: Trial | None = None
        self.facts = {
            "path": str(self.base.path),
            "dtype": self.dtype,
            "vocabulary": self.vocabulary,
            "load_ms": load_ms,
            "peft": [f"{path}-peft" for path in self.pool],
            "question": self.question,
            "blas": loaded_blas(),
        }

    def prepare(self, work: str) -> dict[str, Any]:
        """Make the trials of ``work`` ready; works come in the bench's order."""
        self.stack.close()
        config, model = self.config, self.base.model
        prompt, forced = token_ids(config, self.vocabulary)
        if work == "train":
            rows = works.training_rows(self.vocabulary, config.rows, config.prompt_tokens, config.seed)
            steps = config.warmup + config.trials
            self._trial = self.stack.enter_context(works.mlx_training(self.base, rows, self.spec, steps))
        elif work == "merge":
            self._trial = works.mlx_merge(self.pool)
        elif work == "loop":
            self._trial = works.mlx_loop(self.base, self.pool, self.question, ATTEMPTS, config.new_tokens)
        else:
            from mlx_rsgwm.models.slots import unwrap

            if work != "forward" and not self.adapted:
                unwrap(model)
                apply_mlx(self.base, self.pool[0])
                self.adapted = True
            if work == "fused":
                works.fuse_mlx(model)
            self._trial = works.mlx_forward(model, prompt, forced)
        return {}

    def trial(self) -> Times:
        """One trial of the prepared work."""
        assert self._trial is not None
        return self._trial()


class TorchSide:
    """transformers and PEFT with torch's own libraries; threads, attention and batching by a short search.

    Every part of a work takes the setting that was quickest in one trial of each.
    """

    def __init__(self, config: LatencyConfig, device: str, mlx: dict[str, Any]) -> None:
        from mlx_rsgwm.converters.parity.torch import load_torch_base

        self.config, self.device, self.mlx = config, device, mlx
        started = time.perf_counter()
        self.model = load_torch_base(Path(mlx["path"]), device, mlx["dtype"], attention="sdpa")
        self.peft = [Path(folder) for folder in mlx["peft"]]
        self.names = [f"adapter-{number}" for number in range(config.pool)]
        self.setting: Setting = {"threads": os.cpu_count() or 1, "attention": "sdpa", "batching": works.BATCHINGS[0]}
        self.adapted = False
        self.facts = {"load_ms": round((time.perf_counter() - started) * 1e3, 1)}
        self._trial: Trial | None = None

    def prepare(self, work: str) -> dict[str, Any]:
        """Make the trials of ``work`` ready; returns ``{"chosen": [setting of each part], "tried": […]}``."""
        if work != "forward":
            self._adapt()
        if work in ("merge", "loop"):
            self._load_pool()
        elif self.adapted:
            self.model.set_adapter("default")
        if work == "fused":
            self.model = self.model.merge_and_unload()
            self.adapted = False
        make = self._trial_of(work)
        best: list[tuple[float, Setting]] = []
        tried = []
        make((self.setting,))()  # the first call allocates
        for setting in self._settings(work):
            times = [round(value, 2) for value in make((setting, setting))()]
            tried.append({**setting, "ms": times})
            best = [
                min(pair, key=lambda entry: entry[0])
                for pair in zip(best or [(float("inf"), setting)] * len(times),
                                [(value, setting) for value in times], strict=True)
            ]  # fmt: skip
        chosen = [setting for _, setting in best]
        self._trial = make(tuple(chosen))
        return {"chosen": chosen, "tried": tried}

    def trial(self) -> Times:
        """One trial of the prepared work."""
        assert self._trial is not None
        return self._trial()

    def _trial_of(self, work: str) -> Callable[[Sequence[Setting]], Trial]:
        config = self.config
        prompt, forced = token_ids(config, self.mlx["vocabulary"])

        def make(settings: Sequence[Setting]) -> Trial:
            def apply(part: int) -> None:
                self._apply(settings[part])

            apply(0)
            if work == "train":
                rows = works.training_rows(self.mlx["vocabulary"], config.rows, config.prompt_tokens, config.seed)
                trial = works.torch_training(self.model, self.device, rows)
            elif work == "merge":
                trial = works.torch_merge(self.model, self.device, self.names)
            elif work == "loop":
                trial = works.torch_loop(
                    self.model, self.device, self._tokenizer(), self.mlx["question"], ATTEMPTS, config.new_tokens,
                    self.names, settings[0]["batching"],
                )  # fmt: skip
            else:
                return works.torch_forward(
                    self.model, self.device, prompt, forced, lambda part: apply(min(part, len(settings) - 1))
                )

            def run() -> Times:
                apply(0)
                return trial()

            return run

        return make

    def _settings(self, work: str) -> list[Setting]:
        """What the search tries: threads on the CPU, kinds of attention, ways to draft three times."""
        cores = os.cpu_count() or 1
        threads = sorted({cores, max(1, cores // 2), 1}, reverse=True) if self.device == "cpu" else [cores]
        attentions = ["sdpa", "eager"] if work != "merge" else ["sdpa"]
        batchings = works.BATCHINGS if work == "loop" else works.BATCHINGS[:1]
        if work == "loop":  # a loop takes seconds: its threads and attention are those of decoding
            threads, attentions = threads[:1], attentions[:1]
        names = ("threads", "attention", "batching")
        return [dict(zip(names, values, strict=True)) for values in itertools.product(threads, attentions, batchings)]

    def _apply(self, setting: Setting) -> None:
        import torch

        if setting["threads"] != self.setting["threads"]:
            torch.set_num_threads(setting["threads"])
        if setting["attention"] != self.setting["attention"]:
            base = self.model.get_base_model() if self.adapted else self.model
            base.set_attn_implementation(setting["attention"])
        self.setting = setting

    def _adapt(self) -> None:
        if not self.adapted:
            from mlx_rsgwm.converters.parity.torch import apply_peft

            self.model = apply_peft(self.model, self.peft[0], widen=False)
            self.adapted = True

    def _load_pool(self) -> None:
        if self.names[0] not in self.model.peft_config:
            for name, folder in zip(self.names, self.peft, strict=True):
                self.model.load_adapter(str(folder), adapter_name=name, autocast_adapter_dtype=False)

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.mlx["path"], local_files_only=True)
