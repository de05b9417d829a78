"""The page's browser of questions: filters, and of each question its drafts side by side, rejected and accepted."""

from __future__ import annotations

SCRIPT = """
const DATA = JSON.parse(document.getElementById('data').textContent);
const FIRST = 8, MORE = 50;
let shown = FIRST;
const by = id => document.getElementById(id);
const returned = item => item.abstain && !item.accepted ?
  {correct: false, status: 'no_answer', value: null} : item.drafts[item.chosen];
const verdict = draft => draft.correct ? 'right' : draft.status === 'answer' ? 'wrong' : draft.status;
const said = draft => verdict(draft).replace('_', ' ');
const element = (name, text, kind) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
};
const number = value => value === null || value === undefined ? '–' : (+value).toFixed(3);
const shortened = text => text.split('\\n')[0].slice(0, 110);
const drafts = count => count + (count === 1 ? ' draft' : ' drafts');
function stateOf(item, index) {
  if (index >= item.attempts) return ['unasked', 'not asked for by the loop'];
  if (index !== item.chosen) return ['rejected', 'rejected'];
  return item.accepted ? ['accepted', 'accepted'] :
    item.abstain ? ['rejected', 'rejected, best score'] : ['returned', 'returned, not accepted'];
}
function draftView(item, draft, index) {
  const [kind, state] = stateOf(item, index);
  const box = element('div', undefined, 'draft ' + kind);
  const head = element('div');
  const mark = element('span', said(draft), 'mark ' + verdict(draft));
  head.append(element('strong', `Draft ${index + 1}: ${state}. `), mark);
  const scores = Object.entries(draft.scores).map(([name, value]) => name + ' ' + number(value)).join(', ');
  const equation = draft.false_equation ? `; false equation ${draft.false_equation}` : '';
  const about = `answer ${draft.value ?? '–'}; ${scores || 'no scores'}; ${draft.tokens} tokens` +
    (draft.finished ? '' : ', cut off') + equation;
  box.append(head, element('pre', draft.text), element('div', about, 'meta'));
  const others = Object.entries(draft.readings).map(([name, r]) => `${name}: ${r.value ?? r.status}`).join(', ');
  if (others) box.append(element('div', 'read as ' + others, 'meta'));
  return box;
}
function itemView(item) {
  const box = element('details', undefined, 'item');
  const last = returned(item);
  const head = element('summary');
  head.append(element('span', said(last), 'mark ' + verdict(last)),
    shortened(item.question) + ' ',
    element('span', `${item.task}, gold ${item.gold}, answer ${last.value ?? '–'}, ${drafts(item.attempts)}` +
      (item.accepted ? ', accepted' : ''), 'meta'));
  box.append(head);
  box.addEventListener('toggle', () => {
    if (!box.open || box.dataset.filled) return;
    box.dataset.filled = '1';
    box.append(element('div', `${item.id}, sampling seed ${item.seed}` +
      (item.latency_ms === null ? '' : `, ${item.latency_ms.toFixed(0)} ms`), 'meta'));
    if (item.question !== shortened(item.question)) box.append(element('pre', item.question));
    const boxes = element('div', undefined, 'drafts');
    boxes.append(...item.drafts.map((draft, index) => draftView(item, draft, index)));
    box.append(boxes);
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
const VIEWS = [['all', 'any', 'any'], ['mended by checking', 'gained', 'any'], ['spoiled', 'lost', 'any'],
  ['accepted, yet wrong', 'wrong', 'accepted'], ['not accepted', 'any', 'not']];
const chips = VIEWS.map(([name, wanted, taken]) => {
  const chip = element('button', name);
  chip.addEventListener('click', () => { by('verdict').value = wanted; by('accepted').value = taken; refresh(); });
  return chip;
});
function render() {
  const matching = DATA.items.filter(matches);
  by('count').textContent = `${matching.length} of ${DATA.items.length} items`;
  by('items').replaceChildren(...matching.slice(0, shown).map(itemView));
  by('more').hidden = matching.length <= shown;
  VIEWS.forEach(([, wanted, taken], place) =>
    chips[place].setAttribute('aria-pressed', by('verdict').value === wanted && by('accepted').value === taken));
}
function refresh() { shown = FIRST; render(); }
function options(id, values) {
  const distinct = [...new Set(values)];
  for (const value of distinct) by(id).append(new Option(value, value));
  by(id).parentElement.hidden = distinct.length < 2;
}
options('task', DATA.items.map(item => item.task));
options('seed', DATA.items.map(item => item.seed));
options('attempts', DATA.items.map(item => item.attempts).sort());
by('chips').append(...chips);
for (const id of ['words', 'verdict', 'accepted', 'task', 'seed', 'attempts'])
  by(id).addEventListener('input', refresh);
by('more').addEventListener('click', () => { shown += MORE; render(); });
const told = DATA.items.findIndex(item => item.id === DATA.exchange);
if (told > 0) DATA.items.unshift(...DATA.items.splice(told, 1));
render();
if (told >= 0) document.querySelector('details.item').open = true;
"""

EXPLORER = """
<div class="chips" id="chips"></div>
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
