"""Write `goldens/` from nothing, or check that it is what would be written: `mxfp4ref regenerate` as a script.

python tools/tables/regenerate_goldens.py            # write
python tools/tables/regenerate_goldens.py --check    # compare byte for byte; exit code 1 and a list if they differ
python tools/tables/regenerate_goldens.py --only 'gemm/*'
"""

from mxfp4ref.conformance.cli.goldens import regenerate

if __name__ == "__main__":
    regenerate()
