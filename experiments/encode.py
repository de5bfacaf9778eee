"""Pictures and captions to what finetune.py reads: latents and text embeddings, computed once, before training.

    pip install diffusers accelerate transformers
    python experiments/encode.py --pretrained NAME --images FOLDER --out samples
    accelerate launch --multi_gpu experiments/encode.py ...            # by all GPUs of a machine

NAME is a folder, or a name on the hub, of a PixArt or DiT pipeline. For a PixArt, FOLDER holds pictures and a
metadata.jsonl with a line {"file_name": "a.png", "text": "a caption"} for each (the form that the `datasets` library
calls imagefolder); for a DiT, it holds a folder of pictures for each class, which get the labels 0, 1, ... in the order
of their names (out/labels.json). Pictures are turned upright, laid on white, and cut to the centred square.

A sample is a file NAME.safetensors in --out, and none is there that is not complete: begun again, the work goes on.
    latents (c, h, w)       the mean of the VAE's distribution, multiplied by its scaling factor
    prompt_embeds (W, d)    for a PixArt: of the W words that are there, without padding
    class_labels ()         for a DiT, in the place of the prompt
null.safetensors has the prompt_embeds of the empty prompt. What cannot be read is listed and left out, with exit code 1.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline, DiTPipeline, PixArtTransformer2DModel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from samples import is_written, write_sample

from diffratio_mod import InputError
from sample import Parser, input_errors, number, read_picture, replace_file, run_command

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pretrained", required=True, metavar="NAME", help="a pipeline: a folder, or a name on the hub")
    add("--revision", help="of the name on the hub")
    add("--images", type=Path, required=True, metavar="FOLDER", help="pictures, as described above")
    add("--out", type=Path, required=True, metavar="FOLDER", help="of the samples")
    add("--resolution", type=number(int, 8, 8192), help="pixels of a side (default: the model's)")
    add("--batch-size", type=number(int, 1, 10**4), default=8, help="pictures that run together (default 8)")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), default="no",
        help="of VAE and text encoder, and of what is written (default no: float32)")  # fmt: skip
    add("--workers", type=number(int, 0, 256), default=0, help="processes that read pictures (default 0)")
    add("--skip-damaged", action="store_true", help="exit code 0 though some pictures were left out")
    return parser


def list_captions(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """The pictures of metadata.jsonl, as (file name, caption), and what is wrong with the others."""
    rows = {}
    problems = []
    with input_errors(f"cannot read {folder / 'metadata.jsonl'}"):
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        for i, line in enumerate(lines, start=1):
            with input_errors(f"line {i}"):
                row = json.loads(line)
                name = os.path.normpath(row["file_name"])
            caption = row.get("text")
            if not isinstance(caption, str) or not caption.strip():
                problems.append(f"{name}: no caption")
            elif name in rows:
                problems.append(f"{name}: named twice, the first caption is taken")
            elif os.path.isabs(name) or name.startswith(".."):
                problems.append(f"{name}: not in {folder}")
            else:
                rows[name] = caption
    named = {*rows, *(problem.partition(": ")[0] for problem in problems)}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix.lower() in PICTURES and name not in named:
            problems.append(f"{name}: not in metadata.jsonl")
    return list(rows.items()), problems


def list_classes(folder: Path, known: dict[str, int]) -> list[tuple[str, int]]:
    """The pictures of class folders, as (file name, label). known: the labels of the names that the pipeline knows."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if all(name in known for name in classes):
        labels = known
    elif all(name.isdecimal() for name in classes):
        labels = {name: int(name) for name in classes}
    else:
        labels = {name: i for i, name in enumerate(classes)}
    rows = []
    for name in classes:
        for path in sorted((folder / name).rglob("*")):
            if path.suffix.lower() in PICTURES:
                rows.append((str(path.relative_to(folder)), labels[name]))
    return rows


class Batches(torch.utils.data.Dataset):
    """Reads the pictures of a batch: pixels (n, 3, S, S) in [-1, 1], the rows that were read, and what was not."""

    def __init__(self, batches: list[list[tuple]], folder: Path, size: int) -> None:
        self.batches = batches
        self.folder = folder
        self.size = size

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, list[tuple], list[str]]:
        pixels = []
        rows = []
        problems = []
        for name, target in self.batches[i]:
            try:
                picture = read_picture(self.folder / name, self.size)
            except InputError as error:
                problems.append(f"{name}: {error}")
                continue
            pixels.append(torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1)
            rows.append((name, target))
        return torch.stack(pixels) if pixels else torch.empty(0), rows, problems


def words_of(pipe: DiffusionPipeline, captions: list[str]) -> list[torch.Tensor]:
    """The embeddings (W, d) of each caption, as the pipeline computes them, without the padding."""
    embeddings, mask, _, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    return [embedding[there.bool()].cpu() for embedding, there in zip(embeddings, mask)]


def settle(args, size: int) -> None:
    """Samples of one folder are made in one way: what was asked for is written there, and compared."""
    path = args.out / "encoding.json"
    settings = {"pretrained": args.pretrained, "revision": args.revision, "resolution": size}
    settings["mixed_precision"] = args.mixed_precision
    if path.exists():
        with input_errors(f"cannot read {path}"):
            before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"{args.out} was written with {name} {before.get(name)}, not {value}; give another --out"
                )
    with replace_file(path) as file:
        file.write(json.dumps(settings).encode())


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]
    with input_errors(f"cannot use --pretrained {args.pretrained}"):
        options = {"revision": args.revision}
        # The transformer itself is not needed, and may be large.
        pipe = DiffusionPipeline.from_pretrained(args.pretrained, transformer=None, dtype=dtype, **options)
        config = PixArtTransformer2DModel.load_config(args.pretrained, subfolder="transformer", **options)
    pipe.to(accelerator.device)
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    size = args.resolution or config["sample_size"] * scale
    of_classes = isinstance(pipe, DiTPipeline)
    with input_errors(f"cannot read --images {args.images}"):
        if of_classes:
            rows = list_classes(args.images, pipe.labels)
            problems = []
        else:
            rows, problems = list_captions(args.images)
    if not rows:
        raise InputError(f"{args.images} holds no pictures in the form that --help describes")

    # A batch is the same whatever was written before and however many processes there are: so the samples are, too.
    batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    todo = [b for b in batches if not all(is_written(args.out / f"{name}.safetensors", target) for name, target in b)]
    accelerator.wait_for_everyone()  # all have looked before one writes
    if accelerator.is_main_process:
        settle(args, size)
        numbers = sum(len(batch) for batch in todo) * pipe.vae.config.latent_channels * (size // scale) ** 2
        if of_classes:
            labels = {name.split(os.sep)[0]: label for name, label in rows}
            with replace_file(args.out / "labels.json") as file:
                file.write(json.dumps(labels, indent=1).encode())
        else:
            for batch in todo:
                texts = [caption.lower().strip() for _, caption in batch]
                longest = pipe.tokenizer(texts, truncation=True, max_length=300).input_ids
                numbers += sum(map(len, longest)) * pipe.text_encoder.config.d_model
            write_sample(args.out / "null.safetensors", {"prompt_embeds": words_of(pipe, [""])[0]}, "")
        free = shutil.disk_usage(args.out).free
        print(
            f"{len(rows)} pictures; of these {sum(map(len, todo))} to encode, in {numbers * dtype.itemsize / 1e9:.3g} GB"
        )
        print(f"{free / 1e9:.3g} GB are free in {args.out}")

    with accelerator.split_between_processes(todo) as mine:
        dataset = Batches(mine, args.images, size)
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=args.workers)
        for pixels, read, wrong in tqdm(loader, unit="batch", disable=not accelerator.is_main_process):
            problems += wrong
            if not read:
                continue
            latents = pipe.vae.encode(pixels.to(accelerator.device, dtype)).latent_dist.mean
            latents = (latents * pipe.vae.config.scaling_factor).cpu()
            if of_classes:
                samples = [{"class_labels": torch.tensor(label)} for _, label in read]
            else:
                samples = [{"prompt_embeds": words} for words in words_of(pipe, [caption for _, caption in read])]
            for i, (name, target) in enumerate(read):
                write_sample(args.out / f"{name}.safetensors", samples[i] | {"latents": latents[i]}, target)

    problems = sorted(set(gather_object(problems)))
    if accelerator.is_main_process:
        print(*(f"left out: {problem}" for problem in problems), f"wrote {args.out}", sep="\n")
    accelerator.end_training()
    return 1 if problems and not args.skip_damaged else 0


if __name__ == "__main__":
    run_command(main)
