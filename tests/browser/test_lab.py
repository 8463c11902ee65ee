"""The explorer in a real JupyterLab: a person types a prompt, makes it absent, and sees the mask change."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import pytest

from lib import models
from tests.conftest import write_tiny_dataset
from tests.widgets.test_explorer import talkative

TOKEN = "for-this-test-only"
MASK = """() => {
  const canvas = document.querySelector('.p2m canvas');
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  return Array.from(data).filter((_, i) => i % 4 === 0).join(',');
}"""
ANSWERED = "n => Number(document.querySelector('.p2m')?.dataset.answered || 0) >= n"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab server with one notebook that opens the explorer; yields its address."""
    folder = tmp_path_factory.mktemp("lab")
    models.save(folder / "m.safetensors", talkative(text_dim=64), "nullbus", encoder="hash", size=32)
    dataset = write_tiny_dataset(folder / "tiny")
    cell = (
        "from lib.widgets import explore\n"
        f"explore('m.safetensors', {str(dataset)!r}, n=2, captions=__import__('pathlib').Path('captions'))"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "try.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "OMP_NUM_THREADS": "1",
    }
    log = (folder / "lab.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0",
         f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}", "--allow-root"],
        cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, (folder / "lab.log").read_text()
                time.sleep(0.25)
        else:
            pytest.fail("JupyterLab did not start: " + (folder / "lab.log").read_text()[-2000:])
        yield address
    finally:
        server.terminate()
        server.wait(timeout=20)
        log.close()


def test_typing_and_clearing_a_prompt_changes_the_mask(lab, browser):
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.goto(f"{lab}/lab/tree/try.ipynb?token={TOKEN}&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=60_000, state="attached")
    for _ in range(10):  # a key pressed before the page has wired its commands does nothing
        page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
        page.keyboard.press("Control+Enter")
        page.wait_for_timeout(1000)
        if page.locator(".jp-CodeCell .jp-InputPrompt").first.inner_text().strip() != "[ ]:":
            break
    page.wait_for_function(ANSWERED, arg=1, timeout=240_000)
    first = page.evaluate(MASK)

    field = page.locator("input[data-role=local]")
    field.fill("large irregular spiculated mass with shadowing")
    page.wait_for_function(ANSWERED, arg=2, timeout=30_000)
    typed = page.evaluate(MASK)
    assert typed != first

    absent = page.locator("button[data-absent=local]")
    absent.click()
    page.wait_for_function(ANSWERED, arg=3, timeout=30_000)
    assert absent.get_attribute("aria-pressed") == "true"
    assert page.evaluate(MASK) != typed

    absent.click()
    page.wait_for_function(ANSWERED, arg=4, timeout=30_000)
    assert page.evaluate(MASK) == typed
    assert re.search(r"Dice \d\.\d{3}", page.locator("[data-read=dsc]").inner_text())
    assert re.search(r"[\d.]+ ms", page.locator("[data-read=ms]").inner_text())
    assert page.locator(".p2m .error").inner_text() == ""
    page.close()
