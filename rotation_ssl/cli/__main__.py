"""python -m rotation_ssl.cli"""

import sys

from rotation_ssl.cli import main

sys.exit(main())
