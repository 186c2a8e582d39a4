/*
 * nc over AF_VSOCK, for guests that have nothing of the kind: one connection, from and to standard input and output.
 *
 *   vsock_nc connect PORT     to the host's PORT
 *   vsock_nc listen PORT      until one connection has come and gone
 *   vsock_nc echo PORT N      N connections, each in a process of its own, each sent back what it sends
 */
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static char buffer[1 << 16];

static int copy(int from, int to)
{
	ssize_t n = read(from, buffer, sizeof(buffer)), done = 0;

	while (done < n) {
		ssize_t w = write(to, buffer + done, n - done);

		if (w < 0)
			return -1;
		done += w;
	}
	return n;
}

static int talk(int fd)
{
	struct pollfd fds[2] = { { .fd = 0, .events = POLLIN }, { .fd = fd, .events = POLLIN } };

	while (fds[1].fd >= 0) {
		if (poll(fds, 2, -1) < 0)
			return 1;
		if (fds[0].revents && copy(0, fd) <= 0) {
			shutdown(fd, SHUT_WR);
			fds[0].fd = -1;
		}
		if (fds[1].revents && copy(fd, 1) <= 0)
			fds[1].fd = -1;
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_vm at = { .svm_family = AF_VSOCK };
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0), count;

	if (argc < 3)
		return 2;
	at.svm_port = strtoul(argv[2], NULL, 10);
	if (!strcmp(argv[1], "connect")) {
		at.svm_cid = VMADDR_CID_HOST;
		if (connect(fd, (struct sockaddr *)&at, sizeof(at))) {
			perror("connect");
			return 1;
		}
		return talk(fd);
	}
	at.svm_cid = VMADDR_CID_ANY;
	if (bind(fd, (struct sockaddr *)&at, sizeof(at)) || listen(fd, 64)) {
		perror("listen");
		return 1;
	}
	if (!strcmp(argv[1], "listen"))
		return talk(accept(fd, NULL, NULL));
	for (count = atoi(argv[3]); count > 0; count--) {
		int peer = accept(fd, NULL, NULL);

		if (!fork()) {
			while (copy(peer, peer) > 0)
				;
			return 0;
		}
		close(peer);
	}
	while (wait(NULL) > 0)
		;
	return 0;
}
