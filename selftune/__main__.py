"""``python -m selftune`` is the console command ``selftune``."""

import sys

from selftune.cli import main

sys.exit(main())
