"""What encode.py writes and finetune.py reads: a sample is a .safetensors file.

    latents (c, h, w)       of the model's size, as it sees them: multiplied by the VAE's scaling factor
    prompt_embeds (W, d)    for a PixArt: the text encoder's output for the W words of this caption, without padding
    class_labels ()         for a DiT, in the place of the prompt: a whole number

null.safetensors is the empty prompt: for classifier-free guidance it takes the place of one prompt in ten. (A DiT has a
label for that.) Data that is too large for a folder: the `datasets` library and webdataset read such arrays, too.
"""

import os
import sys
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from routing_diffusers import TIMESTEPS

from diffratio_mod import InputError
from sample import input_errors

NULL_SHARE = 0.1  # of the prompts that are replaced by the empty one


def write_sample(path: Path, sample: dict[str, Tensor], target: str | int) -> None:
    """target: the caption or the label, kept as text beside the arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with input_errors(f"cannot write {path}"):
        arrays = {name: values.cpu().contiguous() for name, values in sample.items()}
        save_file(arrays, part, metadata={"target": str(target)})
        os.replace(part, path)


def is_written(path: Path, target: str | int) -> bool:
    """Whether this sample is there, with this caption or label."""
    if not path.exists():
        return False
    with input_errors(f"{path} is no sample; remove it"), safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("target") == str(target)


def read_sample(path: Path, shapes: dict[str, tuple]) -> dict[str, Tensor]:
    """The arrays that `shapes` names, None standing for any length. InputError if one has another shape."""
    with input_errors(f"cannot use {path}"):
        sample = load_file(path)
        for name, shape in shapes.items():
            found = tuple(sample[name].shape) if name in sample else "missing"
            if len(found) != len(shape) or any(want not in (None, n) for want, n in zip(shape, found)):
                raise InputError(f"it does not fit the model: {name} must be {shape}, and is {found}")
    return {name: sample[name] for name in shapes}


class Samples(torch.utils.data.Dataset):
    """Image n of a run: a sample, its noise and its timestep, all drawn from the seed and n.

    Step s of the run is made of the images from s * total on, `total` of them. So its batch is the same however many
    processes and passes share it, and a resumed run draws what an unbroken one would. The timesteps of a step are
    stratified: one in each of `total` equal parts. null: the empty prompt, or a DiT's label for it.
    """

    def __init__(self, files: list[Path], null: Path, model: nn.Module, total: int, seed: int) -> None:
        self.files = files
        self.total = total
        self.seed = seed
        self.null = {}
        side = model.config.sample_size
        self.shapes = {"latents": (model.config.in_channels, side, side)}
        if isinstance(model, DiTTransformer2DModel):
            self.shapes["class_labels"] = ()
            self.null["class_labels"] = torch.tensor(model.config.num_embeds_ada_norm)
        else:
            self.shapes["prompt_embeds"] = (None, model.config.caption_channels)
            if null.exists():
                self.null = read_sample(null, {"prompt_embeds": self.shapes["prompt_embeds"]})
        self[0]  # says at once what is wrong with all

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        """latents and noise (c, h, w), timestep (), and what the model is told: class_labels () or words (W, d)."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_000_007 + n)
        path = self.files[torch.randint(len(self.files), (), generator=rng)]
        sample = read_sample(path, self.shapes)
        if torch.rand((), generator=rng) < NULL_SHARE:
            sample |= self.null
        level = (n % self.total + torch.rand((), generator=rng)) / self.total  # in its part of 0 to 1
        item = {"latents": sample["latents"].to(torch.get_default_dtype())}  # half precision is widened
        item["noise"] = torch.randn(self.shapes["latents"], generator=rng)
        item["timestep"] = (level * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)
        if "class_labels" in sample:
            return item | {"class_labels": sample["class_labels"].long()}
        return item | {"words": sample["prompt_embeds"].to(torch.get_default_dtype())}


def put_together(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of items. Captions are padded to the longest; the mask, 1 = a word, hides the padding."""
    words = [item.pop("words") for item in items if "words" in item]
    batch = torch.utils.data.default_collate(items)
    if words:
        batch["encoder_hidden_states"], batch["encoder_attention_mask"] = pad(words)
    return batch


def pad(words: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Captions, each (its W, d), as one tensor (B, longest W, d), and the mask (B, longest W): 1 = a word."""
    mask = pad_sequence([torch.ones_like(caption[:, 0]) for caption in words], batch_first=True)
    return pad_sequence(words, batch_first=True), mask


def read_samples(
    folder: Path, model: nn.Module, share: float, total: int, regions: int, seed: int
) -> tuple[Samples, Samples | None]:
    """What is trained on, and a share that is held out: 16 images a region, the same in every call."""
    null = folder / "null.safetensors"
    files = [path for path in sorted(folder.rglob("*.safetensors")) if path != null]
    held = []
    if share > 0:
        every = round(1 / share)
        held = files[every - 1 :: every]
    kept = sorted({*files} - {*held})
    if not kept:
        raise InputError(f"{folder} holds no samples, .safetensors files; encode.py writes them")
    data = Samples(kept, null, model, total, seed)
    if not held:
        return data, None
    return data, Samples(held, null, model, total=16 * regions, seed=12345)
