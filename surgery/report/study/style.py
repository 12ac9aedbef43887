"""The page's style sheet: light and dark, any width; only boxes of tables, figures and logs scroll sideways."""

from surgery.report.study.colours import COLOURS


def style_sheet() -> str:
    """Return it."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return (
        f":root{{color-scheme:light dark;--tint:#f6f8fa;--good:#116329;{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{--tint:#161b22;--good:#4ac26b;{dark}}}}}{_RULES}"
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:72rem;color:var(--ink);background:var(--surface);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem}
h2{font-size:1.2rem;margin:2.5rem 0 .75rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.25rem 0 .5rem}
p{margin:.5rem 0}
a{color:var(--run)}
.muted{color:var(--muted)}
.verdicts{list-style:none;margin:1rem 0;padding:0}
.verdicts li{margin:.4rem 0;padding:.5rem .75rem;background:var(--tint);border-left:.25rem solid var(--line)}
.verdicts .better{border-color:var(--good)}
.verdicts .worse,.verdicts .idle{border-color:var(--alarm)}
.better b{color:var(--good)}
.worse b,.idle b,.alarm{color:var(--alarm)}
code,pre{font:.85rem/1.45 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace}
.box,pre{overflow-x:auto;max-width:100%}
.box:focus-visible,pre:focus-visible,summary:focus-visible,a:focus-visible{
outline:2px solid var(--run);outline-offset:1px}
table{border-collapse:collapse;font-size:.9rem;overflow-wrap:normal}
th,td{padding:.35rem .75rem .35rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{color:var(--muted);font-weight:600;white-space:nowrap}
tbody th{font-weight:600;min-width:10rem;max-width:22rem;overflow-wrap:anywhere}
td.number,th.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td:last-child{padding-right:0}
figure{margin:1rem 0}
figure svg{display:block;width:100%;min-width:38rem;max-width:54rem;height:auto;stroke-linejoin:round}
figcaption{color:var(--muted);font-size:.9rem}
dl{display:grid;grid-template-columns:minmax(5rem,max-content) minmax(0,1fr);gap:.25rem 1rem;margin:.5rem 0}
dt{color:var(--muted)}
dd{margin:0;min-width:0}
pre{margin:.25rem 0;padding:.6rem .75rem;background:var(--tint);border:1px solid var(--line);border-radius:.3rem}
pre.command{white-space:pre-wrap;user-select:all}
pre.log{max-height:28rem;overflow-y:auto}
details{margin:.25rem 0}
details details{margin-left:1rem}
summary{cursor:pointer;padding:.2rem 0}
details[open]>summary{font-weight:600}
.trial{padding:0 0 .5rem 1rem;border-left:1px solid var(--line)}
@media (max-width:40rem){dl{grid-template-columns:minmax(0,1fr);gap:0}dd{margin-bottom:.4rem}.trial{padding-left:.6rem}
details details{margin-left:.25rem}}
@media print{pre.log{max-height:none}}
""".replace("\n", "")
