"""The live view of a run in a terminal. Needs textual, so only `watch_run` imports this."""

from __future__ import annotations

import time
from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Footer, Static

from rlstab.record import RunFolder
from rlstab.report._explain import COLOURS
from rlstab.report._live_view import Row, Source, View, view

EVERY = 1.0
"""Seconds between two looks at the folder."""


class LiveView(App[None]):
    """Reward, drift, mismatch, entropy, events and samples of a run, while it runs and after."""

    TITLE = "rlstab watch"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("r", "reload", "read again"),
        Binding("space", "pause", "pause"),
    ]
    CSS = """
    Screen { layout: vertical; overflow: hidden; }
    #head { height: 3; padding: 0 1; background: $panel; }
    #signals { height: 8; padding: 0 1; }
    .titled { height: 1fr; padding: 0 1; overflow: hidden; }
    .titled { border-top: solid $primary; border-title-color: $text-muted; }
    #samples { height: 5; }
    """

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self._source = Source(folder)
        self._paused = False
        self._shown: View | None = None

    def compose(self) -> ComposeResult:
        """Lay out the screen."""
        yield Static(id="head", markup=False)
        yield Static(id="signals", markup=False)
        with Vertical(id="events", classes="titled") as events:
            events.border_title = "events"
            yield Static(id="event_lines", markup=False)
        with Vertical(id="samples", classes="titled") as samples:
            samples.border_title = "samples"
            yield Static(id="sample_lines", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        """Show the run, and look at it again every second."""
        self.action_reload()
        self.set_interval(EVERY, self.look)

    def look(self) -> None:
        """Show what has changed; nothing is drawn where nothing has."""
        if not self._paused:
            self._update(force=False)

    def action_reload(self) -> None:
        """Read the folder anew."""
        self._update(force=True)

    def action_pause(self) -> None:
        """Stop following the run, or go on."""
        self._paused = not self._paused
        self.query_one("#events", Vertical).border_title = "events (paused)" if self._paused else "events"

    def on_resize(self) -> None:
        """Fill the new size."""
        self.action_reload()

    def _update(self, *, force: bool) -> None:
        run = self._source.latest(force=force)
        if run is None:
            return
        now = view(run, now=time.time(), width=max(10, self.size.width - 42))
        if now != self._shown:
            self._shown = now
            self._draw(now)

    def _draw(self, now: View) -> None:
        state = Text(now.state, style=COLOURS[now.state])
        head = Text(now.title, style="bold") + Text("\n") + state + Text(f": {now.cause}")
        self.query_one("#head", Static).update(head)
        self.query_one("#signals", Static).update(_signals(now.rows))
        room = max(1, self.query_one("#events", Vertical).size.height)
        self.query_one("#event_lines", Static).update(_lines(now.events[-room:]))
        self.query_one("#sample_lines", Static).update(_lines(now.samples))


def _signals(rows: tuple[Row, ...]) -> Table:
    table = Table.grid(padding=(0, 1))
    for width, style in ((12, "dim"), (10, "bold"), (11, "dim"), (None, "cyan")):
        table.add_column(width=width, style=style, no_wrap=True, overflow="crop")
    for row in rows:
        table.add_row(row.name, Text(row.value, justify="right"), row.unit, row.bars)
    return table


def _lines(lines: tuple[str, ...]) -> Text:
    return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")
