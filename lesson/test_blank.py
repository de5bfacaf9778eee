"""Tests of the student's version, of its grading, and of the runner: right answers pass, wrong ones are seen through.

python -m pytest lesson/test_blank.py       # two minutes on one CPU core
"""

from __future__ import annotations

import ast
import difflib
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
import check
import parts
import pytest
import run
from parts import PARTS, WRONG, Answer

SOURCE = parts.ORIGINAL.read_text(encoding="utf-8")
NUMBERS = range(1, len(PARTS) + 1)


def red(path: Path, source: str, tests: list[str], *options: str) -> dict[str, type[BaseException]]:
    """Those of the tests that fail with this source as diffratio_mod.py, and the types of their errors."""
    path.write_text(source, encoding="utf-8")
    module = run.load(path, check.SOLUTION)
    errors = check.run_tests(module, path, tests, *options).errors
    sys.modules.pop(check.SOLUTION)
    return errors


def command(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, capture_output=True, encoding="utf-8", timeout=300, check=False)


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 2 and result.stdout == "", result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


# --- The blanks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, *NUMBERS])
def test_original_answers_put_back_one_by_one_turn_exactly_the_listed_tests_green(number, tmp_path):
    now = PARTS[number - 1].tests if number else []
    later = [test for part in PARTS[number:] for test in part.tests]
    source = parts.blank(SOURCE, keep=range(1, number + 1))
    assert set(red(tmp_path / "s.py", source, [*now, *later])) == set(later)


def test_what_is_in_no_list_is_green_from_the_start(tmp_path):
    text = check.TESTS.read_text(encoding="utf-8")
    names = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    listed = [test for part in PARTS for test in part.tests]
    others = [name for name in names if name.startswith("test_method_") and name not in listed]
    assert others and set(listed) <= set(names)
    assert red(tmp_path / "s.py", parts.blank(SOURCE), others) == {}


def test_only_the_answers_are_taken_out_and_each_of_them():
    blank = parts.blank(SOURCE)
    gaps = [gap for part in PARTS for gap in part.gaps]
    assert parts.blank(SOURCE, keep=NUMBERS) == SOURCE
    difference = list(difflib.ndiff(SOURCE.splitlines(), blank.splitlines()))
    new = "\n".join(line[2:] for line in difference if line.startswith("+ "))
    assert [new.count(gap.task) for gap in gaps] == [1] * len(gaps)
    assert len(new.splitlines()) == sum(len(gap.frame.splitlines()) for gap in gaps)
    originals = parts.functions_of(ast.parse(SOURCE))
    others = parts.functions_of(ast.parse(blank))
    assert list(originals) == list(others)
    for name, original in originals.items():  # what a student is told is all there
        assert ast.get_docstring(original) == ast.get_docstring(others[name])
        assert ast.unparse(original.args) == ast.unparse(others[name].args)


def test_an_answer_that_is_no_longer_where_it_was_is_an_error():
    for right, wrong in (("if ratio is not None:", "if k is None:"), ("def column_of", "def c"), ("column =", "c =")):
        with pytest.raises(LookupError, match="part"):
            parts.blank(SOURCE.replace(right, wrong))


# --- Wrong answers, and other right ones -----------------------------------------------------------------------------


@pytest.mark.parametrize("answer", WRONG, ids=[f"{answer.part}, {answer.what}" for answer in WRONG])
def test_wrong_but_plausible_answer_is_caught_by_a_test_of_its_part(answer, tmp_path):
    assert answer.original not in parts.blank(SOURCE, keep={*NUMBERS} - {answer.part})
    source = parts.blank(parts.with_answer(answer), keep=range(1, answer.part + 1))
    errors = set(red(tmp_path / "s.py", source, PARTS[answer.part - 1].tests, "-x").values())
    assert errors and not errors & {NotImplementedError, NameError}


GATHER = """index = order[:, :k].unsqueeze(2).expand(-1, -1, D)
        gain = gate.gather(1, order[:, :k]).unsqueeze(2) * self.layer(x.gather(1, index), None, *context)
        return x.scatter_add(1, index, gain.to(x.dtype))
        rows ="""
RANK = "rank = torch.zeros_like(order).scatter(1, order, torch.arange(N, device=x.device).expand(B, N))"
RIGHT = [  # other answers, none of them wrong
    Answer(
        1, "floor of the negative", "(t * columns - 1e-4).ceil().long() - 1", "-(1e-4 - t * columns).floor().long() - 1"
    ),
    Answer(
        2,
        "expanded square",
        "(ratios.mean() - target) ** 2",
        "ratios.mean() ** 2 - 2 * target * ratios.mean() + target**2",
    ),
    Answer(
        3,
        "rounded from the other side",
        "(tokens * (1 - ratios.detach())).round()",
        "(tokens - (tokens * ratios.detach()).round())",
    ),
    Answer(
        4,
        "with torch.where",
        "(rank < k) + next_best * zero_with_slope",
        "torch.where(next_best, zero_with_slope, (rank < k).float())",
    ),
    Answer(5, "gather and scatter", "rows =", GATHER),
    Answer(4, "e from the ratio", "e = (N - k).clamp(max=", "e = (ratio.detach() * N).round().clamp(max="),
    Answer(5, "rank by scatter", "rank = order.argsort(dim=1)", RANK),
    Answer(
        6,
        "index_select",
        "model.ratios[:, column_of(t, model.ratios.shape[1])]",
        "model.ratios.index_select(1, column_of(t, model.ratios.shape[1]))",
    ),
    Answer(
        7,
        "copy_",
        "self.ratios.clamp_(0, 1 - 1 / self.config.tokens)",
        "self.ratios.copy_(self.ratios.clamp(0, 1 - 1 / self.config.tokens))",
    ),
    Answer(
        8,
        "one by one",
        "tokens_processed(ratios, model.config.tokens).T.tolist()",
        "[[int(z) for z in row] for row in tokens_processed(ratios, model.config.tokens).T]",
    ),
]


def test_other_right_answers_pass(tmp_path):
    for answer in RIGHT:
        path = tmp_path / "s.py"
        path.write_text(parts.with_answer(answer), encoding="utf-8")
        assert check.check(path, [answer.part])[0].verdict == "right", answer.what


def test_helpers_and_imports_and_a_second_definition_of_a_student_are_used(tmp_path):
    source = parts.blank(SOURCE, keep={*NUMBERS} - {2, 7})
    source = source.replace(
        'raise NotImplementedError("part 7: bring the ratios back into their bounds")', "self.bring_back()"
    )
    source = source.replace(
        "    def encode_caption",
        "    def bring_back(self):\n        self.ratios.clamp_(lowest(), 1 - 1 / self.config.tokens)\n\n"
        "    def encode_caption",
    )
    source += "\n\nimport operator\n\n\ndef lowest():\n    return 0\n"
    source += "\n\ndef ratio_loss(ratios, target):\n    return operator.sub(ratios.mean(), target) ** 2\n"
    path = tmp_path / "s.py"
    path.write_text(source, encoding="utf-8")
    assert [result.verdict for result in check.check(path, [2, 7])] == ["right", "right"]


# --- The commands ----------------------------------------------------------------------------------------------------


def test_one_wrong_part_costs_one_point_and_its_property_is_named(tmp_path):
    """Part 4, which parts 5, 6 and 8 need, is wrong; part 7 is not begun."""
    sign = next(answer for answer in WRONG if answer.what == "the sign")
    path = tmp_path / "my_solution.py"
    path.write_text(parts.blank(parts.with_answer(sign), keep={*NUMBERS} - {7}), encoding="utf-8")
    result = command("lesson/blank.py", "--check", path, "--json", tmp_path / "r.json")
    assert result.returncode == 1 and result.stderr == ""
    lines = result.stdout.splitlines()
    words = [line.split("  ")[-1].strip() for line in lines if line[0].isdigit()]
    assert words == ["right", "right", "right", "wrong", "right", "right", "not begun", "right", "6 of 8"]
    assert "has the slope that its docstring promises" in result.stdout
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["points"], written["of"]) == (6, 8)
    assert [part["verdict"] for part in written["parts"]] == words[:-1]
    assert [failure["test"] for failure in written["parts"][3]["failures"]] == PARTS[3].tests


def test_student_version_is_written_as_utf8_and_never_over_answers(tmp_path):
    path = tmp_path / "my_solution.py"
    assert command("lesson/blank.py", "--out", path, "--keep", 1, 2).returncode == 0
    assert path.read_bytes().decode("utf-8").replace("\r\n", "\n") == parts.blank(SOURCE, keep=[1, 2])
    path.write_text("answers", encoding="utf-8")
    assert_refused(command("lesson/blank.py", "--out", path), "my_solution.py", "is there already")
    assert path.read_text(encoding="utf-8") == "answers"


def test_wrong_answers_to_hand_out_are_files_that_differ_from_the_original_in_one_place(tmp_path):
    for number in NUMBERS:
        assert [answer.part for answer in WRONG].count(number) >= parts.HANDED_OUT == 2
    result = command(HERE / "blank.py", "--wrong", 5, cwd=tmp_path)
    sources = [(tmp_path / f"wrong_5_{i}.py").read_text(encoding="utf-8") for i in (1, 2)]
    first, second = [answer for answer in WRONG if answer.part == 5][:2]
    assert sources == [parts.with_answer(first), parts.with_answer(second)]
    assert first.what in result.stdout and second.what in result.stdout
    assert_refused(command(HERE / "blank.py", "--wrong", 5, cwd=tmp_path), "wrong_5_1.py", "is there already")


def test_list_has_all_parts_and_the_text_for_students_too():
    listed = command("lesson/blank.py", "--list").stdout
    text = (HERE / "student.md").read_text(encoding="utf-8")
    for number, part in enumerate(PARTS, 1):
        assert f"{number}  {part.title} (paper {part.paper})" in listed and all(test in listed for test in part.tests)
        assert f"{number}. **{part.title}**" in text


def test_runner_puts_a_file_in_the_place_of_the_method(tmp_path):
    """Here a script in another folder, which imports the project, and a module."""
    (tmp_path / "mine.py").write_text(SOURCE + "\n\nMARK = 'mine'\n", encoding="utf-8")
    script = (
        "import sys, neighbour, train_cifar\n"
        "print(sys.modules['diffratio_mod'].MARK, sys.argv[1:], __name__, neighbour.MARK)\n"
    )
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    (tmp_path / "neighbour.py").write_text("from diffratio_mod import MARK\n", encoding="utf-8")
    result = command("lesson/run.py", tmp_path / "mine.py", tmp_path / "script.py", "--flag", "a b")
    assert result.stdout.split("\n")[0] == "mine ['--flag', 'a b'] __main__ mine", result.stderr
    blank = tmp_path / "blank.py"
    blank.write_text(parts.blank(SOURCE, keep={*NUMBERS} - {2}), encoding="utf-8")
    options = (
        "-m",
        "pytest",
        "-rpf",
        "-p",
        "no:cacheprovider",
        "test_diffratio_mod.py",
        "-k",
        "ratio_loss or ratio_gate",
    )
    report = command("lesson/run.py", blank, *options).stdout
    assert f"FAILED test_diffratio_mod.py::{PARTS[1].tests[0]}" in report
    assert f"PASSED test_diffratio_mod.py::{PARTS[3].tests[0]}" in report


def test_a_file_that_is_no_solution_is_one_line(tmp_path):
    contents = {
        "syntax.py": (b"def ratio_gate(:\n", "syntax.py, line 1"),
        "utf16.py": (SOURCE.encode("utf-16"), "utf16.py is not UTF-8"),
        "zeros.py": (b"x = 1\0", "zeros.py"),
        "other.py": (b"x = 1\n", "other.py is not a version of diffratio_mod.py"),
        "stops.py": (b"x = y\n", "stops.py stops while it is imported: NameError"),
    }
    for name, (content, words) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(run.InputError, match=words):
            run.load(tmp_path / name, "no_solution")
        assert "no_solution" not in sys.modules
    assert_refused(command("lesson/run.py", tmp_path / "syntax.py", "sample.py"), "syntax.py, line 1")
    assert_refused(command("lesson/blank.py", "--check", tmp_path / "none.py"), "none.py", "No such file")


def test_wrong_use_is_one_line(tmp_path):
    blank = tmp_path / "blank.py"
    blank.write_text(parts.blank(SOURCE), encoding="utf-8")
    for arguments, words in (([blank], "give a solution and a script"), ([blank, "nowhere.py"], "nowhere.py")):
        with pytest.raises(run.InputError, match=words):
            run.run([str(argument) for argument in arguments])
    assert_refused(command("lesson/blank.py", "--check", blank, 9), "'9' is no part")
    sampling = ("sample.py", "--num", 1, "--steps", 1, "--prompt", "a red circle", "--out", tmp_path / "s.png")
    assert_refused(command("lesson/run.py", blank, *sampling), "is not filled in: part")
