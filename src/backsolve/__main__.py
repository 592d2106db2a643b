"""The command line: `python -m backsolve diagnose package.module:inverse --input x.npy`."""

import sys

from backsolve._diagnose.command import main

if __name__ == "__main__":
    sys.exit(main())
