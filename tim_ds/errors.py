"""Errors that a user can act on. Each message says what, where, expected, received, and what to do."""


class TimError(Exception):
    """Base of every error raised on purpose by tim_ds."""


class ConfigError(TimError, ValueError):
    """A recipe, an engine file or an override is wrong; the message starts with the dotted key."""


class ShapeError(TimError, ValueError):
    """Tensors, grids or sizes do not fit together."""


class TimeDomainError(TimError, ValueError):
    """A pair (t, r) lies outside the domain of its transport, or r > t."""


class NonFiniteError(TimError, ArithmeticError):
    """A loss, gradient, derivative or sample is NaN or infinite; the message names the samples."""


class CheckpointError(TimError, RuntimeError):
    """A checkpoint or weight file is incomplete, of another model, or cannot be written."""


class RequestError(TimError, ValueError):
    """A sampling or evaluation request that cannot be served: size, step count, prompts."""
