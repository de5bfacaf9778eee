"""Routing around blocks that other people wrote: the paper's PixArt, and DiT, as the diffusers library has them.

    pip install diffusers                                               # which only this file needs
    python experiments/real_models.py --check                           # the equalities, on small models, in seconds
    python experiments/real_models.py --time --model pixart-sigma --layers 4      # at full width: time against FLOPs
    python experiments/real_models.py --plan --model pixart-sigma       # FLOPs and memory of a training

In a script of one's own, load_routing makes a pipeline skip tokens. finetune.py trains. The library's models keep their
code, and their parameters and checkpoints under their names; what routing adds to them, the table and the routers, is
one more submodule, in a file of its own.
"""

import copy
import functools
import inspect
import statistics
from collections.abc import Callable
from pathlib import Path

import common
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

from diffratio_mod import InputError, RoutedLayer, column_of, tokens_processed
from sample import Parser, input_errors, run_command

TIMESTEPS = 1000  # of the discrete schedule that PixArt and DiT were trained with: 0 is the cleanest, 999 the noisiest
SMALL = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 24, "sample_size": 24, "patch_size": 3}
PIXELS = {"in_channels": 3, "out_channels": 6, "cross_attention_dim": 96, "caption_channels": 64}  # 3 of the noise
MODELS = {  # what is not named is the library's default: 28 layers, 16 heads of 72 (width 1152), patches of 2
    "pixart-sigma": (PixArtTransformer2DModel, {"sample_size": 64, "caption_channels": 4096, "interpolation_scale": 1}),
    "dit-xl-2": (DiTTransformer2DModel, {"sample_size": 32, "out_channels": 8}),
    "small-dit": (DiTTransformer2DModel, SMALL),
    "shapes": (PixArtTransformer2DModel, SMALL | PIXELS),
}


def update(block: Callable, x: Tensor, attended: Tensor | None, context: dict) -> Tensor:
    """What a block adds to its tokens x (B, n, D), as RoutedLayer asks for it. context: what else the block takes."""
    bias = None
    if attended is not None:  # (B, n); the library adds the bias to the attention's logits: -inf for "never"
        bias = torch.zeros_like(x[:, :, 0]).masked_fill(~attended, -torch.inf).unsqueeze(1)  # (B, 1, n)
    return block(x, attention_mask=bias, **context) - x


def routed(i: int, layer: RoutedLayer, signature: inspect.Signature, *args: object, **named: object) -> Tensor:
    """Stands in for the forward of block i: tokens (B, N, D) and what else the library gives; returns (B, N, D)."""
    call = signature.bind(*args, **named).arguments
    if call.pop("attention_mask", None) is not None:
        raise InputError("a routed model takes no self-attention mask: it makes its own")
    x = call.pop("hidden_states").contiguous()  # the first block gets a transposed view, which is slow to work on
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()  # as PixArt's blocks return it under autocast: the sum over the layers stays exact
    extra = dict(call.pop("cross_attention_kwargs"))
    way = {name: value[i] for name, value in extra.pop("routing").items()}  # this layer's k, or ratio (B,)
    return layer(x, call | {"cross_attention_kwargs": extra}, **way).to(x.dtype)


class Routing(nn.Module):
    """What routing adds to a model, as its submodule `routing`: the table of ratios (L, C), and the routers.

    So table and routers are among the model's parameters: what moves these, averages them over processes or saves them
    does so with those. The library's checkpoint stays without them: the state_dict of this module is a file of its own.
    """

    def __init__(self, model: nn.Module, ratios: Tensor) -> None:
        super().__init__()
        self.ratios = nn.Parameter(ratios.clone().to(torch.get_default_dtype()))
        self.layers = nn.ModuleList()
        self.tokens = (model.config.sample_size // model.config.patch_size) ** 2  # N, at the model's own size
        self.signature = inspect.signature(model.forward)  # now: engines that prepare a model wrap its forward
        for i, block in enumerate(model.transformer_blocks):
            # The block is in there as a function, not as a module: its weights stay the model's, under their names.
            self.layers.append(RoutedLayer(functools.partial(update, block.forward), model.inner_dim))
            block.forward = functools.partial(routed, i, self.layers[i], inspect.signature(block.forward))
        self.to(model.device)
        self.layers.to(model.dtype)
        model.register_forward_pre_hook(self.plan, with_kwargs=True)
        save = functools.partial(save_without_routing, model)
        model.save_pretrained = functools.update_wrapper(save, model.save_pretrained)
        model.routing = self

    def _apply(self, convert: Callable, recurse: bool = True) -> nn.Module:
        """What .to() and .half() call. A half-precision model keeps its table: k of 1,024 tokens needs over 8 bits."""
        exact = self.ratios.data
        super()._apply(convert, recurse)
        if self.ratios.dtype.itemsize < 4:
            self.ratios.data = exact.to(self.ratios.device)
        return self

    @torch.no_grad()
    def clamp_ratios(self) -> None:
        """Bring the ratios back into [0, 1 - 1/N]. Call it after every step of the optimizer."""
        self.ratios.clamp_(0, 1 - 1 / self.tokens)

    def plan(self, model: nn.Module, args: tuple, named: dict) -> tuple[tuple, dict]:
        """Before each forward pass: from the timesteps to each layer's ratios or k, for RoutedLayer.forward."""
        call = self.signature.bind(*args, **named).arguments
        x = call["hidden_states"]  # (B, c, h, w)
        timestep = torch.as_tensor(call["timestep"], device=x.device).reshape(-1)
        columns = column_of((timestep + 1) / TIMESTEPS, self.ratios.shape[1]).expand(len(x))  # (B,)
        plan = {"ratio": self.ratios[:, columns]}  # (L, B): each image has its own, by mask
        if not torch.is_grad_enabled() and (columns == columns[0]).all():  # sampling: one k for all images, by gather
            tokens = x[0, 0].numel() // model.config.patch_size**2
            plan = {"k": tokens_processed(self.ratios[:, columns[0]], tokens).tolist()}  # L integers
        # A dictionary that the library hands on to every block. So the plan belongs to this call, even when gradient
        # checkpointing runs a block again after another call.
        call["cross_attention_kwargs"] = (call.get("cross_attention_kwargs") or {}) | {"routing": plan}
        return (), call


def save_without_routing(model: nn.Module, *args: object, **named: object) -> None:
    """Stands in for the save_pretrained of a routed model: writes the files that the library would write of it."""
    routing = model.routing
    del model.routing
    try:
        type(model).save_pretrained(model, *args, **named)
    finally:
        model.routing = routing


def route(model: nn.Module, regions: int = 10, ratios: Tensor | None = None) -> Routing:
    """Put a RoutedLayer around every block of a diffusers PixArt or DiT, in place; returns what that adds to train.

    With gradients all tokens are computed, and masked for each image by its timestep; without, and with timesteps of
    one region, the skipped tokens are really skipped. Ratios and routers start at zero, and change nothing.
    regions: columns of the table, or ratios: a table (L, C) to start from.
    """
    if not isinstance(model, PixArtTransformer2DModel | DiTTransformer2DModel) or hasattr(model, "routing"):
        raise InputError(f"cannot route this {type(model).__name__}: only a PixArt or DiT of diffusers, and only once")
    depth = len(model.transformer_blocks)
    ratios = torch.zeros(depth, regions) if ratios is None else ratios
    if ratios.dim() != 2 or len(ratios) != depth or not ((0 <= ratios) & (ratios < 1)).all():
        raise InputError(f"a table {tuple(ratios.shape)} does not fit: {depth} rows, one a layer, of ratios in [0, 1)")
    return Routing(model, ratios)


def load_routing(model: nn.Module, path: str | Path) -> Routing:
    """Route a pretrained model by a file that torch.save(model.routing.state_dict(), path) has written."""
    with input_errors(f"{path} does not hold the routing of this model"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        route(model, ratios=state["ratios"]).load_state_dict(state)
    return model.routing


def diffusion_loss(model: nn.Module, noisy: Tensor, t: Tensor, noise: Tensor, condition: dict) -> Tensor:
    """Mean squared error of the noise that the model sees in `noisy`, one number an image (B,); t (B,): 0 ... 999."""
    guess = model(noisy, timestep=t, **condition).sample[:, : noise.shape[1]]  # what follows is a learned variance
    return (guess - noise).square().mean(dim=(1, 2, 3))


# --- What it shows -----------------------------------------------------------------------------------------------


def example(model: nn.Module) -> dict:
    """A random call of the model: two images at one timestep, with captions of 300 words or with class labels."""
    config = model.config
    images = torch.randn(2, config.in_channels, config.sample_size, config.sample_size)
    call = {"hidden_states": images, "timestep": torch.tensor([250, 250])}
    if isinstance(model, DiTTransformer2DModel):
        call["class_labels"] = torch.tensor([7, 8])
    else:
        call["encoder_hidden_states"] = torch.randn(2, 300, config.caption_channels)
    return call


def check(model: nn.Module) -> bool:
    """Print the equalities that routing keeps, as the largest difference by the largest value; whether all hold."""
    call = example(model)
    with torch.no_grad():
        original = model(**call).sample
    routing = route(model)
    untouched = []  # of each layer that runs, how many tokens of each image (B,) leave it as they came

    def run(gradients: bool) -> Tensor:
        with torch.set_grad_enabled(gradients):
            return model(**call).sample.detach()

    def count_untouched(block: nn.Module, given: tuple, out: Tensor) -> None:
        untouched.append((out == given[0]).all(2).sum(1))

    pairs = {
        "ratios zero: sampling = the original model": (run(gradients=False), original),
        "ratios zero: training = the original model": (run(gradients=True), original),
    }
    nn.init.uniform_(routing.ratios, 0.1, 0.9)
    for layer, block in zip(routing.layers, model.transformer_blocks):
        nn.init.normal_(layer.router.weight, std=0.1)
        block.register_forward_hook(count_untouched)
    pairs["random ratios: training by mask = sampling by gather"] = (run(gradients=True), run(gradients=False))
    processed = tokens_processed(routing.ratios[:, 2], routing.tokens)  # (L,); timestep 250: the third column
    skipped = (routing.tokens - processed).repeat(2)  # of both runs
    pairs["tokens that leave a layer bit-identical = N - k"] = (torch.stack(untouched), skipped.unsqueeze(1))

    print(f"{type(model).__name__}, {len(routing.layers)} layers of width {model.inner_dim}, {routing.tokens} tokens")
    all_hold = True
    for what, (value, expected) in pairs.items():
        difference = float((value - expected).abs().max() / expected.abs().max())
        print(f"  {what:55} {difference:.1e}")
        all_hold = all_hold and difference <= 1e-5
    return all_hold


@torch.no_grad()
def race(model: nn.Module, mean: float = 0.2, rounds: int = 11) -> None:
    """Print what routing saves, in FLOPs and in time. The layers' ratios rise evenly from 0 to twice the mean."""
    dense = copy.deepcopy(model)
    table = route(model, regions=1).ratios
    table[:, 0] = torch.linspace(0, 2 * mean, len(table))
    call = example(model)
    calls = {"dense": functools.partial(dense, **call), "routed": functools.partial(model, **call)}
    flops = {name: common.count_flops(function) for name, function in calls.items()}
    seconds = common.interleaved(calls, rounds, model.device)
    quotient = statistics.median(b / a for a, b in zip(seconds["dense"], seconds["routed"]))
    print(f"dense {statistics.median(seconds['dense']):.2f} s; mean ratio {mean:g} saves ", end="")
    print(f"{1 - flops['routed'] / flops['dense']:.1%} of the FLOPs, {1 - quotient:.1%} of the time ", end="")
    print(f"(medians over {rounds} rounds of both)")


def kept_bytes(model: nn.Module, call: dict) -> int:
    """What autograd keeps of a forward pass under autocast to bfloat16, for the backward pass."""
    kept = {}

    def keep(z: Tensor) -> Tensor:
        kept[z.untyped_storage().data_ptr()] = z.untyped_storage()
        return z

    def give(z: Tensor) -> Tensor:
        return z

    with torch.autograd.graph.saved_tensors_hooks(keep, give), torch.autocast("cpu", torch.bfloat16):
        out = model(**call)  # noqa: F841 (its graph holds what is kept)
    return sum(storage.nbytes() for storage in kept.values())


def plan(model: nn.Module) -> None:
    """Print what a training of the model asks for: parameters, FLOPs and memory, of an image and of any batch."""
    route(model)
    blocks = len(model.transformer_blocks)
    call = example(model)
    one = {name: value[:1] for name, value in call.items()}
    weights = sum(parameter.numel() for parameter in model.parameters())
    of_one = kept_bytes(model, one)
    of_an_image = kept_bytes(model, call) - of_one
    flops = common.count_flops(functools.partial(model, **one))
    # With gradient checkpointing: the input of each block, in fp32, and all of one block at a time.
    inputs = blocks * model.routing.tokens * model.inner_dim * 4
    print(f"{weights / 1e6:.1f} million parameters, {flops / 1e12:.3f} TFLOPs for an image, forward")
    print(f"kept in bfloat16: copies of the weights {(of_one - of_an_image) / 1e9:.2f} GB, ", end="")
    print(f"and an image {of_an_image / 1e9:.3f} GB, checkpointed {(inputs + of_an_image / blocks) / 1e9:.3f} GB")


def main() -> int | None:
    parser = Parser(description=__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--check", action="store_true", help="the equalities; exit code 1 if one does not hold")
    task.add_argument("--time", action="store_true", help="time and FLOPs saved at a mean ratio of 0.2")
    task.add_argument("--plan", action="store_true", help="parameters, FLOPs and memory of a training in bfloat16")
    parser.add_argument("--model", choices=MODELS, nargs="+", default=[*MODELS][2:], help="of random weights")
    parser.add_argument("--layers", type=int, choices=range(1, 29), default=28, metavar="N", help="of the large models")
    args = parser.parse_args()
    torch.manual_seed(0)
    models = []
    for name in args.model:
        kind, config = MODELS[name]
        models.append(kind(**{"num_layers": args.layers} | config).eval())
    if args.time:
        return race(models[0])
    if args.plan:
        return plan(models[0])
    all_hold = all([check(model) for model in models])
    print("all equalities hold" if all_hold else "NOT ALL EQUALITIES HOLD: a difference is above 1e-5")
    return not all_hold


if __name__ == "__main__":
    run_command(main)
