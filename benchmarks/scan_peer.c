/*
 * The peer of scan.py: pread stretches of a file and memcpy what was read, by one or more threads.
 *
 *     scan_peer FILE THREADS <STRETCHES      lines of "OFFSET BYTES", each at most 1 MiB; prints the seconds it took
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BUFFER (1 << 20)
#define MOST_THREADS 64

struct stretch {
	uint64_t offset, bytes;
};

static const char *path;
static struct stretch *stretches;
static size_t count;
static atomic_size_t next;

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static void *copy(void *unused)
{
	char *in = malloc(BUFFER), *out = malloc(BUFFER);
	int fd = open(path, O_RDONLY | O_CLOEXEC); /* each its own: /proc/kcore has a buffer for each open file */
	size_t index;

	(void)unused;
	if (!in || !out || fd < 0)
		die(path);
	memset(in, 1, BUFFER);
	memset(out, 1, BUFFER);
	while ((index = atomic_fetch_add(&next, 1)) < count) {
		uint64_t done = 0, bytes = stretches[index].bytes;

		while (done < bytes) {
			ssize_t got = pread(fd, in + done, bytes - done, stretches[index].offset + done);

			if (got <= 0)
				die("pread");
			done += got;
		}
		memcpy(out, in, bytes);
		/* or the compiler leaves the copy out */
		__asm__ volatile("" : : "r"(out) : "memory");
	}
	close(fd);
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[MOST_THREADS];
	struct timespec start, end;
	size_t room = 0;
	struct stretch one;
	int wanted, i;

	if (argc != 3 || (wanted = atoi(argv[2])) < 1 || wanted > MOST_THREADS)
		return 2;
	path = argv[1];
	while (scanf("%lu %lu", &one.offset, &one.bytes) == 2) {
		if (one.bytes > BUFFER)
			return 2;
		if (count == room) {
			room = room ? 2 * room : 1024;
			stretches = realloc(stretches, room * sizeof(one));
			if (!stretches)
				die("realloc");
		}
		stretches[count++] = one;
	}
	clock_gettime(CLOCK_MONOTONIC, &start);
	for (i = 1; i < wanted; i++)
		if (pthread_create(&threads[i], NULL, copy, NULL))
			die("pthread_create");
	copy(NULL);
	for (i = 1; i < wanted; i++)
		pthread_join(threads[i], NULL);
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%.9f\n", end.tv_sec - start.tv_sec + (end.tv_nsec - start.tv_nsec) / 1e9);
	return 0;
}
