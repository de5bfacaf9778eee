"""Fine-tune a PixArt or DiT of diffusers until it skips tokens: on one device, or on several with accelerate.

    pip install diffusers accelerate
    accelerate launch experiments/finetune.py --pretrained NAME --data samples --out runs/routed
    accelerate launch --multi_gpu --mixed_precision bf16 experiments/finetune.py ...                # by all GPUs

NAME is a folder, or a name on the hub, of a PixArt or DiT pipeline: its transformer and scheduler, and its VAE with
--report-to. encode.py makes the samples; samples.py tells their form. What a run leaves in --out: routing.pt, the table
and the averaged routers; transformer/, the averaged weights in the library's own form (not with --train routing);
metrics.jsonl; ratios.png, a picture of the table; and checkpoint-STEP/, from which --resume goes on. SIGTERM and
SIGUSR1 save and end a run. finetuning.md tells the whole way. Letters as in diffratio_mod.py: B images of one process
and pass, C columns of the table.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers import AutoModel, DDPMScheduler, DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from routing_diffusers import TIMESTEPS, diffusion_loss, load_routing, route
from samples import Samples, put_together, read_samples
from tracking import picture_of, pipeline_around, report

from diffratio_mod import InputError, column_of, ratio_loss
from sample import Parser, input_errors, number, replace_file, run_command

PLACES = ("resume", "out", "pretrained", "data", "routing", "workers")  # these flags --resume may change,
INTERVALS = ("log_every", "save_every", "validate_every", "report_to")  # and these


def make_parser() -> Parser:
    parser = Parser(__doc__)
    count = number(int, 1, 10**9)
    share = number(float, 0, 1)
    add = parser.add_argument_group("what is trained, on what").add_argument
    add("--pretrained", required=True, metavar="NAME", help="a pipeline: a folder, or a name on the hub")
    add("--revision", help="of the name on the hub")
    add("--data", type=Path, required=True, metavar="FOLDER", help="of samples, as encode.py writes them")
    add("--train", choices=("all", "routing"), default="all", help="all, or table and routers alone (default all)")
    add("--routing", type=Path, metavar="FILE", help="to start from: a routing.pt, or a table as ratios.json has it")
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
    add("--seed", type=number(int, 0, 2**31), default=0, help="of the noise and order (default 0)")
    add = parser.add_argument_group("what is reported").add_argument
    add("--log-every", type=count, default=50, help="steps a line of metrics.jsonl sums up (default 50)")
    add("--save-every", type=count, default=500, help="steps between checkpoints (default 500)")
    add("--validation", type=number(float, 0, 0.5), default=0.02, help="share of the samples held out (default 0.02)")
    add("--validate-every", type=count, default=500, help="steps between losses of these (default 500)")
    add("--report-to", help="tensorboard, wandb, ...: what accelerate knows (default: only metrics.jsonl)")
    return parser


# --- What a run starts from, and what it leaves ------------------------------------------------------------------


def load_model(args) -> tuple[nn.Module, DDPMScheduler]:
    """The model, in fp32, routed if that is asked for, and the noise schedule that it was trained with."""
    with input_errors(f"cannot use --pretrained {args.pretrained}"):
        options = {"revision": args.revision, "low_cpu_mem_usage": False}
        model = AutoModel.from_pretrained(args.pretrained, subfolder="transformer", **options)
        scheduler = DDPMScheduler.from_pretrained(args.pretrained, subfolder="scheduler", revision=args.revision)
        if not isinstance(model, PixArtTransformer2DModel | DiTTransformer2DModel):
            raise InputError(f"its {type(model).__name__} cannot be routed: only a PixArt or DiT of diffusers can")
        if getattr(model, "use_additional_conditions", False):
            raise InputError("it asks for the resolution as a condition (PixArt-alpha, 1024 pixels): not supported")
        if (scheduler.config.prediction_type, scheduler.config.num_train_timesteps) != ("epsilon", TIMESTEPS):
            raise InputError(f"its scheduler must be one of {TIMESTEPS} timesteps, for a model that predicts the noise")
    # In evaluation mode, in which these models differ only in that a DiT drops no labels by itself: Samples does it.
    model.eval()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.requires_grad_(args.train == "all")
    if args.target_ratio == 0:
        return model, scheduler
    with input_errors(f"cannot use --routing {args.routing}"):
        if args.routing is None:
            route(model, args.timestep_regions)
        elif args.routing.suffix == ".json":
            route(model, ratios=torch.tensor(json.loads(args.routing.read_text())["ratios"]))
        else:
            load_routing(model, args.routing)
    return model, scheduler


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, the last one last."""
    return sorted(out.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """The whole state of the run, of all processes, in the folder `path`: complete, or not there. Older ones go."""
    part = path.with_name("checkpoint.part")
    with input_errors(f"cannot write {part}, what was saved before is good"):
        accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(part, path)
        for old in checkpoints(path.parent)[:-1]:
            shutil.rmtree(old)


def write_results(model: nn.Module, averaged: EMAModel, weights: list, args) -> None:
    """The averaged weights in the library's own form; the routing, with the averaged routers; the picture of the table.

    The table itself is not averaged: the weights fit the ratios of now.
    """
    with averaging(averaged, weights), input_errors(f"cannot write to {args.out}; --resume writes it again"):
        if args.train == "all":
            model.save_pretrained(args.out / "transformer")
        if args.target_ratio > 0:
            with replace_file(args.out / "routing.pt") as file:
                torch.save(model.routing.state_dict(), file)
            with replace_file(args.out / "ratios.png") as file:
                picture_of(model.routing).save(file, "PNG")


@contextlib.contextmanager
def averaging(averaged: EMAModel, weights: list) -> Iterator[None]:
    """In here the model has its averaged weights."""
    averaged.store(weights)
    averaged.copy_to(weights)
    try:
        yield
    finally:
        averaged.restore(weights)


def write_metrics(path: Path, line: dict) -> None:
    """Append a line; those of a run that went further than the checkpoint from which it was resumed are replaced."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [old for old in lines if json.loads(old)["step"] < line["step"]]
    with replace_file(path) as file:
        file.write("".join(old + "\n" for old in [*lines, json.dumps(line)]).encode())


def settle(args, accelerator: Accelerator) -> None:
    """The flags of a run are kept with it; --resume refuses others: the run would be neither the old nor a new one."""
    path = args.out / "settings.json"
    settings = {name: value for name, value in vars(args).items() if name not in PLACES + INTERVALS}
    settings.update(mixed_precision=accelerator.mixed_precision, processes=accelerator.num_processes)
    if args.resume:
        with input_errors(f"cannot read {path}"):
            before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if before.get(name) != value:
                flag = name.replace("_", "-")
                raise InputError(f"--resume: the run in {args.out} has --{flag} {before.get(name)}, not {value}")
    elif accelerator.is_main_process:
        with replace_file(path) as file:
            file.write(json.dumps(settings, indent=1).encode())


# --- While it trains ---------------------------------------------------------------------------------------------


def loader_of(data: Samples, numbers: range, args, accelerator: Accelerator) -> torch.utils.data.DataLoader:
    """Batches of those images of a run. Each process takes every num_processes-th: so no loader needs preparing."""
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    options = {"num_workers": args.workers, "collate_fn": put_together, "pin_memory": accelerator.device.type == "cuda"}
    return torch.utils.data.DataLoader(data, args.batch_size, sampler=mine, **options)


def losses_of(model: nn.Module, scheduler: DDPMScheduler, batch: dict[str, Tensor], sums: Tensor) -> Tensor:
    """The losses of a batch (B,), added to sums (2, C): of the losses in each region, and of the images."""
    batch = {name: values.to(sums.device, non_blocking=True) for name, values in batch.items()}
    latents = batch.pop("latents")
    noise = batch.pop("noise")
    timestep = batch.pop("timestep")
    losses = diffusion_loss(model, scheduler.add_noise(latents, noise, timestep), timestep, noise, batch)
    columns = column_of((timestep + 1) / TIMESTEPS, sums.shape[1])
    sums.index_add_(1, columns, torch.stack([losses.detach(), torch.ones_like(losses)]).to(sums.dtype))
    return losses


def means_of(sums: Tensor, name: str, accelerator: Accelerator) -> dict:
    """The mean loss, and that of each region, of all processes."""
    losses, images = accelerator.reduce(sums, "sum").tolist()
    of_regions = [loss / n if n else None for loss, n in zip(losses, images)]
    return {name: sum(losses) / sum(images), f"{name}_by_region": of_regions}


@torch.no_grad()
def validate(model: nn.Module, scheduler: DDPMScheduler, held: Samples, name: str, args, accelerator) -> dict:
    sums = torch.zeros(2, args.timestep_regions, device=accelerator.device)
    for batch in loader_of(held, range(held.total), args, accelerator):
        losses_of(model, scheduler, batch, sums)
    return means_of(sums, name, accelerator)


@contextlib.contextmanager
def on_signals(function: Callable[[], None]) -> Iterator[None]:
    """In here SIGTERM and SIGUSR1, with which schedulers announce the end of a job, call the function."""
    before = {}
    for name in ("SIGTERM", "SIGUSR1"):  # Windows has not both, and only the main thread may
        if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
            before[name] = signal.signal(getattr(signal, name), lambda number, frame: function())
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


# --- Training ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int | None:
    args = make_parser().parse_args(arguments)
    saved = checkpoints(args.out)
    if args.resume and not saved:
        raise InputError(f"{args.out} holds no checkpoint to go on from; leave --resume out")
    if saved and not args.resume:
        raise InputError(f"{args.out} holds a run: --resume goes on with it, another --out begins a new one")
    if args.train == "routing" and args.target_ratio == 0:
        raise InputError("--train routing without routing trains nothing: give a --target-ratio")
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate,
        mixed_precision=args.mixed_precision,
        cpu=not torch.accelerator.is_available(),  # if not told, every process takes itself for the only one
        log_with=args.report_to,
        project_dir=args.out,
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise InputError("weights in shards (FSDP, DeepSpeed) are not written by this script; launch it without")
    with on_signals(accelerator.set_trigger):
        return train(args, accelerator, saved)


def train(args, accelerator: Accelerator, saved: list[Path]) -> int | None:
    set_seed(args.seed)
    model, scheduler = load_model(args)
    total = args.batch_size * accelerator.num_processes * args.accumulate  # images of a step
    data, held = read_samples(args.data, model, args.validation, total, args.timestep_regions, args.seed)
    settle(args, accelerator)

    table = model.routing.ratios if args.target_ratio > 0 else None
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter is not table]
    groups = [{"params": weights, "lr": args.lr}]
    if table is not None:
        # A learning rate of their own, and no weight decay: the ratios should not drift to zero.
        groups.append({"params": [table], "lr": args.ratio_lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)

    def rate(step: int) -> float:  # a short warm-up, a plateau, and a linear decay over the last 40 % of the steps
        return min(1.0, (step + 1) / min(100, 0.1 * args.steps + 1), (args.steps - step) / (0.4 * args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    # `wrapped` may average gradients over processes: of all parameters, so of the table and the routers, too.
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    averaged = EMAModel(weights, decay=args.ema_decay)
    accelerator.register_for_checkpointing(schedule, averaged)
    step = 0
    if args.resume:
        with input_errors(f"the run in {args.out} cannot go on"):
            accelerator.load_state(str(saved[-1]))
        step = int(saved[-1].name.removeprefix("checkpoint-"))
        averaged.to(accelerator.device)
        if accelerator.is_main_process:  # they may be missing
            write_results(model, averaged, weights, args)
    pipe = None
    if args.report_to:
        accelerator.init_trackers("finetune")
        if accelerator.is_main_process:
            pipe = pipeline_around(model, args.pretrained, args.revision)

    sums = torch.zeros(2, args.timestep_regions, device=accelerator.device)
    bar = tqdm(initial=step, total=args.steps, disable=not accelerator.is_main_process)
    for batch in loader_of(data, range(step * total, args.steps * total), args, accelerator):
        with accelerator.accumulate(wrapped):
            loss = losses_of(wrapped, scheduler, batch, sums).mean()
            if table is not None:
                # Alike in every process and pass, whose gradients are averaged: so it acts once.
                loss = loss + args.ratio_weight * ratio_loss(table, args.target_ratio)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        schedule.step()
        if table is not None:
            model.routing.clamp_ratios()
        averaged.step(weights)
        step += 1
        bar.update()
        stopping = accelerator.check_trigger()  # a signal has come to one of the processes: they agree on the step
        saving = stopping or step % args.save_every == 0 or step == args.steps
        validating = held is not None and (step % args.validate_every == 0 or step == args.steps)
        if saving or validating or step % args.log_every == 0:
            line = {"step": step} | means_of(sums, "loss", accelerator)
            sums.zero_()
            if not np.isfinite(line["loss"]):
                raise InputError(f"the loss is not finite before step {step}; try a lower --lr; what was saved is good")
            if table is not None:
                line["mean_ratio"] = float(table.detach().mean())
                line["ratios"] = np.round(table.tolist(), 4).tolist()
            if validating:
                with averaging(averaged, weights):
                    line |= validate(model, scheduler, held, "validation_loss", args, accelerator)
                    if table is not None:  # and what skipping costs
                        with model.routing.nothing_skipped():
                            name = "validation_loss_with_nothing_skipped"
                            line |= validate(model, scheduler, held, name, args, accelerator)
            bar.set_postfix({name: line[name] for name in ("loss", "mean_ratio") if name in line})
            if accelerator.is_main_process:
                write_metrics(args.out / "metrics.jsonl", line)
                if pipe is not None:
                    report(line, pipe, held if validating else None, accelerator)
        if saving:
            save_checkpoint(accelerator, args.out / f"checkpoint-{step}")
            if accelerator.is_main_process:
                write_results(model, averaged, weights, args)
            accelerator.wait_for_everyone()
        if stopping:
            break
    accelerator.end_training()
    return 128 + signal.SIGTERM if step < args.steps else None


if __name__ == "__main__":
    run_command(main)
