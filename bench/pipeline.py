"""What draft–verify costs: latency against the drafter alone, items a minute against a plain loop, memory, switching.

    python bench/pipeline.py --run runs/demo [--items 40] [--trials 1] [--out results.json]

``--run`` is a finished demo run: its drafter, verifier, template, score and threshold are used, on held-out questions
of the embedded families. Everything runs in one process. Latency: for every item the drafter alone (one draft), then
draft–verify in each mode, at batch 1, the order of the sides turning from item to item; all modes must give the same
answers. Throughput: the same items through ``answer_many`` and through the loop that a script would be: mlx-lm's
``generate_step`` on a resident drafter and a plain forward pass of a resident verifier (two of mlx-lm's own models, so
that it never has to switch), drafting the same tokens, as often as the loop decided. Pool: draft–verify with the run's
pool (four adapters at most) as verifier against the merged one, all three drafts of every item scored by mean_logprob;
``--pool-only`` measures nothing else.

The last line is JSON: ``latency_ratio`` by mode (mean latency over the drafter's; ``latency_ratio_median`` of medians),
``throughput_ratio``, ``memory_ratio`` (peak over base + adapters + key–value caches), ``switch_ms``, ``pool``
(``latency_ratio`` one question at a time, ``batched_ratio`` of the seconds that ``answer_many`` takes).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.bench.shapes import TINYLLAMA
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.select import select_questions
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.data.word_problems import PLAIN
from mlx_rsgwm.inference.batched_decode import BatchedDecoder
from mlx_rsgwm.inference.calibration import load_calibration
from mlx_rsgwm.inference.draft import Answer, Draft
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import slots_of
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.prefix_cache import GROWTH
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.models.adapter import Adapter, is_complete
from mlx_rsgwm.models.adapter_sources import load_adapter
from mlx_rsgwm.models.base import load_base, resolve_base
from mlx_rsgwm.models.slots import AdapterSlots

MODES = ("sequential", "parallel", "adaptive")
LARGEST_POOL = 4


def load(run: Path, base_name: str, max_tokens: int) -> dict[str, DraftVerify]:
    """One pipeline for each mode, all on the same slots."""
    slots = slots_of(load_base(base_name, dtype="float32"), {name: run / name for name in ("drafter", "verifier")})
    template = Template.from_description(slots.adapter("drafter").manifest["template"])
    calibration = load_calibration(run / "verifier")
    threshold = calibration.threshold if calibration else 0.7
    score = calibration.score if calibration else "mean_logprob"
    sampling = Sampling(max_tokens=max_tokens)
    return {
        mode: DraftVerify(slots, template, "drafter", "verifier", LoopConfig(3, threshold, score, sampling, mode))
        for mode in MODES
    }


def drafter_alone(pipeline: DraftVerify) -> Callable[[str], Any]:
    """The first draft of a question by the same code, and nothing else."""

    def run(question: str) -> Any:
        prompt = pipeline.template.draft_prompt(pipeline.tokenizer, question)
        with pipeline.slots.using("drafter"):
            decoder = BatchedDecoder(pipeline.slots.model, pipeline.parts, pipeline.end_ids, pipeline.config.sampling)
            decoder.read([prompt], [question], [1])
            while not decoder.ended:
                decoder.step([(0, 1)])

    return run


def latencies(pipelines: dict[str, DraftVerify], questions: Sequence[str], trials: int) -> dict[str, list[float]]:
    """Seconds by side, one entry an item: the least over ``trials``."""
    sides: dict[str, Callable[[str], Any]] = {"drafter": drafter_alone(pipelines["sequential"])}
    sides |= {mode: pipeline.answer for mode, pipeline in pipelines.items()}
    names = list(sides)
    for run in sides.values():
        run(questions[0])
    by_name: dict[str, list[float]] = {name: [] for name in names}
    for index, question in enumerate(questions):
        best, said = dict.fromkeys(names, float("inf")), {}
        for trial in range(trials):
            turn = (index + trial) % len(names)
            for name in names[turn:] + names[:turn]:
                started = time.perf_counter()
                said[name] = sides[name](question)
                best[name] = min(best[name], time.perf_counter() - started)
        answers = {(said[mode].text, said[mode].attempts, said[mode].accepted) for mode in MODES}
        assert len(answers) == 1, f"the modes disagree on {question!r}: {answers}"
        for name, seconds in best.items():
            by_name[name].append(seconds)
        shown = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in best.items())
        print(f"item {index + 1}, {said['parallel'].attempts} attempts, ms: {shown}", flush=True)
    return by_name


def one_by_one(
    base_path: Path, run: Path, template: Template, drafts: Sequence[tuple[str, list[Draft]]]
) -> Callable[[], None]:
    """The plain loop on mlx-lm's own models and adapter layers; tokens are given, so both sides do the same work."""
    from mlx_lm.generate import generate_step
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model, load_tokenizer

    tokenizer = load_tokenizer(base_path)
    models = {role: load_adapters(load_model(base_path)[0], str(run / role)) for role in ("drafter", "verifier")}
    for model in models.values():
        model.eval()

    def loop() -> None:
        for question, attempts in drafts:
            prompt = template.draft_prompt(tokenizer, question)
            for draft in attempts:
                tokens = [*draft.tokens, *([tokenizer.eos_token_id] if draft.finished else [])]
                given = iter(tokens)

                def next_given(_: mx.array, given: Iterator[int] = given) -> mx.array:
                    return mx.array([next(given, 0)])

                steps = generate_step(
                    mx.array(prompt),
                    models["drafter"],
                    max_tokens=len(tokens),
                    sampler=next_given,
                )
                for _ in steps:
                    pass
                logits = models["verifier"](mx.array([[*prompt, *tokens]]))[0]
                values = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                rows = mx.arange(len(prompt) - 1, len(prompt) - 1 + len(tokens))
                mx.eval(mx.exp(values[rows, mx.array(tokens)].mean()))

    return loop


def throughput(
    pipelines: dict[str, DraftVerify], base_path: Path, run: Path, questions: Sequence[str], batch_rows: int
) -> dict[str, float]:
    """Items a minute by ``answer_many`` and by the one-by-one loop, in turns, a quarter of the items at a time."""
    pipeline = pipelines["parallel"]
    drafts = []
    for question in questions:
        steps = list(pipeline.steps(question))
        drafts.append((question, [step for step in steps if isinstance(step, Draft) and step.state == "drafted"]))
    seconds = {"ours": 0.0, "one_by_one": 0.0}
    pipeline.answer_many(questions[:4], batch_rows)
    quarter = -(-len(questions) // 4)
    answers: list[Answer] = []
    started = time.perf_counter()
    answers = pipeline.answer_many(questions, batch_rows)
    seconds["ours"] += time.perf_counter() - started
    for start in range(0, len(questions), quarter):
        loop = one_by_one(base_path, run, pipeline.template, drafts[start : start + quarter])
        started = time.perf_counter()
        loop()
        seconds["one_by_one"] += time.perf_counter() - started
    started = time.perf_counter()
    pipeline.answer_many(questions, batch_rows)
    seconds["ours"] = (seconds["ours"] + time.perf_counter() - started) / 2
    assert [answer.attempts for answer in answers] == [len(made) for _, made in drafts]
    return {name: 60 * len(questions) / value for name, value in seconds.items()}


def memory_ratio(pipeline: DraftVerify, question: str) -> float:
    """Peak memory of one question over base + adapters + the caches at their allocated length."""
    account = pipeline.slots.memory()
    resident = account["base"] + sum(account["adapters"].values())
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    pipeline.answer(question)
    config = pipeline.slots.base.config
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    length = len(pipeline.template.draft_prompt(pipeline.tokenizer, question)) + pipeline.config.sampling.max_tokens
    length = -(-length // GROWTH) * GROWTH
    rows = pipeline.config.attempts + 2  # the drafts and, of either adapter, the prompt
    caches = config["num_hidden_layers"] * 2 * rows * heads * size * length * 4
    # What else the process holds (other pipelines, copies for the peer) is not this pipeline's.
    return (mx.get_peak_memory() - before + resident) / (resident + caches)


def switch_ms(slots: AdapterSlots) -> float:
    """Median milliseconds to make another adapter the active one."""
    times = []
    for index in range(200):
        started = time.perf_counter()
        slots.use(("drafter", "verifier")[index % 2])
        times.append(time.perf_counter() - started)
    slots.use(None)
    return 1000 * statistics.median(times)


def pool_cost(pipeline: DraftVerify, run: Path, questions: Sequence[str], batch_rows: int) -> dict[str, Any]:
    """What a pool as verifier costs against the merged verifier, both in turn on every question."""
    slots = pipeline.slots
    pool = sorted(folder for folder in (run / "pool").iterdir() if is_complete(folder))[:LARGEST_POOL]
    for folder in pool:
        slots.load(folder.name, load_adapter(folder))
    config = LoopConfig(3, 1.0, "mean_logprob", pipeline.config.sampling, "parallel")
    sides = {
        name: DraftVerify(slots, pipeline.template, "drafter", verifier, config)
        for name, verifier in (("merged", "verifier"), ("pool", [folder.name for folder in pool]))
    }
    seconds = dict.fromkeys(sides, 0.0)
    for side in sides.values():
        side.answer(questions[0])
        side.answer_many(questions[:4], batch_rows)
    for index, question in enumerate(questions):
        for name in sorted(sides, reverse=bool(index % 2)):
            started = time.perf_counter()
            sides[name].answer(question)
            seconds[name] += time.perf_counter() - started
    batched = {}
    for name, side in sides.items():
        started = time.perf_counter()
        side.answer_many(questions, batch_rows)
        batched[name] = time.perf_counter() - started
    return {
        "adapters": len(pool),
        "latency_ratio": round(seconds["pool"] / seconds["merged"], 3),
        "batched_ratio": round(batched["pool"] / batched["merged"], 3),
        "latency_ms": {name: round(1000 * value / len(questions), 1) for name, value in seconds.items()},
        "items_per_minute": {name: round(60 * len(questions) / value, 1) for name, value in batched.items()},
    }


def tinyllama_slots() -> AdapterSlots:
    """Slots on a model of TinyLlama's shapes, whose weights are never evaluated, with two random adapters."""
    from mlx_lm.models.llama import Model, ModelArgs

    from mlx_rsgwm.models.adapter import LoraSpec
    from mlx_rsgwm.models.base import Base

    model = Model(ModelArgs.from_dict(TINYLLAMA))
    slots = AdapterSlots(Base("tinyllama", Path(), "", TINYLLAMA, model, None))  # type: ignore[arg-type]
    spec = LoraSpec(16, 2.0, 0.0, ("self_attn.q_proj", "self_attn.v_proj"), 22)
    for name in ("drafter", "verifier"):
        weights = {}
        for layer in range(22):
            for leaf, out in (("q_proj", 2048), ("v_proj", 256)):
                weights[f"model.layers.{layer}.self_attn.{leaf}.lora_a"] = mx.ones((2048, 16))
                weights[f"model.layers.{layer}.self_attn.{leaf}.lora_b"] = mx.ones((16, out))
        slots.load(name, Adapter(spec, weights))
    return slots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--pool-only", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pipelines = load(options.run, options.base, options.max_tokens)
    share = -(-options.items // len(PLAIN))
    questions = [q.question for family in PLAIN for q in select_questions(family, "test", share, 7, None).questions][
        : options.items
    ]
    if options.pool_only:
        print(json.dumps({"pool": pool_cost(pipelines["parallel"], options.run, questions, options.batch_rows)}))
        return
    seconds = latencies(pipelines, questions, options.trials)
    means, medians = (
        {name: kind(values) for name, values in seconds.items()} for kind in (statistics.mean, statistics.median)
    )
    memory = memory_ratio(pipelines["parallel"], questions[0])
    rates = throughput(pipelines, resolve_base(options.base), options.run, questions, options.batch_rows)
    result = {
        "latency_ratio": {mode: round(means[mode] / means["drafter"], 3) for mode in MODES},
        "latency_ratio_median": {mode: round(medians[mode] / medians["drafter"], 3) for mode in MODES},
        "latency_ms": {name: round(1000 * value, 1) for name, value in means.items()},
        "throughput_ratio": round(rates["ours"] / rates["one_by_one"], 2),
        "items_per_minute": {name: round(value, 1) for name, value in rates.items()},
        "memory_ratio": round(memory, 3),
        "switch_ms": {
            "smollm2-135m": round(switch_ms(pipelines["parallel"].slots), 4),
            "tinyllama shapes": round(switch_ms(tinyllama_slots()), 4),
        },
        "pool": pool_cost(pipelines["parallel"], options.run, questions, options.batch_rows),
        "items": len(questions),
        "batch_rows": options.batch_rows,
        "score": pipelines["parallel"].config.score,
        "threshold": pipelines["parallel"].config.threshold,
        "versions": versions(),
    }
    give_result(result, options.out)


if __name__ == "__main__":
    main()
