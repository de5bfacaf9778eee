"""The paper's ablation with controls: every arm fine-tunes one dense checkpoint on the same batches at one mean ratio.

    pip install tomesd matplotlib
    python experiments/compare.py --dataset shapes --init assets/shapes_dense.pt
    python experiments/compare.py --dataset folder --data-dir data/cifar10-jpeg --init assets/cifar_dense.pt

All other flags are those of train_cifar.py (--steps 300 and --batch-size 40 if not given). Two minutes and a half an
arm and seed on a CPU core. Measured is the denoising loss on images that no arm has seen, by timestep region, with the
same images and noise for all: differences are paired. What lies in --runs already is not run again, so a study that
was stopped goes on. Leaves compare-DATASET-TARGET.json and .png in experiments/results/, or what --out names.

Arms: dense; layer-timestep; uniform, at the mean ratio that layer-timestep has reached; layer; two-branch (the
paper's gradient). Controls, all with a fixed table: the table that layer-timestep has learned with the same seed
("learned table"), the same shuffled over its cells, reversed in time, with randomly chosen tokens, with routers that
stay at their start; and a hand-made table that is linear in the noise level. Pruned: a dense model without as many of
its layers, those that are missed least. Training-free, on the dense arm's model at a uniform ratio: merging (package
tomesd), random dropping.
"""

import argparse
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import rivals
import torch
from common import RESULTS, flops, held_out_losses, package, scaled, write_json

from diffratio_mod import DiT, InputError
from sample import Parser, number, pick_device, read_checkpoint, replace_file, run_command, sampling_flops
from train_cifar import fill_defaults, load_data, make_parser, start_run, train

FIXED = ("shuffled", "reversed", "linear", "random tokens", "frozen router", "learned table")
TRAINING_FREE = ("merging", "random dropping")
ARMS = ("dense", "layer-timestep", "uniform", "layer", *FIXED, "two-branch", "pruned", *TRAINING_FREE)
KINDS = {
    "two-branch": rivals.TwoBranchLayer,
    "merging": rivals.MergedLayer,
    "random tokens": rivals.RandomLayer,
    "random dropping": rivals.RandomLayer,
}


def settings(args: argparse.Namespace, arm: str, seed: int) -> argparse.Namespace:
    """The settings of train_cifar.py for one arm."""
    study = args.base.dataset + (f"-{args.target}" if arm != "dense" else "")  # dense is the same at all targets
    s = argparse.Namespace(**vars(args.base))
    s.out = str(args.runs / study / f"{seed}-{arm.replace(' ', '-')}")
    s.seed = seed
    s.target_ratio = args.target
    s.mode = arm if arm in ("dense", "uniform", "layer") else "layer-timestep"
    if arm == "pruned":
        s.mode = "dense"
        s.depth -= round(args.target * args.base.depth)
        s.init = f"{s.out}/init.pt"
    return s


def prune(args: argparse.Namespace, s: argparse.Namespace) -> None:
    """Write the dense checkpoint without those layers whose loss is felt least, taken out one after another."""
    model, _ = read_checkpoint(Path(args.base.init))
    data = load_data(args.base)
    while len(model.layers) > s.depth:
        costs = []
        layers = model.layers
        for i in range(len(layers)):
            model.layers = layers[:i] + layers[i + 1 :]
            costs.append(float(torch.tensor(held_out_losses(model, data, 1)["v"]).mean()))
        worst = costs.index(min(costs))
        model.layers = layers[:worst] + layers[worst + 1 :]
    state = model.state_dict() | {"ratios": torch.zeros(s.depth, 1)}
    with replace_file(Path(s.init)) as file:
        torch.save({"config": asdict(replace(model.config, depth=s.depth, mode="dense")), "ema": state}, file)


def measured(args: argparse.Namespace, arm: str, seed: int) -> dict | None:
    """What an earlier call has measured, or None. Raises InputError if its settings were others."""
    path = Path(settings(args, arm, seed).out) / "result.json"
    result = json.loads(path.read_text()) if path.exists() else None
    if result and result["settings"] != args.alike:
        raise InputError(f"{path} was measured with other settings, {result['settings']}; give another --runs")
    return result


def fine_tune(args: argparse.Namespace, arm: str, seed: int) -> DiT:
    """Train one arm; returns its averaged model."""
    s = settings(args, arm, seed)
    learned = measured(args, "layer-timestep", seed)
    if learned is None and arm in ("uniform", *FIXED):
        raise InputError(f"{arm!r} needs what layer-timestep has learned with seed {seed}: run that arm first")
    if arm == "uniform":
        s.target_ratio = learned["mean ratio"]  # what layer-timestep has reached, so that FLOPs are equal
    if arm in FIXED:
        table = torch.tensor(learned["ratios"])  # (L, R)
        order = torch.randperm(table.numel(), generator=torch.Generator().manual_seed(seed))
        line = torch.linspace(0.05, 1, table.shape[1]).expand_as(table)
        others = {"shuffled": table.flatten()[order].view_as(table), "reversed": table.flip(1)}
        table = (others | {"linear": scaled(line, learned["mean ratio"])}).get(arm, table)
    if arm == "pruned":
        prune(args, s)
    run = start_run(s)
    if arm in KINDS:
        rivals.use(run.model, KINDS[arm])
        rivals.use(run.ema, KINDS[arm])
    if arm in FIXED:
        run.model.ratios.data.copy_(table)
        run.model.ratios.requires_grad_(False)
    if arm == "frozen router":
        for layer in run.model.layers:
            layer.router.requires_grad_(False)
    print(f"seed {seed}, {arm}", flush=True)
    train(run, Path(s.out), pictures=False)
    return run.ema


def measure(args: argparse.Namespace, arm: str, seed: int) -> dict:
    """Train and measure one arm."""
    if arm in TRAINING_FREE:
        dense, _ = read_checkpoint(Path(settings(args, "dense", seed).out) / "checkpoint.pt")
        model = DiT(replace(dense.config, mode="uniform")).eval()
        model.load_state_dict(dense.state_dict())
        model.ratios.data.fill_(args.target)
        rivals.use(model.to(pick_device(args.base.device)), KINDS[arm])
    else:
        model = fine_tune(args, arm, seed)
    ratios = model.ratios.detach()
    R = model.config.regions
    whole = replace(model.config, depth=args.base.depth)
    dense_flops = sampling_flops(whole, torch.zeros(args.base.depth, 1), R, 1)
    return {
        "settings": args.alike,
        "losses": held_out_losses(model, load_data(args.base, "test"), args.batches),
        "FLOPs saved": 1 - flops(model, ratios, R) / dense_flops,
        "mean ratio": float(ratios.mean()),
        "ratios": ratios.tolist(),
    }


def paired(mine: dict, base: dict, kind: str) -> str:
    """Mean of (mine - base) / mean base over the batches, and half of its 95 % confidence interval."""
    a, b = (torch.tensor(row["losses"][kind], dtype=torch.float64).mean(dim=1) for row in (mine, base))
    half = 1.96 * (a - b).std() / len(b) ** 0.5
    return f"{float((a - b).mean() / b.mean()):+.2%} ± {float(half / b.mean()):.2%}"


def report(results: dict, kind: str) -> None:
    """Print a table of the arms. kind: the loss in "v", which is trained, or in the "noise"."""
    print(f"\nHeld-out loss in {kind}, means over the seeds, and paired differences of each seed:")
    print("| arm | mean ratio | FLOPs saved | loss | against dense | against uniform |\n" + "|---" * 6 + "|")
    for arm in dict.fromkeys(name for _, name in results):
        rows = {seed: row for (seed, name), row in results.items() if name == arm}
        losses = torch.tensor([row["losses"][kind] for row in rows.values()])
        ratio, saved = (sum(row[key] for row in rows.values()) / len(rows) for key in ("mean ratio", "FLOPs saved"))
        against = []
        for base in ("dense", "uniform"):
            pairs = [(row, results.get((seed, base))) for seed, row in rows.items() if arm != base]
            against.append(", ".join(paired(*pair, kind) for pair in pairs if pair[1]))
        print(f"| {arm} | {ratio:.3f} | {saved:.1%} | {losses.mean():.5f} | {against[0]} | {against[1]} |")


def draw_chart(results: dict, path: Path) -> None:
    """Loss by timestep region against dense, mean over the seeds."""
    package("matplotlib").use("Agg")
    figure, axis = package("matplotlib.pyplot").subplots(figsize=(9, 5))
    axis.set_prop_cycle(color=package("matplotlib").colormaps["tab20"].colors)
    losses = {key: torch.tensor(row["losses"]["noise"]).mean(dim=0) for key, row in results.items()}
    for arm in (arm for arm in ARMS if arm not in ("dense", *TRAINING_FREE)):
        pairs = [(losses[key], losses.get((key[0], "dense"))) for key in losses if key[1] == arm]
        above = [100 * (mine / dense - 1) for mine, dense in pairs if dense is not None]
        if above:
            curve = torch.stack(above).mean(dim=0)
            axis.plot((torch.arange(len(curve)) + 0.5) / len(curve), curve, "o-", label=arm)
    axis.set(xlabel="noise level t", ylabel="held-out loss above the dense arm, %")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=90, bbox_inches="tight")


def main() -> None:
    parser = Parser(__doc__)
    parser.allow_abbrev = False  # --seed is no short form of --seeds
    parser.add_argument("--target", type=number(float, 0, 0.99), default=0.3, help="mean ratio (default 0.3)")
    parser.add_argument("--seeds", type=number(int, 0, 99), nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--batches", type=number(int, 2, 10**4), default=16, help="held out, 16 images a region")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--out", type=Path, help="JSON; the chart goes beside it")
    args, others = parser.parse_known_args()
    flags = ["--steps=300", "--batch-size=40", *others, "--dense-steps=0"]
    args.base = fill_defaults(make_parser().parse_args(flags))
    if args.base.dataset not in ("shapes", "folder") or not args.base.init:
        raise InputError("give a dense checkpoint as --init, and --dataset shapes or folder, which have held-out data")
    alike = ("init", "data_dir", "steps", "batch_size", "lr", "muon_lr", "noise", "ratio_lr", "ratio_weight", "amp")
    args.alike = {name: getattr(args.base, name) for name in alike} | {"batches": args.batches}
    every = list(itertools.product(ARMS, range(100)))
    for arm, seed in every:  # before anything is trained: all that is there must have been measured alike
        measured(args, arm, seed)
    for seed, arm in itertools.product(args.seeds, (arm for arm in ARMS if arm in args.arms)):
        if not measured(args, arm, seed):
            write_json(measure(args, arm, seed), Path(settings(args, arm, seed).out) / "result.json")
    results = {(seed, arm): found for arm, seed in every if (found := measured(args, arm, seed))}  # other calls' too
    report(results, "noise")
    report(results, "v")
    for (seed, arm), row in results.items():
        if arm == "layer-timestep":
            by_region = " ".join(f"{ratio:.2f}" for ratio in torch.tensor(row["ratios"]).mean(dim=0))
            print(f"seed {seed}, learned ratio by region, clean to noisy: {by_region}")
    path = args.out or RESULTS / f"compare-{args.base.dataset}-{args.target}.json"
    write_json({f"{seed}, {arm}": result for (seed, arm), result in results.items()}, path)
    draw_chart(results, path.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
