# What fastrecv uses of libxdp (API of 1.2), of <linux/if_xdp.h> and of the C library: declarations only; and the checksums.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <linux/if_xdp.h>
    #include <pthread.h>
    #include <sys/epoll.h>
    #include <sys/socket.h>
    #include <time.h>
    #include <xdp/libxdp.h>
    #include <xdp/xsk.h>
    """

cdef extern from *:
    void fetch "__builtin_prefetch" (const void *at) nogil

cdef extern from "<linux/if_xdp.h>" nogil:
    enum:
        XDP_COPY
        XDP_ZEROCOPY
        XDP_USE_NEED_WAKEUP
        XDP_STATISTICS
        XDP_OPTIONS
        XDP_OPTIONS_ZEROCOPY

    struct xdp_desc:
        uint64_t addr
        uint32_t len
        uint32_t options

    struct xdp_options:
        uint32_t flags

    struct xdp_statistics:
        uint64_t rx_dropped
        uint64_t rx_invalid_descs
        uint64_t tx_invalid_descs
        uint64_t rx_ring_full
        uint64_t rx_fill_ring_empty_descs
        uint64_t tx_ring_empty_descs

cdef extern from "<xdp/xsk.h>" nogil:
    enum:
        XSK_LIBXDP_FLAGS__INHIBIT_PROG_LOAD

    struct xsk_umem:
        pass
    struct xsk_socket:
        pass
    struct xsk_ring_prod:
        pass
    struct xsk_ring_cons:
        pass

    struct xsk_umem_config:
        uint32_t fill_size
        uint32_t comp_size
        uint32_t frame_size
        uint32_t frame_headroom
        uint32_t flags

    struct xsk_socket_config:
        uint32_t rx_size
        uint32_t tx_size
        uint32_t libxdp_flags
        uint32_t xdp_flags
        uint16_t bind_flags

    int xsk_umem__create(xsk_umem **umem, void *area, uint64_t size, xsk_ring_prod *fill, xsk_ring_cons *comp,
                         const xsk_umem_config *config)
    int xsk_umem__delete(xsk_umem *umem)
    int xsk_socket__create_shared(xsk_socket **xsk, const char *name, uint32_t queue, xsk_umem *umem, xsk_ring_cons *rx,
                                  xsk_ring_prod *tx, xsk_ring_prod *fill, xsk_ring_cons *comp,
                                  const xsk_socket_config *config)
    void xsk_socket__delete(xsk_socket *xsk)
    int xsk_socket__fd(const xsk_socket *xsk)

    uint64_t *xsk_ring_prod__fill_addr(xsk_ring_prod *fill, uint32_t index)
    xdp_desc *xsk_ring_prod__tx_desc(xsk_ring_prod *tx, uint32_t index)
    const uint64_t *xsk_ring_cons__comp_addr(const xsk_ring_cons *comp, uint32_t index)
    const xdp_desc *xsk_ring_cons__rx_desc(const xsk_ring_cons *rx, uint32_t index)
    uint32_t xsk_prod_nb_free(xsk_ring_prod *ring, uint32_t count)
    uint32_t xsk_ring_prod__reserve(xsk_ring_prod *ring, uint32_t count, uint32_t *index)
    void xsk_ring_prod__submit(xsk_ring_prod *ring, uint32_t count)
    int xsk_ring_prod__needs_wakeup(const xsk_ring_prod *ring)
    uint32_t xsk_ring_cons__peek(xsk_ring_cons *ring, uint32_t count, uint32_t *index)
    void xsk_ring_cons__release(xsk_ring_cons *ring, uint32_t count)

cdef extern from "<xdp/libxdp.h>" nogil:
    void *libxdp_set_print(void *printer)

cdef extern from "<sys/epoll.h>" nogil:
    enum:
        EPOLLIN
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD

    struct epoll_event:
        uint32_t events

    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event)

cdef extern from "<linux/membarrier.h>" nogil:
    enum:
        MEMBARRIER_CMD_GLOBAL

cdef extern from "<sys/syscall.h>" nogil:
    enum:
        SYS_membarrier

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)

cdef extern from "<sys/socket.h>" nogil:
    ssize_t recvfrom(int fd, void *data, size_t size, int flags, void *name, void *length)
    ssize_t sendto(int fd, const void *data, size_t size, int flags, const void *name, unsigned int length)
    int SOL_XDP, SO_ERROR

cdef extern from "<time.h>" nogil:
    struct now_timespec "timespec":
        long tv_sec
        long tv_nsec
    int CLOCK_REALTIME
    int clock_gettime(int clock, now_timespec *now)

cdef extern from "frame.h" nogil:
    enum:
        TAKEN
        FRAME_UDP
        FRAME_IP4
        FRAME_IP6

    struct frame:
        const uint8_t *network
        const uint8_t *transport
        uint16_t vlan
        uint16_t length
        uint16_t port
        uint8_t version
        uint8_t tos

    uint16_t frame_word(const uint8_t *at)
    int frame_parse(const uint8_t *at, const uint8_t *end, uint32_t size, frame *parsed)

cdef extern from *:
    """
    #include <arpa/inet.h>
    #include <string.h>

    /* One's complement sum of 16-bit words in memory order (RFC 1071), eight bytes at a time; an odd byte is padded. */
    static inline uint64_t checksum_add(uint64_t sum, uint64_t word)
    {
        sum += word;
        return sum + (sum < word);
    }

    static inline uint64_t checksum_of(const uint8_t *at, size_t size, uint64_t sum)
    {
        uint64_t word = 0;

        for (; size >= 8; at += 8, size -= 8) {
            memcpy(&word, at, 8);
            sum = checksum_add(sum, word);
        }
        if (size) {
            word = 0;
            memcpy(&word, at, size);
            sum = checksum_add(sum, word);
        }
        return sum;
    }

    static inline uint16_t checksum_folded(uint64_t sum)
    {
        sum = (sum & 0xffffffff) + (sum >> 32);
        sum = (sum & 0xffffffff) + (sum >> 32);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        return (uint16_t)sum;
    }

    /* Of the pseudo header: RFC 768; RFC 8200, 8.1. The addresses stand beside each other. */
    static inline uint64_t checksum_pseudo(const struct frame *frame, uint16_t length)
    {
        uint64_t sum = (uint64_t)htons(17) + htons(length);

        return frame->version == 6 ? checksum_of(frame->network + 8, 32, sum) : checksum_of(frame->network + 12, 8, sum);
    }

    /* Whether the checksum of the datagram is right, or there is none. */
    static inline int checksum_right(const struct frame *frame, int partial)
    {
        uint64_t pseudo;
        uint16_t field;

        memcpy(&field, frame->transport + 6, 2);
        if (!field) /* IPv4: the parser takes no such IPv6 */
            return 1;
        pseudo = checksum_pseudo(frame, frame->length);
        if (partial && checksum_folded(pseudo) == field)
            return 1;
        return checksum_folded(checksum_of(frame->transport, frame->length, pseudo)) == 0xffff;
    }
    """
    uint64_t checksum_of(const uint8_t *at, size_t size, uint64_t total) nogil
    uint16_t checksum_folded(uint64_t total) nogil
    uint64_t checksum_pseudo(const frame *parsed, uint16_t length) nogil
    bint checksum_right(const frame *parsed, bint partial) nogil
