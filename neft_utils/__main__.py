"""`python -m neft_utils`: the commands behind make."""

import sys

from neft_utils.make.commands import main

if __name__ == "__main__":
    sys.exit(main())
