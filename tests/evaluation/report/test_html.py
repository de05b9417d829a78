"""The report's page in headless Chromium: filters work, nothing leaves the file."""

import json
import random
import time
from dataclasses import replace
from html import escape

from mlx_rsgwm.evaluation import metrics
from mlx_rsgwm.evaluation.records import DraftRecord, ExtractedAnswer, ItemRecord
from mlx_rsgwm.evaluation.report import folder as report
from mlx_rsgwm.evaluation.report.leads import LEADS, lead
from mlx_rsgwm.evaluation.report.outcome import Outcome, verdict
from tests.browser import check_pictures, opened

EVIL = '</script><script>window.broken=1</script><img src="http://example.com/x.png" onerror="window.broken=1"><!--'


def records(count=130):
    rng = random.Random(3)
    made = []
    for index in range(count):
        drafts = []
        for _ in range(3):
            right = rng.random() < 0.5
            value = "4" if right else rng.choice(["5", None])
            readings = {"strict": ExtractedAnswer(value, "answer" if value else "no_answer", right)}
            score = min(1.0, 0.4 * rng.random() + 0.5 * right)
            drafts.append(DraftRecord(f"2 + 2 = {value}\n{EVIL}", value, right, {"yesno": score}, 7, readings=readings))
        task = ("change", "groups")[index % 2]
        row = ItemRecord(f"i{index}", task, f"Question {index}? {EVIL}", "4", tuple(drafts), "yesno", 2.0, False, 1, 0)
        made.append(metrics.replay(row, 0.5, 3))
    return made


DRAWN = "!!document.getElementById('count')?.textContent"


def test_no_label_meets_another(browser, tmp_path):
    """On a wide and a narrow screen, light and dark, with many families of long names and hostile ones."""
    names = [f"family {index} of questions on $x^{index}$ <b>&amp; more" for index in range(14)]
    rows = [replace(row, task=names[index % 14]) for index, row in enumerate(records(56))]
    report.write_report(tmp_path, [replace(row, latency_ms=1000.0 + 90 * i) for i, row in enumerate(rows)], 3)
    session, evaluate = opened(browser, tmp_path / "report.html", DRAWN)
    check_pictures(browser, session, evaluate, "report", 5)


def test_page_in_chromium(browser, tmp_path):
    rows = records()
    folder = tmp_path / "report"
    report.write_report(folder, rows, 3, {"note": EVIL})
    _, evaluate = opened(browser, folder / "report.html", DRAWN)

    def choose(field, value):
        evaluate(
            f"{{const f = document.getElementById('{field}'); f.value = {json.dumps(value)};"
            "f.dispatchEvent(new Event('input', {bubbles: true}));}"
        )
        return evaluate("document.getElementById('count').textContent")

    wrong = [row for row in rows if row.returned.status == "answer" and not row.returned.correct]
    assert evaluate("document.getElementById('count').textContent") == "130 of 130 items"
    assert evaluate("document.querySelectorAll('details.item').length") == 8
    evaluate("document.getElementById('more').click()")
    assert evaluate("document.querySelectorAll('details.item').length") == 58
    assert choose("verdict", "wrong") == f"{len(wrong)} of 130 items"
    both = [row for row in wrong if row.accepted]
    assert choose("accepted", "accepted") == f"{len(both)} of 130 items"
    assert choose("accepted", "any") == f"{len(wrong)} of 130 items"
    grouped = [row for row in wrong if row.task == "groups"]
    assert choose("task", "groups") == f"{len(grouped)} of 130 items"
    choose("task", "")
    evaluate("document.querySelectorAll('#chips button')[1].click()")  # mended by checking
    mended = [row for row in rows if row.returned.correct and not row.first.correct]
    assert evaluate("document.getElementById('count').textContent") == f"{len(mended)} of 130 items"
    choose("verdict", "any")
    assert choose("words", "question 77?") == "1 of 130 items"
    evaluate("document.querySelector('details.item').open = true")
    time.sleep(0.2)
    assert evaluate("document.querySelectorAll('details.item pre').length") == 4
    assert EVIL in evaluate("document.querySelector('details.item pre').textContent")
    assert evaluate("window.broken === undefined")
    assert evaluate("document.querySelectorAll('svg').length") == 6
    assert evaluate("document.querySelectorAll('img').length") == 0
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(("file://", "data:")) for url in asked)
    said = [
        e
        for e in browser.events
        if e["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    ]
    assert said == []


def test_page_without_a_browser(tmp_path):
    report.write_report(tmp_path, records(8), 3)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert page.count("</script>") == 2  # ours, and no draft's
    data = page.split('id="data">')[1].split("</script>")[0]
    assert [row["id"] for row in json.loads(data)["items"]] == [f"i{index}" for index in range(8)]


def test_the_page_opens_with_what_came_out_then_items_then_tables(tmp_path):
    rows = records(40)
    summary = report.write_report(tmp_path, rows, 3, {"base": {"name": "a-base"}, "date": "2026-11-29"})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    body = page[page.index("<body>") :]
    order = ["a-base · 2026-11-29 · 40 questions", f"<h1>{verdict(Outcome.of(summary))}</h1>", 'class="figure"', "<svg"]
    order += ['id="items"', "<h2>Tables</h2>", "<h2>Charts</h2>"]
    assert sorted(order, key=body.index) == order
    assert body[: body.index('id="items"')].count('class="figure"') == 3
    assert body[: body.index('id="items"')].count("<svg") == 1


def test_every_table_is_led_by_a_sentence_of_its_own(tmp_path):
    rows = records(12)
    twice = [*rows, *(replace(row, seed=1) for row in rows)]
    numbers = [
        replace(row, drafts=tuple(replace(draft, text="2 + 2 = 5\n#### 5") for draft in row.drafts)) for row in twice
    ]
    seen = set()
    other = {**report.summarise_records(rows[:6], 3), "metadata": {}}
    beside = {"beside": {"this": "another verifier", "other": "this one", "report": other}}
    for made, metadata in ((rows, {}), (twice, beside), (numbers, {})):
        summary = report.write_report(tmp_path, made, 3, metadata, check="auto")
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        for title, _ in report.sections(summary):
            sentence = lead(title, summary)
            assert f'<h3>{escape(title)}</h3><p class="lead">{escape(sentence)}</p><div class="wide"><table>' in page
            assert sentence.endswith(".")
            seen.add(title.split(" seeds ")[0])
    assert seen >= set(LEADS) - {"The same drafts by other extractors"}


def test_drafts_stand_side_by_side_and_below_each_other_on_a_phone(browser, tmp_path):
    report.write_report(tmp_path, records(12), 3)
    session, evaluate = opened(browser, tmp_path / "report.html", DRAWN)
    deadline = time.monotonic() + 20
    while evaluate("document.querySelectorAll('details.item[open] .draft').length") < 3:
        assert time.monotonic() < deadline
    kinds = evaluate("[...document.querySelectorAll('details.item[open] .draft')].map(box => box.classList[1])")
    assert kinds[0] == "rejected"
    assert "accepted" in kinds
    for width, rows in ((1280, 1), (390, 3)):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.call("Emulation.setDeviceMetricsOverride", session, **size)
        tops = "new Set([...document.querySelectorAll('details.item[open] .draft')].map(box => box.offsetTop)).size"
        assert evaluate(tops) == rows
