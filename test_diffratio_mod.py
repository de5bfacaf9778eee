"""Tests of DiffRatio-MoD. Each is named after the property that it pins.

    python -m pytest                                        # everything, under 3 minutes on two CPU cores
    DIFFRATIO_MOD=my_solution.py python -m pytest -k method # the tests of the method, against another module

With DIFFRATIO_MOD, the module in that file stands in for diffratio_mod. It must have the same public names: MODES,
Config, InputError, Layer, RoutedLayer, DiT, ratio_gate, ratio_loss, column_of, tokens_processed, schedule, even_noise_levels,
diffusion_loss, sample.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pickle
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

import diffratio_mod as method
import sample as sample_command
import train_cifar as train_command

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
        "words": sample_command.encode(model.config, ["a red circle"] * count),
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
        hidden = [0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in hidden]  # exact GELU
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


@pytest.mark.parametrize("training", [True, False])
def test_method_router_learns_only_through_the_gate_of_processed_tokens(training):
    model = small_model(image_size=32)
    wake_routers(model)
    layer, k = model.layers[0], 40
    x, condition, caption = small_tokens(model)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    ratio = torch.tensor(0.6, requires_grad=True) if training else None
    (layer(x, condition, caption, k, ratio) * direction).sum().backward()
    # The same by hand: with the choice of tokens fixed, gate = 2 * score, and d gate / d bias = gate * (1 - score).
    with torch.no_grad():
        score = torch.sigmoid(layer.router(x))
        order = score.squeeze(2).argsort(dim=1, descending=True, stable=True)[:, :k, None]
        taken = x.gather(1, order.expand(-1, -1, x.shape[2]))
        update = torch.zeros_like(x).scatter(1, order.expand_as(taken), layer.layer(taken, condition, caption, keys=k))
        expected = (2 * score * (1 - score) * update * direction).sum()
    torch.testing.assert_close(layer.router.bias.grad[0], expected, rtol=1e-3, atol=1e-3)
    assert expected.abs() > 0.1


def test_method_hook_reports_the_tokens_that_were_processed():
    model = small_model()
    wake_routers(model)
    model.ratios.data.uniform_(0, 0.9)
    table, seen = method.tokens_processed(model.ratios, 16), []
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    words = sample_command.encode(model.config, ["a red circle", "a blue square"])
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
        scale, sigma = (z.view(-1, 1, 1, 1) for z in method.schedule(t))
        return sigma * (x - scale * self.mean) / (scale**2 * self.variance + sigma**2)


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
    guided = method.sample(
        oracle, words, noise, 10, guidance=4
    )  # the oracle ignores captions: guidance changes nothing
    assert all(torch.equal(caption, torch.cat([words, 0 * words])) for caption in oracle.captions)
    torch.testing.assert_close(plain, guided, rtol=1e-4, atol=1e-4)


def test_method_guidance_moves_away_from_the_null_caption():
    model = small_model("dense")
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    words = sample_command.encode(model.config, ["a red circle"])
    with torch.no_grad():
        t, mask = torch.ones(1), torch.ones(1, 1, 16, 16)
        c, u = (model(noise, t, model.encode_caption(w), 0 * noise, mask) for w in (words, 0 * words))
        scale, sigma = method.schedule(t)
        expected = ((noise - sigma * (u + 2.5 * (c - u))) / scale).clamp(-1, 1)
    torch.testing.assert_close(method.sample(model, words, noise, 1, guidance=2.5), expected, rtol=1e-3, atol=1e-3)


def test_method_inpainting_returns_known_pixels_unchanged_and_never_sees_hidden_ones():
    model = small_model()
    generator = torch.Generator().manual_seed(0)
    known = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, 4:11, 3:9] = 1
    noise = torch.randn(2, 3, 16, 16, generator=generator)
    words = sample_command.encode(model.config, ["a red circle"] * 2)
    images = method.sample(model, words, noise, 5, known=known, mask=mask)
    inside = mask.bool().expand_as(images)
    assert torch.equal(images[~inside], known[~inside]) and not torch.equal(images[inside], known[inside])
    other = torch.where(inside, -known, known)
    assert torch.equal(images, method.sample(model, words, noise, 5, known=other, mask=mask))


def test_method_captions_and_config_refuse_what_they_cannot_hold():
    config = small_model().config
    assert sample_command.encode(config, ["A red  CIRCLE", ""]).tolist() == [[1, 2, 4, 0], [0, 0, 0, 0]]
    with pytest.raises(method.InputError, match=r"'green'.*a red blue circle square"):
        sample_command.encode(config, ["a green circle"])
    with pytest.raises(method.InputError, match="at most 4"):
        sample_command.encode(config, ["a red a red a"])
    for bad in ({"patch_size": 5}, {"heads": 3}, {"mode": "fast"}, {"dim": 126, "heads": 2}):
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
        batch = {
            "images": images,
            "words": sample_command.encode(model.config, captions),
            "mask": torch.ones(size, 1, 16, 16),
        }
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
    for side in (0, 1):  # for each region, and for each layer: skipping more costs something, and the gradient says so
        assert (slope.sum(dim=side) > 0).all() and (gradient.sum(dim=side) > 0).all()
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


def test_models_on_the_way_are_kept_at_the_ratio_that_their_names_say(tmp_path):
    options = {"steps": 60, "dense-fraction": 0, "target-ratio": 0.35, "ratio-lr": 0.02}
    run = small_run(tmp_path, **options, **{"keep-every": 0.1})
    averages = {}  # the last one after each rise past a multiple of 0.1
    before = 0.0
    while run.step < 60:
        run.train_step()
        mean = float(run.ema.ratios.detach().mean())
        for level in (0.1, 0.2, 0.3, 0.4, 0.5):
            if before < level <= mean:
                averages[level] = {name: value.clone() for name, value in run.ema.state_dict().items()}
        before = mean
    assert set(averages) >= {0.1, 0.2, 0.3}
    assert {path.name for path in tmp_path.iterdir()} == {f"ratio-{level}.pt" for level in averages}
    for level, average in averages.items():
        path = tmp_path / f"ratio-{level}.pt"
        model = sample_command.build_model(sample_command.read_checkpoint(path), path)
        assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())


def test_dense_part_leaves_routers_and_ratios_untouched_and_uniform_gets_the_target(tmp_path):
    run = small_run(tmp_path, **{"steps": 4, "dense-fraction": 0.5, "mode": "uniform", "target-ratio": 0.25})
    for _ in range(2):
        run.train_step()
        routers = [p for name, p in run.model.named_parameters() if "router" in name]
        assert run.model.ratios.eq(0).all() and all(p.eq(0).all() for p in routers)
    run.train_step()
    assert run.model.ratios.eq(0.25).all() and all(p.ne(0).any() for p in routers)


def test_each_part_of_training_weighs_the_loss_by_its_own_power_of_the_signal(tmp_path, monkeypatch):
    powers = {"noise-weight": 2.0, "routed-noise-weight": 0.5}
    run = small_run(tmp_path, **{"steps": 2, "dense-fraction": 0.5, **powers})
    seen = []

    def one_for_each_image(model, images, words, mask, t, noise, route):
        seen.append((torch.ones(len(t), requires_grad=True), t, route))
        return seen[-1][0] + 0 * model.out.bias.sum()

    monkeypatch.setattr(train_command, "diffusion_loss", one_for_each_image)
    run.train_step()
    run.train_step()
    assert [route for _, _, route in seen] == [False, True]
    for (losses, t, _), power in zip(seen, powers.values()):
        expected = [np.cos(level * np.arccos(0.02)) ** -power / len(t) for level in t.tolist()]
        np.testing.assert_allclose(losses.grad, expected, rtol=1e-4)


def test_init_from_a_dense_checkpoint_starts_as_that_dense_model(tmp_path):
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
    for kind in ("seen", "held-out", "all"):
        told = set()
        for _ in range(10):
            for caption in train_command.Shapes(16, kind).batch(100, generator)[1]:
                words = caption.split()
                told |= {(words[1], words[2]), (words[-2], words[-1])}
        every = {(c, s) for c in train_command.COLOURS for s in train_command.SHAPES}
        held_out = set(train_command.HELD_OUT)
        expected = {"seen": every - held_out, "held-out": held_out, "all": every}
        assert told == expected[kind] and len(held_out) == 4


def test_masks_for_training_are_all_ones_or_one_box():
    masks = train_command.random_masks(400, 32, torch.Generator().manual_seed(0))
    whole = [bool(mask.all()) for mask in masks]
    assert 0.6 < np.mean(whole) < 0.9
    for mask in masks[:, 0]:
        rows, columns = mask.any(dim=1).float(), mask.any(dim=0).float()
        assert torch.equal(mask, rows[:, None] * columns) and 0 < mask.sum()


@pytest.mark.parametrize("regions, n", [(10, 2), (10, 5), (5, 2), (10, 3), (1, 2)])
def test_every_nth_region_takes_one_of_n_neighbours_and_all_in_turn(regions, n):
    t = method.even_noise_levels(30 * regions, torch.Generator().manual_seed(0))
    total = np.zeros(regions, int)
    for step in range(n):
        moved = train_command.every_nth_region(t, regions, n, step)
        assert (moved.diff() >= 0).all()  # diffusion_loss needs them ascending
        counts = np.bincount([method.column_of(level, regions) for level in moved.tolist()], minlength=regions)
        whole = regions // n * n  # the regions that have n - 1 neighbours; those left over are taken at every step
        expected = [30 * n * (c % n == step) if c < whole else 30 for c in range(regions)]
        assert counts.tolist() == expected
        total += counts
    assert (total == 30 * n).all()


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


# --- the commands ----------------------------------------------------------------------------------------------------

TINY = ["--dataset", "shapes", "--image-size", "16", "--dim", "16", "--depth", "2", "--heads", "2", "--batch-size", "6"]
TINY += ["--patch-size", "4", "--timestep-regions", "3", "--device", "cpu", "--log-every", "2", "--save-every", "3"]


def command(script: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    """Run a command of the project in a process of its own."""
    line = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **options)


def call(module, monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """The same in this process, which saves the start-up time: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    monkeypatch.setattr(train_command.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        sample_command.run_command(module.main)
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that the real command made: two dense steps, then routing."""
    out = tmp_path_factory.mktemp("runs") / "shapes"
    arguments = ["--steps", 8, "--dense-fraction", 0.25, "--ratio-lr", 0.05, "--out", out]
    result = command("train_cifar.py", *TINY, *arguments)
    assert result.returncode == 0, result.stderr
    return out


def test_training_command_leaves_the_promised_files(finished):
    names = {"checkpoint.pt", "metrics.jsonl", "ratios.json", "ratios.png", "samples.png", "routing.png"}
    assert {path.name for path in finished.iterdir()} == names
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for line in lines:
        assert set(line) >= {"loss", "loss_by_region", "mean_ratio", "seconds"} and len(line["loss_by_region"]) == 3
        assert line["loss"] == pytest.approx(np.mean(line["loss_by_region"]))  # regions have equal shares of a batch
    assert lines[0]["mean_ratio"] == 0 < lines[-1]["mean_ratio"]
    table = json.loads((finished / "ratios.json").read_text())
    assert np.shape(table["ratios"]) == (2, 3) and np.mean(table["ratios"]) == pytest.approx(table["mean"], abs=1e-4)
    for name in ("ratios", "samples", "routing"):
        assert min(Image.open(finished / f"{name}.png").size) > 100


def test_checkpoint_gives_identical_samples_in_a_new_process(finished, tmp_path):
    path = finished / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    model = method.DiT(method.Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["ema"])
    options = ["--num", 2, "--steps", 4, "--seed", 3, "--guidance", 2, "--device", "cpu", "--out", tmp_path / "s.png"]
    prompts = ["--prompt", "a red circle", "--prompt", "a blue cross above a red square"]
    extra = ["--npz", tmp_path / "s.npz", "--png-dir", tmp_path / "png", "--routing-map", "--batch-size", 3]
    result = command("sample.py", "--checkpoint", path, *prompts, *options, *extra, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    array = np.load(tmp_path / "s.npz")["arr_0"]
    assert array.shape == (4, 16, 16, 3) and array.dtype == np.uint8
    captions = ["a red circle"] * 2 + ["a blue cross above a red square"] * 2
    expected = np.concatenate([
        sample_command.generate(model.eval(), part, 3, first, steps=4, guidance=2.0)
        for part, first in ((captions[:3], 0), (captions[3:], 3))
    ])  # fmt: skip
    assert np.array_equal(array, expected)
    assert len(np.unique(array.reshape(4, -1), axis=0)) == 4
    for i in range(4):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / f"{i:06d}.png")), array[i])
    assert (tmp_path / "s.png").exists() and (tmp_path / "s-routing.png").exists()
    assert "GFLOPs an image" in result.stdout and "mean ratio" in result.stdout


def test_versions_tell_what_made_a_checkpoint(finished, monkeypatch, capsys):
    path = finished / "checkpoint.pt"
    code, output, _ = call(sample_command, monkeypatch, capsys, "--checkpoint", path, "--versions")
    (made,) = json.loads(output)
    assert code == 0 and made["torch"] == torch.__version__
    assert "train_cifar.py" in made["command"] and "--steps 8" in made["command"]


def test_sampling_depends_on_the_seed_and_not_on_the_batch():
    model = small_model()
    make = lambda seed, *slices: [
        sample_command.generate(model, ["a red circle"] * (b - a), seed, a, steps=3) for a, b in slices
    ]
    whole = make(0, (0, 5))[0].astype(int)
    assert np.array_equal(whole, make(0, (0, 5))[0]) and not np.array_equal(whole, make(1, (0, 5))[0])
    assert np.abs(whole - np.concatenate(make(0, (0, 2), (2, 5)))).max() <= 1


def test_flop_counter_agrees_with_the_share_of_tokens_that_layers_process():
    model = small_model(image_size=32, dim=64, depth=4)
    flops = [sample_command.sampling_flops(model, 4, 1.0, torch.full((4, 1), r)) for r in (0.0, 0.25, 0.5)]
    assert flops[0] > flops[1] > flops[2]
    # By hand for one pass: what a layer does for each token, and what attention does for each pair of tokens.
    d, n, w, p = 64, 64, 4, 4
    for total, k in zip(flops, (64, 48, 32)):
        token = 2 * d * d * (3 + 1 + 1 + 1 + 8)
        layer = k * token + 2 * w * d * 2 * d + 4 * d * k * (k + w) + 2 * n * d  # the last: the router sees all tokens
        other = n * (2 * 7 * p * p * d + 2 * 3 * p * p * d) + 2 * d * d * (2 + 6 + 2)
        encoder = 2 * w * (2 * d * d * (4 + 4) + 4 * d * w)
        assert total == pytest.approx(4 * (4 * layer + other) + encoder, rel=0.01)


def test_ratio_file_changes_what_is_skipped_and_dense_skips_nothing(finished, tmp_path, monkeypatch, capsys):
    start = ["--checkpoint", finished / "checkpoint.pt", "--steps", 4, "--out", tmp_path / "s.png"]
    outputs = {}
    for name, table in (("low", [[0.25] * 6] * 2), ("high", {"ratios": [[0.5], [0.75]]})):
        (tmp_path / "t.json").write_text(json.dumps(table))
        outputs[name] = call(sample_command, monkeypatch, capsys, *start, "--ratios", tmp_path / "t.json")
    outputs["dense"] = call(sample_command, monkeypatch, capsys, *start, "--dense")
    outputs["own"] = call(sample_command, monkeypatch, capsys, *start, "--ratios", finished / "ratios.json")
    assert [code for code, _, _ in outputs.values()] == [0, 0, 0, 0]
    assert "mean ratio 0.250" in outputs["low"][1] and "mean ratio 0.625" in outputs["high"][1]
    fives = call(sample_command, monkeypatch, capsys, *start, "--ratios", tmp_path / "t.json", "--round-k", 5)
    assert fives[0] == 0 and "mean ratio 0.531" in fives[1]  # of 16 tokens, k = 8 and 4 become 10 and 5
    assert "mean ratio 0.000" in outputs["dense"][1] and "0.0% fewer" in outputs["dense"][1]


def test_inpainting_command_keeps_the_known_pixels(finished, tmp_path, monkeypatch, capsys):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[3:9, 5:12] = 255
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    code, _, error = call(
        *(sample_command, monkeypatch, capsys, "--checkpoint", finished / "checkpoint.pt", "--prompt", "a red circle"),
        *("--inpaint", tmp_path / "picture.png", "--mask", tmp_path / "mask.png", "--steps", 3),
        *("--npz", tmp_path / "s.npz", "--out", tmp_path / "s.png"),
    )
    assert code == 0, error
    image = np.load(tmp_path / "s.npz")["arr_0"][0]
    assert np.array_equal(image[mask == 0], picture[mask == 0])
    assert not np.array_equal(image[mask > 0], picture[mask > 0])


@pytest.mark.parametrize("cut", [1, 2, 3, 6, 7])
def test_resumed_run_equals_an_unbroken_one_bit_for_bit(finished, tmp_path, cut, monkeypatch, capsys):
    """Cut inside the dense part, at the switch, and inside the routed part; at a save, between saves, between logs."""
    whole = torch.load(finished / "checkpoint.pt", weights_only=True)
    out = tmp_path / "run"
    run = train_command.start({k: v for k, v in whole["settings"].items()} | {"out": str(out)})
    out.mkdir()
    while run.step < cut:
        run.train_step()
        if run.step % 2 == 0:
            run.log()
    run.save()
    (out / "metrics.jsonl").open("a").write('{"step": 99, "loss": 1}\n{"step": 100, "lo')  # written after the save
    code, _, error = call(train_command, monkeypatch, capsys, "--dataset", "shapes", "--out", out, "--resume")
    assert code == 0, error
    resumed = torch.load(out / "checkpoint.pt", weights_only=True)
    for key in ("model", "ema"):
        assert all(torch.equal(value, resumed[key][name]) for name, value in whole[key].items())
    moments = [[z for state in c["optimizer"]["state"].values() for z in state.values()] for c in (whole, resumed)]
    assert len(moments[0]) == len(moments[1]) > 0 and all(map(torch.equal, *moments))
    lines = [
        [{**json.loads(line), "seconds": 0} for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (finished, out)
    ]
    assert lines[0] == lines[1]


def test_a_run_that_never_saved_leaves_no_lines_to_the_next(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n')
    code, _, error = call(train_command, monkeypatch, capsys, *TINY, "--steps", 2, "--out", tmp_path / "run")
    assert code == 0, error
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2] and "loss" in lines[0]


def test_killed_and_interrupted_runs_resume_from_a_whole_checkpoint(tmp_path):
    out = tmp_path / "run"
    line = [sys.executable, str(HERE / "train_cifar.py"), *TINY, "--out", str(out), "--steps", "4000"]
    line[line.index("--save-every") + 1] = "1"  # saving all the time, so that a kill often hits a save
    signals = (signal.SIGKILL, 0.7), (signal.SIGKILL, 0.2), (signal.SIGINT, 0.1), (signal.SIGTERM, 0.1)
    for attempt, (number, delay) in enumerate(signals):
        resume = ["--resume"] if attempt else []
        process = subprocess.Popen(line + resume, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = (out / "checkpoint.pt").stat().st_mtime_ns if attempt else 0
        deadline = time.time() + 60
        while process.poll() is None and time.time() < deadline:
            if (out / "checkpoint.pt").exists() and (out / "checkpoint.pt").stat().st_mtime_ns > before:
                break
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), error
        checkpoint = sample_command.read_checkpoint(out / "checkpoint.pt")
        sample_command.build_model(checkpoint, out / "checkpoint.pt", "model")
        if number != signal.SIGKILL:
            assert "--resume" in error.splitlines()[-1] and f"step {checkpoint['step']}" in error.splitlines()[-1]


# --- bad input -------------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, error = result
    error = error.split("mean ratio")[-1].split("]\n")[-1]  # what follows a progress bar
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "shape"], ["shape", "cifar10"]),
        (["--dataset", "folder", "--data-dir", "nowhere"], ["nowhere", "train"]),
        (["--dataset", "folder", "--data-dir", "empty"], ["empty", "<class>"]),
        (["--dataset", "folder", "--data-dir", "broken"], ["frog", "0.png"]),
        (["--dataset", "cifar10", "--data-dir", "offline"], ["--data-dir", "--dataset shapes"]),
        (["--target-ratio", "1"], ["--target-ratio", "[0, 1)"]),
        (["--target-ratio", "-0.1"], ["--target-ratio"]),
        (["--target-ratio", "nan"], ["--target-ratio"]),
        (["--patch-size", "5"], ["5", "16"]),
        (["--heads", "3"], ["heads"]),
        (["--mode", "fast"], ["layer-timestep"]),
        (["--steps", "many"], ["--steps"]),
        (["--steps", "-1"], ["--steps"]),
        (["--timestep-regions", "0"], ["regions"]),
        (["--lr", "inf"], ["--lr"]),
        (["--device", "tpu"], ["tpu", "cpu"]),
        (["--init", "nowhere.pt"], ["nowhere.pt"]),
        (["--init", "junk.pt"], ["junk.pt"]),
        (["--out", "taken"], ["taken", "--resume"]),
        (["--out", "fresh", "--resume"], ["fresh"]),
        (["--out", "taken", "--resume", "--lr", "0.1"], ["--lr"]),
        (["--out", "junk.pt"], ["junk.pt"]),
        (["--lr", "1", "--steps", "40"], ["not finite", "--lr"]),
        (["--flag"], ["--flag"]),
    ],
)
def test_training_refuses_bad_input_in_one_line_and_loses_nothing(
    arguments, words, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "taken")
    (tmp_path / "empty" / "train" / "frog").mkdir(parents=True)
    (tmp_path / "broken" / "train" / "frog").mkdir(parents=True)
    (tmp_path / "broken" / "train" / "frog" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    (tmp_path / "junk.pt").write_bytes(b"no checkpoint")

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(train_command.torchvision.datasets.CIFAR10, "download", no_network)
    if "not finite" in words:  # a loss that becomes infinite in one region, at a step of its own
        monkeypatch.setattr(train_command, "diffusion_loss", lossy(train_command.diffusion_loss, after=3))
        words = [*words, "step 3", "regions: [2]"]
    before = snapshot(tmp_path)
    assert_refused(call(train_command, monkeypatch, capsys, *TINY, *arguments), *words)
    after = snapshot(tmp_path)
    assert {path: after.get(path) for path in before} == before


def lossy(diffusion_loss, after: int):
    calls = []

    def loss(*arguments, **options):
        calls.append(1)
        losses = diffusion_loss(*arguments, **options)
        return losses * torch.tensor([1, 1, 1, math.inf, 1, 1]) if len(calls) > after else losses

    return loss


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "nowhere.pt"], ["nowhere.pt"]),
        (["--checkpoint", "junk.pt"], ["junk.pt"]),
        (["--checkpoint", "cut.pt"], ["cut.pt"]),
        (["--checkpoint", "payload.pt"], ["payload.pt", "code"]),
        (["--checkpoint", "huge.pt"], ["huge.pt", "dim"]),
        (["--checkpoint", "misshapen.pt"], ["misshapen.pt", "router"]),
        (["--checkpoint", "missing.pt"], ["missing.pt", "ratios"]),
        (["--checkpoint", "nan.pt"], ["nan.pt", "finite"]),
        (["--prompt", "a red dragon"], ["dragon", "circle", "above"]),
        (["--num", "0"], ["--num"]),
        (["--steps", "0"], ["--steps"]),
        (["--guidance", "nan"], ["--guidance"]),
        (["--ratios", "nowhere.json"], ["nowhere.json"]),
        (["--ratios", "rows.json"], ["rows.json", "2 rows"]),
        (["--ratios", "one.json"], ["one.json", "[0, 1)"]),
        (["--ratios", "nan.json"], ["nan.json"]),
        (["--ratios", "text.json"], ["text.json", "high"]),
        (["--ratios", "junk.pt"], ["junk.pt", "JSON"]),
        (["--ratios", "rows.json", "--dense"], ["--dense"]),
        (["--inpaint", "small.png"], ["--mask"]),
        (["--inpaint", "small.png", "--mask", "large.png"], ["small.png", "same size"]),
        (["--inpaint", "junk.pt", "--mask", "large.png"], ["junk.pt"]),
        (["--inpaint", "nowhere.png", "--mask", "large.png"], ["nowhere.png"]),
        (["--inpaint", "vast.png", "--mask", "large.png"], ["vast.png", "too large"]),
        (["--out", "junk.pt/s.png"], ["junk.pt"]),
    ],
)
def test_sampling_refuses_bad_input_in_one_line_and_loses_nothing(
    arguments, words, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    good = finished / "checkpoint.pt"
    (tmp_path / "junk.pt").write_bytes(b"no checkpoint")
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-1000])
    checkpoint = torch.load(good, weights_only=True)
    router = {"layers.0.router.weight": torch.zeros(1, 17)}
    torch.save({**checkpoint, "config": {**checkpoint["config"], "dim": 10**9}}, "huge.pt")
    torch.save({**checkpoint, "ema": checkpoint["ema"] | router}, "misshapen.pt")
    torch.save({**checkpoint, "ema": {k: v for k, v in checkpoint["ema"].items() if k != "ratios"}}, "missing.pt")
    torch.save({**checkpoint, "ema": {k: v / 0 for k, v in checkpoint["ema"].items()}}, "nan.pt")
    torch.save({**checkpoint, "payload": Payload()}, "payload.pt")
    tables = {"rows": [[0.1]], "one": [[0.1, 1], [0, 0]], "nan": [[math.nan], [0]], "text": [["high"], [0]]}
    for name, table in tables.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
    Image.new("RGB", (20, 20)).save("small.png")
    Image.new("RGB", (30, 20)).save("large.png")
    Image.new("1", (10_000, 10_000)).save("vast.png")
    if "--checkpoint" not in arguments:
        arguments = ["--checkpoint", good, *arguments]
    before = snapshot(tmp_path)
    assert_refused(call(sample_command, monkeypatch, capsys, *arguments), *words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("entry", "value", "word"),
    [
        ("settings", {"batch-size": 6.5}, "--batch-size"),
        ("settings", {"amp": None}, "--amp"),
        ("settings", {"steps": "\x1b[2J"}, "--steps"),
        ("step", 10**6, "step"),
        ("seconds", math.nan, "nan"),
        ("sums", torch.zeros(2, 9), "sums"),
        ("sums", torch.full((2, 3), math.nan), "sums"),
        ("optimizer", torch.zeros(3), "cannot be resumed"),
        ("optimizer", {"state": {0: {"exp_avg": torch.zeros(3)}}}, "cannot be resumed"),
        ("model", {}, "tensors"),
    ],
)
def test_resume_refuses_a_checkpoint_with_a_damaged_entry(finished, tmp_path, entry, value, word, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    changed = checkpoint["settings"] | value if entry == "settings" else value
    torch.save(checkpoint | {entry: changed}, tmp_path / "run" / "checkpoint.pt")
    before = snapshot(tmp_path)
    result = call(train_command, monkeypatch, capsys, "--dataset", "shapes", "--out", tmp_path / "run", "--resume")
    assert_refused(result, word)
    assert snapshot(tmp_path) == before


def test_words_of_a_hostile_checkpoint_cannot_steer_the_terminal(finished, tmp_path, monkeypatch, capsys):
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    words = ["\x1b[2J", *checkpoint["config"]["vocabulary"][1:]]
    torch.save(checkpoint | {"config": checkpoint["config"] | {"vocabulary": words}}, tmp_path / "hostile.pt")
    options = ["--checkpoint", tmp_path / "hostile.pt", "--prompt", "dragon"]
    result = call(sample_command, monkeypatch, capsys, *options)
    assert_refused(result, "dragon")
    assert result[2].rstrip("\n").isprintable()


class Payload:
    """Unpickled carelessly, this creates a file."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_payload_in_the_pickle_of_a_checkpoint_is_real_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"config": {}, "ema": {}, "payload": Payload()}, "payload.pt")
    with pytest.raises(method.InputError):
        sample_command.read_checkpoint(Path("payload.pt"))
    assert not Path("executed").exists()
    with zipfile.ZipFile("payload.pt") as archive:  # the same file, read the dangerous way, does run
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        pickle.loads(archive.read(name))
    assert Path("executed").exists()


def test_bad_input_in_a_process_of_its_own_ends_with_exit_code_2_and_one_line(tmp_path):
    for script, arguments in (("train_cifar.py", ["--dataset", "none"]), ("sample.py", ["--checkpoint", "none.pt"])):
        result = command(script, *arguments, cwd=tmp_path)
        assert_refused((result.returncode, result.stdout, result.stderr), "none")


def test_a_full_disk_leaves_the_older_files_whole_and_no_half_file(finished, tmp_path):
    """The limit on the size of files fails a write in the middle, as a full disk does, in a real process."""
    resource = pytest.importorskip("resource", reason="limits on file sizes need a Unix system")
    shutil.copytree(finished, tmp_path / "run")
    settings = torch.load(finished / "checkpoint.pt", weights_only=True)["settings"]
    run = train_command.start(settings | {"out": str(tmp_path / "part")})
    run.out = tmp_path / "run"
    run.train_step()
    run.save()  # a run that has stopped after one of its steps
    before = snapshot(tmp_path)
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))}
    for script, options in (
        ("train_cifar.py", ["--dataset", "shapes", "--out", tmp_path / "run", "--resume"]),
        ("sample.py", ["--checkpoint", tmp_path / "run" / "checkpoint.pt", "--npz", tmp_path / "s.npz", "--num", 40]),
    ):
        result = command(script, *options, cwd=tmp_path, **limit)
        assert_refused((result.returncode, result.stdout, result.stderr), "cannot write")
    after = snapshot(tmp_path)
    metrics = str(tmp_path / "run" / "metrics.jsonl")  # lines after the checkpoint are written again
    assert {**after, metrics: b""} == {**before, metrics: b""}


def test_damaged_bytes_of_a_checkpoint_are_refused_or_harmless(finished, tmp_path):
    whole, path = (finished / "checkpoint.pt").read_bytes(), tmp_path / "damaged.pt"
    random, refused = np.random.default_rng(0), 0
    for _ in range(40):
        data = bytearray(whole)
        for place in random.integers(0, len(data), random.integers(1, 200)):
            data[place] = random.integers(256)
        path.write_bytes(data[: random.integers(1, len(data))] if random.random() < 0.3 else data)
        try:
            model = sample_command.build_model(sample_command.read_checkpoint(path), path)
        except method.InputError as error:
            assert "damaged.pt" in str(error)
            refused += 1
        else:
            assert all(value.isfinite().all() for value in model.state_dict().values())
    assert refused > 10
