/*
 * What a block device does for one program: operations a second, of one size, in order or at random, so many at a time.
 *
 * virtio_blk DEVICE SECONDS PATTERN:BYTES:DEPTH...     (randread:4096:1 seqwrite:1048576:4 ...)
 *
 * Prints a line for each: PATTERN:BYTES:DEPTH, operations, microseconds. O_DIRECT, so that the device is measured and
 * not the guest's page cache; the kernel's own asynchronous I/O, called by number, so that no library is needed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 64 };

static void fail(const char *what)
{
	fprintf(stderr, "virtio_blk: %s: %s\n", what, strerror(errno));
	exit(2);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000ull + t.tv_nsec / 1000;
}

static uint64_t state = 88172645463325252ull;

static uint64_t next_random(void)
{
	state ^= state << 13; /* Marsaglia's xorshift64 */
	state ^= state >> 7;
	return state ^= state << 17;
}

static void measure(int fd, uint64_t blocks, const char *spec, double seconds)
{
	char pattern[16];
	unsigned long bytes, depth, done = 0, in_flight = 0;
	aio_context_t context = 0;
	struct iocb requests[MOST], *list[MOST];
	struct io_event events[MOST];
	uint64_t started, end, at = 0;
	void *buffers;

	if (sscanf(spec, "%15[a-z]:%lu:%lu", pattern, &bytes, &depth) != 3 || depth > MOST || !depth || !bytes) {
		errno = EINVAL;
		fail(spec);
	}
	blocks /= bytes;
	if (posix_memalign(&buffers, 4096, bytes * depth))
		fail("memory");
	memset(buffers, 0x5a, bytes * depth);
	if (syscall(SYS_io_setup, MOST, &context))
		fail("io_setup");
	memset(requests, 0, sizeof(requests));
	started = now();
	end = started + seconds * 1e6;
	for (unsigned long i = 0; i < depth; i++) {
		requests[i].aio_fildes = fd;
		requests[i].aio_lio_opcode = strstr(pattern, "write") ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
		requests[i].aio_buf = (uintptr_t)buffers + i * bytes;
		requests[i].aio_nbytes = bytes;
		events[i].obj = (uintptr_t)&requests[i];
	}
	long ready = depth;
	while (now() < end || in_flight) {
		long count = 0;

		if (now() < end)
			for (; count < ready; count++) {
				struct iocb *request = (struct iocb *)(uintptr_t)events[count].obj;

				at = pattern[0] == 'r' ? next_random() % blocks : (at + 1) % blocks;
				request->aio_offset = at * bytes;
				list[count] = request;
			}
		if (count && syscall(SYS_io_submit, context, count, list) != count)
			fail("io_submit");
		in_flight += count;
		if (!in_flight)
			break;
		ready = syscall(SYS_io_getevents, context, 1, MOST, events, NULL);
		if (ready < 0)
			fail("io_getevents");
		for (long i = 0; i < ready; i++)
			if (events[i].res != (long)bytes) {
				errno = events[i].res < 0 ? -events[i].res : EIO;
				fail(spec);
			}
		in_flight -= ready;
		done += ready;
	}
	printf("%s %lu %llu\n", spec, done, (unsigned long long)(now() - started));
	fflush(stdout);
	syscall(SYS_io_destroy, context);
	free(buffers);
}

int main(int argc, char **argv)
{
	uint64_t size;
	int fd;

	if (argc < 4) {
		fprintf(stderr, "usage: virtio_blk DEVICE SECONDS PATTERN:BYTES:DEPTH...\n");
		return 2;
	}
	fd = open(argv[1], O_RDWR | O_DIRECT);
	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size))
		fail(argv[1]);
	for (int i = 3; i < argc; i++)
		measure(fd, size, argv[i], atof(argv[2]));
	return 0;
}
