"""Tests of finetune.py, on tiny models with random weights; skipped where diffusers or accelerate is not installed.

Two processes are started once, for all runs that need them: this file, run by torchrun, is what they run.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import finetune
from accelerate.state import AcceleratorState, GradientState
from real_models import load_routing, route
from safetensors.torch import load_file, save_file

from sample import run_command

TINY = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2}
STEPS = ["--steps", "10", "--target-ratio", "0.4", "--lr", "0.01", "--ratio-lr", "0.1", "--save-every", "4"]
RUNS = {  # 16 images a step, by two processes
    "two": ["--batch-size", "8"],
    "accumulated": ["--batch-size", "4", "--accumulate", "2"],
    "checkpointed": ["--batch-size", "8", "--gradient-checkpointing"],
    "stopped": ["--batch-size", "8"],
}


def run(arguments: list[str], out: Path, stop_before: int | None = None) -> None:
    """One run of the script in this process, in float64. Each process leaves its last weights, as out/state-RANK.pt."""
    save_checkpoint = finetune.save_checkpoint
    item = finetune.Samples.__getitem__

    def save_states_too(accelerator, path):
        save_checkpoint(accelerator, path)
        model = accelerator.unwrap_model(accelerator._models[0])
        torch.save(model.state_dict(), out / f"state-{accelerator.process_index}.pt")

    def stopping_item(data, n):
        if stop_before is not None and n >= stop_before * data.total:
            raise KeyboardInterrupt
        return item(data, n)

    AcceleratorState._reset_state()
    GradientState._reset_state()
    torch.set_default_dtype(torch.float64)  # rounding is then far below what a wrong gradient would change
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.Accelerator, "end_training", lambda self: None)  # the processes are asked again
        patch.setattr(finetune, "save_checkpoint", save_states_too)
        patch.setattr(finetune.Samples, "__getitem__", stopping_item)
        patch.setattr(sys, "argv", ["finetune.py", *arguments, "--out", str(out)])
        try:
            finetune.main()
        except KeyboardInterrupt:
            pass
        finally:
            torch.set_default_dtype(torch.float32)


def run_in_two_processes(folder: Path) -> None:
    """What each of the two processes does."""
    basis = [*STEPS, "--data", str(folder / "data"), "--pretrained", str(folder)]
    for name, arguments in RUNS.items():
        run(basis + arguments, folder / name, stop_before=6 if name == "stopped" else None)
    run([*basis, *RUNS["stopped"], "--resume"], folder / "stopped")
    torch.distributed.destroy_process_group()


def write_model(folder: Path, kind: type = diffusers.PixArtTransformer2DModel, **config: object) -> None:
    torch.manual_seed(0)
    if kind is diffusers.PixArtTransformer2DModel:
        config = {"caption_channels": 12, "cross_attention_dim": 16} | config
    kind(**TINY | config).save_pretrained(folder / "transformer")


def write_samples(folder: Path, count: int = 40, side: int = 8) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    for i in range(count):
        mask = torch.ones(5)
        mask[3:] = i % 2
        sample = {"latents": torch.randn(4, side, side), "prompt_embeds": torch.randn(5, 12), "prompt_attention_mask": mask}
        save_file(sample, folder / f"{i}.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of all runs: "one" by this process, the others by two."""
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder)
    write_samples(folder / "data")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", port]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([sys.executable, *map(str, launch), __file__, str(folder)], check=True, env=environment, timeout=300)
    run([*STEPS, "--data", str(folder / "data"), "--pretrained", str(folder), "--batch-size", "16"], folder / "one")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(runs, name):
    expected = torch.load(runs / "one" / "state-0.pt")
    states = [torch.load(runs / name / f"state-{rank}.pt") for rank in (0, 1)]
    differences = [float((states[0][key] - value).abs().max()) for key, value in expected.items()]
    print(f"\n{name}: at most {max(differences):.1e} from one process, mean ratio {expected['routing.ratios'].mean():.3f}")
    assert states[0].keys() == expected.keys()
    assert max(differences) < 1e-6
    for key in expected:
        assert torch.equal(states[0][key], states[1][key]), key
    assert expected["routing.ratios"].unique().numel() > 20  # the cells have gone ways of their own
    assert expected["routing.layers.0.router.weight"].any()


if __name__ == "__main__":
    run_in_two_processes(Path(sys.argv[1]))
