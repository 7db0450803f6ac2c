"""Extern declarations of the C library and of Linux's UAPI, nothing else."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t


cdef extern from *:
    """
    #include <arpa/inet.h>
    #include <linux/errqueue.h>
    #include <linux/net_tstamp.h>
    #include <linux/sock_diag.h>
    #include <linux/time_types.h>
    #include <netinet/in.h>
    #include <netinet/udp.h>
    #include <poll.h>
    #include <sys/eventfd.h>
    #include <sys/mman.h>
    #include <sys/socket.h>
    #include <sys/un.h>
    #include <time.h>
    #include <stddef.h>
    #include <unistd.h>

    #define SUN_PATH offsetof(struct sockaddr_un, sun_path)
    """
    ctypedef unsigned int socklen_t
    ctypedef unsigned short sa_family_t

    cdef struct in_addr:
        uint32_t s_addr
    cdef struct in6_addr:
        uint8_t s6_addr[16]
    cdef struct sockaddr:
        sa_family_t sa_family
    cdef struct sockaddr_in:
        sa_family_t sin_family
        uint16_t sin_port
        in_addr sin_addr
    cdef struct sockaddr_in6:
        sa_family_t sin6_family
        uint16_t sin6_port
        uint32_t sin6_flowinfo
        in6_addr sin6_addr
        uint32_t sin6_scope_id
    cdef struct sockaddr_un:
        sa_family_t sun_family
        char sun_path[108]

    const size_t SUN_PATH

    cdef struct iovec:
        void *iov_base
        size_t iov_len
    cdef struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    cdef struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    cdef struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    cmsghdr *CMSG_FIRSTHDR(msghdr *message) nogil
    cmsghdr *CMSG_NXTHDR(msghdr *message, cmsghdr *part) nogil
    unsigned char *CMSG_DATA(cmsghdr *part) nogil
    size_t CMSG_SPACE(size_t length) nogil
    size_t CMSG_LEN(size_t length) nogil

    cdef struct timespec:
        long tv_sec
        long tv_nsec
    cdef struct __kernel_timespec:
        int64_t tv_sec
        long long tv_nsec
    cdef struct in_pktinfo:
        int ipi_ifindex
        in_addr ipi_spec_dst
        in_addr ipi_addr
    cdef struct in6_pktinfo:
        in6_addr ipi6_addr
        unsigned int ipi6_ifindex
    cdef struct sock_extended_err:
        uint32_t ee_errno
        uint8_t ee_origin
    cdef struct pollfd:
        int fd
        short events
        short revents

    int recvmmsg(int fd, mmsghdr *messages, unsigned int count, int flags, timespec *timeout) nogil
    ssize_t recvmsg(int fd, msghdr *message, int flags) nogil
    int sendmmsg(int fd, mmsghdr *messages, unsigned int count, int flags) nogil
    int ppoll(pollfd *fds, unsigned long count, const timespec *timeout, const void *signals) nogil
    int eventfd(unsigned int value, int flags) nogil
    int nanosleep(const timespec *time, timespec *left) nogil
    int close(int fd) nogil
    int getpid() nogil
    int getsockopt(int fd, int level, int name, void *value, socklen_t *size) nogil
    void *mmap(void *where, size_t size, int protection, int flags, int fd, long offset) nogil
    int mprotect(void *where, size_t size, int protection) nogil
    int munmap(void *where, size_t size) nogil
    uint16_t ntohs(uint16_t value) nogil
    uint16_t htons(uint16_t value) nogil
    uint32_t ntohl(uint32_t value) nogil
    const char *inet_ntop(int family, const void *address, char *text, socklen_t room) nogil

    int AF_UNIX, AF_INET, AF_INET6
    int SOL_SOCKET, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_UDP
    int MSG_DONTWAIT, MSG_TRUNC, MSG_CTRUNC, MSG_CMSG_CLOEXEC, MSG_ERRQUEUE, MSG_NOSIGNAL
    int IP_PKTINFO, IP_TOS, IP_RECVORIGDSTADDR
    int IPV6_PKTINFO, IPV6_TCLASS, IPV6_RECVORIGDSTADDR
    int SCM_RIGHTS, SO_EE_ORIGIN_LOCAL, SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6
    int IP_RECVERR, IPV6_RECVERR
    int SO_DOMAIN, SO_RXQ_OVFL, UDP_GRO, UDP_SEGMENT
    int SO_TIMESTAMPNS_OLD, SO_TIMESTAMPNS_NEW, SO_TIMESTAMPING_OLD, SO_TIMESTAMPING_NEW
    int POLLIN, POLLOUT, POLLERR, POLLRDHUP
    int EFD_CLOEXEC, EFD_NONBLOCK
    int PROT_NONE, PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    void *MAP_FAILED
