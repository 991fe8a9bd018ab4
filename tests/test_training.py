"""Lightning glue: exact resume, checkpoints that survive, schedules, hooks at the right place."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from open_clip.loss import ClipLoss

from clipattr.clip.loading import load_clip
from clipattr.config.choices import Logger
from clipattr.config.schema import TrainerConfig
from clipattr.errors import CheckpointError, ConfigError
from clipattr.probes.linear import LinearProbe
from clipattr.sae.topk import TopKSae
from clipattr.training.activations import ActivationDataModule
from clipattr.training.checkpoints import AtomicCheckpointIO, newest_valid
from clipattr.training.clip_module import ClipModule
from clipattr.training.optim import warmup_cosine, warmup_hold_decay
from clipattr.training.probe_module import ProbeModule
from clipattr.training.sae_member import SaeMember
from clipattr.training.sae_module import SaeModule
from clipattr.training.trainer import build_trainer, fit
from tests.stores import store_of
from tests.tiny import save_tiny_clip

N_STEPS = 24
OF_SAE = "members.0.sae."


class KilledError(Exception):
    """Stands for kill -9: nothing of the run's own code handles it."""


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise KilledError


def settings(**changes) -> TrainerConfig:
    options = {"steps": N_STEPS, "checkpoint_every": 5, "progress": False, "accelerator": "cpu"}
    return TrainerConfig(**(options | changes))


def activations() -> torch.Tensor:
    return torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) * 3 + 10


def sae_run(folder, *, seed=0, kill_at=None) -> dict[str, torch.Tensor]:
    data = ActivationDataModule(
        lambda _: store_of(activations(), folder / "store"),
        batch_size=32,
        seed=seed,
        n_steps=N_STEPS,
    )
    sae = TopKSae(d_model=8, n_latents=24, k=3, generator=torch.Generator().manual_seed(1))
    member = SaeMember(sae, lr=1e-2, warmup=3, k_aux=4, aux_coefficient=0.1, dead_after=64)
    module = SaeModule({"": member}, n_steps=N_STEPS)
    callbacks = [] if kill_at is None else [KillAt(kill_at)]
    trainer = build_trainer(settings(), folder, callbacks=callbacks)
    fit(trainer, module, data, folder)
    return module.state_dict()


def test_resumed_run_ends_with_the_same_bits(tmp_path):
    whole = sae_run(tmp_path / "whole")
    with pytest.raises(KilledError):
        sae_run(tmp_path / "killed", kill_at=13)
    assert newest_valid(tmp_path / "killed" / "checkpoints").name == "step=10.ckpt"
    resumed = sae_run(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_resume_refuses_another_order(tmp_path):
    with pytest.raises(KilledError):
        sae_run(tmp_path, kill_at=13)
    with pytest.raises(CheckpointError, match="seed was 0 and is 1"):
        sae_run(tmp_path, seed=1)


def test_checkpoint_holds_unit_decoder_rows_and_the_position(tmp_path):
    sae_run(tmp_path)
    path = newest_valid(tmp_path / "checkpoints")
    checkpoint = torch.load(path, weights_only=True)
    norms = checkpoint["state_dict"]["members.0.sae.W_dec"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(24), atol=1e-6, rtol=0)
    assert checkpoint["ActivationDataModule"]["t"] == checkpoint["global_step"] == 20


def test_sae_starts_from_the_data_and_learns(tmp_path):
    state = sae_run(tmp_path)
    rows = activations()
    spread = ((rows - rows.mean(0)).square().sum(1).mean() / 8).sqrt()
    torch.testing.assert_close(state["members.0.sae.input_scale"], spread)
    sae = TopKSae(d_model=8, n_latents=24, k=3, generator=torch.Generator().manual_seed(1))
    sae.initialise_from(rows)
    before = (rows - sae(rows).recon).square().sum()
    sae.load_state_dict({k[len(OF_SAE) :]: v for k, v in state.items() if OF_SAE in k})
    assert (rows - sae(rows).recon).square().sum() < 0.7 * before


def test_history_counts_rows_in_training(tmp_path):
    state = sae_run(tmp_path)
    since = state["members.0.history.rows_since_fired"]
    assert since.dtype == torch.int64
    assert ((since >= 0) & (since <= 32 * N_STEPS)).all()
    assert (since == 0).any()


def test_truncated_checkpoint_is_passed_over(tmp_path, caplog):
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "step=1.ckpt")
    io.save_checkpoint({"step": 2}, tmp_path / "step=2.ckpt")
    newest = tmp_path / "step=2.ckpt"
    newest.write_bytes(newest.read_bytes()[:100])
    assert newest_valid(tmp_path) == tmp_path / "step=1.ckpt"
    assert "step=2.ckpt" in caplog.text
    assert newest_valid(tmp_path / "empty") is None


def test_failed_save_keeps_the_old_checkpoint(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises((AttributeError, RuntimeError, TypeError)):
        io.save_checkpoint({"step": (yield_ for yield_ in ())}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("step", [0, 4, 9, 10, 50, 99])
def test_schedules_on_paper(step):
    ramp = (step + 1) / 10
    cosine = 0.5 * (1 + math.cos(math.pi * step / 100))
    assert warmup_cosine(10, 100)(step) == pytest.approx(min(ramp, cosine))
    hold = min(ramp, 1.0, (100 - step) / 20)
    assert warmup_hold_decay(10, 100)(step) == pytest.approx(hold)


def test_probe_separates_what_is_separable(tmp_path):
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(400, 6, generator=generator), dim=1)
    labels = (features[:, 2] > 0).long()
    data = ActivationDataModule(
        lambda _: store_of(features, tmp_path / "store"),
        batch_size=100,
        seed=0,
        n_steps=N_STEPS,
        fields=("x", "images"),
        finish=lambda x, images: (x, labels[images.long()]),
    )
    probe = LinearProbe(6, 2)
    module = ProbeModule(probe, lr=0.3, weight_decay=0.0, n_steps=N_STEPS)
    fit(build_trainer(settings(), tmp_path), module, data, tmp_path)
    assert (probe(features).argmax(1) == labels).double().mean() > 0.95


def test_clip_loss_is_the_symmetric_cross_entropy(tmp_path):
    model = load_clip(save_tiny_clip(tmp_path / "clip")).model
    module = ClipModule(model, lr=1e-3, weight_decay=0.1, warmup=1, n_steps=1)
    module.loss = ClipLoss()
    module.log = lambda *_, **__: None
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 600, (5, 20), generator=generator)
    loss = module.training_step((images, tokens), 0)
    image = torch.nn.functional.normalize(model.encode_image(images), dim=1).double()
    text = torch.nn.functional.normalize(model.encode_text(tokens), dim=1).double()
    logits = model.logit_scale.exp().double() * image @ text.T
    plain = 0.0
    for row in range(5):
        plain -= logits[row].log_softmax(0)[row] / 10
        plain -= logits[:, row].log_softmax(0)[row] / 10
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)


def test_missing_logger_names_the_extra(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("wandb")

    monkeypatch.setattr("clipattr.training.trainer.WandbLogger", missing)
    with pytest.raises(ConfigError, match=r"clipattr\[wandb\]"):
        build_trainer(settings(logger=Logger.wandb), tmp_path)


def test_batch_larger_than_the_data_is_refused(tmp_path):
    data = ActivationDataModule(
        lambda _: store_of(activations(), tmp_path / "store"), batch_size=999, seed=0, n_steps=1
    )
    module = ProbeModule(LinearProbe(8, 2), lr=0.1, weight_decay=0.0, n_steps=1)
    with pytest.raises(ConfigError, match="batch_size=999, but there are 200 rows"):
        fit(build_trainer(settings(), tmp_path), module, data, tmp_path)
