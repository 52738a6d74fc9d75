"""The looks of the report: system fonts, readable in print and without colour."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#dfe4ea;--good:#1d7a46;--bad:#b3261e;--open:#8a6100;
--paper:#fff;--tint:#f5f7f9}
*{box-sizing:border-box}
body{margin:0 auto;max-width:980px;padding:20px 24px 60px;color:var(--ink);background:var(--paper);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
input[name=lang]{position:absolute;opacity:0}
label{display:inline-block;margin:0 4px 0 0;padding:3px 12px;border:1px solid var(--line);
border-radius:14px;color:var(--soft);cursor:pointer;font-size:14px}
#l-es:checked+label,#l-pt:checked+label,#l-en:checked+label{background:var(--ink);color:#fff}
input:focus-visible+label{outline:3px solid #8ab4f8}
main .es,main .pt,main .en{display:none}
#l-es:checked~main .es,#l-pt:checked~main .pt,#l-en:checked~main .en{display:inline}
h1{font-size:30px;line-height:1.2;margin:26px 0 2px}
header p{color:var(--soft);margin:0 0 18px;overflow-wrap:anywhere}
h2{font-size:21px;margin:36px 0 6px;border-top:1px solid var(--line);padding-top:18px}
.verdict{border-radius:10px;padding:14px 22px;border:1px solid var(--line);border-left-width:9px}
.verdict h2{border:0;margin:2px 0 6px;padding:0;font-size:25px}
.verdict.good{border-left-color:var(--good);background:#f1f8f4}
.verdict.bad{border-left-color:var(--bad);background:#fdf2f1}
.verdict.good h2{color:var(--good)}.verdict.bad h2{color:var(--bad)}
.verdict p{margin:5px 0}
.note{padding-left:14px;border-left:3px solid var(--open);color:#5e4300}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;
margin:18px 0 4px}
.figures div{background:var(--tint);border-radius:10px;padding:12px 16px;color:var(--soft)}
.figures b{display:block;font-size:32px;line-height:1.15;color:var(--ink)}
.lead{color:var(--soft);margin:2px 0 12px;max-width:75ch}
.small{color:var(--soft);font-size:14px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:15px;min-width:50%}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--soft)}
.matrix td,.matrix tr:first-child th{text-align:center;padding:4px 8px;min-width:30px}
.matrix tr:first-child th:nth-child(-n+2){text-align:left}
.matrix .name{font-weight:500;color:var(--ink);white-space:nowrap}
.c-in_sum{color:#fff;background:var(--good)}.c-dropped{color:#6d3d00;background:#ffdda8}
.c-declined{color:#7b1c15;background:#f8cfcb}.c-joined_only{color:#4a5463;background:#e4e9ef}
.c-silent{color:#8b95a1}
.legend{display:flex;flex-wrap:wrap;gap:4px 20px;color:var(--soft);font-size:14px}
.key i{display:inline-block;min-width:20px;height:20px;margin-right:7px;border-radius:4px;
text-align:center;font-style:normal;line-height:20px;vertical-align:middle}
.chart{width:100%;height:auto;background:var(--tint);border-radius:10px}
.grid{stroke:var(--line)}.tick{font-size:12px;fill:var(--soft)}
.end{text-anchor:end}.mid{text-anchor:middle}
svg.bar{width:160px;height:14px}svg.bar .back{fill:#e8edf2}svg.bar .fill{fill:#1f5fa8}
svg.bar.over .fill{fill:var(--bad)}
ul{padding-left:22px}li{margin:6px 0}li.no b:first-child{color:var(--bad)}
code{font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;color:var(--soft);overflow-wrap:anywhere}
pre{background:var(--tint);border-radius:10px;padding:14px 18px;overflow-x:auto;
font:13px/1.6 ui-monospace,Menlo,Consolas,monospace}
.tag{display:inline-block;padding:0 10px;border-radius:10px;font-size:13px;font-weight:600;
white-space:nowrap}
.tag.yes{background:#dff1e6;color:var(--good)}.tag.no{background:#f8d7d4;color:var(--bad)}
.tag.open{background:#fbecc8;color:var(--open)}
.questions td:nth-child(2){min-width:230px}
details summary{cursor:pointer;color:var(--open);font-weight:600}
@media print{body{max-width:none;padding:0}label{display:none}section{break-inside:avoid}}
"""
