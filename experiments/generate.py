"""Pictures from prompts, by a pipeline whose transformer skips tokens; beside it, if asked, by the one that does not.

    pip install diffusers accelerate transformers
    python experiments/generate.py --pretrained NAME --routed runs/routed --prompt "a red circle above a blue square"
    python experiments/generate.py --pretrained NAME --routed runs/routed --prompts FILE --compare    # one a line

--routed is what finetune.py leaves: routing.pt, and transformer/ if the weights were trained, too. All else is NAME's,
a folder or a name on the hub. A DiT takes for a prompt the number of a class, or a name of it that the pipeline knows.
"""

import functools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import count_flops, interleaved
from routing_diffusers import load_routing

from diffratio_mod import InputError, RoutedLayer
from sample import Parser, draw_grid, draw_samples, input_errors, number, run_command, write_png

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_parser() -> Parser:
    parser = Parser(__doc__)
    count = number(int, 1, 10**6)
    add = parser.add_argument
    add("--pretrained", required=True, metavar="NAME", help="a pipeline: a folder, or a name on the hub")
    add("--revision", help="of the name on the hub")
    add("--routed", type=Path, required=True, metavar="FOLDER", help="what finetune.py has left")
    add("--prompt", action="append", default=[], help="repeatable")
    add("--prompts", type=Path, metavar="FILE", help="of prompts, one a line")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of the noise; image i has seed + i (default 0)")
    add("--steps", type=count, default=20, help="denoising steps (default 20)")
    add("--guidance", type=number(float, 1, 100), default=4.5, help="1 is off, at half the cost (default 4.5)")
    add("--batch-size", type=count, default=4, help="images that run together (default 4)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda if there is one)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")
    add("--offload", choices=("model", "sequential"), help="keep on the GPU only what runs: less memory, more time")
    add("--compare", action="store_true", help="the same by NAME's own transformer, unrouted: pictures, FLOPs, seconds")
    add("--rounds", type=count, default=3, help="with --compare: times that both are timed (default 3)")
    add("--routing-map", action="store_true", help="draw which tokens the first picture skipped: NAME-routing.png")
    add("--out", type=Path, default=Path("generated.png"), help="captioned picture (default generated.png)")
    add("--png-dir", type=Path, help="the routed pictures as 000000.png, ... in this folder, for FID tools")
    return parser


def load_pipeline(args) -> DiffusionPipeline:
    """The pipeline, with the weights of --routed if there are some, offloaded if asked, and then routed."""
    with input_errors(f"cannot use --pretrained {args.pretrained} with --routed {args.routed}"):
        pipe = plain_pipeline(args)
        if (args.routed / "transformer").is_dir():
            kind = type(pipe.transformer)
            pipe.transformer = kind.from_pretrained(args.routed / "transformer", dtype=DTYPES[args.dtype])
        if args.offload == "sequential":  # before routing, which then stays on the GPU: it is small
            pipe.enable_sequential_cpu_offload(device=args.device)
        load_routing(pipe.transformer, args.routed / "routing.pt")
        if args.offload == "model":
            pipe.enable_model_cpu_offload(device=args.device)
        if args.offload is None:
            pipe.to(args.device)
    return pipe


def plain_pipeline(args) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(args.pretrained, revision=args.revision, dtype=DTYPES[args.dtype])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DiffusionPipeline, prompts: list[str], first: int, args) -> np.ndarray:
    """Pictures, uint8 (n, S, S, 3): image i of all starts from the noise of seed + i, on the CPU, alike everywhere."""
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "output_type": "np"}
    options["generator"] = [torch.Generator().manual_seed(args.seed + first + i) for i in range(len(prompts))]
    if isinstance(pipe, DiTPipeline):
        images = pipe([label_of(pipe, prompt) for prompt in prompts], **options).images
    else:
        images = pipe(prompts, clean_caption=False, use_resolution_binning=False, **options).images
    return (255 * images).round().astype(np.uint8)


def label_of(pipe: DiTPipeline, prompt: str) -> int:
    label = pipe.labels.get(prompt, prompt)
    with input_errors(f"no class {prompt!r}; give its number"):
        return int(label)


def draw_routing_map(pipe: DiffusionPipeline, prompt: str, args) -> Image.Image:
    """The first picture, and for up to six steps the tokens that each layer processed, bright."""
    conditional = 0 if isinstance(pipe, DiTPipeline) else -1  # with guidance a batch has an unconditional half, too
    records = []  # layer by layer, step by step: which tokens ran, (side, side)

    def record(layer: RoutedLayer, inputs: tuple, named: dict, _: torch.Tensor) -> None:
        order = layer.score_and_sort(inputs[0])[1][conditional].cpu()  # (N,)
        ran = torch.zeros(len(order), dtype=torch.bool).index_fill(0, order[: named["k"]], True)
        records.append(ran.unflatten(0, (math.isqrt(len(ran)), -1)).numpy())

    layers = pipe.transformer.routing.layers
    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    picture = draw(pipe, [prompt], 0, args)[0]
    for hook in hooks:
        hook.remove()
    steps = len(records) // len(layers)
    shown = sorted({round(i * (steps - 1) / 5) for i in range(6)})
    rows = []
    for i in range(len(layers)):
        row = []
        for step in shown:
            ran = records[step * len(layers) + i]
            patch = len(picture) // len(ran)
            bright = ran.repeat(patch, axis=0).repeat(patch, axis=1)[..., None]  # (S, S, 1)
            row.append((np.where(bright, picture, picture // 5), f"{1 - ran.mean():.2f}"))
        rows.append(row)
    names = [f"layer {i + 1}" for i in range(len(layers))]
    title = f"{prompt}: tokens that each layer processed (bright), and the share that bypassed"
    return draw_grid(rows, title, names, [f"step {step + 1}" for step in shown])


def compare(pipe: DiffusionPipeline, dense: DiffusionPipeline, prompts: list[str], args) -> None:
    """Print FLOPs and seconds of one batch by both pipelines, text encoder and VAE included, one beside the other."""
    calls: dict[str, Callable] = {
        "dense": functools.partial(draw, dense, prompts, 0, args),
        "routed": functools.partial(draw, pipe, prompts, 0, args),
    }
    flops = {name: count_flops(call) / len(prompts) for name, call in calls.items()}
    seconds = interleaved(calls, args.rounds, torch.device(args.device))
    for name in calls:
        of_an_image = statistics.median(seconds[name]) / len(prompts)
        print(f"{name:8} {flops[name] / 1e9:10.2f} GFLOPs, {of_an_image:7.3f} s an image")
    flops_saved = 1 - flops["routed"] / flops["dense"]
    time_saved = 1 - statistics.median(b / a for a, b in zip(seconds["dense"], seconds["routed"]))
    print(f"saved: {flops_saved:.1%} of the FLOPs, {time_saved:.1%} of the time", end="")
    print(f", {time_saved / flops_saved:.2f} of it" if flops_saved > 0 else "")


def main(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    prompts = list(args.prompt)
    if args.prompts:
        with input_errors(f"cannot read --prompts {args.prompts}"):
            prompts += [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise InputError("what shall it draw? --prompt or --prompts")
    if args.compare and args.offload:
        raise InputError("--compare measures time, which --offload changes: leave one out")
    if args.offload == "sequential" and args.device == "cpu":
        raise InputError("--offload sequential needs a GPU, from which it takes the weights")
    pipe = load_pipeline(args)
    pipes = {"routed": pipe}
    if args.compare:
        pipes["dense"] = plain_pipeline(args).to(args.device)
    pictures: dict[str, list] = {name: [] for name in pipes}
    for first in tqdm(range(0, len(prompts), args.batch_size), unit="batch", disable=None):
        batch = prompts[first : first + args.batch_size]
        for name, one in pipes.items():
            pictures[name] += [*draw(one, batch, first, args)]
        if args.png_dir:
            for i in range(first, first + len(batch)):
                write_png(Image.fromarray(pictures["routed"][i]), args.png_dir / f"{i:06d}.png")
    if args.compare:
        rows = [list(zip(pictures[name][:8], prompts)) for name in ("dense", "routed")]
        write_png(draw_grid(rows, row_names=["dense", "routed"], side=112, captions=True), args.out)
        compare(pipe, pipes["dense"], prompts[: args.batch_size], args)
    else:
        write_png(draw_samples(np.stack(pictures["routed"][:64]), prompts[:64]), args.out)
    if args.routing_map:
        map_path = args.out.with_name(args.out.stem + "-routing.png")
        write_png(draw_routing_map(pipe, prompts[0], args), map_path)
    print(
        f"{len(prompts)} pictures, {args.steps} steps, guidance {args.guidance:g}, seed {args.seed}: wrote {args.out}"
    )


if __name__ == "__main__":
    run_command(main)
