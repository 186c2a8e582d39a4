"""KVM's user-space ABI for x86: include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm{,_para}.h.

Structures and constants are spelled as the headers spell them. Only what offmap uses is declared; tests compare sizes,
offsets and numbers with the installed headers where those are new enough to have them.
"""

from ctypes import Structure, Union, c_int, c_int16, c_uint8, c_uint16, c_uint32, c_uint64, sizeof

from offmap.uapi.ioctl import io, ior, iow, iowr
from offmap.uapi.members import u8, u16, u32, u64
from offmap.uapi.page import PAGE_SIZE

KVMIO = 0xAE
KVM_API_VERSION = 12

# --- exit reasons (struct kvm_run.exit_reason) -----------------------------------------------------------------------
KVM_EXIT_IO = 2
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_MEMORY_FAULT = 39

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

# --- capabilities ----------------------------------------------------------------------------------------------------
KVM_CAP_USER_MEMORY = 3
KVM_CAP_COALESCED_MMIO = 15
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_READONLY_MEM = 81
KVM_CAP_ENFORCE_PV_FEATURE_CPUID = 190
KVM_CAP_BINARY_STATS_FD = 203
KVM_CAP_USER_MEMORY2 = 231
KVM_CAP_GUEST_MEMFD = 234
KVM_CAP_GUEST_MEMFD_FLAGS = 244
KVM_CAP_X86_KVMCLOCK_HVA = 252  # kernel/patches

# --- memory ----------------------------------------------------------------------------------------------------------
KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2

GUEST_MEMFD_FLAG_MMAP = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1

# --- CPUID leaves and the PV features in them (asm/kvm_para.h) -------------------------------------------------------
KVM_CPUID_SIGNATURE = 0x40000000
KVM_CPUID_FEATURES = 0x40000001
KVM_FEATURE_CLOCKSOURCE = 0
KVM_FEATURE_CLOCKSOURCE2 = 3
KVM_FEATURE_STEAL_TIME = 5
KVM_FEATURE_PV_EOI = 6
KVM_FEATURE_ASYNC_PF_INT = 14
KVM_FEATURE_CLOCKSOURCE_STABLE_BIT = 24

MSR_KVM_SYSTEM_TIME = 0x12
MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01

KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1


KVM_PIO_PAGE_OFFSET = 1  # asm/kvm.h: where the data of port accesses is in the vCPU's mapping, in pages
KVM_COALESCED_MMIO_PAGE_OFFSET = 2  # asm/kvm.h: likewise, the ring of coalesced writes


class kvm_userspace_memory_region(Structure):
    _fields_ = [*u32("slot flags"), *u64("guest_phys_addr memory_size userspace_addr")]


class kvm_userspace_memory_region2(Structure):
    _fields_ = [
        *u32("slot flags"),
        *u64("guest_phys_addr memory_size userspace_addr guest_memfd_offset"),
        *u32("guest_memfd pad1"),
        ("pad2", c_uint64 * 14),
    ]


class kvm_create_guest_memfd(Structure):
    _fields_ = [*u64("size flags"), ("reserved", c_uint64 * 6)]


class kvm_enable_cap(Structure):
    _fields_ = [*u32("cap flags"), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class kvm_irq_level(Structure):
    _fields_ = u32("irq level")


class kvm_irqfd(Structure):
    _fields_ = [*u32("fd gsi flags resamplefd"), ("pad", c_uint8 * 16)]


class kvm_ioeventfd(Structure):
    _fields_ = [*u64("datamatch addr"), *u32("len"), ("fd", c_int), *u32("flags"), ("pad", c_uint8 * 36)]


class kvm_coalesced_mmio_zone(Structure):
    _fields_ = [*u64("addr"), *u32("size pio")]


class kvm_coalesced_mmio(Structure):
    _fields_ = [*u64("phys_addr"), *u32("len pio"), ("data", c_uint8 * 8)]


class kvm_coalesced_mmio_ring(Structure):
    """The header, without its flexible array ``coalesced_mmio[]``."""

    _fields_ = u32("first last")


KVM_COALESCED_MMIO_MAX = (PAGE_SIZE - sizeof(kvm_coalesced_mmio_ring)) // sizeof(kvm_coalesced_mmio)


class kvm_regs(Structure):
    _fields_ = u64("rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags")


class kvm_segment(Structure):
    _fields_ = [*u64("base"), *u32("limit"), *u16("selector"), *u8("type present dpl db s l g avl unusable padding")]


class kvm_dtable(Structure):
    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


KVM_NR_INTERRUPTS = 256


class kvm_sregs(Structure):
    _fields_ = [
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, kvm_dtable) for name in ("gdt", "idt")),
        *u64("cr0 cr2 cr3 cr4 cr8 efer apic_base"),
        ("interrupt_bitmap", c_uint64 * ((KVM_NR_INTERRUPTS + 63) // 64)),
    ]


class kvm_lapic_state(Structure):
    _fields_ = [("regs", c_uint8 * 0x400)]


class kvm_cpuid_entry2(Structure):
    _fields_ = [*u32("function index flags eax ebx ecx edx"), ("padding", c_uint32 * 3)]


KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0  # the header's own spelling


class kvm_cpuid2(Structure):
    """The header, without its flexible array ``entries[]``."""

    _fields_ = u32("nent padding")


class kvm_cpuid(Structure):
    """The header, without its flexible array ``entries[]``."""

    _fields_ = u32("nent padding")


class kvm_msr_entry(Structure):
    _fields_ = [*u32("index reserved"), *u64("data")]


class kvm_msrs(Structure):
    """The header, without its flexible array ``entries[]``."""

    _fields_ = u32("nmsrs pad")


KVM_MAX_XCRS = 16


class kvm_xcr(Structure):
    _fields_ = [*u32("xcr reserved"), *u64("value")]


class kvm_xcrs(Structure):
    _fields_ = [*u32("nr_xcrs flags"), ("xcrs", kvm_xcr * KVM_MAX_XCRS), ("padding", c_uint64 * 16)]


class kvm_run_io(Structure):
    _fields_ = [*u8("direction size"), *u16("port"), *u32("count"), *u64("data_offset")]


class kvm_run_mmio(Structure):
    _fields_ = [("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8)]


class kvm_run_internal(Structure):
    _fields_ = [*u32("suberror ndata"), ("data", c_uint64 * 16)]


class kvm_run_fail_entry(Structure):
    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class kvm_run_system_event(Structure):
    _fields_ = [*u32("type ndata"), ("data", c_uint64 * 16)]


class kvm_run_memory_fault(Structure):
    _fields_ = u64("flags gpa size")


class _kvm_run_exit(Union):
    _fields_ = [
        ("io", kvm_run_io),
        ("mmio", kvm_run_mmio),
        ("internal", kvm_run_internal),
        ("fail_entry", kvm_run_fail_entry),
        ("system_event", kvm_run_system_event),
        ("memory_fault", kvm_run_memory_fault),
        ("padding", c_uint8 * 256),
    ]


class kvm_run(Structure):
    """The head of ``struct kvm_run``, up to the end of its union of exits."""

    _anonymous_ = ("exit",)
    _fields_ = [
        *u8("request_interrupt_window immediate_exit"),
        ("padding1", c_uint8 * 6),
        *u32("exit_reason"),
        *u8("ready_for_interrupt_injection if_flag"),
        *u16("flags"),
        *u64("cr8 apic_base"),
        ("exit", _kvm_run_exit),
    ]


class kvm_stats_header(Structure):
    _fields_ = u32("flags name_size num_desc id_offset desc_offset data_offset")


class kvm_stats_desc(Structure):
    """The descriptor, without its flexible array ``name[]`` of ``kvm_stats_header.name_size`` bytes."""

    _fields_ = [*u32("flags"), ("exponent", c_int16), *u16("size"), *u32("offset bucket_size")]


class kvm_xen_hvm_config(Structure):
    _fields_ = [
        *u32("flags msr"),
        *u64("blob_addr_32 blob_addr_64"),
        *u8("blob_size_32 blob_size_64"),
        ("pad2", c_uint8 * 30),
    ]


class kvm_xen_hvm_attr(Structure):
    """Its union ``u`` as 64-bit words."""

    _fields_ = [*u16("type"), ("pad", c_uint16 * 3), ("u", c_uint64 * 8)]


class kvm_xen_vcpu_attr(Structure):
    """Its union ``u`` as 64-bit words."""

    _fields_ = [*u16("type"), ("pad", c_uint16 * 3), ("u", c_uint64 * 8)]


# --- ioctls on /dev/kvm ----------------------------------------------------------------------------------------------
KVM_GET_API_VERSION = io(KVMIO, 0x00)
KVM_CREATE_VM = io(KVMIO, 0x01)
KVM_CHECK_EXTENSION = io(KVMIO, 0x03)
KVM_GET_VCPU_MMAP_SIZE = io(KVMIO, 0x04)
KVM_GET_SUPPORTED_CPUID = iowr(KVMIO, 0x05, kvm_cpuid2)

# --- ioctls on a VM fd -----------------------------------------------------------------------------------------------
KVM_CREATE_VCPU = io(KVMIO, 0x41)
KVM_SET_USER_MEMORY_REGION = iow(KVMIO, 0x46, kvm_userspace_memory_region)
KVM_SET_TSS_ADDR = io(KVMIO, 0x47)
KVM_SET_IDENTITY_MAP_ADDR = iow(KVMIO, 0x48, c_uint64)
KVM_SET_USER_MEMORY_REGION2 = iow(KVMIO, 0x49, kvm_userspace_memory_region2)
KVM_CREATE_IRQCHIP = io(KVMIO, 0x60)
KVM_IRQ_LINE = iow(KVMIO, 0x61, kvm_irq_level)
KVM_REGISTER_COALESCED_MMIO = iow(KVMIO, 0x67, kvm_coalesced_mmio_zone)
KVM_IRQFD = iow(KVMIO, 0x76, kvm_irqfd)
KVM_IOEVENTFD = iow(KVMIO, 0x79, kvm_ioeventfd)
KVM_XEN_HVM_CONFIG = iow(KVMIO, 0x7A, kvm_xen_hvm_config)
KVM_XEN_HVM_SET_ATTR = iow(KVMIO, 0xC9, kvm_xen_hvm_attr)
KVM_GET_STATS_FD = io(KVMIO, 0xCE)  # on a vCPU fd too
KVM_CREATE_GUEST_MEMFD = iowr(KVMIO, 0xD4, kvm_create_guest_memfd)

# --- ioctls on a vCPU fd (KVM_ENABLE_CAP also on a VM fd) ------------------------------------------------------------
KVM_RUN = io(KVMIO, 0x80)
KVM_GET_REGS = ior(KVMIO, 0x81, kvm_regs)
KVM_SET_REGS = iow(KVMIO, 0x82, kvm_regs)
KVM_GET_SREGS = ior(KVMIO, 0x83, kvm_sregs)
KVM_SET_SREGS = iow(KVMIO, 0x84, kvm_sregs)
KVM_SET_MSRS = iow(KVMIO, 0x89, kvm_msrs)
KVM_GET_LAPIC = ior(KVMIO, 0x8E, kvm_lapic_state)
KVM_SET_LAPIC = iow(KVMIO, 0x8F, kvm_lapic_state)
KVM_SET_CPUID = iow(KVMIO, 0x8A, kvm_cpuid)
KVM_SET_CPUID2 = iow(KVMIO, 0x90, kvm_cpuid2)
KVM_GET_TSC_KHZ = io(KVMIO, 0xA3)
KVM_ENABLE_CAP = iow(KVMIO, 0xA3, kvm_enable_cap)
KVM_XEN_VCPU_SET_ATTR = iow(KVMIO, 0xCB, kvm_xen_vcpu_attr)
KVM_SET_XCRS = iow(KVMIO, 0xA7, kvm_xcrs)
