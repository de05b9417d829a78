"""The README of a published adapter: what it is, how it was made, how well it does, its proof, how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_rsgwm.core import tables

METRICS = {
    "accuracy": "Accuracy",
    "wrong_rate": "Wrong",
    "accept_rate": "Accept rate",
    "accepted_and_correct": "Accepted and correct",
    "false_accept_rate": "False-accept rate",
}

# Models of mlx-lm that transformers' AutoModelForCausalLM does not load, for they have eyes too.
IMAGE_TEXT = (
    *("kimi_k25", "lfm2_vl", "llava", "minimax_m3_vl", "mistral3", "mistral4", "muse_glimmer", "muse_spark"),
    *("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"),
)


def model_card(
    repo: str,
    base: str,
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    *,
    licence: str,
    mlx_folder: str | None,
    certificate: Mapping[str, Any] | None,
    report: Mapping[str, Any] | None,
    wrapped: bool = False,
) -> str:
    """The Markdown of README.md with the Hub's front matter.

    Args:
        repo: ``owner/name`` it goes to.
        base: the base's Hub id.
        config: PEFT's ``adapter_config.json``.
        manifest: the adapter's, empty for one of others.
        licence: the Hub's identifier of it.
        mlx_folder: where in the repository mlx-lm's layout is, or None.
        certificate: of ``rsgwm parity``, or None.
        report: an evaluation's ``report.json``, or None.
        wrapped: whether it belongs to the model of text and images, not to its language model alone.
    """
    head = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": licence,
        "tags": ["lora", "peft", "mlx", "mlx-rsgwm", *(["dora"] if config.get("use_dora") else [])],
    }
    front = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items())
    parts = [
        f"---\n{front}\n---",
        f"# {repo.rpartition('/')[2]}",
        f"A {'DoRA' if config.get('use_dora') else 'LoRA'} adapter for [{base}](https://huggingface.co/{base}), "
        f"rank {config['r']}, alpha {config['lora_alpha']}, made with mlx-rsgwm.",
        *_origin(manifest),
        *_metrics(report),
        *_proof(certificate),
        _usage(repo, base, wrapped or (manifest.get("base") or {}).get("model_type") in IMAGE_TEXT, mlx_folder),
        f"## Licence\n\n{licence}. The base model has its own.",
    ]
    return "\n\n".join(parts) + "\n"


def _origin(manifest: Mapping[str, Any]) -> list[str]:
    """How it was trained or merged, as far as its manifest says."""
    rows: list[tuple[str, Any]] = []
    kind = manifest.get("kind")
    if kind == "merged":
        merge = manifest.get("merge") or {}
        sources = [str(source.get("name") or "?") for source in merge.get("sources") or []]
        rows += [("made by", f"merging {len(sources)} adapters by {merge.get('method')}"), ("role", merge.get("role"))]
        rows.append(("sources", ", ".join(sources)))
    elif kind == "trained":
        config, data = manifest.get("config") or {}, manifest.get("data") or {}
        rows.append(("made by", f"training, {config.get('epochs')} epochs, seed {manifest.get('seed')}"))
        counts = data.get("counts") or {}
        tasks = [
            f"{task} ({', '.join(f'{n} {role}' for role, n in by_role.items())})" for task, by_role in counts.items()
        ]
        rows.append(("data", "; ".join(tasks) or data.get("hash")))
        rows.append(("data hash", data.get("hash")))
    template = manifest.get("template") or {}
    if template.get("draft"):
        rows.append(("prompt", f"`{json.dumps(template['draft'], ensure_ascii=False)}`"))
    versions = manifest.get("versions") or {}
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    shown = [[label, str(value)] for label, value in rows if value]
    return ["## How it was made\n\n" + tables.markdown([["", ""], *shown])] if shown else []


def _metrics(report: Mapping[str, Any] | None) -> list[str]:
    """The evaluation's rates with their 95 % intervals."""
    if report is None:
        return []
    rows = [["", "drafter alone", "draft–verify"]]
    for name, label in METRICS.items():
        alone, checked = (report.get(part, {}).get(name) for part in ("drafter", "draft_verify"))
        if alone is not None or checked is not None:
            rows.append([label, _rate(alone), _rate(checked)])
    return ["## Metrics\n\n95 % intervals in brackets.\n\n" + tables.markdown(rows)]


def _rate(value: Any) -> str:
    return f"{tables.show(value)}, n = {value['n']}" if isinstance(value, Mapping) else tables.ABSENT


def _proof(certificate: Mapping[str, Any] | None) -> list[str]:
    if certificate is None:
        return []
    greedy = certificate.get("greedy") or {}
    return [
        "## Proof\n\n"
        f"MLX {certificate.get('mlx')} and torch {certificate.get('torch')} with PEFT {certificate.get('peft')} "
        f"compute the same with it in {certificate.get('dtype')}: logits differ by at most "
        f"{certificate.get('max_abs_logit', 0):.1e} over {certificate.get('tokens')} tokens "
        f"(the adapter changes them by {certificate.get('effect_torch', 0):.1e}); {greedy.get('agree')} of "
        f"{greedy.get('tokens')} greedy tokens are alike. `mlx_rsgwm/parity.json` holds the certificate."
    ]


def _usage(repo: str, base: str, wrapped: bool, mlx_folder: str | None) -> str:
    loader = "AutoModelForImageTextToText" if wrapped else "AutoModelForCausalLM"
    torch = (
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {loader}, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")\n'
        f'model = {loader}.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(model, "{repo}")\n'
        "```"
    )
    fetch = f"rsgwm hub pull {repo} adapter --base {base}\n"
    direct = f"hf download {repo} --include '{mlx_folder}/*' --local-dir .\n" if mlx_folder else ""
    folder = mlx_folder or "adapter"
    lines = direct or fetch
    return (
        f"## Usage\n\nWith torch:\n\n{torch}\n\nWith MLX:\n\n```sh\n{lines}"
        f'mlx_lm.generate --model {base} --adapter-path {folder} --prompt "..."\n```'
    )
