"""Latents divided among two processes (gloo): the choice, gradients and training of one process."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed

from clipattr.errors import ConfigError
from clipattr.sae import BatchTopKSae, TopKSae
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.sharded import ShardedTopKSae, find_largest, own_rows
from clipattr.training.sae_member import SaeMember
from tests.observed_run import Processes

WIDTH, N_LATENTS, K, BATCH, N_STEPS = 12, 48, 5, 64, 30
# More of them in the second half than in the first, and more than k_aux in all.
DEAD = [0, 7, *range(30, 44)]
K_AUX = 9
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
NORMALISATIONS = (Normalisation.scale, Normalisation.standardise, Normalisation.layer_norm)
TIES = {"ties": K, "wider than a part": N_LATENTS // 2 + 3, "all": N_LATENTS}


class Rank(NamedTuple):
    """Which process; none for one alone, which has all latents."""

    number: int
    world_size: int


def rows(n_rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(20, WIDTH, generator=generator, dtype=torch.float64)
    chosen = torch.rand(n_rows, 20, generator=generator, dtype=torch.float64)
    return (2 + torch.where(chosen > 0.8, chosen, 0.0) @ atoms).to(dtype)


def member_of(
    rank: Rank | None,
    dtype: torch.dtype = torch.float64,
    normalisation: Normalisation = Normalisation.scale,
    ema: float | None = None,
) -> SaeMember:
    """With latents too weak to be chosen, which are dead after two batches."""
    sae = TopKSae(
        d_model=WIDTH,
        n_latents=N_LATENTS,
        k=K,
        normalisation=normalisation,
        generator=torch.Generator().manual_seed(1),
    ).to(dtype)
    member = SaeMember(
        sae,
        lr=1e-2,
        warmup=3,
        k_aux=K_AUX,
        aux_coefficient=0.5,
        dead_after=2 * BATCH,
        from_data=True,
        ema=ema,
    ).to(dtype)
    member.initialise_from(rows(500, dtype))
    with torch.no_grad():
        sae.W_enc[DEAD] *= 0.02
        # Not equal: a row without spread would make them equals, of which topk takes any.
        sae.b_enc[DEAD] = torch.linspace(0.01, 0.02, len(DEAD), dtype=dtype)
    if rank is not None:
        member.shard(*rank)
    return member


def gradients(rank: Rank | None, normalisation: Normalisation) -> dict[str, Tensor]:
    """Of a step with dead latents; and the loss, the norm and the gradient after clipping."""
    member = member_of(rank, normalisation=normalisation)
    n_own = member.sae.n_latents
    first = n_own * rank.number if rank else 0
    dead = torch.tensor([n - first for n in DEAD if first <= n < first + n_own])
    member.history.rows_since_fired[dead] = 2 * BATCH
    step = member(rows(BATCH))
    step.loss.total.backward()
    found = {"total": step.loss.total.detach(), "auxiliary": step.loss.auxiliary.detach()}
    found |= {f"grad {name}": one.grad.clone() for name, one in member.sae.named_parameters()}
    found["norm"] = member.sae.gradient_norm()
    assert member.clip_gradient(found["norm"].item() / 3)
    found |= {f"clipped {name}": one.grad for name, one in member.sae.named_parameters()}
    return found


def trained(rank: Rank | None, dtype: torch.dtype, ema: float | None = None) -> dict[str, Tensor]:
    """After some steps; of several processes, what the first has gathered."""
    member = member_of(rank, dtype, ema=ema)
    adam = torch.optim.Adam(member.sae.parameters(), lr=member.lr)
    for x in rows(N_STEPS * BATCH, dtype).split(BATCH):
        step = member(x)
        member.take_in(step.output, 1)
        adam.zero_grad()
        step.loss.total.backward()
        member.remove_parallel_gradient()
        assert member.clip_gradient(1.0)
        adam.step()
        member.after_step()
    found = {"history": member.history.rows_since_fired}
    if rank is not None:
        found["b_dec"] = member.sae.b_dec.detach().clone()
        member.gather(torch.device("cpu"))
    else:
        member.sae = member.finish()
    return found | {f"sae {name}": one for name, one in member.sae.state_dict().items()}


def tied(dtype: torch.dtype) -> Tensor:
    """Small whole numbers, so that the k-th is one of many equals in most rows."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-3, 4, (40, N_LATENTS), generator=generator).to(dtype)


def chosen(rank: Rank, k: int, dtype: torch.dtype) -> Tensor:
    """The own latents that are kept, by their number among all."""
    part = ShardedTopKSae(build(k), *rank)
    pre = tied(dtype).chunk(rank.world_size, dim=1)[rank.number]
    indices = find_largest(pre, min(k, pre.shape[1]))
    is_kept = part._keep(pre.gather(1, indices), k)
    return torch.zeros_like(pre, dtype=torch.bool).scatter_(1, indices, is_kept)


def build(k: int) -> TopKSae:
    return TopKSae(d_model=WIDTH, n_latents=N_LATENTS, k=k, generator=torch.Generator())


def damaged(rank: Rank) -> dict[str, Any]:
    """A row of nan in the data; a gradient that is infinite on the second process."""
    member, x = member_of(rank), rows(BATCH)
    x[3, 2] = torch.nan
    total = member(x).loss.total.detach()
    member(rows(BATCH)).loss.total.backward()
    if rank.number == 1:
        member.sae.b_enc.grad[0] = torch.inf
    return {"total": total, "verdict": member.clip_gradient(1.0)}


def run_rank(folder: Path, number: int, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=world_size
    )
    rank = Rank(number, world_size)
    found: dict[str, object] = {f"gradients {n.name}": gradients(rank, n) for n in NORMALISATIONS}
    found |= {f"trained {dtype}": trained(rank, dtype) for dtype in TOLERANCE}
    found["averaged"] = trained(rank, torch.float64, ema=0.9)
    for name, k in TIES.items():
        found[f"chosen {name}"] = chosen(rank, k, torch.float32)
        found[f"chosen {name} bf16"] = chosen(rank, k, torch.bfloat16)
    found["damaged"] = damaged(rank)
    torch.save(found, folder / f"{number}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("ranks")
    assert Processes(folder, 2, run_rank).exit_codes() == [0, 0]
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


def join(name: str, first: Tensor, second: Tensor) -> Tensor:
    """Slices one after the other; what both have is equal to the bit."""
    if name.rpartition(" ")[2] in ("W_enc", "b_enc", "W_dec", "history"):
        return torch.cat([first, second])
    assert torch.equal(first, second), name
    return first


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_gradients_are_those_of_one_process(
    parts: list[dict[str, Any]], normalisation: Normalisation
):
    first, second = (part[f"gradients {normalisation.name}"] for part in parts)
    expected = gradients(None, normalisation)
    assert expected["auxiliary"] > 0
    assert expected["grad W_dec"][DEAD].abs().sum() > 0
    assert first.keys() == expected.keys()
    for name, value in expected.items():
        found = join(name, first[name], second[name])
        torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_training_ends_with_the_weights_of_one_process(
    parts: list[dict[str, Any]], dtype: torch.dtype
):
    first, second = (part[f"trained {dtype}"] for part in parts)
    expected = trained(None, dtype)
    assert torch.equal(first["b_dec"], second["b_dec"])
    assert torch.equal(torch.cat([first["history"], second["history"]]), expected["history"])
    assert (expected["history"] >= 2 * BATCH).any()
    for name, value in expected.items():
        if name != "history":
            torch.testing.assert_close(first[name], value, rtol=0, atol=TOLERANCE[dtype], msg=name)
    # AuxK has moved dead latents, and training the others.
    start = member_of(None, dtype).sae
    assert ((expected["sae W_dec"] - start.W_dec).abs().amax(1) > 1e-3).all()


def test_a_running_mean_of_the_weights_is_gathered(parts: list[dict[str, Any]]):
    expected = trained(None, torch.float64, ema=0.9)
    for name, value in expected.items():
        if name != "history":
            found = parts[0]["averaged"][name]
            torch.testing.assert_close(found, value, rtol=0, atol=1e-10, msg=name)
    difference = expected["sae W_enc"] - trained(None, torch.float64)["sae W_enc"]
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TIES)
def test_of_equals_the_first_are_chosen(parts: list[dict[str, Any]], name: str, dtype: torch.dtype):
    suffix = " bf16" if dtype is torch.bfloat16 else ""
    found = torch.cat([part[f"chosen {name}{suffix}"] for part in parts], dim=1)
    for row, is_chosen in zip(tied(dtype).tolist(), found, strict=True):
        order = sorted(range(N_LATENTS), key=lambda j: (-row[j], j))
        assert is_chosen.nonzero().flatten().tolist() == sorted(order[: TIES[name]])


def test_what_is_not_finite_is_so_for_all(parts: list[dict[str, Any]]):
    for part in parts:
        assert part["damaged"]["total"].isnan()
        assert part["damaged"]["verdict"] is False


@pytest.mark.parametrize("n", [1, 4, 9, 10])
def test_find_largest_on_paper(n: int):
    inf, nan = float("inf"), float("nan")
    values = torch.tensor(
        [
            [1.0, 3, 3, 2, 3, 3, 0, 2, 3, 1],
            [0.0] * 10,
            [-inf, 1, 0, 1, -inf, 1, 1, inf, 1, 1],
            [9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0],
        ]
    )
    for row, found in zip(values.tolist(), find_largest(values, n).tolist(), strict=True):
        assert found == sorted(range(10), key=lambda j: (-row[j], j))[:n]
    values[0, 6] = nan
    assert 6 in find_largest(values, n)[0]


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ConfigError, match="a BatchTopKSae cannot be divided"):
        ShardedTopKSae(BatchTopKSae(d_model=4, n_latents=8, k=2), 0, 2)
    with pytest.raises(ConfigError, match="48 latents cannot be divided among 5"):
        ShardedTopKSae(build(3), 0, 5)
    part = ShardedTopKSae(build(3), 1, 2)
    assert (part.n_latents, part.k, len(part.W_dec)) == (24, 3, 24)
    with pytest.raises(ConfigError, match="latents of one process"):
        part.fold()


def test_a_part_does_not_keep_the_whole_in_memory():
    assert own_rows(torch.zeros(10, 3), 1, 2).untyped_storage().nbytes() == 5 * 3 * 4
