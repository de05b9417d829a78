"""A blind-spot study as tables for a terminal and as a page with the questions that chains recovered."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from mlx_rsgwm.core import tables
from mlx_rsgwm.core.tables import Rows, show
from mlx_rsgwm.evaluation.report.html import page
from mlx_rsgwm.inference.grafting import GREEDY, KINDS

SHOWN = 40  # recovered questions on the page


def opening(summary: Mapping[str, Any]) -> str:
    """One sentence: how many questions sampling missed, and what chains found there beyond fresh samples."""
    stratum, test = summary["stratum"], summary.get("chains_over_fresh")
    missed = f"{round(stratum['value'] * stratum['n'])} of {stratum['n']} questions are right in none of six samples"
    if test is None:
        return f"{missed}: there is no blind spot here."
    chains, fresh = summary["recovery"]["R_6"]["value"], summary["fresh"]["value"]
    verdict = "can be chance" if test["p_value"] >= 0.05 else "is more than chance"
    return (
        f"{missed}. Six chains find {chains:.1%} of these, six fresh samples {fresh:.1%}; the difference {verdict} "
        f"(p = {test['p_value']:.3f})."
    )


def recovery_rows(summary: Mapping[str, Any]) -> Rows:
    """Recovery with 95 % intervals of chains and of the control."""
    rows: list[list[str]] = [["on what six samples missed", "found"]]
    rows += [
        [f"{name}: {GREEDY}" if kind == GREEDY else f"{name}: and {kind}", show(rate)]
        for (name, rate), kind in zip(summary["recovery"].items(), (GREEDY, *KINDS), strict=True)
    ]
    if "fresh" in summary:
        rows.append(["six fresh samples (control)", show(summary["fresh"])])
    return rows


def kind_rows(summary: Mapping[str, Any]) -> Rows:
    """How many questions each kind of graft finds alone."""
    return [["graft", "questions"], *([kind, f"{count}"] for kind, count in summary["by_kind"].items())]


def study_notes(summary: Mapping[str, Any]) -> list[str]:
    """Tokens and Jaccard indices in words."""
    tokens = summary["tokens"]
    shown = {name: _largest(pairs) for name, pairs in summary["jaccard_pairs"].items()}
    return [
        f"tokens: six samples of all questions {tokens['sampled']}; of those missed, six chains {tokens['grafted']}, "
        f"six fresh samples {tokens['fresh']}",
        f"largest Jaccard index of two kinds: of what they find and greedy does not {shown['fixed']}, of what they "
        f"miss {shown['errors']}",
    ]


def _largest(pairs: Mapping[str, float]) -> str:
    """The largest index and its pair, as ``0.50 (zero, shuf)``; a dash where every set is empty."""
    name = max(pairs, key=lambda pair: pairs[pair], default=None)
    return "–" if name is None else f"{pairs[name]:.2f} ({name})"


def jaccard_rows(summary: Mapping[str, Any]) -> Rows:
    """Jaccard indices of all pairs of kinds, of what they find and greedy does not and of what they miss."""
    readings = summary["jaccard_pairs"]
    rows: list[list[str]] = [["Jaccard index", "of what they find", "of what they miss"]]
    for pair in dict.fromkeys([*readings["fixed"], *readings["errors"]]):
        indices = (readings[reading].get(pair) for reading in ("fixed", "errors"))
        rows.append([pair, *("–" if index is None else f"{index:.2f}" for index in indices)])
    return rows


def study_text(summary: Mapping[str, Any]) -> str:
    """The study for a terminal."""
    parts = [opening(summary)]
    if summary["recovery"]:
        parts += [tables.aligned(recovery_rows(summary)), tables.aligned(kind_rows(summary))]
        parts.append("\n".join(study_notes(summary)))
    return "\n\n".join(parts)


def render_page(summary: Mapping[str, Any]) -> str:
    """The study as a page that asks nothing of the network."""
    body = f"<header><h1>What sampling never finds</h1><p>{escape(opening(summary))}</p></header>"
    if summary["recovery"]:
        body += tables.html(recovery_rows(summary)) + tables.html(kind_rows(summary))
        body += "".join(f'<p class="note">{escape(note)}</p>' for note in study_notes(summary))
        body += f"<details><summary>All pairs</summary>{tables.html(jaccard_rows(summary))}</details>"
        body += "<h2>Questions that a chain answered rightly</h2>" + _recovered(summary)
    return page("Blind spot", body)


def _recovered(summary: Mapping[str, Any]) -> str:
    recovered = [item for item in summary["items"] if any(chain["correct"] for chain in item["chains"].values())]
    if not recovered:
        return "<p>None.</p>"
    parts = []
    for item in recovered[:SHOWN]:
        again = "found by fresh samples, too" if item["fresh"] else "found by no fresh sample"
        chains = "".join(
            f"<dt>{escape(kind)}</dt><dd>{escape(chain['text'])}</dd>"
            for kind, chain in item["chains"].items()
            if chain["correct"]
        )
        parts.append(
            f"<details><summary>{escape(item['question'])} ({escape(item['gold'])}; {again})</summary>"
            f"<dl>{chains}</dl></details>"
        )
    return "".join(parts)
