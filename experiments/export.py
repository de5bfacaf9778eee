"""Make a small checkpoint for sampling and for --init out of a run: the averaged weights alone, in half precision.

The table stays in single precision. read_checkpoint gives float32 again.

python experiments/export.py runs/shapes/checkpoint.pt assets/shapes_routed.pt
"""

from pathlib import Path

import common  # noqa: F401 (which makes the files of the project importable)
import torch

from diffratio_mod import InputError
from sample import Parser, read_checkpoint, replace_file, run_command


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    model, checkpoint = read_checkpoint(args.source)
    # The ratios stay in single precision: a rounded ratio could change the number of tokens that a layer processes.
    ema = {name: value if name == "ratios" else value.half() for name, value in model.state_dict().items()}
    if not all(value.isfinite().all() for value in ema.values()):
        raise InputError(f"{args.source} holds weights that are too large for half precision")
    kept = {name: checkpoint[name] for name in ("config", "step", "made_by")}
    prompts = list(dict.fromkeys(checkpoint["prompts"]))  # each once
    with replace_file(args.target) as file:
        torch.save(kept | {"prompts": prompts, "ema": ema}, file)
    print(f"{args.target}: {args.target.stat().st_size / 1e6:.1f} MB, step {checkpoint['step']}")


if __name__ == "__main__":
    run_command(main)
