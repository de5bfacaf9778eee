"""Tests of finetune.py, on tiny models with random weights; skipped where diffusers or accelerate is not installed.

Two processes are started once, for all runs that need them: this file, run by torchrun, is what they run.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from test_real_models import KINDS, call, diffusers, inputs, tiny  # isort: skip (skips all if there is no diffusers)

import finetune
from accelerate.state import AcceleratorState, GradientState
from real_models import load_routing, route
from safetensors.torch import load_file, save_file

from sample import run_command

STEPS = ["--steps", "10", "--target-ratio", "0.4", "--lr", "0.01", "--ratio-lr", "0.1"]
STEPS += ["--save-every", "4", "--log-every", "1"]
RUNS = {  # 16 images a step, by two processes
    "two": ["--batch-size", "8"],
    "accumulated": ["--batch-size", "4", "--accumulate", "2"],
    "checkpointed": ["--batch-size", "8", "--gradient-checkpointing"],
    "stopped": ["--batch-size", "8"],
}


def run(
    folder: Path, out: str, arguments: list[str], stop_before: int | None = None, dtype: torch.dtype = torch.float64
) -> None:
    """A run on folder/data. Each process leaves its last weights, not averaged, as folder/out/state-RANK.pt.

    In float64 rounding is far below what a wrong gradient would change.
    """
    save_checkpoint = finetune.save_checkpoint
    item = finetune.Samples.__getitem__

    def save_states_too(accelerator, path):
        save_checkpoint(accelerator, path)
        model = accelerator.unwrap_model(accelerator._models[0])
        assert not model.training  # in which a DiT would drop labels on top of those that Samples drops
        assert model.is_gradient_checkpointing == ("--gradient-checkpointing" in arguments)
        torch.save(model.state_dict(), path.with_name(f"state-{accelerator.process_index}.pt"))

    def item_or_stop(data, n):
        if stop_before is not None and n >= stop_before * data.total:
            raise KeyboardInterrupt
        return item(data, n)

    AcceleratorState._reset_state()
    GradientState._reset_state()
    argv = ["finetune.py", *arguments, "--data", str(folder / "data"), "--out", str(folder / out)]
    torch.set_default_dtype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(finetune, "save_checkpoint", save_states_too)
        patch.setattr(finetune.Samples, "__getitem__", item_or_stop)
        patch.setattr(finetune.Accelerator, "end_training", lambda self: None)  # the two processes are asked again
        try:
            finetune.main()
        except KeyboardInterrupt:
            pass
        finally:
            torch.set_default_dtype(torch.float32)


def run_in_two_processes(folder: Path) -> None:
    """What each of the two processes does."""
    for name, arguments in RUNS.items():
        stop_before = 6 if name == "stopped" else None
        run(folder, name, [*STEPS, "--pretrained", str(folder), *arguments], stop_before)
    run(folder, "stopped", [*STEPS, "--pretrained", str(folder), *RUNS["stopped"], "--resume"])
    torch.distributed.destroy_process_group()


def write_model_and_samples(folder: Path, kind: str = "pixart", side: int = 8) -> None:
    tiny(kind).save_pretrained(folder / "transformer")
    (folder / "data").mkdir()
    latents, condition = inputs(kind, 40, side)
    names = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    for i in range(40):
        sample = {names.get(name, name): values[i].clone() for name, values in condition.items()}
        sample["latents"] = latents[i].clone()
        save_file(sample, folder / "data" / f"{i}.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of all runs: "one" by this process, the others by two."""
    folder = tmp_path_factory.mktemp("runs")
    write_model_and_samples(folder)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    torchrun = ["torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", port]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", *torchrun, __file__, str(folder)]
    subprocess.run(command, check=True, env=environment, timeout=300)
    run(folder, "one", [*STEPS, "--pretrained", str(folder), "--batch-size", "16"])
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(runs, name):
    expected = torch.load(runs / "one" / "state-0.pt")
    first = torch.load(runs / name / "state-0.pt")
    second = torch.load(runs / name / "state-1.pt")
    largest = max(float((first[key] - value).abs().max()) for key, value in expected.items())
    print(f"\n{name}: at most {largest:.1e} from one process")
    assert largest < 1e-6
    for key in expected:
        assert torch.equal(first[key], second[key]), key
    assert expected["routing.ratios"].unique().numel() > 20  # the cells have gone ways of their own
    assert expected["routing.layers.0.router.weight"].any()


def test_a_run_that_is_stopped_and_resumed_equals_an_unbroken_one(runs):
    unbroken = runs / "two"
    for path in ("metrics.jsonl", "transformer/diffusion_pytorch_model.safetensors", "ratios.png"):
        assert (runs / "stopped" / path).read_bytes() == (unbroken / path).read_bytes(), path
    for path in ("state-0.pt", "routing.pt"):
        expected = torch.load(unbroken / path)
        for key, value in torch.load(runs / "stopped" / path).items():
            assert torch.equal(value, expected[key]), key


def test_weights_and_routers_are_averaged_and_the_table_is_not(runs):
    state = torch.load(runs / "one" / "state-0.pt")
    routing = torch.load(runs / "one" / "routing.pt")
    weights = load_file(runs / "one" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == tiny("pixart").state_dict().keys()
    assert torch.equal(routing["ratios"], state["routing.ratios"])
    for file, name, prefix in ((routing, "layers.0.router.weight", "routing."), (weights, "proj_out.weight", "")):
        assert 0 < (file[name] - state[prefix + name]).abs().max() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_samples_train_densely_then_routed_and_sample(kind, tmp_path):
    folder = tmp_path
    write_model_and_samples(folder, kind)
    ratios = torch.tensor([0.0, 0.6, 0.6]).unsqueeze(1).expand(3, 4)  # a mean of 0.4: the pull is downwards
    torch.save(route(tiny(kind), ratios=ratios).state_dict(), folder / "start.pt")
    short = ["--steps", "12", "--batch-size", "8", "--ratio-lr", "0.01", "--mixed-precision", "bf16"]
    run(folder, "dense", [*short, "--pretrained", str(folder), "--target-ratio", "0"], dtype=torch.float32)
    assert not (folder / "dense" / "routing.pt").exists()
    routed = ["--pretrained", str(folder / "dense"), "--routing", str(folder / "start.pt")]
    run(folder, "routed", [*short, *routed, "--ema-decay", "0"], dtype=torch.float32)
    last = json.loads((folder / "routed" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 12
    assert 0.3 < last["mean_ratio"] < 0.39
    assert last["ratios"][0] == [0.0] * 4  # not below, where k has no meaning

    model = KINDS[kind][0].from_pretrained(folder / "routed" / "transformer")
    load_routing(model, folder / "routed" / "routing.pt")
    scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(folder / "routed" / "scheduler")
    seen = []
    model.transformer_blocks[1].ff.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    scheduler.set_timesteps(4)
    x, condition = inputs(kind)
    for t in scheduler.timesteps:
        x = scheduler.step(call(model, x, t, condition)[:, :4], t, x).prev_sample
    assert x.isfinite().all()
    assert max(seen) < 16  # of 16 tokens


def test_the_images_of_a_step_are_apart(tmp_path):
    write_model_and_samples(tmp_path)
    data = finetune.Samples(tmp_path / "data", tiny("pixart"), 16, seed=0)
    data.null = {"prompt_embeds": torch.full((5, 12), 7.0), "prompt_attention_mask": torch.ones(5)}
    step = [data[n] for n in range(160, 320)]
    assert len({item["noise"].sum().item() for item in step}) == 160
    parts = [int(item["timestep"]) * 16 // 1000 for item in step]
    assert all(abs(part - n % 16) <= 1 for n, part in enumerate(parts))  # 1: the timestep is rounded down
    assert 5 <= sum((item["encoder_hidden_states"] == 7).all().item() for item in step) <= 30


def test_the_data_that_it_makes_fits_its_own_model(tmp_path):
    finetune.make_data(tmp_path, 3)
    model, _ = finetune.load_model(None)
    item = finetune.Samples(tmp_path, model, 8, seed=0)[0]
    assert item["latents"].shape == (3, 24, 24)
    assert item["latents"].dtype == torch.float32  # in the files it is half of that
    assert load_file(tmp_path / "null.safetensors")["prompt_attention_mask"].sum() == 1


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capfd):
    write_model_and_samples(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "vae").mkdir()
    diffusers.AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "vae" / "transformer")
    (tmp_path / "large").mkdir()
    write_model_and_samples(tmp_path / "large", side=16)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "0.safetensors").write_bytes(b"PK")
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    torch.save(route(tiny("pixart", num_layers=5)).state_dict(), tmp_path / "deep.pt")
    cases = {
        "where are the samples": [],
        "holds no samples": ["--data", "empty"],
        r"latents must be (4, 8, 8), and is (4, 16, 16)": ["--data", "large/data"],
        "cannot read": ["--data", "damaged"],
        "AutoencoderKL cannot be routed": ["--data", "data", "--pretrained", "vae"],
        "does not hold the routing of this model": ["--data", "data", "--routing", "deep.pt"],
        "holds a run": ["--data", "data", "--out", "run"],
        "cannot go on": ["--data", "data", "--out", "run", "--resume"],
        "no checkpoint to go on from": ["--data", "data", "--resume"],
    }
    monkeypatch.chdir(tmp_path)
    for message, arguments in cases.items():
        monkeypatch.setattr(sys, "argv", ["finetune.py", "--pretrained", ".", "--out", "out", *arguments])
        with pytest.raises(SystemExit) as stop:
            run_command(finetune.main)
        lines = capfd.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert lines[-1].startswith("error: ")
        assert message in lines[-1]
        assert len(lines) == 1, lines
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    run_in_two_processes(Path(sys.argv[1]))
