"""``python -m mimbench`` is the same command as ``mimbench``."""

from mimbench.cli import main

if __name__ == "__main__":
    main()
