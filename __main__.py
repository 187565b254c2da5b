"""``python -m shoal`` is the command ``shoal``."""

import sys

from shoal.deploy.cli import main

sys.exit(main())
