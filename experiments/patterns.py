"""What a routed `shapes` model has learned to look at, as figures: does its router find the objects?

    python experiments/patterns.py assets/shapes_routed.pt    # a minute on a CPU

For each layer and timestep region: the area under the ROC curve (AUC) of the router's score against the true object
mask (1: objects score highest, 0: the background does, 0.5: it cannot tell), and against the mask of inpainting (1: the
tokens to generate score highest). Then the correlation of a cell's learned ratio with its mean score (the paper's figure
10). Leaves experiments/results/patterns.json, or what --out names.
"""

from pathlib import Path

import common
import torch
import torch.nn.functional as F
from common import tools
from torch import Tensor

from diffratio_mod import DiT, schedule, tokens_processed
from train_cifar import Shapes


def auc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve of scores (n,) against booleans (n,), ties counted by half."""
    low, high = score[~positive].sort().values, score[positive]
    wins = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return float(wins.double().mean() / 2 / len(low))


@torch.no_grad()
def measure(model: DiT, images: int, box: bool) -> Tensor:
    """AUC and mean of the routers' scores in the middle of each region: (2, L, C).

    Against the objects, or with `box` against what is to be generated when the middle half of the picture is missing;
    over the tokens that lie at least 80 % inside or at most 5 % inside.
    """
    config, rng, records = model.config, torch.Generator().manual_seed(21), []
    x0, captions, masks = Shapes(config.image_size).batch(images, rng)
    S, C = config.image_size, model.ratios.shape[1]
    hole = torch.full((images, 1, S, S), 0.0 if box else 1.0)
    hole[:, :, S // 4 : S - S // 4, S // 4 : S - S // 4] = 1
    truth = F.avg_pool2d(hole if box else masks.sum(dim=1, keepdim=True), config.patch_size).flatten(1)
    clear = (truth > 0.8) | (truth < 0.05)
    caption, k = model.encode_caption(tools.encode(config, captions)), tokens_processed(model.ratios, config.tokens)
    hooks = tools.record_routing(model, records)
    for c in range(C):
        t = torch.full((images,), (c + 0.5) / C)
        a, s = (z.view(-1, 1, 1, 1) for z in schedule(t))
        model(a * x0 + s * torch.randn(x0.shape, generator=rng), t, caption, x0, hole, k=k[:, c].tolist())
    for hook in hooks:
        hook.remove()
    rows = [(auc(score[clear], truth[clear] > 0.8), float(score.mean())) for score, _ in records]
    return torch.tensor(rows).view(C, config.depth, 2).permute(2, 1, 0)  # they came region after region


def main() -> None:
    parser = tools.Parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=tools.number(int, 1, 10**5), default=400)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "patterns.json")
    args = parser.parse_args()
    model, _ = tools.read_checkpoint(args.checkpoint)
    ratios, (objects, scores) = model.ratios.detach(), measure(model, args.images, box=False)
    tables = {"objects": objects, "tokens to generate": measure(model, args.images, box=True)[0]}
    results: dict = {"checkpoint": str(args.checkpoint), "images": args.images, "mean score": scores.tolist()}
    for name, table in tables.items():
        results[f"AUC, {name}"] = table.tolist()
        print(f"AUC, {name}: rows are layers, columns timestep regions from clean to noisy")
        print("\n".join("  " + " ".join(f"{value:.2f}" for value in row) for row in table.tolist()))
    correlation = float(torch.corrcoef(torch.stack([ratios.flatten(), scores.flatten()]))[0, 1])
    print(f"correlation of ratio and mean score: {correlation:.2f}")
    common.write_json(results | {"correlation of ratio and mean score": correlation}, args.out)


if __name__ == "__main__":
    tools.run_command(main)
