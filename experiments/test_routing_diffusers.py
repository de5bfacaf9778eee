"""Tests of routing_diffusers.py, on tiny models with random weights; skipped where diffusers is not installed.

What routing works with, and what it does not, stands in finetuning.md as a table whose lines are these tests.
"""

import ast
import copy
import functools
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from routing_diffusers import diffusion_loss, load_routing, route

from diffratio_mod import InputError, RoutedLayer

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
def test_another_size_has_the_same_shares_of_its_own_tokens(kind):
    model = tiny(kind)
    seen = []
    model.transformer_blocks[1].ff.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    route(model, ratios=torch.full((3, 1), 0.25))
    x, condition = inputs(kind, side=16)
    assert call(model, x, 5, condition).shape[2:] == (16, 16)
    assert seen == [48]  # of 64


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
    assert {parameter.dtype for parameter in model.routing.parameters()} == {torch.float32}


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


# --- Scores, gates and the choice of tokens are float32 everywhere ---------------------------------------------------


@pytest.fixture
def choices(monkeypatch) -> list:
    """Of each layer that runs: its input, and the scores and the order that it computes."""
    records = []
    score_and_sort = RoutedLayer.score_and_sort

    def record(layer, x):
        result = score_and_sort(layer, x)
        records.append((layer, x.detach(), *(z.detach() for z in result)))
        return result

    monkeypatch.setattr(RoutedLayer, "score_and_sort", record)
    return records


def in_half_precision(model: nn.Module, how: str) -> torch.dtype:
    """Make it so; returns the dtype of what the model is given."""
    if how == "layerwise":
        model.to(torch.bfloat16)
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
        assert model.transformer_blocks[0].ff.net[2].weight.dtype == torch.float8_e4m3fn
        return torch.bfloat16
    if how == "autocast":
        return torch.float32
    dtype = {"bfloat16": torch.bfloat16, "half": torch.float16}[how]
    model.to(dtype)
    return dtype


@both
@pytest.mark.parametrize("how", ["autocast", "bfloat16", "half", "layerwise"])
@pytest.mark.parametrize("deviation", [1e-4, 0.3], ids=["at the start", "trained"])
def test_every_router_chooses_in_float32(kind, how, deviation, choices):
    """Near 1/2, where a router starts, half precision tells few scores apart: raster order would choose."""
    model = tiny(kind)
    routing = route(model, ratios=torch.full((3, 10), 0.5))
    for layer in routing.layers:
        nn.init.normal_(layer.router.weight, std=deviation)
    exact = copy.deepcopy(routing)
    dtype = in_half_precision(model, how)
    x, condition = inputs(kind)
    condition = {name: z.to(dtype) if z.is_floating_point() else z for name, z in condition.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        for gradients in (True, False):
            call(model, x.to(dtype), 500, condition, gradients)
    assert len(choices) == 6
    for layer, seen, score, order in choices:
        router = exact.layers[[*routing.layers].index(layer)].router
        expected = torch.sigmoid(seen.float() @ router.weight[0] + router.bias)
        assert score.dtype == torch.float32
        torch.testing.assert_close(score, expected, rtol=0, atol=3e-7)
        assert (score.gather(1, order).diff(dim=1) <= 0).all()
        assert score.unique().numel() > 0.9 * score.numel()  # in bfloat16 all would be 1/2 at the start
        assert layer.router.weight.dtype == routing.ratios.dtype == torch.float32


@both
def test_a_model_in_half_precision_gets_routers_in_float32(kind):
    model = tiny(kind).to(torch.bfloat16)
    routing = randomise(route(model))
    assert {parameter.dtype for parameter in routing.parameters()} == {torch.float32}
    x, condition = inputs(kind)
    condition = {name: z.bfloat16() if z.is_floating_point() else z for name, z in condition.items()}
    assert call(model, x.bfloat16(), 500, condition).dtype == torch.bfloat16


# --- What it works with ----------------------------------------------------------------------------------------------


def routed_and_expected(kind: str = "pixart") -> tuple[nn.Module, functools.partial, Tensor]:
    """A routed model, a call that samples with it, and what that gives."""
    model = tiny(kind)
    randomise(route(model))
    x, condition = inputs(kind)
    sample = functools.partial(call, x=x, t=500, condition=condition)
    return model, sample, sample(model)


@both
def test_pickling(kind):
    model, sample, expected = routed_and_expected(kind)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(sample(loaded), expected)
    assert loaded.routing.layers[0] is not model.routing.layers[0]


@both
def test_sequential_offloading(kind, tmp_path):
    """First offloaded, then routed; the other way round it is refused in one line."""
    accelerate = pytest.importorskip("accelerate")
    model, sample, expected = routed_and_expected(kind)
    torch.save(model.routing.state_dict(), tmp_path / "routing.pt")
    other = tiny(kind)
    accelerate.cpu_offload(other, torch.device("cpu"), offload_buffers=True)
    assert next(other.parameters()).is_meta
    load_routing(other, tmp_path / "routing.pt")
    assert torch.equal(sample(other), expected)
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    with pytest.raises(InputError, match="offload sequentially first"):
        sample(model)


@pytest.mark.parametrize("kind_of_group", ["block_level", "leaf_level"])
def test_group_offloading(kind_of_group):
    model, sample, expected = routed_and_expected()
    groups = {"num_blocks_per_group": 1} if kind_of_group == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), kind_of_group, **groups)
    assert torch.equal(sample(model), expected)


def test_a_routing_that_is_elsewhere_comes_to_the_model_s_input():
    """So that a model works that is offloaded: its own weights come only when its forward begins."""
    model = tiny("pixart")
    route(model)
    model.routing.plan(model, (), {"hidden_states": torch.zeros(3, 4, 8, 8, device="meta"), "timestep": 5})
    assert model.routing.ratios.is_meta
    assert model.routing.layers[2].router.weight.is_meta


def test_lora_and_the_table_train_together():
    peft = pytest.importorskip("peft")
    model, sample, expected = routed_and_expected()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q", "to_v"]), model)
    model.routing.requires_grad_(True)  # peft has frozen it with all else
    torch.testing.assert_close(sample(model), expected)
    sample(model, gradients=True).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"routing.ratios", "routing.layers.1.router.weight"} < trained
    assert all("lora" in name or name.startswith("routing") for name in trained)


def test_fused_projections_and_plain_attention():
    model, sample, expected = routed_and_expected()
    model.fuse_qkv_projections()
    torch.testing.assert_close(sample(model), expected, rtol=1e-5, atol=1e-5)
    model.unfuse_qkv_projections()
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    torch.testing.assert_close(sample(model), expected, rtol=1e-5, atol=1e-5)


def test_this_file_and_the_method_file_are_all_that_a_script_needs():
    tree = ast.parse(Path(__file__).with_name("routing_diffusers.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert modules - sys.stdlib_module_names - {"collections.abc"} == {"torch", "diffusers", "diffratio_mod"}
