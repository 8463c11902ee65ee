"""The ledger's filters as a reader without a network uses them: by keyboard, by a link, and without any script."""

import shutil

import pytest

from tests.book.test_evidence import ROOT, gathered, write_book
from tests.book.test_evidence import evidence as pages


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """The ledger's own HTML, style and script in a page of its own: rendering the book takes longer than looking."""
    folder = tmp_path_factory.mktemp("ledger")
    text = pages.ledger_page(gathered(write_book(folder)))
    (folder / "_static").mkdir()
    for name in ("ledger.js", "book.css"):
        shutil.copy(ROOT / "book/_assets" / name, folder / "_static" / name)
    body = "\n".join(line for line in text.splitlines() if line.startswith("<"))
    style = '<meta charset="utf-8"><link rel="stylesheet" href="_static/book.css">'
    (folder / "ledger.html").write_text(f"<!doctype html><title>Ledger</title>{style}<body>{body}</body>")
    return folder / "ledger.html"


@pytest.fixture
def look(browser, ledger):
    contexts = []

    def opened(query="", **more):
        contexts.append(browser.new_context(offline=True, **more))
        page = contexts[-1].new_page()
        page.goto(ledger.as_uri() + query)
        return page

    yield opened
    for context in contexts:
        context.close()


def shown(page):
    return page.locator(".ledger tbody tr:visible").count()


def test_rows_are_chosen_by_keyboard_and_counted_aloud(look):
    page = look()
    assert shown(page) == 2
    page.get_by_label("Verdict").focus()
    page.keyboard.type("supported")
    assert shown(page) == 1
    assert page.locator("output[aria-live=polite]").inner_text() == "1 of 2 rows shown"
    page.get_by_label("Words").fill("abstract dice")
    assert shown(page) == 0
    page.get_by_role("button", name="All claims").press("Enter")
    page.wait_for_function("document.querySelector('output').textContent == '2 of 2 rows shown'")
    page.get_by_label("Words").fill("BEATS old")
    assert shown(page) == 1 and page.get_by_role("row").filter(has_text="New beats old").is_visible()


def test_a_link_opens_with_its_choice(look):
    assert shown(look("?verdict=supported")) == 1
    assert shown(look("?kind=number&verdict=supported")) == 0
    assert shown(look("?nonsense=1")) == 2


def test_without_scripts_all_rows_are_there_and_no_form(look):
    page = look(java_script_enabled=False)
    assert shown(page) == 2 and not page.locator("form.filters").is_visible()


def test_a_phone_shows_cards_that_are_still_a_table(look):
    page = look(viewport={"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert page.get_by_role("table").count() == 1 and page.get_by_role("cell").count() == 2 * 5
    assert page.get_by_role("columnheader", name="verdict").count() == 1
    assert page.locator(".ledger thead").bounding_box()["height"] <= 1  # heard, not seen: the cells say their columns
