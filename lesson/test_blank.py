"""Tests of the student's version: each part turns its tests green, and they see through wrong answers.

python -m pytest lesson/test_blank.py       # under a minute on two CPU cores
"""

from __future__ import annotations

import ast
import difflib
import os
import subprocess
import sys
import types
from collections.abc import Collection
from pathlib import Path

import blank as kit
import pytest

ROOT = Path(__file__).parents[1]
SOURCE = kit.ORIGINAL.read_text(encoding="utf-8")
NUMBERS = range(1, len(kit.PARTS) + 1)


class Watch:
    """A plugin for a run of pytest within this one: shows the tests another module, and notes which of them end well."""

    def __init__(self, module: types.ModuleType, patch: pytest.MonkeyPatch) -> None:
        self.module, self.patch, self.errors = module, patch, {}

    def pytest_runtest_setup(self, item: pytest.Function) -> None:
        if self.errors.setdefault(item.originalname, None) is not None:
            pytest.skip("a test is red if it is red for one set of parameters")
        self.patch.setattr(item.module, "method", self.module)

    def pytest_runtest_makereport(self, item: pytest.Function, call: pytest.CallInfo) -> None:
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            self.errors[item.originalname] = call.excinfo.type


def run(source: str, tests: Collection[str], *options: str) -> dict[str, type[BaseException] | None]:
    """Run tests with this source as diffratio_mod.py: for each the type of error that it ends with; None is green."""
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType("my_solution")
        patch.setitem(sys.modules, module.__name__, module)
        exec(compile(source, "my_solution.py", "exec"), module.__dict__)  # noqa: S102
        watch = Watch(module, patch)
        plugins = "cacheprovider", "faulthandler", "unraisableexception", "threadexception"
        options = *options, "-q", "--tb=no", *(f"-pno:{plugin}" for plugin in plugins)
        pytest.main([str(ROOT / "test_diffratio_mod.py"), "-k", " or ".join(tests), *options], [watch])
    assert watch.errors, "no test of that name"
    return watch.errors


@pytest.mark.parametrize("number", [0, *NUMBERS])
def test_original_answers_put_back_one_by_one_turn_exactly_the_listed_tests_green(number):
    now, later = kit.PARTS[number - 1].tests if number else [], [z for part in kit.PARTS[number:] for z in part.tests]
    errors = run(kit.blank(SOURCE, keep=range(1, number + 1)), [*now, *later] if number else ["test_method"])
    assert set(errors) >= {*now, *later}
    for test, error in errors.items():  # at the start, those in no list are green
        assert (error is None) == (test not in later), f"{test} is {'green' if error is None else 'red'}"


WRONG = [  # the part, what is wrong, and in which piece of the original answer
    (1, "an edge in the noisier column", "(t * columns - 1e-4).ceil().long() - 1", "(t * columns).long()"),
    (1, "column 0 is the noisiest", "(t * columns - 1e-4)", "((1 - t) * columns + 1e-4)"),
    (1, "rounding decides at an edge", "t * columns - 1e-4", "t * columns"),
    (2, "each ratio pulled, not the mean", "(ratios.mean() - target) ** 2", "((ratios - target) ** 2).mean()"),
    (2, "not squared", "(ratios.mean() - target) ** 2", "(ratios.mean() - target).abs()"),
    (2, "the sum for the mean", "(ratios.mean() - target) ** 2", "(ratios.sum() - target) ** 2"),
    (3, "the share processed for the share skipped", "(1 - ratios.detach())", "ratios.detach()"),
    (3, "cut off for rounded", "(1 - ratios.detach())).round()", "(1 - ratios.detach()))"),
    (3, "at least none for at least one", ".long().clamp(1, tokens)", ".long().clamp(0, tokens)"),
    (4, "the sign", "(ratio.detach() - ratio)", "(ratio - ratio.detach())"),
    (4, "the last of the k best for the next", "(rank >= k) & (rank < k + e)", "(rank >= k - e) & (rank < k)"),
    (4, "all that bypass for the next e", "(rank >= k) & (rank < k + e)", "rank >= k"),
    (4, "not shared among the next e", "N / (2 * e.clamp(min=1))", "N / 2"),
    (4, "not halved", "(2 * e.clamp(min=1))", "e.clamp(min=1)"),
    (4, "0 / 0 where none bypasses", "e.clamp(min=1)", "e"),
    (5, "softmax for sigmoid", "torch.sigmoid(self.router(x))", "self.router(x).softmax(1)"),
    (5, "worst for best", "descending=True", "descending=False"),
    (5, "equal scores in any order", "descending=True, stable=True", "descending=True"),
    (
        5,
        "sampling: the first image's best for all",
        "torch.arange(B, device=x.device)",
        "torch.zeros_like(order[:, 0])",
    ),
    (5, "sampling: gates not sorted as tokens", "gate.flatten().index_select(0, rows)", "gate[:, :k].reshape(B, k)"),
    (5, "sampling: no gate", "gain = gate * self.layer", "gain = self.layer"),
    (5, "sampling: the update for the sum", "index_add(0, rows", "index_copy(0, rows"),
    (5, "sampling: the gate learns nothing", "gate.flatten().index", "gate.detach().flatten().index"),
    (5, "training: the order for the rank", "rank, ratio = order.argsort(dim=1)", "rank, ratio = order"),
    (5, "training: all attended to", "self.layer(x, rank < k_best, *context)", "self.layer(x, None, *context)"),
    (5, "training: the choice without the score", "gate = gate * ratio_gate", "gate = ratio_gate"),
    (5, "training: the choice without its slope", "ratio_gate(rank, k_best, ratio)", "(rank < k_best)"),
    (6, "one noise level for the whole batch", "column_of(t, model", "column_of(t.mean().expand(len(t)), model"),
    (6, "clean for noisy", "column_of(t, model", "column_of(1 - t, model"),
    (6, "no way back to the table", "model.ratios[:, column_of(t,", "model.ratios.detach()[:, column_of(t,"),
    (7, "the last token can go", "clamp_(0, 1 - 1 / self.config.tokens)", "clamp_(0, 1)"),
    (7, "a copy is clamped", "self.ratios.clamp_(0, ", "self.ratios.clamp(0, "),
    (8, "the level that a step goes to", "column_of(levels[:-1], ratios.shape", "column_of(levels[1:], ratios.shape"),
    (8, "the step for the noise level", "column_of(levels[:-1], ratios", "column_of(levels[:-1].flip(0), ratios"),
    (
        8,
        "the mean of a layer's row",
        "k = tokens_processed(ratios,",
        "k = tokens_processed(0 * ratios + ratios.mean(1, True),",
    ),
]


@pytest.mark.parametrize("number, mistake, right, wrong", WRONG, ids=[f"{z[0]}, {z[1]}" for z in WRONG])
def test_wrong_but_plausible_answer_is_caught_by_a_test_of_its_part(number, mistake, right, wrong):
    assert SOURCE.count(right) == 1 and right not in kit.blank(SOURCE, keep={*NUMBERS} - {number})
    source = kit.blank(SOURCE.replace(right, wrong), keep=range(1, number + 1))
    errors = {*run(source, kit.PARTS[number - 1].tests, "-x").values()} - {None}
    assert errors and not errors & {NotImplementedError, NameError}


def test_each_part_has_wrong_answers():
    assert all([z[0] for z in WRONG].count(number) >= 2 for number in NUMBERS)


def test_only_the_answers_are_taken_out_and_each_of_them():
    blank, gaps = kit.blank(SOURCE), [gap for part in kit.PARTS for gap in part.gaps]
    assert kit.blank(SOURCE, keep=NUMBERS) == SOURCE
    difference = list(difflib.ndiff(SOURCE.splitlines(), blank.splitlines()))
    new = "\n".join(line[2:] for line in difference if line.startswith("+ "))
    assert [new.count(gap.task) for gap in gaps] == [1] * len(gaps)
    assert len(new.splitlines()) == sum(len(gap.frame.splitlines()) for gap in gaps)
    functions = [[z for z in ast.walk(ast.parse(text)) if isinstance(z, ast.FunctionDef)] for text in (SOURCE, blank)]
    for original, other in zip(*functions, strict=True):  # what a student is told is all there
        for tell in (ast.get_docstring, lambda z: z.name, lambda z: ast.unparse(z.args)):
            assert tell(original) == tell(other)


def test_an_answer_that_is_no_longer_where_it_was_is_an_error():
    for right, wrong in ("if ratio is not None:", "if k is None:"), ("def column_of", "def c"), ("column =", "c ="):
        with pytest.raises(LookupError, match="part"):
            kit.blank(SOURCE.replace(right, wrong))


def test_commands_of_the_lesson(tmp_path):
    """With part 1 filled in, its tests are green and those of part 2 red."""

    def output(*command: str, **changes: str) -> str:
        command, environment = [sys.executable, *command], os.environ | changes
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False).stdout

    solution, listed = tmp_path / "my_solution.py", output("lesson/blank.py", "--list")
    solution.write_text(output("lesson/blank.py", "--keep", "1"), encoding="utf-8")
    options = "-k", output("lesson/blank.py", "--tests", "1", "2").strip(), "-rpf", "-p", "no:cacheprovider"
    report = output("-m", "pytest", *options, DIFFRATIO_MOD=str(solution))
    for part, word in zip(kit.PARTS, ("PASSED", "FAILED")):
        assert all(f"{word} test_diffratio_mod.py::{test}" in report for test in part.tests)
    assert "NotImplementedError: part 2: what pulls" in report and "part 1" not in report
    text = (ROOT / "lesson" / "student.md").read_text(encoding="utf-8")
    for number, part in enumerate(kit.PARTS, 1):
        assert f"{number}  {part.title} (paper {part.paper})" in listed and all(test in listed for test in part.tests)
        assert f"{number}. **{part.title}**" in text
