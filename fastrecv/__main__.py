"""`fastrecv` and `python -m fastrecv`: says in one line what is missing when the commands cannot even be imported."""

from __future__ import annotations

import sys


def main() -> int:
    try:
        from fastrecv.cli.main import run  # noqa: PLC0415 - the commands' libraries are an extra
    except ImportError as error:
        if error.name and error.name.startswith("fastrecv"):
            reason = str(error)
        else:
            reason = f"the commands need {error.name}: pip install 'fastrecv[cli]'"
        print(f"fastrecv: {reason}", file=sys.stderr)
        return 77
    return run()


if __name__ == "__main__":
    sys.exit(main())
