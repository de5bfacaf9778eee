"""Tests of real_models.py, on tiny models with random weights; skipped where diffusers is not installed."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import real_models
from real_models import InputError, diffusion_loss, load_routing, route

N = 16  # tokens
TINY = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2}
KINDS = {
    "pixart": (diffusers.PixArtTransformer2DModel, TINY | {"caption_channels": 12, "cross_attention_dim": 16}),
    "dit": (diffusers.DiTTransformer2DModel, TINY | {"out_channels": 8}),
}
both = pytest.mark.parametrize("kind", KINDS)


def tiny(kind: str, **config: int) -> nn.Module:
    """A model of random weights, among them those that the library starts at zero or at one."""
    torch.manual_seed(0)
    cls, sizes = KINDS[kind]
    return cls(**sizes | config).eval()


def inputs(kind: str, batch: int = 3, side: int = 8) -> tuple[Tensor, dict]:
    """Noisy images, and what the model is told of them."""
    x = torch.randn(batch, 4, side, side)
    if kind == "dit":
        return x, {"class_labels": torch.arange(batch)}
    words = torch.ones(batch, 5)
    words[0, 3:] = 0  # the first caption is shorter
    return x, {"encoder_hidden_states": torch.randn(batch, 5, 12), "encoder_attention_mask": words}


def randomise(routing: nn.Module) -> nn.Module:
    """A table with all kinds of ratios, routers that tell tokens apart."""
    nn.init.uniform_(routing.ratios, 0.1, 0.9)
    for layer in routing.layers:
        nn.init.normal_(layer.router.weight, std=0.3)
        nn.init.normal_(layer.router.bias, std=0.3)
    return routing


def call(model: nn.Module, x: Tensor, t: Tensor | int, condition: dict, gradients: bool = False) -> Tensor:
    with torch.set_grad_enabled(gradients):
        return model(x, timestep=torch.as_tensor(t).expand(len(x)), **condition).sample


def route_naively(model: nn.Module, routing: nn.Module, column: int) -> None:
    """Routing again, image by image and without RoutedLayer: what the routed model is compared with."""
    for i, block in enumerate(model.transformer_blocks):
        k = max(1, round(N * (1 - routing.ratios[i, column].item())))

        def forward(x, *, block=block.forward, router=routing.layers[i].router, k=k, attention_mask=None, **rest):
            out = x.clone()
            for b in range(len(x)):
                score = [1 / (1 + torch.exp(-(x[b, n] * router.weight[0]).sum() - router.bias[0])) for n in range(N)]
                best = sorted(range(N), key=lambda n: -score[n])[:k]
                mine = {name: z[b : b + 1] if isinstance(z, Tensor) else z for name, z in rest.items()}
                after = block(x[b : b + 1, best], **mine)[0]
                for place, n in enumerate(best):
                    out[b, n] = x[b, n] + 2 * score[n] * (after[place] - x[b, n])
            return out

        block.forward = forward


@both
@pytest.mark.parametrize(("t", "column"), [(0, 0), (99, 0), (100, 1), (999, 9)])
def test_equals_a_naive_reference(kind, t, column):
    model = tiny(kind)
    x, condition = inputs(kind)
    reference = copy.deepcopy(model)
    route_naively(reference, randomise(route(model)), column)
    expected = call(reference, x, t, condition)
    for gradients in (False, True):
        torch.testing.assert_close(call(model, x, t, condition, gradients), expected, rtol=1e-5, atol=1e-5)


@both
def test_nothing_changes_at_first_and_the_library_s_files_never_do(kind, tmp_path):
    model = tiny(kind)
    x, condition = inputs(kind)
    expected = call(model, x, 300, condition)
    own = model.state_dict().keys()
    model.save_pretrained(tmp_path / "before")
    routing = route(model)
    for gradients in (False, True):
        torch.testing.assert_close(call(model, x, 300, condition, gradients), expected, rtol=1e-5, atol=1e-6)

    randomise(routing)  # among the model's parameters, not in its files
    added = {"routing." + name for name in routing.state_dict()}
    assert model.state_dict().keys() == own | added == {name for name, _ in model.named_parameters()} | own | added
    assert sum(parameter.numel() for parameter in routing.parameters()) == 3 * 10 + 3 * (16 + 1)
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
    assert hasattr(model, "routing")


@both
def test_sampling_computes_only_k_tokens(kind):
    model = tiny(kind)
    seen = []
    for block in model.transformer_blocks:
        block.ff.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    route(model, ratios=torch.tensor([[0.0, 0.5], [0.25, 0.9], [0.99, 0.0]]))
    x, condition = inputs(kind)
    call(model, x, 499, condition)
    call(model, x, 500, condition)
    assert seen == [16, 12, 1, 8, 2, 16]
    seen.clear()
    call(model, x, 499, condition, gradients=True)
    call(model, x, torch.tensor([499, 500, 499]), condition)  # two regions in one batch: by mask
    assert seen == [16] * 6


@both
def test_each_image_of_a_training_batch_has_its_own_ratios(kind):
    model = tiny(kind)
    x, condition = inputs(kind)
    routing = randomise(route(model))
    t = torch.tensor([20, 520, 920])
    together = call(model, x, t, condition, gradients=True)
    for i, level in enumerate(t.tolist()):
        torch.testing.assert_close(together[i], call(model, x, level, condition)[i], rtol=1e-5, atol=1e-5)
    together.square().mean().backward()
    assert set(routing.ratios.grad.abs().sum(0).nonzero().flatten().tolist()) == {0, 5, 9}
    assert all(parameter.grad.any() for parameter in routing.parameters())
    assert model.transformer_blocks[1].attn1.to_q.weight.grad.any()


@both
def test_a_routing_file_makes_a_model_from_disk_the_routed_one(kind, tmp_path):
    model = tiny(kind)
    x, condition = inputs(kind)
    routing = randomise(route(model))
    expected = call(model, x, 777, condition)
    model.save_pretrained(tmp_path)
    file = {"ratios": routing.ratios.data}  # as files have been since the first: these names, and no others
    for i, layer in enumerate(routing.layers):
        file[f"layers.{i}.router.weight"] = layer.router.weight.data
        file[f"layers.{i}.router.bias"] = layer.router.bias.data
    assert file.keys() == routing.state_dict().keys()
    torch.save(file, tmp_path / "routing.pt")
    loaded = KINDS[kind][0].from_pretrained(tmp_path)
    assert (call(loaded, x, 777, condition) - expected).abs().max() > 1e-3  # the model alone is dense
    load_routing(loaded, tmp_path / "routing.pt")
    assert torch.equal(call(loaded, x, 777, condition), expected)


def test_the_loss_leaves_a_learned_variance_out():
    model = tiny("pixart")
    x, condition = inputs("pixart")
    noise = torch.randn(3, 4, 8, 8)
    t = torch.tensor([0, 500, 999])
    guess = call(model, x, t, condition)
    assert guess.shape[1] == 8  # four channels of noise, four of the variance
    expected = [((guess[i, :4] - noise[i]) ** 2).mean() for i in range(3)]
    torch.testing.assert_close(diffusion_loss(model, x, t, noise, condition), torch.stack(expected))


def test_a_copy_has_its_own_routing_and_its_own_files(tmp_path):
    model = tiny("pixart")
    x, condition = inputs("pixart")
    randomise(route(model))
    twin = copy.deepcopy(model)
    before = call(model, x, 500, condition)
    assert torch.equal(call(twin, x, 500, condition), before)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(call(model, x, 500, condition), before)
    twin.save_pretrained(tmp_path)
    assert not KINDS["pixart"][0].from_pretrained(tmp_path).proj_out.weight.any()


@both
@pytest.mark.parametrize("gradients", [False, True])
def test_half_precision(kind, gradients):
    model = tiny(kind)
    x, condition = inputs(kind)
    expected = call(model, x, 500, condition)
    dtypes = []
    model.transformer_blocks[2].register_forward_pre_hook(lambda _, given: dtypes.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        dense = call(model, x, 500, condition)
        route(model)
        assert (call(model, x, 500, condition, gradients) - dense).abs().max() < 0.02 * dense.abs().max()
    assert dtypes[1] == torch.float32  # from layer to layer, as in the dense PixArt
    model.to(torch.bfloat16)  # after routing, as a pipeline may do
    half = {name: z.bfloat16() if z.is_floating_point() else z for name, z in condition.items()}
    out = call(model, x.bfloat16(), 500, half, gradients)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()
    assert model.routing.ratios.dtype == torch.float32  # k of 1,024 tokens needs more than eight bits


def test_bad_input_is_one_clear_line(tmp_path):
    x, condition = inputs("pixart")
    model = tiny("pixart")
    with pytest.raises(InputError, match="cannot route this Linear"):
        route(nn.Linear(2, 2))
    for table in (torch.zeros(4, 10), torch.zeros(3), torch.ones(3, 10), torch.full((3, 10), torch.nan)):
        with pytest.raises(InputError, match="does not fit: 3 rows"):
            route(model, ratios=table)
    deep = route(tiny("pixart", num_layers=5)).state_dict()
    for name, content in {"deep": deep, "other": {"a": 1}, "list": [1]}.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "garbage").write_bytes(b"\x80\x02garbage" * 99)
    for name in ("deep", "other", "list", "garbage", "missing"):
        with pytest.raises(InputError, match="does not hold the routing"):
            load_routing(tiny("pixart"), tmp_path / name)
    route(model)
    with pytest.raises(InputError, match="only once"):
        route(model)
    with pytest.raises(InputError, match="makes its own"):
        call(model, x, 5, condition | {"attention_mask": torch.ones(3, N)})


def test_check_fails_where_an_equality_is_broken(monkeypatch, capsys):
    assert real_models.check(tiny("pixart"))
    assert capsys.readouterr().out.startswith("PixArtTransformer2DModel, 3 layers of width 16, 16 tokens")
    update = real_models.update
    monkeypatch.setattr(real_models, "update", lambda block, x, attended, context: update(block, x, None, context))
    assert not real_models.check(tiny("dit"))
