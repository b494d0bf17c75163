"""The page's CSS: one accent colour, quiet rules, the reader's own fonts."""

CSS = """
:root{color-scheme:light dark;
--paper:#fff;--card:#f7f7f8;--ink:#1b1d22;--muted:#646975;--rule:#e3e5e9;--accent:#3451c7;
--good:#157f4b;--bad:#c62f3b;--warn:#f6f1e4;
--s0:#3451c7;--s1:#c65d0e;--s2:#0f8573;--s3:#a8327f;--s4:#8a6a00;--s5:#5b6b7d;--s6:#b3302f;--s7:#5a3fb0}
@media (prefers-color-scheme:dark){:root{
--paper:#131519;--card:#1b1e24;--ink:#e8eaee;--muted:#9ba1ad;--rule:#2c3038;--accent:#92a7ff;
--good:#4fc58a;--bad:#ff7d84;--warn:#272419;
--s0:#92a7ff;--s1:#ffa35c;--s2:#4fcdb8;--s3:#f08bcb;--s4:#dfbd4f;--s5:#a9b8c9;--s6:#ff8f8b;--s7:#bda8ff}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.6 ui-sans-serif,system-ui,
-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header,main{max-width:66rem;margin:0 auto;padding:0 1.5rem}
header{padding-top:4rem}
main{padding-bottom:6rem}
h1,h2,h3,h4,h5{line-height:1.25;font-weight:600;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h1{font-size:2.1rem;letter-spacing:-.022em}
h2{font-size:1.3rem}
h3,h4{font-size:.95rem}
.shelf h4,.shelf h5{font-size:.8rem;color:var(--muted);font-weight:500;
margin-bottom:.5rem;letter-spacing:0}
.shelf h4 span,.shelf h5 span{margin-left:.5em;font-weight:400}
p{margin:0}
section{margin-top:4rem}
section>h3{margin:2.2rem 0 1rem}
.kicker{color:var(--muted);font-size:.85rem;margin-bottom:.4rem}
.facts{color:var(--muted);margin-top:.5rem;overflow-wrap:anywhere}
.facts span+span::before{content:"·";margin:0 .5em}
.lead{color:var(--muted);font-size:.9rem;margin-top:.3rem;max-width:46rem}
.notes{list-style:none;margin:1.5rem 0 0;padding:.8rem 1.1rem;background:var(--warn);
border-radius:8px;font-size:.9rem;overflow-wrap:anywhere}
.empty{margin-top:1rem}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;
font-size:.9em}
pre{background:var(--card);border-radius:8px;padding:1rem 1.2rem;overflow-x:auto;margin:1rem 0 0}
.hero{display:flex;flex-wrap:wrap;align-items:baseline;gap:0 .6rem;margin:1.4rem 0 1.8rem;
font-variant-numeric:tabular-nums}
.hero b{font-size:3.2rem;line-height:1.1;font-weight:600;letter-spacing:-.03em;color:var(--accent)}
.hero span{font-size:1.4rem;color:var(--muted)}
.hero small{flex-basis:100%;font-size:.95rem;color:var(--muted)}
.scroll{overflow-x:auto;margin-top:1rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.95rem}
th,td{padding:.6rem 1.4rem .6rem 0;border-bottom:1px solid var(--rule);white-space:nowrap;
text-align:right;font-weight:400;vertical-align:baseline}
th:first-child{text-align:left}
td:last-child,th:last-child{padding-right:0}
thead th{color:var(--muted);font-size:.82rem}
th strong,td strong{font-weight:600}
.config td,.config thead th{text-align:left;white-space:normal;
overflow-wrap:anywhere;min-width:8rem}
.config table{font-size:.88rem}
.config th,.config td{padding-top:.38rem;padding-bottom:.38rem}
.config tbody th{color:var(--muted);font-family:ui-monospace,SFMono-Regular,
Menlo,Consolas,monospace;font-size:.92em;width:32%}
.alone{max-width:46rem}
.compared td:last-child{white-space:normal;text-align:left;min-width:15rem}
.compared thead th:last-child{text-align:left}
.differs{color:var(--accent);font-weight:600}
.terms{display:flex;flex-wrap:wrap;gap:.9rem 2.6rem;margin:1.4rem 0 0;font-size:.92rem}
.terms dt{color:var(--muted);font-size:.82rem}
.terms dd{margin:0;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.5rem;list-style:none;padding:0;margin:1rem 0 0;
font-size:.88rem}
.legend li{display:flex;align-items:center;gap:.5rem;overflow-wrap:anywhere}
.swatch{width:28px;height:12px;flex:none}
.key{display:inline-block;min-width:1.35em;padding:0 .3em;margin-right:.55em;border-radius:.7em;
color:var(--paper);font:600 .8em/1.35 inherit;font-style:normal;text-align:center;flex:none}
.legend .key{margin-right:0}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));
gap:2.2rem 3rem;
margin-top:1.4rem}
figure{margin:0;min-width:0;max-width:36rem}
figcaption{display:flex;flex-wrap:wrap;gap:0 .8rem;align-items:baseline;margin-bottom:.5rem}
figcaption small{color:var(--muted);font-size:.8rem}
.plot{display:block;width:100%;height:auto;overflow:visible;stroke-linejoin:round;stroke-linecap:butt}
.task{margin-top:1.4rem;padding-top:1.4rem;border-top:1px solid var(--rule);display:grid;
grid-template-columns:auto 1fr;gap:.1rem 1rem;align-items:baseline}
.score{color:var(--muted);font-size:.9rem}
.score strong{color:var(--ink);font-weight:600}
.shelf{grid-column:1/-1;display:grid;grid-template-columns:minmax(5.5rem,13rem) 1fr;
gap:1.2rem 2.6rem;
margin-top:.9rem}
.cards{list-style:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:.9rem .8rem}
.card{width:3.6rem;font-size:.75rem;line-height:1.45}
.right,.wrong{width:7rem}
.card img{display:block;width:3.5rem;height:3.5rem;object-fit:contain;border-radius:4px;
image-rendering:pixelated;background:var(--card)}
.frame{position:relative;width:max-content;padding:3px;
border:2px solid var(--good);border-radius:8px}
.wrong .frame{border:2px dashed var(--bad)}
.mark{position:absolute;right:-9px;bottom:-9px;width:20px;height:20px;border-radius:50%;
background:var(--good);color:var(--paper);font-size:12px;line-height:20px;text-align:center}
.wrong .mark{background:var(--bad)}
.label{display:flex;align-items:center;gap:.35em;margin-top:.35rem;white-space:nowrap}
.label i{width:.7em;height:.7em;border-radius:50%;flex:none}
.c0{background:#4c78a8}.c1{background:#f58518}.c2{background:#54a24b}.c3{background:#e45756}
.c4{background:#9d6fc4}.c5{background:#b5894f}.c6{background:#e377a2}.c7{background:#8b8f97}
.c8{background:#b8a417}.c9{background:#2fa5b5}
.answer{display:block;white-space:nowrap;font-variant-numeric:tabular-nums}
.answer em{font-style:normal;color:var(--muted);display:inline-block;width:3.5em}
.answer b{font-weight:600}
.answer.before{color:var(--muted)}
:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
@media (max-width:44rem){
header,main{padding-left:1.1rem;padding-right:1.1rem}
header{padding-top:2.2rem}
section{margin-top:3rem}
h1{font-size:1.65rem}
.shelf{grid-template-columns:1fr}
th,td{padding-right:.9rem}
.alone th{white-space:normal}
.task{grid-template-columns:1fr}}
@media print{section{break-inside:avoid-page}body{font-size:12px}}
"""
