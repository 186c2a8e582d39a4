"""Published rates of leaks, so that a number of bytes becomes a time. None of them was measured here."""

from offmap.attack.result import Hours

# As their authors published them.
RATES: tuple[tuple[str, float], ...] = (
    ("Branch Privilege Injection, Rüegge, Wikner and Razavi 2025, Intel Raptor Lake", 5.6 * 1024),
    ("Retbleed, Wikner and Razavi 2022, AMD Zen 2", 3900.0),
    ("Retbleed, Wikner and Razavi 2022, Intel Coffee Lake", 219.0),
    ("Inception, Trujillo, Wikner and Razavi 2023, AMD Zen 4", 39.0),
    ("VMScape, Wikner, Trujillo and Razavi 2025, AMD Zen 4", 32.0),
)


def times_at_rates(size: int) -> tuple[Hours, ...]:
    """How long so many bytes take at each rate."""
    return tuple(Hours(leak=leak, bytes_per_second=rate, hours=round(size / rate / 3600, 4)) for leak, rate in RATES)
