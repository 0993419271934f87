/*
 * The load client: thousands of websocket clients in one process, at the lowest possible cost.
 *
 *     clients PORT PATH SUBPROTOCOL OPENINGS
 *
 * OPENINGS is a file with a line for each client: the text frames that it sends, separated by tabs. It sends the first
 * after the handshake and all others when the first is answered. A client is open when each frame has been answered
 * by a `welcome` or a `subscribed`. A client with an empty line sends nothing. SUBPROTOCOL "-" means none.
 *
 * The process reads commands from stdin, one a line, and answers on stdout with one JSON object a line:
 *
 *     open N    open the next N clients; answered when all of them are open
 *     connect N the same, but each keeps back what follows its first frame; answered when the first are answered
 *     ask       send at once what all clients have kept back; not answered
 *     until N   answered when all clients together have received N rows
 *     pause     read nothing until `gather`; answered
 *     gather N  read once something has arrived for each client, and then as for `until`; the answer says when the last
 *               of it had arrived. Until then the processors belong to the server
 *     mark      report what has been received so far
 *     forget    discard the latencies recorded so far; not answered
 *
 * A row is `"content":"@<microseconds since 1970>` anywhere in a frame: that is how every peer sends a message of the
 * bench. Latency is the time from that timestamp until the bytes were read. Rows are counted for all clients, and
 * latencies recorded for the first SAMPLED. Any error ends the process with exit code 1 and a line on stderr.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { LOOK = 200000, /* nanoseconds between two looks for what has arrived */ };
enum { CHUNK = 256 * 1024, CARRY = 64, SAMPLED = 16, AT_ONCE = 64, SOURCES = 16, PEEK = 125, REQUEST = 1024 };
enum state { CLOSED, SHAKING, OPENING, HOLDING, OPEN };

static const char MARKER[] = "\"content\":\"@";
enum { MARKER_BYTES = sizeof MARKER - 1, ROW_BYTES = MARKER_BYTES + 20 };

struct client {
    int fd;
    enum state state;
    char *opening;          /* the frames that it has not sent yet */
    uint32_t unanswered;    /* frames that it has sent */
    char *head;             /* the response to the handshake, until it is complete */
    uint32_t head_bytes;
    uint64_t left;          /* missing bytes of the current frame */
    uint8_t header[10], header_bytes, opcode;
    uint8_t peek[PEEK], peek_bytes;     /* the beginning of its payload */
    uint8_t carry[CARRY], carry_bytes;  /* the end of the last read, which may contain the beginning of a row */
    uint8_t unread;         /* something has arrived that is to be read later */
};

static struct client *clients;
static uint32_t known, begun, opened, to_open;
static int readiness, holding, paused;
static struct sockaddr_in server;
static char request[REQUEST];
static uint64_t rows, frames, bytes, goal, last_read;
static uint32_t *samples;
static size_t sample_count, sample_room;
static uint8_t buffer[CARRY + CHUNK];

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void sample(uint64_t microseconds)
{
    if (sample_count == sample_room) {
        sample_room = sample_room ? sample_room * 2 : 65536;
        samples = realloc(samples, sample_room * sizeof *samples);
        if (!samples)
            fail("out of memory");
    }
    samples[sample_count++] = microseconds < UINT32_MAX ? (uint32_t)microseconds : UINT32_MAX;
}

/* Count the rows in data, which begins with the bytes carried over. Carries over what may be the start of another. */
static void count_rows(struct client *c, const uint8_t *data, size_t size, uint64_t wall)
{
    size_t from = 0, keep = size < MARKER_BYTES - 1 ? 0 : size - (MARKER_BYTES - 1);
    for (;;) {
        const uint8_t *at = memchr(data + from, '@', size - from);
        if (!at)
            break;
        size_t place = (size_t)(at - data);
        from = place + 1;
        if (place < MARKER_BYTES - 1 || memcmp(at - (MARKER_BYTES - 1), MARKER, MARKER_BYTES))
            continue;
        if (size - place < ROW_BYTES - MARKER_BYTES) { /* digits are missing */
            keep = place - (MARKER_BYTES - 1);
            break;
        }
        rows++;
        if (from > keep)
            keep = from;
        if (c - clients < SAMPLED) {
            uint64_t stamp = 0;
            for (const uint8_t *d = at + 1; *d >= '0' && *d <= '9'; d++)
                stamp = stamp * 10 + (uint64_t)(*d - '0');
            sample(wall / 1000 > stamp ? wall / 1000 - stamp : 0);
        }
    }
    c->carry_bytes = (uint8_t)(size - keep);
    memcpy(c->carry, data + keep, c->carry_bytes);
}

static void put(struct client *c, const void *data, size_t size)
{
    if (send(c->fd, data, size, MSG_NOSIGNAL) != (ssize_t)size)
        fail("client %td cannot send: %s", c - clients, strerror(errno));
}

/* Build a masked frame. The masking key is 0, which RFC 6455 allows and which makes masking free. */
static size_t frame(uint8_t *out, uint8_t opcode, const void *payload, size_t size)
{
    size_t head = 2;
    out[0] = 0x80 | opcode;
    if (size < 126) {
        out[1] = 0x80 | (uint8_t)size;
    } else {
        out[1] = 0x80 | 126;
        out[2] = (uint8_t)(size >> 8);
        out[3] = (uint8_t)size;
        head = 4;
    }
    memset(out + head, 0, 4);
    memcpy(out + head + 4, payload, size);
    return head + 4 + size;
}

static void begin_clients(void);

static void mark_open(struct client *c, enum state state)
{
    c->state = state;
    if (++opened == to_open) {
        printf("{\"opened\":%u,\"at\":%llu}\n", opened, (unsigned long long)now(CLOCK_MONOTONIC));
        fflush(stdout);
    }
    begin_clients();
}

/* Send the next frame of the opening, or all that are left. */
static void send_opening(struct client *c, int all)
{
    size_t room = c->opening ? strlen(c->opening) + 16 : 0, size = 0;
    uint8_t *out = malloc(room * 2 + 16);
    if (!out)
        fail("out of memory");
    while (c->opening && *c->opening) {
        char *end = strchrnul(c->opening, '\t');
        size += frame(out + size, 1, c->opening, (size_t)(end - c->opening));
        c->opening = *end ? end + 1 : end;
        c->unanswered++;
        if (!all)
            break;
    }
    if (size)
        put(c, out, size);
    free(out);
}

static void answered(struct client *c)
{
    if (--c->unanswered)
        return;
    if (holding) {
        mark_open(c, HOLDING);
        return;
    }
    send_opening(c, 1);
    if (!c->unanswered)
        mark_open(c, OPEN);
}

static void ask(void)
{
    for (uint32_t i = 0; i < begun; i++)
        if (clients[i].state == HOLDING) {
            clients[i].state = OPEN;
            send_opening(&clients[i], 1);
        }
}

static int has_op(const struct client *c, const char *op)
{
    size_t size = strlen(op);
    return c->peek_bytes >= 7 + size && !memcmp(c->peek, "{\"op\":\"", 7) && !memcmp(c->peek + 7, op, size);
}

static void end_of_frame(struct client *c)
{
    uint8_t out[PEEK + 16];
    switch (c->opcode) {
    case 1:
        frames++;
        if (has_op(c, "error\""))
            fail("client %td got an error: %.*s", c - clients, c->peek_bytes, (char *)c->peek);
        if (c->state == OPENING && (has_op(c, "welcome\"") || has_op(c, "subscribed\"")))
            answered(c);
        break;
    case 8:
        fail("client %td was closed with %d: %.*s", c - clients,
             c->peek_bytes > 1 ? c->peek[0] << 8 | c->peek[1] : 1005, c->peek_bytes > 1 ? c->peek_bytes - 2 : 0,
             (char *)c->peek + 2);
        break;
    case 9:
        put(c, out, frame(out, 10, c->peek, c->peek_bytes));
        break;
    }
}

static void take_frames(struct client *c, const uint8_t *data, size_t size)
{
    while (size) {
        if (!c->left) {
            c->header[c->header_bytes++] = *data++;
            size--;
            uint8_t form = c->header_bytes > 1 ? c->header[1] : 0;
            uint8_t whole = form == 126 ? 4 : form == 127 ? 10 : 2;
            if (c->header_bytes < whole)
                continue;
            if (!(c->header[0] & 0x80) || form > 127)
                fail("client %td received a fragmented or masked frame", c - clients);
            c->opcode = c->header[0] & 15;
            c->left = form < 126 ? form : 0;
            for (int i = 2; i < whole; i++)
                c->left = c->left << 8 | c->header[i];
            c->peek_bytes = 0;
            if (c->left)
                continue;
        }
        size_t part = c->left < size ? (size_t)c->left : size;
        size_t peek = part < (size_t)(PEEK - c->peek_bytes) ? part : (size_t)(PEEK - c->peek_bytes);
        memcpy(c->peek + c->peek_bytes, data, peek);
        c->peek_bytes += (uint8_t)peek;
        c->left -= part;
        data += part;
        size -= part;
        if (!c->left) {
            c->header_bytes = 0;
            end_of_frame(c);
        }
    }
}

static void report_goal(void)
{
    if (goal && rows >= goal) {
        goal = 0;
        printf("{\"rows\":%llu,\"at\":%llu}\n", (unsigned long long)rows, (unsigned long long)last_read);
        fflush(stdout);
    }
}

static void take(struct client *c, uint8_t *data, size_t size, uint64_t wall)
{
    bytes += size;
    take_frames(c, data, size);
    memcpy(data - c->carry_bytes, c->carry, c->carry_bytes);
    count_rows(c, data - c->carry_bytes, size + c->carry_bytes, wall);
}

static void take_head(struct client *c, uint8_t *data, size_t size)
{
    if (!c->head && !(c->head = malloc(REQUEST + 1)))
        fail("out of memory");
    size_t part = size < (size_t)(REQUEST - c->head_bytes) ? size : (size_t)(REQUEST - c->head_bytes);
    memcpy(c->head + c->head_bytes, data, part);
    uint32_t before = c->head_bytes;
    c->head_bytes += (uint32_t)part;
    c->head[c->head_bytes] = 0;
    char *end = strstr(c->head, "\r\n\r\n");
    if (!end) {
        if (c->head_bytes == REQUEST)
            fail("client %td: the response to its handshake is too long", c - clients);
        return;
    }
    if (strncmp(c->head, "HTTP/1.1 101", 12))
        fail("client %td was refused: %.*s", c - clients, (int)strcspn(c->head, "\r"), c->head);
    size_t used = (size_t)(end + 4 - c->head) - before;
    free(c->head);
    c->head = NULL;
    c->state = OPENING;
    send_opening(c, 0);
    if (!c->unanswered)
        mark_open(c, OPEN);
    if (size > used)
        take(c, data + used, size - used, now(CLOCK_REALTIME));
}

/* Read all that has arrived: the kernel says only once that something has. */
static void readable(struct client *c)
{
    uint8_t *data = buffer + CARRY;
    ssize_t size;
    do {
        size = recv(c->fd, data, CHUNK, 0);
        if (size < 0 && errno == EAGAIN)
            return;
        if (size <= 0)
            fail("client %td lost its connection: %s", c - clients, size ? strerror(errno) : "end of stream");
        last_read = now(CLOCK_MONOTONIC);
        if (c->state == SHAKING)
            take_head(c, data, (size_t)size);
        else
            take(c, data, (size_t)size, now(CLOCK_REALTIME));
        report_goal();
    } while (size == CHUNK);
}

static void gather(uint64_t number)
{
    struct timespec pause = {.tv_nsec = LOOK};
    struct epoll_event events[256];
    uint32_t waiting = opened;
    while (waiting) {
        nanosleep(&pause, NULL);
        int ready;
        do {
            ready = epoll_wait(readiness, events, 256, 0);
            for (int i = 0; i < ready; i++)
                if (events[i].data.u32 != UINT32_MAX && !clients[events[i].data.u32].unread) {
                    clients[events[i].data.u32].unread = 1;
                    waiting--;
                }
        } while (ready == 256);
    }
    uint64_t arrived = now(CLOCK_MONOTONIC);
    for (uint32_t i = 0; i < opened; i++) {
        clients[i].unread = 0;
        readable(&clients[i]);
    }
    if (rows >= number)
        last_read = arrived;
    paused = 0;
    goal = number;
    report_goal();
}

/* Connect from one of several loopback addresses, since the ports of one would not suffice. */
static void begin(struct client *c)
{
    struct sockaddr_in source = {.sin_family = AF_INET};
    int on = 1;
    source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + (uint32_t)((c - clients) % SOURCES));
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0)
        fail("no socket for client %td: %s", c - clients, strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    if (bind(c->fd, (struct sockaddr *)&source, sizeof source) ||
        connect(c->fd, (struct sockaddr *)&server, sizeof server))
        fail("client %td cannot connect: %s", c - clients, strerror(errno));
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u32 = (uint32_t)(c - clients)};
    if (epoll_ctl(readiness, EPOLL_CTL_ADD, c->fd, &event))
        fail("epoll: %s", strerror(errno));
    c->state = SHAKING;
    put(c, request, strlen(request));
}

static void begin_clients(void)
{
    while (begun < to_open && begun - opened < AT_ONCE)
        begin(&clients[begun++]);
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static double percentile(double share)
{
    return sample_count ? samples[(size_t)(share * (double)(sample_count - 1))] / 1e6 : 0;
}

static void mark(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    qsort(samples, sample_count, sizeof *samples, compare);
    printf("{\"clients\":%u,\"rows\":%llu,\"frames\":%llu,\"bytes\":%llu,\"at\":%llu,\"cpu\":%.6f,"
           "\"sampled\":%zu,\"p50\":%.6f,\"p90\":%.6f,\"p99\":%.6f,\"worst\":%.6f}\n",
           opened, (unsigned long long)rows, (unsigned long long)frames, (unsigned long long)bytes,
           (unsigned long long)last_read,
           (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
               (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6,
           sample_count, percentile(0.5), percentile(0.9), percentile(0.99), percentile(1));
    fflush(stdout);
}

static void command(char *line)
{
    unsigned long long number = 0;
    if (sscanf(line, "open %llu", &number) == 1 || sscanf(line, "connect %llu", &number) == 1) {
        if (!number || opened + number > known)
            fail("cannot open %llu more of %u clients, of which %u are open", number, known, opened);
        to_open = opened + (uint32_t)number;
        holding = line[0] == 'c';
        begin_clients();
    } else if (sscanf(line, "until %llu", &number) == 1) {
        goal = number ? number : 1;
        report_goal();
    } else if (!strcmp(line, "pause")) {
        paused = 1;
        printf("{\"paused\":true}\n");
        fflush(stdout);
    } else if (sscanf(line, "gather %llu", &number) == 1) {
        gather(number);
    } else if (!strcmp(line, "ask")) {
        ask();
    } else if (!strcmp(line, "mark")) {
        mark();
    } else if (!strcmp(line, "forget")) {
        sample_count = 0;
    } else {
        fail("not a command: %s", line);
    }
}

/* Run every command that has arrived on stdin. */
static void take_commands(void)
{
    static char waiting[4096];
    static size_t size;
    ssize_t got = read(0, waiting + size, sizeof waiting - 1 - size);
    if (got <= 0)
        exit(0);
    size += (size_t)got;
    waiting[size] = 0;
    char *line = waiting, *end;
    while ((end = strchr(line, '\n'))) {
        *end = 0;
        command(line);
        line = end + 1;
    }
    size -= (size_t)(line - waiting);
    memmove(waiting, line, size);
}

static void read_openings(const char *path)
{
    FILE *file = fopen(path, "r");
    size_t room = 0, space = 0;
    char *line = NULL;
    ssize_t size;
    if (!file)
        fail("%s: %s", path, strerror(errno));
    while ((size = getline(&line, &room, file)) >= 0) {
        if (size && line[size - 1] == '\n')
            line[size - 1] = 0;
        if (known == space) {
            space = space ? space * 2 : 1024;
            clients = realloc(clients, space * sizeof *clients);
        }
        if (!clients)
            fail("out of memory");
        memset(&clients[known], 0, sizeof *clients);
        clients[known++].opening = strdup(line);
    }
    free(line);
    fclose(file);
}

int main(int argc, char **argv)
{
    struct rlimit files;
    struct epoll_event events[256];
    char protocol[128] = "";
    if (argc != 5)
        fail("usage: %s PORT PATH SUBPROTOCOL OPENINGS", argv[0]);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1]))};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (strcmp(argv[3], "-"))
        snprintf(protocol, sizeof protocol, "Sec-WebSocket-Protocol: %s\r\n", argv[3]);
    if (snprintf(request, sizeof request,
                 "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n%s\r\n",
                 argv[2], argv[1], protocol) >= (int)sizeof request)
        fail("the path is too long");
    read_openings(argv[4]);
    readiness = epoll_create1(0);
    struct epoll_event input = {.events = EPOLLIN, .data.u32 = UINT32_MAX};
    epoll_ctl(readiness, EPOLL_CTL_ADD, 0, &input);
    for (;;) {
        while (paused)
            take_commands();
        int ready = epoll_wait(readiness, events, 256, -1);
        for (int i = 0; i < ready; i++) {
            if (events[i].data.u32 == UINT32_MAX)
                take_commands();
            else
                readable(&clients[events[i].data.u32]);
        }
    }
}
