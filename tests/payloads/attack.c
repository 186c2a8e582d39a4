/*
 * A guest that attacks its VMM: a virtio-mmio driver that does to each device what the fuzzers in tests/fuzz do, through
 * KVM, for ever. It needs no Linux and starts in milliseconds.
 *
 * On the serial port it says U when it is up, a dot for each 16 rounds, and ! if it finds in its memory what the guest
 * beside it has filled its own with (monitor.S, letter f).
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define MIB (1ul << 20)
#define DEVICES 0xd0000000ul /* offmap.devices.virtio.bus.VIRTIO_MMIO_BASE */
#define MOST_DEVICES 16
#define MOST_QUEUES 16
#define RINGS (32 * MIB) /* a span for each queue */
#define SPAN 0x10000ul
#define AVAIL 0x2000ul
#define USED 0x4000ul
#define TABLES 0x8000ul
#define BUFFERS (40 * MIB)
#define BUFFER_BYTES (4 * MIB)
#define GIVEN (48 * MIB) /* what the balloon gives away: no code, no ring */
#define PATTERN 0x5ec2e7005ec2e700ul
#define CMDLINE 0x20000ul

/* linux/virtio_mmio.h */
enum {
	MAGIC = 0, DEVICE_ID = 8, DRIVER_FEATURES = 0x20, DRIVER_FEATURES_SEL = 0x24, DEVICE_FEATURES = 0x10,
	DEVICE_FEATURES_SEL = 0x14, QUEUE_SEL = 0x30, QUEUE_NUM_MAX = 0x34, QUEUE_NUM = 0x38, QUEUE_READY = 0x44,
	QUEUE_NOTIFY = 0x50, INTERRUPT_ACK = 0x64, STATUS = 0x70, QUEUE_DESC = 0x80, QUEUE_AVAIL = 0x90,
	QUEUE_USED = 0xa0, CONFIG = 0x100,
};
enum { NET = 1, BLOCK = 2, CONSOLE = 3, RNG = 4, BALLOON = 5, VSOCK = 19 };
enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };

struct descriptor { u64 addr; u32 len; u16 flags, next; };

struct queue {
	u64 base;
	u32 size, free, table;
	u16 idx;
};

static u64 state;
static u64 devices[MOST_DEVICES];
static u32 found;
static struct queue queues[MOST_QUEUES];
static struct descriptor chain[512];
static u32 links;
static u64 fill; /* where the next buffer is, in bytes of BUFFERS */

static u32 dice(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state >> 16;
}

static u32 below(u32 count) { return dice() % count; }
static int rarely(u32 times) { return !below(times); }

static void out8(u16 port, u8 value) { asm volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }

static u8 in8(u16 port)
{
	u8 value;
	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static u32 get(u64 address) { return *(volatile u32 *)address; }
static void put(u64 address, u32 value) { *(volatile u32 *)address = value; }
static void put16(u64 address, u16 value) { *(volatile u16 *)address = value; }
static void barrier(void) { asm volatile("mfence" : : : "memory"); }

void *memset(void *to, int value, u64 count)
{
	for (u8 *at = to; count--; at++)
		*(volatile u8 *)at = value;
	return to;
}

static const u64 odd[] = { 0, 1, 0xfff, 0x1000, 0x7000, RINGS, RINGS + AVAIL, RINGS + USED, DEVICES, 64 * MIB - 1,
			   64 * MIB, 128 * MIB - 1, 3ul << 30, 1ul << 32, ~0ul, ~0ul - 15, 0xfee00000ul };
static const u32 lengths[] = { 0, 1, 7, 16, 512, 4096, 65536, 1 << 20, 16 << 20, 0x7fffffff, 0xffffffff };

#define SOME(of) ((of)[below(sizeof(of) / sizeof((of)[0]))])

static void piece(const void *data, u32 size, u16 flags)
{
	if (links == 512)
		return;
	if (fill + size > BUFFER_BYTES)
		fill = 0;
	if (size > BUFFER_BYTES)
		size = BUFFER_BYTES;
	if (data)
		for (u32 at = 0; at < size; at++)
			*(volatile u8 *)(BUFFERS + fill + at) = ((const u8 *)data)[at];
	chain[links++] = (struct descriptor){ BUFFERS + fill, size, flags, 0 };
	fill += size;
}

static u32 shape(void) /* bytes of a buffer; now and then very many */
{
	return rarely(64) ? BUFFER_BYTES : rarely(8) ? 65536 : below(4096);
}

static void block(void)
{
	u64 header[2] = { below(6) == 5 ? dice() : SOME(((u32[]){ 0, 0, 1, 1, 4, 8, 11, 13 })), rarely(8) ? state : below(256) };
	u32 kind = header[0], ranges = kind == 11 ? 1 + below(64) : 1 + below(2);

	piece(header, 16, 0);
	if (kind == 11 || kind == 13)
		for (; ranges--;) {
			u32 range[4] = { below(2048), 0, rarely(4) ? dice() : below(2048), rarely(8) ? dice() : below(2) };
			piece(range, 16, 0);
		}
	else if (kind != 4)
		piece(0, 512 * below(rarely(16) ? 8192 : 64), kind == 1 ? 0 : WRITE);
	piece(0, 1, WRITE);
}

static void vsock(u32 queue)
{
	u8 header[44] = { 0 };
	u32 size = rarely(3) ? below(65536) : 0;

	if (queue == 0) {
		piece(0, 64 + below(4096), WRITE);
		return;
	}
	*(u64 *)header = rarely(16) ? dice() : 3;
	*(u64 *)(header + 8) = 2;
	*(u32 *)(header + 16) = below(64);
	*(u32 *)(header + 20) = SOME(((u32[]){ 1000, 1001, 1000, 70 }));
	*(u32 *)(header + 24) = rarely(16) ? dice() : size;
	*(u16 *)(header + 28) = rarely(16) ? dice() : 1;
	*(u16 *)(header + 30) = size ? 5 : below(9);
	*(u32 *)(header + 32) = below(4);
	*(u32 *)(header + 36) = rarely(8) ? dice() : 1 << 18;
	*(u32 *)(header + 40) = rarely(8) ? dice() : 0;
	piece(header, rarely(16) ? below(44) : 44, 0);
	if (size)
		piece(0, size, 0);
}

static void console(u32 queue)
{
	if (queue == 3) {
		u16 message[4] = { below(4), 0, SOME(((u16[]){ 0, 3, 6, 6, 1, 9 })), below(2) };
		piece(message, 8, 0);
	} else if (queue % 2) {
		piece(0, below(512), 0);
	} else {
		piece(0, 64 + below(512), WRITE);
	}
}

static void net(u32 queue)
{
	if (queue == 0) {
		piece(0, rarely(4) ? below(4096) : 2048, WRITE);
	} else if (queue == 2) {
		u8 command[8] = { below(5), below(7), 2, 0, 0, 0, 0, 1 };
		piece(command, rarely(8) ? below(8) : 8, 0);
		piece(0, 1, WRITE);
	} else {
		u8 header[12] = { below(4), rarely(4) ? dice() : 0, rarely(4) ? dice() : 0 };
		piece(header, 12, 0);
		piece(0, rarely(8) ? shape() : 60 + below(1500), 0);
	}
}

static void balloon(u32 queue)
{
	u32 pages[256], count = 1 + below(256);

	if (queue >= 2) {
		chain[links++] = (struct descriptor){ GIVEN + 4096 * below(1024), 4096 << below(8), WRITE, 0 };
		return;
	}
	for (u32 at = 0; at < count; at++)
		pages[at] = rarely(512) ? dice() : GIVEN / 4096 + below(2048);
	piece(pages, 4 * count - rarely(64), 0);
}

static void content(u32 device, u32 queue)
{
	links = 0;
	/* A balloon takes any number for a page's, and this program's pages have small ones. */
	switch (rarely(32) && device != BALLOON ? 0 : device) {
	case BLOCK: block(); return;
	case VSOCK: vsock(queue); return;
	case CONSOLE: console(queue); return;
	case NET: net(queue); return;
	case BALLOON: balloon(queue); return;
	case RNG:
		for (u32 count = 1 + below(rarely(32) ? 500 : 4); count--;)
			piece(0, shape(), WRITE);
		return;
	default:
		for (u32 count = 1 + below(rarely(32) ? 500 : 6); count--;)
			piece(0, shape(), rarely(2) ? WRITE : 0);
	}
}

static void add(struct queue *queue, u32 device, u32 number)
{
	u32 wrong = rarely(12) ? 1 + below(9) : 0, head, first, at, chosen;
	struct descriptor *table;

	content(device, number);
	if (links > queue->size)
		links = queue->size;
	chosen = below(links);
	if (wrong == 1)
		chain[chosen].addr = SOME(odd);
	else if (wrong == 2)
		chain[chosen].len = SOME(lengths);
	else if (wrong == 3)
		chain[chosen].addr = RINGS + below(SPAN * 2);
	else if (wrong == 4)
		chain[chosen].flags ^= WRITE;
	if (links <= 512 && !rarely(3)) {
		head = queue->free;
		queue->free = (head + 1) % queue->size;
		first = 0;
		table = (void *)(queue->base + TABLES + (queue->table++ % 4) * 0x2000);
		((struct descriptor *)queue->base)[head] = (struct descriptor){
			(u64)table, 16 * links + (wrong == 5 ? below(17) : 0), INDIRECT, 0 };
	} else {
		if (queue->free + links > queue->size)
			queue->free = 0;
		head = first = queue->free;
		queue->free = (head + links) % queue->size;
		table = (struct descriptor *)queue->base + head;
	}
	for (at = 0; at < links; at++) {
		table[at] = chain[at];
		table[at].next = first + at + 1;
		if (table[at].addr < RINGS && (wrong == 6 || table[at].flags & WRITE))
			table[at].addr += RINGS; /* it shall not write to this program */
		if (at + 1 < links)
			table[at].flags |= NEXT;
		if (at == chosen && wrong == 6)
			table[at].flags = dice();
		if (at == chosen && wrong == 7) {
			table[at].flags |= NEXT;
			table[at].next = below(queue->size);
		}
	}
	put16(queue->base + AVAIL + 4 + 2 * (queue->idx % queue->size), wrong == 8 ? dice() : head);
	queue->idx += wrong == 9 ? dice() : 1;
	barrier();
	put16(queue->base + AVAIL + 2, queue->idx);
}

static u32 set_up(u64 device)
{
	u32 count = 0, size, most, wrong = rarely(12) ? 1 + below(6) : 0;

	put(device + STATUS, 0);
	put(device + STATUS, 1);
	put(device + STATUS, 3);
	for (u32 word = 0; word < 2; word++) {
		put(device + DEVICE_FEATURES_SEL, word);
		put(device + DRIVER_FEATURES_SEL, word);
		put(device + DRIVER_FEATURES, get(device + DEVICE_FEATURES) & (rarely(2) ? ~0u : dice() | word));
	}
	put(device + STATUS, 11);
	for (; count < MOST_QUEUES; count++) {
		struct queue *queue = &queues[count];
		put(device + QUEUE_SEL, count);
		most = get(device + QUEUE_NUM_MAX);
		if (!most)
			break;
		for (size = 1 << (2 + below(8)); size > most;)
			size /= 2;
		queue->base = RINGS + count * SPAN;
		queue->size = size;
		queue->free = queue->table = queue->idx = 0;
		put(queue->base + AVAIL, 0);
		put(queue->base + USED, 0);
		put(device + QUEUE_NUM, wrong == 1 ? dice() : size);
		put(device + QUEUE_DESC, wrong == 2 ? dice() : queue->base);
		put(device + QUEUE_AVAIL, wrong == 3 ? dice() : queue->base + AVAIL);
		put(device + QUEUE_USED, wrong == 4 ? dice() : queue->base + USED);
		put(device + QUEUE_DESC + 4, 0);
		put(device + QUEUE_AVAIL + 4, wrong == 5 ? dice() : 0);
		put(device + QUEUE_USED + 4, 0);
		if (!(wrong == 6 && rarely(4)))
			put(device + QUEUE_READY, 1);
	}
	put(device + STATUS, 15);
	return count;
}

static void legacy(void) /* any port, but those that end this guest */
{
	static const u16 ports[] = { 0x3f9, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x70, 0x71, 0x40, 0x61, 0x80, 0xcf8 };
	u16 port = SOME(ports);

	if (rarely(2))
		in8(port);
	else
		out8(port, dice());
	out8(0x3fb, 3); /* no DLAB: what is said is heard */
	out8(0x3fc, 0x0b);
}

static void round_(void)
{
	u64 device = devices[below(found)];
	u32 id, count, steps = 1 + below(24);

	id = get(device + DEVICE_ID);
	count = set_up(device);
	while (count && steps--) {
		u32 number = below(count), what = below(100);
		struct queue *queue = &queues[number];
		if (what < 70) {
			for (u32 some = 1 + below(8); some--;)
				add(queue, id, number);
			put(device + QUEUE_NOTIFY, number);
		} else if (what < 80) { /* the rings change while the device reads them */
			put(device + QUEUE_NOTIFY, number);
			for (u32 times = below(256); times--;) {
				u32 at = below(rarely(2) ? 0x100 : TABLES / 2);
				if (at % 8 != 1) /* the part of an address that would lead it to this program */
					put16(queue->base + 2 * at, SOME(((u16[]){ 0, 1, 2, 3, 4, 0xffff })));
			}
		} else if (what < 85) {
			put(device + 4 * below(0x42), rarely(2) ? dice() : below(16));
		} else if (what < 90) {
			put(device + CONFIG + 4 * below(8), dice());
		} else if (what < 92) {
			*(volatile u16 *)(device + below(0x200)) = dice();
		} else if (what < 95) {
			put(device + INTERRUPT_ACK, 3);
		} else if (what < 98) {
			legacy();
		} else {
			put(device + STATUS, 0);
			break;
		}
	}
}

#define PARTS 64

static int seen(u64 part) /* looks at one line in 16 of a part */
{
	u64 start = BUFFERS + part * (BUFFER_BYTES / PARTS);

	for (u64 *at = (u64 *)start; at < (u64 *)(start + BUFFER_BYTES / PARTS); at += 128)
		if (*at == PATTERN)
			return 1;
	return 0;
}

static void say(u8 what)
{
	out8(0x3f8, what);
	out8(0x3f8, '\n');
}

void _start(void)
{
	const u8 *at = (const u8 *)CMDLINE;
	u32 low, high;

	asm volatile("rdtsc" : "=a"(low), "=d"(high));
	state = ((u64)high << 32 | low) | 1;
	if (at[0] == 's' && at[1] == 'e' && at[2] == 'e' && at[3] == 'd')
		for (state = 1; *at && *at != ' '; at++) /* "seed=…": the same again */
			state = state * 31 + *at;
	for (u64 device = DEVICES; device < DEVICES + 0x1000 * MOST_DEVICES; device += 0x1000)
		if (get(device + MAGIC) == 0x74726976)
			devices[found++] = device;
	out8(0x70, 0); /* set the clock, which few guests do */
	out8(0x71, 0x12);
	say('U');
	for (u64 rounds = 1;; rounds++) {
		round_();
		if (rounds % 16 == 0)
			say(seen(rounds / 16 % PARTS) ? '!' : '.');
	}
}
