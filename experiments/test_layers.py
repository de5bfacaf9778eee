"""The layers that the routed one is compared with, and the arms of the trade-off, where it is known what is right."""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
import numpy as np
import pytest
import torch
import tradeoff
from tradeoff import Guidance

from diffratio_mod import Config, DiT, InputError, RoutedLayer, column_of, sample_images, tokens_processed


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
    common.use(model, kind)
    common.begin_sampling(model, batch)
    with torch.no_grad():
        return model(noise, torch.full((batch,), 0.5), caption, noise, mask, k=[k, k])


CACHES = [common.CachedLayer, common.ForecastingLayer]


@pytest.mark.parametrize("kind", [common.AttentionPrunedLayer, common.MergedLayer, *CACHES])
def test_layers_that_are_not_trained_equal_the_dense_ones_where_nothing_is_skipped(model, kind):
    for layer in model.layers:  # then all gates are 1, in the layers that have the routed layer's
        torch.nn.init.zeros_(layer.router.weight)
        torch.nn.init.zeros_(layer.router.bias)
    torch.testing.assert_close(run(model, kind, 16), run(model, RoutedLayer, None), rtol=1e-4, atol=1e-5)


def test_pruned_tokens_take_what_a_kept_one_gains_and_kept_ones_their_own(model):
    layer = model.layers[0]
    x = torch.randn(2, 16, 16)
    context = (torch.randn(2, 6, 16), torch.randn(2, 2, 16))
    common.use(model, common.AttentionPrunedLayer)
    with torch.no_grad():
        whole = layer(x, *context, k=16)
        pruned = layer(x, *context, k=5)
    same = (whole - pruned).abs().amax(dim=2) < 1e-5
    assert same.sum(dim=1).tolist() == [5, 5]  # attention sees all tokens, so the kept ones are as they were


def gains_of(model, kind, rows):
    """What the first layer adds at each step of a sampling, and what the layer alone gives for the same input.

    rows: how many rows the batch of each step has.
    """
    common.use(model, kind)
    common.begin_sampling(model, 2)
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
    gains, computed = gains_of(model, common.CachedLayer, [4, 4, 4, 4, 4, 4])
    for step, gain in enumerate(gains):
        torch.testing.assert_close(gain, computed[step - step % 2], rtol=1e-4, atol=1e-5)
    assert (computed[1] - computed[0]).abs().max() > 0.01


def test_a_forecast_is_exact_where_a_layer_adds_what_changes_linearly_and_repeats_while_one_step_is_known(model):
    common.use(model, common.ForecastingLayer)
    common.begin_sampling(model, 4)
    layer = model.layers[0]
    start = torch.randn(4, 16, 16)
    slope = torch.randn(4, 16, 16)
    for step in range(9):
        layer.layer.forward = lambda x, *_: start + step * slope
        expected = start if step == 1 else start + step * slope
        torch.testing.assert_close(layer(torch.zeros(4, 16, 16)), expected)


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_computes_when_guidance_begins_and_keeps_the_conditional_half_when_it_ends(model, kind):
    gains, computed = gains_of(model, kind, [2, 4, 4, 4, 4, 2, 2])
    for step in (0, 1, 2, 4, 6):  # 1: the unconditional half has not been computed yet
        torch.testing.assert_close(gains[step], computed[step], rtol=1e-4, atol=1e-5)
    expected = {3: computed[2], 5: computed[4][:2]}
    if kind is common.ForecastingLayer:
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
    common.use(model, RoutedLayer)
    for step in (0, 2):
        routed.append(model.layers[0](x[step], *context, k=k[step]))
    common.use(model, kind)
    common.begin_sampling(model, 4)
    out = [model.layers[0](x[step], *context, k=k[step]) for step in range(4)]

    for step in (0, 2):
        assert torch.equal(out[step], routed[step // 2])
    gains = [routed[0] - x[0], routed[1] - x[2]]
    expected = gains[1]
    if kind is common.ForecastingLayer:
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
    gains, computed = gains_of(model, common.ForecastingLayer, [2, 2, 4, 4])
    for step in range(4):
        torch.testing.assert_close(gains[step], computed[step - step % 2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modes", ["dense layer-timestep", "layer-timestep layer-timestep", "layer dense"])
def test_guidance_by_skipping_is_plain_sampling_with_the_guided_prediction_of_two_models_that_read_the_caption(modes):
    torch.manual_seed(0)
    strong, weak = (random_model(mode, 5) for mode in modes.split())
    words = torch.tensor([[1, 2], [2, 0], [1, 0]])
    noise = torch.randn(3, 3, 16, 16)
    both = common.GuidedBySkipping(strong, weak)
    common.begin_sampling(both, 3)
    result = sample_images(both, words, noise, 10, 2.5, (0.3, 0.8))

    def one(model, x, t):
        k = None
        if model.config.mode != "dense":
            column = column_of(t[:1], model.ratios.shape[1])
            k = tokens_processed(model.ratios[:, column], 16).flatten().tolist()
        zero = torch.zeros_like(x)
        return model(x, t, model.encode_caption(words), zero, torch.ones_like(x[:, :1]), k=k)

    def guided(x, t, *_, **__):
        eps = one(strong, x, t)
        if 0.29 < t[0] < 0.81:
            eps = one(weak, x, t) + 2.5 * (eps - one(weak, x, t))
        return eps

    reference = random_model("dense")
    reference.forward = guided
    torch.testing.assert_close(result, sample_images(reference, words, noise, 10, 1.0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(result, sample_images(strong, words, noise, 10, 1.0), atol=1e-2)


def test_models_that_do_not_fit_cannot_guide_each_other():
    with pytest.raises(InputError):
        common.GuidedBySkipping(random_model("layer-timestep", 5), random_model("layer-timestep", 4))
    with pytest.raises(InputError):
        common.GuidedBySkipping(random_model(), DiT(Config(("a", "c"), 16, 4, 16, 2, 2, 2, "uniform", 2)))


def test_operations_add_up_over_layers_halves_and_steps():
    torch.manual_seed(0)
    strong = random_model("dense")
    weak = random_model("layer-timestep", 5)
    table = weak.ratios.detach()

    def count(model, steps=10, guidance=3.0, interval=(0.0, 1.0), ratios=None):
        return common.flops(model, model.ratios.detach() if ratios is None else ratios, steps, guidance, interval)

    for model in (strong, weak):
        halves = count(model, guidance=1.0)
        assert count(model) == 2 * halves
        guided_steps = 2 * count(model, 1, 1.0)  # one of the two captions, and one of the two halves
        assert count(model, 1) == guided_steps
        everywhere, nowhere = count(model), count(model, interval=(0.0, 0.05))
        assert nowhere == halves < count(model, interval=(0.25, 1.0)) < count(model, interval=(0.15, 1.0)) < everywhere
    both = common.GuidedBySkipping(strong, weak)
    assert count(both) == count(strong, guidance=1.0) + count(weak, guidance=1.0)
    assert count(both, guidance=1.0) == count(strong, guidance=1.0)
    assert count(weak, ratios=0 * table) > count(weak) > count(weak, ratios=0 * table + 0.9)
    cached = common.use(random_model("dense"), common.CachedLayer)
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

    for sign, higher in ((1, False), (-1, True)):
        for error, expected in ((1.0, 0.25), (2.0, 0.45)):
            asked.clear()
            cost = lambda guidance: 1 - guidance.interval[0]
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
    assert isinstance(arm(":forecast").layers[1], common.ForecastingLayer)
    guided = arm(f":weak-model:{path}")
    assert torch.equal(guided.ratios, torch.cat([model.ratios, model.ratios]))
    assert torch.equal(guided.weak.out.bias, guided.strong.out.bias)
    model.ratios.data.zero_()
    torch.save({"config": asdict(model.config), "ema": model.state_dict()}, path)
    for wrong in (":scaled", ":scaled:0.1", ":scaled:2", ":weak-model:no.pt", ":cache:0.1", ":cached"):
        with pytest.raises(InputError):
            arm(wrong)


def test_every_arm_draws_each_image_from_its_own_noise_whatever_the_batch(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = random_model("layer-timestep", 5)
    path = tmp_path / "model.pt"
    torch.save({"config": asdict(model.config), "ema": model.state_dict()}, path)
    options = Guidance(2.0, (0.25, 0.85)).options()
    for kind in ("", ":cache", ":forecast", f":weak-model:{path}"):
        arm = tradeoff.model_of(f"name={path}{kind}", torch.device("cpu"))
        whole = common.draw_images(arm, ["a", "b", "a b"], 0, amp=False, steps=5, **options)
        monkeypatch.setattr(common, "BATCH", 2)
        parts = common.draw_images(arm, ["a", "b", "a b"], 0, amp=False, steps=5, **options)
        monkeypatch.undo()
        assert np.abs(whole.astype(int) - parts).max() <= 1  # rounding
