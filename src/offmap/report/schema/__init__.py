"""The published form of results: a JSON Schema that is shipped with the package."""

from importlib.resources import files

__all__ = ["schema_text"]


def schema_text() -> str:
    """The JSON Schema (draft 2020-12) of whatever ``offmap audit --json`` prints; ends with a newline."""
    return files(__name__).joinpath("offmap-audit.json").read_text(encoding="utf-8")
