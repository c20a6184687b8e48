"""Entry point of `python -m jest_bench`."""

from jest_bench.commands import app

if __name__ == "__main__":
    app(prog_name="python -m jest_bench")
