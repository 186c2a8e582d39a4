"""Getting a Debian kernel package through the machine's own apt, without installing anything or needing root.

Three views are tried in turn: the machine's package lists as they are; the machine's sources with lists of our own
(it may never have run ``apt-get update``, or long ago); and a Debian suite that the machine does not use, on the
mirror that it does. All of them are verified by apt with the machine's own keyrings.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from offmap.lab.cache import cache_folder, sha256_of
from offmap.lab.errors import LabError

# Where each kernel series lives in Debian. A machine's own suites are tried before these.
SUITES: dict[str, tuple[str, ...]] = {
    "6.1": ("bookworm", "bookworm-security"),
    "6.12": ("trixie", "trixie-security"),
}
NEWER_SUITES = ("trixie-backports", "trixie")  # any series that is not listed above
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")  # of the package debian-archive-keyring

T = TypeVar("T")


@dataclass(frozen=True)
class Package:
    """One version of a package, as apt's signed index describes it."""

    name: str
    version: str
    sha256: str
    depends: str = ""


@dataclass(frozen=True)
class AptView:
    """A way to look at package indexes: apt's options for it, and whether its lists must be fetched first."""

    label: str
    options: tuple[str, ...]
    lists: Path | None = None

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run one apt command and return its output. Raises LabError: it failed."""
        argv = [command[0], *self.options, *command[1:]]
        env = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(
            argv, capture_output=True, text=True, env=env, cwd=cwd, check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W:"))]
            reason = errors[0] if errors else f"status {done.returncode}"
            raise LabError(
                f"{command[0]} {command[1]} failed: {reason}", "check the machine's apt sources and its network"
            )
        return done.stdout

    def update(self) -> None:
        """Fetch the lists, for a view with lists of its own."""
        if self.lists is not None:
            self.run("apt-get", "update")


def have_apt() -> bool:
    """Say whether this machine can download Debian packages."""
    return all(shutil.which(tool) for tool in ("apt-get", "apt-cache", "dpkg-deb"))


def views(series: str, folder: Path) -> Iterator[AptView]:
    """Yield the views on which to look for a kernel of ``series``; ``folder`` holds what they fetch."""
    yield AptView("the machine's package lists", ())
    private = _private(folder / "own")
    yield AptView("the machine's sources", private, folder / "own")
    if sources := debian_sources(SUITES.get(series, NEWER_SUITES)):
        yield _listed("Debian's suites on the machine's mirror", folder / f"debian-{series}", sources)


def from_views(what: str, series: str, fetch: Callable[[AptView], T | None], remedy: str) -> T:
    """Return what `fetch` gets from the first of the `views` in which it finds `what` (it returns None where not).

    Raises:
        LabError: no view has it; says why not, view by view, and the remedy.
    """
    failures = []
    for view in views(series, cache_folder("apt")):
        try:
            view.update()
            if (found := fetch(view)) is not None:
                return found
            failures.append(f"{view.label} have none")
        except LabError as error:
            failures.append(f"{view.label}: {error.reason}")
    raise LabError(f"cannot get {what}: {'; '.join(failures)}", remedy)


def source_view(folder: Path) -> AptView:
    """Return a view on the source packages of the machine's own Debian release; ``folder`` holds what it fetches.

    Raises:
        LabError: this machine runs no Debian, or none of its mirrors has one.
    """
    release = _debian_codename()
    suites = (release, f"{release}-security", f"{release}-updates") if release else ()
    sources = debian_sources(suites, "deb-src")
    if not sources:
        raise LabError("this machine's apt knows no Debian mirror", "use a Debian machine")
    return _listed("Debian's source packages on the machine's mirror", folder / f"source-{release}", sources)


def _debian_codename() -> str:
    """``bookworm``, or an empty string where the machine's release is not Debian's."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return ""
    return release.get("VERSION_CODENAME", "") if release.get("ID") == "debian" else ""


def _listed(label: str, state: Path, sources: str) -> AptView:
    """Return a view on these sources and no others, with lists of its own."""
    private = _private(state)
    listing = state / "sources.list"
    listing.write_text(sources)
    options = (f"Dir::Etc::SourceList={listing}", "Dir::Etc::SourceParts=/dev/null", "APT::Default-Release=")
    return AptView(label, (*private, *_flags(options)), state)


def _flags(options: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for option in options for word in ("-o", option))


def _private(state: Path) -> tuple[str, ...]:
    for part in ("lists/partial", "archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    return _flags(
        (
            f"Dir::State::Lists={state / 'lists'}",
            f"Dir::Cache={state}",
            f"Dir::Cache::Archives={state / 'archives'}",
            "APT::Sandbox::User=root",  # the _apt user cannot write below a private home
            "APT::Get::List-Cleanup=true",
        )
    )


def debian_sources(suites: Sequence[str], kind: str = "deb") -> str:
    """Compose a sources.list for ``suites`` on the mirrors that the machine uses for Debian; empty if it uses none.

    Args:
        kind: ``deb``, or ``deb-src`` for source packages.
    """
    text = AptView("", ()).run(
        "apt-get", "indextargets", "--format", "$(SITE) $(ORIGIN) $(REPO_URI) $(LABEL)", "Created-By: Packages"
    )
    plain = security = ""
    for line in text.splitlines():
        _, origin, uri, label = (*line.split(" ", 3), "", "", "", "")[:4]
        if "debian" not in f"{origin} {label} {uri}".lower() or "ubuntu" in uri.lower():
            continue
        if "security" in uri.lower() or "security" in label.lower():
            security = security or uri
        elif uri.rstrip("/").endswith("debian"):
            plain = plain or uri
    signed = f" [signed-by={KEYRING}]" if KEYRING.is_file() else ""
    lines = []
    for suite in suites:
        uri = security if suite.endswith("-security") else plain
        if uri:
            lines.append(f"{kind}{signed} {uri} {suite} main\n")
    return "".join(lines)


def find_kernel(view: AptView, series: str) -> tuple[Package, ...]:
    """Return the packages of the newest generic amd64 kernel of ``series`` (``6.12``) in ``view``, if there is one."""
    pattern = rf"^linux-image-{re.escape(series)}\.[0-9].*-amd64$"
    names = [line.split(" ", 1)[0] for line in view.run("apt-cache", "search", "--names-only", pattern).splitlines()]
    # 6.12.117+deb12-amd64 and 6.1.0-40-amd64, but not -cloud-amd64, -rt-amd64, -amd64-unsigned or -amd64-dbg.
    generic = re.compile(rf"linux-image-{re.escape(series)}\.[^-]+(-\d+)?-amd64")
    names = [name for name in names if generic.fullmatch(name)]
    if not names:
        return ()
    image = newest(parse_packages(view.run("apt-cache", "show", "--all-versions", *names)))
    if image is None:
        return ()
    # Debian's 7.x kernels come in parts on which linux-image-R depends: base (configuration), binary, modules.
    release = image.name.removeprefix("linux-image-")
    exactly = rf"(linux-(?:base|binary|modules)-{re.escape(release)}) \(= {re.escape(image.version)}\)"
    parts = [f"{name}={image.version}" for name in re.findall(exactly, image.depends)]
    return (image, *(parse_packages(view.run("apt-cache", "show", *parts)) if parts else ()))


def parse_packages(text: str) -> list[Package]:
    """Read ``apt-cache show`` output (deb822 stanzas); those without a SHA256 are left out."""
    packages = []
    for stanza in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if not line.startswith(" ") and ": " in line)
        if {"Package", "Version", "SHA256"} <= fields.keys():
            packages.append(Package(fields["Package"], fields["Version"], fields["SHA256"], fields.get("Depends", "")))
    return packages


def newest(packages: Sequence[Package]) -> Package | None:
    """Return the package of the highest version, by Debian's own rules of comparison (dpkg)."""
    best: Package | None = None
    for package in packages:
        if best is None or _is_newer(package.version, best.version):
            best = package
    return best


def _is_newer(version: str, than: str) -> bool:
    return subprocess.run(["dpkg", "--compare-versions", version, "gt", than], check=False).returncode == 0


def download(view: AptView, package: Package, folder: Path) -> Path:
    """Download ``package`` into ``folder`` and check it against the index.

    Raises:
        LabError: apt failed, or what came is not what the index promised.
    """
    view.run("apt-get", "download", f"{package.name}={package.version}", cwd=folder)
    files = list(folder.glob(f"{package.name}_*.deb"))
    if len(files) != 1 or sha256_of(files[0]) != package.sha256:
        raise LabError(
            f"the download of {package.name} {package.version} is not what apt's index promised", "try again"
        )
    return files[0]


def download_closure(view: AptView, names: Sequence[str], folder: Path) -> list[Path]:
    """Download the newest packages of these names and all that they depend on, as if nothing were installed here.

    apt checks each against its signed index.

    Raises:
        LabError: apt failed, or knows no such package.
    """
    archives = folder / "archives"
    (archives / "partial").mkdir(parents=True)
    nothing = folder / "status"
    nothing.touch()
    options = _flags(
        (
            f"Dir::State::status={nothing}",
            f"Dir::Cache::Archives={archives}",
            "APT::Sandbox::User=root",
            "Debug::NoLocking=true",  # the machine's own apt may be at work; we change nothing of it
            "APT::Get::AllowUnauthenticated=false",
        )
    )
    flags = ("--download-only", "--assume-yes", "--no-install-recommends")
    AptView(view.label, (*view.options, *options)).run("apt-get", "install", *flags, *names)
    return sorted(archives.glob("*.deb"))
