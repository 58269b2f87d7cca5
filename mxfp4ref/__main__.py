"""`python -m mxfp4ref`."""

from mxfp4ref.cli import main

if __name__ == "__main__":
    main()
