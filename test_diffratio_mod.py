"""Tests of DiffRatio-MoD, as a specification: each is named after the property that it pins.

python -m pytest                                        # everything, four minutes
python -m pytest -k method                              # those of the method alone, half a minute
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
import unicodedata
import zlib
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands; small models are faster with one thread
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import diffratio_mod as method
import sample
import train_cifar

HERE = Path(__file__).parent
torch.set_num_threads(1)
WORDS = ("a", "red", "blue", "circle", "square")
PATCHES = [np.s_[:, y : y + 2, x : x + 2] for y in range(0, 12, 2) for x in range(0, 12, 2)]


def setup_function() -> None:
    """Before every test."""
    torch.manual_seed(0)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere, biases and all that starts at zero too, so that no term is invisible."""
    for parameter in module.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape)
    return module


def small_model(mode: str = "layer-timestep", skips: float = 0.9) -> method.DiT:
    """Three layers, 36 tokens, patches of 2 x 2 pixels. skips=0: ratios and routers are zero, as at the start."""
    model = randomise(method.DiT(method.Config(WORDS, 12, 2, 16, 3, 2, 5, mode, 4)))
    model.ratios.data = skips * torch.rand(model.ratios.shape)
    if skips == 0:
        for layer in model.layers:
            torch.nn.init.zeros_(layer.router.weight)
            torch.nn.init.zeros_(layer.router.bias)
    return model


def small_batch(count: int = 8) -> dict:
    """Arguments for diffusion_loss: each image with its own caption, mask and noise level, in no order."""
    lengths = torch.arange(count).unsqueeze(1) % 6  # from the null caption to a full one
    words = torch.randint(1, 6, (count, 5)) * (torch.arange(5) < lengths)
    rows = torch.rand(count, 1, 12, 1) < 0.8
    columns = torch.rand(count, 1, 1, 12) < 0.8
    mask = (rows & columns).float()
    t = (torch.randperm(count) + torch.rand(count)) / count
    eps = torch.randn(count, 3, 12, 12)
    images = torch.rand(count, 3, 12, 12) * 2 - 1
    return {"images": images, "words": words, "mask": mask, "t": t, "eps": eps}


def check_shape(about: str, got, shape: torch.Size) -> None:
    """Fails unless `got` is a tensor of this shape."""
    hint = "Is a `return` missing, or a gradient lost on its way?"
    assert got is not None, f"{about}: expected a tensor, got None. {hint}"
    assert isinstance(got, torch.Tensor), f"{about}: expected a tensor, got {got!r}"
    assert got.shape == shape, f"{about}: expected the shape {list(shape)}, got {list(got.shape)}"


def check_close(about: str, got, expected, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Fails unless `got` is a tensor like `expected`: says what was given (`about`), what was expected, what came."""
    expected = torch.as_tensor(expected).detach().double()
    check_shape(about, got, expected.shape)
    got = got.detach().double()
    far = ~got.isclose(expected, rtol, atol)
    if far.any():
        place = tuple(far.nonzero()[0].tolist())
        right = expected[place].item()
        came = got[place].item()
        digits = 10 if math.isclose(right, came, rel_tol=1e-3) else 4
        numbers = f"expected {right:.{digits}g}, got {came:.{digits}g}"
        where = f" at {list(place)}, and {far.sum()} of {far.numel()} differ" if place else ""
        raise AssertionError(f"{about}: {numbers}{where}")


# --- The whole forward pass against a reference from the definitions, in float64 -------------------------------------


def waves(position: float, dim: int, longest: float) -> np.ndarray:
    """Cosines, then sines, of a position: dim numbers."""
    angles = position / longest ** (np.arange(dim // 2) / (dim // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)])


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Attention of queries (n, D) to keys and values (m, D), in two heads."""
    query, key, value = (z.reshape(len(z), 2, -1) for z in (query, key, value))
    weights = np.exp(np.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[2]))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(axis=2, keepdims=True), value).reshape(len(query), -1)


def routed(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, k: int | None, update) -> np.ndarray:
    """The k tokens with the highest scores gain twice their score times update(them), the others stay. None: dense."""
    if k is None:
        return x + update(x)
    score = 1 / (1 + np.exp(-x @ weight[0] - bias))
    best = sorted(range(len(x)), key=lambda i: -score[i])[:k]  # sorted() keeps equals in order
    result = x.copy()
    result[best] += 2 * score[best, None] * update(x[best])
    return result


def reference(model: method.DiT, noisy, t: float, words, known, mask, k: list) -> np.ndarray:
    """What DiT.forward says for one image, with nothing of PyTorch but the weights; each layer has its k."""
    w = {name: value.numpy() for name, value in model.state_dict().items()}

    def normalise(x, eps=1e-6):
        return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + eps)

    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    def linear(name, x):
        return x @ w[name + "weight"].T + w[name + "bias"]

    def norm(name, x):
        return normalise(x, 1e-5) * w[name + "weight"] + w[name + "bias"]

    def update(x):  # of `layer`, in the loop below
        shift1, scale1, alpha1, shift2, scale2, alpha2 = modulation + w[layer + "modulation"]
        qkv = linear(layer + "qkv.", normalise(x) * (1 + scale1) + shift1)
        gain = alpha1 * linear(layer + "attention_out.", attend(*np.split(qkv, 3, axis=1)))
        query = linear(layer + "caption_q.", normalise(x + gain))
        keys_values = linear(layer + "caption_kv.", caption)
        gain = gain + linear(layer + "caption_out.", attend(query, *np.split(keys_values, 2, axis=1)))
        hidden = linear(layer + "mlp.0.", normalise(x + gain) * (1 + scale2) + shift2)
        return gain + alpha2 * linear(layer + "mlp.2.", gelu(hidden))

    caption = w["embed_word.weight"][words] + w["word_positions"]
    for name in ("caption_encoder.layers.0.", "caption_encoder.layers.1."):
        qkv = linear(name + "self_attn.in_proj_", norm(name + "norm1.", caption))
        caption = caption + linear(name + "self_attn.out_proj.", attend(*np.split(qkv, 3, axis=1)))
        caption = caption + linear(name + "linear2.", gelu(linear(name + "linear1.", norm(name + "norm2.", caption))))

    hidden = linear("embed_time.0.", waves(1000 * t, 16, 10_000))
    condition = linear("embed_time.2.", hidden / (1 + np.exp(-hidden))) + caption.mean(axis=0)
    condition = condition / (1 + np.exp(-condition))
    modulation = linear("condition.", condition).reshape(6, 16)

    pixels = np.concatenate([noisy, np.where(mask == 1, 0, known), mask])
    x = linear("embed_patch.", np.stack([pixels[patch].flatten() for patch in PATCHES])) + model.positions.numpy()
    for i in range(3):
        layer = f"layers.{i}.layer."
        router = f"layers.{i}.router."
        x = routed(x, w[router + "weight"], w[router + "bias"], k[i], update)

    shift, scale = np.split(linear("condition_out.", condition), 2)
    velocity = np.zeros_like(noisy)
    for patch, values in zip(PATCHES, linear("out.", normalise(x) * (1 + scale) + shift)):
        velocity[patch] = values.reshape(3, 2, 2)
    return math.sin(t * math.acos(0.02)) * noisy + math.cos(t * math.acos(0.02)) * velocity


def k_at(ratios: torch.Tensor, t: float) -> list[int]:
    """How many of 36 tokens each layer processes at noise level t."""
    k = []
    for row in ratios.tolist():
        column = math.ceil(t * len(row) - 1e-9) - 1
        k.append(min(max(round(36 * (1 - row[column])), 1), 36))
    return k


def in_float64(model: method.DiT, batch: dict) -> dict:
    """Turn both into float64. Positions and time features, which are float32 for good, are compared, then replaced."""
    positions = np.stack([np.concatenate([waves(y, 8, 100), waves(x, 8, 100)]) for y, x in np.ndindex(6, 6)])
    np.testing.assert_allclose(model.positions, positions, atol=1e-6)
    model.double().positions = torch.tensor(positions)
    features = np.stack([waves(1000 * t, 16, 10_000) for t in batch["t"].tolist()])

    def compare_and_replace(module, inputs):
        np.testing.assert_allclose(inputs[0], features, atol=3e-4)  # an angle of up to 1000, in float32
        return torch.tensor(features)

    model.embed_time.register_forward_pre_hook(compare_and_replace)
    doubled = dict(batch)
    for name, value in batch.items():
        if value.is_floating_point():
            doubled[name] = value.double()
    return doubled


@pytest.mark.part(6)
@pytest.mark.parametrize("mode, route", [*((mode, True) for mode in method.MODES), ("layer", False)])
def test_method_forward_and_loss_of_a_mixed_batch_equal_the_reference_image_by_image(mode, route):
    model = small_model(mode)
    batch = in_float64(model, small_batch())
    images, words, mask, t, eps = batch.values()
    a, s = (z.view(-1, 1, 1, 1) for z in method.schedule(t))
    noisy = a * images + s * eps
    is_dense = mode == "dense" or not route
    if is_dense:
        sampling_k = None
    else:
        sampling_k = [13, 36, 1]

    losses = method.diffusion_loss(model, **batch, route=route)
    with torch.no_grad():
        sampled = model.eval()(noisy, t, model.encode_caption(words), images, mask, k=sampling_k)

    for i, level in enumerate(t.tolist()):
        if is_dense:
            k_in_training = [None] * 3
            k_in_sampling = [None] * 3
        else:
            k_in_training = k_at(model.ratios, level)
            k_in_sampling = sampling_k
        inputs = noisy[i].numpy(), level, words[i].numpy(), images[i].numpy(), mask[i].numpy()
        about = f"mode {mode}, image {i} of the batch, t = {level:.3f}"
        guess = reference(model, *inputs, k_in_training)
        expected_loss = np.mean((guess - eps[i].numpy()) ** 2) / math.cos(level * math.acos(0.02)) ** 2
        check_close(f"{about}, so the layers' k are {k_in_training}: the loss", losses[i], expected_loss, 1e-6)
        expected = reference(model, *inputs, k_in_sampling)
        check_close(f"{about}, DiT.forward with k = {k_in_sampling}", sampled[i], expected, 1e-9, 1e-9)


@pytest.mark.part(6)
def test_method_the_model_is_trained_with_the_known_pixels_and_without_the_hidden_ones():
    model = small_model()
    images, words, mask, t, eps = small_batch().values()
    patches = []
    model.embed_patch.register_forward_pre_hook(lambda module, inputs: patches.append(inputs[0]))

    method.diffusion_loss(model, images, words, mask, t, eps)

    pixels = torch.nn.functional.pixel_shuffle(patches[0].transpose(1, 2).unflatten(2, (6, 6)), 2)
    known = torch.where(mask == 1, 0, images)
    check_close("the model's input in training, channels 3 to 5: known pixels, 0 under the mask", pixels[:, 3:6], known)
    check_close("the model's input in training, channel 6: the mask", pixels[:, 6:], mask)


@pytest.mark.part(6)
@pytest.mark.parametrize("mode", ["uniform", "layer", "layer-timestep"])
def test_method_zero_ratios_equal_dense_to_the_last_bit(mode):
    for count in (1, 8, 33):
        model = small_model(mode, skips=0)
        batch = small_batch(count)
        images, words, mask, t, noisy = batch.values()
        inputs = noisy, t, model.encode_caption(words), images, mask
        about = f"mode {mode}, {count} images, all ratios and routers 0"

        dense_losses = method.diffusion_loss(model, **batch, route=False)
        check_close(f"{about}: the losses, as with route=False", method.diffusion_loss(model, **batch), dense_losses)
        check_close(f"{about}: DiT.forward with every k = 36 of 36", model(*inputs, k=[36] * 3), model(*inputs))


class Toy(torch.nn.Linear):
    """A layer with nothing of Layer: a linear map of each token, and the mean of the attended ones."""

    def forward(self, x, attended, scale):
        if attended is None:
            weight = x.new_ones(x.shape[:2])
        else:
            weight = attended.to(x.dtype)
        mean = torch.einsum("bn,bnd->bd", weight, x) / weight.sum(dim=1, keepdim=True)
        return scale * (super().forward(x) + mean.unsqueeze(1))


def toy_layer() -> tuple[method.RoutedLayer, torch.Tensor, torch.Tensor]:
    """A routed toy layer of float64, tokens (3, 16, 6), and what else the layer takes."""
    layer = randomise(method.RoutedLayer(Toy(6, 6), 6)).double()
    return layer, torch.randn(3, 16, 6).double(), torch.rand(3, 1, 1).double()


@pytest.mark.part(5)
@pytest.mark.parametrize("k", range(1, 17))
def test_method_any_layer_can_be_routed_and_bypassed_tokens_leave_bit_identical(k):
    layer, x, scale = toy_layer()
    w = {name: value.numpy() for name, value in layer.state_dict().items()}
    own_ks = [k, 17 - k, 1 + k // 2]  # each image's own k in training
    computed = []  # how many tokens of an image the layer was given
    layer.layer.register_forward_pre_hook(lambda module, inputs: computed.append(inputs[0].shape[1]))

    def expected(i, k):
        def update(best):
            return scale[i].numpy() * (best @ w["layer.weight"].T + w["layer.bias"] + best.mean(axis=0))

        return routed(x[i].numpy(), w["router.weight"], w["router.bias"], k, update)

    def compare(branch, ks, result):
        check_shape(f"{branch}, tokens (3, 16, 6)", result, x.shape)
        for i in range(3):
            right = torch.tensor(expected(i, ks[i]))
            gain = result[i] - x[i]
            right_gain = right - x[i]
            scores = layer.router(x[i]).squeeze(1).sigmoid()
            for rank, token in enumerate(scores.argsort(descending=True).tolist()):
                about = f"{branch}, image {i}, k = {ks[i]} of 16, token {token} of rank {rank}, "
                if rank < ks[i]:
                    about += f"which gains 2 x {scores[token]:.3f} times the layer's update of it among the k best"
                    check_close(about, gain[token], right_gain[token], 1e-9, 1e-12)
                else:
                    check_close(about + "which bypasses, so that it stays", result[i, token], x[i, token])

    compare("sampling", [k, k, k], layer(x, scale, k=k))
    assert computed == [k], f"sampling, k = {k} of 16: the layer must compute {[k]} tokens an image, it did {computed}"
    ratio = 1 - torch.tensor(own_ks).double() / 16
    compare("training", own_ks, layer(x, scale, ratio=ratio))
    dense = x + layer.layer(x, None, scale)
    check_close("neither k nor ratio is given: x + the layer's update", layer(x, scale), dense)


@pytest.mark.part(5)
def test_method_equal_scores_are_taken_in_order(monkeypatch):
    sort = torch.Tensor.argsort

    def argsort(x, dim=-1, descending=False, stable=False):
        """Unless stable, ties come in any order: here the reverse."""
        if stable:
            return sort(x, dim=dim, descending=descending, stable=True)
        return x.shape[dim] - 1 - sort(x.flip(dim), dim=dim, descending=descending, stable=True)

    monkeypatch.setattr(torch, "argsort", argsort)
    monkeypatch.setattr(torch.Tensor, "argsort", argsort)
    layer, x, scale = toy_layer()
    torch.nn.init.zeros_(layer.router.weight)

    for branch, options in (("sampling", {"k": 7}), ("training", {"ratio": torch.full((3,), 9 / 16)})):
        changed = (layer(x, scale, **options) != x).any(dim=2)
        for i in range(3):
            tokens = changed[i].nonzero().flatten().tolist()
            about = f"{branch}, image {i}, 16 equal scores, k = 7, tokens that are processed"
            assert tokens == [*range(7)], f"{about}: expected 0 to 6, as in the picture, got {tokens}"


@pytest.mark.part(5)
def test_method_router_learns_only_through_the_gate_of_processed_tokens_and_the_ratio_through_that_of_the_next():
    layer, x, scale = toy_layer()
    ratio = torch.full((3,), 9 / 16).double()
    direction = torch.randn(3, 16, 6).double()

    # gradcheck changes the inputs in place; the choice of tokens stays
    inputs = x.requires_grad_(), *layer.router.parameters()
    agrees = torch.autograd.gradcheck(lambda *_: layer(x, scale, ratio=ratio), inputs, raise_exception=False)
    about = "training, k = 7 of 16: the gradients of tokens and router are not what finite differences give"
    assert agrees, f"{about}. Is a gate missing or detached, or does a skipped token learn?"

    (layer(x, scale, ratio=ratio.requires_grad_()) * direction).sum().backward()
    score, order = layer.score_and_sort(x)
    attended = order.argsort(dim=1) < 7
    change = 2 * score * (layer.layer(x, attended, scale) * direction).sum(dim=2)  # by the processing of each token
    expected = -16 / 2 * change.gather(1, order[:, 7:8]).squeeze(1)  # e = 1
    check_close("training, k = 7 of 16, e = 1: the gradient of each image's ratio", ratio.grad, expected, 1e-7, 1e-7)


@pytest.mark.part(5)
@pytest.mark.parametrize("k", [[36, 35, 34], [18, 36, 1], [1, 2, 3], [30, 20, 10]])
def test_method_training_equals_sampling_in_the_result_and_in_what_the_weights_learn(k):
    """So the tokens next after the k best teach the ratio, and nothing else. (gradcheck changes weights in place.)"""
    model = small_model()
    images, words, mask, t, noisy = in_float64(model, small_batch()).values()
    names = [name for name, _ in model.named_parameters() if name != "ratios"]
    weights = [parameter for name, parameter in model.named_parameters() if name != "ratios"]
    fixed = 1 - torch.tensor(k).double().unsqueeze(1).expand(3, 8) / 36
    learned = fixed.clone().requires_grad_()
    about = f"three layers with k = {k} of 36: "

    def run(**options):
        return model(noisy, t, model.encode_caption(words), images, mask, **options)

    def result_loss_and_gradients(**options):
        result = run(**options)
        loss = (result - images).square().sum()
        return result, loss, torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)

    sampled, _, gradients_of_sampling = result_loss_and_gradients(k=k)
    _, _, gradients_of_fixed = result_loss_and_gradients(ratio=fixed)
    trained, loss, gradients_of_learned = result_loss_and_gradients(ratio=learned)

    check_close(about + "what training gives, against sampling", trained, sampled, 1e-9, 1e-9)
    for name, *gradients in zip(names, gradients_of_fixed, gradients_of_learned, gradients_of_sampling, strict=True):
        of_fixed, of_learned, of_sampling = gradients
        assert of_sampling is not None, f"{about}in sampling, no gradient reaches {name}"
        gradient = f"{about}the gradient of {name}"
        check_close(f"{gradient} in training, against sampling", of_learned, of_sampling, 1e-7, 1e-7)
        check_close(f"{gradient}, whether ratios learn or not", of_learned, of_fixed)
    slope = torch.autograd.grad(loss, learned, allow_unused=True)[0]
    assert slope is not None, about + "in training, no gradient reaches the ratios"
    check_close(about + "has the ratio a gradient (1) or not (0)", slope != 0, fixed > 0)
    small_weights = [weight for weight in weights if weight.numel() < 100]
    agrees = torch.autograd.gradcheck(lambda *_: run(k=k), small_weights, fast_mode=True, raise_exception=False)
    assert agrees, about + "in sampling, the gradients of the weights are not what finite differences give"


@pytest.mark.part(4)
@pytest.mark.parametrize("N", [16, 64, 256])
def test_method_ratio_gate_chooses_the_k_best_and_has_the_slope_that_its_docstring_promises(N):
    k = torch.tensor([N // 2, N - 1, N - 2, N - 5, N, 1])
    exact = k + torch.tensor([-0.3, 0.4, -0.4, 0.2, 0.0, 0.0])  # N (1 - ratio), which rounds to k
    k = k.unsqueeze(1)
    ratio = (1 - exact / N).unsqueeze(1).requires_grad_()
    rank = torch.stack([torch.randperm(N) for _ in range(6)])

    gate = method.ratio_gate(rank, k, ratio)
    check_shape(f"ratio_gate of ranks (6, {N})", gate, rank.shape)
    assert gate.requires_grad, "ratio_gate: the result does not depend on ratio, so that it has no slope"
    slopes = torch.autograd.functional.jacobian(lambda ratio: method.ratio_gate(rank, k, ratio), ratio)  # (6, N, 6, 1)

    abouts = []
    for image in range(6):
        e = min(N - k[image].item(), math.ceil(0.05 * N))
        abouts.append(f"N = {N}, k = {k[image].item()}, ratio = {ratio[image].item():.4g}, so e = {e}")
        finite = gate[image].isfinite().all() and slopes[image, :, image].isfinite().all()
        assert finite, f"{abouts[image]}: a gate or a slope is not a number. Is it 0 / 0?"
    for image in range(6):
        e = min(N - k[image].item(), math.ceil(0.05 * N))
        for place in range(N):
            token = rank[image].tolist().index(place)
            about = f"{abouts[image]}, token of rank {place}: "
            check_close(about + "the gate", gate[image, token], 1.0 if place < k[image] else 0.0)
            if k[image] <= place < k[image] + e:  # e tokens stand for the next one; N pass; trapezoid: half
                expected = -N / e / 2
            else:
                expected = 0.0
            check_close(about + "the slope of the gate in ratio", slopes[image, token, image, 0], expected, 0, 1e-3)
            others = slopes[image, token].sum() - slopes[image, token, image, 0]
            check_close(about + "its slope in the ratios of other images", others, 0.0)


@pytest.mark.part(3)
def test_method_tokens_processed_are_the_nearest_whole_number_from_one_to_all():
    ratios = torch.linspace(0, 0.9999, 300, requires_grad=True).view(3, 100)

    k = method.tokens_processed(ratios, 64)

    check_shape("tokens_processed of ratios (3, 100)", k, ratios.shape)
    assert k.dtype == torch.long, f"tokens_processed: expected whole numbers, torch.long, got {k.dtype}"
    for ratio, count in zip(ratios.flatten().tolist(), k.flatten().tolist()):
        exact = 64 * (1 - ratio)
        nearest = max(round(exact), 1)
        about = f"ratio = {ratio:.4f}, so that N (1 - ratio) = {exact:.3f} of 64 tokens"
        assert count == nearest or abs(exact - count) <= 0.5 + 1e-4, f"{about}: expected k = {nearest}, got {count}"
        assert 1 <= count <= 64, f"{about}: expected k = {nearest}, got {count}"


@pytest.mark.part(1)
@pytest.mark.parametrize("columns", [1, 4, 10])
def test_method_columns_cut_the_noise_levels_evenly_in_training_and_sampling(columns):
    def check_columns(t, expected):
        before = t.clone()
        result = method.column_of(t, columns)
        unchanged = "column_of changes its argument t in place, and other code needs it: expected t as it was"
        assert torch.equal(t, before), f"{unchanged}, {before[0]:.4g} at first, got {t[0]:.4g}"
        check_shape(f"column_of of {len(t)} noise levels", result, t.shape)
        assert result.dtype == torch.long, f"column_of: expected whole numbers, torch.long, got {result.dtype}"
        for level, came, right in zip(t.tolist(), result.tolist(), expected, strict=True):
            about = f"t = {level:.8g} with C = {columns} columns, so that t C = {level * columns:.8g}"
            about += f", expected column {right}, which covers ({right / columns:g}, {(right + 1) / columns:g}]"
            assert came == right, f"{about} up to rounding, got {came}"

    t = torch.rand(500).clamp(1e-3)
    check_columns(t, [math.ceil(level * columns) - 1 for level in t.tolist()])
    check_columns(torch.tensor([1e-6, 1.0]), [0, columns - 1])
    for steps in range(1, 50):  # an edge belongs to the cleaner column, however t is rounded
        t = torch.linspace(1, 0, steps + 1)[:-1]
        check_columns(t, [-(-i * columns // steps) - 1 for i in range(steps, 0, -1)])


@pytest.mark.part(2)
def test_method_ratio_loss_pulls_all_cells_alike_towards_the_target():
    ratios = torch.rand(3, 5, requires_grad=True)
    mean = np.mean(ratios.tolist())
    about = f"target 0.3, ratios (3, 5) from {ratios.min():.3f} to {ratios.max():.3f} with the mean {mean:.4f}"

    loss = method.ratio_loss(ratios, 0.3)
    check_close(f"{about}: ratio_loss, ({mean:.4f} - 0.3) squared", loss, (mean - 0.3) ** 2, 1e-5)
    assert loss.requires_grad, f"{about}: ratio_loss gives no gradient to the ratios: is something detached?"
    loss.backward()

    check_close(f"{about}: the gradient of the ratios", ratios.grad, torch.full((3, 5), 2 * (mean - 0.3) / 15), 1e-5)


@pytest.mark.part(7)
@pytest.mark.parametrize("pull, bound, k", [(1, 0.0, 36), (-1, 1 - 1 / 36, 1)])
def test_method_a_ratio_at_its_bound_comes_back_at_the_first_step_when_the_pull_turns(pull, bound, k):
    model = small_model()
    optimizer = torch.optim.SGD([model.ratios], lr=0.1)
    for _ in range(20):
        model.ratios.grad = torch.full((3, 4), float(pull))
        optimizer.step()
        model.clamp_ratios()
    about = f"N = 36, after 20 steps that {'lower' if pull > 0 else 'raise'} all ratios, each with clamp_ratios: "
    check_close(about + "the ratios", model.ratios, torch.full((3, 4), bound))
    check_close(about + "k of each ratio", method.tokens_processed(model.ratios, 36), torch.full((3, 4), k))

    optimizer.zero_grad()
    method.diffusion_loss(model, **small_batch(32)).mean().backward()
    has_slope = torch.full((3, 4), k != 36)  # if nothing is skipped there is none
    assert model.ratios.grad is not None, about + "no gradient reaches the ratios"
    check_close(about + "has each ratio a gradient (1) or not (0)", model.ratios.grad != 0, has_slope)

    optimizer.zero_grad()
    method.ratio_loss(model.ratios, 0.5).backward()  # the pull turns
    optimizer.step()
    model.clamp_ratios()
    back = pull * (model.ratios - bound) > 0
    about += f"one step of a pull to 0.5 should bring them back from {bound:.4f}"
    assert back.all(), f"{about}, and they are {model.ratios.min():.4f} to {model.ratios.max():.4f}"


@pytest.mark.parametrize("mode", method.MODES)
def test_method_a_new_model_is_the_same_in_every_mode_but_for_its_table_and_adds_nothing(mode):
    model = method.DiT(small_model(mode).config)
    dense = method.DiT(small_model("dense").config)
    model.load_state_dict(dense.state_dict() | {"ratios": model.ratios})  # strict: the same names and shapes
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert sum(z.numel() for z in model.parameters()) - model.ratios.numel() == 21_263

    columns = 4 if mode == "layer-timestep" else 1
    assert torch.equal(model.ratios, torch.zeros(3, columns))
    assert model.ratios.requires_grad == (mode in ("layer", "layer-timestep"))

    for module in (model.condition, model.condition_out, model.out, *(layer.router for layer in model.layers)):
        assert module.weight.eq(0).all()
        assert module.bias.eq(0).all()

    images, words, mask, t, noisy = small_batch().values()
    updates = []
    for layer in model.layers:
        layer.layer.register_forward_hook(lambda module, inputs, update: updates.append(update))
    result = model(noisy, t, model.encode_caption(words), images, mask)
    assert len(updates) == 3
    assert all(update.eq(0).all() for update in updates)
    torch.testing.assert_close(result, method.schedule(t)[1].view(-1, 1, 1, 1) * noisy)  # the velocity is zero


def toy_batch(count: int) -> dict:
    """Arguments for diffusion_loss: somewhere on grey a box, whose colour a word tells; the noise levels ascend."""
    colour = torch.randint(3, (count,))
    place = torch.randint(12, (2, count, 1))
    near = (torch.arange(12) - place).abs() < 3  # (2, B, S)
    box = near[0].unsqueeze(2) & near[1].unsqueeze(1)
    paint = (2 * torch.eye(3) - 1)[colour]
    images = torch.where(box.unsqueeze(1), paint[:, :, None, None], 0.0)
    words = 1 + colour.unsqueeze(1)
    t = (torch.arange(count) + torch.rand(count)) / count
    eps = torch.randn(count, 3, 12, 12)
    return {"images": images, "words": words, "mask": torch.ones(count, 1, 12, 12), "t": t, "eps": eps}


@pytest.mark.part(6)
def test_method_gradient_of_a_ratio_agrees_with_the_finite_difference_in_k():
    """In a model that has learned at one fixed ratio: for each layer and region, the loss at k - 3 against k + 3."""
    model = method.DiT(method.Config(WORDS, 12, 2, 32, 2, 2, 1, "layer-timestep", 4))
    ratios = model.ratios
    ratios.data.fill_(0.4)
    steps = 250
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter is not ratios], lr=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (step + 1) / 20) * math.sqrt(1 - step / steps)
        method.diffusion_loss(model, **toy_batch(32)).mean().backward()
        assert ratios.grad is not None, "diffusion_loss gives no gradient to the ratios: is something detached?"
        optimizer.step()
        model.zero_grad()

    rounds = 6
    slope = torch.zeros(2, 4)
    for _ in range(rounds):
        batch = toy_batch(128)
        (method.diffusion_loss(model, **batch).mean() / rounds).backward()
        for layer in range(2):
            for change in (3 / 36, -3 / 36):
                ratios.data[layer] += change
                losses = method.diffusion_loss(model, **batch).detach().view(4, 32).sum(dim=1)  # of each region
                slope[layer] += losses / (256 * change * rounds)
                ratios.data[layer] -= change

    about = "a trained model, ratios 0.4, three tokens more and three fewer in each layer and region: the gradients' "
    share = (ratios.grad.sum() / slope.sum()).item()
    assert 0.4 < share < 2.5, about + f"sum should be that of the measured slopes, and is {share:.2g} times it"
    correlation = np.corrcoef(ratios.grad.flatten(), slope.flatten())[0, 1]
    about += "correlation with the measured slopes"
    assert correlation > 0.4, f"{about} should be above 0.4, and is {correlation:.2f}"


@pytest.mark.part(7)
def test_method_a_training_step_is_one_pass_that_reads_nothing_back_from_the_device():
    class Operations(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    model = small_model().to("meta")  # shapes without numbers: whatever needs a number fails
    batch = {name: z.to("meta") for name, z in small_batch().items()}
    images, words, mask, t, noisy = batch.values()

    with Operations() as dense:
        method.diffusion_loss(model, **batch, route=False).mean().backward()
    with Operations() as routed:
        (method.diffusion_loss(model, **batch).mean() + method.ratio_loss(model.ratios, 0.3)).backward()
    torch.optim.AdamW(model.parameters()).step()
    model.clamp_ratios()

    about = "a training step with routing, counted in operations: "
    assert routed.count <= 1.8 * dense.count, about + f"{routed.count}, a dense one {dense.count}: more than one pass"
    assert model.ratios.grad.is_meta, "after clamp_ratios, the ratios' gradient should be where it was, on the device"
    model(noisy, t, model.encode_caption(words), images, mask, k=[36, 7, 1])  # nor does a step of sampling


@pytest.mark.part(6)
def test_method_the_loss_compiles_once_whatever_the_ratios():
    model = small_model()
    batch = small_batch()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    loss = torch.compile(method.diffusion_loss, fullgraph=True, backend=backend)
    for most in (0.0, 0.5, 0.97):
        model.ratios.data = most * torch.rand(3, 4)
        expected = method.diffusion_loss(model, **batch)
        try:
            compiled = loss(model, **batch)
        except Exception as error:
            reason = "are numbers read out of a tensor, by tolist, item or `if`?"
            raise AssertionError(f"torch.compile does not make one graph of diffusion_loss: {reason}") from error
        check_close(f"ratios up to {most}: the compiled loss", compiled, expected, 1e-5, 1e-5)
    assert len(graphs) == 1, f"three tables of ratios: torch.compile should compile once, and did {len(graphs)} times"


def check_precision(device: str, skips: float) -> None:
    """The losses in float32 and in bfloat16 against those of a CPU; and everything comes out in float32."""
    model = small_model(skips=skips)
    batch = small_batch()
    expected = method.diffusion_loss(model, **batch, route=skips > 0)  # zero ratios equal dense
    model = model.to(device)
    batch = {name: value.to(device) for name, value in batch.items()}
    layer, x, scale = (z.float().to(device) for z in toy_layer())
    layer.layer.register_forward_hook(lambda module, inputs, update: update.bfloat16())

    for amp, tolerance in ((False, 1e-3), (True, 0.1)):
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            losses = method.diffusion_loss(model, **batch)
            images = method.sample_images(model, batch["words"], batch["eps"], steps=2)
            tokens = layer(x, scale, k=7)
        about = f"{device}, {'bfloat16' if amp else 'float32'}, ratios up to {skips}: "
        results = {"diffusion_loss": losses, "sample_images": images, "RoutedLayer.forward with k": tokens}
        for name, result in results.items():
            assert result.dtype == torch.float32, f"{about}expected float32 from {name}, got {result.dtype}"
        assert not images.requires_grad, about + "sample_images should not keep what a gradient needs"
        check_close(about + "the losses, against float32 on a CPU", losses.cpu(), expected, tolerance, tolerance / 10)


@pytest.mark.part(5, 8)
@pytest.mark.parametrize("skips", [0.0, 0.9])
def test_method_bfloat16_trains_and_samples_with_about_the_same_result(skips):
    check_precision("cpu", skips)


@pytest.mark.parametrize("skips", [0.0, 0.9])
def test_method_cuda_trains_and_samples_with_about_the_same_result(skips):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    check_precision("cuda", skips)


def test_method_config_refuses_what_does_not_fit_and_what_is_absurd():
    many = tuple(str(i) for i in range(50_001))
    most = 2048
    method.Config(many[1:], most, most, most, most, most, most, "dense", most)
    assert method.Config(WORDS, 128, 1) == method.Config(WORDS, 128, 1, 128, 6, 4, 8, "layer-timestep", 10)  # large

    sizes = "image_size", "patch_size", "dim", "depth", "heads", "caption_length", "regions"
    refused = [{name: value} for name in sizes for value in (0, -1, most + 1, 4.0, "4", True, None)]
    refused += [{"patch_size": 5}, {"image_size": 129, "patch_size": 1}, {"dim": 126, "heads": 2}, {"heads": 3}]
    refused += [{"vocabulary": ()}, {"vocabulary": ("a", "a")}, {"vocabulary": many}]
    refused += [{"mode": "fast" * 99}, {"dim": "9" * 99}]
    for changes in refused:
        with pytest.raises(method.InputError) as error:
            method.Config(**({"vocabulary": WORDS} | changes))
        assert isinstance(error.value, ValueError)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 130


@pytest.mark.part(8)
def test_method_sampler_reproduces_a_known_distribution():
    model = small_model("dense")
    mean = torch.linspace(-0.3, 0.3, 3).view(1, 3, 1, 1)

    def exact(noisy, t, *_, **__):  # the noise in data that are normal, pixel by pixel
        a, s = (z.view(-1, 1, 1, 1) for z in method.schedule(t))
        return s * (noisy - a * mean) / (a**2 * 0.15**2 + s**2)

    model.forward = exact
    images = method.sample_images(model, torch.ones(128, 5).long(), torch.randn(128, 3, 12, 12))

    about = "128 images from a model that knows the distribution, of each colour: "
    check_close(about + "the mean", images.mean(dim=(0, 2, 3)), mean.flatten(), 0, 0.01)
    check_close(about + "the standard deviation", images.std(dim=(0, 2, 3)), torch.full((3,), 0.15), 0, 0.01)


def paper_sampler(predict, noise, known, mask, steps=30, guidance=3.0) -> list[tuple[float, torch.Tensor]]:
    """DPM-Solver++(2M) as in its paper (arXiv 2211.01095, algorithm 2), with guidance; t and guess of every step."""
    t = np.linspace(1, 0, steps + 1)
    a = np.cos(t * math.acos(0.02))
    s = np.sin(t * math.acos(0.02))
    half_snr = np.log(a / np.maximum(s, 1e-300))
    x = noise.double()
    guesses = []
    for i in range(steps):
        conditional, null = predict(x.float(), t[i])
        x0 = (x - s[i] * (null + guidance * (conditional - null))) / a[i]
        guesses.append(mask * x0.clamp(-1, 1) + (1 - mask) * known)
        h = half_snr[i + 1] - half_snr[i]
        data = guesses[i]
        if 0 < i < steps - 1:
            r = (half_snr[i] - half_snr[i - 1]) / h
            data = (1 + 1 / (2 * r)) * guesses[i] - 1 / (2 * r) * guesses[i - 1]
        x = s[i + 1] / s[i] * x - a[i + 1] * np.expm1(-h) * data
    return [*zip(t, guesses), (0.0, x)]


@pytest.mark.part(8)
@pytest.mark.parametrize("options", [{}, {"steps": 8, "guidance": 1.0}, {"steps": 1}, {"steps": 2, "guidance": 0.0}])
@pytest.mark.parametrize("mode", method.MODES)
def test_method_sampler_equals_dpm_solver_and_computes_the_k_tokens_of_each_noise_level(mode, options):
    model = small_model(mode)
    noise = torch.randn(8, 3, 12, 12)
    known, words, mask, *_ = small_batch().values()
    if mode == "uniform":  # has no table of its own that differs between layers
        given_table = torch.tensor([[0.0, 0.9], [0.5, 0.2], [0.99, 0.0]])
        table = given_table
    else:
        given_table = None
        table = model.ratios

    def predict(x, t):
        k = None if mode == "dense" else k_at(table, t)
        for caption in (model.encode_caption(words), model.encode_caption(0 * words)):
            yield model(x, torch.full((8,), t).float(), caption, known, mask, k=k).detach()

    expected = paper_sampler(predict, noise, known, mask, **options)

    calls = []  # k of each layer at each step, and the batch that it was given
    for layer in model.layers:
        layer.register_forward_pre_hook(
            lambda _, inputs, named: calls.append((named["k"], len(inputs[0]))), with_kwargs=True
        )
    computed = []  # tokens that the last layer computes
    model.layers[2].layer.register_forward_pre_hook(lambda module, inputs: computed.append(inputs[0].shape[1]))
    captions = []
    model.caption_encoder.register_forward_pre_hook(lambda module, inputs: captions.append(len(inputs[0])))
    guesses = []
    result = method.sample_images(
        model,
        words,
        noise,
        **options,
        known=known,
        mask=mask,
        ratios=given_table,
        hook=lambda t, guess: guesses.append((t, guess)),
    )

    columns = table.shape[1]
    about = f"mode {mode}, table of {columns} columns, {options or 'all options as usual'}: "
    images = 8 if options.get("guidance") == 1 else 16  # without guidance the null caption is not computed
    assert captions == [images], f"{about}expected one batch of {images} captions to be encoded, got {captions}"
    assert len(calls) == 3 * len(guesses), f"{about}expected one run of the model a step"
    for i, (t, _) in enumerate(expected[:-1]):
        step = f"{about}step {i}, at t = {t:.3f}: "
        right_k = [None] * 3 if mode == "dense" else k_at(table, t)
        k = [k for k, _ in calls[3 * i : 3 * i + 3]]
        assert all(isinstance(one, (int, type(None))) for one in k), f"{step}expected Python integers as k, got {k}"
        assert k == right_k, f"{step}expected k = {right_k} of 36 tokens for the layers, got {k}"
        right_tokens = 36 if mode == "dense" else right_k[2]
        assert computed[i] == right_tokens, f"{step}expected {right_tokens} tokens computed, got {computed[i]}"
        assert calls[3 * i][1] == images, f"{step}expected a batch of {images} images, got {calls[3 * i][1]}"

    for i, ((t, guess), (right_t, right)) in enumerate(zip([*guesses, (0.0, result)], expected, strict=True)):
        assert t == pytest.approx(right_t), f"{about}step {i}: expected t = {right_t:.4f}, got {t:.4f}"
        what = "the result" if t == 0 else f"the guess of the image at step {i}, t = {t:.3f}"
        check_close(f"{about}{what}, against DPM-Solver++", guess, right, 1e-4, 1e-4)


@pytest.mark.part(8)
def test_method_inpainting_returns_known_pixels_unchanged_and_never_sees_hidden_ones():
    model = small_model()
    known, words, mask, _, noise = small_batch().values()
    inside = mask.bool().expand(8, 3, 12, 12)

    images = method.sample_images(model, words, noise, 5, known=known, mask=mask)
    check_close("inpainting: the pixels outside of the mask", images[~inside], known[~inside])
    assert not torch.equal(images[inside], known[inside]), "inpainting: what lies under the mask was not generated"

    changed_inside = torch.where(inside, -known, known)
    others = method.sample_images(model, words, noise, 5, known=changed_inside, mask=mask)
    check_close("inpainting: the images, with other pixels hidden under the mask", others, images)


@pytest.mark.part(8)
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 1.0), (0.0, 0.75), (0.3, 0.6), (0.7, 0.7), (0.8, 0.2)])
@pytest.mark.parametrize("mode", ["dense", "layer-timestep"])
def test_method_guidance_acts_within_its_interval_and_all_other_steps_run_the_conditional_half_alone(mode, interval):
    model = small_model(mode)
    noise = torch.randn(8, 3, 12, 12)
    known, words, mask, *_ = small_batch().values()
    expected_batches = []

    def predict(x, t):  # outside of the interval both are the conditional prediction, so guidance changes nothing
        tenth = round(10 * t)
        acts = 10 * interval[0] <= tenth <= 10 * interval[1]
        k = None if mode == "dense" else k_at(model.ratios, t)
        other_words = 0 * words if acts else words
        predictions = []
        for caption in (words, other_words):
            inputs = x, torch.full((8,), t).float(), model.encode_caption(caption), known, mask
            predictions.append(model(*inputs, k=k).detach())
        expected_batches.append(16 if acts else 8)
        return predictions

    expected = paper_sampler(predict, noise, known, mask, steps=10, guidance=4.0)

    guesses = []
    batches = []
    model.layers[2].register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    result = method.sample_images(
        model, words, noise, 10, 4.0, interval, known, mask, hook=lambda t, guess: guesses.append((t, guess))
    )

    about = f"mode {mode}, ten steps, guidance within t = {interval}: "
    assert batches == expected_batches, f"{about}expected batches of {expected_batches} images, got {batches}"
    for i, ((t, guess), (right_t, right)) in enumerate(zip([*guesses, (0.0, result)], expected, strict=True)):
        assert t == pytest.approx(right_t), f"{about}step {i}: expected t = {right_t:.4f}, got {t:.4f}"
        check_close(f"{about}the guess of the image at step {i}, t = {t:.3f}", guess, right, 1e-4, 1e-4)


@pytest.mark.part(8)
def test_method_guidance_everywhere_is_the_default_and_guidance_nowhere_is_the_plain_model_to_the_last_bit():
    model = small_model()
    words = small_batch()["words"]
    noise = torch.randn(8, 3, 12, 12)
    encoded = []
    model.caption_encoder.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))

    default = method.sample_images(model, words, noise, 5)
    everywhere = method.sample_images(model, words, noise, 5, 3.0, guidance_interval=(0.0, 1.0))
    plain = method.sample_images(model, words, noise, 5, guidance=1.0)
    nowhere = method.sample_images(model, words, noise, 5, 3.0, guidance_interval=(0.0, 0.1))

    check_close("guidance within (0, 1), against the default", everywhere, default)
    check_close("guidance within (0, 0.1), where no step is, against guidance 1", nowhere, plain)
    assert encoded == [16, 16, 8, 8], f"captions that are encoded: expected [16, 16, 8, 8], got {encoded}"
    assert not torch.equal(default, plain), "guidance 3 changes nothing"


def test_word_positions_start_small():
    model = method.DiT(method.Config(WORDS, dim=256, caption_length=64))
    assert float(model.word_positions.detach().std()) == pytest.approx(0.02, rel=0.05)


# --- The central claim, on a toy whose costs are known ---------------------------------------------------------------


class Eraser(torch.nn.Module):
    """A layer that takes one of the token's numbers to zero."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x, attended):
        update = torch.zeros_like(x)
        update[:, :, self.place] = -x[:, :, self.place]
        return update


def errors_left(ratios: torch.Tensor, prices: torch.Tensor, count: int) -> torch.Tensor:
    """The loss (B,) of images that a table (2, 4) skips by: what two erasers have left of 64 tokens' numbers, squared.

    A token's number in layer l at column c is squared prices[l, c] * u, where u rises evenly from 0 to 2 over the
    tokens. The routers see u, so that the cheapest tokens are skipped first: a ratio r costs prices[l, c] * r^2.
    """
    u = torch.stack([torch.randperm(64) for _ in range(count)]).add(0.5) / 32  # (B, N)
    t = (torch.arange(count) + torch.rand(count)) / count
    column = (t * 4).long()
    errors = [(u * prices[layer, column].unsqueeze(1)).sqrt() for layer in range(2)]
    x = torch.stack([u, *errors], dim=2)  # (B, N, 3)
    for place in (1, 2):
        layer = method.RoutedLayer(Eraser(place), 3)
        layer.router.weight.data[0, 0] = 1e-3  # so that the gates are nearly 1
        x = layer(x, ratio=ratios[place - 1, column])
    return x[:, :, 1:].square().sum(dim=2).mean(dim=1)


@pytest.mark.part(4)
def test_method_the_table_learns_to_skip_where_it_costs_least():
    """The best table is known: each cell's marginal cost, 2 price r, is the pull's 2 weight (target - mean)."""
    prices = torch.tensor([[0.05, 0.8, 0.2, 1.6], [0.4, 0.1, 3.2, 0.02]])
    target, weight = 0.5, 4.0
    ratios = torch.nn.Parameter(torch.zeros(2, 4))
    optimizer = torch.optim.Adam([ratios], lr=0.02)
    for _ in range(250):
        optimizer.zero_grad()
        (errors_left(ratios, prices, 32).mean() + weight * method.ratio_loss(ratios, target)).backward()
        optimizer.step()
        ratios.data.clamp_(0, 63 / 64)
    learned = ratios.detach()

    means = torch.linspace(0, target, 2001)
    marginal = 2 * weight * (target - means) / 2  # per layer: the pull acts on the mean of two layers' cells
    best_of_means = (marginal.view(-1, 1, 1) / (2 * prices)).clamp(max=63 / 64)  # (2001, 2, 4)
    best = best_of_means[(best_of_means.mean(dim=(1, 2)) - means).abs().argmin()]
    about = "two layers that cost by the cell, target 0.5, 250 steps"
    check_close(f"{about}: the learned ratios, against the best ones", learned, best, 0, 0.08)

    rank_correlation = np.corrcoef(learned.flatten().argsort().argsort(), prices.flatten().argsort().argsort())[0, 1]
    about = f"{about}: the rank correlation of ratio and cost"
    assert rank_correlation < -0.9, f"{about} should be below -0.9, and is {rank_correlation:.2f}"
    with torch.no_grad():
        loss = errors_left(learned, prices, 512).mean()
        for _ in range(5):
            shuffled = learned.flatten()[torch.randperm(8)].view(2, 4)
            other = errors_left(shuffled, prices, 512).mean()
            assert loss < other, f"the learned table should cost less than shuffled: {loss:.4f}, {other:.4f}"


# --- Routers score in float32 ----------------------------------------------------------------------------------------


@pytest.mark.part(5)
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("way", ["autocast", "bfloat16 model"])
def test_method_routers_score_gate_and_choose_in_float32_under_autocast_and_in_half_precision(way, start):
    """Of a shipped model, and of routers that have just begun, whose bfloat16 scores would nearly all be equal."""
    model = sample.read_checkpoint(sample.DEFAULT_CHECKPOINT)[0]
    x = torch.randn(8, 64, 128).bfloat16()
    for shipped in model.layers:
        layer = method.RoutedLayer(shipped.layer, 128)
        layer.load_state_dict(shipped.state_dict())
        if start:
            torch.nn.init.normal_(layer.router.weight, std=1e-4)
        layer.router.bfloat16()  # these weights are meant, whatever they are computed in
        weight, bias = (parameter.double() for parameter in layer.router.parameters())
        exact = torch.sigmoid(x.double() @ weight[0] + bias)
        assert len(exact[0].float().unique()) > 60  # of 64; in bfloat16 as few as 4

        if way == "autocast":
            layer.float()
            with torch.autocast("cpu", torch.bfloat16):
                score, order = layer.score_and_sort(x.float())
                gates = 2 * score
        else:
            layer.bfloat16()
            score, order = layer.score_and_sort(x)
            gates = 2 * score
        about = f"score_and_sort, {way}: "
        assert score.dtype == torch.float32, f"{about}expected scores in float32, got {score.dtype}"
        check_close(about + "twice the scores, against float64", gates, 2 * exact, 0, 1e-6)
        ranked = exact.gather(1, order)
        falling = ranked.diff(dim=1) < 1e-7  # but for what float32 cannot tell apart
        check_close(about + "does each exact score lie below the one before (1) or not (0)", falling, falling | True)


@pytest.mark.part(5)
@pytest.mark.parametrize("options", [{"k": 16}, {"k": 9}, {"ratio": torch.full((3,), 7 / 16)}])
def test_method_gates_are_float32_under_autocast_in_training_and_in_sampling(options):
    layer = method.RoutedLayer(torch.nn.Identity(), 6)
    torch.nn.init.normal_(layer.router.weight, std=0.3)
    layer.layer.forward = lambda x, attended: torch.ones_like(x)  # so that what a token gains is its gate
    x = torch.randn(3, 16, 6)
    score, order = layer.score_and_sort(x)
    chosen = order.argsort(dim=1) < options.get("k", 9)
    with torch.autocast("cpu", torch.bfloat16):
        gates = layer(x, **options) - x
    about = f"autocast to bfloat16, {'sampling' if 'k' in options else 'training'}: gates, twice the k best's scores"
    check_close(about, gates[:, :, 0], 2 * score * chosen, 0, 1e-5)


@pytest.mark.part(5)
def test_method_a_bfloat16_model_trains_and_samples_in_its_precision_with_exact_gates():
    layer = method.RoutedLayer(torch.nn.Identity(), 6).bfloat16()
    torch.nn.init.normal_(layer.router.weight, std=0.3)
    layer.layer.forward = lambda x, attended: torch.full_like(x, 256.0)  # so that an update of bfloat16 shows its gate
    x = torch.randn(3, 16, 6).bfloat16()
    score, order = layer.score_and_sort(x)
    expected = (x.float() + 256 * 2 * score.unsqueeze(2)).bfloat16()
    for options in ({"k": 16}, {"k": 9}, {"ratio": torch.full((3,), 7 / 16)}):
        result = layer(x, **options)
        k = options.get("k", 9)
        about = f"tokens in bfloat16, k = {k} of 16, by {'a ratio' if 'ratio' in options else 'k'}: "
        assert result.dtype == torch.bfloat16, f"{about}expected bfloat16 as the tokens, got {result.dtype}"
        chosen = order.argsort(dim=1) < k
        check_close(about + "tokens that bypass", result[~chosen], x[~chosen])
        check_close(about + "the k best, each with its gate", result[chosen], expected[chosen], 0.01, 0)


def test_in_bfloat16_a_fine_tuning_skips_as_many_tokens_above_as_below(tmp_path):
    """With bfloat16 scores ties would go to the first tokens: of those that bypass, 31 % would be in the upper half."""
    flags = ["--amp", "--steps", 12, "--batch-size", 16, "--out", tmp_path]
    run = train_cifar.start_run(settings_of("--dataset", "shapes", "--init", HERE / "assets/shapes_dense.pt", *flags))
    train_cifar.train(run, tmp_path, pictures=False)
    images, words, mask, t, eps = train_cifar.training_batch(run)
    above = []

    def count(layer, inputs):
        _, order = layer.score_and_sort(inputs[0])
        above.append((order[:, 32:] < 32).float().mean().item())  # of the half that is skipped first

    for layer in run.model.layers:
        layer.register_forward_pre_hook(count)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        method.diffusion_loss(run.model, images, words, mask, t, eps)
    assert 0.4 < np.mean(above) < 0.6


# --- The data --------------------------------------------------------------------------------------------------------


def shape_in(mask: torch.Tensor) -> tuple[str, float, float]:
    """The shape that a mask (S, S) shows, by its area and its centre of mass; and that centre, x and y, in pixels."""
    grid = torch.arange(float(len(mask)))
    rows = mask.sum(dim=1)
    columns = mask.sum(dim=0)
    x = float(columns @ grid / mask.sum())
    y = float(rows @ grid / mask.sum())
    middle = grid[rows > 0].mean()
    length = (rows > 0).sum()
    share = mask.sum() / (rows.max() * columns.max())  # of its bounding box: 0.56 for a cross, 0.79, 1
    if (y - middle) / length > 0.09:  # a triangle's is 1/6
        return "triangle", x, y
    if share < 0.68:
        return "cross", x, y
    if share < 0.9:
        return "circle", x, y
    return "square", x, y


def test_shapes_caption_mask_and_picture_agree():
    images, captions, masks = train_cifar.Shapes(32).batch(300, torch.Generator().manual_seed(0))
    assert images.abs().max() <= 1
    assert masks.min() >= 0
    assert masks.max() <= 1

    names = [*train_cifar.COLOURS]
    colours = torch.tensor([*train_cifar.COLOURS.values()])
    for image, caption, pair in zip((images + 1) / 2, captions, masks):
        words = caption.split()
        told = [words[1:3]]  # colour and shape of each object
        if len(words) > 3:
            told.append(words[-2:])
        assert (pair.sum(dim=(1, 2)) > 10).tolist() == [True, len(told) == 2]
        assert (pair.sum(dim=0) <= 1 + 1e-6).all()  # objects do not overlap
        centres = []
        for mask, (colour, shape) in zip(pair, told):
            seen = (image[:, mask > 0.99].mean(dim=1) - colours).abs().sum(dim=1).argmin()
            assert names[seen] == colour
            seen_shape, x, y = shape_in(mask)
            assert seen_shape == shape
            centres.append((x, y))
        if len(told) == 2:
            (x1, y1), (x2, y2) = centres
            distances = {"above": y2 - y1, "below": y1 - y2, "left": x2 - x1, "right": x1 - x2}
            assert distances[words[3]] > 8


def test_held_out_pairs_never_occur_in_training_and_all_others_do():
    all_pairs = {(colour, shape) for colour in train_cifar.COLOURS for shape in train_cifar.SHAPES}
    held_out = set(train_cifar.HELD_OUT)
    rng = torch.Generator().manual_seed(0)
    for kind, expected in (("seen", all_pairs - held_out), ("held-out", held_out), ("all", all_pairs)):
        _, captions, _ = train_cifar.Shapes(16, kind).batch(1000, rng)
        pairs = set()
        for caption in captions:
            words = caption.split()
            pairs.add((words[1], words[2]))
            pairs.add((words[-2], words[-1]))
        assert pairs == expected


@pytest.mark.parametrize("size", [16, 32])
def test_shapes_keep_their_place_in_pictures_of_every_size(size):
    """All lengths grow with the picture. Radii are 8 to 11 for one object, 5.5 to 7 for two, in 32 pixels."""
    _, captions, masks = train_cifar.Shapes(size).batch(4000, torch.Generator().manual_seed(1))
    two = torch.tensor([len(caption.split()) > 3 for caption in captions])
    assert float(two.float().mean()) == pytest.approx(0.6, abs=0.03)
    circle = math.pi  # the area at radius 1
    square = 1.72**2
    triangle = 1.75 * 1.0104
    cross = 2 * 1.36 - 0.68**2
    mean_area = (circle + square + triangle + cross) / 4 / 32**2
    area = masks.sum(dim=(2, 3)) / size**2
    assert float(area[~two, 0].mean()) == pytest.approx(91 * mean_area, abs=0.004)  # 91: the mean of radius^2
    assert float(area[two].mean()) == pytest.approx(39.25 * mean_area, abs=0.003)
    assert area[~two, 1].max() == 0


def test_backgrounds_are_nearly_grey_and_change_in_every_direction():
    images, _, masks = train_cifar.Shapes(24).batch(1000, torch.Generator().manual_seed(0))
    images = torch.where(masks.sum(dim=1, keepdim=True) > 0, torch.nan, images)
    spread = images.amax(dim=1) - images.amin(dim=1)  # between the colours of a pixel
    assert 0.02 < spread.nanmean() < 0.2
    grey = images.nanmean(dim=1)
    downwards = grey[:, 0].nanmean(dim=1) < grey[:, -1].nanmean(dim=1)
    to_the_right = grey[:, :, 0].nanmean(dim=1) < grey[:, :, -1].nanmean(dim=1)
    for brighter in (downwards, to_the_right, downwards == to_the_right):
        assert 0.45 < brighter.float().mean() < 0.55
    assert grey[~grey.isnan()].min() < -0.7
    assert grey[~grey.isnan()].max() > 0.7


def test_noise_levels_are_stratified_and_the_logarithm_of_noise_by_signal_is_normal():
    t = train_cifar.random_noise_levels(100, -0.5, 0.8, torch.Generator().manual_seed(3))
    level = torch.tan(t * math.acos(0.02)).log()  # strata: the quantiles are nearly exact
    torch.testing.assert_close(level[[16, 50, 84]], torch.tensor([-1.3, -0.5, 0.3]), rtol=0, atol=0.05)

    even = train_cifar.even_noise_levels(40, torch.Generator().manual_seed(3))
    place = even * 40 - torch.arange(40)  # in order, one in each equal part, anywhere in it
    assert place.min() > 0
    assert place.max() < 1
    assert place.std() > 0.2


def test_batches_have_their_shares_of_null_captions_and_boxes_and_no_two_are_alike():
    batches = {}
    for seed in (2, 3, 4):
        run = tiny_run("--batch-size", 64, "--image-size", 32, "--noise", 0, 3, "--seed", seed)
        for run.step in range(60):
            batches[seed, run.step] = train_cifar.training_batch(run)
    images, words, mask, t, eps = (torch.cat(parts) for parts in zip(*batches.values()))

    null = words.eq(0).all(dim=1)
    assert abs(null.float().mean() - 0.1) < 0.01  # of 11,520
    boxed = mask.eq(0).any(dim=(1, 2, 3))
    assert abs(boxed.float().mean() - 0.25) < 0.013
    assert abs((null & boxed).float().mean() - 0.025) < 0.006  # one does not depend on the other

    rows = mask[boxed, 0].amax(dim=2)  # (boxes, 32)
    columns = mask[boxed, 0].amax(dim=1)  # (boxes, 32)
    assert mask.unique().tolist() == [0, 1]
    assert torch.equal(mask[boxed, 0], rows.unsqueeze(2) * columns.unsqueeze(1))  # a box, where it is 1
    for inside in (rows, columns):
        assert inside.diff(dim=1).clamp(min=0).sum(dim=1).max() <= 1  # in one piece
        side = inside.sum(dim=1)
        assert 8 <= side.min() < 10  # a quarter of the picture
        assert 30 < side.max() <= 32
        assert abs(side.mean() / 32 - 7 / 16) < 0.02  # 1/4 + (3/4 - corner) / 2, where the corner is 3/8 in the mean
        assert inside[:, 0].any()
        assert inside[:, -1].any()

    assert 1e-3 <= t.min() < 0.01
    assert 0.99 < t.max() <= 1
    for values in (images, eps):
        assert len(values.flatten(1)[:, :40].unique(dim=0)) == len(values)
    assert len(t.view(-1, 64).unique(dim=0)) == 180


class TorchvisionSet:
    """What torchvision's data sets have in common: pictures and labels of a half, 40 bright ones to train on."""

    classes = ("Left Right", "dark")

    def __init__(self, root, train, download) -> None:
        assert (root, download) == ("data", True)
        self.train = train

    def __len__(self) -> int:
        return 40 if self.train else 10

    def __getitem__(self, i: int):
        if i >= len(self):
            raise IndexError
        ramp = np.linspace(100, 200, 28).astype(np.uint8)[None].repeat(28, 0)  # dark on the left
        return Image.fromarray(ramp if self.train else ramp // 4), i % 2


@pytest.mark.parametrize("name", [*train_cifar.TORCHVISION])
def test_each_half_of_torchvision_s_sets_is_read_as_that_half(name, monkeypatch):
    monkeypatch.setattr(train_cifar.torchvision.datasets, train_cifar.TORCHVISION[name], TorchvisionSet)
    for part, count in (("train", 40), ("test", 10)):
        data = train_cifar.load_data(settings_of("--dataset", name, "--image-size", 16), part)
        images, captions, _ = data.batch(200, torch.Generator().manual_seed(0))
        assert data.length == count
        assert images.shape == (200, 3, 16, 16)
        assert (images.mean() > 0) == (part == "train")
        assert set(captions) == {"a photo of a left right", "a photo of a dark"}


def write_picture(path: Path, colour=(200, 100, 0), size: int = 8) -> None:
    """A picture of one colour, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)


def folder_settings(folder: Path, *flags: object):
    """The settings of a run on a folder of pictures, in 8 x 8 pixels."""
    return settings_of("--dataset", "folder", "--data-dir", folder, "--image-size", 8, *flags)


@pytest.mark.parametrize("part, flags, share", [("train", [], 0.5), ("test", [], 0), ("train", ["--no-flip"], 0)])
def test_a_folder_of_pictures_becomes_captions_and_images_half_of_them_mirrored_in_training(
    tmp_path, part, flags, share
):
    ramp = np.linspace(0, 100, 30)[None, :, None].repeat(40, 0).repeat(3, 2)  # dark on the left
    for name, value in (("Sea_Lion/0.png", 0), ("frog/0.png", 150), ("frog/1.jpg", 150)):
        path = tmp_path / part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((ramp + value).astype(np.uint8)).save(path)

    data = train_cifar.load_data(folder_settings(tmp_path, *flags), part)
    images, captions, _ = data.batch(300, torch.Generator().manual_seed(0))

    assert data.prompts == ["a photo of a sea lion", "a photo of a frog"]  # each class once
    assert set(captions) == set(data.prompts)
    assert [image.mean() > 0 for image in images] == ["frog" in caption for caption in captions]
    mirrored = np.mean([bool(image[0, 0, 0] > image[0, 0, -1]) for image in images])
    assert mirrored == pytest.approx(share, abs=0.1)


def test_each_picture_is_drawn_as_often_as_any_other_with_its_own_caption():
    brightness = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    pictures = np.broadcast_to(brightness, (20, 4, 4, 3)).copy()
    data = train_cifar.Pictures(pictures, [i % 2 for i in range(20)], ["even", "odd"], True)
    images, captions, _ = data.batch(4000, torch.Generator().manual_seed(0))
    drawn = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert captions == ["a photo of a odd" if i % 2 else "a photo of a even" for i in drawn.tolist()]
    assert 150 < drawn.bincount(minlength=20).min()  # 200 in the mean


def test_the_longest_caption_fits_and_there_is_room_for_eight_words():
    names = ["one", "one_of_the_longest_names_of  all"]
    data = train_cifar.Pictures(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], names, False)
    assert data.captions[1] == "a photo of a one of the longest names of all"
    assert data.caption_length == 11
    assert train_cifar.Pictures(np.zeros((1, 8, 8, 3), np.uint8), [0], ["a"], False).caption_length == 8


def test_what_is_in_a_folder_is_said_and_what_systems_put_there_is_no_picture(tmp_path, capsys, monkeypatch):
    walk = os.walk

    def walk_backwards(folder, followlinks):  # a file system gives names in any order
        for where, folders, names in walk(folder, followlinks=followlinks):
            folders.sort(reverse=True)
            names.sort(reverse=True)
            yield where, folders, names

    monkeypatch.setattr(os, "walk", walk_backwards)
    train = tmp_path / "train"
    for name in ("toad/0.webp", "frog/b.png", "frog/a.png", "frog/deeper/1.JPG", "0.png", "__MACOSX/frog/._0.png"):
        write_picture(train / name)
    write_picture(train / ".ipynb_checkpoints/0.png")
    for name in ("frog/._a.png", "frog/.DS_Store", "frog/a.HEIC", "frog/b.heic", "toad/notes", "newt/a.heic"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_bytes(b"\0")

    by_class, _ = train_cifar.find_pictures(train)
    data = train_cifar.load_data(folder_settings(tmp_path))

    assert [*by_class] == ["frog", "toad"]
    assert [path.name for path in by_class["frog"]] == ["a.png", "b.png", "1.JPG"]
    assert data.captions == ["a photo of a frog", "a photo of a toad"]
    assert list(data.labels) == [0, 0, 0, 1]
    line = capsys.readouterr().err.splitlines()[0]
    assert "4 pictures in 2 classes" in line
    for what in ("3 .heic", "1 without a suffix", "1 outside of the class folders", "1 class without pictures"):
        assert what in line


@pytest.mark.skipif(os.name == "nt", reason="Windows lets not everybody make links")
def test_links_are_followed_once_a_class_and_never_round_in_a_circle(tmp_path):
    train = tmp_path / "train"
    for name in ("a/0.png", "a/in/1.png", "b/0.png", "b/1.png"):
        write_picture(train / name)
    write_picture(tmp_path / "elsewhere" / "2.png")
    (train / "a" / "up").symlink_to("..")
    (train / "a" / "itself").symlink_to(".")
    (train / "a" / "twice").symlink_to("in")
    (train / "b" / "up").symlink_to(tmp_path)
    (train / "b" / "more").symlink_to(tmp_path / "elsewhere")

    by_class, left_out = train_cifar.find_pictures(train)

    assert {name: len(paths) for name, paths in by_class.items()} == {"a": 2, "b": 3}
    assert left_out == {"link to a folder that is read already": 4}


@pytest.mark.skipif(os.name == "nt", reason="Windows has none of these in folders")
def test_pipes_and_sockets_and_links_to_nothing_are_left_out_and_counted(tmp_path):
    write_picture(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "1.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "a" / "2.png")
    by_class, left_out = train_cifar.find_pictures(tmp_path)
    assert [path.name for path in by_class["a"]] == ["0.png"]
    assert left_out == {"not a regular file": 2}


def test_classes_that_share_a_caption_are_refused_by_name(tmp_path):
    for name in ("Cat", "cat", "dog", "dog_", "frog"):
        write_picture(tmp_path / "train" / name / "0.png")
    with pytest.raises(method.InputError, match="Cat, cat, dog, dog_ cannot"):
        train_cifar.load_data(folder_settings(tmp_path))


def test_reading_a_folder_takes_the_memory_of_its_array_and_little_more(tmp_path):
    for i in range(60):
        write_picture(tmp_path / "train" / "a" / f"{i:02d}.png", (4 * i, 0, 0), 128)
    settings = settings_of("--dataset", "folder", "--data-dir", tmp_path, "--image-size", 128)
    tracemalloc.start()
    data = train_cifar.load_data(settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.images[:, 0, 0, 0].tolist() == [4 * i for i in range(60)]
    assert peak < 1.15 * data.images.numel()


def test_too_little_memory_is_reported_as_that(tmp_path, monkeypatch, capsys):
    write_picture(tmp_path / "train" / "a" / "0.png")

    def no_memory(*_):
        raise MemoryError("Unable to allocate 9.9 TiB")

    monkeypatch.setattr(sample, "to_square", no_memory)
    flags = ["--dataset", "folder", "--data-dir", tmp_path, "--out", tmp_path / "run"]
    code, _, error = call(train_cifar, capsys, *flags)
    assert code == 2
    assert error.splitlines()[-1] == "error: out of memory: Unable to allocate 9.9 TiB"


def test_class_names_and_prompts_are_compared_in_one_form_of_unicode(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Café")
    write_picture(tmp_path / "train" / decomposed / "0.png")
    data = train_cifar.load_data(folder_settings(tmp_path))
    assert data.vocabulary == ("a", "photo", "of", unicodedata.normalize("NFC", "café"))
    for text in ("café", decomposed, "CAFÉ"):
        assert method.encode(method.Config(data.vocabulary), [text])[0, 0] == 4


@pytest.mark.parametrize("name", ["shapes_dense", "shapes_routed"])
def test_shapes_have_the_words_and_prompts_of_the_shipped_checkpoints(name):
    model, checkpoint = sample.read_checkpoint(HERE / "assets" / f"{name}.pt")
    data = train_cifar.Shapes(24)
    assert model.config.vocabulary == data.vocabulary
    assert model.config.caption_length == data.caption_length
    assert checkpoint["prompts"] == list(data.prompts)
    assert not model.training
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


# --- Training --------------------------------------------------------------------------------------------------------

TINY = ["--dataset", "shapes", "--image-size", "16", "--dim", "16", "--depth", "2", "--heads", "2", "--batch-size", "6"]
TINY += ["--patch-size", "4", "--timestep-regions", "3", "--device", "cpu", "--log-every", "2"]


def settings_of(*flags: object):
    """The settings that these flags give, with all defaults filled in."""
    return train_cifar.fill_defaults(train_cifar.make_parser().parse_args([str(flag) for flag in flags]))


def tiny_run(*flags: object) -> train_cifar.Run:
    """A run with tiny settings and these flags, before its first step."""
    return train_cifar.start_run(settings_of(*TINY, *flags))


def states(run: train_cifar.Run, out: Path, count: int | None = None):
    """Train; yields the run and the batch before each step, and at the end the run and None. count: steps to make."""
    last = run.settings.steps if count is None else run.step + count
    while run.step < last:
        batch = train_cifar.training_batch(run)
        yield run, batch
        stop_after_a_step(run, out)
    yield run, None


def stop_after_a_step(run: train_cifar.Run, out: Path) -> None:
    @contextlib.contextmanager
    def a_signal():
        yield [signal.SIGTERM]

    with pytest.MonkeyPatch.context() as context:
        context.setattr(train_cifar, "stop_on_signals", a_signal)
        train_cifar.train(run, out, pictures=False)


class ReferenceRun:
    """A run from the definitions, with nothing of train_cifar.py but its batches."""

    def __init__(self, run: train_cifar.Run) -> None:
        self.mode = run.settings.mode
        self.step = run.step
        self.steps = run.settings.steps
        self.dense_steps = run.settings.dense_steps
        self.model = copy.deepcopy(run.model)
        self.averaged = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        linears = [z for layer in self.model.layers for z in layer.layer.modules() if isinstance(z, torch.nn.Linear)]
        matrices = [linear.weight for linear in linears]
        chosen = {id(p) for p in [*matrices, self.model.ratios]}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.weights = [*matrices, *others]
        self.optimizers = {  # each with the peak of its learning rate
            torch.optim.Muon(matrices, weight_decay=0): 0.01,
            torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01): 3e-3 * 128 / 16,
            torch.optim.Adam([self.model.ratios], betas=(0.9, 0.99)): 0.05,
        }

    def train(self, images, words, mask, t, eps) -> dict:
        """One step. Gives the learning rates, and the line of metrics of this step."""
        routed = self.mode != "dense" and self.step >= self.dense_steps
        if routed and self.mode == "uniform":
            self.model.ratios.data[:] = 0.3
        losses = method.diffusion_loss(self.model, images, words, mask, t, eps, routed)
        total = losses.mean()
        if routed and self.mode.startswith("layer"):
            total = total + 2 * (self.model.ratios.mean() - 0.3) ** 2
        self.model.zero_grad()
        total.backward()

        gradients = [p.grad for p in self.weights if p.grad is not None]
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        for gradient in gradients:
            gradient *= min(1, 1 / (norm + 1e-6))
        warm = (self.step + 1) / min(100, 1 + self.steps / 10)
        cool = (self.steps - self.step) / (0.4 * self.steps)
        for optimizer, peak in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = peak * min(1, warm, cool)
            optimizer.step()
        self.model.ratios.data = self.model.ratios.data.clip(0, 15 / 16)

        decay = min(0.9995, self.step / (self.step + 9))
        for name, p in self.model.named_parameters():
            self.averaged[name] = p.detach() + decay * (self.averaged[name] - p.detach())
        self.averaged["ratios"] = self.model.ratios.detach().clone()
        self.step += 1

        regions = torch.tensor([math.ceil(3 * level) - 1 for level in t.tolist()])
        return {
            "rates": [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers],
            "step": self.step,
            "loss": losses.mean().item(),
            "gradient_norm": norm,
            "loss_by_region": [losses[regions == region].mean().item() for region in range(3)],
            "mean_ratio": float(self.model.ratios.mean()),
        }


def assert_nearly_equal(name: str, value: torch.Tensor, expected: torch.Tensor) -> None:
    """Two values of a parameter, but for biases of keys: the loss does not depend on them, their gradient is noise."""
    compared = torch.ones(len(value), dtype=torch.bool)
    if name.endswith(("qkv.bias", "in_proj_bias")):
        compared[16:32] = False
    if name.endswith("caption_kv.bias"):
        compared[:16] = False
    difference = (value - expected)[compared].abs().mean()
    # Muon computes in bfloat16: it turns the last bit of a gradient into a difference that is seen, by processor.
    tolerance = 3e-4 if ".layer." in name and name.endswith("weight") else 5e-5
    assert difference < tolerance, f"{name} differs by {difference}"


@pytest.mark.parametrize("step, steps", [(0, 10), (25_000, 30_000)])
@pytest.mark.parametrize("mode", method.MODES)
def test_a_run_equals_the_reference_step_by_step_across_the_switch_to_routing(mode, step, steps, tmp_path):
    flags = ["--mode", mode, "--steps", steps, "--dense-steps", step + 2, "--batch-size", 20, "--log-every", 1]
    run = tiny_run(*flags, "--ratio-lr", 0.05)
    for name, value in run.model.state_dict().items():
        assert torch.equal(run.ema.state_dict()[name], value)
    randomise(run.model)  # so that gradients are long enough to be clipped
    run.model.ratios.data = torch.linspace(0, 15 / 16, run.model.ratios.numel()).view_as(run.model.ratios)
    run.ema.load_state_dict(run.model.state_dict())
    run.step = step
    expected = ReferenceRun(run)

    wanted = None
    for _, batch in states(run, tmp_path, 5):
        if wanted is not None:
            groups = run.muon.param_groups + run.adamw.param_groups
            assert [group["lr"] for group in groups] == pytest.approx(wanted.pop("rates"))
            line = dict(run.metrics[-1])
            np.testing.assert_allclose(line.pop("ratios"), expected.model.ratios.detach(), atol=6e-5)
            assert line.pop("seconds") >= 0
            # Not closer: Muon's bfloat16 rounds differently on different processors.
            assert line.pop("loss_by_region") == pytest.approx(wanted.pop("loss_by_region"), rel=1e-3)
            assert line == pytest.approx(wanted, rel=1e-3)
            for name, value in expected.model.named_parameters():
                assert_nearly_equal(name, run.model.get_parameter(name), value)
                assert_nearly_equal(name, run.ema.get_parameter(name), expected.averaged[name])
        if batch is not None:
            wanted = expected.train(*batch)
    assert len(run.metrics) == 5


def test_a_line_of_metrics_is_the_mean_of_the_steps_since_the_last_one(tmp_path):
    run = tiny_run("--steps", 4, "--log-every", 1)
    train_cifar.train(run, tmp_path / "each", pictures=False)
    two = tiny_run("--steps", 4, "--log-every", 3)
    train_cifar.train(two, tmp_path / "two", pictures=False)
    assert [line["step"] for line in two.metrics] == [3, 4]
    for name in ("loss", "gradient_norm"):
        assert two.metrics[0][name] == pytest.approx(np.mean([line[name] for line in run.metrics[:3]]), rel=1e-5)
        assert two.metrics[1][name] == pytest.approx(run.metrics[3][name], rel=1e-5)


@pytest.mark.parametrize("target", [0.2, 0.5])
def test_mean_ratio_arrives_at_its_target(target, tmp_path):
    run = tiny_run("--steps", 120, "--dense-steps", 0, "--patch-size", 2, "--target-ratio", target, "--ratio-lr", 0.02)
    assert run.model.ratios.eq(0).all()
    train_cifar.train(run, tmp_path, pictures=False)
    ratios = run.model.ratios.detach()
    assert abs(float(ratios.mean()) - target) < 0.02
    assert ratios.std() > 0.001  # cells went different ways


def test_dense_steps_come_first_and_leave_ratios_and_routers_alone(tmp_path):
    flags = ["--mode", "uniform", "--target-ratio", 0.25]
    for run, _ in states(tiny_run("--steps", 4, "--dense-steps", 2, *flags), tmp_path):
        routers = [p for name, p in run.model.named_parameters() if "router" in name]
        if run.step > 2:
            assert run.model.ratios.eq(0.25).all()
            assert all(p.ne(0).any() for p in routers)
        else:
            assert run.model.ratios.eq(0).all()
            assert all(p.eq(0).all() for p in routers)


def test_muon_has_the_matrices_of_the_layers_and_adamw_all_else():
    run = tiny_run()
    names = ("qkv", "attention_out", "caption_q", "caption_kv", "caption_out", "mlp.0", "mlp.2")
    name_of = {p: name for name, p in run.model.named_parameters()}
    groups = run.muon.param_groups + run.adamw.param_groups
    muon, others, ratios = ([name_of[p] for p in group["params"]] for group in groups)
    assert muon == [f"layers.{i}.layer.{name}.weight" for i in range(2) for name in names]
    assert ratios == ["ratios"]
    assert sorted(muon + others + ratios) == sorted(name_of.values())
    assert [group["peak"] for group in groups] == [0.01, 0.024, 0.01]
    assert [group["weight_decay"] for group in groups] == [0, 0.01, 0]


def test_the_learning_rate_rises_in_a_tenth_or_a_hundred_steps_stays_and_falls_in_the_last_four_tenths():
    assert [train_cifar.share_of_peak(step, 50) for step in (0, 2, 5, 30)] == pytest.approx([1 / 6, 1 / 2, 1, 1])
    assert [train_cifar.share_of_peak(step, 50) for step in (40, 49)] == pytest.approx([1 / 2, 1 / 20])
    assert [train_cifar.share_of_peak(step, 5000) for step in (49, 99)] == pytest.approx([1 / 2, 1])


def test_init_takes_the_image_layers_and_says_what_it_does_not_take(finished, tmp_path, capsys):
    init = finished / "checkpoint.pt"
    source = sample.read_checkpoint(init)[0].state_dict()
    assert source["ratios"].any()

    def assert_taken(run, kind_of_name):
        for model in (run.model, run.ema):
            for name, value in model.state_dict().items():
                if kind_of_name(name):
                    assert torch.equal(source[name], value), name

    run = tiny_run("--init", init)
    assert_taken(run, lambda name: True)
    assert not run.ema.training

    run = tiny_run("--init", init, "--timestep-regions", 4)
    assert run.model.ratios.eq(0).all()
    assert "ratio" in capsys.readouterr().err
    assert_taken(run, lambda name: name != "ratios")

    write_picture(tmp_path / "train" / "frog" / "0.png")
    run = tiny_run("--dataset", "folder", "--data-dir", tmp_path, "--init", init)
    assert "captions" in capsys.readouterr().err
    assert run.model.config.vocabulary == ("a", "photo", "of", "frog")
    assert_taken(run, lambda name: name.startswith("layers."))
    assert not torch.equal(run.model.word_positions, source["word_positions"])


@pytest.mark.parametrize("flags, expected", [([], False), (["--amp"], True)])
def test_amp_runs_the_network_in_bfloat16_and_keeps_weights_and_sums_in_float32(flags, expected, monkeypatch, tmp_path):
    in_bfloat16 = []
    loss = method.diffusion_loss

    def spy(*arguments):
        in_bfloat16.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16)
        return loss(*arguments)

    monkeypatch.setattr(train_cifar, "diffusion_loss", spy)
    run = tiny_run("--steps", 2, "--dense-steps", 1, *flags)
    train_cifar.train(run, tmp_path, pictures=False)
    assert in_bfloat16 == [expected, expected]
    assert {value.dtype for value in run.model.state_dict().values()} == {torch.float32}
    assert run.loss_sums.dtype == torch.float32


def test_compile_compiles_the_loss_once_and_trains_with_what_comes_of_it(monkeypatch, tmp_path):
    calls = []

    def compile_loss(function, fullgraph):
        assert function is method.diffusion_loss

        def compiled_loss(*arguments):
            calls.append(fullgraph)
            return function(*arguments)

        return compiled_loss

    monkeypatch.setattr(torch, "compile", compile_loss)
    monkeypatch.setenv("CXX", "g++")
    train_cifar.train(tiny_run("--steps", 3, "--compile"), tmp_path, pictures=False)
    assert calls == [True, True, True]


# --- What a run leaves, and how it goes on ---------------------------------------------------------------------------


def command(script: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    """Run a command of the project in a process of its own."""
    line = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **options)


def call(module, capsys, *arguments: object) -> tuple[int, str, str]:
    """The same in this process, which saves the start-up time: exit code, standard output, standard error."""
    with pytest.MonkeyPatch.context() as context, pytest.raises(SystemExit) as stopped:
        context.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        sample.run_command(module.main)
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that the real command made: two dense steps, then routing."""
    out = tmp_path_factory.mktemp("runs") / "shapes"
    result = command("train_cifar.py", *TINY, "--steps", 8, "--dense-steps", 2, "--ratio-lr", 0.05, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


def lines_of(folder: Path) -> list[dict]:
    """The lines of a run's metrics, without the seconds, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line | {"seconds": 0} for line in lines]


def content_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_a_run_leaves_its_files_and_they_show_the_averaged_model(finished):
    names = {"ratios", "samples", "routing", "curves"}
    files = {f"{name}.png" for name in names} | {"checkpoint.pt", "metrics.jsonl", "ratios.json"}
    assert {path.name for path in finished.iterdir()} == files
    content = content_of(finished)
    assert lines_of(finished) == [line | {"seconds": 0} for line in content["metrics"]]
    assert [line["step"] for line in content["metrics"]] == [2, 4, 6, 8]
    assert 0 < content["seconds"] < 100
    assert "--ratio-lr 0.05" in content["made_by"][0]["command"]
    assert content["made_by"][0]["torch"] == str(torch.__version__)

    model = sample.read_checkpoint(finished / "checkpoint.pt")[0]
    for name, value in content["ema"].items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not torch.equal(content["ema"]["out.weight"], content["model"]["out.weight"])
    prompts = content["prompts"]
    mean = float(model.ratios.detach().mean())
    title = f"Share of tokens that bypass, layer-timestep, mean {mean:.3f}"
    expected = {
        "samples": sample.draw_samples(sample.images_from_prompts(model, prompts, 0), prompts),
        "ratios": sample.draw_ratios(model.ratios, title),
        "routing": sample.draw_routing(model, prompts[:3], 0),
        "curves": sample.draw_curves(content["metrics"]),
    }
    for name, picture in expected.items():
        assert np.array_equal(Image.open(finished / f"{name}.png"), picture), name
    table = json.loads((finished / "ratios.json").read_text())
    np.testing.assert_allclose(table["ratios"], content["ema"]["ratios"], atol=6e-5)
    assert table["mean"] == pytest.approx(mean)
    assert (table["mode"], table["target"]) == ("layer-timestep", 0.3)


@pytest.mark.parametrize("cut", [1, 2, 3, 6, 7])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(finished, tmp_path, cut, capsys):
    """Cut inside the dense part, at the switch, and inside the routed part; at a line of metrics, and between two."""
    run = tiny_run("--steps", 8, "--dense-steps", 2, "--ratio-lr", 0.05)
    for _ in states(run, tmp_path, cut):
        pass
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss": 1}\n{"step": 100, "lo')  # written after the save

    code, _, error = call(train_cifar, capsys, "--out", tmp_path, "--resume")

    assert code == 0, error
    assert lines_of(tmp_path) == lines_of(finished)
    whole = content_of(finished)
    resumed = content_of(tmp_path)
    for key in ("model", "ema"):
        for name, value in whole[key].items():
            assert torch.equal(value, resumed[key][name]), f"{key}: {name}"
    for name in ("adamw", "muon"):
        moments = [z for state in whole[name]["state"].values() for z in state.values()]
        resumed_moments = [z for state in resumed[name]["state"].values() for z in state.values()]
        assert len(moments) > 0
        assert all(map(torch.equal, moments, resumed_moments)), name


def test_a_run_goes_on_without_its_init_for_more_steps_with_its_clock_and_says_what_becomes_of_the_rate(
    finished, tmp_path, capsys
):
    init = tmp_path / "init.pt"
    shutil.copy(finished / "checkpoint.pt", init)
    flags = [*TINY, "--out", tmp_path / "run", "--init", init, "--steps", 20, "--dense-steps", 3]
    assert call(train_cifar, capsys, *flags)[0] == 0
    before = content_of(tmp_path / "run")
    init.unlink()

    code, _, error = call(train_cifar, capsys, "--out", tmp_path / "run", "--resume", "--steps", 40)

    assert code == 0
    assert "from 0% to 100% of its peak" in error  # the last step but one had 1/8, one more would have 0
    assert "3 dense steps stay" in error
    after = content_of(tmp_path / "run")
    assert after["step"] == 40
    assert after["seconds"] > before["seconds"]
    assert after["made_by"][:-1] == before["made_by"]
    assert "--resume --steps 40" in after["made_by"][-1]["command"]
    assert lines_of(tmp_path / "run")[-1]["step"] == 40


def test_a_run_does_not_go_on_with_another_number_of_pictures(tmp_path, capsys):
    write_picture(tmp_path / "train" / "frog" / "0.png")
    flags = [*TINY, "--dataset", "folder", "--data-dir", tmp_path, "--image-size", 8]
    assert call(train_cifar, capsys, *flags, "--steps", 2, "--out", tmp_path / "run")[0] == 0
    write_picture(tmp_path / "train" / "frog" / "1.png")
    before = snapshot(tmp_path)
    result = call(train_cifar, capsys, "--out", tmp_path / "run", "--resume", "--steps", 3)
    assert_refused(result, "began with 1 pictures", "now there are 2")
    assert snapshot(tmp_path) == before


def test_a_run_is_not_shortened_to_its_dense_steps(tmp_path, capsys):
    for _ in states(tiny_run("--steps", 9, "--dense-steps", 5), tmp_path, 1):
        pass
    assert_refused(call(train_cifar, capsys, "--out", tmp_path, "--resume", "--steps", 4), "--dense-steps 5")


def test_checkpoints_metrics_and_pictures_come_when_they_are_due_checkpoints_first(tmp_path, monkeypatch):
    """Before the first step; every --save-every minutes; at each quarter, before the pictures; and at the end."""
    events = []
    clock = iter(range(0, 10**6, 30))  # half a minute passes whenever the time is asked for: once a step at least
    monkeypatch.setattr(train_cifar, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(train_cifar, "save_checkpoint", lambda run, out: events.append(f"save {run.step}"))
    monkeypatch.setattr(train_cifar, "write_pictures", lambda run, out: events.append(f"draw {run.step}"))

    run = tiny_run("--steps", 12, "--save-every", 1, "--log-every", 5)
    train_cifar.train(run, tmp_path)

    quarters = ["save 3", "draw 3", "save 6", "draw 6", "save 9", "draw 9", "save 12", "draw 12"]
    assert [event for event in events if event in quarters] == quarters
    assert events[0] == "save 0"
    assert set(events) - set(quarters) - {"save 0"}  # and some between, when a minute has passed
    assert [line["step"] for line in run.metrics] == [5, 10, 12]
    monkeypatch.undo()

    saved = []
    monkeypatch.setattr(train_cifar, "save_checkpoint", lambda run, out: saved.append(run.step))
    train_cifar.train(tiny_run("--steps", 9, "--save-every", 0), tmp_path, pictures=False)
    assert saved == [*range(10)]
    saved.clear()
    train_cifar.train(tiny_run("--steps", 9, "--save-every", 1000), tmp_path, pictures=False)
    assert saved == [0, 9]


def test_a_folder_holds_a_run_from_its_start_on(tmp_path, capsys):
    run = tiny_run("--steps", 8)
    for _ in states(run, tmp_path, 1):
        pass
    assert_refused(call(train_cifar, capsys, *TINY, "--out", tmp_path), str(tmp_path), "--resume", "another --out")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_stops_a_run_after_its_step_saved_and_afterwards_all_handlers_are_as_before(
    name, tmp_path, capsys, monkeypatch
):
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"no {name} on this system")
    loss = method.diffusion_loss
    during = []

    def send_a_signal(model, *arguments):
        if model.word_positions.grad is not None:  # in the second step
            signal.raise_signal(number)
            during.append(signal.getsignal(number))
        return loss(model, *arguments)

    monkeypatch.setattr(train_cifar, "diffusion_loss", send_a_signal)
    before = signal.getsignal(number)
    try:
        signal.signal(number, signal.default_int_handler)  # whoever runs the tests may ignore it, as nohup does
        code, output, error = call(train_cifar, capsys, *TINY, "--steps", 20, "--out", tmp_path)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert code == 128 + number
    assert output == ""
    assert content_of(tmp_path)["step"] == 2
    assert "stopped after step 2," in error
    assert error.splitlines()[-1].endswith(f"--out {tmp_path} --resume")
    assert during == [signal.SIG_DFL]  # the next one ends the process at once


def test_what_is_ignored_stays_ignored_and_training_works_in_a_thread(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with train_cifar.stop_on_signals() as received:
            signal.raise_signal(signal.SIGTERM)
        assert received == []
    finally:
        signal.signal(signal.SIGTERM, before)
    run = tiny_run("--steps", 2)
    thread = threading.Thread(target=train_cifar.train, args=(run, tmp_path, False))
    thread.start()
    thread.join()
    assert content_of(tmp_path)["step"] == 2


def test_a_process_that_is_killed_within_a_save_leaves_the_checkpoint_before_and_resumes_from_it(
    finished, tmp_path, capsys
):
    shutil.copytree(finished, tmp_path / "run")
    before = (finished / "checkpoint.pt").read_bytes()
    script = """
import os, sys, torch, train_cifar

def half_a_save(state, file):
    file.write(b"half")
    file.flush()
    os._exit(9)

torch.save = half_a_save
train_cifar.main(sys.argv[1:])
"""
    flags = ["--out", str(tmp_path / "run"), "--resume", "--steps", "9"]
    killed = subprocess.run([sys.executable, "-c", script, *flags], cwd=HERE, capture_output=True, check=False)
    assert killed.returncode == 9, killed.stderr
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert call(train_cifar, capsys, *flags)[0] == 0
    assert lines_of(tmp_path / "run")[-1]["step"] == 9
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_full_disk_leaves_the_older_checkpoint_whole_and_the_next_one_brings_the_metrics_back(
    finished, tmp_path, capsys
):
    """The limit on the size of files fails a write in the middle, as a full disk does, in a real process."""
    pytest.importorskip("resource", reason="limits on file sizes need a Unix system")
    shutil.copytree(finished, tmp_path / "run")
    before = (finished / "checkpoint.pt").read_bytes()
    script = f"""
import resource, sys, torch, sample, train_cifar

def step_on_a_full_disk(run):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({9000}, {9000}))
    return batch(run)

batch = train_cifar.training_batch
train_cifar.training_batch = step_on_a_full_disk
sample.run_command(train_cifar.main)
"""
    flags = ["--out", str(tmp_path / "run"), "--resume", "--steps", "9"]
    line = [sys.executable, "-c", script, *flags]
    result = subprocess.run(line, cwd=HERE, capture_output=True, text=True, check=False)
    assert_refused((result.returncode, "", result.stderr), "cannot write", "checkpoint.pt")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() != b""
    assert content_of(tmp_path / "run")["step"] == 8
    assert len(before) > 9000

    with (tmp_path / "run" / "metrics.jsonl").open("w") as file:
        file.write('{"step": 2, "lo')  # where the disk was full
    assert call(train_cifar, capsys, *flags)[0] == 0
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [2, 4, 6, 8, 9]


def test_pictures_that_cannot_be_written_or_drawn_are_warnings_and_training_goes_on(tmp_path, capsys, monkeypatch):
    def no_memory(*_):
        raise MemoryError("nothing left")

    monkeypatch.setattr(train_cifar, "draw_routing", no_memory)
    out = tmp_path / "run"
    for name in ("samples.png", "ratios.json"):
        (out / name).mkdir(parents=True)
    code, _, error = call(train_cifar, capsys, *TINY, "--steps", 8, "--out", out)
    assert code == 0
    for name in ("samples.png", "ratios.json", "routing.png: MemoryError: nothing left"):
        assert error.count(f"warning: no {name}") == 4
    assert content_of(out)["step"] == 8
    assert (out / "curves.png").exists()
    assert not list(out.glob("*.part"))


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint_is_written(tmp_path, monkeypatch, capsys):
    loss = method.diffusion_loss
    factors = iter([1, 1, 1, math.inf, *[1] * 40])  # at the fourth step

    def multiplied_loss(*arguments):
        return loss(*arguments) * next(factors)

    monkeypatch.setattr(train_cifar, "diffusion_loss", multiplied_loss)
    flags = ["--steps", 40, "--log-every", 3, "--save-every", 0, "--out", tmp_path]
    result = call(train_cifar, capsys, *TINY, *flags)
    assert_refused(result, "not finite", "steps 4 to 4", "what was saved", "--lr")
    assert content_of(tmp_path)["step"] == 3


def test_defaults_that_depend_on_other_settings(finished):
    init = ["--init", finished / "checkpoint.pt"]  # 16 pixels, patches of 4, width 16, 2 layers, 2 heads
    names = ["image_size", "patch_size", "dim", "depth", "heads", "steps", "dense_steps", "lr", "muon_lr", "noise"]
    even = [0.0, 1.6]
    clean = [-1.0, 1.2]
    table = {
        "--dataset shapes": [24, 3, 128, 6, 4, 3000, 1800, 3e-3, 0.01, even],
        "--dataset shapes --steps 100 --dim 64": [24, 3, 64, 6, 4, 100, 60, 6e-3, 0.01, even],
        "--dataset shapes --init": [16, 4, 16, 2, 2, 750, 0, 6e-3, 0.0025, clean],
        "": [32, 4, 128, 6, 4, 30_000, 18_000, 3e-3, 0.01, clean],
        "--steps 1": [32, 4, 128, 6, 4, 1, 0, 3e-3, 0.01, clean],
        "--dataset folder --init": [16, 4, 16, 2, 2, 30_000, 0, 6e-3, 0.0025, clean],
        "--init --steps 10 --dense-steps 4 --lr 0.5": [16, 4, 16, 2, 2, 10, 4, 0.5, 0.0025, clean],
        "--noise 1 2 --muon-lr 0.1 --heads 2": [32, 4, 128, 6, 2, 30_000, 18_000, 3e-3, 0.1, [1, 2]],
    }
    for line, expected in table.items():
        flags = line.split()
        if "--init" in flags:
            flags.remove("--init")
            flags += init
        settings = settings_of(*flags)
        given = [getattr(settings, name) for name in names]
        assert given[:-1] == pytest.approx(expected[:-1]), line
        assert given[-1] == expected[-1], line


# --- Bad input: one line, exit code 2, nothing lost ------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    """The path and the content of all files in a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """The result of a command is exit code 2 and one line of error with these words in it."""
    code, _, error = result
    line = error[error.rfind("error: ") :].removesuffix("\n")  # what follows a progress bar
    assert code == 2, error
    assert line.startswith("error: "), error
    assert line.isprintable(), error
    assert error.endswith("\n"), error
    for word in words:
        assert word in line, error


BAD = """
    train --dataset shape | shape cifar10
    train --dataset folder --data-dir nowhere | --data-dir nowhere
    train --dataset folder --data-dir broken | broken/train/frog/0.png
    train --dataset cifar10 --data-dir offline | --data-dir offline network
    train --patch-size 5 | 5 16
    train --steps 0 | --steps
    train --steps 9 --dense-steps 9 | --dense-steps 9 --steps
    train --noise 0 -1 | --noise -1
    train --seed 4294967296 | --seed
    train --init nowhere.pt | nowhere.pt
    train --init taken/checkpoint.pt --dim 32 | --dim 16
    train --out taken | taken --resume
    train --out fresh --resume | fresh
    train --out exported --resume | exported --init
    train --out taken --resume --lr 0.1 | --lr
    train --out taken --resume --batch-size 7 | --batch-size 6
    train --out taken --resume --steps 4 | --steps 8
    sample --checkpoint payload.pt | payload.pt code
    sample --checkpoint large.pt | large.pt
    sample --checkpoint missing.pt | missing.pt ratios
    sample --checkpoint nan.pt | nan.pt finite
    sample --checkpoint words.pt --prompt dragon | dragon
    sample --checkpoint dense.pt --routing-map | dense.pt --routing-map
    sample --prompt bleu | blue circle above
    sample --guidance nan | --guidance
    sample --guidance-interval 0.9 0.1 | --guidance-interval
    sample --seed 4294967296 | --seed
    sample --ratios nowhere.json | nowhere.json ratios.json
    sample --ratios rows.json | rows.json 2 rows
    sample --ratios ragged.json | ragged.json row 2 1 3
    sample --ratios one.json | one.json row 1 column 2 1.5 [0, 1)
    sample --ratios text.json | text.json row 2 column 1 "many"
    sample --ratios rows.json --dense | --dense
    sample --inpaint small.png | --mask
    sample --inpaint small.png --mask wide.png | small.png same size
    sample --inpaint junk.pt --mask wide.png | junk.pt
    sample --inpaint small.png --mask black.png | black.png no pixel 0 of 255 paint
    sample --inpaint small.png --mask white.png | white.png all of paint
    sample --out junk.pt/s.png | junk.pt
    sample --out broken | broken folder
    sample --npz s.png --out s.png | --npz s.png
    sample --png-dir . --steps 1 | --png-dir black.png
"""


class TouchesAFile:
    """What creates the file `executed` when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def write_bad_files() -> None:
    """In the current folder: all that the cases above name, beside the finished run in `taken`."""
    picture = Path("broken/train/frog/0.png")
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    Image.new("RGB", (20, 20)).save("small.png")
    Image.new("RGB", (30, 20)).save("wide.png")
    Image.new("L", (20, 20), 0).save("black.png")
    Image.new("L", (20, 20), 255).save("white.png")
    Path("rows.json").write_text("[[0.1]]")
    Path("ragged.json").write_text("[[0.1, 0, 0], [0.2]]")
    Path("one.json").write_text("[[0.1, 1.5], [0, 0]]")
    Path("text.json").write_text('[[0.1, 0], ["many", 0]]')
    Path("junk.pt").write_bytes(b"no checkpoint")

    good = torch.load("taken/checkpoint.pt", weights_only=True)
    without_ratios = {name: value for name, value in good["ema"].items() if name != "ratios"}
    not_finite = {name: value / 0 for name, value in good["ema"].items()}
    clears_the_screen = ["\x1b[2J", *good["config"]["vocabulary"][1:]]
    dense = good["ema"] | {"ratios": torch.zeros(2, 1)}
    Path("exported").mkdir()
    torch.save({"config": good["config"], "model": good["model"], "ema": good["ema"]}, "exported/checkpoint.pt")
    torch.save(good | {"payload": TouchesAFile()}, "payload.pt")
    torch.save(good | {"config": good["config"] | {"dim": 2048, "depth": 1000}}, "large.pt")
    torch.save(good | {"config": good["config"] | {"mode": "dense"}, "ema": dense}, "dense.pt")
    torch.save(good | {"ema": without_ratios}, "missing.pt")
    torch.save(good | {"ema": not_finite}, "nan.pt")
    torch.save(good | {"config": good["config"] | {"vocabulary": clears_the_screen}}, "words.pt")


@pytest.mark.parametrize("case", BAD.strip().splitlines())
def test_bad_input_is_refused_in_one_line_and_nothing_is_lost(case, finished, tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(train_cifar.torchvision.datasets.CIFAR10, "download", no_network)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "taken")
    write_bad_files()
    line, words = case.split("|")
    script, *flags = line.split()
    if script == "sample":
        module = sample
        start = [] if "--checkpoint" in flags else ["--checkpoint", "taken/checkpoint.pt"]
    else:
        module = train_cifar
        start = ["--device", "cpu"] if "--resume" in flags or "--init" in flags else TINY
    before = snapshot(tmp_path)

    result = call(module, capsys, *start, *flags)

    assert_refused(result, *words.split())
    after = snapshot(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert not (tmp_path / "fresh").exists()
    assert not (tmp_path / "executed").exists()


def test_a_fault_of_the_program_keeps_its_own_words(tmp_path, monkeypatch):
    """It is not called a fault of the data, and what caused an error of reading is kept."""
    monkeypatch.setattr(train_cifar.torchvision.datasets, "CIFAR10", TorchvisionSet)
    monkeypatch.setattr(train_cifar, "to_square", lambda image, size: image.no_such_thing)
    with pytest.raises(AttributeError, match="no_such_thing"):
        train_cifar.load_data(settings_of())
    with pytest.raises(method.InputError) as error:
        sample.read_checkpoint(tmp_path / "nowhere.pt")
    assert isinstance(error.value.__cause__, FileNotFoundError)


def test_numbers_of_flags_are_taken_from_bound_to_bound():
    whole = sample.number(int, 1, 3)
    share = sample.number(float, 0, 1)
    assert [whole("1"), whole("3"), share("0"), share("1"), share("1e-2")] == [1, 3, 0.0, 1.0, 0.01]
    for convert, text in ((whole, "0"), (whole, "4"), (whole, "2.0"), (share, "-0.1"), (share, "1.1"), (share, "nan")):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            convert(text)


def test_a_stopped_command_ends_with_130_and_an_error_is_one_line_however_long(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # in a notebook it is no file of the system

    def stopped():
        raise KeyboardInterrupt

    def full():
        raise OSError("no space\n\tleft \x1b[2J" + 2000 * "x")

    for main, expected in ((stopped, 130), (full, 2)):
        with pytest.raises(SystemExit) as ended:
            sample.run_command(main)
        assert ended.value.code == expected
    error = capsys.readouterr().err
    assert error.startswith("error: no space left [2Jxxx")
    assert error.endswith("x\n")
    assert len(error) < 1020


# --- Pictures as people have them ------------------------------------------------------------------------------------


def corners() -> np.ndarray:
    """A picture (16, 16, 3) whose quarters are red, green, blue and black, from the top left one on."""
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8, :8, 0] = 255
    picture[:8, 8:, 1] = 255
    picture[8:, :8, 2] = 255
    return picture


STORED = {  # how a camera stores what its orientation tag then turns upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_that_was_stored_turned_is_read_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(corners()).transpose(STORED[orientation]).save(path, exif=exif)
    read = sample.read_picture(path, 16)
    assert (np.abs(read.astype(int) - corners())[[3, 3, 12, 12], [3, 12, 3, 12]] < 60).all()


def picture_files(folder: Path) -> dict[str, tuple]:
    """Pictures of one colour in many formats, with the colour (of white paper) that each should be read as."""
    red = Image.new("RGB", (16, 16), (250, 0, 0))
    blue = Image.new("RGB", (16, 16), "blue")
    half = Image.new("RGBA", (16, 16), (200, 40, 0, 128))
    clear = Image.new("RGBA", (16, 16), (200, 40, 0, 0))
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    files = {
        "a.bmp": (red, {}, (250, 0, 0)),
        "cmyk.jpg": (red.convert("CMYK"), {"quality": 95}, (250, 0, 0)),
        "palette.png": (red.quantize(4), {}, (250, 0, 0)),
        "animated.gif": (red, {"save_all": True, "append_images": [blue]}, (250, 0, 0)),
        "animated.webp": (red, {"save_all": True, "append_images": [blue]}, (250, 0, 0)),
        "one.png": (Image.new("1", (16, 16), 1), {}, (255, 255, 255)),
        "grey.png": (Image.new("L", (16, 16), 77), {}, (77, 77, 77)),
        "half.png": (half, {}, (227, 147, 127)),  # half transparent, on white
        "half.webp": (half, {"lossless": True, "exact": True}, (227, 147, 127)),
        "half.tif": (half, {}, (227, 147, 127)),
        "clear.png": (clear, {}, (255, 255, 255)),
        "la.png": (Image.new("LA", (16, 16), (90, 128)), {}, (172, 172, 172)),
        "clear_palette.png": (palette, {"transparency": 1}, (255, 255, 255)),
        "clear_palette.gif": (palette, {"transparency": 1}, (255, 255, 255)),
        "clear_colour.png": (Image.new("RGB", (16, 16), (1, 2, 3)), {"transparency": (1, 2, 3)}, (255, 255, 255)),
        "16_bits.png": (Image.fromarray(np.full((16, 16), 25700, np.uint16)), {}, (100, 100, 100)),
        "16_bits.tif": (Image.fromarray(np.full((16, 16), 25700, np.uint16)), {}, (100, 100, 100)),
        "32_bits.tif": (Image.fromarray(np.full((16, 16), 25700, np.int32)), {}, (100, 100, 100)),
        "floats.tif": (Image.fromarray(np.full((16, 16), 100 / 255, np.float32)), {}, (100, 100, 100)),
    }
    for name, (image, options, _) in files.items():
        image.save(folder / name, **options)
    return {name: colour for name, (_, _, colour) in files.items()}


def test_pictures_of_all_kinds_are_read_in_their_colours_and_what_is_transparent_is_white(tmp_path):
    for name, colour in picture_files(tmp_path).items():
        read = sample.read_picture(tmp_path / name, 8)
        tolerance = 12 if name.startswith(("cmyk", "animated")) else 1
        assert read.shape == (8, 8, 3), name
        assert np.abs(read - np.array(colour, float)).max() <= tolerance, name


@pytest.mark.parametrize("shape", [(160, 640), (640, 160), (161, 641)])
def test_of_a_picture_that_is_not_square_the_centred_square_is_taken(tmp_path, shape):
    picture = np.zeros((*shape, 3), np.uint8)  # black, and in the middle a white disc as wide as the short side
    y, x = np.indices(shape)
    middle = np.array(shape) / 2 - 0.5
    picture[np.hypot(y - middle[0], x - middle[1]) < min(shape) / 2] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    read = sample.read_picture(tmp_path / "a.png", 32)[:, :, 0] / 255
    assert read.mean() == pytest.approx(math.pi / 4, abs=0.01)
    assert np.abs(read - read.T).max() < 0.15
    assert read[16, 0] > 0.5
    assert read[0, 0] < 0.05


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_large_pictures_are_reduced_with_antialiasing(tmp_path, suffix):
    stripes = np.zeros((1024, 1024, 3), np.uint8)
    stripes[:, ::2] = 255
    stripes[:, 512:] //= 2
    Image.fromarray(stripes).save(tmp_path / f"a.{suffix}", quality=95)
    read = sample.read_picture(tmp_path / f"a.{suffix}", 32)
    assert np.abs(read[:, :15] - 127.5).max() < 6
    assert np.abs(read[:, 17:] - 63.5).max() < 6


def test_a_file_that_cannot_be_read_is_one_line_that_names_it(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    content = whole.read_bytes()
    huge = bytearray(content)
    huge[16:24] = (15000).to_bytes(4, "big") * 2  # 225 megapixels
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    Image.fromarray(np.array([[0, 200.0]], np.float32)).save(tmp_path / "range.tif")
    files = {"cut.png": content[:3000], "empty.jpg": b"", "text.png": b"not a picture", "huge.png": bytes(huge)}
    files["range.tif"] = (tmp_path / "range.tif").read_bytes()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(method.InputError) as error:
            sample.read_picture(tmp_path / name, 8)
        assert f"{name}; repair or remove it" in str(error.value)
        assert "\n" not in str(error.value)
    assert "0 to 200, not within 0 to 1" in str(error.value)


@pytest.mark.parametrize("mode, kept, generated", [
    ("1", 0, 1), ("L", 20, 230), ("RGB", (255, 0, 0), (255, 255, 255)), ("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)),
])  # fmt: skip
def test_in_a_mask_what_is_white_or_transparent_is_generated(tmp_path, mode, kept, generated):
    write_picture(tmp_path / "p.png", (51, 102, 255))
    mask = Image.new(mode, (8, 8), kept)
    mask.paste(generated, (0, 0, 4, 8))
    mask.save(tmp_path / "m.png")
    read = sample.read_inpainting(tmp_path / "p.png", tmp_path / "m.png", 8)
    assert torch.equal(read["mask"], (torch.arange(8) < 4).float().expand(1, 8, 8))
    torch.testing.assert_close(read["known"], torch.tensor([-0.6, -0.2, 1.0])[:, None, None].expand(3, 8, 8))


def test_a_photo_and_a_mask_fit_if_they_do_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 8), "red").save(tmp_path / "p.png", exif=exif)  # stored lying
    mask = Image.new("L", (8, 12), 0)
    mask.paste(255, (0, 0, 4, 12))
    mask.save(tmp_path / "m.png")
    read = sample.read_inpainting(tmp_path / "p.png", tmp_path / "m.png", 8)
    assert torch.equal(read["mask"], (torch.arange(8) < 4).float().expand(1, 8, 8))


# --- Sampling --------------------------------------------------------------------------------------------------------


def test_words_have_the_ids_of_the_vocabulary_from_1_in_their_order_and_padding_comes_after():
    config = method.Config(WORDS, caption_length=6)
    captions = ["a red circle", "A BLUE  Square", "", "square square a a red blue", "an a"]
    expected = [[1, 2, 4, 0, 0, 0], [1, 3, 5, 0, 0, 0], [0] * 6, [5, 5, 1, 1, 2, 3], [1, 1, 0, 0, 0, 0]]
    assert method.encode(config, captions).tolist() == expected
    with pytest.raises(method.InputError, match="7 words"):
        method.encode(config, ["a a a a a a a"])
    with pytest.raises(method.InputError, match="unknown word 'bleu'.*did you mean 'blue'"):
        method.encode(config, ["a bleu circle"])
    assert method.encode(method.Config(("an", "a")), ["an a"])[0, :2].tolist() == [1, 2]


def test_each_image_has_noise_of_its_own_whatever_the_batch_and_seeds_share_none(monkeypatch):
    given = []

    def keep_noise(model, words, noise, **options):
        given.extend(noise)
        return noise

    monkeypatch.setattr(sample, "sample_images", keep_noise)
    for seed in (0, 1, 2):
        for first, count in ((0, 3), (3, 1), (4, 4)):
            sample.images_from_prompts(small_model(), ["a red circle"] * count, seed, first)
    expected = []
    for seed, image in np.ndindex(3, 8):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + image)
        expected.append(torch.randn(3, 12, 12, generator=generator))
    assert torch.equal(torch.stack(given), torch.stack(expected))
    assert len(torch.stack(given).flatten(1).unique(dim=0)) == 24


def test_bytes_are_the_nearest_of_each_value_and_what_is_out_of_range_is_cut():
    values = torch.tensor([-1.5, -1.0, -0.99, 0.01, 0.99, 1.0, 1.5]).view(1, 1, 1, 7).expand(1, 3, 2, 7)
    bytes_of_values = sample.to_uint8(values)
    assert bytes_of_values.dtype == np.uint8
    assert bytes_of_values.shape == (1, 2, 7, 3)
    assert bytes_of_values[0, 1, :, 2].tolist() == [0, 0, 1, 129, 254, 255, 255]
    assert np.array_equal(sample.to_uint8(values.bfloat16())[0, 0, [0, 1, 5, 6], 0], [0, 0, 255, 255])


@pytest.mark.parametrize("guidance, interval", [(1.0, (0.0, 1.0)), (3.0, (0.0, 1.0)), (3.0, (0.3, 0.8))])
@pytest.mark.parametrize("mode", ["layer-timestep", "dense"])
def test_the_counted_operations_are_those_of_a_run_with_guidance_and_unequal_columns(mode, guidance, interval):
    """Two for each multiplication of a linear layer or of attention, counted by hooks while four images are drawn."""
    model = small_model(mode)
    operations = 0

    def count_linear(linear, inputs, _):
        nonlocal operations
        operations += 2 * inputs[0].numel() * linear.out_features

    def count_router(layer, inputs, options, _):
        nonlocal operations
        if options.get("k") is not None:
            operations += 2 * inputs[0].numel()

    def count_attention(layer, inputs, _):  # scores and weighted means: of tokens with tokens, then with words
        nonlocal operations
        B, n, D = inputs[0].shape
        operations += 4 * B * D * n * (n + 5)

    def count_caption_encoder(_, inputs, __):  # of two layers: qkv, out, an MLP twice as wide; attention of 5 words
        nonlocal operations
        B, n, D = inputs[0].shape
        operations += 2 * (2 * B * n * D * D * (3 + 1 + 4) + 4 * B * D * n * n)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "caption_encoder" not in name:
            module.register_forward_hook(count_linear)
        if isinstance(module, method.RoutedLayer):
            module.register_forward_hook(count_router, with_kwargs=True)
        if isinstance(module, method.Layer):
            module.register_forward_hook(count_attention)
    model.caption_encoder.register_forward_hook(count_caption_encoder)
    options = {"steps": 7, "guidance": guidance, "guidance_interval": interval}
    sample.images_from_prompts(model, ["a red circle"] * 4, 0, **options)
    counted = sample.sampling_flops(model.config, model.ratios.detach(), 7, guidance, interval)
    assert counted == pytest.approx(operations / 4, rel=1e-6)


def sample_and_print(capsys, finished, tmp_path, *flags) -> tuple[np.ndarray, dict[str, float]]:
    """The images that the command draws of two prompts, and the figures that it prints."""
    start = ["--checkpoint", finished / "checkpoint.pt", "--out", tmp_path / "s.png", "--npz", tmp_path / "s.npz"]
    start += ["--prompt", "a red circle", "--prompt", "a blue cross"]
    code, output, error = call(sample, capsys, *start, *flags)
    assert code == 0, error
    words = output.replace(",", "").split()
    figures = {"images": int(words[0]), "saved": float(words[words.index("fewer") - 1].rstrip("%"))}
    figures["GFLOPs"] = float(words[words.index("GFLOPs") - 1])
    figures["mean ratio"] = float(words[words.index("ratio") + 1])
    return np.load(tmp_path / "s.npz")["arr_0"], figures


@pytest.mark.parametrize("interval", [(0, 1), (0.4, 0.9)])
def test_what_is_printed_is_what_was_done(finished, tmp_path, capsys, interval):
    """Three steps, at t = 1, 2/3, 1/3, of a table with four columns: the last one, the third and the second."""
    table = torch.tensor([[0.0, 0.25, 0.5, 0.75], [0.0, 0.5, 0.25, 0.5]])
    (tmp_path / "t.json").write_text(json.dumps(table.tolist()))
    flags = ["--steps", 3, "--guidance", 2, "--num", 2, "--seed", 5, "--batch-size", 3]
    flags += ["--ratios", tmp_path / "t.json"]
    flags += ["--guidance-interval", *interval]
    images, figures = sample_and_print(capsys, finished, tmp_path, *flags)
    model = sample.read_checkpoint(finished / "checkpoint.pt")[0]
    options = {"steps": 3, "guidance": 2.0, "guidance_interval": interval, "ratios": table}
    captions = ["a red circle", "a blue cross", "a red circle", "a blue cross"]  # in turn
    assert np.array_equal(images, sample.images_from_prompts(model, captions, 5, **options))
    assert len(np.unique(images.reshape(4, -1), axis=0)) == 4
    assert figures["images"] == 4
    assert figures["mean ratio"] == pytest.approx((0.75 + 0.5 + 0.5 + 0.25 + 0.25 + 0.5) / 6, abs=1e-3)
    flops = sample.sampling_flops(model.config, table, 3, 2.0, interval)
    dense = sample.sampling_flops(model.config, 0 * table, 3, 2.0, interval)
    assert figures["GFLOPs"] == pytest.approx(flops / 1e9, abs=0.006)
    assert figures["saved"] == pytest.approx(100 * (1 - flops / dense), abs=0.06)


def test_more_images_are_added_at_the_end_and_a_checkpoint_without_prompts_given_draws_its_own(
    finished, tmp_path, capsys
):
    few, _ = sample_and_print(capsys, finished, tmp_path, "--steps", 2)
    many, figures = sample_and_print(capsys, finished, tmp_path, "--steps", 2, "--num", 3, "--batch-size", 2)
    assert np.array_equal(many[:2], few)
    assert figures["images"] == 6
    flags = ["--checkpoint", finished / "checkpoint.pt", "--steps", 1, "--out", tmp_path / "s.png"]
    code, output, _ = call(sample, capsys, *flags)
    assert code == 0
    assert output.startswith("16 images")


def test_tables_change_what_is_skipped_and_dense_skips_nothing(finished, tmp_path, capsys):
    low = tmp_path / "low.json"
    high = tmp_path / "high.json"
    low.write_text(json.dumps([[0.25] * 6] * 2))
    high.write_text(json.dumps({"ratios": [[0.5], [0.75]]}))
    flags_of_ratio = {
        0.25: ["--ratios", low],
        0.625: ["--ratios", high],
        0.531: ["--ratios", high, "--round-k", 5],  # k = 8 and 4 become 10 and 5
        0: ["--dense"],
    }
    for expected, flags in flags_of_ratio.items():
        _, figures = sample_and_print(capsys, finished, tmp_path, "--steps", 4, *flags)
        assert figures["mean ratio"] == pytest.approx(expected, abs=6e-4)
        assert (figures["saved"] == 0) == ("--dense" in flags)


def test_k_is_rounded_to_a_multiple_and_stays_between_one_and_all(finished, tmp_path):
    model = sample.read_checkpoint(finished / "checkpoint.pt")[0]  # of 16 tokens
    (tmp_path / "t.json").write_text(json.dumps([[0.95, 0.6, 0.5], [0.0, 0.1, 0.2]]))
    k_of_multiple = {
        1: [[1, 6, 8], [16, 14, 13]],
        5: [[1, 5, 10], [15, 15, 15]],
        10: [[1, 10, 10], [16, 10, 10]],  # not 0, not 20
        40: [[1, 1, 1], [1, 1, 1]],
    }
    for multiple, expected in k_of_multiple.items():
        flags = ["--ratios", str(tmp_path / "t.json"), "--round-k", str(multiple)]
        ratios = sample.table_of(sample.make_parser().parse_args(flags), model)
        torch.testing.assert_close(ratios, 1 - torch.tensor(expected) / 16)


def test_bfloat16_gives_nearly_the_same_pictures(finished, tmp_path, capsys):
    exact, _ = sample_and_print(capsys, finished, tmp_path, "--steps", 4, "--num", 3)
    rounded, _ = sample_and_print(capsys, finished, tmp_path, "--steps", 4, "--num", 3, "--amp")
    difference = np.abs(exact.astype(float) - rounded)
    assert 0 < difference.mean() < 3


def test_a_checkpoint_gives_identical_samples_in_a_new_process_whatever_the_terminal_can_print(finished, tmp_path):
    out = tmp_path / "写真.png"
    flags = ["--prompt", "a red circle", "--num", 3, "--batch-size", 2, "--steps", 4, "--seed", 3, "--device", "cpu"]
    flags += ["--checkpoint", finished / "checkpoint.pt", "--out", out, "--npz", tmp_path / "s.npz"]
    flags += ["--png-dir", tmp_path / "png", "--routing-map"]
    result = command("sample.py", *flags, env=os.environ | {"PYTHONIOENCODING": "cp1252"})

    assert result.returncode == 0, result.stderr
    model = sample.read_checkpoint(finished / "checkpoint.pt")[0]
    expected = sample.images_from_prompts(model, ["a red circle"] * 3, 3, steps=4)
    array = np.load(tmp_path / "s.npz")["arr_0"]
    assert array.dtype == np.uint8
    assert np.array_equal(array, expected)
    for i in range(3):
        assert np.array_equal(Image.open(tmp_path / "png" / f"{i:06d}.png"), array[i])
    assert out.exists()
    assert (tmp_path / "写真-routing.png").exists()


def test_stopped_sampling_has_written_each_batch_and_says_so(finished, tmp_path, capsys, monkeypatch):
    draw = sample.images_from_prompts

    def stopped_in_the_third_batch(model, prompts, seed, first=0, **options):
        if first == 4:
            raise KeyboardInterrupt
        return draw(model, prompts, seed, first, **options)

    monkeypatch.setattr(sample, "images_from_prompts", stopped_in_the_third_batch)
    flags = ["--checkpoint", finished / "checkpoint.pt", "--prompt", "a red circle", "--num", 9, "--batch-size", 2]
    flags += ["--steps", 1, "--out", tmp_path / "s.png"]
    code, _, error = call(sample, capsys, *flags, "--png-dir", tmp_path / "png")
    assert code == 130
    assert f"stopped after 4 of 9 images, 4 of them in {tmp_path / 'png'}" in error
    assert len(list((tmp_path / "png").iterdir())) == 4
    code, _, error = call(sample, capsys, *flags)
    assert code == 130
    assert "nothing is written" in error


def test_a_folder_that_holds_other_pictures_takes_no_new_ones(finished, tmp_path, capsys):
    start = ["--checkpoint", finished / "checkpoint.pt", "--steps", 1, "--out", tmp_path / "s.png"]
    start += ["--prompt", "a red circle", "--png-dir", tmp_path / "png"]
    assert call(sample, capsys, *start, "--num", 3)[0] == 0
    before = snapshot(tmp_path)
    assert_refused(call(sample, capsys, *start, "--num", 1), "--png-dir", "000001.png")
    assert snapshot(tmp_path) == before
    assert call(sample, capsys, *start, "--num", 4)[0] == 0  # all of the old ones are replaced
    assert len(list((tmp_path / "png").iterdir())) == 4


def test_a_routing_map_of_an_earlier_run_is_named_as_that(finished, tmp_path, capsys):
    flags = ["--checkpoint", finished / "checkpoint.pt", "--steps", 1, "--out", tmp_path / "s.png"]
    _, output, _ = call(sample, capsys, *flags, "--routing-map")
    assert "earlier" not in output
    _, output, _ = call(sample, capsys, *flags)
    assert f"{tmp_path / 's-routing.png'} is of an earlier run" in output


def test_inpainting_keeps_the_known_pixels_and_the_sheet_begins_with_what_was_given(
    finished, tmp_path, capsys, monkeypatch
):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[3:9, 5:12] = 255
    Image.fromarray(picture).save(tmp_path / "p.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    sheets = []
    draw = sample.draw_samples

    def keep(images, captions):
        sheets.append((images, captions))
        return draw(images, captions)

    monkeypatch.setattr(sample, "draw_samples", keep)
    flags = ["--inpaint", tmp_path / "p.png", "--mask", tmp_path / "m.png", "--steps", 3]

    images, _ = sample_and_print(capsys, finished, tmp_path, *flags)

    for image in images:
        assert np.array_equal(image[mask == 0], picture[mask == 0])
        assert (image != picture)[mask > 0].any()
    shown, captions = sheets[0]
    assert np.array_equal(shown[0], picture)
    assert np.array_equal(shown[1][mask == 0], picture[mask == 0])
    assert (shown[1][mask > 0] == 128).all()
    assert np.array_equal(shown[2:], images)
    assert captions[2:] == ["a red circle", "a blue cross"]


def test_the_routing_that_is_recorded_is_what_was_processed(finished):
    model = sample.read_checkpoint(finished / "checkpoint.pt")[0]
    given = []  # of each routed layer in turn: all its tokens, then those that it processes
    for layer in model.layers:
        torch.nn.init.normal_(layer.router.weight)
        for module in (layer.layer, layer):
            module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model.ratios.data.uniform_(0.1, 0.9)
    records = []

    hooks = sample.record_routing(model, records)
    sample.images_from_prompts(model, ["a red circle", "a blue cross"], 0, steps=3)

    assert len(hooks) == 2
    assert len(records) == 6
    for (score, order), x, processed in zip(records, given[::2], given[1::2]):
        assert torch.equal(x.gather(1, order[..., None].expand_as(processed)), processed)
        assert torch.equal(score.topk(order.shape[1]).indices.sort().values, order.sort().values)


def test_auto_takes_cuda_then_mps_then_the_cpu_and_what_is_missing_is_refused(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert sample.pick_device("auto").type == expected
        assert sample.pick_device("cpu").type == "cpu"
    assert asked == ["high"]  # on CUDA, TensorFloat-32
    with pytest.raises(method.InputError, match="cuda"):
        sample.pick_device("cuda")


# --- Pictures that are drawn -----------------------------------------------------------------------------------------


def cells_of(monkeypatch, draw, *arguments, **options) -> tuple:
    """What a function asks draw_grid to draw: rows of images and texts, the title, the names of rows and of columns."""
    grids = []
    with monkeypatch.context() as context:
        context.setattr(sample, "draw_grid", lambda *asked, **_: grids.append(asked))
        draw(*arguments, **options)
    return grids[0]


def test_a_heat_map_has_noise_on_the_left_the_first_layer_on_top_and_means_at_its_edges(monkeypatch):
    table = torch.tensor([[0.0, 0.0, 0.9, 0.1], [0.0, 0.3, 0.0, 0.1]])
    rows, title, row_names, column_names = cells_of(monkeypatch, sample.draw_ratios, table, "title")
    texts = [[text for _, text in row] for row in rows]
    assert texts == [
        ["0.10", "0.90", "0.00", "0.00", "0.25"],
        ["0.10", "0.00", "0.30", "0.00", "0.10"],
        ["0.10", "0.45", "0.15", "0.00", "0.18"],
    ]
    darkness = [[255 - image.mean() for image, _ in row] for row in rows]
    ratios = [[float(text) for text in row] for row in texts]
    assert np.corrcoef(np.ravel(darkness), np.ravel(ratios))[0, 1] > 0.999
    assert title == "title"
    assert row_names == ["layer 1", "layer 2", "mean"]
    assert column_names == ["t 0.75\nto 1", "t 0.5\nto 0.75", "t 0.25\nto 0.5", "t 0\nto 0.25", "mean"]


def test_a_routing_map_shows_the_processed_tokens_of_six_steps_and_each_layer_bright(finished, monkeypatch):
    model = sample.read_checkpoint(finished / "checkpoint.pt")[0]
    for layer in model.layers:
        torch.nn.init.normal_(layer.router.weight)
    table = torch.tensor([[0.25, 0.5], [0.75, 0.0]])
    prompts = ["a red circle", "a blue cross"]
    options = {"steps": 11, "ratios": table}

    rows, _, row_names, names = cells_of(monkeypatch, sample.draw_routing, model, prompts, 4, **options)

    records = []
    guesses = []
    hooks = sample.record_routing(model, records)
    sample.images_from_prompts(model, prompts, 4, hook=lambda t, x0: guesses.append(sample.to_uint8(x0)), **options)
    for hook in hooks:
        hook.remove()
    steps = [0, 2, 4, 6, 8, 10]
    assert row_names == ["guess", "layer 1", "layer 2"]
    assert [name.splitlines()[0] for name in names[::6]] == prompts
    assert [name.splitlines()[1] for name in names] == 2 * [f"t = {1 - step / 11:.2f}" for step in steps]
    for column, (image, i) in enumerate(np.ndindex(2, 6)):
        guess = guesses[steps[i]][image]
        assert np.array_equal(rows[0][column][0], guess)
        for layer in range(2):
            _, order = records[2 * steps[i] + layer]
            drawn, text = rows[1 + layer][column]
            assert text == f"{table[layer, 0 if i > 2 else 1]:.2f}"
            for token in range(16):
                place = np.s_[4 * (token // 4) : 4 * (token // 4) + 4, 4 * (token % 4) : 4 * (token % 4) + 4]
                if token in order[image]:
                    assert np.array_equal(drawn[place], guess[place])
                else:
                    assert np.array_equal(drawn[place], guess[place] // 5)


def test_a_sheet_shows_64_images_eight_a_row_each_over_its_caption_in_good_english(monkeypatch):
    images = np.zeros((70, 4, 4, 3), np.uint8)
    images[:, :, :, 0] = 3 * np.arange(70).reshape(-1, 1, 1)
    captions = [f"a airplane {i}" for i in range(70)]
    (rows,) = cells_of(monkeypatch, sample.draw_sheet, images, captions, {})
    assert [len(row) for row in rows] == [8] * 8
    cells = [cell for row in rows for cell in row]
    assert [image[0, 0, 0] for image, _ in cells] == [3 * i for i in range(64)]
    assert [text for _, text in cells] == [f"an airplane {i}" for i in range(64)]


@pytest.mark.parametrize("words", [1, 30])
def test_captions_stay_clear_of_the_images_below_and_beside_them(words):
    colours = [(200, 0, 0), (0, 150, 0), (0, 0, 250), (90, 90, 0)]
    images = np.array([np.full((4, 4, 3), colour, np.uint8) for colour in colours])
    captions = [" ".join(["wonderful"] * words)] * 4
    sheet = np.array(sample.draw_samples(images, captions, columns=2))
    for colour in colours:
        assert (sheet == colour).all(axis=2).sum() == 112 * 112  # not a pixel is written over


def test_letters_are_never_boxes(monkeypatch):
    """A font of the system that has them, if there is one; else a plain substitute."""
    for text in ("a red circle", "Löwe", "猫 Café"):
        shown, font = sample.lettering(text, 12)
        assert sample.has_letters(font, shown)
    assert sample.lettering("a red circle", 12)[0] == "a red circle"
    monkeypatch.setattr(sample, "SYSTEM_FONTS", ("no such font.ttf",))
    sample.lettering.cache_clear()
    assert sample.lettering("猫 Löwe", 12)[0] == "? Lowe"
    sample.lettering.cache_clear()


def test_curves_show_each_value_at_its_step_losses_in_logarithms_and_the_first_line_from_step_zero(monkeypatch):
    metrics = []
    for step, loss in ((10, 1.0), (20, 0.1), (30, 0.01)):
        ratios = [[0.2, 0.2], [step / 50, step / 50]]
        metrics.append({"step": step, "loss": loss, "loss_by_region": [0.01, 1.0, None], "ratios": ratios})
    metrics[1]["loss_by_region"] = [0.01, 1.0, 0.5]  # a region without images has no loss
    lines = []
    texts = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "line", lambda _, points, *__: lines.append(np.array(points)))
    monkeypatch.setattr(sample, "write", lambda _, place, text, *__, **___: texts.append(text))

    sample.draw_curves(metrics)

    assert len(lines) == 1 + 4 + 3
    loss = lines[0]
    assert loss[:, 0] == pytest.approx(loss[0, 0] + np.array([0, 1, 2, 3]) * (loss[1, 0] - loss[0, 0]))
    assert loss[0, 1] == loss[1, 1]
    assert loss[2, 1] - loss[1, 1] == pytest.approx(loss[3, 1] - loss[2, 1])  # 1, 0.1, 0.01: equal parts
    assert loss[1, 1] < loss[3, 1]  # high is up
    assert len(lines[3]) == 1  # of the third region
    mean = lines[-1][:, 1]  # 0.2, 0.2, 0.3, 0.4
    assert mean[2] - mean[1] == pytest.approx(mean[3] - mean[2])
    assert sum("logarithmic" in text for text in texts) == 2
    for name in ("t 0 to 0.33", "t 0.67 to 1", "layer 1", "layer 2", "mean", "all"):
        assert name in texts
