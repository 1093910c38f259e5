"""`python -m alloy`, which torchrun also uses."""

from alloy.cli import main

if __name__ == "__main__":
    main()
