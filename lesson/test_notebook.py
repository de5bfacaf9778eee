"""The notebook of the lesson: it runs from top to bottom, and says which answers are wrong.

Executing it needs nbformat, nbclient, ipykernel and matplotlib; where they are missing, only the kept file is looked
at. To make the kept outputs anew:

    jupyter nbconvert --to notebook --execute --ExecutePreprocessor.record_timing=False --inplace lesson/notebook.ipynb
    jupyter nbconvert --coalesce-streams lesson/notebook.ipynb
"""

import copy
import itertools
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).with_name("notebook.ipynb")
FEWER = {"IMAGES": 20, "STEPS": 20, "BATCH": 8, "SAMPLING_STEPS": 2, "REPEATS": 1}  # in the cell tagged "setup"
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
    (GATE, "return (rank", "(rank", "is a `return` missing"),
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
    for cell, next_cell in itertools.pairwise(cells):
        if is_tagged(cell, "fill-in"):
            (source,) = re.findall(r"```python\n(.*?)```", next_cell["source"], flags=re.DOTALL)
            sources.append(source)
    return sources


def execute(cells):
    """Run the cells in the notebook's folder with less to compute; returns them with their outputs."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    cells = copy.deepcopy(cells)
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
        if is_tagged(cell, "setup"):
            for name, number in FEWER.items():
                cell["source"], count = re.subn(
                    rf"^{name} = \d+", f"{name} = {number}", cell["source"], flags=re.MULTILINE
                )
                assert count == 1, name
    notebook = nbformat.from_dict(read_notebook() | {"cells": cells})
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()
    return notebook.cells


def test_the_kept_file_has_the_outputs_of_one_whole_run_without_errors_and_is_small():
    code = [cell for cell in read_notebook()["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 12
    assert any("image/png" in output.get("data", {}) for output in code[1]["outputs"]), "the second cell has a picture"
    assert not any(output["output_type"] == "error" for output in outputs)
    warnings = ["".join(output["text"]) for output in outputs if output.get("name") == "stderr"]
    assert all("%|" in text for text in warnings), "only the bar of the training"
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_what_only_prepares_measures_or_checks_is_folded_in_jupyter_and_in_colab():
    for cell in read_notebook()["cells"]:
        if cell["cell_type"] == "code":
            is_folded = cell["metadata"].get("jupyter", {}).get("source_hidden", False)
            assert is_folded == (cell["metadata"].get("cellView") == "form") == cell["source"].startswith("# @title")
            if any(is_tagged(cell, tag) for tag in ("setup", "helpers", "check")):
                assert is_folded
            if is_tagged(cell, "fill-in"):
                assert not is_folded


def test_the_notebook_runs_and_its_checks_are_green_once_it_is_filled_in():
    cells = read_notebook()["cells"]
    blanks = [cell for cell in cells if is_tagged(cell, "fill-in")]
    for cell, source in zip(blanks, solutions(cells), strict=True):
        cell["source"] = source
    cells = execute(cells)  # raises an error that a cell raises
    assert [text_of(cell)[0] for cell in cells if is_tagged(cell, "check")] == ["🟩", "🟩"]


def test_a_blank_is_not_begun_and_a_wrong_answer_is_told_what_is_wrong():
    cells = read_notebook()["cells"]
    setup = [cell for cell in cells if is_tagged(cell, "setup") or is_tagged(cell, "helpers")]
    blanks = [cell for cell in cells if is_tagged(cell, "fill-in")]
    checks = [cell for cell in cells if is_tagged(cell, "check")]
    right = dict(zip((GATE, LAYER), solutions(cells), strict=True))
    check_of = dict(zip((GATE, LAYER), checks, strict=True))
    parts = [*setup, blanks[0], checks[0], blanks[1], checks[1], checks[0] | {"source": right[GATE]}, checks[0]]
    first_answer = len(parts)
    for name, old, new, _ in WRONG_ANSWERS:
        assert old in right[name]
        parts.append(checks[0] | {"source": right[name].replace(old, new)})
        parts.append(check_of[name])

    cells = execute(parts)

    begun = [cells[len(setup) + 1], cells[len(setup) + 3]]
    assert all("not begun" in text_of(cell) for cell in begun)
    checked = cells[first_answer + 1 :: 2]
    for cell, (name, old, new, complaint) in zip(checked, WRONG_ANSWERS, strict=True):
        assert f"🟥 {name}: not yet" in text_of(cell) and complaint in text_of(cell), (old, new, text_of(cell))
