"""Kernel events that say what maps memory between two walks of the page tables (docs/trace.md)."""
