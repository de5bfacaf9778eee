"""What share of its prompts does a `shapes` model follow? Judged by a classifier that is trained on true renderings.

    python experiments/judge.py assets/shapes_dense.pt assets/shapes_routed.pt --num 240     # minutes on two CPU cores

The classifier sees an image and names its layout (one object, two above each other, two side by side) and the colour
and the shape of the first (upper or left) and of the second object. A prompt is followed if all of it is right. It is
trained once, on renderings of all pairs with noise and ragged edges, and kept in runs/. What it gets right of fresh true
renderings is printed first.

Inpainting: the object of a true rendering is cut out by a box. Another object is asked for in its place, and is there or
not; or the same one, and then the error is the root mean square difference to the rendering, pixels in [-1, 1], within
the box. Results go to --out, by default experiments/judge.json.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffratio_mod import DiT
from sample import Parser, build_model, generate, pick_device, read_checkpoint, replacing, run_command, to_float
from train_cifar import COLOURS, HELD_OUT, RELATIONS, SHAPES, Shapes

PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
HEADS = (3, len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES))


def labels_of(captions: list[str]) -> torch.Tensor:
    """What the classifier should say: (count, 5) layout, colour and shape of the first and second object, -100: none."""
    rows = []
    for caption in captions:
        words = caption.split()
        first, second = ([list(COLOURS).index(a), SHAPES.index(b)] for a, b in (words[1:3], words[-2:]))
        if len(words) == 3:
            rows.append([0, *first, -100, -100])
        elif words[3] in ("above", "left"):
            rows.append([1 if words[3] == "above" else 2, *first, *second])
        else:
            rows.append([1 if words[3] == "below" else 2, *second, *first])
    return torch.tensor(rows)


def ragged(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Every pixel takes its colour from a place up to about a pixel away, with noise: edges as a small model draws them."""
    count, _, size, _ = images.shape
    strength = torch.rand(count, 1, 1, 1, generator=rng)
    grid = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(images.shape), align_corners=False)
    away = torch.randn(count, size, size, 2, generator=rng) * 1.2 / size
    images = F.grid_sample(images, grid + strength * away, padding_mode="border", align_corners=False)
    return images + 0.1 * strength * torch.randn(images.shape, generator=rng)


class Judge(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        widths = (3, 32, 64, 64, 128)
        layers = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, padding=1, stride=2 if i else 1), nn.GroupNorm(8, b), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (size // 8) ** 2, 256), nn.ReLU())
        self.head = nn.Linear(256, sum(HEADS))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.head(self.body(images)).split(HEADS, dim=1)

    @torch.no_grad()
    def right(self, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Is the caption followed? (count,) of booleans."""
        truth = labels_of(captions)
        said = torch.stack([logits.argmax(dim=1).cpu() for logits in self(images)], dim=1)
        return ((said == truth) | (truth == -100)).all(dim=1)


def trained_judge(size: int, steps: int, device: torch.device) -> Judge:
    """Train a judge, or read the one that an earlier call has left in runs/."""
    torch.manual_seed(0)
    judge, path = Judge(size).to(device), Path(f"runs/judge-{size}-{steps}.pt")
    if path.exists():
        judge.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return judge.eval()
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    rng = torch.Generator().manual_seed(1)
    data = Shapes(size, "all")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        images, captions, _ = data.batch(128, rng)
        images, truth = ragged(images, rng), labels_of(captions).to(device)
        loss = sum(F.cross_entropy(out, truth[:, i]) for i, out in enumerate(judge(images.to(device))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        torch.save(judge.state_dict(), file)
    return judge.eval()


def prompts_of(count: int, two: bool) -> list[str]:
    """Prompts that go through all pairs in turn, the second object and the relation drawn from a fixed seed."""
    rng = torch.Generator().manual_seed(2)
    prompts = []
    for i in range(count):
        (a, b), (c, d) = PAIRS[i % len(PAIRS)], PAIRS[int(torch.randint(len(PAIRS), (1,), generator=rng))]
        relation = RELATIONS[int(torch.randint(4, (1,), generator=rng))]
        prompts.append(f"a {a} {b} {relation} a {c} {d}" if two else f"a {a} {b}")
    return prompts


def one_word_changed(caption: str, rng: torch.Generator) -> str:
    """The caption with another colour or another shape for one of its objects."""
    words = caption.split()
    places = [i for i, word in enumerate(words) if word in COLOURS or word in SHAPES]
    place = places[int(torch.randint(len(places), (1,), generator=rng))]
    others = [word for word in (COLOURS if words[place] in COLOURS else SHAPES) if word != words[place]]
    words[place] = others[int(torch.randint(len(others), (1,), generator=rng))]
    return " ".join(words)


def held_out(caption: str) -> bool:
    words = caption.split()
    return (words[1], words[2]) in HELD_OUT or (words[-2], words[-1]) in HELD_OUT


def inpainting(model: DiT, judge: Judge, count: int, options: dict) -> dict[str, float]:
    """Cut the object out of true renderings: is another one drawn there, and the same one as it was?"""
    size = model.config.image_size
    images, captions, masks = Shapes(size).batch(4 * count, torch.Generator().manual_seed(5))
    rows = [i for i, caption in enumerate(captions) if len(caption.split()) == 3][:count]
    known, object_mask = images[rows], masks[rows, :1] > 0
    pixel = torch.arange(size)
    hole = torch.zeros(len(rows), 1, size, size)
    for i, mask in enumerate(object_mask[:, 0]):
        y, x = pixel[mask.any(dim=1)], pixel[mask.any(dim=0)]
        hole[i, 0, max(0, y[0] - 1) : y[-1] + 2, max(0, x[0] - 1) : x[-1] + 2] = 1
    same = [captions[i] for i in rows]
    other = ["a {} {}".format(*PAIRS[i % len(PAIRS)]) for i in range(len(rows))]
    drawn = {}
    for name, prompts in (("same", same), ("other", other)):
        parts = [
            generate(model, prompts[i : i + 48], 1, i, known[i : i + 48], hole[i : i + 48], **options)
            for i in range(0, len(rows), 48)
        ]
        drawn[name] = to_float(np.concatenate(parts))
    device = next(judge.parameters()).device
    error = ((drawn["same"] - known).square() * hole).sum() / (3 * hole.sum())
    return {
        "inpainting, another object asked for": float(judge.right(drawn["other"].to(device), other).float().mean()),
        "inpainting, the same object, root mean square error within the box": float(error.sqrt()),
    }


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--num", type=int, default=240, help="prompts of each kind")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--judge-steps", type=int, default=1000)
    parser.add_argument("--inpaint", type=int, default=96, help="images to inpaint")
    parser.add_argument("--dense", action="store_true", help="the same weights, nothing skipped")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    models = {str(path): build_model(read_checkpoint(path), path).to(device) for path in args.checkpoints}
    judge = trained_judge(next(iter(models.values())).config.image_size, args.judge_steps, device)
    results = {"prompts of each kind": args.num, "steps": args.steps, "guidance": args.guidance, "device": str(device)}

    rng = torch.Generator().manual_seed(3)
    for pairs in ("seen", "held-out", "all"):
        images, captions, _ = Shapes(next(iter(models.values())).config.image_size, pairs).batch(2000, rng)
        results[f"true renderings, {pairs} pairs"] = float(judge.right(images.to(device), captions).float().mean())
    images = ragged(images, rng)
    results["the last with ragged edges"] = float(judge.right(images.to(device), captions).float().mean())
    wrong = [one_word_changed(caption, rng) for caption in captions]
    results["these with one word of the caption changed"] = float(judge.right(images.to(device), wrong).float().mean())
    for name, model in models.items():
        for two in (False, True):
            prompts = prompts_of(args.num, two)
            options = {"steps": args.steps, "guidance": args.guidance}
            if args.dense:
                options["ratios"] = torch.zeros(model.config.depth, 1)
            images = [generate(model, prompts[i : i + 48], 0, i, **options) for i in range(0, len(prompts), 48)]
            right = torch.cat([
                judge.right(to_float(part).to(device), prompts[48 * i : 48 * i + 48]) for i, part in enumerate(images)
            ])  # fmt: skip
            unseen = torch.tensor([held_out(prompt) for prompt in prompts])
            kind = "two objects" if two else "one object"
            for which, rows in (("seen", ~unseen), ("held-out", unseen)):
                results[f"{name}, {kind}, {which} pairs ({int(rows.sum())})"] = float(right[rows].float().mean())
        if args.inpaint:
            found = inpainting(model, judge, args.inpaint, options)
            results |= {f"{name}, {kind} ({args.inpaint})": value for kind, value in found.items()}
    for name, value in results.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}", flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
