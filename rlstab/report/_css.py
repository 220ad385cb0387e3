"""The style sheet of the report: follows the reader's light or dark setting, and reads well on a phone."""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f6f7f9; --card: #ffffff; --text: #1b1f24; --muted: #5c6570; --line: #e1e5ea;
  --good: #00694e; --bad: #b3261e; --open: #8a5a00; --code: #eef1f4;
  --c0: #0069a8; --c1: #c44e00; --c2: #00795a; --c3: #8a3ffc; --c4: #a6355f; --c5: #6b6b00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0f1216; --card: #171b21; --text: #e8ecf1; --muted: #9aa5b1; --line: #2b323b;
    --good: #4fd1a5; --bad: #ff8a80; --open: #f2c063; --code: #20262e;
    --c0: #62b6f0; --c1: #f0984a; --c2: #35c79a; --c3: #b99cff; --c4: #f28bb0; --c5: #cfcf6a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 70rem; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem; }
p { margin: .4rem 0; }
.muted { color: var(--muted); }
.small { font-size: .875rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.25rem; }
.verdict { margin-top: 1.25rem; }
.verdict p:first-child { margin-top: 0; font-size: 1.2rem; font-weight: 600; line-height: 1.4; }
.verdict p:last-child { margin-bottom: 0; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child > td, tr:last-child > th { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 500; font-size: .875rem; }
tbody th { font-weight: 500; }
td.number, th.number { text-align: right; white-space: nowrap; }
.better { color: var(--good); font-weight: 600; }
.worse { color: var(--bad); font-weight: 600; }
.unclear { color: var(--open); }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.plots .card { padding: .75rem; }
figure { margin: 0; }
figcaption span { color: var(--muted); font-size: .875rem; }
svg.chart { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg.chart:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
.grid { stroke: var(--line); }
.tick { fill: var(--muted); font-size: 12px; }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
.curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.cursor { stroke: var(--muted); }
.bad { fill: var(--bad); font-size: 13px; text-anchor: middle; }
.c0 { stroke: var(--c0); fill: var(--c0); } .c1 { stroke: var(--c1); fill: var(--c1); }
.c2 { stroke: var(--c2); fill: var(--c2); } .c3 { stroke: var(--c3); fill: var(--c3); }
.c4 { stroke: var(--c4); fill: var(--c4); } .c5 { stroke: var(--c5); fill: var(--c5); }
.line text { stroke: none; }
.mark line { stroke: var(--open); stroke-dasharray: 3 3; }
.mark text { fill: var(--open); font-size: 11px; }
.mark.harm line { stroke: var(--bad); } .mark.harm text { fill: var(--bad); }
.mark.cause line { stroke: var(--c3); } .mark.cause text { fill: var(--c3); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .3rem 0; padding: 0; list-style: none; }
.legend { font-size: .875rem; min-height: 1.5em; }
.legend output { font-variant-numeric: tabular-nums; color: var(--muted); }
.legend .at { visibility: hidden; margin-left: auto; color: var(--muted); }
.legend .at.shown { visibility: visible; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .35em; }
.key { border-radius: 2px; background: currentColor; }
.c0 .key { background: var(--c0); } .c1 .key { background: var(--c1); } .c2 .key { background: var(--c2); }
.c3 .key { background: var(--c3); } .c4 .key { background: var(--c4); } .c5 .key { background: var(--c5); }
.state b { text-transform: uppercase; letter-spacing: .04em; }
.state.healthy b { color: var(--good); } .state.warning b { color: var(--open); }
.state.collapsed b { color: var(--bad); }
h3 { margin: 0 0 .5rem; font-size: 1.05rem; }
h3 span { font-weight: 400; font-size: .875rem; color: var(--muted); }
.against { color: var(--open); }
section > .card + .card, .card + .plots { margin-top: 1rem; }
.other { margin-top: 3rem; border-top: 2px solid var(--line); }
.timeline { margin: 0; padding: 0; list-style: none; }
.timeline li { padding: .2rem 0; }
.timeline b { display: inline-block; min-width: 1.6em; color: var(--open); }
.timeline .harm b { color: var(--bad); } .timeline .cause b { color: var(--c3); }
.timeline span { color: var(--muted); font-size: .875rem; }
.samples { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.samples dl { margin: 0; }
dt { margin-top: .6rem; font-size: .875rem; color: var(--muted); }
.samples dt:first-child, .signals dt:first-child { margin-top: 0; }
dd { margin: 0; }
pre, code { font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
pre {
  margin: .15rem 0; padding: .5rem .65rem; max-height: 24rem; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--code); border-radius: 6px;
}
details > summary { cursor: pointer; font-weight: 500; }
details[open] > summary { margin-bottom: .75rem; }
.signals dt { font-size: 1rem; color: var(--text); }
.signals dd { font-size: .875rem; color: var(--muted); padding-bottom: .5rem; border-bottom: 1px solid var(--line); }
.signals dd:last-child { border-bottom: 0; padding-bottom: 0; }
ul { margin: 0; padding-left: 1.2rem; }
@media (max-width: 40rem) {
  body { padding: 1.25rem .75rem 3rem; }
  .card { padding: .85rem .9rem; }
  .plots .card { padding: .6rem; }
  th, td { padding: .45rem .3rem; }
  td.number { white-space: normal; }
  .tick { font-size: 19px; }
  .mark text { font-size: 17px; }
  .curve { stroke-width: 2.4; }
}
"""
