"""Seconds against FLOPs: sampling with dense, uniform and learned tables, token merging, and a training step.

    pip install tomesd
    python experiments/speed.py --rounds 3                     # 8 minutes on two CPU cores
    python experiments/speed.py --rounds 3 --compile           # with training steps whose loss is compiled, too
    python experiments/speed.py --device cuda --amp --batch-scale 8

All that is compared runs interleaved, round after round, in this one process; a figure is the median over the rounds of
its time divided by the baseline's time of the same round, its spread half the distance of the quartiles. Weights are
random: they do not change what is computed. Leaves experiments/results/speed.json, or what --out names.
"""

import functools
import itertools
import math
import statistics
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, flops, interleaved, scaled, write_json
from rivals import MergedLayer, TwoBranchLayer, use
from torch import Tensor

from diffratio_mod import Config, DiT, diffusion_loss, ratio_loss, sample_images, tokens_processed
from sample import DEFAULT_CHECKPOINT, Parser, number, pick_device, read_checkpoint, run_command
from train_cifar import even_noise_levels

STEPS = 5  # of sampling, one for each column of the tables
# Tokens, width, layers, heads, and the batch: images that run together (with guidance, twice those that are made).
CASES = [(64, 128, 6, 4, 2), (64, 128, 6, 4, 32), (256, 128, 6, 2, 16)]
CASES += [(256, 384, 4, 6, 1), (256, 384, 4, 6, 16), (1024, 384, 4, 6, 4)]


def random_model(config: Config, mode: str, device: torch.device) -> DiT:
    torch.manual_seed(0)
    model = DiT(replace(config, mode=mode)).to(device)
    for name, parameter in model.named_parameters():
        if name != "ratios":
            torch.nn.init.normal_(parameter, std=0.02)  # also the routers and the gates
    return model


def learned_table(depth: int, mean: float) -> Tensor:
    """The ready-made shapes model's table in this many layers and STEPS columns, scaled to a mean."""
    model, _ = read_checkpoint(DEFAULT_CHECKPOINT)
    table = F.interpolate(model.ratios.detach()[None, None], (depth, STEPS), mode="area")[0, 0]
    # A cell that skips less than half a token where it was learned skips nothing; so it must be where tokens are more.
    nothing = scaled(table, mean) < 0.5 / model.config.tokens
    return scaled(table.masked_fill(nothing, 0), mean)


def relative(seconds: list[float], base: list[float]) -> tuple[float, float]:
    """Median and spread of the quotients, round by round."""
    low, median, high = np.percentile(np.divide(seconds, base), (25, 50, 75)).tolist()
    return median, (high - low) / 2


def sampling(config: Config, batch: int, rounds: int, args: Namespace) -> list[dict]:
    """Dense, uniform and learned tables; the routed model with nothing skipped; token merging."""
    dense = random_model(config, "dense", args.device).eval()
    routed = random_model(config, "layer-timestep", args.device).eval()
    merged = use(random_model(config, "layer-timestep", args.device).eval(), MergedLayer)
    noise = torch.randn(batch, 3, config.image_size, config.image_size, device=args.device)
    words = torch.ones(batch, 8, dtype=torch.long, device=args.device)
    zero = torch.zeros(config.depth, 1)
    runs: dict[str, tuple[DiT, Tensor]] = {"dense": (dense, zero), "routed, nothing skipped": (routed, zero)}
    for mean in (0.1, 0.2, 0.3, 0.5, 0.7):
        runs[f"uniform {mean}"] = (routed, zero + mean)
        runs[f"learned {mean}"] = (routed, learned_table(config.depth, mean))
    for mean in (0.2, 0.3, 0.5):
        k = (tokens_processed(learned_table(config.depth, mean), config.tokens) / 16).round() * 16
        runs[f"learned {mean}, k in sixteens"] = (routed, 1 - k.clamp(min=1) / config.tokens)
    runs |= {f"merging {mean}": (merged, zero + mean) for mean in (0.3, 0.5)}

    def run(model: DiT, ratios: Tensor) -> None:
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            sample_images(model, words, noise, STEPS, 1, ratios=ratios)

    calls = {name: functools.partial(run, *one) for name, one in runs.items()}
    seconds = interleaved(calls, rounds, args.device)
    most = flops(dense, zero, STEPS)
    rows = []
    for name, (model, ratios) in runs.items():
        left, spread = relative(seconds[name], seconds["dense"])
        row = {"table": name, "seconds": statistics.median(seconds[name]), "time saved": 1 - left, "spread": spread}
        rows.append(row | {"FLOPs saved": 1 - flops(model, ratios, STEPS) / most})
    return rows


def training(config: Config, batch: int, rounds: int, args: Namespace) -> tuple[float, dict]:
    """Forward, backward and optimizer: dense, routed (by mask), the paper's two branches; if asked, also compiled."""
    rng = torch.Generator().manual_seed(0)
    functions = {}
    eps = torch.randn(batch, 3, config.image_size, config.image_size, generator=rng)
    words = torch.ones(batch, 8, dtype=torch.long)
    t = even_noise_levels(batch, rng)
    given = [z.to(args.device) for z in (eps.clamp(-1, 1), words, torch.ones_like(eps[:, :1]), t, eps)]
    names = ["dense", "routed", "two branches"]
    if args.compile:
        names += ["dense, compiled", "routed, compiled"]
    for name in names:
        model = random_model(config, "dense" if "dense" in name else "layer-timestep", args.device)
        if "dense" not in name:
            model.ratios.data.copy_(learned_table(config.depth, 0.3))
        if name == "two branches":
            use(model, TwoBranchLayer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        loss_of = torch.compile(diffusion_loss, fullgraph=True) if "compiled" in name else diffusion_loss

        def step(model=model, optimizer=optimizer, loss_of=loss_of) -> None:
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                loss = loss_of(model, *given).mean()
            (loss + ratio_loss(model.ratios, 0.3)).backward()
            optimizer.step()
            optimizer.zero_grad()

        functions[name] = step
    seconds = interleaved(functions, rounds, args.device)
    pairs = [*itertools.product(names[1:], ["dense"]), ("routed", "two branches")]
    return statistics.median(seconds["dense"]), {f"{a} / {b}": relative(seconds[a], seconds[b]) for a, b in pairs}


def main() -> None:
    parser = Parser(__doc__)
    count = number(int, 1, 10**4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=count, default=5, help="of large cases; small ones get three times as many")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--batch-scale", type=count, default=1, help="multiply all batch sizes")
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    parser.add_argument("--compile", action="store_true", help="time training steps with a compiled loss, too")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else str(args.device)
    results: dict = {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads()}
    results |= {"bfloat16": args.amp, "rounds": args.rounds, "cases": []}
    for tokens, dim, depth, heads, batch in CASES:
        batch *= args.batch_scale
        label = f"{tokens} tokens, width {dim}, {depth} layers, batch {batch}"
        if args.only not in label:
            continue
        config = Config(("word",), 2 * math.isqrt(tokens), 2, dim, depth, heads, regions=STEPS)
        rounds = args.rounds * (3 if tokens * batch < 4096 else 1)  # small cases are quick, and noisier
        rows = sampling(config, batch, rounds, args)
        results["cases"].append({"case": label, "sampling": rows})
        print(label)
        for row in rows:
            what = f"  {row['table']:25} {row['seconds']:7.3f} s  FLOPs saved {row['FLOPs saved']:6.1%}"
            print(f"{what}  time saved {row['time saved']:6.1%} ± {row['spread']:.1%}", flush=True)
        if batch > 2:
            dense, quotients = training(config, batch, rounds, args)
            results["cases"][-1] |= {"dense training step, seconds": dense, "training": quotients}
            print(f"  a training step, dense: {dense:.3f} s")
            print("".join(f"  {name}: {q:.2f} ± {half:.2f}\n" for name, (q, half) in quotients.items()), flush=True)
        write_json(results, args.out)  # what is measured stays if a later case is stopped


if __name__ == "__main__":
    run_command(main)
