"""The layers that the routed one is compared with: right where it is known what they must give."""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
import pytest
import torch
import tradeoff

from diffratio_mod import Config, DiT, InputError, RoutedLayer


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DiT(Config(("a", "b"), 16, 4, 16, 2, 2, 2, "uniform", 2)).eval()
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    return model


def run(model, kind, k, batch=4, noise=None):
    torch.manual_seed(1)
    noise = torch.randn(batch, 3, 16, 16) if noise is None else noise
    caption, mask = model.encode_caption(torch.ones(batch, 2, dtype=torch.long)), torch.ones(batch, 1, 16, 16)
    with torch.no_grad():
        return common.use(model, kind)(noise, torch.full((batch,), 0.5), caption, noise, mask, k=[k, k])


@pytest.mark.parametrize("kind", [common.AttentionPrunedLayer, common.CachedLayer, common.MergedLayer])
def test_layers_that_are_not_trained_equal_the_dense_ones_where_nothing_is_skipped(model, kind):
    if kind is common.MergedLayer:
        for layer in model.layers:  # its gate is the routed layer's
            torch.nn.init.zeros_(layer.router.weight), torch.nn.init.zeros_(layer.router.bias)
    torch.testing.assert_close(run(model, kind, 16), run(model, RoutedLayer, None), rtol=1e-4, atol=1e-5)


def test_pruned_tokens_take_what_a_kept_one_gains_and_kept_ones_their_own(model):
    layer, x = model.layers[0], torch.randn(2, 16, 16)
    context = (torch.randn(2, 6, 16), torch.randn(2, 2, 16))
    common.use(model, common.AttentionPrunedLayer)
    with torch.no_grad():
        whole, pruned = layer(x, *context, k=16), layer(x, *context, k=5)
    same = (whole - pruned).abs().amax(dim=2) < 1e-5
    assert same.sum(dim=1).tolist() == [5, 5]  # attention sees all tokens, so the kept ones are as they were


def test_a_cached_layer_repeats_the_gain_of_the_step_before(model):
    layer, (x, y), context = model.layers[0], torch.randn(2, 2, 16, 16), (torch.randn(2, 6, 16), torch.randn(2, 2, 16))
    common.use(model, common.CachedLayer)
    with torch.no_grad():
        first, second, third = layer(x, *context), layer(y, *context), layer(y, *context)
    torch.testing.assert_close(second - y, first - x)
    assert (third - second).abs().max() > 0.01


def test_the_weaker_half_is_the_second_one_and_skips_twice_as_much(model):
    noise = torch.randn(4, 3, 16, 16).repeat(2, 1, 1, 1)[:4]
    weaker = run(model, common.WeakerUnconditionalLayer, 12, noise=noise)
    for rows, k in ((slice(0, 2), 12), (slice(2, 4), 8)):
        torch.testing.assert_close(weaker[rows], run(model, RoutedLayer, k, noise=noise)[rows])


def test_an_arm_of_the_tradeoff_has_its_checkpoints_weights_and_the_table_that_it_names(tmp_path):
    torch.manual_seed(0)
    model = DiT(Config(("a", "b"), 16, 4, 16, 2, 2, 2, "layer-timestep", 5))
    model.ratios.data = torch.rand(2, 5) / 2
    torch.save({"config": asdict(model.config), "ema": model.state_dict()}, path := tmp_path / "model.pt")
    arm = lambda kind: tradeoff.model_of(f"name={path}{kind}", torch.device("cpu"))
    assert torch.equal(arm("").ratios, model.ratios) and arm(":scaled:0").ratios.eq(0).all()
    scaled = arm(":scaled:0.1")
    torch.testing.assert_close(scaled.ratios / model.ratios, torch.full((2, 5), 0.1 / model.ratios.mean().item()))
    assert arm(":merging:0.3").ratios.eq(0.3).all() and torch.equal(scaled.out.bias, model.out.bias)
    model.ratios.data.zero_()
    torch.save({"config": asdict(model.config), "ema": model.state_dict()}, path)
    for wrong in (":scaled", ":scaled:0.1", ":scaled:2", ":cache:0.1", ":cached"):
        with pytest.raises(InputError):
            arm(wrong)
