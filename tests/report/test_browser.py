"""The report in a real browser: Chromium, headless, without a network."""

import json
import re

import pytest
from support.recorded_runs import token_record, write_lines, write_run, write_tokens

from jaxrlhf import report
from jaxrlhf.report import tokens

HOSTILE = (
    "</script><script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\"> "
    "<b>bold</b> &amp; \x1b[31mred\x07 \u202egnp.exe \ud800 alone"
)
PIECES = ["He", " met", "\n", " 日", "本", "", " <b>", "</script>", "\t", " \u202eend", " !"]

MINUS = "\u2212"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The report of a PPO run with samples and tokens, most of them hostile."""
    run = write_run(tmp_path_factory.mktemp("runs") / "ppo", "ppo", 40, step=10)
    rows = [
        {"step": 1, "prompt": "gains", "completion": "the cat sat on a mat", "score": -1.0},
        {"step": 1, "prompt": "loses", "completion": "a b c", "score": 2.0},
        {"step": 1, "prompt": f"hostile {HOSTILE}", "completion": HOSTILE, "score": 0.0},
        {"step": 1, "prompt": "silent", "completion": "", "score": None},
        {"step": 1, "prompt": "long", "completion": "word " * 20_000, "score": 0.0},
        {"step": 40, "prompt": "gains", "completion": "the dog sat on a mat", "score": 3.0},
        {"step": 40, "prompt": "loses", "completion": "a b d", "score": 1.5},
        {"step": 40, "prompt": f"hostile {HOSTILE}", "completion": "x" * 5000, "score": 0.0},
        {"step": 40, "prompt": "silent", "completion": "", "score": None},
        {"step": 40, "prompt": "long", "completion": "word " * 19_000, "score": 0.0},
    ]
    write_lines(run / "samples.jsonl", rows)
    for step in (1, 40):
        write_tokens(run, step, [token_record(step, 0, PIECES), token_record(step, 1, ["other"] * 3, None)])
    return report.write(run)


@pytest.fixture
def opened(browser, path):
    """Open the report at a width and colour scheme; at the end, nothing may have failed or been asked for."""
    faults, pages = [], []

    def open_page(width=1280, scheme="light", target=path):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        pages.append(page)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        url = target.as_uri()

        def refuse(route):
            if route.request.url.partition("#")[0] == url:
                route.continue_()
            else:
                faults.append(f"asked for {route.request.url}")
                route.abort()

        page.route("**/*", refuse)
        page.goto(url)
        page.wait_for_selector(".plot path")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert faults == []


def chart(page, title):
    return page.locator("figure", has=page.get_by_text(title, exact=True))


def test_pointing_at_a_chart_shows_step_and_values(opened):
    page = opened()
    figure = chart(page, "Score")
    assert not figure.locator(".tip").is_visible()
    box = figure.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 40)
    tip = figure.locator(".tip").inner_text()
    assert "step 40" in tip and "objective/scores" in tip and re.search(r"2\.9|3\.0", tip)
    page.mouse.move(box["x"] + 46, box["y"] + 40)
    assert "step 1" in figure.locator(".tip").inner_text().splitlines()[0]
    page.mouse.move(0, 0)
    assert not figure.locator(".tip").is_visible()


@pytest.mark.parametrize("width", [360, 1280])
def test_a_tooltip_shows_its_labels_whole_and_not_over_the_place(opened, width, tmp_path):
    run = write_run(tmp_path / "ppo", "ppo", 12)
    held_out = {"eval/scores": 1.0, "eval/scores_greedy": 2.0}
    (run / "validation.json").write_text(json.dumps({"metrics": held_out, "scores": [1.0]}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13, "objective/scores": 1.0, **held_out}) + "\n")
    page = opened(width, target=report.write(run))
    figure = chart(page, "Score")
    figure.scroll_into_view_if_needed()
    box = figure.locator("svg").bounding_box()
    for x in range(52, int(box["width"]) - 10, 20):
        page.mouse.move(box["x"] + x, box["y"] + 60)
        tip = figure.locator(".tip")
        assert re.search(r"eval/scores_greedy \(at |step (0|13)", tip.inner_text())
        assert tip.evaluate("e => [...e.querySelectorAll('span')].every((s) => s.scrollWidth <= s.clientWidth + 1)")
        place, line = tip.bounding_box(), figure.locator("g.cursor line").bounding_box()
        assert box["x"] <= place["x"] and place["x"] + place["width"] <= box["x"] + box["width"] + 1
        apart = line["x"] <= place["x"] or line["x"] >= place["x"] + place["width"]
        assert apart or place["y"] >= line["y"] + line["height"]


def test_charts_and_tokens_are_read_with_the_keyboard(opened):
    page = opened()
    figure = chart(page, "KL to the reference")
    figure.locator("svg").focus()
    page.keyboard.press("End")
    assert "step 40" in figure.locator(".tip").inner_text()
    page.keyboard.press("ArrowLeft")
    assert "step 39" in figure.locator(".tip").inner_text()
    page.keyboard.press("Escape")
    assert not figure.locator(".tip").is_visible()

    page.locator(".tokens .token").first.focus()
    page.keyboard.press("ArrowRight")
    assert "token 2 of 11, id 1" in page.locator(".detail").inner_text()
    assert page.evaluate("document.activeElement.textContent") == "·met"
    page.keyboard.press("End")
    assert "token 11 of 11" in page.locator(".detail").inner_text()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # the focus is visible


def test_every_control_is_reached_by_tab(opened):
    page = opened()
    page.evaluate(
        """() => { window.seen = new Set(); document.addEventListener("focusin", (event) => {
        const e = event.target, name = e.getAttribute("class") || "";
        window.seen.add(`${e.tagName}.${e.type || ""}.${name}`); }); }"""
    )
    for _ in range(120):
        page.keyboard.press("Tab")
    seen = page.evaluate("[...window.seen]")
    controls = {
        "svg..plot",
        "INPUT.radio.",
        "INPUT.range.",
        "INPUT.checkbox.",
        "SELECT.select-one.",
        "SUMMARY..",
        "A..",
    }
    assert controls | {"SPAN..token"} <= set(seen)


def test_the_token_view_shows_the_numbers_of_the_record(opened):
    page = opened()
    record = token_record(40, 0, PIECES)
    page.locator(".tokens .token").nth(1).hover()
    detail = page.locator(".detail").inner_text()
    for name in tokens.SERIES:
        assert f"{record[name][1]:.4g}".replace("-", MINUS).rstrip("0") in detail, name
    assert "88.4 %" in detail and "36.8 %" in detail  # exp(-0.1234), exp(-1)
    assert "alternative" in detail and "·met" in detail
    assert page.locator(".tokens .token").all_inner_texts() == [
        "He",
        "·met",
        "↵",
        "·日",
        "本",
        "▯",
        "·<b>",
        "</script>",
        "⇥",
        "·\\u202eend",
        "·!",
    ]


def test_a_radio_changes_the_colours_and_the_legend(opened):
    page = opened()

    def colours():
        return page.eval_on_selector_all(".tokens .token", "nodes => nodes.map(n => n.style.backgroundColor)")

    labels = page.locator(".radios label").all_inner_texts()
    assert labels == ["KL", "advantage", "value", "reward", "log p", "entropy", "ratio"]
    before, scale = colours(), page.locator(".scale").inner_text()
    page.get_by_role("radio", name="entropy").check()
    assert colours() != before and page.locator(".scale").inner_text() != scale
    # Both signs of the advantage have their own colour, as they have in the record.
    page.get_by_role("radio", name="advantage").check()
    assert colours() == before
    signs = [value > 0 for value in token_record(40, 0, PIECES)["advantage"]]
    assert [("--positive" in colour) for colour in colours()] == signs


def test_step_and_sample_of_the_token_view_are_chosen(opened):
    page = opened()
    page.get_by_label("Sample", exact=True).select_option("1")
    assert page.locator(".tokens .token").all_inner_texts() == ["other"] * 3
    assert "prompt 1" in page.locator(".token-view .prompt").inner_text()
    page.locator(".token-view").get_by_label("Step", exact=True).select_option("1")
    page.locator(".tokens .token").first.hover()
    value = token_record(1, 0, PIECES)["value"][0]
    assert f"{value:.4g}".replace("-", MINUS) in page.locator(".detail").inner_text()


def test_samples_are_sorted_and_their_words_compared(opened):
    page = opened()
    first, last = page.locator(".card").first, page.locator(".card")
    assert "gains" in first.inner_text() and "+4" in first.inner_text()
    assert first.locator("del").all_inner_texts() == ["cat"] and first.locator("ins").all_inner_texts() == ["dog"]
    page.get_by_label("Order", exact=True).select_option("loss")
    assert "loses" in last.first.inner_text() and f"{MINUS}0.5" in last.first.inner_text()
    assert "silent" in last.last.inner_text() and "(empty)" in last.last.inner_text()


def test_a_table_sorts_by_its_columns(opened):
    page = opened()
    page.evaluate(
        """() => { const rows = [{a: 2, b: "x"}, {a: null, b: "z"}, {a: -1, b: "y"}];
        document.querySelector("main").append(table("sorted", [
          {label: "a", value: (r) => r.a}, {label: "b", value: (r) => r.b}], rows)); }"""
    )
    sorted_table = page.locator("table", has_text="sorted")

    def column():
        return sorted_table.locator("tbody td").all_inner_texts()

    sorted_table.get_by_role("button", name="a").click()
    assert column() == ["x", "y", "z"]  # numbers: the largest first, a missing one last
    sorted_table.get_by_role("button", name="a").click()
    assert column() == ["y", "x", "z"]
    assert sorted_table.locator("th").first.get_attribute("aria-sort") == "ascending"
    sorted_table.get_by_role("button", name="b").press("Enter")
    assert column() == ["x", "y", "z"]


def test_hostile_texts_stay_text(opened):
    page = opened()
    assert page.title().endswith("jaxrlhf report")
    card = page.locator(".card", has_text="hostile")
    text = card.inner_text()
    shown = "<script>document.title", "<b>bold</b>", "&amp;", "\\x1b[31mred\\x07", "\\u202egnp.exe", "\\ud800 alone"
    for part in shown:
        assert part in text
    assert page.locator("main img, main script, main b b").count() == 0
    assert "more characters" in page.locator(".card", has_text="long").inner_text()


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(opened, width, scheme):
    page = opened(width, scheme)
    page.eval_on_selector_all("details", "nodes => nodes.forEach((n) => { n.open = true; })")
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Text stands out from the page in both schemes: WCAG asks for a ratio of 4.5.
    contrast = page.evaluate(
        """() => { const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map((v) => {
          const s = v / 255; return s <= 0.03928 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4; });
          return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const back = light(getComputedStyle(document.body).backgroundColor);
        return [".verdict", ".note", "figcaption .unit", ".tick", ".status"].map((s) => {
          const style = getComputedStyle(document.querySelector(s));
          const text = light(s === ".tick" ? style.fill : style.color);
          return (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05); }); }"""
    )
    assert min(contrast) >= 4.5


def test_the_logarithmic_switch_moves_positive_curves_only(opened):
    page = opened()

    def curve(title):
        return chart(page, title).locator("path").first.get_attribute("d")

    before = curve("Score"), curve("Learning rate"), curve("Length")
    page.get_by_label("logarithmic scale").check()
    after = curve("Score"), curve("Learning rate"), curve("Length")
    assert after[0] == before[0] and after[2] != before[2]


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "grpo"])
def test_pages_of_other_methods_are_drawn(opened, method, tmp_path):
    run = write_run(tmp_path / method, method, 3, outcome=None)
    page = opened(target=report.write(run))
    assert page.locator(".plot").count() > 3
    assert page.locator(".verdict").inner_text().startswith("Ended without a record of how, after 3 of 3 ")
    titles = page.locator("h2").all_inner_texts()
    assert "Curves" in titles and "Reproduce" in titles and "Tokens" not in titles
