"""Structure-aware fuzzers of everything in the VMM that reads what a guest wrote: python -m tests.fuzz."""
