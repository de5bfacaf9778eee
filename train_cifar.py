"""Train a DiffRatio-MoD model: first densely, or from a dense checkpoint, then learn its compression ratios.

    python train_cifar.py --dataset shapes --init assets/shapes_dense.pt   # the main job, minutes on two CPU cores
    python train_cifar.py                                                  # CIFAR-10, for a GPU
    python train_cifar.py --dataset folder --data-dir pictures             # pictures/train/<class>/*.png or *.jpg
    python train_cifar.py --dataset shapes --resume --steps 1500           # go on with a run, here for longer

Leaves in a run folder (--out, default runs/DATASET): checkpoint.pt, metrics.jsonl, ratios.json (the learned table), and
the pictures curves, ratios, samples and routing (which tokens a layer processed), renewed at each quarter of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import sample as tools  # isort: skip (first: it prepares torch and diffratio_mod)
import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import diffratio_mod as method

# --- Settings --------------------------------------------------------------------------------------------------------

DATASETS = {"shapes": "", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}  # and their names in torchvision
DATASETS |= {"fashion_mnist": "FashionMNIST", "svhn": "SVHN", "folder": "ImageFolder"}
NETWORK = ("image_size", "patch_size", "dim", "depth", "heads")  # taken from the checkpoint with --init
MAY_CHANGE = ("out", "resume", "steps", "device", "data_dir", "log_every", "save_every", "compile")


def make_parser() -> argparse.ArgumentParser:
    """The command line. A default that depends on other flags is None here, and filled in by `fill_defaults`."""
    count, share = tools.number(int, 1, 10**9), tools.number(float, 0, 1)
    parser = tools.Parser(__doc__)
    add = parser.add_argument_group("the run").add_argument
    add("--dataset", choices=DATASETS, default="cifar10", help="what to train on (default cifar10)")
    add("--data-dir", default="data", help="folder with the data set, or to download it to (default data)")
    add("--out", help="run folder (default runs/DATASET)")
    add("--init", help="start from the weights of this checkpoint")
    add("--resume", action="store_true", help="go on with the run in --out, for longer if --steps says so")
    add("--steps", type=count, help="in all (default 750 for shapes with --init, 3000 without; else 30000)")
    add("--batch-size", type=tools.number(int, 1, 2**16), default=64, help="images a step (default 64)")
    add("--seed", type=tools.number(int, 0, 10**9), default=0, help="of weights, data and noise (default 0)")
    add("--log-every", type=count, default=20, help="steps between lines of metrics.jsonl (default 20)")
    add("--save-every", type=count, default=200, help="steps between checkpoints (default 200)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    add("--amp", action="store_true", help="run the network in bfloat16 (default off)")
    add("--compile", action="store_true", help="compile the loss; needs a C++ compiler (default off)")
    add = parser.add_argument_group("the method").add_argument
    add("--mode", choices=method.MODES, default="layer-timestep", help="of the table (default layer-timestep)")
    add("--target-ratio", type=tools.number(float, 0, 0.99), default=0.3, help="share that bypasses (default 0.3)")
    add("--timestep-regions", type=tools.number(int, 1, 1000), default=10, help="columns of the table (default 10)")
    add("--ratio-weight", type=tools.number(float, 0, 1e4), default=2.0, help="of the pull; 0: off (default 2)")
    add("--ratio-lr", type=share, default=1e-2, help="learning rate of the ratios (default 0.01)")
    add("--dense-steps", type=tools.number(int, 0, 10**9), help="first, without routing (default 60 %%; with --init 0)")
    add = parser.add_argument_group("the network and its training").add_argument
    add("--lr", type=share, help="peak, for AdamW (default 3e-3 * 128 / dim; a quarter of it with --init)")
    add("--muon-lr", type=share, help="peak, for the layers' matrices (default 0.01; a quarter of it with --init)")
    noise = {"type": tools.number(float, -9, 9), "nargs": 2, "metavar": ("MEAN", "DEVIATION")}
    add("--noise", **noise, help="of log(noise / signal) (default -1 1.2; shapes from nothing 0 1.6)")
    for name, default in zip(NETWORK, ("32, shapes 24", "4, shapes 3", "128", "6", "4")):
        add("--" + name.replace("_", "-"), type=tools.number(int, 1, 2048), help=f"default {default}")
    return parser


def fill_defaults(s: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on other settings. Raises InputError where settings do not fit together."""
    late = dict(zip(NETWORK, (24, 3, 128, 6, 4) if s.dataset == "shapes" else (32, 4, 128, 6, 4)))
    if s.init:
        source = tools.read_checkpoint(Path(s.init))[0].config
        late = {name: getattr(source, name) for name in NETWORK}
        if wrong := [name for name in NETWORK if getattr(s, name) not in (None, late[name])]:
            raise method.InputError(f"--{wrong[0].replace('_', '-')} does not fit --init, which has {late[wrong[0]]}")
    late["steps"], share = 30000 if s.dataset != "shapes" else 750 if s.init else 3000, 0.25 if s.init else 1.0
    late |= {"lr": share * 3e-3 * 128 / (s.dim or late["dim"]), "muon_lr": share * 0.01}
    late["noise"] = [-1.0, 1.2] if s.init or s.dataset != "shapes" else [0.0, 1.6]  # much noise teaches layout
    late["dense_steps"] = 0 if s.init else round(0.6 * (s.steps or late["steps"]))
    s = argparse.Namespace(**vars(s) | {name: value for name, value in late.items() if getattr(s, name) is None})
    method.Config(("word",), *map(vars(s).get, NETWORK), 8, s.mode, s.timestep_regions)  # refuses bad sizes at once
    return s


# --- Data: a vocabulary, a caption_length, prompts to show, and batches of images and captions -----------------------

# RGB in [0, 1], far from each other in hue; backgrounds are nearly grey, so that a hue means an object.
COLOURS = {"red": (0.90, 0.15, 0.15), "yellow": (0.95, 0.85, 0.10), "green": (0.15, 0.70, 0.20)}
COLOURS |= {"cyan": (0.10, 0.80, 0.85), "blue": (0.15, 0.25, 0.90), "purple": (0.65, 0.20, 0.80)}
SHAPES, RELATIONS = ("circle", "square", "triangle", "cross"), ("above", "below", "left of", "right of")
HELD_OUT = (("purple", "circle"), ("green", "square"), ("yellow", "triangle"), ("blue", "cross"))  # never trained on


class Shapes:
    """Coloured shapes, made on the fly: one, or two in a relation. pairs: "seen" in training, "held-out" or "all"."""

    def __init__(self, image_size: int = 32, pairs: str = "seen") -> None:
        held_out = {"seen": (False,), "held-out": (True,), "all": (False, True)}[pairs]
        self.pairs = [(a, b) for a in COLOURS for b in SHAPES if ((a, b) in HELD_OUT) in held_out]
        self.image_size, self.caption_length = image_size, 8
        self.vocabulary = tuple(dict.fromkeys(["a", *COLOURS, *SHAPES, *" ".join(RELATIONS).split()]))
        two = enumerate(zip([*COLOURS, "red", "blue"], ["blue", "green", "purple", "red"] * 2))
        self.prompts = [f"a {colour} {shape}" for colour, shape in zip([*COLOURS, "red", "blue"], SHAPES * 2)]
        self.prompts += [f"a {a} {SHAPES[i % 4]} {RELATIONS[i % 4]} a {b} {SHAPES[i // 2 - 1]}" for i, (a, b) in two]

    def batch(self, count: int, rng: torch.Generator) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Images (count, 3, S, S) in [-1, 1], captions, object masks (count, 2, S, S); four in ten have one object."""
        S, unit = self.image_size, self.image_size / 32
        pair = torch.randint(len(self.pairs), (count, 2), generator=rng)
        relation = torch.randint(4, (count,), generator=rng)
        two = torch.rand(count, 1, generator=rng) < 0.6
        # One object lies near the middle; two lie in different halves, the first before the second along the axis of
        # the relation ("above", "left of") or after it ("below", "right of"). All are (count, 2 objects).
        small, large, along, across, alone = torch.rand(5, count, 2, generator=rng)
        radius = unit * torch.where(two, 5.5 + 1.5 * small, 8 + 3 * large)
        order = (2.0 * (relation[:, None] % 2) - 1) * torch.tensor([1.0, -1.0])
        along, across = S / 2 + unit * (8 * order + (2 * along - 1)), S / 2 + unit * (8 * across - 4)
        centre = torch.stack([along, across], dim=2)  # (count, 2, x and y)
        centre = torch.where((relation < 2)[:, None, None], centre.flip(2), centre)
        centre[:, 0] = torch.where(two, centre[:, 0], S / 2 + unit * (8 * alone - 4))
        masks = draw_shapes(torch.tensor([SHAPES.index(shape) for _, shape in self.pairs])[pair], centre, radius, S)
        masks[:, 1] *= two[:, None]

        # Backgrounds: nearly grey gradients in all directions, (count, 3, S, S).
        x, angle = torch.linspace(-0.5, 0.5, S), 2 * torch.pi * torch.rand(count, 1, 1, 1, generator=rng)
        ends = 0.1 + 0.8 * torch.rand(2, count, 1, 1, 1, generator=rng)
        ends = ends + 0.03 * torch.randn(2, count, 3, 1, 1, generator=rng)
        image = torch.lerp(ends[0], ends[1], 0.5 + angle.cos() * x + angle.sin() * x[:, None]).clamp(0, 1)
        colour = torch.tensor([COLOURS[name] for name, _ in self.pairs])[pair]
        colour = (colour + 0.05 * torch.randn(count, 2, 3, generator=rng)).clamp(0, 1)
        for i in range(2):
            image = torch.lerp(image, colour[:, i, :, None, None], masks[:, i, None])
        told = [f"a {colour} {shape}" for colour, shape in self.pairs]
        rows = zip(pair.tolist(), relation.tolist(), two.flatten().tolist())
        return image * 2 - 1, [told[i] + f" {RELATIONS[r]} {told[j]}" * both for (i, j), r, both in rows], masks


def draw_shapes(shape: torch.Tensor, centre: torch.Tensor, radius: torch.Tensor, size: int) -> torch.Tensor:
    """Anti-aliased masks (..., size, size) of shapes (...), indices into SHAPES, with centres (..., 2), x and y."""
    grid, r = torch.arange(size) + 0.5, radius[..., None, None]
    x, y = grid - centre[..., 0, None, None], grid[:, None] - centre[..., 1, None, None]
    circle = (x**2 + y**2).sqrt() - r
    square = torch.maximum(x.abs(), y.abs()) - 0.86 * r
    triangle = torch.maximum(y - 0.75 * r, 0.866 * x.abs() - 0.5 * y - 0.5 * r)  # points up
    upright, flat = torch.maximum(x.abs() - 0.34 * r, y.abs() - r), torch.maximum(x.abs() - r, y.abs() - 0.34 * r)
    distance = torch.stack([circle, square, triangle, torch.minimum(upright, flat)])  # in pixels, signed
    distance = distance.gather(0, shape[None, ..., None, None].expand(1, *distance.shape[1:]))
    return (0.5 - distance[0]).clamp(0, 1)


class Pictures:
    """Images (count, S, S, 3), uint8, captioned "a photo of a CLASS"; flip: mirrored ones are as good."""

    def __init__(self, images: np.ndarray, labels: Sequence[int], classes: Sequence[str], flip: bool) -> None:
        self.images, self.labels, self.flip = torch.from_numpy(images).permute(0, 3, 1, 2), labels, flip
        self.captions = ["a photo of a " + " ".join(name.lower().replace("_", " ").split()) for name in classes]
        self.vocabulary = tuple(dict.fromkeys(" ".join(self.captions).split()))
        self.caption_length = max(8, max(len(caption.split()) for caption in self.captions))
        self.prompts = (self.captions * 16)[: max(16, min(len(classes), 32))]

    def batch(self, count: int, rng: torch.Generator) -> tuple[torch.Tensor, list[str], None]:
        """Images (count, 3, S, S) in [-1, 1] drawn with replacement, their captions, and no object masks."""
        rows = torch.randint(len(self.images), (count,), generator=rng)
        images = self.images[rows].float() / 127.5 - 1
        mirrored = (torch.rand(count, 1, 1, 1, generator=rng) < 0.5) & self.flip
        captions = [self.captions[self.labels[row]] for row in rows.tolist()]
        return torch.where(mirrored, images.flip(3), images), captions, None


def load_data(s: argparse.Namespace, part: str = "train") -> Shapes | Pictures:
    """The data set of the settings dataset, data_dir, image_size. part: "train", mirrored but for digits, or "test"."""
    if s.dataset == "shapes":
        return Shapes(s.image_size)
    folder, needs = f"{s.data_dir}/{part}", "shapes needs no data, folder needs pictures in"
    with tools.input_errors(f"no --dataset {s.dataset} in --data-dir {s.data_dir} ({needs} {folder}/<class>/)"):
        root, how = folder, {"loader": lambda path: tools.input_errors(path)(Image.open(path).convert)("RGB")}
        if s.dataset != "folder":
            how = {"download": True} | ({"split": part} if s.dataset == "svhn" else {"train": part == "train"})
            root = s.data_dir
        how["transform"] = lambda image: np.array(image.convert("RGB").resize((s.image_size, s.image_size)))
        data = getattr(torchvision.datasets, DATASETS[s.dataset])(root, **how)
        (images, labels), flip = zip(*data), part == "train" and s.dataset != "svhn"
    return Pictures(np.stack(images), labels, getattr(data, "classes", "0123456789"), flip)


def random_masks(count: int, size: int, rng: torch.Generator) -> torch.Tensor:
    """Masks for inpainting (count, 1, S, S), 1 = generate: a random box for one image in four, else all ones."""
    corner = torch.rand(count, 2, generator=rng) * 0.75
    end = corner + 0.25 + (0.75 - corner) * torch.rand(count, 2, generator=rng)  # sides of a quarter to the whole
    grid = (torch.arange(size) + 0.5) / size
    inside = (grid >= corner[..., None]) & (grid < end[..., None])  # (count, 2, S)
    box = (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
    return (box | (torch.rand(count, 1, 1, 1, generator=rng) < 0.75)).float()


# --- Model, optimizer, and the loop ----------------------------------------------------------------------------------


def train(s: argparse.Namespace, checkpoint: dict | None = None) -> Iterator[SimpleNamespace]:
    """Train; yields the run before the first step and after each. checkpoint: of a run that is to go on.

    Randomness comes from seed and step, so a resumed run draws what an unbroken one would. Nothing is read back here.
    """
    device, data = tools.pick_device(s.device), load_data(s)
    torch.manual_seed(s.seed)
    config = method.Config(data.vocabulary, *map(vars(s).get, NETWORK), data.caption_length, s.mode, s.timestep_regions)
    model = method.DiT(config).to(device)
    if s.init and not checkpoint:
        source, unfit = tools.read_checkpoint(Path(s.init))[0], []
        if (source.config.mode, source.config.regions) != (s.mode, s.timestep_regions):
            unfit = ["ratios"]
            if source.config.mode != "dense":
                print(f"{s.init} has another kind of table: not taken, the ratios start at zero", file=sys.stderr)
        if replace(source.config, mode=s.mode, regions=s.timestep_regions) != model.config:
            print(f"{s.init} knows other captions: its words are not taken, but start anew", file=sys.stderr)
            unfit += ["embed_word.weight", "word_positions"]
        model.load_state_dict({k: v for k, v in source.state_dict().items() if k not in unfit}, strict=False)
    ema = copy.deepcopy(model).eval()  # the averaged model, which samples
    # Muon (Jordan et al. 2024) makes each update orthogonal, which suits the layers' matrices. AdamW takes the rest;
    # the ratios have a learning rate of their own, and no weight decay: they should not drift to zero.
    weights = {name: p for name, p in model.named_parameters() if name != "ratios"}
    matrices = {name: p for name, p in weights.items() if ".layer." in name and name.endswith("weight")}
    others = [p for name, p in weights.items() if name not in matrices]
    groups = [{"params": others, "peak": s.lr}, {"params": [model.ratios], "peak": s.ratio_lr, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    muon = torch.optim.Muon([{"params": [*matrices.values()], "peak": s.muon_lr}], lr=0.0, weight_decay=0.0)
    # Since the last line of metrics: loss and images of each region; in the last column, gradient norm and steps.
    sums = torch.zeros(2, s.timestep_regions + 1, device=device)
    run = SimpleNamespace(settings=s, data=data, model=model, ema=ema, adamw=adamw, muon=muon, sums=sums)
    run.step, run.seconds, run.metrics, run.made_by = 0, 0.0, [], []
    if checkpoint:
        with tools.input_errors("the run cannot go on, its data or checkpoint is another"):
            if checkpoint["config"] != asdict(config):
                raise method.InputError("the words or sizes differ")
            for name in ("model", "ema", "adamw", "muon"):
                vars(run)[name].load_state_dict(checkpoint[name])
            sums.copy_(checkpoint["sums"])
            vars(run).update({name: checkpoint[name] for name in ("step", "seconds", "metrics", "made_by")})
    run.made_by = [*run.made_by, {"command": shlex.join(["python", *sys.argv]), "torch": str(torch.__version__)}]
    compiling = tools.input_errors("--compile failed; is there a C++ compiler, as g++?")
    run.loss_of = method.diffusion_loss
    yield run
    loss_of = compiling(torch.compile(run.loss_of, fullgraph=True)) if s.compile else run.loss_of

    while run.step < s.steps:
        began, rng = time.perf_counter(), torch.Generator().manual_seed(s.seed * 1_000_000_007 + run.step)
        images, captions, _ = data.batch(s.batch_size, rng)
        words = tools.encode(model.config, captions)
        words[torch.rand(s.batch_size, generator=rng) < 0.1] = 0  # the null caption, for classifier-free guidance
        mask = random_masks(s.batch_size, s.image_size, rng)
        # log(noise / signal) is normal (Karras et al. 2022), so most images are rather clean: there the details are
        # decided that an eye sees first. Stratified, and turned into t as in `schedule`.
        normal = torch.special.ndtri(method.even_noise_levels(s.batch_size, rng))
        t = ((s.noise[0] + s.noise[1] * normal).exp().atan() / math.acos(0.02)).clamp(1e-3, 1)
        noise = torch.randn(images.shape, generator=rng)
        images, words, mask, t, noise = (z.to(device) for z in (images, words, mask, t, noise))

        routed = run.step >= s.dense_steps and s.mode != "dense"
        if routed and s.mode == "uniform":
            model.ratios.data.fill_(s.target_ratio)
        # In bfloat16, a CPU's fused attention is slow backwards.
        plain = sdpa_kernel(SDPBackend.MATH) if s.amp and device.type == "cpu" else contextlib.nullcontext()
        with plain, torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
            losses = loss_of(model, images, words, mask, t, noise, routed)  # (B,)
        losses = losses / method.schedule(t)[0] ** 2  # to v: see diffusion_loss
        loss = losses.mean()
        if routed and model.ratios.requires_grad:
            loss = loss + s.ratio_weight * method.ratio_loss(model.ratios, s.target_ratio)
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        # A short warm-up, a plateau, and a linear decay over the last 40 % of the steps.
        rising, falling = (run.step + 1) / min(100, 0.1 * s.steps + 1), (s.steps - run.step) / (0.4 * s.steps)
        for group in adamw.param_groups + muon.param_groups:
            group["lr"] = group["peak"] * min(1.0, rising, falling)
        adamw.step()
        muon.step()
        model.clamp_ratios()

        with torch.no_grad():
            # Averaged over about the last tenth of the run, at most 2,000 steps; the ratios are not: the weights fit k.
            decay = min(0.9995, run.step / (run.step + 9))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            ema.ratios.copy_(model.ratios)
            counted = torch.stack([losses.detach().float(), torch.ones_like(t)])
            counted = torch.zeros_like(sums).index_add_(1, method.column_of(t, s.timestep_regions), counted)
            counted[:, -1] = torch.stack([norm, torch.ones_like(norm)])
            sums += torch.where(sums.isfinite().all(), counted, 0.0)  # so the first that was not finite stays visible
        run.step, run.seconds = run.step + 1, run.seconds + time.perf_counter() - began
        yield run


# --- What is written -------------------------------------------------------------------------------------------------


def finite_sums(run: SimpleNamespace) -> torch.Tensor:
    """The sums since the last line of metrics, on the CPU. Raises InputError if a loss or gradient was not finite."""
    sums, first = run.sums.cpu(), run.metrics[-1]["step"] + 1 if run.metrics else 1
    if not sums.isfinite().all():
        regions = (~sums[0, :-1].isfinite()).nonzero().flatten().add(1).tolist() or "none"
        where = f"in steps {first} to {run.step}, timestep regions {regions}"
        raise method.InputError(f"loss or gradient not finite {where}; what was saved before is good; try a lower --lr")
    return sums


def write_metrics(run: SimpleNamespace, out: Path) -> None:
    """Append a line to metrics.jsonl: of the steps since the last one."""
    (*losses, norm), (*images, steps) = finite_sums(run).tolist()
    ratios = run.ema.ratios.detach().cpu()
    line = {"step": run.step, "seconds": round(run.seconds, 2), "loss": sum(losses) / sum(images)}
    line["loss_by_region"] = [loss / count if count else None for loss, count in zip(losses, images)]
    line |= {"gradient_norm": norm / steps, "mean_ratio": float(ratios.mean())}
    line["ratios"] = np.round(ratios.tolist(), 4).tolist()
    run.metrics.append(line)
    run.sums.zero_()
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def save_checkpoint(run: SimpleNamespace, path: Path, whole: bool = True) -> None:
    """Write a checkpoint, never one that is not finite; whole: from which the run can go on, not only what samples."""
    state = {"config": asdict(run.model.config), "ema": run.ema.state_dict(), "prompts": list(run.data.prompts)}
    state |= {"step": run.step, "made_by": run.made_by, "sums": finite_sums(run)}
    if whole:
        state |= {name: vars(run)[name].state_dict() for name in ("model", "adamw", "muon")}
        state |= {"settings": vars(run.settings), "seconds": run.seconds, "metrics": run.metrics}
    with tools.replace_file(path) as file:
        torch.save(state, file)


def write_pictures(run: SimpleNamespace, out: Path) -> None:
    """Write the learned table and the pictures, from the averaged weights."""
    s, prompts, ratios = run.settings, run.data.prompts, run.ema.ratios.detach()
    mean, rows = float(ratios.mean()), np.round(ratios.tolist(), 4).tolist()
    table = {"about": "share of tokens that bypass; a row a layer, a column a timestep region, the least noisy first"}
    table |= {"mode": s.mode, "target": s.target_ratio, "mean": mean, "ratios": rows}
    with tools.replace_file(out / "ratios.json") as file:
        file.write(json.dumps(table, indent=1).replace("\n   ", " ").replace("\n  ]", "]").encode())
    pictures = {"samples": tools.draw_samples(tools.images_from_prompts(run.ema, prompts, s.seed), prompts)}
    pictures["ratios"] = tools.draw_ratios(ratios, f"Share of tokens that bypass, {s.mode}, mean {mean:.3f}")
    pictures["curves"] = draw_curves(run.metrics)
    if s.mode != "dense":
        pictures["routing"] = tools.draw_routing(run.ema, prompts[:3], s.seed)
    for name, picture in pictures.items():
        with tools.replace_file(out / f"{name}.png") as file:
            picture.save(file, "PNG")


def draw_curves(metrics: list[dict]) -> Image.Image:
    """Loss, loss by noise level, and ratios over the steps, from the lines of metrics.jsonl."""
    steps, loss, regions = ([line[name] for line in metrics] for name in ("step", "loss", "loss_by_region"))
    layers = np.array([np.mean(line["ratios"], axis=1) for line in metrics])
    panels = {  # (lines, curves), the last one is black
        "loss": np.log10(np.c_[loss]),
        "loss by noise level, blue clean to red noisy; black: all": np.log10(np.c_[np.array(regions, float), loss]),
        "ratio by layer, blue first to red last; black: mean": np.c_[layers, layers.mean(axis=1)],
    }
    draw = ImageDraw.Draw(sheet := Image.new("RGB", (1290, 300), tools.PAPER))
    for left, (title, values) in zip((60, 490, 920), panels.items()):
        low, high = np.nanmin(values), np.nanmax(values) + 0.01
        draw.text((left, 12), title, tools.INK, tools.FONT)
        draw.rectangle((left, 40, left + 340, 260), outline=(200, 200, 205))
        for share in (0, 0.5, 1):
            level = low + share * (high - low) if "ratio" in title else 10 ** (low + share * (high - low))
            draw.text((left - 4, 260 - 220 * share), f"{level:.2g}", tools.INK, tools.SMALL, "rm")
            draw.text((left + 340 * share, 264), f"{steps[-1] * share:.0f}", tools.INK, tools.SMALL, "ma")
        for i, curve in enumerate(values.T, 1):
            points = zip([0, *steps], [curve[0], *curve])  # a line of metrics tells of the steps before it
            points = [(left + 340 * x / steps[-1], 260 - 220 * (y - low) / (high - low)) for x, y in points if y > -99]
            red, black = i / values.shape[1], i == values.shape[1]
            draw.line(points, tools.INK if black else (round(270 * red), 70, round(270 - 270 * red)), 2 + black)
    return sheet


def main(argv: Sequence[str] | None = None, prepare=lambda run: None) -> int | None:
    """The command. argv: in place of sys.argv; prepare: called with the run before its first step, may change it."""
    s, checkpoint = make_parser().parse_args(argv), None
    out = Path(s.out or f"runs/{s.dataset}")
    path = out / "checkpoint.pt"
    if path.exists() != s.resume:
        here = "holds a run already, and --resume goes on with it" if path.exists() else "holds no run to go on with"
        raise method.InputError(f"{out} {here}; another --out starts a new one")
    if s.resume:
        checkpoint = tools.read_checkpoint(path, "model")[1]
        with tools.input_errors(f"cannot go on with {path}"):
            began = checkpoint["settings"]
            s = make_parser().parse_args(argv, argparse.Namespace(**began))  # flags that are given replace its own
            for name in set(vars(s)) - set(MAY_CHANGE):
                if getattr(s, name) != began.get(name):
                    raise method.InputError(f"its --{name.replace('_', '-')} is {began.get(name)} and cannot change")
            if s.steps < checkpoint["step"]:
                raise method.InputError(f"it has done {checkpoint['step']} steps, more than --steps {s.steps}")
    steps, stop = train(s if s.resume else fill_defaults(s), checkpoint), []
    run = next(steps)
    prepare(run)
    s = run.settings
    out.mkdir(parents=True, exist_ok=True)  # below: lines of metrics after the checkpoint come again
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.metrics))
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one stops after a step, a second one at once
        signal.signal(number, lambda number, _: (stop.append(number), signal.signal(number, signal.SIG_DFL)))
    with tqdm(steps, total=s.steps, initial=run.step, unit="step", dynamic_ncols=True) as bar:
        for run in bar:
            if run.step % s.log_every == 0 or run.step == s.steps:
                write_metrics(run, out)
                bar.set_postfix_str(f"loss {run.metrics[-1]['loss']:.4f}, ratio {run.metrics[-1]['mean_ratio']:.3f}")
            if stop or run.step % s.save_every == 0 or run.step == s.steps:
                save_checkpoint(run, path)
            if stop:
                bar.close()
                again = shlex.join(["python", sys.argv[0], "--dataset", s.dataset, "--out", str(out), "--resume"])
                print(f"stopped after step {run.step}, saved to {path}; go on with: {again}", file=sys.stderr)
                return 128 + stop[0]
            if run.step in (s.steps // 4, s.steps // 2, 3 * s.steps // 4) and run.metrics:
                write_pictures(run, out)
    write_pictures(run, out)
    print(f"{run.step} steps in {run.seconds / 60:.1f} minutes; see {out}; for longer, --resume with more --steps")


if __name__ == "__main__":
    tools.run_command(main)
