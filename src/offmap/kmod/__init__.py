"""The offmap kernel module: finding its sources, building it, loading it."""
