"""fastrecv: a Linux receive front end for Python.

So far: BPF through libbpf (`fastrecv.bpf`), what the kernel allows (`fastrecv.features`), and the flood bench
(`python -m fastrecv.bench`).
"""

from fastrecv.errors import BpfError, NotSupported

__all__ = ["BpfError", "NotSupported"]
