"""The optional libraries of evidence. They are imported when they are used, so that nothing else starts slower."""

from offmap.errors import OffmapError


def require_libraries() -> None:
    """Fail early, and in one line, where they are not installed. Raises OffmapError: they are not."""
    try:
        import cryptography  # noqa: F401
        import securesystemslib  # noqa: F401
    except ImportError as error:
        raise OffmapError(
            "evidence cannot be made or checked here", "pip install 'offmap[evidence]'", why=str(error)
        ) from None
