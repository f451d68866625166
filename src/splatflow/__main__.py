"""`python -m splatflow` is the command line."""

import sys

from splatflow.cli import main

sys.exit(main())
