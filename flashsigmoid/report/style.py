"""The style that the pages share, light and dark."""

from __future__ import annotations

from .figures import DARK, LIGHT


def style() -> str:
    """The style sheet, with a variable for the colour of each arm, in light and in dark."""
    light = "".join(f"--arm-{index}:{each};" for index, each in enumerate(LIGHT))
    dark = "".join(f"--arm-{index}:{each};" for index, each in enumerate(DARK))
    return (
        f":root{{color-scheme:light dark;{_LIGHT}{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}{dark}}}}}\n{_CSS}"
    )


_LIGHT = "--page:#fafaf9;--card:#fff;--ink:#1b1f24;--soft:#5a636e;--line:#e1e4e8;--mark:#fff0bd;--warn:#b86e00;"
_DARK = "--page:#14171b;--card:#1c2026;--ink:#e6e8eb;--soft:#a0a9b5;--line:#333a43;--mark:#4b3f12;--warn:#f0b54a;"
_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font-size:16px;line-height:1.55}
body,svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
main{max-width:1120px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:clamp(1.6rem,4.5vw,2.3rem);line-height:1.15;letter-spacing:-.015em;margin:0 0 .8rem}
h2{font-size:1.3rem;margin:3rem 0 1rem}
h3{font-size:1rem;margin:0 0 .5rem;overflow-wrap:anywhere}
.lead{max-width:92ch;margin:0;font-size:1.05rem}
ul.lead{margin-top:.6rem;padding-left:1.2rem}
.lead li{margin:.25rem 0}
aside{margin:1.5rem 0 0;padding:.1rem 1rem;border-left:4px solid var(--warn);background:var(--card)}
aside ul{margin:.6rem 0;padding-left:1.1rem}
article,figure,.scroll{background:var(--card);border:1px solid var(--line);border-radius:10px}
article,figure{padding:1rem 1.1rem;min-width:0}
figure{margin:0 0 1rem}
.cards,.samples,.pair,.panels{display:grid;gap:1rem}
.cards,.samples{grid-template-columns:repeat(auto-fit,minmax(min(100%,15.5rem),1fr))}
.pair{grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr))}
.panels{grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:.5rem}
.attention-maps,.hearing{grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr))}
.cards{margin-top:1.75rem}
.cards article{border-top:5px solid;max-width:38rem}
.value{font-size:2.3rem;font-weight:650;line-height:1.1;margin:.2rem 0 0;font-variant-numeric:tabular-nums}
.unit{margin:0;color:var(--soft);font-size:.88rem}
dl{display:grid;grid-template-columns:auto 1fr;gap:.15rem 1rem;margin:.9rem 0 0;font-size:.92rem}
dt{color:var(--soft)}
dd{margin:0;text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
figcaption{color:var(--soft);font-size:.88rem;max-width:95ch;margin-top:.4rem}
.panel{max-width:34rem}
svg{display:block;width:100%;height:auto}
.missing{color:var(--soft);font-style:italic;margin:.2rem 0}
pre,code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.82rem}
pre{margin:.6rem 0 0;line-height:1.5;max-height:30rem;overflow:auto}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin-bottom:1rem}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.45rem .8rem;border-bottom:1px solid var(--line);vertical-align:top}
th,td{white-space:nowrap}
tbody tr:last-child>*{border-bottom:0}
tbody th{font-weight:500}
.differs>*{background:var(--mark);font-weight:650}
td.wrap{white-space:normal;overflow-wrap:anywhere}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em}
summary{cursor:pointer;padding:.2rem 0 .8rem;color:var(--soft)}
small{color:var(--soft)}
@media (max-width:640px){main{padding:1.5rem .8rem 3rem}article,figure{padding:.8rem .7rem}}
"""
