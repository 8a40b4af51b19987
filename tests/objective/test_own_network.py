"""A network that is not TiM: the program of the README, and what goes wrong with one is said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.objective.networks import CarryingNetwork, SmoothNetwork, images_at
from tim_ds.errors import ConfigError
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.loss import transition_loss
from tim_ds.objective.transport import OTFM
from tim_ds.packed import ClassCondition, Condition, Network, NetworkOutput, Segments
from tim_ds.sampler.config import SamplerConfig
from tim_ds.sampler.transition import sample

README = Path(__file__).parents[2] / "tim_ds" / "objective" / "README.md"


def program(training_steps: int) -> str:
    section = README.read_text().split("## A network of your own", 1)[1]
    block = re.search(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block is not None
    shown, changed = block[1], block[1].replace("range(1500)", f"range({training_steps})")
    assert (shown == changed) == (training_steps == 1500)
    return changed


def distances(printed: str) -> list[float]:
    return [
        float(value) for value in re.findall(r"^\d+ steps: Frechet distance (\S+)$", printed, re.MULTILINE)
    ]


def test_the_program_of_the_readme_trains_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    found: dict[str, object] = {}
    exec(compile(program(100), str(README), "exec"), found)
    after = distances(capsys.readouterr().out)
    assert len(after) == 5
    # Drawing the mean of the digits, whatever the noise, would be at the variance of the data.
    images = found["images"]
    assert isinstance(images, Tensor)
    variance = images.flatten(1).var(0).sum().item()
    # 2.0 to 3.6 over three seeds, of a variance of 18.8.
    assert max(after) < 0.35 * variance


@pytest.mark.slow
def test_the_program_of_the_readme_reaches_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    exec(compile(program(1500), str(README), "exec"), {})
    received = distances(capsys.readouterr().out)
    section = README.read_text().split("## A network of your own", 1)[1].split("\n## ", 1)[0]
    row = re.search(r"^\| this loop \| (.*) \|$", section, re.MULTILINE)
    assert row is not None
    written = [float(cell) for cell in row[1].split("|")]
    # Another build of torch sums in another order, and 1,500 steps follow another path.
    assert received == pytest.approx(written, abs=0.3)


IMAGES = images_at(OTFM(), [0.8, 0.5, 0.9], [0.2, 0.5, 0.0], [(2, 2), (1, 3), (2, 1)], channels=2)


def loss_of(network: Network, config: ObjectiveConfig, condition: Condition = IMAGES.condition) -> Tensor:
    given = (IMAGES.x_TC, IMAGES.z_TC, IMAGES.times, IMAGES.segments, condition)
    return transition_loss(network, OTFM(), config, *given, latent_channels=2).denoising_S


def test_paired_with_a_network_that_carries_nothing_names_what_works() -> None:
    with pytest.raises(ConfigError, match=r"SmoothNetwork takes none.*'jvp'.*'dde'"):
        loss_of(SmoothNetwork(2), ObjectiveConfig())


def test_a_type_error_inside_a_network_that_carries_is_its_own() -> None:
    def broken(*_: object, **__: object) -> NetworkOutput:
        raise TypeError("of the network itself")

    with pytest.raises(TypeError, match="of the network itself"):
        loss_of(CarryingNetwork(broken), ObjectiveConfig())


@dataclass(frozen=True, eq=False)
class Sized:
    """A class and a size: a condition that the project does not know."""

    labels_S: Tensor
    sizes_S: Tensor

    @property
    def num_segments(self) -> int:
        return len(self.labels_S)

    def select(self, indices: Sequence[int]) -> Sized:
        return Sized(self.labels_S[list(indices)], self.sizes_S[list(indices)])

    def repeat(self, times: int) -> Sized:
        return Sized(self.labels_S.repeat_interleave(times), self.sizes_S.repeat_interleave(times))

    def join(self, others: Sequence[Sized]) -> Sized:
        parts = [self, *others]
        return Sized(torch.cat([p.labels_S for p in parts]), torch.cat([p.sizes_S for p in parts]))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Sized:
        return Sized(self.labels_S.to(device), self.sizes_S.to(device))


def of_size(network: SmoothNetwork) -> Network:
    """Its F times the size of the image."""

    def scaled(
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        assert isinstance(condition, Sized)
        output = network(x_TC, t_S, r_S, segments, ClassCondition(condition.labels_S))
        return NetworkOutput(output.F_TC * segments.expand(condition.sizes_S)[:, None], None)

    return scaled


@pytest.mark.parametrize("derivative", ["dde", "jvp"])
def test_a_condition_of_another_kind_passes_through_the_objective(
    derivative: Literal["dde", "jvp"],
) -> None:
    """F times 2 for every image is a network whose output layer is twice as large."""
    config, labels = ObjectiveConfig(derivative=derivative), torch.tensor([0, 3, 1])
    received = loss_of(of_size(SmoothNetwork(2)), config, Sized(labels, torch.full((3,), 2.0).double()))
    twice = SmoothNetwork(2)
    twice.outward.data *= 2
    # The same sums, scaled before or after: float64 rounding, over a difference of 0.01 for dde.
    assert torch.allclose(received, loss_of(twice, config, ClassCondition(labels)), rtol=1e-11)


def test_a_condition_of_another_kind_is_guided() -> None:
    torch.manual_seed(0)
    segments, labels = Segments.from_grids([(2, 2), (1, 3)]), torch.tensor([0, 3])
    z_TC = torch.randn(7, 2, dtype=torch.float64)
    ones, null = torch.ones(2).double(), torch.tensor([4, 4])
    config = SamplerConfig(num_steps=3, cfg_scale=2.0)
    received = sample(
        of_size(SmoothNetwork(2)), OTFM(), z_TC, segments, Sized(labels, ones), config,
        null_condition=Sized(null, ones),
    )  # fmt: skip
    expected = sample(
        SmoothNetwork(2), OTFM(), z_TC, segments, ClassCondition(labels), config,
        null_condition=ClassCondition(null),
    )  # fmt: skip
    assert torch.equal(received.x_TC, expected.x_TC)
