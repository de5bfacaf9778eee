"""Grade a student's version of diffratio_mod.py, part by part, each with the original answers to all other parts.

No command; blank.py --check calls it. So one wrong part costs one point, and not all tests that need it. The student's
file is imported as it is; then the functions of the other parts are replaced by the original ones. So helpers, imports
and whatever else a student has added stay, and any right answer passes.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import io
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from parts import ORIGINAL, PARTS, functions_of, message
from run import load

TESTS = ORIGINAL.with_name("test_diffratio_mod.py")
SOLUTION = "my_solution"  # the name under which a student's file is imported


@dataclass(frozen=True)
class Failure:
    test: str
    property: str  # the name of the test in words
    message: str  # the first lines of what went wrong, with the line of the student's file if it failed there


@dataclass(frozen=True)
class Result:
    part: int
    title: str
    verdict: str  # "right", "wrong", "not begun", or "not finished" where some blanks of the part are left
    failures: list[Failure]


class Watch:
    """A plugin of pytest: gives the tests a student's module in the place of the original, and notes what fails."""

    def __init__(self, module: types.ModuleType, path: Path) -> None:
        self.module = module
        self.path = path
        self.original: types.ModuleType | None = None
        self.failures: dict[str, Failure | None] = {}  # of each test that was run; None: it passed
        self.errors: dict[str, type[BaseException]] = {}  # of those that failed

    def pytest_runtest_setup(self, item: pytest.Function) -> None:
        if self.failures.setdefault(item.originalname, None) is not None:
            pytest.skip("a test is red if it is red for one set of parameters")
        self.original = item.module.method
        item.module.method = self.module

    def pytest_runtest_teardown(self, item: pytest.Function) -> None:
        if self.original is not None:  # these tests may themselves be run by a test
            item.module.method = self.original

    def pytest_runtest_makereport(self, item: pytest.Function, call: pytest.CallInfo) -> None:
        error = call.excinfo
        if error is None or error.errisinstance(pytest.skip.Exception):
            return
        lines = [line.strip() for line in str(error.value).splitlines() if line.strip()]
        if lines[1:] and lines[1].startswith("assert"):
            lines = lines[:1]  # what the test says of it is enough
        text = f"{error.type.__name__}: {' '.join(lines[:2])}"
        own = [entry.lineno + 1 for entry in error.traceback if str(entry.path) == str(self.path.resolve())]
        if own:
            text += f" (line {own[-1]})"
        words = item.originalname.removeprefix("test_method_").replace("_", " ")
        self.failures[item.originalname] = Failure(item.originalname, words, text[:300])
        self.errors[item.originalname] = error.type


def run_tests(module: types.ModuleType, path: Path, tests: list[str], *options: str) -> Watch:
    """Run tests of the project on a module; what they print is not shown."""
    watch = Watch(module, path)
    plugins = ("cacheprovider", "faulthandler", "unraisableexception", "threadexception")
    arguments = [f"{TESTS}::{test}" for test in tests]
    arguments += [f"-pno:{plugin}" for plugin in plugins]
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        pytest.main([*arguments, *options], [watch])
    missing = set(tests) - set(watch.failures)
    if missing and "-x" not in options:
        raise LookupError(f"{TESTS.name} does not run {', '.join(missing)}:\n{output.getvalue()[-2000:]}")
    return watch


def original_functions(number: int) -> dict[str, ast.FunctionDef]:
    """The functions of all parts but this one, by name, from the original."""
    functions = functions_of(ast.parse(ORIGINAL.read_text(encoding="utf-8")))
    names = [gap.function for i, part in enumerate(PARTS, 1) if i != number for gap in part.gaps]
    return {name: functions[name] for name in names}


def put_in(module: types.ModuleType, functions: dict[str, ast.FunctionDef]) -> None:
    """Let the module have these functions and methods in the place of its own."""
    flags = __future__.annotations.compiler_flag
    for name, node in functions.items():
        code = compile(ast.Module([node], []), str(ORIGINAL), "exec", flags, dont_inherit=True)
        made: dict[str, types.FunctionType] = {}
        exec(code, module.__dict__, made)  # noqa: S102 (its globals are the module's: it calls the module's functions)
        class_name, _, function = name.rpartition(".")
        owner = getattr(module, class_name) if class_name else module
        setattr(owner, function, made[function])


def left_blank(path: Path, number: int) -> tuple[int, int]:
    """How many blanks of a part are left in a file, and how many it has."""
    functions = functions_of(ast.parse(path.read_text(encoding="utf-8-sig")))
    left = 0
    gaps = PARTS[number - 1].gaps
    for gap in gaps:
        node = functions.get(gap.function)
        texts = [ast.unparse(line) for line in ast.walk(node) if isinstance(line, ast.Raise)] if node else []
        left += any(message(number, gap) in text for text in texts)
    return left, len(gaps)


def check(path: Path, numbers: list[int]) -> list[Result]:
    """Grade these parts of a student's file. Raises InputError if it is no version of diffratio_mod.py."""
    load(path, SOLUTION)
    results = []
    for number in numbers:
        part = PARTS[number - 1]
        left, gaps = left_blank(path, number)
        if left == gaps:
            results.append(Result(number, part.title, "not begun", []))
            continue
        module = load(path, SOLUTION)  # anew for each part, as others have put something into it
        put_in(module, original_functions(number))
        watch = run_tests(module, path, part.tests)
        sys.modules.pop(SOLUTION)
        failures = [failure for failure in watch.failures.values() if failure]
        verdict = "right"
        if failures:
            verdict = "wrong"
        if left:
            verdict = "not finished"
        results.append(Result(number, part.title, verdict, failures))
    return results
