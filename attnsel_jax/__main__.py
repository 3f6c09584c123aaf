"""`python -m attnsel_jax` is the console script `attnsel`."""

from attnsel_jax.cli import main

if __name__ == "__main__":
    main()
