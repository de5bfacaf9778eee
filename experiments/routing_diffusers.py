"""Token routing for the PixArt and DiT of the library diffusers. Copy this file and diffratio_mod.py: that is all.

In a script that samples, two lines make a pipeline skip tokens:

    from routing_diffusers import load_routing
    load_routing(pipeline.transformer, "routing.pt")        # the table and the routers, a few KB

In a script that trains, `routing = route(model)` adds the table and the routers to the model's parameters; the loss is
diffusion_loss(...).mean() + weight * ratio_loss(routing.ratios, target) (diffratio_mod.py has ratio_loss), and after
every step of the optimizer comes routing.clamp_ratios(). finetune.py is such a script.

The library's models keep their code, and their parameters and checkpoints under their names: what routing adds is one
more submodule, model.routing, whose state_dict is a file of its own. Letters as in diffratio_mod.py.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

from diffratio_mod import InputError, RoutedLayer, column_of, tokens_processed

TIMESTEPS = 1000  # of the discrete schedule that PixArt and DiT were trained with: 0 is the cleanest, 999 the noisiest

# --- One block -------------------------------------------------------------------------------------------------------


def update(forward: Callable, x: Tensor, attended: Tensor | None, context: dict) -> Tensor:
    """What a block adds to its tokens x (B, n, D), as RoutedLayer asks for it. context: what else the block takes."""
    bias = None
    if attended is not None:  # (B, n); the library adds the bias to the attention's logits: -inf for "never"
        bias = torch.zeros_like(x[:, :, 0]).masked_fill(~attended, -torch.inf).unsqueeze(1)  # (B, 1, n)
    return forward(x, attention_mask=bias, **context) - x


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


def own_forward(module: nn.Module) -> Callable:
    """The module's forward, in a form that survives pickling: as a bound method it would come back as what replaced it.

    An engine that offloads weights may have put its own in its place: then that one.
    """
    return vars(module).get("forward") or functools.partial(type(module).forward, module)


# --- The model -------------------------------------------------------------------------------------------------------


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
            self.layers.append(RoutedLayer(functools.partial(update, own_forward(block)), model.inner_dim))
            block.forward = functools.partial(routed, i, self.layers[i], inspect.signature(block.forward))
        if model.device.type != "meta":  # where sequential offloading has put the weights
            self.to(model.device)
        model.register_forward_pre_hook(self.plan, with_kwargs=True)
        save = functools.partial(save_without_routing, model)
        save_as_before = functools.partial(type(model).save_pretrained, model)
        model.save_pretrained = functools.update_wrapper(save, save_as_before)  # pipelines read its signature
        # enable_layerwise_casting stores weights in 8 bits, but for these.
        model._skip_layerwise_casting_patterns = [*(model._skip_layerwise_casting_patterns or ()), "routing"]
        model.routing = self

    def _apply(self, convert: Callable, recurse: bool = True) -> nn.Module:
        """What .to() and .half() call. In a half-precision model, table and routers stay in float32 (see
        RoutedLayer.score_and_sort), and k of 1,024 tokens needs over 8 bits.
        """

        def convert_exactly(z: Tensor) -> Tensor:
            converted = convert(z)
            return z.to(converted.device) if converted.dtype.itemsize < 4 else converted

        return super()._apply(convert_exactly, recurse)

    @torch.no_grad()
    def clamp_ratios(self) -> None:
        """Bring the ratios back into [0, 1 - 1/N]. Call it after every step of the optimizer."""
        self.ratios.clamp_(0, 1 - 1 / self.tokens)

    @contextlib.contextmanager
    def nothing_skipped(self) -> Iterator[None]:
        """In here all tokens are processed, by the same weights; the gates remain."""
        ratios = self.ratios.data
        self.ratios.data = torch.zeros_like(ratios)
        try:
            yield
        finally:
            self.ratios.data = ratios

    def plan(self, model: nn.Module, args: tuple, named: dict) -> tuple[tuple, dict]:
        """Before each forward pass: from the timesteps to each layer's ratios or k, for RoutedLayer.forward."""
        call = self.signature.bind(*args, **named).arguments
        x = call["hidden_states"]  # (B, c, h, w)
        if self.ratios.is_meta and not x.is_meta:
            raise InputError("offload sequentially first, then route: this routing's weights are no longer here")
        if self.ratios.device != x.device:
            self.to(x.device)  # it is small, and does not wait until an engine that offloads weights brings it
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


# --- For scripts -----------------------------------------------------------------------------------------------------


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
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        route(model, ratios=state["ratios"]).load_state_dict(state)
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path} does not hold the routing of this model: {error}") from error
    return model.routing


def diffusion_loss(model: nn.Module, noisy: Tensor, t: Tensor, noise: Tensor, condition: dict) -> Tensor:
    """Mean squared error of the noise that the model sees in `noisy`, one number an image (B,); t (B,): 0 ... 999."""
    guess = model(noisy, timestep=t, **condition).sample[:, : noise.shape[1]]  # what follows is a learned variance
    return (guess - noise).square().mean(dim=(1, 2, 3))
