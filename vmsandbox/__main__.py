"""`python -m vmsandbox`."""

from vmsandbox.cli.app import main

if __name__ == "__main__":
    main()
