"""Sample with trained models, record everything, and write one page to play with: lesson/explorer.html.

    python lesson/explorer.py                                                    # the shipped models, half a minute
    python lesson/explorer.py runs/shapes/checkpoint.pt --out my_explorer.html   # your own

The page needs no network and no library: open it in a browser. Each prompt is sampled with five tables from the same
noise; for every step it has what entered, the guess of the image, which tokens each layer processed, the scores of the
routers and the cost. Only the records are written: what the page looks like and what it says stays as in explorer.html.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import re
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import sample as tools  # before torch

# isort: split
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffratio_mod import Config, DiT, InputError, RoutedLayer, column_of
from train_cifar import HELD_OUT

SHIPPED = [HERE.parent / "assets" / name for name in ("shapes_routed.pt", "cifar_routed.pt")]
PAGE = HERE / "explorer.html"
RECORDS = re.compile(r'(?<=<script type="application/json" id="data">).*?(?=</script>)', re.DOTALL)  # in the page
LARGEST = 3_000_000  # bytes of the page
SHAPES = ["a red circle", "a red circle above a blue square", "a cyan cross right of a red circle", "a purple circle"]
SHAPES += ["a green square left of a yellow triangle", "a blue cross below a purple circle"]  # some pairs are held out

# --- One sampling run, recorded --------------------------------------------------------------------------------------


class DrawnLayer(RoutedLayer):
    """The tokens are drawn by chance, and every gate is 1. `drawn` is set before each forward pass: see `record`."""

    drawn: Tensor  # (B, N), each row a permutation

    def score_and_sort(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(x[:, :, 0], 0.5), self.drawn


def record(model: DiT, prompts: list[str], table: Tensor, chance: bool, seed: int, **options) -> dict[str, np.ndarray]:
    """Sample each prompt with a table (L, C); chance: tokens are drawn, no router chooses. T steps, B prompts:

    noisy and guess, uint8 (T, B, S, S, 3): what enters the model at each step, and what it takes the image to be.
    processed, booleans (T, L, B, N), and score, float (T, L, B, N): of each layer's tokens.
    """
    B, L, N = len(prompts), model.config.depth, model.config.tokens
    noisy, guess, records, rng = [], [], [], torch.Generator().manual_seed(seed)

    def draw(layer: torch.nn.Module, inputs: tuple) -> None:
        layer.drawn = torch.rand(inputs[0].shape[:2], generator=rng).argsort(dim=1)

    hooks = tools.record_routing(model, records)
    hooks.append(model.register_forward_pre_hook(lambda _, inputs: noisy.append(tools.to_uint8(inputs[0][:B]))))
    for layer in model.layers if chance else []:
        layer.__class__ = DrawnLayer
        hooks.append(layer.register_forward_pre_hook(draw))
    tools.images_from_prompts(
        model, prompts, seed, ratios=table, hook=lambda _, x0: guess.append(tools.to_uint8(x0)), **options
    )
    for hook in hooks:
        hook.remove()
    for layer in model.layers:
        layer.__class__ = RoutedLayer
    # With guidance, a batch is the prompts and again as many null captions. Shown is the routing of the prompts.
    score = torch.stack([score[:B] for score, _ in records])  # (T * L, B, N)
    processed = [torch.zeros(B, N, dtype=torch.bool).scatter(1, order[:B], True) for _, order in records]
    found = {"score": score.view(-1, L, B, N).numpy(), "processed": torch.stack(processed).view(-1, L, B, N).numpy()}
    return found | {"noisy": np.stack(noisy), "guess": np.stack(guess)}


@functools.cache  # tables share columns
def flops(config: Config, column: tuple[float, ...], steps: int, guidance: float) -> int:
    return tools.sampling_flops(config, torch.tensor(column).unsqueeze(1), steps, guidance)


def costs(config: Config, table: Tensor, columns: list[int], guidance: float) -> tuple[int, list[int]]:
    """FLOPs to encode the caption of an image, and of each step."""
    ratios = [tuple(column) for column in table.T.tolist()]
    caption = 2 * flops(config, ratios[0], 1, guidance) - flops(config, ratios[0], 2, guidance)
    return caption, [flops(config, ratios[c], 1, guidance) - caption for c in columns]


# --- Packing ---------------------------------------------------------------------------------------------------------


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def sprite(images: np.ndarray, quality: int) -> str:
    """Images (T, B, S, S, 3) as one JPEG: a row a prompt, a column a step. Its blocks of 8 pixels fit S = 24 and 32."""
    T, B, S = images.shape[:3]
    file, sheet = io.BytesIO(), images.transpose(1, 2, 0, 3, 4).reshape(B * S, T * S, 3)
    Image.fromarray(sheet).save(file, "JPEG", quality=quality, subsampling=0)
    return text_of(file.getvalue())


def pack(run: dict[str, np.ndarray]) -> dict[str, str]:
    """A run as text. bits: processed, ordered (B, T, L, N). scores: hundredths (B, L, N, T), each less the last."""
    bits = np.packbits(run["processed"].transpose(2, 0, 1, 3))
    scores = (100 * run["score"]).round().astype(np.uint8).transpose(2, 1, 3, 0)
    scores = np.diff(scores, axis=3, prepend=np.uint8(0))  # modulo 256; scores move little from step to step
    packed = {"noisy": sprite(run["noisy"], 50), "guess": sprite(run["guess"], 85)}
    return packed | {name: text_of(zlib.compress(z.tobytes(), 9)) for name, z in (("bits", bits), ("scores", scores))}


def explore(path: Path, steps: int, guidance: float, seed: int, count: int) -> dict:
    """All that the page needs of one checkpoint."""
    model, checkpoint = tools.read_checkpoint(path)
    config, learned = model.config, model.ratios.detach()
    if config.mode == "dense":
        raise InputError(f"{path} is a dense model, it has no trained routers to look at; give a routed one")
    shapes = set(" ".join(SHAPES).split()) <= set(config.vocabulary)
    known = list(dict.fromkeys(checkpoint["prompts"]))
    prompts = SHAPES if shapes else [known[i * len(known) // count] for i in range(min(count, len(known)))]
    even, none = torch.full_like(learned, float(learned.mean())), torch.zeros_like(learned)
    tables = {"learned": learned, "uniform": even, "reversed": learned.flip(1), "random tokens": learned, "dense": none}
    levels, packed = torch.linspace(1, 0, steps + 1)[:-1], []
    columns = column_of(levels, learned.shape[1]).tolist()
    for name, table in tables.items():
        chance = name == "random tokens"
        run = record(model, prompts, table, chance, seed, steps=steps, guidance=guidance)
        caption, step_costs = costs(config, table, columns, guidance)
        ratios = [[round(ratio, 4) for ratio in row] for row in table.tolist()]
        k = run["processed"][:, :, 0].sum(axis=2).tolist()  # (T, L); all images have the same
        about = {"name": name, "chance": chance, "ratios": ratios, "k": k, "flops": step_costs}
        packed.append(about | pack(run))
    pairs = [set(zip(prompt.split(), prompt.split()[1:])) for prompt in prompts]
    kinds = ["held out" if pair & set(HELD_OUT) else "seen" if shapes else "" for pair in pairs]
    return {
        "name": "Coloured shapes" if shapes else "Photographs",
        "file": path.name,
        **{name: getattr(config, name) for name in ("image_size", "patch_size", "depth")},
        "levels": [round(t, 4) for t in levels.tolist()],
        "columns": columns,
        "prompts": [{"text": text, "kind": kind} for text, kind in zip(prompts, kinds)],
        "captionFlops": caption,
        "tables": packed,
    }


def main() -> None:
    parser = tools.Parser(__doc__)
    add, number = parser.add_argument, tools.number
    add("checkpoints", nargs="*", type=Path, default=SHIPPED, help="of routed models (default: those in assets/)")
    add("--out", type=Path, default=PAGE, help="the page (default lesson/explorer.html)")
    add("--steps", type=number(int, 2, 100), default=20, help="denoising steps (default 20)")
    add("--guidance", type=number(float, 0, 100), default=3.0, help="1 is off, at half the cost (default 3)")
    add("--prompts", type=number(int, 1, 100), default=5, help="of a model of photographs (default 5)")
    add("--seed", type=number(int, 0, 2**40), default=0, help="seed of the noise (default 0)")
    args = parser.parse_args()
    models = [explore(path, args.steps, args.guidance, args.seed, args.prompts) for path in args.checkpoints]
    readme = HERE.parent / "README.md"
    try:
        link = Path(os.path.relpath(readme, args.out.parent)).as_posix()
    except ValueError:  # on another drive of Windows
        link = readme.as_uri()
    data = {"guidance": args.guidance, "seed": args.seed, "readme": link, "models": models}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no tag within the records
    page = RECORDS.sub(lambda _: text, PAGE.read_text(encoding="utf-8"), count=1).encode()
    if len(page) > LARGEST:
        raise InputError(
            f"the page would have {len(page) / 1e6:.1f} MB, at most {LARGEST / 1e6:g} may be; give fewer --prompts"
        )
    with tools.replace_file(args.out) as file:
        file.write(page)
    print(f"wrote {args.out}, {len(page) / 1e6:.2f} MB")


if __name__ == "__main__":
    tools.run_command(main)
