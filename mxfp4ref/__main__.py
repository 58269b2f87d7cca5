"""`python -m mxfp4ref`."""

from mxfp4ref.conformance.cli import main

if __name__ == "__main__":
    main()
