"""The latents that each class relies on most, as a table."""

import csv
import io
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def reliance_table(
    names: Sequence[str],
    mean_attribution: Float[Tensor, "class latent"],
    share_of_images: Float[Tensor, " latent"],
    top: int,
) -> str:
    """CSV, `top` lines per class: the largest mean attributions, negative ones among them."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["class", "rank", "latent", "mean_attribution", "share_of_images"])
    n_listed = min(top, mean_attribution.shape[1])
    for name, row in zip(names, mean_attribution, strict=True):
        for rank, latent in enumerate(row.abs().topk(n_listed).indices.tolist(), start=1):
            share = float(share_of_images[latent])
            writer.writerow([name, rank, latent, f"{float(row[latent]):.6g}", f"{share:.6g}"])
    return file.getvalue()
