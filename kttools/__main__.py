"""python -m kttools"""

import sys

from .cli import main

sys.exit(main())
