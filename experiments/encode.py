"""Pictures and captions to what finetune.py reads: latents and text embeddings, computed once, before training.

    pip install diffusers accelerate transformers
    python experiments/encode.py --pretrained NAME --images FOLDER --out samples
    accelerate launch --multi_gpu experiments/encode.py ...            # by all GPUs of a machine

NAME is a folder, or a name on the hub, of a PixArt or DiT pipeline. For a PixArt, FOLDER holds pictures and a
metadata.jsonl with a line {"file_name": "a.png", "text": "a caption"} for each (the form that the `datasets` library
calls imagefolder). For a DiT, it holds a folder of pictures for each class, called by a name that the pipeline knows,
or by the class's number; other names get 0, 1, ... in their order (out/labels.json). Pictures are turned upright, laid
on white, and cut to the centred square. samples.py tells what is written. Begun again, the work goes on where it ended.
What cannot be read is listed and left out, and the exit code is 1.
"""

import functools
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
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from samples import is_written, write_sample

from diffratio_mod import InputError
from sample import Parser, input_errors, number, read_picture, replace_file, run_command

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pretrained", required=True, metavar="NAME", help="a pipeline: a folder, or a name on the hub")
    add("--revision", help="of the name on the hub")
    add("--images", type=Path, required=True, metavar="FOLDER", help="pictures, as described above")
    add("--out", type=Path, required=True, metavar="FOLDER", help="of the samples")
    add("--resolution", type=number(int, 8, 8192), help="pixels of a side (default: the model's)")
    add("--batch-size", type=number(int, 1, 10**4), default=8, help="pictures that run together (default 8)")
    add("--mixed-precision", choices=DTYPES, default="no", help="of what computes and what is written (default no)")
    add("--workers", type=number(int, 0, 256), default=0, help="processes that read pictures (default 0)")
    add("--skip-damaged", action="store_true", help="exit code 0 though some pictures were left out")
    return parser


def list_captions(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """The pictures of metadata.jsonl, as (file name, caption), and what is wrong with others."""
    captions: dict[str, str] = {}
    problems = {}
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines, start=1):
        with input_errors(f"line {i} of metadata.jsonl"):
            row = json.loads(line)
            name = os.path.normpath(row["file_name"])
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            problems[name] = "no caption"
        elif name in captions:
            problems[name] = "named twice, the first caption is taken"
        elif os.path.isabs(name) or name.startswith(".."):
            problems[name] = f"not in {folder}"
        else:
            captions[name] = row["text"]
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix.lower() in PICTURES and name not in captions and name not in problems:
            problems[name] = "not in metadata.jsonl"
    return list(captions.items()), [f"{name}: {problem}" for name, problem in problems.items()]


def list_classes(folder: Path, known: dict[str, int]) -> list[tuple[str, int]]:
    """The pictures of class folders, as (file name, label). known: the labels of the names that the pipeline knows."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    labels = {name: i for i, name in enumerate(classes)}
    if all(name in known for name in classes):
        labels = known
    elif all(name.isdecimal() for name in classes):
        labels = {name: int(name) for name in classes}
    paths = [path for name in classes for path in sorted((folder / name).rglob("*"))]
    names = [str(path.relative_to(folder)) for path in paths if path.suffix.lower() in PICTURES]
    return [(name, labels[Path(name).parts[0]]) for name in names]


def read_batch(folder: Path, size: int, batch: list[tuple]) -> tuple[list[Tensor], list[tuple], list[str]]:
    """The pictures of a batch, each (3, S, S) in [-1, 1], the rows that were read, and what was wrong with others."""
    pictures = []
    rows = []
    problems = []
    for name, target in batch:
        try:
            pictures.append(torch.from_numpy(read_picture(folder / name, size)).permute(2, 0, 1) / 127.5 - 1)
            rows.append((name, target))
        except InputError as error:
            problems.append(f"{name}: {error}")
    return pictures, rows, problems


def encode_texts(pipe: DiffusionPipeline, captions: list[str]) -> list[Tensor]:
    """The embeddings (W, d) of each caption, as the pipeline computes them, without the padding."""
    embeddings, mask, _, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    return [words[there.bool()] for words, there in zip(embeddings, mask)]


def numbers_of(pipe: DiffusionPipeline, rows: list[tuple], size: int) -> int:
    """How many numbers the samples of these rows hold."""
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    numbers = len(rows) * pipe.vae.config.latent_channels * (size // scale) ** 2
    if rows and not isinstance(pipe, DiTPipeline):
        words = pipe.tokenizer([caption.lower() for _, caption in rows], truncation=True, max_length=300).input_ids
        numbers += sum(map(len, words)) * pipe.text_encoder.config.d_model
    return numbers


def settle(out: Path, **settings: object) -> None:
    """The samples of a folder are made in one way, which is kept with them; InputError if another is asked for."""
    path = out / "encoding.json"
    if path.exists():
        with input_errors(f"{path}: all samples of a folder are made in one way"):
            for name, value in json.loads(path.read_text(encoding="utf-8")).items():
                if settings.get(name) != value:
                    raise InputError(f"{name} {value}, not {settings.get(name)}; give another --out")
    with replace_file(path) as file:
        file.write(json.dumps(settings).encode())


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    dtype = DTYPES[args.mixed_precision]
    with input_errors(f"cannot use --pretrained {args.pretrained}"):  # but for its transformer, which may be large
        options = {"revision": args.revision}
        pipe = DiffusionPipeline.from_pretrained(args.pretrained, transformer=None, dtype=dtype, **options)
        config = PixArtTransformer2DModel.load_config(args.pretrained, subfolder="transformer", **options)
    pipe.to(accelerator.device)
    size = args.resolution or config["sample_size"] * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    problems: list[str] = []
    with input_errors(f"cannot read --images {args.images}"):
        if isinstance(pipe, DiTPipeline):
            rows = list_classes(args.images, pipe.labels)
        else:
            rows, problems = list_captions(args.images)
        if not rows:
            raise InputError("no pictures in the form that --help describes")

    # A batch is the same whatever was written before and however many processes there are: so the samples are, too.
    batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    todo = [b for b in batches if not all(is_written(args.out / f"{name}.safetensors", target) for name, target in b)]
    accelerator.wait_for_everyone()  # all have looked before one writes
    if accelerator.is_main_process:
        settle(args.out, pretrained=args.pretrained, resolution=size, mixed_precision=args.mixed_precision)
        rows_to_do = [row for batch in todo for row in batch]
        gigabytes = numbers_of(pipe, rows_to_do, size) * dtype.itemsize / 1e9
        free = shutil.disk_usage(args.out).free / 1e9
        print(f"{len(rows)} pictures; {len(rows_to_do)} to encode, in {gigabytes:.3g} GB; {free:.3g} GB are free")
        if isinstance(pipe, DiTPipeline):
            labels = {Path(name).parts[0]: label for name, label in rows}
            with replace_file(args.out / "labels.json") as file:
                file.write(json.dumps(labels, indent=1).encode())
        else:
            write_sample(args.out / "null.safetensors", {"prompt_embeds": encode_texts(pipe, [""])[0]}, "")

    with accelerator.split_between_processes(todo) as mine:
        read = functools.partial(read_batch, args.images, size)
        loader = torch.utils.data.DataLoader(mine, batch_size=None, collate_fn=read, num_workers=args.workers)
        for pictures, rows, wrong in tqdm(loader, unit="batch", disable=not accelerator.is_main_process):
            problems += wrong
            if not pictures:
                continue
            images = torch.stack(pictures).to(accelerator.device, dtype)
            latents = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
            if isinstance(pipe, DiTPipeline):
                told = [{"class_labels": torch.tensor(label)} for _, label in rows]
            else:
                told = [{"prompt_embeds": words} for words in encode_texts(pipe, [caption for _, caption in rows])]
            for i, (name, target) in enumerate(rows):
                write_sample(args.out / f"{name}.safetensors", told[i] | {"latents": latents[i]}, target)

    problems = sorted(set(gather_object(problems)))
    if accelerator.is_main_process:
        print(*(f"left out: {problem}" for problem in problems), f"wrote {args.out}", sep="\n")
    accelerator.end_training()
    return 1 if problems and not args.skip_damaged else 0


if __name__ == "__main__":
    run_command(main)
