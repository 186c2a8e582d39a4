"""A page of this architecture: arch/x86/include/asm/page_types.h."""

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT  # bytes
PAGE_MASK = ~(PAGE_SIZE - 1)  # an address & PAGE_MASK is the start of its page
