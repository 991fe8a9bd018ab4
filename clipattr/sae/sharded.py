"""A TopK SAE whose latents are divided among processes, for a dictionary too wide for one device.

Process r of w has the rows [r n / w, (r + 1) n / w) of W_enc, b_enc and W_dec, and with them their
gradients, their moments in the optimiser and their history: 1 / w of what one process would hold.
b_dec and the statistics of the normalisation are the same everywhere. All processes see the same
rows, and a step is that of one process:

    own z                        each process for its own latents, nothing is sent
    the k largest of all         the k largest of each process, and which of them stay
    x_hat = sum_r (sum_j a_j v_j) + b_dec      the inner sum over the latents of process r

What travels in a step of `rows` rows, of numbers of b bytes (4 in float32):

    choice      w rows k b          gathered: what each process receives and sorts
    x_hat       rows d b            added up: in a ring each sends 2 (w - 1) / w of it
    AuxK        w rows k_aux b, and rows d b once more, where a latent is dead; its count
    b_dec       d b for each of the two, and 8 bytes for the norm of the gradient

No index is sent. 2,048 rows of d = 768 with k = 64 on eight devices: 4.2 MB and 6.3 MB.
"""

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, distributed
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils import get_total_norm

from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError
from clipattr.sae import kernels
from clipattr.sae.sae import Sae, SaeOutput
from clipattr.sae.topk import TopKSae

# What has a row for each latent, of an SAE and of its history.
SLICED = ("W_enc", "b_enc", "W_dec", "rows_since_fired")


class ShardedTopKSae(TopKSae):
    """The latents of one process; `forward` needs all processes, and gives the x_hat of all.

    Codes, `n_latents` and the history are those of the own latents. Every row has as many slots on
    each process as it could have active latents there; those that lost have value 0.
    """

    def __init__(self, whole: Sae, rank: int, world_size: int) -> None:
        """Copy the part of process `rank` out of an SAE that may be forgotten then."""
        if type(whole) is not TopKSae:
            raise ConfigError(
                f"a {type(whole).__name__} cannot be divided among processes: only a TopKSae can"
            )
        if whole.n_latents % world_size:
            raise ConfigError(
                f"{whole.n_latents} latents cannot be divided among {world_size} processes: every "
                "process takes the same number"
            )
        n_own = whole.n_latents // world_size
        super().__init__(
            d_model=whole.d_model,
            n_latents=n_own,
            k=min(whole.k, n_own),
            normalisation=whole.normalisation,
            # Its own generator: the directions that it draws are overwritten.
            generator=Generator(),
        )
        self.k = whole.k
        self.rank = rank
        self.world_size = world_size
        self.to(whole.W_enc).load_state_dict(
            {
                name: own_rows(value, rank, world_size) if is_sliced(name) else value
                for name, value in whole.state_dict().items()
            }
        )

    @property
    def settings(self) -> dict[str, Any]:
        """None: a part can neither be saved nor folded."""
        raise ConfigError("these are the latents of one process: gather() gives the SAE to save")

    @property
    def centre(self) -> Float[Tensor, " model"]:
        """b_dec, whose gradient as the centre is the sum of what the latents of all processes give.

        As the bias of x_hat every process gets the whole of it.
        """
        return cast(Tensor, _SameEverywhere.apply(self.b_dec))

    def choose(
        self, inputs: Float[Tensor, "row model"], pre: Float[Tensor, "row latent"]
    ) -> SparseCodes:
        """The own latents among the k largest of all; of equals, those of lowest index."""
        indices = find_largest(pre, min(self.k, self.n_latents))
        is_kept = self._keep(pre.gather(1, indices), self.k)
        return SparseCodes(indices, self._activate(inputs, pre, indices) * is_kept, self.n_latents)

    def choose_dead(
        self, output: SaeOutput, is_dead: Bool[Tensor, " latent"], k: int
    ) -> SparseCodes | None:
        """The own latents among the k largest dead ones of all."""
        dead = is_dead.nonzero().squeeze(1)
        most = torch.tensor(len(dead), device=dead.device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        n_slots, n_rows = min(k, int(most)), len(output.pre)
        if n_slots == 0:
            return None
        # A process with fewer dead latents pads, and its padding names all latents in turn: a sum
        # over the rows of one latent must not get them all.
        indices = torch.arange(n_rows * n_slots, device=dead.device) % self.n_latents
        indices = indices.view(n_rows, n_slots)
        values = torch.full_like(indices, -torch.inf, dtype=output.pre.dtype)
        n_own = min(n_slots, len(dead))
        if n_own:
            indices[:, :n_own] = dead[find_largest(output.pre[:, dead], n_own)]
            values[:, :n_own] = output.pre.gather(1, indices[:, :n_own])
        is_kept = self._keep(values, k)
        is_kept[:, n_own:] = False
        activations = self._activate(output.inputs, output.pre, indices)
        return SparseCodes(indices, activations * is_kept * output.unit, self.n_latents)

    def _keep(self, values: Float[Tensor, "row slot"], k: int) -> Bool[Tensor, "row slot"]:
        """Which of the own values are among the k largest of all processes.

        A stable sort leaves equals in the order of the processes and, as each has sent its own by
        `find_largest`, of the latents: every process finds the same, and exactly k.
        """
        every = [torch.empty_like(values) for _ in range(self.world_size)]
        distributed.all_gather(every, values)
        gathered = torch.cat(every, dim=1)
        winners = gathered.sort(dim=1, descending=True, stable=True).indices[:, :k]
        is_kept = torch.zeros_like(gathered, dtype=torch.bool).scatter_(1, winners, True)
        return is_kept.chunk(self.world_size, dim=1)[self.rank].clone()

    def combine(self, codes: SparseCodes) -> Float[Tensor, "*rows out"]:
        """Sum of a_j v_j over the latents of all processes, without b_dec."""
        return self.in_raw_units(cast(Tensor, _Sum.apply(codes.decode(self.W_dec))))

    def gradient_norm(self) -> Float[Tensor, ""]:
        """Of the parameters of all processes, of which b_dec is one."""
        own, shared = (
            get_total_norm([one.grad for one in parameters if one.grad is not None])
            for parameters in ((self.W_enc, self.b_enc, self.W_dec), (self.b_dec,))
        )
        square = own.double().square()  # of a large gradient infinite in float32
        distributed.all_reduce(square)
        return (square + shared.double().square()).sqrt().to(own)

    def gather(self) -> TopKSae | None:
        """The SAE of all processes, on the CPU of the first one; None on the others."""
        state = {
            name: gather_rows(value) if is_sliced(name) else value.cpu()
            for name, value in self.state_dict().items()
        }
        if self.rank:
            return None
        whole = TopKSae(
            d_model=self.d_model,
            n_latents=self.n_latents * self.world_size,
            k=self.k,
            normalisation=self.normalisation,
            generator=Generator(),
        )
        whole.to(self.W_enc.dtype).train(self.training).load_state_dict(state)
        return whole


def find_largest(values: Float[Tensor, "row latent"], n: int) -> Int[Tensor, "row {n}"]:
    """The n largest of each row, largest first, and of equals those of lowest index.

    torch's own top-k takes any of equals. Only where the n-th and the one behind it are equal does
    that matter to the set, so that rows of another kind cost nothing more.
    """
    indices = kernels.top_k(values, min(n + 1, values.shape[1]))
    if values.shape[1] > n:
        largest = values.gather(1, indices)
        indices = indices[:, :n].clone()
        is_tied = largest[:, n - 1] == largest[:, n]
        if is_tied.any():
            indices[is_tied] = _first_of_equals(values[is_tied], largest[is_tied, n - 1, None], n)
    indices = indices.sort(dim=1).values
    order = values.gather(1, indices).sort(dim=1, descending=True, stable=True).indices
    return indices.gather(1, order)


def _first_of_equals(values: Tensor, smallest: Tensor, n: int) -> Tensor:
    """All above the smallest that is chosen, and as many of its equals as there is room for."""
    is_above = ~(values <= smallest)  # nan is, as in topk: it must reach the loss
    is_equal = values == smallest
    room = n - is_above.sum(1, keepdim=True)
    is_chosen = is_above | (is_equal & (is_equal.cumsum(1) <= room))
    return is_chosen.nonzero()[:, 1].view(len(values), n)


def is_sliced(name: str) -> bool:
    """Whether what has this name in a state has a row for each latent."""
    return name.rpartition(".")[2] in SLICED


def own_rows(
    whole: Float[Tensor, "latent *rest"] | Int[Tensor, "latent *rest"], rank: int, world_size: int
) -> Tensor:
    """A copy of the rows of one process: a view would keep the whole alive, and be saved so."""
    return whole.chunk(world_size)[rank].clone()


def gather_rows(
    own: Float[Tensor, "latent *rest"] | Int[Tensor, "latent *rest"],
) -> Tensor | None:
    """The rows of all processes, on the CPU of the first one; None on the others.

    Its device holds the part of one other process at a time, and never the whole.
    """
    own = own.detach().contiguous()
    if distributed.get_rank():
        distributed.send(own, 0)
        return None
    n_processes = distributed.get_world_size()
    whole = torch.empty(n_processes * len(own), *own.shape[1:], dtype=own.dtype)
    received = torch.empty_like(own)
    for process, rows in enumerate(whole.chunk(n_processes)):
        if process:
            distributed.recv(received, process)
        rows.copy_(received if process else own)
    return whole


class _Sum(Function):
    """The sum over processes; all have the same gradient of it, which is that of each summand."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> Tensor:
        return gradients[0]


class _SameEverywhere(Function):
    """A number that all processes have; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, shared: Tensor) -> Tensor:
        return shared.view_as(shared)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  of a decorator
        ctx: Any, *gradients: Tensor
    ) -> Tensor:
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total
