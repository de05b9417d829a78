"""The report as one HTML file that asks nothing of the network: tables, pictures as SVG, and a browser of the items.

All data stands in the file as JSON; texts reach the document as text nodes only, so that a draft cannot run as script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mlx_rsgwm.core import tables
from mlx_rsgwm.evaluation.records import ItemRecord
from mlx_rsgwm.evaluation.report.plots import charts

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .4rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.alarm { font-size: 1.2rem; font-weight: 700; color: #b3261e; border: 2px solid; padding: .5rem .8rem; }
.wide { overflow-x: auto; } .note { margin: .2rem 0; max-width: 75ch; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: .8rem; }
svg { width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 4px; stroke-linejoin: round; }
.filters { display: flex; flex-wrap: wrap; gap: .5rem .8rem; align-items: center; margin: .5rem 0; position: sticky;
  top: 0; background: Canvas; padding: .4rem 0; border-bottom: 1px solid var(--line); }
.filters input { min-width: 14rem; } .filters label { display: flex; gap: .3rem; align-items: center; }
details.item { border-bottom: 1px solid var(--line); padding: .25rem 0; }
summary { cursor: pointer; } .mark { display: inline-block; min-width: 5.6rem; font-weight: 600; }
.right { color: #2e7d4f; } .wrong { color: #b3261e; } .no_answer, .cut_off { color: #8a6d00; }
.meta { color: #7a7a7a; font-size: .85rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .5rem; margin: .3rem 0;
  border-radius: 4px; font-size: .85rem; }
.draft { margin: .4rem 0 .4rem 1rem; } .draft.chosen { border-left: 3px solid #2563a8; padding-left: .6rem; }
button { font: inherit; }
"""

SCRIPT = """
const DATA = JSON.parse(document.getElementById('data').textContent);
const PAGE = 50;
let shown = PAGE;
const by = id => document.getElementById(id);
const returned = item => item.abstain && !item.accepted ?
  {correct: false, status: 'no_answer', value: null} : item.drafts[item.chosen];
const verdict = draft => draft.correct ? 'right' : draft.status === 'answer' ? 'wrong' : draft.status;
const element = (name, text, kind) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
};
const number = value => value === null || value === undefined ? '–' : (+value).toFixed(3);
function draftView(item, draft, index) {
  const box = element('div', undefined, 'draft' + (index === item.chosen ? ' chosen' : ''));
  const scores = Object.entries(draft.scores).map(([name, value]) => name + ' ' + number(value)).join(', ');
  const used = index < item.attempts ? '' : ', not asked for by the loop';
  const state = index === item.chosen ? (item.accepted ? ', accepted' : ', returned, not accepted') : '';
  const head = element('div', undefined, 'meta');
  head.append(element('span', verdict(draft), 'mark ' + verdict(draft)),
    `draft ${index + 1}${state}${used}; answer ${draft.value ?? '–'}; ${scores || 'no scores'}; ` +
    `${draft.tokens} tokens` + (draft.finished ? '' : ', cut off'));
  box.append(head, element('pre', draft.text));
  const others = Object.entries(draft.readings).map(([name, r]) => `${name}: ${r.value ?? r.status}`).join(', ');
  if (others) box.append(element('div', 'read as ' + others, 'meta'));
  return box;
}
function itemView(item) {
  const box = element('details', undefined, 'item');
  const last = returned(item);
  const head = element('summary');
  head.append(element('span', verdict(last), 'mark ' + verdict(last)),
    item.question.split('\\n')[0].slice(0, 110) + ' ',
    element('span', `${item.task}, gold ${item.gold}, answer ${last.value ?? '–'}, ${item.attempts} attempts` +
      (item.accepted ? ', accepted' : ''), 'meta'));
  box.append(head);
  box.addEventListener('toggle', () => {
    if (!box.open || box.dataset.filled) return;
    box.dataset.filled = '1';
    box.append(element('div', `${item.id}, sampling seed ${item.seed}` +
      (item.latency_ms === null ? '' : `, ${item.latency_ms.toFixed(0)} ms`), 'meta'), element('pre', item.question));
    item.drafts.forEach((draft, index) => box.append(draftView(item, draft, index)));
  });
  return box;
}
function matches(item) {
  const words = by('words').value.trim().toLowerCase();
  const last = verdict(returned(item)), first = verdict(item.drafts[0]);
  const wanted = {
    any: true, right: last === 'right', wrong: last === 'wrong', no_answer: last === 'no_answer',
    cut_off: last === 'cut_off', gained: last === 'right' && first !== 'right',
    lost: last !== 'right' && first === 'right',
    missed: last !== 'right' && item.drafts.some(draft => draft.correct)
  }[by('verdict').value];
  const taken = {any: true, accepted: item.accepted, not: !item.accepted}[by('accepted').value];
  const text = () =>
    [item.id, item.question, item.gold, ...item.drafts.map(draft => draft.text)].join('\\n').toLowerCase();
  return wanted && taken && (by('task').value === '' || by('task').value === item.task) &&
    (by('seed').value === '' || +by('seed').value === item.seed) &&
    (by('attempts').value === '' || +by('attempts').value === item.attempts) && (!words || text().includes(words));
}
function render() {
  const found = DATA.items.filter(matches);
  by('count').textContent = `${found.length} of ${DATA.items.length} items`;
  by('items').replaceChildren(...found.slice(0, shown).map(itemView));
  by('more').hidden = found.length <= shown;
}
function options(id, values) {
  for (const value of [...new Set(values)]) by(id).append(new Option(value, value));
}
options('task', DATA.items.map(item => item.task));
options('seed', DATA.items.map(item => item.seed));
options('attempts', DATA.items.map(item => item.attempts).sort());
for (const id of ['words', 'verdict', 'accepted', 'task', 'seed', 'attempts'])
  by(id).addEventListener('input', () => { shown = PAGE; render(); });
by('more').addEventListener('click', () => { shown += PAGE; render(); });
render();
"""

FILTERS = """
<div class="filters">
<input id="words" type="search" placeholder="words in question or draft" aria-label="words">
<label>verdict <select id="verdict"><option value="any">any</option><option value="right">right</option>
<option value="wrong">wrong</option><option value="no_answer">no answer</option><option value="cut_off">cut off</option>
<option value="gained">right, first draft not</option><option value="lost">not right, first draft was</option>
<option value="missed">not right, some draft was</option></select></label>
<label>accepted <select id="accepted"><option value="any">any</option><option value="accepted">accepted</option>
<option value="not">not accepted</option></select></label>
<label>task <select id="task"><option value="">all</option></select></label>
<label>attempts <select id="attempts"><option value="">any</option></select></label>
<label>seed <select id="seed"><option value="">all</option></select></label>
<span id="count" class="meta"></span>
</div>
<div id="items"></div>
<button id="more" hidden>show more</button>
"""


def render_html(
    title: str,
    sections: Sequence[tables.Section],
    notes: Sequence[str],
    summary: Mapping[str, Any],
    records: Sequence[ItemRecord],
) -> str:
    """The whole page; ``sections`` are titled tables whose first row is the head."""
    figures = "".join(f"<h2>{escape(name)}</h2>{tables.html(rows)}" for name, rows in sections)
    above = (summary.get("overlap") or {}).get("headline")
    said = "".join(f'<p class="{"alarm" if note == above else "note"}">{escape(note)}</p>' for note in notes)
    drawn = "".join(charts(summary))
    about = escape(json.dumps(summary["metadata"], indent=2, ensure_ascii=False))
    # "</script>" and "<!--" in a draft must not end the data; JSON reads \u003c as "<".
    data = json.dumps({"items": [record.to_dict() for record in records]}, ensure_ascii=False).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style></head><body>\n'
        f'<h1>{escape(title)}</h1>{said}\n{figures}\n<h2>Charts</h2><div class="charts">{drawn}</div>\n'
        f"<h2>Items</h2>{FILTERS}\n<h2>Where the numbers come from</h2><details><summary>as JSON</summary>"
        f"<pre>{about}</pre></details>\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{SCRIPT}</script></body></html>\n'
    )
