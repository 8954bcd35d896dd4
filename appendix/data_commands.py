"""The command line of data.py: draw | show | convert.

    python data.py draw search 4 --out scenes
    python data.py show scenes/search.jsonl
    python data.py convert screenspot web.json out.jsonl --images DIR --check
"""
import argparse
import json
import os

import data
from appendix import benchmarks, convert, faults, run
from appendix.files import DataError, check_writable


def main():
    parser = run.Parser(description="Draw, show and convert data.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_draw(commands)
    add_show(commands)
    add_convert(commands)
    args = parser.parse_args()
    if args.command in ("draw", "show") and args.n < 1:
        parser.error(f"n is {args.n}; expected 1 or more")
    args.run(args)


# --------------------------------------------------------------------------------------------------
# draw

def add_draw(commands):
    p = commands.add_parser("draw", help="draw toy samples as PNG and JSONL")
    p.add_argument("task", choices=data.TASKS)
    p.add_argument("n", type=int)
    p.add_argument("--out", default="scenes")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--split", choices=("train", "test"), default="test")
    p.add_argument("--side", type=int, default=data.SIDE)
    p.add_argument("--difficulty", choices=data.DIFFICULTIES, default="medium")
    p.set_defaults(run=draw_rows)


def draw_rows(args):
    out = os.path.join(args.out, f"{args.task}.jsonl")
    check_writable(out)                             # before the work, not after it
    samples = data.toy(args.task, args.split, args.n, args.seed, args.difficulty, args.side)
    data.write_jsonl(out, samples)
    print(f"{args.n} {args.task} samples in {out}")


# --------------------------------------------------------------------------------------------------
# show

def add_show(commands):
    p = commands.add_parser("show", help="print a JSONL file's questions")
    p.add_argument("file")
    p.add_argument("--images", default=None)
    p.add_argument("-n", type=int, default=5)
    p.set_defaults(run=show_rows)


def show_rows(args):
    samples = data.read_jsonl(args.file, args.images)
    print("\n\n".join(data.prompt(samples[0])), "\n")
    for s in samples[:args.n]:
        print(f"{s.id} | {s.answer_type} | {s.question} {s.options or ''} -> {answer_of(s)}")
    print(f"{len(samples)} rows")


def answer_of(s):
    if s.targets:
        return s.targets
    if s.options and s.answer is not None:
        return s.options[s.answer]
    return s.answer


# --------------------------------------------------------------------------------------------------
# convert

def add_convert(commands):
    names = "NAME, and the layout of the coordinates in its files:"
    for name, converter in benchmarks.CONVERTERS.items():
        names += f"\n  {name:20} {converter.layout or 'none'}"
    p = commands.add_parser(
        "convert", help="turn a published file or folder into our JSONL", epilog=names,
        formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("name", choices=benchmarks.CONVERTERS, metavar="NAME")
    p.add_argument("path")
    p.add_argument("out")
    p.add_argument("--images", default=None, help="folder of the image paths; default: of PATH")
    p.add_argument("--only", default="", help="one category: a split, a task, a platform")
    p.add_argument("--files", default="", metavar="PATTERN",
                   help="of a folder PATH: the names of the files to read, such as '*_v2.json'")
    p.add_argument("--skip-missing", action="store_true",
                   help="leave out the rows whose images are not there")
    p.add_argument("--check", action="store_true",
                   help="compare rows, images and boxes with what was published; "
                        "write OUT.gold.jsonl")
    p.set_defaults(run=run_convert)


def run_convert(args):
    source = os.path.realpath(args.path)
    out = os.path.realpath(args.out)
    inside_source = out == source or out.startswith(os.path.join(source, ""))
    if os.path.isdir(out) or inside_source:
        raise DataError(f"{args.out} is a folder, or is part of what is converted; "
                        "expected another file to write")
    check_writable(args.out)
    samples, counts, missing = convert.convert(
        args.name, args.path, args.images, args.skip_missing, args.only, args.files)
    if args.check:
        convert.check(args.name, samples, counts, args.only)
    with run.removed_on_error(args.out + ".tmp"):
        data.write_jsonl(args.out, samples)
    layout = benchmarks.CONVERTERS[args.name].layout or "none"
    message = f"{len(samples)} rows -> {args.out}; coordinates read as {layout}"
    if missing:
        message += f"; {len(missing)} rows left out for want of an image, such as {missing[0]}"
    print(message)
    if args.check:
        write_gold(args.out, samples)


def write_gold(out, samples):
    """The right answers beside the rows, as a file of predictions that evaluate.py can score."""
    path = os.path.splitext(out)[0] + ".gold.jsonl"
    lines = []
    for s in samples:
        if not faults.why_unscorable(s):
            lines.append(json.dumps({"id": s.id, "text": convert.gold_prediction(s)}) + "\n")
    run.write_text(path, "".join(lines))
    print("to see the gold answers scored: "
          f"python evaluate.py --data {out} --predictions {path}")
