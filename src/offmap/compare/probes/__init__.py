"""The questions to one cell of the comparison: one module for each kind of question."""
