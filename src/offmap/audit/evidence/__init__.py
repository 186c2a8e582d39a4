"""Evidence: a verdict that can be checked on another machine (docs/evidence.md)."""
