"""Tests of finetune.py and samples.py, on tiny models; skipped where diffusers or accelerate is not installed.

Two processes are started once, for all runs that need them: this file, run by torchrun, is what they run.
"""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from test_routing_diffusers import KINDS, call, diffusers, inputs, tiny  # isort: skip (skips all without diffusers)

import finetune
import samples
from accelerate.state import AcceleratorState, GradientState
from routing_diffusers import diffusion_loss, load_routing, route
from safetensors.torch import load_file, save_file

from diffratio_mod import RoutedLayer
from sample import run_command

STEPS = ["--steps", "10", "--target-ratio", "0.4", "--lr", "0.01", "--ratio-lr", "0.1"]
STEPS += ["--save-every", "4", "--log-every", "1", "--validation", "0.1", "--validate-every", "5"]
RUNS = {  # 16 images a step, by two processes
    "two": ["--batch-size", "8"],
    "accumulated": ["--batch-size", "4", "--accumulate", "2", "--gradient-checkpointing"],
    "stopped": ["--batch-size", "8"],
}


def run(folder: Path, out: str, arguments: list[str], dtype: torch.dtype = torch.float64, stop: int | None = None):
    """A run on folder/data. Each process leaves its last weights, not averaged, as folder/out/state-RANK.pt.

    In float64 rounding is far below what a wrong gradient would change. stop: the last process gets a SIGTERM when it
    reads for this step.
    """
    save_checkpoint = finetune.save_checkpoint
    item = finetune.Samples.__getitem__

    def save_states_too(accelerator, path):
        save_checkpoint(accelerator, path)
        model = accelerator.unwrap_model(accelerator._models[0])
        assert not model.training  # in which a DiT would drop labels on top of those that Samples drops
        assert model.is_gradient_checkpointing == ("--gradient-checkpointing" in arguments)
        torch.save(model.state_dict(), path.with_name(f"state-{accelerator.process_index}.pt"))

    def item_and_signal(data, n):
        if n == (stop or -1) * data.total - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return item(data, n)

    AcceleratorState._reset_state()
    GradientState._reset_state()
    torch.set_default_dtype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "save_checkpoint", save_states_too)
        patch.setattr(finetune.Samples, "__getitem__", item_and_signal)
        patch.setattr(finetune.Accelerator, "end_training", lambda self: None)  # the two processes are asked again
        try:
            return finetune.main([*arguments, "--data", str(folder / "data"), "--out", str(folder / out)])
        finally:
            torch.set_default_dtype(torch.float32)


def run_in_two_processes(folder: Path) -> None:
    """What each of the two processes does."""
    for name, arguments in RUNS.items():
        code = run(
            folder, name, [*STEPS, "--pretrained", str(folder), *arguments], stop=6 if name == "stopped" else None
        )
        assert code == (143 if name == "stopped" else None)
    run(folder, "stopped", [*STEPS, "--pretrained", str(folder), *RUNS["stopped"], "--resume"])
    torch.distributed.destroy_process_group()


def write_model_and_samples(folder: Path, kind: str = "pixart", side: int = 8) -> None:
    """A model, its scheduler, and 40 samples, whose captions have 1 to 5 words."""
    tiny(kind).save_pretrained(folder / "transformer")
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    (folder / "data").mkdir()
    latents, condition = inputs(kind, 40, side)
    for i in range(40):
        sample = {"latents": latents[i].clone()}
        if kind == "dit":
            sample["class_labels"] = condition["class_labels"][i].clone()
        else:
            sample["prompt_embeds"] = condition["encoder_hidden_states"][i, : 1 + i % 5].clone()
        save_file(sample, folder / "data" / f"{i:02d}.safetensors")


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


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- Several processes, and runs that end early ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two", "accumulated"])
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
    for line, other in zip(metrics(runs / "one"), metrics(runs / name), strict=True):
        for key in line.keys() - {"ratios"}:
            assert other[key] == pytest.approx(line[key], abs=1e-6), key


def test_a_signal_to_one_of_two_processes_stops_both_and_the_resumed_run_equals_an_unbroken_one(runs):
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


def test_signals_are_as_before_after_a_run_that_one_has_stopped(runs, tmp_path):
    shutil.copytree(runs / "data", tmp_path / "data")
    mine = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    short = ["--pretrained", str(runs), "--steps", "4", "--batch-size", "4", "--validation", "0"]
    assert run(tmp_path, "out", short, stop=2) == 143
    assert signal.signal(signal.SIGUSR1, mine) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [path.name for path in finetune.checkpoints(tmp_path / "out")] == ["checkpoint-2"]


def test_resume_refuses_other_flags_and_writes_results_that_are_missing(runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "data", tmp_path / "data")
    short = ["--pretrained", str(runs), "--steps", "4", "--batch-size", "4", "--save-every", "2"]
    short += ["--validation", "0"]
    replace_file = finetune.replace_file

    def full_disk(path):
        if path.name == "routing.pt" and finetune.checkpoints(path.parent)[-1].name == "checkpoint-4":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace_file(path)

    monkeypatch.setattr(finetune, "replace_file", full_disk)
    with pytest.raises(finetune.InputError, match="No space left on device"):
        run(tmp_path, "out", short)
    monkeypatch.undo()
    before = (tmp_path / "out" / "routing.pt").read_bytes()
    other = {"--lr": "0.5", "--seed": "1", "--batch-size": "2", "--target-ratio": "0.5", "--ema-decay": "0.5"}
    for flag, value in other.items():
        with pytest.raises(finetune.InputError, match=f"has {flag} .*, not {value}"):
            run(tmp_path, "out", [*short, flag, value, "--resume"])
    assert run(tmp_path, "out", [*short, "--resume"]) is None
    assert (tmp_path / "out" / "routing.pt").read_bytes() != before
    state = torch.load(tmp_path / "out" / "state-0.pt")
    assert torch.equal(torch.load(tmp_path / "out" / "routing.pt")["ratios"], state["routing.ratios"])
    assert [line["step"] for line in metrics(tmp_path / "out")] == [2, 4]


# --- What is trained -------------------------------------------------------------------------------------------------


@pytest.fixture
def upper_half(monkeypatch) -> list[float]:
    """In training, of each layer that runs: the share of the bypassing tokens that lie in the picture's upper half."""
    shares = []
    forward = RoutedLayer.forward

    def record(layer, x, *context, **way):
        if "ratio" in way and layer.router.weight.any():
            order = layer.score_and_sort(x)[1]
            shares.append(float((order[:, -4:] < x.shape[1] / 2).double().mean()))
        return forward(layer, x, *context, **way)

    monkeypatch.setattr(RoutedLayer, "forward", record)
    return shares


@pytest.mark.parametrize("kind", KINDS)
def test_samples_train_densely_then_routed_in_bfloat16_and_sample(kind, tmp_path, upper_half):
    folder = tmp_path
    write_model_and_samples(folder, kind)
    ratios = torch.tensor([0.0, 0.6, 0.6]).unsqueeze(1).expand(3, 4)  # a mean of 0.4: the pull is downwards
    torch.save(route(tiny(kind), ratios=ratios).state_dict(), folder / "start.pt")
    short = ["--steps", "12", "--batch-size", "8", "--ratio-lr", "0.01", "--mixed-precision", "bf16"]
    run(folder, "dense", [*short, "--pretrained", str(folder), "--target-ratio", "0"], torch.float32)
    assert not (folder / "dense" / "routing.pt").exists()
    shutil.copytree(folder / "dense" / "transformer", folder / "transformer", dirs_exist_ok=True)
    routed = ["--pretrained", str(folder), "--routing", str(folder / "start.pt")]
    run(folder, "routed", [*short, *routed, "--ema-decay", "0", "--log-every", "12"], torch.float32)
    last = metrics(folder / "routed")[-1]
    assert last["step"] == 12
    assert 0.3 < last["mean_ratio"] < 0.39
    assert last["ratios"][0] == [0.0] * 4  # not below, where k has no meaning
    assert sum(upper_half) / len(upper_half) > 0.4  # ties at the cut would leave the lower half behind

    model = KINDS[kind][0].from_pretrained(folder / "routed" / "transformer")
    load_routing(model, folder / "routed" / "routing.pt")
    scheduler = diffusers.DPMSolverMultistepScheduler()
    seen = []
    model.transformer_blocks[1].ff.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    scheduler.set_timesteps(4)
    x, condition = inputs(kind)
    for t in scheduler.timesteps:
        x = scheduler.step(call(model, x, t, condition)[:, :4], t, x).prev_sample
    assert x.isfinite().all()
    assert max(seen) < 16  # of 16 tokens


def test_train_routing_leaves_the_weights_alone_and_starts_from_a_table(runs, tmp_path):
    shutil.copytree(runs / "data", tmp_path / "data")
    (tmp_path / "table.json").write_text(json.dumps({"ratios": [[0.1, 0.2]] * 3}))
    arguments = [*STEPS, "--pretrained", str(runs), "--train", "routing", "--routing", str(tmp_path / "table.json")]
    run(tmp_path, "out", [*arguments, "--batch-size", "4", "--gradient-checkpointing", "--steps", "3"], torch.float32)
    state = torch.load(tmp_path / "out" / "state-0.pt")
    for key, value in tiny("pixart").state_dict().items():
        assert torch.equal(state[key], value), key
    assert state["routing.ratios"].shape == (3, 2)
    assert state["routing.ratios"].mean() > 0.15
    assert state["routing.layers.1.router.weight"].any()
    assert not (tmp_path / "out" / "transformer").exists()
    assert (tmp_path / "out" / "routing.pt").exists()


@pytest.fixture
def in_float64():
    """As the two processes ran: noise is drawn in this precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_held_out_loss_is_that_of_the_weights_that_are_written(runs, in_float64):
    last = metrics(runs / "one")[-1]
    model = KINDS["pixart"][0].from_pretrained(runs / "one" / "transformer", low_cpu_mem_usage=False)
    routing = load_routing(model, runs / "one" / "routing.pt")
    files = sorted((runs / "data").iterdir())[9::10]
    held = samples.Samples(files, runs / "no", model, total=160, seed=12345)
    batch = samples.put_together([held[n] for n in range(160)])
    x = [batch.pop(name) for name in ("latents", "noise", "timestep")]
    noisy = diffusers.DDPMScheduler().add_noise(*x)
    for name in ("validation_loss", "validation_loss_with_nothing_skipped"):
        with torch.no_grad():
            losses = diffusion_loss(model, noisy, x[2], x[1], batch).view(10, 16).mean(dim=1)
        assert last[name] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert last[name + "_by_region"] == pytest.approx(losses.tolist(), rel=1e-5)
        torch.nn.init.zeros_(routing.ratios)
    assert last["validation_loss"] != last["validation_loss_with_nothing_skipped"]
    assert [line["step"] for line in metrics(runs / "one") if "validation_loss" in line] == [5, 10]


# --- Samples ---------------------------------------------------------------------------------------------------------


def test_each_caption_of_a_batch_gives_the_loss_that_it_has_alone(runs):
    model = tiny("pixart")
    with torch.no_grad():
        data = samples.Samples(sorted((runs / "data").iterdir()), runs / "no", model, 16, seed=0)
        items = [data[n] for n in range(16)]
        assert {len(item["words"]) for item in items} == {1, 2, 3, 4, 5}

        def losses(some: list[dict]) -> torch.Tensor:
            batch = samples.put_together([dict(item) for item in some])
            noisy, noise, timestep = (batch.pop(name) for name in ("latents", "noise", "timestep"))
            return diffusion_loss(model, noisy, timestep, noise, batch)

        alone = torch.cat([losses([item]) for item in items])
        torch.testing.assert_close(losses(items), alone, rtol=0, atol=1e-6)


def test_the_images_of_a_step_are_apart(runs, tmp_path):
    save_file({"prompt_embeds": torch.full((2, 12), 7.0)}, tmp_path / "null.safetensors")
    files = sorted((runs / "data").iterdir())
    data = samples.Samples(files, tmp_path / "null.safetensors", tiny("pixart"), 16, seed=0)
    step = [data[n] for n in range(160, 320)]
    assert len({item["noise"].sum().item() for item in step}) == 160
    parts = [int(item["timestep"]) * 16 // 1000 for item in step]
    assert all(abs(part - n % 16) <= 1 for n, part in enumerate(parts))  # 1: the timestep is rounded down
    assert 5 <= sum((item["words"] == 7).all().item() for item in step) <= 30


def test_bad_input_is_one_line_and_exit_code_2(runs, tmp_path, monkeypatch, capfd):
    for name in ("data", "transformer", "scheduler"):
        shutil.copytree(runs / name, tmp_path / name)
    (tmp_path / "empty").mkdir()
    diffusers.AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "vae" / "transformer")
    shutil.copytree(tmp_path / "scheduler", tmp_path / "vae" / "scheduler")
    (tmp_path / "large").mkdir()
    save_file({"latents": torch.zeros(4, 16, 16)}, tmp_path / "large" / "0.safetensors")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "0.safetensors").write_bytes(b"PK")
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    torch.save(route(tiny("pixart", num_layers=5)).state_dict(), tmp_path / "deep.pt")
    cases = {
        "holds no samples": ["--data", "empty"],
        "latents must be (4, 8, 8), and is (4, 16, 16)": ["--data", "large"],
        "cannot use damaged": ["--data", "damaged"],
        "AutoencoderKL cannot be routed": ["--pretrained", "vae"],
        "does not hold the routing of this model": ["--routing", "deep.pt"],
        "holds a run": ["--out", "run"],
        "cannot read run/settings.json": ["--out", "run", "--resume"],
        "no checkpoint to go on from": ["--resume"],
        "--seed: must be int from 0 to": ["--seed", "4294967296"],
        "trains nothing": ["--train", "routing", "--target-ratio", "0"],
    }
    monkeypatch.chdir(tmp_path)
    for message, arguments in cases.items():
        AcceleratorState._reset_state()
        GradientState._reset_state()
        with pytest.raises(SystemExit) as stop:
            run_command(lambda a=arguments: finetune.main(["--pretrained", ".", "--data", "data", "--out", "out", *a]))
        lines = capfd.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert lines[-1].startswith("error: ")
        assert message in lines[-1]
        assert len(lines) == 1, lines
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    run_in_two_processes(Path(sys.argv[1]))
