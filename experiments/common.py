"""What several experiments share, and what the routed layer is compared with. No command.

Import it before torch: it makes the files of the project importable, and sample.py prepares torch.
"""

import copy
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample as tools  # before torch

# isort: split
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffratio_mod import DiT, InputError, RoutedLayer, diffusion_loss, normalise, schedule, tokens_processed
from diffratio_mod import sample_images
from train_cifar import even_noise_levels

RESULTS = Path(__file__).resolve().parent / "results"
BATCH = 50  # images that draw_images samples at once

# --- Layers to compare with: each has the parameters and the arguments of RoutedLayer --------------------------------

BINS = 10  # the paper's: ratios of 0 %, 10 %, ... 100 %


def use(model: DiT, kind: type[RoutedLayer]) -> DiT:
    """Let every layer of the model compute as `kind` does, with the parameters that it has."""
    for layer in model.layers:
        layer.__class__ = kind
    return model


def begin_sampling(model: nn.Module, images: int) -> None:
    """Tell the layers that remember, and the models that treat the two halves of guidance differently, what comes now.

    images: without guidance a batch has so many rows; with guidance twice as many, the unconditional half behind.
    """
    for module in model.modules():
        if isinstance(module, CachedLayer):
            module.step = 0
            module.computed = []
        if isinstance(module, GuidedBySkipping):
            module.images = images


class TwoBranchLayer(RoutedLayer):
    """The paper's way to a gradient for the ratio (3.3), written from its description. In training the layer runs
    twice, each image at the bins below and above its ratio, and the outputs are mixed by closeness; else once, at the
    nearest.
    """

    def forward(self, x, *context, k=None, ratio=None):
        N = x.shape[1]
        if ratio is None or not self.training:
            if ratio is not None:
                ratio = (BINS * (1 - tokens_processed(ratio, N) / N)).round() / BINS
            if k is not None:
                k = max(1, round(N * (1 - round(BINS * (1 - k / N)) / BINS)))
            return super().forward(x, *context, k=k, ratio=ratio)
        score, order = self.score_and_sort(x)
        rank = order.argsort(dim=1)  # (B, N)
        ratio = ratio.unsqueeze(1)  # (B, 1)
        lower = (BINS * ratio.detach()).floor().clamp(max=BINS - 1)
        out = x  # (B, N, D)
        for at, share in ((lower, 1 + lower - BINS * ratio), (lower + 1, BINS * ratio - lower)):
            k_best = (N * (1 - at / BINS)).round()  # (B, 1); none in the last bin: then all gates are 0
            gate = share * 2 * score * (rank < k_best)
            out = out + gate.unsqueeze(2) * self.layer(x, rank < k_best.clamp(min=1), *context)
        return out


class RandomLayer(RoutedLayer):
    """Random dropping: the k tokens are drawn anew for every image, layer and step, and every gate is 1."""

    def score_and_sort(self, x):
        return torch.full_like(x[:, :, 0], 0.5), torch.rand(x.shape[:2], device=x.device).argsort(dim=1)


class MergedLayer(RoutedLayer):
    """Token merging (ToMe for Stable Diffusion, 2303.17604) around the whole layer, by the package `tomesd`: N - k
    tokens are merged into similar ones; what these gain, all of their parts gain. Not for training: all images share a
    ratio.
    """

    def forward(self, x, *context, k=None, ratio=None):
        N = x.shape[1]
        side = math.isqrt(N)
        if k is None and ratio is not None:
            k = int(tokens_processed(ratio[:1], N))
        if k is None or k == N:
            return super().forward(x, *context)
        stride = 2 if k >= N / 4 else 4  # one token in stride^2 is a destination, and at least these remain
        match = package("tomesd.merge").bipartite_soft_matching_random2d
        merge, unmerge = match(x, side, side, stride, stride, N - k, no_rand=True)
        return x + unmerge(self.layer(merge(x), None, *context))


class AttentionPrunedLayer(RoutedLayer):
    """Attention-based pruning (AT-EDM, 2405.05252), written from its description, not trained. Self-attention runs for
    all tokens; a page rank over its map keeps the k most attended ones for the rest of the layer, and each other token
    takes what the kept token gains that it attends to most.
    """

    def forward(self, x, *context, k=None, ratio=None):
        modulation, caption = context
        layer = self.layer
        shift1, scale1, alpha1, shift2, scale2, alpha2 = (modulation + layer.modulation).unsqueeze(2).unbind(1)
        qkv = layer.qkv(normalise(x, shift1, scale1)).unflatten(2, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (qkv[0] @ qkv[1].transpose(2, 3) * qkv.shape[4] ** -0.5).softmax(dim=3)  # (B, H, N, N)
        gain = alpha1 * layer.attention_out((attention.to(qkv.dtype) @ qkv[2]).transpose(1, 2).flatten(2))
        attention = attention.mean(dim=1)  # (B, N, N)
        importance = attention.new_ones(len(x), 1, x.shape[1])
        for _ in range(5):
            importance = importance @ attention  # (B, 1, N): what all tokens give to each
        kept = importance.squeeze(1).argsort(dim=1, descending=True)[:, :k]  # (B, k)
        attention = attention + torch.eye(x.shape[1], device=x.device)  # a kept token takes its own
        to_kept = attention.gather(2, kept.unsqueeze(1).expand(-1, x.shape[1], -1))  # (B, N, k)
        nearest = to_kept.argmax(dim=2)  # (B, N), in 0 ... k - 1

        x = x + gain
        best = x.gather(1, kept.unsqueeze(2).expand(-1, -1, x.shape[2]))
        key, value = layer.caption_kv(caption).chunk(2, dim=-1)
        gain = layer.caption_out(layer.attend(layer.caption_q(normalise(best)), key, value))
        gain = gain + alpha2 * layer.mlp(normalise(best + gain, shift2, scale2))
        return x + gain.gather(1, nearest.unsqueeze(2).expand(-1, -1, x.shape[2]))


class CachedLayer(RoutedLayer):
    """What caching papers do at its simplest, not trained: on every second step a layer adds what it added the step
    before.

    It computes, too, where the rows are more than before: at the first step with guidance. A step that is computed is
    the routed layer's: the tokens that bypass it gain nothing, then and when it is repeated. Needs begin_sampling.
    """

    def forward(self, x, *context, k=None, ratio=None):
        if self.step % 2 == 0 or len(self.computed[-1][1]) < len(x):
            out = super().forward(x, *context, k=k, ratio=ratio)
            self.computed = [*self.computed[-1:], (self.step, out - x)]
        else:
            out = x + self.cached_gain(len(x))
        self.step += 1
        return out

    def cached_gain(self, rows: int) -> Tensor:
        """What to add in place of what is not computed: (rows, N, D)."""
        _, gain = self.computed[-1]
        return gain[:rows]


class ForecastingLayer(CachedLayer):
    """A cache that forecasts: on a step that is not computed, the layer adds what lies on the straight line through
    what it added at the last two steps that were (the first order of TaylorSeer, 2503.06923). With one, it repeats.
    """

    def cached_gain(self, rows: int) -> Tensor:
        last_step, last = self.computed[-1]
        before_step, before = self.computed[0]
        if before_step == last_step or len(before) < rows:
            return last[:rows]
        last = last[:rows]
        before = before[:rows]
        line = last.any(dim=2, keepdim=True) & before.any(dim=2, keepdim=True)  # not for a token that bypassed once
        ahead = (self.step - last_step) / (last_step - before_step)
        return last + ahead * line * (last - before)


class GuidedBySkipping(nn.Module):
    """Two models that sample as one. What guidance takes for the conditional half comes from the strong model, what it
    takes for the unconditional half from the weak one, which skips more tokens (as in Sparse Guidance, 2601.01608).
    Both read the caption, none the null caption. Needs begin_sampling.

    Its table holds the rows of both models, the strong one's first, so that `sample` gives it the k of both.
    """

    def __init__(self, strong: DiT, weak: DiT) -> None:
        """Raises InputError if the models do not fit together."""
        super().__init__()
        alike = replace(weak.config, mode=strong.config.mode, regions=strong.config.regions) == strong.config
        columns = sorted({strong.ratios.shape[1], weak.ratios.shape[1]})
        if not alike or (len(columns) == 2 and columns[0] != 1):
            raise InputError("the strong and the weak model must have the same words, sizes and noise regions")
        self.strong = strong
        self.weak = weak
        self.config = replace(strong.config, mode="layer-timestep")
        tables = [model.ratios.detach().expand(-1, columns[-1]) for model in (strong, weak)]
        self.register_buffer("ratios", torch.cat(tables))

    def encode_caption(self, words: Tensor) -> Tensor:
        n = self.images
        caption = self.strong.encode_caption(words[:n])
        if len(words) == n:
            return caption
        return torch.cat([caption, self.weak.encode_caption(words[:n])])

    def forward(self, *inputs: Tensor, k: list[int]) -> Tensor:
        n = self.images
        depth = len(self.strong.layers)
        eps = self._one(self.strong, [z[:n] for z in inputs], k[:depth])
        if len(inputs[0]) == n:  # a step without guidance
            return eps
        return torch.cat([eps, self._one(self.weak, [z[n:] for z in inputs], k[depth:])])

    def _one(self, model: DiT, inputs: list[Tensor], k: list[int]) -> Tensor:
        if model.config.mode == "dense":
            return model(*inputs)
        return model(*inputs, k=k)


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


def flops(model: nn.Module, ratios: Tensor, steps: int, guidance: float = 1.0, guidance_interval=(0.0, 1.0)) -> int:
    """As sampling_flops of sample.py, but with the layers that the model has."""
    other = copy.deepcopy(model).eval().to("meta")  # shapes are all that counts
    with torch.device("meta"):
        words = torch.zeros(1, model.config.caption_length, dtype=torch.long)
        noise = torch.zeros(1, 3, model.config.image_size, model.config.image_size)
    begin_sampling(other, 1)
    return count_flops(lambda: sample_images(other, words, noise, steps, guidance, guidance_interval, ratios=ratios.cpu()))


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


def draw_images(model: nn.Module, prompts: list[str], seed: int, amp: bool, **options) -> np.ndarray:
    """As images_from_prompts, BATCH images at once, with any kind of model, and in bfloat16 if asked."""
    parts = []
    for first in tqdm(range(0, len(prompts), BATCH), str(options), leave=False, disable=None):
        some = prompts[first : first + BATCH]
        begin_sampling(model, len(some))
        with torch.autocast(model.ratios.device.type, torch.bfloat16, enabled=amp):
            parts.append(tools.images_from_prompts(model, some, seed, first, **options))
    return np.concatenate(parts)


def held_out_batches(model: DiT, data, count: int) -> Iterator[tuple[Tensor, ...]]:
    """Arguments for diffusion_loss, 16 images a region, in the order of the regions; the same in every call."""
    size, rng, device = 16 * model.config.regions, torch.Generator().manual_seed(12345), model.ratios.device
    for _ in range(count):
        images, captions, _ = data.batch(size, rng)
        batch = (images, tools.encode(model.config, captions), torch.ones_like(images[:, :1]))
        batch += (even_noise_levels(size, rng), torch.randn(images.shape, generator=rng))
        yield tuple(z.to(device) for z in batch)


@torch.no_grad()
def held_out_losses(model: DiT, data, count: int) -> dict[str, list[list[float]]]:
    """Mean loss of each region for each batch: count x R, in the noise and in the velocity v."""
    torch.manual_seed(0)  # for layers that choose at random
    rows: dict[str, list[list[float]]] = {"noise": [], "v": []}
    for batch in held_out_batches(model, data, count):
        losses = diffusion_loss(model, *batch)
        for name, weighted in (("noise", losses * schedule(batch[3])[0] ** 2), ("v", losses)):
            rows[name].append([round(value, 7) for value in weighted.view(-1, 16).mean(dim=1).tolist()])
    return rows


def to_float(images: np.ndarray) -> Tensor:
    """Images uint8 (B, S, S, 3) to (B, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


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
        with tools.replace_file(path) as file:
            torch.save(made, file)
    return torch.load(path, map_location="cpu", weights_only=True)


def write_json(results: dict, path: Path) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in results.items()]
    with tools.replace_file(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())
