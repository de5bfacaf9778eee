"""Ratio tables raced against each other: the same weights, prompts and noise, different tables.

    python lesson/race.py dense learned my_table.json                       # two minutes on a CPU
    python lesson/race.py dense learned uniform reversed learned:0.5        # tables that need no file

A table is `dense` (nothing skipped), `learned` (that of --checkpoint), `reversed` (the learned one, its columns in
reverse order), `uniform` (the same ratio everywhere, the learned mean), `random` (the learned table, but the tokens
are drawn by chance, not by the routers), any of the last four followed by `:MEAN` (scaled to this mean), or a file in
the form of ratios.json. Printed for each: what it skips, FLOPs, seconds an image (median of interleaved rounds), and
the share of prompts followed, with its standard error (half with one object, half with two; see experiments/judge.py).
Leaves race.png.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from common import scaled, to_float
from judge import followed, mixed_prompts, trained_judge
from rivals import RandomLayer, use

from diffratio_mod import DiT, InputError, RoutedLayer, column_of, tokens_processed
from sample import (
    DEFAULT_CHECKPOINT,
    Parser,
    draw_grid,
    images_from_prompts,
    number,
    read_checkpoint,
    read_ratios,
    run_command,
    sampling_flops,
    write_png,
)

ROUND = 32  # images a round


def table_of(name: str, model: DiT) -> torch.Tensor:
    """The ratios (L, C) that a name stands for. Raises InputError."""
    learned = model.ratios.detach()
    kind, _, target = name.partition(":")
    if Path(name).is_file():
        return read_ratios(Path(name), model.config.depth)
    if kind not in ("dense", "learned", "reversed", "uniform", "random"):
        raise InputError(f"{name!r} is neither a file nor one of dense, learned, reversed, uniform, random")
    mean = float(learned.mean())
    if target:
        try:
            mean = number(float, 0, 0.97)(target)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{name!r}: the mean ratio behind the colon {error}") from None
        learned = scaled(learned, mean)
    tables = {"dense": 0 * learned, "reversed": learned.flip(1), "uniform": torch.full_like(learned, mean)}
    return tables.get(kind, learned)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--num", type=number(int, ROUND, 10**6), default=96, help="prompts, rounded down to 32s")
    parser.add_argument("--steps", type=number(int, 1, 1000), default=30)
    parser.add_argument("--guidance", type=number(float, 0, 100), default=3.0)
    parser.add_argument("--out", type=Path, default=Path("race.png"))
    args = parser.parse_args()
    num = args.num - args.num % ROUND
    model, _ = read_checkpoint(args.checkpoint)
    config = model.config
    tables = {name: table_of(name, model) for name in args.tables}
    if config.mode == "dense":
        raise InputError(f"{args.checkpoint} is a dense model: it has no trained routers")
    judge = trained_judge(config.image_size)
    options = {"steps": args.steps, "guidance": args.guidance}
    prompts = mixed_prompts(num)

    images = {name: [] for name in tables}
    seconds = {name: [] for name in tables}
    images_from_prompts(model, prompts[:ROUND], 0, steps=1)  # warm up
    for first in tqdm(range(0, num, ROUND), unit="round", disable=None):
        for name, ratios in tables.items():
            kind, _, _ = name.partition(":")
            use(model, RandomLayer if kind == "random" else RoutedLayer)
            part = prompts[first : first + ROUND]
            start = time.perf_counter()
            images[name].append(images_from_prompts(model, part, 0, first, ratios=ratios, **options))
            seconds[name].append((time.perf_counter() - start) / ROUND)

    dense = sampling_flops(config, 0 * model.ratios.detach(), **options)
    print("| table | mean ratio in sampling | FLOPs saved | seconds an image | prompts followed |\n" + "|---" * 5 + "|")
    labels = []
    columns = []
    for name, ratios in tables.items():
        drawn = np.concatenate(images[name])
        median = statistics.median(seconds[name])
        right = float(followed(judge, to_float(drawn), prompts).float().mean())
        levels = column_of(torch.linspace(1, 0, args.steps + 1)[:-1], ratios.shape[1])
        mean = 1 - float(tokens_processed(ratios[:, levels], config.tokens).double().mean()) / config.tokens
        saved = 1 - sampling_flops(config, ratios, **options) / dense
        error = 100 * (right * (1 - right) / num) ** 0.5
        print(f"| {name} | {mean:.3f} | {saved:.1%} | {median:.3f} | {right:.1%} of {num} ± {error:.1f} |")
        labels.append(f"{Path(name).name[:16]}\nratio {mean:.2f}, {median:.3f} s\n{right:.0%} right")
        columns.append([(drawn[i], prompts[i]) for i in range(0, num, num // 8 + 1)])  # in turn one object and two
    rows = list(zip(*columns))
    write_png(draw_grid(rows, "Ratio tables raced", (), labels, 112, captions=True), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
