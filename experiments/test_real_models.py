"""Tests of real_models.py, on tiny models with random weights; skipped where diffusers is not installed.

The numbers of the comparison with the released pseudo-code and of the ratio's gradient are printed with -s.
"""

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

from sample import run_command

N = 16  # tokens
TINY = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2}
KINDS = {
    "pixart": (diffusers.PixArtTransformer2DModel, TINY | {"caption_channels": 12, "cross_attention_dim": 16}),
    "dit": (diffusers.DiTTransformer2DModel, TINY | {"out_channels": 8}),
}
both = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    torch.set_grad_enabled(True)


def tiny(kind: str) -> nn.Module:
    """A model of random weights, among them those that the library starts at zero or at one."""
    torch.manual_seed(0)
    cls, config = KINDS[kind]
    return cls(**config).eval()


def condition_of(kind: str, batch: int = 3) -> dict:
    if kind == "dit":
        return {"class_labels": torch.arange(batch)}
    words = torch.ones(batch, 5)
    words[0, 3:] = 0  # the first caption is shorter
    return {"encoder_hidden_states": torch.randn(batch, 5, 12), "encoder_attention_mask": words}


def randomise(routing: nn.Module) -> nn.Module:
    """A table with all kinds of ratios, routers that tell tokens apart."""
    nn.init.uniform_(routing.ratios, 0.1, 0.9)
    for layer in routing.layers:
        nn.init.normal_(layer.router.weight, std=0.3)
        nn.init.normal_(layer.router.bias, std=0.3)
    return routing


def call(model: nn.Module, x: Tensor, t: Tensor | int, condition: dict, gradients: bool = False) -> Tensor:
    t = torch.full((len(x),), t) if isinstance(t, int) else t
    with torch.set_grad_enabled(gradients):
        return model(x, timestep=t, **condition).sample


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
@pytest.mark.parametrize(("t", "column"), [(0, 0), (99, 0), (100, 1), (555, 5), (899, 8), (999, 9)])
def test_equals_a_naive_reference(kind, t, column):
    model, x, condition = tiny(kind), torch.randn(3, 4, 8, 8), condition_of(kind)
    reference = copy.deepcopy(model)
    route_naively(reference, randomise(route(model)), column)
    with torch.no_grad():
        expected = call(reference, x, t, condition)
    for gradients in (False, True):
        torch.testing.assert_close(call(model, x, t, condition, gradients), expected, rtol=1e-5, atol=1e-5)


@both
def test_nothing_changes_at_first(kind):
    model, x, condition = tiny(kind), torch.randn(3, 4, 8, 8), condition_of(kind)
    expected, keys = call(model, x, 300, condition), list(model.state_dict())
    route(model)
    for gradients in (False, True):
        torch.testing.assert_close(call(model, x, 300, condition, gradients), expected, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == keys  # the model's own parameters, under their own names
    assert sum(p.numel() for p in model.routing.parameters()) == 3 * 10 + 3 * (16 + 1)


@both
def test_sampling_computes_only_k_tokens(kind):
    model, seen = tiny(kind), []
    for block in model.transformer_blocks:
        block.ff.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    routing = route(model, ratios=torch.tensor([[0.0, 0.5], [0.25, 0.9], [0.99, 0.0]]))
    x, condition = torch.randn(3, 4, 8, 8), condition_of(kind)
    call(model, x, 499, condition)
    call(model, x, 500, condition)
    assert seen == [16, 12, 1, 8, 2, 16]
    seen.clear()
    call(model, x, 499, condition, gradients=True)
    call(model, x, torch.tensor([499, 500, 499]), condition)  # two regions in one batch: by mask
    assert seen == [16] * 6
    assert routing.ratios.grad is None


@both
def test_each_image_of_a_training_batch_has_its_own_ratios(kind):
    model, x, condition = tiny(kind), torch.randn(3, 4, 8, 8), condition_of(kind)
    routing, t = randomise(route(model)), torch.tensor([20, 520, 920])
    together = call(model, x, t, condition, gradients=True)
    for i, level in enumerate(t.tolist()):
        torch.testing.assert_close(together[i], call(model, x, level, condition)[i], rtol=1e-5, atol=1e-5)
    together.square().mean().backward()
    assert set(routing.ratios.grad.abs().sum(0).nonzero().flatten().tolist()) == {0, 5, 9}
    assert all(p.grad is not None and p.grad.any() for p in routing.parameters())
    assert model.transformer_blocks[1].attn1.to_q.weight.grad.any()


@both
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    """Also when a second forward pass, at other timesteps, comes before the backward pass of the first."""
    model, x, condition = tiny(kind), torch.randn(3, 4, 8, 8), condition_of(kind)
    routing, gradients = randomise(route(model)), []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        routing.zero_grad()
        first = call(model, x, torch.tensor([20, 520, 920]), condition, gradients=True)
        call(model, x, torch.tensor([120, 620, 820]), condition, gradients=True)
        first.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in routing.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)
    assert gradients[0].any()


@both
def test_fine_tuning_reaches_the_target_and_is_kept_in_a_small_file(kind, tmp_path):
    model, x, condition = tiny(kind), torch.randn(3, 4, 8, 8), condition_of(kind)
    routing, noise = route(model, regions=4), torch.randn(3, 4, 8, 8)
    model.enable_gradient_checkpointing()
    optimizer = torch.optim.Adam([{"params": [*model.parameters(), *routing.layers.parameters()]}], lr=1e-3)
    optimizer.add_param_group({"params": routing.ratios, "lr": 3e-2})
    losses = []
    for step in range(30):
        t = torch.tensor([step * 25 % 1000, (step * 25 + 333) % 1000, (step * 25 + 666) % 1000])
        losses.append(diffusion_loss(model, x + noise, t, noise, condition).mean())
        optimizer.zero_grad()
        (losses[-1] + 2 * real_models.ratio_loss(routing.ratios, 0.3)).backward()
        optimizer.step()
        routing.ratios.data.clamp_(0, 0.99)
    assert losses[-1] < 0.8 * losses[0]
    assert abs(routing.ratios.mean() - 0.3) < 0.05
    expected = call(model, x, 777, condition)

    model.save_pretrained(tmp_path)
    torch.save(routing.state_dict(), tmp_path / "routing.pt")
    assert (tmp_path / "routing.pt").stat().st_size < 8000
    loaded = KINDS[kind][0].from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert (call(loaded, x, 777, condition) - expected).abs().max() > 1e-3  # the model alone is dense
    load_routing(loaded, tmp_path / "routing.pt")
    assert torch.equal(call(loaded, x, 777, condition), expected)


@both
def test_the_loss_leaves_a_learned_variance_out(kind):
    model, x, condition = tiny(kind), torch.randn(3, 4, 8, 8), condition_of(kind)
    noise, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    guess = call(model, x, t, condition)
    assert guess.shape[1] == 8  # four channels of noise, four of the variance
    expected = [((guess[i, :4] - noise[i]) ** 2).mean() for i in range(3)]
    torch.testing.assert_close(diffusion_loss(model, x, t, noise, condition), torch.stack(expected))


@both
def test_a_copy_has_its_own_routing(kind):
    model, x, condition = tiny(kind), torch.randn(3, 4, 8, 8), condition_of(kind)
    randomise(route(model))
    twin, before = copy.deepcopy(model), call(model, x, 500, condition)
    assert torch.equal(call(twin, x, 500, condition), before)
    nn.init.zeros_(twin.routing.ratios)
    nn.init.zeros_(twin.transformer_blocks[0].attn1.to_q.weight)
    assert not torch.equal(call(twin, x, 500, condition), before)
    assert torch.equal(call(model, x, 500, condition), before)


@both
@pytest.mark.parametrize("gradients", [False, True])
def test_half_precision(kind, gradients):
    model, x, condition = tiny(kind), torch.randn(3, 4, 8, 8), condition_of(kind)
    expected = call(model, x, 500, condition)
    route(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert (call(model, x, 500, condition, gradients) - expected).abs().max() < 0.1 * expected.abs().max()
    model.to(torch.bfloat16)  # after routing, as a pipeline may do
    half = {name: z.bfloat16() if z.is_floating_point() else z for name, z in condition.items()}
    out = call(model, x.bfloat16(), 500, half, gradients)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()
    assert model.routing.ratios.dtype == torch.float32  # k of 1,024 tokens needs more than eight bits


def test_compiled_blocks_share_one_graph_whatever_k_is():
    """The blocks are compiled before they are routed: then one graph serves all layers, noise levels and k."""
    model, x, condition, graphs = tiny("pixart"), torch.randn(3, 4, 8, 8), condition_of("pixart"), []
    twin = copy.deepcopy(model)

    def backend(graph, _):
        graphs.append(graph)
        return graph

    for block in model.transformer_blocks:
        block.forward = torch.compile(block.forward, backend=backend, dynamic=True, fullgraph=True)
    ratios = torch.linspace(0.12, 0.85, 30).view(3, 10)
    route(model, ratios=ratios)
    route(twin, ratios=ratios)
    for t in (0, 300, 999):
        torch.testing.assert_close(call(model, x, t, condition), call(twin, x, t, condition), rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


class Narrow(nn.Module):
    def forward(self, hidden_states, attention_mask=None, cross_attention_kwargs=None, **_):
        return hidden_states[:, :-1]


class Pair(Narrow):
    def forward(self, hidden_states, attention_mask=None, cross_attention_kwargs=None, **_):
        return hidden_states, None


def test_bad_input_is_one_clear_line(tmp_path):
    x, condition = torch.randn(3, 4, 8, 8), condition_of("pixart")
    with pytest.raises(InputError, match="cannot route this Linear"):
        route(nn.Linear(2, 2))
    model = tiny("pixart")
    for table in (torch.zeros(4, 10), torch.zeros(3), torch.ones(3, 10), torch.full((3, 10), torch.nan)):
        with pytest.raises(InputError, match="does not fit: 3 rows"):
            route(model, ratios=table)
    route(model)
    with pytest.raises(InputError, match="only once"):
        route(model)
    with pytest.raises(InputError, match="makes its own"):
        call(model, x, 5, condition | {"attention_mask": torch.ones(3, N)})
    for block, what in ((Narrow(), r"\[3, 15, 16\]"), (Pair(), "tuple")):
        model = tiny("pixart")
        model.transformer_blocks[1] = block
        route(model)
        with pytest.raises(InputError, match=f"input's shape.* not .*{what}"):
            call(model, x, 5, condition)
    files = {
        "deep": route(tiny("pixart")).state_dict() | {"ratios": torch.zeros(5, 10)},
        "other": {"a": 1},
        "list": [1],
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "garbage").write_bytes(b"\x80\x02garbage" * 99)
    (tmp_path / "empty").touch()
    for name in (*files, "garbage", "empty", "missing"):
        with pytest.raises(InputError, match="does not hold the routing"):
            load_routing(tiny("pixart"), tmp_path / name)


def run_main(monkeypatch, *argv: object) -> int | None:
    monkeypatch.setattr(sys, "argv", ["real_models.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        run_command(real_models.main)
    return int(stop.value.code or 0)


def test_check_passes_on_models_from_disk(monkeypatch, capsys, tmp_path):
    tiny("pixart").save_pretrained(tmp_path)
    assert run_main(monkeypatch, "--check", "--pretrained", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all equalities hold"
    assert lines[0] == "PixArtTransformer2DModel, 3 layers of width 16, 16 tokens"
    assert len(lines) == 6


def test_check_fails_where_an_equality_is_broken(monkeypatch, capsys, tmp_path):
    tiny("dit").save_pretrained(tmp_path)
    update = real_models.update
    monkeypatch.setattr(real_models, "update", lambda block, x, attended, context: update(block, x, None, context))
    assert run_main(monkeypatch, "--check", "--pretrained", tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("NOT ALL EQUALITIES HOLD")


def test_bad_commands_are_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    diffusers.AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "vae")
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "config.json").write_text("{")
    for folder in ("vae", "garbage", "missing"):
        assert run_main(monkeypatch, "--check", "--pretrained", tmp_path / folder) == 2
        complaint = capsys.readouterr().err.strip().splitlines()
        assert complaint[-1].startswith("error: ") and len(complaint) == 1, complaint
    assert run_main(monkeypatch, "--check", "--model", "unknown") == 2


def vae() -> nn.Module:
    return diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4).eval()


def test_the_library_s_dit_pipeline_samples_with_tokens_skipped():
    scheduler = diffusers.DPMSolverMultistepScheduler()
    pipe = diffusers.DiTPipeline(transformer=tiny("dit"), vae=vae(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        rng = torch.Generator().manual_seed(1)
        return torch.tensor(pipe([1, 2], num_inference_steps=3, generator=rng, output_type="np").images)

    expected = draw()
    routing = route(pipe.transformer)
    torch.testing.assert_close(draw(), expected, rtol=1e-4, atol=1e-4)
    randomise(routing)
    assert (draw() - expected).abs().max() > 1e-2


def test_the_library_s_pixart_pipeline_samples_with_tokens_skipped(tmp_path):
    pytest.importorskip("transformers")
    scheduler = diffusers.DPMSolverMultistepScheduler()
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae(), "scheduler": scheduler}
    pipe = diffusers.PixArtSigmaPipeline(transformer=tiny("pixart"), **parts)
    pipe.set_progress_bar_config(disable=True)
    prompt = {"prompt_embeds": torch.randn(2, 5, 12), "prompt_attention_mask": torch.ones(2, 5)}
    prompt |= {"negative_prompt_embeds": torch.randn(2, 5, 12), "negative_prompt_attention_mask": torch.ones(2, 5)}
    size = {"height": 8, "width": 8, "use_resolution_binning": False, "num_inference_steps": 3, "output_type": "pt"}

    def draw() -> Tensor:
        rng = torch.Generator().manual_seed(1)
        return pipe(negative_prompt=None, generator=rng, **prompt, **size).images

    expected = draw()
    torch.save(randomise(route(tiny("pixart"))).state_dict(), tmp_path / "routing.pt")
    load_routing(pipe.transformer, tmp_path / "routing.pt")
    assert (draw() - expected).abs().max() > 1e-2
    for parameter in pipe.transformer.routing.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(draw(), expected, rtol=1e-4, atol=1e-4)


def small_pixart() -> nn.Module:
    """64 tokens, so that two more or fewer are a small step."""
    torch.manual_seed(0)
    sizes = {"num_layers": 4, "attention_head_dim": 16, "cross_attention_dim": 32, "sample_size": 16}
    return diffusers.PixArtTransformer2DModel(**KINDS["pixart"][1] | sizes).eval()


def test_gradient_of_a_ratio_agrees_with_the_finite_difference_in_k():
    """The model is to give what it gives densely, so skipping a token costs something, in one cell more than in another."""
    model, x, condition = small_pixart(), torch.randn(80, 4, 16, 16), condition_of("pixart", 80)
    t = torch.arange(1000).view(10, 100)[:, ::13].flatten()  # eight timesteps of each region
    dense = call(model, x, t, condition)
    routing, step = route(model), 2 / 64
    table = routing.ratios
    nn.init.uniform_(table, 0.1, 0.6)
    for layer in routing.layers:  # the gates as training leaves them, near 1, and large where an update is
        nn.init.normal_(layer.router.weight, std=0.05)

    def losses(gradients: bool) -> Tensor:
        return (call(model, x, t, condition, gradients) - dense).square().mean(dim=(1, 2, 3))

    losses(gradients=True).mean().backward()
    learned, slope = table.data.clone(), torch.zeros(4, 10)
    for layer in range(4):
        for sign in (1, -1):
            table.data[layer] += sign * step
            slope[layer] += sign * losses(gradients=False).view(10, 8).sum(1) / 80 / (2 * step)
            table.data.copy_(learned)
    same = float((table.grad * slope > 0).float().mean())
    quotient = float(table.grad.sum() / slope.sum())
    correlation = float(torch.corrcoef(torch.stack([table.grad.flatten(), slope.flatten()]))[0, 1])
    print(
        f"\nthe same sign in {same:.0%} of 40 cells, correlation {correlation:.2f}, quotient of the sums {quotient:.2f}"
    )
    assert same >= 0.9 and correlation > 0.5


def released(model: nn.Module, routing: nn.Module) -> None:
    """Replace the routed forwards by that of the released pseudo-code, at equal routers and k, after its description.

    The k best tokens go through attention and MLP, but only what the MLP adds is multiplied by the score, and by the
    score itself, not by twice the score.
    """
    for layer, block in zip(routing.layers, model.transformer_blocks):

        def forward(x, context, k, layer=layer, ff=block.ff):
            score, order = layer.score_and_sort(x)
            best = order[:, :k].unsqueeze(2)
            kept, score = x.gather(1, best.expand(-1, -1, x.shape[2])), score.unsqueeze(2).gather(1, best)
            hook = ff.register_forward_hook(lambda _, given, out: out * score)
            out = kept + layer.layer(kept, None, context)
            hook.remove()
            return x.scatter(1, best.expand_as(kept), out)

        layer.forward = forward


def test_what_the_released_pseudo_code_does_differently():
    model, x, condition = small_pixart(), torch.randn(8, 4, 16, 16), condition_of("pixart", 8)
    dense, routing = call(model, x, 500, condition), route(model)
    theirs = copy.deepcopy(model)
    released(theirs, theirs.routing)

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    at_first = [apart(call(one, x, 500, condition), dense) for one in (model, theirs)]
    for layer, twin in zip(routing.layers, theirs.routing.layers):
        nn.init.normal_(layer.router.weight, std=0.1)
        twin.router.load_state_dict(layer.router.state_dict())
    for one in (routing, theirs.routing):
        nn.init.constant_(one.ratios, 0.3)
    between = apart(call(theirs, x, 500, condition), call(model, x, 500, condition))
    kept = torch.ones((), requires_grad=True)  # their parameter is the share that is kept, and starts at 1
    (kept.clamp(0.1, 1) - 0.7).square().backward()
    print(
        f"\nnothing skipped, routers as they start: {at_first[0]:.1e} from the dense output, theirs {at_first[1]:.1%}"
    )
    print(
        f"ratio 0.3, the same random routers: the two are {between:.1%} apart; at the start a clamp has slope {kept.grad}"
    )
    assert at_first[0] < 1e-6 and at_first[1] > 0.02 and between > 0.02
