"""The sections of the page that tell in words and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from rlstab.monitors import Claim, Diagnosis
from rlstab.record import Event, Rollout, Run, numbers
from rlstab.report._chart import Mark
from rlstab.report._explain import SHORT
from rlstab.report._run import known
from rlstab.report._summary import amount, change, summarise, title
from rlstab.report._verdict import verdict

_EVENTS = 200
_SAMPLES = 8
_CHARACTERS = 2_000
_CLASSES = {"better": "better", "worse": "worse", "not clear": "unclear", "": ""}
_GOOD = {"higher": "higher is better", "lower": "lower is better", "none": "neither direction is good in itself"}


def section(heading: str, content: str) -> str:
    """Return a section with its heading; nothing where there is no content."""
    return f"<section>\n<h2>{heading}</h2>\n{content}\n</section>\n" if content else ""


def card(content: str, kind: str = "") -> str:
    """Return content on a card."""
    return f'<div class="card{kind and " " + kind}">{content}</div>'


def folded(summary: str, content: str) -> str:
    """Return content on a card that opens when asked."""
    return card(f"<details><summary>{escape(summary)}</summary>{content}</details>")


def bullets(items: Sequence[str]) -> str:
    """Return sentences as a list on a card; nothing for none."""
    return card(f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>") if items else ""


def verdict_of(run: Run, diagnosis: Diagnosis) -> str:
    """Return what the run came to: its state and cause first, then the outcome, the drift, the agreement, the end."""
    cause = (
        f": {escape(diagnosis.claims[0].title.lower())}" if diagnosis.claims and diagnosis.state != "healthy" else ""
    )
    state = SHORT[diagnosis.state].partition(":")[0]
    lines = [f'<p class="state {diagnosis.state}"><b>{escape(state)}</b>{cause}</p>']
    lines += [f"<p>{escape(line)}</p>" for line in verdict(run)]
    return card("".join(lines), "verdict") + "\n"


def causes(diagnosis: Diagnosis) -> str:
    """Return a card for each cause: evidence, what speaks against it, what would settle it, and what to change."""
    cards = "".join(card(_cause(claim)) for claim in diagnosis.claims)
    unread = sorted({key for keys in diagnosis.unexamined.values() for key in keys})
    note = ""
    if unread:
        names = ", ".join(diagnosis.unexamined)
        note = f'<p class="muted small">Not looked at for want of {escape(", ".join(unread))}: {escape(names)}.</p>'
    return f"{cards}{note}" if cards else ""


def _cause(claim: Claim) -> str:
    evidence = "".join(f"<li>{escape(line)}</li>" for line in claim.evidence)
    against = "".join(f'<li class="against">against: {escape(line)}</li>' for line in claim.against)
    settle = f'<p class="muted">Would settle it: {escape(", ".join(claim.unread))}.</p>' if claim.unread else ""
    edits = "".join(
        f"{escape(edit.key)}: {escape(json.dumps(edit.value))}  # {escape(edit.why)}\n" for edit in claim.edits
    )
    return (
        f"<h3>{escape(claim.title)} <span>{claim.words}, {claim.sure:.0%} of the evidence, from step {claim.since}"
        f"</span></h3><ul>{evidence}{against}</ul>{settle}<p>{escape(claim.remedy)}</p>"
        f"{f'<pre>{edits}</pre>' if edits else ''}"
    )


def timeline(marks: Sequence[Mark]) -> str:
    """Return what the charts mark, as a numbered list."""
    rows = "".join(
        f'<li class="{mark.kind}"><b>{mark.number}</b> <span>step {mark.step}</span> {escape(cut(mark.says, 400))}</li>'
        for mark in marks
    )
    return card(f'<ol class="timeline">{rows}</ol>') if rows else ""


def table(run: Run) -> str:
    """Return the values before and after training."""
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
    return card(f'<div class="scroll"><table>{body}</table></div>{note}')


def _unbroken(number: str) -> str:
    """Let a number break before its error only."""
    return escape(number).replace("± ", "±&nbsp;").replace(" %", "&nbsp;%").replace(" points", "&nbsp;points")


def samples(run: Run) -> str:
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
        card(
            f"<dl><dt>prompt</dt><dd><pre>{escape(cut(prompt))}</pre></dd>"
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
    return f"<dt>{escape(heading)}</dt><dd><pre>{escape(cut(_text(row.fields.get('completion', ''))))}</pre></dd>"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def cut(text: str, most: int = _CHARACTERS) -> str:
    """Return the beginning of a text, and how much of it is left out."""
    return text if len(text) <= most else f"{text[:most]}… [{len(text) - most} more characters]"


def events_of(run: Run) -> str:
    events = run.events.rows
    if not events:
        return ""
    rows = "".join(_event(event, run.times[0]) for event in events[-_EVENTS:])
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("time", "step", "event", "details"))
    note = f'<p class="muted small">The last {_EVENTS} of {len(events)}.</p>' if len(events) > _EVENTS else ""
    return card(f'{note}<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>')


def _event(event: Event, start: float) -> str:
    step = "" if event.step is None else str(event.step)
    details = ", ".join(f"{name}: {_text(value)}" for name, value in event.fields.items())
    return (
        f'<tr><td class="number">+{duration(event.time - start)}</td><td class="number">{step}</td>'
        f'<td>{escape(event.kind)}</td><td class="small"><code>{escape(cut(details))}</code></td></tr>'
    )


def duration(seconds: float) -> str:
    """Return a span of time in its two largest units.

    >>> duration(3725.0)
    '1 h 2 min'
    >>> duration(12.3)
    '12.3 s'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def signals(run: Run) -> str:
    keys = [key for key in run.metrics.keys() if not key.endswith("_se")]  # noqa: SIM118
    keys += [row.key for row in summarise(run) if row.key not in keys]
    if not keys:
        return ""
    entries = "".join(_signal(run, key) for key in sorted(keys))
    return folded(f"{len(keys)} metrics of this run", f'<dl class="signals">{entries}</dl>')


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
