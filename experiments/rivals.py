"""Layers that the routed one is compared with: each has the parameters and the arguments of RoutedLayer. No command.

Trained: the paper's two branches. Not trained: random dropping, token merging, pruning by attention, and two caches.
"""

import math

import common
import torch
from torch import Tensor

from diffratio_mod import DiT, RoutedLayer, normalise, tokens_processed

BINS = 10  # the paper's: ratios of 0 %, 10 %, ... 100 %


def use(model: DiT, kind: type[RoutedLayer]) -> DiT:
    """Let every layer of the model compute as `kind` does, with the parameters that it has."""
    for layer in model.layers:
        layer.__class__ = kind
    return model


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
        match = common.package("tomesd.merge").bipartite_soft_matching_random2d
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
    the routed layer's: the tokens that bypass it gain nothing, then and when it is repeated. `forget` is for the start
    of a sampling.
    """

    def forget(self):
        self.step = 0
        self.computed = []  # of the last two steps that were: the step, and what was added

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
