"""The eight parts of the lesson: where each stands in diffratio_mod.py, and wrong answers to it.

No command; blank.py takes the parts out and grades them. Where a part stands is found in the syntax tree, by what it is
("the branch `if ratio is not None` of RoutedLayer.forward"), so diffratio_mod.py needs no marks, and its lines may
move. The tests of a part are those that `@pytest.mark.part(number)` gives it in test_diffratio_mod.py.
"""

from __future__ import annotations

import ast
import copy
import textwrap
from collections.abc import Callable, Collection, Iterator
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


PARTS = [
    Part("The columns of the table", "3.4", [Gap("column_of", "the column of each noise level")]),
    Part("The pull", "3.3", [Gap("ratio_loss", "what pulls the mean ratio to the target")]),
    Part("From a ratio to k", "3.3", [Gap("tokens_processed", "how many tokens are processed at each ratio")]),
    Part(
        "A zero with a slope",
        "3.3",
        [Gap("ratio_gate", "1 for the k best, 0 for the others, but for the next e with a slope")],
    ),
    Part(
        "The routed layer",
        "3.2",
        [
            Gap("RoutedLayer.score_and_sort", "every token's score, and the tokens from best to worst"),
            Gap("RoutedLayer.forward", "training: each image's own k, by mask", branch("ratio is not None")),
            Gap("RoutedLayer.forward", "sampling: only the k best are computed", after_branch("ratio is not None")),
        ],
    ),
    Part(
        "The ratios of a batch",
        "3.4",
        [
            Gap(
                "diffusion_loss",
                "ratio (L, B): each layer's at each image's noise level",
                find=assignments("ratio"),
                frame="ratio = None\nif routed:\n    {}",
            )
        ],
    ),
    Part("The bounds of a ratio", "3.3", [Gap("DiT.clamp_ratios", "bring the ratios back into their bounds")]),
    Part(
        "The k of each sampling step",
        "3.4",
        [
            Gap(
                "sample_images",
                "column and k, so that k[column[i]] lists each layer's k at step i",
                find=assignments("column", "k"),
            )
        ],
    ),
]
NUMBERS = range(1, len(PARTS) + 1)


# --- Wrong answers: each is what a student could write, and the tests of its part see through it ---------------------


@dataclass(frozen=True)
class Answer:
    part: int
    what: str  # in a few words what is other, and in WRONG what is wrong
    original: str  # the piece of the original answer that it changes, which stands once in diffratio_mod.py
    other: str  # what stands there instead


HANDED_OUT = 2  # of each part, the first ones: those that look most like a right answer
WRONG = [
    Answer(1, "an edge in the noisier column", "(t * columns - 1e-4).ceil().long() - 1", "(t * columns).long()"),
    Answer(1, "column 0 is the noisiest", "(t * columns - 1e-4)", "((1 - t) * columns + 1e-4)"),
    Answer(1, "rounding decides at an edge", "t * columns - 1e-4", "t * columns"),
    Answer(1, "t is changed in place", "(t * columns - 1e-4).ceil()", "t.mul_(columns).sub_(1e-4).ceil()"),
    Answer(2, "each ratio pulled, not the mean", "(ratios.mean() - target) ** 2", "((ratios - target) ** 2).mean()"),
    Answer(2, "not squared", "(ratios.mean() - target) ** 2", "(ratios.mean() - target).abs()"),
    Answer(2, "the sum for the mean", "(ratios.mean() - target) ** 2", "(ratios.sum() - target) ** 2"),
    Answer(3, "the share processed for the share skipped", "(1 - ratios.detach())", "ratios.detach()"),
    Answer(3, "cut off for rounded", "(1 - ratios.detach())).round()", "(1 - ratios.detach()))"),
    Answer(3, "at least none for at least one", ".long().clamp(1, tokens)", ".long().clamp(0, tokens)"),
    Answer(4, "the last of the k best for the next", "(rank >= k) & (rank < k + e)", "(rank >= k - e) & (rank < k)"),
    Answer(4, "the sign", "(ratio.detach() - ratio)", "(ratio - ratio.detach())"),
    Answer(4, "all that bypass for the next e", "(rank >= k) & (rank < k + e)", "rank >= k"),
    Answer(4, "not shared among the next e", "N / (2 * e.clamp(min=1))", "N / 2"),
    Answer(4, "not halved", "(2 * e.clamp(min=1))", "e.clamp(min=1)"),
    Answer(4, "0 / 0 where none bypasses", "e.clamp(min=1)", "e"),
    Answer(5, "training: all attended to", "self.layer(x, rank < k_best, *context)", "self.layer(x, None, *context)"),
    Answer(5, "training: the order for the rank", "rank = order.argsort(dim=1)", "rank = order"),
    Answer(
        5,
        "sampling: all tokens by mask",
        "if k == N:",
        "if k < N:\n            best = order.argsort(dim=1) < k\n"
        "            return x + (gate * best).unsqueeze(2) * self.layer(x, best, *context)\n        if k == N:",
    ),
    Answer(
        5,
        "softmax for sigmoid",
        "torch.sigmoid(F.linear(x.to(precision), weight, bias))",
        "F.linear(x.to(precision), weight, bias).softmax(1)",
    ),
    Answer(5, "worst for best", "descending=True", "descending=False"),
    Answer(5, "equal scores in any order", "descending=True, stable=True", "descending=True"),
    Answer(
        5,
        "sampling: the first image's best for all",
        "torch.arange(B, device=x.device)",
        "torch.zeros_like(order[:, 0])",
    ),
    Answer(
        5, "sampling: gates not sorted as tokens", "gate.flatten().index_select(0, rows)", "gate[:, :k].reshape(B, k)"
    ),
    Answer(5, "sampling: no gate", "gain = gate * self.layer", "gain = self.layer"),
    Answer(5, "sampling: the update for the sum", "index_add(0, rows", "index_copy(0, rows"),
    Answer(5, "sampling: the gate learns nothing", "gate.flatten().index", "gate.detach().flatten().index"),
    Answer(5, "training: the choice without the score", "gate = gate * ratio_gate", "gate = ratio_gate"),
    Answer(5, "training: the choice without its slope", "ratio_gate(rank, k_best, ratio)", "(rank < k_best)"),
    Answer(6, "one noise level for the whole batch", "column_of(t, model", "column_of(t.mean().expand(len(t)), model"),
    Answer(6, "no way back to the table", "model.ratios[:, column_of(t,", "model.ratios.detach()[:, column_of(t,"),
    Answer(6, "clean for noisy", "column_of(t, model", "column_of(1 - t, model"),
    Answer(7, "the last token can go", "clamp_(0, 1 - 1 / self.config.tokens)", "clamp_(0, 1)"),
    Answer(7, "a copy is clamped", "self.ratios.clamp_(0, ", "self.ratios.clamp(0, "),
    Answer(
        8, "the level that a step goes to", "column_of(levels[:-1], ratios.shape", "column_of(levels[1:], ratios.shape"
    ),
    Answer(
        8,
        "the mean of a layer's row",
        "k = tokens_processed(ratios,",
        "k = tokens_processed(0 * ratios + ratios.mean(1, True),",
    ),
    Answer(8, "k is a tensor", "model.config.tokens).T.tolist()", "model.config.tokens).T"),
    Answer(8, "the step for the noise level", "column_of(levels[:-1], ratios", "column_of(levels[:-1].flip(0), ratios"),
]


def with_answer(answer: Answer) -> str:
    """The whole original with this answer in it."""
    source = ORIGINAL.read_text(encoding="utf-8")
    if source.count(answer.original) != 1:
        raise LookupError(f"part {answer.part}, {answer.what!r}: {answer.original!r} does not stand there once")
    return source.replace(answer.original, answer.other)


# --- Taking them out, and what else was changed ----------------------------------------------------------------------


def functions_of(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """All functions and methods by their name, a method's with its class; of two with one name the later one."""
    return {name: node for name, node in members_of(tree).items() if isinstance(node, ast.FunctionDef)}


def members_of(tree: ast.Module) -> dict[str, ast.stmt]:
    """All functions, constants, methods and fields by their name, with that of the class; the last of each name."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            members = {f"{node.name}.{name}": member for name, member in _named(node.body)}
        else:
            members = dict(_named([node]))
        found.update(members)
    return found


def _named(statements: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    for node in statements:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            yield _text(node.targets[0]), node
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            yield _text(node.target), node


def message(number: int, gap: Gap) -> str:
    """What stands in the NotImplementedError of a gap."""
    return f"part {number}: {gap.task}"


def blank(source: str, keep: Collection[int] = ()) -> str:
    """The source with all parts taken out but those to keep, by number from 1. What is not taken out stays as it is."""
    functions = functions_of(ast.parse(source))
    cuts = []
    for number, part in enumerate(PARTS, 1):
        if number in keep:
            continue
        for gap in part.gaps:
            found = gap.find(functions[gap.function]) if gap.function in functions else []
            if not found:
                raise LookupError(f"part {number}, {gap.task!r}, is not where it was, in {gap.function}")
            text = gap.frame.format(f'raise NotImplementedError("{message(number, gap)}")')
            text = textwrap.indent(text, " " * found[0].col_offset) + "\n"
            cuts.append((found[0].lineno - 1, found[-1].end_lineno, text))
    lines = source.splitlines(keepends=True)
    for start, end, text in sorted(cuts, reverse=True):
        lines[start:end] = [text]
    return "".join(lines)


def blanks_left(tree: ast.Module, number: int) -> list[int]:
    """The lines of a student's file in which a blank of a part is left, one for each blank."""
    functions = functions_of(tree)
    left = []
    for gap in PARTS[number - 1].gaps:
        node = functions.get(gap.function)
        raises = [line for line in ast.walk(node) if isinstance(line, ast.Raise)] if node else []
        left += [line.lineno for line in raises if message(number, gap) in _text(line)][:1]
    return left


def changed_outside(tree: ast.Module) -> list[str]:
    """What a student's file has otherwise than the original, outside the blanks: names, constants with their values."""
    original = members_of(ast.parse(ORIGINAL.read_text(encoding="utf-8")))
    theirs = members_of(tree)
    changed = []
    for name, node in original.items():
        other = theirs.get(name)
        gaps = [gap for part in PARTS for gap in part.gaps if gap.function == name]
        if other is None:
            changed.append(f"{name} (it is gone)")
        elif gaps:
            if not _around(node, gaps) <= {_text(line) for line in ast.walk(other) if isinstance(line, ast.stmt)}:
                changed.append(f"{name}, around its blank (graded as it is)")
        elif _text(other) != _text(node):
            constant = isinstance(node, (ast.Assign, ast.AnnAssign))
            changed.append(f"{_text(other)[:200] or name} (it was {ast.unparse(node.value)})" if constant else name)
    return changed


def _around(function: ast.FunctionDef, gaps: list[Gap]) -> set[str]:
    """The statements of a function that no blank touches, and its head."""
    taken_out = {id(line) for gap in gaps for line in gap.find(function)}
    texts = set()
    for line in whole_body(function):
        if not any(id(inner) in taken_out for inner in ast.walk(line)):
            texts.add(_text(line))
    return texts


def _text(node: ast.AST) -> str:
    """A statement without comments, and a function without its docstring: these may change.

    Empty if an expression is too long for Python to write it.
    """
    if isinstance(node, ast.FunctionDef):
        node = copy.copy(node)
        node.body = whole_body(node) or [ast.Pass()]
    try:
        return ast.unparse(node)
    except RecursionError:
        return ""
