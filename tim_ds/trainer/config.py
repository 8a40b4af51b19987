"""How long, how fast and how safely a run trains. Standard library only.

Batch sizes, accumulation, clipping and precision live here, engine matters (ZeRO stage, buckets, offload) in
`ds_configs/*.json`; a key given in both places is an error.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from tim_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW, as the authors set it."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    """Linear warm-up: step n has n / warmup_steps of the full rate."""
    final_lr_share: float = 0.0
    """cosine: lr at the last step as a share of lr."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "grad_clip", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"train.optimizer.{name}: expected 0 or more, received {getattr(self, name)}"
                )
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(
                "train.optimizer.betas: expected two numbers from 0 up to but not 1, "
                f"received {list(self.betas)}"
            )
        if not 0.0 <= self.final_lr_share <= 1.0:
            raise ConfigError(
                f"train.optimizer.final_lr_share: expected 0 to 1, received {self.final_lr_share}"
            )
        if self.final_lr_share > 0 and self.schedule == "constant":
            raise ConfigError(
                "train.optimizer.final_lr_share: belongs to schedule 'cosine', a constant rate has no end; "
                "remove it, or set the schedule"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep: int = 2
    """Newest complete checkpoints that are kept."""
    milestones: tuple[int, ...] = ()
    """Steps at which a checkpoint is written that is never deleted."""
    strict: bool = False
    """Stop when the newest checkpoint is damaged. Otherwise the run goes on from the one before it, with a
    warning: it repeats the steps between, to the same bits, and the damaged one is kept beside."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"train.checkpoint.{name}: expected at least 1, received {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewConfig:
    """Grids sampled from the EMA weights while training, at fixed prompts and seeds, as `sampler` says."""

    every_steps: int = 0
    """0: no grids."""
    prompts: tuple[str, ...] = ()
    """Captions, or class labels as text."""
    sizes: tuple[str, ...] = ()
    """HEIGHTxWIDTH in pixels, one a prompt."""
    num_steps: tuple[int, ...] = (1, 4, 32)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("every_steps", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.preview.{name}: expected 0 or more, received {getattr(self, name)}")
        if self.every_steps > 0 and not self.num_steps:
            raise ConfigError("train.preview.num_steps: required when train.preview.every_steps is above 0")


AdapterTarget = Literal[
    "attn.qkv",
    "attn.proj",
    "cross_attn.q",
    "cross_attn.kv",
    "cross_attn.proj",
    "mlp.fc1_g",
    "mlp.fc1_x",
    "mlp.fc2",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Low-rank adapters on matrices of every block; the network itself is frozen."""

    rank: int = 16
    alpha: float = 16.0
    """What an adapter adds is multiplied by alpha / rank."""
    targets: tuple[AdapterTarget, ...] = get_args(AdapterTarget)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"train.adapter.rank: expected at least 1, received {self.rank}")
        if self.alpha <= 0:
            raise ConfigError(f"train.adapter.alpha: expected above 0, received {self.alpha:g}")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ConfigError(
                "train.adapter.targets: expected different matrices, at least one, "
                f"received {list(self.targets)}"
            )


WIDEST_SIGMA_REL = math.sqrt(1 / 12)
"""sigma_rel of gamma = 0, where every step weighs the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AverageConfig:
    """One running average of the weights; updated after every applied step n = 1, 2, ..."""

    name: str = "ema"
    decay: float | None = None
    """Exponential: the average keeps this share of itself at every step."""
    warmup: bool = False
    """With `decay`: min(decay, (1 + n) / (10 + n)) at step n, to forget the start sooner."""
    sigma_rel: float | None = None
    """Power function: the weight of step i grows as i^gamma, and the width (standard deviation) of the
    profile is this share of the steps so far, however long the run. 0.05 and 0.10 are usual."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", self.name, re.ASCII):
            raise ConfigError(
                f"name: expected letters, digits, dashes and underscores, received {self.name!r}"
            )
        if (self.decay is None) == (self.sigma_rel is None):
            raise ConfigError(
                "decay: expected one of decay (exponential) and sigma_rel (power function), received "
                f"{'neither' if self.decay is None else 'both'}"
            )
        if self.decay is not None and not 0.0 <= self.decay < 1.0:
            raise ConfigError(f"decay: expected 0 up to but not 1, received {self.decay}")
        if self.sigma_rel is not None and not 0.0 < self.sigma_rel <= WIDEST_SIGMA_REL:
            raise ConfigError(
                f"sigma_rel: expected above 0 up to {WIDEST_SIGMA_REL:.4f} (an even mean of all steps), "
                f"received {self.sigma_rel}"
            )
        if self.warmup and self.decay is None:
            raise ConfigError("warmup: belongs to decay; a power function needs none, remove it")


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotConfig:
    """Copies of the power-function averages through the run, from which `python -m tim_ds.trainer.post_hoc`
    makes the average of any other width."""

    every_steps: int = 0
    """0: no snapshots."""
    keep: int = 64
    """At most so many; of more, the one whose neighbours are nearest in relative time goes. At least 3."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ConfigError(
                f"train.ema.snapshots.every_steps: expected 0 or more, received {self.every_steps}"
            )
        if self.keep < 3:
            raise ConfigError(f"train.ema.snapshots.keep: expected at least 3, received {self.keep}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig:
    """Averages of the weights, float32, sharded like the optimiser: four bytes a parameter each."""

    averages: tuple[AverageConfig, ...] = (AverageConfig(decay=0.9999),)
    use: str | None = None
    """The average that previews, export, evaluation and guided targets use; null where there is only one."""
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)

    def __post_init__(self) -> None:
        names = [average.name for average in self.averages]
        problems = []
        if not names:
            problems.append("train.ema.averages: expected at least one, received an empty list")
        problems += [
            f"train.ema.averages[{i}].name: {name!r} is the name of another average; names have to differ"
            for i, name in enumerate(names)
            if name in names[:i]
        ]
        if self.use is None and len(names) > 1:
            problems.append(f"train.ema.use: required with several averages, one of {', '.join(names)}")
        if self.use is not None and self.use not in names:
            problems.append(f"train.ema.use: expected one of {', '.join(names)}, received {self.use!r}")
        if self.snapshots.every_steps and all(average.sigma_rel is None for average in self.averages):
            problems.append(
                "train.ema.snapshots: needs an average with sigma_rel; two of them (0.05 and 0.10) give the "
                "closest reconstructions"
            )
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def used(self) -> AverageConfig:
        """The average that `use` names."""
        return next(a for a in self.averages if self.use in (None, a.name))


EVALUATIONS = ("nfe", "resolution")


BENCHMARKS = ("geneval", "dpg", "mjhq", "imagenet")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """A published benchmark, or part of one, while training; files and models as for `launch/evaluate.py`."""

    kind: Literal["geneval", "dpg", "mjhq", "imagenet"]
    size: str
    """HEIGHTxWIDTH."""
    limit: int | None = None
    """geneval, dpg, mjhq: prompts, spread over the file; null: all."""
    num: int | None = None
    """geneval, dpg: pictures a prompt; null: 1."""
    count: int | None = None
    """imagenet: pictures, a multiple of the classes; at least 2,049 for the distances."""
    metadata: str | None = None
    """geneval, mjhq: the file of prompts."""
    questions: str | None = None
    """dpg: the file of questions."""
    reference: str | None = None
    """mjhq: folder of the data set's pictures; imagenet: reference batch (npz)."""
    detector: str | None = None
    """geneval: folder or hub id; null: the default of `launch/evaluate.py`, as below."""
    clip: str | None = None
    """geneval, mjhq."""
    vqa: str | None = None
    """dpg."""
    inception: str | None = None
    """mjhq, imagenet: weight file."""
    calibration: str | None = None
    """geneval: calibration.json of a comparison with the published evaluator; null: not calibrated."""
    batch: int = 16
    """Pictures of one call on a rank."""

    def __post_init__(self) -> None:
        for name in ("limit", "num", "count", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"train.evaluation.benchmarks.{name}: expected at least 1, received {value}"
                )
        if self.kind == "imagenet" and self.count is None:
            raise ConfigError("train.evaluation.benchmarks.count: needed by imagenet, such as 10000")

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.size}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Scores of the EMA weights while training, by the code of `launch/evaluate.py`."""

    every_steps: int = 0
    """0: none."""
    kinds: tuple[str, ...] = ("nfe",)
    """`nfe`: seen sizes and a held-back one; `resolution`: every size of a suite. May be empty beside
    benchmarks."""
    num_steps: tuple[int, ...] = (1, 4)
    pictures: int = 200
    """Handwriting: of seen sizes (nfe), of each size (resolution)."""
    held_back: int = 50
    """Handwriting, nfe: pictures of four digits in a row."""
    longest: int = 5
    """Handwriting, resolution: digits of the longest rows and columns."""
    data: str | None = None
    """Handwriting data set that the prompts follow and the reader learns from; null: data.shards."""
    prompts_file: str | None = None
    """resolution of a text-to-image network: captions, one a line, instead of handwriting."""
    sizes: tuple[str, ...] = ()
    """With prompts_file: HEIGHTxWIDTH."""
    scorer: str | None = None
    """With prompts_file: package.module:callable that gives a scorer for a device, or clip=FOLDER."""
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    """Published benchmarks. Pictures are shared over the ranks (ZeRO-3: every rank draws all)."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("every_steps", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"train.evaluation.{name}: expected 0 or more, received {getattr(self, name)}"
                )
        names = [one.name for one in self.benchmarks]
        if len(set(names)) != len(names):
            raise ConfigError(
                f"train.evaluation.benchmarks: expected each kind and size once, received {', '.join(names)}"
            )
        if not (self.kinds or self.benchmarks) or any(kind not in EVALUATIONS for kind in self.kinds):
            raise ConfigError(
                f"train.evaluation.kinds: expected some of {', '.join(EVALUATIONS)}, "
                f"received {list(self.kinds)}"
            )
        if not self.num_steps or min(self.num_steps) < 1:
            raise ConfigError(
                f"train.evaluation.num_steps: expected numbers of at least 1, received {list(self.num_steps)}"
            )
        if self.prompts_file is None and (self.sizes or self.scorer is not None):
            raise ConfigError(
                "train.evaluation.sizes, scorer: belong to prompts_file; remove them or give it"
            )
        if self.prompts_file is not None and (not self.sizes or self.scorer is None):
            raise ConfigError("train.evaluation.prompts_file: needs sizes and a scorer beside it")
        if self.prompts_file is not None and self.kinds != ("resolution",):
            raise ConfigError(
                "train.evaluation.kinds: prompts_file belongs to 'resolution' alone, "
                f"received {list(self.kinds)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    FORMER_KEYS: ClassVar[dict[str, str]] = {
        "ema_decay": "ema: {averages: [{decay: ...}]}",
        "ema_warmup": "ema: {averages: [{decay: ..., warmup: true}]}",
    }

    steps: int
    """Optimiser steps of the run."""
    seed: int = 0
    init_from: str | None = None
    """Weights to start from: an export, a run or checkpoint (averaged), or a file that the authors released.
    Null: fresh ones."""
    adapter: AdapterConfig | None = None
    """Train adapters on frozen weights instead of the weights; needs init_from."""
    precision: Literal["fp32", "bf16_autocast", "bf16"] = "fp32"
    """`bf16_autocast`: float32 parameters under autocast (the authors' numerics); `bf16`: bf16 weights with
    float32 masters."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    activation_checkpointing: bool = False
    log_every: int = 10
    peak_tflops: float | None = None
    """Peak of one device in dense TFLOP/s at this precision, for the model's utilisation; null: known by the
    device's name, and where it is not, no utilisation is given."""
    max_skipped_steps: int = 10
    """Consecutive non-finite steps after which the run ends, with a checkpoint."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}: expected at least 1, received {getattr(self, name)}")
        if self.adapter is not None and self.init_from is None:
            raise ConfigError(
                "train.init_from: required with train.adapter: adapters change weights that are trained"
            )
        if self.adapter is not None and self.ema.snapshots.every_steps:
            raise ConfigError(
                "train.ema.snapshots: a fit of adapters is not made, because their product is not linear in "
                "them; remove the snapshots or train.adapter"
            )
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ConfigError(f"train.peak_tflops: expected null or above 0, received {self.peak_tflops}")
        if self.seed < 0:
            raise ConfigError(f"train.seed: expected 0 or more, received {self.seed}")
        if len(self.preview.prompts) != len(self.preview.sizes):
            raise ConfigError(
                f"train.preview.sizes: expected one size a prompt ({len(self.preview.prompts)}), "
                f"received {len(self.preview.sizes)}"
            )
