"""The two pictures of the front page, from the shipped models: one that moves, and one with what they draw.

    python experiments/pictures.py    # under a minute on a CPU

Nothing is chosen by eye: seed 0, one image a prompt. `sampling.gif`: one prompt from noise to image, dense beside
routed, with the tokens that each layer processed. `dense_and_learned.png`: the prompts that the checkpoints keep, of
`shapes` every second (four with one object, four with two), of the photographs the first eight, guided as in the chart
of the front page. Two models are compared, not one model with two tables: from `shapes_dense.pt` the routed one was
trained for 750 steps more; the two of CIFAR-10 were trained for equally long. Leaves both in assets/, or where --out
says.
"""

import textwrap
from pathlib import Path

import common  # noqa: F401 (which makes the files of the project importable)
import numpy as np
import torch
from PIL import Image, ImageDraw

from diffratio_mod import DiT, column_of
from sample import (
    DEFAULT_CHECKPOINT,
    PAPER,
    SIZE,
    Parser,
    draw_grid,
    images_from_prompts,
    in_english,
    read_checkpoint,
    record_routing,
    run_command,
    sampling_flops,
    to_uint8,
    write,
    write_png,
)

ASSETS = DEFAULT_CHECKPOINT.parent
# Name, of its checkpoints' prompts those that are drawn, steps, guidance and its interval, and the start of the title.
PAIRS = (
    ("shapes", slice(0, 16, 2), 10, 3.0, (0.0, 1.0), "Coloured shapes"),
    ("cifar", slice(0, 8), 20, 4.0, (0.25, 0.85), "Photographs"),
)
PROMPT = "a red circle above a blue cross"
STEPS = 20
GUIDANCE = 3.0


def draw_pair(
    name: str, chosen: slice, steps: int, guidance: float, interval: tuple[float, float], title: str
) -> Image.Image:
    """Two rows, dense and routed, each with the GFLOPs of an image at its left."""
    rows = []
    row_names = []
    for kind in ("dense", "routed"):
        model, checkpoint = read_checkpoint(ASSETS / f"{name}_{kind}.pt")
        prompts = checkpoint["prompts"][chosen]
        ratios = model.ratios.detach()
        images = images_from_prompts(model, prompts, seed=0, steps=steps, guidance=guidance, guidance_interval=interval)
        gflops = sampling_flops(model.config, ratios, steps, guidance, interval) / 1e9
        print(f"{name}, {kind}: {gflops:.2f} GFLOPs an image, mean of the table {float(ratios.mean()):.2f}")
        rows.append([(image, "") for image in images])
        row_names.append(f"{kind}\n{gflops:.1f}\nGFLOPs")
    column_names = [textwrap.fill(in_english(prompt), 16) for prompt in prompts]
    title += f", {steps} steps, the same noise: a dense model, and one that skips tokens by its learned ratios"
    return draw_grid(rows, title, row_names, column_names, side=96)  # 4 x 24 and 3 x 32 pixels


# --- The picture that moves ------------------------------------------------------------------------------------------


def sampling_of(model: DiT) -> tuple[list[np.ndarray], list[list[np.ndarray]], list[float]]:
    """Of each step: the guess (S, S, 3), each layer's processed tokens (N,) as booleans, and the GFLOPs until then."""
    guesses = []
    records: list = []
    hooks = []
    if model.config.mode != "dense":
        hooks = record_routing(model, records)
    options = {"steps": STEPS, "guidance": GUIDANCE}
    images_from_prompts(model, [PROMPT], 0, hook=lambda t, x0: guesses.append(to_uint8(x0)[0]), **options)
    for hook in hooks:
        hook.remove()
    depth = model.config.depth
    tokens = np.arange(model.config.tokens)
    processed = [
        [np.isin(tokens, order[0]) for _, order in records[i : i + depth]] for i in range(0, len(records), depth)
    ]

    ratios = model.ratios.detach()
    gflops = []
    total = 0.0
    for column in column_of(torch.linspace(1, 0, STEPS + 1)[:-1], ratios.shape[1]).tolist():
        of_column = ratios[:, column : column + 1]
        once, twice = (sampling_flops(model.config, of_column, steps, GUIDANCE) / 1e9 for steps in (1, 2))
        total += once if not gflops else twice - once  # the caption is read once
        gflops.append(total)
    return guesses, processed, gflops


def enlarged(image: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)


def draw_frame(title: str, rows: list[tuple[str, np.ndarray]], layers: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Left, below each other, two guesses with their labels; right, three a row, the layers with theirs."""
    frame = Image.new("RGB", (800, 452), PAPER)
    draw = ImageDraw.Draw(frame)
    write(draw, (12, 10), title, size=20)
    for i, (label, image) in enumerate(rows):
        y = 44 + 204 * i
        frame.paste(enlarged(image, 168), (12, y))
        write(draw, (12, y + 172), label, size=SIZE)
    for i, (label, image) in enumerate(layers):
        x = 248 + 186 * (i % 3)
        y = 44 + 204 * (i // 3)
        frame.paste(enlarged(image, 168), (x, y))
        write(draw, (x, y + 172), label, size=SIZE)
    return frame


def draw_moving_picture() -> list[Image.Image]:
    """A frame for each step; the last one sums up, with how often each token was processed."""
    dense, _ = read_checkpoint(ASSETS / "shapes_dense.pt")
    routed, _ = read_checkpoint(ASSETS / "shapes_routed.pt")
    dense_guesses, _, dense_gflops = sampling_of(dense)
    guesses, processed, gflops = sampling_of(routed)
    patch = routed.config.patch_size
    side = routed.config.image_size // patch

    def lit(image: np.ndarray, share: np.ndarray) -> np.ndarray:
        """The image, dark where tokens bypass. share (N,): how much light each token gets."""
        light = 0.15 + 0.85 * share.reshape(side, side).repeat(patch, axis=0).repeat(patch, axis=1)
        return (image * light[:, :, None]).astype(np.uint8)

    frames = []
    for i in range(STEPS):
        rows = [
            (f"dense: {dense_gflops[i]:.1f} GFLOPs", dense_guesses[i]),
            (f"routed: {gflops[i]:.1f} GFLOPs", guesses[i]),
        ]
        layers = []
        for layer, chosen in enumerate(processed[i], start=1):
            layers.append((f"layer {layer} skips {1 - chosen.mean():.0%}", lit(guesses[i], chosen)))
        frames.append(draw_frame(f'"{PROMPT}", step {i + 1} of {STEPS}', rows, layers))
    saved = 1 - gflops[-1] / dense_gflops[-1]
    layers = []
    for layer, shares in enumerate(np.mean(processed, axis=0), start=1):
        layers.append((f"layer {layer} skipped {1 - shares.mean():.0%}", lit(guesses[-1], shares)))
    rows = [
        (f"dense: {dense_gflops[-1]:.1f} GFLOPs", dense_guesses[-1]),
        (f"routed: {gflops[-1]:.1f} GFLOPs", guesses[-1]),
    ]
    frames.append(draw_frame(f"{saved:.0%} of the arithmetic saved; bright: tokens processed most often", rows, layers))
    return frames


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder (default assets)")
    args = parser.parse_args()
    frames = draw_moving_picture()
    palette = frames[-1].quantize(64)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [500] * STEPS + [6000]
    path = args.out / "sampling.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} KB")

    parts = [draw_pair(*pair) for pair in PAIRS]
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), PAPER)
    y = 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height
    write_png(sheet, args.out / "dense_and_learned.png")
    print(f"wrote {args.out / 'dense_and_learned.png'}")


if __name__ == "__main__":
    run_command(main)
