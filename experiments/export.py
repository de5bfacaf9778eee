"""Make a small checkpoint for sampling and for --init out of a run: the EMA weights alone, in half precision.

python experiments/export.py runs/shapes/checkpoint.pt assets/shapes_routed.pt
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import read_checkpoint

source, target = map(Path, sys.argv[1:])
checkpoint = read_checkpoint(source)
# The ratios stay in single precision: a rounded ratio could change the number of tokens that a layer processes.
ema = {name: value if name == "ratios" else value.half() for name, value in checkpoint["ema"].items()}
kept = {name: checkpoint[name] for name in ("config", "prompts", "step", "made_by")}
torch.save({**kept, "ema": ema}, target)
print(
    f"{target}: {target.stat().st_size / 1e6:.1f} MB, step {checkpoint['step']} of {checkpoint['made_by'][0]['command']}"
)
