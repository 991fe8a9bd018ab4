"""The faithfulness table of one dictionary on the world's test images."""

from pathlib import Path

from jaxtyping import Float, Int
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from clipattr.callbacks import FaithfulnessCallback, GlobalDeletionCallback
from clipattr.config.schema import EvaluateWorld
from clipattr.jobs.world_results import Faithfulness
from clipattr.spliced import Spliced
from clipattr.training.spliced_module import SplicedModule, rows_loader
from clipattr.training.trainer import build_tester


def run_test(
    config: EvaluateWorld,
    spliced: Spliced,
    x: Float[Tensor, "row model"],
    folder: Path,
    callbacks: list[Callback],
) -> None:
    """`Trainer.test` on the rows."""
    trainer = build_tester(config.trainer, folder, callbacks=callbacks)
    loader = rows_loader(x, batch_size=config.data.batch_size)
    trainer.test(SplicedModule(spliced), loader, verbose=False)


def measure_faithfulness(
    config: EvaluateWorld,
    spliced: Spliced,
    x: Float[Tensor, "row model"],
    folder: Path,
    weights: Float[Tensor, "class embed"],
    targets: Int[Tensor, " row"],
) -> Faithfulness:
    """Local orders first: their means over the images of a noun are the global ones."""
    settings = config.evaluation
    local = FaithfulnessCallback(
        spliced,
        weights,
        targets,
        methods=settings.methods,
        n_steps=settings.steps,
        ig_steps=settings.ig_steps,
        overlap_top=settings.overlap_top,
        resamples=settings.resamples,
        seed=config.seed,
        sum_classes=True,
    )
    run_test(config, spliced, x, folder, [local])
    by_class_mean = GlobalDeletionCallback(
        local.reader,
        targets,
        local.rankings,
        resamples=settings.resamples,
        seed=config.seed,
    )
    run_test(config, spliced, x, folder, [by_class_mean])
    return Faithfulness(local, by_class_mean)
