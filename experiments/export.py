"""Make a small checkpoint for sampling and for --init out of a run: the averaged weights alone, in half precision.

python experiments/export.py runs/shapes/checkpoint.pt assets/shapes_routed.pt
"""

from pathlib import Path

import torch
from common import tools

from diffratio_mod import InputError


def main() -> None:
    parser = tools.Parser(__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    model, checkpoint = tools.read_checkpoint(args.source)
    # The ratios stay in single precision: a rounded ratio could change the number of tokens that a layer processes.
    ema = {name: value if name == "ratios" else value.half() for name, value in model.state_dict().items()}
    if not all(value.isfinite().all() for value in ema.values()):
        raise InputError(f"{args.source} holds weights that are too large for half precision")
    with tools.replace_file(args.target) as file:
        torch.save({name: checkpoint[name] for name in ("config", "prompts", "step", "made_by")} | {"ema": ema}, file)
    print(f"{args.target}: {args.target.stat().st_size / 1e6:.1f} MB, step {checkpoint['step']}")


if __name__ == "__main__":
    tools.run_command(main)
