"""Generate images with a DiffRatio-MoD checkpoint, the tokens that each layer skips really skipped.

    python sample.py --prompt "a red circle above a blue square" --num 4
    python sample.py --checkpoint runs/shapes/checkpoint.pt --dense          # the same weights, nothing skipped
    python sample.py --ratios my_table.json --routing-map                    # another ratio table, and where it skips
    python sample.py --inpaint assets/photo.png --mask assets/mask.png --prompt "a red circle left of a blue cross"

Takes seconds on a CPU, leaves one captioned picture (--out), and prints what the sampling cost. From top to bottom:
prompts to images, what that costs, pictures, files, the command line.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import math
import os
import re
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffratio_mod import Config, DiT, InputError, RoutedLayer, column_of, encode, sample_images, tokens_processed

DEFAULT_CHECKPOINT = Path(__file__).parent / "assets" / "shapes_routed.pt"

# --- Prompts to images -----------------------------------------------------------------------------------------------


def images_from_prompts(model: DiT, prompts: Sequence[str], seed: int, first: int = 0, **options) -> np.ndarray:
    """Sample one image for each prompt: uint8 (B, S, S, 3). options: those of sample_images.

    Image i starts from the noise number `first + i` of this seed, whatever else is in the batch.
    """
    size = model.config.image_size
    device = model.ratios.device
    noise = []
    for image in range(first, first + len(prompts)):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + image)
        noise.append(torch.randn(3, size, size, generator=rng))
    for name in ("known", "mask"):
        if name in options:
            options[name] = options[name].to(device).expand(len(prompts), -1, -1, -1)  # one for all images
    words = encode(model.config, prompts).to(device)
    return to_uint8(sample_images(model, words, torch.stack(noise).to(device), **options))


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images (B, 3, S, S) in [-1, 1] to uint8 (B, S, S, 3)."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" takes CUDA, then Apple's MPS, then the CPU. Raises InputError if it is missing.

    On CUDA, float32 matrix products run in TensorFloat-32 from here on: faster, with 10 bits of mantissa.
    """
    available = []
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    if name not in ("auto", *available):
        raise InputError(f"device {name!r} is not available; here: auto, {', '.join(available)}")
    device = torch.device(available[0] if name == "auto" else name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


# --- What sampling costs, and which tokens it processes --------------------------------------------------------------


def sampling_flops(
    config: Config, ratios: torch.Tensor, steps: int, guidance: float, guidance_interval=(0.0, 1.0)
) -> int:
    """Floating-point operations to sample one image, as PyTorch counts them (2 for a multiply-add)."""
    with torch.device("meta"):  # shapes are all that counts
        model = DiT(config)
        words = torch.zeros(2, config.caption_length, dtype=torch.long)
        images = torch.zeros(2, 3, config.image_size, config.image_size)
        t = torch.ones(2)
        caption = model.encode_caption(words)

    # A dry run of the sampler, which notes what it asks of the network; then each kind of call is counted once.
    network = model.forward
    calls: collections.Counter = collections.Counter()  # by number of images, and by k of the layers (dense: None)

    def note_call(noisy: torch.Tensor, *_, k: list | None) -> torch.Tensor:
        calls[len(noisy), None if k is None else tuple(k)] += 1
        return noisy

    model.forward = note_call
    sample_images(model, words[:1], images[:1], steps, guidance, guidance_interval, ratios=ratios)

    def count(function: Callable, *arguments, **options) -> int:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # a form that it can count
            function(*arguments, **options)
        return counter.get_total_flops()

    caption_count = max(batch for batch, _ in calls)  # 2 if guidance acts, 1 else
    total = count(model.encode_caption, words[:caption_count])  # once for all steps
    for (batch, k), times in calls.items():
        noisy = known = images[:batch]
        mask = images[:batch, :1]
        total += times * count(network, noisy, t[:batch], caption[:batch], known, mask, k=k)
    return total


def record_routing(model: DiT, records: list) -> list:
    """Hook all layers: when one samples, its scores (B, N) and processed tokens (B, k) are appended to `records`.

    Returns the hooks, to be removed.
    """

    def record(layer: RoutedLayer, inputs: tuple, options: dict, _: torch.Tensor) -> None:
        score, order = layer.score_and_sort(inputs[0])
        records.append((score, order[:, : options["k"]]))

    return [layer.register_forward_hook(record, with_kwargs=True) for layer in model.layers]


# --- Pictures, all drawn with Pillow ---------------------------------------------------------------------------------

INK = (30, 30, 40)
PAPER = (255, 255, 255)
SIZE = 15  # of letters, in pixels
SMALL = 12
SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf", "msyh.ttc", "malgun.ttf")


@functools.cache
def lettering(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text, and a font that has its letters: Pillow's own or one of the system's. Without one, é is e, and 猫 ?."""
    own = ImageFont.load_default(size)
    if has_letters(own, text):
        return text, own
    for name in SYSTEM_FONTS:
        with contextlib.suppress(OSError):  # not on this system
            font = ImageFont.truetype(name, size)
            if has_letters(font, text):
                return text, font
    letters = [letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter)]
    return "".join(letter if has_letters(own, letter) else "?" for letter in letters), own


def has_letters(font: ImageFont.FreeTypeFont, text: str) -> bool:
    box = bytes(font.getmask("\uffff"))  # what a font draws for a letter that it does not have
    return all(letter.isspace() or bytes(font.getmask(letter)) != box for letter in text)


def write(draw: ImageDraw.ImageDraw, place: tuple, text: str, anchor: str = "la", size: int = SMALL, **options) -> None:
    text, font = lettering(text, size)
    draw.text(place, text, options.pop("fill", INK), font, anchor, spacing=1, **options)


def draw_grid(rows: list, title="", row_names=(), column_names=(), side=80, captions=False) -> Image.Image:
    """A grid of squares, each an image (S, S, 3) and a text. The text is in the corner, or as a caption below."""

    def wrapped(text: str) -> str:
        return textwrap.fill(text, side // 6)

    margin = 14
    left = margin + 50 if row_names else margin
    top = margin + 70 if title else margin
    cell_width = side + 4
    cell_height = side + 4
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    if captions:  # under each image as much room as the longest caption needs
        texts = [lettering(wrapped(text), SMALL) for row in rows for _, text in row]
        cell_height += 6 + max(math.ceil(draw.textbbox((0, 0), text, font, spacing=1)[3]) for text, font in texts)

    title, font = lettering(title, SIZE)
    width = max(left + cell_width * len(rows[0]), margin + round(font.getlength(title))) + 10
    sheet = Image.new("RGB", (width, top + cell_height * len(rows) + 10), PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (margin, 10), title, size=SIZE)
    for j, name in enumerate(column_names):
        write(draw, (left + j * cell_width, top - 4), name, "ld")
    for i, row in enumerate(rows):
        y = top + i * cell_height
        if row_names:
            write(draw, (margin, y + side / 2), row_names[i], "lm")
        for j, (image, text) in enumerate(row):
            x = left + j * cell_width
            sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
            if captions:
                write(draw, (x, y + side + 1), wrapped(text))
            else:
                write(draw, (x + side - 3, y + side - 2), text, "rd", stroke_width=2, stroke_fill=PAPER)
    return sheet


def in_english(caption: str) -> str:
    """Models are taught "a airplane"; people read "an airplane"."""
    return re.sub(r"\ba (?=[aeiou])", "an ", caption)


def draw_samples(images: np.ndarray, captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Images (B, S, S, 3), each over its caption."""
    cells = [(image, in_english(caption)) for image, caption in zip(images, captions)]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    return draw_grid(rows, side=112, captions=True)


def draw_ratios(ratios: torch.Tensor, title: str) -> Image.Image:
    """A ratio table (L, C) as a heat map, noise on the left as in sampling, with the means at its edges."""
    L, C = ratios.shape
    noisy_first = ratios.detach().flip(1).cpu().numpy()
    table = np.pad(noisy_first, ((0, 1), (0, 1)), "mean")
    at_zero = np.array([255, 255, 255])
    at_one = np.array([0, 60, 130])
    rows = []
    for row in table:
        colours = [np.round(at_zero + ratio * (at_one - at_zero)).astype(np.uint8) for ratio in row]
        rows.append([(colour.reshape(1, 1, 3), f"{ratio:.2f}") for colour, ratio in zip(colours, row)])
    row_names = [*(f"layer {i + 1}" for i in range(L)), "mean"]
    column_names = [*(f"t {1 - (j + 1) / C:.2g}\nto {1 - j / C:.2g}" for j in range(C)), "mean"]
    return draw_grid(rows, title, row_names, column_names, side=46)


def draw_routing(model: DiT, prompts: Sequence[str], seed: int, **options) -> Image.Image:
    """Sample, and show for up to six steps which tokens each layer processed; the first row is the guessed image."""
    patch = model.config.patch_size
    side = model.config.image_size // patch
    layers_so_far: list = []  # of the current step, filled by the hooks of the layers
    steps: list = []  # t, guesses (B, S, S, 3), and each layer's processed tokens (B, k)

    def end_of_step(t: float, guess: torch.Tensor) -> None:
        steps.append((t, to_uint8(guess), [order.cpu() for _, order in layers_so_far]))
        layers_so_far.clear()

    hooks = record_routing(model, layers_so_far)
    try:
        images_from_prompts(model, prompts, seed, hook=end_of_step, **options)
    finally:  # also without enough memory, after which a training goes on
        for hook in hooks:
            hook.remove()

    columns, names = [], []
    for n, prompt in enumerate(prompts):  # with guidance, the first half of a batch is the conditional one
        for i in sorted({round(j * (len(steps) - 1) / 5) for j in range(6)}):
            t, guesses, processed = steps[i]
            column = [(guesses[n], "")]
            bypassed = []
            for order in processed:
                bright = np.isin(np.arange(side**2), order[n]).reshape(side, side)
                bright = bright.repeat(patch, axis=0).repeat(patch, axis=1)[..., None]  # (S, S, 1)
                bypassed.append(1 - bright.mean())
                column.append((np.where(bright, guesses[n], guesses[n] // 5), f"{bypassed[-1]:.2f}"))
            columns.append(column)
            first_line = prompt if i == 0 else ""
            names.append(f"{first_line}\nt = {t:.2f}\nratio {np.mean(bypassed):.2f}")
    title = "Tokens that each layer processed (bright) or let bypass (dark), and the share that bypassed"
    rows = [list(row) for row in zip(*columns)]
    return draw_grid(rows, title, ["guess", *(f"layer {i + 1}" for i in range(len(rows) - 1))], names)


def draw_curves(metrics: list[dict]) -> Image.Image:
    """Loss, loss by noise level, and ratios over the steps, from the lines of metrics.jsonl."""
    steps = [line["step"] for line in metrics]
    loss = np.array([line["loss"] for line in metrics])
    by_region = np.array([line["loss_by_region"] for line in metrics], dtype=float).T  # None becomes NaN
    by_layer = np.array([np.mean(line["ratios"], axis=1) for line in metrics]).T
    R = len(by_region)
    losses = {f"t {i / R:.2g} to {(i + 1) / R:.2g}": curve for i, curve in enumerate(by_region)} | {"all": loss}
    ratios = {f"layer {i + 1}": curve for i, curve in enumerate(by_layer)} | {"mean": by_layer.mean(axis=0)}
    sheet = Image.new("RGB", (1500, 300), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw_panel(draw, 60, "loss, logarithmic axis", steps, {"all": loss}, logarithmic=True)
    draw_panel(draw, 500, "loss by noise level, logarithmic axis", steps, losses, logarithmic=True)
    draw_panel(draw, 1030, "ratio by layer", steps, ratios, logarithmic=False)
    return sheet


def draw_panel(draw: ImageDraw.ImageDraw, left: int, title: str, steps: list, curves: dict, logarithmic: bool) -> None:
    """Named curves over the steps, from blue to red, the last one black, and a legend. What is NaN is left out."""
    values = np.array([*curves.values()])
    if logarithmic:
        values = np.log10(values)
    low = np.nanmin(values)
    high = np.nanmax(values) + 0.01
    width, top, bottom = 340, 40, 260
    write(draw, (left, 12), title, size=SIZE)
    draw.rectangle((left, top, left + width, bottom), outline=(200, 200, 205))

    def x_of(step: float) -> float:
        return left + width * step / steps[-1]

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    for share in (0, 0.5, 1):
        value = low + share * (high - low)
        label = 10**value if logarithmic else value
        write(draw, (left - 4, y_of(value)), f"{label:.2g}", "rm")
        step = share * steps[-1]
        write(draw, (x_of(step), bottom + 4), f"{step:.0f}", "ma")
    named = range(0, len(curves), math.ceil(len(curves) / 12))  # of very many, some
    for i, (name, curve) in enumerate(zip(curves, values)):
        red = (i + 1) / len(curves)
        colour = (round(255 * red), 70, round(255 * (1 - red)))
        if i == len(curves) - 1:
            colour = INK
        curve = [curve[0], *curve]  # a line of metrics tells of the steps before it: the first from step 0 on
        points = [(x_of(step), y_of(value)) for step, value in zip([0, *steps], curve) if not math.isnan(value)]
        draw.line(points, colour, 2)
        if i in named:
            write(draw, (left + width + 8, top + 18 * named.index(i)), name, fill=colour)


# --- Files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def input_errors(about: str) -> Iterator[None]:
    """What goes wrong while a file is read or written becomes an InputError of one line, with its cause.

    A damaged or hostile file can fail in any way; but too little memory is no fault of a file.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".removeprefix("InputError: ")
        if "Weights only load failed" in reason:
            reason = "it holds code, or is damaged"
        raise InputError(f"{about}: {reason[:400]}") from error


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator:
    """A file that takes the place of `path` when it is complete, and vanishes if anything goes wrong."""
    part = path.with_name(path.name + ".part")
    with input_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                yield file
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_png(picture: Image.Image, path: Path) -> None:
    with replace_file(path) as file:
        picture.save(file, "PNG")


def read_checkpoint(path: Path, weights: str = "ema") -> tuple[DiT, dict]:
    """The model, on the CPU, with the weights "ema" or "model" of a checkpoint, and the checkpoint's whole dictionary.

    Runs no code that a file may hold. Raises InputError if it is damaged, or no checkpoint.
    """
    with input_errors(f"cannot use {path} as a checkpoint"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**checkpoint["config"])
        values = checkpoint[weights]
        with torch.device("meta"):  # shapes without memory: weights that do not fit are refused before any is taken
            DiT(config).load_state_dict(dict(values), assign=True)  # a copy: assign marks its metadata
        model = DiT(config).eval()
        model.load_state_dict(values)
        if not all(value.isfinite().all() for value in values.values()):
            raise InputError("its weights are not finite")
    return model, checkpoint


def read_ratios(path: Path, depth: int) -> torch.Tensor:
    """A ratio table (L, C) from a JSON file: {"ratios": [[...], ...]}, as train_cifar.py writes it."""
    with input_errors(f"cannot use --ratios {path} (assets/ratios.json is an example)"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            content = content["ratios"]
        if not isinstance(content, list) or len(content) != depth or not all(isinstance(row, list) for row in content):
            raise InputError(f"it must have {depth} rows, one a layer")
        for i, row in enumerate(content, start=1):
            if not row or len(row) != len(content[0]):
                raise InputError(f"row {i} has {len(row)} values, the first one has {len(content[0])}")
            for j, ratio in enumerate(row, start=1):
                if type(ratio) not in (int, float) or not 0 <= ratio < 1:
                    raise InputError(f"row {i}, column {j}: {json.dumps(ratio)[:40]} is no ratio in [0, 1)")
    return torch.tensor(content, dtype=torch.float32)


def read_picture(path: Path, size: int) -> np.ndarray:
    """The centred square of a picture file, upright and on white: RGB, uint8 (size, size, 3).

    Raises InputError, which names the file, if it cannot be read.
    """
    with input_errors(f"cannot read the picture {path}; repair or remove it"), Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded at down to an eighth of its size
        return to_square(ImageOps.exif_transpose(image), size)


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """The centred square of an image, on white: RGB, uint8 (size, size, 3). Raises InputError for values out of range.

    Not left to Pillow's `convert`, which cuts 16 bits off at 255, floats too, and shows the colours under transparency.
    """
    highest = {"F": 1.0, "I": 65535}.get(image.mode[:1])  # grey as floats, or with 16 bits
    if highest:
        values = np.asarray(image, dtype=np.float64)
        if not (values.min() >= 0 and values.max() <= highest):
            raise InputError(f"values from {values.min():g} to {values.max():g}, not within 0 to {highest:g}")
        image = Image.fromarray(np.round(255 / highest * values).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(ImageOps.fit(image.convert("RGB"), (size, size)))  # reduced with antialiasing


def read_inpainting(picture: Path, mask: Path, size: int) -> dict[str, torch.Tensor]:
    """The known pixels (3, S, S) in [-1, 1] and the mask (1, S, S), 1 = generate: what is white in its file."""
    pixels = torch.from_numpy(read_picture(picture, size))  # (S, S, 3)
    brightness = torch.from_numpy(read_picture(mask, size)).float().mean(dim=2)  # (S, S)
    sizes = []
    for path in (picture, mask):
        with Image.open(path) as image:
            sizes.append(ImageOps.exif_transpose(image).size)
    if sizes[0] != sizes[1]:
        raise InputError(f"--inpaint {picture} and --mask {mask} must be of the same size, not {sizes}")
    generated = brightness >= 128
    if not generated.any():
        brightest = f"its brightest is {brightness.max():.0f} of 255"
        raise InputError(f"no pixel in the square of --mask {mask} is white ({brightest}); paint it where to generate")
    if generated.all():
        raise InputError(f"all of --mask {mask} is white, nothing of --inpaint would stay; paint black what is to stay")
    return {"known": pixels.permute(2, 0, 1) / 127.5 - 1, "mask": generated[None].float()}


# --- The command line ------------------------------------------------------------------------------------------------


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
        raise argparse.ArgumentTypeError(f"must be {kind.__name__} from {low:.10g} to {high:.10g}, not {text!r}")

    return convert


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main function; what is wrong becomes one printable line on standard error, and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # in a notebook it is another kind of stream
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal cannot print ends nothing
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError) as error:  # OSError: a full disk, ...
        about = "out of memory: " if isinstance(error, MemoryError | torch.OutOfMemoryError) else ""
        line = about + " ".join(str(error).split())
        print("error:", "".join(filter(str.isprintable, line))[:1000], file=sys.stderr)
        sys.exit(2)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to draw").add_argument
    add("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="to sample from (default: assets/shapes_routed.pt)")
    add(
        "--prompt",
        action="append",
        help="what to draw; repeatable (default: those of the checkpoint, 16 or one a class)",
    )
    add(
        "--num",
        type=number(int, 1, 10**6),
        default=1,
        help="images a prompt, in turn: all prompts, then all again (default 1)",
    )
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the noise (default 0)")
    add("--inpaint", type=Path, metavar="PICTURE", help="fill a part of it; the prompt tells the whole picture")
    add("--mask", type=Path, metavar="PICTURE", help="of the same size; what is white in it is generated")
    add = parser.add_argument_group("how").add_argument
    add("--steps", type=number(int, 1, 1000), default=20, help="denoising steps (default 20)")
    add("--guidance", type=number(float, 0, 100), default=3.0, help="1 is off, at half the cost (default 3)")
    add("--guidance-interval", type=number(float, 0, 1), nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="noise levels t at which guidance acts (default 0 1); other steps take half as long")  # fmt: skip
    add("--ratios", type=Path, metavar="JSON", help="skip by this table, in the form of ratios.json")
    add("--dense", action="store_true", help="the same weights, with nothing skipped")
    add("--round-k", type=number(int, 1, 16384), default=1, help="round each k to a multiple; 16 suits CPUs")
    add("--batch-size", type=number(int, 1, 10**5), default=64, help="images that run together (default 64)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    add("--amp", action="store_true", help="run the network in bfloat16 (default off)")
    add = parser.add_argument_group("what is written").add_argument
    add("--out", type=Path, default=Path("samples.png"), help="captioned picture (default samples.png)")
    add("--routing-map", action="store_true", help="draw which tokens were processed, first 3 images: NAME-routing.png")
    add("--npz", type=Path, help="all images as one array, uint8 NHWC under the key arr_0, for FID tools")
    add("--png-dir", type=Path, help="all images as 000000.png, ... in this folder, for FID tools")
    return parser


def table_of(args: argparse.Namespace, model: DiT) -> torch.Tensor:
    """The ratio table (L, C) that the flags ask for; with --round-k, such that each k is a multiple, 1, or all."""
    tokens = model.config.tokens
    if args.dense:
        return torch.zeros(model.config.depth, 1)
    if args.ratios:
        ratios = read_ratios(args.ratios, model.config.depth)
    else:
        ratios = model.ratios.detach().cpu()
    k = (tokens_processed(ratios, tokens) / args.round_k).round() * args.round_k
    return 1 - k.clamp(1, tokens) / tokens


def check_outputs(args: argparse.Namespace, count: int) -> None:
    """Raises InputError if what the flags promise cannot be written, or would lie among pictures of another run."""
    files = [args.out]
    if args.routing_map:
        files.append(routing_map_of(args.out))
    if args.npz:
        files.append(args.npz)
    if args.png_dir:
        files.append(args.png_dir / png_name(0))
        others = {path.name for path in args.png_dir.glob("*.png")} - {png_name(i) for i in range(count)}
        if others:
            raise InputError(f"--png-dir {args.png_dir} holds other pictures, as {min(others)}; give another folder")
    if len(set(files)) < len(files):
        raise InputError(f"--out and --npz are both {args.out}; give two names")
    for path in files:  # before the work, not after
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
        with input_errors(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path.parent, os.W_OK):
                raise InputError("its folder is read-only")


def png_name(number: int) -> str:
    return f"{number:06d}.png"


def routing_map_of(out: Path) -> Path:
    return out.with_name(out.stem + "-routing.png")


def draw_sheet(images: np.ndarray, captions: Sequence[str], options: dict) -> Image.Image:
    """The first 64 images over their captions; in inpainting behind the picture and what the model sees of it."""
    images = images[:64]
    captions = captions[:64]
    if "known" in options:
        known, mask = options["known"], options["mask"]
        given = to_uint8(torch.stack([known, known * (1 - mask)]))
        images = np.concatenate([given, images])
        captions = ["the picture", "what the model sees, grey to be filled", *captions]
    return draw_samples(images, captions)


def main() -> int | None:
    args = make_parser().parse_args()
    if (args.inpaint is None) != (args.mask is None):
        raise InputError("--inpaint and --mask go together")
    if args.guidance_interval[0] > args.guidance_interval[1]:
        raise InputError("the first level of --guidance-interval must not be above the second")
    if args.dense and args.ratios:
        raise InputError("--dense and --ratios do not go together")
    device = pick_device(args.device)
    model, checkpoint = read_checkpoint(args.checkpoint)
    model = model.to(device)
    config = model.config
    if config.mode == "dense" and (args.ratios or args.routing_map):
        raise InputError(f"{args.checkpoint} is a dense model: it has no trained routers for --ratios or --routing-map")
    ratios = table_of(args, model)
    options: dict = {
        "steps": args.steps,
        "guidance": args.guidance,
        "guidance_interval": tuple(args.guidance_interval),
        "ratios": ratios,
    }
    if args.inpaint:
        options.update(read_inpainting(args.inpaint, args.mask, config.image_size))
    prompts = args.prompt or list(dict.fromkeys(checkpoint["prompts"]))  # each once
    captions = prompts * args.num  # in turn, so that a larger --num only adds images at the end
    encode(config, prompts)  # which refuses unknown words
    check_outputs(args, len(captions))

    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
        warm_up = dict(options, steps=1)  # what is done but once should not count
        images_from_prompts(model, captions[: args.batch_size], args.seed, **warm_up)
        images = np.empty((len(captions), config.image_size, config.image_size, 3), np.uint8)
        seconds = 0.0
        done = 0
        try:
            for first in tqdm(range(0, len(captions), args.batch_size), unit="batch", disable=None):
                batch = captions[first : first + args.batch_size]
                start = time.perf_counter()
                images[first : first + len(batch)] = images_from_prompts(model, batch, args.seed, first, **options)
                seconds += time.perf_counter() - start
                if args.png_dir:
                    for i in range(first, first + len(batch)):
                        write_png(Image.fromarray(images[i]), args.png_dir / png_name(i))
                done += len(batch)
        except KeyboardInterrupt:
            where = f", {done} of them in {args.png_dir}" if args.png_dir else ", nothing is written"
            print(f"stopped after {done} of {len(captions)} images{where}", file=sys.stderr)
            return 130

        # The array first, the drawings after: what fails there loses nothing.
        if args.npz:
            with replace_file(args.npz) as file:
                np.savez(file, arr_0=images)
        write_png(draw_sheet(images, captions, options), args.out)
        if args.routing_map:
            write_png(draw_routing(model, captions[:3], args.seed, **options), routing_map_of(args.out))

    column_of_step = column_of(torch.linspace(1, 0, args.steps + 1)[:-1], ratios.shape[1])
    mean = float(ratios[:, column_of_step].mean())
    cost = (args.steps, args.guidance, args.guidance_interval)
    flops = sampling_flops(config, ratios, *cost)
    dense_flops = sampling_flops(config, torch.zeros_like(ratios), *cost)
    print(f"{len(images)} images, {args.steps} steps, guidance {args.guidance:g}, seed {args.seed}: {seconds:.2f} s")
    print(f"{flops / 1e9:.2f} GFLOPs an image, {1 - flops / dense_flops:.1%} fewer than dense; mean ratio {mean:.3f}")
    if len(images) > 64:
        print("the sheet shows the first 64 images")
    if args.routing_map and len(images) > 3:
        print("the routing map shows the first 3 images")
    if not args.routing_map and routing_map_of(args.out).exists():
        print(f"note: {routing_map_of(args.out)} is of an earlier run")
    written = [args.out]
    if args.routing_map:
        written.append(routing_map_of(args.out))
    if args.npz:
        written.append(args.npz)
    if args.png_dir:
        written.append(args.png_dir)
    print("wrote", *written)
    return None


if __name__ == "__main__":
    run_command(main)
