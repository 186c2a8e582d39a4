"""What evidence does not show, so that it must be trusted: always the same lines for the same evidence."""

from collections.abc import Iterator

from offmap.audit.evidence.quote import Quoted
from offmap.audit.evidence.statement import Ima, Predicate

_AUDITOR = (
    "the verdict is the auditor's word, and the auditor saw what its kernel showed: root of the host, or a kernel that "
    "lies, can have let it state anything"
)
_IMA = {
    Ima.ABSENT: "this kernel has no IMA: nothing measured which programs and modules ran after the boot, not even the "
    "auditor, so that they are the host's word",
    Ima.BOOT_ONLY: "there is no IMA policy: nothing measured which programs and modules ran after the boot, not even "
    "the auditor, so that they are the host's word",
    Ima.UNKNOWN: "whether IMA measures programs and modules is not told, so that they are the host's word",
    Ima.MEASURES: "IMA has measured {count} files; the list of them is not in here, so that register 10 must be "
    "compared by whoever has it",
}


def to_trust(found: Predicate, quoted: Quoted | None, fresh: bool, compared: bool) -> Iterator[tuple[str, str]]:
    """Yield what must be trusted: the subject and a sentence.

    Args:
        fresh: a nonce was expected, and it was there.
        compared: with a policy or a baseline.
    """
    yield "auditor", _AUDITOR
    yield "keys", "whoever has a private key can sign anything: that nobody else had it"
    host = found.host
    if quoted is None:
        yield (
            "boot",
            "no TPM vouches for the kernel, its command line, its boot and its modules: they are the host's word",
        )
    else:
        yield (
            "TPM's key",
            "that it is a restricted signing key of a real TPM in that host: its certificate says so, or not",
        )
        yield (
            "boot",
            "the registers show what firmware and boot loader measured; what they stand for is known from a boot that "
            "is trusted",
        )
        if not quoted.safe:
            yield "TPM's clock", "it may have gone back, as the TPM lost power without being shut down"
    yield (
        "IMA",
        _IMA.get(Ima(host.ima) if host.ima in set(Ima) else Ima.UNKNOWN, "").format(count=host.ima_measurements),
    )
    if host.lockdown in (None, "none"):
        yield "lockdown", "the kernel does not keep root from changing it while it runs (lockdown is not in force)"
    if unnamed := sorted(name for name, build in host.modules.items() if build is None):
        yield "modules", f"{len(unnamed)} have no build ID and are known by name only: {', '.join(unnamed[:8])}"
    if not compared:
        yield "host", "nothing was expected of kernel, command line, modules and boot: give --policy"
    yield (
        "time",
        f"{found.began.time} to {found.ended.time} is by the host's clock"
        + ("" if fresh else ", and without a nonce nothing shows that it is not older"),
    )
    for limit in found.limits:
        yield "limit", limit
