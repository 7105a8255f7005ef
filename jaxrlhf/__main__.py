"""The command: `jaxrlhf` and `python -m jaxrlhf`. The rest of the package is imported where Ctrl-C is handled."""

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
