"""What known libraries do when they accumulate gradients, found by running them.

A trainer is made once for both epochs: one made anew each epoch cannot carry anything over.
"""

from nbutils.report.libraries.table import libraries_notes, libraries_table, observe_all

__all__ = ["libraries_notes", "libraries_table", "observe_all"]
