"""The one module that DeepSpeed wraps: a pack goes in, its loss comes out.

Main forward, derivative forward, teacher and loss all happen inside one call of one root module. Under
ZeRO-3 the order of module calls is then the same on every rank and step, so that parameters are fetched
along a recorded trace; three calls of the network from outside would make every forward a trace of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tim_ds.model.ops import transition_loss_terms
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.loss import LossTerms, transition_loss
from tim_ds.objective.transport import build_transport
from tim_ds.trainer.inputs import StepInputs


class StepOutput(NamedTuple):
    loss: Tensor
    """Scalar to call backward on."""
    terms: LossTerms
    """Per image, detached."""


class TransitionStep(nn.Module):
    """One micro-step of training.

    Args:
        network: what is trained.
        objective: what is optimised.
        latent_channels: channels of one latent cell.
        world_size: ranks whose gradients are averaged.
        teacher: frozen network of the guided target, refreshed from the EMA weights.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: ObjectiveConfig,
        *,
        latent_channels: int,
        world_size: int,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.objective = objective
        self.transport = build_transport(objective.transport)
        self.latent_channels = latent_channels
        self.world_size = world_size

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Loss of this micro-step, scaled so that every image of the step counts once.

        The step's loss is the mean over all its images, which are spread unevenly over ranks and micro-steps.
        Gradients are averaged over ranks and summed over micro-steps, hence the factor world size / images
        of the step. A loss that is not finite poisons its own gradient, so that no rank can take the step:
        it is refused by the gradient norm, which all ranks share, without a host waiting for the loss.
        """
        terms = transition_loss(
            self.network,
            self.transport,
            self.objective,
            inputs.x_TC,
            inputs.z_TC,
            inputs.times,
            inputs.segments,
            inputs.condition,
            latent_channels=self.latent_channels,
            teacher=self.teacher,
            null_condition=inputs.null_condition,
            features_TZ=inputs.features_TZ,
            terms_of_images=transition_loss_terms,
        )
        loss = terms.total_S.sum() * (self.world_size / inputs.images_in_step)
        detached = loss.detach()
        loss = loss * torch.where(detached.isfinite(), 1.0, torch.nan)
        return StepOutput(loss, terms._replace(total_S=terms.total_S.detach()))
