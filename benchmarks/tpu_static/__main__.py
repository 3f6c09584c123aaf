"""`python -m benchmarks.tpu_static`."""

from benchmarks.tpu_static.cli import app

if __name__ == "__main__":
    app()
