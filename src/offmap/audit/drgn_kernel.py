"""The running kernel as drgn sees it: a reader of /proc/kcore and a walker of page tables that are not of our making.

drgn parses kcore's headers and VMCOREINFO and translates addresses with its own x86-64 iterator, in C; it needs neither
debugging information nor symbols for that. ``drgn.helpers.linux.mm.follow_phys`` only wants a ``struct mm_struct`` to
take ``pgd`` from, so it is given one that has nothing else.
"""

import re
from typing import TYPE_CHECKING

from offmap.errors import OffmapError, Undetermined

if TYPE_CHECKING:
    from drgn import Object, Program, Type


def require_drgn() -> None:
    """Check that drgn is installed, before an audit is made for it. Raises OffmapError: it is not installed."""
    try:
        import drgn  # noqa: F401
    except ImportError:
        raise OffmapError("--oracle drgn needs drgn, which is not installed", "pip install 'offmap[oracle]'") from None


class DrgnKernel:
    """Translates addresses of the running kernel and of its processes.

    Raises:
        OffmapError: drgn is not installed.
        Undetermined: it cannot look at this kernel.
    """

    def __init__(self) -> None:
        require_drgn()
        import drgn
        from drgn.helpers.linux.mm import follow_phys

        self.version = drgn.__version__
        self._object, self._fault = drgn.Object, drgn.FaultError
        self._follow_phys = follow_phys
        self._program: Program = drgn.Program()
        try:
            self._program.set_kernel()
        except (OSError, ValueError, drgn.FaultError) as error:
            raise Undetermined(f"drgn cannot look at this kernel: {error}", "run the audit as root") from None
        self._mm = _declare_mm(self._program)
        text: str = self._program["VMCOREINFO"].string_().decode("ascii", "replace")
        top = re.search(r"^SYMBOL\((?:swapper_pg_dir|init_top_pgt)\)=([0-9a-f]+)$", text, re.MULTILINE)
        if top is None:
            raise Undetermined("VMCOREINFO of this kernel does not say where its page tables are")
        self._kernel = self._mm_of(int(top[1], 16))

    def _mm_of(self, pgd: int) -> "Object":
        found: Object = self._object(self._program, self._mm, value={"pgd": pgd})
        return found

    def kernel(self, va: int) -> int | None:
        """Physical address of a kernel address; None where nothing is mapped. Raises Undetermined: drgn cannot tell."""
        return self._translate(self._kernel, va)

    def process(self, pgd: int, va: int) -> int | None:
        """Physical address of an address of a process, by the kernel address of its top page table (else as above)."""
        return self._translate(self._mm_of(pgd), va)

    def _translate(self, mm: "Object", va: int) -> int | None:
        try:
            return int(self._follow_phys(mm, va).value_())
        except self._fault as error:
            if "not mapped" in str(error):
                return None
            raise Undetermined(f"drgn cannot translate {va:#x}: {error}") from None


def _declare_mm(program: "Program") -> "Type":
    """A ``struct mm_struct`` that has only ``pgd``, and the other type that follow_phys asks for."""
    import drgn

    number = program.int_type("unsigned long", 8, False)
    phys_addr_t = program.typedef_type("phys_addr_t", number)

    def find(_program: "Program", _kinds: object, name: str, _file: str | None) -> "Type | None":
        return phys_addr_t if name == "phys_addr_t" else None

    # After all others: where there is debugging information, it has the type.
    program.register_type_finder("offmap", find, enable_index=-1)
    return program.struct_type("mm_struct", 8, (drgn.TypeMember(program.pointer_type(program.void_type()), "pgd"),))
