"""The report of a run: one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rlstab.errors import RecordError
from rlstab.record import Event, Rollout, Run, RunFolder, numbers
from rlstab.report._css import STYLE
from rlstab.report._plots import PLOTS, Plot, png
from rlstab.report._run import known
from rlstab.report._style import DARK, LIGHT, Palette
from rlstab.report._summary import amount, change, summarise, title
from rlstab.report._verdict import missing, verdict

_EVENTS = 200
_SAMPLES = 8
_CHARACTERS = 2_000
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_CLASSES = {"better": "better", "worse": "worse", "not clear": "unclear", "": ""}
_GOOD = {"higher": "higher is better", "lower": "lower is better", "none": "neither direction is good in itself"}


def write_report(folder: RunFolder) -> Path:
    """Write the report of a run into its folder.

    The page holds its plots and its style, runs no script and loads nothing, so it opens offline and can be sent on. It
    shows the verdict in words, values before and after, plots, sample completions, events, the configuration, and what
    each metric means; where data are missing it says which and why.

    Args:
        folder: The run.

    Returns:
        Path of the page.

    Raises:
        RecordError: A file cannot be read or written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     write_report(RunFolder.create(f"{place}/run", config_text="seed: 0")).name
        'report.html'
    """
    text = page(Run.of(folder))
    try:
        folder.report.write_text(text, "utf-8")
    except OSError as error:
        raise RecordError(f"cannot write {folder.report}: {error.strerror}") from error
    return folder.report


def page(run: Run) -> str:
    """Return the page of a run."""
    name = escape(run.name)
    sections = (
        _section("Before and after", _table(run)),
        _section("Over the steps", _plots(run)),
        _section("Sample completions", _samples(run)),
        _section("What is missing", _list(missing(run))),
        _section("Events", _events(run)),
        _section("What the metrics mean", _signals(run)),
        _section("Configuration", _folded("config.yaml", f"<pre>{escape(run.config)}</pre>")),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name} · rlstab</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{name}</h1><p class="muted small">{escape(_subtitle(run))}</p></header>\n'
        f"<main>\n{_verdict(run)}{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _subtitle(run: Run) -> str:
    span = f" · {_duration(run.times[-1] - run.times[0])} from the first record to the last" if run.times else ""
    return f"report of a run{span}"


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{heading}</h2>\n{content}\n</section>\n" if content else ""


def _card(content: str, kind: str = "") -> str:
    return f'<div class="card{kind and " " + kind}">{content}</div>'


def _folded(summary: str, content: str) -> str:
    return _card(f"<details><summary>{escape(summary)}</summary>{content}</details>")


def _verdict(run: Run) -> str:
    return _card("".join(f"<p>{escape(line)}</p>" for line in verdict(run)), "verdict") + "\n"


def _list(items: Sequence[str]) -> str:
    return _card(f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>") if items else ""


def _table(run: Run) -> str:
    rows = [
        f'<tr><th scope="row">{escape(title(row))}</th>'
        f'<td class="number">{_unbroken(amount(row.before, row.before_se, row.unit))}</td>'
        f'<td class="number">{_unbroken(amount(row.after, row.after_se, row.unit))}</td>'
        f'<td class="number {_CLASSES[row.judgement]}">{_unbroken(change(row))}'
        f"{f'<br><span class=small>{row.judgement}</span>' if row.judgement else ''}</td></tr>"
        for row in summarise(run)
    ]
    if not rows:
        return ""
    heads = "".join(f'<th scope="col" class="number">{head}</th>' for head in ("before", "after", "change"))
    note = '<p class="muted small">± one standard error, prompts as the unit; “not clear” is within two of them.</p>'
    body = f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return _card(f'<div class="scroll"><table>{body}</table></div>{note}')


def _unbroken(number: str) -> str:
    """Let a number break before its error only."""
    return escape(number).replace("± ", "±&nbsp;").replace(" %", "&nbsp;%").replace(" points", "&nbsp;points")


def _plots(run: Run) -> str:
    cards = [_card(_picture(run, plot)) for plot in PLOTS if plot.possible(run)]
    return f'<div class="plots">{"".join(cards)}</div>' if cards else ""


def _picture(run: Run, plot: Plot) -> str:
    """Return a plot in both palettes, of which the browser takes the one that fits the reader's setting."""
    dark, light = (_data_uri(run, plot, palette) for palette in (DARK, LIGHT))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="Plot of the {escape(plot.shows)}"></picture>'
    )


def _data_uri(run: Run, plot: Plot, palette: Palette) -> str:
    return "data:image/png;base64," + base64.b64encode(png(plot.draw(run, palette))).decode("ascii")


def _samples(run: Run) -> str:
    """Return completions before and after by prompt: those of the evaluations, else of the first and the last step."""
    rows = run.rollouts.rows
    evaluated = [row for row in rows if row.fields.get("phase") in ("before", "after")]
    shown = evaluated or rows
    if not shown:
        return ""
    first, last = shown[0].step, shown[-1].step
    before, after = _of_step(shown, first), _of_step(shown, last) if last != first else {}
    prompts = [prompt for prompt in before if prompt in after]
    prompts += [prompt for prompt in (*before, *after) if prompt not in prompts]
    cards = [
        _card(
            f"<dl><dt>prompt</dt><dd><pre>{escape(_cut(prompt))}</pre></dd>"
            f"{_completion(before.get(prompt))}{_completion(after.get(prompt))}</dl>"
        )
        for prompt in prompts[:_SAMPLES]
    ]
    return f'<div class="samples">{"".join(cards)}</div>'


def _of_step(rows: Sequence[Rollout], step: int) -> dict[str, Rollout]:
    """Return the first completion of every prompt at one step."""
    found: dict[str, Rollout] = {}
    for row in rows:
        if row.step == step:
            found.setdefault(_text(row.fields.get("prompt", "")), row)
    return found


def _completion(row: Rollout | None) -> str:
    if row is None:
        return ""
    rewards = {"reward": row.fields.get("reward"), **numbers(row.fields.get("rewards"))}
    scores = "".join(f" · {name} {value:.3g}" for name, value in rewards.items() if isinstance(value, int | float))
    heading = f"{row.fields.get('phase', 'completion')}, step {row.step}{scores}"
    return f"<dt>{escape(heading)}</dt><dd><pre>{escape(_cut(_text(row.fields.get('completion', ''))))}</pre></dd>"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}… [{len(text) - _CHARACTERS} more characters]"


def _events(run: Run) -> str:
    events = run.events.rows
    if not events:
        return ""
    rows = "".join(_event(event, run.times[0]) for event in events[-_EVENTS:])
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("time", "step", "event", "details"))
    note = f'<p class="muted small">The last {_EVENTS} of {len(events)}.</p>' if len(events) > _EVENTS else ""
    return _card(f'{note}<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>')


def _event(event: Event, start: float) -> str:
    step = "" if event.step is None else str(event.step)
    details = ", ".join(f"{name}: {_text(value)}" for name, value in event.fields.items())
    return (
        f'<tr><td class="number">+{_duration(event.time - start)}</td><td class="number">{step}</td>'
        f'<td>{escape(event.kind)}</td><td class="small"><code>{escape(_cut(details))}</code></td></tr>'
    )


def _duration(seconds: float) -> str:
    """Return a span of time in its two largest units.

    >>> _duration(3725.0)
    '1 h 2 min'
    >>> _duration(12.3)
    '12.3 s'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _signals(run: Run) -> str:
    keys = [key for key in run.metrics.keys() if not key.endswith("_se")]  # noqa: SIM118
    keys += [row.key for row in summarise(run) if row.key not in keys]
    if not keys:
        return ""
    entries = "".join(_signal(run, key) for key in sorted(keys))
    return _folded(f"{len(keys)} metrics of this run", f'<dl class="signals">{entries}</dl>')


def _signal(run: Run, key: str) -> str:
    values = run.metrics.series(key).values
    last = f" · last {values[-1]:.4g}" if len(values) else ""
    entry = known(key)
    if entry is None:
        return f"<dt><code>{escape(key)}</code></dt><dd>a metric of the user's own{last}</dd>"
    formula = f"<code>{escape(entry.formula)}</code><br>" if entry.formula else ""
    cost = "" if entry.cost == "none" else f" · costs {entry.cost}"
    facts = f"unit {entry.unit} · {_GOOD[entry.direction]} · {entry.cadence} · joined by {entry.reduction}{cost}{last}"
    return f"<dt><code>{escape(key)}</code> {escape(entry.meaning)}</dt><dd>{formula}{escape(facts)}</dd>"
