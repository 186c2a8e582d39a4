"""Print the kind of RAM that a guest on this host should have, for use in a script:

    offmap run --memory "$(sudo python examples/best_backend.py)" …

The order of preference is that of docs/which-way.md. Only what the audit saw hidden counts.
"""

import sys

import offmap

PREFERENCE = ("unplugged", "reserved", "guest_memfd-unmapped", "secretmem-bridge", "secretmem")


def main() -> int:
    """Print its name; say why not of those that would have been preferred."""
    found = {backend.backend: backend for backend in offmap.list_backends()}
    for name in PREFERENCE:
        backend = found[name]
        if backend.health in {offmap.Health.HIDING, offmap.Health.MOSTLY}:
            print(name)
            return 0
        print(f"not {name}: {backend.reason}; {backend.remedy}", file=sys.stderr)
    print("nothing hides on this host", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
