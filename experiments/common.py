"""What several experiments share: measuring, drawing many images, files. No command.

Import it first: it makes the files of the project importable.
"""

import copy
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffratio_mod import DiT, InputError, diffusion_loss, encode, sample_images, schedule  # noqa: E402
from sample import images_from_prompts, replace_file  # noqa: E402
from train_cifar import Pictures, Shapes, even_noise_levels  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
BATCH = 50  # images that draw_images samples at once


# --- Cost ------------------------------------------------------------------------------------------------------------


def flops(model: nn.Module, ratios: Tensor, steps: int, guidance: float = 1.0, guidance_interval=(0.0, 1.0)) -> int:
    """As sampling_flops of sample.py, but with the layers that the model has."""
    other = copy.deepcopy(model).eval().to("meta")  # shapes are all that counts
    with torch.device("meta"):
        words = torch.zeros(1, model.config.caption_length, dtype=torch.long)
        noise = torch.zeros(1, 3, model.config.image_size, model.config.image_size)
    forget(other)
    return count_flops(
        lambda: sample_images(other, words, noise, steps, guidance, guidance_interval, ratios=ratios.cpu())
    )


@torch.no_grad()
def count_flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted
        call()
    return counter.get_total_flops()


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every function in every round: whatever else the machine does, it does to all.

    A first round warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in tqdm(range(rounds + 1), leave=False, disable=None):
        for name, function in functions.items():
            wait_for(device)
            start = time.perf_counter()
            function()
            wait_for(device)
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- Images and losses -----------------------------------------------------------------------------------------------


def forget(model: nn.Module) -> None:
    """Tell the layers that remember what they computed that a new sampling begins."""
    for module in model.modules():
        if hasattr(module, "forget"):
            module.forget()


def draw_images(model: nn.Module, prompts: list[str], seed: int, amp: bool, **options) -> np.ndarray:
    """As images_from_prompts, BATCH images at once, with any kind of model, and in bfloat16 if asked."""
    parts = []
    for first in tqdm(range(0, len(prompts), BATCH), str(options), leave=False, disable=None):
        some = prompts[first : first + BATCH]
        forget(model)
        with torch.autocast(model.ratios.device.type, torch.bfloat16, enabled=amp):
            parts.append(images_from_prompts(model, some, seed, first, **options))
    return np.concatenate(parts)


def to_float(images: np.ndarray) -> Tensor:
    """Images uint8 (B, S, S, 3) to (B, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def held_out_batches(model: DiT, data: Shapes | Pictures, count: int) -> Iterator[tuple[Tensor, ...]]:
    """Arguments for diffusion_loss, 16 images a region, in the order of the regions; the same in every call."""
    size = 16 * model.config.regions
    rng = torch.Generator().manual_seed(12345)
    for _ in range(count):
        images, captions, _ = data.batch(size, rng)
        words = encode(model.config, captions)
        everywhere = torch.ones_like(images[:, :1])
        t = even_noise_levels(size, rng)
        eps = torch.randn(images.shape, generator=rng)
        yield tuple(z.to(model.ratios.device) for z in (images, words, everywhere, t, eps))


@torch.no_grad()
def held_out_losses(model: DiT, data: Shapes | Pictures, count: int) -> dict[str, list[list[float]]]:
    """Mean loss of each region for each batch: count x R, in the noise and in the velocity v."""
    torch.manual_seed(0)  # for layers that choose at random
    rows: dict[str, list[list[float]]] = {"noise": [], "v": []}
    for batch in held_out_batches(model, data, count):
        t = batch[3]
        of_velocity = diffusion_loss(model, *batch)
        of_noise = of_velocity * schedule(t)[0] ** 2
        for name, losses in (("noise", of_noise), ("v", of_velocity)):
            rows[name].append([round(value, 7) for value in losses.view(-1, 16).mean(dim=1).tolist()])
    return rows


def scaled(table: Tensor, mean: float) -> Tensor:
    """The table with its shape kept and its mean moved: all cells times one factor, at most 0.98."""
    low = 0.0
    high = 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        if (table * middle).clamp(max=0.98).mean() < mean:
            low = middle
        else:
            high = middle
    return (table * low).clamp(max=0.98)


# --- Packages and files ----------------------------------------------------------------------------------------------


def package(name: str) -> ModuleType:
    """A package that only this experiment needs. Raises InputError if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pip = name.partition(".")[0].replace("_", "-")
        raise InputError(f"this needs a package that is not here ({error}): pip install {pip}") from None


def cached(name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, or has returned to an earlier call: tensors, kept in runs/."""
    path = Path("runs") / f"{name}.pt"
    if not path.exists():
        made = make()
        with replace_file(path) as file:
            torch.save(made, file)
    return torch.load(path, map_location="cpu", weights_only=True)


def write_json(results: dict, path: Path) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in results.items()]
    with replace_file(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())
