"""One training step of each library's TopK SAE, for `sae.py`; imported in a process of its own."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

DECAY = 5  # the learning rate falls over the last 1 / DECAY of the steps, where it is asked to


class Task(NamedTuple):
    """What all are given."""

    d_model: int
    n_latents: int
    k: int
    batch: int
    steps: int
    lr: float | None  # None: the library's own
    warmup: int
    is_tuned: bool
    n_dead: int  # latents that count as dead in every step, so that AuxK has work
    seed: int
    device: str = "cpu"
    is_half: bool = False  # ours alone: others are put under autocast as a whole, or do it


class Rival(NamedTuple):
    """A library at work."""

    step: Callable[[int, Tensor], object]
    recon: Callable[[Tensor], Tensor]
    dictionary: Callable[[], Tensor]  # [latent, model]


def clipattr(task: Task, *, over_batch: bool = False) -> Rival:
    """Ours, from the rows to the renormalised decoder."""
    from clipattr.sae.topk import BatchTopKSae, TopKSae
    from clipattr.training.sae_member import SaeMember

    generator = torch.Generator().manual_seed(task.seed)
    kind = BatchTopKSae if over_batch else TopKSae
    sae = kind(d_model=task.d_model, n_latents=task.n_latents, k=task.k, generator=generator)
    sae.to(task.device)
    member = SaeMember(
        sae,
        lr=task.lr or 1e-3,
        warmup=task.warmup,
        k_aux=task.d_model // 2,
        aux_coefficient=1 / 32,
        dead_after=10_000_000,
    ).to(task.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=member.lr, fused=True)
    schedule = scheduled(optimizer, task)

    def step(i: int, x: Tensor) -> None:
        if i == 0:
            member.initialise_from(x)
        member.history.rows_since_fired[: task.n_dead] = member.dead_after
        with torch.autocast(task.device, torch.bfloat16, enabled=task.is_half):
            output, loss, _ = member(x)
        member.take_in(output, 1)
        loss.total.backward()
        member.remove_parallel_gradient()
        assert member.clip_gradient(1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        member.after_step()

    return Rival(step, lambda x: sae(x).recon, lambda: sae.W_dec)


def clipattr_batch(task: Task) -> Rival:
    """BatchTopK; it is left in training, where it chooses in the batch."""
    return clipattr(task, over_batch=True)


def sparsify(task: Task, *, signum: bool = True) -> Rival:
    """Its Trainer wants a language model: this is the body of its hook."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    config = SparseCoderConfig(num_latents=task.n_latents, k=task.k)
    sae = SparseCoder(task.d_model, config, device=task.device, dtype=torch.float32)
    lr = task.lr or (5e-3 if signum else 2e-4) / (task.n_latents / 2**14) ** 0.5
    if signum:
        optimizer: Any = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=lr), momentum=0.95)
        optimizer.train()
        schedule = None
    else:
        optimizer = torch.optim.Adam(sae.parameters(), lr=lr, fused=task.is_tuned or None)
        schedule = scheduled(optimizer, task)
    is_dead = torch.arange(task.n_latents, device=task.device) < task.n_dead

    def step(i: int, x: Tensor) -> None:
        if i == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        output = sae(x, dead_mask=is_dead)
        (output.fvu + output.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()

    def recon(x: Tensor) -> Tensor:
        if signum:
            optimizer.eval()  # the averaged weights
        return sae(x).sae_out

    return Rival(step, recon, lambda: sae.W_dec)


def sparsify_adam(task: Task) -> Rival:
    """With the optimiser that the others have."""
    return sparsify(task, signum=False)


def dictionary_learning(task: Task, *, over_batch: bool = False) -> Rival:
    """The whole of TopKTrainer.update."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    kind: Any = BatchTopKTrainer if over_batch else TopKTrainer
    trainer = kind(
        steps=task.steps,
        activation_dim=task.d_model,
        dict_size=task.n_latents,
        k=task.k,
        layer=0,
        lm_name="none",
        lr=task.lr,
        warmup_steps=task.warmup,
        decay_start=task.steps - task.steps // DECAY,
        seed=task.seed,
        device=task.device,
    )
    fuse(trainer.optimizer, task)

    def step(i: int, x: Tensor) -> None:
        trainer.num_tokens_since_fired[: task.n_dead] = trainer.dead_feature_threshold
        trainer.update(i, x)

    def recon(x: Tensor) -> Tensor:
        return trainer.ae.decode(trainer.ae.encode(x, use_threshold=False))

    return Rival(step, recon, lambda: trainer.ae.decoder.weight.T)


def dictionary_learning_batch(task: Task) -> Rival:
    """BatchTopK, choosing in the batch."""
    return dictionary_learning(task, over_batch=True)


def sae_lens(task: Task, **options: Any) -> Rival:
    """SAETrainer.step."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    lr = task.lr or 3e-4
    sizes = {"d_in": task.d_model, "d_sae": task.n_latents, "k": task.k}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, device=task.device, **options))
    config = SAETrainerConfig(
        total_training_samples=task.steps * task.batch,
        train_batch_size_samples=task.batch,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=task.warmup,
        lr_decay_steps=task.steps // DECAY,
        device=task.device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer: Any = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))
    fuse(trainer.optimizer, task)

    def step(i: int, x: Tensor) -> None:
        window = trainer.cfg.dead_feature_window
        trainer.n_forward_passes_since_fired[: task.n_dead] = window + 1
        trainer.step(x)
        trainer.n_training_steps += 1

    return Rival(step, lambda x: sae.decode(sae.encode(x)), lambda: sae.W_dec)


def sae_lens_sparse(task: Task) -> Rival:
    """Its option for sparse codes, which excludes its rescaling."""
    return sae_lens(task, use_sparse_activations=True, rescale_acts_by_decoder_norm=False)


def overcomplete(task: Task) -> Rival:
    """train_sae over one batch, without its monitoring."""
    import matplotlib
    import matplotlib.cm

    # It asks for a function that newer matplotlibs do not have.
    with suppress(AttributeError):
        matplotlib.cm.get_cmap = matplotlib.colormaps.get_cmap
    from overcomplete.sae import TopKSAE, train_sae

    sae = TopKSAE(task.d_model, nb_concepts=task.n_latents, top_k=task.k, device=task.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=task.lr or 5e-4, fused=task.is_tuned or None)
    schedule = scheduled(optimizer, task)

    def error(x: Tensor, recon: Tensor, *_: Tensor) -> Tensor:
        return (x - recon).square().mean()

    def step(i: int, x: Tensor) -> None:
        train_sae(sae, [x], error, optimizer, schedule, nb_epochs=1, monitoring=0)

    return Rival(step, lambda x: sae(x)[2], sae.get_dictionary)


def scheduled(optimizer: torch.optim.Optimizer, task: Task) -> Any:
    """Linear up, constant, linear down over the last steps."""
    from clipattr.training.optim import warmup_hold_decay

    factor = warmup_hold_decay(task.warmup, task.steps, 1 / DECAY)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def fuse(optimizer: torch.optim.Optimizer, task: Task) -> None:
    """Adam in one kernel, where a library does not let one ask for it."""
    for group in optimizer.param_groups:
        group["fused"] = task.is_tuned or None


RIVALS: dict[str, Callable[[Task], Rival]] = {
    "clipattr": clipattr,
    "sparsify, signum": sparsify,
    "sparsify, Adam": sparsify_adam,
    "SAELens, sparse": sae_lens_sparse,
    "SAELens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "overcomplete": overcomplete,
    "clipattr, BatchTopK": clipattr_batch,
    "dictionary_learning, BatchTopK": dictionary_learning_batch,
}
ONLY_QUALITY = {"clipattr, BatchTopK", "dictionary_learning, BatchTopK"}
LACKS = {
    "clipattr": "nothing",
    "sparsify, signum": "clipping; AuxK gives its encoder no gradient; half of Adam's moments",
    "sparsify, Adam": "clipping; AuxK gives its encoder no gradient",
    "SAELens, sparse": "projection and normalised decoder",
    "SAELens": "projection and normalised decoder (it rescales activations instead)",
    "dictionary_learning": "nothing",
    "overcomplete": "AuxK, projection and decoder bias",
    "clipattr, BatchTopK": "nothing",
    "dictionary_learning, BatchTopK": "nothing",
}
