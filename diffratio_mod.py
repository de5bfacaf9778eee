"""DiffRatio-MoD: a Diffusion Transformer that learns how many tokens each layer skips at each noise level.

The whole method of "Layer- and Timestep-Adaptive Differentiable Token Compression Ratios for Efficient Diffusion
Transformers" (arXiv 2412.16822), top to bottom: configuration, one DiT layer, the table of ratios, the gate and the
routed layer, the model, the diffusion loss, the sampler. Two commands use it; both run on a CPU:

    python train_cifar.py --dataset shapes --init assets/shapes_dense.pt    # learns the ratios in minutes
    python sample.py --prompt "a red circle above a blue square"            # samples in seconds, tokens really skipped

Each layer has a learnable compression *ratio* for each region of noise levels (the paper's timesteps): the share of
tokens that bypass the layer, 0 = dense. These ratios form a table, a row a layer and a column a region. They start at
zero, so that a pretrained model starts unchanged, and two forces shape them: a pull of their mean towards a target
moves all alike, the diffusion loss lowers those where skipping hurts. So the table learns to skip where it costs least.

Which tokens bypass is decided by a router in each layer: it gives every token a *score*. The k = N (1 - ratio),
rounded, with the highest scores go through the layer, the others bypass it unchanged: routing as in Mixture-of-Depths
(arXiv 2404.02258). What the layer adds to a token is multiplied by its *gate*: twice its score if it is among the k,
else 0. k is a whole number and has no slope, so the choice is *straight-through*: hard in the forward pass, with a
slope in the ratio in the backward pass (see ratio_gate).

In training the images of a batch have different noise levels, and so different k: all N tokens are computed, and those
that bypass are masked, which saves no time. Sampling gathers the k tokens and computes only these, with the same result
up to rounding; for all N it still computes the routers, a sort and a copy a layer, the embedding and the last layer.

What differs from the paper, with the reasons where it stands: the gate is twice the score; a ratio learns in one pass,
through the tokens next after the k best, not in two at multiples of 10 %; ratios are clamped after the step, not in the
forward pass; the network is small, works on pixels, gives the velocity and reads captions itself; inpainting is added.

Letters used in comments:
    B images   N image tokens   D width   H heads   L layers   C columns of the ratio table (1, or R timestep regions)
    W words of a caption   S image side in pixels   p patch side in pixels   n, m any number of tokens or words
    k tokens that a layer processes   e tokens next after the k best, through which the ratio learns, in training only
    t noise level, 0 clean to 1 noise   a, s shares of signal and noise at t   eps the noise   x0 the clean image
"""

from __future__ import annotations

import difflib
import math
import unicodedata
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- Configuration ---------------------------------------------------------------------------------------------------

MODES = ("dense", "uniform", "layer", "layer-timestep")


@dataclass(frozen=True)
class Config:
    """All that is needed to rebuild a model. Raises InputError for sizes that do not fit together or are absurd."""

    vocabulary: tuple[str, ...]  # every word that a caption may use; word i has the id i + 1, and 0 is "no word"
    image_size: int = 32  # S, pixels
    patch_size: int = 4  # p, pixels; must divide image_size
    dim: int = 128  # D
    depth: int = 6  # L
    heads: int = 4  # H; must divide dim
    caption_length: int = 8  # W; shorter captions are padded with "no word"; the null caption is padding alone
    mode: str = "layer-timestep"  # one of MODES: how the ratio table looks, see DiT.__init__
    regions: int = 10  # R, regions of equal width into which the noise levels are cut

    def __post_init__(self) -> None:
        _refuse_bad_sizes(self)

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2  # N


# --- One DiT layer, in the manner of PixArt --------------------------------------------------------------------------


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
        # adaLN-single (PixArt): the six modulations come from one projection of the timestep that all layers share
        # (DiT.condition), plus this offset of the layer's own. These two and caption_out start at zero: a new layer
        # adds nothing.
        self.modulation = nn.Parameter(torch.zeros(6, dim))
        for parameter in self.caption_out.parameters():
            nn.init.zeros_(parameter)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attended: Tensor | None = None) -> Tensor:
        """Multi-head attention: query (B, n, D), key and value (B, m, D), attended (B, m); returns (B, n, D)."""
        query, key, value = (z.unflatten(2, (self.heads, -1)).transpose(1, 2) for z in (query, key, value))
        allowed = None if attended is None else attended[:, None, None, :]  # alike for all heads and all queries
        return F.scaled_dot_product_attention(query, key, value, allowed).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, attended: Tensor | None, modulation: Tensor, caption: Tensor) -> Tensor:
        """Tokens x (B, n, D), modulation (B, 6, D), caption (B, W, D); returns the update (B, n, D).

        attended: booleans (B, n), the tokens that may be attended to; None: all.
        """
        shift1, scale1, alpha1, shift2, scale2, alpha2 = (modulation + self.modulation).unsqueeze(2).unbind(1)

        query, key, value = self.qkv(normalise(x, shift1, scale1)).chunk(3, dim=-1)  # (B, n, D) each
        update = alpha1 * self.attention_out(self.attend(query, key, value, attended))

        key, value = self.caption_kv(caption).chunk(2, dim=-1)  # (B, W, D) each
        update = update + self.caption_out(self.attend(self.caption_q(normalise(x + update)), key, value))

        return update + alpha2 * self.mlp(normalise(x + update, shift2, scale2))


def normalise(x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x if shift is None or scale is None else torch.addcmul(shift, x, 1 + scale)


# --- The table of ratios (paper 3.3 and 3.4) and token routing (paper 3.2) -------------------------------------------

NEXT_BEST_SHARE = 0.05  # e as a share of all tokens, rounded up


def column_of(t: Tensor, columns: int) -> Tensor:
    """The columns of a table for noise levels t in (0, 1]: column c covers (c / C, (c + 1) / C], 0 is the cleanest."""
    return ((t * columns - 1e-4).ceil().long() - 1).clamp(0, columns - 1)  # 1e-4: for a t on an edge


def ratio_loss(ratios: Tensor, target: float) -> Tensor:
    """The pull on the ratios (L, C): squared distance of their mean from the target (paper 3.3).

    The training loss is the mean diffusion loss + weight * ratio_loss(...). The paper's mean goes over layers and
    batch, this one over the table: a sampler visits all columns alike, training some more often than others.
    """
    return (ratios.mean() - target) ** 2


def tokens_processed(ratios: Tensor, tokens: int) -> Tensor:
    """How many of N tokens are processed at a ratio in [0, 1): torch.long from 1 to N, in the shape of `ratios`."""
    return (tokens * (1 - ratios.detach())).round().long().clamp(1, tokens)


def ratio_gate(rank: Tensor, k: Tensor, ratio: Tensor) -> Tensor:
    """The straight-through choice of the k best: 1 for these, 0 for all others, but backwards with a slope in `ratio`.

    Why there is a slope. A lower ratio lets one more token in, the next after the k best: its gate goes from 0 to full.
    The loss changes by about the mean of its derivatives at both ends (the trapezoid rule). At full gate the derivative
    is taken to be 0, for there the router has tuned the gate, if only on average over tokens; so half of the derivative
    at gate 0 is left. As dk / dratio = -N, the ratio's gradient is -N / 2 times this derivative. It is averaged over
    the next e tokens (fewer if fewer bypass), which have less variance than one. A factor with the value 0 and the
    slope -N / (2 e), on each of these tokens, gives just that, with the layer's result y:

        dloss / dratio = -N / (2 e) * (sum over the next e tokens of 2 score <dloss / dy, update>)

    It is positive if processing them would lower the loss, and descent then lowers the ratio. (It cannot come from the
    k best: their gates lie where the loss is nearly flat, whatever skipping them would cost.) What it leaves out: a
    token that is processed would also be attended to, by itself and others. That may favour skipping.

    The paper instead runs each layer twice in training, at the multiples of 10 % below and above its ratio, and mixes
    the outputs: the difference that skipping makes, computed and not estimated, for a second pass.

    rank (B, N), each token's place in its image, 0 = best; k and the ratio that it follows from, (B, 1). Gives (B, N).
    """
    N = rank.shape[1]
    e = (N - k).clamp(max=math.ceil(NEXT_BEST_SHARE * N))  # (B, 1); 0 at a ratio of 0, which only the pull can raise
    next_best = (rank >= k) & (rank < k + e)
    zero_with_slope = (ratio.detach() - ratio) * N / (2 * e.clamp(min=1))
    return (rank < k) + next_best * zero_with_slope


class RoutedLayer(nn.Module):
    """A layer with its router: the k tokens with the highest scores gain `gate * update`, all others stay (paper 3.2).

    The score is a sigmoid of one linear layer. The gate is twice the score: the router starts at zero, so every gate
    starts at exactly 1 and the routed network starts as the dense one. (The paper multiplies by the score itself, near
    1/2 at the start, which changes a pretrained network.) Only through the gate does the router get a gradient.
    """

    def __init__(self, layer: nn.Module, dim: int) -> None:
        """layer: any that takes (x, attended, *context), as Layer does, and returns what it adds to x."""
        super().__init__()
        self.layer = layer
        self.router = nn.Linear(dim, 1)
        for parameter in self.router.parameters():
            nn.init.zeros_(parameter)

    def score_and_sort(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Every token's score (B, N), and the indices from best to worst (B, N); equal scores stay in raster order.

        In float32 whatever autocast or the weights say, as mixtures of experts keep their routers (arXiv 2101.03961,
        2.4): near 1/2, bfloat16 scores are 0.004 apart, and in many images their raster order would decide.
        """
        precision = torch.promote_types(x.dtype, torch.float32)  # a float64 model stays one
        weight, bias = (parameter.to(precision) for parameter in self.router.parameters())
        # The meta device, on which operations are counted, has no autocast to switch off.
        no_autocast = nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
        with no_autocast:
            score = torch.sigmoid(F.linear(x.to(precision), weight, bias)).squeeze(2)
        return score, score.argsort(dim=1, descending=True, stable=True)

    def forward(self, x: Tensor, *context: Tensor, k: int | None = None, ratio: Tensor | None = None) -> Tensor:
        """Tokens x (B, N, D) and what else the layer takes; returns (B, N, D). Three ways, by what is given:

        nothing: the dense layer, no router.
        ratio (B,), each image's own: training. All tokens are computed, but only each image's k best are attended to,
            and a gate of 0 leaves the others unchanged. Shapes are fixed, and no GPU is waited for.
        k, a Python integer from 1 to N, for all images: sampling. Only the k best are computed.
        """
        B, N, D = x.shape
        if k is None and ratio is None:
            return x + self.layer(x, None, *context)
        score, order = self.score_and_sort(x)
        gate = 2 * score  # (B, N)
        if ratio is not None:
            rank = order.argsort(dim=1)  # (B, N): the inverse of a permutation is its argsort
            ratio = ratio.unsqueeze(1)  # (B, 1)
            k_best = tokens_processed(ratio, N)  # (B, 1)
            gate = gate * ratio_gate(rank, k_best, ratio)
            return (x + gate.unsqueeze(2) * self.layer(x, rank < k_best, *context)).to(x.dtype)

        if k == N:  # nothing to gather
            return torch.addcmul(x, gate.unsqueeze(2), self.layer(x, None, *context)).to(x.dtype)
        # Rows of x as (B * N, D): index_select and index_add are faster than gather and scatter_add.
        rows = (order[:, :k] + N * torch.arange(B, device=x.device).unsqueeze(1)).flatten()
        best = x.flatten(0, 1).index_select(0, rows).view(B, k, D)
        gate = gate.flatten().index_select(0, rows).view(B, k, 1)
        gain = gate * self.layer(best, None, *context)  # (B, k, D)
        return x.flatten(0, 1).index_add(0, rows, gain.flatten(0, 1).to(x.dtype)).view(B, N, D)


# --- The noise schedule, and the model -------------------------------------------------------------------------------

LARGEST_ANGLE = math.acos(0.02)  # at t = 1 there is 2 % of the signal left: a sampler divides by a


def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine noise schedule (a, s): x_t = a * x0 + s * eps."""
    angle = t * LARGEST_ANGLE
    return angle.cos(), angle.sin()


class DiT(nn.Module):
    """A small text-conditional Diffusion Transformer, with a router in every layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        dim, p = config.dim, config.patch_size
        self.embed_patch = nn.Linear(7 * p**2, dim)  # 3 noisy, 3 known, 1 mask channel
        self.register_buffer("positions", _positions(config.image_size // p, dim), persistent=False)
        self.embed_time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

        # Two small transformer layers stand where PixArt has T5: "red", "circle" must become "a circle that is red".
        self.embed_word = nn.Embedding(len(config.vocabulary) + 1, dim)
        self.word_positions = nn.Parameter(0.02 * torch.randn(config.caption_length, dim))
        encoder = nn.TransformerEncoderLayer(dim, config.heads, 2 * dim, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.caption_encoder = nn.TransformerEncoder(encoder, num_layers=2, enable_nested_tensor=False)

        self.condition = nn.Linear(dim, 6 * dim)  # shared by all layers
        self.layers = nn.ModuleList(RoutedLayer(Layer(dim, config.heads), dim) for _ in range(config.depth))
        self.condition_out = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, 3 * p**2)
        for parameter in nn.ModuleList([self.condition, self.condition_out, self.out]).parameters():
            nn.init.zeros_(parameter)

        # The four modes, the paper's ablation, differ in this table:
        #   dense           zeros, and no router runs
        #   uniform         one fixed ratio everywhere (plain Mixture-of-Depths); the trainer fills it in
        #   layer           one learned ratio a layer, the same at all noise levels (paper 3.3)
        #   layer-timestep  one learned ratio a layer and region (paper 3.4), column 0 the least noisy: the full method
        ratios = torch.zeros(config.depth, config.regions if config.mode == "layer-timestep" else 1)  # (L, C)
        self.ratios = nn.Parameter(ratios, requires_grad=config.mode in ("layer", "layer-timestep"))

    @torch.no_grad()
    def clamp_ratios(self) -> None:
        """Bring the ratios back into [0, 1 - 1/N], where they mean what k does. Call it after every step.

        In the forward pass, a clamp has no gradient beyond its bounds, on PyTorch 2.14 not even at 0, where all start.
        """
        self.ratios.clamp_(0, 1 - 1 / self.config.tokens)

    def encode_caption(self, words: Tensor) -> Tensor:
        """Word ids (B, W) to caption tokens (B, W, D), once for all steps. Padding is attended to as any word is."""
        return self.caption_encoder(self.embed_word(words) + self.word_positions)

    def forward(
        self, noisy: Tensor, t: Tensor, caption: Tensor, known: Tensor, mask: Tensor, k=None, ratio=None
    ) -> Tensor:
        """Predict the noise in the noisy images: (B, 3, S, S) to (B, 3, S, S).

        t: noise levels (B,), from 0 (clean) to 1 (noise). caption: (B, W, D), from encode_caption.
        known, mask: pixels that are given (B, 3, S, S), and where to generate (B, 1, S, S), 1 = generate. What `known`
            holds under the mask is hidden from the model; a mask of all ones is plain generation.
        k, ratio: as in RoutedLayer, for each layer: k a list of L integers, or ratio (L, B), or neither.
        """
        p, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        pixels = torch.cat([noisy, known * (1 - mask), mask], dim=1)  # (B, 7, S, S)
        x = self.embed_patch(F.pixel_unshuffle(pixels, p).flatten(2).transpose(1, 2)) + self.positions  # (B, N, D)

        # PixArt's timestep conditioning, plus the mean of the caption's tokens (as in Stable Diffusion 3).
        condition = F.silu(self.embed_time(_waves(1000 * t, self.config.dim, 10_000)) + caption.mean(dim=1))  # (B, D)
        modulation = self.condition(condition).unflatten(1, (6, -1))  # (B, 6, D)
        for i, layer in enumerate(self.layers):
            k_of_layer = None if k is None else k[i]
            ratio_of_layer = None if ratio is None else ratio[i]
            x = layer(x, modulation, caption, k=k_of_layer, ratio=ratio_of_layer)  # (B, N, D)

        shift, scale = self.condition_out(condition).unsqueeze(1).chunk(2, dim=2)  # (B, 1, D) each
        patches = self.out(normalise(x, shift, scale))  # (B, N, 3 * p * p)
        velocity = F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (side, side)), p)  # (B, 3, S, S)
        # The last layer gives the velocity v = a * eps - s * x0 (Salimans and Ho 2022), from which the noise follows.
        # At high noise the input is nearly eps: a network that gave eps would have to copy it.
        a, s = (z.view(-1, 1, 1, 1) for z in schedule(t))
        return s * noisy + a * velocity


def _waves(position: Tensor, dim: int, longest: float) -> Tensor:
    """Sine-cosine features: (n,) to (n, dim), wavelengths from 2 pi to longest * 2 pi."""
    frequency = torch.exp(-math.log(longest) * torch.arange(dim // 2, device=position.device) / (dim // 2))
    angle = position.unsqueeze(1) * frequency  # (n, dim / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _positions(side: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (N, D): half of the width tells the row, half the column."""
    place = _waves(torch.arange(side), dim // 2, 100)  # (side, D/2)
    return torch.cat([place.repeat_interleave(side, dim=0), place.repeat(side, 1)], dim=1)


# --- Diffusion loss and sampler --------------------------------------------------------------------------------------


def diffusion_loss(
    model: DiT, images: Tensor, words: Tensor, mask: Tensor, t: Tensor, eps: Tensor, route: bool = True
) -> Tensor:
    """Mean squared error of the predicted velocity, one number an image: (B,).

    images (B, 3, S, S) in [-1, 1], which are also the known pixels: the model hides those under the mask; words (B, W),
    ids as in Config; mask (B, 1, S, S), 1 = generate; t (B,) in (0, 1]; eps (B, 3, S, S); route=False: no routers, as
    before routing begins.
    """
    routed = route and model.config.mode != "dense"
    ratio = model.ratios[:, column_of(t, model.ratios.shape[1])] if routed else None  # (L, B)
    a, s = (z.view(-1, 1, 1, 1) for z in schedule(t))
    predicted = model(a * images + s * eps, t, model.encode_caption(words), images, mask, ratio=ratio)
    # In x_t = a * x0 + s * eps the velocity is (eps - s * x_t) / a: its error is that of the noise, divided by a. The
    # error of the noise itself would weigh high noise levels, where a is small, next to nothing.
    return (predicted.float() - eps).square().mean(dim=(1, 2, 3)) / a.flatten() ** 2


@torch.no_grad()
def sample_images(
    model: DiT, words: Tensor, noise: Tensor, steps=30, guidance=3.0, guidance_interval=(0.0, 1.0),
    known=None, mask=None, ratios=None, hook=None,
) -> Tensor:  # fmt: skip
    """Generate images (B, 3, S, S) in [-1, 1] with DPM-Solver++(2M), the tokens that a layer skips really skipped.

    words (B, W), ids as in Config; noise, the start (B, 3, S, S), standard normal; guidance, classifier-free: 1 is the
    plain conditional model, at half the cost; guidance_interval, the lowest and the highest t at which guidance acts
    (arXiv 2404.07724): all other steps are plain; known and mask, for inpainting, as in DiT.forward: known pixels are
    returned unchanged; ratios, another table (L, any number of columns) in place of the learned one: zeros skip nothing
    (the gates remain), and a dense model ignores it; hook, a function, called at every step with t and the current x0.
    """
    ratios = model.ratios if ratios is None else ratios
    levels = torch.linspace(1, 0, steps + 1)
    column = column_of(levels[:-1], ratios.shape[1]).tolist()  # of each step
    k = tokens_processed(ratios, model.config.tokens).T.tolist()  # k[column][layer]; one transfer from the device
    a, s = (z.tolist() for z in schedule(levels))
    known = torch.zeros_like(noise) if known is None else known
    mask = torch.ones_like(noise[:, :1]) if mask is None else mask
    low, high = guidance_interval  # 1e-4, below: rounding must not exclude a t on an edge
    guided = [guidance != 1 and low - 1e-4 <= t <= high + 1e-4 for t in levels[:-1].tolist()]  # of each step
    if any(guided):
        words = torch.cat([words, torch.zeros_like(words)])  # the given captions and the null ones
    captions = model.encode_caption(words)

    noisy = noise
    last_x0, last_stride = None, None  # of the step before
    for i, t in enumerate(levels[:-1].tolist()):
        halves = 2 if guided[i] else 1  # the conditional and, where guidance acts, the unconditional one, as one batch
        caption = captions[: halves * len(noise)]
        t_of_all = noisy.new_full((len(caption),), t)
        k_i = None if model.config.mode == "dense" else k[column[i]]
        noisy_halves, known_halves, mask_halves = (z.repeat(halves, 1, 1, 1) for z in (noisy, known, mask))
        eps = model(noisy_halves, t_of_all, caption, known_halves, mask_halves, k=k_i).float()
        if guided[i]:
            conditional, unconditional = eps.chunk(2)
            eps = unconditional + guidance * (conditional - unconditional)
        x0 = torch.where(mask.bool(), ((noisy - s[i] * eps) / a[i]).clamp(-1, 1), known)
        if hook is not None:
            hook(t, x0)
        # DDIM takes x0 for the image and goes to the next noise level along the noise that this implies. 2M takes what
        # the last x0 and this one extrapolate to, in log(a / s); the first step has no last x0, and at the end of the
        # last one log(a / s) is infinite.
        image = x0
        if i < steps - 1:
            stride = math.log(a[i + 1] / s[i + 1]) - math.log(a[i] / s[i])
            if i > 0:
                image = x0 + stride / (2 * last_stride) * (x0 - last_x0)
            last_x0 = x0
            last_stride = stride
        noisy = a[i + 1] * image + s[i + 1] * (noisy - a[i] * image) / s[i]
    return noisy  # at t = 0, where it is x0


# --- What a user may give: captions and sizes ------------------------------------------------------------------------


class InputError(ValueError):
    """Something that the user gave is wrong. The message is one line: what is wrong, and what to do."""


def words_of(caption: str) -> list[str]:
    """A caption's words in lower case. NFC: some systems write é as two characters, others as one."""
    return unicodedata.normalize("NFC", caption.lower()).split()


def encode(config: Config, captions: Sequence[str]) -> Tensor:
    """Captions to word ids (B, W). The empty caption, all zeros, is the null caption of classifier-free guidance."""
    ids = {" ".join(words_of(word)): i for i, word in enumerate(config.vocabulary, start=1)}
    rows = []
    for caption in captions:
        words = words_of(caption)
        if "an" not in ids:  # models are taught "a airplane"
            words = ["a" if word == "an" else word for word in words]
        for word in words:
            if word not in ids:
                close = "".join(f"did you mean {known!r}? " for known in difflib.get_close_matches(word, ids, 1))
                raise InputError(f"unknown word {word!r} in {caption!r}; {close}known: {' '.join(ids)}")
        if len(words) > config.caption_length:
            raise InputError(f"caption {caption!r} has {len(words)} words; at most {config.caption_length} fit")
        padding = [0] * (config.caption_length - len(words))
        rows.append([ids[word] for word in words] + padding)
    return torch.tensor(rows, dtype=torch.long)


def _refuse_bad_sizes(config: Config) -> None:
    """Raises InputError where the sizes of a Config do not fit together, or are absurd."""
    for name in ("image_size", "patch_size", "dim", "depth", "heads", "caption_length", "regions"):
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= 2048:
            raise InputError(f"{name} must be a whole number from 1 to 2048, not {str(value)[:40]!r}")
    if config.image_size % config.patch_size or config.tokens > 16384:
        raise InputError(f"patches of {config.patch_size} pixels must cut {config.image_size} into at most 128 x 128")
    if config.dim % config.heads or config.dim % 4:
        raise InputError(f"dim {config.dim} must be a multiple of 4 and of the number of heads, {config.heads}")
    if config.mode not in MODES:
        raise InputError(f"mode {str(config.mode)[:40]!r} is not one of {', '.join(MODES)}")
    if not 0 < len(set(config.vocabulary)) == len(config.vocabulary) <= 50_000:
        raise InputError("the vocabulary must be 1 to 50000 words, each of them once")
