"""Published rates of leaks, so that a number of bytes becomes a time. None of them was measured here."""

from typing import NamedTuple

from offmap.attack.result import Hours

_PAPER = "the paper, as it is quoted; not read again for this list"


class Rate(NamedTuple):
    """A leak's bytes a second, on which processor, by whom, and in which document of theirs."""

    leak: str
    bytes_per_second: float
    source: str


RATES = (
    Rate(
        "Branch Privilege Injection, Rüegge, Wikner and Razavi 2025, Intel Raptor Lake",
        5 * 1024,
        'its artifact, comsec-group/bprc, experiments/exp-end2end/README.md: "over 5KiB/s in the median"',
    ),
    Rate(
        "Retbleed, Wikner and Razavi 2022, AMD Zen 2 (EPYC 7252)",
        round(4096 / 1.970),
        'its artifact, comsec-group/retbleed, retbleed_zen/exploits/README.md: "Leaked 4096 bytes in 1.970 seconds"',
    ),
    Rate("Retbleed, Wikner and Razavi 2022, Intel Coffee Lake", 219.0, _PAPER),
    Rate("Inception, Trujillo, Wikner and Razavi 2023, AMD Zen 4", 39.0, _PAPER),
    Rate("VMScape, Graf, Rüegge, Hajiabadi and Razavi 2026, AMD Zen 4", 32.0, _PAPER),
)


def times_at_rates(size: int) -> tuple[Hours, ...]:
    """How long so many bytes take at each rate."""
    return tuple(
        Hours(
            leak=rate.leak,
            bytes_per_second=rate.bytes_per_second,
            source=rate.source,
            hours=round(size / rate.bytes_per_second / 3600, 4),
        )
        for rate in RATES
    )
