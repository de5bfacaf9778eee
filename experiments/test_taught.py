"""Fine-tuning with a teacher: its loss against a definition of its own, and what the command does with a teacher."""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import taught

# isort: split
import pytest
import torch

import train_cifar
from diffratio_mod import Config, DiT, InputError, column_of, schedule

FLAGS = shlex.split("--dataset shapes --dim 16 --depth 2 --heads 2 --steps 2 --batch-size 4 --save-every 1")


def test_the_loss_is_the_distance_of_guided_predictions_and_moves_the_student_alone():
    torch.manual_seed(0)
    model, teacher = (DiT(Config(("a", "b"), 16, 4, 16, 3, 2, 4, mode, 4)) for mode in ("layer-timestep", "dense"))
    for parameter in (*model.parameters(), *teacher.requires_grad_(False).parameters()):
        parameter.data = 0.3 * torch.rand(parameter.shape) - 0.1
    images, eps = torch.randn(2, 6, 3, 16, 16)
    words, mask, t = torch.randint(3, (6, 4)), torch.rand(6, 1, 16, 16).round(), torch.linspace(0.1, 1, 6)
    a, s = (z.view(-1, 1, 1, 1) for z in schedule(t))
    guided = []
    for net, ratio in ((model, model.ratios[:, column_of(t, 4)]), (teacher, None)):
        inputs = lambda w, net=net: (a * images + s * eps, t, net.encode_caption(w), images, mask)
        guided.append(3 * net(*inputs(words), ratio=ratio) - 2 * net(*inputs(0 * words), ratio=ratio))
    losses = taught.imitation_loss(model, images, words, mask, t, eps, True, teacher)
    torch.testing.assert_close(losses, (guided[0] - guided[1]).square().mean(dim=(1, 2, 3)))
    losses.mean().backward()
    assert model.ratios.grad.any() and all(p.grad is None for p in teacher.parameters())
    model.load_state_dict(teacher.state_dict() | {"ratios": torch.zeros(3, 4)})
    assert taught.imitation_loss(model, images, words, mask, t, eps, False, teacher).eq(0).all()


def test_a_teacher_teaches_in_every_step_stays_as_it_is_and_must_be_dense(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_cifar.main([*FLAGS, "--mode", "dense", "--out", "dense"])
    loss, teachers = taught.imitation_loss, []
    monkeypatch.setattr(taught, "imitation_loss", lambda *z: teachers.append(z[-1]) or loss(*z))
    flags = ["--teacher", "dense/checkpoint.pt", *FLAGS, "--init", "dense/checkpoint.pt", "--out", "new"]
    for count, extra in ((2, []), (3, ["--resume", "--steps", "3"])):
        monkeypatch.setattr(sys, "argv", ["taught.py", *(flags if not extra else flags[:2] + flags[-2:] + extra)])
        taught.main()
        assert len(teachers) == count
    began = torch.load(tmp_path / "dense" / "checkpoint.pt", weights_only=True)["ema"]
    assert all(torch.equal(value, began[name]) for name, value in teachers[0].state_dict().items())
    assert torch.load(tmp_path / "new" / "checkpoint.pt", weights_only=True)["settings"]["noise"] == [0.0, 1.6]
    monkeypatch.setattr(sys, "argv", ["taught.py", "--teacher", "new/checkpoint.pt", *FLAGS, "--out", "other"])
    with pytest.raises(InputError, match="no dense model"):
        taught.main()
    assert not (tmp_path / "other").exists()
