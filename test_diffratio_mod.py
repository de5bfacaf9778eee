"""Tests of DiffRatio-MoD, as a specification: each is named after the property that it pins.

python -m pytest                                        # everything, within 2 minutes on two CPU cores
DIFFRATIO_MOD=my_solution.py python -m pytest -k method # the tests of the method, against another file
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands; small models are faster with one thread
import sample as sample_command  # isort: skip (first: it puts the file of DIFFRATIO_MOD in the place of diffratio_mod)
import numpy as np
import pytest
import torch
from PIL import Image

import diffratio_mod as method
import train_cifar as train_command

HERE = Path(__file__).parent
torch.set_num_threads(1)
WORDS = ("a", "red", "blue", "circle", "square")
PATCHES = [np.s_[:, y : y + 2, x : x + 2] for y in range(0, 12, 2) for x in range(0, 12, 2)]


def setup_function() -> None:  # before every test
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
    for layer in model.layers if skips == 0 else ():
        torch.nn.init.zeros_(layer.router.weight), torch.nn.init.zeros_(layer.router.bias)
    return model


def small_batch(count: int = 8) -> dict:
    """Arguments for diffusion_loss: each image with its own caption, mask and noise level, in no order."""
    words = torch.randint(1, 6, (count, 5)) * (torch.arange(5) < torch.arange(count).unsqueeze(1) % 6)  # null to full
    mask = ((torch.rand(count, 1, 12, 1) < 0.8) & (torch.rand(count, 1, 1, 12) < 0.8)).float()
    t, eps = (torch.randperm(count) + torch.rand(count)) / count, torch.randn(count, 3, 12, 12)
    return {"images": torch.rand(count, 3, 12, 12) * 2 - 1, "words": words, "mask": mask, "t": t, "eps": eps}


# --- The whole forward pass against a reference from the definitions, in float64 ------------------------------------


def waves(position: float, dim: int, longest: float) -> np.ndarray:
    angles = position / longest ** (np.arange(dim // 2) / (dim // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)])


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    query, key, value = (z.reshape(len(z), 2, -1) for z in (query, key, value))  # two heads
    weights = np.exp(np.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[2]))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(axis=2, keepdims=True), value).reshape(len(query), -1)


def routed(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, k: int | None, update) -> np.ndarray:
    """The k tokens with the highest scores gain twice their score times update(them), the others stay. None: dense."""
    if k is None:
        return x + update(x)
    score, result = 1 / (1 + np.exp(-x @ weight[0] - bias)), x.copy()
    best = sorted(range(len(x)), key=lambda i: -score[i])[:k]  # sorted() keeps equals in order
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
        query, keys_values = linear(layer + "caption_q.", normalise(x + gain)), linear(layer + "caption_kv.", caption)
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
        layer, router = f"layers.{i}.layer.", f"layers.{i}.router."
        x = routed(x, w[router + "weight"], w[router + "bias"], k[i], update)
    shift, scale = np.split(linear("condition_out.", condition), 2)
    velocity = np.zeros_like(noisy)
    for patch, values in zip(PATCHES, linear("out.", normalise(x) * (1 + scale) + shift)):
        velocity[patch] = values.reshape(3, 2, 2)
    return math.sin(t * math.acos(0.02)) * noisy + math.cos(t * math.acos(0.02)) * velocity


def k_at(ratios: torch.Tensor, t: float) -> list[int]:  # how many of 36 tokens each layer processes
    return [min(max(round(36 * (1 - row[math.ceil(t * len(row) - 1e-9) - 1])), 1), 36) for row in ratios.tolist()]


def in_float64(model: method.DiT, batch: dict) -> dict:
    """Turn both into float64. Positions and time features, which are float32 for good, are compared, then replaced."""
    positions = np.stack([np.concatenate([waves(y, 8, 100), waves(x, 8, 100)]) for y, x in np.ndindex(6, 6)])
    np.testing.assert_allclose(model.positions, positions, atol=1e-6)
    model.double().positions = torch.tensor(positions)
    features, compare = np.stack([waves(1000 * t, 16, 10_000) for t in batch["t"].tolist()]), np.testing.assert_allclose
    replace = lambda _, inputs: compare(inputs[0], features, atol=3e-4) or torch.tensor(features)  # compare() is None
    model.embed_time.register_forward_pre_hook(replace)  # 3e-4: an angle of up to 1000, in float32
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


@pytest.mark.parametrize("mode, route", [*((mode, True) for mode in method.MODES), ("layer", False)])
def test_method_forward_and_loss_of_a_mixed_batch_equal_the_reference_image_by_image(mode, route):
    model, dense = small_model(mode), [None] * 3 if mode == "dense" or not route else None
    images, words, mask, t, eps = (batch := in_float64(model, small_batch())).values()
    losses = method.diffusion_loss(model, **batch, route=route)
    a, s = (z.view(-1, 1, 1, 1) for z in method.schedule(t))
    noisy, k = a * images + s * eps, None if dense else [13, 36, 1]
    with torch.no_grad():
        sampled = model.eval()(noisy, t, model.encode_caption(words), images, mask, k=k)
    for i, level in enumerate(t.tolist()):
        inputs = noisy[i].numpy(), level, *(z[i].numpy() for z in (words, images, mask))
        guess = reference(model, *inputs, dense or k_at(model.ratios, level))
        assert losses[i].item() == pytest.approx(np.mean((guess - eps[i].numpy()) ** 2), rel=1e-6)
        np.testing.assert_allclose(sampled[i], reference(model, *inputs, dense or k), 1e-9, 1e-9)


def test_method_the_model_is_trained_with_the_known_pixels_and_without_the_hidden_ones():
    model, patches = small_model(), []
    images, words, mask, t, eps = small_batch().values()
    model.embed_patch.register_forward_pre_hook(lambda module, inputs: patches.append(inputs[0]))
    method.diffusion_loss(model, images, words, mask, t, eps)
    pixels = torch.nn.functional.pixel_shuffle(patches[0].transpose(1, 2).unflatten(2, (6, 6)), 2)
    assert torch.equal(pixels[:, 3:], torch.cat([torch.where(mask == 1, 0, images), mask], dim=1))


@pytest.mark.parametrize("mode", ["uniform", "layer", "layer-timestep"])
def test_method_zero_ratios_equal_dense_to_the_last_bit(mode):
    for count in (1, 8, 33):
        model = small_model(mode, skips=0)
        images, words, mask, t, noisy = (batch := small_batch(count)).values()
        assert torch.equal(method.diffusion_loss(model, **batch), method.diffusion_loss(model, **batch, route=False))
        inputs = noisy, t, model.encode_caption(words), images, mask
        assert torch.equal(model(*inputs, k=[36] * 3), model(*inputs))


class Toy(torch.nn.Linear):
    """A layer with nothing of Layer: a linear map of each token, and the mean of the attended ones."""

    def forward(self, x, attended, scale):
        weight = x.new_ones(x.shape[:2]) if attended is None else attended.to(x.dtype)
        mean = torch.einsum("bn,bnd->bd", weight, x) / weight.sum(dim=1, keepdim=True)
        return scale * (super().forward(x) + mean.unsqueeze(1))


def toy_layer() -> tuple[method.RoutedLayer, torch.Tensor, torch.Tensor]:
    """A routed toy layer of float64, tokens (3, 16, 6), and what else the layer takes."""
    layer = randomise(method.RoutedLayer(Toy(6, 6), 6)).double()
    return layer, torch.randn(3, 16, 6).double(), torch.rand(3, 1, 1).double()


@pytest.mark.parametrize("k", range(1, 17))
def test_method_any_layer_can_be_routed_and_bypassed_tokens_leave_bit_identical(k):
    layer, x, scale = toy_layer()
    w, own = {name: value.numpy() for name, value in layer.state_dict().items()}, [k, 17 - k, 1 + k // 2]

    def update(best):
        return scale[i].numpy() * (best @ w["layer.weight"].T + w["layer.bias"] + best.mean(axis=0))

    for ks, options in ([k] * 3, {"k": k}), (own, {"ratio": 1 - torch.tensor(own).double() / 16}):
        for i, result in enumerate(layer(x, scale, **options).detach()):
            expected = routed(x[i].numpy(), w["router.weight"], w["router.bias"], ks[i], update)
            np.testing.assert_allclose(result, expected, 1e-12, 1e-12)
            assert (result == x[i]).all(dim=1).sum() == 16 - ks[i]
    assert torch.equal(layer(x, scale), x + layer.layer(x, None, scale))


def test_method_equal_scores_are_taken_in_order(monkeypatch):
    sort = torch.Tensor.argsort

    def argsort(x, dim=-1, descending=False, stable=False):  # unless stable, ties come in any order: here the reverse
        order = sort(x if stable else x.flip(dim), dim=dim, descending=descending, stable=True)
        return order if stable else x.shape[dim] - 1 - order

    monkeypatch.setattr(torch, "argsort", argsort)
    monkeypatch.setattr(torch.Tensor, "argsort", argsort)
    layer, x, scale = toy_layer()
    torch.nn.init.zeros_(layer.router.weight)
    for options in ({"k": 7}, {"ratio": torch.full((3,), 9 / 16)}):
        assert torch.equal((layer(x, scale, **options) != x).any(dim=2), torch.arange(16).lt(7).expand(3, 16))


def test_method_router_learns_only_through_the_gate_of_processed_tokens_and_the_ratio_through_that_of_the_next():
    layer, x, scale = toy_layer()
    ratio, direction = torch.full((3,), 9 / 16).double(), torch.randn(3, 16, 6).double()
    inputs = x.requires_grad_(), *layer.router.parameters()  # gradcheck changes them in place; the choice stays
    assert torch.autograd.gradcheck(lambda *_: layer(x, scale, ratio=ratio), inputs)
    (layer(x, scale, ratio=ratio.requires_grad_()) * direction).sum().backward()
    score, order = layer.score_and_sort(x)
    change = 2 * score * (layer.layer(x, order.argsort(dim=1) < 7, scale) * direction).sum(dim=2)  # by its processing
    torch.testing.assert_close(ratio.grad, -16 / 2 * change.gather(1, order[:, 7:8]).squeeze(1))  # e = 1


@pytest.mark.parametrize("k", [[36, 35, 34], [18, 36, 1], [1, 2, 3], [30, 20, 10]])
def test_method_training_equals_sampling_in_the_result_and_in_what_the_weights_learn(k):
    """So the tokens next after the k best teach the ratio, and nothing else. (gradcheck changes weights in place.)"""
    model, results, gradients = small_model(), [], []
    images, words, mask, t, noisy = in_float64(model, small_batch()).values()
    weights = [parameter for name, parameter in model.named_parameters() if name != "ratios"]
    fixed = 1 - torch.tensor(k).double().unsqueeze(1).expand(3, 8) / 36
    learned = fixed.clone().requires_grad_()
    run = lambda **options: model(noisy, t, model.encode_caption(words), images, mask, **options)
    for options in ({"k": k}, {"ratio": fixed}, {"ratio": learned}):
        results.append(run(**options))
        loss = (results[-1] - images).square().sum()
        gradients.append(torch.autograd.grad(loss, weights, retain_graph=True))
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(gradients[1], gradients[2], rtol=0, atol=0)
    assert torch.equal(torch.autograd.grad(loss, learned)[0] != 0, fixed > 0)
    assert torch.autograd.gradcheck(lambda *_: run(k=k), [z for z in weights if z.numel() < 100], fast_mode=True)


@pytest.mark.parametrize("N", [16, 64, 256])
def test_method_ratio_gate_chooses_the_k_best_and_has_the_slope_that_its_docstring_promises(N):
    ks = torch.tensor([N, N - 1, N - 2, N - 5, N // 2, 1])
    rank, k, ratio = torch.stack([torch.randperm(N) for _ in ks]), ks.unsqueeze(1), torch.rand(6, 1)
    expected = torch.zeros(6, N, 6, 1)
    for image, token in np.ndindex(6, N):
        e = min(N - ks[image], math.ceil(0.05 * N))
        if ks[image] <= rank[image, token] < ks[image] + e:  # e tokens stand for the next one; N pass; trapezoid: half
            expected[image, token, image] = -N / e / 2
    slopes = torch.autograd.functional.jacobian(lambda ratio: method.ratio_gate(rank, k, ratio), ratio)
    torch.testing.assert_close(slopes, expected)
    assert torch.equal(method.ratio_gate(rank, k, ratio), (rank < k).float())


def test_method_tokens_processed_are_the_nearest_whole_number_from_one_to_all():
    k = method.tokens_processed(ratios := torch.linspace(0, 0.9999, 300, requires_grad=True).view(3, 100), 64)
    assert k.shape == (3, 100) and k.dtype == torch.long and (k.min(), k.max()) == (1, 64)
    assert ((64 * (1 - ratios) - k).abs() <= 0.5 + 1e-4)[k > 1].all()


@pytest.mark.parametrize("columns", [1, 4, 10])
def test_method_columns_cut_the_noise_levels_evenly_in_training_and_sampling(columns):
    t = torch.rand(500).clamp(1e-3)
    assert method.column_of(t, columns).tolist() == [math.ceil(level * columns) - 1 for level in t.tolist()]
    assert method.column_of(torch.tensor([1e-6, 1.0]), columns).tolist() == [0, columns - 1]
    for steps in range(1, 50):  # an edge belongs to the cleaner column, however t is rounded
        expected = [-(-i * columns // steps) - 1 for i in range(steps, 0, -1)]
        assert method.column_of(torch.linspace(1, 0, steps + 1)[:-1], columns).tolist() == expected
    t = method.even_noise_levels(40, torch.Generator().manual_seed(3))
    place = t * 40 - torch.arange(40)  # random levels: in order, one in each equal part, anywhere in it
    assert place.min() > 0 and place.max() < 1 and place.std() > 0.2
    assert torch.equal(t, method.even_noise_levels(40, torch.Generator().manual_seed(3)))


def test_method_ratio_loss_pulls_all_cells_alike_towards_the_target():
    ratios = torch.rand(3, 5, requires_grad=True)
    loss = method.ratio_loss(ratios, 0.3)
    loss.backward()
    assert loss.item() == pytest.approx((np.mean(ratios.tolist()) - 0.3) ** 2, rel=1e-5)
    torch.testing.assert_close(ratios.grad, (2 * (ratios.detach().mean() - 0.3) / 15).expand(3, 5))


@pytest.mark.parametrize("pull, bound, k", [(1, 0.0, 36), (-1, 1 - 1 / 36, 1)])
def test_method_a_ratio_at_its_bound_comes_back_at_the_first_step_when_the_pull_turns(pull, bound, k):
    model = small_model()
    optimizer = torch.optim.SGD([model.ratios], lr=0.1)
    for _ in range(20):
        model.ratios.grad = torch.full((3, 4), float(pull))
        optimizer.step(), model.clamp_ratios()
    assert model.ratios.eq(torch.tensor(bound)).all() and method.tokens_processed(model.ratios, 36).eq(k).all()
    optimizer.zero_grad(), method.diffusion_loss(model, **small_batch(32)).mean().backward()
    assert model.ratios.grad.eq(0).all() if k == 36 else model.ratios.grad.ne(0).all()  # nothing is skipped: no slope
    optimizer.zero_grad(), method.ratio_loss(model.ratios, 0.5).backward()  # the pull turns
    optimizer.step(), model.clamp_ratios()
    assert (pull * (model.ratios - bound) > 0).all()


@pytest.mark.parametrize("mode", method.MODES)
def test_method_a_new_model_is_the_same_in_every_mode_but_for_its_table_and_adds_nothing(mode):
    model, dense = (method.DiT(small_model(z).config) for z in (mode, "dense"))
    model.load_state_dict(dense.state_dict() | {"ratios": model.ratios})  # strict: the same names and shapes
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert sum(z.numel() for z in model.parameters()) - model.ratios.numel() == 21_263
    assert torch.equal(model.ratios, torch.zeros(3, 4 if mode == "layer-timestep" else 1))
    assert model.ratios.requires_grad == (mode in ("layer", "layer-timestep"))
    for module in (model.condition, model.condition_out, model.out, *(layer.router for layer in model.layers)):
        assert module.weight.eq(0).all() and module.bias.eq(0).all()
    updates, (images, words, mask, t, noisy) = [], small_batch().values()
    for layer in model.layers:
        layer.layer.register_forward_hook(lambda module, inputs, update: updates.append(update))
    result = model(noisy, t, model.encode_caption(words), images, mask)
    assert len(updates) == 3 and all(update.eq(0).all() for update in updates)
    torch.testing.assert_close(result, method.schedule(t)[1].view(-1, 1, 1, 1) * noisy)  # the velocity is zero


def toy_batch(count: int) -> dict:
    """Arguments for diffusion_loss: somewhere on grey a box, whose colour a word tells; the noise levels ascend."""
    colour, place = torch.randint(3, (count,)), torch.randint(12, (2, count, 1))
    near = (torch.arange(12) - place).abs() < 3  # (2, B, S)
    box, paint = near[0].unsqueeze(2) & near[1].unsqueeze(1), (2 * torch.eye(3) - 1)[colour]
    images, words = torch.where(box.unsqueeze(1), paint[:, :, None, None], 0.0), 1 + colour.unsqueeze(1)
    t, eps = (torch.arange(count) + torch.rand(count)) / count, torch.randn(count, 3, 12, 12)
    return {"images": images, "words": words, "mask": torch.ones(count, 1, 12, 12), "t": t, "eps": eps}


def test_method_gradient_of_a_ratio_agrees_with_the_finite_difference_in_k():
    """In a model that has learned at one fixed ratio: for each layer and region, the loss at k - 3 against k + 3."""
    model, steps, rounds = method.DiT(method.Config(WORDS, 12, 2, 32, 2, 2, 1, "layer-timestep", 4)), 250, 6
    (ratios := model.ratios).data.fill_(0.4)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter is not ratios], lr=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (step + 1) / 20) * math.sqrt(1 - step / steps)
        method.diffusion_loss(model, **toy_batch(32)).mean().backward()
        optimizer.step(), model.zero_grad()
    slope = torch.zeros(2, 4)
    for batch in (toy_batch(128) for _ in range(rounds)):
        (method.diffusion_loss(model, **batch).mean() / rounds).backward()
        for layer, change in ((layer, change) for layer in range(2) for change in (3 / 36, -3 / 36)):
            ratios.data[layer] += change
            losses = method.diffusion_loss(model, **batch).detach().view(4, 32).sum(dim=1)  # of each region
            slope[layer] += losses / (256 * change * rounds)
            ratios.data[layer] -= change
    assert 0.4 < ratios.grad.sum() / slope.sum() < 2.5  # skipping more costs something
    assert np.corrcoef(ratios.grad.flatten(), slope.flatten())[0, 1] > 0.4


def test_method_a_training_step_is_one_pass_that_reads_nothing_back_from_the_device():
    class Operations(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    model = small_model().to("meta")  # shapes without numbers: whatever needs a number fails
    images, words, mask, t, noisy = (batch := {name: z.to("meta") for name, z in small_batch().items()}).values()
    with Operations() as dense:
        method.diffusion_loss(model, **batch, route=False).mean().backward()
    with Operations() as routed:
        (method.diffusion_loss(model, **batch).mean() + method.ratio_loss(model.ratios, 0.3)).backward()
    torch.optim.AdamW(model.parameters()).step()
    model.clamp_ratios()
    assert routed.count <= 1.8 * dense.count and model.ratios.grad.is_meta
    model(noisy, t, model.encode_caption(words), images, mask, k=[36, 7, 1])  # nor does a step of sampling


def test_method_the_loss_compiles_once_whatever_the_ratios():
    model, batch, graphs = small_model(), small_batch(), []
    loss = torch.compile(method.diffusion_loss, fullgraph=True, backend=lambda z, _: graphs.append(z) or z.forward)
    for most in (0.0, 0.5, 0.97):
        model.ratios.data = most * torch.rand(3, 4)
        torch.testing.assert_close(loss(model, **batch), method.diffusion_loss(model, **batch))
    assert len(graphs) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("skips", [0.0, 0.9])
def test_method_cuda_and_bfloat16_train_and_sample_with_about_the_same_result(device, skips):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model, batch = small_model(skips=skips), small_batch()
    expected = method.diffusion_loss(model, **batch, route=skips > 0)  # zero ratios equal dense
    model, batch = model.to(device), {name: value.to(device) for name, value in batch.items()}
    layer, x, scale = (z.float().to(device) for z in toy_layer())
    layer.layer.register_forward_hook(lambda module, inputs, update: update.bfloat16())
    for amp, tolerance in ((False, 1e-3), (True, 0.1)):
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            losses = method.diffusion_loss(model, **batch)
            images = method.sample(model, batch["words"], batch["eps"], steps=2)
            tokens = layer(x, scale, k=7)
        assert losses.dtype == images.dtype == tokens.dtype == torch.float32 and not images.requires_grad
        torch.testing.assert_close(losses.cpu(), expected, rtol=tolerance, atol=tolerance / 10)


def test_method_config_refuses_what_does_not_fit_and_what_is_absurd():
    many, most = tuple(str(i) for i in range(50_001)), 2048
    method.Config(many[1:], most, most, most, most, most, most, "dense", most)
    assert method.Config(WORDS, 128, 1) == method.Config(WORDS, 128, 1, 128, 6, 4, 8, "layer-timestep", 10)  # large
    sizes = "image_size", "patch_size", "dim", "depth", "heads", "caption_length", "regions"
    refused = [{name: value} for name in sizes for value in (0, -1, most + 1, 4.0, "4", True, None)]
    refused += [{"patch_size": 5}, {"image_size": 129, "patch_size": 1}, {"dim": 126, "heads": 2}, {"heads": 3}]
    refused += [{"vocabulary": z} for z in ((), ("a", "a"), many)] + [{"mode": "fast" * 99}, {"dim": "9" * 99}]
    for changes in refused:
        with pytest.raises(method.InputError) as error:
            method.Config(**({"vocabulary": WORDS} | changes))
        assert isinstance(error.value, ValueError) and "\n" not in str(error.value) and len(str(error.value)) < 130


def test_method_sampler_reproduces_a_known_distribution():
    model, mean = small_model("dense"), torch.linspace(-0.3, 0.3, 3).view(1, 3, 1, 1)

    def exact(noisy, t, *_, **__):  # the noise in data that are normal, pixel by pixel
        a, s = (z.view(-1, 1, 1, 1) for z in method.schedule(t))
        return s * (noisy - a * mean) / (a**2 * 0.15**2 + s**2)

    model.forward = exact
    images = method.sample(model, torch.ones(128, 5).long(), torch.randn(128, 3, 12, 12))
    assert (images.mean(dim=(0, 2, 3)) - mean.flatten()).abs().max() < 0.01
    assert (images.std(dim=(0, 2, 3)) - 0.15).abs().max() < 0.01


def paper_sampler(predict, noise, known, mask, steps=30, guidance=3.0) -> list[tuple[float, torch.Tensor]]:
    """DPM-Solver++(2M) as in its paper (arXiv 2211.01095, algorithm 2), with guidance; t and guess of every step."""
    t = np.linspace(1, 0, steps + 1)
    a, s = np.cos(t * math.acos(0.02)), np.sin(t * math.acos(0.02))
    x, guesses, half_snr = noise.double(), [], np.log(a / np.maximum(s, 1e-300))
    for i in range(steps):
        conditional, null = predict(x.float(), t[i])
        x0 = (x - s[i] * (null + guidance * (conditional - null))) / a[i]
        guesses.append(mask * x0.clamp(-1, 1) + (1 - mask) * known)
        h, data = half_snr[i + 1] - half_snr[i], guesses[i]
        if 0 < i < steps - 1:
            r = (half_snr[i] - half_snr[i - 1]) / h
            data = (1 + 1 / (2 * r)) * guesses[i] - 1 / (2 * r) * guesses[i - 1]
        x = s[i + 1] / s[i] * x - a[i + 1] * np.expm1(-h) * data
    return [*zip(t, guesses), (0.0, x)]


@pytest.mark.parametrize("options", [{}, {"steps": 8, "guidance": 1.0}, {"steps": 1}, {"steps": 2, "guidance": 0.0}])
@pytest.mark.parametrize("mode", method.MODES)
def test_method_sampler_equals_its_paper_and_computes_the_k_tokens_of_each_noise_level(mode, options):
    model, noise, hooked, sizes = small_model(mode), torch.randn(8, 3, 12, 12), [], []
    known, words, mask, *_ = small_batch().values()
    table = torch.tensor([[0.0, 0.9], [0.5, 0.2], [0.99, 0.0]]) if mode == "uniform" else model.ratios

    def predict(x, t):
        k = None if mode == "dense" else k_at(table, t)
        for caption in (model.encode_caption(words), model.encode_caption(0 * words)):
            yield model(x, torch.full((8,), t).float(), caption, known, mask, k=k).detach()

    expected = paper_sampler(predict, noise, known, mask, **options)
    for module in (model.caption_encoder, model.layers[2].layer):
        module.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[:2]))
    given = {"known": known, "mask": mask, "ratios": table if mode == "uniform" else None}
    result = method.sample(model, words, noise, **options, **given, hook=lambda *z: hooked.append(z))
    for (t, guess), (expected_t, expected_guess) in zip([*hooked, (0.0, result)], expected, strict=True):
        torch.testing.assert_close(guess.double(), expected_guess.double(), rtol=1e-4, atol=1e-4)
        assert t == pytest.approx(expected_t)
    images = 8 if options.get("guidance") == 1 else 16  # without guidance the null caption is not computed
    assert sizes == [(images, 5)] + [(images, 36 if mode == "dense" else k_at(table, t)[2]) for t, _ in expected[:-1]]


def test_method_inpainting_returns_known_pixels_unchanged_and_never_sees_hidden_ones():
    model = small_model()
    known, words, mask, _, noise = small_batch().values()
    images, inside = method.sample(model, words, noise, 5, known=known, mask=mask), mask.bool().expand(8, 3, 12, 12)
    assert torch.equal(images[~inside], known[~inside]) and not torch.equal(images[inside], known[inside])
    hidden = torch.where(inside, -known, known)
    assert torch.equal(images, method.sample(model, words, noise, 5, known=hidden, mask=mask))


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
        predictions = []
        for caption in (words, 0 * words if acts else words):
            inputs = x, torch.full((8,), t).float(), model.encode_caption(caption), known, mask
            predictions.append(model(*inputs, k=k).detach())
        expected_batches.append(16 if acts else 8)
        return predictions

    expected = paper_sampler(predict, noise, known, mask, steps=10, guidance=4.0)
    guesses = []
    batches = []
    model.layers[2].register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    result = method.sample(
        model, words, noise, 10, 4.0, interval, known, mask, hook=lambda t, guess: guesses.append((t, guess))
    )
    for (t, guess), (expected_t, expected_guess) in zip([*guesses, (0.0, result)], expected, strict=True):
        assert t == pytest.approx(expected_t)
        torch.testing.assert_close(guess.double(), expected_guess.double(), rtol=1e-4, atol=1e-4)
    assert batches == expected_batches


def test_method_guidance_everywhere_is_the_default_and_guidance_nowhere_is_the_plain_model_to_the_last_bit():
    model = small_model()
    words = small_batch()["words"]
    noise = torch.randn(8, 3, 12, 12)
    encoded = []
    model.caption_encoder.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    default = method.sample(model, words, noise, 5)
    assert torch.equal(default, method.sample(model, words, noise, 5, 3.0, guidance_interval=(0.0, 1.0)))
    plain = method.sample(model, words, noise, 5, guidance=1.0)
    assert torch.equal(plain, method.sample(model, words, noise, 5, 3.0, guidance_interval=(0.0, 0.1)))
    assert encoded == [16, 16, 8, 8] and not torch.equal(default, plain)


# --- The data --------------------------------------------------------------------------------------------------------


def test_shapes_caption_mask_and_picture_agree():
    images, captions, masks = train_command.Shapes(32).batch(300, torch.Generator().manual_seed(0))
    assert images.abs().max() <= 1 and masks.min() >= 0 and masks.max() <= 1
    grid, names, colours = torch.arange(32.0), [*train_command.COLOURS], torch.tensor([*train_command.COLOURS.values()])
    for image, caption, pair in zip((images + 1) / 2, captions, masks):
        told, centres = caption.split()[1:3] + caption.split()[-2:] * (len(caption.split()) > 3), []
        assert (pair.sum(dim=(1, 2)) > 10).tolist() == [True, len(told) == 4]
        assert (pair.sum(dim=0) <= 1 + 1e-6).all()  # objects do not overlap
        for mask, colour, shape in zip(pair, told[::2], told[1::2]):
            seen = (image[:, mask > 0.99].mean(dim=1) - colours).abs().sum(dim=1).argmin()
            rows, columns = mask.sum(dim=1), mask.sum(dim=0)
            centres.append((float(columns @ grid / mask.sum()), float(rows @ grid / mask.sum())))
            middle, length = grid[rows > 0].mean(), (rows > 0).sum()
            share = mask.sum() / (rows.max() * columns.max())  # of its bounding box: 0.56 for a cross, 0.79, 1
            guess = "cross" if share < 0.68 else "circle" if share < 0.9 else "square"
            guess = "triangle" if (centres[-1][1] - middle) / length > 0.09 else guess  # a triangle's is 1/6
            assert (names[seen], guess) == (colour, shape)
        if len(told) == 4:
            (x1, y1), (x2, y2) = centres
            assert {"above": y2 - y1, "below": y1 - y2, "left": x2 - x1, "right": x1 - x2}[caption.split()[3]] > 8


def test_held_out_pairs_never_occur_in_training_and_all_others_do():
    every = {(colour, shape) for colour in train_command.COLOURS for shape in train_command.SHAPES}
    held_out, rng = set(train_command.HELD_OUT), torch.Generator().manual_seed(0)
    for kind, expected in (("seen", every - held_out), ("held-out", held_out), ("all", every)):
        captions = [caption.split() for caption in train_command.Shapes(16, kind).batch(1000, rng)[1]]
        assert {(words[i], words[i + 1]) for words in captions for i in (1, -2)} == expected


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_folder_of_pictures_becomes_captions_and_images_half_of_them_mirrored_in_training(tmp_path, part):
    ramp = np.linspace(0, 100, 30)[None, :, None].repeat(40, 0).repeat(3, 2)
    for name, value in (("Sea_Lion/0.png", 0), ("frog/0.png", 150), ("frog/1.jpg", 150)):
        (tmp_path / part / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((ramp + value).astype(np.uint8)).save(tmp_path / part / name)
    flags = ["--dataset", "folder", "--data-dir", str(tmp_path)]
    data = train_command.load_data(train_command.fill_defaults(train_command.make_parser().parse_args(flags)), part)
    images, captions, _ = data.batch(64, torch.Generator().manual_seed(0))
    assert set(captions) == {"a photo of a sea lion", "a photo of a frog"} and images.shape == (64, 3, 32, 32)
    assert [image.mean() > 0 for image in images] == ["frog" in caption for caption in captions]
    low, high = {"train": (0.3, 0.7), "test": (0, 0)}[part]
    assert low <= np.mean([bool(image[0, 0, 0] > image[0, 0, -1]) for image in images]) <= high


# --- Training --------------------------------------------------------------------------------------------------------

TINY = ["--dataset", "shapes", "--image-size", "16", "--dim", "16", "--depth", "2", "--heads", "2", "--batch-size", "6"]
TINY += ["--patch-size", "4", "--timestep-regions", "3", "--device", "cpu", "--log-every", "2", "--save-every", "3"]


def steps_of(*flags: object):
    """The runs that the generator yields, with tiny settings and these flags."""
    settings = train_command.make_parser().parse_args([*TINY, *map(str, flags)])
    return train_command.train(train_command.fill_defaults(settings))


@pytest.mark.parametrize("target", [0.2, 0.5])
def test_mean_ratio_arrives_at_its_target(target):
    flags = ["--steps", 120, "--dense-steps", 0, "--patch-size", 2]
    for run in steps_of("--target-ratio", target, "--ratio-lr", 0.02, *flags):
        assert run.step or run.model.ratios.eq(0).all()
    ratios = run.model.ratios.detach()
    assert abs(float(ratios.mean()) - target) < 0.02 and ratios.std() > 0.001  # cells went different ways


def test_dense_steps_come_first_and_leave_routers_alone_and_losses_count_in_v_at_normal_noise_levels(monkeypatch):
    loss, seen = method.diffusion_loss, []

    def spy(model, images, words, mask, t, noise, route):
        seen.append((torch.ones(len(t), requires_grad=True), t, route))
        return seen[-1][0] + loss(model, images, words, mask, t, noise, route)

    monkeypatch.setattr(method, "diffusion_loss", spy)
    flags = ["--mode", "uniform", "--target-ratio", 0.25, "--noise", -0.5, 0.8]
    for run in steps_of("--steps", 4, "--dense-steps", 2, "--batch-size", 100, *flags):
        routers = [p for name, p in run.model.named_parameters() if "router" in name]
        assert run.model.ratios.eq(0.25 if run.step > 2 else 0).all()
        assert all(p.ne(0).any() == (run.step > 2) for p in routers)
    assert [route for _, _, route in seen] == [False, False, True, True]
    for losses, t, _ in seen:
        torch.testing.assert_close(losses.grad, torch.cos(t * math.acos(0.02)) ** -2 / len(t))
        level = torch.tan(t * math.acos(0.02)).log()  # strata: the quantiles are nearly exact
        torch.testing.assert_close(level[[16, 50, 84]], torch.tensor([-1.3, -0.5, 0.3]), rtol=0, atol=0.05)


def test_muon_has_the_matrices_of_the_layers_adamw_all_else_and_their_rates_rise_stay_and_fall():
    names = ("qkv", "attention_out", "caption_q", "caption_kv", "caption_out", "mlp.0", "mlp.2")
    matrices = [f"layers.{i}.layer.{name}.weight" for i in range(2) for name in names]
    for run in steps_of("--steps", 50):
        groups = run.muon.param_groups + run.adamw.param_groups
        if run.step:  # the n-th: up in 6 steps, down in the last 20
            share = min(1, run.step / 6, (51 - run.step) / 20)
            assert [group["lr"] for group in groups] == pytest.approx([share * peak for peak in (0.01, 0.024, 0.01)])
    of = {p: name for name, p in run.model.named_parameters()}
    muon, others, ratios = ([of[p] for p in group["params"]] for group in groups)
    assert muon == matrices and ratios == ["ratios"] and sorted(muon + others + ratios) == sorted(of.values())


def test_init_takes_the_image_layers_and_says_what_it_does_not_take(finished, tmp_path, capsys):
    init = finished / "checkpoint.pt"
    source = sample_command.read_checkpoint(init)[0].state_dict()
    run = next(steps_of("--init", init, "--steps", 1))
    assert all(torch.equal(source[name], z) for name, z in run.model.state_dict().items()) and source["ratios"].any()
    run = next(steps_of("--init", init, "--steps", 1, "--timestep-regions", 4))
    assert run.model.ratios.eq(0).all() and "ratio" in capsys.readouterr().err
    assert all(torch.equal(source[name], z) for name, z in run.model.state_dict().items() if name != "ratios")
    (tmp_path / "train" / "frog").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "train" / "frog" / "0.png")
    run = next(steps_of("--dataset", "folder", "--data-dir", tmp_path, "--init", init))
    assert "captions" in capsys.readouterr().err and run.model.config.vocabulary == ("a", "photo", "of", "frog")
    assert all(torch.equal(source[name], z) for name, z in run.model.state_dict().items() if name.startswith("layers."))


# --- The commands ----------------------------------------------------------------------------------------------------


def command(script: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    """Run a command of the project in a process of its own."""
    line = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **options)


def call(module, capsys, *arguments: object) -> tuple[int, str, str]:
    """The same in this process, which saves the start-up time: exit code, standard output, standard error."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        patch.setattr(signal, "signal", lambda *_: None)
        sample_command.run_command(module.main)
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
    return [json.loads(line) | {"seconds": 0} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_leaves_the_promised_files(finished):
    pictures, lines = {"ratios.png", "samples.png", "routing.png", "curves.png"}, lines_of(finished)
    assert {path.name for path in finished.iterdir()} == {"checkpoint.pt", "metrics.jsonl", "ratios.json"} | pictures
    assert [line["step"] for line in lines] == [2, 4, 6, 8] and lines[0]["mean_ratio"] == 0 < lines[-1]["mean_ratio"]
    for line in lines:
        found = [loss for loss in line["loss_by_region"] if loss is not None]
        assert min(found) <= line["loss"] <= max(found)
        assert np.shape(line["ratios"]) == (2, 3) and np.mean(line["ratios"]) == pytest.approx(
            line["mean_ratio"], abs=1e-4
        )
    assert json.loads((finished / "ratios.json").read_text())["ratios"] == lines[-1]["ratios"]
    assert all(min(Image.open(finished / name).size) > 100 for name in pictures)


@pytest.mark.parametrize("cut", [1, 2, 3, 6, 7])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(finished, tmp_path, cut, capsys):
    """Cut inside the dense part, at the switch, and inside the routed part; at a save, between saves, between logs."""
    for run in steps_of("--steps", 8, "--dense-steps", 2, "--ratio-lr", 0.05):
        if run.step and run.step % 2 == 0:
            train_command.write_metrics(run, tmp_path)
        if run.step == cut:
            break
    train_command.save_checkpoint(run, tmp_path / "checkpoint.pt")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss": 1}\n{"step": 100, "lo')  # written after the save
    assert call(train_command, capsys, "--out", tmp_path, "--resume")[0] == 0
    assert lines_of(tmp_path) == lines_of(finished)
    whole, resumed = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (finished, tmp_path))
    for key in ("model", "ema"):
        assert all(torch.equal(value, resumed[key][name]) for name, value in whole[key].items())
    for name in ("adamw", "muon"):
        moments = [[z for state in c[name]["state"].values() for z in state.values()] for c in (whole, resumed)]
        assert len(moments[0]) == len(moments[1]) > 0 and all(map(torch.equal, *moments))


def test_a_finished_run_can_be_extended_to_more_steps(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    assert call(train_command, capsys, "--out", tmp_path / "run", "--resume", "--steps", 12)[0] == 0
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [2, 4, 6, 8, 10, 12]


def test_killed_and_interrupted_runs_resume_from_a_whole_checkpoint(tmp_path):
    path, line = tmp_path / "checkpoint.pt", [sys.executable, str(HERE / "train_cifar.py"), *TINY]
    line += ["--out", str(tmp_path), "--steps", "4000", "--save-every", "1"]  # so that a kill often hits a save
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        before = path.stat().st_mtime_ns if path.exists() else 0
        flags = ["--resume"] if before else []
        process = subprocess.Popen(line + flags, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.time() + 60
        while process.poll() is None and time.time() < deadline:
            if path.exists() and path.stat().st_mtime_ns > before:
                break
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1].splitlines()[-1]
        step = sample_command.read_checkpoint(path, "model")[1]["step"]
        if number != signal.SIGKILL:
            assert process.returncode == 128 + number and "--resume" in error and f"step {step}," in error


def test_a_checkpoint_gives_identical_samples_in_a_new_process(finished, tmp_path):
    path, prompts = finished / "checkpoint.pt", ["a red circle", "a blue cross above a red square"]
    flags = ["--num", 2, "--steps", 4, "--seed", 3, "--guidance", 2, "--device", "cpu", "--out", tmp_path / "s.png"]
    flags += ["--npz", tmp_path / "s.npz", "--png-dir", tmp_path / "png", "--routing-map", "--batch-size", 3]
    result = command("sample.py", "--checkpoint", path, "--prompt", prompts[0], "--prompt", prompts[1], *flags)
    assert result.returncode == 0, result.stderr
    array, model = np.load(tmp_path / "s.npz")["arr_0"], sample_command.read_checkpoint(path)[0]
    captions = [prompts[0]] * 2 + [prompts[1]] * 2
    generate = sample_command.images_from_prompts
    expected = [generate(model, captions[a:b], 3, a, steps=4, guidance=2.0) for a, b in ((0, 3), (3, 4))]
    assert array.dtype == np.uint8 and np.array_equal(array, np.concatenate(expected))
    assert len(np.unique(array.reshape(4, -1), axis=0)) == 4
    assert all(np.array_equal(Image.open(tmp_path / "png" / f"{i:06d}.png"), array[i]) for i in range(4))
    assert (tmp_path / "s.png").exists() and (tmp_path / "s-routing.png").exists()
    assert "GFLOPs an image" in result.stdout and "mean ratio" in result.stdout


def test_the_counted_operations_agree_with_a_count_by_hand():
    config = method.Config(("a",), 32, 4, 64, 4, 2, 4)
    for ratio, k in ((0.0, 64), (0.25, 48), (0.5, 32)):
        d, n, w, p = 64, 64, 4, 4  # what a layer does for each token, and attention for each pair of tokens
        token = 2 * d * d * (3 + 1 + 1 + 1 + 8)
        layer = k * token + 2 * w * d * 2 * d + 4 * d * k * (k + w) + 2 * n * d  # the last: the router sees all tokens
        other = n * (2 * 7 * p * p * d + 2 * 3 * p * p * d) + 2 * d * d * (2 + 6 + 2)
        expected = 4 * (4 * layer + other) + 2 * w * (2 * d * d * (4 + 4) + 4 * d * w)  # four steps, captions once
        counted = sample_command.sampling_flops(config, torch.full((4, 1), ratio), 4, 1.0)
        assert counted == pytest.approx(expected, rel=0.01)


def test_the_routing_that_is_recorded_is_what_was_processed(finished):
    model, records, given = sample_command.read_checkpoint(finished / "checkpoint.pt")[0], [], []
    for layer in model.layers:
        torch.nn.init.normal_(layer.router.weight)
        for module in (layer.layer, layer):
            module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model.ratios.data.uniform_(0.1, 0.9)
    hooks = sample_command.record_routing(model, records)
    sample_command.images_from_prompts(model, ["a red circle", "a blue cross"], 0, steps=3)
    assert len(records) == len(hooks) * 3 == 6
    for (score, order), x, processed in zip(records, given[::2], given[1::2]):  # all tokens come in, these get on
        assert torch.equal(x.gather(1, order[..., None].expand_as(processed)), processed)
        assert torch.equal(score.topk(order.shape[1]).indices.sort().values, order.sort().values)


def test_tables_change_what_is_skipped_and_dense_skips_nothing(finished, tmp_path, capsys):
    start = ["--checkpoint", finished / "checkpoint.pt", "--steps", 4, "--out", tmp_path / "s.png"]
    low, high = ["--ratios", tmp_path / "low.json"], ["--ratios", tmp_path / "high.json"]
    low[1].write_text(json.dumps([[0.25] * 6] * 2)), high[1].write_text(json.dumps({"ratios": [[0.5], [0.75]]}))
    ratios = {"0.250": low, "0.625": high, "0.531": [*high, "--round-k", 5]}  # k = 8 and 4 become 10 and 5
    for expected, flags in (ratios | {"": ["--ratios", finished / "ratios.json"], "0.000": ["--dense"]}).items():
        code, output, error = call(sample_command, capsys, *start, *flags)
        assert code == 0 and f"mean ratio {expected}" in output, error
        assert ("0.0% fewer than dense" in output) == ("--dense" in flags)


def test_inpainting_keeps_the_known_pixels(finished, tmp_path, capsys):
    picture, mask = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8), np.zeros((16, 16), np.uint8)
    mask[3:9, 5:12] = 255
    Image.fromarray(picture).save(tmp_path / "p.png"), Image.fromarray(mask).save(tmp_path / "m.png")
    flags = ["--inpaint", tmp_path / "p.png", "--mask", tmp_path / "m.png", "--steps", 3, "--npz", tmp_path / "s.npz"]
    flags += ["--prompt", "a red circle", "--checkpoint", finished / "checkpoint.pt", "--out", tmp_path / "s.png"]
    assert call(sample_command, capsys, *flags)[0] == 0
    image = np.load(tmp_path / "s.npz")["arr_0"][0]
    assert np.array_equal(image[mask == 0], picture[mask == 0]) and (image != picture)[mask > 0].any()


def test_a_file_that_is_to_stand_in_for_the_method_and_is_not_there_is_one_clear_line():
    result = command("train_cifar.py", "--help", env=os.environ | {"DIFFRATIO_MOD": "none.py"})
    assert_refused((result.returncode, "", result.stderr), "DIFFRATIO_MOD=none.py")


# --- Bad input: one line, exit code 2, nothing lost ------------------------------------------------------------------


snapshot = lambda folder: {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, error = result
    line = error[error.rfind("error: ") :].removesuffix("\n")  # what follows a progress bar
    assert code == 2 and line.startswith("error: ") and line.isprintable() and error.endswith("\n"), error
    assert all(word in line for word in words), error


BAD = """
    train --dataset shape | shape cifar10
    train --dataset folder --data-dir nowhere | --data-dir nowhere
    train --dataset folder --data-dir broken | --data-dir broken
    train --dataset cifar10 --data-dir offline | --data-dir offline network
    train --patch-size 5 | 5 16
    train --steps 0 | --steps
    train --init nowhere.pt | nowhere.pt
    train --init taken/checkpoint.pt --dim 32 | --dim 16
    train --out taken | taken --resume
    train --out fresh --resume | fresh
    train --out taken --resume --lr 0.1 | --lr
    train --out taken --resume --steps 4 | --steps 8
    sample --checkpoint payload.pt | payload.pt code
    sample --checkpoint large.pt | large.pt
    sample --checkpoint missing.pt | missing.pt ratios
    sample --checkpoint nan.pt | nan.pt finite
    sample --checkpoint words.pt --prompt dragon | dragon
    sample --prompt bleu | blue circle above
    sample --guidance nan | --guidance
    sample --ratios nowhere.json | nowhere.json ratios.json
    sample --ratios rows.json | rows.json 2 rows
    sample --ratios one.json | one.json [0, 1)
    sample --ratios rows.json --dense | --dense
    sample --inpaint small.png | --mask
    sample --inpaint small.png --mask wide.png | small.png same size
    sample --inpaint junk.pt --mask wide.png | junk.pt
    sample --out junk.pt/s.png | junk.pt
"""


@pytest.mark.parametrize("case", BAD.strip().splitlines())
def test_bad_input_is_refused_in_one_line_and_nothing_is_lost(case, finished, tmp_path, monkeypatch, capsys):
    (script, *flags), words = (part.split() for part in case.split("|"))
    monkeypatch.chdir(tmp_path), shutil.copytree(finished, "taken")
    (tmp_path / "broken" / "train" / "frog").mkdir(parents=True)
    (tmp_path / "broken" / "train" / "frog" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    (tmp_path / "junk.pt").write_bytes(b"no checkpoint")
    no_network = lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    monkeypatch.setattr(train_command.torchvision.datasets.CIFAR10, "download", no_network)
    good = torch.load("taken/checkpoint.pt", weights_only=True)
    payload = type("Payload", (), {"__reduce__": lambda self: (Path.touch, (Path("executed"),))})()  # runs if unpickled
    changes = {"payload": {"payload": payload}, "large": {"config": good["config"] | {"dim": 2048, "depth": 1000}}}
    changes["missing"] = {"ema": {name: value for name, value in good["ema"].items() if name != "ratios"}}
    changes["nan"] = {"ema": {name: value / 0 for name, value in good["ema"].items()}}
    words_of = ["\x1b[2J", *good["config"]["vocabulary"][1:]]  # the first one would clear the screen
    changes["words"] = {"config": good["config"] | {"vocabulary": words_of}}
    [torch.save(good | change, f"{name}.pt") for name, change in changes.items()]
    for name, table in {"rows": [[0.1]], "one": [[0.1, 1], [0, 0]]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
    Image.new("RGB", (20, 20)).save("small.png"), Image.new("RGB", (30, 20)).save("wide.png")
    before, start = snapshot(tmp_path), [] if "--checkpoint" in flags else ["--checkpoint", "taken/checkpoint.pt"]
    if script == "train":
        start = ["--device", "cpu"] if "--resume" in flags or "--init" in flags else TINY
    assert_refused(call(train_command if script == "train" else sample_command, capsys, *start, *flags), *words)
    after = snapshot(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert not (tmp_path / "fresh").exists() and not (tmp_path / "executed").exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint_is_written(tmp_path, monkeypatch, capsys):
    loss, factors = method.diffusion_loss, torch.ones(40, 6)
    factors[3, -1], steps = math.inf, iter(factors)  # at the fourth step, in the noisiest sixth of its images
    monkeypatch.setattr(method, "diffusion_loss", lambda *z, **options: loss(*z, **options) * next(steps))
    result = call(train_command, capsys, *TINY, "--steps", 40, "--log-every", 3, "--noise", 3, 1, "--out", tmp_path)
    assert_refused(result, "not finite", "steps 4 to", "regions [3]", "saved before", "--lr")
    assert sample_command.read_checkpoint(tmp_path / "checkpoint.pt", "model")[1]["step"] == 3


def test_a_full_disk_leaves_the_older_files_whole_and_no_half_file(finished, tmp_path):
    """The limit on the size of files fails a write in the middle, as a full disk does, in a real process."""
    resource = pytest.importorskip("resource", reason="limits on file sizes need a Unix system")
    shutil.copytree(finished, tmp_path / "run")
    before, limit = snapshot(tmp_path), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
    result = command("train_cifar.py", "--out", tmp_path / "run", "--resume", "--steps", 9, preexec_fn=limit)
    assert_refused((result.returncode, "", result.stderr), "cannot write")
    after, metrics = snapshot(tmp_path), {str(tmp_path / "run" / "metrics.jsonl"): b""}  # where a line was added
    assert after | metrics == before | metrics
