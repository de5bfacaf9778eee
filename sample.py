"""Generate images with a DiffRatio-MoD checkpoint, the tokens that each layer skips really skipped.

    python sample.py --prompt "a red circle above a blue square" --num 4
    python sample.py --checkpoint runs/shapes/checkpoint.pt --dense          # the same weights, nothing skipped
    python sample.py --ratios my_table.json --routing-map                    # another ratio table, and where it skips
    python sample.py --inpaint photo.png --mask mask.png --prompt "a blue cross"   # white in the mask is generated

Takes seconds on a CPU. Leaves one captioned picture (--out), and prints what the sampling cost. The functions that
read a checkpoint and draw pictures live here; train_cifar.py uses them too.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffratio_mod import Config, DiT, InputError, column_of, sample, tokens_processed

READY_MADE = Path(__file__).parent / "assets" / "shapes_routed.pt"
LARGEST_PICTURE = 50_000_000  # pixels; a larger input image is refused before it is decoded
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns


# ---------------------------------------------------------------------------------------------------------------------
# Command line, device, files
# ---------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, as all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def keep_freed_memory() -> None:
    """Let the C library keep the memory that tensors free, for speed on a CPU.

    glibc hands large blocks back to the system as soon as they are free, and gets new, empty pages for the next
    layer's tensors, which costs time. Elsewhere than with glibc, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: smaller blocks (32 MiB is the most allowed) come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap shrinks only if this much of its end is free


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function; bad input becomes one line on standard error and exit code 2."""
    keep_freed_memory()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError) as error:  # OSError: a full disk, a folder that may not be written, ...
        text = " ".join(str(error).split())[:2000]  # parts of it can come from a hostile file
        print("error: " + "".join(c if c.isprintable() else "?" for c in text), file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError:
        print("error: not enough memory on the device; try a smaller --batch-size or model", file=sys.stderr)
        sys.exit(2)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes CUDA, then Apple's MPS, then the CPU. Raises InputError."""
    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here.insert(0, "cuda")
    try:
        device = torch.device(here[0] if name == "auto" else name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; here: {', '.join(here)}") from None
    if device.type not in here or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise InputError(f"device {name!r} is not available; here: {', '.join(here)}")
    return device


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings of a library about a damaged file: it is refused in one line, or it is good enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def writing(path: Path, mode: str = "wb") -> Iterator[IO]:
    """An open file; what goes wrong with it (a full disk, a folder without permission) becomes an InputError."""
    try:
        with open(path, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {path}: {reason}; what had been saved before is untouched") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO]:
    """A file that takes the place of `path` when it is complete and on disk, and vanishes if anything goes wrong."""
    temporary = path.with_name(path.name + ".part")
    try:
        with writing(temporary) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running anything from it: a dictionary of tensors and plain values.

    Raises InputError for a file that is missing, cut short, not a checkpoint, or that holds code.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; train one with train_cifar.py or give --checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.save writes: a zip archive, nothing in it compressed
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InputError(f"{path} is not a checkpoint of this project: its contents are compressed")
        with quiet():
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - torch.load fails in a dozen ways on a damaged file; each means the same to the user
        reason = "it holds code, which is not run" if "weights_only" in str(error) else "damaged, or another format"
        raise InputError(f"cannot read {path} as a checkpoint: {reason} ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("ema"), dict) or "config" not in checkpoint:
        raise InputError(f"{path} is not a checkpoint of this project: it has no config and ema entries")
    return checkpoint


LARGEST = {"image_size": 1024, "patch_size": 64, "dim": 2048, "depth": 64, "heads": 64, "caption_length": 256}


def check_config(values: dict) -> Config:
    """A Config from a file or a command line; raises InputError where a size could ask for all memory."""
    for name, most in (LARGEST | {"regions": 1000}).items():
        if type(values[name]) is not int or not 1 <= values[name] <= most:
            raise InputError(f"{name} must be a whole number from 1 to {most}, not {str(values[name])[:40]!r}")
    words = values["vocabulary"]
    if not 1 <= len(words) <= 50_000 or not all(type(word) is str for word in words) or len(set(words)) < len(words):
        raise InputError("the vocabulary must be 1 to 50000 words, each of them once")
    if type(values["mode"]) is not str or len(values["mode"]) > 40:
        raise InputError("the mode must be one word")
    config = Config(**{**values, "vocabulary": tuple(words)})
    if config.tokens > 16384:
        raise InputError(f"{config.tokens} patches an image are too many, at most 16384; take larger patches")
    return config


def build_model(checkpoint: dict, path: Path, weights: str = "ema") -> DiT:
    """The model that a checkpoint describes, in evaluation mode on the CPU.

    weights: the entry of the checkpoint to take, "ema" or "model". Raises InputError where the config is absurd or a
    tensor is missing, unknown, misshapen or not finite; before that nothing of the config's size is allocated.
    """
    values, names = checkpoint["config"], {field.name for field in fields(Config)}
    if not isinstance(values, dict) or set(values) != names or not isinstance(values["vocabulary"], (list, tuple)):
        raise InputError(f"{path}: the config must have exactly the entries {', '.join(sorted(names))}")
    try:
        config = check_config(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    with torch.device("meta"):  # shapes without memory
        expected = {name: tuple(value.shape) for name, value in DiT(config).state_dict().items()}
    given = checkpoint.get(weights)
    if not isinstance(given, dict) or not all(isinstance(value, Tensor) for value in given.values()):
        raise InputError(f"{path}: the entry {weights!r} is not a dictionary of tensors")
    if odd := sorted(map(str, set(expected) ^ set(given))):
        raise InputError(f"{path}: {len(odd)} tensors are missing or unknown, the first is {odd[0][:80]}")
    for name, shape in expected.items():
        value = given[name]
        if tuple(value.shape) != shape or value.layout != torch.strided or not value.is_floating_point():
            raise InputError(f"{path}: {name} has shape {tuple(value.shape)} instead of {shape}, or is not of floats")
        if not value.isfinite().all():
            raise InputError(f"{path}: {name} holds a value that is not finite")
    check_ratios(given["ratios"].tolist(), config.depth, str(path))
    model = DiT(config)
    model.load_state_dict(given)
    return model.eval()


def check_ratios(table: object, depth: int, source: str) -> Tensor:
    """A ratio table as nested lists, checked, to a tensor (L, C). Raises InputError; `source` names where it is from."""
    number = (int, float)
    if not isinstance(table, list) or not all(isinstance(row, list) for row in table) or len(table) != depth:
        raise InputError(f"{source}: the ratios must be {depth} rows, one a layer, each a list of numbers")
    if len({len(row) for row in table}) != 1 or not 1 <= len(table[0]) <= 1000:
        raise InputError(f"{source}: every row of ratios must have the same number of columns, 1 to 1000")
    for row in table:
        for ratio in row:
            if isinstance(ratio, bool) or not isinstance(ratio, number) or not 0 <= ratio < 1:
                raise InputError(f"{source}: the compression ratio {str(ratio)[:40]!r} is not a number in [0, 1)")
    return torch.tensor(table, dtype=torch.float32).clamp(max=1 - 2**-24)


def read_ratios(path: Path, depth: int) -> Tensor:
    """A ratio table (L, C) from a JSON file: {"ratios": [[...], ...]}, as train_cifar.py writes it. Raises InputError."""
    try:
        if path.stat().st_size > 10_000_000:
            raise InputError(f"{path} is too large for a ratio table")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a JSON file: {error}") from None
    return check_ratios(content.get("ratios") if isinstance(content, dict) else content, depth, str(path))


def round_k(ratios: Tensor, tokens: int, multiple: int) -> Tensor:
    """The ratio table (L, C) whose k are those of `ratios`, rounded to a multiple, at least 1 and at most N.

    Attention kernels compute in blocks, so some k cost more time than larger ones.
    """
    k = (tokens * (1 - ratios) / multiple).round() * multiple
    return 1 - k.clamp(1, tokens) / tokens


def read_picture(path: Path, size: int, mode: str) -> Image.Image:
    """An image file, converted to a Pillow mode and resized to size x size. Raises InputError if it is not a picture."""
    try:
        with quiet(), Image.open(path) as file:
            if file.width * file.height > LARGEST_PICTURE:
                raise InputError(f"it is too large, {file.width} x {file.height} pixels")
            picture = file.convert(mode)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except Exception as error:  # noqa: BLE001 - Pillow raises many kinds of errors on damaged files
        raise InputError(f"cannot read {path} as an image: {error}") from None
    return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling from prompts, and what it costs
# ---------------------------------------------------------------------------------------------------------------------


def encode(config: Config, captions: Sequence[str]) -> Tensor:
    """Captions to word ids (B, W). The empty caption, all zeros, is the null caption of classifier-free guidance.

    Raises InputError for a word that is not in the vocabulary and for a caption of more than W words.
    """
    ids, rows = {word: i + 1 for i, word in enumerate(config.vocabulary)}, []
    for caption in captions:
        words = caption.lower().split()
        if unknown := [word for word in words if word not in ids]:
            raise InputError(f"unknown word {unknown[0]!r} in {caption!r}; known: {' '.join(config.vocabulary)}")
        if len(words) > config.caption_length:
            raise InputError(f"caption {caption!r} has {len(words)} words; at most {config.caption_length} fit")
        rows.append([ids[word] for word in words] + [0] * (config.caption_length - len(words)))
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), config.caption_length)


def generate(
    model: DiT,
    prompts: Sequence[str],
    seed: int,
    first: int = 0,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    **options,
) -> np.ndarray:
    """One image a prompt, uint8 (B, S, S, 3). For inpainting, known (3, S, S) and mask (1, S, S) are
    shared by all images; with a leading B, each has its own.

    Every image has its own noise, from the seed and its number (`first` + position), so that it does not depend on
    the batch that it is made in. options: steps, guidance, ratios, hook, see diffratio_mod.sample.
    """
    size, device = model.config.image_size, next(model.parameters()).device
    noise = [
        torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed * 1_000_003 + first + i))
        for i in range(len(prompts))
    ]
    if known is not None and mask is not None:
        options["known"] = known.to(device).expand(len(prompts), -1, -1, -1)
        options["mask"] = mask.to(device).expand(len(prompts), -1, -1, -1)
    words = encode(model.config, prompts).to(device)
    return to_uint8(sample(model, words, torch.stack(noise).to(device), **options))


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (B, 3, S, S) in [-1, 1] to uint8 (B, S, S, 3)."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def to_float(images: np.ndarray) -> Tensor:
    """The inverse of to_uint8: uint8 (B, S, S, 3) to (B, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


def sampling_flops(model: DiT, steps: int, guidance: float, ratios: Tensor | None = None) -> int:
    """Floating-point operations to sample one image, counted by PyTorch's counter step by step (2 for a multiply-add)."""
    config, device = model.config, next(model.parameters()).device
    image = torch.zeros(1, 3, config.image_size, config.image_size, device=device)
    words = torch.zeros(1, config.caption_length, dtype=torch.long, device=device)
    # The counter knows the plain form of attention on every device, the fused one only on some.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sample(model, words, image, steps, guidance, ratios=ratios)
    return counter.get_total_flops()


def mean_sampling_ratio(model: DiT, steps: int, ratios: Tensor | None = None) -> float:
    """The share of (token, layer) pairs that a sampling run skips, from the k that it uses."""
    if model.config.mode == "dense":
        return 0.0
    k = tokens_processed(model.ratios if ratios is None else ratios, model.config.tokens)
    columns = [column_of(1 - i / steps, len(k)) for i in range(steps)]
    return 1 - sum(sum(k[c]) for c in columns) / (steps * model.config.depth * model.config.tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, all drawn with Pillow
# ---------------------------------------------------------------------------------------------------------------------

FONT, SMALL = ImageFont.load_default(15), ImageFont.load_default(12)
INK, PAPER = (30, 30, 40), (255, 255, 255)


def enlarge(image: np.ndarray, side: int) -> Image.Image:
    """An image (S, S, 3) as a square picture with crisp pixels."""
    return Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont = SMALL) -> str:
    """Break a text into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width else [lines[-1], word]
    return "\n".join(lines)


def draw_samples(images: np.ndarray, captions: Sequence[str], columns: int = 8, side: int = 112) -> Image.Image:
    """A grid of images (B, S, S, 3), each over its caption."""
    columns = min(columns, len(images))
    width, height = side + 12, side + 46
    sheet = Image.new("RGB", (columns * width + 12, math.ceil(len(images) / columns) * height + 12), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = 12 + i % columns * width, 12 + i // columns * height
        sheet.paste(enlarge(image, side), (x, y))
        draw.multiline_text((x, y + side + 3), wrap(caption, side), INK, SMALL, spacing=1)
    return sheet


def draw_ratios(ratios: Tensor, title: str) -> Image.Image:
    """A ratio table (L, C) as a labelled heat map, noise on the left as in sampling, with the means at its edges."""
    table = ratios.detach().float().cpu().flip(1)  # sampling order: from noise to image
    table = torch.cat([table, table.mean(1, keepdim=True)], dim=1)
    table = torch.cat([table, table.mean(0, keepdim=True)], dim=0)
    rows, columns = table.shape
    cell, gap, left, top = (58, 34), 8, 74, 64
    sheet = Image.new("RGB", (left + columns * cell[0] + gap + 24, top + rows * cell[1] + gap + 44), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((14, 10), title, INK, FONT)
    draw.text((14, 32), "share of tokens that bypass each layer", (110, 110, 120), SMALL)
    for i in range(rows):
        y = top + i * cell[1] + gap * (i == rows - 1)
        draw.text((14, y + 9), "mean" if i == rows - 1 else f"layer {i + 1}", INK, SMALL)
        for j in range(columns):
            x = left + j * cell[0] + gap * (j == columns - 1)
            ratio = float(table[i, j])
            colour = tuple(round(255 + (dark - 255) * ratio) for dark in (0, 60, 130))
            draw.rectangle((x, y, x + cell[0] - 2, y + cell[1] - 2), fill=colour)
            draw.text((x + cell[0] / 2, y + cell[1] / 2), f"{ratio:.2f}", PAPER if ratio > 0.5 else INK, SMALL, "mm")
    y = top + rows * cell[1] + gap + 6
    for j in range(columns - 1):
        high = 1 - j / (columns - 1)
        label = f"{abs(high - 1 / (columns - 1)):.1f}-{high:.1f}" if columns < 12 else f"{high:.2f}"
        draw.text((left + (j + 0.5) * cell[0], y), label, INK, SMALL, "ma")
    draw.text((left + (columns - 0.5) * cell[0] + gap, y), "mean", INK, SMALL, "ma")
    draw.text((left, y + 16), "noise level t, from noise (left) to image (right)", INK, SMALL)
    return sheet


def draw_routing(
    model: DiT, prompts: Sequence[str], seed: int, shown: int = 6, side: int = 80, **options
) -> Image.Image:
    """Sample a few prompts and show, for each, which tokens each layer processed as the image cleared.

    Rows are layers, columns noise levels; a token that bypassed the layer is darkened, and the number is the share of
    those. The first row is the model's guess of the image at that noise level. options: steps, guidance, ratios, see
    diffratio_mod.sample.
    """
    config, records = model.config, []
    if config.mode == "dense":
        raise InputError("a dense model has no routing to show")
    generate(model, prompts, seed, hook=lambda *record: records.append(record), **options)
    picked = [records[round(i * (len(records) - 1) / (shown - 1))] for i in range(shown)]
    left, top, gap, across = 74, 50, 26, config.image_size // config.patch_size
    block = left + shown * (side + 3) + gap
    sheet = Image.new("RGB", (len(prompts) * block + 12, top + (config.depth + 1) * (side + 3) + 56), PAPER)
    draw = ImageDraw.Draw(sheet)
    title = "Tokens that each layer processed (bright) or let bypass (dark), and the share that bypassed"
    draw.text((14, 8), title, INK, FONT)
    for n, prompt in enumerate(prompts):
        draw.text((n * block + left, 31), prompt, INK, SMALL)
        for i in range(config.depth + 1):
            y = top + i * (side + 3) + 4 * (i > 0)
            draw.text((n * block + 14, y + side // 2 - 7), f"layer {i}" if i else "guess", INK, SMALL)
            for j, (t, guess, routing) in enumerate(picked):
                x = n * block + left + j * (side + 3)
                tile = to_uint8(guess[n : n + 1])[0]
                if i:
                    processed = np.zeros(config.tokens, bool)
                    processed[routing[i - 1][1][n].cpu().numpy()] = True
                    pixels = processed.reshape(across, across).repeat(config.patch_size, 0).repeat(config.patch_size, 1)
                    tile = np.where(pixels[..., None], tile, tile // 5)
                sheet.paste(enlarge(tile.astype(np.uint8), side), (x, y))
                if i:
                    draw.rectangle((x + side - 29, y + side - 15, x + side - 1, y + side - 1), PAPER)
                    ratio = 1 - len(routing[i - 1][1][n]) / config.tokens
                    draw.text((x + side - 2, y + side - 1), f"{ratio:.2f}", INK, SMALL, "rd")
                if i == config.depth:
                    draw.text((x + side / 2, y + side + 4), f"t = {t:.2f}", INK, SMALL, "ma")
                    share = 1 - sum(len(order[n]) for _, order in routing) / (config.depth * config.tokens)
                    draw.text((x + side / 2, y + side + 20), f"ratio {share:.2f}", INK, SMALL, "ma")
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = Parser(description="Sample images from a DiffRatio-MoD checkpoint.")
    add = parser.add_argument
    add("--checkpoint", type=Path, default=READY_MADE, help="checkpoint to sample from (default: the ready-made one)")
    add("--prompt", action="append", help="what to draw; repeatable (default: prompts kept in the checkpoint)")
    add("--num", type=int, default=1, help="images a prompt (default 1)")
    add("--steps", type=int, default=30, help="denoising steps; 20 to 50 are enough (default 30)")
    add("--guidance", type=float, default=3.0, help="classifier-free guidance; 1 is off, at half the cost (default 3)")
    add("--seed", type=int, default=0, help="seed of the noise (default 0)")
    add("--batch-size", type=int, default=64, help="images that run together; does not change them (default 64)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    add("--out", type=Path, default=Path("samples.png"), help="captioned picture to write (default samples.png)")
    add("--inpaint", type=Path, metavar="IMAGE", help="fill a part of this image; needs --mask")
    add("--mask", type=Path, metavar="MASK", help="image of the same size; what is white in it is generated")
    add("--ratios", type=Path, metavar="FILE.json", help="use this ratio table, in the form of ratios.json")
    add("--dense", action="store_true", help="the same weights, with nothing skipped")
    add("--round-k", type=int, default=1, help="round each layer's k to a multiple of this: 16 suits CPUs (default 1)")
    add("--routing-map", action="store_true", help="also draw which tokens were processed, as NAME-routing.png")
    add("--npz", type=Path, help="also write all images as one array, uint8 NHWC under the key arr_0, for FID tools")
    add("--png-dir", type=Path, help="also write all images as 000000.png, ... into this folder, for FID tools")
    add("--versions", action="store_true", help="print what made the checkpoint (versions, command line) and stop")
    args = parser.parse_args()
    limits = {"num": 10**7, "steps": 1000, "seed": 2**40, "batch_size": 10**5, "round_k": 16384}
    for name, high in limits.items():
        low = 0 if name == "seed" else 1
        if not low <= getattr(args, name) <= high:
            raise InputError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {getattr(args, name)}")
    if not 0 <= args.guidance <= 100:
        raise InputError(f"--guidance must be from 0 to 100, not {args.guidance}")
    if args.dense and args.ratios:
        raise InputError("--dense skips nothing, --ratios says what to skip; give one of them")
    if (args.inpaint is None) != (args.mask is None):
        raise InputError("--inpaint and --mask go together")
    return args


def main() -> None:
    args = arguments()
    checkpoint = read_checkpoint(args.checkpoint)
    if args.versions:
        print(json.dumps(checkpoint.get("made_by", []), indent=2, default=str))
        return
    model = build_model(checkpoint, args.checkpoint).to(pick_device(args.device))
    config = model.config
    prompts = args.prompt or [p for p in checkpoint.get("prompts", []) if isinstance(p, str)][:16] or [""]
    encode(config, prompts)  # a bad word is reported before anything is computed

    options: dict = {"steps": args.steps, "guidance": args.guidance}
    if args.ratios:
        options["ratios"] = read_ratios(args.ratios, config.depth)
    elif args.dense:
        options["ratios"] = torch.zeros(config.depth, 1)
    if config.mode == "dense" and (args.ratios or args.routing_map):
        raise InputError(f"{args.checkpoint} is a dense model: it has no trained routers for --ratios or --routing-map")
    if args.round_k > 1:
        options["ratios"] = round_k(options.get("ratios", model.ratios.detach().cpu()), config.tokens, args.round_k)
    painting: dict = {}
    if args.inpaint:
        painting = read_inpainting(args.inpaint, args.mask, config.image_size)

    captions = [prompt for prompt in prompts for _ in range(args.num)]
    generate(model, captions[: args.batch_size], args.seed, **painting, **(options | {"steps": 1}))  # warm up
    batches, start = [], time.perf_counter()
    with tqdm(total=len(captions), unit="image", disable=None) as bar:
        for first in range(0, len(captions), args.batch_size):
            batch = captions[first : first + args.batch_size]
            batches.append(generate(model, batch, args.seed, first, **painting, **options))
            bar.update(len(batch))
    seconds = time.perf_counter() - start
    images = np.concatenate(batches)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    pictures = {args.out: draw_samples(images[:64], captions[:64])}
    if args.routing_map:
        routing = draw_routing(model, prompts[:3], args.seed, **painting, **options)
        pictures[args.out.with_name(args.out.stem + "-routing.png")] = routing
    for path, picture in pictures.items():
        with replacing(path) as file:
            picture.save(file, "PNG")
    written = [*pictures]
    if args.npz:
        args.npz.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.npz) as file:
            np.savez(file, arr_0=images)
        written.append(args.npz)
    if args.png_dir:
        args.png_dir.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(args.png_dir / f"{i:06d}.png")
        written.append(args.png_dir)

    flops = sampling_flops(model, args.steps, args.guidance, options.get("ratios"))
    dense = sampling_flops(model, args.steps, args.guidance, torch.zeros(config.depth, 1))
    print(f"{len(images)} images, {args.steps} steps, guidance {args.guidance:g}, seed {args.seed}: {seconds:.2f} s")
    ratio = mean_sampling_ratio(model, args.steps, options.get("ratios"))
    print(f"mean ratio {ratio:.3f}; {flops / 1e9:.2f} GFLOPs an image, {1 - flops / dense:.1%} fewer than dense")
    print("wrote " + ", ".join(map(str, written)))


def read_inpainting(image: Path, mask: Path, size: int) -> dict[str, Tensor]:
    """The known pixels (3, S, S) in [-1, 1] and the mask (1, S, S), 1 = generate. Raises InputError."""
    sizes = []
    for path in (image, mask):
        read_picture(path, 1, "L")  # refuses what is not a picture
        with Image.open(path) as picture:
            sizes.append(picture.size)
    if sizes[0] != sizes[1]:
        raise InputError(f"{image} has {sizes[0]} pixels and {mask} has {sizes[1]}; they must have the same size")
    known = to_float(np.asarray(read_picture(image, size, "RGB"))[None])[0]
    return {"known": known, "mask": torch.from_numpy(np.array(read_picture(mask, size, "L")) >= 128).float()[None]}


if __name__ == "__main__":
    run_command(main)
