"""Fine-tune a PixArt or DiT of diffusers until it skips tokens: on one device, or on several with accelerate.

    pip install diffusers accelerate
    python experiments/finetune.py --make-data runs/data                    # 4,096 small samples, to try the whole way
    accelerate launch experiments/finetune.py --data runs/data --target-ratio 0 --steps 1500 --lr 2e-3 --out runs/dense
    accelerate launch experiments/finetune.py --data runs/data --pretrained runs/dense --lr 5e-4 --out runs/routed

A quarter of an hour on a CPU; the mean ratio arrives at 0.3. On a machine with GPUs the same commands take one of them,
`accelerate launch --multi_gpu --mixed_precision bf16 experiments/finetune.py ...` takes all.

A sample is a .safetensors file of --data, with
    latents (c, h, w)               of the model's size, as it sees them: multiplied by the VAE's scaling factor
    prompt_embeds (W, d)            for a PixArt: the text encoder's output, all samples with the same number of words W
    prompt_attention_mask (W,)      1 = a word, 0 = padding
    class_labels ()                 for a DiT, in the place of the prompt: a whole number
A file null.safetensors holds the two prompt_ arrays of the empty prompt: for classifier-free guidance it takes the place
of one prompt in ten. (A DiT has a label for that.)

What a run leaves in --out: transformer/ and scheduler/, the averaged weights in the library's own form; routing.pt, the
table and the routers; metrics.jsonl; ratios.png, a picture of the table; and checkpoint-STEP/, from which --resume goes
on. Letters as in diffratio_mod.py: B images of one process and pass, C columns of the table.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers import AutoModel, DDPMScheduler, DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.training_utils import EMAModel
from real_models import MODELS, TIMESTEPS, diffusion_loss, load_routing, route
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from diffratio_mod import InputError, column_of, ratio_loss
from sample import Parser, draw_ratios, input_errors, number, replace_file, run_command

NULL_SHARE = 0.1  # of the prompts that are replaced by the empty one


def make_parser() -> Parser:
    parser = Parser(__doc__)
    count = number(int, 1, 10**9)
    share = number(float, 0, 1)
    add = parser.add_argument_group("what is trained, on what").add_argument
    add("--data", type=Path, metavar="FOLDER", help="of samples, as described above")
    add("--make-data", type=Path, metavar="FOLDER", help="write a small data set there, and end")
    add("--pretrained", type=Path, metavar="FOLDER", help="its transformer/ and scheduler/ (default: small, random)")
    add("--routing", type=Path, metavar="FILE", help="table and routers to start from (default: nothing skipped)")
    add("--out", type=Path, default=Path("runs/finetuned"), help="folder of the results (default runs/finetuned)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out; give the same command again")
    add = parser.add_argument_group("the method").add_argument
    add("--target-ratio", type=number(float, 0, 0.99), default=0.3, help="mean; 0: dense, no routing (default 0.3)")
    add("--timestep-regions", type=number(int, 1, 1000), default=10, help="columns of the table (default 10)")
    add("--ratio-weight", type=number(float, 0, 1e4), default=2.0, help="of the pull to the target (default 2)")
    add("--ratio-lr", type=share, default=1e-2, help="learning rate of the ratios (default 0.01)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=count, default=700, help="of the optimizer (default 700)")
    add("--batch-size", type=count, default=32, help="images of one process and pass (default 32)")
    add("--accumulate", type=count, default=1, metavar="N", help="passes whose gradients make a step (default 1)")
    add("--lr", type=share, default=2e-5, help="peak learning rate of weights and routers (default 2e-5)")
    add("--ema-decay", type=share, default=0.9995, help="of the averaged weights, 0: not averaged (default 0.9995)")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="(default: what accelerate launch says)")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--workers", type=number(int, 0, 256), default=0, help="processes that read samples (default 0)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of the weights, noise and order (default 0)")
    add("--log-every", type=count, default=50, help="steps a line of metrics.jsonl sums up (default 50)")
    add("--save-every", type=count, default=500, help="steps between checkpoints (default 500)")
    return parser


# --- Data --------------------------------------------------------------------------------------------------------


def read_sample(path: Path) -> dict[str, Tensor]:
    with input_errors(f"cannot read {path}"):
        return load_file(path)


class Samples(torch.utils.data.Dataset):
    """Image n of a run: a sample, its noise and its timestep, all drawn from the seed and n.

    Step s of the run is made of the images from s * total on, `total` of them. So its batch is the same however many
    processes and passes share it, and a resumed run draws what an unbroken one would. The timesteps of a step are
    stratified: one in each of `total` equal parts.
    """

    def __init__(self, folder: Path, model: nn.Module, total: int, seed: int) -> None:
        null = folder / "null.safetensors"
        self.files = [path for path in sorted(folder.glob("*.safetensors")) if path != null]
        if not self.files:
            raise InputError(f"{folder} holds no samples, .safetensors files; --make-data writes some")
        self.total = total
        self.seed = seed
        side = model.config.sample_size
        self.shapes = {"latents": (model.config.in_channels, side, side)}
        if isinstance(model, DiTTransformer2DModel):
            self.null = {"class_labels": torch.tensor(model.config.num_embeds_ada_norm)}
            self.shapes["class_labels"] = ()
        else:
            words = len(read_sample(self.files[0]).get("prompt_attention_mask", ()))
            self.null = {}
            self.shapes["prompt_embeds"] = (words, model.config.caption_channels)
            self.shapes["prompt_attention_mask"] = (words,)
            if null.exists():
                self.null = self.checked(null, read_sample(null), ("prompt_embeds", "prompt_attention_mask"))
        self[0]  # says at once what is wrong with all

    def checked(self, path: Path, sample: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
        """Those arrays of a sample, if they have the shapes that the model asks for; InputError if not."""
        for name in names:
            shape = tuple(sample[name].shape) if name in sample else "missing"
            if shape != self.shapes[name]:
                raise InputError(f"{path} does not fit the model: {name} must be {self.shapes[name]}, and is {shape}")
        return {name: sample[name] for name in names}

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        """latents and noise (c, h, w), timestep (), and what the model is told, under its arguments' names."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_000_007 + n)
        path = self.files[torch.randint(len(self.files), (), generator=rng)]
        sample = self.checked(path, read_sample(path), tuple(self.shapes))
        if torch.rand((), generator=rng) < NULL_SHARE:
            sample |= self.null
        level = (n % self.total + torch.rand((), generator=rng)) / self.total  # in its part of 0 to 1
        item = {"latents": sample["latents"].to(torch.get_default_dtype())}  # half precision is widened
        item["noise"] = torch.randn(self.shapes["latents"], generator=rng)
        item["timestep"] = (level * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)
        if "class_labels" in sample:
            return item | {"class_labels": sample["class_labels"].long()}
        item["encoder_hidden_states"] = sample["prompt_embeds"].to(torch.get_default_dtype())
        return item | {"encoder_attention_mask": sample["prompt_attention_mask"].to(torch.get_default_dtype())}


def make_data(folder: Path, count: int = 4096) -> None:
    """Samples of captioned shapes: pixels for latents, and for T5 a fixed random vector for each word at each place."""
    from train_cifar import Shapes  # here, as it needs torchvision

    folder.mkdir(parents=True, exist_ok=True)
    shapes = Shapes(24)
    rng = torch.Generator().manual_seed(0)
    images, captions, _ = shapes.batch(count, rng)
    end = len(shapes.vocabulary)  # the id of "no more words", as T5 ends a prompt
    vectors = torch.randn(shapes.caption_length + 1, end + 1, 64, generator=rng)
    for i, caption in enumerate(tqdm([*captions, ""], desc="writing samples")):
        ids = [shapes.vocabulary.index(word) for word in caption.split()] + [end]
        mask = torch.arange(len(vectors)) < len(ids)
        ids += [end] * (len(vectors) - len(ids))
        sample = {"prompt_embeds": vectors[range(len(vectors)), ids].half(), "prompt_attention_mask": mask.half()}
        path = folder / "null.safetensors"
        if i < count:
            sample["latents"] = images[i].half()
            path = folder / f"{i:06d}.safetensors"
        save_file(sample, path, metadata={"prompt": caption})


# --- What a run starts from, and what it leaves ------------------------------------------------------------------


def load_model(folder: Path | None) -> tuple[nn.Module, DDPMScheduler]:
    """The model, in fp32, and its noise schedule, of a folder; or a small PixArt with random weights."""
    if folder is None:  # the library's linear schedule drowns small images in noise early
        kind, config = MODELS["shapes"]
        return kind(**config), DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler = DDPMScheduler()  # as PixArt and DiT were trained
    with input_errors(f"cannot use --pretrained {folder}"):
        local = {"local_files_only": True, "low_cpu_mem_usage": False}
        model = AutoModel.from_pretrained(str(folder), subfolder="transformer", **local)
        if (folder / "scheduler").is_dir():
            scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
        if not isinstance(model, PixArtTransformer2DModel | DiTTransformer2DModel):
            raise InputError(f"its {type(model).__name__} cannot be routed: only a PixArt or DiT of diffusers can")
        if getattr(model, "use_additional_conditions", False):
            raise InputError("it asks for the resolution as a condition (PixArt-alpha, 1024 pixels): not supported")
        if (scheduler.config.prediction_type, scheduler.config.num_train_timesteps) != ("epsilon", TIMESTEPS):
            raise InputError(f"its scheduler must be one of {TIMESTEPS} timesteps, for a model that predicts the noise")
    return model, scheduler


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, the last one last."""
    return sorted(out.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """The whole state of the run, of all processes, in the folder `path`: complete, or not there. Older ones go."""
    part = path.with_name("checkpoint.part")
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(part, path)
        for old in checkpoints(path.parent)[:-1]:
            shutil.rmtree(old)


def write_results(model: nn.Module, scheduler: DDPMScheduler, averaged: EMAModel, weights: list, out: Path) -> None:
    """The averaged weights in the library's own form; the routing, with the averaged routers; the picture of the table.

    The table itself is not averaged: the weights fit the ratios of now.
    """
    averaged.store(weights)
    averaged.copy_to(weights)
    model.save_pretrained(out / "transformer")
    scheduler.save_pretrained(out / "scheduler")
    if hasattr(model, "routing"):
        with replace_file(out / "routing.pt") as file:
            torch.save(model.routing.state_dict(), file)
        ratios = model.routing.ratios.detach()
        with replace_file(out / "ratios.png") as file:
            draw_ratios(ratios, f"The learned table, mean {ratios.mean():.3f}").save(file, "PNG")
    averaged.restore(weights)


def write_metrics(path: Path, line: dict) -> None:
    """Append a line; those of a run that went further than the checkpoint from which it was resumed are replaced."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [old for old in lines if json.loads(old)["step"] < line["step"]]
    with replace_file(path) as file:
        file.write("".join(old + "\n" for old in [*lines, json.dumps(line)]).encode())


# --- Training ----------------------------------------------------------------------------------------------------


def main() -> None:
    args = make_parser().parse_args()
    if args.make_data:
        return make_data(args.make_data)
    if args.data is None:
        raise InputError("where are the samples? --data FOLDER; --make-data FOLDER writes a small set")
    saved = checkpoints(args.out)
    if args.resume and not saved:
        raise InputError(f"{args.out} holds no checkpoint to go on from; leave --resume out")
    if saved and not args.resume:
        raise InputError(f"{args.out} holds a run: --resume goes on with it, another --out begins a new one")

    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate,
        mixed_precision=args.mixed_precision,
        cpu=not torch.accelerator.is_available(),  # if not told, every process takes itself for the only one
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise InputError("weights in shards (FSDP, DeepSpeed) are not written by this script; launch it without")
    set_seed(args.seed)
    # In evaluation mode, in which these models differ only in that a DiT drops no labels by itself: Samples does it.
    model, scheduler = load_model(args.pretrained)
    model.eval()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    groups = [{"params": list(model.parameters()), "lr": args.lr}]
    if args.target_ratio > 0:
        routing = load_routing(model, args.routing) if args.routing else route(model, args.timestep_regions)
        groups[0]["params"] += routing.layers.parameters()
        # A learning rate of their own, and no weight decay: the ratios should not drift to zero.
        groups.append({"params": [routing.ratios], "lr": args.ratio_lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)

    def rate(step: int) -> float:  # a short warm-up, a plateau, and a linear decay over the last 40 % of the steps
        return min(1.0, (step + 1) / min(100, 0.1 * args.steps + 1), (args.steps - step) / (0.4 * args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    total = args.batch_size * accelerator.num_processes * args.accumulate  # images of a step
    data = Samples(args.data, model, total, args.seed)

    # From here on the model may be in a wrapper that averages gradients. The table and the routers are among its
    # parameters, so theirs are averaged too.
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    table = bare.routing.ratios if args.target_ratio > 0 else None
    weights = [parameter for parameter in bare.parameters() if parameter is not table]
    averaged = EMAModel(weights, decay=args.ema_decay)
    accelerator.register_for_checkpointing(schedule, averaged)
    first = 0
    if args.resume:
        with input_errors(f"the run in {args.out} cannot go on, with another model or other settings"):
            accelerator.load_state(str(saved[-1]))
        first = int(saved[-1].name.removeprefix("checkpoint-"))
        averaged.to(accelerator.device)

    # Each process takes every num_processes-th image: the loader is not prepared, as this is all that would do.
    numbers = range(first * total + accelerator.process_index, args.steps * total, accelerator.num_processes)
    loader = torch.utils.data.DataLoader(data, args.batch_size, sampler=numbers, num_workers=args.workers)
    bar = tqdm(initial=first, total=args.steps, disable=not accelerator.is_main_process)
    sums = torch.zeros(2, args.timestep_regions, device=accelerator.device)  # loss and images of each region
    step = first
    for batch in loader:
        batch = {name: values.to(accelerator.device) for name, values in batch.items()}  # the first dimension is B
        latents = batch.pop("latents")
        noise = batch.pop("noise")
        timestep = batch.pop("timestep")
        with accelerator.accumulate(model):
            noisy = scheduler.add_noise(latents, noise, timestep)
            losses = diffusion_loss(model, noisy, timestep, noise, batch)  # (B,)
            loss = losses.mean()
            if table is not None:
                # Alike in every process and pass, whose gradients are averaged: so it acts once.
                loss = loss + args.ratio_weight * ratio_loss(table, args.target_ratio)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        counted = torch.stack([losses.detach().to(sums.dtype), torch.ones_like(losses, dtype=sums.dtype)])
        sums.index_add_(1, column_of((timestep + 1) / TIMESTEPS, args.timestep_regions), counted)
        if not accelerator.sync_gradients:
            continue

        schedule.step()
        if table is not None:
            bare.routing.clamp_ratios()
        averaged.step(weights)
        step += 1
        bar.update()
        saving = step % args.save_every == 0 or step == args.steps
        if saving or step % args.log_every == 0:
            loss_sums, images = accelerator.reduce(sums, "sum").tolist()
            sums.zero_()
            if not np.isfinite(loss_sums).all():
                raise InputError(f"the loss is not finite before step {step}; try a lower --lr; what was saved is good")
            line = {"step": step, "loss": sum(loss_sums) / sum(images)}
            line["loss_by_region"] = [loss / n if n else None for loss, n in zip(loss_sums, images)]
            if table is not None:
                line["mean_ratio"] = float(table.detach().mean())
                line["ratios"] = np.round(table.tolist(), 4).tolist()
            bar.set_postfix({name: line[name] for name in ("loss", "mean_ratio") if name in line})
            if accelerator.is_main_process:
                write_metrics(args.out / "metrics.jsonl", line)
        if saving:
            save_checkpoint(accelerator, args.out / f"checkpoint-{step}")
            if accelerator.is_main_process:
                write_results(bare, scheduler, averaged, weights, args.out)
            accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
