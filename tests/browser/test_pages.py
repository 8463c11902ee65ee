"""The built pages as a reader without a network opens them: from disk, in a browser."""

from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell

from tests.book.test_build import build, write_book

BUILT = Path(__file__).parents[2] / "_build/html"
CHAPTER = [
    new_markdown_cell(
        "# Tiny\n\n## 1. In one minute\n\nDice {glue:text}`dice`, $a^2$ {cite}`nullbus`\n\n$$ b = \\frac{1}{c} $$"
    ),
    new_code_cell(
        "import anywidget, ipywidgets, matplotlib.pyplot as plt, pandas as pd, traitlets\n"
        "from types import SimpleNamespace\n"
        "from lib import chapter\n"
        "chapter.glue('dice', SimpleNamespace(mean=0.714, low=0.661, high=0.752))"
    ),
    new_code_cell("plt.plot([1, 2])\nplt.show()"),
    new_code_cell("pd.DataFrame({'dsc': [0.1, 0.2]})"),
    new_code_cell(
        "class Hello(anywidget.AnyWidget):\n"
        "    _esm = '''export default { render({ model, el }) {\n"
        "        el.className = 'hello'; el.textContent = `says ${model.get('word')}`; } };'''\n"
        "    word = traitlets.Unicode('nothing').tag(sync=True)\n"
        "Hello(word='indistinct')"
    ),
    new_code_cell(
        "slider, twin = ipywidgets.IntSlider(value=4), ipywidgets.IntText(value=4)\n"
        "ipywidgets.jslink((slider, 'value'), (twin, 'value'))\n"
        r"ipywidgets.VBox([slider, twin, ipywidgets.HTMLMath(r'\(x^2\)'), ipywidgets.Button(icon='check')])"
    ),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The real prose and one tiny executed chapter under every name that the index opens, built."""
    names = ("nullbus", "uavls", "duplus", "medclip_samv2", "malenia")
    paths = write_book(tmp_path_factory.mktemp("book"), dict.fromkeys(names, CHAPTER))
    assert build.main(["book", "--jobs", "1"], root=paths.root) == 0
    return paths.html


@pytest.fixture
def open_page(browser):
    """Open a page from disk with the network blocked; what went wrong gathers in `.troubles`."""
    contexts = []

    def opened(path: Path, width: int = 1300, query: str = ""):
        context = browser.new_context(offline=True, viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.troubles = []

        def gate(route):
            if route.request.url.startswith(("file:", "data:", "blob:")):
                route.continue_()
            else:
                page.troubles.append(f"request of {route.request.url}")
                route.abort()

        context.route("**/*", gate)
        page.on("console", lambda line: page.troubles.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on("requestfailed", lambda request: page.troubles.append(f"failed: {request.url}"))
        page.goto(path.as_uri() + query, wait_until="load")
        return page

    yield opened
    for context in contexts:
        context.close()


def check_page(page):
    """What holds of every page: its maths is typeset, its images are there, nothing is wrong, nothing sticks out."""
    if page.locator(".math").count():
        page.wait_for_selector("mjx-container", timeout=20_000)
    for image in page.locator("img:visible").all():
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    page.wait_for_load_state("networkidle")
    assert page.troubles == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize("width", [1300, 390], ids=["desk", "phone"])
@pytest.mark.parametrize("name", ["index", "method", "references", "what_was_run", "genindex", "notebooks/nullbus"])
def test_pages_open_from_disk_without_a_network(pages, open_page, name, width):
    check_page(open_page(pages / f"{name}.html", width))


def test_a_chapter_shows_maths_figures_tables_and_numbers(pages, open_page):
    page = open_page(pages / "notebooks/nullbus.html")
    page.wait_for_selector("div.math mjx-container")
    assert page.locator("span.math mjx-container").count() == 1
    assert page.locator(".cell_output img").count() == 1
    assert page.locator(".cell_output table td").all_text_contents() == ["0.1", "0.2"]
    assert "Dice 0.71 (0.66–0.75)," in page.locator("article").inner_text()


def test_widgets_work_on_a_page_without_kernel(pages, open_page):
    page = open_page(pages / "notebooks/nullbus.html")
    page.wait_for_selector(".hello", timeout=20_000)
    assert page.locator(".hello").text_content() == "says indistinct"
    page.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".widget-text input").input_value() == "5"
    page.wait_for_selector(".widget-htmlmath mjx-container", timeout=20_000)
    check_page(page)


def test_the_front_page_leads_into_the_book(pages, open_page):
    page = open_page(pages / "index.html")
    assert page.locator(".bd-sidebar-primary .toctree-l1").all_text_contents()[0].strip() == "Tiny"
    assert page.locator(".sd-card").count() == 8 and page.locator(".interval").count() == 4
    page.locator("article").get_by_role("link", name="Open the chapter").first.click()
    page.wait_for_url("**/notebooks/nullbus.html")
    assert page.locator("article h1").inner_text().startswith("Tiny")


def test_search_finds_words_of_a_chapter(pages, open_page):
    page = open_page(pages / "search.html", query="?q=minute")
    page.wait_for_selector("#search-results li a", timeout=20_000)
    assert "Tiny" in page.locator("#search-results").inner_text()
    assert page.troubles == []


@pytest.mark.skipif(not BUILT.exists(), reason="_build/html is not there: run make book to check the real pages too.")
def test_the_built_book_opens_from_disk_without_a_network(open_page):
    # _static holds the theme's own templates, which are no pages.
    for path in sorted(path for path in BUILT.rglob("*.html") if "_static" not in path.parts):
        page = open_page(path)
        check_page(page)
        for view in page.locator("script[type='application/vnd.jupyter.widget-view+json']").all():
            drawn = "tag => tag.previousElementSibling || tag.nextElementSibling"
            assert view.evaluate_handle(drawn).as_element(), f"a widget of {path} is not drawn"
