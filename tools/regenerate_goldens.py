"""Write `goldens/` and the package's small suite from nothing, or check that they are what would be written.

python tools/regenerate_goldens.py            # write
python tools/regenerate_goldens.py --check    # compare byte for byte; exit code 1 and a list if they differ
python tools/regenerate_goldens.py --only 'gemm/*'
"""

import sys

from mxfp4ref.regenerate import main

if __name__ == "__main__":
    sys.exit(main())
