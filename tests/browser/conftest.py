"""One headless Chromium for the tests that look at pages as a reader does."""

import os
import shutil
from pathlib import Path

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
FOUND_BY_SETUP = Path(__file__).parents[2] / ".venv/.browser"


def chromium() -> str | None:
    """Find the browser: named by CHROMIUM, found by the set-up, or on PATH."""
    if os.environ.get("CHROMIUM"):
        return os.environ["CHROMIUM"]
    if FOUND_BY_SETUP.is_file():
        return FOUND_BY_SETUP.read_text().strip()
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def browser():
    if (executable := chromium()) is None:
        pytest.skip("No Chromium was found: install chromium, or set CHROMIUM to its path.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=FLAGS.split())
        yield running
        running.close()
