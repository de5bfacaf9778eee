"""Tests of the student's version, of its grading, and of the runner: right answers pass, wrong ones are seen through.

python -m pytest lesson/test_blank.py       # half a minute on one CPU core
"""

from __future__ import annotations

import ast
import csv
import difflib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
import blank
import parts
import run
from parts import NUMBERS, PARTS, WRONG, Answer

SOURCE = parts.ORIGINAL.read_text(encoding="utf-8")
PULL = "(ratios.mean() - target) ** 2"  # the answer to part 2
GAP_2 = parts.message(2, PARTS[1].gaps[0])


def events_of(source: str, part: int | None, tmp_path: Path, *options: str) -> list[tuple]:
    """What the tests of a part say of a source: event, test and message."""
    path = tmp_path / "s.py"
    path.write_text(source, encoding="utf-8")
    events = []
    if part is None:
        module = run.load(source, path, blank.SOLUTION)
    else:
        module = blank.with_answers(source, path, part)
    blank.run_pytest(blank.Watch(module, source, path, part, lambda *event: events.append(event)), *options)
    sys.modules.pop(blank.SOLUTION)
    assert events
    return [event for event in events if event[0] != "begun"]


def command(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, capture_output=True, encoding="utf-8", timeout=300, check=False)


def call(monkeypatch, *arguments: object) -> int:
    """blank.py with these arguments, in this process."""
    for name in ("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTEST_ADDOPTS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # what it sets is put back at the end
    monkeypatch.setattr(sys, "argv", ["blank.py", *map(str, arguments)])
    return blank.main()


# --- The blanks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", NUMBERS)
def test_all_tests_of_a_part_are_red_while_it_is_blank(number, tmp_path):
    source = parts.blank(SOURCE, keep={*NUMBERS} - {number})
    red = {test.partition("[")[0] for event, test, _ in events_of(source, number, tmp_path) if event == "failed"}
    assert red == {test.partition("[")[0] for test in blank.tests_of_parts()[number]}
    assert len(parts.blanks_left(ast.parse(source), number)) == len(PARTS[number - 1].gaps)


def test_tests_of_no_part_are_green_from_the_start(tmp_path):
    events = events_of(parts.blank(SOURCE), None, tmp_path)
    assert {event for event, test, _ in events if "cuda" not in test} == {"passed"}


def test_only_the_answers_are_taken_out_and_each_of_them():
    blanked = parts.blank(SOURCE)
    gaps = [gap for part in PARTS for gap in part.gaps]
    assert parts.blank(SOURCE, keep=NUMBERS) == SOURCE
    difference = list(difflib.ndiff(SOURCE.splitlines(), blanked.splitlines()))
    new = "\n".join(line[2:] for line in difference if line.startswith("+ "))
    assert [new.count(gap.task) for gap in gaps] == [1] * len(gaps)
    assert len(new.splitlines()) == sum(len(gap.frame.splitlines()) for gap in gaps)
    originals = parts.functions_of(ast.parse(SOURCE))
    others = parts.functions_of(ast.parse(blanked))
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
def test_wrong_but_plausible_answer_is_caught_by_a_test_of_its_part_which_says_what_came(answer, tmp_path):
    assert answer.original not in parts.blank(SOURCE, keep={*NUMBERS} - {answer.part})
    event, test, message = events_of(parts.with_answer(answer), answer.part, tmp_path, "-x")[-1]
    assert event == "failed", f"{test}: {event}"
    said = ("expected" in message and "got" in message) or "gradient" in message or "not a number" in message
    said = said or "must compute" in message
    assert said and "tensor(" not in message.partition("got")[0] and "Error" not in message, message


GATHER = """index = order[:, :k].unsqueeze(2).expand(-1, -1, D)
        gain = gate.gather(1, order[:, :k]).unsqueeze(2) * self.layer(x.gather(1, index), None, *context)
        return x.scatter_add(1, index, gain.to(x.dtype))
        rows = (order"""
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
    Answer(5, "gather and scatter", "rows = (order", GATHER),
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
        quick = ("-k", "not finite_difference and not table_learns and not guidance and not compiles")  # the slow ones
        events = events_of(parts.with_answer(answer), answer.part, tmp_path, *quick)
        assert {event for event, _, _ in events} == {"passed"}, answer.what


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
    for part in (2, 7):
        assert {event for event, _, _ in events_of(source, part, tmp_path)} == {"passed"}
    assert parts.changed_outside(ast.parse(source)) == []


def test_what_is_changed_outside_the_blanks_is_named_and_not_charged(tmp_path):
    changes = {
        "NEXT_BEST_SHARE = 0.05": ("NEXT_BEST_SHARE = 0.5", "NEXT_BEST_SHARE = 0.5 (it was 0.05)"),
        "LARGEST_ANGLE = math.acos(0.02)": ("LARGEST_ANGLE = 1.0", "LARGEST_ANGLE = 1.0 (it was math.acos(0.02))"),
        "regions: int = 10": ("regions: int = 4", "regions: int = 4 (it was 10)"),
        "angle = t * LARGEST_ANGLE": ("angle = LARGEST_ANGLE * t", "schedule"),
        "def _positions(": ("def _other_positions(", "_positions (it is gone)"),
        "levels = torch.linspace(1, 0, steps + 1)": (
            "levels = torch.linspace(1, 0.0, 1 + steps)",
            "sample_images, around its blank (graded as it is)",
        ),
    }
    source = SOURCE
    for old, (new, _) in changes.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    named = parts.changed_outside(ast.parse(source))
    assert sorted(named) == sorted(name for _, name in changes.values())
    assert {event for event, _, _ in events_of(source, 4, tmp_path)} == {"passed"}
    assert parts.changed_outside(ast.parse(parts.blank(SOURCE, keep=[2]))) == []


# --- Grading ---------------------------------------------------------------------------------------------------------

ENDINGS = {  # answers to part 2, each with its verdict and words of the message
    "right": (f"return {PULL}", "right", ""),
    "flood": ("[print('2  The pull   right ' * 50000) for _ in range(200)]", "wrong", "got None"),
    "exit": ("import os; os._exit(0)", "stopped", "ends the process, with exit code 0"),
    "killed": ("import os; os.kill(os.getpid(), 9)", "stopped", "SIGKILL"),
    "skip": ("import pytest; pytest.skip('x')", "skipped", "skipped the test: x"),
    "xfail": ("import pytest; pytest.xfail('x')", "wrong", "XFailed"),
    "sysexit": ("import sys; sys.exit(0)", "wrong", "SystemExit: 0"),
    "interrupt": ("raise KeyboardInterrupt", "stopped", "KeyboardInterrupt"),
    "leave": ("import pytest; pytest.exit('x')", "stopped", "Exit: x"),
    "recursion": ("return ratio_loss(ratios, target)", "wrong", "RecursionError"),
    "replaced": ("import pytest; pytest.approx = lambda x, **_: x; return 0 * ratios.mean()", "wrong", "expected"),
    "blind": (f"torch.Tensor.isclose = lambda a, *_: a == a; return {PULL}", "wrong", "replaces Tensor.isclose"),
    "raise-below": (f"return {PULL}; raise NotImplementedError({GAP_2!r})", "right", ""),
    "wrong-raise-below": (f"return {PULL} + 1; raise NotImplementedError({GAP_2!r})", "not finished", "is still there"),
    "untouched": (f"raise NotImplementedError({GAP_2!r})", "not begun", "is still there: raise NotImplementedError"),
    "assert": ("assert ratios is None", "wrong", "AssertionError (line "),
    "assert-words": ("assert ratios is None, 'no\\n' + 'x' * 999", "wrong", "AssertionError: no (line "),
    "nothing": (PULL, "wrong", "expected a tensor, got None"),
    "again": (PULL, "wrong", "expected a tensor, got None"),
}
ENDS_OF_IMPORTS = {  # what stands at the end of a file that cannot be graded, and words of the reason
    "import-exit": ("import os; os._exit(0)", "ends the process, with exit code 0"),
    "import-fails": ("x = y", "stops while it is imported: NameError"),
    "import-skip": ("import pytest; pytest.skip('x', allow_module_level=True)", "stops while"),
    "import-lines": ("x = 1\nraise ValueError('a\\nb', object())", "a\\nb', <object object at 0x...>) (line "),
    "import-syntax": ("def ratio_gate(:", "Python cannot read it"),
    "import-len": ("import builtins; builtins.len = lambda x: 3", ""),
}


ODD_FILES = {  # what stands at the end of a file whose answers are right
    "long": "LONG = " + "1 + " * 1500 + "1",
    "float64": "torch.set_default_dtype(torch.float64)",
    "star": "from torch import *",
    "no-gate": "del ratio_gate",
}


def test_whatever_an_answer_does_it_costs_its_own_points_and_all_of_a_folder_is_written(tmp_path):
    answers = tmp_path / "answers"
    (answers / "deeper").mkdir(parents=True)
    (answers / "__pycache__").mkdir()
    (answers / "__pycache__" / "x.py").write_text("", encoding="utf-8")
    for name, (answer, _, _) in ENDINGS.items():
        (answers / f"{name}.py").write_text(SOURCE.replace(f"return {PULL}", answer), encoding="utf-8")
    for name, (end, _) in ENDS_OF_IMPORTS.items():
        (answers / f"{name}.py").write_text(f"{SOURCE}\n{end}\n", encoding="utf-8")
    for name, end in ODD_FILES.items():
        (answers / f"{name}.py").write_text(f"{SOURCE}\n{end}\n", encoding="utf-8")
    itself = "\nimport os\nNEXT_BEST_SHARE = 0.5\nos.remove(__file__)\n"
    (answers / "deeper" / "removes.py").write_text(SOURCE + itself, encoding="utf-8")

    flags = ["--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv"]
    result = command(HERE / "blank.py", "--check", "answers", 2, *flags, cwd=tmp_path)

    assert result.returncode == 1 and result.stderr == "", result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    written = {one["file"]: one for one in json.loads((tmp_path / "r.json").read_text())["files"]}
    rows = {row["file"]: row for row in csv.DictReader((tmp_path / "r.csv").read_text().splitlines())}
    assert len(written) == len(ENDINGS) + len(ENDS_OF_IMPORTS) + len(ODD_FILES) + 1
    assert list(lines) == list(written) == list(rows)
    for name, (_, verdict, words) in ENDINGS.items():
        file = f"answers/{name}.py"
        part = written[file]["parts"][0]
        assert part["verdict"] == rows[file]["part 2"] == verdict, name
        assert words in "".join(failure["message"] for failure in part["failures"]), name
        points = int(verdict == "right")
        assert written[file]["points"] == int(rows[file]["points"]) == points
        assert lines[file].startswith(f"{points} of 1") and (verdict == "right" or f"2 {verdict}" in lines[file])
    for name, (_, words) in ENDS_OF_IMPORTS.items():
        one = written[f"answers/{name}.py"]
        assert words in one["error"] and one["points"] == 0 and "cannot be graded" in lines[one["file"]], one
        assert rows[one["file"]]["error"] == one["error"]
    for name in ODD_FILES:
        assert written[f"answers/{name}.py"]["points"] == 1, written[f"answers/{name}.py"]
    removed = written["answers/deeper/removes.py"]
    assert removed["points"] == 1 and removed["changed"] == ["NEXT_BEST_SHARE = 0.5 (it was 0.05)"]
    assert (answers / "deeper" / "removes.py").exists()
    assert written["answers/nothing.py"]["parts"] == written["answers/again.py"]["parts"]  # the same bytes
    text = json.dumps(written)
    assert "0x" not in text.replace("0x...", "") and str(tmp_path) not in text


BUSY = "a loop without end, or a busy machine (then a larger --limit)"


def test_an_answer_without_an_end_is_stopped_and_the_others_are_graded(tmp_path):
    tests = {2: ["test_method_ratio_loss_pulls_all_cells_alike_towards_the_target"], 7: ["none"]}
    path = tmp_path / "a.py"
    source = parts.blank(SOURCE.replace(f"return {PULL}", "while True: pass"), keep={*NUMBERS} - {7})
    path.write_text(source, encoding="utf-8")
    endless, _ = blank.grade(path, [2, 7], tests, 5).parts
    assert endless.verdict == "no end after 5 s"
    assert endless.failures[0].message == f"{endless.verdict}: {BUSY}"
    assert endless.failures[0].test in ("", tests[2][0])

    path.write_text(source + "\nwhile True: pass\n", encoding="utf-8")
    assert blank.grade(path, [2, 7], tests, 1).error == f"{path}, while it is imported: no end after 1 s: {BUSY}"
    path.write_text(parts.blank(SOURCE), encoding="utf-8")
    assert [result.verdict for result in blank.grade(path, [2, 7], tests, 60).parts] == ["not begun"] * 2


def test_half_a_message_does_not_keep_the_grading(tmp_path):
    pipes = "[c for c in gc.get_objects() if isinstance(c, multiprocessing.connection.Connection) and c.writable]"
    answer = f"import gc, os, multiprocessing.connection; [os.write(c.fileno(), bytes(3)) for c in {pipes}]"
    answer += "\n    while True: pass"
    begun = time.monotonic()
    _, reason = blank.events_of(SOURCE.replace(f"return {PULL}", answer), tmp_path / "a.py", 2, 2)
    assert reason == f"no end after 2 s: {BUSY}" and time.monotonic() - begun < 30


def test_a_function_that_is_gone_costs_its_own_part_and_is_named(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(SOURCE.replace("def ratio_gate(", "def gate("), encoding="utf-8")
    tests = {number: blank.tests_of_parts()[number] for number in (2, 4)}
    pull, gate = blank.grade(path, [2, 4], tests, 60).parts
    assert pull.verdict == "right" and gate.verdict == "wrong"
    assert gate.failures[0].message == "it has no ratio_gate"


def test_one_wrong_part_costs_one_point_and_its_property_is_named(tmp_path):
    """Part 4, which parts 5, 6 and 8 need, is wrong; part 7 is not begun."""
    sign = next(answer for answer in WRONG if answer.what == "the sign")
    source = parts.blank(parts.with_answer(sign), keep={*NUMBERS} - {7})
    path = tmp_path / "my_solution.py"
    path.write_text(source, encoding="utf-8")
    flags = [2, 3, 4, 7, 8, "--json", tmp_path / "r.json"]

    result = command("lesson/blank.py", "--check", path, *flags)

    assert result.returncode == 1 and result.stderr == ""
    lines = result.stdout.splitlines()
    words = [line.split("  ")[-1].strip() for line in lines if line[0].isdigit()]
    assert words == ["right", "right", "wrong", "not begun", "right", "3 of 5"]
    said = " ".join(result.stdout.split())
    assert "has the slope that its docstring promises" in said and "expected -8, got 8" in said
    (written,) = json.loads((tmp_path / "r.json").read_text())["files"]
    assert (written["points"], written["of"], written["error"]) == (3, 5, None)
    assert [part["verdict"] for part in written["parts"]] == words[:-1]


def test_a_part_is_right_only_if_each_of_its_tests_was_run_and_passed(monkeypatch):
    """Here for what a process may report of a part with two tests, and for a file with some blanks left."""
    passed = [("passed", "a", ""), ("passed", "b", "")]
    reports = {
        "right": [*passed, ("end", "", "")],
        "wrong": [*passed, ("failed", "b", "x"), ("end", "", "")],
        "skipped": [("passed", "a", ""), ("skipped", "b", "x"), ("end", "", "")],
        "stopped": [("passed", "a", ""), ("end", "", "")],
    }
    for verdict, events in reports.items():
        monkeypatch.setattr(blank, "events_of", lambda *_, events=events: (events, None))
        assert blank.grade_part(SOURCE, Path("a.py"), 5, ["a", "b"], 60).verdict == verdict
    monkeypatch.setattr(blank, "events_of", lambda *_: (passed, "the process is gone"))
    assert blank.grade_part(SOURCE, Path("a.py"), 5, ["a", "b"], 60).verdict == "stopped"

    monkeypatch.setattr(blank, "events_of", lambda *_: (reports["right"], None))
    first_blank = f'raise NotImplementedError("{parts.message(5, PARTS[4].gaps[0])}")'
    source = parts.blank(SOURCE).replace(first_blank, "return None")
    assert blank.grade_part(source, Path("a.py"), 5, ["a", "b"], 60).verdict == "right"  # what is left is not reached
    events = [("failed", "a", f"NotImplementedError: {parts.message(5, PARTS[4].gaps[1])} (line 9: ...)")]
    monkeypatch.setattr(blank, "events_of", lambda *_: (events, None))
    assert blank.grade_part(source, Path("a.py"), 5, ["a", "b"], 60).verdict == "not finished"
    assert blank.grade_part(parts.blank(SOURCE), Path("a.py"), 5, ["a", "b"], 60).verdict == "not begun"


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_ends_the_grading_and_its_process_and_writes_nothing(tmp_path):
    mark = tmp_path / "begun"
    answer = f"import pathlib, os; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); [0 for _ in iter(int, 1)]"
    (tmp_path / "a.py").write_text(SOURCE.replace(f"return {PULL}", answer), encoding="utf-8")
    line = [sys.executable, HERE / "blank.py", "--check", "a.py", "2", "--json", "r.json"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored here is ignored there, too
    process = subprocess.Popen(line, cwd=tmp_path, **streams)
    signal.signal(signal.SIGINT, before)
    deadline = time.time() + 60
    while not (mark.exists() and mark.read_text()) and time.time() < deadline:
        time.sleep(0.1)

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)

    assert process.returncode == 130 and out == err == "", (out, err)
    assert not (tmp_path / "r.json").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


# --- The other commands, and the runner ------------------------------------------------------------------------------


def test_student_version_is_written_as_utf8_and_never_over_answers(tmp_path, monkeypatch):
    path = tmp_path / "my_solution.py"
    assert call(monkeypatch, "--out", path, "--keep", 1, 2) == 0
    assert path.read_bytes().decode("utf-8").replace("\r\n", "\n") == parts.blank(SOURCE, keep=[1, 2])
    path.write_text("answers", encoding="utf-8")
    with pytest.raises(run.InputError, match=r"my_solution.py is there already"):
        call(monkeypatch, "--out", path)
    assert path.read_text(encoding="utf-8") == "answers"


def test_wrong_answers_to_hand_out_are_files_that_differ_from_the_original_in_one_place(tmp_path, monkeypatch, capsys):
    text = (HERE / "teachers.md").read_text(encoding="utf-8")
    for number in NUMBERS:
        assert [answer.part for answer in WRONG].count(number) >= parts.HANDED_OUT == 2
        assert f"| {number} | " in text
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "--wrong", 5)
    sources = [(tmp_path / f"wrong_5_{i}.py").read_text(encoding="utf-8") for i in (1, 2)]
    first, second = [answer for answer in WRONG if answer.part == 5][:2]
    assert sources == [parts.with_answer(first), parts.with_answer(second)]
    printed = capsys.readouterr().out
    assert first.what in printed and second.what in printed
    with pytest.raises(run.InputError, match=r"wrong_5_1.py is there already"):
        call(monkeypatch, "--wrong", 5)


def test_list_has_all_parts_and_the_text_for_students_too(monkeypatch, capsys):
    call(monkeypatch, "--list")
    listed = capsys.readouterr().out
    text = (HERE / "student.md").read_text(encoding="utf-8")
    for number, part in enumerate(PARTS, 1):
        assert f"{number}  {part.title} (paper {part.paper})" in listed
        assert f"{number}. **{part.title}**" in text
    assert listed.count("     test_method_") >= len(PARTS)


def test_runner_puts_a_file_in_the_place_of_the_method(tmp_path):
    """Here for a script in another folder, which imports the project, and for a module."""
    (tmp_path / "mine.py").write_text(SOURCE + "\n\nMARK = 'mine'\n", encoding="utf-8")
    script = (
        "import sys, neighbour, train_cifar\n"
        "print(sys.modules['diffratio_mod'].MARK, sys.argv[1:], __name__, neighbour.MARK)\n"
    )
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    (tmp_path / "neighbour.py").write_text("from diffratio_mod import MARK\n", encoding="utf-8")
    result = command("lesson/run.py", tmp_path / "mine.py", tmp_path / "script.py", "--flag", "a b")
    assert result.stdout.split("\n")[0] == "mine ['--flag', 'a b'] __main__ mine", result.stderr

    test = "def test_mark():\n    import diffratio_mod\n    assert diffratio_mod.MARK == 'mine'\n"
    (tmp_path / "test_mark.py").write_text(test, encoding="utf-8")
    options = ("-m", "pytest", "-p", "no:cacheprovider", "-k", "mark", tmp_path / "test_mark.py")
    assert "1 passed" in command("lesson/run.py", tmp_path / "mine.py", *options).stdout


def test_a_file_that_is_no_solution_is_one_line(tmp_path, monkeypatch):
    contents = {
        "syntax.py": (b"def ratio_gate(:\n", "syntax.py, line 1"),
        "utf16.py": (SOURCE.encode("utf-16"), "utf16.py is not UTF-8"),
        "zeros.py": (b"x = 1\0", "zeros.py"),
        "brackets.py": (b"(" * 10000, "brackets.py"),
        "other.py": (b"x = 1\n", "other.py is not a version of diffratio_mod.py"),
        "stops.py": (b"x = y\n", "stops.py stops while it is imported: NameError"),
    }
    for name, (content, words) in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(run.InputError, match=words):
            run.load(run.read_source(path), path, "no_solution")
        assert "no_solution" not in sys.modules
    with pytest.raises(run.InputError, match="it is no file"):
        run.read_source(tmp_path)
    with pytest.raises(run.InputError, match="No such file"):
        run.read_source(tmp_path / "none.py")
    with pytest.raises(run.InputError, match=r"syntax.py, line 1"):
        call(monkeypatch, "--check", tmp_path / "syntax.py", "--json", tmp_path / "r.json")
    assert "syntax.py, line 1" in json.loads((tmp_path / "r.json").read_text())["files"][0]["error"]


def test_wrong_use_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffratio_mod", sys.modules["diffratio_mod"])  # put back at the end
    monkeypatch.setattr(sys, "path", [*sys.path])
    blanked = tmp_path / "blank.py"
    blanked.write_text(parts.blank(SOURCE), encoding="utf-8")
    for arguments, words in (([blanked], "give a solution and a script"), ([blanked, "nowhere.py"], "nowhere.py")):
        with pytest.raises(run.InputError, match=words):
            run.run([str(argument) for argument in arguments])
    (tmp_path / "empty").mkdir()
    refused = {
        "'9' is no part": ["--check", blanked, 9],
        "give --check a file": ["--check", 2],
        "there is no .py file": ["--check", tmp_path / "empty"],
        "--json and --csv with --check": ["--list", "--csv", "x.csv"],
        "is a file to be graded": ["--check", blanked, "--json", tmp_path / "empty" / ".." / "blank.py"],
        "give two names": ["--check", blanked, "--json", tmp_path / "r", "--csv", tmp_path / "r"],
        "give the name of a file in a folder": ["--check", blanked, "--csv", tmp_path],
    }
    for words, arguments in refused.items():
        with pytest.raises(run.InputError, match=words):
            call(monkeypatch, *arguments)
    assert blanked.read_text(encoding="utf-8") == parts.blank(SOURCE) and not (tmp_path / "r").exists()
    script = tmp_path / "script.py"
    script.write_text("import diffratio_mod\ndiffratio_mod.ratio_loss(None, 0.3)\n", encoding="utf-8")
    with pytest.raises(run.InputError, match="is not filled in: part 2"):
        run.run([str(blanked), str(script)])
