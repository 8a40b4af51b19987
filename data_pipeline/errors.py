"""The error of everything that is wrong with data: files, samples, plans, captions."""


class DataError(ValueError):
    """A shard, an index, a sample or a request for data is wrong; the message names it and what to do."""
