"""Say what a run would do, and everything that is wrong, before anything is run.

Labels, filters of rare perturbations, splits and prior sources are those of the run: the same functions
read them. Of the data, tables and shapes are read and no value of a matrix.
"""

from biojepa.check.report import check_config
from biojepa.check.text import as_text

__all__ = ["as_text", "check_config"]
