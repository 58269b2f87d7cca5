"""Write `goldens/` and the package's small suite from nothing, or check that they are what would be written.

python tools/tables/regenerate_goldens.py            # write
python tools/tables/regenerate_goldens.py --check    # compare byte for byte; exit code 1 and a list if they differ
python tools/tables/regenerate_goldens.py --only 'gemm/*'
"""

import sys

from mxfp4ref.goldens.writing import main

if __name__ == "__main__":
    sys.exit(main())
