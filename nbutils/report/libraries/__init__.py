"""What known libraries do when they accumulate gradients, found by running them.

`python -m nbutils libraries` runs them; they come with the extra `peers`. Files: `task` is what a
library is given, `hugging_face` and `others` hold one short training per library, `measure` says
what became of each image, `table` keeps the record in `notebooks/reference/libraries/`. A trainer
is made once and kept for both epochs: one made anew for each epoch cannot carry anything over.
"""

from nbutils.report.libraries.table import libraries_notes, libraries_table, observe_all

__all__ = ["libraries_notes", "libraries_table", "observe_all"]
