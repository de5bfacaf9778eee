"""What a routed `shapes` model has learned to look at, as figures: does its router find the objects?

    pip install scipy matplotlib
    python experiments/patterns.py assets/shapes_routed.pt --metrics runs/shapes/metrics.jsonl    # a minute on a CPU

For each layer and timestep region: the area under the ROC curve (AUC) of the router's score against the true object
mask (1: objects score highest, 0: the background does, 0.5: it cannot tell), and against the mask of inpainting (1: the
tokens to generate score highest). Then the correlation of a cell's learned ratio with its mean score (the paper's figure
10), the rank correlation of noise level and mean ratio, and, with --metrics, every layer's ratio during training.
Leaves experiments/patterns.json and experiments/patterns.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffratio_mod import DiT, schedule, tokens_processed
from sample import Parser, build_model, encode, read_checkpoint, run_command
from train_cifar import Shapes


def auc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve of scores (n,) against booleans (n,), ties counted by half."""
    ranks = torch.from_numpy(stats.rankdata(score.numpy()))
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(score) - count)))


@torch.no_grad()
def scores_by_cell(model: DiT, images: int, box: bool) -> tuple[list[list[Tensor]], Tensor]:
    """Router scores (images, N) of each layer and region in the middle of the region, and a mask (images, N).

    The mask is the share of a token that objects cover, or with `box` the share that is to be generated when the middle
    half of the picture is missing.
    """
    config, data, rng = model.config, Shapes(model.config.image_size), torch.Generator().manual_seed(21)
    x0, captions, masks = data.batch(images, rng)
    S, R = config.image_size, model.ratios.shape[1]
    hole = torch.ones(images, 1, S, S)
    if box:
        hole.zero_()[:, :, S // 4 : S - S // 4, S // 4 : S - S // 4] = 1
    truth = hole if box else masks.sum(dim=1, keepdim=True)
    truth = F.avg_pool2d(truth, config.patch_size).flatten(1)
    caption, k = model.encode_caption(encode(config, captions)), tokens_processed(model.ratios, config.tokens)
    cells: list[list[Tensor]] = [[] for _ in range(config.depth)]
    for c in range(R):
        t = torch.full((images,), (c + 0.5) / R)
        signal, noise = (z.view(-1, 1, 1, 1) for z in schedule(t))
        routing: list = []
        model(signal * x0 + noise * torch.randn(x0.shape, generator=rng), t, caption, x0, hole, k[c], routing=routing)
        for layer, (score, _) in enumerate(routing):
            cells[layer].append(score)
    return cells, truth


def auc_table(cells: list[list[Tensor]], truth: Tensor) -> Tensor:
    """AUC (L, R), over the tokens that lie at least 80 % inside or at most 5 % inside the mask."""
    clear = (truth > 0.8) | (truth < 0.05)
    return torch.tensor([[auc(score[clear], truth[clear] > 0.8) for score in row] for row in cells])


def draw_chart(tables: dict[str, Tensor], ratios: Tensor, means: Tensor, metrics: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3 + bool(metrics), figsize=(17 if metrics else 13, 3.8))
    for axis, (name, table) in zip(axes, tables.items()):
        shown = axis.imshow(table, vmin=0, vmax=1, cmap="RdBu_r", aspect="auto")
        axis.set(title=f"AUC of the score: {name}", xlabel="timestep region, clean to noisy", ylabel="layer")
        axis.set_yticks(range(len(table)), [str(i + 1) for i in range(len(table))])
        axis.set_xticks(range(table.shape[1]), [str(i + 1) for i in range(table.shape[1])])
        figure.colorbar(shown, ax=axis)
    axes[2].scatter(
        ratios.flatten(), means.flatten(), c=torch.arange(ratios.shape[1]).repeat(len(ratios)), cmap="viridis"
    )
    axes[2].set(title="a point a cell, yellow = noisy", xlabel="learned ratio", ylabel="mean router score")
    if metrics:
        for layer in range(len(ratios)):
            curve = [line["ratio_by_layer"][layer] for line in metrics]
            axes[3].plot([line["step"] for line in metrics], curve, label=f"layer {layer + 1}")
        axes[3].plot([x["step"] for x in metrics], [x["mean_ratio"] for x in metrics], "k--", label="mean")
        axes[3].set(title="ratios during training", xlabel="step", ylabel="ratio")
        axes[3].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--metrics", type=Path, help="metrics.jsonl of the run")
    parser.add_argument("--images", type=int, default=400)
    args = parser.parse_args()
    model = build_model(read_checkpoint(args.checkpoint), args.checkpoint)
    ratios = model.ratios.detach()
    cells, truth = scores_by_cell(model, args.images, box=False)
    tables = {"objects": auc_table(cells, truth)}
    tables["inpainting"] = auc_table(*scores_by_cell(model, args.images, box=True))
    means = torch.tensor([[float(score.mean()) for score in row] for row in cells])
    region = torch.arange(ratios.shape[1])
    results = {
        "checkpoint": str(args.checkpoint),
        "images": args.images,
        "AUC, objects": tables["objects"].tolist(),
        "AUC, tokens to generate": tables["inpainting"].tolist(),
        "mean score": means.tolist(),
        "correlation of ratio and mean score": float(
            torch.corrcoef(torch.stack([ratios.flatten(), means.flatten()]))[0, 1]
        ),
        "rank correlation of region and mean ratio": float(stats.spearmanr(region, ratios.mean(dim=0)).statistic),
        "mean ratio by layer": ratios.mean(dim=1).tolist(),
        "mean ratio by region": ratios.mean(dim=0).tolist(),
    }
    for name, table in tables.items():
        print(f"AUC, {name}: rows are layers, columns timestep regions from clean to noisy")
        for row in table:
            print("  " + " ".join(f"{value:.2f}" for value in row))
    for name, value in results.items():
        if isinstance(value, float):
            print(f"{name}: {value:.2f}")
    metrics = [json.loads(line) for line in args.metrics.read_text().splitlines()] if args.metrics else []
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw_chart(tables, ratios, means, metrics, path.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
