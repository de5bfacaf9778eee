"""Tests of DiffRatio-MoD. Each is named after the property that it pins.

    python -m pytest                                        # everything, under 3 minutes on two CPU cores
    DIFFRATIO_MOD=my_solution.py python -m pytest -k method # the tests of the method, against another module

With DIFFRATIO_MOD, the module in that file stands in for diffratio_mod. It must have the same public names: Config,
InputError, Layer, RoutedLayer, DiT, ratio_gate, ratio_loss, column_of, tokens_processed, schedule, even_noise_levels,
diffusion_loss, sample.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).parent
if "DIFFRATIO_MOD" in os.environ:  # must be in place before the companions import it
    _spec = importlib.util.spec_from_file_location("diffratio_mod", os.environ["DIFFRATIO_MOD"])
    sys.modules["diffratio_mod"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["diffratio_mod"])

import diffratio_mod as method  # noqa: E402
import sample as sample_command  # noqa: E402
import train_cifar as train_command  # noqa: E402

WORDS = ("a", "red", "blue", "circle", "square")


def small_model(mode: str = "layer-timestep", seed: int = 0, **changes) -> method.DiT:
    """A small model whose weights are random everywhere but in the routers, which stay as they are at the start."""
    options = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 3, "heads": 2, "regions": 4, "caption_length": 4}
    model = method.DiT(method.Config(WORDS, mode=mode, **(options | changes)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "router" not in name and name != "ratios":
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def wake_routers(model: torch.nn.Module, seed: int = 1) -> None:
    """Give the routers random weights, so that their scores differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)


def small_batch(model: method.DiT, count: int = 8, seed: int = 2) -> dict:
    """Arguments for diffusion_loss."""
    generator = torch.Generator().manual_seed(seed)
    size = model.config.image_size
    images = torch.rand(count, 3, size, size, generator=generator) * 2 - 1
    return {
        "images": images,
        "words": model.config.encode(["a red circle"] * count),
        "mask": torch.ones(count, 1, size, size),
        "t": method.even_noise_levels(count, generator),
        "eps": torch.randn(images.shape, generator=generator),
    }


def small_tokens(model: method.DiT, count: int = 2, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, conditioning and caption for a single layer."""
    generator, dim = torch.Generator().manual_seed(seed), model.config.dim
    shapes = (count, model.config.tokens, dim), (count, 6, dim), (count, model.config.caption_length, dim)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


# --- routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["uniform", "layer", "layer-timestep"])
def test_method_zero_ratios_equal_dense_bit_for_bit(mode):
    for seed in range(3):
        model = small_model(mode, seed)
        batch = small_batch(model, seed=seed)
        with torch.no_grad():
            routed = method.diffusion_loss(model, **batch)
            dense = method.diffusion_loss(model, **batch, route=False)
            k = method.tokens_processed(model.ratios, model.config.tokens)[0]
            caption = model.encode_caption(batch["words"])
            inputs = (batch["eps"], batch["t"], caption, batch["images"], batch["mask"])
            assert torch.equal(model(*inputs, k=k), model(*inputs))
        if mode != "layer-timestep":  # with columns of their own, other images share a matrix product: last-bit changes
            assert torch.equal(routed, dense)
        assert torch.allclose(routed, dense, rtol=1e-5)


def naive_layer(layer: method.Layer, x: np.ndarray, condition: np.ndarray, caption: np.ndarray) -> np.ndarray:
    """What a DiT layer adds to each of its tokens, token by token in float64: x (n, D), one image."""
    w = {name: value.detach().double().numpy() for name, value in layer.state_dict().items()}
    dim, heads = x.shape[1], layer.heads
    size = dim // heads
    shift1, scale1, gate1, shift2, scale2, gate2 = condition + w["modulation"]

    def linear(name, token):
        return w[name + ".weight"] @ token + w[name + ".bias"]

    def norm(token):
        return (token - token.mean()) / math.sqrt(token.var() + 1e-6)

    def attend(query, keys, values):
        result = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            weights = [math.exp(query[part] @ key[part] / math.sqrt(size)) for key in keys]
            result.append(sum(w * value[part] for w, value in zip(weights, values)) / sum(weights))
        return np.concatenate(result)

    qkv = [linear("qkv", norm(token) * (1 + scale1) + shift1) for token in x]
    words = [linear("caption_kv", word) for word in caption]
    updates = []
    for token, (q, _, _) in zip(x, [np.split(z, 3) for z in qkv]):
        seen = attend(q, [np.split(z, 3)[1] for z in qkv], [np.split(z, 3)[2] for z in qkv])
        update = gate1 * linear("attention_out", seen)
        asked = linear("caption_q", norm(token + update))
        read = attend(asked, [word[:dim] for word in words], [word[dim:] for word in words])
        update = update + linear("caption_out", read)
        hidden = linear("mlp.0", norm(token + update) * (1 + scale2) + shift2)
        hidden = [0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) for z in hidden]
        updates.append(update + gate2 * linear("mlp.2", np.array(hidden)))
    return np.stack(updates)


@pytest.mark.parametrize("k", range(1, 17))
def test_method_routed_layer_equals_naive_reference_and_leaves_bypassed_tokens_bit_identical(k):
    model = small_model()
    wake_routers(model)
    layer = model.layers[1]
    x, condition, caption = small_tokens(model)
    with torch.no_grad():
        result = layer(x, condition, caption, k)
    for image in range(len(x)):
        token = x[image].double().numpy()
        weight, bias = (p.detach().double().numpy() for p in (layer.router.weight[0], layer.router.bias))
        score = 1 / (1 + np.exp(-(token @ weight + bias)))
        best = sorted(sorted(range(len(token)), key=lambda i: -score[i])[:k])
        update = naive_layer(layer.layer, token[best], *(z[image].double().numpy() for z in (condition, caption)))
        expected = token.copy()
        expected[best] += 2 * score[best, None] * update
        changed = [i for i in range(len(token)) if not torch.equal(result[image, i], x[image, i])]
        assert changed == best
        np.testing.assert_allclose(result[image].double().numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("k", [1, 5, 12, 15, 16])
def test_method_training_forward_equals_sampling_forward(k):
    model = small_model(image_size=32)  # 64 tokens: several lie beyond the boundary
    wake_routers(model)
    x, condition, caption = small_tokens(model)
    ratio = torch.tensor(1 - k / 64, requires_grad=True)
    training = model.layers[0](x, condition, caption, k, ratio)
    with torch.no_grad():
        sampling = model.layers[0](x, condition, caption, k)
    torch.testing.assert_close(training, sampling, rtol=1e-5, atol=1e-5)
    same = (training == x).all(dim=2)
    assert torch.equal(same, (sampling == x).all(dim=2)) and same.sum().item() == len(x) * (64 - k)


def test_method_ties_are_broken_alike_in_training_and_sampling():
    model = small_model(image_size=32)  # routers at their start: every score is 1/2
    x, condition, caption = small_tokens(model)
    ratio = torch.tensor(0.5, requires_grad=True)
    training = model.layers[0](x, condition, caption, 32, ratio)
    torch.testing.assert_close(training, model.layers[0](x, condition, caption, 32), rtol=1e-5, atol=1e-5)


def test_method_router_learns_only_through_the_gate_of_processed_tokens():
    model = small_model()
    wake_routers(model)
    layer = model.layers[0]
    x, condition, caption = small_tokens(model)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    (layer(x, condition, caption, 6, torch.tensor(0.6, requires_grad=True)) * direction).sum().backward()
    gradient = layer.router.bias.grad.clone()
    assert gradient.abs() > 1e-3
    # The same by hand: with the choice of tokens fixed, the gate is 2 * sigmoid, so d gate / d bias = gate * (1 - score).
    with torch.no_grad():
        score = torch.sigmoid(layer.router(x))
        gain = layer(x, condition, caption, 6) - x
        expected = (gain * (1 - score) * direction).sum()
    torch.testing.assert_close(gradient[0], expected, rtol=1e-3, atol=1e-4)


def test_method_hook_reports_the_tokens_that_were_processed():
    model = small_model()
    wake_routers(model)
    model.ratios.data.uniform_(0, 0.9)
    table, seen = method.tokens_processed(model.ratios, 16), []
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    words = model.config.encode(["a red circle", "a blue square"])
    method.sample(model, words, noise, steps=8, hook=lambda t, image, routing: seen.append((t, routing)))
    assert len(seen) == 8
    for t, routing in seen:
        k = table[method.column_of(t, 4)]
        assert [tuple(index.shape) for _, index in routing] == [(2, n) for n in k]
        for score, index in routing:
            bypassed = torch.ones_like(score).scatter(1, index, 0).bool()
            for row in range(2):
                assert bypassed[row].sum() == 16 - index.shape[1]
                if bypassed[row].any():
                    assert score[row, index[row]].min() >= score[row, bypassed[row]].max()


# --- ratios ----------------------------------------------------------------------------------------------------------


def test_method_ratio_gate_is_zero_with_the_slope_of_half_the_tokens():
    ratio = torch.tensor(0.37, requires_grad=True)
    gate = method.ratio_gate(ratio, 64, 4)
    assert gate.item() == 0
    (4 * gate).backward()  # four tokens beyond the boundary stand for the next one; N = 64 pass it; trapezoid: half
    assert ratio.grad.item() == pytest.approx(-32)


def test_method_tokens_processed_are_integers_that_fall_with_the_ratio():
    ratios = torch.linspace(0, 0.9999, 300).reshape(3, 100)
    table = method.tokens_processed(ratios, 64)
    assert len(table) == 100 and all(type(k) is int and 1 <= k <= 64 for column in table for k in column)
    by_layer = [column[0] for column in table] + [column[1] for column in table] + [column[2] for column in table]
    assert by_layer == sorted(by_layer, reverse=True) and by_layer[0] == 64 and by_layer[-1] == 1
    for k, ratio in zip(by_layer, ratios.flatten().tolist()):
        assert k == 1 or abs(64 * (1 - ratio) - k) <= 0.5 + 1e-4


def test_method_columns_cut_the_noise_levels_evenly_in_training_and_sampling():
    for columns in (1, 4, 10):
        for t in np.random.default_rng(0).uniform(1e-4, 1, 500):
            assert method.column_of(t, columns) == next(c for c in range(columns) if t <= (c + 1) / columns)
        steps = [method.column_of(1 - i / 40, columns) for i in range(40)]
        assert [steps.count(c) for c in range(columns)] == [40 // columns] * columns
        t = method.even_noise_levels(40, torch.Generator().manual_seed(0)).tolist()
        assert t == sorted(t) and 0 < t[0] and t[-1] < 1
        assert [[method.column_of(x, columns) for x in t].count(c) for c in range(columns)] == [40 // columns] * columns


def test_method_loss_by_regions_equals_one_image_at_a_time():
    model = small_model()
    wake_routers(model)
    model.ratios.data.uniform_(0, 0.9)
    batch = small_batch(model, 12)
    together = method.diffusion_loss(model, **batch)
    table = method.tokens_processed(model.ratios, 16)
    for i, t in enumerate(batch["t"].tolist()):
        image, eps = batch["images"][i], batch["eps"][i]
        angle = t * math.acos(0.02)
        noisy = math.cos(angle) * image + math.sin(angle) * eps
        caption = model.encode_caption(batch["words"][i : i + 1])
        k = table[math.ceil(t * 4) - 1]
        guess = model(noisy[None], batch["t"][i : i + 1], caption, image[None], batch["mask"][i : i + 1], k=k)
        assert together[i].item() == pytest.approx((guess[0] - eps).pow(2).mean().item(), rel=1e-4)


def test_method_ratio_loss_pulls_every_cell_alike_towards_the_target():
    ratios = torch.rand(3, 5, requires_grad=True)
    loss = method.ratio_loss(ratios, 0.3)
    assert loss.item() == pytest.approx((ratios.detach().numpy().mean() - 0.3) ** 2, rel=1e-5)
    loss.backward()
    expected = 2 * (ratios.detach().mean() - 0.3) / 15
    torch.testing.assert_close(ratios.grad, expected.expand(3, 5))


@pytest.mark.parametrize("bound", ["low", "high"])
def test_method_a_ratio_at_its_bound_comes_back_at_the_first_step_when_the_pull_turns(bound):
    model = small_model()
    sign, limit = (1, 0.0) if bound == "low" else (-1, 1 - 1 / 16)
    model.ratios.data.fill_(0.5)
    optimizer = torch.optim.SGD([model.ratios], lr=0.1)
    for _ in range(20):
        (sign * model.ratios.sum()).backward()
        optimizer.step(), optimizer.zero_grad(), model.clamp_ratios()
    assert torch.equal(model.ratios.data, torch.full_like(model.ratios, limit))
    assert {k for column in method.tokens_processed(model.ratios, 16) for k in column} == {16 if bound == "low" else 1}
    method.ratio_loss(model.ratios, 0.5).backward()  # the pull turns
    optimizer.step(), model.clamp_ratios()
    assert (sign * (model.ratios - limit) > 0).all()


def test_method_modes_differ_only_in_the_table():
    tables = {mode: small_model(mode).ratios for mode in ("dense", "uniform", "layer", "layer-timestep")}
    assert {mode: tuple(table.shape) for mode, table in tables.items()} == {
        "dense": (3, 1),
        "uniform": (3, 1),
        "layer": (3, 1),
        "layer-timestep": (3, 4),
    }
    assert {mode for mode, table in tables.items() if table.requires_grad} == {"layer", "layer-timestep"}
    names = [[name for name, _ in small_model(mode).named_parameters()] for mode in tables]
    assert names.count(names[0]) == 4 and all(table.eq(0).all() for table in tables.values())


# --- sampler ---------------------------------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """Predicts the noise exactly for data that are normal with a known mean and variance, pixel by pixel."""

    def __init__(self, mean: torch.Tensor, variance: float) -> None:
        super().__init__()
        self.config = method.Config(WORDS, image_size=16, mode="dense")
        self.ratios = torch.zeros(6, 1)
        self.mean, self.variance, self.captions = mean, variance, []

    def encode_caption(self, words):
        return words

    def forward(self, x, t, caption, known, mask, k=None, ratios=None, routing=None):
        self.captions.append(caption)
        signal, noise = (z.view(-1, 1, 1, 1) for z in method.schedule(t))
        return noise * (x - signal * self.mean) / (signal**2 * self.variance + noise**2)


def test_method_sampler_reproduces_a_known_distribution():
    mean = torch.linspace(-0.3, 0.3, 3).view(1, 3, 1, 1)
    noise = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    words = torch.ones(64, 8, dtype=torch.long)
    for steps, tolerance in ((20, 0.02), (50, 0.01)):
        images = method.sample(Oracle(mean, 0.15**2), words, noise, steps, guidance=1)
        assert (images.mean(dim=(0, 2, 3)) - mean.flatten()).abs().max() < tolerance
        assert (images.std(dim=(0, 2, 3)) - 0.15).abs().max() < tolerance


def test_method_guidance_one_is_the_plain_conditional_prediction():
    oracle = Oracle(torch.zeros(1, 3, 1, 1), 0.1)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    words = torch.ones(2, 8, dtype=torch.long)
    plain = method.sample(oracle, words, noise, 10, guidance=1)
    assert all(torch.equal(caption, words) for caption in oracle.captions)
    oracle.captions.clear()
    guided = method.sample(oracle, words, noise, 10, guidance=4)  # the oracle ignores captions: guidance changes nothing
    assert all(torch.equal(caption, torch.cat([words, 0 * words])) for caption in oracle.captions)
    torch.testing.assert_close(plain, guided, rtol=1e-4, atol=1e-4)


def test_method_guidance_moves_away_from_the_null_caption():
    model = small_model("dense")
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    words = model.config.encode(["a red circle"])
    with torch.no_grad():
        t, mask = torch.ones(1), torch.ones(1, 1, 16, 16)
        c, u = (model(noise, t, model.encode_caption(w), 0 * noise, mask) for w in (words, 0 * words))
        signal, sigma = method.schedule(t)
        expected = ((noise - sigma * (u + 2.5 * (c - u))) / signal).clamp(-1, 1)
    torch.testing.assert_close(method.sample(model, words, noise, 1, guidance=2.5), expected, rtol=1e-3, atol=1e-3)


def test_method_inpainting_returns_known_pixels_unchanged_and_never_sees_hidden_ones():
    model = small_model()
    generator = torch.Generator().manual_seed(0)
    known = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, 4:11, 3:9] = 1
    noise, words = torch.randn(2, 3, 16, 16, generator=generator), model.config.encode(["a red circle"] * 2)
    images = method.sample(model, words, noise, 5, known=known, mask=mask)
    inside = mask.bool().expand_as(images)
    assert torch.equal(images[~inside], known[~inside]) and not torch.equal(images[inside], known[inside])
    other = torch.where(inside, -known, known)
    assert torch.equal(images, method.sample(model, words, noise, 5, known=other, mask=mask))


def test_method_captions_and_config_refuse_what_they_cannot_hold():
    config = small_model().config
    assert config.encode(["A red  CIRCLE", ""]).tolist() == [[1, 2, 4, 0], [0, 0, 0, 0]]
    with pytest.raises(method.InputError, match=r"'green'.*a red blue circle square"):
        config.encode(["a green circle"])
    with pytest.raises(method.InputError, match="at most 4"):
        config.encode(["a red a red a"])
    for bad in ({"patch_size": 5}, {"heads": 3}, {"mode": "fast"}, {"regions": 0}, {"dim": 10**9}, {"depth": -1}):
        with pytest.raises(method.InputError):
            method.Config(WORDS, **bad)


# --- training --------------------------------------------------------------------------------------------------------


def small_run(out: Path, **changes) -> train_command.Run:
    """A training run on small shapes, as the command would start it."""
    given = {"dataset": "shapes", "image-size": 16, "dim": 32, "depth": 3, "heads": 2, "patch-size": 2}
    given |= {"batch-size": 16, "timestep-regions": 4, "steps": 20, "device": "cpu", "out": str(out)}
    return train_command.start(given | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learned for a while at one fixed ratio, so that skipping more tokens costs something."""
    options = {"mode": "uniform", "target-ratio": 0.4, "steps": 400, "batch-size": 32, "dense-fraction": 0.5}
    run = small_run(tmp_path_factory.mktemp("trained"), **options)
    while run.step < 400:
        run.train_step()
    return run


def test_method_gradient_of_a_ratio_agrees_with_the_finite_difference_in_k(trained):
    """The gradient of one pass against the loss at k - 3 and k + 3 tokens, for each layer and region."""
    model = method.DiT(method.Config(trained.config.vocabulary, 16, 2, 32, 3, 2, 8, "layer-timestep", 4))
    model.load_state_dict(trained.model.state_dict() | {"ratios": torch.full((3, 4), 0.4)})
    generator, rounds, size = torch.Generator().manual_seed(7), 6, 128
    slope = torch.zeros(3, 4)
    for _ in range(rounds):
        images, captions, _ = trained.data.batch(size, generator)
        batch = {"images": images, "words": model.config.encode(captions), "mask": torch.ones(size, 1, 16, 16)}
        batch |= {"t": method.even_noise_levels(size, generator), "eps": torch.randn(images.shape, generator=generator)}
        (method.diffusion_loss(model, **batch).mean() / rounds).backward()
        with torch.no_grad():
            for layer in range(3):
                ends = []
                for shift in (3 / 64, -3 / 64):
                    model.ratios[layer] += shift
                    ends.append(method.diffusion_loss(model, **batch).reshape(4, -1).sum(dim=1) / size)
                    model.ratios[layer] -= shift
                slope[layer] += (ends[0] - ends[1]) / (6 / 64) / rounds
    gradient = model.ratios.grad
    assert (gradient[slope.abs() > slope.max() / 20] > 0).all() and (slope > -slope.max() / 20).all()
    assert 0.5 < gradient.sum() / slope.sum() < 2
    assert np.corrcoef(gradient.flatten(), slope.flatten())[0, 1] > 0.6


def test_mean_ratio_arrives_at_its_target_and_zero_steps_leave_it_at_zero(tmp_path):
    for target in (0.2, 0.5):
        run = small_run(tmp_path, **{"steps": 120, "dense-fraction": 0, "target-ratio": target, "ratio-lr": 0.02})
        assert run.model.ratios.eq(0).all() and run.ema.ratios.eq(0).all()
        while run.step < 120:
            run.train_step()
        assert abs(float(run.model.ratios.detach().mean()) - target) < 0.02
        assert run.model.ratios.detach().std() > 0.005  # and the cells went different ways
        assert torch.equal(run.ema.ratios, run.model.ratios)


def test_dense_part_leaves_routers_and_ratios_untouched_and_uniform_gets_the_target(tmp_path):
    run = small_run(tmp_path, **{"steps": 4, "dense-fraction": 0.5, "mode": "uniform", "target-ratio": 0.25})
    for _ in range(2):
        run.train_step()
        routers = [p for name, p in run.model.named_parameters() if "router" in name]
        assert run.model.ratios.eq(0).all() and all(p.eq(0).all() for p in routers)
    run.train_step()
    assert run.model.ratios.eq(0.25).all() and all(p.ne(0).any() for p in routers)


def test_init_from_a_dense_checkpoint_starts_as_that_dense_model(trained, tmp_path):
    dense = small_run(tmp_path / "dense", mode="dense", steps=3)
    dense.out.mkdir()
    while dense.step < 3:
        dense.train_step()
    dense.save()
    routed = small_run(tmp_path / "routed", init=str(dense.out / "checkpoint.pt"))
    options = {"seed": 5, "steps": 4}
    assert np.array_equal(
        sample_command.generate(dense.ema, ["a red circle"], **options),
        sample_command.generate(routed.ema, ["a red circle"], **options),
    )
    assert routed.model.ratios.shape == (3, 4) and routed.model.ratios.requires_grad


# --- data ------------------------------------------------------------------------------------------------------------


def test_shapes_caption_mask_and_picture_agree():
    data, generator = train_command.Shapes(32), torch.Generator().manual_seed(0)
    images, captions, masks = data.batch(400, generator)
    assert images.min() >= -1 and images.max() <= 1 and masks.min() >= 0 and masks.max() <= 1
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    colours = torch.tensor(list(train_command.COLOURS.values()))
    for image, caption, pair in zip((images + 1) / 2, captions, masks):
        words = caption.split()
        told = [(words[1], words[2])] + ([(words[-2], words[-1])] if len(words) > 3 else [])
        assert (pair.sum(dim=(1, 2)) > 10).tolist() == [True, len(told) == 2]
        assert (pair.sum(dim=0) <= 1 + 1e-6).all()  # objects do not overlap
        centres = []
        for mask, (colour, shape) in zip(pair, told):
            core = mask > 0.99
            seen = list(train_command.COLOURS)[(image[:, core].mean(dim=1) - colours).abs().sum(dim=1).argmin()]
            assert seen == colour
            rows, columns = mask.sum(dim=1), mask.sum(dim=0)
            extent = (rows > 0).nonzero().flatten().float()
            lopsided = ((mask * y).sum() / mask.sum() - extent.mean()) / len(extent) > 0.09  # triangles: 1/6
            share = mask.sum() / (rows.max() * columns.max())  # of its bounding box: 0.56 for a cross, 0.79, 1
            guess = "triangle" if lopsided else "cross" if share < 0.68 else "circle" if share < 0.9 else "square"
            assert guess == shape
            centres.append(((mask * x).sum() / mask.sum(), (mask * y).sum() / mask.sum()))
        if len(told) == 2:
            (x1, y1), (x2, y2) = centres
            truth = {"above": y2 - y1, "below": y1 - y2, "left": x2 - x1, "right": x1 - x2}
            assert truth[words[3]] > 8


def test_shapes_held_out_pairs_never_occur_in_training_and_all_others_do():
    generator = torch.Generator().manual_seed(0)
    for kind in ("seen", "held-out"):
        told = set()
        for _ in range(10):
            for caption in train_command.Shapes(16, kind).batch(100, generator)[1]:
                words = caption.split()
                told |= {(words[1], words[2]), (words[-2], words[-1])}
        every = {(c, s) for c in train_command.COLOURS for s in train_command.SHAPES}
        held_out = set(train_command.HELD_OUT)
        assert told == (held_out if kind == "held-out" else every - held_out) and len(held_out) == 4


def test_masks_for_training_are_all_ones_or_one_box():
    masks = train_command.random_masks(400, 32, torch.Generator().manual_seed(0))
    whole = [bool(mask.all()) for mask in masks]
    assert 0.6 < np.mean(whole) < 0.9
    for mask in masks[:, 0]:
        rows, columns = mask.any(dim=1).float(), mask.any(dim=0).float()
        assert torch.equal(mask, rows[:, None] * columns) and 0 < mask.sum()


def test_folder_of_pictures_becomes_captions_and_images(tmp_path):
    for name, value in (("Sea_Lion", 10), ("frog", 200)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            size = (40 + 10 * i, 30)
            Image.new("RGB", size, (value, 0, 0)).save(tmp_path / "train" / name / f"{i}.{'png' if i else 'jpg'}")
    data = train_command.load_folder(tmp_path, 16)
    images, captions, _ = data.batch(64, torch.Generator().manual_seed(0))
    assert set(captions) == {"a photo of a sea lion", "a photo of a frog"} and images.shape == (64, 3, 16, 16)
    for image, caption in zip(images, captions):
        assert (image[0].mean() > 0) == ("frog" in caption)
