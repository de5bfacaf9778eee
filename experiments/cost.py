"""Seconds against FLOPs: routed sampling beside dense sampling, interleaved in one run.

    python experiments/cost.py assets/shapes_routed.pt --num 16     # a minute or two on two CPU cores

For the learned table and for the same table scaled to a mean of 0.3 and 0.5 (and one uniform table each): the share of
FLOPs saved, the share of seconds saved (medians), and their quotient. The baseline is `--dense`: the same weights,
nothing skipped. Results go to experiments/cost.json.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import Parser, build_model, generate, pick_device, read_checkpoint, run_command, sampling_flops


def scaled(table: torch.Tensor, mean: float) -> torch.Tensor:
    """The table with its shape kept and its mean moved to `mean`: all cells times one factor, at most 0.98."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (table * middle).clamp(max=0.98).mean() < mean else (low, middle)
    return (table * low).clamp(max=0.98)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--num", type=int, default=16, help="images in the batch; guidance doubles it")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    model = build_model(read_checkpoint(args.checkpoint), args.checkpoint).to(pick_device(args.device))
    table = model.ratios.detach().cpu()
    tables = {"dense": torch.zeros(model.config.depth, 1), "learned": table}
    for mean in (0.3, 0.5):
        tables[f"learned, scaled to {mean}"] = scaled(table, mean)
        tables[f"uniform {mean}"] = torch.full((model.config.depth, 1), mean)
    prompts, seconds = [""] * args.num, {name: [] for name in tables}
    for repeat in tqdm(range(args.repeats + 1)):
        for name, ratios in tables.items():
            start = time.perf_counter()
            generate(model, prompts, 0, steps=args.steps, guidance=args.guidance, ratios=ratios)
            if model.ratios.is_cuda:
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    flops = {name: sampling_flops(model, args.steps, args.guidance, ratios) for name, ratios in tables.items()}
    rows = []
    for name, ratios in tables.items():
        median, spread = statistics.median(seconds[name]), statistics.pstdev(seconds[name])
        saved = 1 - flops[name] / flops["dense"], 1 - median / statistics.median(seconds["dense"])
        rows.append({"table": name, "mean ratio": float(ratios.mean()), "seconds": median, "spread": spread})
        rows[-1] |= {
            "FLOPs saved": saved[0],
            "time saved": saved[1],
            "quotient": saved[1] / saved[0] if saved[0] else 0,
        }
    print(f"{args.num} images, {args.steps} steps, guidance {args.guidance:g}, {torch.get_num_threads()} threads")
    for row in rows:
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v:24}" for k, v in row.items()))
    Path(__file__).with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
