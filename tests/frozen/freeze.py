"""Writes the trajectories of all jobs anew: ``python -m tests.frozen.freeze``."""

import json

from tests.frozen.jobs import FILES, JOBS, run


def main() -> None:
    for driver, path in FILES.items():
        names = [name for name in JOBS if name.startswith(f"{driver}/")]
        found = {name.removeprefix(f"{driver}/"): run(name) for name in names}
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
