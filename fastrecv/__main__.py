"""`fastrecv` and `python -m fastrecv`: says in one line what is missing when the commands cannot even be imported."""

from __future__ import annotations

import os
import sys


def main() -> int:
    try:
        from fastrecv.cli.main import run  # noqa: PLC0415 - the commands' libraries are an extra
        from fastrecv.privileges import ALONE, OtherThreadsError  # noqa: PLC0415 - the same
    except ImportError as error:
        return _missing(error)
    try:
        return run()
    except ImportError as error:  # a command is imported when it is called
        return _missing(error)
    except OtherThreadsError:
        if os.environ.items() >= ALONE.items():
            raise
        # numpy has started threads for its linear algebra, which would keep every capability: over again, without.
        try:
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | ALONE)  # noqa: S606
        except OSError as error:
            variables = " ".join(f"{name}={value}" for name, value in ALONE.items())
            print(f"fastrecv: {sys.executable}: {error.strerror}; set {variables}, or let this user execute it",
                  file=sys.stderr)  # fmt: skip
            return 77


def _missing(error: ImportError) -> int:
    if error.name and error.name.startswith("fastrecv"):
        reason = str(error)
    else:
        reason = f"the commands need {error.name}: pip install 'fastrecv[cli]'"
    print(f"fastrecv: {reason}", file=sys.stderr)
    return 77


if __name__ == "__main__":
    sys.exit(main())
