"""The paper's ablation with controls: every arm fine-tunes one dense checkpoint on the same batches at one mean ratio.

    python experiments/compare.py --init assets/shapes_dense.pt --dataset shapes --seeds 3
    python experiments/compare.py --init runs/cifar_dense/checkpoint.pt --dataset folder --data-dir data/cifar10-jpeg

The measure is the denoising loss on images that no arm has seen, by timestep region, with the same images and noise for
all arms: differences are paired. An arm that is in the results file already is not run again, so a study that was
stopped goes on. Leaves experiments/compare-DATASET-TARGET.json and .png.

Arms: dense; uniform; layer; layer-timestep; two-branch (the paper's gradient). Controls, all with a fixed table: the
table that layer-timestep learned with the same seed ("learned table"), the same shuffled over its cells, reversed in
time, with randomly chosen tokens, with routers that stay at their start; and a hand-made table that is linear in the
noise level. Training-free, on the dense arm's model at a uniform ratio: merging (package tomesd), random dropping.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import MergedLayer, RandomLayer, TwoBranchLayer, scaled, use

from diffratio_mod import DiT, RoutedLayer, diffusion_loss, even_noise_levels
from sample import Parser, build_model, read_checkpoint, replacing, run_command, sampling_flops
from train_cifar import Pictures, Shapes, load_folder, start

LEARNING = ("dense", "uniform", "layer", "layer-timestep", "two-branch")
FIXED = ("learned table", "shuffled", "reversed", "linear", "random router", "frozen router")
TRAINING_FREE = ("merging", "random dropping")
ARMS = LEARNING + FIXED + TRAINING_FREE


def table_of(arm: str, learned: Tensor, target: float, seed: int) -> Tensor:
    """The fixed table (L, R) of a control, from the one that layer-timestep has learned."""
    if arm == "shuffled":
        order = torch.randperm(learned.numel(), generator=torch.Generator().manual_seed(seed))
        return learned.flatten()[order].view_as(learned)
    if arm == "reversed":
        return learned.flip(1)
    if arm == "linear":
        return scaled(torch.linspace(0.05, 1, learned.shape[1]).expand_as(learned), target)
    return learned


def held_out(args: argparse.Namespace, size: int) -> Shapes | Pictures:
    """Data that training does not use: fresh shapes, or the folder test/."""
    return Shapes(size) if args.dataset == "shapes" else load_folder(args.data_dir, size, "test")


@torch.no_grad()
def losses_by_region(
    model: DiT, data: Shapes | Pictures, batches: int, ratios: Tensor | None = None
) -> list[list[float]]:
    """Mean loss of each region for each batch of 16 images a region: batches x R."""
    R, rng = model.config.regions, torch.Generator().manual_seed(12345)
    torch.manual_seed(0)  # for layers that choose at random
    learned = model.ratios.detach().clone()
    if ratios is not None:
        model.ratios.data = ratios
    rows = []
    for _ in range(batches):
        images, captions, _ = data.batch(16 * R, rng)
        t, eps = even_noise_levels(16 * R, rng), torch.randn(images.shape, generator=rng)
        losses = diffusion_loss(model, images, model.config.encode(captions), torch.ones_like(images[:, :1]), t, eps)
        rows.append(losses.view(R, -1).mean(dim=1).tolist())
    model.ratios.data = learned
    return rows


def fine_tune(arm: str, seed: int, args: argparse.Namespace, learned: Tensor | None) -> DiT:
    """Train one arm and return its averaged model."""
    given = {"dataset": args.dataset, "data-dir": str(args.data_dir), "init": str(args.init), "seed": seed}
    given |= {"steps": args.steps, "batch-size": args.batch_size, "target-ratio": args.target, "noise-weight": 0.0}
    given |= {"ratio-lr": args.ratio_lr, "device": args.device, "save-every": 10**9, "log-every": 10}
    given["mode"] = arm if arm in ("dense", "uniform", "layer") else "layer-timestep"
    given["out"] = str(args.runs / f"{args.dataset}-{args.target}-{seed}-{arm.replace(' ', '-')}")
    for name in ("checkpoint.pt", "metrics.jsonl"):  # of an arm that was stopped
        (Path(given["out"]) / name).unlink(missing_ok=True)
    run = start(given)
    kind = {"two-branch": TwoBranchLayer, "random router": RandomLayer}.get(arm, RoutedLayer)
    use(run.model, kind), use(run.ema, kind)
    if arm in FIXED:
        assert learned is not None
        run.model.ratios.data.copy_(table_of(arm, learned, args.target, seed))
        run.model.ratios.requires_grad_(False)
    if arm == "frozen router":
        for layer in run.model.layers:
            layer.router.requires_grad_(False)
    run.out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=args.steps, desc=f"seed {seed}, {arm}", leave=False) as bar:
        while run.step < args.steps:
            bar.set_postfix_str(f"loss {run.train_step():.4f}")
            bar.update()
            if run.step % 10 == 0:
                run.log()
    run.save()
    return run.ema


def measure(arm: str, seed: int, args: argparse.Namespace, results: dict) -> dict:
    """Train and measure one arm."""
    path = args.runs / f"{args.dataset}-{args.target}-{seed}-dense" / "checkpoint.pt"
    if arm in TRAINING_FREE:
        model = build_model(read_checkpoint(path), path)
        model = use(rebuilt(model, "uniform"), MergedLayer if arm == "merging" else RandomLayer)
        model.ratios.data.fill_(args.target)
    else:
        learned = results.get(f"{seed}, layer-timestep", {}).get("ratios")
        model = fine_tune(arm, seed, args, None if learned is None else torch.tensor(learned))
    data = held_out(args, model.config.image_size)
    zero = torch.zeros(model.config.depth, 1)
    flops = sampling_flops(model, model.config.regions, 1)
    return {
        "losses": losses_by_region(model, data, args.batches),
        "mean ratio": float(model.ratios.detach().mean()),
        "ratios": model.ratios.tolist(),
        "FLOPs saved": 1 - flops / sampling_flops(use(model, RoutedLayer), model.config.regions, 1, zero),
    }


def rebuilt(model: DiT, mode: str) -> DiT:
    """The same weights in another mode."""
    from dataclasses import replace

    other = DiT(replace(model.config, mode=mode))
    other.load_state_dict(model.state_dict())
    return other.eval()


def paired(a: list[list[float]], b: list[list[float]]) -> tuple[float, float]:
    """Mean of (a - b) / mean b over batches, and half of its 95 % confidence interval."""
    rows = [sum(x) / len(x) - sum(y) / len(y) for x, y in zip(a, b)]
    base = sum(map(sum, b)) / sum(map(len, b))
    mean = sum(rows) / len(rows)
    deviation = math.sqrt(sum((row - mean) ** 2 for row in rows) / (len(rows) - 1))
    return mean / base, 1.96 * deviation / math.sqrt(len(rows)) / base


def report(results: dict, seeds: list[int]) -> str:
    """A table of the arms: loss of each seed, and the difference to uniform, paired."""
    lines = [
        "| arm | mean ratio | FLOPs saved | " + " | ".join(f"loss, seed {s}" for s in seeds) + " | against uniform |"
    ]
    lines.append("|---" * (4 + len(seeds)) + "|")
    for arm in ARMS:
        rows = {seed: results[f"{seed}, {arm}"] for seed in seeds if f"{seed}, {arm}" in results}
        if not rows:
            continue
        losses = [f"{sum(map(sum, r['losses'])) / sum(map(len, r['losses'])):.4f}" for r in rows.values()]
        losses += [""] * (len(seeds) - len(losses))
        against = []
        for seed, row in rows.items():
            if base := results.get(f"{seed}, uniform"):
                mean, half = paired(row["losses"], base["losses"])
                against.append(f"{mean:+.1%} ± {half:.1%}")
        first = next(iter(rows.values()))
        ratio = sum(row["mean ratio"] for row in rows.values()) / len(rows)
        saved = f"{first['FLOPs saved']:.1%}"
        lines.append(f"| {arm} | {ratio:.3f} | {saved} | " + " | ".join(losses) + f" | {', '.join(against)} |")
    return "\n".join(lines)


def draw_chart(results: dict, path: Path) -> None:
    """Loss by timestep region against the dense arm of the same seed, mean over seeds; the learned ratios beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4))
    for arm in ARMS:
        curves = []
        for name, row in results.items():
            seed, kind = name.split(", ", 1)
            if kind == arm and arm != "dense" and f"{seed}, dense" in results:
                mine, dense = (torch.tensor(r["losses"]).mean(dim=0) for r in (row, results[f"{seed}, dense"]))
                curves.append(100 * (mine / dense - 1))
        if curves and arm not in TRAINING_FREE:
            curve = torch.stack(curves).mean(dim=0)
            left.plot([(c + 0.5) / len(curve) for c in range(len(curve))], curve, marker="o", label=arm)
        for name, row in results.items():
            if arm == "layer-timestep" and name.endswith(", layer-timestep"):
                mean = torch.tensor(row["ratios"]).mean(dim=0)
                right.plot([(c + 0.5) / len(mean) for c in range(len(mean))], mean, marker="o", label="seed " + name[0])
    left.set(xlabel="noise level t", ylabel="held-out loss above the dense arm, %")
    right.set(xlabel="noise level t", ylabel="learned ratio, mean over layers", ylim=(0, 1))
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True, help="dense checkpoint")
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--target", type=float, default=0.3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=40)
    parser.add_argument("--ratio-lr", type=float, default=0.01)
    parser.add_argument("--batches", type=int, default=24, help="held-out batches of 16 images a region")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    path = Path(__file__).with_name(f"compare-{args.dataset}-{args.target}.json")
    results = json.loads(path.read_text()) if path.exists() else {}
    seeds = list(range(args.seeds))
    for seed in seeds:
        for arm in sorted(args.arms, key=ARMS.index):
            if f"{seed}, {arm}" not in results:
                results[f"{seed}, {arm}"] = measure(arm, seed, args, results)
                with replacing(path) as file:
                    file.write(json.dumps(results).encode())
    print(report(results, seeds))
    draw_chart(results, path.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
