"""Samples of models of photographs, measured: Frechet distance, class accuracy, inpainting error.

    python experiments/quality.py runs/cifar_dense/checkpoint.pt runs/cifar_routed/checkpoint.pt --data-dir data/cifar10-jpeg

A small classifier is trained on the folder train/ (or read from --classifier, where an earlier call has left it). The
Frechet distance is taken between its features of --num samples and those of all images in test/. It is NOT comparable
with the FID of papers, which uses the features of Inception: for that, write the samples with `sample.py --npz` or
`--png-dir` and give them to the public tools. What real photographs (of train/) get is printed first. Class accuracy is
the share of samples that the classifier takes for the class of their prompt. The inpainting error is the root mean
square difference to the true photograph, pixels in [-1, 1], within the middle half that was generated anew. All models
get the same noise. Results go to experiments/quality.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffratio_mod import InputError
from sample import Parser, build_model, generate, pick_device, read_checkpoint, replacing, run_command, to_float
from train_cifar import Pictures, load_folder


class Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        widths, layers = (3, 24, 48, 96, 96), []
        for i in range(4):
            stride = 2 if i in (1, 2) else 1
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1), nn.GroupNorm(8, widths[i + 1]), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 96, 96), nn.ReLU())
        self.head = nn.Linear(96, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def labelled(data: Pictures, rows: Tensor) -> tuple[Tensor, Tensor]:
    return data.images[rows].float() / 127.5 - 1, torch.tensor(data.labels)[rows]


def train_classifier(data: Pictures, steps: int, device: torch.device) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(len(data.captions)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.02)
    rng = torch.Generator().manual_seed(1)
    for step in tqdm(range(steps), desc="classifier", leave=False, mininterval=5):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        images, labels = labelled(data, torch.randint(len(data.images), (128,), generator=rng))
        flip = torch.rand(128, 1, 1, 1, generator=rng) < 0.5
        images = torch.where(flip, images.flip(3), images)
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def judged(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (count, 96) and the classes that the classifier names (count,)."""
    device = next(model.parameters()).device
    features = torch.cat([model.body(part.to(device)) for part in images.split(500)])
    return features.cpu().double(), model.head(features).argmax(dim=1).cpu()


def frechet(a: Tensor, b: Tensor) -> float:
    """Distance of two normal distributions with the means and covariances of the features (count, D)."""
    mean_a, mean_b, cov_a, cov_b = a.mean(dim=0), b.mean(dim=0), a.T.cov(), b.T.cov()
    # The square root of a product of covariances has as its trace the sum of the roots of the product's eigenvalues.
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--num", type=int, default=1000, help="samples of each model")
    parser.add_argument("--inpaint", type=int, default=200, help="photographs to inpaint")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--classifier", type=Path, default=Path("runs/classifier.pt"))
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    models = {str(path): build_model(read_checkpoint(path), path).to(device) for path in args.checkpoints}
    size = next(iter(models.values())).config.image_size
    train, test = load_folder(args.data_dir, size), load_folder(args.data_dir, size, "test")
    if args.classifier.exists():
        judge = Classifier(len(train.captions)).to(device)
        try:
            judge.load_state_dict(torch.load(args.classifier, map_location=device, weights_only=True))
        except (RuntimeError, AttributeError, UnpicklingError):
            raise InputError(f"{args.classifier} is no such classifier; delete it, or name another") from None
    else:
        judge = train_classifier(train, args.classifier_steps, device)
        args.classifier.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.classifier) as file:
            torch.save(judge.state_dict(), file)
    judge.eval()

    real, said = judged(judge, to_float(test.images.permute(0, 2, 3, 1).numpy()))
    results: dict = {"samples": args.num, "steps": args.steps, "guidance": args.guidance, "device": str(device)}
    results["classifier's accuracy on test/"] = float((said == torch.tensor(test.labels)).float().mean())
    rows = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(3))[: args.num]
    features, said = judged(judge, labelled(train, rows)[0])
    results["photographs of train/"] = {
        "Frechet distance": frechet(features, real),
        "class accuracy": float((said == labelled(train, rows)[1]).float().mean()),
    }
    wanted = torch.arange(args.num) % len(train.captions)
    prompts = [train.captions[label] for label in wanted.tolist()]
    options = {"steps": args.steps, "guidance": args.guidance}
    rows = torch.randperm(len(test.images), generator=torch.Generator().manual_seed(4))[: args.inpaint]
    known, labels = labelled(test, rows)
    mask = torch.zeros(len(known), 1, size, size)
    mask[:, :, size // 4 : size - size // 4, size // 4 : size - size // 4] = 1
    for name, model in models.items():
        images = []
        for first in tqdm(range(0, args.num, 50), desc=name, leave=False, mininterval=5):
            images.append(to_float(generate(model, prompts[first : first + 50], 0, first, **options)))
        features, said = judged(judge, torch.cat(images))
        captions = [train.captions[label] for label in labels.tolist()]
        filled = to_float(generate(model, captions, 1, 0, known, mask, **options))
        error = ((filled - known).square() * mask).sum() / (3 * mask.sum())
        results[name] = {
            "Frechet distance": frechet(features, real),
            "class accuracy": float((said == wanted).float().mean()),
            "inpainting error": float(error.sqrt()),
        }
    text = json.dumps(results, indent=1)
    print(text)
    with replacing(Path(__file__).with_suffix(".json")) as file:
        file.write(text.encode() + b"\n")


if __name__ == "__main__":
    run_command(main)
