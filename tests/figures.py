"""The README's result table, episodes and pictures, from runs that happened:

    for s in 0 1 2; do python train_rl.py --name seed$s --seed $s; done
    python train_sft.py                                            # the policy before RL: the same traces, the same seed
    python tests/figures.py runs/seed0 runs/seed1 runs/seed2       # prints, writes .github/curve.svg and .github/episode.png
    python tests/figures.py                                        # only puts the files' line numbers into the README
"""
import json, os, re, statistics, sys, textwrap

from PIL import Image, ImageDraw, ImageFont

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data, model, zoom_rollout


def curve(runs, path, w=720, h=260):
    """Training accuracy by step, with and without zooming: a thin line per seed, and their mean."""
    rows = [[json.loads(line) for line in open(os.path.join(run, "metrics.jsonl"))] for run in runs]
    steps = min(map(len, rows))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" font-family="sans-serif" font-size="12">',
           f'<rect width="{w}" height="{h}" fill="#fff"/>']
    for panel, (key, title, top) in enumerate((("accuracy", "answers right, training", 1.0), ("accuracy_blind", "the same, where it may not zoom (chance 0.25)", 1.0))):
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


def panel(e, label, w=1000, h=300):
    """One episode: the scene with the points it named and the windows it saw, its words, its crops."""
    page = Image.new("RGB", (w, h), "white")
    pen, font, bold = ImageDraw.Draw(page), ImageFont.load_default(14), ImageFont.load_default(17)
    scene, k = e.views[0].source, 280 / e.views[0].source.width
    page.paste(scene.resize((280, 280), Image.LANCZOS), (10, 10))
    pen.text((310, 10), label, "black", bold)
    y, crops = 40, [v for v in e.views if v.box != e.views[0].box]
    for n, t in enumerate(e.turns, 1):
        for line in t.text.split("\n"):
            for part in textwrap.wrap(line, 62) or [""]:
                pen.text((310, y), part, "#222", font)
                y += 17
        y += 8
        if t.crop:
            color = ("#ff8c1a", "#1ac6ff", "#d94cff")[(n - 1) % 3]
            pen.rectangle([10 + v * k for v in t.crop], outline=color, width=3)
            pen.text((14 + t.crop[0] * k, 12 + t.crop[1] * k), str(n), color, bold)
            crop = crops[sum(bool(b.crop) for b in e.turns[:n]) - 1]
            page.paste(crop.source.crop(crop.box).resize((112, 112), Image.NEAREST), (w - 124, 10 + 120 * (n - 1)))
            pen.rectangle((w - 124, 10 + 120 * (n - 1), w - 12, 122 + 120 * (n - 1)), outline=color, width=3)
    return page


def episodes(before, after, path, seed=0):
    """Before and after on one held-out question, sampled with the same numbers: the first with a wrong option before, the right one after."""
    policies = [model.load(folder, quiet=True) for folder in (before, after)]
    for i, sample in enumerate(data.toy("search", "test", 50, f"figure{seed}")):
        pair = [zoom_rollout.rollout(vlm, [sample], seed=i)[0] for vlm in policies]
        said = [next((o for o in sample.options if f"<answer> {o} </answer>" in e.turns[-1].text), None) for e in pair]
        if said[0] not in (None, said[1]) and said[1] == sample.options[sample.answer]:
            break
    print(f"\n{data.prompt(sample)[1]}    (right: {sample.options[sample.answer]})")
    page = Image.new("RGB", (1000, 600))
    for n, (e, label) in enumerate(zip(pair, ("after the warm start", "after RL"))):
        print(f"\n{label}:\n" + "\n[crop]\n".join(t.text for t in e.turns))
        page.paste(panel(e, f"{label}: {sample.question}"), (0, 300 * n))
    page.save(path)


def line_numbers():
    """The README's numbers of lines, and of the lines at which the seven steps begin."""
    text = lambda name: open(os.path.join(ROOT, name), encoding="utf-8").read()
    step = lambda n: next(i for i, line in enumerate(text("train_rl.py").splitlines(), 1) if line.strip().startswith(f"# {n}. "))
    readme = re.sub(r"^(\| `(\w+\.py)` \| [^|]+ \| )\d+ \|$", lambda m: f"{m[1]}{text(m[2]).count(chr(10))} |", text("README.md"), flags=re.M)
    readme = re.sub(r"^((\d)\. \*\*.+?\*\* \(.*?line )\d+\)", lambda m: f"{m[1]}{step(m[2])})", readme, flags=re.M)
    with open(os.path.join(ROOT, "README.md"), "w", encoding="utf-8") as f:
        f.write(readme)


def main():
    line_numbers()
    runs = sys.argv[1:]
    if not runs:
        return
    summaries = [json.load(open(os.path.join(run, "summary.json"))) for run in runs]
    print(f"| | {' | '.join(map(os.path.basename, runs))} | mean | standard deviation |\n|---|{'---|' * (len(runs) + 2)}")
    for key in ("accuracy_before", "accuracy_after", "accuracy_no_zoom", "accuracy_black_crop", "zooms_per_episode", "kl_samp_max", "seconds"):
        values = [s[key] for s in summaries]
        form = "{:.1%}" if key.startswith("acc") else "{:.0f}" if key == "seconds" else "{:.2g}"
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"| `{key}` | {' | '.join(form.format(v) for v in values)} | {form.format(statistics.mean(values))} | {form.format(spread)} |")
    os.makedirs(os.path.join(ROOT, ".github"), exist_ok=True)
    curve(runs, os.path.join(ROOT, ".github", "curve.svg"))
    episodes("runs/sft/checkpoint", os.path.join(runs[0], "checkpoint"), os.path.join(ROOT, ".github", "episode.png"))


if __name__ == "__main__":
    main()
