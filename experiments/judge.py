"""What share of its prompts does a `shapes` model follow? Judged by a classifier that is trained on true renderings.

    python experiments/judge.py assets/shapes_dense.pt assets/shapes_routed.pt --num 240     # minutes on two CPU cores

The classifier sees an image and names its layout (one object, two above each other, two side by side) and the colour
and the shape of the first (upper or left) and of the second object. A prompt is followed if all of it is right. It is
trained once, on renderings of all pairs with noise and ragged edges, and kept in runs/; its own errors are printed
first.
Inpainting: the object of a true rendering is cut out by a box. Another object is asked for in its place, and is there
or not; or the same one: the error is the root mean square difference to the rendering within the box, pixels in [-1,
1].
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, cached, to_float, write_json
from torch import Tensor, nn
from tqdm import tqdm

from diffratio_mod import DiT, InputError
from sample import Parser, images_from_prompts, number, pick_device, read_checkpoint, run_command
from train_cifar import COLOURS, HELD_OUT, RELATIONS, SHAPES, Shapes

PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
HEADS = (3, len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES))


def labels_of(captions: list[str]) -> Tensor:
    """What the classifier should say: (count, 5) layout, colour and shape of the first and second object, -100 none."""
    rows = []
    for caption in captions:
        words = caption.split()
        first = [list(COLOURS).index(words[1]), SHAPES.index(words[2])]
        second = [list(COLOURS).index(words[-2]), SHAPES.index(words[-1])]
        if len(words) == 3:
            rows.append([0, *first, -100, -100])
            continue
        if words[3] in ("below", "right"):
            first, second = second, first
        layout = 1 if words[3] in ("above", "below") else 2
        rows.append([layout, *first, *second])
    return torch.tensor(rows)


def ragged(images: Tensor, rng: torch.Generator) -> Tensor:
    """Every pixel takes its colour from up to about a pixel away, with noise: edges as a small model draws them."""
    count, _, size, _ = images.shape
    strength = torch.rand(count, 1, 1, 1, generator=rng)
    grid = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(images.shape), align_corners=False)
    away = torch.randn(count, size, size, 2, generator=rng) * 1.2 / size
    images = F.grid_sample(images, grid + strength * away, padding_mode="border", align_corners=False)
    return images + 0.1 * strength * torch.randn(images.shape, generator=rng)


def trained_judge(size: int, device: torch.device | str = "cpu") -> nn.Module:
    """Train a judge, or read the one that an earlier call left in runs/. Its outputs are those of HEADS in a row."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise((3, 32, 64, 64, 128))):
        layers += [nn.Conv2d(a, b, 3, padding=1, stride=2 if i else 1), nn.GroupNorm(8, b), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(128 * (size // 8) ** 2, 256), nn.ReLU(), nn.Linear(256, sum(HEADS))]
    judge = nn.Sequential(*layers).to(device)
    steps = 1000

    def train() -> dict[str, Tensor]:
        optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
        data = Shapes(size, "all")
        rng = torch.Generator().manual_seed(1)
        for step in tqdm(range(steps), desc="training the judge", disable=None):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
            images, captions, _ = data.batch(128, rng)
            truth = labels_of(captions).to(device)
            said = judge(ragged(images, rng).to(device)).split(HEADS, dim=1)
            optimizer.zero_grad()
            sum(F.cross_entropy(out, truth[:, i]) for i, out in enumerate(said)).backward()
            optimizer.step()
        return judge.state_dict()

    judge.load_state_dict(cached(f"judge-{size}", train))
    return judge


@torch.no_grad()
def followed(judge: nn.Module, images: Tensor, captions: list[str]) -> Tensor:
    """Are the captions followed? (count,) of booleans."""
    truth = labels_of(captions)
    out = judge(images.to(next(judge.parameters()).device)).cpu()
    said = torch.stack([part.argmax(dim=1) for part in out.split(HEADS, dim=1)], dim=1)
    return ((said == truth) | (truth == -100)).all(dim=1)


def prompts_of(count: int, two: bool) -> list[str]:
    """Prompts that go through all pairs in turn, the second object and the relation drawn from a fixed seed."""
    rng = torch.Generator().manual_seed(2)
    prompts = []
    for i in range(count):
        (a, b), (c, d) = PAIRS[i % len(PAIRS)], PAIRS[int(torch.randint(len(PAIRS), (1,), generator=rng))]
        relation = RELATIONS[int(torch.randint(4, (1,), generator=rng))]
        prompts.append(f"a {a} {b} {relation} a {c} {d}" if two else f"a {a} {b}")
    return prompts


def mixed_prompts(count: int) -> list[str]:
    """Prompts with one object and with two, in turn."""
    pairs = zip(prompts_of(count // 2, two=False), prompts_of(count // 2, two=True))
    return list(itertools.chain.from_iterable(pairs))


def one_word_changed(caption: str, rng: torch.Generator) -> str:
    """The caption with another colour or another shape for one of its objects."""
    words = caption.split()
    places = [i for i, word in enumerate(words) if word in COLOURS or word in SHAPES]
    place = places[int(torch.randint(len(places), (1,), generator=rng))]
    others = [word for word in (COLOURS if words[place] in COLOURS else SHAPES) if word != words[place]]
    words[place] = others[int(torch.randint(len(others), (1,), generator=rng))]
    return " ".join(words)


def inpainting(model: DiT, judge: nn.Module, count: int, options: dict) -> tuple[Tensor, Tensor]:
    """Cut objects out of true renderings: is another one drawn there (count,)? How far is the same one from itself?"""
    size = model.config.image_size
    images, captions, masks = Shapes(size).batch(4 * count, torch.Generator().manual_seed(5))
    rows = [i for i, caption in enumerate(captions) if len(caption.split()) == 3][:count]
    known = images[rows]
    hole = torch.zeros(len(rows), 1, size, size)
    for i, mask in enumerate(masks[rows, 0] > 0):
        y = mask.any(dim=1).nonzero().flatten()
        x = mask.any(dim=0).nonzero().flatten()
        hole[i, 0, max(0, y[0] - 1) : y[-1] + 2, max(0, x[0] - 1) : x[-1] + 2] = 1
    options = options | {"known": known, "mask": hole}
    other = [f"a {a} {b}" for a, b in (PAIRS * count)[: len(rows)]]
    drawn = to_float(images_from_prompts(model, other, 1, **options))
    same = to_float(images_from_prompts(model, [captions[i] for i in rows], 1, **options))
    error = (((same - known).square() * hole).sum() / (3 * hole.sum())).sqrt()
    return followed(judge, drawn, other), error


def main() -> None:
    parser = Parser(__doc__)
    count = number(int, 1, 1000)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--num", type=count, default=240, help="prompts of each kind (default 240)")
    parser.add_argument("--steps", type=count, default=30)
    parser.add_argument("--guidance", type=number(float, 0, 100), default=3.0)
    parser.add_argument("--inpaint", type=number(int, 0, 10**4), default=96, help="images to inpaint; 0: none")
    parser.add_argument("--out", type=Path, default=RESULTS / "judge.json")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    options = {"steps": args.steps, "guidance": args.guidance}
    models = {str(path): read_checkpoint(path)[0].to(device) for path in args.checkpoints}
    size, *others = {model.config.image_size for model in models.values()}
    if others:
        raise InputError(f"the models draw images of {size} and {others[0]} pixels; judge each size in its own call")
    judge = trained_judge(size, device)
    rng = torch.Generator().manual_seed(3)
    results: dict = {"prompts of each kind": args.num, "device": str(device)} | options

    def note(what: str, value: Tensor) -> None:
        results[what] = float(value.float().mean())
        print(f"{what}: {results[what]:.3f}", flush=True)

    for pairs in ("seen", "held-out", "all"):
        images, captions, _ = Shapes(size, pairs).batch(2000, rng)
        note(f"true renderings, {pairs} pairs", followed(judge, images, captions))
    images = ragged(images, rng)
    note("the last with ragged edges", followed(judge, images, captions))
    wrong = [one_word_changed(caption, rng) for caption in captions]
    note("these with one word of the caption changed", followed(judge, images, wrong))
    for name, model in models.items():
        for kind in ("one object", "two objects"):
            prompts = prompts_of(args.num, kind == "two objects")
            right = followed(judge, to_float(images_from_prompts(model, prompts, 0, **options)), prompts)
            pairs = [(tuple(words[1:3]), tuple(words[-2:])) for words in map(str.split, prompts)]
            unseen = torch.tensor([a in HELD_OUT or b in HELD_OUT for a, b in pairs])
            for which, rows in (("seen", ~unseen), ("held-out", unseen)):
                note(f"{name}, {kind}, {which} pairs ({int(rows.sum())})", right[rows])
        if args.inpaint:
            right, error = inpainting(model, judge, args.inpaint, options)
            note(f"{name}, inpainting, another object asked for ({args.inpaint})", right)
            note(f"{name}, inpainting, the same object, root mean square error within the box ({args.inpaint})", error)
    write_json(results, args.out)


if __name__ == "__main__":
    run_command(main)
