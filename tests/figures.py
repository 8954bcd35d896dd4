"""The README's result table and its pictures, from runs that happened:

    for s in 0 1 2; do python train_rl.py --name seed$s --seed $s; done
    python tests/figures.py runs/seed0 runs/seed1 runs/seed2       # prints the table, writes .github/curve.svg and .github/episode.png
"""
import json, os, statistics, sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def curve(runs, path, w=720, h=260):
    """Training accuracy and zooms per episode by step, a thin line per seed and their mean."""
    rows = [[json.loads(line) for line in open(os.path.join(run, "metrics.jsonl"))] for run in runs]
    steps = min(map(len, rows))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" font-family="sans-serif" font-size="12">',
           f'<rect width="{w}" height="{h}" fill="#fff"/>']
    for panel, (key, title, top) in enumerate((("accuracy", "answers right, training", 1.0), ("zooms", "zooms per episode", 3.0))):
        x0, width, y0, height = 40 + panel * 360, 300, 30, h - 60
        X, Y = lambda i: x0 + width * i / max(steps - 1, 1), lambda v: y0 + height * (1 - v / top)
        out.append(f'<text x="{x0}" y="18" font-weight="bold">{title}</text>')
        for tick in range(5):
            v = top * tick / 4
            out.append(f'<path d="M{x0} {Y(v):.1f}h{width}" stroke="#ddd"/><text x="{x0 - 6}" y="{Y(v) + 4:.1f}" text-anchor="end" fill="#666">{v:g}</text>')
        smooth = lambda ys: [statistics.mean(ys[max(0, i - 2):i + 3]) for i in range(len(ys))]
        lines = [smooth([r[key] for r in run[:steps]]) for run in rows]
        for ys, style in [(ys, 'stroke="#9db4f0" stroke-width="1"') for ys in lines] + [([statistics.mean(v) for v in zip(*lines)], 'stroke="#2447c5" stroke-width="2.5"')]:
            out.append(f'<polyline fill="none" {style} points="{" ".join(f"{X(i):.1f},{Y(y):.1f}" for i, y in enumerate(ys))}"/>')
        out.append(f'<text x="{x0}" y="{h - 10}" fill="#666">step 1</text><text x="{x0 + width}" y="{h - 10}" text-anchor="end" fill="#666">step {steps}</text>')
    with open(path, "w") as f:
        f.write("\n".join(out + ["</svg>"]))


def main():
    runs = sys.argv[1:]
    summaries = [json.load(open(os.path.join(run, "summary.json"))) for run in runs]
    print(f"| | {' | '.join(map(os.path.basename, runs))} | mean | standard deviation |\n|---|{'---|' * (len(runs) + 2)}")
    for key in ("accuracy_before", "accuracy_after", "accuracy_no_zoom", "accuracy_black_crop", "zooms_per_episode", "kl_samp_max", "seconds"):
        values = [s[key] for s in summaries]
        form = "{:.1%}" if key.startswith("acc") else "{:.0f}" if key == "seconds" else "{:.2g}"
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"| `{key}` | {' | '.join(form.format(v) for v in values)} | {form.format(statistics.mean(values))} | {form.format(spread)} |")
    os.makedirs(os.path.join(ROOT, ".github"), exist_ok=True)
    curve(runs, os.path.join(ROOT, ".github", "curve.svg"))


if __name__ == "__main__":
    main()
