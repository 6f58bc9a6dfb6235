"""The comparison page: what stands in the file, and what a real browser makes of it."""
import html
import json
import re
import shutil
import subprocess
from urllib.parse import quote

import pytest

from eval import report_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
HOSTILE = ("</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> "
           "$title &amp; <!-- \u2028 <i>")
HEADS = ["base", "sft & more", "grpo"]
INTERVAL = {"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6], "n": 120}


def summary(mode, **by_subject):
    generated = {"format_rate": 0.9, "mean_length": 41.5} if mode == "generated" else {}
    return {**INTERVAL, "majority_accuracy": 0.3, "by_subject": by_subject or {"Cardiology": INTERVAL},
            **generated}


def make_rows(n=120):
    """Row i is right in head h if bit h of i is set: of each 8 rows 6 have heads that differ."""
    return [{"id": f"medmcqa:{i}", "question": f"Question {i} {HOSTILE}",
             "options": ["one", "two", HOSTILE, "four"],
             "ground_truth": "ABCD"[i % 4], "subject": "Cardiology" if i % 3 else "<i>Anatomy</i>",
             "answers": {head: {"answer": "A" if i >> bit & 1 else HOSTILE, "accuracy": float(i >> bit & 1),
                                "completion": f"needle{i}. {HOSTILE}" + " long" * 40}
                         for bit, head in enumerate(HEADS)}}
            for i in range(n)]


def make_page(rows):
    subjects = {"<i>Anatomy</i>": INTERVAL, "Cardiology": INTERVAL}
    heads = {head: {mode: summary(mode, **subjects) for mode in ("generated", "loglikelihood")}
             for head in HEADS}
    paired = [{"before": "base", "after": after, "mode": mode, "only_before": 30, "only_after": 31,
               "p_value": 1.0}
              for after in HEADS[1:] for mode in ("generated", "loglikelihood")]
    return report_html("Hostile <b>title</b> $data", heads, rows, paired)


def data_in(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_page_loads_nothing():
    page = report_html("Plain", {"base": {"generated": summary("generated")}}, [])
    assert not re.search(
        r"https?://|\bsrc\s*=|@import|url\(|<link\b|<iframe\b|\bfetch\(|XMLHttpRequest|innerHTML", page)
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in page


def test_data_comes_back_and_cannot_leave_its_script():
    rows = make_rows()
    page = make_page(rows)
    assert data_in(page)["rows"] == rows
    assert page.count("<script") == page.count("</script") == 2
    assert not any(tag in page for tag in ("<img", "<b>", "<i>", "<!--"))
    assert "<h1>Hostile &lt;b&gt;title&lt;/b&gt; $data</h1>" in page
    page.encode("utf-8")


@pytest.mark.parametrize("modes", [["generated"], ["loglikelihood"], ["generated", "loglikelihood"]])
def test_one_chart_a_mode(modes):
    page = report_html("t", {head: {mode: summary(mode) for mode in modes} for head in HEADS}, [])
    assert page.count("<svg") == len(modes) and page.count("<rect") == page.count(
        'class="majority"') == 3 * len(modes)
    assert page.count(">sft &amp; more <small>") == len(modes)


def browse(folder, page, view="", probe=""):
    """Opens the page in headless chromium and runs probe (the body of a JavaScript function) in it.

    Returns (what probe returned, the DOM as text, the lines of the browser's console).
    """
    script = ("<script>addEventListener('load', () => { const output = document.createElement('output');"
              "output.textContent = JSON.stringify((() => {" + probe + "})());"
              "document.body.append(output); })</script>")
    file = folder / "report.html"
    file.write_text(page + script, encoding="utf-8")
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
             "--disable-background-networking --dump-dom --disable-component-update --disable-sync "
             "--disable-dev-shm-usage --enable-logging=stderr --window-size=1300,900")
    run = subprocess.run([BROWSER, *flags.split(), f"--user-data-dir={folder / 'profile'}",
                          f"{file.as_uri()}#{view}"],
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    result = json.loads(html.unescape(re.findall(r"<output>(.*?)</output>", run.stdout, re.S)[-1]))
    return result, run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


COUNT = "return [document.querySelectorAll('article').length, document.getElementById('count').textContent];"


@needs_browser
@pytest.mark.parametrize("view, cards, found", [
    ("", 50, 90), ("filter=nonsense", 50, 90), ("filter=all", 50, 120), ("filter=wrong in grpo", 50, 60),
    ("filter=newly right: base → sft %26 more", 30, 30), ("filter=newly wrong: base → grpo", 30, 30),
    ("filter=all&subject=<i>Anatomy</i>", 40, 40), ("filter=all&text=NEEDLE11.", 1, 1),
    ("filter=all&text=nowhere", 0, 0)])
def test_views(tmp_path, view, cards, found):
    result, _, console = browse(tmp_path, make_page(make_rows()), quote(view, safe="=&%"), probe=COUNT)
    assert result == [cards, f"Showing {cards} of {found} questions"] and not console


@needs_browser
def test_controls(tmp_path):
    result, _, console = browse(tmp_path, make_page(make_rows()), probe="""
        const seen = [], at = id => document.getElementById(id);
        const count = () => document.querySelectorAll("article").length;
        const set = (id, value) => {
            at(id).value = value;
            at(id).dispatchEvent(new Event("input"));
            seen.push(count());
        };
        at("more").click(); seen.push(count(), at("more").hidden);
        set("filter", "all"); at("more").click(); at("more").click(); seen.push(count(), at("more").hidden);
        set("filter", "newly right: sft & more → grpo"); set("text", "needle12"); set("text", "");
        set("subject", "Cardiology");
        return [...seen, decodeURIComponent(location.hash.replaceAll("+", " "))];""")
    assert result == [90, True, 50, 120, True, 30, 1, 30, 20,
                      "#filter=newly right: sft & more → grpo&subject=Cardiology&text="] and not console


@needs_browser
def test_model_output_is_shown_not_run(tmp_path):
    rows = make_rows(8)
    result, dom, console = browse(tmp_path, make_page(rows), "filter=all", probe="""
        return [document.title, document.images.length,
                document.querySelectorAll("article script, article i").length,
                [...document.querySelectorAll("pre")].map(node => node.textContent)];""")
    title, images, scripts, shown = result
    assert title == "Hostile <b>title</b> $data" and images == scripts == 0 and not console
    assert sorted(shown) == sorted(a["completion"] for row in rows for a in row["answers"].values())
    assert "&lt;script&gt;document.title='owned'&lt;/script&gt;" in dom


@needs_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_no_sideways_scrolling(tmp_path, width):
    page = make_page(make_rows()).replace("needle1.", "needle" * 100)
    # a window is 500 at least
    frame = f'<iframe style="width: {width}px; border: 0" srcdoc="{html.escape(page)}"></iframe>'
    result, _, console = browse(tmp_path, frame, probe="""
        const {innerWidth, document: page} = document.querySelector("iframe").contentWindow;
        const answers = [...page.querySelector(".answers").children];
        const tops = answers.map(node => node.getBoundingClientRect().top);
        return [innerWidth, page.documentElement.scrollWidth, new Set(tops).size,
                [...page.querySelectorAll("select, input")].every(node => node.labels.length)];""")
    inner, wide, stacks, labelled = result
    assert inner == width and wide <= inner and stacks == (3 if width == 390
                                                           else 1) and labelled and not console


@needs_browser
@pytest.mark.parametrize("rows, heads, cards", [(make_rows(3), ["base"], 3), ([], HEADS, 0), (
    [{"id": "x", "question": "Yes?", "options": [], "ground_truth": "yes", "subject": "", "answers": {
        "base": {"answer": "", "accuracy": 0.0, "completion": ""}}}], ["base", "grpo"], 1)])
def test_odd_input(tmp_path, rows, heads, cards):
    page = report_html("t",
                       {head: {"generated": {**summary("generated"), "by_subject": {}}} for head in heads},
                       rows)
    result, dom, console = browse(tmp_path, page, "filter=all", probe=COUNT)
    assert result[0] == cards and not console
    assert cards != 1 or "Right answer: yes" in dom and "no answer found" in dom and "(empty)" in dom


def test_lone_surrogates_and_line_separators_can_be_written():
    rows = make_rows(1)
    rows[0]["answers"]["base"]["completion"] = "half \ud83d of a smile \u2028\u2029"
    page = make_page(rows)
    assert data_in(page)["rows"] == rows and page.encode("utf-8") and "\u2028" not in page
