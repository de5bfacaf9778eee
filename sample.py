"""Generate images with a DiffRatio-MoD checkpoint, the tokens that each layer skips really skipped.

    python sample.py --prompt "a red circle above a blue square" --num 4
    python sample.py --checkpoint runs/shapes/checkpoint.pt --dense          # the same weights, nothing skipped
    python sample.py --ratios my_table.json --routing-map                    # another ratio table, and where it skips
    python sample.py --inpaint assets/photo.png --mask assets/mask.png --prompt "a red circle left of a blue cross"

Takes seconds on a CPU, leaves one captioned picture (--out), and prints what the sampling cost. In an environment with
DIFFRATIO_MOD=my_solution.py that file takes the place of diffratio_mod.py, here and in training.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: threads that wait soon sleep, so that others can work
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

if (other := os.environ.get("DIFFRATIO_MOD")) and "diffratio_mod" not in sys.modules:
    spec = importlib.util.spec_from_file_location("diffratio_mod", other)
    if spec is None or not Path(other).is_file():
        argparse.ArgumentParser().exit(2, f"error: DIFFRATIO_MOD={other} is no Python file; give one, or unset it\n")
    sys.modules["diffratio_mod"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["diffratio_mod"])
from diffratio_mod import Config, DiT, InputError, RoutedLayer, column_of, sample, tokens_processed

DEFAULT_CHECKPOINT = Path(__file__).parent / "assets" / "shapes_routed.pt"
FONT, SMALL, INK, PAPER = ImageFont.load_default(15), ImageFont.load_default(12), (30, 30, 40), (255, 255, 255)


class Parser(argparse.ArgumentParser):
    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        raise InputError(f"{message}; see --help")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """The type of a flag: an int or a float from low to high."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be {kind.__name__} from {low:g} to {high:g}, not {text!r}")

    return convert


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main function; what is wrong becomes one printable line on standard error, and exit code 2."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError, MemoryError, torch.cuda.OutOfMemoryError) as error:  # OSError: a full disk, ...
        print("error:", "".join(filter(str.isprintable, " ".join(str(error).split())))[:1000], file=sys.stderr)
        sys.exit(2)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes CUDA, then Apple's MPS, then the CPU."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ("auto", *here):
        raise InputError(f"device {name!r} is not available; here: auto, {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


# --- Files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def input_errors(about: str) -> Iterator:
    """Whatever goes wrong within becomes one line: a damaged or hostile file can fail in any way."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".removeprefix("InputError: ")
        reason = "it holds code, or is damaged" if "Weights only load failed" in reason else reason[:400]
        raise InputError(f"{about}: {reason}") from None


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator:
    """A file that takes the place of `path` when it is complete and on disk, and vanishes if anything goes wrong."""
    part = path.with_name(path.name + ".part")
    with input_errors(f"cannot write {path}, what was there before is safe"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def read_checkpoint(path: Path, weights: str = "ema") -> tuple[DiT, dict]:
    """The model with the weights "ema" or "model" of a checkpoint, on the CPU, and all of it. Runs nothing of it."""
    with input_errors(f"cannot use {path} as a checkpoint"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, values = Config(**checkpoint["config"]), checkpoint[weights]
        with torch.device("meta"):  # shapes without memory: weights that do not fit are refused before any is taken
            DiT(config).load_state_dict(dict(values), assign=True)  # a copy: assign leaves its mark in the metadata
        model = DiT(config).eval()
        model.load_state_dict(values)
        if not all(value.isfinite().all() for value in values.values()):
            raise InputError("its weights are not finite")
    return model, checkpoint


def read_ratios(path: Path, depth: int) -> torch.Tensor:
    """A ratio table (L, C) from a JSON file: {"ratios": [[...], ...]}, as train_cifar.py writes it."""
    with input_errors(f"cannot use --ratios {path} (assets/ratios.json is an example)"):
        content = json.loads(path.read_text(encoding="utf-8"))
        ratios = torch.tensor(content["ratios"] if isinstance(content, dict) else content, dtype=torch.float32)
        if ratios.ndim != 2 or len(ratios) != depth or not ratios.numel() or not ((ratios >= 0) & (ratios < 1)).all():
            raise InputError(f"it must have {depth} rows, one a layer, of ratios in [0, 1)")
    return ratios


def read_inpainting(picture: Path, mask: Path, size: int) -> dict[str, torch.Tensor]:
    """The known pixels (3, S, S) in [-1, 1] and the mask (1, S, S), 1 = generate."""
    with input_errors(f"cannot use --inpaint {picture} and --mask {mask}"):
        images = [Image.open(path).convert("RGB") for path in (picture, mask)]
        if images[0].size != images[1].size:
            raise InputError(f"they must be of the same size, not {images[0].size} and {images[1].size}")
    known, where = (torch.from_numpy(np.array(image.resize((size, size)))) for image in images)
    return {"known": known.permute(2, 0, 1) / 127.5 - 1, "mask": (where[None, :, :, 0] >= 128).float()}


# --- Sampling from prompts, and what it costs ------------------------------------------------------------------------


def encode(config: Config, captions: Sequence[str]) -> torch.Tensor:
    """Captions to word ids (B, W). The empty caption, all zeros, is the null caption of classifier-free guidance."""
    ids, rows = {word: i + 1 for i, word in enumerate(config.vocabulary)}, []
    for caption in captions:
        words = caption.lower().split()
        for word in [word for word in words if word not in ids]:
            close = "".join(f"did you mean {known!r}? " for known in difflib.get_close_matches(word, ids, 1))
            raise InputError(f"unknown word {word!r} in {caption!r}; {close}known: {' '.join(ids)}")
        if len(words) > config.caption_length:
            raise InputError(f"caption {caption!r} has {len(words)} words; at most {config.caption_length} fit")
        rows.append([ids[word] for word in words] + [0] * (config.caption_length - len(words)))
    return torch.tensor(rows, dtype=torch.long)


def images_from_prompts(model: DiT, prompts: Sequence[str], seed: int, first: int = 0, **options) -> np.ndarray:
    """Images (B, S, S, 3), uint8, each from its own noise, whatever the batch. options: of diffratio_mod.sample."""
    size, device = model.config.image_size, model.ratios.device
    rngs = [torch.Generator().manual_seed(seed * 1_000_003 + first + i) for i in range(len(prompts))]
    noise = torch.stack([torch.randn(3, size, size, generator=rng) for rng in rngs]).to(device)
    for name in {"known", "mask"} & set(options):
        options[name] = options[name].to(device).expand(len(prompts), -1, -1, -1)
    return to_uint8(sample(model, encode(model.config, prompts).to(device), noise, **options))


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images (B, 3, S, S) in [-1, 1] to uint8 (B, S, S, 3)."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def sampling_flops(config: Config, ratios: torch.Tensor, steps: int, guidance: float) -> int:
    """Floating-point operations to sample one image, as PyTorch counts them (2 for a multiply-add)."""
    with torch.device("meta"):  # shapes are all that counts
        model, image = DiT(config), torch.zeros(1, 3, config.image_size, config.image_size)
        words = torch.zeros(1, config.caption_length, dtype=torch.long)
    total, columns = 0, column_of(torch.linspace(1, 0, steps + 1)[:-1], ratios.shape[1]).tolist()
    for column in set(columns):  # steps of one column cost the same
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # a form that it can count
            sample(model, words, image, 1, guidance, ratios=ratios[:, [column]].cpu())
        step = sum(counter.get_flop_counts()["DiT"].values())
        total += columns.count(column) * step
    return total + counter.get_total_flops() - step  # the captions are encoded once


def record_routing(model: DiT, records: list) -> list:
    """Let layers that sample append their scores (B, N) and processed tokens (B, k) to `records`. Gives the hooks."""

    def record(layer: RoutedLayer, inputs: tuple, options: dict, _: torch.Tensor) -> None:
        score, order = layer.score_and_sort(inputs[0])
        records.append((score, order[:, : options["k"]]))

    return [layer.register_forward_hook(record, with_kwargs=True) for layer in model.layers]


# --- Pictures, all drawn with Pillow ---------------------------------------------------------------------------------


def draw_grid(rows: list, title="", row_names=(), column_names=(), side=80, lines=0) -> Image.Image:
    """A grid of squares, each of an image (S, S, 3) and a text, in its corner or under it, in so many lines."""
    left, top, width, height = 14 + 50 * bool(row_names), 14 + 70 * bool(title), side + 4, side + 4 + 15 * lines
    wide = max(left + width * len(rows[0]), 14 + round(FONT.getlength(title))) + 10
    draw = ImageDraw.Draw(sheet := Image.new("RGB", (wide, top + height * len(rows) + 10), PAPER))
    draw.text((14, 10), title, INK, FONT)
    for j, name in enumerate(column_names):
        draw.text((left + j * width, top - 4), name, INK, SMALL, "ld", 1)
    for i, row in enumerate(rows):
        draw.text((14, top + i * height + side / 2), row_names[i] if row_names else "", INK, SMALL, "lm")
        for j, (image, text) in enumerate(row):
            x, y = left + j * width, top + i * height
            sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
            place, anchor = ((x, y + side + 1), "la") if lines else ((x + side - 3, y + side - 2), "rd")
            draw.text(place, textwrap.fill(text, side // 6), INK, SMALL, anchor, 1, stroke_width=2, stroke_fill=PAPER)
    return sheet


def draw_samples(images: np.ndarray, captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Images (B, S, S, 3), each over its caption."""
    cells, lines = list(zip(images, captions)), max(len(textwrap.wrap(caption, 18)) for caption in captions)
    return draw_grid([cells[i : i + columns] for i in range(0, len(cells), columns)], side=112, lines=lines)


def draw_ratios(ratios: torch.Tensor, title: str) -> Image.Image:
    """A ratio table (L, C) as a heat map, noise on the left as in sampling, with the means at its edges."""
    table, C = np.pad(ratios.detach().flip(1).cpu().numpy(), ((0, 1), (0, 1)), "mean"), ratios.shape[1]
    colours = (255 - table[..., None, None, None] * np.array([255, 195, 125])).round().astype(np.uint8)
    rows = [[(colour, f"{ratio:.2f}") for colour, ratio in zip(*row)] for row in zip(colours, table)]
    levels = [f"t {1 - (j + 1) / C:.2g}\nto {1 - j / C:.2g}" for j in range(C)]
    return draw_grid(rows, title, [*(f"layer {i + 1}" for i in range(len(ratios))), "mean"], [*levels, "mean"], side=46)


def draw_routing(model: DiT, prompts: Sequence[str], seed: int, **options) -> Image.Image:
    """Sample, and show for six steps which tokens each layer processed; the first row is the guess of the image."""
    config, steps, records, columns, names = model.config, [], [], [], []
    hooks = record_routing(model, records)
    images_from_prompts(model, prompts, seed, hook=lambda t, guess: steps.append((t, to_uint8(guess))), **options)
    for hook in hooks:
        hook.remove()
    L, p, side = config.depth, config.patch_size, config.image_size // config.patch_size
    for n, prompt in enumerate(prompts):  # with guidance, the first half of a batch is the conditional one
        for i in sorted({round(j * (len(steps) - 1) / 5) for j in range(6)}):
            t, guess = steps[i][0], steps[i][1][n]
            processed = [np.isin(np.arange(side**2), order[n].cpu()) for _, order in records[i * L : (i + 1) * L]]
            bright = [z.reshape(side, side, 1).repeat(p, 0).repeat(p, 1) for z in processed]  # L of (S, S, 1)
            columns.append([(guess, ""), *((np.where(z, guess, guess // 5), f"{1 - z.mean():.2f}") for z in bright)])
            names.append(f"{'' if i else prompt}\nt = {t:.2f}\nratio {1 - np.mean(processed):.2f}")
    title = "Tokens that each layer processed (bright) or let bypass (dark), and the share that bypassed"
    return draw_grid(list(zip(*columns)), title, ["guess", *(f"layer {i + 1}" for i in range(L))], names)


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to draw").add_argument
    add("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="to sample from (default: the shipped one of shapes)")
    add("--prompt", action="append", help="what to draw; repeatable (default: prompts kept in the checkpoint)")
    add("--num", type=number(int, 1, 10**6), default=1, help="images a prompt (default 1)")
    add("--seed", type=number(int, 0, 2**40), default=0, help="seed of the noise (default 0)")
    add("--inpaint", type=Path, metavar="PICTURE", help="fill a part of it; the prompt tells the whole picture")
    add("--mask", type=Path, metavar="PICTURE", help="of the same size; what is white in it is generated")
    add = parser.add_argument_group("how").add_argument
    add("--steps", type=number(int, 1, 1000), default=20, help="denoising steps (default 20)")
    add("--guidance", type=number(float, 0, 100), default=3.0, help="1 is off, at half the cost (default 3)")
    add("--ratios", type=Path, metavar="JSON", help="skip by this table, in the form of ratios.json")
    add("--dense", action="store_true", help="the same weights, with nothing skipped")
    add("--round-k", type=number(int, 1, 16384), default=1, help="round each k to a multiple; 16 suits CPUs")
    add("--batch-size", type=number(int, 1, 10**5), default=64, help="images that run together (default 64)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    add = parser.add_argument_group("what is written").add_argument
    add("--out", type=Path, default=Path("samples.png"), help="captioned picture (default samples.png)")
    add("--routing-map", action="store_true", help="also draw which tokens were processed, as NAME-routing.png")
    add("--npz", type=Path, help="all images as one array, uint8 NHWC under the key arr_0, for FID tools")
    add("--png-dir", type=Path, help="all images as 000000.png, ... in this folder, for FID tools")
    args = parser.parse_args()
    if (args.inpaint is None) != (args.mask is None) or (args.dense and args.ratios):
        raise InputError("--inpaint and --mask go together, --dense and --ratios do not")
    model, checkpoint = read_checkpoint(args.checkpoint)
    model, config = model.to(pick_device(args.device)), model.config
    if config.mode == "dense" and (args.ratios or args.routing_map):
        raise InputError(f"{args.checkpoint} is a dense model: it has no trained routers for --ratios or --routing-map")
    ratios = read_ratios(args.ratios, config.depth) if args.ratios else model.ratios.detach().cpu() * (not args.dense)
    k = (tokens_processed(ratios, config.tokens) / args.round_k).round() * args.round_k
    ratios = 1 - k.clamp(1, config.tokens) / config.tokens
    options: dict = {"steps": args.steps, "guidance": args.guidance, "ratios": ratios}
    options |= read_inpainting(args.inpaint, args.mask, config.image_size) if args.inpaint else {}

    prompts = args.prompt or checkpoint["prompts"]
    captions = [prompt for prompt in prompts for _ in range(args.num)]
    images_from_prompts(model, captions[: args.batch_size], args.seed, **(options | {"steps": 1}))  # warm up
    firsts, start = tqdm(range(0, len(captions), args.batch_size), unit="batch", disable=None), time.time()
    parts = [images_from_prompts(model, captions[i : i + args.batch_size], args.seed, i, **options) for i in firsts]
    images, seconds = np.concatenate(parts), time.time() - start
    files = {args.out: draw_samples(images[:64], captions[:64])} | ({args.npz: None} if args.npz else {})
    if args.routing_map:
        path = args.out.with_name(args.out.stem + "-routing.png")
        files[path] = draw_routing(model, prompts[:3], args.seed, **options)
    if args.png_dir:
        files |= {args.png_dir / f"{i:06d}.png": Image.fromarray(image) for i, image in enumerate(images)}
    mean = float(ratios[:, column_of(torch.linspace(1, 0, args.steps + 1)[:-1], ratios.shape[1])].mean())
    flops, dense = (sampling_flops(config, table, args.steps, args.guidance) for table in (ratios, 0 * ratios))
    print(f"{len(images)} images, {args.steps} steps, guidance {args.guidance:g}, seed {args.seed}: {seconds:.2f} s")
    print(f"{flops / 1e9:.2f} GFLOPs an image, {1 - flops / dense:.1%} fewer than dense; mean ratio {mean:.3f}")
    if len(images) > 64 or (args.routing_map and len(prompts) > 3):
        print("the sheet shows at most 64 images, a routing map at most 3 prompts")
    print("writing", *list(files)[:4], *["..."] * (len(files) > 4), f"({sum(map(Path.exists, files))} over older ones)")
    for path, picture in files.items():
        with replace_file(path) as file:
            picture.save(file, "PNG") if picture else np.savez(file, arr_0=images)


if __name__ == "__main__":
    run_command(main)
