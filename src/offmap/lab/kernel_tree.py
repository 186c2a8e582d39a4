"""An unpacked or built kernel in the cache, with a manifest of its files' digests.

The cache is checked at each use, never trusted: what the lab boots or loads must match the manifest.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from offmap.lab.cache import sha256_of

MANIFEST = "manifest.json"  # {"sha256": {relative path: digest}}


def used_files(tree: Path, release: str) -> list[Path]:
    """List the files that matter: the image, its configuration, the module index and every module."""
    modules = tree / "lib/modules" / release
    return [*sorted((tree / "boot").iterdir()), *sorted(modules.glob("modules.*")), *sorted(modules.rglob("*.ko*"))]


def write_manifest(tree: Path, files: Iterable[Path]) -> None:
    """Record the digests of ``files`` below ``tree``."""
    digests = {str(path.relative_to(tree)): sha256_of(path) for path in files}
    (tree / MANIFEST).write_text(json.dumps({"sha256": digests}))


def damaged(tree: Path) -> str:
    """Say what is wrong with an unpacked tree, or return an empty string."""
    try:
        digests = json.loads((tree / MANIFEST).read_text())["sha256"]
        if not digests:
            return "empty manifest"
        for name, digest in digests.items():
            if sha256_of(tree / name) != digest:
                return f"{name} was changed"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable: {error}"
    return ""
