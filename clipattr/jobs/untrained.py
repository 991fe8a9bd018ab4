"""The control of faithfulness: a dictionary that was never trained, in the place of the SAE."""

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.sae.topk import TopKSae
from clipattr.spliced import Spliced


def build_untrained(
    spliced: Spliced, x: Float[Tensor, "row model"], *, k: int, seed: int
) -> Spliced:
    """Random directions around the mean of the data: what attribution says of any dictionary."""
    trained = spliced.sae
    sae = TopKSae(
        d_model=trained.d_model,
        n_latents=trained.n_latents,
        k=k,
        generator=torch.Generator().manual_seed(seed),
    )
    sae.initialise_from(x.cpu())
    return Spliced(spliced.cut, sae.requires_grad_(False).to(trained.b_enc.device))
