"""Style sheet of the report: readable from 320 to 2000 pixels, light and dark, printed too."""

from __future__ import annotations

# c0 to c7: things; b0 to b7: ordered bins, early to late. Each set is legible on its own background.
_LIGHT = {
    "paper": "#ffffff", "card": "#f6f7f9", "ink": "#1b1f24", "soft": "#57606a", "rule": "#d9dee4",
    "accent": "#0b57c9", "warn": "#a4262c",
    "c0": "#1f6feb", "c1": "#c2650a", "c2": "#23845a", "c3": "#8250df",
    "c4": "#c93c5a", "c5": "#0e7c8f", "c6": "#7d6b00", "c7": "#6b7280",
    "b0": "#3b0f70", "b1": "#641a80", "b2": "#8c2981", "b3": "#b73779",
    "b4": "#d9486a", "b5": "#e0633f", "b6": "#c77716", "b7": "#a38100",
}  # fmt: skip
_DARK = {
    "paper": "#14181d", "card": "#1d232a", "ink": "#e6e9ed", "soft": "#a3adb8", "rule": "#36404a",
    "accent": "#7db4ff", "warn": "#ff9aa2",
    "c0": "#6cb0ff", "c1": "#f5a94a", "c2": "#5fd0a0", "c3": "#b899f5",
    "c4": "#ff8599", "c5": "#55cfe0", "c6": "#d9c64d", "c7": "#a8b0ba",
    "b0": "#8f7dff", "b1": "#aa8bff", "b2": "#c98be8", "b3": "#e489c8",
    "b4": "#f78ba0", "b5": "#fb9a78", "b6": "#f9b45c", "b7": "#f3d55b",
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


_CLASSES = "".join(
    f".line.{c}{{stroke:var(--{c})}}.area.{c},.dot.{c}{{fill:var(--{c})}}.key.{c}{{background:var(--{c})}}"
    for c in [*(f"c{i}" for i in range(8)), *(f"b{i}" for i in range(8))]
)

STYLE = f"""
:root {{ {_variables(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK)} }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif }}
header, main, footer {{ max-width: 1560px; margin: 0 auto; padding: 0 clamp(12px, 2.5vw, 36px) }}
header {{ display: flex; flex-wrap: wrap; gap: 4px 28px; align-items: baseline; padding-top: 22px }}
h1 {{ font-size: 1.7rem; margin: 0; overflow-wrap: anywhere }}
h2 {{ font-size: 1.25rem; margin: 0 0 12px }}
h3 {{ font-size: 1.05rem; margin: 22px 0 8px; overflow-wrap: anywhere }}
nav {{ display: flex; flex-wrap: wrap; gap: 2px 16px }}
a {{ color: var(--accent) }}
a:focus-visible, summary:focus-visible, .scroll:focus-visible {{ outline: 3px solid var(--accent);
  outline-offset: 2px }}
.skip {{ position: absolute; left: -999px }}
.skip:focus {{ left: 12px; top: 8px; background: var(--paper); padding: 6px 10px; z-index: 1 }}
section {{ margin: 26px 0 }}
section + section {{ border-top: 1px solid var(--rule); padding-top: 22px }}
.summary h2 {{ display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: center; overflow-wrap: anywhere }}
.summary + .summary {{ border-top: 0; padding-top: 0 }}
.status {{ font-size: .85rem; font-weight: 600; padding: 2px 10px; border-radius: 999px;
  border: 1px solid var(--soft); color: var(--soft) }}
.status.finished {{ border-color: var(--c2); color: var(--c2) }}
.status.running {{ border-color: var(--c0); color: var(--c0) }}
.status.stopped {{ border-color: var(--warn); color: var(--warn) }}
.folder {{ margin: -6px 0 10px; color: var(--soft); font-size: .9rem; overflow-wrap: anywhere }}
dl {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 8px; margin: 0 }}
dl div {{ background: var(--card); border-radius: 8px; padding: 8px 12px }}
dt {{ color: var(--soft); font-size: .82rem }}
dd {{ margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums }}
.missing {{ color: var(--warn); margin: 10px 0 0; overflow-wrap: anywhere }}
.charts {{ display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)) }}
figure {{ margin: 0; background: var(--card); border-radius: 10px; padding: 12px 14px; min-width: 0 }}
figcaption {{ font-weight: 600 }}
figcaption span {{ font-weight: 400; color: var(--soft) }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: 0 14px; margin: 2px 0 6px; padding: 0;
  font-size: .84rem; color: var(--soft) }}
.legend b {{ color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums }}
.key {{ display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; flex: none }}
svg {{ display: block; width: 100%; height: auto; overflow: visible }}
svg text {{ font-size: 12.5px; fill: var(--soft); font-family: inherit }}
.line {{ fill: none; stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round }}
.area {{ opacity: .9; stroke: var(--card); stroke-width: .6 }}
.grid {{ stroke: var(--rule); stroke-width: 1 }}
.axis, .tick {{ stroke: var(--soft); stroke-width: 1 }}
.mark {{ stroke-width: 1.4 }}
.mark.continued {{ stroke: var(--ink); stroke-dasharray: 2 4; opacity: .75 }}
.mark.save {{ stroke: var(--warn); stroke-width: 3 }}
.mark.skipped {{ stroke: var(--c3); stroke-width: 3 }}
.marks {{ margin: -4px 0 12px }}
.mark-key {{ display: inline-block; height: 14px; margin-right: 8px; vertical-align: -2px;
  border-left: 2px dashed var(--ink) }}
.mark-key.save {{ height: 8px; border-left: 3px solid var(--warn); vertical-align: 4px }}
.mark-key.skipped {{ height: 8px; border-left: 3px solid var(--c3) }}
.words td, .words th {{ text-align: left; padding-right: 18px }}
.words th, .words td:nth-child(2) {{ white-space: nowrap }}
.words td:last-child {{ overflow-wrap: anywhere; min-width: 24ch; max-width: 90ch }}
.scroll + .scroll {{ margin-top: 18px }}
.sheets {{ display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)) }}
img {{ display: block; max-width: 100%; height: auto; margin-top: 8px; border-radius: 6px; background: #fff }}
.scroll + .sheets {{ margin-top: 18px }}
.note {{ color: var(--soft); font-size: .9rem; max-width: 90ch }}
details {{ margin-top: 6px; font-size: .88rem }}
details.file {{ margin: 10px 0; font-size: 1rem }}
summary {{ cursor: pointer; color: var(--accent) }}
.scroll {{ overflow-x: auto; margin-top: 6px }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }}
caption {{ text-align: left; font-weight: 600; padding-bottom: 4px }}
th, td {{ padding: 3px 12px 3px 0; text-align: right; border-bottom: 1px solid var(--rule); font-weight: 400;
  vertical-align: top }}
thead th {{ color: var(--soft) }}
th:first-child {{ text-align: left }}
td:last-child:not(:nth-child(2)) {{ padding-right: 0 }}
pre {{ margin: 0; font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }}
footer {{ color: var(--soft); font-size: .85rem; padding-bottom: 26px }}
{_CLASSES}
@media print {{ nav, .skip {{ display: none }} figure {{ break-inside: avoid }} }}
"""
