/*
 * The peer of exit_cost.py: the same guest and the same loop around KVM_RUN, in C.
 *
 *   exit_cost PORT STOP_PORT <guest-code
 *
 * Runs the real-mode code on its standard input at 0x1000 until it writes to STOP_PORT, and prints the seconds that took.
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define CODE 0x1000
#define MEMORY 0x10000

struct device {
	uint8_t last;
};

struct port {
	uint32_t (*read)(struct device *device, uint16_t port, unsigned int size);
	void (*write)(struct device *device, uint16_t port, unsigned int size, uint32_t value);
	struct device *device;
};

static struct port ports[0x10000];
static volatile int stop;

static uint32_t latch_read(struct device *device, uint16_t port, unsigned int size)
{
	(void)port, (void)size;
	return device->last;
}

static void latch_write(struct device *device, uint16_t port, unsigned int size, uint32_t value)
{
	(void)port, (void)size;
	device->last = value;
}

static void stop_write(struct device *device, uint16_t port, unsigned int size, uint32_t value)
{
	(void)device, (void)port, (void)size, (void)value;
	stop = 1;
}

static void port_io(struct kvm_run *run)
{
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	struct port *port = &ports[run->io.port];

	for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size) {
		uint32_t value = UINT32_MAX;

		if (run->io.direction == KVM_EXIT_IO_OUT) {
			memcpy(&value, data, run->io.size);
			if (port->write)
				port->write(port->device, run->io.port, run->io.size, value);
		} else {
			if (port->read)
				value = port->read(port->device, run->io.port, run->io.size);
			memcpy(data, &value, run->io.size);
		}
	}
}

static void run_until_stopped(int vcpu, struct kvm_run *run)
{
	while (!stop) {
		if (ioctl(vcpu, KVM_RUN, 0) < 0) {
			if (errno == EINTR || errno == EAGAIN)
				continue;
			err(1, "KVM_RUN");
		}
		switch (run->exit_reason) {
		case KVM_EXIT_IO:
			port_io(run);
			break;
		default:
			errx(1, "unexpected exit %u", run->exit_reason);
		}
	}
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static int must(int result, const char *what)
{
	if (result < 0)
		err(1, "%s", what);
	return result;
}

int main(int argc, char **argv)
{
	struct device latch = { 0 };

	if (argc != 3)
		errx(2, "usage: exit_cost PORT STOP_PORT <guest-code");
	ports[(uint16_t)strtoul(argv[1], NULL, 0)] = (struct port){ latch_read, latch_write, &latch };
	ports[(uint16_t)strtoul(argv[2], NULL, 0)] = (struct port){ NULL, stop_write, NULL };

	int kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	uint8_t *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		err(1, "mmap");
	must(read(0, memory + CODE, MEMORY - CODE), "read");
	struct kvm_userspace_memory_region region = { .memory_size = MEMORY, .userspace_addr = (uintptr_t)memory };
	must(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");

	int vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	int size = must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		err(1, "mmap of the vCPU");
	struct kvm_sregs sregs;
	must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = sregs.cs.selector = 0;
	must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
	must(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");

	double started = now();
	run_until_stopped(vcpu, run);
	printf("%.9f\n", now() - started);
	return 0;
}
