"""Run the launcher: `python -m megatron_let.launch [torchrun arguments] script [script arguments]`."""

import sys

from megatron_let.launch.launcher import main

if __name__ == "__main__":
    sys.exit(main())
