"""tim_ds: training and sampling Transition Models (TiM) at any resolution, in any number of steps."""

__version__ = "0.1.0"
