"""`python -m fastrecv.bench`: says in one line what is missing when the bench cannot even be imported."""

from __future__ import annotations

import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is set up yet: a Ctrl-C while importing just ends it
try:
    from fastrecv.bench.cli import main
except ImportError as error:
    if error.name and error.name.startswith("fastrecv"):
        reason = str(error)
    else:
        reason = f"the bench needs {error.name}: pip install 'fastrecv[bench]'"
    print(f"fastrecv.bench: {reason}", file=sys.stderr)
    sys.exit(77)
signal.signal(signal.SIGINT, signal.default_int_handler)

sys.exit(main())
