"""`python -m fastrecv.collector`: the same as `fastrecv collect`."""

from __future__ import annotations

import sys

from fastrecv.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "collect")
    sys.exit(main())
