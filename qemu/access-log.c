/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A TCG plugin for QEMU that counts, for each 4 KiB frame of an emulated host's RAM, the accesses that the host's kernel
 * makes to it by a kernel-half address, and whether a nested guest has touched it before.
 *
 * The log is a file that this plugin and its reader share (offmap/lab/access_log.py): a header, a table of the
 * instructions that accessed frames of guests, and one entry for each frame. There is nothing to flush: the reader sees
 * what is counted when it is counted.
 *
 * Who runs, host or guest: the host's kernel executes VMRUN, and what runs next is the guest; with #VMEXIT the processor
 * goes on at the instruction behind that VMRUN (AMD APM volume 2, 15.5 and 15.6). That instruction is known by its place
 * in RAM, as the guest may have code at the same virtual address. QEMU keys translated code by whether the processor
 * is in guest mode (HF_GUEST_MASK): code that was translated in one mode and runs in the other shows that the telling is
 * wrong, and is counted as a mismatch.
 *
 * Seen: what instructions load and store, helper functions included. Not seen, as QEMU 7.2 tells plugins nothing of it:
 * page-table walks, the processor's own reads of descriptor tables and writes of interrupt frames, VMCBs, instruction
 * fetches, and what devices do.
 *
 * One processor, and RAM in one piece: what QEMU 7.2 calls a physical address is the offset in its RAM block.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <qemu-plugin.h>

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

#define FORMAT 1
#define PAGE 4096
#define SITES 4096 /* a power of two */

struct header {
    char magic[8];
    uint64_t format;
    uint64_t frames;
    uint64_t sites;
    uint64_t generation;  /* written by the reader: what is counted from now on belongs to this one */
    uint64_t vmruns;      /* entries into guests since power-on: the log's clock */
    uint64_t vmexits;
    uint64_t mismatches;  /* code translated in one mode and run in the other: 0, or the log is worth nothing */
    uint64_t lost;        /* accesses whose frame QEMU could not tell */
    uint64_t sites_lost;  /* accesses by instructions for which the table had no room */
    uint64_t host;        /* accesses by the host's kernel to RAM by kernel-half addresses */
    uint64_t host_io;     /* and to devices */
    uint64_t guest;       /* accesses by guests to RAM, by any address */
    uint64_t guest_upper; /* those of them by kernel-half addresses */
};

/* An instruction of the host's kernel that accessed frames after a guest had touched them. */
struct site {
    uint64_t rip;
    uint64_t during;     /* accesses, less `tail` */
    uint64_t tail;       /* accesses since the `tail_vmrun`th entry into a guest, which may have been the last one */
    uint64_t tail_vmrun;
    uint64_t stores;     /* how many of all were stores */
    uint64_t frame;      /* of the first access */
    uint64_t vaddr;
    uint64_t unused;
};

/* Accesses before the first entry into a guest of a generation are not counted. */
struct frame {
    uint32_t generation; /* of the reader's: what is older counts for nothing */
    uint32_t guest;      /* accesses by a guest, as far as they can be counted */
    uint64_t early;      /* by the host's kernel, before the first by a guest, if there was one */
    uint64_t early_rip;  /* of the first of these */
    uint64_t during;     /* by the host's kernel since then, as in struct site */
    uint64_t tail;
    uint64_t tail_vmrun;
    uint64_t rip;        /* of the first of these */
    uint64_t vaddr;
};

_Static_assert(sizeof(struct header) <= PAGE && sizeof(struct site) == 64 && sizeof(struct frame) == 64, "the reader's");

static struct header *header;
static struct site *sites;
static struct frame *frames;
static uint64_t generation;
static uint64_t first_vmrun; /* `vmruns` when this generation began */
static bool in_guest;
static const char *landing; /* where the host goes on after #VMEXIT: an address in QEMU's own memory */

static void leave_guest(void)
{
    in_guest = false;
    header->vmexits++;
}

static void on_vmrun(unsigned int vcpu, void *next)
{
    if (in_guest) /* a guest's own, which its host intercepts */
        return;
    in_guest = true;
    landing = next;
    header->vmruns++;
}

static void on_landing(unsigned int vcpu, void *here)
{
    if (in_guest && here == landing)
        leave_guest();
}

static void count_tail(uint64_t *during, uint64_t *tail, uint64_t *tail_vmrun)
{
    if (*tail_vmrun != header->vmruns) {
        *during += *tail;
        *tail = 0;
        *tail_vmrun = header->vmruns;
    }
    ++*tail;
}

static void count_site(uint64_t rip, bool store, uint64_t frame, uint64_t vaddr)
{
    uint64_t hash = rip * 0x9E3779B97F4A7C15u;

    for (unsigned int probe = 0; probe < SITES; probe++) {
        struct site *site = &sites[(hash >> 32) + probe & (SITES - 1)];

        if (!site->rip) {
            site->rip = rip;
            site->frame = frame;
            site->vaddr = vaddr;
        }
        if (site->rip == rip) {
            site->stores += store;
            count_tail(&site->during, &site->tail, &site->tail_vmrun);
            return;
        }
    }
    header->sites_lost++;
}

/* The entry of the frame that an access went to, or NULL where it is no RAM. */
static struct frame *frame_of(qemu_plugin_meminfo_t info, uint64_t vaddr, bool count_io)
{
    struct qemu_plugin_hwaddr *hwaddr = qemu_plugin_get_hwaddr(info, vaddr);
    uint64_t phys = hwaddr ? qemu_plugin_hwaddr_phys_addr(hwaddr) : ~vaddr;
    struct frame *frame;

    /* An entry that has left the TLB meanwhile is given the address of the last access to a device. */
    if ((phys ^ vaddr) & (PAGE - 1)) {
        header->lost++;
        return NULL;
    }
    /* The processor's own, to a VMCB, by physical address: #VMEXIT within an instruction of the guest's. */
    if (phys == vaddr)
        return NULL;
    if (qemu_plugin_hwaddr_is_io(hwaddr)) {
        header->host_io += count_io;
        return NULL;
    }
    if (phys / PAGE >= header->frames) /* the firmware's ROM */
        return NULL;
    if (generation != *(volatile uint64_t *)&header->generation) {
        generation = header->generation;
        first_vmrun = header->vmruns;
        memset(sites, 0, SITES * sizeof(*sites));
    }
    frame = &frames[phys / PAGE];
    if (frame->generation != (uint32_t)generation)
        *frame = (struct frame) { .generation = generation };
    return frame;
}

static void count_guest(qemu_plugin_meminfo_t info, uint64_t vaddr)
{
    struct frame *frame = frame_of(info, vaddr, false);

    if (!frame)
        return;
    header->guest++;
    header->guest_upper += (int64_t)vaddr < 0;
    if (!frame->guest && frame->rip) {
        frame->early = frame->during + frame->tail;
        frame->early_rip = frame->rip;
        frame->during = frame->tail = frame->rip = 0;
    }
    if (frame->guest != UINT32_MAX)
        frame->guest++;
}

static void count_host(qemu_plugin_meminfo_t info, uint64_t vaddr, uint64_t rip)
{
    struct frame *frame = frame_of(info, vaddr, true);

    if (!frame)
        return;
    header->host++;
    if (header->vmruns == first_vmrun)
        return;
    if (!frame->rip) {
        frame->rip = rip;
        frame->vaddr = vaddr;
    }
    count_tail(&frame->during, &frame->tail, &frame->tail_vmrun);
    if (frame->guest)
        count_site(rip, qemu_plugin_mem_is_store(info), frame - frames, vaddr);
}

/* The second page of an access that crosses into one, or 0. */
static uint64_t second_page(qemu_plugin_meminfo_t info, uint64_t vaddr)
{
    uint64_t last = vaddr + (1ull << qemu_plugin_mem_size_shift(info)) - 1;

    return (last ^ vaddr) & ~(uint64_t)(PAGE - 1) ? last & ~(uint64_t)(PAGE - 1) : 0;
}

static void on_access(qemu_plugin_meminfo_t info, uint64_t vaddr, uint64_t rip)
{
    uint64_t second;

    if (!in_guest && (int64_t)vaddr >= 0)
        return;
    second = second_page(info, vaddr);
    if (in_guest) {
        count_guest(info, vaddr);
        if (second)
            count_guest(info, second);
    } else {
        count_host(info, vaddr, rip);
        if (second)
            count_host(info, second, rip);
    }
}

static void on_host_access(unsigned int vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *rip)
{
    header->mismatches += in_guest;
    on_access(info, vaddr, (uint64_t)rip);
}

static void on_guest_access(unsigned int vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *rip)
{
    header->mismatches += !in_guest;
    on_access(info, vaddr, (uint64_t)rip);
}

static bool is_vmrun(const struct qemu_plugin_insn *insn)
{
    return qemu_plugin_insn_size(insn) == 3 && !memcmp(qemu_plugin_insn_data(insn), "\x0f\x01\xd8", 3);
}

/* Code is translated when it is about to run, so in the mode in which it will. */
static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        uint64_t rip = qemu_plugin_insn_vaddr(insn);
        char *here = qemu_plugin_insn_haddr(insn);
        bool upper = (int64_t)rip < 0;

        if (i == 0 && here && here == landing) {
            if (in_guest)
                leave_guest();
            qemu_plugin_register_vcpu_insn_exec_cb(insn, on_landing, QEMU_PLUGIN_CB_NO_REGS, here);
        }
        if (upper && here && is_vmrun(insn)) {
            qemu_plugin_register_vcpu_insn_exec_cb(insn, on_vmrun, QEMU_PLUGIN_CB_NO_REGS, here + 3);
            continue; /* what it loads, it loads from the VMCB */
        }
        /* The host's programs cannot use kernel-half addresses. */
        if (in_guest || upper)
            qemu_plugin_register_vcpu_mem_cb(insn, in_guest ? on_guest_access : on_host_access, QEMU_PLUGIN_CB_NO_REGS,
                                             QEMU_PLUGIN_MEM_RW, (void *)rip);
    }
}

static int map_log(const char *path, uint64_t count)
{
    size_t size = PAGE + SITES * sizeof(struct site) + count * sizeof(struct frame);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    char *map;

    if (fd < 0 || ftruncate(fd, size) < 0)
        return -1;
    map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map == MAP_FAILED)
        return -1;
    header = (struct header *)map;
    sites = (struct site *)(map + PAGE);
    frames = (struct frame *)(sites + SITES);
    header->format = FORMAT;
    header->frames = count;
    header->sites = SITES;
    header->generation = generation = 1;
    memcpy(header->magic, "offmapal", sizeof(header->magic));
    return 0;
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    const char *path = NULL;
    uint64_t count = 0;

    for (int i = 0; i < argc; i++) {
        if (!strncmp(argv[i], "log=", 4))
            path = argv[i] + 4;
        else if (!strncmp(argv[i], "frames=", 7))
            count = strtoull(argv[i] + 7, NULL, 0);
    }
    if (!path || !count || strcmp(info->target_name, "x86_64") || !info->system_emulation ||
        info->system.max_vcpus != 1) {
        fprintf(stderr, "access-log: needs log=FILE, frames=N and an emulated x86-64 machine of one processor\n");
        return -1;
    }
    if (map_log(path, count)) {
        fprintf(stderr, "access-log: cannot write %s\n", path);
        return -1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    return 0;
}
