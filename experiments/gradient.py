"""The one-pass gradient of a ratio against the finite difference of the loss in k, for every layer and region.

    python experiments/gradient.py assets/cifar_routed.pt --data-dir data/cifar10-jpeg   # minutes on a CPU

The finite difference: the loss with `shift` tokens fewer against `shift` tokens more in one layer, all others as
learned, on the same images and noise. Printed, over the cells that are not near a bound:
the quotient of the sums, the correlation, and how often the signs agree.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffratio_mod
from sample import Parser, build_model, encode, read_checkpoint, run_command
from train_cifar import load_data


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset", default="folder")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=8, help="batches of 160 images")
    parser.add_argument("--shift", type=int, default=2, help="tokens")
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.checkpoint)
    model = build_model(checkpoint, args.checkpoint)
    config, size, rng = model.config, 160, torch.Generator().manual_seed(11)
    data = load_data(args.dataset, args.data_dir, config.image_size)
    L, R = model.ratios.shape
    slope = torch.zeros(L, R)
    for _ in tqdm(range(args.rounds)):
        images, captions, _ = data.batch(size, rng)
        batch = {"images": images, "words": encode(config, captions), "t": diffratio_mod.even_noise_levels(size, rng)}
        batch |= {"mask": torch.ones_like(images[:, :1]), "eps": torch.randn(images.shape, generator=rng)}
        (diffratio_mod.diffusion_loss(model, **batch).mean() / args.rounds).backward()
        learned, step = model.ratios.detach().clone(), args.shift / config.tokens
        with torch.no_grad():
            for layer in range(L):
                ends = []
                for sign in (1, -1):
                    model.ratios[layer] = (learned[layer] + sign * step).clamp(0, 1 - 1 / config.tokens)
                    ends.append(diffratio_mod.diffusion_loss(model, **batch).reshape(R, -1).sum(dim=1) / size)
                    model.ratios.copy_(learned)
                slope[layer] += (ends[0] - ends[1]) / (2 * step) / args.rounds
    inside = (model.ratios > step) & (model.ratios < 1 - step)
    gradient, slope = model.ratios.grad[inside], slope[inside]
    print(
        f"{len(slope)} of {L * R} cells; sum of gradients / sum of finite differences: {gradient.sum() / slope.sum():.2f}"
    )
    print(f"correlation {torch.corrcoef(torch.stack([gradient, slope]))[0, 1]:.2f}; ", end="")
    print(f"same sign in {(gradient * slope > 0).float().mean():.0%}")


if __name__ == "__main__":
    run_command(main)
