"""The page of a comparison in a real browser: Chromium, headless, without a network."""

import pytest

from jaxrlhf.evaluation import comparison, comparison_files
from jaxrlhf.evaluation.summary import by_group, statistics, with_reference

HOSTILE = (
    "</script><script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\"> "
    "<b>bold</b> &amp; \x1b[31mred\x07 \u202egnp.exe \ud800 alone"
)
SCORES = {"one": [0.0, 4.0, 2.0, None], "two": [1.0, 1.0, 5.0, 1.0], "three": [0.0, 4.0, 2.0, 3.0]}
TEXTS = {
    "one": ["the cat sat", HOSTILE, "", "word " * 20_000],
    "two": ["the dog sat", "b", "c", "d"],
    "three": ["e", "f", "g", "h"],
}


def evaluated(model: str) -> dict:
    prompts = []
    for i, (text, score) in enumerate(zip(TEXTS[model], SCORES[model], strict=True)):
        common = {"score": score, "components": {"r": score}}
        answers = [
            {"text": text, "tokens": 3 + i, "finished": i != 1, "sample": 0, **common},
            {"text": f"{text} again", "tokens": 9, "finished": True, "sample": 1, **common},
        ]
        category = "odd" if i % 2 else f"even {HOSTILE}"
        prompt = {"prompt": f"prompt {i} {HOSTILE}", "index": i, "file": "f.jsonl", "category": category}
        prompt |= {"reference": "the dog sat" if i < 2 else None, "completions": answers, "mean": score, "spread": 0.0}
        prompts.append(with_reference(prompt))
    shared = {"references_from": "right", "category_from": "category", "prompts_from": ["f.jsonl"], "seed": 0}
    return {
        "model": f"runs/{model}{HOSTILE if model == 'one' else ''}",
        **shared,
        "reward": {"function": HOSTILE},
        "environment": {"function": ""},
        "weights": {"r": 1.0},
        "sampling": {"greedy": False, "temperature": 1.0},
        "threshold": 1.0,
        "statistics": statistics(prompts, 1.0),
        "groups": {"category": by_group(prompts, "category", 1.0)},
        "prompts": prompts,
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    divergences = [None, {"mean": 0.25, "standard_error": 0.05}, {"reason": "the tokenizers differ"}]
    result = comparison.compare_results([evaluated(model) for model in SCORES], divergences)
    folder = tmp_path_factory.mktemp("compare")
    return comparison_files.write(result, folder)[0][0]


@pytest.fixture
def opened(browser, path):
    """Open the page at a width; at the end, nothing may have failed or been asked for."""
    faults, pages = [], []

    def open_page(width=1280):
        page = browser.new_page(viewport={"width": width, "height": 800})
        pages.append(page)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))

        def refuse(route):
            if route.request.url.partition("#")[0] == path.as_uri():
                route.continue_()
            else:
                faults.append(f"asked for {route.request.url}")
                route.abort()

        page.route("**/*", refuse)
        page.goto(path.as_uri())
        page.wait_for_selector(".plot circle")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not faults


def test_hostile_texts_stay_text(opened):
    page = opened()
    assert page.title().startswith("Comparison of runs/one</script>")
    assert page.locator("img").count() == page.locator("main script").count() == page.locator("main b b").count() == 0
    shown = page.inner_text("#answers")
    assert "<b>bold</b> &amp; \\x1b[31mred\\x07 \\u202egnp.exe \\ud800 alone" in shown
    assert "\x1b" not in page.locator("main").inner_html()


def test_the_tables_hold_the_numbers_and_sort(opened):
    page = opened()
    table = page.locator("#models table").first
    rows = [row.inner_text().split("\t") for row in table.locator("tbody tr").all()]
    head = [cell.inner_text() for cell in table.locator("thead th").all()]
    second = dict(zip(head, rows[1], strict=True))
    assert second["win rate"].startswith("0.67 [") and second["KL to A"] == "0.250 ± 0.050"
    assert second["wins \u2013 ties \u2013 losses"] == "2 \u2013 0 \u2013 1"
    assert dict(zip(head, rows[2], strict=True))["KL to A"] == "\u2013"
    table.get_by_role("button", name="difference from A").click()
    assert [row.inner_text()[0] for row in table.locator("tbody tr").all()] == ["B", "C", "A"]
    assert "no KL of C to A: the tokenizers differ" in page.inner_text("header")


def test_answers_are_sorted_filtered_and_compared_word_by_word(opened):
    page = opened()
    cards = page.locator("#answers .card")
    assert cards.count() == 4
    assert cards.first.locator("del").inner_text() == "cat" and cards.first.locator("ins").inner_text() == "dog"
    page.locator("#answers .menu", has_text="order").locator("select").select_option("best")
    assert cards.first.inner_text().count("(+3 to A)") == 1
    page.locator("#answers .menu", has_text="order").locator("select").select_option("worst")
    assert "(\u22123 to A)" in cards.first.inner_text()
    page.locator("#answers .menu", has_text="category").locator("select").select_option("1")
    assert cards.count() == 2
    page.locator("#answers .menu", has_text="category").locator("select").select_option("")
    page.locator("#answers .menu", has_text="order").locator("select").select_option("file")
    page.locator("#answers .menu", has_text="sample").locator("select").select_option(label="2")
    assert "the cat sat again" in cards.first.inner_text()
    page.get_by_label("mark words that differ").uncheck()
    assert page.locator("#answers del").count() == 0


@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_width_and_charts_answer_to_keys(opened, width):
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    plot = page.locator(".plot").first
    plot.focus()
    page.keyboard.press("ArrowRight")
    assert "value" in page.locator(".tip.on").inner_text()
    if width == 360:
        first, second = (page.locator("#answers .card").first.locator(".columns > div").nth(i) for i in (0, 1))
        assert second.bounding_box()["y"] > first.bounding_box()["y"], "columns are stacked"
