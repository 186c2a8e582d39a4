/*
 * The guest's half of the comparison: takes a command a line at the console, and ends each answer with a line
 * "offmap-probe: done 0", or with "offmap-probe: done ERRNO what failed". Results are lines "offmap-probe: = VALUE…".
 *
 *   load NAME...                      insert the files of /modules whose names contain one of these, or "all"
 *   sh LINE                           run a line of shell
 *   disk DEVICE BYTES                 copy the first BYTES to the next BYTES, past the page cache, and flush
 *   read DEVICE BYTES                 microseconds to read so much from its start, past the page cache
 *   write DEVICE BYTES                the same, written; flushed
 *   echo tcp ADDRESS PORT             connect, and send everything back until the other side ends
 *   echo vsock PORT                   the same, to the host
 *   send ADDRESS PORT BYTES           microseconds to send so much by TCP and get one byte for it
 *   chase BYTES STEPS                 nanoseconds a step, of dependent loads in random order
 *   copy BYTES TIMES                  microseconds to copy so much so often
 *   fill BYTES / check                fill memory with a pattern; count the words that are not as they were
 *   cpus                              run on each CPU that is online; print the number of each
 *   cpuid LEAF                        eax ebx ecx edx
 *   rdmsr INDEX / wrmsr INDEX VALUE   of CPU 0
 *   clock                             microseconds of CLOCK_MONOTONIC
 *   burn MILLISECONDS                 keep the CPU busy; print the clock ticks stolen meanwhile
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <cpuid.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PIECE (256UL << 10)

static char *words[16];
static int count;

static double now(void) /* microseconds */
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static uint64_t state;

static uint64_t next_random(void)
{
	state ^= state << 13; /* Marsaglia's xorshift64 */
	state ^= state >> 7;
	return state ^= state << 17;
}

static unsigned long long number(int index)
{
	return index < count ? strtoull(words[index], NULL, 0) : 0;
}

static void *memory(size_t size)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	return at == MAP_FAILED ? NULL : at;
}

static char *buffer(void)
{
	static char *piece;

	return piece ? piece : (piece = memory(PIECE));
}

static int load(void)
{
	struct dirent **names;
	int found = scandir("/modules", &names, NULL, alphasort), failed = 0;
	char path[512];

	for (int i = 0; i < found; i++) {
		int wanted = 0;

		if (names[i]->d_name[0] == '.')
			continue;
		for (int w = 1; w < count; w++)
			wanted |= !strcmp(words[w], "all") || strstr(names[i]->d_name, words[w]) != NULL;
		if (!wanted)
			continue;
		snprintf(path, sizeof(path), "/modules/%s", names[i]->d_name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
			failed = errno;
		close(fd);
	}
	errno = failed;
	return failed ? -1 : 0;
}

static int move(int fd, int out, unsigned long from, unsigned long size)
{
	for (unsigned long done = 0; done < size; done += PIECE) {
		ssize_t n = out ? pwrite(fd, buffer(), PIECE, from + done) : pread(fd, buffer(), PIECE, from + done);

		if (n != PIECE) {
			errno = n < 0 ? errno : EIO;
			return -1;
		}
	}
	return 0;
}

static int disk(void)
{
	int fd = open(words[1], O_RDWR | O_DIRECT | O_CLOEXEC), result = 0;
	unsigned long size = number(2);

	if (fd < 0)
		return -1;
	for (unsigned long at = 0; at < size && !result; at += PIECE)
		result = move(fd, 0, at, PIECE) || move(fd, 1, size + at, PIECE);
	result = result || fdatasync(fd);
	close(fd);
	return result ? -1 : 0;
}

static int timed_disk(void)
{
	int fd = open(words[1], O_RDWR | O_DIRECT | O_CLOEXEC), out = !strcmp(words[0], "write");
	double started = now();

	if (fd < 0)
		return -1;
	if (move(fd, out, 0, number(2)) || (out && fdatasync(fd))) {
		close(fd);
		return -1;
	}
	printf("offmap-probe: = %.0f\n", now() - started);
	close(fd);
	return 0;
}

/* A connection that gets nowhere is given up, so that the next question can be put. */
static int patient(int fd)
{
	struct timeval most = { .tv_sec = 10 };

	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &most, sizeof(most)); /* connect(2)'s too */
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &most, sizeof(most));
	return fd;
}

static int call(const char *address, int port)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(port) };
	int fd = patient(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));

	inet_pton(AF_INET, address, &at.sin_addr);
	if (fd < 0 || connect(fd, (struct sockaddr *)&at, sizeof(at)))
		return -1;
	return fd;
}

static int call_vsock(int port)
{
	struct sockaddr_vm at = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port };
	int fd = patient(socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0));

	if (fd < 0 || connect(fd, (struct sockaddr *)&at, sizeof(at)))
		return -1;
	return fd;
}

static int put(int fd, unsigned long size)
{
	while (size) {
		ssize_t n = write(fd, buffer(), size < PIECE ? size : PIECE);

		if (n <= 0)
			return -1;
		size -= n;
	}
	return 0;
}

static int echo(void)
{
	int fd = strcmp(words[1], "vsock") ? call(words[2], number(3)) : call_vsock(number(2));
	ssize_t n;

	if (fd < 0)
		return -1;
	while ((n = read(fd, buffer(), PIECE)) > 0)
		for (ssize_t done = 0; done < n;) {
			ssize_t w = write(fd, buffer() + done, n - done);

			if (w < 0)
				return -1;
			done += w;
		}
	close(fd);
	return n < 0 ? -1 : 0;
}

static int send_stream(void)
{
	int fd = call(words[1], number(2));
	double started = now();

	if (fd < 0)
		return -1;
	if (put(fd, number(3)) || read(fd, buffer(), 1) != 1) {
		close(fd);
		return -1;
	}
	printf("offmap-probe: = %.0f\n", now() - started);
	close(fd);
	return 0;
}

struct node {
	struct node *next;
	char rest_of_cache_line[64 - sizeof(void *)];
};

static int chase(void)
{
	static struct node *nodes, *at;
	static size_t size;
	unsigned long steps = number(2);
	uint32_t many = number(1) / sizeof(*nodes), *order;

	if (size != number(1)) { /* one cycle through all nodes (Sattolo), the same in every guest */
		if (nodes)
			munmap(nodes, size);
		size = number(1);
		nodes = at = memory(size);
		order = memory(many * sizeof(*order));
		if (!nodes || !order)
			return -1;
		state = 0x9e3779b97f4a7c15;
		for (uint32_t i = 0; i < many; i++)
			order[i] = i;
		for (uint32_t i = many - 1; i > 0; i--) {
			uint32_t other = next_random() % i, kept = order[i];

			order[i] = order[other];
			order[other] = kept;
		}
		for (uint32_t i = 0; i < many; i++)
			nodes[order[i]].next = &nodes[order[(i + 1) % many]];
		munmap(order, many * sizeof(*order));
	}
	double started = now();

	for (unsigned long i = 0; i < steps; i++)
		at = at->next;
	__asm__ volatile("" : "+r"(at)); /* it is used */
	printf("offmap-probe: = %.4f\n", (now() - started) * 1e3 / steps);
	return 0;
}

static int copy(void)
{
	static char *from, *to;
	static size_t size;

	if (size != number(1)) {
		size = number(1);
		from = memory(size);
		to = memory(size);
		if (!from || !to)
			return -1;
		memset(from, 1, size);
	}
	double started = now();

	for (int times = number(2); times > 0; times--) {
		memcpy(to, from, size);
		__asm__ volatile("" : : "r"(to) : "memory");
	}
	printf("offmap-probe: = %.0f\n", now() - started);
	return 0;
}

static uint64_t *pattern;
static size_t pattern_words;

static int fill(void)
{
	pattern_words = number(1) / sizeof(*pattern);
	pattern = memory(number(1));
	if (!pattern)
		return -1;
	state = 0x2545f4914f6cdd1d;
	for (size_t i = 0; i < pattern_words; i++)
		pattern[i] = next_random();
	return 0;
}

static int check(void)
{
	size_t wrong = 0;

	state = 0x2545f4914f6cdd1d;
	for (size_t i = 0; i < pattern_words; i++)
		wrong += pattern[i] != next_random();
	printf("offmap-probe: = %zu %zu\n", wrong, pattern_words);
	return 0;
}

static int cpus(void)
{
	cpu_set_t all, one;

	if (sched_getaffinity(0, sizeof(all), &all))
		return -1;
	printf("offmap-probe: =");
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &all))
			continue;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		if (sched_setaffinity(0, sizeof(one), &one))
			return -1;
		printf(" %d", sched_getcpu());
	}
	printf("\n");
	return sched_setaffinity(0, sizeof(all), &all);
}

static int cpuid(void)
{
	unsigned int a, b, c, d;

	__cpuid_count(number(1), 0, a, b, c, d);
	printf("offmap-probe: = %u %u %u %u\n", a, b, c, d);
	return 0;
}

static int msr(void)
{
	int out = !strcmp(words[0], "wrmsr");
	int fd = open("/dev/cpu/0/msr", (out ? O_WRONLY : O_RDONLY) | O_CLOEXEC);
	uint64_t value = number(2);
	ssize_t n;

	if (fd < 0)
		return -1;
	n = out ? pwrite(fd, &value, sizeof(value), number(1)) : pread(fd, &value, sizeof(value), number(1));
	close(fd);
	if (n != sizeof(value))
		return -1;
	printf("offmap-probe: = %llu\n", (unsigned long long)value);
	return 0;
}

static long long stolen(void) /* clock ticks, of all CPUs: proc_stat(5) */
{
	long long ticks = 0;
	FILE *file = fopen("/proc/stat", "re");

	if (file) {
		if (fscanf(file, "cpu %*d %*d %*d %*d %*d %*d %*d %lld", &ticks) != 1)
			ticks = 0;
		fclose(file);
	}
	return ticks;
}

static int burn(void)
{
	long long before = stolen();
	double end = now() + number(1) * 1e3;

	while (now() < end)
		;
	printf("offmap-probe: = %lld\n", stolen() - before);
	return 0;
}

static int clock_now(void)
{
	printf("offmap-probe: = %.0f\n", now());
	return 0;
}

static const struct {
	const char *name;
	int (*run)(void);
} commands[] = {
	{ "load", load }, { "disk", disk }, { "read", timed_disk }, { "write", timed_disk },
	{ "echo", echo }, { "send", send_stream }, { "chase", chase }, { "copy", copy },
	{ "fill", fill }, { "check", check }, { "cpus", cpus }, { "cpuid", cpuid },
	{ "rdmsr", msr }, { "wrmsr", msr }, { "burn", burn }, { "clock", clock_now },
};

static int obey(char *line)
{
	if (!strncmp(line, "sh ", 3)) {
		int status = system(line + 3);

		errno = status ? ECHILD : 0;
		return status;
	}
	for (char *word = strtok(line, " "); word && count < 15; word = strtok(NULL, " "))
		words[count++] = word;
	if (!count)
		return 0;
	for (size_t i = 0; i < sizeof(commands) / sizeof(*commands); i++)
		if (!strcmp(words[0], commands[i].name))
			return commands[i].run();
	errno = ENOSYS;
	return -1;
}

int main(void)
{
	static char line[1024];
	struct termios terminal;

	if (!tcgetattr(0, &terminal)) {
		terminal.c_lflag &= ~(ECHO | ECHONL);
		tcsetattr(0, TCSANOW, &terminal);
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("offmap-probe: done 0 here\n");
	while (fgets(line, sizeof(line), stdin)) {
		line[strcspn(line, "\n")] = 0;
		count = 0;
		errno = 0;
		if (obey(line))
			printf("offmap-probe: done %d %s\n", errno ? errno : EIO, strerror(errno ? errno : EIO));
		else
			printf("offmap-probe: done 0\n");
	}
	return 0;
}
