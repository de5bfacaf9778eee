"""The notebook of the lesson: it runs from top to bottom, blank and filled in, and says which answers are wrong.

Executing it needs nbformat, nbclient and ipykernel; where they are missing, only the kept file is looked at.
"""

import copy
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).with_name("notebook.ipynb")
FEWER = "IMAGES = 20\nSTEPS = 10\nBATCH = 8\nSAMPLING_STEPS = 2\nREPEATS = 1"
GATE = "ratio_gate"
LAYER = "RoutedLayer"
# Of each cell to fill in: what to change in its solution, into what, and what the check must then complain about.
WRONG_ANSWERS = [
    (GATE, "(rank < k) +", "(rank <= k) +", "its value must be 1 for the k best"),
    (GATE, "(2 * e.clamp(min=1))", "e.clamp(min=1)", "the slope at rank 40 is -16 and should be -8"),
    (
        GATE,
        "(rank >= k) & (rank < k + e)",
        "(rank < k) & (rank >= k - e)",
        "the slope at rank 36 is -8 and should be 0",
    ),
    (GATE, "e.clamp(min=1)", "e", "at k = 64 of 64 it is not finite"),
    (GATE, "ratio.detach() - ratio", "ratio.detach() - ratio.detach()", "it has no slope"),
    (LAYER, "rank < k_best, *context", "None, *context", "with a ratio its result is another"),
    (LAYER, "(2 * score)", "score", "its result is another"),
    (LAYER, "ratio = ratio.unsqueeze(1)", "ratio = ratio.detach().unsqueeze(1)", "no gradient reaches the ratio"),
    (LAYER, "rank = order.argsort(dim=1)", "rank = order", "with a ratio its result is another"),
    (LAYER, "best = order[:, :k]", "best = order[:, -k:]", "with k = 1 its result is another"),
    (
        LAYER,
        "self.layer(x.gather(1, index), None, *context)",
        "self.layer(x, order.argsort(1) < k, *context).gather(1, index)",
        "it must compute 1 tokens",
    ),
]


def read_notebook():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])  # the file has a list of lines
    return notebook


def is_tagged(cell, tag):
    return tag in cell["metadata"].get("tags", [])


def text_of(cell):
    """What a cell printed."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def solutions(cells):
    """The source of each cell that is to be filled in, as the folded solution in the next cell has it."""
    sources = []
    for cell, next_cell in zip(cells, cells[1:]):
        if is_tagged(cell, "fill-in"):
            (source,) = re.findall(r"```python\n(.*?)```", next_cell["source"], flags=re.DOTALL)
            sources.append(source)
    return sources


def execute(cells):
    """Run the cells in the notebook's folder with less to compute; returns them with their outputs."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = copy.deepcopy(cells)
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
        if is_tagged(cell, "parameters"):
            cell["source"] = FEWER
    notebook = nbformat.from_dict(read_notebook() | {"cells": cells})
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()
    return notebook.cells


def test_the_kept_file_has_the_outputs_of_one_whole_run_without_errors_and_is_small():
    code = [cell for cell in read_notebook()["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 12
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert NOTEBOOK.stat().st_size < 3_000_000


@pytest.mark.parametrize("filled_in", [False, True])
def test_the_notebook_runs_and_its_checks_are_green_once_it_is_filled_in(filled_in):
    cells = read_notebook()["cells"]
    if filled_in:
        blanks = [cell for cell in cells if is_tagged(cell, "fill-in")]
        for cell, source in zip(blanks, solutions(cells), strict=True):
            cell["source"] = source
    cells = execute(cells)  # raises an error that a cell raises
    verdicts = [text_of(cell)[0] for cell in cells if is_tagged(cell, "check")]
    assert verdicts == ["🟩" if filled_in else "⬜"] * 2


def test_a_wrong_answer_is_told_what_is_wrong():
    cells = read_notebook()["cells"]
    blanks = [i for i, cell in enumerate(cells) if is_tagged(cell, "fill-in")]
    checks = [cell for cell in cells if is_tagged(cell, "check")]
    setup = [cell for cell in cells[: blanks[0]] if cell["cell_type"] == "code"][:4]
    right = dict(zip((GATE, LAYER), solutions(cells), strict=True))
    check_of = dict(zip((GATE, LAYER), checks, strict=True))
    parts = [*setup, checks[0] | {"source": right[GATE]}, checks[0]]
    for name, old, new, _ in WRONG_ANSWERS:
        assert old in right[name]
        parts.append(checks[0] | {"source": right[name].replace(old, new)})
        parts.append(check_of[name])
    checked = execute(parts)[len(setup) + 3 :: 2]
    for cell, (name, old, new, complaint) in zip(checked, WRONG_ANSWERS, strict=True):
        assert f"🟥 {name}: not yet" in text_of(cell) and complaint in text_of(cell), (old, new, text_of(cell))
