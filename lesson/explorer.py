"""Put a routed model into the page lesson/explorer.html, which samples with it in the browser.

    python lesson/explorer.py                                                    # the shipped model, a second
    python lesson/explorer.py runs/shapes/checkpoint.pt --out my_explorer.html   # your own, with its sizes and words

Only the model in the page is replaced: what the page looks like, says and computes stays as in explorer.html. It needs
no network and no library; open it in a browser.

The weights are stored as bfloat16: half of the bits, and of float32's 24 significant ones 8 are left, with which mixed
precision multiplies, too. As text for a page they take 3.8 MB. float16 has 11 significant bits, but takes 4.6 MB,
because bits of a mantissa are noise, which cannot be compressed. All else in the page is computed in float32. The ratio
table is stored as it is, so that each k is the same.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from diffratio_mod import DiT, InputError
from sample import Parser, read_checkpoint, replace_file, run_command
from train_cifar import COLOURS, RELATIONS, SHAPES

SHIPPED = HERE.parent / "assets" / "shapes_routed.pt"
PAGE = HERE / "explorer.html"
MODEL = re.compile(r'(?<=<script type="application/json" id="model">).*?(?=</script>)', re.DOTALL)  # in the page


def pack_weights(weights: dict[str, torch.Tensor]) -> str:
    """All weights, one after the other, as text: bfloat16, first all upper bytes, then all lower ones, deflated.

    The upper bytes, sign and exponent, repeat themselves and shrink to 41 %; the lower ones, mostly mantissa, do not.
    """
    values = torch.cat([weight.flatten() for weight in weights.values()])
    bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    upper = (bits >> 8).astype(np.uint8)
    lower = (bits & 255).astype(np.uint8)
    return base64.b64encode(zlib.compress(upper.tobytes() + lower.tobytes(), 9)).decode()


def describe(model: DiT, checkpoint: dict, path: Path) -> dict:
    """All that the page needs of a checkpoint. Raises InputError for a dense one."""
    config = model.config
    if config.mode == "dense":
        raise InputError(f"{path} is a dense model, it has no trained routers to play with; give a routed one")
    weights = model.state_dict()
    ratios = weights.pop("ratios")
    words_of_shapes = {"a", *COLOURS, *SHAPES, *" ".join(RELATIONS).split()}
    grammar = None  # a free text stands in place of menus
    if words_of_shapes <= set(config.vocabulary):
        grammar = {"colours": list(COLOURS), "shapes": list(SHAPES), "relations": list(RELATIONS)}
    return {
        "file": path.name,
        "config": asdict(config),
        "prompts": checkpoint.get("prompts") or [""],
        "grammar": grammar,
        "ratios": ratios.tolist(),
        "shapes": {name: list(weight.shape) for name, weight in weights.items()},
        "weights": pack_weights(weights),
    }


def link_to_front_page(page: Path) -> str:
    readme = HERE.parent / "README.md"
    try:
        return Path(os.path.relpath(readme, page.resolve().parent)).as_posix()
    except ValueError:  # on another drive of Windows
        return readme.as_uri()


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=SHIPPED, help="default: assets/shapes_routed.pt")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (default lesson/explorer.html)")
    args = parser.parse_args()
    model, checkpoint = read_checkpoint(args.checkpoint)
    content = describe(model, checkpoint, args.checkpoint)
    content["readme"] = link_to_front_page(args.out)
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")  # no tag within the model
    page = MODEL.sub(lambda _: text, PAGE.read_text(encoding="utf-8"), count=1).encode()
    with replace_file(args.out) as file:
        file.write(page)
    print(f"wrote {args.out}, {len(page) / 1e6:.2f} MB")


if __name__ == "__main__":
    run_command(main)
