/*
 * The floor: the cost of sending the same bytes to the same number of sockets, without anything else.
 *
 *     floor CLIENTS BYTES JOINED RATE EVENTS
 *
 * Prints {"port":P}, accepts CLIENTS websocket clients, prints {"clients":CLIENTS}, and waits for a line on stdin.
 * Then, EVENTS times at RATE a second (0: at full speed), it sends each client JOINED text frames of BYTES bytes in
 * one send(). Finally it prints {"cpu":SECONDS,"sent":FRAMES}, its CPU time for the sending alone, and waits for the
 * end of stdin. Each frame contains a row as clients.c counts it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static const char ANSWER[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

static void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static double cpu(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static int accept_client(int listening)
{
    char request[4096];
    size_t size = 0;
    int on = 1, fd = accept(listening, NULL, NULL);
    if (fd < 0)
        fail("accept");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    do {
        ssize_t got = recv(fd, request + size, sizeof request - 1 - size, 0);
        if (got <= 0)
            fail("the handshake");
        size += (size_t)got;
        request[size] = 0;
    } while (!strstr(request, "\r\n\r\n"));
    if (send(fd, ANSWER, sizeof ANSWER - 1, MSG_NOSIGNAL) < 0)
        fail("the handshake");
    return fd;
}

static void send_all(int fd, const char *data, size_t size)
{
    while (size) {
        ssize_t sent = send(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) {
            struct pollfd room = {.fd = fd, .events = POLLOUT};
            poll(&room, 1, -1);
        } else if (sent < 0) {
            fail("send");
        } else {
            data += sent;
            size -= (size_t)sent;
        }
    }
}

int main(int argc, char **argv)
{
    struct rlimit files;
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t length = sizeof address;
    if (argc != 6) {
        fprintf(stderr, "usage: %s CLIENTS BYTES JOINED RATE EVENTS\n", argv[0]);
        return 1;
    }
    int clients = atoi(argv[1]), joined = atoi(argv[3]), events = atoi(argv[5]);
    size_t bytes = (size_t)atoi(argv[2]), head = bytes < 126 + 2 ? 2 : 4;
    double rate = atof(argv[4]);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (bytes < 64 || bytes > 65535) {
        fprintf(stderr, "a frame has 64 to 65535 bytes\n");
        return 1;
    }
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listening = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listening, (struct sockaddr *)&address, sizeof address) || listen(listening, 4096) ||
        getsockname(listening, (struct sockaddr *)&address, &length))
        fail("listen");
    printf("{\"port\":%d}\n", ntohs(address.sin_port));
    fflush(stdout);
    int *sockets = calloc((size_t)clients, sizeof *sockets);
    for (int i = 0; i < clients; i++)
        sockets[i] = accept_client(listening);
    printf("{\"clients\":%d}\n", clients);
    fflush(stdout);
    if (getchar() == EOF)
        return 0;

    char *frames = malloc(bytes * (size_t)joined + 1);
    struct timespec next, wall;
    clock_gettime(CLOCK_MONOTONIC, &next);
    double before = cpu();
    for (int event = 0; event < events; event++) {
        clock_gettime(CLOCK_REALTIME, &wall);
        for (int j = 0; j < joined; j++) {
            char *frame = frames + (size_t)j * bytes;
            size_t payload = bytes - head;
            memset(frame, ' ', bytes);
            frame[0] = (char)0x81;
            frame[1] = head == 2 ? (char)payload : 126;
            if (head == 4) {
                frame[2] = (char)(payload >> 8);
                frame[3] = (char)payload;
            }
            int text = snprintf(frame + head, payload, "{\"content\":\"@%llu ",
                                (unsigned long long)wall.tv_sec * 1000000u + (unsigned long long)wall.tv_nsec / 1000);
            frame[head + (size_t)text] = ' '; /* replaces the terminating NUL */
            memcpy(frame + bytes - 2, "\"}", 2);
        }
        for (int i = 0; i < clients; i++)
            send_all(sockets[i], frames, bytes * (size_t)joined);
        if (rate > 0) {
            next.tv_nsec += (long)(1e9 / rate);
            next.tv_sec += next.tv_nsec / 1000000000;
            next.tv_nsec %= 1000000000;
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
        }
    }
    printf("{\"cpu\":%.6f,\"sent\":%lld}\n", cpu() - before, (long long)events * joined * clients);
    fflush(stdout);
    while (getchar() != EOF)
        ;
    return 0;
}
