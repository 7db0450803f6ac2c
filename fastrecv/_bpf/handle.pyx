"""What every handle on a kernel object shares: the error funnel, the descriptor, pins.

Every failure of a call into libbpf leaves through `error`: a BpfError with errno, what was tried, what to do, and all that
libbpf and the verifier printed meanwhile.
"""

import os
import warnings

from fastrecv.errors import BpfError

from cpython.exc cimport PyErr_CheckSignals
from fastrecv._bpf.libbpf cimport (
    BPF_F_RDONLY,
    bpf_obj_get_opts,
    bpf_obj_pin,
    get_pinned,
    libbpf_version_string,
)
from libc.errno cimport EINTR, EPERM
from libc.string cimport memset


cdef extern from *:
    """
    #include <bpf/libbpf.h>
    #include <stdarg.h>
    #include <stdio.h>
    #include <stdlib.h>

    /* What libbpf says, the verifier's log included, collects here for the exception of the call that failed. */
    static __thread char *log_text;
    static __thread size_t log_used, log_room;

    static int log_print(enum libbpf_print_level level, const char *format, va_list arguments)
    {
        va_list again;
        char *larger;
        int length;

        if (level == LIBBPF_DEBUG)
            return 0;
        va_copy(again, arguments);
        length = vsnprintf(NULL, 0, format, again);
        va_end(again);
        if (length < 0 || length > 1 << 24)
            return 0;
        if (log_used + length + 1 > log_room) {
            larger = realloc(log_text, 2 * (log_used + length + 1));
            if (!larger)
                return 0;
            log_text = larger;
            log_room = 2 * (log_used + length + 1);
        }
        log_used += vsnprintf(log_text + log_used, log_room - log_used, format, arguments);
        return length;
    }

    static void log_install(void) { libbpf_set_print(log_print); }
    static void log_clear(void) { log_used = 0; }
    """
    const char *log_text
    size_t log_used
    void log_install() nogil
    void log_clear() nogil

log_install()

LIBBPF_VERSION = libbpf_version_string().decode().lstrip("v")

_CURES = {
    EPERM: "run as root, or with CAP_BPF and CAP_NET_ADMIN",
}


cdef object error(int code, str tried):
    """The funnel: what to raise for errno `code` after `tried` failed."""
    log = log_text[:log_used].decode("utf-8", "replace") if log_used else ""
    log_clear()
    if code == EINTR:
        PyErr_CheckSignals()
    reason = "not supported by this map or kernel" if code == ENOTSUPP else os.strerror(code)
    message = f"{tried}: {reason}"
    if code in _CURES:
        message += f" ({_CURES[code]})"
    return BpfError(code, message, log)


cdef void forget_log() noexcept:
    """Drop what earlier, successful calls printed."""
    log_clear()


cdef int check(int result, str tried) except -1:
    """Pass on what libbpf 1.x returned (>= 0), or raise for the negative errno."""
    if result < 0:
        raise error(-result, tried)
    return result


cdef class Descriptor:
    """A file descriptor that names one kernel object: closed once, a warning when it was forgotten."""

    def __cinit__(self, *arguments):
        self.fd = -1  # a constructor that fails must not leave 0 to be closed

    cdef int alive(self) except -1:
        if self.fd < 0:
            raise ValueError(f"{type(self).__name__} is closed")
        return self.fd

    def fileno(self):
        return self.alive()

    def pin(self, path):
        """Keep the object in bpffs under `path` beyond the life of this process."""
        cdef bytes encoded = os.fsencode(path)
        cdef const char *name = encoded
        cdef int fd = self.alive(), result
        with nogil:
            result = bpf_obj_pin(fd, name)
        check(result, f"pinning to {os.fsdecode(path)}")

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self):
        self.alive()
        return self

    def __exit__(self, *exception):
        self.close()

    def __del__(self):
        if self.fd >= 0:
            warnings.warn(f"unclosed {type(self).__name__}, fd {self.fd}", ResourceWarning, source=self)
            self.close()


cdef int open_pin(path, bint read_only=False) except -1:
    cdef bytes encoded = os.fsencode(path)
    cdef const char *name = encoded
    cdef bpf_obj_get_opts opts
    cdef int result
    memset(&opts, 0, sizeof(opts))
    opts.sz = sizeof(opts)
    opts.file_flags = BPF_F_RDONLY if read_only else 0
    with nogil:
        result = get_pinned(name, &opts)
    return check(result, f"opening the pin {os.fsdecode(path)}")
