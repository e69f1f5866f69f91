"""Workers of a search.

``python -m selftune.search worker --storage ADDRESS SCRIPT …`` runs a script as an additional
worker of its search; ``python -m selftune.search NUMBER`` is started by ``select`` itself.
"""

from __future__ import annotations

import argparse
import mmap
import pickle
import sys
from pathlib import Path

from selftune.search._workers import Payload, join, work


def main() -> None:
    """Run a worker."""
    if sys.argv[1:] and sys.argv[1].isdecimal():
        # Standard input is a file that all workers share, so it is mapped and not read.
        with mmap.mmap(sys.stdin.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            payload: Payload = pickle.loads(mapped)
        work(payload, payload.open(int(sys.argv[1])))
        return
    parser = argparse.ArgumentParser(prog="python -m selftune.search")
    worker = parser.add_subparsers(required=True).add_parser(
        "worker", help="run a script as an additional worker of its search"
    )
    worker.add_argument("--storage", required=True, help="path or URL of the search's storage")
    worker.add_argument("script", help="a Python file that calls selftune.search.select")
    worker.add_argument("rest", nargs=argparse.REMAINDER, help="script arguments")
    args = parser.parse_args()
    if not Path(args.script).is_file():
        parser.error(f"{args.script}: no such file")
    join(args.storage, args.script, args.rest)


if __name__ == "__main__":
    main()
