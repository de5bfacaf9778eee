"""Ratio tables raced against each other: the same weights, prompts and noise, different tables.

    python experiments/race.py dense learned my_table.json                       # two minutes on a CPU
    python experiments/race.py dense learned uniform reversed learned:0.5        # tables that need no file

A table is `dense` (nothing skipped), `learned` (that of --checkpoint), `reversed` (the learned one, its columns in
reverse order), `uniform` (the same ratio everywhere, the learned mean), `random` (the learned table, but the tokens
are drawn by chance, not by the routers), any of the last four followed by `:MEAN` (scaled to this mean), or a file in
the form of ratios.json. Printed for each: what it skips, FLOPs, seconds an image (median of interleaved rounds), and the
share of prompts followed (half of them with one object, half with two; see judge.py). Leaves race.png.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import RandomLayer, scaled, use
from judge import prompts_of, trained_judge

from diffratio_mod import DiT, InputError, RoutedLayer
from sample import (
    FONT,
    INK,
    PAPER,
    READY_MADE,
    SMALL,
    Parser,
    build_model,
    enlarge,
    generate,
    mean_sampling_ratio,
    read_checkpoint,
    read_ratios,
    run_command,
    sampling_flops,
    to_float,
    wrap,
)

ROUND = 32  # images a round


def table_of(name: str, model: DiT) -> Tensor:
    """The ratios (L, C) that a name stands for. Raises InputError."""
    learned = model.ratios.detach().clone()
    kind, _, target = name.partition(":")
    try:
        mean = float(target) if target else float(learned.mean())
    except ValueError:
        raise InputError(f"{name!r}: what follows the colon must be a mean ratio, as in learned:0.5") from None
    if not 0 <= mean < 0.98:
        raise InputError(f"{name!r}: the mean ratio must be in [0, 0.98)")
    if kind == "dense":
        return torch.zeros_like(learned)
    if kind in ("learned", "random"):
        return scaled(learned, mean) if target else learned
    if kind == "reversed":
        return (scaled(learned, mean) if target else learned).flip(1)
    if kind == "uniform":
        return torch.full_like(learned, mean)
    if not Path(name).is_file():
        raise InputError(f"{name!r} is neither a file nor one of dense, learned, reversed, uniform, random")
    return read_ratios(Path(name), model.config.depth)


def draw_race(images: dict[str, np.ndarray], labels: dict[str, str], prompts: list[str], side: int = 88) -> Image.Image:
    """A row a table, a column a prompt."""
    left, top, width = 190, 62, side + 6
    sheet = Image.new("RGB", (left + len(prompts) * width + 8, top + len(images) * width + 8), PAPER)
    draw = ImageDraw.Draw(sheet)
    for j, prompt in enumerate(prompts):
        draw.multiline_text((left + j * width, 4), wrap(prompt, side), INK, SMALL, spacing=1)
    for i, (name, row) in enumerate(images.items()):
        draw.text((10, top + i * width + 8), name, INK, FONT)
        draw.multiline_text((10, top + i * width + 28), labels[name], (90, 90, 100), SMALL, spacing=2)
        for j in range(len(prompts)):
            sheet.paste(enlarge(row[j], side), (left + j * width, top + i * width))
    return sheet


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--checkpoint", type=Path, default=READY_MADE)
    parser.add_argument("--num", type=int, default=96, help="prompts, a multiple of 32")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=Path("race.png"))
    args = parser.parse_args()
    if args.num < ROUND or args.num % ROUND:
        raise InputError(f"--num must be a multiple of {ROUND}")
    model = build_model(read_checkpoint(args.checkpoint), args.checkpoint)
    tables = {name: table_of(name, model) for name in args.tables}
    judge = trained_judge(model.config.image_size, 1000, torch.device("cpu"))
    prompts = [p for pair in zip(prompts_of(args.num // 2, False), prompts_of(args.num // 2, True)) for p in pair]
    options = {"steps": args.steps, "guidance": args.guidance}

    images: dict[str, list[np.ndarray]] = {name: [] for name in tables}
    seconds: dict[str, list[float]] = {name: [] for name in tables}
    generate(model, prompts[:ROUND], 0, steps=1)  # warm up
    for first in range(0, args.num, ROUND):
        for name, ratios in tables.items():
            use(model, RandomLayer if name.partition(":")[0] == "random" else RoutedLayer)
            start = time.perf_counter()
            images[name].append(generate(model, prompts[first : first + ROUND], 0, first, ratios=ratios, **options))
            seconds[name].append((time.perf_counter() - start) / ROUND)
    use(model, RoutedLayer)

    dense = sampling_flops(model, args.steps, args.guidance, torch.zeros(model.config.depth, 1))
    labels, drawn = {}, {name: np.concatenate(parts) for name, parts in images.items()}
    print("| table | mean ratio in sampling | FLOPs saved | seconds an image | prompts followed |")
    print("|---|---|---|---|---|")
    for name, ratios in tables.items():
        right = float(judge.right(to_float(drawn[name]), prompts).float().mean())
        saved = 1 - sampling_flops(model, args.steps, args.guidance, ratios) / dense
        mean, median = mean_sampling_ratio(model, args.steps, ratios), statistics.median(seconds[name])
        print(f"| {name} | {mean:.3f} | {saved:.1%} | {median:.3f} | {right:.1%} of {args.num} |")
        labels[name] = f"mean ratio {mean:.2f}\n{median:.3f} s an image\n{right:.0%} right"
    shown = range(0, args.num, args.num // 8 + 1)  # in turn with one object and with two
    drawn = {name: row[list(shown)] for name, row in drawn.items()}
    draw_race(drawn, labels, [prompts[i] for i in shown]).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
