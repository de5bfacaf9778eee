"""Train a DiffRatio-MoD model: first densely, or from a dense checkpoint, then learn its compression ratios.

    python train_cifar.py --dataset shapes --init assets/shapes_dense.pt   # the main job, 10 minutes on two CPU cores
    python train_cifar.py                                                  # CIFAR-10, for a GPU
    python train_cifar.py --dataset folder --data-dir pictures             # pictures/train/<class>/*.png or *.jpg
    python train_cifar.py --dataset shapes --resume                        # go on where a run was stopped

Leaves a run folder (--out, default runs/DATASET): checkpoint.pt, metrics.jsonl, ratios.json and ratios.png (the
learned table), samples.png (prompts and images), routing.png (which tokens each layer processed at which noise level).
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import platform
import shlex
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

from diffratio_mod import (
    MODES,
    Config,
    DiT,
    InputError,
    column_of,
    diffusion_loss,
    even_noise_levels,
    ratio_loss,
    schedule,
)
from sample import (
    Parser,
    build_model,
    check_config,
    draw_ratios,
    draw_routing,
    draw_samples,
    encode,
    generate,
    pick_device,
    read_checkpoint,
    read_picture,
    replacing,
    run_command,
    writing,
)

# ---------------------------------------------------------------------------------------------------------------------
# Data. A data set has a `vocabulary`, a `caption_length`, `prompts` to show, and a `batch` of images and captions.
# ---------------------------------------------------------------------------------------------------------------------

COLOURS = {  # RGB in [0, 1], far from each other in hue; backgrounds are nearly grey, so that a hue means an object
    "red": (0.90, 0.15, 0.15),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.15, 0.70, 0.20),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.15, 0.25, 0.90),
    "purple": (0.65, 0.20, 0.80),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("above", "below", "left of", "right of")
HELD_OUT = (("purple", "circle"), ("green", "square"), ("yellow", "triangle"), ("blue", "cross"))  # never trained on


class Shapes:
    """Anti-aliased coloured shapes on varied backgrounds, made on the fly: one, or two in a stated relation.

    pairs: "seen" draws only (colour, shape) pairs that training may use, "held-out" only the others, "all" both.
    """

    def __init__(self, image_size: int = 32, pairs: str = "seen") -> None:
        self.image_size = image_size
        every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
        self.pairs = [pair for pair in every if pairs == "all" or (pair in HELD_OUT) == (pairs == "held-out")]
        self.caption_length = 8
        self.vocabulary = tuple(dict.fromkeys(["a", *COLOURS, *SHAPES, *" ".join(RELATIONS).split()]))
        self.prompts = [f"a {colour} {shape}" for colour, shape in zip([*COLOURS, "red", "blue"], SHAPES * 2)] + [
            f"a {a} {SHAPES[i % 4]} {RELATIONS[i % 4]} a {b} {SHAPES[i // 2 - 1]}"
            for i, (a, b) in enumerate(zip([*COLOURS, "red", "blue"], ["blue", "green", "purple", "red"] * 2))
        ]

    def batch(self, count: int, rng: torch.Generator) -> tuple[Tensor, list[str], Tensor]:
        """Images (count, 3, S, S) in [-1, 1], their captions, and object masks (count, 2, S, S), coverage 0 to 1.

        Four images in ten have one object, six have two. The second mask of an image with one object is zero.
        """
        S, unit = self.image_size, self.image_size / 32

        def uniform(low: float | Tensor, high: float | Tensor, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=rng)

        pair = torch.randint(len(self.pairs), (count, 2), generator=rng)
        relation = torch.randint(4, (count,), generator=rng)
        two = torch.rand(count, generator=rng) < 0.6
        # One object lies near the middle; two lie in different halves, the first one before the second along the axis of
        # the relation ("above", "left of") or after it ("below", "right of").
        radius = unit * torch.where(two[:, None], uniform(5.5, 7, 2), uniform(8, 11, 2))
        order = torch.where((relation % 2 == 0)[:, None], torch.tensor([-1.0, 1.0]), torch.tensor([1.0, -1.0]))
        along = S / 2 + unit * (8 * order + uniform(-1, 1, 2))
        across = S / 2 + unit * uniform(-4, 4, 2)
        vertical = (relation < 2)[:, None]
        centre = torch.stack([torch.where(vertical, across, along), torch.where(vertical, along, across)], dim=2)
        alone = S / 2 + unit * uniform(-4, 4, 2)
        centre[:, 0] = torch.where(two[:, None], centre[:, 0], alone)  # (count, 2 objects, x and y)

        names = [[self.pairs[i] for i in row] for row in pair.tolist()]
        shape = torch.tensor([[SHAPES.index(shape) for _, shape in row] for row in names])
        colour = torch.tensor([[COLOURS[colour] for colour, _ in row] for row in names])
        masks = draw_shapes(shape, centre, radius, S)
        masks[:, 1] *= two[:, None, None]

        image = self._backgrounds(count, rng)
        colour = (colour + 0.05 * torch.randn(count, 2, 3, generator=rng)).clamp(0, 1)
        for i in range(2):
            image = torch.lerp(image, colour[:, i, :, None, None], masks[:, i, None])
        captions = [
            f"a {a} {b} {RELATIONS[r]} a {c} {d}" if both else f"a {a} {b}"
            for ((a, b), (c, d)), r, both in zip(names, relation.tolist(), two.tolist())
        ]
        return image * 2 - 1, captions, masks

    def _backgrounds(self, count: int, rng: torch.Generator) -> Tensor:
        """Nearly grey gradients in all directions: (count, 3, S, S) in [0, 1]."""
        x = torch.linspace(-0.5, 0.5, self.image_size)
        angle = 2 * math.pi * torch.rand(count, 1, 1, 1, generator=rng)
        ends = 0.1 + 0.8 * torch.rand(2, count, 1, 1, 1, generator=rng)
        ends = ends + 0.03 * torch.randn(2, count, 3, 1, 1, generator=rng)
        return torch.lerp(ends[0], ends[1], 0.5 + angle.cos() * x + angle.sin() * x[:, None]).clamp(0, 1)


def draw_shapes(shape: Tensor, centre: Tensor, radius: Tensor, size: int) -> Tensor:
    """Coverage masks (..., size, size) in [0, 1], anti-aliased from signed distances in pixels.

    shape (...): indices into SHAPES; centre (..., 2): x and y in pixels; radius (...): pixels.
    """
    grid = torch.arange(size) + 0.5
    x = grid[None, :] - centre[..., 0, None, None]  # (..., 1, size)
    y = grid[:, None] - centre[..., 1, None, None]
    r = radius[..., None, None]
    circle = (x**2 + y**2).sqrt() - r
    square = torch.maximum(x.abs(), y.abs()) - 0.86 * r
    triangle = torch.maximum(y - 0.75 * r, 0.866 * x.abs() - 0.5 * y - 0.5 * r)  # points up
    bar, arm = 0.34 * r, r
    cross = torch.minimum(
        torch.maximum(x.abs() - bar, y.abs() - arm), torch.maximum(x.abs() - arm, y.abs() - bar)
    )  # fmt: skip
    distance = torch.stack(torch.broadcast_tensors(circle, square, triangle, cross))  # (4, ..., size, size)
    index = shape[None, ..., None, None].expand(1, *distance.shape[1:])
    return (0.5 - distance.gather(0, index).squeeze(0)).clamp(0, 1)


class Pictures:
    """Images that fit into memory, captioned "a photo of a CLASS". flip: mirrored images are as good as the originals."""

    def __init__(self, images: np.ndarray, labels: list[int], classes: list[str], flip: bool) -> None:
        """images uint8 (count, S, S, 3), labels: for every image an index into classes."""
        self.images = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        self.labels, self.flip = labels, flip
        self.captions = ["a photo of a " + " ".join(name.lower().replace("_", " ").split()) for name in classes]
        self.vocabulary = tuple(dict.fromkeys(" ".join(self.captions).split()))
        self.caption_length = max(8, max(len(caption.split()) for caption in self.captions))
        self.prompts = (self.captions * 16)[: max(16, min(len(classes), 32))]

    def batch(self, count: int, rng: torch.Generator) -> tuple[Tensor, list[str], None]:
        """Images (count, 3, S, S) in [-1, 1] drawn with replacement, their captions, and no object masks."""
        rows = torch.randint(len(self.images), (count,), generator=rng)
        images = self.images[rows].float() / 127.5 - 1
        mirrored = torch.rand(count, 1, 1, 1, generator=rng) < 0.5
        if self.flip:
            images = torch.where(mirrored, images.flip(3), images)
        return images, [self.captions[self.labels[row]] for row in rows.tolist()], None


def load_folder(data_dir: Path, size: int, part: str = "train") -> Pictures:
    """The user's own images, data_dir/train/<class>/*.png or *.jpg, resized to size x size. Raises InputError."""
    root = data_dir / part
    classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((root / name).iterdir()):
            if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
                images.append(np.asarray(read_picture(path, size, "RGB")))
                labels.append(label)
    if not images:
        raise InputError(f"no images in {root}; expected {root}/<class>/*.png or *.jpg")
    return Pictures(np.stack(images), labels, classes, flip=False)


def load_torchvision(name: str, data_dir: Path, size: int) -> Pictures:
    """A data set of torchvision, downloaded to data_dir if it is not there. Raises InputError."""
    kind, flip = {
        "cifar10": (torchvision.datasets.CIFAR10, True),
        "cifar100": (torchvision.datasets.CIFAR100, True),
        "fashion_mnist": (torchvision.datasets.FashionMNIST, True),
        "svhn": (torchvision.datasets.SVHN, False),
    }[name]
    options = {"split": "train"} if name == "svhn" else {"train": True}
    try:
        data = kind(str(data_dir), download=True, **options)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"could not load or download {name} to {data_dir} ({error}); give --data-dir with a copy that is at hand, "
            "or train on --dataset shapes, which needs no download"
        ) from None
    pictures = [picture.convert("RGB").resize((size, size)) for picture, _ in data]
    classes = getattr(data, "classes", list("0123456789"))
    return Pictures(np.stack([np.asarray(picture) for picture in pictures]), [int(y) for _, y in data], classes, flip)


DATASETS = ("shapes", "cifar10", "cifar100", "fashion_mnist", "svhn", "folder")


def load_data(name: str, data_dir: Path, size: int) -> Shapes | Pictures:
    """A data set by its name, with images of size x size. Raises InputError."""
    if name == "shapes":
        return Shapes(size)
    return load_folder(data_dir, size) if name == "folder" else load_torchvision(name, data_dir, size)


def every_nth_region(t: Tensor, regions: int, n: int, step: int) -> Tensor:
    """Move noise levels (B,) that cover (0, 1) evenly into one of every n neighbouring regions, another at each step.

    A step then runs its batch in fewer and larger groups, which is faster (see diffusion_loss); over n steps all regions
    have had the same share. What is left over when n does not divide the regions stays where it was.
    """
    place = t * regions  # the region, and behind the point the place in it
    first = (place / n).floor() * n  # of the n neighbours
    moved = first + step % n + (place - first) / n
    return torch.where(first + n <= regions, moved, place) / regions


def random_masks(count: int, size: int, rng: torch.Generator) -> Tensor:
    """Masks for inpainting (count, 1, S, S), 1 = generate: a random box for one image in four, else all ones."""
    corner = torch.rand(count, 2, generator=rng) * 0.75
    end = corner + 0.25 + (0.75 - corner) * torch.rand(count, 2, generator=rng)  # sides of a quarter to the whole
    grid = (torch.arange(size) + 0.5) / size
    inside = (grid >= corner[..., None]) & (grid < end[..., None])  # (count, 2, S)
    box = (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
    whole = torch.rand(count, 1, 1, 1, generator=rng) < 0.75
    return (box | whole).float()


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

# name: (default, type, help). The defaults that depend on other flags are filled in by `settle`.
FLAGS = {
    "dataset": ("cifar10", str, "what to train on: " + ", ".join(DATASETS)),
    "data-dir": ("data", str, "folder with the data set, or to download it to"),
    "out": (None, str, "run folder (default runs/DATASET)"),
    "steps": (None, int, "optimizer steps in all (default 750 for shapes with --init, 3000 without; else 30000)"),
    "batch-size": (64, int, "images a step"),
    "lr": (None, float, "peak learning rate of the weights (default 3e-3 * 128 / dim; a quarter of it with --init)"),
    "mode": ("layer-timestep", str, "the ratio table: " + ", ".join(MODES)),
    "target-ratio": (0.3, float, "target of the mean compression ratio, the share of tokens that bypass, 0 to 1"),
    "timestep-regions": (10, int, "regions of noise levels with ratios of their own"),
    "every-nth-region": (1, int, "layer-timestep: a routed step takes one of every n regions, in turn; 2 is faster"),
    "ratio-weight": (2.0, float, "weight of the ratio loss; 0 switches the pull to the target off"),
    "ratio-lr": (1e-2, float, "learning rate of the ratios"),
    "dense-fraction": (None, float, "share of the steps before routing begins (default 0.6; with --init 0)"),
    "noise-weight": (2.0, float, "dense part: weigh the loss by (1 / signal) to this power; 2: the loss in v, 0: off"),
    "routed-noise-weight": (0.0, float, "the same for the routed part; 0 is the paper's loss"),
    "init": (None, str, "start from the weights of this dense checkpoint"),
    "device": ("auto", str, "auto, cuda, mps or cpu"),
    "seed": (0, int, "seed of the weights, the data order and the noise"),
    "image-size": (None, int, "pixels a side; other images are resized (default 24 for shapes, else 32)"),
    "dim": (128, int, "width of the network"),
    "depth": (6, int, "layers"),
    "heads": (4, int, "attention heads"),
    "patch-size": (None, int, "pixels a side; a token is one patch (default 3 for shapes, else 4)"),
    "log-every": (20, int, "steps between lines of metrics.jsonl"),
    "save-every": (200, int, "steps between checkpoints"),
    "keep-every": (0.0, float, "keep a model on the way at each multiple of this mean ratio, as ratio-0.1.pt; 0: off"),
}
ARCHITECTURE = ("image-size", "dim", "depth", "heads", "patch-size")  # taken from the checkpoint with --init


def arguments() -> dict:
    """The settings of the run, from the command line; flags that were not given are absent."""
    parser = Parser(
        description="Train a DiffRatio-MoD model. See the top of this file for examples.",
        argument_default=argparse.SUPPRESS,
    )
    for name, (default, kind, text) in FLAGS.items():
        shown = "" if default is None else f" (default {default})"
        parser.add_argument("--" + name, type=kind, help=text + shown, metavar=kind.__name__.upper())
    parser.add_argument("--amp", action="store_true", help="run the network in bfloat16 (default off)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return {name.replace("_", "-"): value for name, value in vars(parser.parse_args()).items()}


def settle(given: dict) -> dict:
    """Fill in the defaults and check every value. Raises InputError."""
    s = {name: default for name, (default, _, _) in FLAGS.items()} | {"amp": False} | given
    shapes, start = s["dataset"] == "shapes", s["init"] is not None
    late = {
        "out": f"runs/{s['dataset']}",
        "image-size": 24 if shapes else 32,
        "patch-size": 3 if shapes else 4,
        "steps": (750 if start else 3000) if shapes else 30000,
        "lr": 3e-3 * (128 / max(1, s["dim"])) * (0.25 if start else 1),
        "dense-fraction": 0.0 if start else 0.6,
    }
    s |= {name: value for name, value in late.items() if s[name] is None}
    for name, (_, kind, _) in (FLAGS | {"amp": (0, bool, "")}).items():  # those from a checkpoint can be anything
        kinds = (int, float) if kind is float else (kind,)
        if type(s[name]) not in kinds and not (name == "init" and s[name] is None):
            raise InputError(f"--{name} must be of type {kind.__name__}, not {str(s[name])[:40]!r}")
    if s["dataset"] not in DATASETS:
        raise InputError(f"unknown data set {s['dataset']!r}; known: {', '.join(DATASETS)}")
    if s["mode"] not in MODES:
        raise InputError(f"unknown mode {s['mode']!r}; known: {', '.join(MODES)}")
    for name, low, high in (
        ("steps", 0, 10**9), ("batch-size", 1, 10**5), ("lr", 0, 1), ("ratio-weight", 0, 1e4), ("ratio-lr", 0, 1), ("noise-weight", 0, 4),
        ("dense-fraction", 0, 1), ("seed", 0, 10**9), ("log-every", 1, 10**9), ("save-every", 1, 10**9),
        ("keep-every", 0, 1), ("routed-noise-weight", 0, 4), ("every-nth-region", 1, max(1, s["timestep-regions"])),
    ):  # fmt: skip
        if not low <= s[name] <= high:
            raise InputError(f"--{name} must be from {low} to {high:g}, not {s[name]}")
    if not 0 <= s["target-ratio"] < 1:
        raise InputError(f"--target-ratio must be in [0, 1), not {s['target-ratio']}: it is the share that bypasses")
    return s


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Run:
    """A training run: the model, its EMA, the optimizer, and everything else that a checkpoint holds."""

    def __init__(self, settings: dict, config: Config, data: Shapes | Pictures) -> None:
        self.settings, self.config, self.data = settings, config, data
        self.out, self.device = Path(settings["out"]), pick_device(settings["device"])
        self.step, self.seconds, self.made_by = 0, 0.0, [made_by()]
        torch.manual_seed(settings["seed"])
        self.model = DiT(config).to(self.device)
        self.ema = copy.deepcopy(self.model).eval()
        weights = [p for name, p in self.model.named_parameters() if name != "ratios"]
        # The ratios have a learning rate of their own, and no weight decay: they should not drift to zero.
        groups = [{"params": weights, "peak": settings["lr"], "weight_decay": 0.01}]
        groups += [{"params": [self.model.ratios], "peak": settings["ratio-lr"], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99))
        self.dense_steps = round(settings["dense-fraction"] * settings["steps"])
        # Since the last line of metrics, for each region: the sum of the losses, and the number of images.
        self.sums = torch.zeros(2, config.regions, dtype=torch.float64)

    def load(self, model: DiT, ema: DiT) -> None:
        """Take over the weights of two other models."""
        self.model.load_state_dict(model.state_dict())
        self.ema.load_state_dict(ema.state_dict())

    def train_step(self) -> float:
        """One optimizer step. Returns the diffusion loss, the plain mean over the batch.

        Raises InputError, with the weights as they were, where the loss or its gradient is not finite.
        """
        s, config, B = self.settings, self.config, self.settings["batch-size"]
        # All randomness of a step comes from the seed and the step, so a resumed run draws what an unbroken one would.
        rng = torch.Generator().manual_seed(s["seed"] * 1_000_000_007 + self.step)
        images, captions, _ = self.data.batch(B, rng)
        words = encode(config, captions)
        words[torch.rand(B, generator=rng) < 0.1] = 0  # the null caption, for classifier-free guidance
        mask = random_masks(B, config.image_size, rng)
        t = even_noise_levels(B, rng)
        routed = self.step >= self.dense_steps and config.mode != "dense"
        if routed and s["every-nth-region"] > 1:
            t = every_nth_region(t, self.model.ratios.shape[1], s["every-nth-region"], self.step)
        noise = torch.randn(images.shape, generator=rng)
        images, words, mask, noise = (z.to(self.device) for z in (images, words, mask, noise))

        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.learning_rate_factor()
        if routed and config.mode == "uniform":
            self.model.ratios.data.fill_(s["target-ratio"])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=s["amp"]):
            losses = diffusion_loss(self.model, images, words, mask, t, noise, route=routed)  # (B,)
        # The plain loss is nearly blind to the noisiest levels, where the layout of an image is decided: there the noise
        # is easy to predict. A network that starts from nothing learns it sooner with the loss in v, which weighs them
        # more (see the end of DiT.forward). The routed part uses the plain loss, as the paper does: it decides what
        # skipping costs.
        weight = schedule(t.to(self.device))[0] ** -s["routed-noise-weight" if routed else "noise-weight"]
        loss = (losses * weight).mean()
        if routed and self.model.ratios.requires_grad:
            loss = loss + s["ratio-weight"] * ratio_loss(self.model.ratios, s["target-ratio"])
        self.optimizer.zero_grad()
        loss.backward()
        weights = self.optimizer.param_groups[0]["params"]
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)

        region = torch.tensor([column_of(level, config.regions) for level in t.tolist()])
        losses = losses.detach().double().cpu()
        by_region = torch.zeros(2, config.regions, dtype=torch.float64)
        by_region[0].index_add_(0, region, losses)
        by_region[1].index_add_(0, region, torch.ones_like(losses))
        if not torch.isfinite(losses).all() or not torch.isfinite(norm):
            where = [c + 1 for c in range(config.regions) if not torch.isfinite(by_region[0, c])] or "none"
            raise InputError(
                f"the loss or its gradient is not finite at step {self.step} (timestep regions: {where}); the weights "
                f"were not changed, {self.checkpoint_words()}; try a lower --lr, or without --amp"
            )
        before = float(self.ema.ratios.detach().mean())
        self.optimizer.step()
        self.model.clamp_ratios()
        self.step += 1
        self.update_ema()
        self.keep(before)
        self.sums += by_region
        return float(losses.mean())

    def learning_rate_factor(self) -> float:
        """A short warm-up, a plateau, and a linear decay over the last 40 % of the steps."""
        steps = self.settings["steps"]
        return min(1.0, (self.step + 1) / min(100, 0.1 * steps + 1), (steps - self.step) / (0.4 * steps))

    @torch.no_grad()
    def update_ema(self) -> None:
        """Average the weights over about the last tenth of the run so far, at most over 2,000 steps."""
        decay = min(0.9995, self.step / (self.step + 9))
        for mine, theirs in zip(self.ema.parameters(), self.model.parameters()):
            mine.lerp_(theirs, 1 - decay)
        self.ema.ratios.copy_(self.model.ratios)  # not averaged: the weights have adapted to the newest k

    # --- what is written -------------------------------------------------------------------------------------------

    def checkpoint_words(self) -> str:
        """What of the run is safe on disk, for an error message."""
        path = self.out / "checkpoint.pt"
        return f"{path} holds the last good state" if path.exists() else "no checkpoint had been written yet"

    def averaged(self) -> dict:
        """What sampling needs of a checkpoint."""
        own = {"config": asdict(self.config), "ema": self.ema.state_dict(), "prompts": list(self.data.prompts)}
        return own | {"step": self.step, "made_by": self.made_by}

    def write(self, name: str, state: dict) -> None:
        """Write to a file beside it, flush it to disk, then rename: an older file of this name stays whole till then."""
        content = io.BytesIO()  # torch.save turns an error of the disk into one of its own, so it does not see the disk
        torch.save(state, content)
        with replacing(self.out / name) as file:
            file.write(content.getbuffer())

    def save(self) -> None:
        """Write the checkpoint, from which the run can go on."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "settings": self.settings,
            "seconds": self.seconds,
            "sums": self.sums,
        }
        self.write("checkpoint.pt", self.averaged() | state)

    def keep(self, before: float) -> None:
        """Keep the averaged model if the mean ratio has risen from `before` past a multiple of --keep-every.

        On the way to its target a run passes every smaller mean ratio: these are the paper's by-product models (figure
        7). One that is passed more than once is kept as it was the last time.
        """
        every, now = self.settings["keep-every"], float(self.ema.ratios.detach().mean())
        if every and self.model.ratios.requires_grad and now // every > before // every:
            self.write(f"ratio-{now // every * every:g}.pt", self.averaged())

    def log(self) -> None:
        """Append a line to metrics.jsonl."""
        total, count = self.sums.sum(dim=1).tolist()
        ratios = self.model.ratios.detach()
        line = {
            "step": self.step,
            "loss": total / count,
            "loss_by_region": [a / b if b else None for a, b in zip(*self.sums.tolist())],
            "mean_ratio": float(ratios.mean()),
            "ratio_by_layer": ratios.mean(dim=1).tolist(),
            "seconds": round(self.seconds, 2),
        }
        with writing(self.out / "metrics.jsonl", "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
        self.sums.zero_()

    def show(self) -> None:
        """Write ratios.json, ratios.png, samples.png and routing.png from the EMA weights."""
        ratios, seed = self.ema.ratios.detach().cpu(), self.settings["seed"]
        table = {
            "about": "compression ratio, the share of tokens that bypass; a row a layer, a column a timestep region, "
            "the least noisy first",
            "mode": self.config.mode,
            "target": self.settings["target-ratio"],
            "mean": float(ratios.mean()),
            "ratios": [[round(ratio, 4) for ratio in row] for row in ratios.tolist()],
        }
        text = json.dumps(table, indent=1).replace("\n   ", " ").replace("\n  ]", "]")
        with replacing(self.out / "ratios.json") as file:
            file.write(text.encode())
        pictures = {
            "ratios": draw_ratios(ratios, f"Ratios of mode {self.config.mode}, mean {float(ratios.mean()):.3f}")
        }
        prompts = self.data.prompts
        pictures["samples"] = draw_samples(generate(self.ema, prompts, seed), prompts)
        if self.config.mode != "dense":
            pictures["routing"] = draw_routing(self.ema, prompts[:3], seed)
        for name, picture in pictures.items():
            with replacing(self.out / f"{name}.png") as file:
                picture.save(file, "PNG")


def made_by() -> dict[str, str]:
    """What made a checkpoint: versions and command line."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "platform": platform.machine(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def start(given: dict) -> Run:
    """A new run, from scratch or from the weights of --init. Raises InputError; writes nothing."""
    path = Path(given["init"]) if given.get("init") else None
    source = build_model(read_checkpoint(path), path) if path else None
    if source is not None:  # the checkpoint decides on the architecture
        for name in ARCHITECTURE:
            value = getattr(source.config, name.replace("-", "_"))
            if given.setdefault(name, value) != value:
                raise InputError(f"--{name} {given[name]} does not fit the model of --init, which has {value}")
    s = settle(given)
    if (Path(s["out"]) / "checkpoint.pt").exists():
        raise InputError(f"{s['out']} holds a run already; --resume goes on with it, another --out starts a new one")
    sizes = {name.replace("-", "_"): s[name] for name in ARCHITECTURE}
    sizes |= {"mode": s["mode"], "regions": s["timestep-regions"]}
    check_config(sizes | {"vocabulary": ("word",), "caption_length": 8})  # refused before any data is loaded
    data = load_data(s["dataset"], Path(s["data-dir"]), s["image-size"])
    config = check_config(sizes | {"vocabulary": data.vocabulary, "caption_length": data.caption_length})
    run = Run(s, config, data)
    if source is not None:
        if (source.config.vocabulary, source.config.caption_length) != (data.vocabulary, data.caption_length):
            raise InputError(f"the model of --init {path} was trained on captions of another data set")
        source.ratios = run.model.ratios
        run.load(source, source)
    return run


def resume(given: dict) -> Run:
    """Go on with the run in --out, with its own settings. Raises InputError; writes nothing but metrics.jsonl."""
    out = Path(given.get("out") or settle(given)["out"])
    path = out / "checkpoint.pt"
    checkpoint = read_checkpoint(path)
    model, ema = build_model(checkpoint, path, "model"), build_model(checkpoint, path)
    try:
        settings = settle(checkpoint["settings"])
        for name, value in given.items():
            if name not in ("resume", "out", "device", "data-dir") and settings[name] != value:
                raise InputError(f"the run in {out} has --{name} {settings[name]}, not {value}; it resumes as it began")
        settings |= {name: given[name] for name in ("device", "data-dir") if name in given} | {"out": str(out)}
        data = load_data(settings["dataset"], Path(settings["data-dir"]), model.config.image_size)
        if (data.vocabulary, data.caption_length) != (model.config.vocabulary, model.config.caption_length):
            raise InputError(f"the data in {settings['data-dir']} has other captions than the run in {out}")
        run = Run(settings, model.config, data)
        run.load(model, ema)
        groups = run.optimizer.state_dict()["param_groups"]  # from the settings, never from the file
        run.optimizer.load_state_dict({"state": dict(checkpoint["optimizer"])["state"], "param_groups": groups})
        for parameter, state in run.optimizer.state.items():
            mean, square, count = state["exp_avg"], state["exp_avg_sq"], state["step"]
            fits = mean.shape == square.shape == parameter.shape and count.shape == () and count >= 1
            if not fits or not mean.isfinite().all() or not square.isfinite().all() or square.min() < 0:
                raise InputError(f"{path}: the optimizer's state does not fit the weights")
        run.step, run.seconds, sums = int(checkpoint["step"]), float(checkpoint["seconds"]), checkpoint["sums"]
        if not 0 <= run.step <= settings["steps"] or not 0 <= run.seconds < math.inf:
            raise InputError(f"{path}: step {run.step}, {run.seconds} s do not fit a run of {settings['steps']} steps")
        if sums.shape != run.sums.shape or not sums.isfinite().all():
            raise InputError(f"{path}: the sums of the losses are not finite numbers for {run.config.regions} regions")
        run.sums.copy_(sums)
        run.made_by = [*checkpoint["made_by"], *run.made_by]  # one entry for each time it was started
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path} cannot be resumed: {type(error).__name__} {error}") from None
    # Lines after the checkpoint will be written again.
    metrics = out / "metrics.jsonl"
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and step_of(line) <= run.step]
        with replacing(metrics) as file:
            file.write("".join(kept).encode())
    return run


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for one that is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def main() -> int:
    given = arguments()
    run = resume(given) if given.pop("resume", False) else start(given)
    s = run.settings
    run.out.mkdir(parents=True, exist_ok=True)
    with writing(run.out / "metrics.jsonl", "ab" if run.step else "wb"):
        pass  # a folder that cannot be written to is noticed now; lines of a run that never saved go
    stop: list[int] = []

    def on_signal(number: int, _: object) -> None:
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    began = time.perf_counter() - run.seconds
    average = None
    with tqdm(total=s["steps"], initial=run.step, unit="step", dynamic_ncols=True) as bar:
        while run.step < s["steps"]:
            loss = run.train_step()
            run.seconds = time.perf_counter() - began
            average = loss if average is None else 0.95 * average + 0.05 * loss
            bar.update()
            bar.set_postfix_str(
                f"loss {average:.4f}, mean ratio {float(run.model.ratios.detach().mean()):.3f}", refresh=False
            )
            if run.step % s["log-every"] == 0 or run.step == s["steps"]:
                run.log()
            if stop:
                break
            if run.step % s["save-every"] == 0:
                run.save()
    run.save()
    if stop:
        again = shlex.join(["python", sys.argv[0], "--dataset", s["dataset"], "--out", s["out"], "--resume"])
        print(
            f"stopped after step {run.step}, saved to {run.out / 'checkpoint.pt'}; go on with: {again}", file=sys.stderr
        )
        return 128 + stop[0]
    run.show()
    print(
        f"{run.step} steps in {run.seconds / 60:.1f} minutes, mean ratio {float(run.ema.ratios.detach().mean()):.3f}; see {run.out}"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
