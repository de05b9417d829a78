"""The commands by name: where each is, what help says of it without importing it, and the sections of that help.

A command is named in the order in which a job uses it; words after the first are a group's: ``hub push``.
"""

from __future__ import annotations

# Full name: module and attribute, and what help says of it without importing it.
COMMANDS = {
    "demo": ("mlx_rsgwm.cli.run:demo", "The whole job on a small base model, in minutes."),
    "run": ("mlx_rsgwm.cli.run:run", "Run a recipe: a whole job as one YAML file, resumable."),
    "recipe init": ("mlx_rsgwm.cli.recipe:init", "Write a commented recipe for your own questions."),
    "help": ("mlx_rsgwm.cli.reference:show_help", "Say what a command does and takes: rsgwm help hub push."),
    "data build": ("mlx_rsgwm.cli.data:build", "Build a corpus from tasks or your own questions."),
    "data negatives": ("mlx_rsgwm.cli.negatives:negatives", "Build verifier pairs from adapters' own mistakes."),
    "train": ("mlx_rsgwm.cli.train:train", "Train one LoRA or DoRA adapter and keep its importance."),
    "average": ("mlx_rsgwm.cli.average:average", "Average the checkpoints of one run into one adapter."),
    "pool train": ("mlx_rsgwm.cli.train_pool:train_pool", "Train several adapters that share one initialisation."),
    "pool sweep": ("mlx_rsgwm.cli.merge_sweep:merge_sweep", "Merge a pool by many methods and rank the merges."),
    "pool route": ("mlx_rsgwm.cli.route:route", "Fit what chooses the adapter of a pool that answers."),
    "adapter loss": ("mlx_rsgwm.cli.loss:loss", "Loss of rows under the base and adapters on it."),
    "adapter importance": ("mlx_rsgwm.cli.importance:importance", "Collect importance for one trained elsewhere."),
    "directions collect": ("mlx_rsgwm.cli.directions:collect", "Collect directions for one trained elsewhere."),
    "audit": ("mlx_rsgwm.cli.audit:audit", "Know before you merge: spectra, overlaps, a verdict, a plan."),
    "probe measure": ("mlx_rsgwm.cli.probe_measure:measure", "Measure every pair of adapters, as a table."),
    "probe outcomes": ("mlx_rsgwm.cli.probe_outcomes:outcomes", "Merge pairs and sets, and measure what is left."),
    "probe fit": ("mlx_rsgwm.cli.probe_fit:fit", "Fit predictors of retention, judged on left-out tasks."),
    "probe report": ("mlx_rsgwm.cli.probe_report:report", "Show predictors, and what drives each merge method."),
    "probe decide": ("mlx_rsgwm.cli.probe_decide:decide", "Merge, reweight, prune or route: say which, and do it."),
    "merge": ("mlx_rsgwm.cli.merge:merge", "Merge a pool into a drafter and a verifier."),
    "quantvec extract": ("mlx_rsgwm.cli.quantvec:extract", "Lift off what training through rounding adds."),
    "quantvec apply": ("mlx_rsgwm.cli.quantvec:apply", "Put it on another adapter, so that that survives rounding."),
    "ask": ("mlx_rsgwm.cli.ask:ask", "Answer a question, or a file of them."),
    "chat": ("mlx_rsgwm.cli.chat:chat", "Talk with one adapter, a model, or a pair."),
    "serve": ("mlx_rsgwm.cli.serve:serve", "Serve adapters and verified answers to clients of OpenAI's API."),
    "calibrate": ("mlx_rsgwm.cli.calibrate:calibrate", "Fit a verifier's scores and threshold on held-out questions."),
    "eval": ("mlx_rsgwm.cli.evaluate:evaluate", "Compare the drafter alone with draft–verify on the same items."),
    "compare": ("mlx_rsgwm.cli.report:compare", "Compare two runs on the same items: tests and intervals."),
    "blindspot": ("mlx_rsgwm.cli.blindspot:blindspot", "Find what sampling never finds, and try grafted chains there."),
    "tails": ("mlx_rsgwm.cli.tails:tails", "Say whether a claim about the tail of scores holds."),
    "report write": ("mlx_rsgwm.cli.report:report", "Write a run's report anew from its items."),
    "report curves": ("mlx_rsgwm.cli.plot:plot", "Draw the training curves of adapters."),
    "report controls": ("mlx_rsgwm.cli.eval_controls:controls", "Compare other ways to spend the same tokens."),
    "report tables": ("mlx_rsgwm.cli.tables:tables", "Measure the paper's Tables 1, 2 and 3 beside its numbers."),
    "lm-eval": ("mlx_rsgwm.cli.eval_lm:lm_eval", "Let lm-evaluation-harness drive the drafter or the pipeline."),
    "convert to-peft": ("mlx_rsgwm.cli.convert:convert_to_peft", "An mlx-lm adapter to PEFT's layout."),
    "convert from-peft": ("mlx_rsgwm.cli.convert:convert_from_peft", "A PEFT adapter to mlx-lm's layout."),
    "convert from-mlx": ("mlx_rsgwm.cli.convert:convert_from_mlx", "An adapter of an old mlx-lm to today's."),
    "convert to-gguf": ("mlx_rsgwm.cli.convert:convert_to_gguf", "An adapter or a fused model to a GGUF file."),
    "convert from-gguf": ("mlx_rsgwm.cli.convert:convert_from_gguf", "A base model in a GGUF file to a folder."),
    "convert check": ("mlx_rsgwm.cli.convert:check", "Prove that two layouts hold the same adapter."),
    "parity": ("mlx_rsgwm.cli.parity:parity", "Compare an adapter's logits with torch and PEFT."),
    "fuse": ("mlx_rsgwm.cli.fuse:fuse", "Work an adapter into its base, measuring what survives."),
    "hub push": ("mlx_rsgwm.cli.hub:push", "Publish an adapter on the Hugging Face Hub."),
    "hub pull": ("mlx_rsgwm.cli.hub:pull", "Fetch an adapter from the Hugging Face Hub."),
    "base pull": ("mlx_rsgwm.cli.base:pull", "Fetch a base model, so that later commands need no network."),
    "base info": ("mlx_rsgwm.cli.base:info", "Say what a base model is."),
    "bench latency": ("mlx_rsgwm.cli.bench:bench_latency", "Time prefill, decode, training, merging beside torch."),
    "bench compare": ("mlx_rsgwm.cli.bench:bench_compare", "Compare two measurements of latency."),
    "doctor": ("mlx_rsgwm.cli.doctor:doctor", "Examine this machine and say what to fix."),
}

GROUPS = {
    "recipe": "Recipes of your own: init.",
    "data": "Corpora of draft rows and verifier pairs: build, negatives.",
    "pool": "Adapters that belong together: train, sweep, route.",
    "adapter": "What an adapter knows of its data: loss, importance.",
    "directions": "Second moments of the inputs of an adapter's layers: collect.",
    "probe": "Predict how well adapters merge: measure, outcomes, fit, report, decide.",
    "quantvec": "Quantization vectors, for bases of few bits: extract, apply.",
    "report": "Pages, pictures and studies of runs: write, curves, controls, tables.",
    "convert": "Other formats: to-peft, from-peft, from-mlx, to-gguf, from-gguf, check.",
    "hub": "Adapters on the Hugging Face Hub: push, pull.",
    "base": "Base models: pull, info.",
    "bench": "Speed of this machine: latency, compare.",
}

SECTIONS = {
    "Start": ("demo", "run", "recipe", "help"),
    "Data and training": ("data", "train", "average", "pool", "adapter", "directions"),
    "Merge": ("audit", "probe", "merge", "quantvec"),
    "Answer": ("ask", "chat", "serve", "calibrate"),
    "Evaluate": ("eval", "compare", "blindspot", "tails", "report", "lm-eval"),
    "Exchange": ("convert", "parity", "fuse", "hub"),
    "Machine": ("base", "bench", "doctor"),
}

# These compute with torch; from the others it is hidden (see startup).
WITH_TORCH = frozenset({"parity", "bench latency", "run", "demo", "report tables", "lm-eval"})


def members(group: str) -> list[str]:
    """Names below a group, those of the table's first words for the empty one, each once and in order."""
    names = [name.removeprefix(group).split() for name in COMMANDS if not group or name.startswith(f"{group} ")]
    below = list(dict.fromkeys(words[0] for words in names))
    if group:
        return below
    placed = [name for section in SECTIONS.values() for name in section if name in below]
    return placed + [name for name in below if name not in placed]


def summary(name: str) -> str:
    """The line that help shows of a command or group."""
    return GROUPS[name] if name in GROUPS else COMMANDS[name][1]


def full_name(arguments: list[str]) -> str:
    """The command that a command line names, as far as it names one: ``hub push`` of ``hub push x --json``."""
    words = [argument for argument in arguments if not argument.startswith("-")]
    return " ".join(words[:2]) if words[:1] and words[0] in GROUPS else " ".join(words[:1])
