"""The report as one HTML file that asks nothing of the network: what came out in ten seconds, items, tables, pictures.

All data stands in the file as JSON; texts reach the document as text nodes only, so that a draft cannot run as script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mlx_rsgwm.core import tables
from mlx_rsgwm.evaluation.records import ItemRecord
from mlx_rsgwm.evaluation.report.explorer import EXPLORER, SCRIPT
from mlx_rsgwm.evaluation.report.leads import lead
from mlx_rsgwm.evaluation.report.outcome import Outcome, acceptance, percent, verdict
from mlx_rsgwm.evaluation.report.plots import OPENING, charts

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --quiet: #6b6b6b; --blue: #2563a8; --green: #2e7d4f;
  --red: #b3261e; --ochre: #8a6d00; }
@media (prefers-color-scheme: dark) {
  :root { --quiet: #a5a5a5; --blue: #7fb2ea; --green: #7cc79a; --red: #f2958e; --ochre: #d9bd58; }
  svg { filter: invert(.93) hue-rotate(180deg); } /* their ink is black */
}
* { box-sizing: border-box; } [hidden] { display: none !important; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 1.2rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .2rem 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; } h3 { font-size: 1rem; margin: 1.6rem 0 .1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
.alarm { font-size: 1.2rem; font-weight: 700; color: var(--red); border: 2px solid; padding: .5rem .8rem; }
.wide { overflow-x: auto; } .note, .lead { margin: .2rem 0 .5rem; max-width: 75ch; }
.opening { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 1.2rem;
  margin: 1rem 0; align-items: center; }
.figure { border-left: 4px solid var(--blue); padding: .1rem 0 .1rem .9rem; margin: 0 0 1rem; }
.figure b { display: block; font-size: 2rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: .8rem; }
svg { width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 4px; stroke-linejoin: round; }
.chips, .filters { display: flex; flex-wrap: wrap; gap: .4rem .8rem; align-items: center; margin: .5rem 0; }
.chips button { border: 1px solid var(--line); border-radius: 1rem; background: none; padding: .15rem .8rem; }
.chips button[aria-pressed=true] { background: var(--blue); color: Canvas; border-color: var(--blue); }
.filters input { min-width: 14rem; } .filters label { display: flex; gap: .3rem; align-items: center; max-width: 100%; }
select { min-width: 0; }
select, input, button { font: inherit; max-width: 100%; }
details.item { border-bottom: 1px solid var(--line); padding: .35rem 0; }
summary { cursor: pointer; } .mark { font-weight: 600; margin-right: .5rem; }
details.item > summary .mark { display: inline-block; min-width: 5.2rem; }
.right { color: var(--green); } .wrong { color: var(--red); } .no_answer, .cut_off { color: var(--ochre); }
.meta { color: var(--quiet); font-size: .85rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .5rem; margin: .3rem 0;
  border-radius: 4px; font-size: .85rem; }
.drafts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(250px, 100%), 1fr)); gap: .7rem;
  margin: .5rem 0; }
.draft { border: 1px solid var(--line); border-top: 4px solid var(--line); border-radius: 4px; padding: .4rem .6rem; }
.draft.rejected { border-top-color: var(--red); } .draft.accepted { border-top-color: var(--green); }
.draft.returned { border-top-color: var(--ochre); } .draft.unasked { opacity: .6; }
@media (max-width: 600px) {
  h1 { font-size: 1.25rem; } .figure b { font-size: 1.6rem; } td:first-child { white-space: normal; min-width: 8rem; }
}
"""


def render_html(
    title: str,
    sections: Sequence[tables.Section],
    notes: Sequence[str],
    summary: Mapping[str, Any],
    records: Sequence[ItemRecord],
) -> str:
    """The whole page; ``sections`` are titled tables whose first row is the head."""
    alarm = str((summary.get("overlap") or {}).get("headline") or "")
    drawn = charts(summary)
    figures = "".join(
        f'<h3>{escape(name)}</h3><p class="lead">{escape(lead(name, summary))}</p>{tables.html(rows)}'
        for name, rows in sections
    )
    said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes if note != alarm)
    others = "".join(picture for name, picture in drawn.items() if name != OPENING)
    about = escape(json.dumps(summary["metadata"], indent=2, ensure_ascii=False))
    # "</script>" and "<!--" in a draft must not end the data; JSON reads \u003c as "<".
    shown = {"items": [record.to_dict() for record in records], "exchange": (summary.get("exchange") or {}).get("id")}
    data = json.dumps(shown, ensure_ascii=False).replace("<", "\\u003c")
    body = (
        f"{_opening(summary, alarm, drawn[OPENING])}\n"
        f"<h2>Questions, drafts and what became of them</h2>{EXPLORER}\n"
        f"<h2>Tables</h2>{said}{figures}\n"
        f'<h2>Charts</h2><div class="charts">{others}</div>\n'
        "<h2>Where the numbers come from</h2><details><summary>as JSON</summary>"
        f"<pre>{about}</pre></details>\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{SCRIPT}</script>'
    )
    return page(title, body)


def page(title: str, body: str) -> str:
    """A document of this style around a body of HTML, which asks nothing of the network."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style></head><body>\n'
        f"{body}</body></html>\n"
    )


def _opening(summary: Mapping[str, Any], alarm: str, picture: str) -> str:
    """The ten seconds: model and date, the verdict, three figures, one chart."""
    outcome, metadata = Outcome.of(summary), summary["metadata"]
    base = metadata.get("base")
    told = [base.get("name") if isinstance(base, Mapping) else base, metadata.get("date"), f"{summary['n']} questions"]
    figures = "".join(
        f'<p class="figure"><b>{escape(large)}</b>{escape(small)}</p>' for large, small in _figures(outcome, summary)
    )
    return (
        (f'<p class="alarm">{escape(alarm)}</p>' if alarm else "")
        + f'<header><div class="meta">{escape(" · ".join(str(part) for part in told if part))}</div>'
        + f"<h1>{escape(verdict(outcome))}</h1><div>{escape(acceptance(outcome))}</div></header>"
        + f'<div class="opening"><div>{figures}</div>{picture}</div>'
    )


def _figures(outcome: Outcome, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Three large figures, each with what it is."""
    before, after = (percent(rate).removesuffix(" %") for rate in (outcome.before, outcome.after))
    spans = [f"{100 * rate.low:.0f} to {100 * rate.high:.0f}" for rate in (outcome.before, outcome.after)]
    right = (f"{before} → {after} %", f"right before and after checking (95 % intervals {spans[0]} and {spans[1]})")
    parts = [percent(rate) if rate else "–" for rate in (outcome.accepted, outcome.others)]
    counts = [rate.n if rate else 0 for rate in (outcome.accepted, outcome.others)]
    told = (" against ".join(parts), f"right among the {counts[0]} accepted and the {counts[1]} other answers")
    if outcome.time_ratio is None:
        return [right, told, (f"{outcome.drafts:.2f} drafts", "a question; time was not measured")]
    times = [f"{summary[mode]['average_latency_ms'] / 1000:.2f} s" for mode in ("drafter", "draft_verify")]
    taken = f"the time of the drafter alone ({times[0]} → {times[1]}, {outcome.timed} questions one by one)"
    return [right, told, (f"{outcome.time_ratio:.2f} ×", taken)]
