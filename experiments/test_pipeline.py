"""encode.py, finetune.py and generate.py, end to end on tiny pipelines that are made here from configurations.

Skipped where diffusers, accelerate, transformers or tokenizers is not installed.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

for name in ("diffusers", "accelerate", "transformers", "tokenizers"):
    pytest.importorskip(name)
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import encode
import finetune
import generate
import plan
import small_pipeline
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from routing_diffusers import load_routing, route
from safetensors.torch import load_file

from diffratio_mod import InputError
from sample import read_picture

CAPTIONS = ["a red circle", "a green square above a blue cross", "a cross", "a blue circle left of a red square"]
NAMES = ["plain.png", "turned.jpg", "clear.png", "more/deep.png"]
SIDE = 32


def picture(seed: int, size: tuple[int, int] = (40, 36), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels, mode).resize(size)


def randomise(model: torch.nn.Module) -> None:
    """The library starts some weights at zero, with which a prompt would change nothing."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.fixture(scope="module")
def pixart(tmp_path_factory) -> Path:
    """A PixArt pipeline in pipeline/, and in pictures/ four captioned pictures, upright or not, with alpha or not."""
    folder = tmp_path_factory.mktemp("pixart")
    torch.manual_seed(0)
    pipe = small_pipeline.make_pipeline(CAPTIONS, layers=2, heads=1, channels=4)
    randomise(pipe.transformer)
    pipe.save_pretrained(folder / "pipeline")
    (folder / "pictures" / "more").mkdir(parents=True)
    picture(0).save(folder / "pictures" / NAMES[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture(1).save(folder / "pictures" / NAMES[1], exif=exif)
    picture(2, mode="RGBA").save(folder / "pictures" / NAMES[2])
    picture(3).save(folder / "pictures" / NAMES[3])
    write_metadata(folder / "pictures", zip(NAMES, CAPTIONS))
    return folder


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    """A DiT pipeline in pipeline/, and in pictures/ two class folders."""
    folder = tmp_path_factory.mktemp("dit")
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 24, "sample_size": 16}
    vae = AutoencoderKL(block_out_channels=[4, 8], norm_num_groups=4, sample_size=SIDE,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
    pipe = DiTPipeline(DiTTransformer2DModel(**sizes, out_channels=8), vae, DDIMScheduler())
    randomise(pipe.transformer)
    pipe.save_pretrained(folder / "pipeline")
    index = json.loads((folder / "pipeline" / "model_index.json").read_text())
    (folder / "pipeline" / "model_index.json").write_text(
        json.dumps(index | {"id2label": {"3": "cat", "5": "dog, hound"}})
    )
    for i, name in enumerate(["dog/a.png", "cat/a.png", "dog/b.png"]):
        (folder / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / "pictures" / name)
    return folder


def write_metadata(folder: Path, rows) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def run_encode(folder: Path, out: Path, *more: str) -> int:
    start_anew()
    arguments = ["--pretrained", str(folder / "pipeline"), "--images", str(folder / "pictures"), "--out", str(out)]
    return encode.main([*arguments, *more])


def start_anew() -> None:
    """As in a process that has just begun: accelerate keeps its state."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors*")}


# --- Encoding --------------------------------------------------------------------------------------------------------


def test_latents_and_embeddings_are_the_pipeline_s_own_bit_for_bit(pixart, tmp_path, capfd):
    assert run_encode(pixart, tmp_path, "--batch-size", "1") == 0
    assert files_of(tmp_path).keys() == {f"{name}.safetensors" for name in [*NAMES, "null"]}
    pipe = DiffusionPipeline.from_pretrained(pixart / "pipeline")
    lengths = set()
    with torch.no_grad():
        for name, caption in zip([*NAMES, "null"], [*CAPTIONS, ""]):
            sample = load_file(tmp_path / f"{name}.safetensors")
            words = sample["prompt_embeds"]
            embeds, mask, _, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False)
            assert torch.equal(embeds[0, : len(words)], words)
            assert mask[0].sum() == len(words)
            lengths.add(len(words))
            if name != "null":
                pixels = read_picture(pixart / "pictures" / name, SIDE)
                pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
                latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
                assert torch.equal(latents[0], sample["latents"])
    assert len(lengths) > 3
    size = sum(len(data) for data in files_of(tmp_path).values()) / 1e9
    said = float(capfd.readouterr().out.split(" GB")[0].split()[-1])
    assert said == pytest.approx(size, rel=0.2)


def test_encoding_that_is_stopped_and_begun_again_gives_the_same_files(pixart, tmp_path, monkeypatch):
    assert run_encode(pixart, tmp_path / "unbroken", "--batch-size", "3") == 0
    save_file = encode.write_sample.__globals__["save_file"]
    written = []

    def stop_in_the_third(arrays, path, **options):
        written.append(path)
        if len(written) == 3:
            path.write_bytes(b"not complete")
            raise KeyboardInterrupt
        save_file(arrays, path, **options)

    monkeypatch.setitem(encode.write_sample.__globals__, "save_file", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_encode(pixart, tmp_path / "stopped", "--batch-size", "3")
    monkeypatch.undo()
    finetune_would_read = sorted((tmp_path / "stopped").rglob("*.safetensors"))
    assert len(finetune_would_read) == 2
    assert run_encode(pixart, tmp_path / "stopped", "--batch-size", "3") == 0
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "unbroken")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").rglob("*.png.safetensors")}
    assert run_encode(pixart, tmp_path / "stopped", "--batch-size", "3") == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}  # nothing was left to do
    with pytest.raises(InputError, match="resolution 32, not 16"):
        run_encode(pixart, tmp_path / "stopped", "--resolution", "16")


def test_two_processes_encode_every_picture_once(pixart, tmp_path):
    assert run_encode(pixart, tmp_path / "one", "--batch-size", "1") == 0
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    torchrun = ["torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", port]
    arguments = ["--pretrained", str(pixart / "pipeline"), "--images", str(pixart / "pictures"), "--batch-size", "1"]
    command = [sys.executable, "-m", *torchrun, encode.__file__, *arguments, "--out", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, check=True, env=environment, timeout=300)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_what_cannot_be_read_is_listed_by_name_and_left_out(pixart, tmp_path, capfd):
    shutil.copytree(pixart, tmp_path / "given")
    pictures = tmp_path / "given" / "pictures"
    (pictures / "damaged.png").write_bytes(b"\x89PNG and no more")
    for name in ("unnamed.png", "mute.png"):
        picture(5).save(pictures / name)
    rows = [*zip(NAMES, CAPTIONS), ("damaged.png", "a cross"), ("mute.png", " "), ("./plain.png", "a square")]
    write_metadata(pictures, [*rows, ("missing.png", "a cross"), ("../outside.png", "a cross")])
    assert run_encode(tmp_path / "given", tmp_path / "out") == 1
    out = capfd.readouterr().out
    for problem in (
        "damaged.png: cannot read",
        "mute.png: no caption",
        "plain.png: named twice",
        "missing.png: cannot",
    ):
        assert f"left out: {problem}" in out
    assert "left out: ../outside.png: not in" in out
    assert "left out: unnamed.png: not in metadata.jsonl" in out
    assert out.count("left out") == 6
    assert files_of(tmp_path / "out").keys() == {f"{name}.safetensors" for name in [*NAMES, "null"]}
    assert run_encode(tmp_path / "given", tmp_path / "out", "--skip-damaged") == 0


@pytest.mark.parametrize(
    ("names", "labels"),
    [(("cat", "dog"), (3, 5)), (("12", "7"), (12, 7)), (("cow", "dog"), (0, 1))],
    ids=["that the pipeline knows", "numbers", "others"],
)
def test_class_folders_get_labels(dit, tmp_path, names, labels):
    for old, new in zip(("cat", "dog"), names):
        shutil.copytree(dit / "pictures" / old, tmp_path / "pictures" / new)
    (tmp_path / "pipeline").symlink_to(dit / "pipeline")
    assert run_encode(tmp_path, tmp_path / "out") == 0
    for name, label in zip(names, labels):
        assert load_file(tmp_path / "out" / name / "a.png.safetensors")["class_labels"] == label
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == dict(zip(names, labels))
    assert len(files_of(tmp_path / "out")) == 3


# --- The whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_three_commands_lead_from_pictures_to_a_routed_pipeline(kind, request, tmp_path, capfd):
    folder = request.getfixturevalue(kind)
    assert run_encode(folder, tmp_path / "samples") == 0
    start_anew()
    name = ["--pretrained", str(folder / "pipeline")]
    short = ["--steps", "4", "--batch-size", "4", "--ratio-lr", "0.2", "--lr", "0.01", "--timestep-regions", "2"]
    reported = ["--validation", "0.3", "--validate-every", "2"]
    if kind == "pixart":
        pytest.importorskip("tensorboard")
        reported += ["--report-to", "tensorboard"]
    data = ["--data", str(tmp_path / "samples"), "--out", str(tmp_path / "routed")]
    assert finetune.main([*name, *data, *short, *reported]) is None
    if kind == "pixart":
        assert any((tmp_path / "routed" / "finetune").iterdir())

    prompts = CAPTIONS[:2] if kind == "pixart" else ["dog", "7"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    routed = [*name, "--routed", str(tmp_path / "routed"), "--steps", "3", "--rounds", "1", "--batch-size", "1"]
    written = ["--out", str(tmp_path / "sheet.png"), "--png-dir", str(tmp_path / "png"), "--routing-map"]
    capfd.readouterr()
    generate.main([*routed, *written, "--prompts", str(tmp_path / "prompts.txt"), "--compare"])
    out = capfd.readouterr().out
    assert "GFLOPs" in out
    assert float(out.split("saved: ")[1].split("%")[0]) > 1
    for path in ("sheet.png", "sheet-routing.png"):
        assert Image.open(tmp_path / path).width > 100

    pipe = DiffusionPipeline.from_pretrained(folder / "pipeline")  # by hand, the second picture alone
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path / "routed" / "transformer")
    load_routing(pipe.transformer, tmp_path / "routed" / "routing.pt")
    options = {"num_inference_steps": 3, "guidance_scale": 4.5, "generator": torch.Generator().manual_seed(1)}
    if kind == "pixart":
        image = pipe(prompts[1], use_resolution_binning=False, clean_caption=False, **options).images[0]
    else:
        image = pipe([7], **options).images[0]
    drawn = np.asarray(Image.open(tmp_path / "png" / "000001.png")).astype(int)
    assert np.abs(drawn - np.asarray(image)).max() <= 1
    assert drawn.std() > 1
    assert len(list((tmp_path / "png").iterdir())) == 2


@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_offloading_changes_nothing(kind, request, tmp_path):
    """On a CPU it moves weights from the CPU to the CPU, by the same hooks."""
    folder = request.getfixturevalue(kind)
    pipe = DiffusionPipeline.from_pretrained(folder / "pipeline")
    route(pipe.transformer, ratios=torch.full((2, 1), 0.5))
    torch.save(pipe.transformer.routing.state_dict(), tmp_path / "routing.pt")
    arguments = ["--pretrained", str(folder / "pipeline"), "--routed", str(tmp_path), "--steps", "2"]
    arguments += ["--prompt", "5", "--device", "cpu", "--out", str(tmp_path / "sheet.png")]
    generate.main([*arguments, "--png-dir", str(tmp_path / "here")])
    generate.main([*arguments, "--png-dir", str(tmp_path / "offloaded"), "--offload", "model"])
    assert (tmp_path / "here" / "000000.png").read_bytes() == (tmp_path / "offloaded" / "000000.png").read_bytes()


def test_generate_says_in_one_line_what_does_not_go(pixart, tmp_path):
    name = ["--pretrained", str(pixart / "pipeline"), "--routed", str(tmp_path), "--out", str(tmp_path / "a.png")]
    cases = {
        "what shall it draw": [],
        "routing.pt does not hold": ["--prompt", "a cross"],
        "needs a GPU": ["--prompt", "a cross", "--offload", "sequential", "--device", "cpu"],
        "leave one out": ["--prompt", "a cross", "--offload", "model", "--compare"],
        "--seed": ["--prompt", "a cross", "--seed", "4294967296"],
    }
    for message, arguments in cases.items():
        with pytest.raises(InputError, match=message):
            generate.main([*name, *arguments])


def test_the_plan_of_a_large_model(capfd):
    plan.main(["--model", "dit-xl-2", "--layers", "1"])
    plan.main(["--model", "dit-xl-2", "--layers", "1", "--time", "--rounds", "1"])
    on_paper, kept, timed = capfd.readouterr().out.splitlines()
    assert on_paper.startswith("29.4 million parameters")
    assert 0 < float(kept.split("an image ")[1].split()[0]) < 1
    assert "0.0% of the FLOPs" in timed  # of one layer the ratio is 0


def test_the_small_pipeline_fits_its_pictures(tmp_path):
    small_pipeline.main(["--out", str(tmp_path), "--count", "6", "--vae-steps", "2"])
    rows = [json.loads(line) for line in (tmp_path / "pictures" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    ids = pipe.tokenizer(rows[0]["text"]).input_ids
    assert pipe.tokenizer.decode(ids, skip_special_tokens=True) == rows[0]["text"]
    assert pipe.transformer.config.sample_size == 16
