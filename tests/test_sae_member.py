"""k that falls, and the running mean of the weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipattr.errors import ConfigError
from clipattr.sae import BatchTopKSae, NestedTopKSae, ReluSae, TopKSae
from clipattr.sae.averaging import AveragedSae
from clipattr.sae.sae import Sae
from clipattr.training import fit_sae
from clipattr.training.activations import ActivationDataModule
from clipattr.training.sae_member import SaeMember
from clipattr.training.sae_module import SaeModule
from clipattr.training.trainer import build_trainer, fit
from tests.stores import store_of
from tests.test_training import N_STEPS, KillAt, KilledError, activations, settings

DECAY, K_START, K_STEPS = 0.9, 12, 20


def member_of(kind: type[TopKSae] = TopKSae, **options: object) -> SaeMember:
    sae = kind(d_model=8, n_latents=24, k=3, generator=torch.Generator().manual_seed(1))
    usual = {"lr": 1e-2, "warmup": 3, "k_aux": 4, "aux_coefficient": 0.1, "dead_after": 64}
    return SaeMember(sae, **(usual | options))  # type: ignore[arg-type]


def run(folder: Path, member: SaeMember, kill_at: int | None = None) -> SaeModule:
    data = ActivationDataModule(
        lambda _: store_of(activations(), folder / "store"), batch_size=32, seed=0, n_steps=N_STEPS
    )
    module = SaeModule({"": member}, n_steps=N_STEPS)
    callbacks = [] if kill_at is None else [KillAt(kill_at)]
    fit(build_trainer(settings(), folder, callbacks=callbacks), module, data, folder)
    return module


def test_the_mean_is_that_of_a_plain_loop():
    sae = TopKSae(d_model=4, n_latents=6, k=2).double()
    averaged = AveragedSae(sae, decay=0.75)
    history: list[Tensor] = []
    for step in range(10):
        with torch.no_grad():
            sae.W_enc.normal_(generator=torch.Generator().manual_seed(step))
        averaged.update(sae)
        history.append(sae.W_enc.detach().clone())
        if step < 4:
            torch.testing.assert_close(averaged.mean.W_enc, torch.stack(history).mean(0))
    expected = torch.stack(history[:4]).mean(0)
    for weights in history[4:]:
        expected = 0.75 * expected + 0.25 * weights
    torch.testing.assert_close(averaged.mean.W_enc, expected, rtol=1e-12, atol=1e-12)


def test_what_comes_out_has_unit_directions_and_the_statistics():
    member = member_of(ema=DECAY).double()
    for seed in range(3):
        with torch.no_grad():
            member.sae.W_dec.normal_(generator=torch.Generator().manual_seed(seed))
        member.after_step()
    sae = member.sae
    sae.input_scale.fill_(0.7)
    found = member.finish()
    torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(24).double())
    assert (found.input_scale, found.training) == (0.7, False)
    assert not torch.equal(found.W_dec, sae.W_dec)


def test_a_threshold_has_no_mean():
    with pytest.raises(ConfigError, match="ema=0.9 for a BatchTopKSae: the threshold"):
        member_of(BatchTopKSae, ema=DECAY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": 1.0}, "ema=1.0: must lie between"),
        ({"ema": float("nan")}, "ema=nan: must lie between"),
        ({"lr": -1.0}, "lr=-1.0, k_aux=4"),
        ({"k_aux": 0}, "lr=0.01, k_aux=0"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        member_of(**options)


def test_k_falls_to_its_end():
    member = member_of(k_start=K_START, k_steps=K_STEPS)
    ks = []
    for step in range(K_STEPS + 5):
        member.anneal(step)
        ks.append(member(activations()[:4]).output.codes.values.shape[1])
    assert ks[0] == K_START
    assert ks[K_STEPS // 3] == round(K_START - 9 * (K_STEPS // 3) / K_STEPS)
    assert ks == sorted(ks, reverse=True)
    assert ks[K_STEPS - 1 :] == [3] * 6


@pytest.mark.parametrize("options", [{"k_start": 2}, {"k_start": 25}])
def test_a_start_that_cannot_be(options: dict[str, int]):
    with pytest.raises(ConfigError, match=r"k_start=\d+ for a TopKSae of 24 latents with k=3"):
        member_of(**options)
    sae = ReluSae(d_model=8, n_latents=24, sparsity=0.1)
    with pytest.raises(ConfigError, match="with no k"):
        SaeMember(
            sae, lr=1.0, warmup=1, k_aux=1, aux_coefficient=0.0, dead_after=1, k_start=4, k_steps=2
        )


def test_both_resume_with_the_same_bits(tmp_path: Path):
    options = {"ema": DECAY, "k_start": K_START, "k_steps": K_STEPS}
    whole = run(tmp_path / "whole", member_of(**options)).state_dict()
    with pytest.raises(KilledError):
        run(tmp_path / "killed", member_of(**options), kill_at=13)
    resumed = run(tmp_path / "killed", member_of(**options)).state_dict()
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    plain = run(tmp_path / "plain", member_of()).state_dict()
    assert not torch.equal(plain["members.0.sae.W_dec"], whole["members.0.sae.W_dec"])


def test_fit_sae_gives_the_mean():
    rows = activations()
    found: dict[float | None, Sae] = {
        ema: fit_sae(rows, k=3, n_latents=24, steps=40, batch_size=32, ema=ema)
        for ema in (None, 0.99)
    }
    with torch.no_grad():
        before, after = ((sae(rows).recon - rows).square().sum() for sae in found.values())
    assert before != after
    assert after < 2 * before


def test_what_was_averaged_can_be_trained_on():
    first = fit_sae(activations(), k=3, n_latents=24, steps=3, batch_size=32, ema=0.9)
    before = first.W_dec.detach().clone()
    again = fit_sae(activations(), first, steps=3, batch_size=32)
    assert not torch.equal(again.W_dec, before)


@pytest.mark.parametrize(("steps", "k_start"), [(1, 16), (300, 16)])
def test_k_and_threshold_end_where_they_belong(steps: int, k_start: int):
    rows = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
    sae = fit_sae(
        rows, BatchTopKSae, k=4, n_latents=32, steps=steps, batch_size=256, k_start=k_start
    )
    assert sae.max_active == 32
    assert isinstance(sae, BatchTopKSae)
    assert sae.k == 4
    if steps > 1:
        l0 = sae.encode(rows).is_active.sum(1).double().mean().item()
        assert l0 == pytest.approx(4, rel=0.05)


def test_levels_do_not_fall():
    with pytest.raises(ConfigError, match="k_start=8 for a NestedTopKSae of 24 latents with no k"):
        fit_sae(activations(), NestedTopKSae, ks=(2, 4), n_latents=24, steps=2, k_start=8)
