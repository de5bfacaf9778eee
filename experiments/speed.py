"""Seconds against FLOPs: sampling, the parts of a routed layer, a training step, token merging, the dense model itself.

    pip install tomesd matplotlib
    python experiments/speed.py --rounds 8                     # 22 minutes on two CPU cores
    python experiments/speed.py --device cuda --amp --batch-scale 8 [--compile]

All that is compared runs interleaved, round after round, in this one process; a figure is the median over the rounds of
its time divided by the baseline's time of the same round, its spread half the distance of the quartiles. On a noisy
machine the least times tell more: what they save is printed last. Weights are random: they do not change what is
computed. Leaves experiments/speed.json and experiments/speed.png.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import MergedLayer, TwoBranchLayer, scaled, use

from diffratio_mod import Config, DiT, RoutedLayer, diffusion_loss, even_noise_levels, ratio_loss
from diffratio_mod import sample as draw
from sample import READY_MADE, Parser, pick_device, read_checkpoint, round_k, run_command, sampling_flops
from train_cifar import every_nth_region

WORDS = tuple(f"w{i}" for i in range(40))
MEANS = (0.1, 0.2, 0.3, 0.5, 0.7)
STEPS = 5  # of sampling, one for each column of the tables


@dataclass(frozen=True)
class Case:
    tokens: int
    dim: int
    depth: int
    heads: int
    batch: int  # images that run together; with guidance, twice the number of images that are made

    def __str__(self) -> str:
        return f"{self.tokens} tokens, width {self.dim}, {self.depth} layers, batch {self.batch}"

    def model(self, mode: str, device: torch.device) -> DiT:
        side = round(self.tokens**0.5)
        torch.manual_seed(0)
        model = DiT(Config(WORDS, side * 2, 2, self.dim, self.depth, self.heads, mode=mode, regions=STEPS))
        for name, parameter in model.named_parameters():
            if name != "ratios":
                torch.nn.init.normal_(parameter, std=0.02)  # also the routers and the gates
        return model.to(device).eval()


CASES = (
    Case(64, 128, 6, 4, 2),
    Case(64, 128, 6, 4, 32),
    Case(256, 128, 6, 2, 16),
    Case(256, 384, 4, 6, 1),
    Case(256, 384, 4, 6, 16),
    Case(1024, 384, 4, 6, 4),
)


def learned_table(depth: int, mean: float) -> Tensor:
    """The ready-made shapes model's table in this many layers and STEPS columns, scaled to a mean."""
    checkpoint = read_checkpoint(READY_MADE)
    table = F.interpolate(checkpoint["ema"]["ratios"].float()[None, None], (depth, STEPS), mode="area")[0, 0]
    # A cell that skips less than half a token where it was learned skips nothing; so it must be where tokens are more.
    nothing = scaled(table, mean) < 0.5 / Config(**checkpoint["config"]).tokens
    return scaled(table.masked_fill(nothing, 0), mean)


def interleaved(
    functions: dict[str, Callable], rounds: int, device: torch.device, label: str
) -> dict[str, list[float]]:
    """Seconds of every function in every round; a first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in tqdm(range(rounds + 1), desc=label, leave=False):
        for name, function in functions.items():
            wait(device)
            start = time.perf_counter()
            function()
            wait(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def relative(seconds: list[float], base: list[float]) -> tuple[float, float]:
    """Median and spread of the quotients, round by round."""
    quotients = [a / b for a, b in zip(seconds, base)]
    quarter = statistics.quantiles(quotients, n=4) if len(quotients) > 1 else [quotients[0]] * 3
    return statistics.median(quotients), (quarter[2] - quarter[0]) / 2


def peak_memory(function: Callable, device: torch.device) -> float:
    """The most that is allocated at one time while the function runs, beside the weights and the inputs, in MB."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 1e6


def sampling(case: Case, args: argparse.Namespace) -> list[dict]:
    """Dense, uniform and learned tables; the routed model with nothing skipped; token merging."""
    device = args.device
    dense, routed, merged = (case.model(mode, device) for mode in ("dense", "layer-timestep", "layer-timestep"))
    use(merged, MergedLayer)
    side = dense.config.image_size
    noise = torch.randn(case.batch, 3, side, side, device=device)
    words = torch.ones(case.batch, 8, dtype=torch.long, device=device)
    runs: dict[str, tuple[DiT, Tensor | None]] = {"dense": (dense, None)}
    runs["routed, nothing skipped"] = (routed, torch.zeros(case.depth, 1))
    for mean in MEANS:
        runs[f"uniform {mean}"] = (routed, torch.full((case.depth, 1), mean))
        runs[f"learned {mean}"] = (routed, learned_table(case.depth, mean))
    for mean in (0.2, 0.3, 0.5):
        runs[f"learned {mean}, k rounded to 16"] = (routed, round_k(learned_table(case.depth, mean), case.tokens, 16))
    for mean in (0.3, 0.5):
        runs[f"merging {mean}"] = (merged, torch.full((case.depth, 1), mean))
    flops = {name: sampling_flops(model, STEPS, 1, ratios) for name, (model, ratios) in runs.items()}
    if args.compile:
        runs = {name: (torch.compile(model), ratios) for name, (model, ratios) in runs.items()}

    def run(model: DiT, ratios: Tensor | None) -> Callable:
        def function() -> None:
            with torch.autocast(device.type, torch.bfloat16) if args.amp else contextlib.nullcontext():
                draw(model, words, noise, STEPS, 1, ratios=ratios)

        return function

    functions = {name: run(*one) for name, one in runs.items()}
    seconds = interleaved(functions, args.rounds, device, str(case))
    rows = []
    for name in runs:
        time_left, spread = relative(seconds[name], seconds["dense"])
        row = {"case": str(case), "table": name, "seconds": statistics.median(seconds[name]), "spread": spread}
        row |= {"FLOPs saved": 1 - flops[name] / flops["dense"], "time saved": 1 - time_left}
        row["quotient"] = row["time saved"] / row["FLOPs saved"] if row["FLOPs saved"] > 0.01 else None
        row["time saved, least times"] = 1 - min(seconds[name]) / min(seconds["dense"])
        if not args.compile and name in ("dense", "uniform 0.3", "learned 0.3", "uniform 0.7", "merging 0.3"):
            row["peak MB"] = peak_memory(functions[name], device)
        rows.append(row)
    return rows


def crossover(rows: list[dict]) -> float:
    """The smallest share of FLOPs saved at which a uniform table saves time, by linear interpolation."""
    points = [(0.0, next(row for row in rows if row["table"] == "routed, nothing skipped")["time saved"])]
    points += [(row["FLOPs saved"], row["time saved"]) for row in rows if row["table"].startswith("uniform")]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 > 0:
            return 0.0 if y0 >= 0 else x0 + (x1 - x0) * -y0 / (y1 - y0)
    return float("inf")


def parts(case: Case, args: argparse.Namespace) -> dict:
    """Each part of RoutedLayer.forward on its own, at a ratio of 0.3, as a share of the whole."""
    device, B, N, D = args.device, case.batch, case.tokens, case.dim
    layer = case.model("layer-timestep", device).layers[0]
    x = torch.randn(B, N, D, device=device)
    condition, caption = torch.randn(B, 6, D, device=device), torch.randn(B, 8, D, device=device)
    k = round(0.7 * N)
    score = torch.rand(B, N, 1, device=device)
    rows = (score[:, :, 0].argsort(1)[:, :k] + N * torch.arange(B, device=device)[:, None]).flatten()
    taken = x.flatten(0, 1).index_select(0, rows).view(B, k, D)

    def gather() -> None:
        x.flatten(0, 1).index_select(0, rows)
        score.flatten(0, 1).index_select(0, rows)

    functions = {
        "whole": lambda: layer(x, condition, caption, k),
        "router": lambda: torch.sigmoid(layer.router(x)),
        "top-k": lambda: score.squeeze(2).argsort(dim=1, descending=True, stable=True),
        "gather": gather,
        "layer": lambda: layer.layer(taken, condition, caption, keys=k),
        "gate and scatter": lambda: x.flatten(0, 1).index_add(0, rows, (taken * score[:, :k]).flatten(0, 1)),
        "dense layer": lambda: layer(x, condition, caption, None),
    }
    with torch.no_grad():
        seconds = interleaved(functions, 8 * args.rounds, device, f"parts, {case}")
    shares = {name: relative(values, seconds["whole"])[0] for name, values in seconds.items()}
    return {"case": str(case), "k": k, "milliseconds": 1000 * statistics.median(seconds["whole"])} | shares


def attention(case: Case, args: argparse.Namespace) -> dict:
    """Time of the attention kernel at k tokens, over that at N, beside what the arithmetic says: (k / N) squared."""
    B, H, N, d = case.batch, case.heads, case.tokens, case.dim // case.heads
    sizes = sorted({round(N * share) for share in (1, 0.9, 0.75, 0.7, 0.625, 0.5)}, reverse=True)
    inputs = {k: [torch.randn(B, H, k, d, device=args.device) for _ in range(3)] for k in sizes}
    functions = {str(k): lambda qkv=qkv: F.scaled_dot_product_attention(*qkv) for k, qkv in inputs.items()}
    with torch.no_grad():
        seconds = interleaved(functions, 8 * args.rounds, args.device, f"attention, {case}")
    row: dict = {"case": str(case), "milliseconds": 1000 * statistics.median(seconds[str(N)])}
    return row | {f"{k} tokens": [relative(seconds[str(k)], seconds[str(N)])[0], (k / N) ** 2] for k in sizes if k < N}


def training(case: Case, args: argparse.Namespace) -> dict:
    """Forward, backward and optimizer: dense, one pass with learning ratios, the same with every second region in turn
    (the fifth at every step), the paper's two branches. All twice, so that each region has had its turn."""
    device, B = args.device, case.batch
    functions: dict[str, Callable] = {}
    for name in ("dense", "one pass", "every second region", "two branches"):
        mode = "dense" if name == "dense" else "layer-timestep"
        model = use(case.model(mode, device), TwoBranchLayer if name == "two branches" else RoutedLayer)
        if mode != "dense":
            model.ratios.data.copy_(learned_table(case.depth, 0.3))
        weights = [p for name, p in model.named_parameters() if name != "ratios"]
        optimizer = torch.optim.AdamW([{"params": weights}, {"params": [model.ratios], "lr": 0.0}], lr=1e-6)
        size, rng = model.config.image_size, torch.Generator().manual_seed(0)
        images = torch.rand(B, 3, size, size, generator=rng).to(device) * 2 - 1
        eps, mask = torch.randn(images.shape, generator=rng).to(device), torch.ones(B, 1, size, size, device=device)
        words, t = torch.ones(B, 8, dtype=torch.long, device=device), even_noise_levels(B, rng)
        levels = [t, t] if name != "every second region" else [every_nth_region(t, STEPS, 2, step) for step in (0, 1)]

        def steps(model=model, optimizer=optimizer, images=images, eps=eps, mask=mask, words=words, levels=levels):
            for t in levels:
                with torch.autocast(device.type, torch.bfloat16) if args.amp else contextlib.nullcontext():
                    loss = diffusion_loss(model, images, words, mask, t, eps).mean()
                (loss + ratio_loss(model.ratios, 0.3)).backward()
                optimizer.step()
                optimizer.zero_grad()

        functions[name] = steps
    seconds = interleaved(functions, args.rounds, device, f"training, {case}")
    row = {"case": str(case), "dense, seconds a step": statistics.median(seconds["dense"]) / 2}
    pairs = [(name, "dense") for name in functions if name != "dense"]
    for name, base in (*pairs, ("one pass", "two branches")):
        row[f"{name} / {base}"], row[f"{name} / {base}, spread"] = relative(seconds[name], seconds[base])
    return row


def dense_rate(case: Case, args: argparse.Namespace) -> dict:
    """The dense forward pass against a large matrix product on the same device, both in FLOPs a second."""
    device, n = args.device, 8192 if args.device.type == "cuda" else 2048
    model = case.model("dense", device)
    size, kind = model.config.image_size, torch.bfloat16 if args.amp else torch.float32
    x, t = torch.randn(case.batch, 3, size, size, device=device), torch.full((case.batch,), 0.5, device=device)
    caption, mask = (
        torch.randn(case.batch, 8, case.dim, device=device),
        torch.ones(case.batch, 1, size, size, device=device),
    )
    a, b = torch.randn(n, n, device=device, dtype=kind), torch.randn(n, n, device=device, dtype=kind)

    def forward() -> None:
        with torch.autocast(device.type, torch.bfloat16) if args.amp else contextlib.nullcontext():
            model(x, t, caption, x, mask)

    with torch.no_grad():
        seconds = interleaved({"matrix": lambda: a @ b, "dense": forward}, 3 * args.rounds, device, f"rate, {case}")
    flops = case.batch * (
        sampling_flops(model, 2, 1) - sampling_flops(model, 1, 1)
    )  # of one forward pass, without captions
    limit = 2 * n**3 / statistics.median(seconds["matrix"])
    rate = flops / statistics.median(seconds["dense"])
    row = {"case": str(case), "tokens a second": case.batch * case.tokens / statistics.median(seconds["dense"])}
    return row | {"GFLOP/s": rate / 1e9, "matrix product, GFLOP/s": limit / 1e9, "share": rate / limit}


def rounded(value: object) -> str:
    """A figure for the screen."""
    if isinstance(value, list):
        return " / ".join(map(rounded, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def draw_chart(rows: list[dict], path: Path) -> None:
    """Time saved over FLOPs saved, a curve for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axis, kind in zip(axes, ("uniform", "learned")):
        axis.plot([0, 0.75], [0, 0.75], color="0.7", linestyle="--", label="time saved = FLOPs saved")
        for case in dict.fromkeys(row["case"] for row in rows):
            mine = [row for row in rows if row["case"] == case and row["table"].startswith((kind, "routed"))]
            mine = [row for row in mine if "rounded" not in row["table"]]
            axis.plot([r["FLOPs saved"] for r in mine], [r["time saved"] for r in mine], marker="o", label=case)
        axis.set(title=f"{kind} tables", xlabel="share of FLOPs saved")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of time saved")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="of the large cases; small ones get three times as many")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--sampling-only", action="store_true", help="no parts, attention, training, dense rate")
    parser.add_argument("--batch-scale", type=int, default=1, help="multiply all batch sizes")
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile, in sampling")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    args.device = pick_device(args.device)
    cases = [Case(c.tokens, c.dim, c.depth, c.heads, c.batch * args.batch_scale) for c in CASES]
    cases = [case for case in cases if args.only in str(case)]
    results: dict = {"torch": torch.__version__, "device": str(args.device), "threads": torch.get_num_threads()}
    if args.device.type == "cuda":
        results["device"] = torch.cuda.get_device_name()
    results |= {"bfloat16": args.amp, "compile": args.compile, "rounds": args.rounds, "steps": STEPS}
    results |= {"sampling": [], "crossover": {}, "parts": [], "attention": [], "training": [], "dense rate": []}
    for case in cases:
        # Small cases are quick, and noisier.
        own = argparse.Namespace(**vars(args) | {"rounds": args.rounds * (3 if case.tokens * case.batch < 4096 else 1)})
        rows = sampling(case, own)
        results["sampling"] += rows
        results["crossover"][str(case)] = crossover(rows)
        print(f"\n{case}; routing pays from {crossover(rows):.1%} of FLOPs saved")
        for row in rows:
            quotient = "" if row["quotient"] is None else f"quotient {row['quotient']:5.2f}"
            memory = f"peak {row['peak MB']:.0f} MB" if "peak MB" in row else ""
            print(
                f"  {row['table']:29} {row['seconds']:7.3f} s  FLOPs saved {row['FLOPs saved']:6.1%}  "
                f"time saved {row['time saved']:6.1%} +- {row['spread']:.1%}  {quotient:15} {memory:12} "
                f"least times {row['time saved, least times']:6.1%}"
            )
        if case.batch > 2 and not args.sampling_only:
            for function in (parts, attention, training, dense_rate):
                name, row = function.__name__.replace("_", " "), function(case, own)
                results[name].append(row)
                shown = ", ".join(f"{key} {rounded(value)}" for key, value in row.items() if key != "case")
                print(f"  {name}: {shown}", flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")  # what is measured stays if a later case is stopped
    draw_chart(results["sampling"], args.out.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
