"""The trade-off between quality and cost: routing, and what a user would do instead, each at several step counts.

    C=runs/compare/folder
    python experiments/tradeoff.py dense=$C/0-dense/checkpoint.pt cache=$C/0-dense/checkpoint.pt:cache \\
        "layer-timestep 0.3=$C-0.3/0-layer-timestep/checkpoint.pt" --dataset folder --data-dir data/cifar10-jpeg

An arm is NAME=CHECKPOINT, and what is behind a colon makes the layers of the model compute in another way: `cache` (on
every second step a layer adds what it added the step before), `merging:0.3` (ToMe, package tomesd) and `pruning:0.3`
(AT-EDM) with this share of the tokens, `weaker` (the unconditional half of guidance skips twice as much), `scaled:0.2` (the
table scaled to this mean). Each arm chooses its guidance at 10 steps on 500 images (from the middle of --guidance
outwards, until the best lies between two worse ones, or at an end), and samples at every step count with it. Quality: for
photographs KID in thousandths (photographs.py), for `shapes` the share of prompts followed (judge.py). Last come the
seconds, of all arms in interleaved rounds. Leaves tradeoff-DATASET.json and .png; arms that the file holds already are not
run again.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import common
import numpy as np
import photographs
import torch
from common import tools
from judge import followed, prompts_of, trained_judge
from tqdm import tqdm

from diffratio_mod import DiT, InputError, RoutedLayer
from train_cifar import load_data

KINDS = {"": RoutedLayer, "cache": common.CachedLayer, "weaker": common.WeakerUnconditionalLayer}
KINDS |= {"merging": common.MergedLayer, "pruning": common.AttentionPrunedLayer, "scaled": RoutedLayer}


def model_of(arm: str, device: torch.device) -> DiT:
    """The model of NAME=CHECKPOINT:KIND:RATIO."""
    path, kind, ratio = (*arm.partition("=")[2].split(":"), "", "")[:3]
    if kind not in KINDS or (kind in ("merging", "pruning", "scaled")) != bool(ratio):
        raise InputError(f"{arm!r} is not NAME=CHECKPOINT, with :cache, :weaker, :merging:, :pruning: or :scaled:RATIO")
    model, _ = tools.read_checkpoint(Path(path))
    if ratio:
        with tools.input_errors(f"the ratio of {arm!r}"):
            mean = tools.number(float, 0, 0.98)(ratio)
        if kind == "scaled" and not model.ratios.any():
            raise InputError(f"{arm!r}: this model has no learned table to scale")
        weights, table = model.state_dict(), common.scaled(model.ratios.detach(), mean)
        if kind != "scaled":  # one ratio for all layers and steps
            model, table = DiT(replace(model.config, mode="uniform")), torch.full_like(table[:, :1], mean)
        model.load_state_dict(weights | {"ratios": table})
    return common.use(model.eval().to(device), KINDS[kind])


def draw(model: DiT, prompts: list[str], first: int, args: argparse.Namespace, **options: float) -> np.ndarray:
    """As tools.images_from_prompts, in any layers and precision."""
    for layer in model.layers:
        layer.calls = 0
    with torch.autocast(model.ratios.device.type, torch.bfloat16, enabled=args.amp):
        return tools.images_from_prompts(model, prompts, args.seed, first, **options)


def measure_of(args: argparse.Namespace, size: int, device: torch.device) -> tuple[Callable, Callable, bool]:
    """Prompts by their number; quality and its standard error of images and prompts; whether more of it is better."""
    if args.dataset == "folder":
        distance = photographs.measure_of(args.data_dir, size, device)
        captions = load_data(argparse.Namespace(**vars(args), image_size=size), "test").captions
        quality = lambda images, _: [distance(images)[name] for name in ("KID e-3", "standard error")]
        return lambda num: (captions * num)[:num], quality, False
    judge = trained_judge(size, device)

    def share_followed(images: np.ndarray, prompts: list[str]) -> list[float]:
        share = float(followed(judge, common.to_float(images), prompts).float().mean())
        return [100 * share, 100 * (share * (1 - share) / len(prompts)) ** 0.5]

    both = lambda num: zip(prompts_of(num // 2, False), prompts_of(num // 2, True))
    return lambda num: [prompt for pair in both(num) for prompt in pair], share_followed, True


def draw_chart(results: dict, dataset: str, path: Path) -> None:
    """Quality over GFLOPs, and over seconds, a curve an arm."""
    common.package("matplotlib").use("Agg")
    figure, axes = common.package("matplotlib.pyplot").subplots(1, 2, figsize=(15, 6), sharey=True)
    colours = common.package("matplotlib").colormaps["tab10" if len(results) <= 10 else "tab20"].colors
    for axis, cost in zip(axes, ("GFLOPs", "seconds")):
        axis.set_prop_cycle(color=colours)
        for name, row in results.items():
            points = list(row["steps"].values())
            style = "o--" if name.startswith("dense") else "o-"
            axis.plot([p[cost] for p in points], [p["quality"] for p in points], style, markersize=4, label=name)
        axis.set(xlabel=f"{cost} an image", xscale="log")
    axes[0].set_ylabel("prompts followed, %" if dataset == "shapes" else "KID, thousandths")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=90, bbox_inches="tight")


def main() -> None:
    parser = tools.Parser(__doc__)
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--dataset", choices=("shapes", "folder"), default="folder")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--steps", type=tools.number(int, 1, 1000), nargs="+", default=[20, 14, 10, 7, 5])
    parser.add_argument("--guidance", type=tools.number(float, 0, 100), nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--num", type=tools.number(int, 50, 10**6), default=1000, help="images a point (default 1000)")
    parser.add_argument("--seed", type=tools.number(int, 0, 2**40), default=0)
    parser.add_argument("--rounds", type=tools.number(int, 1, 1000), default=5, help="of 32 images, to time the arms")
    parser.add_argument("--amp", action="store_true", help="sample in bfloat16 (default off)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, out = tools.pick_device(args.device), args.out or common.RESULTS / f"tradeoff-{args.dataset}.json"
    models = {arm.partition("=")[0]: model_of(arm, device) for arm in args.arms}
    prompts_by, quality, higher = measure_of(args, next(iter(models.values())).config.image_size, device)
    results = json.loads(out.read_text()) if out.exists() else {}

    @functools.cache
    def measure(model: DiT, num: int, **options: float) -> list[float]:
        prompts, firsts = prompts_by(num), tqdm(range(0, num, 50), str(options), leave=False, disable=None)
        parts = [draw(model, prompts[i : i + 50], i, args, **options) for i in firsts]
        return quality(np.concatenate(parts), prompts)

    for name, model in models.items():
        if name in results:
            continue
        tried: dict[float, list[float]] = {}
        levels = sorted(args.guidance)
        if isinstance(model.layers[0], common.WeakerUnconditionalLayer):
            levels = [g for g in levels if g != 1]  # at 1 there is no unconditional half
        best = levels[(len(levels) - 1) // 2]
        while new := set(levels[max(0, levels.index(best) - 1) : levels.index(best) + 2]) - set(tried):
            tried |= {g: measure(model, min(500, args.num), steps=10, guidance=g) for g in sorted(new)}
            best = (max if higher else min)(tried, key=lambda guidance: tried[guidance][0])
        print(f"{name}, at 10 steps:", ", ".join(f"guidance {g:g}: {tried[g][0]:.1f}" for g in tried), flush=True)
        row: dict = {"guidance": best, "tried at 10 steps": tried, "steps": {}}
        for steps in args.steps:
            found = dict(zip(("quality", "standard error"), measure(model, args.num, steps=steps, guidance=best)))
            row["steps"][str(steps)] = found
            found["GFLOPs"] = common.flops(model, model.ratios.detach(), steps, best) / 1e9
            print(f"  {steps} steps: {' '.join(f'{what} {value:.2f}' for what, value in found.items())}", flush=True)
        results[name] = row
        common.write_json(results, out)

    for steps in map(str, args.steps):
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(args.rounds):  # interleaved: whatever else the machine does, it does to all
            for name, model in models.items():
                begin = time.perf_counter()
                draw(model, prompts_by(32), 0, args, steps=int(steps), guidance=results[name]["guidance"])
                seconds[name].append((time.perf_counter() - begin) / 32)
        for name, of in seconds.items():
            results[name]["steps"][steps]["seconds"] = statistics.median(of)
    print("\n| arm | guidance |" + "".join(f" {steps} steps |" for steps in args.steps))
    print("|---" * (len(args.steps) + 2) + "|")
    for name in models:
        of = [results[name]["steps"][str(steps)] for steps in args.steps]
        cells = [f"{p['quality']:.1f} ± {p['standard error']:.1f} ({p['GFLOPs']:.1f}; {p['seconds']:.3f})" for p in of]
        print(f"| {name} | {results[name]['guidance']:g} | {' | '.join(cells)} |")
    common.write_json(results, out)
    draw_chart({name: results[name] for name in models}, args.dataset, out.with_suffix(".png"))


if __name__ == "__main__":
    tools.run_command(main)
