"""The one-pass gradient of a ratio against the finite difference of the loss in k, for every layer and region.

    python experiments/gradient.py assets/cifar_routed.pt --data-dir data/cifar10-jpeg   # minutes on a CPU

The finite difference: the loss with `--shift` tokens fewer against as many more in one layer, on the same images and
noise. Printed, over the cells not near a bound: the quotient of the sums, the correlation, how often the signs agree.
"""

import argparse
from pathlib import Path

import common
import torch
from common import tools
from tqdm import tqdm

from diffratio_mod import InputError, diffusion_loss
from train_cifar import load_data


def main() -> None:
    parser = tools.Parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset", default="folder", choices=("folder", "shapes"))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--rounds", type=tools.number(int, 1, 10**4), default=8, help="batches of 16 images a region")
    parser.add_argument("--shift", type=tools.number(int, 1, 1000), default=2, help="tokens (default 2)")
    args = parser.parse_args()
    model, _ = tools.read_checkpoint(args.checkpoint)
    if model.config.mode != "layer-timestep":
        raise InputError(f"{args.checkpoint} has no ratio for each layer and region")
    data = load_data(argparse.Namespace(**vars(args), image_size=model.config.image_size), "test")
    learned, step = model.ratios.detach().clone(), args.shift / model.config.tokens
    difference, R = torch.zeros_like(learned), learned.shape[1]
    for batch in tqdm(common.held_out_batches(model, data, args.rounds), total=args.rounds, disable=None):
        (diffusion_loss(model, *batch).mean() / args.rounds).backward()
        for layer in range(len(learned)):
            for sign in (1, -1):
                model.ratios.data[layer] = (learned[layer] + sign * step).clamp(0, 1 - 1 / model.config.tokens)
                with torch.no_grad():
                    by_region = diffusion_loss(model, *batch).view(R, 16).sum(dim=1) / (16 * R)
                difference[layer] += sign * by_region / (2 * step) / args.rounds
                model.ratios.data.copy_(learned)
    inside = (learned > step) & (learned < 1 - step)
    a, b = model.ratios.grad[inside], difference[inside]
    print(f"{len(a)} of {learned.numel()} cells; sum of gradients / sum of finite differences: {a.sum() / b.sum():.2f}")
    print(f"correlation {torch.corrcoef(torch.stack([a, b]))[0, 1]:.2f}; same sign in {(a * b > 0).float().mean():.0%}")


if __name__ == "__main__":
    tools.run_command(main)
