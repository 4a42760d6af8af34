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

from nbutils.paths import NOTEBOOKS, ROOT

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
    arguments += ["--expose-app-in-browser"]
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
    # Collapsed cells show no count, so the application is asked.
    page.wait_for_function(
        """() => {
          const cells = window.jupyterapp.shell.currentWidget.content.widgets;
          const codes = cells.filter(cell => cell.model.type == 'code').map(cell => cell.model);
          return codes.every(model => model.executionCount && model.executionState != 'running')
            || document.querySelector('[data-mime-type$="error"]');
        }"""
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


def figures(path):
    """How many figures each stored cell shows, but for those with controls or other images."""
    cells = nbformat.read(path, as_version=4).cells
    plain = [
        "interactive" not in cell.metadata.get("tags", [])
        and "plots.plot_misread" not in cell.source  # drawn only where the images are
        for cell in cells
    ]
    outputs = [
        cell.get("outputs", []) if shown else [] for cell, shown in zip(cells, plain, strict=True)
    ]
    return [sum("image/png" in out.get("data", {}) for out in each) for each in outputs]


def test_all_cells_run_and_everything_is_seen(notebook):
    path, page = notebook
    bad = page.locator("[data-mime-type$='error'], [data-mime-type$='stderr']")
    assert bad.all_inner_texts() == []
    drawn = []
    for number in range(len(figures(path))):
        images = page.locator(".jp-Notebook .jp-Cell").nth(number).locator(".jp-RenderedImage img")
        sizes = images.evaluate_all("all => all.map(i => [i.naturalWidth, i.naturalHeight])")
        drawn.append(sum(min(size) > 100 for size in sizes))
    # More are drawn where the data folder has images that were not there when it was stored.
    assert all(now >= stored for now, stored in zip(drawn, figures(path), strict=True))
    in_text = page.locator(".jp-RenderedMarkdown img")
    assert 0 not in in_text.evaluate_all("all => all.map(image => image.naturalWidth)")
    assert page.evaluate(CLIPPED) == []
    assert page.evaluate(BROKEN_LINES) == []
    assert page.evaluate(CUT_CHOICES) == []


def test_widgets_are_alive_and_bars_get_to_their_end(notebook):
    path, page = notebook
    outputs = page.locator(".jp-OutputArea-output").all_inner_texts()
    for fallback in ("HBox(", "VBox(", "Loading widget", "Error displaying widget", "0%|"):
        assert [text for text in outputs if fallback in text] == []
    bars = page.locator(".jp-OutputArea-output:has(.widget-hprogress)").all_inner_texts()
    if "_train_" in path.stem:
        assert ["100%" in bar for bar in bars] == [True]


def picture(page):
    return page.locator("img.widget-image").screenshot()


def next_picture(page, before):
    """The picture that takes the place of `before`; after two minutes, what is still there."""
    end = time.monotonic() + 120
    while (now := picture(page)) == before and time.monotonic() < end:
        page.wait_for_timeout(200)
    return now


@pytest.mark.parametrize("notebook", [NOTEBOOKS / "04_summary.ipynb"], indirect=True, ids=["04"])
def test_the_explorer_draws_what_is_chosen(notebook):
    _, page = notebook
    assert "Ctrl or Shift" in page.locator(".widget-hbox:has(img.widget-image)").inner_text()
    settings, seeds = (f".widget-select-multiple select >> nth={n}" for n in (0, 1))
    metric, against = (f".widget-dropdown select >> nth={n}" for n in (0, 1))
    seen = [picture(page)]
    for name, choose in {
        "updates": lambda: page.select_option(against, "updates"),
        "error": lambda: page.click(".widget-toggle-button:has-text('error')"),
        "training": lambda: page.select_option(metric, index=0),
        "two-settings": lambda: page.select_option(settings, index=[0, 1]),
        "nothing": lambda: page.select_option(seeds, []),
    }.items():
        choose()
        seen.append(next_picture(page, seen[-1]))
        (SCREENSHOTS / f"04_explorer-{name}.png").write_bytes(seen[-1])
    assert len(set(seen)) == len(seen)
    controls = page.locator(settings).bounding_box()
    shown = page.locator("img.widget-image").bounding_box()
    assert controls["x"] + controls["width"] <= shown["x"]  # beside each other
    assert shown["x"] + shown["width"] <= WIDTH
