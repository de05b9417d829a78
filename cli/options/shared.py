"""Every option that more than one command has, each defined once: one name, one type, one meaning.

A call says what differs between commands: the default, and a tail of the help (after the first ``;`` or in brackets).
A test by introspection holds that no command defines such an option in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mlx_rsgwm.cli.options.kinds import (
    ANY_NUMBER,
    COUNT,
    NEW_FILE,
    NEW_PATH,
    PAIR,
    PATH,
    POSITIVE,
    SOURCE,
    TIMES,
    Number,
    OneOf,
    Whole,
)
from mlx_rsgwm.cli.options.paths import SOURCES

F = TypeVar("F", bound=Callable[..., Any])
Option = Callable[[F], F]

SPLIT = "Split to take: of a file train, calibration, test or all"
# Defaults of mlx_rsgwm.inference.sampling.Sampling, which is slow to import; a test holds them equal.
TEMPERATURE, TOP_P, MAX_TOKENS = 0.7, 0.9, 256


def _tail(tail: str) -> str:
    return f"; {tail}." if tail else "."


def _default(text: str) -> str:
    return f"  [default: {text}]" if text else ""


def base(default: str = "the adapter's own") -> Any:
    """``--base``, by default the one that the adapters record."""
    text = f"Base model: Hub id, folder, .gguf file or alias.{_default(default)}"
    return click.option("--base", "base_name", metavar="MODEL", help=text)


def task(tail: str = "repeatable", required: bool = True, default: str = "") -> Any:
    """``--task``: what questions are about."""
    text = f"Task: generated family, data set or file of questions; {tail}.{_default(default)}"
    return click.option("--task", "tasks", metavar="TASK", multiple=True, required=required, help=text)


def questions() -> Any:
    """``--questions``: where data sets are that are not to come from the Hub."""
    text = "Folder of data sets as TASK/SPLIT.jsonl.  [default: the Hub]"
    return click.option("--questions", "folder", type=PATH, help=text)


def corpus(tail: str = "", required: bool = False, multiple: bool = False, name: str = "corpus") -> Any:
    """``--corpus``: rows to train on, to score or to look at."""
    text = f"Corpus: its folder, a folder with train.jsonl, or a .jsonl file{_tail(tail)}"
    return click.option("--corpus", name, type=PATH, required=required, multiple=multiple, help=text)


def predictors() -> Any:
    """``--predictors``: what forecasts the retention of merges."""
    text = "Folder of `rsgwm probe fit`, or a file in it.  [default: those that come with rsgwm, where they fit]"
    return click.option("--predictors", type=PATH, help=text)


def methods(tail: str, default: str) -> Any:
    """``--methods``: merges that stand beside each other."""
    text = f"Merges to compare; {tail}.{_default(default)}"
    return click.option("--methods", multiple=True, metavar="METHOD[:NAME=VALUE[/VALUE…],…],…", help=text)


def page(what: str) -> Any:
    """``--html``: a page with pictures."""
    return click.option("--html", "page", type=NEW_FILE, help=f"Write a page here: {what}.")


def data() -> Any:
    """``--data``: what adapters are judged or measured on."""
    text = (
        "Rows of the adapters' tasks: a task, a file of questions or of rows, or a corpus; once for all adapters, or "
        "one for each in their order."
    )
    return click.option("--data", multiple=True, metavar="TASK-OR-FILE", help=text)


def data_rows(default: int) -> Any:
    """``--data-rows``: at most so many of each."""
    text = "Rows of --data that are taken, at most."
    return click.option("--data-rows", type=Whole(8), default=default, show_default=True, help=text)


def items(default: int | None, tail: str = "", shown: str = "") -> Any:
    """``--items``: how many questions."""
    text = f"Questions of each task{_tail(tail)}{_default(shown)}"
    return click.option("--items", type=POSITIVE, default=default, show_default=default is not None, help=text)


def split(default: str) -> Any:
    """``--split`` of a data set or file."""
    return click.option("--split", metavar="SPLIT", help=f"{SPLIT}.{_default(default)}")


def slice_order() -> Any:
    """``--slice``: which of a task's questions."""
    from mlx_rsgwm.evaluation.slices import SLICES

    text = "Which questions of a task: the first, or shuffled by --seed."
    return click.option("--slice", "how", type=OneOf(SLICES), default="first", show_default=True, help=text)


def batch_rows(default: int = 32) -> Any:
    """``--batch-rows``: what decides time and memory alone, unlike a training batch."""
    text = "Rows drafted or scored at a time: time and memory, never the result."
    return click.option("--batch-rows", type=POSITIVE, default=default, show_default=True, help=text)


def batch_size(default: int) -> Any:
    """``--batch-size`` of gradients: it decides the result."""
    return click.option("--batch-size", type=POSITIVE, default=default, show_default=True, help=BATCH_SIZE)


BATCH_SIZE = "Rows of a gradient's batch."


def rows(default: int) -> Any:
    """``--rows``: at most so many of a corpus."""
    text = "So many rows at most; 0 for all."
    return click.option("--rows", type=COUNT, default=default, show_default=True, help=text)


ROW_LENGTH = "Longest row in tokens"
SKETCH_COLUMNS = "Columns of the sketches kept of the layers' inputs, for merging"


def max_seq_length() -> Any:
    """``--max-seq-length``, as mlx-lm calls it: of a row."""
    from mlx_rsgwm.training.config import TrainConfig

    return click.option(
        "--max-seq-length",
        "max_tokens",
        type=Whole(2),
        default=TrainConfig.max_tokens,
        show_default=True,
        help=f"{ROW_LENGTH}; longer ones are left out.",
    )


def mask_prompt(default: bool | None = True) -> Any:
    """``--mask-prompt``: what counts of a row."""
    text = "Only completions count; in a corpus they always do."
    return click.option("--mask-prompt/--no-mask-prompt", default=default, show_default=default is not None, help=text)


def draft_rows(default: int, tail: str = "") -> Any:
    """``--draft-rows`` of a corpus."""
    text = f"Rows of a task that teach to answer{_tail(tail)}"
    return click.option("--draft-rows", type=COUNT, default=default, show_default=True, help=text)


def verify_rows() -> Any:
    """``--verify-rows`` of a corpus."""
    text = "Rows of a task that teach to judge; half of them are wrong."
    return click.option("--verify-rows", type=COUNT, default=100, show_default=True, help=text)


def true_equations() -> Any:
    """``--true-equations``, for verify rows that a calculator is of no use for."""
    text = "Wrong answers only that a calculator cannot find."
    return click.option("--true-equations", is_flag=True, help=text)


def offset(tail: str = "") -> Any:
    """``--offset`` into a task's questions."""
    text = f"Questions to pass over first{_tail(tail)}"
    return click.option("--offset", type=COUNT, default=0, show_default=True, help=text)


def template(default: str = "", text: str = "the one that the adapters were trained with") -> Any:
    """``--template`` of prompts."""
    from mlx_rsgwm.data.template import TEMPLATES

    return click.option(
        "--template",
        "template_name",
        type=OneOf(list(TEMPLATES)),
        default=default or None,
        help=f"Prompt template.{_default(default or text)}",
    )


def out(what: str, required: bool = False, default: str = "") -> Any:
    """``--out`` or ``-o``: the file or folder that a command writes."""
    # A default of None would be one to click (8.5), and a required option is not asked for where there is one.
    usual: dict[str, Any] = {"default": Path(default), "show_default": True} if default else {}
    return click.option("--out", "-o", type=NEW_PATH, required=required, help=f"Where to write: {what}.", **usual)


def settings(what: str, name: str = "settings") -> Any:
    """``--set``: a value by its name."""
    text = f"Set a value by its name; {what}. Repeatable."
    return click.option("--set", name, type=PAIR, metavar="NAME=VALUE", multiple=True, help=text)


def replace() -> Any:
    """``--replace`` what an earlier run left in the adapter's folder."""
    return click.option("--replace", is_flag=True, help="Replace what is already there.")


def allow_overlap() -> Any:
    """``--allow-overlap``: measure what is no test, and say so."""
    text = "Ask what the adapters were trained or calibrated on, too; the result says so."
    return click.option("--allow-overlap", is_flag=True, help=text)


def sampling_seeds(default: int | None, shown: str = "") -> Any:
    """``--sampling-seeds``: passes of an evaluation."""
    text = f"Passes over the questions, from --seed upwards.{_default(shown)}"
    return click.option("--sampling-seeds", type=TIMES, default=default, show_default=default is not None, help=text)


def timed() -> Any:
    """``--timed``: questions for the figures of latency."""
    text = "Questions also asked one by one, for the latency figures."
    return click.option("--timed", type=COUNT, default=12, show_default=True, help=text)


def rank(tail: str) -> Any:
    """``--rank`` of what is written."""
    return click.option("--rank", type=POSITIVE, help=f"Rank of the result.{_default(tail)}")


def weight() -> Any:
    """``--weight`` of every merged adapter."""
    text = "Weight of an adapter; one for each, in their order.  [default: equal]"
    return click.option("--weight", "weights", type=ANY_NUMBER, multiple=True, help=text)


def revision(default: str) -> Any:
    """``--revision`` of a repository."""
    text = f"Branch, tag or commit on the Hub.{_default(default)}"
    return click.option("--revision", metavar="REVISION", help=text)


def certificate(tail: str) -> Any:
    """``--certificate``: a parity result to hand on."""
    return click.option("--certificate", type=PATH, help=f"File of `rsgwm parity --out`; {tail}.")


def dry_run(tail: str) -> Any:
    """``--dry-run``: look first."""
    return click.option("--dry-run", is_flag=True, help=f"Only show what would come of it; {tail}.")


def device() -> Any:
    """``--device`` of torch."""
    text = "Torch's device; auto is MPS, CUDA or else the CPU."
    kind = OneOf(["auto", "mps", "cuda", "cpu"])
    return click.option("--device", type=kind, default="auto", show_default=True, help=text)


def dtype(names: list[str], tail: str) -> Any:
    """``--dtype`` that MLX and torch compute in; the first name is the default."""
    text = f"What both sides compute in; {tail}."
    return click.option("--dtype", type=OneOf(names), default=names[0], show_default=True, help=text)


def adapter(tail: str, required: bool = False, name: str = "adapters") -> Any:
    """``--adapter``: those that a command works with beside or instead of its arguments."""
    text = f"Adapter: {SOURCES}; {tail}. Repeatable."
    return click.option("--adapter", name, type=SOURCE, multiple=True, required=required, help=text)


def choose(what: str) -> Any:
    """``--choose``: settle something on rows instead of by hand."""
    return click.option("--choose", "rows", type=PATH, help=f"Held-out rows that choose: {what}.")


def vector(required: bool = False) -> Any:
    """``--vector``: what makes an adapter survive few bits."""
    text = f"Quantization vector of `rsgwm quantvec extract`: {SOURCES}."
    return click.option("--vector", type=SOURCE, required=required, help=text)


def vector_weight() -> Any:
    """``--lambda``: how much of it."""
    text = "How often the quantization vector is added.  [default: 1]"
    return click.option("--lambda", "weight", type=Number(-100, 100), help=text)


def attempts() -> Any:
    """``--attempts`` of the loop."""
    from mlx_rsgwm.inference.policy import LoopConfig

    text = "Drafts of a question at most, the first included."
    return click.option("--attempts", type=TIMES, default=LoopConfig.attempts, show_default=True, help=text)


def draft_count(default: int | None, tail: str = "", shown: str = "", name: str = "draft_count") -> Any:
    """``--draft-count``: how many are made of every question, accepted or not."""
    text = f"Drafts recorded of a question{_tail(tail)}{_default(shown)}"
    return click.option("--draft-count", name, type=TIMES, default=default, show_default=default is not None, help=text)


def layer() -> Any:
    """``--layer`` whose output grafted drafts replace."""
    text = "Layer whose output grafted drafts replace, from 0.  [default: three quarters up]"
    return click.option("--layer", type=COUNT, help=text)


def temperature() -> Any:
    """``--temperature`` of drafting."""
    text = "Temperature of drafting; 0 takes the likeliest token."
    kind = Number(0)
    return click.option("--temperature", type=kind, default=TEMPERATURE, show_default=True, help=text)


def top_p() -> Any:
    """``--top-p`` of drafting."""
    text = "Draft from the likeliest tokens that hold this share of the probability."
    kind = Number(0, 1, min_open=True)
    return click.option("--top-p", type=kind, default=TOP_P, show_default=True, help=text)


def max_tokens(default: int | None = 0, shown: str = "") -> Any:
    """``--max-tokens`` of a draft, as mlx_lm.generate calls it."""
    number = MAX_TOKENS if default == 0 else default
    text = f"Longest draft in tokens.{_default(shown)}"
    return click.option("--max-tokens", type=POSITIVE, default=number, show_default=number is not None, help=text)
