"""lm-evaluation-harness (0.4) beside us: our drafter or pipeline as its model, and its GSM8K filters on our drafts.

lm_eval is the extra ``lm-eval``; nothing here imports it before it is asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core import files
from mlx_rsgwm.core.config import read_yaml
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation.equality import is_correct
from mlx_rsgwm.evaluation.records import ItemRecord
from mlx_rsgwm.inference.loop import DraftVerify

_ASKED = re.compile(
    r"(?:^|\n)\s*(?:Question|Q|Problem):\s*((?:(?!\n\s*(?:Question|Q|Problem):).)*?)\s*\n?\s*(?:Answer|A):\s*$",
    re.DOTALL,
)


def load_lm_eval() -> Any:
    """The package, or an error that says how to get it."""
    try:
        import lm_eval
    except ImportError:
        raise RsgwmError("lm_eval is not installed; run: pip install 'mlx-rsgwm[lm-eval]'") from None
    return lm_eval


def question_of(context: str) -> str:
    """The last question in a prompt of lm_eval's ("Question: …\\nAnswer:"), to be asked in the adapter's own template.

    A prompt of another form is the question itself. Few-shot examples are left out: adapters here are trained without.
    """
    match = _ASKED.search(context)
    return match[1].strip() if match else context.strip()


def until(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of ``stops``."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def make_model(pipeline: DraftVerify, role: str = "pipeline", batch_rows: int = 32) -> Any:
    """An ``lm_eval.api.model.LM``: ``role`` is ``pipeline`` (draft–verify) or ``drafter`` (its first draft).

    Generation follows the pipeline's own sampling and length; the stop texts of a task are applied to what comes out.
    Log-likelihoods are the drafter's, of the prompt as the task gives it.
    """
    load_lm_eval()
    from lm_eval.api.model import LM

    if role not in ("pipeline", "drafter"):
        raise RsgwmError(f"the model lm_eval drives is pipeline or drafter, found {role!r}")

    class RsgwmLM(LM):
        asked = False  # anything yet

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            self.asked = True
            questions = [question_of(request.args[0]) for request in requests]
            if role == "drafter":
                texts = [drafts[0].text for drafts in pipeline.draft_many(questions, 1, batch_rows)]
            else:
                texts = [answer.text or "" for answer in pipeline.answer_many(questions, batch_rows)]
            stops = [request.args[1].get("until") or [] for request in requests]
            stops = [[stop] if isinstance(stop, str) else stop for stop in stops]
            return [until(text, stop) for text, stop in zip(texts, stops, strict=True)]

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self.asked = True
            return [loglikelihood(pipeline, *request.args) for request in requests]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            self.asked = True
            return [loglikelihood(pipeline, "", request.args[0])[0] for request in requests]

    return RsgwmLM()


def loglikelihood(pipeline: DraftVerify, context: str, continuation: str) -> tuple[float, bool]:
    """Nats of a continuation after a context by the drafter, and whether greedy decoding would write it."""
    tokenizer = pipeline.tokenizer
    tokens = list(tokenizer.encode(context + continuation))
    start = len(tokenizer.encode(context)) if context else 0
    if start == 0:
        begin = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        if begin is None:
            raise RsgwmError("the base's tokenizer has no end-of-text token to put before a text without a context")
        tokens, start = [begin, *tokens], 1
    if start >= len(tokens):
        return 0.0, True
    hidden, head = pipeline.parts
    with pipeline.slots.using(pipeline.drafter):
        logits = head(hidden(mx.array([tokens[:-1]]))[0, start - 1 :]).astype(mx.float32)
        chosen = mx.array(tokens[start:])
        scores = mx.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
        greedy = mx.all(mx.argmax(logits, axis=-1) == chosen)
        mx.eval(scores, greedy)
    return float(sum(scores.tolist())), bool(greedy.item())  # type: ignore[arg-type]


def drive(pipeline: DraftVerify, tasks: Sequence[Any], role: str, limit: int | None, seed: int) -> dict[str, Any]:
    """``lm_eval.simple_evaluate`` on our model; ``tasks`` are names, or configurations as mappings. Zero-shot.

    Raises:
        RsgwmError: lm_eval has no such task, or cannot use a configuration.
    """
    lm_eval = load_lm_eval()
    model = make_model(pipeline, role)
    try:
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model, tasks=list(tasks), num_fewshot=0, limit=limit, bootstrap_iters=0, random_seed=seed
        )
    except Exception as error:  # before it asks anything: of its own and of datasets, whatever a task makes them do
        if model.asked or isinstance(error, RsgwmError):
            raise
        names = ", ".join(str(task.get("task") if isinstance(task, dict) else task) for task in tasks)
        raise RsgwmError(f"lm_eval cannot use the task {names!r} ({type(error).__name__}: {error})") from error
    return results


@dataclass(frozen=True)
class Disagreement:
    """A draft that lm_eval's filter and an extractor of ours judge differently; values None where none was found."""

    item: str
    draft: int
    gold: str
    filter: str
    theirs: str | None
    theirs_correct: bool
    extractor: str
    ours: str | None
    ours_correct: bool
    text: str


PAIRS = {"strict-match": "strict", "flexible-extract": "flexible"}


def gsm8k_filters() -> tuple[dict[str, tuple[str, int]], dict[str, Any]]:
    """Filter name → (pattern, which match), and the options of exact_match, as the installed gsm8k.yaml has them."""
    folder = Path(load_lm_eval().__file__).parent
    file = folder / "tasks" / "gsm8k" / "gsm8k.yaml"
    config = read_yaml(files.read_text(file), str(file))
    filters = {
        entry["name"]: (entry["filter"][0]["regex_pattern"], entry["filter"][0].get("group_select", 0))
        for entry in config["filter_list"]
    }
    metric = config["metric_list"][0]
    options = {name: metric[name] for name in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    return filters, {**options, "until": config["generation_kwargs"]["until"]}


def lm_eval_readings(texts: Sequence[str], golds: Sequence[str]) -> dict[str, list[tuple[str | None, bool]]]:
    """What lm_eval's GSM8K filters find in each text, and whether its exact_match calls it equal to gold.

    ``golds`` are final answers; lm_eval compares with the whole solution, of which its regexes keep as much.
    """
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    filters, options = gsm8k_filters()
    stops = options.pop("until")
    cut = [until(text, stops) for text in texts]
    readings = {}
    for name, (pattern, group) in filters.items():
        values = [row[0] for row in RegexFilter(pattern, group).apply([[text] for text in cut], [{} for _ in cut])]
        rows = []
        for value, gold in zip(values, golds, strict=True):
            score = exact_match_hf_evaluate(predictions=[value], references=[f"#### {gold}"], **options)["exact_match"]
            rows.append((None if value == "[invalid]" else value, bool(math.isclose(float(score), 1.0))))
        readings[name] = rows
    return readings


def _same_number(harness_value: str | None, value: str | None) -> bool:
    if harness_value is None or value is None:
        return harness_value is value
    return is_correct(harness_value.strip("$").rstrip(".,"), value)


def disagreements(records: Sequence[ItemRecord]) -> list[dict[str, Any]]:
    """Every recorded draft that one of lm_eval's two GSM8K filters reads otherwise than our like-named extractor.

    Raises:
        RsgwmError: drafts that were not read with ``strict`` and ``flexible``, so no task with numbers.
    """
    rows = [(record, number, draft) for record in records for number, draft in enumerate(record.drafts, 1)]
    if any(name not in draft.readings for _, _, draft in rows for name in PAIRS.values()):
        raise RsgwmError("lm_eval's GSM8K filters read numbers; these drafts are not of a task with numbers")
    harness_readings = lm_eval_readings([draft.text for _, _, draft in rows], [record.gold for record, _, _ in rows])
    differing = []
    for name, extractor in PAIRS.items():
        for (record, number, draft), (value, correct) in zip(rows, harness_readings[name], strict=True):
            reading = draft.readings[extractor]
            if correct != reading.correct or not _same_number(value, reading.value):
                sides = (name, value, correct, extractor, reading.value, reading.correct)
                differing.append(asdict(Disagreement(record.id, number, record.gold, *sides, draft.text)))
    return differing
