"""``python -m flowgrpo``, for launchers such as torchrun."""

import sys

from flowgrpo.cli import main

sys.exit(main())
