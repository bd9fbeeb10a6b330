"""What the demo shows: on a terminal with colours and a progress bar, else as plain lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_LINE_CHARACTERS = 72
_PLAIN_STEPS = 5  # lines that tell of the progress where there is no bar
_PLAIN_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Summary:
    """The demo's figures."""

    documents: int
    embedded: int
    unchanged: int
    seconds: float
    bare_docs_per_s: float | None
    p50_ms: float
    p99_ms: float
    searches: int
    recall: float  # at 10, against exact search


class DemoView:
    """Prints the demo's steps."""

    def __init__(self, console: Console | None = None) -> None:
        """``console`` is standard output by default."""
        console = console or Console(highlight=False)
        if not console.is_terminal:
            console = Console(file=console.file, highlight=False, width=_PLAIN_WIDTH)
        self._console = console

    def title(self, data: Path) -> None:
        """Say what begins."""
        self._console.rule("[bold]vecfleet demo")
        self._console.print(
            f"[dim]a fleet on this machine, its data in {escape(str(data))}", soft_wrap=True
        )

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show that something takes its time."""
        if not self._console.is_terminal:
            self._console.print(f"… {what}")
            yield
            return
        with self._console.status(what):
            yield

    def done(self, what: str) -> None:
        """Tell that a step is done."""
        self._console.print(f"[green]✓[/] {escape(what)}")

    @contextmanager
    def ingesting(self, total: int) -> Iterator[Callable[[int, float], None]]:
        """A progress bar; call what it gives with documents done and seconds."""
        if not self._console.is_terminal:
            yield self._plain_progress(total)
            return
        columns = (
            TextColumn("ingesting"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} docs/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task("", total=total, rate="-")

            def show(done: int, seconds: float) -> None:
                rate = f"{done / seconds:,.0f}" if seconds > 0 else "-"
                progress.update(task, completed=done, rate=rate)

            yield show

    def _plain_progress(self, total: int) -> Callable[[int, float], None]:
        said = 0

        def show(done: int, seconds: float) -> None:
            nonlocal said
            step = done * _PLAIN_STEPS // max(1, total)
            if step > said:
                said = step
                self._console.print(f"… ingested {done:,} of {total:,} after {seconds:.1f} s")

        return show

    def answers(self, question: str, hits: Sequence[dict[str, Any]], milliseconds: float) -> None:
        """A question with the passages found for it."""
        self._console.print()
        self._console.print(
            f"[bold cyan]?[/] [bold]{escape(question)}[/]  [dim]{milliseconds:.0f} ms"
        )
        for hit in hits:
            self._passage(hit["score"], hit["id"], hit["text"])

    def _passage(self, score: float, name: str, text: str) -> None:
        self._console.print(f"  [green]{score:.3f}[/]  [bold]{escape(name)}[/]")
        self._console.print(Text(f"         {_first_line(text)}", style="dim"))

    def reranked(self, question: str, method: str, order: Sequence[tuple[str, float]]) -> None:
        """A list that was put in order."""
        self._console.print()
        self._console.print(
            f"[bold cyan]⇅[/] [bold]reranked for: {escape(question)}[/] [dim]{method}"
        )
        for place, (name, score) in enumerate(order, 1):
            self._console.print(f"  {place}.  [green]{score:.3f}[/]  {escape(name)}")
        self._console.print()

    def summary(self, summary: Summary) -> None:
        """The figures."""
        table = Table(title="what it did", show_header=False, title_justify="left")
        table.add_column()
        table.add_column(justify="right")
        table.add_row("documents", f"{summary.documents:,}")
        table.add_row("embedded now", f"{summary.embedded:,}")
        table.add_row("unchanged since an earlier run", f"{summary.unchanged:,}")
        if summary.embedded and summary.bare_docs_per_s:
            rate = summary.embedded / summary.seconds
            table.add_row("documents a second, from producer to index", f"{rate:,.0f}")
            table.add_row("the engine alone, same run", f"{summary.bare_docs_per_s:,.0f}")
            table.add_row("ratio of the two", f"{rate / summary.bare_docs_per_s:.2f}")
        table.add_row(f"search p50 ({summary.searches} over HTTP)", f"{summary.p50_ms:.1f} ms")
        table.add_row("search p99", f"{summary.p99_ms:.1f} ms")
        table.add_row("recall@10 against exact search", f"{summary.recall:.3f}")
        self._console.print(table)

    def end(self, data: Path, collection: str) -> None:
        """Say what is left and what to do with it."""
        shown = escape(str(data))
        self._console.print(
            f"The collection stays in {shown}: run again, and only what changed is embedded.\n"
            f"To go on with it: [bold]vecfleet up --data {shown}[/], and in another terminal\n"
            f"[bold]VECFLEET_DATA={shown} vecfleet search -c {collection} 'a question'[/]",
            soft_wrap=True,
        )


def _first_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LINE_CHARACTERS else line[: _LINE_CHARACTERS - 1] + "…"
