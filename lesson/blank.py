"""A student's version of diffratio_mod.py: the key parts of the method taken out, docstrings and all the rest kept.

    python lesson/blank.py > my_solution.py           # everything blank; it overwrites, so do this once
    python lesson/blank.py --keep 1 2 > demo.py       # the original answers of parts 1 and 2 left in
    python lesson/blank.py --list                     # the parts in their order, and the tests that each turns green
    python lesson/blank.py --tests 3                  # those of part 3, for pytest -k

lesson/student.md is the text that goes with it. Where a part stands is found in the syntax tree, by what it is ("the
branch `if ratio is not None` of RoutedLayer.forward"), so diffratio_mod.py needs no marks, and its lines may move.
"""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

ORIGINAL = Path(__file__).parents[1] / "diffratio_mod.py"

# --- What can be taken out of a function: some statements of its body, in a row --------------------------------------

Find = Callable[[ast.FunctionDef], list[ast.stmt]]  # returns nothing where it does not find them


def whole_body(function: ast.FunctionDef) -> list[ast.stmt]:
    return function.body[ast.get_docstring(function) is not None :]


def branch(condition: str) -> Find:
    """What is done `if` the condition holds."""
    return lambda function: next((line.body for line in function.body if _asks(line, condition)), [])


def after_branch(condition: str) -> Find:
    """What is done if it does not hold, where the branch ends with a return: the rest of the function."""
    return lambda function: next(
        (function.body[i + 1 :] for i, line in enumerate(function.body) if _asks(line, condition)), []
    )


def assignments(*names: str) -> Find:
    """The statements in a row that give these names their values, one each."""

    def find(function: ast.FunctionDef) -> list[ast.stmt]:
        given = [ast.unparse(line.targets[0]) if isinstance(line, ast.Assign) else "" for line in function.body]
        places = [i for i in range(len(given)) if tuple(given[i : i + len(names)]) == names]
        return function.body[places[0] : places[0] + len(names)] if places else []

    return find


def _asks(line: ast.stmt, condition: str) -> bool:
    return isinstance(line, ast.If) and ast.unparse(line.test) == condition


# --- The parts, in the order of the lesson ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    function: str  # its name, after that of its class
    task: str  # short: it becomes the message of the NotImplementedError
    find: Find = whole_body
    frame: str = "{}"  # what stands around the raise


@dataclass(frozen=True)
class Part:
    title: str
    paper: str  # section
    gaps: list[Gap]
    tests: list[str]  # that are red before this part is filled in, and green after it


PARTS = [
    Part(
        "The columns of the table",
        "3.4",
        [Gap("column_of", "the column of each noise level")],
        ["test_method_columns_cut_the_noise_levels_evenly_in_training_and_sampling"],
    ),
    Part(
        "The pull",
        "3.3",
        [Gap("ratio_loss", "what pulls the mean ratio to the target")],
        ["test_method_ratio_loss_pulls_all_cells_alike_towards_the_target"],
    ),
    Part(
        "From a ratio to k",
        "3.3",
        [Gap("tokens_processed", "how many tokens are processed at each ratio")],
        ["test_method_tokens_processed_are_the_nearest_whole_number_from_one_to_all"],
    ),
    Part(
        "A zero with a slope",
        "3.3",
        [Gap("ratio_gate", "1 for the k best, 0 for the others, but for the next e with a slope")],
        ["test_method_ratio_gate_chooses_the_k_best_and_has_the_slope_that_its_docstring_promises"],
    ),
    Part(
        "The routed layer",
        "3.2",
        [
            Gap("RoutedLayer.score_and_sort", "every token's score, and the tokens from best to worst"),
            Gap("RoutedLayer.forward", "training: each image's own k, by mask", branch("ratio is not None")),
            Gap("RoutedLayer.forward", "sampling: only the k best are computed", after_branch("ratio is not None")),
        ],
        [
            "test_method_any_layer_can_be_routed_and_bypassed_tokens_leave_bit_identical",
            "test_method_equal_scores_are_taken_in_order",
            "test_method_router_learns_only_through_the_gate_of_processed_tokens_and_the_ratio_through_that_of_the_next",
            "test_method_training_equals_sampling_in_the_result_and_in_what_the_weights_learn",
        ],
    ),
    Part(
        "The ratios of a batch",
        "3.4",
        [
            Gap(
                "diffusion_loss",
                "ratio (L, B): each layer's at each image's noise level",
                assignments("ratio"),
                "ratio = None\nif routed:\n    {}",
            )
        ],
        [
            "test_method_forward_and_loss_of_a_mixed_batch_equal_the_reference_image_by_image",
            "test_method_the_model_is_trained_with_the_known_pixels_and_without_the_hidden_ones",
            "test_method_zero_ratios_equal_dense_to_the_last_bit",
            "test_method_gradient_of_a_ratio_agrees_with_the_finite_difference_in_k",
            "test_method_the_loss_compiles_once_whatever_the_ratios",
        ],
    ),
    Part(
        "The bounds of a ratio",
        "3.3",
        [Gap("DiT.clamp_ratios", "bring the ratios back into their bounds")],
        [
            "test_method_a_ratio_at_its_bound_comes_back_at_the_first_step_when_the_pull_turns",
            "test_method_a_training_step_is_one_pass_that_reads_nothing_back_from_the_device",
        ],
    ),
    Part(
        "The k of each sampling step",
        "3.4",
        [
            Gap(
                "sample",
                "column and k, so that k[column[i]] lists each layer's k at step i",
                assignments("column", "k"),
            )
        ],
        [
            "test_method_sampler_equals_its_paper_and_computes_the_k_tokens_of_each_noise_level",
            "test_method_sampler_reproduces_a_known_distribution",
            "test_method_inpainting_returns_known_pixels_unchanged_and_never_sees_hidden_ones",
            "test_method_cuda_and_bfloat16_train_and_sample_with_about_the_same_result",
        ],
    ),
]


# --- Taking them out -------------------------------------------------------------------------------------------------


def blank(source: str, keep: Collection[int] = ()) -> str:
    """The source with all parts taken out but those to keep, by number from 1. What is not taken out stays as it is."""
    tree, lines, cuts = ast.parse(source), source.splitlines(keepends=True), []
    functions = {z.name: z for z in tree.body if isinstance(z, ast.FunctionDef)}
    for parent in (z for z in tree.body if isinstance(z, ast.ClassDef)):
        functions |= {f"{parent.name}.{z.name}": z for z in parent.body if isinstance(z, ast.FunctionDef)}
    for number, part in enumerate(PARTS, 1):
        for gap in part.gaps if number not in keep else ():
            found = gap.find(functions[gap.function]) if gap.function in functions else []
            if not found:
                raise LookupError(f"part {number}, {gap.task!r}, is not where it was, in {gap.function}")
            text = gap.frame.format(f'raise NotImplementedError("part {number}: {gap.task}")')
            text = textwrap.indent(text, " " * found[0].col_offset) + "\n"
            cuts.append((found[0].lineno - 1, found[-1].end_lineno, text))
    for start, end, text in sorted(cuts, reverse=True):
        lines[start:end] = [text]
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, numbers = parser.add_argument, range(1, len(PARTS) + 1)
    part = {"type": int, "nargs": "+", "choices": numbers, "metavar": "N"}
    add("--keep", default=(), help=f"parts whose answers are left in, 1 to {len(PARTS)}", **part)
    add("--list", action="store_true", help="print the parts in their order, with the tests of each")
    add("--tests", help="print the tests of these parts, for pytest -k", **part)
    args = parser.parse_args()
    if args.tests:
        print(" or ".join(test for number in args.tests for test in PARTS[number - 1].tests))
    elif args.list:
        for number, part in zip(numbers, PARTS):
            names = ", ".join(dict.fromkeys(gap.function for gap in part.gaps))
            print(f"{number}  {part.title} (paper {part.paper}): {names}", *part.tests, sep="\n     ")
    else:
        sys.stdout.write(blank(ORIGINAL.read_text(encoding="utf-8"), args.keep))


if __name__ == "__main__":
    main()
