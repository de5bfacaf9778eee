"""A student's version of diffratio_mod.py: the key parts of the method taken out, docstrings and all the rest kept.

    python lesson/blank.py --out my_solution.py                 # everything blank
    python lesson/blank.py --out my_solution.py --keep 1 2      # the original answers of parts 1 and 2 left in
    python lesson/blank.py --check my_solution.py               # what is right, in half a minute
    python lesson/blank.py --check my_solution.py 4 5           # parts 4 and 5 alone
    python lesson/blank.py --check my_solution.py --json a.json # and a file for an autograder
    python lesson/blank.py --wrong 4                            # two wrong answers to part 4, as files to hand out
    python lesson/blank.py --list                               # the parts in their order, and the tests of each

No file is ever overwritten but that of --json. lesson/student.md is the text that goes with it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from check import check
from parts import HANDED_OUT, ORIGINAL, PARTS, WRONG, blank, with_answer

from diffratio_mod import InputError
from sample import Parser, number, replace_file, run_command

NUMBERS = range(1, len(PARTS) + 1)


def write_new(path: Path, source: str) -> None:
    """Write a file of Python that is not there yet. Raises InputError if it is."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(source)
    except FileExistsError:
        raise InputError(f"{path} is there already, with answers perhaps: give another name, or move it away") from None
    print(f"wrote {path}")


def print_list() -> None:
    for i, part in enumerate(PARTS, 1):
        names = ", ".join(dict.fromkeys(gap.function for gap in part.gaps))
        print(f"{i}  {part.title} (paper {part.paper}): {names}")
        for test in part.tests:
            print(f"     {test}")


def part_number(text: str) -> int:
    if text not in map(str, NUMBERS):
        raise InputError(f"{text!r} is no part: they have the numbers 1 to {len(PARTS)}, see --list")
    return int(text)


def write_wrong(part: int) -> None:
    """Write wrong answers to a part, each in a file that is else the original, and say what is wrong with each."""
    answers = [answer for answer in WRONG if answer.part == part][:HANDED_OUT]
    for i, answer in enumerate(answers, 1):
        write_new(Path(f"wrong_{part}_{i}.py"), with_answer(answer))
        print(f"    {answer.what}")


def print_check(path: Path, numbers: list[int], json_path: Path | None) -> int:
    """Grade the parts and print a line for each, and what was wrong. Gives the exit code: 0 if all are right."""
    results = check(path, numbers or list(NUMBERS))
    for result in results:
        print(f"{result.part}  {result.title:32}{result.verdict}")
        for failure in result.failures:
            print(f"     {failure.property}\n       {failure.message}")
    points = sum(result.verdict == "right" for result in results)
    print(f"{points} of {len(results)}")
    if json_path:
        content = {"points": points, "of": len(results), "parts": [asdict(result) for result in results]}
        with replace_file(json_path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
    return 0 if points == len(results) else 1


def main() -> int:
    parser = Parser(__doc__)
    part = number(int, 1, len(PARTS))
    does = parser.add_mutually_exclusive_group(required=True)
    does.add_argument("--out", type=Path, metavar="FILE", help="write the student's version; never over a file")
    does.add_argument("--check", nargs="+", metavar=("FILE", "PART"), help="grade all parts, or those that are named")
    does.add_argument("--wrong", type=part, metavar="PART", help="write wrong answers to a part, to discuss in class")
    does.add_argument("--list", action="store_true", help="print the parts in their order, with the tests of each")
    keep = {"type": part, "nargs": "+", "default": [], "metavar": "PART"}
    parser.add_argument("--keep", **keep, help=f"with --out: parts whose answers are left in, 1 to {len(PARTS)}")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="with --check: also write what came out, for an autograder"
    )
    args = parser.parse_args()
    if (args.keep and not args.out) or (args.json and not args.check):
        raise InputError("--keep goes with --out, --json with --check")
    if args.out:
        write_new(args.out, blank(ORIGINAL.read_text(encoding="utf-8"), args.keep))
    if args.wrong:
        write_wrong(args.wrong)
    if args.list:
        print_list()
    if args.check:
        file, *numbers = args.check
        return print_check(Path(file), [part_number(text) for text in numbers], args.json)
    return 0


if __name__ == "__main__":
    run_command(main)
