"""`python -m morph`."""

from morph.cli import main

if __name__ == "__main__":
    main()
