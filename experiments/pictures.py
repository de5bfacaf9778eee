"""What the shipped dense and routed models draw: the same prompts, the same noise, and what an image costs.

    python experiments/pictures.py    # under a minute on a CPU

Nothing is chosen by eye: seed 0, one image a prompt, the prompts those that the checkpoints keep, of `shapes` every
second (four with one object, four with two), of the photographs the first eight. Two models are compared, not one model
with two tables: from `shapes_dense.pt` the routed one was trained for 750 steps more; the two of CIFAR-10 were trained
for equally long. Leaves assets/dense_and_learned.png, or what --out names.
"""

import textwrap
from pathlib import Path

import common  # noqa: F401 (which makes the files of the project importable)
from PIL import Image

from sample import (
    DEFAULT_CHECKPOINT,
    PAPER,
    Parser,
    draw_grid,
    images_from_prompts,
    read_checkpoint,
    run_command,
    sampling_flops,
    write_png,
)

ASSETS = DEFAULT_CHECKPOINT.parent
GUIDANCE = 3.0
# Name, of its checkpoints' prompts those that are drawn, steps, and the start of the title.
PAIRS = (
    ("shapes", slice(0, 16, 2), 10, "Coloured shapes"),
    ("cifar", slice(0, 8), 20, "Photographs"),
)


def draw_pair(name: str, chosen: slice, steps: int, title: str) -> Image.Image:
    """Two rows, dense and routed, each with the GFLOPs of an image at its left."""
    rows = []
    row_names = []
    for kind in ("dense", "routed"):
        model, checkpoint = read_checkpoint(ASSETS / f"{name}_{kind}.pt")
        prompts = checkpoint["prompts"][chosen]
        ratios = model.ratios.detach()
        images = images_from_prompts(model, prompts, seed=0, steps=steps, guidance=GUIDANCE)
        gflops = sampling_flops(model.config, ratios, steps, GUIDANCE) / 1e9
        print(f"{name}, {kind}: {gflops:.2f} GFLOPs an image, mean of the table {float(ratios.mean()):.2f}")
        rows.append([(image, "") for image in images])
        row_names.append(f"{kind}\n{gflops:.1f}\nGFLOPs")
    column_names = [textwrap.fill(prompt, 16) for prompt in prompts]
    title += f", {steps} steps, the same noise: a dense model, and one that skips tokens by its learned ratios"
    return draw_grid(rows, title, row_names, column_names, side=96)  # 4 x 24 and 3 x 32 pixels


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS / "dense_and_learned.png")
    args = parser.parse_args()
    parts = [draw_pair(*pair) for pair in PAIRS]
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), PAPER)
    y = 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height
    write_png(sheet, args.out)
    print("wrote", args.out)


if __name__ == "__main__":
    run_command(main)
