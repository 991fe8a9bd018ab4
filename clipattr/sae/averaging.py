"""The running mean of an SAE's weights, which is less noisy than the last ones."""

import copy

import torch
from torch import Tensor, nn

from clipattr.sae.constraints import normalise_decoder_
from clipattr.sae.sae import Sae


class AveragedSae(nn.Module):
    """mean <- mean + max(1 - decay, 1 / n) (weights - mean) after step n.

    At first the plain mean of all steps, so that where training started has no part in it, and an
    exponential one from step 1 / (1 - decay) on. No gradient; a buffer counts the steps.
    """

    n_steps: Tensor

    def __init__(self, sae: Sae, decay: float) -> None:
        """Nothing has been averaged yet."""
        super().__init__()
        self.mean = copy.deepcopy(sae).requires_grad_(False)
        self.decay = decay
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, sae: Sae) -> None:
        """Take in the weights as they are after a step."""
        self.n_steps.add_(1)
        share = (1 / self.n_steps.double()).clamp_min(1 - self.decay)
        for mean, weights in zip(self.mean.parameters(), sae.parameters(), strict=True):
            mean.lerp_(weights, share.to(mean))

    @torch.no_grad()
    def finish(self, sae: Sae) -> Sae:
        """The mean, with unit directions and with the statistics of the SAE as it is."""
        for mine, theirs in zip(self.mean.buffers(), sae.buffers(), strict=True):
            mine.copy_(theirs)
        normalise_decoder_(self.mean.W_dec)
        return self.mean.requires_grad_()  # as what was trained
