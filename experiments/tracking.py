"""What finetune.py shows of a run with --report-to: scalars, the table as a picture, samples of held-out prompts."""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, DiTPipeline, PixArtTransformer2DModel
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from routing_diffusers import Routing
from samples import Samples, pad

from sample import draw_ratios, input_errors


def report(line: dict, pipe: DiffusionPipeline, held: Samples | None, accelerator: Accelerator) -> None:
    """A line of metrics, and pictures (n, S, S, 3), to the trackers of accelerate. held: with samples of these."""
    scalars = {name: value for name, value in line.items() if isinstance(value, float)}
    scalars |= {f"loss in region {i}": value for i, value in enumerate(line["loss_by_region"]) if value is not None}
    accelerator.log(scalars, step=line["step"])
    pictures = {}
    if hasattr(pipe.transformer, "routing"):
        pictures["table"] = np.asarray(picture_of(pipe.transformer.routing))[None]
    if held is not None:
        pictures["samples"] = draw_held_out(pipe, held)
    for tracker in accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images"):
            tracker.log_images(pictures, step=line["step"], **options)


def picture_of(routing: Routing) -> Image.Image:
    ratios = routing.ratios.detach()
    return draw_ratios(ratios, f"The learned table, mean {ratios.mean():.3f}")


def pipeline_around(model: nn.Module, pretrained: str, revision: str | None) -> DiffusionPipeline:
    """The pipeline that draws samples with this model. Its prompts are in the held-out samples, as embeddings."""
    given = {"transformer": model}
    if isinstance(model, PixArtTransformer2DModel):
        given.update(text_encoder=None, tokenizer=None)
    with input_errors(f"--report-to draws samples, and cannot use --pretrained {pretrained} for it"):
        pipe = DiffusionPipeline.from_pretrained(pretrained, revision=revision, **given)
        pipe.vae.to(model.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_held_out(pipe: DiffusionPipeline, held: Samples) -> np.ndarray:
    """Images (4, S, S, 3) in [0, 1] of the first four held-out prompts, from noise that stays the same."""
    options = {"num_inference_steps": 20, "output_type": "np"}
    options["generator"] = [torch.Generator().manual_seed(i) for i in range(4)]
    items = [held[i] for i in range(4)]
    if isinstance(pipe, DiTPipeline):
        return pipe([int(item["class_labels"]) for item in items], **options).images
    words = [item["words"] for item in items] + [held.null["prompt_embeds"].to(items[0]["words"])] * 4
    padded, mask = pad(words)
    options["prompt_embeds"], options["negative_prompt_embeds"] = padded.chunk(2)
    options["prompt_attention_mask"], options["negative_prompt_attention_mask"] = mask.chunk(2)
    return pipe(negative_prompt=None, use_resolution_binning=False, **options).images
