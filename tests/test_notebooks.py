"""What every committed notebook must be, and that the README shows what the records say."""

import re
from urllib.parse import urlsplit

import nbformat
import papermill
import pytest

from nbutils import RunConfig
from nbutils.paths import NOTEBOOKS, ROOT
from nbutils.report.notebooks import PATHS, navigation
from nbutils.report.readme import render

README = ROOT / "README.md"
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells_of(path):
    return nbformat.read(path, as_version=4).cells


def code_cells(path):
    return [cell for cell in cells_of(path) if cell.cell_type == "code" and cell.source.strip()]


def test_notebooks_are_numbered_and_listed_in_that_order():
    stems = [path.stem for path in PATHS]
    assert all(re.fullmatch(r"\d\d_[a-z_]+", stem) for stem in stems)
    assert len({stem[:2] for stem in stems}) == len(stems)
    # The overview lists all but itself.
    for page, listed in ((README, stems), (NOTEBOOKS / "00_overview.ipynb", stems[1:])):
        assert re.findall(r"\| \[(\d\d_[a-z_]+)\]", page.read_text()) == listed


@every_notebook
def test_it_was_executed_from_top_to_bottom_without_errors(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    cells = code_cells(path)
    # nbval compares nothing in a cell without a count.
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            if "interactive" not in cell.metadata.get("tags", []):
                assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


@every_notebook
def test_it_begins_with_its_question_and_links_and_ends_with_a_link_onward(path):
    first, *_, last = cells_of(path)
    assert first.cell_type == last.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert first.source.split("\n")[2] == navigation(path)
    assert "**Question.**" in first.source
    assert "Next: " in last.source


@every_notebook
def test_a_cell_is_read_at_a_glance(path):
    assert max(len(cell.source.splitlines()) for cell in code_cells(path)) <= 40


def test_functions_that_two_notebooks_share_live_in_the_package():
    seen = {}
    for path in PATHS:
        source = "\n\n".join(cell.source for cell in code_cells(path))
        for function in re.findall(r"^def .*:\n(?:(?: .*)?\n)+", source, re.MULTILINE):
            assert seen.setdefault(function.strip(), path) == path, function


@every_notebook
def test_its_parameters_are_declared_once_with_a_comment_each(path):
    tagged = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) <= 1
    declared = papermill.inspect_notebook(str(path))
    assert len(declared) == sum(len(cell.source.splitlines()) for cell in tagged)
    assert all(parameter["help"] for parameter in declared.values())


@pytest.mark.parametrize("number", ["02", "03"])
def test_a_training_notebook_declares_every_setting_with_its_default(number):
    path = next(path for path in PATHS if path.stem.startswith(number))
    declared = papermill.inspect_notebook(str(path))
    settings = set(RunConfig.field_names())
    missing = {"accumulation_steps"} if number == "02" else set()
    assert set(declared) == settings - missing | {"out", "on_oom"}
    chosen = {"epochs", "accumulation_steps"}  # small here, so that the notebook runs in seconds
    for name in settings - missing - chosen:
        assert eval(declared[name]["default"]) == getattr(RunConfig(), name), name


def markdown_of(path):
    """The text of a page: of a notebook its cells of text, and tables that its code writes."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    texts = []
    for cell in cells_of(path):
        if cell.cell_type == "markdown":
            texts.append(cell.source)
        texts += [out.get("data", {}).get("text/markdown", "") for out in cell.get("outputs", [])]
    return "\n".join(texts)


@pytest.mark.parametrize("path", [*PATHS, README], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = markdown_of(path)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)\n]+)\)", text):
        address = urlsplit(target)
        if address.scheme:  # outside: only its form
            assert re.fullmatch(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/\S*)?", target), target
        elif address.path:
            assert (path.parent / address.path).exists(), target
        else:
            assert address.fragment in anchors, target


def test_the_readmes_numbers_are_those_of_the_records():
    assert render() == README.read_text(encoding="utf-8")


def test_the_readmes_python_runs():
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(block.replace("epochs=5", "epochs=1"), {})


def test_the_readme_names_every_folder():
    text = README.read_text(encoding="utf-8")
    folders = [path.parent.name for path in ROOT.glob("nbutils/*/__init__.py")]
    assert [name for name in folders if f"`{name}/`" not in text] == []
