"""A student's version of diffratio_mod.py: the key parts of the method taken out, docstrings and all the rest kept.

    python lesson/blank.py --out my_solution.py                 # everything blank
    python lesson/blank.py --out my_solution.py --keep 1 2      # the original answers of parts 1 and 2 left in
    python lesson/blank.py --check my_solution.py               # what is right, in half a minute
    python lesson/blank.py --check my_solution.py 4 5           # parts 4 and 5 alone
    python lesson/blank.py --check my_solution.py --json a.json # and a file for an autograder
    python lesson/blank.py --check answers --csv points.csv     # all .py files in a folder, a line each
    python lesson/blank.py --wrong 4                            # two wrong answers to part 4, as files to hand out
    python lesson/blank.py --list                               # the parts in their order, and the tests of each

No file is ever overwritten but those of --json and --csv. lesson/student.md is the text that goes with it.

A part is graded in a process of its own: the original, with the student's functions of this part in it, and whatever
else the student has added. So one wrong part costs one point, any right answer passes, and one that never ends, or ends
the process, costs its own point only. Right is a part if each of its tests was run and passed.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import csv
import inspect
import io
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from parts import HANDED_OUT, NUMBERS, ORIGINAL, PARTS, WRONG, blank, blanks_left, changed_outside, with_answer
from run import load, read_source, why_it_stops

from diffratio_mod import InputError
from sample import Parser, number, replace_file, run_command

TESTS = ORIGINAL.with_name("test_diffratio_mod.py")
SOLUTION = "my_solution"  # the name under which a student's file is imported
MEMORY = 8 * 2**30  # bytes that a part may take

# --- What comes out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    test: str
    property: str  # the name of the test in words
    message: str  # what was given, expected and came; the line of the student's file, if it failed there


@dataclass(frozen=True)
class Result:
    part: int
    title: str
    verdict: str  # "right", or what else: "wrong", "skipped", "stopped", "no end ...", "not begun", "not finished"
    failures: list[Failure]


@dataclass(frozen=True)
class Grade:
    file: str
    points: int
    of: int
    error: str | None  # why the file cannot be graded at all
    changed: list[str]  # what is otherwise than in the original, outside the blanks
    parts: list[Result]


# --- In the process of one part --------------------------------------------------------------------------------------


def with_answers(source: str, path: Path, part: int) -> types.ModuleType:
    """The original as a module, but for the student's functions of this part, and with all that the student added.

    The two have their names apart: what the student calls `sum` is not what the original calls so. Raises InputError.
    """
    theirs = load(source, path, SOLUTION, whole=False)
    answers = {}
    for gap in PARTS[part - 1].gaps:
        owner, _, function = gap.function.rpartition(".")
        try:
            answers[gap.function] = inspect.getattr_static(getattr(theirs, owner) if owner else theirs, function)
        except AttributeError:
            raise InputError(f"it has no {gap.function}") from None

    module = load(ORIGINAL.read_text(encoding="utf-8"), ORIGINAL, SOLUTION)
    for name, ours in list(vars(module).items()):
        if isinstance(ours, type) and ours.__module__ == SOLUTION:  # methods of the student's own
            other = getattr(theirs, name, None)
            for member, value in vars(other).items() if isinstance(other, type) else ():
                if member not in vars(ours):
                    setattr(ours, member, value)
    for name, answer in answers.items():
        owner, _, function = name.rpartition(".")
        setattr(getattr(module, owner) if owner else module, function, answer)
    shared = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    vars(theirs).update(shared)  # an answer calls the original answers to the other parts
    return module


class Watch:
    """A plugin of pytest: gives the tests of a part a student's module for the original one, and says what comes out.

    `report` is called with "begun", "passed" or "failed", the test, and a message. One failure of a test is enough: it
    is not run for further parameters.
    """

    def __init__(self, module: types.ModuleType, source: str, path: Path, part: int | None, report: Callable) -> None:
        self.module = module
        self.lines = source.split("\n")  # as Python counts them: splitlines also ends one at a form feed
        self.path = path
        self.part = part  # None: all tests of the method that belong to no part
        self.report = report
        self.red: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        items[:] = [item for item in items if item.name.startswith("test_method_") and self.part in parts_of(item)]

    def pytest_runtest_protocol(self, item: pytest.Function) -> bool | None:
        return True if item.originalname in self.red else None  # True: it is done

    def pytest_runtest_setup(self, item: pytest.Function) -> None:
        self.original = item.module.method
        item.module.method = self.module
        self.report("begun", item.name, "")

    def pytest_runtest_teardown(self, item: pytest.Function) -> None:
        item.module.method = self.original  # these tests may themselves be run by a test

    def pytest_runtest_makereport(self, item: pytest.Function, call: pytest.CallInfo) -> None:
        if call.excinfo is not None:
            self.red.add(item.originalname)
            skipped = call.excinfo.errisinstance(pytest.skip.Exception)
            self.report("skipped" if skipped else "failed", item.name, self.explain(call.excinfo))
        elif call.when == "call":
            self.report("passed", item.name, "")

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo) -> None:
        self.report("stopped", "", f"the answer ended the tests: {self.explain(excinfo)}")

    def explain(self, error: pytest.ExceptionInfo) -> str:
        """What went wrong, in one line, with the line of the student's file if it went wrong there."""
        lines = [" ".join(line.split()) for line in str(error.value).splitlines() if line.strip()] or [""]
        own = str(self.path.resolve())
        calls = [entry for entry in error.traceback if str(entry.path) in (own, str(TESTS))]
        in_test = error.errisinstance(AssertionError) and (not calls or str(calls[-1].path) != own)
        if in_test:
            text = lines[0]  # the test's own words
        elif error.errisinstance(pytest.skip.Exception):
            text = f"the answer skipped the test: {lines[0]}"
        else:
            text = f"{error.type.__name__}: {lines[0]}".removesuffix(": ")
        text = text[:400]
        if "NoneType" in text:
            text += ". Something is None: is a `return` missing?"
        places = [entry.lineno for entry in calls if str(entry.path) == own]
        if places and not in_test:
            text += f" (line {places[-1] + 1}: {self.lines[places[-1]].strip()[:80]})"
        return text


def parts_of(item: pytest.Function) -> tuple[int | None, ...]:
    """The parts of the lesson that a test belongs to."""
    mark = item.get_closest_marker("part")
    return mark.args if mark else (None,)


def run_pytest(plugin: object, *options: str) -> int:
    """Run the project's tests with a plugin, and no other ones; what they print is not shown."""
    arguments = [str(TESTS), "--override-ini=addopts=", "--capture=no", "--tb=native", *options]
    arguments += [
        f"-pno:{name}" for name in ("cacheprovider", "faulthandler", "unraisableexception", "threadexception")
    ]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return pytest.main(arguments, [plugin])


def public_names() -> dict[str, object]:
    """What the tests lean on, and no answer may replace."""
    found = {}
    for owner in (builtins, pytest, torch, torch.Tensor, torch.nn.functional):
        for name in dir(owner):
            value = inspect.getattr_static(owner, name)
            if callable(value) and not name.startswith("_") and name != "Storage":  # PyTorch itself swaps this one
                found[f"{owner.__name__}.{name}"] = value
    return found


def grade_in_process(sender: Connection, source: str, path: Path, part: int | None) -> None:
    """Import a student's file, and run the tests of a part if one is given. What comes out goes to `sender`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own: what an answer starts is ended with it
    threading.Thread(target=end_with_parent, daemon=True).start()
    limit_memory()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.chdir(path.parent)

    def report(event: str, test: str, text: str) -> None:
        for folder in {str(path.parent), str(path.parent.resolve())}:  # the same files give the same bytes
            text = text.replace(f"{folder}{os.sep}", "").replace(folder, ".")
        text = re.sub(r"\b0x[0-9a-fA-F]+", "0x...", text)
        sender.send_bytes(json.dumps([event, test, text]).encode())

    before = public_names()
    try:
        if part is None:
            load(source, path, SOLUTION, whole=False)
        else:
            module = with_answers(source, path, part)
    except BaseException as error:  # an answer may raise whatever it likes
        report("error", "", str(error) if isinstance(error, InputError) else why_it_stops(path, error))
        return
    torch.set_default_dtype(torch.float32)  # as the tests are written
    if part is not None:
        run_pytest(Watch(module, source, path, part, report))
    replaced = [name for name, value in public_names().items() if before.get(name, value) is not value]
    if replaced:
        report("failed", "", f"the file replaces {replaced[0]}, which the tests need")
    report("end", "", "")


def limit_memory() -> None:
    """An answer that takes ever more memory should end before the machine does. Where the system has such limits."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


# --- Grading ---------------------------------------------------------------------------------------------------------


def tests_of_parts() -> dict[int, list[str]]:
    """The tests of each part, with their parameters. Raises LookupError if there are none."""
    found: dict[int, list[str]] = {part: [] for part in NUMBERS}

    class Collect:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            for item in session.items:
                for part in parts_of(item):
                    if part is not None:
                        found[part].append(item.name)

    code = run_pytest(Collect(), "--collect-only")
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code != pytest.ExitCode.OK or not all(found.values()):
        raise LookupError(f"{TESTS.name} has no tests for some part, or cannot be read")
    return found


def events_of(source: str, path: Path, part: int | None, limit: float) -> tuple[list[tuple], str | None]:
    """What a process reports, and why it ended if not by itself: it has `limit` seconds."""
    # Linux copies this process, with all that it has imported; elsewhere each process imports it again, in 4 seconds.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    events: list[tuple] = []
    deadline = time.monotonic() + limit
    folder = Path(tempfile.mkdtemp())  # where an answer may write, and delete itself
    copy = folder / path.name
    copy.write_text(source, encoding="utf-8")
    process = context.Process(target=grade_in_process, args=(sender, source, copy, part), daemon=True)
    messages: queue.SimpleQueue = queue.SimpleQueue()
    reader = threading.Thread(target=receive, args=(receiver, messages), daemon=True)
    try:
        process.start()
        sender.close()
        reader.start()
        while not events or events[-1][0] not in ("end", "error"):
            message = messages.get(timeout=max(0.0, deadline - time.monotonic()))
            if message is None:  # the process is gone
                process.join(1)
                return events, reason_of(process.exitcode)
            event, test, text = map(str, json.loads(message))
            events.append((event, test, text))
        return events, None
    except queue.Empty:
        return events, f"no end after {limit:g} s: a loop without end, or a busy machine (then a larger --limit)"
    except (ValueError, TypeError):
        return events, "the answer breaks the grading: what came back cannot be read"
    finally:
        if process.pid:
            with contextlib.suppress(OSError, AttributeError):  # it may be gone; Windows has no groups
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        if reader.is_alive():
            reader.join(1)
        shutil.rmtree(folder, ignore_errors=True)


def receive(receiver: Connection, messages: queue.SimpleQueue) -> None:
    """Pass messages on, and None at their end. A thread of its own, since half a message would keep it for ever."""
    with receiver, contextlib.suppress(EOFError, OSError):
        while True:
            messages.put(receiver.recv_bytes(10**6))
    messages.put(None)


def reason_of(exit_code: int | None) -> str:
    if exit_code is None:
        return "the answer has closed what the grading writes to"
    if exit_code >= 0:
        return f"the answer ends the process, with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    cause = {"SIGSEGV": ": a recursion without end?", "SIGKILL": ": out of memory?"}.get(name, "")
    return f"the process was ended by {name}{cause}"


def grade_part(source: str, path: Path, part: int, tests: list[str], limit: float) -> Result:
    title = PARTS[part - 1].title
    events, reason = events_of(source, path, part, limit)
    verdict = "right"
    failures = []
    begun = ""
    for event, test, text in events:
        if event == "begun":
            begun = test
        if event in ("failed", "skipped", "stopped", "error"):
            failures.append(failure(test or begun, text))
            if event != "skipped":
                verdict = "stopped" if event == "stopped" else "wrong"
            elif verdict == "right":
                verdict = "skipped"
    passed = {test for event, test, _ in events if event == "passed"}
    if reason:
        verdict = reason.partition(":")[0] if reason.startswith("no end") else "stopped"
        failures.append(failure(begun, reason))
    elif not failures and passed != set(tests):
        verdict = "stopped"
        failures.append(failure(begun, f"{len(set(tests) - passed)} of {len(tests)} tests were not run to their end"))
    left = blanks_left(ast.parse(source), part)
    if left and verdict != "right":
        failures = [one for one in failures if f"NotImplementedError: part {part}:" not in one.message]
        verdict = "not finished" if failures or len(left) < len(PARTS[part - 1].gaps) else "not begun"
        failures += [failure("", f"line {line} is still there: raise NotImplementedError(...)") for line in left]
    return Result(part, title, verdict, failures)


def failure(test: str, message: str) -> Failure:
    name = test.partition("[")[0]
    return Failure(name, name.removeprefix("test_method_").replace("_", " "), message)


def grade(path: Path, parts: list[int], tests: dict[int, list[str]], limit: float, tell=lambda result: None) -> Grade:
    """Grade parts of a student's file; `tell` is called with each result as it comes."""
    try:
        source = read_source(path)
        events, reason = events_of(source, path, None, limit)
        if reason:
            raise InputError(f"{path}, while it is imported: {reason}")
        for event, _, text in events:
            if event != "end":
                raise InputError(text)
    except InputError as error:
        return Grade(path.as_posix(), 0, len(parts), str(error), [], [])
    results = []
    for part in parts:
        results.append(grade_part(source, path, part, tests[part], limit))
        tell(results[-1])
    points = sum(result.verdict == "right" for result in results)
    return Grade(path.as_posix(), points, len(parts), None, changed_outside(ast.parse(source)), results)


# --- The command -----------------------------------------------------------------------------------------------------


def write_new(path: Path, source: str) -> None:
    """Write a file of Python that is not there yet. Raises InputError if it is."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(source)
    except FileExistsError:
        raise InputError(f"{path} is there already, with answers perhaps: give another name, or move it away") from None
    print(f"wrote {path}")


def print_list() -> None:
    tests = tests_of_parts()
    for i, part in enumerate(PARTS, 1):
        names = ", ".join(dict.fromkeys(gap.function for gap in part.gaps))
        print(f"{i}  {part.title} (paper {part.paper}): {names}")
        for test in dict.fromkeys(name.partition("[")[0] for name in tests[i]):
            print(f"     {test}")


def write_wrong(part: int) -> None:
    """Write wrong answers to a part, each in a file that is else the original, and say what is wrong with each."""
    answers = [answer for answer in WRONG if answer.part == part][:HANDED_OUT]
    for i, answer in enumerate(answers, 1):
        write_new(Path(f"wrong_{part}_{i}.py"), with_answer(answer))
        print(f"    {answer.what}")


def files_and_parts(words: list[str]) -> tuple[list[Path], list[int]]:
    """What stands behind --check: files, folders of files, and numbers of parts (none: all). Raises InputError."""
    files = []
    parts = []
    for word in words:
        path = Path(word)
        if word.isdecimal():
            if int(word) not in NUMBERS:
                raise InputError(f"{word!r} is no part: they have the numbers 1 to {len(PARTS)}, see --list")
            parts.append(int(word))
        elif path.is_dir():
            inside = sorted(one for one in path.rglob("*.py") if one.is_file() and not hidden(one.relative_to(path)))
            if not inside:
                raise InputError(f"there is no .py file in the folder {path}")
            files.extend(inside)
        else:
            files.append(path)
    if not files:
        raise InputError("give --check a file, or a folder of files")
    return list(dict.fromkeys(files)), sorted(set(parts)) or list(NUMBERS)


def hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def print_result(result: Result) -> None:
    print(f"{result.part}  {result.title:32}{result.verdict}")
    said = set()
    for one in result.failures:
        if one.property:
            print(textwrap.fill(one.property, 110, initial_indent=" " * 5, subsequent_indent=" " * 5))
        if one.message not in said:
            print(textwrap.fill(one.message, 110, initial_indent=" " * 7, subsequent_indent=" " * 7))
        said.add(one.message)
    sys.stdout.flush()


def print_line(one: Grade, width: int) -> None:
    """A file in one line: the points, and which parts are not right."""
    line = f"{one.file:{width}}  {one.points} of {one.of}"
    if one.error:
        line += f"   cannot be graded: {one.error}"
    others = [f"{result.part} {result.verdict}" for result in one.parts if result.verdict != "right"]
    if others:
        line += f"   {', '.join(others)}"
    if one.changed:
        line += f"   changed outside the blanks: {', '.join(one.changed)}"
    print(line, flush=True)


def check(paths: list[Path], parts: list[int], limit: float) -> Iterator[Grade]:
    """Grade files one by one, and print what comes out: all of it for one file, else a line for each."""
    tests = tests_of_parts()
    if len(paths) > 1:
        width = max(len(path.as_posix()) for path in paths)
        for path in paths:
            one = grade(path, parts, tests, limit)
            print_line(one, width)
            yield one
        return
    one = grade(paths[0], parts, tests, limit, print_result)
    if one.changed:
        text = f"changed outside the blanks, and graded with the original: {', '.join(one.changed)}"
        print(textwrap.fill(text, 110, subsequent_indent=" " * 5))
    if not one.error:
        print(f"{one.points} of {one.of}")
    yield one


def write_json(grades: list[Grade], path: Path) -> None:
    content = {"files": [asdict(one) for one in grades]}
    with replace_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def write_csv(grades: list[Grade], parts: list[int], path: Path) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "points", "of", *(f"part {part}" for part in parts), "changed outside the blanks", "error"])
    for one in grades:
        verdicts = [result.verdict for result in one.parts] or ["not graded"] * len(parts)
        table.writerow([one.file, one.points, one.of, *verdicts, "; ".join(one.changed), one.error or ""])
    with replace_file(path) as file:
        file.write(text.getvalue().encode("utf-8", "backslashreplace"))


def same_file(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


def check_and_write(args: argparse.Namespace) -> int:
    """What --check asks for. Gives the exit code: 0, all is right; 1, not. Raises InputError for a single bad file."""
    paths, parts = files_and_parts(args.check)
    for path in filter(None, (args.json, args.csv)):  # before the work, not after
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise InputError(f"cannot write {path}: give the name of a file in a folder that is there")
        if any(same_file(path, other) for other in paths):
            raise InputError(f"{path} is a file to be graded: give another name to write to")
    if args.json and args.csv and same_file(args.json, args.csv):
        raise InputError(f"--json and --csv are both {args.csv}: give two names")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whatever else is installed, the tests run in one process
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a copied process cannot use a GPU
    grades = list(check(paths, parts, args.limit))
    if args.json:
        write_json(grades, args.json)
    if args.csv:
        write_csv(grades, parts, args.csv)
    if len(grades) == 1 and grades[0].error:
        raise InputError(grades[0].error)
    return 0 if all(one.points == one.of for one in grades) else 1


def main() -> int:
    parser = Parser(__doc__)
    part = number(int, 1, len(PARTS))
    does = parser.add_mutually_exclusive_group(required=True)
    does.add_argument("--out", type=Path, metavar="FILE", help="write the student's version; never over a file")
    check_help = "grade files or folders, all parts or those that are named"
    does.add_argument("--check", nargs="+", metavar=("FILE", "FILE_OR_PART"), help=check_help)
    does.add_argument("--wrong", type=part, metavar="PART", help="write wrong answers to a part, to discuss in class")
    does.add_argument("--list", action="store_true", help="print the parts in their order, with the tests of each")
    keep_help = f"with --out: parts whose answers are left in, 1 to {len(PARTS)}"
    parser.add_argument("--keep", type=part, nargs="+", default=[], metavar="PART", help=keep_help)
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --check: write all of what came out")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="with --check: write a line for each file")
    limit_help = "with --check: the seconds that a part may take (default 60)"
    parser.add_argument("--limit", type=number(float, 1, 86400), default=60.0, metavar="SECONDS", help=limit_help)
    args = parser.parse_args()
    if (args.keep and not args.out) or ((args.json or args.csv) and not args.check):
        raise InputError("--keep goes with --out, --json and --csv with --check")
    if args.out:
        write_new(args.out, blank(ORIGINAL.read_text(encoding="utf-8"), args.keep))
    if args.wrong:
        write_wrong(args.wrong)
    if args.list:
        print_list()
    if args.check:
        return check_and_write(args)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all that Ctrl-C ends
    run_command(main)
