"""``python -m cnsdiff_dist``, which is what torchrun launches."""

from cnsdiff_dist.cli import entry

if __name__ == "__main__":
    entry()
