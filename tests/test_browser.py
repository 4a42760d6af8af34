"""Every notebook in a real JupyterLab, in a headless Chromium: `make test-browser`.

Screenshots of the whole notebooks, as run, are left in `build/browser/`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from nbutils.paths import NOTEBOOKS
from nbutils.report.readme import ROOT

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SCREENSHOTS = Path(ROOT, "build", "browser")
WIDTH, HEIGHT = 1280, 900  # pixels, of a small laptop
PATIENCE = 900  # seconds for a notebook to run through, also on a machine that does much else

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the extra browser: pip install -e '.[browser]'"
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

# What of a notebook is wider or higher than the place that it has, as [element, text, excess].
CLIPPED = """() => {
  const found = [];
  const seen = element => !element.closest('mjx-assistive-mml');  // which only screen readers see
  for (const part of document.querySelectorAll('.jp-OutputArea-output, .jp-RenderedMarkdown')) {
    for (const element of [part, ...part.querySelectorAll('*')].filter(seen)) {
      const style = getComputedStyle(element);
      const wide = element.scrollWidth - element.clientWidth;
      const high = element.scrollHeight - element.clientHeight;
      if ((style.overflowX != 'visible' && wide > 1) || (style.overflowY != 'visible' && high > 1))
        found.push([element.className || element.tagName, element.innerText.slice(0, 60),
                    `${wide} x ${high} pixels`]);
    }
  }
  return found;
}"""


# Printed lines that are too long, and so were broken, anywhere in a word.
BROKEN_LINES = """() => [...document.querySelectorAll('.jp-RenderedText pre')].filter(pre => {
  const lines = pre.textContent.replace(/\\n$/, '').split('\\n').length;
  const height = parseFloat(getComputedStyle(pre).lineHeight);
  return pre.getBoundingClientRect().height > (lines + 0.9) * height;
}).map(pre => pre.textContent)"""

# Drop-down lists that show only the beginning of what is chosen.
CUT_CHOICES = """() => [...document.querySelectorAll('.widget-dropdown select')].filter(select => {
  const pen = document.createElement('canvas').getContext('2d');
  pen.font = getComputedStyle(select).font;
  return pen.measureText(select.selectedOptions[0].text).width > select.clientWidth - 16;
}).map(select => select.selectedOptions[0].text)"""


def without_outputs(path):
    """The notebook as it is before it is run, so that all that is seen was made in the browser."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address of a notebook, by name, in a JupyterLab on copies.

    Each opens in a workspace of its own, so that the one before is not restored beside it.
    """
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    for path in NOTEBOOKS.glob("*.ipynb"):
        nbformat.write(without_outputs(path), folder / "notebooks" / path.name)
    settings = {
        # All cells are in the page, also those that are not in view.
        "notebook-extension/tracker": {"windowingMode": "none", "scrollPastEnd": False},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for plugin, values in settings.items():
        path = folder / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "PYTHONPATH": str(ROOT),
    }
    arguments = [f"--notebook-dir={folder / 'notebooks'}", "--no-browser", "--port=0"]
    arguments += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with (
        open(folder / "log.txt", "w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *arguments],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as server,
    ):
        try:
            started = time.monotonic()
            while not (known := list((folder / "runtime").glob("jpserver-*.json"))):
                assert server.poll() is None, (folder / "log.txt").read_text()
                assert time.monotonic() < started + 60, (folder / "log.txt").read_text()
                time.sleep(0.2)
            address = json.loads(known[0].read_text())
            yield f"{address['url']}lab/workspaces/{{0}}/tree/{{0}}.ipynb?token={address['token']}"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # Chromium has no sandbox for root, as whom containers run.
        options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def notebook(request, lab, browser):
    """A notebook's path, and the page that shows it after Run All Cells."""
    path = request.param
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.set_default_timeout(PATIENCE * 1000)
    page.goto(lab.format(path.stem))
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_selector("text=| Idle")
    page.click(".lm-MenuBar-item:has-text('Run')")
    page.click("[data-command='runmenu:run-all']")
    codes = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    page.wait_for_function(
        """count => {
          const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
          const done = prompts.filter(prompt => /\\d/.test(prompt.innerText)).length;
          return done == count || document.querySelector('[data-mime-type$="error"]');
        }""",
        arg=len(codes),
    )
    page.wait_for_timeout(1000)  # pictures and widgets are drawn after the last cell ends
    take_screenshot(page, path.stem)
    yield path, page
    page.close()


def take_screenshot(page, name):
    """Picture of the whole notebook: the window is made as high as it for the while."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    height = page.eval_on_selector(".jp-WindowedPanel-outer", "panel => panel.scrollHeight")
    page.set_viewport_size({"width": WIDTH, "height": height + 200})
    page.eval_on_selector(".jp-WindowedPanel-outer", "panel => { panel.scrollTop = 0; }")
    page.wait_for_timeout(500)
    page.locator(".jp-NotebookPanel").screenshot(path=SCREENSHOTS / f"{name}.png")
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})


def test_no_cell_fails_or_warns(notebook):
    _, page = notebook
    bad = page.locator("[data-mime-type$='error'], [data-mime-type$='stderr']")
    assert bad.all_inner_texts() == []


def test_every_stored_figure_is_drawn(notebook):
    path, page = notebook
    stored, drawn = [], []
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        pictures = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        stored.append((number, len(pictures)))
        shown = page.locator(".jp-Notebook .jp-Cell").nth(number)
        images = shown.locator(".jp-RenderedImage img")
        sizes = images.evaluate_all("all => all.map(i => [i.naturalWidth, i.naturalHeight])")
        drawn.append((number, sum(min(size) > 100 for size in sizes)))
    assert drawn == stored


def test_every_picture_in_the_text_is_there(notebook):
    _, page = notebook
    images = page.locator(".jp-RenderedMarkdown img")
    assert 0 not in images.evaluate_all("all => all.map(image => image.naturalWidth)")


def test_nothing_is_clipped_or_scrolls_within_its_place(notebook):
    _, page = notebook
    assert page.evaluate(CLIPPED) == []
    assert page.evaluate(BROKEN_LINES) == []
    assert page.evaluate(CUT_CHOICES) == []


def test_widgets_are_alive(notebook):
    _, page = notebook
    outputs = page.locator(".jp-OutputArea-output").all_inner_texts()
    for fallback in ("HBox(", "VBox(", "Loading widget", "Error displaying widget", "0%|"):
        assert [text for text in outputs if fallback in text] == []


@pytest.mark.parametrize(
    "notebook", sorted(NOTEBOOKS.glob("*_train_*.ipynb")), indirect=True, ids=lambda path: path.stem
)
def test_training_shows_a_bar_that_gets_to_its_end(notebook):
    _, page = notebook
    bar = page.locator(".jp-OutputArea-output:has(.widget-hprogress)")
    assert bar.count() == 1
    assert "100%" in bar.inner_text()


def picture(page):
    return page.locator("img.widget-image").screenshot()


def next_picture(page, before):
    """The picture that takes the place of `before`; after two minutes, what is still there."""
    end = time.monotonic() + 120
    while (now := picture(page)) == before and time.monotonic() < end:
        page.wait_for_timeout(200)
    return now


@pytest.mark.parametrize("notebook", [NOTEBOOKS / "04_summary.ipynb"], indirect=True)
def test_the_explorer_draws_what_is_chosen(notebook):
    _, page = notebook
    seen = [picture(page)]
    for choose in (
        lambda: page.click(".widget-toggle-button:has-text('updates')"),
        lambda: page.click(".widget-toggle-button:has-text('error')"),
        lambda: page.select_option(".widget-dropdown select", index=0),
        lambda: page.select_option(".widget-select-multiple select >> nth=0", index=[0, 1]),
    ):
        choose()
        seen.append(next_picture(page, seen[-1]))
    take_screenshot(page, "04_summary-explored")
    assert len(set(seen)) == len(seen)
