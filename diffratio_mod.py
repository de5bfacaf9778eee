"""DiffRatio-MoD: a Diffusion Transformer that learns how many tokens each layer skips at each noise level.

The whole method of "Layer- and Timestep-Adaptive Differentiable Token Compression Ratios for Efficient Diffusion
Transformers" (arXiv 2412.16822), top to bottom: configuration, one DiT layer, the router and the routed layer, the table
of ratios, the model, the diffusion loss, the sampler. The commands are in the companions; both run on a CPU:

    python train_cifar.py --dataset shapes --init assets/shapes_dense.pt    # learns the ratios in minutes
    python sample.py --prompt "a red circle above a blue square"            # samples in seconds, tokens really skipped

Each layer has a router that scores every image token. The k tokens with the highest scores go through the layer, the
others leave it as they came. k follows from the layer's compression *ratio*, the share of tokens that bypass it (0 =
dense). Every layer has one learnable ratio for each region of noise levels, and all start at zero, so that a pretrained
model starts unchanged. Two forces shape them: the squared distance of their mean from a target raises them, the
diffusion loss lowers those where skipping hurts. What results is a table that skips where it costs least.

What differs from the paper: the gate is twice the score; a ratio gets its gradient in one pass, from tokens beyond the
k-th, not from two passes at multiples of 10 %; ratios are clamped after the step, not in the forward pass; the network
is small and predicts the velocity; inpainting is added. The reasons stand at each place.

Letters used in shape comments:
    B images   N image tokens   D width   H heads   L layers   R timestep regions   C columns of the ratio table
    W words of a caption   S image side in pixels   p patch side in pixels
    k tokens that a layer processes   e tokens just beyond the k-th, looked at in training only
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- Configuration -----------------------------------------------------------------------------------------------------

MODES = ("dense", "uniform", "layer", "layer-timestep")


class InputError(ValueError):
    """Something that the user gave is wrong. The message is one line: what is wrong, and what to do."""


@dataclass(frozen=True)
class Config:
    """Everything that is needed to rebuild a model. Raises InputError for sizes that do not fit together."""

    vocabulary: tuple[str, ...]  # every word that a caption may use; word i has the id i + 1, and 0 is "no word"
    image_size: int = 32  # S, pixels
    patch_size: int = 4  # p, pixels; must divide image_size
    dim: int = 128  # D
    depth: int = 6  # L
    heads: int = 4  # H; must divide dim
    caption_length: int = 8  # W; shorter captions are padded with "no word"; the null caption is nothing else
    mode: str = "layer-timestep"  # one of MODES: how the ratio table looks, see DiT.__init__
    regions: int = 10  # R, regions of equal width into which the noise levels are cut

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise InputError(f"patches of {self.patch_size} pixels do not divide an image of {self.image_size}")
        if self.dim % self.heads or self.dim % 4:
            raise InputError(f"dim {self.dim} must be a multiple of 4 and of the number of heads, {self.heads}")
        if self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")

    @property
    def tokens(self) -> int:
        """N, the number of image tokens."""
        return (self.image_size // self.patch_size) ** 2


# --- One DiT layer, in the manner of PixArt ----------------------------------------------------------------------------


class Layer(nn.Module):
    """Self-attention, cross-attention to the caption, MLP. Returns what it *adds* to the tokens, not the sum.

    Why not the sum: routing multiplies what a token gains by a gate. `x + gate * update` with a gate of exactly 1 is
    the dense layer `x + update` to the last bit; `x + gate * (layer(x) - x)` would differ by rounding.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.caption_q = nn.Linear(dim, dim)
        self.caption_kv = nn.Linear(dim, 2 * dim)
        self.caption_out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        # adaLN-single (PixArt): the timestep's six modulations come from one projection that all layers share, which
        # starts at zero; a layer owns only this offset to it. So a new layer's gates are zero: it adds nothing.
        self.modulation = nn.Parameter(torch.zeros(6, dim))
        nn.init.zeros_(self.caption_out.weight)
        nn.init.zeros_(self.caption_out.bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Multi-head attention: q (B, n, D) looks at k and v (B, m, D); returns (B, n, D)."""
        q, k, v = (z.unflatten(2, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))  # (B, H, n or m, D/H)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, modulation: Tensor, caption: Tensor, keys: int) -> Tensor:
        """x (B, n, D), modulation (B, 6, D), caption (B, W, D); returns the update (B, n, D).

        All n tokens look, but only the first `keys` of them are looked at (see RoutedLayer).
        """
        modulation = modulation + self.modulation  # (B, 6, D): what all layers share, plus this layer's own
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(2).unbind(1)  # (B, 1, D)

        q, k, v = self.qkv(_modulate(x, shift1, scale1)).chunk(3, dim=-1)  # (B, n, D) each
        update = gate1 * self.attention_out(self.attend(q, k[:, :keys], v[:, :keys]))

        k, v = self.caption_kv(caption).chunk(2, dim=-1)  # (B, W, D) each
        update = update + self.caption_out(self.attend(self.caption_q(_normalise(x + update)), k, v))

        return update + gate2 * self.mlp(_modulate(x + update, shift2, scale2))


def _normalise(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, _normalise(x), 1 + scale)


# --- Token routing (paper 3.2) with a differentiable ratio (paper 3.3) -------------------------------------------------

BOUNDARY = 0.05  # share of all tokens that are looked at beyond the k-th, in training, to see what skipping them costs


def ratio_gate(ratio: Tensor, tokens: int, beyond: int) -> Tensor:
    """The straight-through factor on the gates of the tokens just beyond the k-th: the number 0 with a slope in `ratio`.

    How does the loss change if the layer skips a little less? One more token is processed: its gate goes from 0 to its
    full value. To first order that changes the loss by its derivative at gate 0, and a factor of 0 lets just that flow
    to the ratio. N tokens pass the boundary as the ratio goes from 1 to 0, so the slope is -N, shared among the e tokens
    that stand for the next one: -N / e. If processing them lowers the loss, the ratio's gradient is positive, and
    gradient descent lowers the ratio.

    The factor 1/2: skipping costs the difference of the loss between gate 0 and the full gate, and the trapezoid rule
    takes the mean of the derivatives at both ends. That of a processed token is taken to be 0: training flattens the
    loss there. (So the k processed tokens could not tell what skipping costs.)

    The paper instead runs the layer twice, at the multiples of 10 % below and above the ratio, and mixes the outputs.

    Args: ratio, a scalar tensor; tokens, N; beyond, e >= 1. Returns a scalar tensor that equals 0.
    """
    return (ratio.detach() - ratio) * (tokens / (2 * beyond))


class RoutedLayer(nn.Module):
    """A layer with its router: the k tokens with the highest scores gain `gate * update`, all others stay (paper 3.2).

    The score is a sigmoid of one linear layer. The gate is twice the score: the router starts at zero, so every gate
    starts at exactly 1 and the routed network starts as the dense one. (The paper multiplies by the score itself,
    which is near 1/2 at the start and so changes a pretrained network before its first step.) The gate is the only
    way in which the router gets a gradient, as in Mixture-of-Depths, and no auxiliary loss is needed.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.layer = Layer(dim, heads)
        self.router = nn.Linear(dim, 1)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        caption: Tensor,
        k: int | None,
        ratio: Tensor | None = None,
        routing: list | None = None,
    ) -> Tensor:
        """x (B, N, D), modulation (B, 6, D), caption (B, W, D); returns (B, N, D).

        k: how many tokens are processed, 1 to N, the same for the whole batch, so that the shapes are known before
        anything is computed and nothing waits for the device. None: no router at all, the dense layer.
        ratio: given in training only, a scalar tensor that is to get a gradient (see ratio_gate). It does not change
        the result.
        routing: a list to which the scores (B, N) and the processed tokens' indices (B, k) are appended.
        """
        B, N, D = x.shape
        if k is None:
            return x + self.layer(x, modulation, caption, keys=N)
        score = torch.sigmoid(self.router(x))  # (B, N, 1)
        if k == N:  # nothing to choose; each token is processed in its place, and none beyond k can move the ratio
            if routing is not None:
                routing.append((score.squeeze(2), torch.arange(N, device=x.device).expand(B, N)))
            return torch.addcmul(x, 2 * score, self.layer(x, modulation, caption, keys=N))

        # In training the layer also takes e tokens beyond the k-th. They look but are not looked at, so the k come out
        # as in sampling; and their gate is 0, so they leave as they came and teach nothing but the ratio.
        e = 0 if ratio is None else min(N - k, math.ceil(BOUNDARY * N))
        order = score.squeeze(2).argsort(dim=1, descending=True, stable=True)  # stable: equal scores in order
        rows = (order[:, : k + e] + N * torch.arange(B, device=x.device).unsqueeze(1)).flatten()  # of x as (B * N, D)
        if routing is not None:
            routing.append((score.squeeze(2), order[:, :k]))

        taken = x.flatten(0, 1).index_select(0, rows).view(B, k + e, D)
        gate = 2 * score.flatten(0, 1).index_select(0, rows).view(B, k + e, 1)
        if ratio is not None:
            gate = torch.cat([gate[:, :k], gate[:, k:] * ratio_gate(ratio, N, e)], dim=1)
        gain = gate * self.layer(taken, modulation, caption, keys=k)  # (B, k + e, D)
        return x.flatten(0, 1).index_add(0, rows, gain.flatten(0, 1).to(x.dtype)).view(B, N, D)


# --- The table of ratios (paper 3.3 and 3.4) ---------------------------------------------------------------------------


def column_of(t: float, columns: int) -> int:
    """The column of a ratio table for the noise level t in (0, 1]: column c covers (c / C, (c + 1) / C], 0 is clean.

    1e-6 absorbs the rounding of a t that lies on an edge.
    """
    return min(columns - 1, max(0, math.ceil(t * columns - 1e-6) - 1))


def tokens_processed(ratios: Tensor, tokens: int) -> list[list[int]]:
    """How many tokens each layer processes, as Python integers: ratios (L, C) in [0, 1) to k[c][l], each 1 to N.

    One transfer from the device, before the first layer runs.
    """
    return [[max(1, round(tokens * (1 - ratio))) for ratio in column] for column in ratios.detach().T.tolist()]


def ratio_loss(ratios: Tensor, target: float) -> Tensor:
    """The pull on the ratios (paper 3.3): squared distance of their mean from the target.

    The training loss is diffusion_loss(...).mean() + weight * ratio_loss(...), and nothing else. The paper's mean goes
    over the layers and the batch; noise levels are drawn evenly here, so that is the mean over the table (L, C).
    """
    return (ratios.mean() - target) ** 2


# --- The model ---------------------------------------------------------------------------------------------------------


class DiT(nn.Module):
    """A small text-conditional Diffusion Transformer that predicts noise, with a router in every layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = self.config = config
        self.embed_patch = nn.Linear(7 * c.patch_size**2, c.dim)  # 3 noisy, 3 known, 1 mask channel
        self.register_buffer("positions", _positions(c.image_size // c.patch_size, c.dim), persistent=False)
        self.embed_time = nn.Sequential(nn.Linear(c.dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))

        # A caption's words see each other in two small transformer layers, which stand where PixArt has T5: "red" and
        # "circle" must become "a circle that is red" somewhere.
        self.embed_word = nn.Embedding(len(c.vocabulary) + 1, c.dim)
        self.word_positions = nn.Parameter(0.02 * torch.randn(c.caption_length, c.dim))
        encoder = nn.TransformerEncoderLayer(c.dim, c.heads, 2 * c.dim, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.caption_encoder = nn.TransformerEncoder(encoder, num_layers=2, enable_nested_tensor=False)

        self.condition = nn.Linear(c.dim, 6 * c.dim)  # adaLN-single, shared by all layers
        self.layers = nn.ModuleList(RoutedLayer(c.dim, c.heads) for _ in range(c.depth))
        self.condition_out = nn.Linear(c.dim, 2 * c.dim)
        self.out = nn.Linear(c.dim, 3 * c.patch_size**2)
        for module in (self.condition, self.condition_out, self.out):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

        # The ratios. The four modes, the paper's ablation, differ in this table:
        #   dense           stays zero, and no router runs
        #   uniform         one fixed ratio everywhere (plain Mixture-of-Depths); the trainer fills it in
        #   layer           one learned ratio a layer, the same at all noise levels (paper 3.3)
        #   layer-timestep  one learned ratio a layer and region (paper 3.4), column 0 the least noisy: the full method
        columns = c.regions if c.mode == "layer-timestep" else 1
        self.ratios = nn.Parameter(torch.zeros(c.depth, columns), requires_grad=c.mode.startswith("layer"))

    @torch.no_grad()
    def clamp_ratios(self) -> None:
        """Bring the ratios back into [0, 1 - 1/N], so that at least one token is processed. Call it after every step.

        A clamp inside the forward pass would give a ratio beyond the bound no gradient, and it would never return.
        """
        self.ratios.clamp_(0, 1 - 1 / self.config.tokens)

    def encode_caption(self, words: Tensor) -> Tensor:
        """Word ids (B, W) to caption tokens (B, W, D). The same for every denoising step, so computed once."""
        return self.caption_encoder(self.embed_word(words) + self.word_positions)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        caption: Tensor,
        known: Tensor,
        mask: Tensor,
        k: Sequence[int] | None = None,
        ratios: Tensor | None = None,
        routing: list | None = None,
    ) -> Tensor:
        """Predict the noise in x: returns (B, 3, S, S).

        Args:
            x: noisy images (B, 3, S, S). t: noise levels (B,), from 0 (clean) to 1 (noise).
            caption: (B, W, D), from encode_caption.
            known, mask: pixels that are given (B, 3, S, S), and where to generate (B, 1, S, S), 1 = generate. Pixels
                under the mask are hidden from the model; a mask of all ones is plain generation.
            k, ratios, routing: as in RoutedLayer, for all layers: L integers; the column (L,) of the table that they
                came from; one list for all.
        """
        p, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        pixels = torch.cat([x, known * (1 - mask), mask], dim=1)  # (B, 7, S, S)
        h = self.embed_patch(F.pixel_unshuffle(pixels, p).flatten(2).transpose(1, 2)) + self.positions  # (B, N, D)

        # PixArt's timestep conditioning, plus the mean of the caption's tokens (as in Stable Diffusion 3).
        condition = F.silu(self.embed_time(_waves(1000 * t, self.config.dim, 10_000)) + caption.mean(dim=1))  # (B, D)
        modulation = self.condition(condition).unflatten(1, (6, -1))  # (B, 6, D)
        nothing = [None] * len(self.layers)
        for layer, k_l, ratio in zip(self.layers, k or nothing, nothing if ratios is None else ratios):
            h = layer(h, modulation, caption, k_l, ratio, routing)  # (B, N, D)

        shift, scale = self.condition_out(condition).unsqueeze(1).chunk(2, dim=2)  # (B, 1, D) each
        patches = self.out(_modulate(h, shift, scale))  # (B, N, 3 * p * p)
        out = F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (side, side)), p)  # (B, 3, S, S)
        # At high noise x is nearly eps itself, and what matters is how it differs. So the network's own output is the
        # velocity v = a * eps - s * x_0 (Salimans and Ho 2022), from which eps follows; without this line it
        # would have to repeat x to many digits.
        a, s = (z.view(-1, 1, 1, 1) for z in schedule(t))
        return s * x + a * out


def _waves(position: Tensor, dim: int, longest: float) -> Tensor:
    """Sine-cosine features: (n,) to (n, dim), wavelengths from 2 pi to longest * 2 pi."""
    frequency = torch.exp(-math.log(longest) * torch.arange(dim // 2, device=position.device) / (dim // 2))
    angle = position.float().unsqueeze(1) * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _positions(side: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (N, D): half of the width tells the row, half the column."""
    row = _waves(torch.arange(side), dim // 2, 100)  # (side, D/2)
    return torch.cat([row.repeat_interleave(side, dim=0), row.repeat(side, 1)], dim=1)


# --- Diffusion: noise schedule, loss, sampler --------------------------------------------------------------------------


def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine noise schedule (a, s): x_t = a * x_0 + s * eps. t in [0, 1]; t = 1 leaves 2 % of the signal."""
    angle = t * math.acos(0.02)
    return angle.cos(), angle.sin()


def even_noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """Random noise levels (count,) in (0, 1), ascending, one in each of `count` equal strata."""
    return (torch.arange(count) + torch.rand(count, generator=generator).clamp(1e-4, 1 - 1e-4)) / count


def diffusion_loss(
    model: DiT, images: Tensor, words: Tensor, mask: Tensor, t: Tensor, eps: Tensor, route: bool = True
) -> Tensor:
    """Mean squared error of the predicted noise, one number an image: (B,).

    images (B, 3, S, S) in [-1, 1]; words (B, W), ids as in Config; mask (B, 1, S, S), 1 = generate; t (B,) on the
    CPU, ascending, in (0, 1]; eps (B, 3, S, S), the noise. route=False runs the model densely, without its routers:
    the first part of a training from nothing.

    Images that run together share k. But one step should see noise levels of all kinds, for steps on single regions
    would pull the weights to and fro. So the regions of a batch run one after another, and their gradients add up.
    (Every other region, in turn, was as good, and faster: --every-nth-region of train_cifar.py.)
    """
    route = route and model.config.mode != "dense"
    columns = model.ratios.shape[1] if route else 1
    k = tokens_processed(model.ratios, model.config.tokens) if route else None
    learning = route and model.ratios.requires_grad and torch.is_grad_enabled()
    region = [column_of(level, columns) for level in t.tolist()]
    t, caption = t.to(images.device), model.encode_caption(words)
    losses = []
    for c in sorted(set(region)):
        rows = slice(region.index(c), region.index(c) + region.count(c))  # neighbours, as t ascends
        x0, level = images[rows], t[rows]
        a, s = (z.view(-1, 1, 1, 1) for z in schedule(level))
        ratios = model.ratios[:, c] if learning else None
        guess = model(a * x0 + s * eps[rows], level, caption[rows], x0, mask[rows], k[c] if k else None, ratios)
        losses.append((guess.float() - eps[rows]).square().mean(dim=(1, 2, 3)))
    return torch.cat(losses)


@torch.no_grad()
def sample(
    model: DiT,
    words: Tensor,
    noise: Tensor,
    steps: int = 30,
    guidance: float = 3.0,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    ratios: Tensor | None = None,
    hook: Callable[[float, Tensor, list], None] | None = None,
) -> Tensor:
    """Generate images (B, 3, S, S) in [-1, 1] with DPM-Solver++(2M), the tokens that a layer skips really skipped.

    Args:
        words: (B, W), ids as in Config. noise: the start (B, 3, S, S), standard normal.
        guidance: classifier-free guidance; 1 is the plain conditional model, at half the cost.
        known, mask: for inpainting, see DiT.forward; known pixels are returned unchanged.
        ratios: another table (L, any number of columns) in place of the learned one; zeros skip nothing (the gates
            remain). A model of mode dense has no use for it.
        hook: called at every step with t, the current guess of the image, and for each layer its scores and processed
            tokens (see RoutedLayer), those of the conditional half.
    """
    guided = guidance != 1
    known = torch.zeros_like(noise) if known is None else known
    mask = torch.ones_like(noise[:, :1]) if mask is None else mask
    k = tokens_processed(model.ratios if ratios is None else ratios, model.config.tokens)
    twice = (lambda z: torch.cat([z, z])) if guided else (lambda z: z)  # with guidance, both captions run as one batch
    caption = model.encode_caption(torch.cat([words, torch.zeros_like(words)]) if guided else words)
    known2, mask2 = twice(known), twice(mask)

    x, last, last_h = noise, noise, math.inf  # inf: nothing to extrapolate from in the first step
    for t, t_next in itertools.pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        routing: list | None = None if hook is None else []
        k_t = None if model.config.mode == "dense" else k[column_of(t, len(k))]
        x2 = twice(x)
        eps = model(x2, x2.new_full((len(x2),), t), caption, known2, mask2, k_t, routing=routing).float()
        if guided:
            conditional, unconditional = eps.chunk(2)
            eps = unconditional + guidance * (conditional - unconditional)

        (a, s), (a_next, s_next) = ([float(z) for z in schedule(torch.tensor(u))] for u in (t, t_next))
        x0 = torch.where(mask.bool(), ((x - s * eps) / a).clamp(-1, 1), known)
        if hook is not None:
            hook(t, x0, [(score[: len(x)], index[: len(x)]) for score, index in routing or []])
        # DDIM takes x0 for the image; 2M extrapolates from the last x0 and this one, but not in the first step and the
        # last. h is the step in log(a / s).
        h = math.log(a_next / s_next) - math.log(a / s) if s_next > 0 else 0.0
        image = x0 + h / (2 * last_h) * (x0 - last)
        x = a_next * image + s_next * (x - a * image) / s
        last, last_h = x0, h
    return x  # the last step ends at t = 0, where x is x0
