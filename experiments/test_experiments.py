"""The layers that the routed one is compared with, the arms of the trade-off, and what routers look at."""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
import numpy as np
import pytest
import rivals
import torch
import torch.nn.functional as F
import tradeoff
from tradeoff import Guidance

from diffratio_mod import Config, DiT, InputError, RoutedLayer, encode, schedule, tokens_processed
from sample import DEFAULT_CHECKPOINT, read_checkpoint, record_routing
from train_cifar import Shapes


def random_model(mode="uniform", regions=2):
    model = DiT(Config(("a", "b"), 16, 4, 16, 2, 2, 2, mode, regions)).eval()
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    model.ratios.data = torch.rand(model.ratios.shape) / 2
    return model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return random_model()


def run(model, kind, k, batch=4, noise=None):
    torch.manual_seed(1)
    if noise is None:
        noise = torch.randn(batch, 3, 16, 16)
    caption = model.encode_caption(torch.ones(batch, 2, dtype=torch.long))
    mask = torch.ones(batch, 1, 16, 16)
    rivals.use(model, kind)
    common.forget(model)
    with torch.no_grad():
        return model(noise, torch.full((batch,), 0.5), caption, noise, mask, k=[k, k])


CACHES = [rivals.CachedLayer, rivals.ForecastingLayer]


@pytest.mark.parametrize("kind", [rivals.AttentionPrunedLayer, rivals.MergedLayer, *CACHES])
def test_layers_that_are_not_trained_equal_the_dense_ones_where_nothing_is_skipped(model, kind):
    for layer in model.layers:  # then all gates are 1, in the layers that have the routed layer's
        torch.nn.init.zeros_(layer.router.weight)
        torch.nn.init.zeros_(layer.router.bias)
    torch.testing.assert_close(run(model, kind, 16), run(model, RoutedLayer, None), rtol=1e-4, atol=1e-5)


def test_pruned_tokens_take_what_a_kept_one_gains_and_kept_ones_their_own(model):
    layer = model.layers[0]
    x = torch.randn(2, 16, 16)
    context = (torch.randn(2, 6, 16), torch.randn(2, 2, 16))
    rivals.use(model, rivals.AttentionPrunedLayer)
    with torch.no_grad():
        whole = layer(x, *context, k=16)
        pruned = layer(x, *context, k=5)
    same = (whole - pruned).abs().amax(dim=2) < 1e-5
    assert same.sum(dim=1).tolist() == [5, 5]  # attention sees all tokens, so the kept ones are as they were


def gains_of(model, kind, rows):
    """What the first layer adds at each step of a sampling, and what the layer alone gives for the same input.

    rows: how many rows the batch of each step has.
    """
    rivals.use(model, kind)
    common.forget(model)
    layer = model.layers[0]
    gains = []
    computed = []
    for count in rows:
        x = torch.randn(4, 16, 16)[:count]
        context = (torch.randn(4, 6, 16)[:count], torch.randn(4, 2, 16)[:count])
        with torch.no_grad():
            gains.append(layer(x, *context) - x)
            computed.append(layer.layer(x, None, *context))
    return gains, computed


def test_a_cache_repeats_on_every_second_step_what_was_added_the_step_before(model):
    gains, computed = gains_of(model, rivals.CachedLayer, [4, 4, 4, 4, 4, 4])
    for step, gain in enumerate(gains):
        torch.testing.assert_close(gain, computed[step - step % 2], rtol=1e-4, atol=1e-5)
    assert (computed[1] - computed[0]).abs().max() > 0.01


def test_a_forecast_is_exact_where_a_layer_adds_what_changes_linearly_and_repeats_while_one_step_is_known(model):
    rivals.use(model, rivals.ForecastingLayer)
    common.forget(model)
    layer = model.layers[0]
    start = torch.randn(4, 16, 16)
    slope = torch.randn(4, 16, 16)
    for step in range(9):
        layer.layer.forward = lambda x, *_, step=step: start + step * slope
        expected = start if step == 1 else start + step * slope
        torch.testing.assert_close(layer(torch.zeros(4, 16, 16)), expected)


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_computes_when_guidance_begins_and_keeps_the_conditional_half_when_it_ends(model, kind):
    gains, computed = gains_of(model, kind, [2, 4, 4, 4, 4, 2, 2])
    for step in (0, 1, 2, 4, 6):  # 1: the unconditional half has not been computed yet
        torch.testing.assert_close(gains[step], computed[step], rtol=1e-4, atol=1e-5)
    expected = {3: computed[2], 5: computed[4][:2]}
    if kind is rivals.ForecastingLayer:
        expected = {3: 2 * computed[2] - computed[1], 5: 1.5 * computed[4][:2] - 0.5 * computed[2][:2]}
    for step, gain in expected.items():
        torch.testing.assert_close(gains[step], gain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_of_a_routed_model_skips_on_computed_steps_what_routing_skips_and_repeats_the_gains_of_the_others(
    model, kind
):
    x = torch.randn(4, 4, 16, 16)  # of four steps
    context = (torch.randn(4, 6, 16), torch.randn(4, 2, 16))
    k = (5, 11, 9, 3)
    routed = []
    rivals.use(model, RoutedLayer)
    for step in (0, 2):
        routed.append(model.layers[0](x[step], *context, k=k[step]))
    rivals.use(model, kind)
    common.forget(model)
    out = [model.layers[0](x[step], *context, k=k[step]) for step in range(4)]

    for step in (0, 2):
        assert torch.equal(out[step], routed[step // 2])
    gains = [routed[0] - x[0], routed[1] - x[2]]
    expected = gains[1]
    if kind is rivals.ForecastingLayer:
        line = gains[1] + (gains[1] - gains[0]) / 2  # from steps 0 and 2 to step 3
        through_both = (gains[0] != 0).any(dim=2, keepdim=True) & (gains[1] != 0).any(dim=2, keepdim=True)
        assert through_both.any() and not through_both.all()
        expected = torch.where(through_both, line, gains[1])
    torch.testing.assert_close(out[1], x[1] + gains[0])
    torch.testing.assert_close(out[3], x[3] + expected)
    assert (out[1] == x[1]).all(dim=2).sum(dim=1).tolist() == [11] * 4  # of 16 tokens, 5 gain
    bypassed = (gains[1] == 0).all(dim=2)
    assert torch.equal(out[3][bypassed], x[3][bypassed])


def test_a_forecast_repeats_where_the_step_before_the_last_had_no_unconditional_half(model):
    gains, computed = gains_of(model, rivals.ForecastingLayer, [2, 2, 4, 4])
    for step in range(4):
        torch.testing.assert_close(gains[step], computed[step - step % 2], rtol=1e-4, atol=1e-5)


def test_operations_add_up_over_layers_halves_and_steps():
    torch.manual_seed(0)
    strong = random_model("dense")
    weak = random_model("layer-timestep", 5)
    table = weak.ratios.detach()

    def count(model, steps=4, guidance=3.0, interval=(0.0, 1.0), ratios=None):
        return common.flops(model, model.ratios.detach() if ratios is None else ratios, steps, guidance, interval)

    for model in (strong, weak):
        halves = count(model, guidance=1.0)
        assert count(model) == 2 * halves
        guided_steps = 2 * count(model, 1, 1.0)  # one of the two captions, and one of the two halves
        assert count(model, 1) == guided_steps
        everywhere = count(model)
        nowhere = count(model, interval=(0.0, 0.05))
        assert nowhere == halves < count(model, interval=(0.6, 1.0)) < count(model, interval=(0.4, 1.0)) < everywhere
    assert count(weak, ratios=0 * table) > count(weak) > count(weak, ratios=0 * table + 0.9)
    cached = rivals.use(random_model("dense"), rivals.CachedLayer)
    assert count(strong) / 2 < count(cached) < 0.7 * count(strong)


def test_the_choice_of_an_arm_is_the_cheapest_within_one_standard_error_of_the_best():
    intervals = [(0, 1), (0.25, 1), (0.45, 1)]
    asked = []

    def quality_at(guidance):  # best at 4 and 0.25; the narrowest interval is 1.5 worse
        of_interval = {0: 3.0, 0.25: 0.0, 0.45: 1.5}[guidance.interval[0]]
        return 50 + 5 * abs(guidance.weight - 4) + of_interval

    def try_it(guidance):
        asked.append(guidance)
        return {"quality": sign * quality_at(guidance), "standard error": error}

    def cost(guidance):
        return 1 - guidance.interval[0]

    for sign, higher in ((1, False), (-1, True)):  # noqa: B007 (try_it reads both)
        for error, expected in ((1.0, 0.25), (2.0, 0.45)):  # noqa: B007
            asked.clear()
            best, tried = tradeoff.choose(try_it, cost, [1, 2, 3, 4, 5], intervals, higher)
            assert best == Guidance(4, (expected, 1))
            assert len(set(asked)) == len(asked) == len(tried) < 15  # none twice, and not all
            assert Guidance(5, (0.25, 1)) in tried and Guidance(3, (0.25, 1)) in tried


def test_an_arm_of_the_tradeoff_has_its_checkpoints_weights_and_the_table_that_it_names(tmp_path):
    torch.manual_seed(0)
    model = random_model("layer-timestep", 5)
    path = tmp_path / "model.pt"

    def arm(kind):
        return tradeoff.model_of(f"name={path}{kind}", torch.device("cpu"))

    torch.save({"config": asdict(model.config), "ema": model.state_dict()}, path)
    assert torch.equal(arm("").ratios, model.ratios)
    assert arm(":scaled:0").ratios.eq(0).all()
    scaled = arm(":scaled:0.1")
    torch.testing.assert_close(scaled.ratios / model.ratios, torch.full((2, 5), 0.1 / model.ratios.mean().item()))
    assert torch.equal(scaled.out.bias, model.out.bias)
    assert arm(":merging:0.3").ratios.eq(0.3).all()
    assert isinstance(arm(":forecast").layers[1], rivals.ForecastingLayer)
    middle = arm(":dense:0.4-0.8").ratios
    assert middle[:, 2:4].eq(0).all()
    assert torch.equal(middle[:, [0, 1, 4]], model.ratios[:, [0, 1, 4]])
    assert arm(":dense:0-1").ratios.eq(0).all()
    model.ratios.data.zero_()
    torch.save({"config": asdict(model.config), "ema": model.state_dict()}, path)
    for wrong in (":scaled", ":scaled:0.1", ":scaled:2", ":dense:2-3", ":cache:0.1", ":cached"):
        with pytest.raises(InputError):
            arm(wrong)


def test_every_arm_draws_each_image_from_its_own_noise_whatever_the_batch(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = random_model("layer-timestep", 5)
    path = tmp_path / "model.pt"
    torch.save({"config": asdict(model.config), "ema": model.state_dict()}, path)
    options = Guidance(2.0, (0.25, 0.85)).options()
    for kind in ("", ":cache", ":forecast"):
        arm = tradeoff.model_of(f"name={path}{kind}", torch.device("cpu"))
        whole = common.draw_images(arm, ["a", "b", "a b"], 0, amp=False, steps=5, **options)
        monkeypatch.setattr(common, "BATCH", 2)
        parts = common.draw_images(arm, ["a", "b", "a b"], 0, amp=False, steps=5, **options)
        monkeypatch.undo()
        assert np.abs(whole.astype(int) - parts).max() <= 1  # rounding


def auc(score, positive):
    """Area under the ROC curve of scores (n,) against booleans (n,)."""
    low = score[~positive].sort().values
    return float(torch.searchsorted(low, score[positive]).double().mean() / len(low))


@torch.no_grad()
def test_routers_of_shapes_find_objects_and_high_ratios_do_not_mean_low_scores():
    """Section 4 of the page: the scores of the shipped model against the true object masks, 60 images a region."""
    model, _ = read_checkpoint(DEFAULT_CHECKPOINT)
    config = model.config
    rng = torch.Generator().manual_seed(21)
    x0, captions, masks = Shapes(config.image_size).batch(60, rng)
    truth = F.avg_pool2d(masks.sum(dim=1, keepdim=True), config.patch_size).flatten(1)  # (B, N)
    clear = (truth > 0.8) | (truth < 0.05)
    caption = model.encode_caption(encode(config, captions))
    everywhere = torch.ones_like(x0[:, :1])
    areas = torch.zeros(config.depth, 10)
    scores = torch.zeros(config.depth, 10)
    for c in range(10):
        t = torch.full((60,), (c + 0.5) / 10)
        a, s = (z.view(-1, 1, 1, 1) for z in schedule(t))
        noisy = a * x0 + s * torch.randn(x0.shape, generator=rng)
        records = []
        hooks = record_routing(model, records)
        model(noisy, t, caption, x0, everywhere, k=tokens_processed(model.ratios[:, c], config.tokens).tolist())
        for hook in hooks:
            hook.remove()
        for layer, (score, _) in enumerate(records):
            areas[layer, c] = auc(score[clear], truth[clear] > 0.8)
            scores[layer, c] = score.mean()
    assert areas[4].min() > 0.95  # layer 5: objects, at all noise levels
    assert areas[3].min() > 0.7  # layer 4, too
    assert areas[5, 1:].max() < 0.15  # layer 6: the background
    correlation = torch.corrcoef(torch.stack([model.ratios.flatten(), scores.flatten()]))[0, 1]
    assert -0.3 < correlation < 0  # the paper's figure 10 has a clearly negative one
