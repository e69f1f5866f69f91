"""One of several workers: ``python -m selftune.search NUMBER``, started by ``select``."""

from __future__ import annotations

import mmap
import pickle
import sys

from selftune.search._workers import Payload, work


def main() -> None:
    """Run trials until there are enough."""
    # Standard input is a file that all workers share, so it is mapped and not read.
    with mmap.mmap(sys.stdin.fileno(), 0, access=mmap.ACCESS_READ) as held:
        payload: Payload = pickle.loads(held)
    work(payload, payload.open(int(sys.argv[1])))


if __name__ == "__main__":
    main()
