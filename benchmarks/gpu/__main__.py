"""`python -m benchmarks.gpu`."""

from benchmarks.gpu.cli import app

if __name__ == "__main__":
    app()
