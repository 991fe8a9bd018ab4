"""A grid of probes: each member is its own run, whatever happens to the others."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from sklearn.metrics import log_loss
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, cross_entropy

from clipattr.config.schema import TrainerConfig
from clipattr.errors import ConfigError
from clipattr.probes.grid import GridScores, ProbeGrid
from clipattr.probes.linear import LinearProbe
from clipattr.probes.losses import head_losses
from clipattr.training.activations import ActivationDataModule
from clipattr.training.probe_grid import GridPoint, ProbeGridModule
from clipattr.training.probe_module import ProbeModule
from clipattr.training.trainer import build_trainer, fit
from tests.stores import store_of

N_STEPS = 20
POINTS = [GridPoint(0.3, 0.0), GridPoint(0.03, 0.5), GridPoint(1e-3, 0.0), GridPoint(0.3, 0.5)]


def make_rows() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (200,), generator=draw)
    rows = torch.randn(3, 8, generator=draw)[labels] + torch.randn(200, 8, generator=draw)
    # Gradients with a norm above 1, where clipping is at work.
    return 4 * rows, labels


class Curve(Callback):
    """What is logged at each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps.append({name: float(v) for name, v in trainer.logged_metrics.items()})


def train(module: ProbeModule | ProbeGridModule, folder: Path) -> list[dict[str, float]]:
    rows, labels = make_rows()
    data = ActivationDataModule(
        lambda _: store_of(rows, folder / "store"),
        batch_size=32,
        seed=0,
        n_steps=N_STEPS,
        fields=("x", "images"),
        finish=lambda x, images: (x.float(), labels[images.long()]),
    )
    settings = TrainerConfig(steps=N_STEPS, progress=False, accelerator="cpu", log_every=1)
    curve = Curve()
    fit(build_trainer(settings, folder, callbacks=[curve]), module, data, folder)
    return curve.steps


def test_each_member_is_its_own_run(tmp_path: Path):
    module = ProbeGridModule([LinearProbe(8, 3) for _ in POINTS], POINTS, n_steps=N_STEPS)
    curves = train(module, tmp_path / "grid")
    for point, member in zip(POINTS, module.grid.probes, strict=True):
        alone = LinearProbe(8, 3)
        one = ProbeModule(alone, lr=point.lr, weight_decay=point.weight_decay, n_steps=N_STEPS)
        curve = train(one, tmp_path / point.name)
        torch.testing.assert_close(member.weight, alone.weight, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(member.bias, alone.bias, atol=1e-6, rtol=1e-6)
        own = [step[f"{point.name}/loss"] for step in curves]
        assert own == pytest.approx([step["train/loss"] for step in curve], abs=1e-6, rel=1e-6)
    assert len({tuple(one.bias.tolist()) for one in module.grid.probes}) == len(POINTS)


def test_sgd_is_the_plain_loop(tmp_path: Path):
    points = [GridPoint(0.1, 0.2), GridPoint(0.01, 0.0)]
    probes = [LinearProbe(8, 3) for _ in points]
    module = ProbeGridModule(probes, points, n_steps=N_STEPS, optimiser="sgd")
    seen: list[tuple[Tensor, Tensor]] = []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: (seen.append(batch), step(batch, batch_idx))[1]
    train(module, tmp_path)
    for point, probe in zip(points, probes, strict=True):
        theta = [torch.zeros(3, 8), torch.zeros(3)]
        moved = [torch.zeros(3, 8), torch.zeros(3)]
        for number, (x, y) in enumerate(seen):
            theta = [one.requires_grad_() for one in theta]
            loss = cross_entropy(x @ theta[0].T + theta[1], y)
            gradients = torch.autograd.grad(loss, theta)
            norm = sum(float(one.square().sum()) for one in gradients) ** 0.5
            lr = point.lr * (1 + torch.tensor(torch.pi * number / N_STEPS).cos()) / 2
            for i, decay in ((0, point.weight_decay), (1, 0.0)):
                gradient = gradients[i] / max(1.0, norm) + decay * theta[i].detach()
                moved[i] = 0.9 * moved[i] + gradient
                theta[i] = theta[i].detach() - lr * moved[i]
        torch.testing.assert_close(probe.weight.detach(), theta[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(probe.bias.detach(), theta[1], atol=1e-5, rtol=1e-4)


def test_one_that_diverges_leaves_the_others_alone(tmp_path: Path):
    points = [GridPoint(float("inf"), 0.0), GridPoint(0.03, 0.0)]
    both = [LinearProbe(8, 3), LinearProbe(8, 3)]
    train(ProbeGridModule(both, points, n_steps=N_STEPS), tmp_path / "both")
    (alone,) = probes = [LinearProbe(8, 3)]
    train(ProbeGridModule(probes, points[1:], n_steps=N_STEPS), tmp_path / "one")
    torch.testing.assert_close(both[1].weight, alone.weight, atol=1e-6, rtol=1e-6)
    rows, labels = make_rows()
    scores = GridScores()
    with torch.no_grad():
        scores.update(ProbeGrid(both)(rows), labels)
    assert scores.scores()[0] == 0
    assert scores.scores()[1] > 0.5


def test_scores_are_those_of_a_loop():
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(30, 4, 3, generator=draw)
    labels, groups = torch.randint(3, (2, 30), generator=draw)
    scores = GridScores()
    for rows in (slice(0, 17), slice(17, 30)):
        scores.update(logits[rows], labels[rows], groups[rows])
    for member in range(4):
        right = logits[:, member].argmax(1) == labels
        assert scores.scores()[member] == pytest.approx(right.double().mean().item())
        worst = min(right[groups == group].double().mean().item() for group in range(3))
        assert scores.scores("worst_group")[member] == pytest.approx(worst)


@pytest.mark.parametrize("is_weighted", [False, True])
def test_losses_are_those_of_sklearn_and_loops(is_weighted: bool):
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(20, 2, 3, generator=draw)
    labels = torch.randint(3, (20,), generator=draw)
    weight = torch.tensor([1.0, 2.0, 0.5]) if is_weighted else None
    of_rows = weight[labels] if weight is not None else torch.ones(20)
    losses = head_losses(logits, labels, weight)
    for member in range(2):
        p = logits[:, member].double().softmax(1)
        expected = log_loss(labels, p / p.sum(1, keepdim=True), sample_weight=of_rows)
        assert float(losses[member]) == pytest.approx(expected, rel=1e-5)
        assert float(head_losses(logits[:, member], labels, weight)) == pytest.approx(expected)
    several = torch.randint(2, (20, 3), generator=draw).float()
    losses = head_losses(logits, several, weight)
    counts = torch.where(several > 0, torch.ones(3) if weight is None else weight, 1.0)
    for member in range(2):
        expected = binary_cross_entropy(logits[:, member].sigmoid(), several, weight=counts)
        torch.testing.assert_close(losses[member], expected)


def test_refuses_what_does_not_belong_together():
    with pytest.raises(ConfigError, match=r"shapes \[\(2, 4\), \(3, 4\)\]"):
        ProbeGrid([LinearProbe(4, 2), LinearProbe(4, 3)])
    with pytest.raises(ConfigError, match="1 probes for the grid .*lr=0.3,wd=0"):
        ProbeGridModule([LinearProbe(4, 2)], POINTS, n_steps=3)
