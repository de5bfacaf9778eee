"""The paper's ablation with controls: every arm fine-tunes one dense checkpoint on the same batches at one mean ratio.

    pip install tomesd matplotlib
    python experiments/compare.py --init assets/shapes_dense.pt --dataset shapes
    python experiments/compare.py --init assets/cifar_dense.pt --dataset folder --data-dir data/cifar10-jpeg

About two minutes and a half an arm and seed on a CPU core. The measure is the denoising loss on images that no arm has
seen, by timestep region, with the same images and noise for all arms: differences are paired. An arm whose result is in
--runs already is not run again, so a study that was stopped goes on. Leaves compare-DATASET-TARGET.json and .png beside
this file, or what --out names.

Arms: dense; layer-timestep; uniform, at the mean ratio that layer-timestep has reached; layer; two-branch (the paper's
gradient). Controls, all with a fixed table: the table that layer-timestep has learned with the same seed ("learned
table"), the same shuffled over its cells, reversed in time, with randomly chosen tokens, with routers that stay at their
start; and a hand-made table that is linear in the noise level. Training-free, on the dense arm's model at a uniform
ratio: merging (package tomesd), random dropping.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import MergedLayer, RandomLayer, TwoBranchLayer, scaled, use

from diffratio_mod import DiT, InputError, RoutedLayer, diffusion_loss, even_noise_levels, schedule
from sample import Parser, build_model, encode, pick_device, read_checkpoint, replacing, run_command, sampling_flops
from train_cifar import Pictures, Shapes, load_folder, start

LEARNING = ("dense", "layer-timestep", "uniform", "layer")
FIXED = ("shuffled", "reversed", "linear", "random router", "frozen router", "learned table")
TRAINING_FREE = ("merging", "random dropping")
ARMS = LEARNING + FIXED + ("two-branch",) + TRAINING_FREE


def table_of(arm: str, learned: Tensor, seed: int) -> Tensor:
    """The fixed table (L, R) of a control, from the one that layer-timestep has learned."""
    if arm == "shuffled":
        order = torch.randperm(learned.numel(), generator=torch.Generator().manual_seed(seed))
        return learned.flatten()[order].view_as(learned)
    if arm == "reversed":
        return learned.flip(1)
    if arm == "linear":
        return scaled(torch.linspace(0.05, 1, learned.shape[1]).expand_as(learned), float(learned.mean()))
    return learned


def held_out(args: argparse.Namespace, size: int) -> Shapes | Pictures:
    """Data that training does not use: fresh shapes, or the folder test/."""
    return Shapes(size) if args.dataset == "shapes" else load_folder(args.data_dir, size, "test")


@torch.no_grad()
def held_out_losses(model: DiT, data: Shapes | Pictures, batches: int) -> dict[str, list[list[float]]]:
    """Mean loss of each region for each batch of 16 images a region: batches x R, in the noise and in the velocity v."""
    R, rng, device = model.config.regions, torch.Generator().manual_seed(12345), model.ratios.device
    torch.manual_seed(0)  # for layers that choose at random
    rows: dict[str, list[list[float]]] = {"noise": [], "v": []}
    for _ in range(batches):
        images, captions, _ = data.batch(16 * R, rng)
        t, eps = even_noise_levels(16 * R, rng), torch.randn(images.shape, generator=rng)
        given = (images, encode(model.config, captions), torch.ones_like(images[:, :1]))
        losses = diffusion_loss(model, *(z.to(device) for z in given), t, eps.to(device)).cpu()
        for name, weighted in (("noise", losses), ("v", losses / schedule(t)[0] ** 2)):
            rows[name].append([round(value, 7) for value in weighted.view(R, -1).mean(dim=1).tolist()])
    return rows


def mean(rows: list[list[float]]) -> float:
    return sum(map(sum, rows)) / sum(map(len, rows))


def folder(args: argparse.Namespace, seed: int, arm: str) -> Path:
    study = args.dataset if arm == "dense" else f"{args.dataset}-{args.target}"  # dense is the same at all targets
    return args.runs / study / f"{seed}-{arm.replace(' ', '-')}"


def fine_tune(arm: str, seed: int, args: argparse.Namespace, learned: Tensor | None) -> tuple[DiT, list[DiT]]:
    """Train one arm; return its averaged model, and what that was each time the mean ratio had grown by 0.05."""
    given = {"dataset": args.dataset, "data-dir": str(args.data_dir), "init": str(args.init), "seed": seed}
    given |= {"steps": args.steps, "batch-size": args.batch_size, "target-ratio": args.target}
    given |= {"noise-weight": args.noise_weight, "routed-noise-weight": args.noise_weight}
    given |= {"ratio-lr": args.ratio_lr, "every-nth-region": args.every_nth_region}
    given |= {"device": args.device, "out": str(folder(args, seed, arm))}
    given["mode"] = arm if arm in ("dense", "uniform", "layer") else "layer-timestep"
    if learned is None and arm in ("uniform", *FIXED):
        raise InputError(f"{arm!r} needs what layer-timestep has learned with seed {seed}: run that arm first")
    if arm == "uniform" and learned is not None:
        given["target-ratio"] = float(learned.mean())  # what layer-timestep has reached, so that FLOPs are equal
    for name in ("checkpoint.pt", "metrics.jsonl"):  # of an arm that was stopped
        (Path(given["out"]) / name).unlink(missing_ok=True)
    run = start(given)
    kind = {"two-branch": TwoBranchLayer, "random router": RandomLayer}.get(arm, RoutedLayer)
    use(run.model, kind), use(run.ema, kind)
    if arm in FIXED and learned is not None:
        run.model.ratios.data.copy_(table_of(arm, learned, seed))
        run.model.ratios.requires_grad_(False)
    if arm == "frozen router":
        for layer in run.model.layers:
            layer.router.requires_grad_(False)
    run.out.mkdir(parents=True, exist_ok=True)
    kept: list[DiT] = []
    with tqdm(total=args.steps, desc=f"seed {seed}, {arm}", leave=False, mininterval=5) as bar:
        while run.step < args.steps:
            bar.set_postfix_str(f"loss {run.train_step():.4f}", refresh=False)
            bar.update()
            if run.step % 10 == 0:
                run.log()
            if arm == "layer-timestep" and float(run.ema.ratios.detach().mean()) >= 0.05 * (len(kept) + 1):
                kept.append(copy.deepcopy(run.ema))
    run.save()
    return run.ema, kept


def measure(arm: str, seed: int, args: argparse.Namespace) -> dict:
    """Train and measure one arm."""
    if arm in TRAINING_FREE:
        path = folder(args, seed, "dense") / "checkpoint.pt"
        model, kept = build_model(read_checkpoint(path), path), []
        model = use(rebuilt(model, "uniform"), MergedLayer if arm == "merging" else RandomLayer)
        model.to(pick_device(args.device))
        model.ratios.data.fill_(args.target)
    else:
        path = folder(args, seed, "layer-timestep") / "result.json"
        learned = torch.tensor(json.loads(path.read_text())["ratios"]) if path.exists() else None
        model, kept = fine_tune(arm, seed, args, learned)
    data = held_out(args, model.config.image_size)
    flops = sampling_flops(model, model.config.regions, 1)
    result = {
        "losses": held_out_losses(model, data, args.batches),
        "mean ratio": float(model.ratios.detach().mean()),
        "ratios": model.ratios.tolist(),
    }
    if kept:
        result["on the way"] = [
            {
                "mean ratio": float(m.ratios.detach().mean()),
                "loss": mean(held_out_losses(m, data, args.batches)["noise"]),
            }
            for m in kept
        ]
    zero = torch.zeros(model.config.depth, 1)
    result["FLOPs saved"] = 1 - flops / sampling_flops(use(model, RoutedLayer), model.config.regions, 1, zero)
    return result


def settings(args: argparse.Namespace) -> dict:
    """What must be alike in all arms of a study; the target has a folder of its own."""
    names = ("init", "data_dir", "steps", "batch_size", "ratio_lr", "every_nth_region", "noise_weight", "batches")
    return {name: str(value) if isinstance(value := getattr(args, name), Path) else value for name in names}


def measured(arm: str, seed: int, args: argparse.Namespace) -> dict | None:
    """What an earlier call has measured, or None. Raises InputError if its settings were others."""
    path = folder(args, seed, arm) / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    if result.get("settings") != settings(args):
        was = result.get("settings")
        raise InputError(f"{path} was measured with {was}, not {settings(args)}; give another --runs")
    return result


def rebuilt(model: DiT, mode: str) -> DiT:
    """The same weights in another mode."""
    other = DiT(replace(model.config, mode=mode))
    other.load_state_dict(model.state_dict())
    return other.eval()


def paired(a: list[list[float]], b: list[list[float]]) -> tuple[float, float]:
    """Mean of (a - b) / mean b over batches, and half of its 95 % confidence interval."""
    rows = [sum(x) / len(x) - sum(y) / len(y) for x, y in zip(a, b)]
    difference = sum(rows) / len(rows)
    deviation = math.sqrt(sum((row - difference) ** 2 for row in rows) / (len(rows) - 1))
    return difference / mean(b), 1.96 * deviation / math.sqrt(len(rows)) / mean(b)


def report(results: dict, kind: str) -> str:
    """A table of the arms: held-out loss, and for each seed the paired difference to dense and to uniform.

    kind: the loss in the noise ("noise"), which is trained, or in the velocity ("v"), which weighs noisy levels more.
    """
    lines = [
        f"Held-out loss in {kind}:",
        "| arm | mean ratio | FLOPs saved | loss | against dense, a seed each | against uniform |",
        "|---" * 6 + "|",
    ]
    for arm in ARMS:
        rows = {name.split(", ")[0]: row for name, row in results.items() if name.split(", ")[1] == arm}
        if not rows:
            continue
        against = []
        for base in ("dense", "uniform"):
            pairs = [
                paired(row["losses"][kind], results[f"{seed}, {base}"]["losses"][kind])
                for seed, row in rows.items()
                if f"{seed}, {base}" in results and arm != base
            ]
            against.append(", ".join(f"{difference:+.2%} ± {half:.2%}" for difference, half in pairs))
        average = [sum(row[key] for row in rows.values()) / len(rows) for key in ("mean ratio", "FLOPs saved")]
        loss = sum(mean(row["losses"][kind]) for row in rows.values()) / len(rows)
        lines.append(f"| {arm} | {average[0]:.3f} | {average[1]:.1%} | {loss:.5f} | {against[0]} | {against[1]} |")
    return "\n".join(lines)


def tables(results: dict) -> str:
    """What layer-timestep has learned: the ratio by region, and the loss of the models on the way."""
    lines = []
    for name, row in results.items():
        if name.endswith(", layer-timestep"):
            by_region = torch.tensor(row["ratios"]).mean(dim=0)
            order = by_region.argsort().argsort().float()  # without ties, so this is Spearman's
            rank = torch.corrcoef(torch.stack([order, torch.arange(len(order)).float()]))[0, 1]
            table = " ".join(f"{ratio:.2f}" for ratio in by_region)
            lines.append(f"{name}: ratio by region, clean to noisy, {table}; rank correlation {rank:.2f}")
            way = ", ".join(f"{one['loss']:.4f} at {one['mean ratio']:.2f}" for one in row.get("on the way", []))
            lines.append(f"    loss on the way to a mean of {row['mean ratio']:.3f}: {way}")
    return "\n".join(lines)


def draw_chart(results: dict, path: Path) -> None:
    """Loss by timestep region against dense; learned ratios by region; quality on the way. Means over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(16, 4.4))
    for arm in ARMS:
        curves = []
        for name, row in results.items():
            seed, kind = name.split(", ", 1)
            if kind == arm and arm != "dense" and f"{seed}, dense" in results:
                both = (row, results[f"{seed}, dense"])
                mine, dense = (torch.tensor(one["losses"]["noise"]).mean(dim=0) for one in both)
                curves.append(100 * (mine / dense - 1))
        if curves and arm not in TRAINING_FREE:
            curve = torch.stack(curves).mean(dim=0)
            left.plot([(c + 0.5) / len(curve) for c in range(len(curve))], curve, marker="o", label=arm)
    for name, row in results.items():
        seed, kind = name.split(", ", 1)
        if kind == "layer-timestep":
            by_region = torch.tensor(row["ratios"]).mean(dim=0)
            middle.plot(
                [(c + 0.5) / len(by_region) for c in range(len(by_region))], by_region, "o-", label="seed " + seed
            )
            way = [*row.get("on the way", []), {"mean ratio": row["mean ratio"], "loss": mean(row["losses"]["noise"])}]
            right.plot([w["mean ratio"] for w in way], [w["loss"] for w in way], "o-", label="seed " + seed)
    left.set(xlabel="noise level t", ylabel="held-out loss above the dense arm, %")
    middle.set(xlabel="noise level t", ylabel="learned ratio, mean over layers", ylim=(0, 1))
    right.set(xlabel="mean ratio, on the way to its target", ylabel="held-out loss")
    left.set_ylim(top=left.get_ylim()[1] + 0.35 * (left.get_ylim()[1] - left.get_ylim()[0]))  # room for the legend
    for axis in (left, middle, right):
        axis.set_visible(bool(axis.lines))  # a study of one arm compares nothing
        if axis.lines:
            axis.legend(fontsize=8, loc="upper left", ncols=3 if axis is left else 1)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90, bbox_inches="tight")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True, help="dense checkpoint")
    parser.add_argument("--dataset", default="shapes", choices=("shapes", "folder"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--target", type=float, default=0.3)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=40)
    parser.add_argument("--ratio-lr", type=float, default=0.01)
    parser.add_argument("--every-nth-region", type=int, default=1)
    parser.add_argument("--noise-weight", type=float, default=0.0, help="2: fine-tune all arms with the loss in v")
    parser.add_argument("--batches", type=int, default=16, help="held-out batches of 16 images a region")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--out", type=Path, help="JSON; the picture goes beside it")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    every = list(itertools.product(ARMS, sorted({*range(100), *args.seeds})))
    for arm, seed in every:  # before anything is trained: all that is there must have been measured alike
        measured(arm, seed, args)
    for seed in args.seeds:
        for arm in (arm for arm in ARMS if arm in args.arms):
            if measured(arm, seed, args) is None:
                result = {"settings": settings(args)} | measure(arm, seed, args)
                path = folder(args, seed, arm) / "result.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as file:
                    file.write(json.dumps(result).encode())
    results = {}
    for arm, seed in every:  # also what other calls have measured
        result = measured(arm, seed, args)
        if result is not None:
            results[f"{seed}, {arm}"] = result
    print("\n\n".join([report(results, "noise"), report(results, "v"), tables(results)]))
    path = args.out or Path(__file__).with_name(f"compare-{args.dataset}-{args.target}.json")
    with replacing(path) as file:
        file.write(json.dumps({"steps": args.steps, "batch size": args.batch_size} | results).encode())
    draw_chart(results, path.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
