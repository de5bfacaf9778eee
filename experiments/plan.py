"""What a training of the large models asks for, and what routing saves in sampling, on a CPU with random weights.

    python experiments/plan.py --model pixart-sigma                      # FLOPs and memory of a training, a minute
    python experiments/plan.py --model pixart-sigma --time --layers 4    # what routing saves of both, half a minute

No weights are downloaded. PixArt-Sigma takes 512 pixels (1,024 tokens), DiT-XL/2 256 (256 tokens).
"""

import copy
import functools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import count_flops, interleaved
from routing_diffusers import route

from sample import Parser, number, run_command

MODELS = {  # what is not named is the library's default: 28 layers, 16 heads of 72 (width 1152), patches of 2
    "pixart-sigma": (PixArtTransformer2DModel, {"sample_size": 64, "caption_channels": 4096, "interpolation_scale": 1}),
    "dit-xl-2": (DiTTransformer2DModel, {"sample_size": 32, "out_channels": 8}),
}


def example(model: nn.Module, images: int) -> dict:
    """A random call of the model: images at one timestep, with captions of 300 words or with class labels."""
    config = model.config
    call = {
        "hidden_states": torch.randn(images, config.in_channels, config.sample_size, config.sample_size),
        "timestep": torch.full((images,), 250),
    }
    if isinstance(model, DiTTransformer2DModel):
        call["class_labels"] = torch.arange(images)
    else:
        call["encoder_hidden_states"] = torch.randn(images, 300, config.caption_channels)
    return call


@torch.no_grad()
def race(model: nn.Module, mean: float, rounds: int) -> None:
    """Print what routing saves, in FLOPs and in time. The layers' ratios rise evenly from 0 to twice the mean."""
    dense = copy.deepcopy(model)
    table = route(model, regions=1).ratios
    table[:, 0] = torch.linspace(0, 2 * mean, len(table))
    call = example(model, 2)
    calls = {"dense": functools.partial(dense, **call), "routed": functools.partial(model, **call)}
    flops = {name: count_flops(function) for name, function in calls.items()}
    seconds = interleaved(calls, rounds, model.device)
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
    weights = sum(parameter.numel() for parameter in model.parameters())
    of_one = kept_bytes(model, example(model, 1))
    of_an_image = kept_bytes(model, example(model, 2)) - of_one
    flops = count_flops(functools.partial(model, **example(model, 1)))
    # With gradient checkpointing: the input of each block, in fp32, and all of one block at a time.
    inputs = blocks * model.routing.tokens * model.inner_dim * 4
    print(f"{weights / 1e6:.1f} million parameters, {flops / 1e12:.3f} TFLOPs for an image, forward")
    print(f"kept in bfloat16: copies of the weights {(of_one - of_an_image) / 1e9:.2f} GB, ", end="")
    print(f"and an image {of_an_image / 1e9:.3f} GB, checkpointed {(inputs + of_an_image / blocks) / 1e9:.3f} GB")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="pixart-sigma", help="of random weights")
    parser.add_argument("--layers", type=number(int, 1, 28), default=28, help="of its 28 (default 28)")
    parser.add_argument("--time", action="store_true", help="what routing saves at a mean ratio of 0.2, batch 2")
    parser.add_argument("--rounds", type=number(int, 1, 1000), default=11, help="with --time (default 11)")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    kind, config = MODELS[args.model]
    model = kind(num_layers=args.layers, **config).eval()
    if args.time:
        race(model, 0.2, args.rounds)
    else:
        plan(model)


if __name__ == "__main__":
    run_command(main)
