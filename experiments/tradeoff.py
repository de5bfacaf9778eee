"""The trade-off between quality and cost: routing, and what a user would do instead, each at several step counts.

    D=assets/cifar_dense.pt
    python experiments/tradeoff.py dense=$D cache=$D:cache layer-timestep=assets/cifar_routed.pt \\
        --data-dir data/cifar10-jpeg

An arm is NAME=CHECKPOINT. What is behind a colon makes the model compute in another way:

    cache             on every second step a layer adds what it added the step before
    forecast          the same, but it adds what the last two steps that were computed let expect
    merging:0.3       tokens are merged (ToMe, package tomesd), this share of them
    pruning:0.3       tokens are pruned by attention (AT-EDM), this share of them
    scaled:0.2        the learned table is scaled to this mean
    dense:0.3-0.7     nothing is skipped at these noise levels

The layers of a routed checkpoint stay routed in a cache, `:cache` or `:forecast`: on the steps that are computed they
skip what its table says. So both savings are combined.

Each arm chooses its guidance and the interval of noise levels where it acts, at 10 steps on --choose-by images: from
the middle of --guidance and the first of --intervals to whatever is better, one guidance up or down or another
interval, until nothing is. Of all tried within one standard error of the best, it takes the cheapest. With this choice
it samples at every step count. Quality: for photographs KID in thousandths (photographs.py), for `shapes` the share of
prompts followed (judge.py). Leaves tradeoff-DATASET.json, and .png with all arms of that file; those that it holds
already are not run again.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import photographs
import torch
from common import RESULTS, draw_images, flops, package, scaled, to_float, write_json
from judge import followed, mixed_prompts, trained_judge
from rivals import AttentionPrunedLayer, CachedLayer, ForecastingLayer, MergedLayer, use
from torch import nn

from diffratio_mod import DiT, InputError
from sample import Parser, input_errors, number, pick_device, read_checkpoint, run_command
from train_cifar import load_data

LAYERS = {
    "cache": CachedLayer,
    "forecast": ForecastingLayer,
    "merging": MergedLayer,
    "pruning": AttentionPrunedLayer,
}
WITHOUT_VALUE = ("", "cache", "forecast")
WITH_RATIO = ("merging", "pruning", "scaled")


# --- Arms ------------------------------------------------------------------------------------------------------------


def model_of(arm: str, device: torch.device) -> nn.Module:
    """The model of NAME=CHECKPOINT:KIND:VALUE. Raises InputError."""
    _, _, source = arm.partition("=")
    path, _, way = source.partition(":")
    kind, _, value = way.partition(":")
    allowed = (*WITH_RATIO, "dense") if value else WITHOUT_VALUE
    if not path or kind not in allowed:
        ways = [*WITHOUT_VALUE[1:], *(f"{name}:RATIO" for name in WITH_RATIO), "dense:LOW-HIGH"]
        raise InputError(f"{arm!r} is not NAME=CHECKPOINT, alone or with one of :{', :'.join(ways)}")
    model, _ = read_checkpoint(Path(path))
    if kind == "dense":
        with input_errors(f"the noise levels of {arm!r}"):
            low, high = interval_of(value, "-")
        edges = torch.arange(model.ratios.shape[1] + 1) / model.ratios.shape[1]
        within = (edges[:-1] > low - 1e-4) & (edges[1:] < high + 1e-4)  # the columns that lie in there
        model.ratios.data[:, within] = 0
    elif kind in WITH_RATIO:
        with input_errors(f"the ratio of {arm!r}"):
            ratio = number(float, 0, 0.98)(value)
        model = with_ratio(model, kind, ratio)
    if kind in LAYERS:
        use(model, LAYERS[kind])
    return model.eval().to(device)


def with_ratio(model: DiT, kind: str, ratio: float) -> DiT:
    """The model with the ratios that the kind of an arm asks for. Raises InputError if it has no table to change."""
    table = model.ratios.detach()
    if kind == "scaled":
        if not table.any():
            raise InputError("scaled: this model has no learned table")
        model.ratios.data = scaled(table, ratio)
        return model
    uniform = DiT(replace(model.config, mode="uniform"))  # one ratio for all layers and steps
    uniform.load_state_dict(model.state_dict() | {"ratios": torch.full_like(table[:, :1], ratio)})
    return uniform


# --- Quality ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """How good images are."""

    prompts: Callable[[int], list[str]]  # so many, the same at every call
    quality: Callable[[np.ndarray, list[str]], dict[str, float]]  # of images of prompts: quality and standard error
    higher_is_better: bool


def measure_of(args: argparse.Namespace, size: int, device: torch.device) -> Measure:
    if args.dataset == "folder":
        return measure_photographs(args, size, device)
    judge = trained_judge(size, device)

    def share_followed(images: np.ndarray, prompts: list[str]) -> dict[str, float]:
        share = float(followed(judge, to_float(images), prompts).float().mean())
        error = (share * (1 - share) / len(prompts)) ** 0.5
        return {"quality": 100 * share, "standard error": 100 * error}

    return Measure(mixed_prompts, share_followed, True)


def measure_photographs(args: argparse.Namespace, size: int, device: torch.device) -> Measure:
    captions = load_data(argparse.Namespace(**vars(args), image_size=size), "test").captions
    distance = photographs.measure_of(args.data_dir, size, device)

    def quality(images: np.ndarray, _: list[str]) -> dict[str, float]:
        found = distance(images)
        return {
            "quality": found["KID e-3"],
            "standard error": found["standard error"],
            "Frechet distance": found["Frechet distance"],
        }

    return Measure(lambda count: (captions * count)[:count], quality, False)


# --- An arm's choice of guidance -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guidance:
    weight: float  # of guidance
    interval: tuple[float, float]  # the lowest and the highest noise level at which it acts

    def options(self) -> dict:
        """Arguments for sample_images."""
        return {"guidance": self.weight, "guidance_interval": self.interval}


def choose(
    try_it: Callable[[Guidance], dict[str, float]],
    cost: Callable[[Guidance], float],
    weights: list[float],
    intervals: list[tuple[float, float]],
    higher_is_better: bool,
) -> tuple[Guidance, dict[Guidance, dict[str, float]]]:
    """The guidance that an arm takes, and all that were tried; as the text at the top says.

    try_it: quality and standard error of a guidance. weights: ascending.
    """
    tried: dict[Guidance, dict[str, float]] = {}

    def badness(guidance: Guidance) -> float:
        quality = tried[guidance]["quality"]
        return -quality if higher_is_better else quality

    best = Guidance(weights[(len(weights) - 1) // 2], intervals[0])
    candidates = [best]
    while candidates:
        for guidance in candidates:
            tried[guidance] = try_it(guidance)
        best = min(tried, key=badness)
        place = weights.index(best.weight)
        near = [Guidance(weight, best.interval) for weight in weights[max(0, place - 1) : place + 2]]
        near += [Guidance(best.weight, interval) for interval in intervals]
        candidates = [guidance for guidance in dict.fromkeys(near) if guidance not in tried]
    within = badness(best) + tried[best]["standard error"]
    good = [guidance for guidance in tried if badness(guidance) <= within]
    return min(good, key=lambda guidance: (cost(guidance), badness(guidance))), tried


def interval_of(text: str, between: str = ":") -> tuple[float, float]:
    """The type of --intervals: LOW:HIGH, both from 0 to 1."""
    low, _, high = text.partition(between)
    level = number(float, 0, 1)
    return level(low), level(high)


# --- The command -----------------------------------------------------------------------------------------------------


def measure_arm(name: str, model: nn.Module, measure: Measure, args: argparse.Namespace) -> dict:
    """What an arm's row of the results holds: its guidance, all that were tried, and a point for each step count."""
    table = model.ratios.detach()

    def try_it(guidance: Guidance) -> dict[str, float]:
        prompts = measure.prompts(args.choose_by)
        images = draw_images(model, prompts, args.seed, args.amp, steps=10, **guidance.options())
        found = measure.quality(images, prompts)
        print(f"{name}, 10 steps, {guidance}: {found['quality']:.1f} ± {found['standard error']:.1f}", flush=True)
        return found

    def cost(guidance: Guidance) -> float:
        return flops(model, table, 10, **guidance.options())

    weights = sorted(args.guidance)
    best, tried = choose(try_it, cost, weights, args.intervals, measure.higher_is_better)
    row: dict = {"guidance": best.weight, "guidance interval": best.interval, "tried at 10 steps": [], "steps": {}}
    for guidance, found in tried.items():
        choice = {"guidance": guidance.weight, "guidance interval": guidance.interval}
        row["tried at 10 steps"].append(choice | found | {"GFLOPs": cost(guidance) / 1e9})
    prompts = measure.prompts(args.num)
    for steps in args.steps:
        images = draw_images(model, prompts, args.seed, args.amp, steps=steps, **best.options())
        point = measure.quality(images, prompts)
        point["GFLOPs"] = flops(model, table, steps, **best.options()) / 1e9
        row["steps"][str(steps)] = point
        text = ", ".join(f"{what} {value:.2f}" for what, value in point.items())
        print(f"{name}, {steps} steps, {best}: {text}", flush=True)
    return row


def print_table(results: dict, steps: list[int]) -> None:
    """In each cell: quality and its standard error, in brackets GFLOPs an image."""
    print("\n| arm | guidance | at t |" + "".join(f" {count} steps |" for count in steps))
    print("|---" * (len(steps) + 3) + "|")
    for name, row in results.items():
        cells = []
        for count in map(str, steps):
            if count not in row["steps"]:  # of an earlier call with other steps
                cells.append("")
                continue
            point = row["steps"][count]
            cells.append(f"{point['quality']:.1f} ± {point['standard error']:.1f} ({point['GFLOPs']:.1f})")
        low, high = row["guidance interval"]
        print(f"| {name} | {row['guidance']:g} | {low:g} to {high:g} | {' | '.join(cells)} |")


def draw_chart(results: dict, dataset: str, path: Path) -> None:
    """Quality over GFLOPs, a curve an arm, with standard errors."""
    package("matplotlib").use("Agg")
    figure, axis = package("matplotlib.pyplot").subplots(figsize=(9, 5.5))
    palette = "tab10" if len(results) <= 10 else "tab20"
    axis.set_prop_cycle(color=package("matplotlib").colormaps[palette].colors)
    for name, row in results.items():
        points = list(row["steps"].values())
        costs = [point["GFLOPs"] for point in points]
        style = "o--" if name.startswith("dense") else "o-"
        errors = [point["standard error"] for point in points]
        axis.errorbar(costs, [point["quality"] for point in points], errors, fmt=style, markersize=4, label=name)
    label = "KID, thousandths: less is better"
    if dataset == "shapes":
        label = "prompts followed, %"
    axis.set(xlabel="GFLOPs an image", ylabel=label, xscale="log")
    ticks = package("matplotlib.ticker")
    axis.xaxis.set_major_locator(ticks.LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.xaxis.set_major_formatter(ticks.StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(ticks.NullFormatter())
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=90, bbox_inches="tight")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--dataset", choices=("shapes", "folder"), default="folder")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--steps", type=number(int, 1, 1000), nargs="+", default=[20, 14, 10, 7, 5])
    parser.add_argument("--guidance", type=number(float, 0, 100), nargs="+", default=[1.5, 2, 3, 4, 5])
    parser.add_argument(
        "--intervals", type=interval_of, nargs="+", metavar="LOW:HIGH",
        default=[(0, 1), (0.25, 1), (0.45, 1), (0.25, 0.85)],
        help="noise levels at which guidance acts (default 0:1 0.25:1 0.45:1 0.25:0.85)",
    )  # fmt: skip
    parser.add_argument("--num", type=number(int, 50, 10**6), default=500, help="images a point (default 500)")
    parser.add_argument("--choose-by", type=number(int, 50, 10**6), default=300, help="images a guidance (default 300)")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    parser.add_argument("--amp", action="store_true", help="sample in bfloat16 (default off)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    device = pick_device(args.device)
    out = args.out or RESULTS / f"tradeoff-{args.dataset}.json"
    models = {}
    for arm in args.arms:
        name, _, _ = arm.partition("=")
        models[name] = model_of(arm, device)
    measure = measure_of(args, next(iter(models.values())).config.image_size, device)
    results = {}
    if out.exists():
        results = json.loads(out.read_text())
    for name, model in models.items():
        if name not in results:
            results[name] = measure_arm(name, model, measure, args)
            write_json(results, out)
    print_table({name: results[name] for name in models}, args.steps)
    draw_chart(results, args.dataset, out.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
