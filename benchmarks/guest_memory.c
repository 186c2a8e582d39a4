/*
 * The guest of guest_memory.py, alone as its init: a pointer chase and a copy, then it powers off.
 *
 * Prints "offmap-benchmark: NAME VALUE", the best of some passes, as a stall of the host shows in the others.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <time.h>
#include <unistd.h>

#define CHASE_BYTES (64UL << 20)
#define COPY_BYTES (32UL << 20)
#define ALIGNMENT (2UL << 20)
#define PASSES 5

struct node {
	struct node *next;
	char rest_of_cache_line[64 - sizeof(void *)];
};

#define NODES (CHASE_BYTES / sizeof(struct node))

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void fail(const char *what)
{
	perror(what);
	sync();
	reboot(RB_POWER_OFF);
	exit(1);
}

/* @size bytes of populated memory, in pages of 2M or of 4K. */
static void *memory(size_t size, int huge)
{
	char *address = mmap(NULL, size + ALIGNMENT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (address == MAP_FAILED)
		fail("mmap");
	address = (char *)(((uintptr_t)address + ALIGNMENT - 1) & -ALIGNMENT);
	if (madvise(address, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE))
		fail("madvise");
	memset(address, 1, size);
	return address;
}

static uint64_t random_number(void)
{
	static uint64_t state = 0x9e3779b97f4a7c15; /* xorshift64: the same order in every guest */

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

/* Nanoseconds a step along one cycle through all nodes in random order (Sattolo's algorithm makes it one). */
static double chase(int huge)
{
	struct node *nodes = memory(CHASE_BYTES, huge);
	uint32_t *order = memory(NODES * sizeof(*order), 1);
	struct node *at = nodes;
	double best = 1e9;

	for (uint32_t i = 0; i < NODES; i++)
		order[i] = i;
	for (uint32_t i = NODES - 1; i > 0; i--) {
		uint32_t other = random_number() % i, kept = order[i];

		order[i] = order[other];
		order[other] = kept;
	}
	for (uint32_t i = 0; i < NODES; i++)
		nodes[order[i]].next = &nodes[order[(i + 1) % NODES]];
	for (int pass = 0; pass < PASSES; pass++) {
		double started = now();

		for (uint32_t i = 0; i < NODES; i++)
			at = at->next;
		__asm__ volatile("" : "+r"(at)); /* it is used */
		double spent = (now() - started) / NODES * 1e9;
		best = spent < best ? spent : best;
	}
	munmap(order, NODES * sizeof(*order));
	munmap(nodes, CHASE_BYTES);
	return best;
}

/* Seconds to copy a gigabyte (10^9 bytes). */
static double copy(void)
{
	char *from = memory(COPY_BYTES, 1), *to = memory(COPY_BYTES, 1);
	double best = 1e9;

	for (int pass = 0; pass < 2 * PASSES; pass++) {
		double started = now();

		memcpy(to, from, COPY_BYTES);
		__asm__ volatile("" : : "r"(to) : "memory");
		double spent = (now() - started) / COPY_BYTES * 1e9;
		best = spent < best ? spent : best;
	}
	return best;
}

int main(void)
{
	printf("offmap-benchmark: chase_4k %.3f\n", chase(0));
	printf("offmap-benchmark: chase_2m %.3f\n", chase(1));
	printf("offmap-benchmark: copy %.4f\n", copy());
	fflush(stdout);
	sync();
	reboot(RB_POWER_OFF);
	return 0;
}
