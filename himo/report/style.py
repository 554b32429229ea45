"""The style of the pages: one sheet, light and dark, no font or image from anywhere."""

# Colours of the runs, after the set of Okabe and Ito (Color Universal Design, 2008); darkened for a
# white page and lightened for a dark one until each has a contrast of 4.5 and more, so that it can
# carry text. The first four stay well apart under protanopia, deuteranopia and tritanopia.
LIGHT = {
    "page": "#ffffff",
    "panel": "#f5f6f8",
    "text": "#1b1f26",
    "quiet": "#59626f",
    "rule": "#dfe3e8",
    "grid": "#eceff2",
    "bad": "#b3001e",
    "mark": "#fff3cf",
    "segment": "11, 96, 168",
    "c0": "#0063a8",
    "c1": "#b84a00",
    "c2": "#00755a",
    "c3": "#a13f7d",
    "c4": "#8a6500",
    "c5": "#2479ad",
    "c6": "#5a5f66",
    "c7": "#14181f",
}
COLOURS = 8  # c0 to c7; further runs take them again
DARK = {
    "page": "#13161b",
    "panel": "#1b2027",
    "text": "#e9ecf0",
    "quiet": "#a2acb9",
    "rule": "#303741",
    "grid": "#232932",
    "bad": "#ff7b8a",
    "mark": "#3a3216",
    "segment": "120, 186, 240",
    "c0": "#62b5f0",
    "c1": "#ff9a5c",
    "c2": "#40cda4",
    "c3": "#ea94c8",
    "c4": "#e9bb4f",
    "c5": "#a5dcfa",
    "c6": "#f4f6f8",
    "c7": "#ddd94f",
}

_SHEET = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--text);
font:16px/1.6 -apple-system,BlinkMacSystemFont,"Segoe UI",Roboto,"Helvetica Neue",Arial,
"Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
main,header,footer,.legend>div{max-width:1136px;margin:0 auto;padding:0 28px}
header{padding-top:64px;padding-bottom:20px}
.over{margin:0 0 10px;font-size:13px;letter-spacing:.08em;text-transform:uppercase;
color:var(--quiet)}
h1{margin:0;font-size:40px;line-height:1.15;font-weight:650;letter-spacing:-.02em;
overflow-wrap:anywhere}
h1 .and{color:var(--quiet);font-weight:400}
.lead{max-width:46em;margin:18px 0 0;font-size:18px;line-height:1.6}
.lead b{font-weight:600}
h2{margin:0 0 4px;font-size:24px;line-height:1.3;font-weight:620;letter-spacing:-.01em}
h2+:is(.charts,.scroll){margin-top:26px}
.about{max-width:52em;margin:0 0 28px;color:var(--quiet)}
section{padding:44px 0 8px;border-top:1px solid var(--rule);margin-top:44px}
section:first-child{border-top:0;margin-top:0;padding-top:20px}
code{font:.88em ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;
overflow-wrap:anywhere}
.legend{position:sticky;top:0;z-index:2;background:var(--page);
border-bottom:1px solid var(--rule)}
.legend>div{display:flex;flex-wrap:wrap;gap:4px 26px;padding-top:12px;padding-bottom:12px}
.legend label{display:flex;align-items:center;gap:8px;cursor:pointer;font-size:15px;
overflow-wrap:anywhere}
.legend input{color:inherit;accent-color:currentColor;margin:0;width:15px;height:15px;flex:none}
.sr{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.swatch{display:inline-block;width:18px;height:4px;border-radius:2px;background:currentColor;
vertical-align:middle;margin-right:8px;flex:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));gap:36px 28px;
margin:8px 0 8px}
.tile h3{margin:0;font-size:14px;font-weight:600;line-height:1.4}
.tile p{margin:0 0 8px;font-size:13px;color:var(--quiet);line-height:1.45}
.tile dl{margin:0}
.tile dl>div{display:flex;align-items:baseline;gap:0}
.tile dt{flex:none}
.tile dd{margin:0;font-size:30px;line-height:1.25;font-weight:400;letter-spacing:-.02em}
.tile dd.best{font-weight:680}
.tile dd small{font-size:15px;letter-spacing:0;color:var(--quiet);font-weight:400;margin-left:2px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr));
gap:44px 36px}
.charts.two{grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr))}
.chart{margin:0;min-width:0}
@media(min-width:760px){.chart.wide{grid-column:span 2}}
figcaption{display:flex;flex-wrap:wrap;align-items:baseline;gap:0 8px;margin-bottom:4px}
.chart h3,.growth h3{margin:0;font-size:15px;font-weight:620}
.unit{font-size:13px;color:var(--quiet)}
.ends{margin-left:auto;display:flex;gap:14px;font-size:14px;font-weight:600}
.plot{padding:20px 6px 42px 46px}
.plot svg{display:block;overflow:visible}
.plot svg.lines{overflow:hidden}
.nothing{height:242px;display:flex;align-items:center;justify-content:center;padding:24px;
border:1px dashed var(--rule);border-radius:8px;color:var(--quiet);font-size:14px;
text-align:center}
.nothing p{margin:0;max-width:22em}
svg text{font-size:12px;fill:var(--text)}
svg text.tick{fill:var(--quiet)}
svg text:not(.tick){paint-order:stroke;stroke:var(--page);stroke-width:4px;stroke-linejoin:round}
svg text.value{fill:currentColor;font-weight:600}
svg text.run{fill:currentColor;font-weight:600}
svg .grid{stroke:var(--grid)}
svg .base{stroke:var(--rule)}
svg path{fill:none;stroke:currentColor;vector-effect:non-scaling-stroke;stroke-linejoin:round;
stroke-linecap:round}
svg path.solid{stroke-width:2}svg path.step{stroke-width:1.5}
svg path.faint{stroke-width:1;opacity:.32}
svg path.dashed{stroke-width:1.5;stroke-dasharray:1 4;opacity:.9}
svg path.fall{stroke:var(--bad);stroke-width:9;opacity:.22;stroke-linecap:butt}
svg .bar{fill:currentColor}
svg .dots{fill:currentColor;stroke:var(--page);stroke-width:1.5}
svg .tau{stroke:var(--text);stroke-dasharray:5 4;stroke-width:1}
svg .chosen{stroke:currentColor;stroke-width:1;stroke-dasharray:2 3}
svg .chance line{stroke:var(--page);stroke-width:4}
svg .chance line+line{stroke:var(--text);stroke-width:1.5;stroke-dasharray:4 3}
svg .fallen{fill:var(--bad);stroke:var(--page);stroke-width:1.5}
.rules{pointer-events:none}
svg .hit{fill:transparent}
svg .hit:hover{fill:rgba(128,140,160,.14)}
.note{margin:6px 0 0;font-size:13px;line-height:1.5;color:var(--quiet)}
details{margin-top:6px;font-size:14px}
summary{cursor:pointer;color:var(--quiet);font-size:13px;width:max-content;max-width:100%;
padding:2px 0}
summary:hover{color:var(--text)}
:focus-visible{outline:2px solid var(--c0);outline-offset:3px;border-radius:3px}
.scroll{overflow-x:auto;margin-top:8px}
table{border-collapse:collapse;font-size:14px;line-height:1.45}
th,td{padding:7px 16px 7px 0;text-align:right;border-bottom:1px solid var(--rule);
vertical-align:baseline;white-space:nowrap;font-weight:400}
th:last-child,td:last-child{padding-right:2px}
thead th{color:var(--quiet);font-size:13px}
tbody th,thead th:first-child{text-align:left}
details table{font-size:13px;line-height:1.35}
details th,details td{padding-top:4px;padding-bottom:4px}
table.main{width:100%;font-size:15px;margin-top:26px}
table.main thead tr:not(:last-child)>*{border-bottom:0;padding-bottom:0}
table.main td,table.main tbody th{padding-top:10px;padding-bottom:10px}
table.main td.best{font-weight:680}
table.main th.group{text-align:right;color:var(--text)}
table.settings td,table.settings th{text-align:left;white-space:normal;overflow-wrap:anywhere;
max-width:30em}
table.settings tbody th{white-space:nowrap}
table.settings tr.differs>*{background:var(--mark)}
table.settings tr>:first-child{padding-left:10px}
.warnings{margin:32px 0 0;padding:18px 22px;background:var(--panel);border-radius:10px;
font-size:15px}
.warnings h2{font-size:16px;margin:0 0 6px}
.warnings ul{margin:0;padding-left:1.2em}
.warnings li{overflow-wrap:anywhere}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));
gap:64px 48px}
.growth{min-width:0;display:flex;flex-direction:column}
.growth .scene{display:flex;gap:20px;align-items:flex-start;margin-bottom:14px;flex:1}
.growth .scene img{width:132px;height:auto;border-radius:6px;flex:none;background:var(--panel)}
.growth .scene .noimage{width:132px;height:132px;border-radius:6px;flex:none;display:flex;
align-items:center;justify-content:center;text-align:center;background:var(--panel);
color:var(--quiet);font-size:13px;padding:12px}
.growth .words{min-width:0}
.growth .path{margin:0 0 6px;font-size:13px;color:var(--quiet);overflow-wrap:anywhere}
.growth .caption{margin:0;font-size:15px;line-height:1.75;overflow-wrap:anywhere}
.segment{background:rgba(var(--segment),var(--a));border-radius:3px;padding:2px 4px;
-webkit-box-decoration-break:clone;box-decoration-break:clone}
.segment b{font-size:11px;font-weight:650;margin-right:5px;color:var(--quiet)}
.strip{margin:0;padding:0;list-style:none;font-size:14px;line-height:1.6}
.strip li{display:flex;flex-wrap:wrap;gap:0 12px;align-items:baseline}
.strip .order{white-space:nowrap;letter-spacing:.02em;min-width:0;overflow-x:auto}
.strip .order i{font-style:normal;color:var(--quiet);padding:0 5px}
.strip .order i.fall{color:var(--bad);font-weight:700}
.big .scene{gap:32px;margin-bottom:20px}
.big .scene img{width:auto;max-width:min(100%,420px);max-height:420px}
@media(min-width:641px){.big .scene img{max-width:44%}}
.misses{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:40px}
.miss{display:flex;flex-wrap:wrap;gap:8px 16px;min-width:0;align-content:flex-start}
.miss>p{flex-basis:100%;margin:0;font-size:14px;line-height:1.55;overflow-wrap:anywhere}
.miss>div{width:132px}
.miss img{display:block;max-width:100%;max-height:132px;border-radius:6px;background:var(--panel)}
.miss .noimage{padding:40px 12px;text-align:center;border-radius:6px;background:var(--panel);
color:var(--quiet);font-size:13px}
.miss .said{color:var(--text)}
.miss small{color:var(--quiet);font-size:12px}
.choice{display:flex;flex-wrap:wrap;gap:6px 22px;margin:0 0 32px;padding:0;border:0;font-size:15px}
.choice label{display:flex;gap:8px;align-items:center;cursor:pointer}
.choice input{margin:0;accent-color:var(--c0)}
body:has(#scores-raw:checked) .normalised,body:has(#scores-normalised:checked) .raw{display:none}
footer{padding-top:28px;padding-bottom:64px;margin-top:48px;font-size:14px;color:var(--quiet)}
footer p{margin:0 0 6px;overflow-wrap:anywhere}
@media(max-width:640px){
main,header,footer,.legend>div{padding-left:18px;padding-right:18px}
header{padding-top:36px}
h1{font-size:30px}.lead{font-size:17px}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr));gap:28px 18px}
.tile dd{font-size:26px}
.growth .scene{flex-direction:column;gap:12px}
section{padding-top:34px;margin-top:34px}}
@media print{.legend{position:static}.hit,.choice{display:none}}
"""


def _variables(colours: dict[str, str]) -> str:
    return ":root{" + "".join(f"--{name}:{value};" for name, value in colours.items()) + "}"


def sheet(runs: int) -> str:
    """The sheet of a page that shows `runs` runs."""
    series = "".join(f".s{i}{{color:var(--c{i})}}" for i in range(COLOURS))
    # A run is hidden where its box in the legend is empty; without a script.
    hidden = "".join(
        f"body:has(#show-{i}:not(:checked)) :is(figure,.growth) .run{i}{{display:none}}"
        for i in range(runs)
    )
    # Where the colours come again, the lines are dashed.
    again = "".join(f".run{i}.solid{{stroke-dasharray:7 4}}" for i in range(COLOURS, runs))
    return (
        _variables(LIGHT)
        + f"@media(prefers-color-scheme:dark){{{_variables(DARK)}}}"
        + _SHEET.replace("\n", "")
        + series
        + hidden
        + again
    )
