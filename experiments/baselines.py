"""What the routed layer is compared with: the paper's two branches, token merging, random dropping. No command.

Each class has the parameters and the arguments of RoutedLayer, so a model is changed by `use(model, TwoBranchLayer)` and back.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffratio_mod import DiT, RoutedLayer

BINS = 10  # the paper's: ratios of 0 %, 10 %, ... 100 %


def use(model: DiT, kind: type[RoutedLayer]) -> DiT:
    """Let every layer of the model compute as `kind` does, with the parameters that it has."""
    for layer in model.layers:
        layer.__class__ = kind
    return model


def scaled(table: Tensor, mean: float) -> Tensor:
    """The table with its shape kept and its mean moved: all cells times one factor, at most 0.98."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (table * middle).clamp(max=0.98).mean() < mean else (low, middle)
    return (table * low).clamp(max=0.98)


class TwoBranchLayer(RoutedLayer):
    """The paper's way to a gradient for the ratio (3.3), written from its description.

    In training the layer runs at the bins below and above the ratio, and the outputs are mixed by closeness; in
    sampling it runs once, at the nearest bin.
    """

    def at_bin(self, number: int, x: Tensor, condition: Tensor, caption: Tensor) -> Tensor:
        k = round(x.shape[1] * (1 - number / BINS))
        return x if k == 0 else super().forward(x, condition, caption, k)

    def forward(self, x, condition, caption, k, ratio=None, routing=None):
        N = x.shape[1]
        if k is None or ratio is None:
            k = None if k is None else max(1, round(N * (1 - round(BINS * (1 - k / N)) / BINS)))
            return super().forward(x, condition, caption, k, None, routing)
        lower = min(BINS - 1, math.floor(BINS * ratio.item()))
        share = BINS * ratio - lower
        low, high = (self.at_bin(number, x, condition, caption) for number in (lower, lower + 1))
        return (1 - share) * low + share * high


class MergedLayer(RoutedLayer):
    """Token merging (ToMe for Stable Diffusion, 2303.17604) around the whole layer, by the package `tomesd`.

    N - k tokens are merged into similar ones before the layer; what a merged token gains, all of its parts gain.
    """

    def forward(self, x, condition, caption, k, ratio=None, routing=None):
        from tomesd.merge import bipartite_soft_matching_random2d

        N, side = x.shape[1], math.isqrt(x.shape[1])
        if k is None or k == N:
            return super().forward(x, condition, caption, None)
        stride = 2 if k >= N / 4 else 4  # one token in stride^2 is a destination, and at least these remain
        merge, unmerge = bipartite_soft_matching_random2d(x, side, side, stride, stride, N - k, no_rand=True)
        merged = merge(x)
        return x + unmerge(self.layer(merged, condition, caption, keys=merged.shape[1]))


class RandomLayer(RoutedLayer):
    """Random dropping: the k tokens that are processed are drawn anew for every image, layer and step."""

    def forward(self, x, condition, caption, k, ratio=None, routing=None):
        B, N, D = x.shape
        if k is None or k == N:
            return super().forward(x, condition, caption, None)
        index = torch.rand(B, N, device=x.device).argsort(dim=1)[:, :k, None].expand(-1, -1, D)
        return x.scatter_add(1, index, self.layer(x.gather(1, index), condition, caption, keys=k).to(x.dtype))
