"""Pictures with captions, and a PixArt pipeline that fits them: what the three commands need, without a download.

    pip install diffusers accelerate transformers tokenizers
    python experiments/small_pipeline.py --out runs/small         # a few minutes on one CPU core

writes runs/small/pictures, 4,096 captioned `shapes` as PNG files with their metadata.jsonl; prompts.txt, eight prompts;
and runs/small/pipeline, a PixArtSigmaPipeline in the library's own form: an AutoencoderKL, trained here for a minute or
two; a tokenizer, trained on the captions; a T5 encoder with random weights; and a PixArt with random weights, which
finetune.py then trains.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel, T5TokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import Parser, number, run_command

SIDE = 32  # of the pictures, in pixels
WIDTH = 64  # of the T5


def make_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerBase:
    """A tokenizer like T5's, of the captions' words: an end after the last one, padding behind it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    end = ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)


def make_pipeline(captions: Sequence[str], layers: int = 6, heads: int = 4, channels: int = 16) -> PixArtSigmaPipeline:
    """A pipeline with random weights but for its tokenizer: pictures of 32 x 32 pixels, latents of 3 x 16 x 16."""
    tokenizer = make_tokenizer(captions)
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=2, num_heads=8)
    )
    # Heads that look at words in fixed distances: so even random weights tell which word stands beside which.
    torch.nn.init.normal_(text_encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=4.0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[channels, 2 * channels],
        norm_num_groups=4,
        latent_channels=3,
        sample_size=SIDE,
    )
    transformer = PixArtTransformer2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=24,
        sample_size=SIDE // 2,
        in_channels=3,
        out_channels=6,
        cross_attention_dim=24 * heads,
        caption_channels=WIDTH,
    )
    # The library's linear schedule drowns small images in noise early.
    scheduler = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2")
    return PixArtSigmaPipeline(tokenizer, text_encoder, vae, transformer, scheduler)


def train_vae(vae: AutoencoderKL, pictures: Tensor, steps: int) -> float:
    """Pictures (n, 3, S, S) in [-1, 1]. Sets the scaling factor, too; returns the squared error of the last step.

    The latents are held near the picture at half its size: a small transformer learns such ones in few steps.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rng = torch.Generator().manual_seed(0)
    bar = tqdm(range(steps), desc="training the VAE", disable=None)
    for _ in bar:
        batch = pictures[torch.randint(len(pictures), (32,), generator=rng)]
        latents = vae.encode(batch).latent_dist
        error = (vae.decode(latents.sample(rng)).sample - batch).square().mean()
        half = torch.nn.functional.avg_pool2d(batch, 2)
        loss = error + (latents.mean - half).square().mean() + 1e-5 * latents.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(error=f"{error.item():.4f}")
    with torch.no_grad():
        vae.register_to_config(scaling_factor=float(1 / vae.encode(pictures[:256]).latent_dist.mean.std()))
    return error.item()


def write_pictures(pictures: Tensor, captions: Sequence[str], folder: Path) -> None:
    """As the `datasets` library reads them: picture files, and metadata.jsonl with file_name and text."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    lines = []
    for i, caption in enumerate(captions):
        Image.fromarray(pixels[i]).save(folder / f"{i:05d}.png")
        lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    from train_cifar import Shapes  # here, as it needs torchvision

    parser = Parser(__doc__)
    count = number(int, 1, 10**6)
    parser.add_argument("--out", type=Path, default=Path("runs/small"), help="folder (default runs/small)")
    parser.add_argument("--count", type=count, default=4096, help="pictures (default 4096)")
    parser.add_argument("--vae-steps", type=count, default=600, help="of the VAE's training (default 600)")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    pictures, captions, _ = Shapes(SIDE).batch(args.count, torch.Generator().manual_seed(0))
    write_pictures(pictures, captions, args.out / "pictures")
    (args.out / "prompts.txt").write_text("\n".join(Shapes.prompts[::2]) + "\n", encoding="utf-8")
    pipeline = make_pipeline(captions)
    error = train_vae(pipeline.vae, pictures, args.vae_steps)
    pipeline.save_pretrained(args.out / "pipeline")
    print(f"wrote {args.count} pictures and a pipeline to {args.out}; squared error of the VAE {error:.4f}")


if __name__ == "__main__":
    run_command(main)
