"""The Python that a disposable host starts from its initramfs: our own interpreter, and what the agent imports.

The interpreter is asked itself: it imports the agent on this machine and lists the files that this took.
"""

import importlib.util
import json
import marshal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from offmap.lab.errors import LabError

AGENT_FOLDER = "agent"  # in the initramfs
_GUEST = Path(__file__).with_name("guest")
_PACKAGE = "offmap/lab/guest"
_HASH_BASED = 1  # PEP 552: the interpreter does not look for the source

# Run by the interpreter. The names of offmap's own packages are made up, so that only the agent's modules are imported.
# dl_iterate_phdr(3) names shared libraries as the loader looks for them, symbolic links and all.
_LIST = """
import sys
for name, path in (("offmap", ""), ("offmap.lab", ""), ("offmap.lab.guest", sys.argv[1])):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [path] if path else []
import offmap.lab.guest.first
own = [name for name in sys.modules if name.startswith("offmap")]
open("/dev/null", encoding="ascii").close()
loaded = [getattr(module, "__file__", None) for name, module in sys.modules.items() if name not in own]
modules = sorted(path for path in loaded if path)
import ctypes
libraries = []
class info(ctypes.Structure):
    _fields_ = [("dlpi_addr", ctypes.c_void_p), ("dlpi_name", ctypes.c_char_p)]
@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(info), ctypes.c_size_t, ctypes.c_void_p)
def found(entry, size, data):
    libraries.append((entry[0].dlpi_name or b"").decode())
    return 0
ctypes.CDLL(None).dl_iterate_phdr(found, None)
import json
print(json.dumps({"modules": modules, "libraries": libraries}))
"""


@dataclass(frozen=True)
class GuestPython:
    """What the agent needs.

    Attributes:
        interpreter: the program.
        binaries: place in the initramfs -> file: the interpreter, libraries and compiled modules.
        sources: place in the initramfs -> Python source, which goes there as byte code.
    """

    interpreter: Path
    binaries: dict[str, Path]
    sources: dict[str, Path]


def guest_python() -> GuestPython:
    """Return what the agent needs of this machine's Python; takes 50 ms.

    Raises:
        LabError: the interpreter cannot run the agent.
    """
    program = Path(sys.executable).resolve()
    argv = [str(program), "-I", "-S", "-B", "-c", _LIST, str(_GUEST)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/", env={})
    try:
        found = json.loads(done.stdout)
        modules, libraries = [str(path) for path in found["modules"]], [str(path) for path in found["libraries"]]
    except (ValueError, KeyError) as error:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise LabError(f"{program} cannot run the lab's agent: {reason}", "use another Python") from error
    binaries = {_place(str(program)): program}
    # Those without a slash are the program itself and the kernel's vDSO.
    binaries |= {_place(name): Path(name) for name in libraries if "/" in name}
    binaries |= {_place(name): Path(name) for name in modules if not name.endswith(".py")}
    sources = {_place(name): Path(name) for name in modules if name.endswith(".py")}
    sources |= {f"{AGENT_FOLDER}/{_PACKAGE}/{path.name}": path for path in sorted(_GUEST.glob("*.py"))}
    return GuestPython(program, binaries, sources)


def _place(path: str) -> str:
    # Not resolved: the loader and the interpreter look for the name that they know.
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in {"", "."}:
            parts.append(part)
    return "/".join(parts)


def byte_code(source: bytes, path: str) -> bytes:
    """Return the content of a .pyc file that this interpreter loads without its source."""
    code = compile(source, path, "exec", dont_inherit=True)
    return importlib.util.MAGIC_NUMBER + _HASH_BASED.to_bytes(4, "little") + bytes(8) + marshal.dumps(code)
