"""One of several workers: ``python -m selftune.search PAYLOAD NUMBER``, started by ``select``."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from selftune.search._workers import Payload, work


def main() -> None:
    """Run trials until there are enough."""
    payload: Payload = pickle.loads(Path(sys.argv[1]).read_bytes())
    work(payload, payload.open(int(sys.argv[2])))


if __name__ == "__main__":
    main()
