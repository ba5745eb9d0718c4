"""Results as a table: on the terminal and in Markdown."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lvnas.evaluate import Result

COLUMNS = (
    "task",
    "adapter",
    "ranks by",
    "perplexity",
    "with end",
    "score",
    "LoRA parameters",
    "share",
    "epoch",
)


def cells(result: Result) -> tuple[str, ...]:
    """One row's texts, in the order of COLUMNS."""
    epoch = "" if result.epoch_seconds is None else f"{result.epoch_seconds:.1f} s"
    return (
        result.task,
        result.adapter or "(base alone)",
        result.method or "",
        f"{result.perplexity:.4f}",
        f"{result.perplexity_with_end:.4f}",
        f"{result.score:.1%} {result.metric}",
        f"{result.parameters:,}" if result.parameters else "",
        f"{result.share:.1%}" if result.parameters else "",
        epoch,
    )


def print_results(results: Sequence[Result]) -> None:
    """Prints the paper's Table 1 for `results`: perplexity, task metric, LoRA parameters, epoch time."""
    table = Table(*COLUMNS, title="Test split, greedy answers; perplexity of the answers' tokens")
    for before, result in zip([None, *results], results, strict=False):
        if before is not None and before.task != result.task:
            table.add_section()
        table.add_row(*cells(result))
    console = Console()
    if console.is_terminal:
        console.print(table)
    else:
        print(markdown(results))


def markdown(results: Sequence[Result]) -> str:
    """The same table in Markdown."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(cells(result)) for result in results]
    return "\n".join(f"| {line} |" for line in lines)
