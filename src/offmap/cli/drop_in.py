"""``offmap-wrap``: the target of a link that has a VMM's name. Programs that start the VMM by that name get it wrapped.

Called by its own name it is ``offmap wrap``.
"""

import sys
import tomllib
from pathlib import Path

from offmap.cli.entry import run as offmap
from offmap.errors import ExitStatus, OffmapError

CONFIG = Path("/etc/offmap/wrap.toml")
_OWN_NAME = "offmap-wrap"
_KEYS = {"vmm": str, "options": list}


def words_for(name: str, config: Path = CONFIG) -> list[str]:
    """The words of ``offmap wrap`` up to the VMM's own arguments, for a link of this name.

    Raises:
        OffmapError: the file says nothing of it, or cannot be understood.
    """
    try:
        tables = tomllib.loads(config.read_text())
    except FileNotFoundError:
        tables = {}
    except (OSError, ValueError) as error:
        raise OffmapError(f"{config} cannot be read", "mend it (docs/wrap.md)", why=str(error)) from None
    table = tables.get(name)
    if not isinstance(table, dict) or "vmm" not in table:
        raise OffmapError(f"{config} does not say what {name} is", f'add the table [{name}] with vmm = "/usr/bin/…"')
    for key, value in table.items():
        if not isinstance(value, _KEYS.get(key, ())):
            raise OffmapError(f"{config}: {key} of [{name}] is not understood", "see docs/wrap.md")
    return [*map(str, table.get("options", ())), "--", table["vmm"]]


def main() -> int:
    """Become the VMM that the link's name stands for; returns the exit status if that fails."""
    name = Path(sys.argv[0]).name
    if name == _OWN_NAME:
        return offmap(["wrap", *sys.argv[1:]])
    try:
        words = words_for(name)
    except OffmapError as error:
        sys.stderr.write(f"{_OWN_NAME}: {error}\n")
        return ExitStatus.FAILED
    return offmap(["wrap", *words, *sys.argv[1:]])
