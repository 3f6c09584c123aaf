"""The console script `attnsel`: one command per file, each a thin print of the library's answers.

Importing this imports no jax: every command imports what it needs when it runs, so that `--help`
is quick, and a question about a chip that is not here initialises no device.
"""

import typer

from attnsel_jax.cli.bench import bench
from attnsel_jax.cli.compare import compare
from attnsel_jax.cli.compile import compile_
from attnsel_jax.cli.devices import devices
from attnsel_jax.cli.matrix import matrix
from attnsel_jax.cli.select import select
from attnsel_jax.cli.terminal import EXIT_CODES, examples, one_line_warnings, whole_output

app = typer.Typer(
    name="attnsel",
    help="Attention backends for JAX: ask which one serves, see why, compare, measure, compile.\n\n"
    + EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command(
    epilog=examples(
        "attnsel devices",
        "attnsel devices --json",
    )
)(devices)
app.command(
    epilog=examples(
        "attnsel select --device h200 --head-size 128 --dtype bfloat16 --has-sliding-window",
        "attnsel select --device v6e --head-size 576 --dtype bfloat16 --use-mla --block-size 64",
        "attnsel select --head-size 128 --dtype float32 --op dense --needs-grad --backend CUDNN",
    )
)(select)
app.command(
    epilog=examples(
        "attnsel matrix",
        "attnsel matrix --markdown > backends.md",
        "attnsel matrix --write .      [dim]# docs/backends.md and the block in README.md[/dim]",
    )
)(matrix)
app.command(
    epilog=examples(
        "attnsel compare",
        "attnsel compare --quick --backend XLA --plot deviations.png",
        "attnsel compare --problem llama3 --problem 'gemma*' --json",
        "attnsel compare --random 200 --seed 7 --backend MOSAIC_TPU",
    )
)(compare)
app.command(
    epilog=examples(
        "attnsel bench --case dense_causal --case paged_decode",
        "attnsel bench --check --output results.json --plot results.png",
        "attnsel bench --case dense_causal_4096 --backend XLA_REFERENCE --rounds 3 --json",
    )
)(bench)
app.command(
    "compile",
    epilog=examples(
        "attnsel compile --device v5e --device v6e --problem llama3.decode",
        "attnsel compile --device h200 --op dense --q-len 8192 --num-heads 32 --gradients",
        "attnsel compile --device 7x --op paged --q-len 1 --kv-len 4096 --batch 32 --json",
    ),
)(compile_)


def main() -> None:
    """Runs the command line."""
    one_line_warnings()
    with whole_output():
        app(prog_name="attnsel")
