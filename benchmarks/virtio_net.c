/*
 * One TCP stream, timed by whoever waits for it: the host's program of virtio_net.py, and the only one of its guest.
 *
 *   virtio_net serve PORT BYTES COUNT     host: COUNT times, accept, read a letter, and
 *                                         'u': read BYTES;  'd': write BYTES and read one byte; print letter and seconds
 *   virtio_net client ADDRESS PORT BYTES LETTERS
 *                                         guest: connect once for each of LETTERS and do its part
 *   virtio_net                            guest, as init: load the modules of /modules/order, take the address
 *                                         OFFMAP_ADDRESS of its environment, run the client, power off
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static char buffer[1 << 18];

static void die(const char *what)
{
	printf("offmap-benchmark: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	if (getpid() == 1)
		reboot(RB_POWER_OFF);
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void put(int fd, long long left)
{
	while (left > 0) {
		ssize_t n = write(fd, buffer, left < (long long)sizeof(buffer) ? left : (long long)sizeof(buffer));

		if (n <= 0)
			die("write");
		left -= n;
	}
}

static void get(int fd, long long left)
{
	while (left > 0) {
		ssize_t n = read(fd, buffer, left < (long long)sizeof(buffer) ? left : (long long)sizeof(buffer));

		if (n <= 0)
			die("read");
		left -= n;
	}
}

static void serve(int port, long long bytes, int count)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(port) };
	int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listener, (struct sockaddr *)&at, sizeof(at)) || listen(listener, 4))
		die("listen");
	puts("ready");
	fflush(stdout);
	while (count--) {
		int fd = accept(listener, NULL, NULL);
		char letter;
		double start;

		if (fd < 0)
			die("accept");
		get(fd, 1);
		letter = buffer[0];
		start = now();
		if (letter == 'u') {
			get(fd, bytes);
		} else {
			put(fd, bytes);
			get(fd, 1);
		}
		printf("%c %.6f\n", letter, now() - start);
		fflush(stdout);
		close(fd);
	}
}

static void client(const char *address, int port, long long bytes, const char *letters)
{
	for (; *letters; letters++) {
		struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
		int fd = socket(AF_INET, SOCK_STREAM, 0);

		inet_pton(AF_INET, address, &to.sin_addr);
		if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
			die("connect");
		if (write(fd, letters, 1) != 1)
			die("write");
		if (*letters == 'u') {
			put(fd, bytes);
			shutdown(fd, SHUT_WR);
			read(fd, buffer, 1); /* until the host has closed it */
		} else {
			get(fd, bytes);
			put(fd, 1);
		}
		close(fd);
	}
}

static void set_address(const char *name, const char *address)
{
	struct ifreq request = { 0 };
	struct sockaddr_in *in = (struct sockaddr_in *)&request.ifr_addr;
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	in->sin_family = AF_INET;
	inet_pton(AF_INET, address, &in->sin_addr);
	if (ioctl(fd, SIOCSIFADDR, &request))
		die("SIOCSIFADDR");
	inet_pton(AF_INET, "255.255.255.0", &in->sin_addr);
	if (ioctl(fd, SIOCSIFNETMASK, &request))
		die("SIOCSIFNETMASK");
	if (ioctl(fd, SIOCGIFFLAGS, &request))
		die("SIOCGIFFLAGS");
	request.ifr_flags |= IFF_UP;
	if (ioctl(fd, SIOCSIFFLAGS, &request))
		die("SIOCSIFFLAGS");
	close(fd);
}

static void load_modules(void)
{
	FILE *order = fopen("/modules/order", "r");
	char name[256], path[300];

	while (order && fscanf(order, "%255s", name) == 1) {
		int fd;

		snprintf(path, sizeof(path), "/modules/%s", name);
		fd = open(path, O_RDONLY);
		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
			die(name);
		close(fd);
	}
}

int main(int argc, char **argv)
{
	if (argc == 5 && !strcmp(argv[1], "serve")) {
		serve(atoi(argv[2]), atoll(argv[3]), atoi(argv[4]));
	} else if (argc == 6 && !strcmp(argv[1], "client")) {
		client(argv[2], atoi(argv[3]), atoll(argv[4]), argv[5]);
	} else if (getpid() == 1) {
		/* Words of the kernel's command line that it does not know are init's environment. */
		load_modules();
		set_address("eth0", getenv("OFFMAP_ADDRESS"));
		if (getenv("OFFMAP_SETTLE"))
			sleep(atoi(getenv("OFFMAP_SETTLE")));
		client(getenv("OFFMAP_HOST"), atoi(getenv("OFFMAP_PORT")), atoll(getenv("OFFMAP_BYTES")),
		       getenv("OFFMAP_LETTERS"));
		puts("offmap-benchmark: done");
		fflush(stdout);
		reboot(RB_POWER_OFF);
	} else {
		fprintf(stderr, "usage: see the source\n");
		return 2;
	}
	return 0;
}
