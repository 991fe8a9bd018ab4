"""Many SAEs in one run: each has the bits of its own run, whatever becomes of the others."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from clipattr.data.store import ActivationStore
from clipattr.errors import DataError
from clipattr.sae import BatchTopKSae, GatedSae, JumpReluSae, MatryoshkaSae, ReluSae, TopKSae
from clipattr.sae.initial import Bias
from clipattr.sae.sae import Sae, SaeOutput
from clipattr.training import sae_module
from clipattr.training.activations import ActivationDataModule
from clipattr.training.sae_member import SaeMember
from clipattr.training.sae_module import SaeModule
from clipattr.training.throughput import Throughput
from clipattr.training.trainer import build_trainer, fit
from tests.observed_run import Processes
from tests.stores import store_of
from tests.test_training import N_STEPS, KillAt, KilledError, activations, settings

BATCH = 32
FAILS_AT = 9


class NanLoss(TopKSae):
    """Its loss is nan from some step on; of the rank that the environment names, if it does."""

    n_calls = 0

    def penalty(self, target: Tensor, output: SaeOutput, spread: Tensor) -> Tensor:
        self.n_calls += 1
        is_here = os.environ.get("RANK", "1") == "1"
        return target.new_full((), torch.nan if is_here and self.n_calls > FAILS_AT else 0.0)


class NanGradient(NanLoss):
    """Its loss is finite all the time, its gradient is not: the root of zero."""

    def penalty(self, target: Tensor, output: SaeOutput, spread: Tensor) -> Tensor:
        fails = super().penalty(target, output, spread).isnan().item()
        return (0 * self.b_enc).abs().sqrt().sum() if fails else target.new_zeros(())


def member(
    kind: type[Sae], lr: float = 1e-2, warmup: int = 3, n_latents: int = 24, **needs: object
) -> SaeMember:
    generator = torch.Generator().manual_seed(1)
    sae = kind(d_model=8, n_latents=n_latents, generator=generator, **needs)
    return SaeMember(sae, lr=lr, warmup=warmup, k_aux=4, aux_coefficient=0.1, dead_after=64)


def grid() -> dict[str, SaeMember]:
    """With gradients that are clipped in some of them and not in others."""
    started = member(GatedSae, n_latents=20, sparsity=1e-3)
    started.bias, started.from_data = Bias.geometric_median, True
    return {
        "a": member(TopKSae, k=3),
        "b": member(TopKSae, lr=0.1, warmup=0, k=5),
        "c": member(BatchTopKSae, warmup=8, n_latents=32, k=3),
        "d": member(JumpReluSae, lr=3e-3, sparsity=3.0),
        "e": member(MatryoshkaSae, k=2, fractions=(0.5, 0.5)),
        "f": started,
    }


def train(
    members: Mapping[str, SaeMember], folder: Path, *callbacks: Callback, seed: int = 0
) -> SaeModule:
    data = ActivationDataModule(
        lambda _: store_of(activations(), folder / "store"),
        batch_size=BATCH,
        seed=seed,
        n_steps=N_STEPS,
    )
    module = SaeModule(members, n_steps=N_STEPS)
    fit(build_trainer(settings(), folder, callbacks=list(callbacks)), module, data, folder)
    return module


def assert_same(found: SaeMember, expected: SaeMember) -> None:
    wanted = expected.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_each_has_the_bits_of_its_own_run(tmp_path: Path):
    together = train(grid(), tmp_path / "together")
    for name, one in grid().items():
        alone = train({"": one}, tmp_path / name)
        assert_same(together.by_name[name], alone.by_name[""])
    weights = [one.sae.W_enc for one in together.by_name.values()]
    assert all(weight.isfinite().all() for weight in weights)
    assert not torch.equal(weights[0], weights[1])


def test_a_member_is_trained_as_on_paper(tmp_path: Path):
    """Plain torch: loss, gradient, clipping, Adam, schedule, projection, normalisation."""
    module = train(
        {"a": member(TopKSae, k=3), "b": member(ReluSae, warmup=5, sparsity=3.0)}, tmp_path
    )
    one = member(ReluSae, warmup=5, sparsity=3.0)
    rows, store = activations(), ActivationStore.open(tmp_path / "store")
    one.initialise_from(store.load())
    assert module.data.stream is not None
    order, n_clipped = module.data.stream.order, 0
    adam = torch.optim.Adam(one.sae.parameters())
    for step in range(N_STEPS):
        numbers = torch.from_numpy(order.rows_of_batch(step, range(order.lanes)))
        result = one(rows[store.load("images")[numbers].long()])
        one.history.update(result.output.codes, BATCH)
        adam.param_groups[0]["lr"] = 1e-2 * min(
            (step + 1) / 5, 1, (N_STEPS - step) / (0.2 * N_STEPS)
        )
        adam.zero_grad()
        result.loss.total.backward()
        gradient, W_dec = one.sae.W_dec.grad, one.sae.W_dec.detach()
        assert gradient is not None
        gradient -= (gradient * W_dec).sum(1, keepdim=True) * W_dec
        norm = sum(p.grad.square().sum() for p in one.sae.parameters()).sqrt()  # type: ignore
        n_clipped += norm > 1
        for parameter in one.sae.parameters():
            parameter.grad /= norm.clamp(min=1)
        adam.step()
        W_dec /= W_dec.norm(dim=1, keepdim=True)
    assert n_clipped
    for name, value in module.by_name["b"].state_dict().items():
        torch.testing.assert_close(value, one.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "what"), [(NanLoss, "loss"), (NanGradient, "gradient")])
def test_one_that_fails_is_as_if_it_were_never_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type[Sae], what: str
):
    with_it = {"good": member(TopKSae, k=3), "bad": member(kind, k=3), "last": member(TopKSae, k=5)}
    module = train(with_it, tmp_path / "with")
    without = train(
        {"good": member(TopKSae, k=3), "last": member(TopKSae, k=5)}, tmp_path / "without"
    )
    for name, one in without.by_name.items():
        assert_same(module.by_name[name], one)
    assert list(module.running) == ["good", "last"]
    assert f"the {what} is not finite at step {FAILS_AT}" in module.failures["bad"]
    assert f"stopped bad: the {what} is not finite" in caplog.text
    assert all(value.isfinite().all() for value in module.by_name["bad"].sae.parameters())


def test_what_failed_stays_stopped_when_a_run_goes_on(tmp_path: Path):
    def members() -> dict[str, SaeMember]:
        return {"bad": member(NanLoss, k=3), **grid()}

    whole = train(members(), tmp_path / "whole")
    with pytest.raises(KilledError):
        train(members(), tmp_path / "killed", KillAt(13))
    resumed = train(members(), tmp_path / "killed")
    assert resumed.failures == whole.failures
    for name, one in whole.by_name.items():
        assert_same(resumed.by_name[name], one)


@pytest.mark.parametrize("names", [[""], ["a", "b"]])
def test_when_all_have_failed_the_step_and_the_images_are_named(tmp_path: Path, names: list[str]):
    members = {name: member(NanGradient, k=3) for name in names}
    with pytest.raises(DataError) as caught:
        train(members, tmp_path)
    message = str(caught.value)
    assert f"the gradient is not finite at step {FAILS_AT}; its 32 rows are finite" in message
    assert message.count("folder/0") == 8
    assert "and 24 more" in message


def test_broken_rows_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The image whose row is damaged on the disk, which none of the rows to start from is."""
    store = store_of(activations(), tmp_path / "store")
    image = int(store.load("images")[150])
    (file,) = store.folder.glob("*.tar")
    row = activations()[image].numpy().tobytes()
    assert file.read_bytes().count(row) == 1
    file.write_bytes(file.read_bytes().replace(row, b"\xff" * len(row)))
    monkeypatch.setattr(sae_module, "INIT_ROWS", 100)
    message = rf"1 of its 32 rows hold nan .*store is damaged.*; rows of folder/{image:04d}$"
    with pytest.raises(DataError, match=message):
        train({"a": member(TopKSae, k=3), "b": member(TopKSae, k=2)}, tmp_path)


def test_names_of_the_curves(tmp_path: Path):
    train({"": member(TopKSae, k=3)}, tmp_path / "one", Throughput(BATCH, 8))
    train({"k=3": member(TopKSae, k=3), "k=2": member(NanLoss, k=2)}, tmp_path / "two")
    one = (tmp_path / "one" / "curves" / "metrics.csv").read_text().splitlines()
    assert {"train/fvu", "train/aux", "train/dead", "rows_per_second"} < set(one[0].split(","))
    two = (tmp_path / "two" / "curves" / "metrics.csv").read_text().splitlines()
    last = dict(zip(two[0].split(","), two[-1].split(","), strict=True))
    assert last["k=2/fvu"] == "nan"
    assert 0 < float(last["k=3/fvu"]) < 1


def test_throughput_counts_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a clock that is a second further at every look."""
    ticks = map(float, range(1000))
    monkeypatch.setattr("clipattr.training.throughput.time.perf_counter", lambda: next(ticks))
    throughput = Throughput(BATCH, 8)
    train({"a": member(TopKSae, k=3), "b": member(TopKSae, k=2)}, tmp_path, throughput)
    assert throughput.rate == N_STEPS * BATCH / (N_STEPS // 8 + 1)


def train_process(folder: Path, rank: int, world_size: int, port: int, *, fails: bool) -> None:
    """One of two processes; the loss fails in the second one alone."""
    os.environ |= {
        **{"TORCHELASTIC_RUN_ID": "grid", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)},
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
    }
    torch.set_num_threads(1)
    members = {"a": member(TopKSae, k=3), "c": member(BatchTopKSae, k=2)}
    members |= {"bad": member(NanLoss, k=3)} if fails else {}
    data = ActivationDataModule(
        lambda _: ActivationStore.open(folder.parent / "store"),
        batch_size=BATCH,
        seed=0,
        n_steps=N_STEPS,
    )
    module = SaeModule(members, n_steps=N_STEPS)
    fit(build_trainer(settings(devices=world_size), folder), module, data, folder)
    torch.save([module.state_dict(), module.failures], folder / f"{rank}.pt")


@pytest.mark.slow
def test_processes_agree_on_what_has_failed(tmp_path: Path):
    store_of(activations(), tmp_path / "store")
    for fails in (True, False):
        processes = Processes(tmp_path / str(fails), 2, train_process, fails=fails)
        assert processes.exit_codes() == [0, 0]
    wanted, _ = torch.load(tmp_path / "False" / "0.pt", weights_only=True)
    for rank in range(2):
        found, failures = torch.load(tmp_path / "True" / f"{rank}.pt", weights_only=True)
        assert f"step {FAILS_AT}" in failures["bad"]
        # The optimiser, which remembers where it was going, leaves it alone: rows would be longer.
        torch.testing.assert_close(found["members.2.sae.W_dec"].norm(dim=1), torch.ones(24))
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name
