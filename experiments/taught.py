"""Fine-tune with a frozen dense model as teacher: train_cifar.py, but the target is what the teacher predicts.

    python experiments/taught.py --teacher assets/cifar_dense.pt --init assets/cifar_routed.pt --dataset folder \\
        --data-dir data/cifar10-jpeg --amp --compile --steps 1350 --out runs/taught

All flags are those of train_cifar.py. No noise level matters more than another here, and every image is computed twice, so
the defaults are `--noise 0 1.6` and `--batch-size 32`. Go on with this command, too, and --teacher: a checkpoint does not tell
that it had a teacher.
"""

from pathlib import Path
from types import SimpleNamespace

from common import tools
from torch import Tensor, cat

import train_cifar
from diffratio_mod import DiT, InputError, column_of, schedule

GUIDANCE = 3.0  # as in sampling


def imitation_loss(
    model: DiT, images: Tensor, words: Tensor, mask: Tensor, t: Tensor, eps: Tensor, route: bool, teacher: DiT
) -> Tensor:
    """As diffusion_loss, but the distance to what the teacher predicts, guided: what skipping changes in a sampler.

    A model that has lost what captions change predicts almost as well, for that is little; but guidance multiplies it.
    """
    a, s = (z.view(-1, 1, 1, 1) for z in schedule(t))
    noisy, t, images, mask = (cat([z, z]) for z in (a * images + s * eps, t, images, mask))
    words = cat([words, 0 * words])
    ratio = model.ratios[:, column_of(t, model.ratios.shape[1])] if route else None  # (L, 2 B)
    predicted = model(noisy, t, model.encode_caption(words), images, mask, ratio=ratio)
    wrong = predicted.float() - teacher(noisy, t, teacher.encode_caption(words), images, mask).float()
    conditional, unconditional = wrong.chunk(2)
    return (unconditional + GUIDANCE * (conditional - unconditional)).square().mean(dim=(1, 2, 3))


def main() -> int | None:
    parser = tools.Parser(__doc__)
    parser.allow_abbrev = False
    parser.add_argument("--teacher", type=Path, required=True, help="dense checkpoint")
    args, flags = parser.parse_known_args()
    teacher = tools.read_checkpoint(args.teacher)[0].requires_grad_(False)

    def prepare(run: SimpleNamespace) -> None:
        same = [(z.image_size, z.vocabulary) for z in (teacher.config, run.model.config)]
        if teacher.config.mode != "dense" or same[0] != same[1]:
            raise InputError(f"--teacher {args.teacher} is no dense model of this size with these captions")
        teacher.to(run.sums.device)
        run.loss_of = lambda *batch: imitation_loss(*batch, teacher)

    return train_cifar.main(
        flags if "--resume" in flags else ["--noise", "0", "1.6", "--batch-size", "32", *flags], prepare
    )


if __name__ == "__main__":
    tools.run_command(main)
