/* A long link between two network namespaces: rate, delay, loss and a queue, which the kernel may not have (netem).
 *
 *     long_link NAMESPACE_A NAMESPACE_B
 *
 * makes a tun device `eth0` in each, and then obeys lines on its standard input: "MBIT DELAY_MS LOSS QUEUE_KB". Each
 * direction has the rate (0: unlimited), the one-way delay, the probability with which it loses a packet, and a queue
 * that drops what does not fit. It answers each line with the packets that it has carried, lost and dropped since the
 * line before, and ends when its input does.
 *
 * The devices segment for TCP, as network cards do: a sender hands over up to 64 KB at once. Here such a piece counts
 * as the packets that it would be on a wire, each of which may be lost by itself; what is left on both sides of a gap
 * goes on as pieces of its own. So a fraction of a core carries what would take more than one packet by packet.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define VNET sizeof(struct virtio_net_hdr)
#define LARGEST (65536 + 256)
#define BATCH 32
enum { FIN = 0x01, PSH = 0x08, CWR = 0x80 };

struct packet {
    struct packet *next;
    double due;
    size_t size; /* of data: the virtio header, then the packet */
    unsigned char data[];
};

struct direction {
    int from, to;
    struct packet *first, **last;
    double free_at; /* when the link has sent all that it has accepted */
};

static double rate, delay, loss, queue; /* bytes a second, seconds, probability, bytes */
static unsigned long carried, lost, dropped;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static int open_device(const char *namespace) {
    char path[256];
    snprintf(path, sizeof path, "/var/run/netns/%s", namespace);
    int handle = open(path, O_RDONLY);
    if (handle < 0 || setns(handle, CLONE_NEWNET)) return perror(path), -1;
    close(handle);
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK), header = VNET;
    struct ifreq request = {.ifr_name = "eth0", .ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR};
    if (device < 0 || ioctl(device, TUNSETIFF, &request) || ioctl(device, TUNSETVNETHDRSZ, &header) ||
        ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6))
        return perror("/dev/net/tun"), -1;
    return device;
}

static uint16_t checksum(const unsigned char *bytes, size_t size) {
    uint32_t sum = 0;
    for (size_t i = 0; i < size; i += 2) sum += bytes[i] << 8 | bytes[i + 1];
    while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
    return htons(~sum & 0xffff);
}

static void put16(unsigned char *at, unsigned value) { at[0] = value >> 8, at[1] = value; }

static void put32(unsigned char *at, uint32_t value) { put16(at, value >> 16), put16(at + 2, value & 0xffff); }

static uint32_t get32(const unsigned char *at) {
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static void enqueue(struct direction *d, struct packet *packet, double due) {
    packet->due = due, packet->next = NULL;
    *d->last = packet, d->last = &packet->next;
}

/* Segments `begin` to `end` of a piece, as a piece of its own. The transport's checksum is left: the kernel neither
 * computes nor verifies it between namespaces. */
static void forward(struct direction *d, const unsigned char *piece, size_t size, size_t header, unsigned segment,
                    unsigned begin, unsigned end, double due) {
    size_t start = header + (size_t)begin * segment, stop = header + (size_t)end * segment;
    if (stop > size) stop = size;
    struct packet *packet = malloc(sizeof *packet + VNET + header + stop - start);
    packet->size = VNET + header + stop - start;
    memcpy(packet->data, piece - VNET, VNET + header);
    memcpy(packet->data + VNET + header, piece + start, stop - start);
    unsigned char *ip = packet->data + VNET;
    struct virtio_net_hdr *vnet = (void *)packet->data;
    unsigned char *tcp = ip + vnet->csum_start;
    if (ip[0] >> 4 == 4) {
        put16(ip + 2, header + stop - start);
        put16(ip + 4, (ip[4] << 8 | ip[5]) + begin);
        put16(ip + 10, 0);
        uint16_t sum = checksum(ip, (ip[0] & 15) * 4);
        memcpy(ip + 10, &sum, 2);
    } else {
        put16(ip + 4, header + stop - start - 40);
    }
    put32(tcp + 4, get32(tcp + 4) + begin * segment);
    if (begin) tcp[13] &= ~CWR;
    if (stop < size) tcp[13] &= ~(FIN | PSH);
    if (end - begin == 1) vnet->gso_type = VIRTIO_NET_HDR_GSO_NONE, vnet->gso_size = 0;
    enqueue(d, packet, due);
}

/* Let the link take a packet of this size; whether it arrives. */
static int accept_packet(struct direction *d, double t, size_t size) {
    if (d->free_at < t) d->free_at = t;
    if (rate && (d->free_at - t) * rate + size > queue) return dropped++, 0;
    if (rate) d->free_at += size / rate;
    if (loss && drand48() < loss) return lost++, 0;
    return carried++, 1;
}

static void take(struct direction *d, double t) {
    static unsigned char buffer[VNET + LARGEST];
    for (int i = 0; i < BATCH; i++) {
        ssize_t got = read(d->from, buffer, sizeof buffer);
        if (got <= (ssize_t)VNET) return;
        const unsigned char *piece = buffer + VNET;
        const struct virtio_net_hdr *vnet = (void *)buffer;
        size_t size = got - VNET;
        if (vnet->gso_type == VIRTIO_NET_HDR_GSO_NONE) {
            if (!accept_packet(d, t, size)) continue;
            struct packet *packet = malloc(sizeof *packet + got);
            packet->size = got;
            memcpy(packet->data, buffer, got);
            enqueue(d, packet, d->free_at + delay);
            continue;
        }
        size_t header = vnet->csum_start + (piece[vnet->csum_start + 12] >> 4) * 4;
        unsigned segment = vnet->gso_size, count = (size - header + segment - 1) / segment, begin = 0;
        for (unsigned k = 0; k < count; k++) {
            size_t payload = k + 1 < count ? segment : size - header - (size_t)k * segment;
            double due = d->free_at + delay;
            if (accept_packet(d, t, header + payload)) continue;
            if (begin < k) forward(d, piece, size, header, segment, begin, k, due);
            begin = k + 1;
        }
        if (begin < count) forward(d, piece, size, header, segment, begin, count, d->free_at + delay);
    }
}

static double deliver(struct direction *d, double t) {
    while (d->first) {
        struct packet *packet = d->first;
        if (packet->due > t) return packet->due;
        if (write(d->to, packet->data, packet->size) < 0) { /* as a card whose host is too slow */
            dropped++;
        }
        if (!(d->first = packet->next)) d->last = &d->first;
        free(packet);
    }
    return t + 1;
}

static int obey(void) {
    char line[256];
    ssize_t got = read(0, line, sizeof line - 1);
    if (got <= 0) return 0;
    line[got] = 0;
    double mbit, milliseconds, kilobytes;
    if (sscanf(line, "%lf %lf %lf %lf", &mbit, &milliseconds, &loss, &kilobytes) != 4) return 0;
    rate = mbit * 1e6 / 8, delay = milliseconds * 1e-3, queue = kilobytes * 1024;
    printf("%lu %lu %lu\n", carried, lost, dropped);
    fflush(stdout);
    carried = lost = dropped = 0;
    return 1;
}

int main(int count, char **arguments) {
    if (count != 3) return fprintf(stderr, "usage: long_link NAMESPACE NAMESPACE\n"), 2;
    int one = open_device(arguments[1]), other = open_device(arguments[2]);
    if (one < 0 || other < 0) return 1;
    struct direction there = {one, other, NULL, NULL, 0}, back = {other, one, NULL, NULL, 0};
    there.last = &there.first, back.last = &back.first;
    struct sched_param priority = {.sched_priority = 1}; /* a link does not wait for the machine's processes */
    sched_setscheduler(0, SCHED_RR, &priority);
    srand48(7);
    for (;;) {
        double t = now();
        take(&there, t), take(&back, t);
        double next = deliver(&there, t), other_next = deliver(&back, t);
        double wait = (next < other_next ? next : other_next) - now();
        struct pollfd files[] = {{0, POLLIN, 0}, {one, POLLIN, 0}, {other, POLLIN, 0}};
        struct timespec left = {0, wait > 0 ? (wait < 1 ? wait : 0.999) * 1e9 : 0};
        ppoll(files, 3, &left, NULL);
        if (files[0].revents && !obey()) return 0;
    }
}
