"""The command: `jaxrlhf` and `python -m jaxrlhf`. It imports nothing before Ctrl-C is answered with a message."""

import sys


def main() -> int:
    """Run the command of this process (`jaxrlhf.cli.main`); returns its exit code."""
    try:
        from jaxrlhf import cli

        return cli.main()
    except KeyboardInterrupt:  # while modules are imported, or an error is reported
        print("jaxrlhf: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
