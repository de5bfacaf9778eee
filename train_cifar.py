"""Train a DiffRatio-MoD model: first densely, or start from a dense checkpoint; then learn its compression ratios.

    python train_cifar.py --dataset shapes --init assets/shapes_dense.pt   # the main job, minutes on two CPU cores
    python train_cifar.py                                                  # CIFAR-10, for a GPU
    python train_cifar.py --dataset folder --data-dir pictures             # pictures/train/<class>/*.png, *.jpg, ...
    python train_cifar.py --dataset shapes --resume --steps 1500           # go on with a run, here for longer

Leaves in a run folder (--out, default runs/DATASET): checkpoint.pt, metrics.jsonl, ratios.json (the learned table), and
the pictures curves, ratios, samples and routing (which tokens a layer processed). Table and pictures are made anew at
each quarter of the run.

Read it from the loop, `train`, outwards: what a step calls, how a run begins, the settings, the data, the command.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from diffratio_mod import (
    LARGEST_ANGLE,
    MODES,
    Config,
    DiT,
    InputError,
    column_of,
    diffusion_loss,
    encode,
    ratio_loss,
    words_of,
)
from sample import (
    Parser,
    draw_curves,
    draw_ratios,
    draw_routing,
    draw_samples,
    images_from_prompts,
    input_errors,
    number,
    pick_device,
    read_checkpoint,
    read_picture,
    replace_file,
    run_command,
    to_square,
    write_png,
)

# --- A run, and its loop ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The state of a training run; a checkpoint holds all of it but the data."""

    settings: argparse.Namespace  # all filled in
    data: Shapes | Pictures
    model: DiT  # what is trained
    ema: DiT  # its average over the last steps, used for sampling
    adamw: torch.optim.AdamW
    muon: torch.optim.Muon
    # Sums since the last line of metrics. They stay on the device: to read them makes a GPU wait.
    loss_sums: Tensor  # (R,), of the losses of the images, by timestep region
    image_counts: Tensor  # (R,)
    norm_sum: Tensor  # (), of the gradient norms of the steps
    summed_steps: int = 0  # how many these are
    step: int = 0  # steps done
    seconds: float = 0.0  # spent, pictures and checkpoints included
    metrics: list[dict] = field(default_factory=list)  # the lines of metrics.jsonl
    made_by: list[dict] = field(default_factory=list)  # the commands, with the version of PyTorch


def train(run: Run, out: Path, pictures: bool = True) -> int | None:
    """Train to the last step, and leave in the folder `out` what a run leaves there, with or without its pictures.

    Returns the number of the signal that stopped it, saved, or None. Raises InputError if a loss is not finite.
    """
    s, model = run.settings, run.model
    loss_of = torch.compile(diffusion_loss, fullgraph=True) if s.compile else diffusion_loss
    # The ratios' gradient is not clipped with the others: their learning rate is their own, and so are their bounds.
    clipped = [parameter for name, parameter in model.named_parameters() if name != "ratios"]
    started = time.perf_counter() - run.seconds
    save_checkpoint(run, out)  # from now on, before the first step, the folder holds a run: a second start is refused
    last_save = time.perf_counter()

    with stop_on_signals() as signals, tqdm(total=s.steps, initial=run.step, unit="step", dynamic_ncols=True) as bar:
        while run.step < s.steps:
            images, words, mask, t, eps = training_batch(run)
            routed = s.mode != "dense" and run.step >= s.dense_steps
            if routed and s.mode == "uniform":
                model.ratios.data.fill_(s.target_ratio)

            with precision(s, t.device):
                losses = loss_of(model, images, words, mask, t, eps, routed)  # (B,)
            loss = losses.mean()
            if routed and model.ratios.requires_grad:
                loss = loss + s.ratio_weight * ratio_loss(model.ratios, s.target_ratio)

            model.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(clipped, 1.0)
            for group in run.adamw.param_groups + run.muon.param_groups:
                group["lr"] = group["peak"] * share_of_peak(run.step, s.steps)
            run.adamw.step()
            run.muon.step()
            model.clamp_ratios()
            update_average(run)
            add_to_sums(run, t, losses, norm)
            run.step += 1
            bar.update()

            finished = run.step == s.steps
            pictures_are_due = pictures and run.step in (s.steps // 4, s.steps // 2, 3 * s.steps // 4)
            metrics_are_due = finished or run.step % s.log_every == 0
            minutes_since_save = (time.perf_counter() - last_save) / 60
            save_is_due = finished or pictures_are_due or signals or minutes_since_save >= s.save_every
            if metrics_are_due or save_is_due:
                check_sums(run)  # which reads them: a GPU is done with its work then
                run.seconds = time.perf_counter() - started
            if metrics_are_due:
                line = add_metrics(run, out)
                bar.set_postfix_str(f"loss {line['loss']:.4f}, ratio {line['mean_ratio']:.3f}")
            if save_is_due:
                save_checkpoint(run, out)
                last_save = time.perf_counter()
            if signals:
                return signals[0]
            if pictures_are_due:
                write_pictures(run, out)
        if pictures:
            write_pictures(run, out)
    run.seconds = time.perf_counter() - started
    return None


# --- What a step calls, in the order of the calls --------------------------------------------------------------------


@contextlib.contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """A list that will hold the signal to stop after the step that runs. The same one again ends the process at once.

    Ctrl-C, kill, a scheduler's warning, a closed terminal (some are not there on Windows). Afterwards all is as it was.
    """
    received: list[int] = []
    before = {}

    def stop(number: int, _) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                before[number] = signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def training_batch(run: Run) -> tuple[Tensor, ...]:
    """What diffusion_loss takes, for the step that comes: images, words, mask, t and eps, on the device.

    All of it is drawn from seed and step, so that a resumed run draws what an unbroken one would.
    """
    s = run.settings
    rng = torch.Generator().manual_seed(s.seed * 1_000_000_007 + run.step)
    images, captions, _ = run.data.batch(s.batch_size, rng)
    words = encode(run.model.config, captions)
    words[torch.rand(s.batch_size, generator=rng) < 0.1] = 0  # the null caption, for classifier-free guidance
    mask = random_masks(s.batch_size, s.image_size, rng)
    t = random_noise_levels(s.batch_size, *s.noise, rng)
    eps = torch.randn(images.shape, generator=rng)
    batch = (images, words, mask, t, eps)
    device = run.model.ratios.device
    if device.type == "cuda":  # from pinned memory, a copy does not wait for what the GPU has still to do
        return tuple(z.pin_memory().to(device, non_blocking=True) for z in batch)
    return tuple(z.to(device) for z in batch)


@contextlib.contextmanager
def precision(s: argparse.Namespace, device: torch.device) -> Iterator[None]:
    """What the forward pass computes in: bfloat16 with --amp, else float32."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=s.amp))
        if s.amp and device.type == "cpu":  # in bfloat16, a CPU's fused attention is slow backwards
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def share_of_peak(step: int, steps: int) -> float:
    """The learning rate of a step: a short warm-up, a plateau, and a linear decay over the last 40 % of the steps."""
    rising = (step + 1) / min(100, 0.1 * steps + 1)
    falling = (steps - step) / (0.4 * steps)
    return min(1.0, rising, falling)


@torch.no_grad()
def update_average(run: Run) -> None:
    """The average over about the last tenth of the run, at most 2,000 steps."""
    decay = min(0.9995, run.step / (run.step + 9))
    torch._foreach_lerp_(list(run.ema.parameters()), list(run.model.parameters()), 1 - decay)
    run.ema.ratios.copy_(run.model.ratios)  # not averaged: the weights fit the k that they have now


@torch.no_grad()
def add_to_sums(run: Run, t: Tensor, losses: Tensor, norm: Tensor) -> None:
    """Count a step's losses (B,) in their timestep regions, and its gradient norm."""
    losses = losses.float()
    region = column_of(t, run.settings.timestep_regions)
    run.loss_sums.index_add_(0, region, losses)
    run.image_counts.index_add_(0, region, torch.ones_like(losses))
    run.norm_sum += norm
    run.summed_steps += 1


def check_sums(run: Run) -> None:
    """Raises InputError if a loss or a gradient since the last line of metrics was not finite."""
    if not (run.loss_sums.isfinite().all() and run.norm_sum.isfinite()):
        steps = f"in steps {run.step - run.summed_steps + 1} to {run.step}"
        raise InputError(f"loss or gradient not finite {steps}; what was saved is good; try a lower --lr in a new run")


def add_metrics(run: Run, out: Path) -> dict:
    """Append a line to metrics.jsonl, of the steps since the last one, and return it; the sums begin anew."""
    losses = run.loss_sums.tolist()
    images = run.image_counts.tolist()
    ratios = run.ema.ratios.detach().cpu()
    line = {
        "step": run.step,
        "seconds": round(run.seconds, 2),
        "loss": sum(losses) / sum(images),
        "loss_by_region": [loss / count if count else None for loss, count in zip(losses, images)],
        "gradient_norm": float(run.norm_sum) / run.summed_steps,
        "mean_ratio": float(ratios.mean()),
        "ratios": np.round(ratios.tolist(), 4).tolist(),
    }
    run.metrics.append(line)
    run.loss_sums.zero_()
    run.image_counts.zero_()
    run.norm_sum.zero_()
    run.summed_steps = 0
    with by_product("metrics.jsonl"), open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line


def save_checkpoint(run: Run, out: Path) -> None:
    """Write checkpoint.pt, from which the run can go on and sample.py can sample.

    metrics.jsonl is written anew: whatever became of the file, it has this run's lines.
    """
    state = {
        "config": asdict(run.model.config),
        "prompts": list(run.data.prompts),
        "pictures": run.data.length,
        "settings": vars(run.settings),
        "model": run.model.state_dict(),
        "ema": run.ema.state_dict(),
        "adamw": run.adamw.state_dict(),
        "muon": run.muon.state_dict(),
        "loss_sums": run.loss_sums,
        "image_counts": run.image_counts,
        "norm_sum": run.norm_sum,
        "summed_steps": run.summed_steps,
        "step": run.step,
        "seconds": run.seconds,
        "metrics": run.metrics,
        "made_by": run.made_by,
    }
    with replace_file(out / "checkpoint.pt") as file:
        torch.save(state, file)
    with by_product("metrics.jsonl"), replace_file(out / "metrics.jsonl") as file:
        file.write("".join(json.dumps(line) + "\n" for line in run.metrics).encode())


@contextlib.contextmanager
def by_product(name: str) -> Iterator[None]:
    """What goes wrong with a picture or a line of metrics is a warning: the run and its checkpoint matter more."""
    try:
        yield
    except Exception as error:  # a full disk, no memory to draw, ...
        tqdm.write(f"warning: no {name}: {type(error).__name__}: {error}; the training goes on", file=sys.stderr)


def write_pictures(run: Run, out: Path) -> None:
    """Write the learned table and the pictures, from the averaged weights."""
    s = run.settings
    prompts = run.data.prompts[:32]
    ratios = run.ema.ratios.detach()
    title = f"Share of tokens that bypass, {s.mode}, mean {float(ratios.mean()):.3f}"
    with by_product("ratios.json"), replace_file(out / "ratios.json") as file:
        file.write(table_as_json(ratios, s).encode())

    pictures = {
        "samples": lambda: draw_samples(images_from_prompts(run.ema, prompts, s.seed), prompts),
        "ratios": lambda: draw_ratios(ratios, title),
    }
    if run.metrics:
        pictures["curves"] = lambda: draw_curves(run.metrics)
    if s.mode != "dense":
        pictures["routing"] = lambda: draw_routing(run.ema, prompts[:3], s.seed)
    for name, draw in pictures.items():
        with by_product(f"{name}.png"):
            write_png(draw(), out / f"{name}.png")


def table_as_json(ratios: Tensor, s: argparse.Namespace) -> str:
    """The table (L, C) as sample.py --ratios reads it, with a line for each layer."""
    about = {
        "about": "share of tokens that bypass; a row a layer, a column a timestep region, the least noisy first",
        "mode": s.mode,
        "target": s.target_ratio,
        "mean": float(ratios.mean()),
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
    rows = [f"  {json.dumps(row)}" for row in np.round(ratios.tolist(), 4).tolist()]
    lines.append(' "ratios": [\n' + ",\n".join(rows) + "]")
    return "{\n" + ",\n".join(lines) + "\n}"


# --- How a run begins ------------------------------------------------------------------------------------------------


def start_run(s: argparse.Namespace, checkpoint: dict | None = None) -> Run:
    """A run before its first step, with random weights or those of --init; or where a checkpoint left it."""
    if s.compile and not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++", "cl")))):
        raise InputError("--compile needs a C++ compiler, as g++; install one, or leave the flag out")
    device = pick_device(s.device)
    data = load_data(s)
    torch.manual_seed(s.seed)
    sizes = {name: getattr(s, name) for name in NETWORK}
    config = Config(
        data.vocabulary, **sizes, caption_length=data.caption_length, mode=s.mode, regions=s.timestep_regions
    )
    model = DiT(config).to(device)
    ema = copy.deepcopy(model).eval()

    # Muon (Jordan et al. 2024) makes each update orthogonal, which suits the layers' matrices. AdamW takes the rest;
    # the ratios have a learning rate of their own, and no weight decay: they should not drift to zero.
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if ".layer." in name and name.endswith("weight"):
            matrices.append(parameter)
        elif name != "ratios":
            others.append(parameter)
    groups = [{"params": others, "peak": s.lr}, {"params": [model.ratios], "peak": s.ratio_lr, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    muon = torch.optim.Muon([{"params": matrices, "peak": s.muon_lr}], lr=0.0, weight_decay=0.0)
    loss_sums = torch.zeros(s.timestep_regions, device=device)
    image_counts = torch.zeros(s.timestep_regions, device=device)
    norm_sum = torch.zeros((), device=device)
    run = Run(s, data, model, ema, adamw, muon, loss_sums, image_counts, norm_sum)
    run.made_by = [{"command": shlex.join(["python", *sys.argv]), "torch": str(torch.__version__)}]
    if checkpoint:
        restore(run, checkpoint)
    elif s.init:
        take_weights(run, s.init)
    return run


def take_weights(run: Run, init: str) -> None:
    """Start from the averaged weights of a checkpoint, as far as they mean the same here; prints what does not."""
    source = read_checkpoint(Path(init))[0]
    own, other = run.model.config, source.config
    unfit = []
    if own.mode != other.mode or run.model.ratios.shape != source.ratios.shape:
        unfit.append("ratios")
        if other.mode != "dense":
            print(f"{init} has another kind of table: not taken, the ratios start at zero", file=sys.stderr)
    if (own.vocabulary, own.caption_length) != (other.vocabulary, other.caption_length):
        unfit += ["embed_word.weight", "word_positions"]
        print(f"{init} knows other captions: its words are not taken, but start anew", file=sys.stderr)
    weights = {name: value for name, value in source.state_dict().items() if name not in unfit}
    run.model.load_state_dict(weights, strict=False)
    run.ema.load_state_dict(run.model.state_dict())


def restore(run: Run, checkpoint: dict) -> None:
    """Bring a run to where a checkpoint left it. Raises InputError if that was of other data or another network."""
    if checkpoint["config"] != asdict(run.model.config):
        raise InputError("the run cannot go on: its words or sizes are not those of the data")
    if checkpoint["pictures"] != run.data.length:
        raise InputError(
            f"the run cannot go on: it began with {checkpoint['pictures']} pictures, now there are {run.data.length}"
        )
    run.model.load_state_dict(checkpoint["model"])
    run.ema.load_state_dict(checkpoint["ema"])
    run.adamw.load_state_dict(checkpoint["adamw"])
    run.muon.load_state_dict(checkpoint["muon"])
    run.loss_sums.copy_(checkpoint["loss_sums"])
    run.image_counts.copy_(checkpoint["image_counts"])
    run.norm_sum.copy_(checkpoint["norm_sum"])
    run.summed_steps = checkpoint["summed_steps"]
    run.step = checkpoint["step"]
    run.seconds = checkpoint["seconds"]
    run.metrics = checkpoint["metrics"]
    run.made_by = checkpoint["made_by"] + run.made_by


# --- Settings --------------------------------------------------------------------------------------------------------

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}  # our names, its names
NETWORK = ("image_size", "patch_size", "dim", "depth", "heads")  # taken from the checkpoint with --init
MAY_CHANGE = ("out", "resume", "steps", "device", "data_dir", "log_every", "save_every", "compile")  # with --resume


def make_parser() -> Parser:
    """The command line. A default that depends on other flags is None here, and filled in by fill_defaults."""
    count = number(int, 1, 10**9)
    count_or_none = number(int, 0, 10**9)
    zero_to_one = number(float, 0, 1)
    size = number(int, 1, 2048)
    parser = Parser(__doc__)
    add = parser.add_argument_group("the run").add_argument
    add("--dataset", choices=("shapes", *TORCHVISION, "folder"), default="cifar10", help="default cifar10")
    add("--data-dir", default="data", help="folder with the data set, or to download it to (default data)")
    add("--no-flip", action="store_true", help="never mirror a picture, as for letters")
    add("--out", help="run folder (default runs/DATASET)")
    add("--init", help="start from the weights of this checkpoint")
    add("--resume", action="store_true", help="go on with the run in --out, for longer if --steps says so")
    add("--steps", type=count, help="in all (default 750 for shapes with --init, 3000 without; else 30000)")
    add("--batch-size", type=number(int, 1, 2**16), default=64, help="images a step (default 64)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, data and noise (default 0)")
    add("--log-every", type=count, default=20, help="steps between lines of metrics.jsonl (default 20)")
    add("--save-every", type=number(float, 0, 1e6), default=5.0, help="minutes between checkpoints (default 5)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    add("--amp", action="store_true", help="run the network in bfloat16 (default off)")
    add("--compile", action="store_true", help="compile the loss; needs a C++ compiler (default off)")
    add = parser.add_argument_group("the method").add_argument
    add("--mode", choices=MODES, default="layer-timestep", help="which ratios are learned (default layer-timestep)")
    add("--target-ratio", type=number(float, 0, 0.99), default=0.3, help="share that bypasses (default 0.3)")
    add("--timestep-regions", type=number(int, 1, 1000), default=10, help="columns of the table (default 10)")
    add("--ratio-weight", type=number(float, 0, 1e4), default=2.0, help="of the pull; 0: off (default 2)")
    add("--ratio-lr", type=zero_to_one, default=1e-2, help="learning rate of the ratios (default 0.01)")
    add("--dense-steps", type=count_or_none, help="first, without routing (default 60 %% of the steps; with --init 0)")
    add = parser.add_argument_group("the network and its training").add_argument
    add("--lr", type=zero_to_one, help="peak, for AdamW (default 3e-3 * 128 / dim; a quarter of it with --init)")
    add("--muon-lr", type=zero_to_one, help="peak, for the layers' matrices (default 0.01; a quarter with --init)")
    add("--noise", type=number(float, -9, 9), nargs=2, metavar=("MEAN", "DEVIATION"),
        help="of log(noise / signal) (default -1 1.2; shapes without --init 0 1.6)")  # fmt: skip
    add("--image-size", type=size, help="pixels (default 32, shapes 24; with --init these five are the checkpoint's)")
    add("--patch-size", type=size, help="pixels (default 4, shapes 3)")
    add("--dim", type=size, help="width (default 128)")
    add("--depth", type=size, help="layers (default 6)")
    add("--heads", type=size, help="of attention (default 4)")
    return parser


def fill_defaults(given: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on other settings. Raises InputError where settings do not fit together."""
    s = argparse.Namespace(**vars(given))
    shapes = s.dataset == "shapes"

    def default(name: str, value: object) -> None:
        if getattr(s, name) is None:
            setattr(s, name, value)

    if s.init:
        source = read_checkpoint(Path(s.init))[0].config
        for name in NETWORK:
            default(name, getattr(source, name))
            if getattr(s, name) != getattr(source, name):
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} does not fit --init, which has {getattr(source, name)}")
    default("image_size", 24 if shapes else 32)
    default("patch_size", 3 if shapes else 4)
    default("dim", 128)
    default("depth", 6)
    default("heads", 4)

    if not shapes:
        default("steps", 30_000)
    default("steps", 750 if s.init else 3000)
    default("dense_steps", 0 if s.init else min(round(0.6 * s.steps), s.steps - 1))
    refuse_without_routing(s)
    rate = 0.25 if s.init else 1.0  # a trained network is changed more gently
    default("lr", rate * 3e-3 * 128 / s.dim)
    default("muon_lr", rate * 0.01)
    if shapes and not s.init:
        default("noise", [0.0, 1.6])  # much noise teaches layout
    default("noise", [-1.0, 1.2])
    if s.noise[1] < 0:
        raise InputError(f"the deviation of --noise must not be negative, as {s.noise[1]:g} is")
    return s


def refuse_without_routing(s: argparse.Namespace) -> None:
    if s.mode != "dense" and s.dense_steps >= s.steps:
        raise InputError(f"--dense-steps {s.dense_steps} leave no step for routing: they must be fewer than --steps")


def read_settings(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Path, dict | None]:
    """The settings, the run folder and, with --resume, its checkpoint. Raises InputError if they do not fit."""
    given = make_parser().parse_args(argv)
    out = Path(given.out or f"runs/{given.dataset}")
    path = out / "checkpoint.pt"
    if not given.resume:
        if path.exists():
            raise InputError(
                f"{out} holds a run: --resume goes on with it; another --out, or without it, starts a new one"
            )
        return fill_defaults(given), out, None
    if not path.exists():
        raise InputError(f"{out} holds no run to go on with; another --out starts a new one")

    checkpoint = read_checkpoint(path, "model")[1]
    if "settings" not in checkpoint:
        raise InputError(f"{path} holds weights alone, no run to go on with; --init starts from them")
    saved = checkpoint["settings"]
    s = make_parser().parse_args(argv, argparse.Namespace(**saved))  # flags that are given replace the run's own
    for name, value in saved.items():
        if name not in MAY_CHANGE and getattr(s, name) != value:
            raise InputError(f"cannot go on with {path}: its --{name.replace('_', '-')} is {value} and cannot change")
    step = checkpoint["step"]
    if s.steps < step:
        raise InputError(f"{path} has done {step} steps, more than --steps {s.steps}")
    refuse_without_routing(s)
    if s.steps != saved["steps"]:
        before, after = (share_of_peak(step, steps) for steps in (saved["steps"], s.steps))
        rate = f"the learning rate goes from {before:.0%} to {after:.0%} of its peak, to fall over the last 40 %"
        routing = "" if s.mode == "dense" else f"; the {s.dense_steps} dense steps stay as they were"
        print(f"--steps {s.steps} in place of {saved['steps']}: {rate}{routing}", file=sys.stderr)
    return s, out, checkpoint


# --- Data: images, captions, a vocabulary, and prompts to show -------------------------------------------------------

# A data set has: vocabulary (words), caption_length, prompts (captions to show), length (images, or None: no end), and
# batch(count, rng) -> images (count, 3, S, S) in [-1, 1], captions, object masks or None. To add one, write such a
# class, and name it in load_data and in --dataset.


def load_data(s: argparse.Namespace, part: str = "train") -> Shapes | Pictures:
    """The data set of the settings dataset, data_dir, image_size, no_flip. part: "train" or "test".

    Only training pictures are mirrored. Raises InputError if the data are not there, or not readable.
    """
    flip = part == "train" and not s.no_flip
    if s.dataset == "shapes":
        return Shapes(s.image_size)
    if s.dataset == "folder":
        return load_folder(Path(s.data_dir), part, s.image_size, flip)
    with input_errors(f"no --dataset {s.dataset} in --data-dir {s.data_dir}, and no download (shapes needs no data)"):
        dataset = getattr(torchvision.datasets, TORCHVISION[s.dataset])(
            s.data_dir, train=part == "train", download=True
        )
    images = np.empty((len(dataset), s.image_size, s.image_size, 3), np.uint8)
    labels = []
    for i, (image, label) in enumerate(dataset):
        images[i] = to_square(image, s.image_size)
        labels.append(label)
    return Pictures(images, labels, dataset.classes, flip)


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
PROMPTS = (  # to show; some have held-out pairs
    "a red circle",
    "a yellow square",
    "a green triangle",
    "a cyan cross",
    "a blue circle",
    "a purple square",
    "a red triangle",
    "a blue cross",
    "a red circle above a blue cross",
    "a yellow square below a green cross",
    "a green triangle left of a purple circle",
    "a cyan cross right of a red circle",
    "a blue circle above a blue square",
    "a purple square below a green square",
    "a red triangle left of a purple triangle",
    "a blue cross right of a red triangle",
)


class Shapes:
    """Coloured shapes, made on the fly: one, or two in a relation. pairs: "seen" in training, "held-out" or "all"."""

    caption_length = 8
    prompts = PROMPTS
    vocabulary = tuple(dict.fromkeys(["a", *COLOURS, *SHAPES, *" ".join(RELATIONS).split()]))  # each word once
    length = None  # without an end

    def __init__(self, image_size: int = 32, pairs: str = "seen") -> None:
        self.image_size = image_size
        self.pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
        if pairs == "seen":
            self.pairs = [pair for pair in self.pairs if pair not in HELD_OUT]
        if pairs == "held-out":
            self.pairs = [pair for pair in self.pairs if pair in HELD_OUT]

    def batch(self, count: int, rng: torch.Generator) -> tuple[Tensor, list[str], Tensor]:
        """Images (count, 3, S, S) in [-1, 1], captions, object masks (count, 2, S, S); four in ten have one object."""
        S = self.image_size
        pair = torch.randint(len(self.pairs), (count, 2), generator=rng)  # of each object
        relation = torch.randint(4, (count, 1), generator=rng)
        two = torch.rand(count, 1, generator=rng) < 0.6
        centre, radius = self.places(relation, two, rng)
        shape = torch.tensor([SHAPES.index(shape) for _, shape in self.pairs])[pair]  # (count, 2)
        masks = draw_shapes(shape, centre, radius, S)
        masks[:, 1] *= two[:, None]

        image = self.backgrounds(count, rng)
        colour = torch.tensor([COLOURS[colour] for colour, _ in self.pairs])[pair]
        colour = (colour + 0.05 * torch.randn(count, 2, 3, generator=rng)).clamp(0, 1)
        for i in range(2):
            image = torch.lerp(image, colour[:, i, :, None, None], masks[:, i, None])

        captions = []
        for (i, j), which, has_two in zip(pair.tolist(), relation.flatten().tolist(), two.flatten().tolist()):
            caption = "a {} {}".format(*self.pairs[i])
            if has_two:
                caption += f" {RELATIONS[which]} " + "a {} {}".format(*self.pairs[j])
            captions.append(caption)
        return image * 2 - 1, captions, masks

    def places(self, relation: Tensor, two: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Where the objects lie: centres (count, 2 objects, x and y) and radii (count, 2), in pixels.

        One object lies near the middle. Two lie in different halves, the first before the second along the axis of
        their relation ("above", "left of"), or after it ("below", "right of"). relation, two: (count, 1).
        """
        unit = self.image_size / 32
        middle = self.image_size / 2
        # Uniform in [0, 1), (count, 2) each.
        small, large, along, across, alone = torch.rand(5, len(two), 2, generator=rng)
        radius = unit * torch.where(two, 5.5 + 1.5 * small, 8 + 3 * large)

        first_comes_first = (relation == 0) | (relation == 2)  # (count, 1)
        half = torch.where(first_comes_first, torch.tensor([-1.0, 1.0]), torch.tensor([1.0, -1.0]))  # of each object
        on_axis = middle + unit * (8 * half + (2 * along - 1))  # the axis of the relation
        off_axis = middle + unit * (8 * across - 4)
        vertical = relation[:, :, None] < 2
        two_objects = torch.where(
            vertical, torch.stack([off_axis, on_axis], dim=2), torch.stack([on_axis, off_axis], dim=2)
        )
        one_object = middle + unit * (8 * alone - 4)  # (count, x and y); the second object is not drawn
        centre = torch.where(two[:, :, None], two_objects, one_object[:, None])
        return centre, radius

    def backgrounds(self, count: int, rng: torch.Generator) -> Tensor:
        """Nearly grey gradients in all directions: (count, 3, S, S) in [0, 1]."""
        x = torch.linspace(-0.5, 0.5, self.image_size)
        angle = 2 * torch.pi * torch.rand(count, 1, 1, 1, generator=rng)
        grey = 0.1 + 0.8 * torch.rand(2, count, 1, 1, 1, generator=rng)
        start, end = grey + 0.03 * torch.randn(2, count, 3, 1, 1, generator=rng)
        return torch.lerp(start, end, 0.5 + angle.cos() * x + angle.sin() * x[:, None]).clamp(0, 1)


def draw_shapes(shape: Tensor, centre: Tensor, radius: Tensor, size: int) -> Tensor:
    """Anti-aliased masks (..., size, size) of shapes (...), indices into SHAPES, with centres (..., 2), x and y."""
    grid = torch.arange(size) + 0.5
    x = grid - centre[..., 0, None, None]
    y = grid[:, None] - centre[..., 1, None, None]
    r = radius[..., None, None]
    # Signed distances in pixels, negative inside: an intersection is a maximum, a union a minimum.
    circle = (x**2 + y**2).sqrt() - r
    square = torch.maximum(x.abs(), y.abs()) - 0.86 * r
    triangle = torch.maximum(y - 0.75 * r, 0.866 * x.abs() - 0.5 * y - 0.5 * r)  # points up
    upright_bar = torch.maximum(x.abs() - 0.34 * r, y.abs() - r)
    flat_bar = torch.maximum(x.abs() - r, y.abs() - 0.34 * r)
    distances = torch.stack([circle, square, triangle, torch.minimum(upright_bar, flat_bar)])  # in the order of SHAPES
    # Of the four, each object has the distance to its own shape.
    distance = distances.gather(0, shape[None, ..., None, None].expand_as(distances[:1]))[0]
    return (0.5 - distance).clamp(0, 1)


class Pictures:
    """Images (count, S, S, 3), uint8, captioned "a photo of a CLASS"; flip: half of them are mirrored at random.

    Raises InputError if two classes would have the same caption.
    """

    def __init__(self, images: np.ndarray, labels: Sequence[int], classes: Sequence[str], flip: bool) -> None:
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)
        self.labels = labels
        self.flip = flip
        self.length = len(images)
        self.captions = ["a photo of a " + " ".join(words_of(name.replace("_", " "))) for name in classes]
        alike = [name for name, caption in zip(classes, self.captions) if self.captions.count(caption) > 1]
        if alike:
            raise InputError(f"the classes {', '.join(alike)} cannot be told apart by their captions: rename some")
        self.prompts = self.captions  # to show: each class once
        self.vocabulary = tuple(dict.fromkeys(" ".join(self.captions).split()))  # each word once
        self.caption_length = max(8, max(len(caption.split()) for caption in self.captions))

    def batch(self, count: int, rng: torch.Generator) -> tuple[Tensor, list[str], None]:
        """Images (count, 3, S, S) in [-1, 1] drawn with replacement, their captions, and no object masks."""
        rows = torch.randint(len(self.images), (count,), generator=rng)
        images = self.images[rows].float() / 127.5 - 1
        mirrored = torch.rand(count, 1, 1, 1, generator=rng) < 0.5
        if self.flip:
            images = torch.where(mirrored, images.flip(3), images)
        return images, [self.captions[self.labels[row]] for row in rows.tolist()], None


PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


def load_folder(data_dir: Path, part: str, size: int, flip: bool) -> Pictures:
    """The pictures in DATA_DIR/PART/<class>/, at any depth. Prints what was found, and what was left out."""
    folder = data_dir / part
    by_class, left_out = find_pictures(folder)
    paths = [path for paths in by_class.values() for path in paths]
    found = f"{folder}: {len(paths)} pictures in {len(by_class)} classes"
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(8))
        found += f"; left out: {kinds}"
    if not paths:
        wanted = f"they belong in {folder}/<class>/ and end in {' '.join(PICTURE_SUFFIXES)}"
        raise InputError(f"no pictures for --dataset folder in --data-dir {data_dir}; {wanted}; {found}")
    print(found, file=sys.stderr)
    images = np.empty((len(paths), size, size, 3), np.uint8)
    for i, path in enumerate(tqdm(paths, "reading", unit="picture", disable=None)):
        images[i] = read_picture(path, size)
    labels = [label for label, paths in enumerate(by_class.values()) for _ in paths]
    return Pictures(images, labels, list(by_class), flip)


def find_pictures(folder: Path) -> tuple[dict[str, list[Path]], collections.Counter]:
    """The picture files of each class folder, in order, and what was left out: how many of each kind.

    Links to folders are followed, but each folder is read once a class, and none that holds the data set itself.
    """
    by_class: dict[str, list[Path]] = {}
    left_out: collections.Counter = collections.Counter()
    seen = {(None, place) for place in (folder.resolve(), *folder.resolve().parents)}  # class and folder
    for where, folders, names in os.walk(folder, followlinks=True):
        place = Path(where).relative_to(folder).parts  # the class, and the folders in it
        for name in sorted(folders):
            path = Path(where, name)
            real = path.resolve()
            class_name = place[0] if place else name
            if hidden(name):
                folders.remove(name)
            elif (None, real) in seen or (class_name, real) in seen:
                folders.remove(name)
                left_out["link to a folder that is read already"] += 1
            else:
                seen.add((class_name, real))
                by_class.setdefault(class_name, [])
        for name in names:
            path = Path(where, name)
            suffix = path.suffix.lower()
            if hidden(name):
                continue
            if suffix not in PICTURE_SUFFIXES:
                left_out[suffix or "without a suffix"] += 1
            elif not path.is_file():  # a pipe, a socket, a link to nothing
                left_out["not a regular file"] += 1
            elif not place:
                left_out["outside of the class folders"] += 1
            else:
                by_class[place[0]].append(path)
    left_out["class without pictures"] = sum(not paths for paths in by_class.values())
    return {name: sorted(paths) for name, paths in by_class.items() if paths}, +left_out


def hidden(name: str) -> bool:
    """Whether a file or folder is what a system or an editor put there: .DS_Store, ._a.png, .ipynb_checkpoints."""
    return name.startswith(".") or name == "__MACOSX"


def even_noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """Random noise levels (count,) in (0, 1), ascending, one in each of `count` equal parts."""
    return (torch.arange(count) + torch.rand(count, generator=generator).clamp(1e-4, 1 - 1e-4)) / count


def random_noise_levels(count: int, mean: float, deviation: float, rng: torch.Generator) -> Tensor:
    """Noise levels t (count,) in [0.001, 1], log(noise / signal) being normal (Karras et al. 2022).

    One lies in each of `count` equally likely parts.

    At the usual mean, -1, most images are rather clean: there the details are decided that an eye sees first.
    """
    normal = torch.special.ndtri(even_noise_levels(count, rng))
    noise_over_signal = (mean + deviation * normal).exp()
    return (noise_over_signal.atan() / LARGEST_ANGLE).clamp(1e-3, 1)  # the inverse of `schedule`


def random_masks(count: int, size: int, rng: torch.Generator) -> Tensor:
    """Masks for inpainting (count, 1, S, S), 1 = generate: a random box for one image in four, else all ones."""
    start = 0.75 * torch.rand(count, 2, generator=rng)  # of the box, down and across, as shares of the side
    end = start + 0.25 + (0.75 - start) * torch.rand(count, 2, generator=rng)  # sides of a quarter to the whole
    grid = (torch.arange(size) + 0.5) / size
    inside = (grid >= start[..., None]) & (grid < end[..., None])  # (count, 2, S)
    box = inside[:, 0, :, None] & inside[:, 1, None, :]  # (count, S, S)
    everywhere = torch.rand(count, 1, 1, 1, generator=rng) < 0.75
    return (box[:, None] | everywhere).float()


# --- The command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int | None:
    """The command. argv: in place of sys.argv. Returns an exit code if a signal stopped the run."""
    s, out, checkpoint = read_settings(argv)
    run = start_run(s, checkpoint)
    stopped_by = train(run, out)
    if stopped_by:
        again = shlex.join(["python", sys.argv[0], "--out", str(out), "--resume"])
        print(f"stopped after step {run.step}, saved to {out}; go on with: {again}", file=sys.stderr)
        return 128 + stopped_by
    print(f"{run.step} steps in {run.seconds / 60:.1f} minutes; see {out}; for longer, --resume with more --steps")
    return None


if __name__ == "__main__":
    run_command(main)
